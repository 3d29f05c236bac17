"""On a GPU: decoding by a CUDA graph, behind a static cache, gives the text of a cache that grows, for every student that it serves."""

import pytest
import torch

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, StudentForCausalLM
from distill_model.cache import StaticCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
STATIC = [name for name, student in STUDENT_ATTENTION_MAP.items() if student.func.CONSTANT_STATE]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["teacher", *STATIC])
def test_a_graph_decodes_what_single_kernels_do(name, dtype):
    config = StudentConfig(vocab_size=96, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                           num_hidden_layers=3, attention_bias=True, qk_norm=True, initializer_range=0.1)  # fmt: skip
    torch.manual_seed(0)
    model = StudentForCausalLM(config)
    if name != "teacher":
        model = StudentForCausalLM.from_teacher(model, name, [1])[0]
    model = model.to("cuda", dtype).eval()
    ids, mask = torch.randint(1, 96, (3, 60), device="cuda"), torch.ones(3, 60, dtype=torch.long, device="cuda")
    mask[0, :17] = 0
    growing, static = None, StaticCache(config if name == "teacher" else model.config, 60)
    for first, last in ((0, 40), *((at, at + 1) for at in range(40, 60))):
        out = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=growing, use_cache=True)
        growing = out.past_key_values
        ours = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=static).logits
        error = (ours[:, -1] - out.logits[:, -1]).norm() / out.logits[:, -1].norm()
        assert error < {torch.float32: 1e-3, torch.bfloat16: 3e-2}[dtype], (last, error)
    assert static.graph is not None
    for num_beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
        if dtype == torch.float32:
            assert torch.equal(model.generate(ids, **options), model.generate(ids, cache_implementation="static", **options))


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("split", [False, True])
def test_a_gpu_that_is_not_the_current_one(split):
    """The whole model, decoded by a graph; or the last layers, as device_map="auto" lays them, decoded without."""
    config = StudentConfig(vocab_size=96, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                           num_hidden_layers=3, initializer_range=0.1)  # fmt: skip
    torch.manual_seed(0)
    model = StudentForCausalLM.from_teacher(StudentForCausalLM(config), "gdn_v4", [2])[0].to("cuda:1").eval()
    ids = torch.randint(1, 96, (2, 20), device="cuda:1")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected = model.generate(ids, **options).sequences
    if split:
        from accelerate import dispatch_model

        places = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
        model = dispatch_model(model, {"model.embeddings": 0, "model.rotary_emb": 0} | places, main_device=0)
        ids = ids.to("cuda:0")
    out = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(out.sequences.cpu(), expected.cpu()) and (out.past_key_values.graph is None) == split

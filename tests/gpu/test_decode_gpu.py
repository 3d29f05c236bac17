"""On a GPU: decoding by a CUDA graph with a static cache gives the same text as with a growing
cache, for every student that supports it; how few kernels a token takes; and that joined weights
are stored once."""

import copy

import pytest
import torch
from test_decode_step import LowRank

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, StudentForCausalLM
from distill_model.cache import StaticCache, state_tensors
from distill_model.decode_step import GraphedDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STATIC = [name for name, student in STUDENT_ATTENTION_MAP.items() if student.supports_static_cache]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["teacher", *STATIC])
def test_a_graph_decodes_the_same_as_single_kernels(name, dtype):
    config = StudentConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
        attention_bias=True,
        qk_norm=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = StudentForCausalLM(config)
    if name != "teacher":
        model = StudentForCausalLM.from_teacher(model, name, [1])[0]
    model = model.to("cuda", dtype).eval()
    ids = torch.randint(1, 96, (3, 60), device="cuda")
    mask = torch.ones(3, 60, dtype=torch.long, device="cuda")
    mask[0, :17] = 0
    exact = copy.deepcopy(model).float()(ids, attention_mask=mask).logits
    growing = None
    static = StaticCache(config if name == "teacher" else model.config, 60)
    errors = []
    for first, last in ((0, 40), *((at, at + 1) for at in range(40, 60))):
        out = model(
            ids[:, first:last],
            attention_mask=mask[:, :last],
            past_key_values=growing,
            use_cache=True,
        )
        growing = out.past_key_values
        ours = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=static).logits
        expected = exact[:, last - 1]
        differences = [logits[:, -1] - expected for logits in (ours, out.logits)]
        errors.append([(x.norm() / expected.norm()).item() for x in differences])
    ours, theirs = (
        sum(each) / len(each) for each in zip(*errors)
    )  # the mean, because the maximum of rounding errors is random
    # fp32: the kernels of a prompt multiply in TF32.
    assert ours < max(1.3 * theirs, 1e-3 if dtype == torch.float32 else 0), (ours, theirs)
    assert static.decoding.graph is not None
    for num_beams in (1, 3):
        options = {
            "attention_mask": mask,
            "max_new_tokens": 12,
            "do_sample": False,
            "num_beams": num_beams,
            "pad_token_id": 0,
        }
        if dtype == torch.float32:
            assert torch.equal(
                model.generate(ids, **options),
                model.generate(ids, cache_implementation="static", **options),
            )


def deep(name, layers, hidden_size=1024):
    """A model in bf16 with the last layer kept, and its static cache after 20 tokens of two
    sequences."""
    config = StudentConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        head_dim=128,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model = StudentForCausalLM(config)
    if name != "teacher":
        model = StudentForCausalLM.from_teacher(model, name, [layers - 1])[0]
    model, cache = model.to("cuda", torch.bfloat16).eval(), StaticCache(model.config, 40)
    model(torch.randint(1, 96, (2, 20), device="cuda"), past_key_values=cache)
    return model, cache


@torch.no_grad()
@pytest.mark.parametrize("name, most", [("teacher", 10), *((f"gdn_v{i}", 10 if i == 5 else 8) for i in range(1, 9))])
def test_kernels_of_a_layer(name, most):
    """The difference between six layers and two, allowing three more for reductions that cuBLAS
    runs as separate kernels."""
    counts = []
    for layers in (2, 6):
        model, cache = deep(name, layers)
        token = torch.ones(2, 1, dtype=torch.long, device="cuda")
        model(token, past_key_values=cache)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(token, past_key_values=cache)
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profile.events()))
    assert counts[0] > 10 and (counts[1] - counts[0]) / 4 <= most + 3, counts


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher", "gdn_v7"])
def test_weights_are_stored_once(name):
    """In no more memory than before, except for the graph's and cuBLAS's. The graph reads what an
    optimiser writes to them."""
    model, cache = deep(name, 8, 2048)
    size = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    token = torch.ones(2, 1, dtype=torch.long, device="cuda")
    model(token, past_key_values=cache)
    assert torch.cuda.memory_allocated() - before < size / 3
    attn = model.model.layers[0].attn
    assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.v_proj.weight.untyped_storage().data_ptr()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    states = [x for layer in cache.layers for x in state_tensors(layer.state)]
    held = [x.clone() for x in states]
    logits = model(token, past_key_values=cache).logits
    for place, value in zip(states, held):
        place.copy_(value)
    cache.decoding.last -= 1
    GraphedDecoder(model, cache).run()  # without the graph
    assert (logits - cache.decoding.logits).norm() < 0.01 * logits.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher", "gdn_v7", "gdn_v5"])
def test_adapters_and_hooks_are_decoded(name):
    """Modified parts run as their modules, in the same graph."""
    model, _ = deep(name, 4, 256)
    layers = model.model.layers
    layers[0].attn.q_proj, layers[1].mlp.down_proj = (
        LowRank(m).to("cuda", torch.bfloat16) for m in (layers[0].attn.q_proj, layers[1].mlp.down_proj)
    )
    layers[2].register_forward_hook(lambda *args: 2 * args[2])
    ids = torch.randint(1, 96, (2, 30), device="cuda")
    cache = StaticCache(model.config, 40)
    exact = copy.deepcopy(model).float()(ids).logits
    model(ids[:, :20], past_key_values=cache)
    for at in range(20, 30):
        logits = model(ids[:, at, None], past_key_values=cache).logits[:, 0]
        assert (logits - exact[:, at]).norm() < 0.05 * exact[:, at].norm()
    assert cache.decoding.graph is not None


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("split", [False, True])
def test_a_gpu_that_is_not_the_current_one(split):
    """The whole model, decoded by a graph; or only the last layers, as with device_map="auto",
    decoded without a graph."""
    config = StudentConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = StudentForCausalLM.from_teacher(StudentForCausalLM(config), "gdn_v4", [2])[0].to("cuda:1").eval()
    ids = torch.randint(1, 96, (2, 20), device="cuda:1")
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, **options).sequences
    if split:
        from accelerate import dispatch_model

        places = {
            "model.layers.0": 0,
            "model.layers.1": 1,
            "model.layers.2": 1,
            "model.norm": 1,
            "lm_head": 1,
        }
        model = dispatch_model(model, {"model.embeddings": 0, "model.rotary_emb": 0} | places, main_device=0)
        ids = ids.to("cuda:0")
    out = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(out.sequences.cpu(), expected.cpu())
    assert (out.past_key_values.decoding.graph is None) == split

"""On a GPU with FP8 tensor cores: the kernels of FP8 against PyTorch's casts, an MLP and a teacher
against float64 and bf16, a CUDA graph of them, and stages 1 and 2 with an FP8 teacher."""

import copy
import json

import pytest
import test_train_gpu
import torch
import torch.nn.functional as F
from conftest import random_teacher, save_tokenizer

import stages
from convert import load_teacher
from cuda_graphs import EAGER_CALLS, GraphedForward
from distill_model import StudentConfig, StudentForCausalLM, fp8
from distill_model.fp8 import CAPABILITY, Fp8SwiGLU, kl_of, quantize_mlps, quantize_rows, quantize_swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY,
        reason="needs a GPU with FP8 tensor cores",
    ),
]


@pytest.mark.parametrize("rows, size", [(1, 16), (7, 1536), (33, 8960), (3, 18944)])
def test_kernels_agree_with_casts(rows, size):
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 3, rows, device="cuda")[:, None]
    x = (torch.randn(rows, size, device="cuda") * sizes).bfloat16()
    gate_up = torch.randn(rows, 2 * size, device="cuda").mul(3).bfloat16()
    gate, up = gate_up.float().chunk(2, 1)
    for (found, scales), values in ((quantize_rows(x), x), (quantize_swiglu(gate_up), F.silu(gate) * up)):
        expected, expected_scales = fp8._quantize(values)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
        # The last bits of a quotient or an exponential decide a rounding now and then.
        assert (found.float() != expected.float()).float().mean() < 2e-3


def teacher():
    config = StudentConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        keep_full_attention_layers=[0, 1, 2, 3],
    )
    torch.manual_seed(0)
    return StudentForCausalLM._from_config(config, dtype=torch.bfloat16).cuda().eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 77, 1024])
def test_mlp_against_float64(rows):
    mlp = teacher().model.layers[0].mlp
    x = torch.randn(1, rows, 512, device="cuda").bfloat16()
    exact = copy.deepcopy(mlp).double()(x.double())
    # Each value of e4m3 is off by up to 1/16, 1/40 in the root mean square, in both factors of two GEMMs in a row.
    assert ((Fp8SwiGLU(mlp)(x).double() - exact).norm() / exact.norm()).item() < 0.08


def test_kl_and_cuda_graph():
    model = teacher()
    batches = torch.randint(0, 512, (EAGER_CALLS + 3, 2, 193), device="cuda")
    kl = kl_of(quantize_mlps, model, [{"input_ids": ids} for ids in batches])
    assert 0 < kl < stages.FP8_MAX_KL
    expected = [model.model(ids, use_cache=False).last_hidden_state for ids in batches]
    graphed = GraphedForward(model.model)
    for ids, hidden in zip(batches, expected):
        assert torch.equal(graphed(input_ids=ids, use_cache=False)["last_hidden_state"], hidden)
    assert graphed.forward_graph is not None


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_train(tmp_path, data_dir, stage, cuda_graphs):
    """Against the same stage with the exact teacher, from the same student."""
    teacher_dir = str(tmp_path / "teacher")
    random_teacher(teacher_dir, "qwen3", initializer_range=0.1)  # of usual weights; FP8 changes larger ones more
    save_tokenizer(teacher_dir)
    changes = {"cuda_graphs": cuda_graphs, "document_mask": False}
    if stage == 2:
        student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0]
        student.save_pretrained(tmp_path / "student")
        changes["student_init_ckpt"] = str(tmp_path / "student")
    files = {}
    for precision in ("exact", "fp8"):
        files[precision] = test_train_gpu.configs(tmp_path / precision, teacher_dir, data_dir, stage, **changes)
    runs = [test_train_gpu.start(file, f"teacher_model.precision={precision}") for precision, file in files.items()]
    for run, file in zip(runs, files.values()):
        test_train_gpu.finish(run, file)
    exact, quantized = (test_train_gpu.losses(tmp_path / precision / f"stage{stage}") for precision in files)
    assert len(quantized) == test_train_gpu.STEPS
    assert quantized[-6:].mean() < 0.9 * quantized[:6].mean()
    assert not torch.equal(quantized, exact)
    torch.testing.assert_close(quantized, exact, rtol=0.1, atol=1e-3)
    found = json.loads((tmp_path / "fp8" / f"stage{stage}" / "teacher_precision.json").read_text())
    assert 0 < found["kl"] <= stages.FP8_MAX_KL

"""On a GPU: the students through FLA's Triton kernels against the same weights through the plain stand-ins."""

import fla.layers.gated_deltanet as gated_deltanet
import fla.modules.norm.fused_norm_gate as fused_norm_gate
import fla.modules.norm.layernorm as layernorm
import pytest
import torch

from distill_model import StudentConfig, cpu_ops, get_student_attention_class

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CONFIG = StudentConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=1,
                       student_name="gdn_v4")  # fmt: skip


def output_and_gradients(layer, x, cotangent):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x)[0].backward(cotangent)
    output = layer(x)[0].detach()
    return {"output": output, "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def error(got, expected):
    """Relative to the size of the tensor, or to a thousandth a number where that is less: some gradients are 0."""
    got, expected = got.float(), expected.float()
    return ((got - expected).norm() / (expected.norm() + 1e-3 * expected.numel() ** 0.5)).item()


# The kernels multiply fp32 as TF32. The decay's gradient is a difference of large sums, which costs it two digits.
DECAY = {"A_log", "dt_bias", "a_proj.weight"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize("name", ["gdn_v1", "gdn_v2", "gdn_v3", "gdn_v4"])
def test_kernels_equal_stand_ins(monkeypatch, name, length, dtype, tolerance):
    torch.manual_seed(0)
    layer = get_student_attention_class(name)(CONFIG, 0).cuda().train()
    layer.init_fresh()
    if layer.use_gate:
        torch.nn.init.normal_(layer.g_proj.weight, std=0.05)
    layer.to(dtype)
    x, cotangent = (torch.randn(2, length, 256, device="cuda", dtype=dtype) for _ in range(2))
    kernels = output_and_gradients(layer, x, cotangent)
    monkeypatch.setattr(gated_deltanet, "chunk_gated_delta_rule", cpu_ops.delta_rule)
    monkeypatch.setattr(gated_deltanet, "causal_conv1d", cpu_ops.causal_conv1d)
    monkeypatch.setattr(fused_norm_gate, "rms_norm_gated", cpu_ops.rms_norm_gated)
    monkeypatch.setattr(layernorm, "rms_norm", cpu_ops.rms_norm)
    plain = output_and_gradients(layer, x, cotangent)
    for key in plain:
        if length == 1 and key in DECAY:
            continue  # one token has nothing to forget: the gradient is 0, and the kernels' is noise
        limit = 4 * tolerance if key in DECAY else tolerance
        assert error(kernels[key], plain[key]) < limit, key

"""On a GPU: the students through FLA's Triton kernels against the same weights through the plain stand-ins."""

import fla.layers.gated_deltanet as gated_deltanet
import fla.modules.norm.fused_norm_gate as fused_norm_gate
import fla.modules.norm.layernorm as layernorm
import pytest
import torch

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, cpu_ops, get_student_attention_class

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CONFIG = StudentConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=1,
                       student_name="gdn_v4")  # fmt: skip


def output_and_gradients(layer, x, cotangent):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x)[0].backward(cotangent)
    output = layer(x)[0].detach()
    return {"output": output, "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("length", [1, 63, 130, 512])
@pytest.mark.parametrize("name", STUDENT_ATTENTION_MAP)
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
    errors = {key: ((kernels[key] - plain[key]).float().norm() / plain[key].float().norm().clamp(min=1e-6)).item() for key in plain}
    assert max(errors.values()) < tolerance, errors

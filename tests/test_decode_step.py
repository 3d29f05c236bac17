"""One token of all layers: each kernel's plain twin against a formula in float64 (the kernels themselves in test_losses.py's interpreter),
and whole models against their full forward, whatever part of them is not plain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_model import StudentConfig, get_student_attention_class
from distill_model.decode_step import gated_delta_token, joined, place_token, swiglu_rows

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
GDN = [
    ("gdn_v1", 24, {"conv_size": 3, "conv_bias": True}),
    ("gdn_v2", 9, {}),
    ("gdn_v3", 33, {"allow_neg_eigval": True}),
    ("gdn_v4", 192, {}),
    ("gdn_v5", 16, {}),
    ("gdn_v6", 20, {}),
    ("gdn_v7", 20, {"conv_bias": True, "conv_size": 5}),
    ("gdn_v7", 34, {"allow_neg_eigval": True}),
    ("gdn_v8", 40, {"conv_size": 1}),
]
PLACES = [(6, 2, 20, True), (3, 3, 8, False), (7, 1, 80, True)]  # heads, kv heads, their size, norms


def near(ours, theirs, limit):
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs).norm() / theirs.norm()
    assert error < limit, error


def rows(dtype, batch, *widths, device="cpu"):
    """Parts of the rows of one matrix, as a product of several maps leaves them."""
    return torch.randn(batch, sum(widths) + 3, device=device).to(dtype)[:, 3:].split(widths, -1)


def angles(dtype, batch, size, device="cpu"):
    turn = 10 * torch.rand(batch, size // 2, device=device)
    return [x.repeat(1, 2).to(dtype) for x in (turn.cos(), turn.sin())]


def turned(x, cos, sin):
    """RoPE as a product of complex numbers; x [heads, size], cos and sin [size]."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:]) * torch.complex(cos, sin)[:half]
    return torch.cat((z.real, z.imag), -1)


def gated_delta_naively(q, k, v, gate, a, b, attn, name, state, past, cos, sin):
    """S <- alpha S (I - beta k k^T) + beta v k^T, o = S q / sqrt(size), a head after the other in float64, with what each name means."""
    double = [x.double() for x in (q, k, v)]
    if past is not None:
        past = [torch.cat((held[..., 1:].double(), new[..., None]), -1) for held, new in zip(past, double)]
        for i, (held, convolution) in enumerate(zip(past, (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d))):
            double[i] = (held * convolution.weight.double()[:, 0]).sum(-1)
            if convolution.bias is not None:
                double[i] += convolution.bias.double()
    heads, size = state.shape[1:3]
    out, state = torch.empty(len(q), heads, size, dtype=torch.float64, device=q.device), state.double()
    for row in range(len(q)):
        q, k, v = (x[row].view(heads, size) for x in double)
        if name != "gdn_v6":
            q, k = q * q.sigmoid(), k * k.sigmoid()
        if name not in ("gdn_v6", "gdn_v7"):
            v = v * v.sigmoid()
        if name == "gdn_v7":
            c, s = cos[row].double(), sin[row].double()
            for channel in range(size):
                if channel % (size // 2) >= 0.25 * (size // 2):
                    c[channel], s[channel] = 1, 0
            q, k = turned(q, c, s), turned(k, c, s)
        for head in range(heads):
            query, key = (x[head] / (x[head] @ x[head] + 1e-6).sqrt() for x in (q, k))
            alpha = (-attn.A_log[head].double().exp() * (1 + (a[row, head].double() + attn.dt_bias[head].double()).exp()).log()).exp()
            beta = b[row, head].double().sigmoid() * (2 if attn.allow_neg_eigval else 1)
            kept = torch.eye(size, device=key.device) - beta * torch.outer(key, key)
            state[row, head] = alpha * state[row, head] @ kept + beta * torch.outer(v[head], key)
            o = state[row, head] @ query / size**0.5
            if name != "gdn_v6":
                o = o / ((o * o).mean() + attn.o_norm.eps).sqrt() * attn.o_norm.weight.double()
            if gate is not None:
                g = gate[row].view(heads, size)[head].double()
                o = o * g.sigmoid() * (g if name == "gdn_v8" else 1)
            out[row, head] = o
    return out.flatten(1), state, past


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name, size, options", GDN)
def test_gated_delta_token(name, size, options, dtype, device="cpu"):
    torch.manual_seed(0)
    heads, batch = 3, 2
    config = StudentConfig(hidden_size=20, num_attention_heads=heads, num_key_value_heads=1, head_dim=size, attention_bias=True,
                           num_hidden_layers=1, keep_full_attention_layers=[], student_name=name)  # fmt: skip
    attn = get_student_attention_class(name)(config, 0, **options).to(dtype).to(device)
    for parameter in attn.parameters():
        parameter.copy_(torch.randn_like(parameter))
    q, k, v, gate, a, b = rows(dtype, batch, *[heads * size] * 4, heads, heads, device=device)
    gate = gate if attn.use_gate else None
    state, past = torch.randn(batch, heads, size, size, device=device), None
    if attn.use_short_conv:
        past = tuple(torch.randn(batch, heads * size, attn.conv_size, device=device).to(dtype) for _ in range(3))
    inputs = q, k, v, gate, a, b, attn
    cos_sin = angles(dtype, batch, size, device) if size % 2 == 0 else [torch.empty(batch, size, device=device).to(dtype)] * 2
    expected, new_state, new_past = gated_delta_naively(*inputs, name, state, past, *cos_sin)
    out = gated_delta_token(*inputs, state, past, *cos_sin)
    assert out.dtype == dtype
    near(out, expected, LIMITS[dtype])
    near(state, new_state, 2e-5)
    for ours, theirs in zip(past or (), new_past or ()):
        assert torch.equal(ours.double(), theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("heads, kv_heads, size, normed", PLACES)
def test_place_token(heads, kv_heads, size, normed, dtype, device="cpu"):
    torch.manual_seed(0)
    q, k, v = rows(dtype, 2, heads * size, kv_heads * size, kv_heads * size, device=device)
    cos, sin = angles(dtype, 2, size, device)
    norms = [nn.RMSNorm(size, eps=0.1).to(device, dtype) for _ in range(2)] if normed else [nn.Identity()] * 2
    buffers = torch.randn(2, 2, 9, kv_heads, size, device=device).to(dtype)
    before, expected = buffers.clone(), []
    for x, norm in zip((q, k), norms):
        if normed:
            norm.weight.copy_(torch.randn(size))
        x = x.double().unflatten(-1, (-1, size))
        x = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double() if normed else x
        expected.append(torch.stack([turned(*row) for row in zip(x, cos.double(), sin.double())]))
    out = place_token(q, k, v, *norms, cos, sin, *buffers, torch.tensor([5], device=device))
    assert out.dtype == dtype
    near(out, expected[0][:, None], LIMITS[dtype])
    near(buffers[0][:, 5], expected[1], LIMITS[dtype])
    assert torch.equal(buffers[1][:, 5], v.view(2, kv_heads, size))
    others = [i for i in range(9) if i != 5]
    assert torch.equal(buffers[:, :, others], before[:, :, others])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("batch, size", [(1, 7), (3, 1030)])
def test_swiglu_rows(batch, size, dtype, device="cpu"):
    gate, up = rows(dtype, batch, size, size, device=device)
    out = swiglu_rows(gate, up)
    assert out.is_contiguous() and out.dtype == dtype
    near(out, F.silu(gate.double()) * up.double(), LIMITS[dtype])

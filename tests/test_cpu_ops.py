"""The CPU stand-ins against token-by-token recurrences in float64, written independently: outputs
and gradients."""

import pytest
import torch
import torch.nn.functional as F

from distill_model import cpu_ops

B, T, H, HV, K, V = 2, 75, 2, 4, 8, 12


def delta_reference(q, k, v, g, beta, state):
    """Gated delta rule; g [B, T, HV] or, per channel, [B, T, HV, K]; state [B, HV, K, V]."""
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * K**-0.5)
    return torch.stack(outputs, 1), state


def gla_reference(q, k, v, g, state, scale=K**-0.5, gate_values=False):
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        decay = decay[..., None, :] if gate_values else decay[..., None]
        state = state * decay + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * scale)
    return torch.stack(outputs, 1), state


def gsa_reference(q, k, v, s, g):
    slots = s.shape[-1]
    ok, hk = gla_reference(q, k, s, g, q.new_zeros(B, HV, K, slots), gate_values=True)
    ov, hv = gla_reference(ok.softmax(-1), s, v, g, q.new_zeros(B, HV, slots, V), scale=1.0)
    return ov, hk, hv


def rwkv7_reference(r, w, k, v, kk, a, state):
    outputs = []
    for t in range(r.shape[1]):
        erased = torch.einsum("bhk,bhkv->bhv", -kk[:, t], state)
        state = state * w[:, t].exp()[..., None] + torch.einsum("bhk,bhv->bhkv", (kk * a)[:, t], erased)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    return torch.stack(outputs, 1), state


def path_reference(q, k, v, w, beta, g):
    k, v, w, beta = (x.repeat_interleave(HV // H, 2) for x in (k, v, w, beta))
    g = g.cumsum(1)
    keys = q.new_zeros(B, 0, HV, K)
    outputs = []
    for t in range(q.shape[1]):  # every past key goes through this token's Householder-like map
        seen = torch.einsum("bjhk,bhk->bjh", keys, w[:, t])
        keys = keys - beta[:, t, None, :, None] * seen[..., None] * w[:, t, None]
        keys = torch.cat((keys, k[:, t : t + 1]), 1)
        logits = torch.einsum("bhk,bjhk->bhj", q[:, t], keys) + (g[:, t, None] - g[:, : t + 1]).transpose(1, 2)
        outputs.append(torch.einsum("bhj,bjhv->bhv", (logits * K**-0.5).softmax(-1), v[:, : t + 1]))
    return (torch.stack(outputs, 1),)


def window_reference(q, k, v, window):
    k, v = (x.repeat_interleave(HV // H, 2) for x in (k, v))
    outputs = []
    for t in range(T):  # the token itself and `window` before it
        seen = slice(max(0, t - window), t + 1)
        weights = (torch.einsum("bhk,bjhk->bhj", q[:, t], k[:, seen]) * K**-0.5).softmax(-1)
        outputs.append(torch.einsum("bhj,bjhv->bhv", weights, v[:, seen]))
    return (torch.stack(outputs, 1),)


def random(*shape, f=lambda x: x):
    return f(torch.randn(*shape, dtype=torch.float64))


def unit(x):
    return F.normalize(x, dim=-1)


def mild(x):
    return F.logsigmoid(x + 3)


def strong(x):
    return -16 * F.softplus(x)


def _delta(decay, per_channel=False):
    return [
        random(B, T, H, K),
        random(B, T, H, K, f=unit),
        random(B, T, HV, V),
        random(B, T, HV, *([K] if per_channel else []), f=decay),
        random(B, T, HV, f=lambda x: 2 * x.sigmoid()),
        random(B, HV, K, V),
    ]


def _delta_op(q, k, v, g, beta, state):
    return cpu_ops.delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)


def _gla_op(q, k, v, g, state):
    return cpu_ops.gla(q, k, v, g, initial_state=state, output_final_state=True)


def _gsa_op(*inputs):
    o, (hk, hv) = cpu_ops.gsa(*inputs, output_final_state=True)
    return o, hk, hv


def _rwkv7_op(r, w, k, v, kk, a, state):
    return cpu_ops.chunk_rwkv7(r, w, k, v, -kk, kk * a, initial_state=state, output_final_state=True)


def _gla(decay):
    return [
        random(B, T, HV, K),
        random(B, T, HV, K),
        random(B, T, HV, V),
        random(B, T, HV, K, f=decay),
        random(B, HV, K, V),
    ]


CASES = {
    "gated delta rule, mild decay": (_delta_op, delta_reference, lambda: _delta(mild)),
    "gated delta rule, strong decay": (_delta_op, delta_reference, lambda: _delta(strong)),
    "KDA, mild decay": (_delta_op, delta_reference, lambda: _delta(mild, True)),
    "KDA, strong decay": (_delta_op, delta_reference, lambda: _delta(strong, True)),
    "GLA, mild decay": (_gla_op, gla_reference, lambda: _gla(mild)),
    "GLA, strong decay": (_gla_op, gla_reference, lambda: _gla(strong)),
    "GSA": (
        _gsa_op,
        gsa_reference,
        lambda: [
            random(B, T, HV, K),
            random(B, T, HV, K),
            random(B, T, HV, V),
            random(B, T, HV, 6, f=torch.sigmoid),
            random(B, T, HV, 6, f=mild),
        ],
    ),
    "RWKV-7": (
        _rwkv7_op,
        rwkv7_reference,
        lambda: [
            random(B, T, HV, K),
            random(B, T, HV, K, f=mild),
            random(B, T, HV, K),
            random(B, T, HV, V),
            random(B, T, HV, K, f=unit),
            random(B, T, HV, K, f=torch.sigmoid),
            random(B, HV, K, V),
        ],
    ),
    "PaTH": (
        lambda *x: cpu_ops.path_attn(*x)[:1],
        path_reference,
        lambda: [
            random(B, T, HV, K),
            random(B, T, H, K),
            random(B, T, H, V),
            random(B, T, H, K, f=unit),
            random(B, T, H, f=lambda x: 2 * x.sigmoid()),
            random(B, T, HV, f=mild),
        ],
    ),
    "causal softmax": (
        lambda *x: (cpu_ops.flash_attn_func(*x, causal=True),),
        lambda *x: window_reference(*x, T),
        lambda: [random(B, T, HV, K), random(B, T, H, K), random(B, T, H, V)],
    ),
    "sliding window": (
        lambda *x: (cpu_ops.flash_attn_func(*x, causal=True, window_size=(9, 0)),),
        lambda *x: window_reference(*x, 9),
        lambda: [random(B, T, HV, K), random(B, T, H, K), random(B, T, H, V)],
    ),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients(case, dtype, tolerance):
    op, reference, make = CASES[case]
    torch.manual_seed(0)
    exact = [x.requires_grad_() for x in make()]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    outputs = op(*inputs)
    expected = reference(*exact)
    cotangents = [torch.randn_like(x) for x in expected]
    gradients = torch.autograd.grad(outputs, inputs, [c.to(o) for c, o in zip(cotangents, outputs)])
    expected_gradients = torch.autograd.grad(expected, exact, cotangents)
    for a, b in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("lengths", [[5, 70], [64, 1, 10], [75]])
def test_packed_sequences_equal_separate_ones(lengths):
    torch.manual_seed(0)
    inputs = [x[:1] for x in _delta(mild)[:5]]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    packed, states = cpu_ops.delta_rule(*inputs, cu_seqlens=edges, output_final_state=True, state_v_first=True)
    for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        out, state = cpu_ops.delta_rule(*(x[:, start:stop] for x in inputs), output_final_state=True)
        torch.testing.assert_close(packed[:, start:stop], out)
        torch.testing.assert_close(states[i].mT, state[0])


def test_packed_softmax_equals_separate_and_queries_are_aligned_to_the_end():
    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    edges = torch.tensor([0, 5, 14])
    packed = cpu_ops.flash_attn_varlen_func(q, k, v, edges, edges, 9, 9, causal=True)
    for start, stop in ((0, 5), (5, 14)):
        alone = cpu_ops.flash_attn_func(*(x[None, start:stop] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(packed[start:stop], alone[0])
        last = cpu_ops.flash_attn_func(q[None, stop - 2 : stop], *(x[None, start:stop] for x in (k, v)), causal=True)
        torch.testing.assert_close(last, alone[:, -2:])


def test_convolution_step_by_step_equals_at_once():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    full, state = cpu_ops.causal_conv1d(x, weight, bias, activation="silu", output_final_state=True)
    padded = F.pad(x, (0, 0, 3, 0))
    naive = torch.stack([(padded[:, t : t + 4] * weight.T).sum(1) + bias for t in range(9)], 1)
    torch.testing.assert_close(full, F.silu(naive))
    cache = torch.zeros(2, 6, 4)
    steps = [
        cpu_ops.causal_conv1d_update(x[:, t], cache, weight=weight, bias=bias, activation="silu")[0] for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), full)
    torch.testing.assert_close(cache, state)


def test_norms():
    x, gate, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16)
    plain = F.rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(cpu_ops.rms_norm(x, weight, None, eps=1e-5), plain)
    for activation, f in (("swish", F.silu), ("sigmoid", torch.sigmoid)):
        gated = cpu_ops.rms_norm_gated(x, gate, weight, None, activation, eps=1e-5)
        torch.testing.assert_close(gated, plain * f(gate))


def test_install_is_idempotent_and_reaches_the_layers():
    import fla.layers.gated_deltanet as module

    if module.chunk_gated_delta_rule is not cpu_ops.delta_rule:
        pytest.skip("a GPU is present: FLA's kernels stay")
    cpu_ops.install()
    assert module.chunk_gated_delta_rule is module.fused_recurrent_gated_delta_rule is cpu_ops.delta_rule
    assert not cpu_ops.bind_stand_ins()


def test_bindings_can_be_undone(monkeypatch):
    import fla.modules.activations as activations

    def stand_in(x):
        return x

    before = activations.ops.swish, activations.ACT2FN["silu"]
    monkeypatch.setattr(cpu_ops, "STAND_INS", {"fla.modules.activations.ops": {"swish": stand_in}})
    bound = cpu_ops.bind_stand_ins()
    assert activations.swish is activations.ops.swish is activations.ACT2FN["silu"] is stand_in
    for space, key, old in bound:
        space[key] = old
    assert (activations.ops.swish, activations.ACT2FN["silu"]) == before

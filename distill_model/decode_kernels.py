"""The Triton kernels of a decoded token, each beside its PyTorch reference implementation, which
runs where there is no GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from .fused_ops import device_guard, load_fp32, rotate, use_triton
from .student_deltanet import GatedDeltaNetPlainStudent

STATE_BLOCK = 16384  # elements of a state that a program of 8 warps holds at a time: 64 per thread


# ------------------------------------------------------------------------------------------ SwiGLU
@triton.jit
def _swiglu_rows(gate, up, out, gate_row, up_row, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = load_fp32(gate + row * gate_row + at, inside)
    u = load_fp32(up + row * up_row + at, inside)
    tl.store(out + row * size + at, g * tl.sigmoid(g) * u, mask=inside)


@device_guard
def swiglu_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [B, size], of tensors whose rows need not be contiguous. No gradient."""
    if not use_triton(gate):
        return F.silu(gate) * up
    batch, size = gate.shape
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grid = (batch, triton.cdiv(size, 1024))
    _swiglu_rows[grid](gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=1024)
    return out


# ------------------------------------------------------------------------------- softmax attention
@triton.jit
def _norm_and_rotate(x, norm, cos, sin, out, eps, NORM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm, if NORM, and RoPE of one head."""
    channel = tl.arange(0, BLOCK)
    inside = channel < HALF
    first = load_fp32(x + channel, inside)
    second = load_fp32(x + HALF + channel, inside)
    if NORM:
        mean_square = tl.sum(first * first + second * second, 0) / (2 * HALF)
        scale = 1 / tl.sqrt(mean_square + eps)
        first *= scale * load_fp32(norm + channel, inside)
        second *= scale * load_fp32(norm + HALF + channel, inside)
    c = load_fp32(cos + channel, inside)
    s = load_fp32(sin + channel, inside)
    tl.store(out + channel, first * c - second * s, mask=inside)
    tl.store(out + HALF + channel, second * c + first * s, mask=inside)


@triton.jit
def _place_token(
    q,
    k,
    v,
    q_row,
    k_row,
    v_row,
    q_norm,
    k_norm,
    cos,
    sin,
    out,
    keys,
    values,
    last,
    q_eps,
    k_eps,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each head of q, of k and of v."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += row * 2 * HALF
    sin += row * 2 * HALF
    place = (row * tokens + tl.load(last)) * KV_HEADS * 2 * HALF
    at = head * 2 * HALF
    if head < HEADS:
        q_out = out + row * HEADS * 2 * HALF + at
        _norm_and_rotate(q + row * q_row + at, q_norm, cos, sin, q_out, q_eps, NORM, HALF, BLOCK)
    elif head < HEADS + KV_HEADS:
        at -= HEADS * 2 * HALF
        _norm_and_rotate(k + row * k_row + at, k_norm, cos, sin, keys + place + at, k_eps, NORM, HALF, BLOCK)
    else:
        at -= (HEADS + KV_HEADS) * 2 * HALF
        channel = tl.arange(0, 2 * BLOCK)
        inside = channel < 2 * HALF
        value = tl.load(v + row * v_row + at + channel, mask=inside)
        tl.store(values + place + at + channel, value, mask=inside)


@device_guard
def place_token(q, k, v, q_norm, k_norm, cos, sin, keys, values, last) -> torch.Tensor:
    """Normalises and rotates q and k of a token, writes k and v to the cache, and returns q.

    q [B, heads x D]; k, v [B, kv heads x D]; q_norm, k_norm: nn.RMSNorm or nn.Identity; cos, sin
    [B, D]; keys, values [B, tokens, kv heads, D], written at position last [1]. Returns [B, 1,
    heads, D].
    """
    run = _place_token_triton if use_triton(q) else _place_token_reference
    return run(q, k, v, q_norm, k_norm, cos, sin, keys, values, last)


def _place_token_reference(q, k, v, q_norm, k_norm, cos, sin, keys, values, last) -> torch.Tensor:
    size = keys.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    q, k, v = (x.unflatten(-1, (1, -1, size)) for x in (q, k, v))
    q = rotate(q_norm(q), cos, sin)
    k = rotate(k_norm(k), cos, sin)
    keys.index_copy_(1, last, k)
    values.index_copy_(1, last, v)
    return q


def _place_token_triton(q, k, v, q_norm, k_norm, cos, sin, keys, values, last) -> torch.Tensor:
    batch = len(q)
    tokens, kv_heads, size = keys.shape[1:]
    heads = q.shape[1] // size
    normed = isinstance(q_norm, nn.RMSNorm)
    out = q.new_empty(batch, 1, heads, size)
    _place_token[(batch, heads + 2 * kv_heads)](
        q,
        k,
        v,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        q_norm.weight if normed else None,
        k_norm.weight if normed else None,
        cos,
        sin,
        out,
        keys,
        values,
        last,
        q_norm.eps if normed else 0.0,
        k_norm.eps if normed else 0.0,
        tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        NORM=normed,
        HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=1,
    )
    return out


# ---------------------------------------------------------------------------------- Gated DeltaNet
@triton.jit
def _convolved(x, past, weight, bias, at, inside, held, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr):
    """The channels `at` of a projection after a convolution over W tokens (0: none) and SiLU. held:
    whether there are earlier tokens; here and below."""
    value = load_fp32(x + at, inside)
    if W > 0:
        value *= load_fp32(weight + at * W + W - 1, inside)
        for token in tl.static_range(W - 1):
            old = load_fp32(past + at * W + token + 1, inside & held)
            value += old * load_fp32(weight + at * W + token, inside)
        if BIAS:
            value += load_fp32(bias + at, inside)
    if SILU:
        value *= tl.sigmoid(value)
    return value


@triton.jit
def _new_windows(x, past, at, inside, held, W: tl.constexpr, W_BLOCK: tl.constexpr):
    """The last W inputs of a convolution, its next state. Loaded separately from `_convolved`, so
    that the compiler can give each its own layout."""
    at = at[:, None]
    token = tl.arange(0, W_BLOCK)[None]
    is_old = inside[:, None] & (token < W - 1)
    is_new = inside[:, None] & (token == W - 1)
    old = tl.load(past + at * W + token + 1, mask=is_old & held, other=0)
    new = tl.load(x + at + token - (W - 1), mask=is_new, other=0)
    return tl.where(token == W - 1, new, old)


@triton.jit
def _store_windows(past, at, inside, windows, W: tl.constexpr, W_BLOCK: tl.constexpr):
    token = tl.arange(0, W_BLOCK)[None]
    tl.store(past + at[:, None] * W + token, windows, mask=inside[:, None] & (token < W))


@triton.jit
def _load_state(state, index, held, SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr):
    """Block `index` of V_BLOCK rows of a head's state: pointers, mask, and values."""
    value = index * V_BLOCK + tl.arange(0, V_BLOCK)
    channel = tl.arange(0, BLOCK)
    both = (value < SIZE)[:, None] & (channel < SIZE)[None]
    place = state + value[:, None] * SIZE + channel[None]
    return place, both, load_fp32(place, both & held)


@triton.jit
def _gated_delta_token(
    q,
    k,
    v,
    gate,
    a,
    b,
    q_row,
    k_row,
    v_row,
    gate_row,
    a_row,
    b_row,
    q_past,
    k_past,
    v_past,
    q_weight,
    k_weight,
    v_weight,
    q_bias,
    k_bias,
    v_bias,
    cos,
    sin,
    A_log,
    dt_bias,
    state,
    rows,
    has_state,
    state_row,
    past_row,
    norm,
    out,
    scale,
    eps,
    PAGED: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    QK_SILU: tl.constexpr,
    V_SILU: tl.constexpr,
    ROTATED: tl.constexpr,
    TWICE: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):
    """One head of one sequence. PAGED: rows says where its state is, has_state whether it has one.
    ROTATED: how many frequencies RoPE rotates, 0 for none."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = row
    held = True
    if PAGED:
        slot = tl.load(rows + row)
        held = tl.load(has_state + row)
    q += row * q_row
    k += row * k_row
    v += row * v_row
    state += slot * state_row + head * SIZE * SIZE
    place, both, h = _load_state(state, 0, held, SIZE, BLOCK, V_BLOCK)  # the slowest load is issued first
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    at = head * SIZE + channel
    if W > 0:
        q_past += slot * past_row
        k_past += slot * past_row
        v_past += slot * past_row
        q_windows = _new_windows(q, q_past, at, inside, held, W, W_BLOCK)
        k_windows = _new_windows(k, k_past, at, inside, held, W, W_BLOCK)
    queries = _convolved(q, q_past, q_weight, q_bias, at, inside, held, W, BIAS, QK_SILU)
    keys = _convolved(k, k_past, k_weight, k_bias, at, inside, held, W, BIAS, QK_SILU)
    if ROTATED > 0:
        HALF: tl.constexpr = SIZE // 2
        rotated = inside & (channel % HALF < ROTATED)
        other = head * SIZE + (channel + HALF) % SIZE
        c = tl.where(rotated, load_fp32(cos + row * SIZE + channel, rotated), 1.0)
        s = load_fp32(sin + row * SIZE + channel, rotated)
        s = tl.where(channel < HALF, -s, s)
        queries = queries * c + _convolved(q, q_past, q_weight, q_bias, other, inside, held, W, BIAS, QK_SILU) * s
        keys = keys * c + _convolved(k, k_past, k_weight, k_bias, other, inside, held, W, BIAS, QK_SILU) * s
    queries *= scale / tl.sqrt(tl.sum(queries * queries, 0) + 1e-6)
    keys *= 1 / tl.sqrt(tl.sum(keys * keys, 0) + 1e-6)
    if W > 0:
        tl.debug_barrier()  # other threads of the program may read what this one is about to write
        _store_windows(q_past, at, inside, q_windows, W, W_BLOCK)
        _store_windows(k_past, at, inside, k_windows, W, W_BLOCK)
    step = tl.load(a + row * a_row + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.where(step > 20, step, tl.log(1 + tl.exp(tl.minimum(step, 20.0))))  # softplus
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    beta = tl.sigmoid(tl.load(b + row * b_row + head).to(tl.float32))
    if TWICE:
        beta *= 2
    PARTS: tl.constexpr = BLOCK // V_BLOCK
    part = tl.arange(0, PARTS)[:, None]
    outs = tl.zeros((PARTS, V_BLOCK), tl.float32)
    for index in range(PARTS):
        value_channel = index * V_BLOCK + tl.arange(0, V_BLOCK)
        real = value_channel < SIZE
        at_v = head * SIZE + value_channel
        values = _convolved(v, v_past, v_weight, v_bias, at_v, real, held, W, BIAS, V_SILU)
        if W > 0:
            v_windows = _new_windows(v, v_past, at_v, real, held, W, W_BLOCK)
        tl.debug_barrier()
        h *= decay
        values = beta * (values - tl.sum(h * keys[None], 1))
        h += values[:, None] * keys[None]
        tl.store(place, h, mask=both)
        if W > 0:
            _store_windows(v_past, at_v, real, v_windows, W, W_BLOCK)
        outs = tl.where(part == index, tl.sum(h * queries[None], 1)[None], outs)
        place, both, h = _load_state(state, index + 1, held, SIZE, BLOCK, V_BLOCK)
    at_out = part * V_BLOCK + tl.arange(0, V_BLOCK)[None]
    real_out = at_out < SIZE
    if NORM:
        outs *= 1 / tl.sqrt(tl.sum(tl.sum(outs * outs, 1), 0) / SIZE + eps)
        outs *= load_fp32(norm + at_out, real_out)
    if GATE != "":
        g = load_fp32(gate + row * gate_row + head * SIZE + at_out, real_out)
        outs *= tl.sigmoid(g)
        if GATE == "silu":
            outs *= g
    tl.store(out + (row * HEADS + head) * SIZE + at_out, outs, mask=real_out)


@device_guard
def gated_delta_token(q, k, v, gate, a, b, attn, state, past, cos, sin, pages=None) -> torch.Tensor:
    """The output of a Gated DeltaNet layer `attn` (Yang et al., arXiv 2412.06464) for one token,
    before its output projection, [B, heads x D].

    q, k, v, gate [B, heads x D] and a, b [B, heads] are the layer's projections of the token;
    gate is None without an output gate. state [B, heads, D of v, D of k] and past, the last W
    inputs [B, heads x D, W] of the convolutions of q, k and v, or None, are updated in place.
    cos, sin [B, D].

    pages: None, or rows [B], the places in dimension 0 of state and past, whose rows need not be
    contiguous, that belong to the sequences, and has_state [B]: where it is False, state and past
    are zeros, whatever is there.
    """
    run = _gated_delta_triton if use_triton(q) else _gated_delta_reference
    return run(q, k, v, gate, a, b, attn, state, past, cos, sin, pages)


def _silu_flags(attn) -> tuple[bool, bool]:
    """Whether q and k, and whether v, go through SiLU."""
    if isinstance(attn, GatedDeltaNetPlainStudent):
        return isinstance(attn.qk_activation, nn.SiLU), False
    return True, True


def _convolutions(attn, past) -> list[nn.Conv1d]:
    return [] if past is None else [attn.q_conv1d, attn.k_conv1d, attn.v_conv1d]


def _gated_delta_triton(q, k, v, gate, a, b, attn, state, past, cos, sin, pages) -> torch.Tensor:
    heads, size = state.shape[1:3]
    qk_silu, v_silu = _silu_flags(attn)
    convolutions = _convolutions(attn, past)
    nothing = [None, None, None]
    width = 0 if past is None else past[0].shape[-1]
    normed = not isinstance(attn.o_norm, nn.Identity)
    activation = "" if gate is None else attn.o_norm.activation
    block = triton.next_power_of_2(size)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _gated_delta_token[(len(q), heads)](
        q,
        k,
        v,
        gate,
        a,
        b,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if gate is None else gate.stride(0),
        a.stride(0),
        b.stride(0),
        *(past or nothing),
        *([c.weight for c in convolutions] or nothing),
        *([c.bias for c in convolutions] or nothing),
        cos,
        sin,
        attn.A_log,
        attn.dt_bias,
        state,
        *(pages or nothing[:2]),
        state.stride(0),
        0 if past is None else past[0].stride(0),
        attn.o_norm.weight if normed else None,
        out,
        size**-0.5,
        attn.o_norm.eps if normed else 0.0,
        PAGED=pages is not None,
        HEADS=heads,
        SIZE=size,
        W=width,
        BIAS=past is not None and attn.q_conv1d.bias is not None,
        QK_SILU=qk_silu,
        V_SILU=v_silu,
        ROTATED=-int(-attn.rope_share * (size // 2) // 1),  # rounded up
        TWICE=attn.allow_neg_eigval,
        NORM=normed,
        GATE="silu" if activation == "swish" else activation,
        BLOCK=block,
        V_BLOCK=min(block, STATE_BLOCK // block),
        W_BLOCK=triton.next_power_of_2(width),
        num_warps=8 if block > 64 else 4,
    )
    return out


def _convolve_token(x: torch.Tensor, past: torch.Tensor, convolution: nn.Conv1d) -> torch.Tensor:
    """A token x [B, channels] after a causal convolution, whose last inputs `past` [B, channels, W]
    are updated in place."""
    new = x[..., None].to(past.dtype)
    past.copy_(torch.cat((past[..., 1:], new), -1))
    out = (past.to(x.dtype) * convolution.weight[:, 0]).sum(-1)
    return out if convolution.bias is None else out + convolution.bias


def _gated_delta_reference(q, k, v, gate, a, b, attn, state, past, cos, sin, pages) -> torch.Tensor:
    if pages is not None:
        rows, has_state = pages
        pools = [state, *(past or ())]
        fresh = ~has_state
        own = [pool[rows].masked_fill(fresh.view(-1, *[1] * (pool.ndim - 1)), 0) for pool in pools]
        out = _gated_delta_reference(q, k, v, gate, a, b, attn, own[0], past and tuple(own[1:]), cos, sin, None)
        for pool, new in zip(pools, own):
            pool[rows] = new
        return out
    heads, size = state.shape[1:3]
    dtype = q.dtype
    qk_silu, v_silu = _silu_flags(attn)
    q, k, v, a, b = (x.to(state.dtype) for x in (q, k, v, a, b))
    if past is not None:
        q, k, v = map(_convolve_token, (q, k, v), past, _convolutions(attn, past))
    q, k, v = (x.unflatten(-1, (heads, size)) for x in (q, k, v))
    if qk_silu:
        q, k = F.silu(q), F.silu(k)
    if v_silu:
        v = F.silu(v)
    if attn.rope_share:
        cos, sin = (x[:, None].to(state.dtype) for x in (cos, sin))
        cos, sin = attn.fast_angles(cos, sin)
        q, k = (rotate(x[:, None], cos, sin)[:, 0] for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    log_decay = -attn.A_log.to(state.dtype).exp() * F.softplus(a + attn.dt_bias)
    state *= log_decay.exp()[..., None, None]
    beta = b.sigmoid() * (2 if attn.allow_neg_eigval else 1)
    change = beta[..., None] * (v - torch.einsum("bhvk,bhk->bhv", state, k))
    state += change[..., None] * k[..., None, :]
    out = torch.einsum("bhvk,bhk->bhv", state, q * size**-0.5)
    if not isinstance(attn.o_norm, nn.Identity):
        out = out * (out.square().mean(-1, keepdim=True) + attn.o_norm.eps).rsqrt() * attn.o_norm.weight
    if gate is not None:
        gate = gate.to(state.dtype).unflatten(-1, (heads, size))
        out = out * (gate.sigmoid() if attn.o_norm.activation == "sigmoid" else F.silu(gate))
    return out.flatten(1).to(dtype)

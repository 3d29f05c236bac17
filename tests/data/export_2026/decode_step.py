"""One token of all layers behind a StaticCache, in few kernels: what a token waits for should be the reading of weights and states.

A layer is two RMSNorms, four matrix products, a SwiGLU, and an attention of one kernel (Gated DeltaNet) or three (softmax). Maps of the
same input are one product: their weights become views of one buffer, so that nothing is held twice. Residuals are added by the
products. What is not plain (adapters, hooks, quantised maps, another linear attention) runs as its module does, the rest around it
as here. Elsewhere than on a GPU the kernels' plain twins serve.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from torch import nn

from .attention import SoftmaxAttention
from .fused_ops import decode_attention, fuses, on_its_device, rotate
from .student_layers import GatedDeltaNetPlainStudent, GatedDeltaNetStudent, WholeLinear

STATE_BLOCK = 16384  # elements of a state that a program of 8 warps holds at a time, 64 a thread


# ------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _swiglu_rows(gate, up, out, gate_row, up_row, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + row * gate_row + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * size + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _turned(x, norm, cos, sin, out, eps, NORM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm, if NORM, and RoPE of one head."""
    channel = tl.arange(0, BLOCK)
    inside = channel < HALF
    first = tl.load(x + channel, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + HALF + channel, mask=inside, other=0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(first * first + second * second, 0) / (2 * HALF) + eps)
        first *= scale * tl.load(norm + channel, mask=inside, other=0).to(tl.float32)
        second *= scale * tl.load(norm + HALF + channel, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + channel, mask=inside, other=0).to(tl.float32)
    s = tl.load(sin + channel, mask=inside, other=0).to(tl.float32)
    tl.store(out + channel, first * c - second * s, mask=inside)
    tl.store(out + HALF + channel, second * c + first * s, mask=inside)


@triton.jit
def _place_token(q, k, v, q_row, k_row, v_row, q_norm, k_norm, cos, sin, out, keys, values, last, q_eps, k_eps, tokens,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program for each head of q, of k and of v."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += row * 2 * HALF
    sin += row * 2 * HALF
    place = (row * tokens + tl.load(last)) * KV_HEADS * 2 * HALF
    at = head * 2 * HALF
    if head < HEADS:
        _turned(q + row * q_row + at, q_norm, cos, sin, out + row * HEADS * 2 * HALF + at, q_eps, NORM, HALF, BLOCK)
    elif head < HEADS + KV_HEADS:
        at -= HEADS * 2 * HALF
        _turned(k + row * k_row + at, k_norm, cos, sin, keys + place + at, k_eps, NORM, HALF, BLOCK)
    else:
        at -= (HEADS + KV_HEADS) * 2 * HALF
        channel = tl.arange(0, 2 * BLOCK)
        inside = channel < 2 * HALF
        tl.store(values + place + at + channel, tl.load(v + row * v_row + at + channel, mask=inside), mask=inside)


@triton.jit
def _channels(x, past, weight, bias, at, inside, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr):
    """The channels `at` of a projection, behind a convolution over W tokens (0: none) and SiLU."""
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if W > 0:
        value *= tl.load(weight + at * W + W - 1, mask=inside, other=0).to(tl.float32)
        for token in tl.static_range(W - 1):
            old = tl.load(past + at * W + token + 1, mask=inside, other=0).to(tl.float32)
            value += old * tl.load(weight + at * W + token, mask=inside, other=0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + at, mask=inside, other=0).to(tl.float32)
    if SILU:
        value *= tl.sigmoid(value)
    return value


@triton.jit
def _windows(x, past, at, inside, W: tl.constexpr, W_BLOCK: tl.constexpr):
    """The last W inputs of a convolution, which its state is to hold. Read apart from `_channels`, so that neither has to follow the
    other's layout."""
    at, token = at[:, None], tl.arange(0, W_BLOCK)[None]
    old = tl.load(past + at * W + token + 1, mask=inside[:, None] & (token < W - 1), other=0)
    new = tl.load(x + at + token - (W - 1), mask=inside[:, None] & (token == W - 1), other=0)
    return tl.where(token == W - 1, new, old)


@triton.jit
def _keep_windows(past, at, inside, windows, W: tl.constexpr, W_BLOCK: tl.constexpr):
    token = tl.arange(0, W_BLOCK)[None]
    tl.store(past + at[:, None] * W + token, windows, mask=inside[:, None] & (token < W))


@triton.jit
def _state_part(state, index, SIZE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr):
    """Where V_BLOCK rows of a head's state lie, what is a part of it, and what it holds."""
    value, channel = index * V_BLOCK + tl.arange(0, V_BLOCK), tl.arange(0, BLOCK)
    both = (value < SIZE)[:, None] & (channel < SIZE)[None]
    place = state + value[:, None] * SIZE + channel[None]
    return place, both, tl.load(place, mask=both, other=0).to(tl.float32)


@triton.jit
def _gated_delta_token(
    q, k, v, gate, a, b, q_row, k_row, v_row, gate_row, a_row, b_row, q_past, k_past, v_past, q_weight, k_weight, v_weight,
    q_bias, k_bias, v_bias, cos, sin, A_log, dt_bias, state, norm, out, scale, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, QK_SILU: tl.constexpr, V_SILU: tl.constexpr,
    FAST: tl.constexpr, TWICE: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one sequence. FAST: how many frequencies RoPE turns, 0 for none."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q += row * q_row
    k += row * k_row
    v += row * v_row
    state += (row * HEADS + head) * SIZE * SIZE
    place, both, h = _state_part(state, 0, SIZE, BLOCK, V_BLOCK)  # the longest wait: begun first
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    at = head * SIZE + channel
    if W > 0:
        q_past += row * HEADS * SIZE * W
        k_past += row * HEADS * SIZE * W
        v_past += row * HEADS * SIZE * W
        q_windows, k_windows = _windows(q, q_past, at, inside, W, W_BLOCK), _windows(k, k_past, at, inside, W, W_BLOCK)
    queries = _channels(q, q_past, q_weight, q_bias, at, inside, W, BIAS, QK_SILU)
    keys = _channels(k, k_past, k_weight, k_bias, at, inside, W, BIAS, QK_SILU)
    if FAST > 0:
        HALF: tl.constexpr = SIZE // 2
        turned = inside & (channel % HALF < FAST)
        other = head * SIZE + (channel + HALF) % SIZE
        c = tl.where(turned, tl.load(cos + row * SIZE + channel, mask=turned, other=0).to(tl.float32), 1.0)
        s = tl.load(sin + row * SIZE + channel, mask=turned, other=0).to(tl.float32)
        s = tl.where(channel < HALF, -s, s)
        queries = queries * c + _channels(q, q_past, q_weight, q_bias, other, inside, W, BIAS, QK_SILU) * s
        keys = keys * c + _channels(k, k_past, k_weight, k_bias, other, inside, W, BIAS, QK_SILU) * s
    queries *= scale / tl.sqrt(tl.sum(queries * queries, 0) + 1e-6)
    keys *= 1 / tl.sqrt(tl.sum(keys * keys, 0) + 1e-6)
    if W > 0:
        tl.debug_barrier()  # other threads of the program may read what this one is about to write
        _keep_windows(q_past, at, inside, q_windows, W, W_BLOCK)
        _keep_windows(k_past, at, inside, k_windows, W, W_BLOCK)
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
        real, at_v = value_channel < SIZE, head * SIZE + value_channel
        values = _channels(v, v_past, v_weight, v_bias, at_v, real, W, BIAS, V_SILU)
        if W > 0:
            v_windows = _windows(v, v_past, at_v, real, W, W_BLOCK)
        tl.debug_barrier()
        h *= decay
        values = beta * (values - tl.sum(h * keys[None], 1))
        h += values[:, None] * keys[None]
        tl.store(place, h, mask=both)
        if W > 0:
            _keep_windows(v_past, at_v, real, v_windows, W, W_BLOCK)
        outs = tl.where(part == index, tl.sum(h * queries[None], 1)[None], outs)
        place, both, h = _state_part(state, index + 1, SIZE, BLOCK, V_BLOCK)
    at_out = part * V_BLOCK + tl.arange(0, V_BLOCK)[None]
    real_out = at_out < SIZE
    if NORM:
        outs *= 1 / tl.sqrt(tl.sum(tl.sum(outs * outs, 1), 0) / SIZE + eps)
        outs *= tl.load(norm + at_out, mask=real_out, other=0).to(tl.float32)
    if GATE != "":
        g = tl.load(gate + row * gate_row + head * SIZE + at_out, mask=real_out, other=0).to(tl.float32)
        outs *= tl.sigmoid(g)
        if GATE == "silu":
            outs *= g
    tl.store(out + (row * HEADS + head) * SIZE + at_out, outs, mask=real_out)


# ------------------------------------------------------------------------------------------------ and their plain twins
@on_its_device
def swiglu_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [B, size], of tensors whose rows need not follow one another. No gradient."""
    if not fuses(gate):
        return F.silu(gate) * up
    (batch, size), out = gate.shape, torch.empty_like(gate, memory_format=torch.contiguous_format)
    _swiglu_rows[(batch, triton.cdiv(size, 1024))](gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=1024)
    return out


@on_its_device
def place_token(q, k, v, q_norm, k_norm, cos, sin, keys, values, last) -> torch.Tensor:
    """Writes k and v [B, kv heads x D] of a token to position last [1] of keys and values [B, tokens, kv heads, D], and returns q
    [B, 1, heads, D] of q [B, heads x D]; q and k behind their norms, nn.RMSNorm or none at all (nn.Identity), and RoPE with cos and
    sin [B, D]."""
    batch, (tokens, kv_heads, size) = len(q), keys.shape[1:]
    heads, normed = q.shape[1] // size, isinstance(q_norm, nn.RMSNorm)
    if not fuses(q):
        q, k, v = (x.unflatten(-1, (1, -1, size)) for x in (q, k, v))
        q, k = (rotate(norm(x), cos[:, None], sin[:, None]) for norm, x in ((q_norm, q), (k_norm, k)))
        keys.index_copy_(1, last, k)
        values.index_copy_(1, last, v)
        return q
    out = q.new_empty(batch, 1, heads, size)
    _place_token[(batch, heads + 2 * kv_heads)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), q_norm.weight if normed else None, k_norm.weight if normed else None,
        cos, sin, out, keys, values, last, q_norm.eps if normed else 0.0, k_norm.eps if normed else 0.0, tokens, HEADS=heads,
        KV_HEADS=kv_heads, NORM=normed, HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip
    return out


@on_its_device
def gated_delta_token(q, k, v, gate, a, b, attn, state, past, cos, sin) -> torch.Tensor:
    """What a Gated DeltaNet layer `attn` (Yang et al., arXiv 2412.06464) makes of a token before its output projection, [B, heads x D].

    q, k, v, gate [B, heads x D] and a, b [B, heads] are what its projections make of the token; gate None without an output gate.
    state [B, heads, D of v, D of k] and past, the last W inputs [B, heads x D, W] of the convolutions of q, k and v, or None, are brought
    to the new token in place. cos, sin [B, D].
    """
    heads, size = state.shape[1:3]
    plain = isinstance(attn, GatedDeltaNetPlainStudent)
    qk_silu, v_silu = not plain or isinstance(attn.qk_activation, nn.SiLU), not plain
    convolutions = () if past is None else (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d)
    normed, activation = not isinstance(attn.o_norm, nn.Identity), "" if gate is None else attn.o_norm.activation
    if fuses(q):
        width, block = 0 if past is None else past[0].shape[-1], triton.next_power_of_2(size)
        biased = past is not None and attn.q_conv1d.bias is not None
        gate_row, out = 0 if gate is None else gate.stride(0), torch.empty_like(q, memory_format=torch.contiguous_format)
        weights, biases = ([getattr(c, name) for c in convolutions] or [None] * 3 for name in ("weight", "bias"))
        fast = -int(-attn.rope_share * (size // 2) // 1)  # rounded up
        _gated_delta_token[(len(q), heads)](
            q, k, v, gate, a, b, *(x.stride(0) for x in (q, k, v)), gate_row, a.stride(0), b.stride(0), *(past or [None] * 3), *weights,
            *biases, cos, sin, attn.A_log, attn.dt_bias, state, attn.o_norm.weight if normed else None, out, size**-0.5,
            attn.o_norm.eps if normed else 0.0, HEADS=heads, SIZE=size, W=width, BIAS=biased, QK_SILU=qk_silu, V_SILU=v_silu, FAST=fast,
            TWICE=attn.allow_neg_eigval, NORM=normed, GATE="silu" if activation == "swish" else activation, BLOCK=block,
            V_BLOCK=min(block, STATE_BLOCK // block), W_BLOCK=triton.next_power_of_2(width), num_warps=8 if block > 64 else 4,
        )  # fmt: skip
        return out
    dtype, real = q.dtype, state.dtype
    q, k, v, a, b = (x.to(real) for x in (q, k, v, a, b))
    if past is not None:
        for held, new in zip(past, (q, k, v)):
            held.copy_(torch.cat((held[..., 1:], new[..., None].to(held.dtype)), -1))
        q, k, v = ((held.to(real) * c.weight[:, 0]).sum(-1) + (0 if c.bias is None else c.bias) for held, c in zip(past, convolutions))
    q, k, v = (x.unflatten(-1, (heads, size)) for x in (q, k, v))
    q, k, v = F.silu(q) if qk_silu else q, F.silu(k) if qk_silu else k, F.silu(v) if v_silu else v
    if attn.rope_share:
        fast = attn.fast_angles(cos[:, None].to(real), sin[:, None].to(real))
        q, k = (rotate(x[:, None], *fast)[:, 0] for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    state *= (-attn.A_log.to(real).exp() * F.softplus(a + attn.dt_bias)).exp()[..., None, None]
    beta = b.sigmoid() * (2 if attn.allow_neg_eigval else 1)
    change = beta[..., None] * (v - torch.einsum("bhvk,bhk->bhv", state, k))
    state += change[..., None] * k[..., None, :]
    out = torch.einsum("bhvk,bhk->bhv", state, q * size**-0.5)
    if normed:
        out = out * (out.square().mean(-1, keepdim=True) + attn.o_norm.eps).rsqrt() * attn.o_norm.weight
    if gate is not None:
        gate = gate.to(real).unflatten(-1, (heads, size))
        out = out * (gate.sigmoid() if activation == "sigmoid" else F.silu(gate))
    return out.flatten(1).to(dtype)


# ------------------------------------------------------------------------------------------------ maps of one input
def untouched(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward and nothing else. transformers' own hooks, which record what is asked
    for and stay for good, record nothing here."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" not in vars(module) and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)


def plain(linear: nn.Module) -> bool:
    """Whether it is x W^T + bias, its tensors where they seem to be: not an adapter, quantised, sharded by ZeRO-3 or on another device."""
    return (type(linear) in (nn.Linear, WholeLinear) and untouched(linear) and linear.weight.is_contiguous()
            and linear.weight.shape == (linear.out_features, linear.in_features)
            and all(type(p) is nn.Parameter and not p.is_inference() for p in linear.parameters()))  # fmt: skip


def joined(parts: list[nn.Parameter | None], rows: list[int]) -> torch.Tensor | None:
    """One tensor [sum(rows), ...] of parameters [rows[i], ...], which are views of it from then on; None is rows of zeros.

    Returns None, and changes nothing, where a parameter is a part of somebody else's memory, as in DeepSpeed's flat buffers, or is shared
    with other processes: they would go on to write there.
    """
    begins, total = [0, *accumulate(rows)], sum(rows)
    held = [(p, slice(begin, end)) for p, begin, end in zip(parts, begins, begins[1:]) if p is not None]
    like = held[0][0]
    shape, memory = (total, *like.shape[1:]), total * like[0].nbytes
    there = [p.untyped_storage().nbytes() == memory and p.storage_offset() == at.start * like[0].numel() for p, at in held]
    if all(there) and len({p.untyped_storage().data_ptr() for p, _ in held}) == 1:
        return like.data.as_strided(shape, (*like.shape[1:], 1), 0)
    shared = any(not p.is_cuda and p.is_shared() for p, _ in held)
    if shared or not all(ours or p.untyped_storage().nbytes() == p.nbytes for ours, (p, _) in zip(there, held)):
        return None
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be trained any more
        whole = like.data.new_zeros(shape)
        for p, at in held:
            whole[at] = p.data
            p.data = whole[at]
    return whole


def fused(maps: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of several linear maps of one input as one, or None where they cannot be."""
    if not all(map(plain, maps)) or len({(p.dtype, p.device) for m in maps for p in m.parameters()}) > 1:
        return None
    rows, biases = [m.out_features for m in maps], [m.bias for m in maps]
    weight = joined([m.weight for m in maps], rows)
    bias = None if weight is None or biases == [None] * len(maps) else joined(biases, rows)
    return None if weight is None or bias is None and biases != [None] * len(maps) else (weight, bias)


def project(x: torch.Tensor, maps: list[nn.Linear]) -> tuple[torch.Tensor, ...]:
    """What each map makes of x [B, in_features]."""
    parameters = fused(maps)
    if parameters is None:
        return tuple(m(x) for m in maps)
    return F.linear(x, *parameters).split([m.out_features for m in maps], -1)


def add_product(hidden: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> None:
    """hidden += linear(x), in one kernel where there is no bias."""
    if not plain(linear):
        hidden += linear(x)
        return
    hidden.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        hidden += linear.bias


# ------------------------------------------------------------------------------------------------ the layers
def input_maps(attn: nn.Module) -> list[nn.Linear]:
    """The maps of what an attention gets, in order: q, k, v, and of Gated DeltaNet its gate, if it has one, a and b. None of an attention
    that is to run as its module does: another one, or one with parts in it that are not its own, whose weights a kernel would misread."""
    if type(attn) is SoftmaxAttention:
        own = all(type(norm) in (nn.RMSNorm, nn.Identity) for norm in (attn.q_norm, attn.k_norm))
        return [attn.q_proj, attn.k_proj, attn.v_proj] if own else []
    if type(attn) not in (GatedDeltaNetStudent, GatedDeltaNetPlainStudent):
        return []
    convolutions = (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d) if attn.use_short_conv else ()
    own = type(attn.o_norm) in (RMSNorm, FusedRMSNormGated, nn.Identity) and all(type(c) is ShortConvolution for c in convolutions)
    if not own or attn.factored and not type(attn.k_proj) is type(attn.v_proj) is nn.Sequential:
        return []
    k, v = (attn.k_proj[0], attn.v_proj[0]) if attn.factored else (attn.k_proj, attn.v_proj)
    return [attn.q_proj, k, v, *([attn.g_proj] if attn.use_gate else []), attn.a_proj, attn.b_proj]


def serves(block: nn.Module) -> bool:
    """Whether a block can be taken apart: none of its modules has hooks, and its MLP is its file's."""
    return type(block.mlp).__module__ == type(block).__module__ and all(map(untouched, block.modules()))


def add_attention(attn: nn.Module, x: torch.Tensor, hidden: torch.Tensor, cache, cos: torch.Tensor, sin: torch.Tensor) -> None:
    maps = input_maps(attn)
    if not maps:
        angles = cos[:, None], sin[:, None]
        hidden += attn(x[:, None], past_key_values=cache, use_cache=True, position_embeddings=angles)[0][:, 0]
        return
    (q, k, v, *gates), held = project(x, maps), cache.layers[attn.layer_idx].state
    if type(attn) is SoftmaxAttention:
        buffers = held["attn_state"]
        q = place_token(q, k, v, attn.q_norm, attn.k_norm, cos, sin, *buffers, cache.last)
        out = decode_attention(q, *buffers, cache.first, cache.last).flatten(1)
    else:
        if attn.factored:
            k, v = attn.k_proj[1](k), attn.v_proj[1](v)
        gate, a, b = gates if attn.use_gate else (None, *gates)
        out = gated_delta_token(q, k, v, gate, a, b, attn, held["recurrent_state"], held["conv_state"], cos, sin)
    add_product(hidden, out, attn.o_proj)


def join_projections(model) -> None:
    """Does what the first token would: brings the weights that are read together into one memory, where they are not yet."""
    before = [p.data_ptr() for p in model.parameters()]
    for block in filter(serves, model.model.layers):
        for maps in (input_maps(block.attn), [block.mlp.gate_proj, block.mlp.up_proj]):
            if maps:
                fused(maps)
    if model.device.type == "cuda" and before != [p.data_ptr() for p in model.parameters()]:
        torch.cuda.empty_cache()  # pieces as large as the weights, too small for what they are now parts of


@torch.no_grad()
def decode_token(model, input_ids: torch.Tensor, position_ids: torch.Tensor, cache) -> torch.Tensor:
    """The logits [B, 1, vocab_size] behind a token of each sequence, input_ids and position_ids [B, 1]; the states in `cache`, a
    StaticCache that is decoding, are brought to it in place."""
    inner = model.model
    hidden = inner.embeddings(input_ids)
    angles = inner.position_embeddings(hidden, position_ids)
    hidden, (cos, sin) = hidden[:, 0].clone(), (x[:, 0] for x in angles)  # which is written to, and not a hook's
    for block in inner.layers:
        if not serves(block):  # a copy, for its output is the hook's, and hidden is written to
            hidden = block(hidden[:, None].clone(), past_key_values=cache, use_cache=True, position_embeddings=angles)[:, 0].clone()
            continue
        add_attention(block.attn, block.attn_norm(hidden), hidden, cache, cos, sin)
        mlp, x = block.mlp, block.mlp_norm(hidden)
        gate, up = project(x, [mlp.gate_proj, mlp.up_proj])
        add_product(hidden, swiglu_rows(gate, up) if mlp.act is None else mlp.act(gate) * up, mlp.down_proj)
    return model.lm_head(inner.norm(hidden))[:, None]

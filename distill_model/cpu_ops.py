"""Plain PyTorch stand-ins for FLA's Triton kernels, for machines without a GPU.

`install()` makes FLA's own layer classes call them; with a GPU it does nothing and FLA runs
unchanged. The functions have the signatures of FLA 0.6.0's entry points. Everything is
differentiable, computes in at least float32 (float64 stays float64), accepts packed sequences
(`cu_seqlens` [N + 1], which FLA's layers make from padding), initial and final states, and
returns the dtype of its input, as the kernels do.

Shapes: B sequences of T tokens, H query/key heads of K channels, HV >= H value heads of V channels.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from functools import wraps

import torch
import torch.nn.functional as F
from torch.linalg import solve_triangular
from torch.nn.utils.rnn import pad_sequence


def _upcast(*xs):
    """The tensors in the dtype to compute in: at least float32. None stays None."""
    return [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]


def _l2norm(x, eps=1e-6):
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def unpack(cu_seqlens, *xs):
    """The mask of real tokens [N, max(T)], and each [1, sum(T), ...] as [N, max(T), ...],
    zero-padded on the right. None stays None."""
    lengths = cu_seqlens.diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    padded = []
    for x in xs:
        if x is not None:
            x = pad_sequence(x[0].split(lengths.tolist()), batch_first=True)
        padded.append(x)
    return mask, *padded


def grouped_by_length(*packed):
    """Makes an op that pads packed sequences to one length read those of similar lengths together:
    padding then less than doubles its work, though one sequence be long and many short.

    packed: the op's parameters of shape [1, sum(T), ...]. It returns such a tensor and a state;
    calls with states are not grouped.
    """

    def decorate(op):
        signature = inspect.signature(op)

        @wraps(op)
        def run(*args, **kwargs):
            options = signature.bind(*args, **kwargs).arguments
            options |= options.pop("_", {})
            cu_seqlens = options.get("cu_seqlens")
            has_state = options.get("initial_state") is not None
            if cu_seqlens is None or has_state or options.get("output_final_state") or options.get("use_cache"):
                return op(**options)
            lengths = cu_seqlens.unique_consecutive().diff()  # without empty sequences
            sizes = torch.tensor([length.bit_length() for length in (lengths - 1).tolist()], device=lengths.device)
            tokens, outputs = [], []
            for size in sizes.unique():
                members = sizes == size
                chosen = members.repeat_interleave(lengths).nonzero().flatten()
                group = {name: options[name][:, chosen] for name in packed if options.get(name) is not None}
                group["cu_seqlens"] = F.pad(lengths[members].cumsum(0), (1, 0))
                outputs.append(op(**options | group)[0])
                tokens.append(chosen)
            return torch.cat(outputs, 1)[:, torch.cat(tokens).argsort()], None

        return run

    return decorate


def _future(C, x):
    """The mask [C, C] of keys after the query."""
    return torch.ones(C, C, dtype=torch.bool, device=x.device).triu(1)


def _causal_decay(G):
    """exp(G_i - G_j) for j <= i, else 0.  G [..., C, D] -> [..., C, C, D]."""
    difference = G.unsqueeze(-2) - G.unsqueeze(-3)
    return difference.masked_fill(_future(G.shape[-2], G)[..., None], -torch.inf).exp()


def _chunk(C, *xs):
    """[B, T, H, D] -> [B, H, N, C, D], zero-padded."""
    pad = -xs[0].shape[1] % C
    chunked = []
    for x in xs:
        padded = F.pad(x, (0, 0, 0, 0, 0, pad))
        chunked.append(padded.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4))
    return chunked


def _each_chunk(*xs):
    """Iterates over the N chunks of tensors [B, H, N, ...]."""
    return zip(*(x.unbind(2) for x in xs))


def _unchunk(outputs, T):
    """N chunks [B, H, C, D] -> [B, T, H, D]."""
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)


def _scan_value_gates(q, k, v, g, S):
    """Chunked gated linear attention with decays of the values: g [B, H, N, C, V]."""
    G = g.cumsum(-2)
    decays = _causal_decay(G)
    since_start = G.exp()
    until_end = (G[..., -1:, :] - G).exp()
    intra = ((q @ k.mT).unsqueeze(-2) @ (v.unsqueeze(-3) * decays)).squeeze(-2)
    out = []
    chunks = _each_chunk(q, k.mT, v * until_end, since_start, intra, since_start[..., -1:, :])
    for q_i, k_i, v_i, since_start_i, intra_i, decay in chunks:
        out.append((q_i @ S) * since_start_i + intra_i)
        S = decay * S + k_i @ v_i
    return out, S


def _scan(q, k, v, g, beta, S):
    """Chunked gated linear attention (beta=None) or gated delta rule: g [B, H, N, C, K or 1], beta
    [B, H, N, C, 1]. The delta rule within a chunk is solved at once, in its WY form."""
    G = g.cumsum(-2)
    decays = _causal_decay(G)
    since_start = G.exp()
    until_end = (G[..., -1:, :] - G).exp()
    if g.shape[-1] == 1:
        qk, kk = ((x @ k.mT) * decays.squeeze(-1) for x in (q, k))
    else:
        qk, kk = ((k.unsqueeze(-3) * decays) @ torch.stack((q, k), -1)).unbind(-1)
    w = v
    if beta is not None:
        matrix = (beta * kk).tril(-1)
        sides = torch.cat((beta * v, beta * k * since_start), -1)
        solved = solve_triangular(matrix, sides, upper=False, unitriangular=True)
        v, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    out = []
    chunks = _each_chunk(q * since_start, (k * until_end).mT, v, w, qk, since_start[..., -1, :, None])
    for q_i, k_i, v_i, w_i, qk_i, decay in chunks:
        if beta is not None:
            v_i = v_i - w_i @ S
        out.append(q_i @ S + qk_i @ v_i)
        S = decay * S + k_i @ v_i
    return out, S


@grouped_by_length("q", "k", "v", "g", "beta")
def linear_attention(
    q,
    k,
    v,
    g,
    beta=None,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    gate_values=False,
):
    """Gated linear attention (beta=None) or gated delta rule, chunk by chunk.

        S_t = diag(e^g_t) S_{t-1};  S_t += k_t (beta_t (v_t - k_t^T S_t))^T;  o_t = scale S_t^T q_t

    q, k [B, T, H, K], v [B, T, HV, V], log-decay g [B, T, HV, K] per channel or [B, T, HV, 1] per
    head (`gate_values`: [B, T, HV, V], decay on the value side), beta [B, T, HV], states [N, HV, K,
    V].
    """
    if cu_seqlens is not None:
        mask, q, k, v, g, beta = unpack(cu_seqlens, q, k, v, g, beta)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = v.dtype
    q, k, v, g, beta = _upcast(q, k, v, g, beta)
    C = min(T, 64 if g.shape[-1] == 1 else 16)
    q, k, v, g = _chunk(C, q * (K**-0.5 if scale is None else scale), k, v, g)
    if HV > H:
        q, k = (x.repeat_interleave(HV // H, 1) for x in (q, k))
    if initial_state is None:
        S = q.new_zeros(B, HV, K, V)
    else:
        S = initial_state.to(q)
        S = S.mT if state_v_first else S
    if gate_values:
        out, S = _scan_value_gates(q, k, v, g, S)
    else:
        if beta is not None:
            (beta,) = _chunk(C, beta.unsqueeze(-1))
        out, S = _scan(q, k, v, g, beta, S)
    o = _unchunk(out, T).to(dtype)
    if cu_seqlens is not None:
        o = o[mask][None]
    if not output_final_state:
        return o, None
    return o, S.mT.contiguous() if state_v_first else S


def _gate_in_kernel(g, A_log, dt_bias, lower_bound):
    """The log-decay that the kernels of the gated delta rule and KDA compute from a projection g
    [B, T, HV] or [B, T, HV, K]."""
    g, A_log, dt_bias = _upcast(g, A_log, dt_bias)
    if dt_bias is not None:
        g = g + dt_bias.view(g.shape[2:])
    A = 1
    if A_log is not None:
        A = A_log.exp().view(-1, *[1] * (g.ndim - 3))
    if lower_bound is None:
        return -A * F.softplus(g)
    return lower_bound * (A * g).sigmoid()


def delta_rule(
    q,
    k,
    v,
    g=None,
    beta=None,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    lower_bound=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    **_,
):
    """chunk_/fused_recurrent_ gated_delta_rule, kda and delta_rule (g=None) in one."""
    if use_qk_l2norm_in_kernel:
        q, k = (_l2norm(x) for x in _upcast(q, k))
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    if use_beta_sigmoid_in_kernel:
        beta = _upcast(beta)[0].sigmoid() * (2 if allow_neg_eigval else 1)
    if g is None:
        g = v.new_zeros(v.shape[:3])
    if use_gate_in_kernel:
        g = _gate_in_kernel(g, A_log, dt_bias, lower_bound)
    return linear_attention(
        q,
        k,
        v,
        g if g.ndim == 4 else g.unsqueeze(-1),
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def gla(
    q,
    k,
    v,
    g=None,
    gk=None,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    **_,
):
    """chunk_gla (g) and fused_recurrent_gla (gk)."""
    return linear_attention(
        q,
        k,
        v,
        g if gk is None else gk,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def gsa(q, k, v, s, g, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **_):
    """chunk_gsa and fused_recurrent_gsa: keys write to slots, slots read values."""
    hk, hv = (None, None) if initial_state is None else initial_state
    options = dict(output_final_state=output_final_state, cu_seqlens=cu_seqlens)
    ok, hk = linear_attention(q, k, s, g, scale=scale, initial_state=hk, gate_values=True, **options)
    slots_read = _upcast(ok)[0].softmax(-1)
    ov, hv = linear_attention(slots_read, s, v, g, scale=1.0, initial_state=hv, **options)
    return ov.to(q.dtype), [hk, hv]


def _scan_dplr(q, k, v, a, b, g, S):
    """Chunked DPLR delta rule of tensors [B, H, N, C, channels]."""
    G = g.cumsum(-2)
    # a_t reads the state before its own decay, so row t of `a` uses the decay of row t - 1.
    next_a = F.pad(a[..., 1:, :], (0, 0, 0, 1))
    rows = torch.stack((q, next_a), -1).unsqueeze(-4)
    columns = torch.stack((k, b), -3).unsqueeze(-3) * _causal_decay(G).unsqueeze(-4)
    of_k, of_b = (columns @ rows).unbind(-4)
    qk, ak = of_k.unbind(-1)
    qb, ab = of_b.unbind(-1)
    ak, ab = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (ak, ab))
    matrix = -ab
    sides = torch.cat((ak @ v, a * (G - g).exp()), -1)
    solved = solve_triangular(matrix, sides, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    until_end = (G[..., -1:, :] - G).exp()
    out = []
    chunks = _each_chunk(
        q * G.exp(), qk, qb, v, u, w, (k * until_end).mT, (b * until_end).mT, G[..., -1, :, None].exp()
    )
    for q_i, qk_i, qb_i, v_i, u_i, w_i, k_i, b_i, decay in chunks:
        u_i = u_i + w_i @ S
        out.append(q_i @ S + qk_i @ v_i + qb_i @ u_i)
        S = decay * S + k_i @ v_i + b_i @ u_i
    return out, S


@grouped_by_length("q", "k", "v", "a", "b", "gk")
def dplr(
    q,
    k,
    v,
    a,
    b,
    gk,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    **_,
):
    """chunk_dplr_delta_rule (RWKV-7): S_t = diag(e^gk_t) S_{t-1} + b_t (a_t^T S_{t-1}) +
    k_t v_t^T."""
    if cu_seqlens is not None:
        mask, q, k, v, a, b, gk = unpack(cu_seqlens, q, k, v, a, b, gk)
    B, T, H, K = q.shape
    dtype = v.dtype
    q = q * (K**-0.5 if scale is None else scale)
    q, k, v, a, b, g = _chunk(min(T, 16), *_upcast(q, k, v, a, b, gk))
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(q)
    out, S = _scan_dplr(q, k, v, a, b, g, S)
    o = _unchunk(out, T).to(dtype)
    if cu_seqlens is not None:
        o = o[mask][None]
    return o, S if output_final_state else None


def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, **kw):
    return dplr(r, k, v, a, b, w, scale=scale, **kw)


def fused_mul_recurrent_rwkv7(r, w, k, v, kk, a, scale=1.0, **kw):
    return dplr(r, k, v, -kk, kk * a, w, scale=scale, **kw)


# ---------------------------------------------------------------------------------- PaTH attention
@grouped_by_length("q", "k", "v", "w", "beta", "g")
def path_attn(q, k, v, w, beta, g=None, scale=None, cu_seqlens=None, use_cache=False):
    """parallel_path_attn: softmax attention whose logits see k_j through H_i ... H_{j+1}, H = I -
    beta w w^T."""
    if cu_seqlens is not None:
        mask, q, k, v, w, beta, g = unpack(cu_seqlens, q, k, v, w, beta, g)
    dtype = q.dtype
    T = q.shape[1]
    if g is None:
        g = q.new_zeros(q.shape[:3])
    (q,) = _upcast(q)
    o, keys = _path_chunks(q, *(x.to(q) for x in (k, v, w, beta, g)), scale or q.shape[-1] ** -0.5)
    o = o.flatten(1, 2)[:, :, :T].transpose(1, 2).to(dtype)
    k_cache = keys[:, :, 0, :T].transpose(1, 2).to(dtype) if use_cache else None
    if cu_seqlens is not None:
        o = o[mask][None]
        k_cache = k_cache if k_cache is None else k_cache[mask][None]
    return o, k_cache


def _path_chunks(q, k, v, w, beta, g, scale):
    """PaTH attention [B, H, G, T padded to chunks, V], G query heads per key head, and the keys as
    seen from the end."""
    C = min(q.shape[1], 64)
    K = q.shape[-1]
    G = q.shape[2] // k.shape[2]
    beta = beta.unsqueeze(-1)
    g = g.cumsum(1).unsqueeze(-1)
    q, k, v, w, beta, g = _chunk(C, q, k, v, w, beta, g)
    q, g = (x.unflatten(1, (-1, G)) for x in (q, g))  # [B, H, G, N, C, .]
    k, v, w, beta = (x.unsqueeze(2) for x in (k, v, w, beta))
    # UT transform: within a chunk, H_i ... H_{j+1} x = x - w^T (X, or Y x from the chunk's start on).
    bw = beta * w
    matrix = (bw @ w.mT).tril(-1)
    sides = torch.cat((bw, (bw @ k.mT).tril(-1)), -1)
    Y, X = solve_triangular(matrix, sides, upper=False, unitriangular=True).split((K, C), -1)
    qw = (q @ w.mT).tril()
    local = (q @ k.mT - qw @ X).masked_fill(_future(C, q), -torch.inf)
    v = v.flatten(3, 4)
    g_all = g.flatten(3)
    past = k[..., 0, :0, :]  # keys as seen from the end of the last chunk
    out = []
    per_chunk = (q - qw @ Y, k - X.mT @ w, w, Y, local, g)
    chunks = zip(*(x.unbind(3) for x in per_chunk))
    for q_i, k_i, w_i, y_i, local_i, g_i in chunks:
        logits = torch.cat((q_i @ past.mT, local_i), -1)
        n = logits.shape[-1]
        weights = ((logits + g_i - g_all[..., None, :n]) * scale).softmax(-1)
        out.append(weights @ v[..., :n, :])
        past = torch.cat((past - (past @ y_i.mT) @ w_i, k_i), -2)
    return torch.cat(out, -2), past


# ----------------------------------------------------------------------------------------- modules
def forgetting_attn(q, k, v, g, scale=None, cu_seqlens=None, **_):
    """Softmax attention with forget gates: logits + sum of the log-gates g [B, T, HQ] between key
    and query."""
    if cu_seqlens is not None:
        lengths = cu_seqlens.unique_consecutive().diff().tolist()  # without empty sequences
        parts = zip(*(x[0].split(lengths) for x in (q, k, v, g)))
        return torch.cat([forgetting_attn(*(x[None] for x in part), scale=scale) for part in parts], 1)
    dtype = q.dtype
    q, k, v, g = (x.transpose(1, 2) for x in _upcast(q, k, v, g))
    g = g.cumsum(-1)
    bias = (g[..., :, None] - g[..., None, :]).masked_fill(_future(q.shape[2], q), -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).to(dtype)


def attn_decoding(q, k, v, g=None, scale=None, cu_seqlens=None, do_gate_scale=False):
    """attn_decoding_one_step: softmax attention of one query [1, N, HQ, K] at the end of each of N
    packed sequences, with forget gates g [1, sum(T), HQ] as in `forgetting_attn`, and `scale` on
    them too if do_gate_scale."""
    mask, k, v, g = unpack(cu_seqlens, k, v, g)
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g = _upcast(q.transpose(0, 1), k, v, g)
    bias = q.new_zeros(len(q), q.shape[2], k.shape[1])
    if g is not None:
        g = g.cumsum(1).mT
        bias = (g[..., -1:] - g) * (scale if do_gate_scale else 1)
    bias = bias.masked_fill(~mask[:, None], -torch.inf)[:, :, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[:, :, 0][None].to(dtype)


@grouped_by_length("x", "residual")
def causal_conv1d(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    backend=None,
    cu_seqlens=None,
    **_,
):
    """Depthwise causal convolution; states are the last W inputs, [N, D, W]."""
    y = x
    if cu_seqlens is not None:
        mask, y = unpack(cu_seqlens, x)
    N, T, D = y.shape
    W = weight.shape[1]
    y = y.mT
    state = y.new_zeros(N, D, W) if initial_state is None else initial_state.to(y)
    y = torch.cat((state, y), -1)
    final_state = None
    if output_final_state:
        lengths = torch.full((N,), T, device=x.device) if cu_seqlens is None else cu_seqlens.diff()
        last_inputs = lengths[:, None] + torch.arange(W, device=x.device)
        final_state = y.gather(-1, last_inputs[:, None].expand(N, D, W))
    bias = None if bias is None else bias.to(y)
    y = F.conv1d(y[..., 1:], weight[:, None].to(y), bias, groups=D).mT
    if cu_seqlens is not None:
        y = y[mask][None]
    if activation is not None:
        y = F.silu(y)
    return y if residual is None else y + residual, final_state


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """One token per sequence; updates `cache` [N, D, W] in place."""
    new = x.reshape(cache.shape[0], -1, 1).to(cache)
    cache.copy_(torch.cat((cache[..., 1:], new), -1))
    y = (cache * weight).sum(-1)
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = F.silu(y)
    y = y.view(x.shape).to(x.dtype)
    return y if residual is None else y + residual, cache


def _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups=1):
    dtype = x.dtype
    res_dtype = torch.float32 if residual_in_fp32 else dtype
    if residual is not None:
        x, res_dtype = x + residual, residual.dtype
    res = x.to(res_dtype)
    (y,) = _upcast(x)
    y = y.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        y = y - y.mean(-1, keepdim=True)
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(dtype), res


def layer_norm(
    x,
    weight,
    bias,
    residual=None,
    eps=1e-5,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    num_groups=1,
):
    y, res = _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)
    return (y, res) if prenorm else y


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def layer_norm_linear(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-5,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    num_groups=1,
):
    y, res = _norm(x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)
    y = F.linear(y, linear_weight, linear_bias)
    return (y, res) if prenorm else y


def _gated(is_rms_norm):
    def norm_gated(
        x,
        g,
        weight,
        bias,
        activation="swish",
        residual=None,
        prenorm=False,
        residual_in_fp32=False,
        eps=1e-6,
    ):
        y, res = _norm(*_upcast(x), weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)
        (g,) = _upcast(g)
        y = (y * (g.sigmoid() if activation == "sigmoid" else F.silu(g))).to(x.dtype)
        return (y, res) if prenorm else y

    return norm_gated


rms_norm_gated = _gated(is_rms_norm=True)
layer_norm_gated = _gated(is_rms_norm=False)


def l2norm(x, eps=1e-6, output_dtype=None):
    return _l2norm(*_upcast(x), eps).to(output_dtype or x.dtype)


def swiglu(x, y):
    return F.silu(x) * y


def swiglu_linear(x, y, weight, bias):
    return F.linear(swiglu(x, y), weight, bias)


def rotary_embedding(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, **_):
    B, T = x.shape[:2]
    pos = torch.arange(T, device=x.device)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        pos = pos - cu_seqlens[:-1].repeat_interleave(lengths)
        if torch.is_tensor(seqlen_offsets):
            seqlen_offsets = seqlen_offsets.repeat_interleave(lengths)
        pos = pos + seqlen_offsets
    else:
        pos = pos + (seqlen_offsets[:, None] if torch.is_tensor(seqlen_offsets) else seqlen_offsets)
    valid = (pos >= 0)[..., None, None]  # left-padding: rows without a position are zero
    cos, sin = (c[pos.clamp(min=0)].unsqueeze(-2) * valid for c in (cos, sin))
    R = 2 * cos.shape[-1]
    rotated = x[..., :R]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated.chunk(2, -1)
    a, b = a * cos - b * sin, a * sin + b * cos
    y = torch.cat((a, b), -1)
    if interleaved:
        y = torch.stack((a, b), -1).flatten(-2)
    return torch.cat((y, x[..., R:]), -1)


def token_shift(x, cu_seqlens=None, cache=None, output_cache=False, **_):
    """delta_t = x_{t-1} - x_t; the cache is the last token, [N, D]."""
    if cu_seqlens is None:
        first = torch.zeros_like(x[:, :1]) if cache is None else cache.view(x.shape[0], 1, -1)
        last = x[:, -1]
        delta = torch.cat((first, x[:, :-1]), 1) - x
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        first = x.new_zeros(1, len(starts), x.shape[-1]) if cache is None else cache.view(1, len(starts), -1).to(x)
        last = x[0, ends - 1]
        has_tokens = ends > starts
        delta = x.roll(1, 1).index_copy(1, starts[has_tokens], first[:, has_tokens]) - x
    return (delta, last) if output_cache else delta


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None, **_):
    """Softmax attention in flash-attn's layout [B, T, H, D]; causality and window are aligned to
    the last query and the last key."""
    query_position = torch.arange(k.shape[1] - q.shape[1], k.shape[1])
    distance = query_position[:, None] - torch.arange(k.shape[1])
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window_size[0] >= 0:
        mask &= distance <= window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask.to(q.device), scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """The same for packed sequences [sum(T), H, D]."""
    lengths = zip((q, k, v), (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))
    sequences = zip(*(x.split(cu_seqlens.diff().tolist()) for x, cu_seqlens in lengths))
    return torch.cat([flash_attn_func(*(x[None] for x in sequence), **options)[0] for sequence in sequences])


# Module of FLA -> its entry points -> their stand-ins; a string names a PyTorch reference
# implementation of FLA's own.
STAND_INS = {
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": delta_rule,
        "fused_recurrent_gated_delta_rule": delta_rule,
    },
    "fla.ops.kda": {"chunk_kda": delta_rule, "fused_recurrent_kda": delta_rule},
    "fla.ops.delta_rule": {
        "chunk_delta_rule": delta_rule,
        "fused_recurrent_delta_rule": delta_rule,
    },
    "fla.ops.gla": {"chunk_gla": gla, "fused_recurrent_gla": gla},
    "fla.ops.gsa": {"chunk_gsa": gsa, "fused_recurrent_gsa": gsa},
    "fla.ops.path_attn.parallel": {"parallel_path_attn": path_attn},
    "fla.ops.forgetting_attn.parallel": {"parallel_forgetting_attn": forgetting_attn},
    "fla.ops.attn.decoding": {"attn_decoding_one_step": attn_decoding},
    "fla.ops.rwkv7": {
        "chunk_rwkv7": chunk_rwkv7,
        "fused_mul_recurrent_rwkv7": fused_mul_recurrent_rwkv7,
    },
    "fla.ops.rwkv7.fused_addcmul": {"fused_addcmul_rwkv7": "fla.ops.rwkv7.fused_addcmul.torch_addcmul_rwkv7"},
    "fla.ops.rwkv7.fused_k_update": {"fused_k_rwkv7": "fla.ops.rwkv7.fused_k_update.k_update_ref"},
    "fla.ops.rwkv7.gate_output_correction": {
        "gate_output_correction": "fla.ops.rwkv7.gate_output_correction.gate_output_correction_ref"
    },
    "fla.modules.token_shift": {"token_shift": token_shift},
    "fla.modules.causal_conv1d.ops": {
        "causal_conv1d": causal_conv1d,
        "causal_conv1d_update": causal_conv1d_update,
    },
    "fla.modules.norm.layernorm": {
        "layer_norm": layer_norm,
        "group_norm": layer_norm,
        "rms_norm": rms_norm,
        "layer_norm_linear": layer_norm_linear,
    },
    "fla.modules.norm.fused_norm_gate": {
        "rms_norm_gated": rms_norm_gated,
        "layer_norm_gated": layer_norm_gated,
    },
    "fla.modules.norm.layernorm_gated": {"rmsnorm_fn": "fla.modules.norm.layernorm_gated.rms_norm_ref"},
    "fla.modules.norm.l2norm": {"l2norm": l2norm},
    "fla.modules.rotary.ops": {"rotary_embedding": rotary_embedding},
    "fla.modules.activations.ops": {
        "swish": F.silu,
        "sigmoid": torch.sigmoid,
        "swiglu": swiglu,
        "swiglu_linear": swiglu_linear,
    },
}


def _resolve(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _namespaces() -> list[dict]:
    """The namespaces of FLA's loaded modules, and each ACT2FN in them."""
    spaces = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fla":
            spaces.append(vars(module))
            if vars(module).get("ACT2FN"):
                spaces.append(vars(module)["ACT2FN"])
    return spaces


def bind_stand_ins() -> list[tuple[dict, str, object]]:
    """Rebinds every name in FLA's loaded modules, and every entry of its ACT2FN, that refers to an
    entry point to its stand-in.

    Returns what undoes it: namespace, name and original value of each binding that changed.
    """
    for path in STAND_INS:
        importlib.import_module(path)
    spaces = _namespaces()
    bound = []
    for path, names in STAND_INS.items():
        for name, stand_in in names.items():
            old = _resolve(f"{path}.{name}")
            new = _resolve(stand_in) if isinstance(stand_in, str) else stand_in
            if new is not old:
                bound += _rebind(spaces, old, new)
    return bound


def rebind_entry_point(old, new) -> None:
    """Rebinds every name in FLA's loaded modules that refers to `old`, to `new`."""
    _rebind(_namespaces(), old, new)


def _rebind(spaces: list[dict], old, new) -> list[tuple[dict, str, object]]:
    bound = []
    for space in spaces:
        for key in [key for key, value in space.items() if value is old]:
            space[key] = new
            bound.append((space, key, old))
    return bound


def install() -> None:
    """Binds FLA's entry points to the stand-ins, once, where FLA found no GPU; with a GPU it does
    nothing.

    Call it before FLA layers are built: they look up their activations when constructed.
    """
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    import fla
    import fla.layers
    import fla.models
    from fla.utils import device_platform

    if device_platform != "cpu":
        return
    bind_stand_ins()
    # FLA takes these from flash-attn, which has no CPU version, and leaves them unset or undefined
    # without it.
    fla.layers.attn.flash_attn_func = flash_attn_func
    fla.layers.attn.flash_attn_varlen_func = flash_attn_varlen_func

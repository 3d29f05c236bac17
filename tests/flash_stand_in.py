"""What FlashAttention computes for packed rows, spelled out on the CPU, so that tests can run the code
around its kernels in float64."""

import torch

from distill_model import documents, sink_attention, student_softmax


def scores(q, k, cu_seqlens, window_size):
    """[tokens, heads, tokens]; -inf where a query does not attend."""
    tokens, heads, dim = q.shape
    order = torch.arange(tokens)
    document = torch.searchsorted(cu_seqlens.long(), order, right=True)
    distance = order[:, None] - order
    seen = (distance >= 0) & (distance < window_size) & (document[:, None] == document)
    k = k.repeat_interleave(heads // k.shape[1], 1)
    return (torch.einsum("thd,shd->ths", q, k) * dim**-0.5).masked_fill(~seen[:, None], -torch.inf)


def forward(q, k, v, cu_seqlens, longest, window_size):
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    all_scores = scores(q, k, cu_seqlens, window_size)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = torch.einsum("ths,shd->thd", all_scores.softmax(-1), v)
    return out.to(dtype), all_scores.logsumexp(-1).T


def backward(d_out, q, k, v, out, log_sum, cu_seqlens, longest, window_size):
    group = q.shape[1] // k.shape[1]
    dtype, wide = q.dtype, log_sum.dtype
    d_out, q, k, v, out = (x.to(wide) for x in (d_out, q, k, v, out))
    weights = (scores(q, k, cu_seqlens, window_size) - log_sum.T[..., None]).exp()
    d_weights = torch.einsum("thd,shd->ths", d_out, v.repeat_interleave(group, 1))
    d_scores = weights * (d_weights - (d_out * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    d_q = torch.einsum("ths,shd->thd", d_scores, k.repeat_interleave(group, 1))
    d_k = torch.einsum("ths,thd->shd", d_scores, q)
    d_v = torch.einsum("ths,thd->shd", weights, d_out)
    d_k, d_v = (x.unflatten(1, (-1, group)).sum(2) for x in (d_k, d_v))
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


def varlen_attn(q, k, v, cu_seqlens, _, longest, __, window_size):
    return forward(q, k, v, cu_seqlens, longest, window_size[0] + 1)[0]


def use(monkeypatch) -> None:
    """Lets the attention of windows run as on a GPU."""
    for module in (documents, student_softmax):
        monkeypatch.setattr(module, "supports_varlen", lambda *_: True)
    monkeypatch.setattr(documents, "_varlen_attention", lambda: (varlen_attn, {}))
    monkeypatch.setattr(sink_attention, "window_forward", forward)
    monkeypatch.setattr(sink_attention, "window_backward", backward)

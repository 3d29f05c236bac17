"""Softmax attention over a sliding window and a document's first tokens, its sinks (Xiao et al.,
arXiv 2309.17453), in time and memory of tokens x (window + sinks).

FlashAttention (Dao et al., arXiv 2205.14135) computes the window's part of each query. The sinks that
the window does not reach are few and computed directly, and the two are merged by their
log-sum-exps, as in Ring Attention (Liu et al., arXiv 2310.01889): with the output and the log-sum-exp
of both, FlashAttention's backward pass gives exact gradients of the window's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LARGEST_BLOCK = 256  # tokens


@dataclass(frozen=True)
class Sinks:
    """The sinks of a packed row's queries, in blocks of `block` tokens, at most window_size.

    A sink that a window does not reach lies window_size tokens before the query or more, so its
    document has begun before the query's block: all queries of a block that attend to such sinks are
    of the document of the block's first token, and share them.

    indices: [blocks, S], of the sinks in the packed row. hidden: [blocks, block, 1, 1, S] bool, where
    the window holds the sink already, or the token is of another document.
    """

    indices: torch.Tensor
    hidden: torch.Tensor
    block: int

    @classmethod
    def of(cls, positions: torch.Tensor, window_size: int, sink_size: int) -> Sinks:
        """positions: [tokens], of each token in its document."""
        block = min(LARGEST_BLOCK, 1 << (window_size.bit_length() - 1))
        order = torch.arange(sink_size, device=positions.device)
        first = torch.arange(0, len(positions), block, device=positions.device)
        begins = first - positions[::block]
        indices = (begins[:, None] + order).clamp(max=len(positions) - 1)
        distance = F.pad(positions, (0, -len(positions) % block)).view(-1, block, 1, 1, 1) - order
        return cls(indices, distance < window_size, block)

    def blocks(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """x [tokens, heads, ...] as [blocks, block, kv_heads, group, ...], padded with zeros, in
        fp32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        missing = -len(x) % self.block
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
        return x.unflatten(1, (kv_heads, -1)).unflatten(0, (-1, self.block))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[blocks, block, kv_heads, group, S], of q in blocks and k [blocks, S, kv_heads, D] of the
        sinks."""
        scores = torch.einsum("ntkgd,nskd->ntkgs", q, k) * q.shape[-1] ** -0.5
        return scores.masked_fill(self.hidden, -torch.inf)

    def gradients(self, q, k, v, out, log_sum, d_out) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q [tokens, heads, D], and of the sinks' keys and values [blocks, S, kv_heads, D], through
        the attention to the sinks. out and log_sum are those of all keys that a query attends to."""
        kv_heads = k.shape[1]
        q, out, log_sum, d_out = (self.blocks(x, kv_heads) for x in (q, out, log_sum.T, d_out))
        k, v = (x[self.indices].to(q) for x in (k, v))
        weights = (self.scores(q, k) - log_sum[..., None]).exp()
        d_weights = torch.einsum("ntkgd,nskd->ntkgs", d_out, v)
        mean = (d_out * out).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * q.shape[-1] ** -0.5
        d_q = torch.einsum("ntkgs,nskd->ntkgd", d_scores, k)
        d_k = torch.einsum("ntkgs,ntkgd->nskd", d_scores, q)
        d_v = torch.einsum("ntkgs,ntkgd->nskd", weights, d_out)
        return d_q.flatten(2, 3).flatten(0, 1), d_k, d_v


def window_forward(q, k, v, cu_seqlens, longest: int, window_size: int):
    """FlashAttention over a sliding window of each document: its output [tokens, heads, D], and the
    log-sum-exps of the scores [heads, tokens]."""
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *(cu_seqlens, cu_seqlens, longest, longest),
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        window_size_left=window_size - 1,
        window_size_right=0,
    )
    return out, log_sum


def window_backward(d_out, q, k, v, out, log_sum, cu_seqlens, longest: int, window_size: int):
    """The gradients of q, k and v of `window_forward`, of which out and log_sum may hold other keys
    besides."""
    return torch.ops.aten._flash_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        log_sum,
        *(cu_seqlens, cu_seqlens, longest, longest),
        0.0,  # no dropout, whose random state is unused
        False,  # a causal mask is a window without a left end
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device),
        window_size_left=window_size - 1,
        window_size_right=0,
    )


class WindowWithSinks(torch.autograd.Function):
    """q [tokens, heads, D], k and v [tokens, kv heads, D]; returns q's shape."""

    @staticmethod
    @torch.autocast("cuda", enabled=False)
    def forward(ctx, q, k, v, cu_seqlens, longest: int, window_size: int, sinks: Sinks):
        tokens, kv_heads, _ = k.shape
        near, near_sum = window_forward(q, k, v, cu_seqlens, longest, window_size)
        near, near_sum = (sinks.blocks(x, kv_heads) for x in (near, near_sum.T))
        sink_k, sink_v = (x[sinks.indices].to(near) for x in (k, v))
        scores = sinks.scores(sinks.blocks(q, kv_heads), sink_k)
        log_sum = torch.logaddexp(near_sum, scores.logsumexp(-1))
        weights = (scores - log_sum[..., None]).exp()
        far = torch.einsum("ntkgs,nskd->ntkgd", weights, sink_v)
        out = torch.addcmul(far, near, (near_sum - log_sum).exp()[..., None])
        out = out.flatten(2, 3).flatten(0, 1)[:tokens].to(q.dtype)
        log_sum = log_sum.flatten(2).flatten(0, 1)[:tokens].T.contiguous()
        ctx.save_for_backward(q, k, v, out, log_sum, cu_seqlens, sinks.indices, sinks.hidden)
        ctx.longest = longest
        ctx.window_size = window_size
        ctx.block = sinks.block
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, d_out):
        q, k, v, out, log_sum, cu_seqlens, indices, hidden = ctx.saved_tensors
        attended = (q, k, v, out, log_sum)
        window = (cu_seqlens, ctx.longest, ctx.window_size)
        d_q, *near = window_backward(d_out.contiguous(), *attended, *window)
        far_q, *far = Sinks(indices, hidden, ctx.block).gradients(*attended, d_out)
        gradients = [(d_q + far_q[: len(q)]).to(q.dtype)]
        # Blocks share sinks: sums in fp32, and in a fixed order, which index_put_ keeps, and
        # index_add_ does not.
        for near_part, far_part in zip(near, far, strict=True):
            total = near_part.to(far_part).index_put_((indices,), far_part, accumulate=True)
            gradients.append(total.to(k.dtype))
        return *gradients, None, None, None, None

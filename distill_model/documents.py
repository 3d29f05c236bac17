"""Chunks of several documents: each document is read as if it stood alone.

A batch [B, T] says by its `document_ids` [B, T] which document a token belongs to: neighbours of a
row with equal ids are of one document, PADDING is of none. Attention reads the batch as one packed
row [1, B T], in which `cu_seqlens` marks where documents begin, as FLA's kernels and FlashAttention
take it (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

PADDING = -1  # the document id of tokens that fill a chunk up


@dataclass(frozen=True)
class Documents:
    """The N documents of a batch, its rows one after another; a row's padding counts as one.

    cu_seqlens: [N + 1] int32, where each begins, and the number of tokens B T. lengths: the same on
    the host, as N lengths. positions: [1, B T], of each token in its document. real: the indices of
    the tokens that are no padding, or None if none is.
    """

    cu_seqlens: torch.Tensor
    lengths: list[int]
    positions: torch.Tensor
    real: torch.Tensor | None

    @classmethod
    def of(cls, document_ids: torch.Tensor) -> Documents:
        """Of document_ids [B, T]. On a GPU a host-device sync."""
        begins = document_ids.new_ones(document_ids.shape, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        begins = begins.flatten()
        starts = begins.nonzero().flatten()
        bounds = F.pad(starts, (0, 1), value=begins.numel())
        lengths = bounds.diff()
        tokens = torch.arange(begins.numel(), device=starts.device)
        positions = tokens - starts.repeat_interleave(lengths, output_size=begins.numel())
        is_real = (document_ids != PADDING).flatten()
        real = None if is_real.all() else is_real.nonzero().flatten()
        return cls(bounds.int(), lengths.tolist(), positions[None], real)


def learned_tokens(loss_mask: torch.Tensor | None, document_ids: torch.Tensor | None) -> torch.Tensor | None:
    """The tokens that a loss of predictions is the mean over, [B, T] bool, or None for all: those of
    loss_mask [B, T]; of document_ids [B, T] neither a document's first token nor padding."""
    if document_ids is None:
        return loss_mask
    continues = torch.zeros_like(document_ids, dtype=torch.bool)
    continues[:, 1:] = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] != PADDING)
    return continues if loss_mask is None else continues & loss_mask


def predicting_learned(loss_mask: torch.Tensor) -> torch.Tensor:
    """The positions [B, T] whose next token is learned, of loss_mask [B, T] bool: True for the tokens
    that are. Never a sequence's last position, whose next token is not in it."""
    positions = torch.zeros_like(loss_mask)
    positions[:, :-1] = loss_mask[:, 1:]
    return positions


def real_rows(x: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    """x [B, T, features], or [1, B T, features], without padding: [tokens, features]."""
    rows = x.flatten(0, -2)
    return rows if documents is None or documents.real is None else rows.index_select(0, documents.real)


def run_attention(attn: nn.Module, x: torch.Tensor, documents: Documents | None = None, **kwargs) -> torch.Tensor:
    """attn's output for x [B, T, hidden_size], of the same shape; with documents, each of them
    alone. kwargs: of attn's forward; position_embeddings [1, B T, head_dim] with documents."""
    if documents is None:
        return attn(x, **kwargs)[0]
    packed = x.flatten(0, 1)[None]
    out = attn(packed, cu_seqlens=documents.cu_seqlens, documents=documents, **kwargs)[0]
    return out.view(x.shape)


def _supports_varlen(q: torch.Tensor) -> bool:
    """Whether FlashAttention's kernels for packed rows take q [..., head_dim]."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = q.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache
def _varlen_attention():
    """PyTorch's attention of packed rows, and the options with which it takes grouped queries:
    version 2.11 takes them unasked. Imported only where it is used, on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if grouped else {}


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    window_size: int | None = None,
    sink_size: int = 0,
) -> torch.Tensor:
    """Causal softmax attention within each document of a packed row: q [1, tokens, heads, D], k and
    v [1, tokens, kv heads, D]; returns q's shape.

    window_size: how many tokens a query attends to, itself included; None for all. sink_size: how
    many of the document's first tokens it attends to besides.
    """
    if not sink_size and _supports_varlen(q):
        varlen_attn, grouped = _varlen_attention()
        left = -1 if window_size is None else window_size - 1
        longest = max(documents.lengths)
        bounds = (documents.cu_seqlens, documents.cu_seqlens, longest, longest)
        return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(left, 0), **grouped)[None]
    parts = (x.transpose(1, 2).split(documents.lengths, 2) for x in (q, k, v))
    outputs = [_document_attention(*part, window_size, sink_size) for part in zip(*parts)]
    return torch.cat(outputs, 2).transpose(1, 2)


def _document_attention(q, k, v, window_size: int | None, sink_size: int) -> torch.Tensor:
    """Causal attention of one document, tensors [1, heads, tokens, D]."""
    length = q.shape[2]
    mask = None
    if window_size is not None and window_size < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & ((distance < window_size) | (position < sink_size))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1]
    )

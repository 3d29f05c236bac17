"""Chunks of several documents: each document is read as if it stood alone.

A batch [B, T] says by its `document_ids` [B, T] which document a token belongs to: neighbours of a
row with equal ids are of one document, PADDING is of none. Attention reads the batch as one packed
row [1, B T], in which `cu_seqlens` marks where documents begin, as FLA's kernels and FlashAttention
take it (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_ops import rebind_entry_point
from .sink_attention import Sinks, WindowWithSinks

PADDING = -1  # the document id of tokens that fill a chunk up
# Elements beside one per token of the tensor of bounds: the end, that of an empty document, and one
# that no document has.
SPARE = 3


@dataclass(frozen=True)
class Documents:
    """The N documents of a batch, its rows one after another; a row's padding counts as one.

    cu_seqlens: [N + 1] int32, where each begins, and the number of tokens B T. positions: [1, B T],
    of each token in its document. is_real: [B T] bool, the tokens that are no padding. row_length:
    T. is_static: whether N is fixed; the last documents are then empty, one at least.
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    is_real: torch.Tensor
    row_length: int
    is_static: bool

    @classmethod
    def of(cls, document_ids: torch.Tensor, max_documents: int | None = None) -> Documents:
        """Of document_ids [B, T]. max_documents: with it, no shape depends on the documents, and the
        host reads nothing, as a CUDA graph needs it; the device asserts that they are not more.
        Without it the host reads how many they are."""
        begins = document_ids.new_ones(document_ids.shape, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        begins = begins.flatten()
        tokens = begins.numel()
        indices = torch.arange(tokens, dtype=torch.int32, device=begins.device)
        numbers = begins.cumsum(0) - 1  # of each token's document
        # As many bounds as there may be at most, see `tokens_of`; those not needed stay at the end.
        bounds = torch.full((tokens + SPARE,), tokens, dtype=torch.int32, device=begins.device)
        bounds.scatter_(0, torch.where(begins, numbers, tokens + SPARE - 1), indices)
        positions = indices - bounds[numbers]
        is_static = max_documents is not None
        if is_static:
            use_static_shapes()
            torch._assert_async(numbers[-1] < max_documents)
            cu_seqlens = bounds[: min(max_documents, tokens) + 2]
        else:
            cu_seqlens = bounds[: int(numbers[-1]) + 2].clone()
        is_real = (document_ids != PADDING).flatten()
        return cls(cu_seqlens, positions.long()[None], is_real, document_ids.shape[1], is_static)

    @classmethod
    def of_rows(cls, x: torch.Tensor, attention_mask: torch.Tensor | None) -> Documents:
        """Each row's tokens as one document, of x [B, T, ...] on its device. attention_mask: [B, T],
        False for padding on the left, which becomes a document of its own."""
        if attention_mask is None:
            attention_mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        return cls.of(attention_mask.bool().int(), 2 * len(x))

    @cached_property
    def lengths(self) -> list[int]:
        """Of the N documents, on the host; reading them is a host-device sync."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def real(self) -> torch.Tensor | None:
        """The indices of the tokens that are no padding, or None if none is; a host-device sync."""
        return None if self.is_real.all() else self.is_real.nonzero().flatten()

    @property
    def longest(self) -> int:
        """A length that no document exceeds."""
        return self.row_length if self.is_static else max(self.lengths)


def tokens_of(cu_seqlens: torch.Tensor) -> int | None:
    """The number of packed tokens, where cu_seqlens are those of static `Documents`; else None.

    Those are the first of a tensor with SPARE more elements than there are tokens. Its size passes
    through FLA's autograd functions and activation checkpointing, which an attribute would not.
    """
    elements = cu_seqlens.untyped_storage().nbytes() // cu_seqlens.element_size()
    return None if elements == len(cu_seqlens) else elements - SPARE


@cache
def use_static_shapes() -> None:
    """Replaces two functions of FLA that read cu_seqlens on the host, for static `Documents`: what
    its kernels take for their grids, and a bound on the lengths for its token shift."""
    from fla.modules import token_shift
    from fla.ops.utils import index
    from fla.utils import tensor_cache

    chunk_indices, longest = index.prepare_chunk_indices, token_shift.prepare_maxlens

    @tensor_cache
    def prepare_chunk_indices(cu_seqlens, chunk_size, cu_seqlens_cpu=None):
        tokens = tokens_of(cu_seqlens)
        if tokens is None:
            return chunk_indices(cu_seqlens, chunk_size, cu_seqlens_cpu)
        return static_chunk_indices(cu_seqlens, chunk_size, tokens)

    def prepare_maxlens(cu_seqlens):
        return tokens_of(cu_seqlens) or longest(cu_seqlens)

    rebind_entry_point(chunk_indices, prepare_chunk_indices)
    rebind_entry_point(longest, prepare_maxlens)


def static_chunk_indices(cu_seqlens: torch.Tensor, chunk_size: int, tokens: int) -> torch.Tensor:
    """(document, chunk in it) of each chunk of the packed tokens, [ceil(tokens / chunk_size) + N - 1,
    2]: as many as N documents, of which the last is empty, can have. Rows that are not needed are
    (N - 1, 0), in the empty document, where kernels have nothing to do."""
    ends = (cu_seqlens.diff() + (chunk_size - 1)).div(chunk_size, rounding_mode="floor").cumsum(0)
    last = len(ends) - 1
    rows = torch.arange(-(-tokens // chunk_size) + last, device=ends.device)
    document = torch.searchsorted(ends, rows, right=True).clamp(max=last)
    first = F.pad(ends, (1, 0))[document]
    chunk = torch.where(document == last, 0, rows - first)
    return torch.stack((document, chunk), 1).to(cu_seqlens)


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


def supports_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention's kernels for packed rows take queries of this kind."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


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
    if supports_varlen(q.device, q.dtype, q.shape[-1]):
        if sink_size and window_size is not None and documents.longest > window_size:
            sinks = Sinks.of(documents.positions[0], window_size, sink_size)
            bounds = (documents.cu_seqlens, documents.longest)
            return WindowWithSinks.apply(q[0], k[0], v[0], *bounds, window_size, sinks)[None]
        varlen_attn, grouped = _varlen_attention()
        left = -1 if window_size is None else window_size - 1
        longest = documents.longest
        bounds = (documents.cu_seqlens, documents.cu_seqlens, longest, longest)
        return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(left, 0), **grouped)[None]
    parts = (x.transpose(1, 2).split(documents.lengths, 2) for x in (q, k, v))
    outputs = [_document_attention(*part, window_size, sink_size) for part in zip(*parts) if part[0].shape[2]]
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

"""A sliding window and sinks, computed as on a GPU: FlashAttention's kernels have a stand-in, and
tests/gpu runs the kernels. Whole layers, with padding and a cache: tests/test_model.py."""

from contextlib import nullcontext

import flash_stand_in
import pytest
import torch
from test_static_documents import NoHostReads

from distill_model.documents import Documents, packed_attention
from distill_model.sink_attention import Sinks

# One token, shorter and longer than windows, many short ones; one document that spans the row.
LENGTHS = ([1, 40, 2, 1, 17, 3, 3, 30], [97])


def document_ids():
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


def inputs(heads, kv_heads, dim=8):
    tokens = document_ids().numel()
    return [torch.randn(1, tokens, n, dim, dtype=torch.double) for n in (heads, kv_heads, kv_heads)]


def naive(q, k, v, window_size, sink_size):
    """Query by query."""
    group = q.shape[2] // k.shape[2]
    outputs = []
    begin = 0
    for length in (length for row in LENGTHS for length in row):
        for i in range(length):
            seen = [begin + j for j in range(i + 1) if j > i - window_size or j < sink_size]
            scores = torch.einsum("hd,shd->hs", q[0, begin + i], k[0, seen].repeat_interleave(group, 1))
            weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
            outputs.append(torch.einsum("hs,shd->hd", weights, v[0, seen].repeat_interleave(group, 1)))
        begin += length
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("most", [None, 12])
@pytest.mark.parametrize("window_size, sink_size", [(1, 1), (5, 3), (16, 4), (4, 20), (96, 4), (97, 4)])
def test_outputs_and_gradients_equal_the_formula(monkeypatch, window_size, sink_size, most):
    heads, kv_heads = [(2, 2), (3, 1), (4, 2)][window_size % 3]
    flash_stand_in.use(monkeypatch)
    tensors = inputs(heads, kv_heads)
    d_out = torch.randn_like(tensors[0])
    found = []
    for attend in (packed_attention, naive):
        leaves = [x.clone().requires_grad_() for x in tensors]
        documents = (Documents.of(document_ids(), most),) if attend is packed_attention else ()
        out = attend(*leaves, *documents, window_size, sink_size)
        out.backward(d_out)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_the_merge_loses_no_more_than_the_dtype_does(monkeypatch, dtype, limit):
    """Sinks with large scores, whose gradients many queries add to."""
    flash_stand_in.use(monkeypatch)
    q, k, v = inputs(4, 2, 16)
    q = q + 1
    k[:, :2] += 2
    k[:, 97:99] += 2
    rounded = [x.to(dtype) for x in (q, k, v)]
    d_out = torch.randn_like(rounded[0])
    found = []
    for attend, kind in ((packed_attention, dtype), (naive, torch.double)):
        leaves = [x.detach().to(kind).clone().requires_grad_() for x in rounded]
        documents = (Documents.of(document_ids()),) if attend is packed_attention else ()
        out = attend(*leaves, *documents, 9, 2)
        out.backward(d_out.to(kind))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        assert all(x.dtype == kind for x in found[-1])
    for got, expected in zip(*found):
        assert (got.double() - expected).norm() < limit * expected.norm()


def test_a_fixed_number_of_documents_reads_nothing_on_the_host(monkeypatch):
    flash_stand_in.use(monkeypatch)
    tensors = inputs(2, 1)
    d_out = torch.randn_like(tensors[0])
    groups = document_ids()
    found = []
    for most in (None, 12):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with nullcontext() if most is None else NoHostReads():
            out = packed_attention(*leaves, Documents.of(groups, most), 8, 3)
            out.backward(d_out)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("window_size, sink_size", [(1, 2), (7, 3), (508, 4), (4096, 64)])
def test_memory_is_tokens_times_sinks(window_size, sink_size):
    tokens = 10_007
    sinks = Sinks.of(torch.arange(tokens), window_size, sink_size)
    assert sinks.block <= window_size
    assert sinks.hidden.numel() < (tokens + sinks.block) * sink_size
    assert len(sinks.indices) == -(-tokens // sinks.block)

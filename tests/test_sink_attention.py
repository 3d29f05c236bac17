"""A sliding window and sinks, computed as on a GPU: FlashAttention's kernels have a stand-in, and
tests/gpu runs the kernels. Whole layers, with padding and a cache: tests/test_model.py."""

from contextlib import nullcontext

import flash_stand_in
import pytest
import torch
from test_static_documents import NoHostReads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_model import sink_attention
from distill_model.documents import PADDING, Documents, packed_attention

# One token, shorter and longer than windows, many short ones, and padding between documents; one
# document that spans the row; padding at the end that is longer than windows.
LENGTHS = ([1, 40, 2, 1, 17, 3, 3, 9], [97], [5])
ROW = 97
DOCUMENTS = 12  # with the padding of two rows


def document_ids():
    ids = torch.full((len(LENGTHS), ROW), PADDING)
    for row, lengths in zip(ids, LENGTHS):
        row[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ids


def inputs(heads, kv_heads, dim=8):
    """q, k, v, and the gradient of the output, which is zero where padding is."""
    ids = document_ids()
    q, k, v = (torch.randn(1, ids.numel(), n, dim, dtype=torch.double) for n in (heads, kv_heads, kv_heads))
    return [q, k, v], torch.randn_like(q) * (ids != PADDING).view(1, -1, 1, 1)


def naive(q, k, v, window_size, sink_size):
    """Query by query; zero where padding is, which is not read."""
    group = q.shape[2] // k.shape[2]
    outputs = []
    for row, lengths in enumerate(LENGTHS):
        begin = row * ROW
        for length in lengths:
            for i in range(length):
                seen = [begin + j for j in range(i + 1) if j > i - window_size or j < sink_size]
                scores = torch.einsum("hd,shd->hs", q[0, begin + i], k[0, seen].repeat_interleave(group, 1))
                weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
                outputs.append(torch.einsum("hs,shd->hd", weights, v[0, seen].repeat_interleave(group, 1)))
            begin += length
        outputs += [torch.zeros_like(q[0, 0])] * ((row + 1) * ROW - begin)
    return torch.stack(outputs)[None]


def without_padding(out):
    return torch.where((document_ids() != PADDING).view(1, -1, 1, 1), out.detach(), 0)


@pytest.mark.parametrize(
    "window_size, sink_size, most",
    [(1, 1, None), (5, 3, DOCUMENTS), (16, 4, None), (4, 20, DOCUMENTS), (96, 4, None), (97, 4, DOCUMENTS)],
)
def test_outputs_and_gradients_equal_the_formula(monkeypatch, window_size, sink_size, most):
    heads, kv_heads = [(2, 2), (3, 1), (4, 2)][window_size % 3]
    flash_stand_in.use(monkeypatch)
    tensors, d_out = inputs(heads, kv_heads)
    found = []
    for attend in (packed_attention, naive):
        leaves = [x.clone().requires_grad_() for x in tensors]
        documents = (Documents.of(document_ids(), most),) if attend is packed_attention else ()
        out = attend(*leaves, *documents, window_size, sink_size)
        out.backward(d_out)
        found.append([without_padding(out), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_the_merge_loses_no_more_than_the_dtype_does(monkeypatch, dtype, limit):
    """Sinks with large scores, whose gradients many queries add to."""
    flash_stand_in.use(monkeypatch)
    (q, k, v), d_out = inputs(4, 2, 16)
    q = q + 1
    k[:, :2] += 2
    k[:, ROW : ROW + 2] += 2
    *rounded, d_out = (x.to(dtype) for x in (q, k, v, d_out))
    found = []
    for attend, kind in ((packed_attention, dtype), (naive, torch.double)):
        leaves = [x.detach().to(kind).clone().requires_grad_() for x in rounded]
        documents = (Documents.of(document_ids()),) if attend is packed_attention else ()
        out = attend(*leaves, *documents, 9, 2)
        out.backward(d_out.to(kind))
        found.append([without_padding(out), *(leaf.grad for leaf in leaves)])
        assert all(x.dtype == kind for x in found[-1])
    for got, expected in zip(*found):
        assert (got.double() - expected).norm() < limit * expected.norm()


def test_a_fixed_number_of_documents_reads_nothing_on_the_host(monkeypatch):
    flash_stand_in.use(monkeypatch)
    tensors, d_out = inputs(2, 1)
    groups = document_ids()
    found = []
    for most in (None, DOCUMENTS):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with nullcontext() if most is None else NoHostReads():
            out = packed_attention(*leaves, Documents.of(groups, most), 8, 3)
            out.backward(d_out)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


class LargestTensor(TorchDispatchMode):
    """nbytes: of the largest memory of a tensor that operations return."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.nbytes = max(self.nbytes, *(x.untyped_storage().nbytes() for x in tensors), 0)
        return result


@pytest.mark.parametrize("window_size, sink_size", [(1, 2), (7, 3), (508, 4), (4096, 64)])
def test_memory_is_tokens_times_sinks(monkeypatch, window_size, sink_size):
    """No tensor of forward and backward pass grows with tokens x tokens, or tokens x window. The
    window's part, a kernel's, returns tensors of the right shapes."""
    flash_stand_in.use(monkeypatch)
    monkeypatch.setattr(sink_attention, "window_forward", lambda q, *_: (q * 1, q.new_zeros(q.shape[1::-1])))
    monkeypatch.setattr(sink_attention, "window_backward", lambda d_out, q, k, v, *_: (q * 1, k * 1, v * 1))
    tokens, heads, kv_heads, dim = 10_007, 4, 2, 8
    q, k, v = (torch.randn(1, tokens, n, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    with LargestTensor() as largest:
        out = packed_attention(q, k, v, Documents.of(torch.zeros(1, tokens).long(), 1), window_size, sink_size)
        out.sum().backward()
    scores = tokens * heads * sink_size * q.element_size()
    assert scores <= largest.nbytes < scores + q.nbytes

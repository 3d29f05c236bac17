"""On a GPU: sliding windows and sinks by FlashAttention's kernels against a softmax over an explicit mask
in fp64: outputs and gradients, of windows and heads of real models. Layers with small windows, CUDA
graphs and decoding: the other files here, as "swa_v1 with sinks"."""

import pytest
import torch
import torch.nn.functional as F

from distill_model.documents import Documents, packed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# One token, around the window, across blocks; one document that spans the row; many.
ROWS = ([1, 508, 700, 509, 513, 1], [2232], [3] * 44 + [2100])


def document_ids():
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    return torch.stack(rows).cuda()


def masked(q, k, v, groups, window_size, sink_size):
    """Row by row, and sums in fp64."""
    position = torch.arange(groups.shape[1], device=groups.device)
    outputs = []
    for row, group in zip(range(len(groups)), groups):
        begin = torch.searchsorted(group, group)
        distance = position[:, None] - position
        near = (distance < window_size) | (position < begin[:, None] + sink_size)
        mask = (distance >= 0) & (group[:, None] == group) & near
        parts = [x.view(*groups.shape, *x.shape[2:])[row].transpose(0, 1)[None] for x in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (12, 2, 128)])
@pytest.mark.parametrize("window_size, sink_size", [(508, 4), (100, 1), (3000, 4)])
def test_windows_and_sinks_equal_an_explicit_mask(dtype, limit, heads, kv_heads, dim, window_size, sink_size):
    torch.manual_seed(0)
    groups = document_ids()
    shapes = [(1, groups.numel(), n, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device="cuda") for shape in shapes)
    k.view(*groups.shape, kv_heads, dim)[1, :4] += 0.5  # sinks that many attend to
    q = q + 0.5
    inputs = [x.to(dtype) for x in (q, k, v)]
    d_out = torch.randn(shapes[0], device="cuda").to(dtype)
    found = []
    for kind in (dtype, torch.double):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        if kind is dtype:
            out = packed_attention(*leaves, Documents.of(groups, 64), window_size, sink_size)
        else:
            out = masked(*leaves, groups, window_size, sink_size)
        out.backward(d_out.to(kind))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*found):
        assert got.dtype == dtype
        assert (got - expected).norm() < limit * expected.norm()


def test_gradients_are_reproducible():
    """To the bit, for keys and values: the queries of 512 blocks add to the same sinks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4096, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    ids = torch.zeros(1, 4096, dtype=torch.int, device="cuda")
    found = []
    for _ in range(3):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        packed_attention(*leaves, Documents.of(ids, 1), 8, 3).square().sum().backward()
        found.append([leaf.grad for leaf in leaves[1:]])
    assert all(torch.equal(x, y) for gradients in found[1:] for x, y in zip(found[0], gradients))

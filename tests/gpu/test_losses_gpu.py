"""On a GPU: the fused heads against the naive losses in float64, and bf16 against the same logits rounded to bf16."""

import pytest
import torch
import torch.nn.functional as F

from distill_model.losses import forward_kl, linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def tensors(dtype, *shapes):
    """Leaves on the GPU, whose products are of the size of logits, and the same in float64."""
    given = [torch.randn(shape, device="cuda", dtype=dtype).mul_(shape[-1] ** -0.25 * 1.5).requires_grad_() for shape in shapes]
    return given, [t.detach().double().requires_grad_() for t in given]


def check(loss, naive, given, references, limit):
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    (3 * naive).backward()
    errors = [abs(loss.item() - naive.item()) / abs(naive.item())]
    errors += [((a.grad.double() - b.grad).norm() / b.grad.norm()).item() for a, b in zip(given, references)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("vocab", [53, 4096, 151_936])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_forward_kl(dtype, vocab, chunk_size):
    given, (h, w, th, tw) = tensors(dtype, (257, 64), (vocab, 64), (257, 96), (vocab, 96))
    student, teacher = ((a @ b.T / 1.5).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    naive = 1.5**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    loss = forward_kl(given[0], given[2], given[1], given[3], 1.5, chunk_size)
    check(loss, naive, given[:2], (h, w), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("vocab", [53, 4096, 151_936])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_linear_cross_entropy(dtype, vocab, chunk_size):
    given, (h, w) = tensors(dtype, (257, 64), (vocab, 64))
    labels = torch.randint(0, vocab, (257,), device="cuda")
    labels[::5] = -100
    check(linear_cross_entropy(*given, labels, chunk_size), F.cross_entropy(h @ w.T, labels), given, (h, w), LIMITS[dtype])

"""The element-wise steps against PyTorch's own, value and gradients; their kernels in test_losses.py's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from distill_model.fused_ops import mean_squared_error, swiglu

SHAPES = [(1,), (3, 17), (2, 5, 60)]


def leaves(shape, count):
    torch.manual_seed(0)
    given = [3 * torch.randn(shape, requires_grad=True) for _ in range(count)]
    given = [t.detach().requires_grad_() for t in given]
    return given, [t.detach().double().requires_grad_() for t in given]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    given, double = leaves(shape, 2)
    out, expected = swiglu(*given), F.silu(double[0]) * double[1]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(given, double):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_squared_error(shape):
    (student, teacher), (s, t) = leaves(shape, 2)
    loss, expected = mean_squared_error(student, teacher), F.mse_loss(s, t.detach())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(student.grad.double(), s.grad, rtol=1e-5, atol=1e-6)
    assert teacher.grad is None

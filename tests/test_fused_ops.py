"""The memory-bound operations against PyTorch's own, values and gradients; their kernels run in
test_losses.py's interpreter."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill_model import fused_ops
from distill_model.decode_kernels import swiglu_rows
from distill_model.fused_ops import (
    decode_attention,
    mean_squared_error,
    project_swiglu,
    rms_norm,
    rotate,
    scaled,
    swiglu,
)

SHAPES = [(1,), (3, 17), (2, 5, 60)]


def leaves(shape, count):
    torch.manual_seed(0)
    given = [3 * torch.randn(shape, requires_grad=True) for _ in range(count)]
    given = [t.detach().requires_grad_() for t in given]
    return given, [t.detach().double().requires_grad_() for t in given]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    given, double = leaves(shape, 2)
    out = swiglu(*given)
    expected = F.silu(double[0]) * double[1]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(given, double):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_project_swiglu(checkpointed):
    """Gradients of all inputs; on a GPU the SwiGLU output is not stored, also under gradient
    checkpointing."""
    given, double = leaves((2, 5, 60), 2)
    projection = nn.Linear(60, 7)
    storages = []

    def project(gate, up):
        def look(module, args):
            storages.append(StorageWeakRef(args[0].untyped_storage()))

        with projection.register_forward_pre_hook(look):
            return project_swiglu(gate, up, projection)

    out = checkpoint(project, *given, use_reentrant=False) if checkpointed else project(*given)
    if fused_ops.use_triton(out):
        gc.collect()  # Triton's interpreter leaves a reference cycle
        assert storages[0].expired()
    expected = F.linear(F.silu(double[0]) * double[1], *(p.double() for p in projection.parameters()))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    wanted = torch.autograd.grad((expected * weight).sum(), [*double, *projection.parameters()])
    for a, b in zip([*given, *projection.parameters()], wanted):
        torch.testing.assert_close(a.grad.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_squared_error(shape):
    (student, teacher), (s, t) = leaves(shape, 2)
    loss = mean_squared_error(student, teacher)
    expected = F.mse_loss(s, t.detach())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(student.grad.double(), s.grad, rtol=1e-5, atol=1e-6)
    assert teacher.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape):
    """Alone and with a fused residual add; with and without the weight's gradient."""
    weight = torch.rand(shape[-1], requires_grad=True)
    eps = 1e-2
    for branches, trains in ((0, True), (1, True), (1, False)):
        given, double = leaves(shape, 1 + branches)
        wanted = [*given, *([weight] if trains else [])]
        outs = rms_norm(given[0], weight if trains else weight.detach(), eps, *given[1:])
        outs = outs if branches else (outs,)
        total = sum(double)
        w = weight.detach().double().requires_grad_()
        expected = (w * total / (total.square().mean(-1, keepdim=True) + eps).sqrt(), total)[: len(outs)]
        directions = [torch.randn(shape) for _ in outs]
        grads = torch.autograd.grad([(a * b).sum() for a, b in zip(outs, directions)], wanted)
        references = torch.autograd.grad([(a * b).sum() for a, b in zip(expected, directions)], [*double, w])
        for a, b in zip((*outs, *grads), (*expected, *references)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_the_rounded_sum():
    """The sum is rounded first, so that the norm is of what the next block gets. In fp16, because
    Triton's interpreter truncates bf16."""
    torch.manual_seed(0)
    x, branch, weight = *torch.randn(2, 5, 40).half(), torch.rand(40).half()
    out, total = rms_norm(x, weight, 1e-6, branch)
    double = total.double()
    expected = weight.double() * double / (double.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(total, x + branch)
    assert torch.equal(out, expected.half())


@pytest.mark.parametrize("batch", [1, 2])
def test_rotate(batch):
    """Positions shared by all rows, and different ones for each."""
    (x,), (double,) = leaves((2, 5, 3, 12), 1)
    angles = torch.randn(batch, 5, 6).repeat(1, 1, 2)
    out = rotate(x, angles.cos(), angles.sin())
    expected = apply_rotary_pos_emb(double, double, angles.double().cos(), angles.double().sin(), unsqueeze_dim=2)[0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


def test_scaled():
    x = torch.randn(3, 17)
    scale = torch.tensor(0.3)
    torch.testing.assert_close(scaled(x.T, scale), x.T * 0.3)
    assert scaled(x.bfloat16(), scale).dtype == torch.bfloat16


def attend_naively(q, k, v, first, last):
    """A loop over sequences and heads, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for row, begin in enumerate(first):
        for head in range(q.shape[2]):
            keys, values = (x[row, begin : last + 1, head * x.shape[2] // q.shape[2]].double() for x in (k, v))
            out[row, 0, head] = (keys @ q[row, 0, head].double() * q.shape[3] ** -0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("length", [1, 30, 300])
def test_decode_attention(length):
    """Sequences that begin at different tokens, one of them at the last; buffers with unused places
    of arbitrary content."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 20), *torch.full((2, 3, length + 20, 2, 20), 1e4)
    first, last = torch.tensor([0, length // 4, length - 1]), torch.tensor([length - 1])
    k[:, :length], v[:, :length] = torch.randn(2, 3, length, 2, 20)
    out = decode_attention(q, k, v, first, last)
    torch.testing.assert_close(out.double(), attend_naively(q, k, v, first, last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: scaled(x, torch.tensor(2.0)),
        lambda x: swiglu(x, x),
        lambda x: swiglu_rows(x, x),
        lambda x: mean_squared_error(x, x),
        lambda x: rms_norm(x, x[0, 0, 0], 1e-6),
        lambda x: rotate(x, *torch.ones(2, 1, 1, 4)),
        lambda x: decode_attention(x, x, x, torch.tensor([0, 0]), torch.tensor([0])),
    ],
)
def test_kernels_are_launched_on_their_tensors_gpu(step, monkeypatch):
    """Not on the current GPU, as Triton would."""
    entered = []
    x = torch.randn(2, 1, 3, 4)

    class Spy:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device_of", Spy)
    step(x)
    assert len(entered) == 1
    assert entered[0] is x

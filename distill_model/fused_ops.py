"""Element-wise steps that are bound by memory, each one Triton kernel on a GPU; elsewhere plain PyTorch.

Measured to pay: see benchmarks/README.md. No autotuning, for it would cost a cold start more than it gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK, WARPS = 2048, 8  # elements of a program; 16-byte loads


@triton.jit
def _swiglu_forward(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _swiglu_backward(gate, up, d_out, d_gate, d_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    d = tl.load(d_out + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_gate + at, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(d_up + at, d * g * s, mask=inside)


@triton.jit
def _squared_difference(student, teacher, difference, sums, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(student + at, mask=inside, other=0).to(tl.float32) - tl.load(teacher + at, mask=inside, other=0).to(tl.float32)
    tl.store(difference + at, d, mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(d * d, 0))


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _swiglu_forward[_grid(gate)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_backward[_grid(gate)](gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return d_gate, d_up


class _MeanSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher):
        student, teacher = student.contiguous(), teacher.contiguous()
        difference, (programs,) = torch.empty_like(student), _grid(student)
        sums = torch.empty(programs, device=student.device)
        _squared_difference[(programs,)](student, teacher, difference, sums, student.numel(), BLOCK=BLOCK, num_warps=WARPS)
        ctx.save_for_backward(difference)
        return sums.sum() / student.numel()

    @staticmethod
    def backward(ctx, d_loss):
        (difference,) = ctx.saved_tensors
        return difference * (d_loss * (2 / difference.numel())), None


def fuses(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor, in place of their plain twins."""
    return x.is_cuda


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of equal shapes (Shazeer, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up) if fuses(gate) else F.silu(gate) * up


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of (student - teacher)^2, a scalar in fp32; the gradient flows to the student alone."""
    if fuses(student):
        return _MeanSquaredError.apply(student, teacher.detach())
    return (student.float() - teacher.detach().float()).square().mean()

"""Element-wise steps that are bound by memory, each one Triton kernel on a GPU; elsewhere plain PyTorch.

Measured to pay: see benchmarks/README.md. No autotuning, for it would cost a cold start more than it gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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


@triton.jit
def _scale(x, scale, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(x + at, mask=inside).to(tl.float32) * tl.load(scale), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, sign, rows, HEADS: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel, head = tl.arange(0, BLOCK), tl.arange(0, HEAD_BLOCK)
    inside = channel < HALF
    angle = (token % rows) * 2 * HALF + channel
    c = tl.load(cos + angle, mask=inside).to(tl.float32)[None]
    s = tl.load(sin + angle, mask=inside).to(tl.float32)[None] * sign
    first = (token * HEADS + head[:, None]) * 2 * HALF + channel[None]
    both = (head[:, None] < HEADS) & inside[None]
    a = tl.load(x + first, mask=both).to(tl.float32)
    b = tl.load(x + first + HALF, mask=both).to(tl.float32)
    tl.store(out + first, a * c - b * s, mask=both)
    tl.store(out + first + HALF, b * c + a * s, mask=both)


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
        return scaled(difference, d_loss * (2 / difference.numel())), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, sign=1.0):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out, (heads, size) = torch.empty_like(x), x.shape[2:]
        _rotate[(x.shape[0] * x.shape[1],)](
            x, cos, sin, out, sign, cos.shape[0] * cos.shape[1], HEADS=heads, HALF=size // 2,
            HEAD_BLOCK=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(size // 2),
        )  # fmt: skip
        ctx.save_for_backward(cos, sin)
        return out

    @staticmethod
    def backward(ctx, d_out):
        return _Rotate.forward(ctx, d_out, *ctx.saved_tensors, sign=-1.0), None, None, None


def fuses(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor, in place of their plain twins."""
    return x.is_cuda


def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times a scalar tensor in fp32, in the dtype of x. PyTorch casts every element for that, at a quarter of the speed."""
    if not fuses(x):
        return x * scale
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _scale[_grid(x)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (Su et al., arXiv 2104.09864) of x [B, T, heads, D]; cos and sin [B or 1, T, D], whose halves are equal."""
    return _Rotate.apply(x, cos, sin) if fuses(x) else apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of equal shapes (Shazeer, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up) if fuses(gate) else F.silu(gate) * up


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of (student - teacher)^2, a scalar in fp32; the gradient flows to the student alone."""
    if fuses(student):
        return _MeanSquaredError.apply(student, teacher.detach())
    return (student.float() - teacher.detach().float()).square().mean()

"""Steps that are bound by memory, as Triton kernels on a GPU; elsewhere plain PyTorch.

Those of training are measured to pay: see benchmarks/README.md. A token's attention reads its length on the GPU, which PyTorch's
kernels do not, and a CUDA graph must. No autotuning, for it would cost a cold start more than it gives.
"""

from __future__ import annotations

from functools import wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BLOCK, WARPS = 2048, 8  # elements of a program; 16-byte loads
PROCESSORS, NORM_WARPS = 132, 24  # of an H200, and of a processor in RMSNorm's backward pass: all run at once


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


@triton.jit
def _rms_norm_forward(x, branch, weight, out, total, scales, eps, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = channel < size, row * size + channel
    values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if ADD:  # what is kept is rounded, and normed as it is kept
        values = (values + tl.load(branch + at, mask=inside, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, values, mask=inside)
        values = values.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    tl.store(scales + row, scale)
    tl.store(out + at, values * scale * tl.load(weight + channel, mask=inside, other=0).to(tl.float32), mask=inside)


@triton.jit
def _rms_norm_backward(total, weight, scales, d_out, d_total, d_x, d_weight, rows, size, ADD: tl.constexpr, TRAINS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """Every so many rows, as many as there are programs, each with its part of the weight's gradient."""
    program, programs, channel = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    inside, at = channel < size, program.to(tl.int64) * size + channel
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        scale = tl.load(scales + row)
        normed = tl.load(total + at, mask=inside, other=0).to(tl.float32) * scale
        d = tl.load(d_out + at, mask=inside, other=0).to(tl.float32)
        part += d * normed
        d *= w
        d = (d - normed * (tl.sum(d * normed, 0) / size)) * scale
        if ADD:
            d += tl.load(d_total + at, mask=inside, other=0).to(tl.float32)
        tl.store(d_x + at, d, mask=inside)
        at += programs.to(tl.int64) * size
    if TRAINS:
        tl.store(d_weight + program.to(tl.int64) * size + channel, part, mask=inside)


@triton.jit
def _attend_part(q, k, v, first, last, out, weight, scale, tokens, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
                 PARTS: tl.constexpr, GROUP_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The queries of one key/value head over one of PARTS equal parts of the tokens: their output, and its weight as a logarithm."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, kv_head = pair // KV_HEADS, pair % KV_HEADS
    begin, end = tl.load(first + sequence), tl.load(last) + 1
    share = tl.cdiv(end - begin, PARTS * BLOCK) * BLOCK
    low = begin + part * share
    high = tl.minimum(low + share, end)
    query, channel, token = tl.arange(0, GROUP_BLOCK), tl.arange(0, SIZE_BLOCK), tl.arange(0, BLOCK)
    rows = pair * GROUP + query  # of the queries: a sequence's heads, one behind the other
    real, inside = query < GROUP, channel < SIZE
    at = rows[:, None] * SIZE + channel[None]
    queries = tl.load(q + at, mask=real[:, None] & inside[None], other=0)
    top = tl.full((GROUP_BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    sums = tl.zeros((GROUP_BLOCK, SIZE_BLOCK), tl.float32)
    for start in range(low, high, BLOCK):
        seen = start + token < high
        place = ((sequence * tokens + start + token)[:, None] * KV_HEADS + kv_head) * SIZE + channel[None]
        both = seen[:, None] & inside[None]
        keys = tl.load(k + place, mask=both, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink, weights = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        values = tl.load(v + place, mask=both, other=0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher
    empty = low >= high
    place = rows * PARTS + part
    tl.store(out + place[:, None] * SIZE + channel[None], sums / tl.where(empty, 1.0, total)[:, None], mask=real[:, None] & inside[None])
    tl.store(weight + place, tl.where(empty, -float("inf"), top + tl.log(total)), mask=real)


@triton.jit
def _join_parts(parts, weight, out, SIZE: tl.constexpr, PARTS: tl.constexpr, SIZE_BLOCK: tl.constexpr):
    row, part, channel = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, SIZE_BLOCK)
    inside = channel < SIZE
    w = tl.load(weight + row * PARTS + part)
    w = tl.exp(w - tl.max(w, 0))
    x = tl.load(parts + (row * PARTS + part)[:, None] * SIZE + channel[None], mask=inside[None], other=0)
    tl.store(out + row * SIZE + channel, tl.sum(x * w[:, None], 0) / tl.sum(w, 0), mask=inside)


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.unpacked = None
        out = torch.empty_like(gate)
        _swiglu_forward[_grid(gate)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return out

    @staticmethod
    def again(node) -> torch.Tensor:
        """The output, from what its node in the graph has saved, and keeps unpacked: gradient checkpointing unpacks but once."""
        node.unpacked = node.unpacked or node.saved_tensors
        return _SwiGLU.apply(*(x.detach() for x in node.unpacked))

    @staticmethod
    def backward(ctx, d_out):
        (gate, up), ctx.unpacked = ctx.unpacked or ctx.saved_tensors, None
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_backward[_grid(gate)](gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return d_gate, d_up


class _MeanSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher):
        student, teacher = student.contiguous(), teacher.contiguous()
        difference, (programs,) = torch.empty_like(student), _grid(student)
        sums = torch.empty(programs, dtype=torch.float32, device=student.device)
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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps):
        ctx.added, x, size = branch is not None, x.contiguous(), x.shape[-1]
        out, rows, block = torch.empty_like(x), x.numel() // size, triton.next_power_of_2(size)
        total, branch = (torch.empty_like(x), branch.contiguous()) if ctx.added else (x, x)
        ctx.launch = dict(ADD=ctx.added, BLOCK=block, num_warps=min(16, max(1, block // 512)))
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        _rms_norm_forward[(rows,)](x, branch, weight, out, total, scales, eps, size, **ctx.launch)
        ctx.save_for_backward(total, weight, scales)
        return (out, total) if ctx.added else out

    @staticmethod
    def backward(ctx, d_out, d_total=None):
        (total, weight, scales), trains = ctx.saved_tensors, ctx.needs_input_grad[2]
        rows, size = len(scales), len(weight)
        programs = min(rows, PROCESSORS * (NORM_WARPS // ctx.launch["num_warps"]))
        d_x, d_weight = torch.empty_like(total), scales.new_empty(programs if trains else 0, size)
        d_out = d_out.contiguous()
        d_total = d_total.contiguous() if ctx.added else d_out
        _rms_norm_backward[(programs,)](total, weight, scales, d_out, d_total, d_x, d_weight, rows, size, TRAINS=trains, **ctx.launch)
        return d_x, d_x if ctx.added else None, d_weight.sum(0).to(weight.dtype) if trains else None, None


def _decode_attention(q, k, v, first, last) -> torch.Tensor:
    (batch, _, heads, size), (_, tokens, kv_heads, _) = q.shape, k.shape
    # Some two programs for each processor of an H200; more than 64 parts would be slow to join.
    parts = min(64, triton.next_power_of_2(triton.cdiv(264, batch * kv_heads)))
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    by_part = q.new_empty(batch * heads, parts, size, dtype=torch.float32)
    weight = q.new_empty(batch * heads, parts, dtype=torch.float32)
    block = max(16, triton.next_power_of_2(size))
    at_once = min(64, max(16, 2**14 // (block * q.element_size())))  # tokens, in the shared memory of every GPU since Ampere
    _attend_part[(batch * kv_heads, parts)](
        q, k, v, first, last, by_part, weight, size**-0.5, tokens, KV_HEADS=kv_heads, GROUP=heads // kv_heads, SIZE=size, PARTS=parts,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)), SIZE_BLOCK=block, BLOCK=at_once,
    )  # fmt: skip
    _join_parts[(batch * heads,)](by_part, weight, out, SIZE=size, PARTS=parts, SIZE_BLOCK=block)
    return out


def on_its_device(function):
    """The same on the GPU that holds the first argument. Triton starts kernels on the current one, which need not be it."""

    @wraps(function)
    def run(x, *rest):
        with torch.cuda.device_of(x):
            return function(x, *rest)

    return run


def fuses(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor, in place of their plain twins."""
    return x.is_cuda


@on_its_device
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times a scalar tensor in fp32, in the dtype of x. PyTorch casts every element for that, at a quarter of the speed."""
    if not fuses(x):
        return x * scale
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _scale[_grid(x)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


@on_its_device
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (Su et al., arXiv 2104.09864) of x [B, T, heads, D]; cos and sin [B or 1, T, D], whose halves are equal."""
    return _Rotate.apply(x, cos, sin) if fuses(x) else apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@on_its_device
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of equal shapes (Shazeer, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up) if fuses(gate) else F.silu(gate) * up


@on_its_device
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, branch: torch.Tensor | None = None):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of x [..., D]; with a branch of x's shape a pair, that of x + branch, and x + branch."""
    if fuses(x) and x.dtype == weight.dtype and (branch is None or branch.dtype == x.dtype):
        return _RMSNorm.apply(x, branch, weight, eps)
    total = x if branch is None else x + branch
    out = F.rms_norm(total, weight.shape, weight, eps)
    return out if branch is None else (out, total)


def project_swiglu(gate: torch.Tensor, up: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """projection(silu(gate) * up). On a GPU the product is not kept for the backward pass, which makes it again: a third of what
    an MLP has to keep. An adapter's or a quantised projection keeps what it likes."""
    product = swiglu(gate, up)
    node, place, size = product.grad_fn, product.data_ptr(), product.numel()
    if node is None or not fuses(gate) or type(projection) is not nn.Linear:
        return projection(product)

    def pack(x: torch.Tensor):
        same = x.data_ptr() == place and x.numel() == size and x.is_contiguous()  # a matmul may have flattened it
        return x.shape if same else x

    def unpack(packed) -> torch.Tensor:
        # From the node, not from gate and up, which gradient checkpointing must be free to forget.
        return packed if isinstance(packed, torch.Tensor) else _SwiGLU.again(node).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return projection(product)


@on_its_device
def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of (student - teacher)^2, a scalar in fp32; the gradient flows to the student alone."""
    if fuses(student):
        return _MeanSquaredError.apply(student, teacher.detach())
    return (student.float() - teacher.detach().float()).square().mean()


@on_its_device
def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one query a sequence, q [B, 1, heads, D], to the tokens from first [B] to last [1], both int64, in k and v
    [B, tokens, kv heads, D]; returns [B, 1, heads, D]. No gradient.

    The tokens are read in parts, as many as fill the GPU (flash decoding, Dao et al. 2023), and how many they are is read on the GPU.
    """
    if fuses(q):
        return _decode_attention(q, k.contiguous(), v.contiguous(), first, last)
    at = torch.arange(k.shape[1], device=q.device)
    seen = (at >= first[:, None]) & (at <= last)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], enable_gqa=k.shape[1] < q.shape[1]).transpose(1, 2)

"""Memory-bound operations: Triton kernels on a GPU, PyTorch reference implementations elsewhere.

benchmarks/README.md has what those of training gain. The attention of a decoded token reads the
length of the text on the GPU, as a CUDA graph requires and PyTorch's kernels do not. No
autotuning: it would slow a cold start more than it gains.
"""

from __future__ import annotations

from functools import wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# Elements of a program, and its warps: loads of 16 bytes.
BLOCK = 2048
WARPS = 8
# Streaming multiprocessors of an H200, and resident warps of each in RMSNorm's backward pass: all
# programs run at once.
PROCESSORS = 132
NORM_WARPS = 24


@triton.jit
def load_fp32(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


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
    d = load_fp32(student + at, inside) - load_fp32(teacher + at, inside)
    tl.store(difference + at, d, mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(d * d, 0))


@triton.jit
def _scale(x, scale, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(out + at, tl.load(x + at, mask=inside).to(tl.float32) * tl.load(scale), mask=inside)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    sign,
    rows,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    head = tl.arange(0, HEAD_BLOCK)
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
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    at = row * size + channel
    values = load_fp32(x + at, inside)
    if ADD:  # the sum is rounded to its dtype before it is normalised
        values = (values + load_fp32(branch + at, inside)).to(total.dtype.element_ty)
        tl.store(total + at, values, mask=inside)
        values = values.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    tl.store(scales + row, scale)
    normed = values * scale * load_fp32(weight + channel, inside)
    tl.store(out + at, normed, mask=inside)


@triton.jit
def _rms_norm_backward(
    total,
    weight,
    scales,
    d_out,
    d_total,
    d_x,
    d_weight,
    rows,
    size,
    ADD: tl.constexpr,
    TRAINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes every n-th row of n programs, and sums its share of the weight's gradient."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    at = program.to(tl.int64) * size + channel
    w = load_fp32(weight + channel, inside)
    part = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        scale = tl.load(scales + row)
        normed = load_fp32(total + at, inside) * scale
        d = load_fp32(d_out + at, inside)
        part += d * normed
        d *= w
        d = (d - normed * (tl.sum(d * normed, 0) / size)) * scale
        if ADD:
            d += load_fp32(d_total + at, inside)
        tl.store(d_x + at, d, mask=inside)
        at += programs.to(tl.int64) * size
    if TRAINS:
        tl.store(d_weight + program.to(tl.int64) * size + channel, part, mask=inside)


@triton.jit
def _attend_part(
    q,
    k,
    v,
    first,
    last,
    out,
    weight,
    scale,
    tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The queries of one key/value head attend to one of PARTS equal parts of the tokens: their
    output, and the logarithm of its softmax denominator."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sequence = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    begin = tl.load(first + sequence)
    end = tl.load(last) + 1
    share = tl.cdiv(end - begin, PARTS * BLOCK) * BLOCK
    low = begin + part * share
    high = tl.minimum(low + share, end)
    query = tl.arange(0, GROUP_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    token = tl.arange(0, BLOCK)
    rows = pair * GROUP + query  # of the queries: the heads of a sequence follow one another
    real = query < GROUP
    inside = channel < SIZE
    query_mask = real[:, None] & inside[None]
    queries = tl.load(q + rows[:, None] * SIZE + channel[None], mask=query_mask, other=0)
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
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        values = tl.load(v + place, mask=both, other=0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher
    empty = low >= high
    place = rows * PARTS + part
    output = sums / tl.where(empty, 1.0, total)[:, None]
    log_weight = tl.where(empty, -float("inf"), top + tl.log(total))
    tl.store(out + place[:, None] * SIZE + channel[None], output, mask=query_mask)
    tl.store(weight + place, log_weight, mask=real)


@triton.jit
def _join_parts(parts, weight, out, SIZE: tl.constexpr, PARTS: tl.constexpr, SIZE_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, SIZE_BLOCK)
    inside = channel < SIZE
    w = tl.load(weight + row * PARTS + part)
    w = tl.exp(w - tl.max(w, 0))
    at = (row * PARTS + part)[:, None] * SIZE + channel[None]
    x = tl.load(parts + at, mask=inside[None], other=0)
    mean = tl.sum(x * w[:, None], 0) / tl.sum(w, 0)
    tl.store(out + row * SIZE + channel, mean, mask=inside)


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
    def recompute(node) -> torch.Tensor:
        """The output, from the tensors that its autograd node has saved. The node keeps them
        unpacked: gradient checkpointing unpacks only once."""
        node.unpacked = node.unpacked or node.saved_tensors
        return _SwiGLU.apply(*(x.detach() for x in node.unpacked))

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.unpacked or ctx.saved_tensors
        ctx.unpacked = None
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        _swiglu_backward[_grid(gate)](
            gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=WARPS
        )
        return d_gate, d_up


class _MeanSquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher):
        student, teacher = student.contiguous(), teacher.contiguous()
        difference = torch.empty_like(student)
        (programs,) = _grid(student)
        sums = torch.empty(programs, dtype=torch.float32, device=student.device)
        _squared_difference[(programs,)](
            student, teacher, difference, sums, student.numel(), BLOCK=BLOCK, num_warps=WARPS
        )
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
        heads, size = x.shape[2:]
        out = torch.empty_like(x)
        _rotate[(x.shape[0] * x.shape[1],)](
            x,
            cos,
            sin,
            out,
            sign,
            cos.shape[0] * cos.shape[1],
            HEADS=heads,
            HALF=size // 2,
            HEAD_BLOCK=triton.next_power_of_2(heads),
            BLOCK=triton.next_power_of_2(size // 2),
        )
        ctx.save_for_backward(cos, sin)
        return out

    @staticmethod
    def backward(ctx, d_out):
        return _Rotate.forward(ctx, d_out, *ctx.saved_tensors, sign=-1.0), None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps):
        x = x.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        block = triton.next_power_of_2(size)
        out = torch.empty_like(x)
        ctx.added = branch is not None
        total, branch = (torch.empty_like(x), branch.contiguous()) if ctx.added else (x, x)
        ctx.launch = dict(ADD=ctx.added, BLOCK=block, num_warps=min(16, max(1, block // 512)))
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        _rms_norm_forward[(rows,)](x, branch, weight, out, total, scales, eps, size, **ctx.launch)
        ctx.save_for_backward(total, weight, scales)
        return (out, total) if ctx.added else out

    @staticmethod
    def backward(ctx, d_out, d_total=None):
        total, weight, scales = ctx.saved_tensors
        trains = ctx.needs_input_grad[2]
        rows = len(scales)
        size = len(weight)
        programs = min(rows, PROCESSORS * (NORM_WARPS // ctx.launch["num_warps"]))
        d_x = torch.empty_like(total)
        d_weight = scales.new_empty(programs if trains else 0, size)
        d_out = d_out.contiguous()
        d_total = d_total.contiguous() if ctx.added else d_out
        _rms_norm_backward[(programs,)](
            total,
            weight,
            scales,
            d_out,
            d_total,
            d_x,
            d_weight,
            rows,
            size,
            TRAINS=trains,
            **ctx.launch,
        )
        d_branch = d_x if ctx.added else None
        d_weight = d_weight.sum(0).to(weight.dtype) if trains else None
        return d_x, d_branch, d_weight, None


def _decode_attention(q, k, v, first, last) -> torch.Tensor:
    batch, _, heads, size = q.shape
    _, tokens, kv_heads, _ = k.shape
    # About two programs per multiprocessor of an H200; more than 64 parts would be slow to join.
    parts = min(64, triton.next_power_of_2(triton.cdiv(264, batch * kv_heads)))
    q = q.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    by_part = q.new_empty(batch * heads, parts, size, dtype=torch.float32)
    weight = q.new_empty(batch * heads, parts, dtype=torch.float32)
    block = max(16, triton.next_power_of_2(size))
    # Tokens at a time, which fit the shared memory of every GPU since Ampere.
    token_block = min(64, max(16, 2**14 // (block * q.element_size())))
    _attend_part[(batch * kv_heads, parts)](
        q,
        k,
        v,
        first,
        last,
        by_part,
        weight,
        size**-0.5,
        tokens,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        PARTS=parts,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        SIZE_BLOCK=block,
        BLOCK=token_block,
    )
    _join_parts[(batch * heads,)](by_part, weight, out, SIZE=size, PARTS=parts, SIZE_BLOCK=block)
    return out


def device_guard(function):
    """Makes the GPU of the first argument the current one, on which Triton launches kernels."""

    @wraps(function)
    def run(x, *rest):
        with torch.cuda.device_of(x):
            return function(x, *rest)

    return run


def use_triton(x: torch.Tensor) -> bool:
    """Whether Triton kernels process this tensor, rather than their reference implementations."""
    return x.is_cuda


@device_guard
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times a scalar fp32 tensor, in the dtype of x. PyTorch would cast x first, at a quarter of
    the speed."""
    if not use_triton(x):
        return x * scale
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _scale[_grid(x)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


@device_guard
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (Su et al., arXiv 2104.09864) of x [B, T, heads, D]; cos and sin [B or 1, T, D], whose
    halves are equal."""
    if use_triton(x):
        return _Rotate.apply(x, cos, sin)
    return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@device_guard
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of equal shapes (Shazeer, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up) if use_triton(gate) else F.silu(gate) * up


@device_guard
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, branch: torch.Tensor | None = None):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of x [..., D]; with a branch of x's shape the
    fused residual add and RMSNorm: the norm of x + branch, and x + branch."""
    if use_triton(x) and x.dtype == weight.dtype and (branch is None or branch.dtype == x.dtype):
        return _RMSNorm.apply(x, branch, weight, eps)
    total = x if branch is None else x + branch
    out = F.rms_norm(total, weight.shape, weight, eps)
    return out if branch is None else (out, total)


def project_swiglu(gate: torch.Tensor, up: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """projection(silu(gate) * up). On a GPU the SwiGLU output is not stored for the backward pass
    but recomputed: a third of an MLP's activations. An adapter or a quantised projection stores
    what it stores."""
    activated = swiglu(gate, up)
    node = activated.grad_fn
    if node is None or not use_triton(gate) or type(projection) is not nn.Linear:
        return projection(activated)
    address = activated.data_ptr()
    size = activated.numel()

    def pack(x: torch.Tensor):
        is_activated = x.data_ptr() == address and x.numel() == size and x.is_contiguous()
        return x.shape if is_activated else x  # the shape, for a GEMM may have flattened it

    def unpack(packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        # From the node, not from gate and up, which gradient checkpointing must be able to free.
        return _SwiGLU.recompute(node).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return projection(activated)


@device_guard
def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of (student - teacher)^2, a scalar in fp32; the gradient flows to the
    student alone."""
    if use_triton(student):
        return _MeanSquaredError.apply(student, teacher.detach())
    return (student.float() - teacher.detach().float()).square().mean()


@device_guard
def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Softmax attention of one query per sequence, q [B, 1, heads, D], to the tokens from first [B]
    to last [1], both int64, in k and v [B, tokens, kv heads, D]; returns [B, 1, heads, D]. No
    gradient.

    The tokens are split into as many parts as fill the GPU (flash decoding, Dao et al. 2023). Their
    number is read on the GPU, so that a CUDA graph can be replayed as the text grows.
    """
    if use_triton(q):
        return _decode_attention(q, k.contiguous(), v.contiguous(), first, last)
    position = torch.arange(k.shape[1], device=q.device)
    seen = (position >= first[:, None]) & (position <= last)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], enable_gqa=is_grouped)
    return out.transpose(1, 2)

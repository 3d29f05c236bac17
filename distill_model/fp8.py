"""The MLPs of a frozen model in FP8: e4m3 weights and activations (Micikevicius et al., arXiv
2209.05433), a scale per output feature of a weight and per token of an activation.

Only the MLPs: they are nine tenths of the FLOPs of a block's GEMMs. Attention stays exact: in stage
1 its output is the target, and its small GEMMs would save little more than casting their inputs
takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from .attention import KeepsDtypes
from .fused_ops import device_guard, load_fp32, use_triton
from .losses import forward_kl
from .modeling_distilled_student import StudentForCausalLM, SwiGLU

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
ALIGNMENT = 16  # of the sizes of an FP8 GEMM
CAPABILITY = (8, 9)  # the first with FP8 tensor cores: Ada
FP8_DEVICE = "a GPU of the Ada, Hopper or a later generation"
FP8_KEY = "teacher_model.precision: fp8"


@triton.jit
def _store_e4m3(values, out, scales, row, size, channel, inside, LARGEST: tl.constexpr):
    """Stores a row of fp32 values as e4m3, and the scale that makes its largest one LARGEST."""
    top = tl.max(tl.abs(values), 0)
    scale = tl.where(top > 0, top / LARGEST, 1.0)
    tl.store(scales + row, scale)
    tl.store(out + row * size + channel, (values / scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_rows(x, out, scales, size, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    values = load_fp32(x + row * size + channel, inside)
    _store_e4m3(values, out, scales, row, size, channel, inside, LARGEST)


@triton.jit
def _quantize_swiglu(gate_up, out, scales, size, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    at = gate_up + row * 2 * size + channel
    gate = load_fp32(at, inside)
    values = gate * tl.sigmoid(gate) * load_fp32(at + size, inside)
    _store_e4m3(values, out, scales, row, size, channel, inside, LARGEST)


def _launch(kernel, x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    rows = len(x)
    out = torch.empty(rows, size, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    kernel[(rows,)](x, out, scales, size, LARGEST=LARGEST, BLOCK=block, num_warps=min(32, max(1, block // 512)))
    return out, scales


def _quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True) / LARGEST
    scales = scales.masked_fill(scales == 0, 1.0)
    return (values / scales).to(E4M3), scales


@device_guard
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, D] as e4m3 [N, D] times scales [N, 1] in fp32: each row's largest value becomes 448."""
    return _launch(_quantize_rows, x, x.shape[1]) if use_triton(x) else _quantize(x)


@device_guard
def quantize_swiglu(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of gate_up [N, 2 D], the two side by side, as `quantize_rows` gives it."""
    if use_triton(gate_up):
        return _launch(_quantize_swiglu, gate_up, gate_up.shape[1] // 2)
    gate, up = gate_up.float().chunk(2, -1)
    return _quantize(F.silu(gate) * up)


class Fp8Linear(KeepsDtypes):
    """A frozen linear layer, of a weight [out, in] and a bias [out] or None: rows in FP8 in, rows in
    the dtype of the weight it was made from out.

    Its tensors are buffers that no checkpoint holds: they are made from the teacher's weights.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        quantized, scale = quantize_rows(weight.detach())
        self.dtype = weight.dtype
        self.register_buffer("weight", quantized, persistent=False)
        self.register_buffer("scale", scale.t(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def forward(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """x [N, in] in e4m3 and scales [N, 1], of `quantize_rows` -> [N, out]."""
        return torch._scaled_mm(
            x,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )


class Fp8SwiGLU(nn.Module):
    """A frozen SwiGLU in FP8. Raises ValueError for an activation or sizes that it does not
    support."""

    def __init__(self, mlp: SwiGLU):
        super().__init__()
        if mlp.act is not None:
            raise ValueError(f"{FP8_KEY} needs MLPs with hidden_act silu; set exact")
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if down.in_features % ALIGNMENT or down.out_features % ALIGNMENT:
            sizes = f"hidden_size {down.out_features} and intermediate_size {down.in_features}"
            raise ValueError(f"{FP8_KEY}: {sizes} must be multiples of {ALIGNMENT}; set exact")
        bias = None if gate.bias is None else torch.cat((gate.bias, up.bias))
        self.gate_up_proj = Fp8Linear(torch.cat((gate.weight, up.weight)), bias)
        self.down_proj = Fp8Linear(down.weight, down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj(*quantize_rows(x.flatten(0, -2)))
        return self.down_proj(*quantize_swiglu(gate_up)).view(x.shape)


def check_fp8_device(device: str) -> None:
    """Raises ValueError unless the device, "cuda" or "cpu", has FP8 tensor cores."""
    if device == "cuda" and torch.cuda.get_device_capability() >= CAPABILITY:
        return
    found = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    raise ValueError(f"{FP8_KEY} needs {FP8_DEVICE}, here is {found}; set exact")


@torch.no_grad()
def quantize_mlps(model: StudentForCausalLM) -> None:
    """Replaces the MLPs of a model by `Fp8SwiGLU`, for good. Raises ValueError, before it replaces
    any, if they are not supported."""
    quantized = [Fp8SwiGLU(block.mlp) for block in model.model.layers]
    for block, mlp in zip(model.model.layers, quantized):
        block.mlp = mlp


@torch.no_grad()
def kl_of(
    change: Callable[[StudentForCausalLM], None], model: StudentForCausalLM, batches: list[dict[str, torch.Tensor]]
) -> float:
    """KL(model before || model after change(model)), the mean over the tokens of `batches`, each
    the inputs input_ids [B, T] and perhaps document_ids, in nats."""

    def hidden_states() -> list[torch.Tensor]:
        return [model.model(**batch, use_cache=False).last_hidden_state.flatten(0, 1) for batch in batches]

    before = hidden_states()
    change(model)
    head = model.lm_head.weight
    kls = [forward_kl(after, exact, head, head) * len(exact) for after, exact in zip(hidden_states(), before)]
    return (sum(kls) / sum(map(len, before))).item()

"""Model FLOPs utilisation (MFU): the FLOPs that a training step needs, over what the GPUs could do
in its time.

The FLOPs of a model and the definition of MFU are those of PaLM (Chowdhery et al., arXiv
2204.02311, appendix B): 2 per weight of a GEMM and token forward, 4 backward, and softmax attention
over the whole sequence. Not counted are what the backward pass computes again and, beyond their
projections, the student attentions: the FLOPs of their recurrences depend on the kernel and are
about 1 % of a layer's GEMMs.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from distill_model import is_student_attention
from distill_model.attention import SoftmaxAttention
from distill_model.fp8 import Fp8Linear

# Peak FLOP/s of dense bf16 GEMMs (no sparsity), from NVIDIA's data sheets. The first entry whose
# words are all in torch.cuda.get_device_name() counts.
PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device_name: str) -> float | None:
    """The peak FLOP/s of a GPU in bf16, or None if it is not known. A MIG slice is a part of its
    GPU, so it has none."""
    if "MIG" in device_name:
        return None
    words = re.split("[ -]", device_name)
    for name, peak in PEAK_BF16_FLOPS.items():
        if all(word in words for word in name.split()):
            return peak
    return None


def device_peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """`peak_flops` of this process's device, or None on a CPU and for dtypes other than bf16."""
    if device != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name())


def _gemm_weights(module: nn.Module) -> int:
    """The elements of all weights that a token is multiplied by."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, Fp8Linear)))


def _attention_flops(module: nn.Module, seq_len: int) -> int:
    """Forward FLOPs per token of a model's full softmax attentions: QK' and the weighted sum of V,
    each 2 seq_len head_dim per head. As in PaLM, the half that the causal mask saves is not
    subtracted."""
    flops = 0
    for m in module.modules():
        if isinstance(m, SoftmaxAttention) and not is_student_attention(m):
            flops += 4 * seq_len * m.num_heads * m.head_dim
    return flops


def _forward_flops(module: nn.Module, seq_len: int) -> int:
    return 2 * _gemm_weights(module) + _attention_flops(module, seq_len)


def alignment_flops_per_token(model: nn.Module, seq_len: int) -> int:
    """FLOPs per token of a training step of stage 1, for a `wrapper.AttentionAlignmentModel`.

    The teacher's blocks run forward, up to the last attention and without lm_head. A student's
    projections run forward, and backward for their weights; only the input of o_proj needs a
    gradient, for the layer's input is detached.
    """
    students = [m for m in model.modules() if is_student_attention(m)]
    student_weights = sum(_gemm_weights(m) for m in students)
    output_projections = sum(_gemm_weights(m.o_proj) for m in students)
    teacher = _forward_flops(model, seq_len) - 2 * student_weights
    return teacher + 4 * student_weights + 2 * output_projections


def training_flops_per_token(model: nn.Module, seq_len: int, teacher: nn.Module | None = None) -> int:
    """FLOPs per token of a training step of stages 2 and 3: the student's forward and backward
    passes (three times the forward, less the gradients of frozen weights), and the forward pass of
    the frozen teacher, if there is one."""
    frozen = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    flops = 3 * _forward_flops(model, seq_len) - 2 * sum(weight.numel() for weight in frozen)
    if teacher is not None:
        flops += _forward_flops(teacher, seq_len)
    return flops

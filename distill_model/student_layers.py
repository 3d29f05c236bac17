"""The student attentions: FLA layers that know how to start from a teacher's softmax attention.

A student is built as `cls(config, layer_idx, **options)`; `STUDENT_ATTENTION_MAP` names them, and a variant is a line
there. `init_from_teacher` accounts for every tensor of both sides in an `InitReport`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import partial

import torch
from fla.layers import GatedDeltaNet
from torch import nn
from transformers import initialization as init

from .attention import SoftmaxAttention
from .config_distilled_student import StudentConfig

# FLA advises short convolutions for pretraining from scratch; a student that starts from a teacher does without.
warnings.filterwarnings("ignore", message="ShortConvolution is crucial")


@dataclass
class InitReport:
    """Where each tensor of a student attention came from, and which of the teacher's were left behind (by name)."""

    copied: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def expand_kv_heads(weight: torch.Tensor, num_kv_heads: int, num_heads: int) -> torch.Tensor:
    """Repeats each key/value head for the query heads that read it: '(h d) ... -> (h g d) ...', h the kv heads.

    weight: [num_kv_heads * head_dim, ...], a projection's weight or bias. Returns [num_heads * head_dim, ...].
    """
    heads = weight.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


class GatedDeltaNetStudent(GatedDeltaNet):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464) with one key/value head a query head of the teacher.

    q, k, v and o start as the teacher's (K and V repeated by head block); biases, q/k norms and RoPE of the teacher
    are dropped. What is new starts neutral: the output gate passes everything (sigmoid(0) under a norm weight of 2),
    the short convolutions are the identity.
    """

    OPTIONS = {"conv_size": int, "conv_bias": bool, "allow_neg_eigval": bool}

    def __init__(self, config: StudentConfig, layer_idx: int, *, use_gate: bool, use_short_conv: bool, **options):
        super().__init__(
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            num_heads=config.num_attention_heads,
            expand_v=1,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            output_gate_activation="sigmoid",
            layer_idx=layer_idx,
            norm_eps=config.rms_norm_eps,
            **options,
        )

    @torch.no_grad()
    def init_fresh(self) -> list[str]:
        """Sets what no teacher has to its start; returns the names. Skips what transformers has just loaded."""
        # Decay as in Mamba-2: rates A in [1, 16] x time steps log-uniform in [1e-3, 0.1], through softplus' inverse.
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        fresh = ["A_log", "dt_bias", "a_proj.weight", "b_proj.weight", "o_norm.weight"]
        init.constant_(self.o_norm.weight, 2.0 if self.use_gate else 1.0)
        if self.use_gate:
            init.zeros_(self.g_proj.weight)
            fresh.append("g_proj.weight")
        if self.use_short_conv:
            for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
                conv = getattr(self, name)
                identity = torch.zeros_like(conv.weight)
                identity[..., -1] = 1
                init.copy_(conv.weight, identity)
                fresh.append(f"{name}.weight")
                if conv.bias is not None:
                    init.zeros_(conv.bias)
                    fresh.append(f"{name}.bias")
        return fresh

    @torch.no_grad()
    def init_from_teacher(self, teacher_attn: SoftmaxAttention) -> InitReport:
        """Copies the teacher's projections and sets the rest to its neutral start.

        Raises ValueError if the teacher's heads do not fit this layer.
        """
        if (teacher_attn.num_heads, teacher_attn.head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"layer {self.layer_idx}: the teacher has {teacher_attn.num_heads} heads of {teacher_attn.head_dim}, "
                f"the student {self.num_heads} of {self.head_dim}"
            )
        report = InitReport(fresh=self.init_fresh())
        grouped = teacher_attn.num_kv_heads < self.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(teacher_attn, name).weight
            if grouped and name in ("k_proj", "v_proj"):
                weight = expand_kv_heads(weight, teacher_attn.num_kv_heads, self.num_heads)
                report.transformed.append(f"{name}.weight")
            else:
                report.copied.append(f"{name}.weight")
            getattr(self, name).weight.copy_(weight)
        taken = {*report.copied, *report.transformed}
        report.dropped = [name for name, _ in teacher_attn.named_parameters() if name not in taken] + ["rope"]
        accounted = taken | set(report.fresh)
        assert accounted == {name for name, _ in self.named_parameters()}, accounted
        return report


STUDENT_ATTENTION_MAP = {
    "gdn_v1": partial(GatedDeltaNetStudent, use_gate=False, use_short_conv=True),
    "gdn_v2": partial(GatedDeltaNetStudent, use_gate=False, use_short_conv=False),
    "gdn_v3": partial(GatedDeltaNetStudent, use_gate=True, use_short_conv=True),
    "gdn_v4": partial(GatedDeltaNetStudent, use_gate=True, use_short_conv=False),
}


def get_student_attention_class(name: str):
    """The constructor `(config, layer_idx, **options)` behind a student's name. Raises ValueError for unknown names."""
    if name not in STUDENT_ATTENTION_MAP:
        raise ValueError(f"student_model.name: {name!r} is unknown; choose one of {', '.join(STUDENT_ATTENTION_MAP)}")
    return STUDENT_ATTENTION_MAP[name]


def check_student(name: str, options: dict) -> None:
    """Raises ValueError, naming key, value and cure, for an unknown student or an option it does not take."""
    known = get_student_attention_class(name).func.OPTIONS
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"student_model.options.{key}: {name} does not take it; it takes {', '.join(known)}")
        if type(value) is not known[key]:
            raise ValueError(f"student_model.options.{key}: {value!r} must be of type {known[key].__name__}")


def is_student_attention(module: nn.Module) -> bool:
    """Whether a module is one of the linear attentions of this file."""
    return isinstance(module, tuple({entry.func for entry in STUDENT_ATTENTION_MAP.values()}))

"""Student attentions with a diagonal or scalar decay: GLA, gated slot attention, HGRN2, Mamba-2."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from fla.layers import GatedLinearAttention, GatedSlotAttention, HGRN2Attention, Mamba2
from fla.layers import gla as gated_linear
from fla.layers.utils import get_layer_cache, update_layer_cache
from fla.modules import RMSNorm
from fla.modules.causal_conv1d import ops as convolution
from torch import nn
from transformers import initialization as init

from .attention import SoftmaxAttention, right_aligned
from .config_distilled_student import StudentConfig
from .student_base import (
    CONVOLUTION,
    LEAST_BLOCK,
    SWITCH,
    InitReport,
    Option,
    State,
    StudentAttention,
    any_padding,
    expand_kv_heads,
    expanded_sizes,
    linear,
    sizes,
)

# Initial norm weight of students whose memory is not addressed by the teacher's keys: at the start
# they output little more than running means, which RMSNorm would scale up to the size of a trained
# attention's output.
SOFT_START = 0.1


class GatedLinearStudent(StudentAttention, GatedLinearAttention):
    """Gated linear attention (Yang et al., arXiv 2312.06635). Its gate is a sigmoid, so that it can
    start open."""

    reads_documents_on_host = True
    OPTIONS = {
        "gate_logit_normalizer": Option(),
        "gate_low_rank_dim": Option(),
        "use_short_conv": SWITCH,
        "conv_size": CONVOLUTION["conv_size"],
    }

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**expanded_sizes(config, layer_idx), gate_fn="sigmoid", **options)

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_v_dim, self.head_k_dim), torch.float32)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.zeros_(self.g_proj.weight)
        init.constant_(self.g_norm.weight, 2.0)
        init.zeros_(self.gk_proj[1].bias)


class GatedSlotStudent(StudentAttention, GatedSlotAttention):
    """Gated slot attention (Zhang et al., arXiv 2409.07146): softmax over a fixed number
    of slots."""

    heads_are_independent = False  # for the norm
    weights_read_by_kernel = ("o_proj",)
    reads_documents_on_host = True
    OPTIONS = {
        "num_slots": Option(minimum=LEAST_BLOCK),
        "gate_logit_normalizer": Option(),
        "use_short_conv": SWITCH,
        "conv_size": CONVOLUTION["conv_size"],
    }

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**expanded_sizes(config, layer_idx), **options)
        self.g_norm = RMSNorm(self.value_dim, eps=config.rms_norm_eps, dtype=torch.float32)

    def recurrent_state(self) -> tuple[State, State]:
        """The keys and the values of the slots."""
        keys = (self.num_heads, self.head_k_dim, self.num_slots)
        values = (self.num_heads, self.num_slots, self.head_v_dim)
        return State(keys, torch.float32), State(values, torch.float32)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.constant_(self.g_norm.weight, SOFT_START)


class HGRN2Student(StudentAttention, HGRN2Attention):
    """HGRN2 (Qin et al., arXiv 2404.07904): gated linear attention whose keys are one minus its
    forget gates.

    Queries and values start from the teacher. Keys are tied to the forget gate, so the teacher's
    are dropped.
    """

    heads_are_independent = False  # for the norm
    weights_read_by_kernel = ("o_proj",)
    reads_documents_on_host = True
    SOURCES = {
        "q_proj.weight": "q_proj.weight",
        "i_proj.weight": "v_proj.weight",
        "o_proj.weight": "o_proj.weight",
    }

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim,
            expand_ratio=config.head_dim,
            layer_idx=layer_idx,
            norm_eps=config.rms_norm_eps,
        )
        for name in ("q_proj", "f_proj", "i_proj"):
            setattr(self, name, linear(config.hidden_size, self.forget_dim))
        self.o_proj = linear(self.input_dim, config.hidden_size)

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_i_dim, self.head_f_dim), torch.float32)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.constant_(self.g_norm.weight, SOFT_START)


class Mamba2Student(StudentAttention, Mamba2):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060) with one group per head: C, B and x start as the
    teacher's q, k and v.

    The teacher's q/k/v biases are kept. Several tokens are read by the kernels of gated linear
    attention: without the package mamba_ssm FLA's layer would read them in plain PyTorch. The option
    `chunk_size` has no effect since; older configs have it.
    """

    reads_documents_on_host = True
    OPTIONS = {"conv_kernel": Option(), "chunk_size": Option()}
    HEAD_DIMS = None
    SOURCES = {"out_proj.weight": "o_proj.weight", "out_proj.bias": "o_proj.bias"}

    def __init__(self, config: StudentConfig, layer_idx: int, *, chunk_size: int = 32, **options):
        heads, head_dim = config.num_attention_heads, config.head_dim
        super().__init__(
            **sizes(config, layer_idx),
            head_dim=head_dim,
            state_size=head_dim,
            n_groups=heads,
            chunk_size=chunk_size,
            # Exact: FLA truncates expand x hidden_size to an integer.
            expand=Fraction(heads * head_dim, config.hidden_size),
            use_bias=True,
            **options,
        )

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_dim, self.ssm_state_size), torch.float32)

    def conv_state(self) -> State:
        return State((self.conv_dim, self.conv_kernel_size))

    @property
    def o_proj(self) -> nn.Linear:
        return self.out_proj

    def share_of_heads(self, name: str, whole: torch.Tensor, rank: int, devices: int) -> torch.Tensor:
        """As for other students; in_proj stacks gate, x, B, C and time steps, conv1d x, B and C."""
        if name.split(".")[0] not in ("in_proj", "conv1d"):
            return super().share_of_heads(name, whole, rank, devices)
        width = self.intermediate_size * devices
        blocks = whole.split(width)  # the time steps, fewer rows, are the last
        return torch.cat([block.chunk(devices)[rank] for block in blocks])

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        self.init_decay()
        init.zeros_(self.D)
        gate = torch.zeros_like(self.in_proj.bias)
        gate[: self.intermediate_size] = 1.0  # before an RMSNorm any constant passes everything
        init.copy_(self.in_proj.bias, gate)
        init.zeros_(self.out_proj.bias)

    @torch.no_grad()
    def init_from_teacher(self, teacher_attn: SoftmaxAttention) -> InitReport:
        """Also copies v, k and q to their rows of in_proj, which stacks gate, x, B, C and time
        steps."""
        report = super().init_from_teacher(teacher_attn)
        width = self.intermediate_size
        for block, name in enumerate(("v_proj", "k_proj", "q_proj"), 1):
            for part, rows in getattr(teacher_attn, name).named_parameters():
                if len(rows) < width:
                    rows = expand_kv_heads(rows, teacher_attn.num_kv_heads, teacher_attn.num_heads)
                self.in_proj.get_parameter(part)[block * width : (block + 1) * width].copy_(rows)
                report.dropped.remove(f"{name}.{part}")
        report.fresh.remove("in_proj.weight")
        report.transformed.append("in_proj.weight")
        return report

    @any_padding
    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, *args, cu_seqlens=None, **_
    ):
        if hidden_states.shape[1] == 1 and cu_seqlens is None:
            return super().forward(hidden_states, None, past_key_values, use_cache)
        state = get_layer_cache(self, past_key_values)
        if attention_mask is None:
            return self.scan(hidden_states, cu_seqlens, state, past_key_values), None, past_key_values
        return self.scan_padded(hidden_states, attention_mask, state, past_key_values), None, past_key_values

    def scan_padded(self, hidden_states, attention_mask, state, past_key_values) -> torch.Tensor:
        """The outputs [B, T, hidden_size] of T left-padded tokens. state: what the cache holds, or
        None. FLA's layer lets padding decay its state; here it has time steps of 0, so that it
        neither writes to the state nor decays it.
        """
        batch, length, _ = hidden_states.shape
        before = self.conv_kernel_size - 1
        gate, xbc, steps = self.project(hidden_states)
        if state is None:
            past = xbc.new_zeros(batch, before, self.conv_dim)
            recurrent_state = None
        else:
            past = state["conv_state"][..., 1:].mT
            recurrent_state = state["recurrent_state"].float()
        real = attention_mask[:, -length:].bool()
        (xbc,) = right_aligned(F.pad(real, (before, 0), value=True), torch.cat((past, xbc), 1))
        steps = steps * real[..., None, None]
        xbc = xbc.mT
        conv_state = xbc[..., -self.conv_kernel_size :]
        xbc = self.act(F.conv1d(xbc, self.conv1d.weight, self.conv1d.bias, groups=self.conv_dim).mT)
        keep_state = past_key_values is not None
        y, recurrent_state = self.recur(xbc, steps, initial_state=recurrent_state, output_final_state=keep_state)
        update_layer_cache(self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=length)
        return self.out_proj(self.norm(y, gate))

    def scan(self, hidden_states, cu_seqlens, state, past_key_values) -> torch.Tensor:
        """The outputs [B, T, hidden_size] of T tokens, or with cu_seqlens of packed sequences [1,
        tokens, hidden_size]. state: what the cache holds, or None; FLA's layer reads only one token
        at a time with a filled cache."""
        gate, xbc, steps = self.project(hidden_states)
        keep_state = past_key_values is not None
        # Looked up in FLA's module, where `cpu_ops` binds its replacement.
        xbc, conv_state = convolution.causal_conv1d(
            x=xbc.contiguous(),
            weight=self.conv1d.weight.squeeze(1),
            bias=self.conv1d.bias,
            initial_state=None if state is None else state["conv_state"],
            output_final_state=keep_state,
            activation=self.activation,
            cu_seqlens=cu_seqlens,
        )
        before = None if state is None else state["recurrent_state"].float()
        options = dict(initial_state=before, output_final_state=keep_state, cu_seqlens=cu_seqlens)
        y, recurrent_state = self.recur(xbc, steps, **options)
        length = hidden_states.shape[1]
        update_layer_cache(self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=length)
        return self.out_proj(self.norm(y, gate))

    def project(self, hidden_states) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gate, the input of the convolution, and the time steps [B, T, heads, 1]."""
        gate, xbc, steps = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], -1
        )
        return gate, xbc, F.softplus(steps.float() + self.dt_bias.float()).clamp(*self.dt_limit)[..., None]

    def recur(self, xbc, steps, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The recurrence over what the convolution returns, [B, T, conv_dim]: its output [B, T,
        intermediate_size], and its last state. With one group per head it is gated linear attention
        with q = C, k = B and v = x times its time steps."""
        x, b, c = (y.unflatten(-1, (self.num_heads, -1)) for y in xbc.split(self.intermediate_size, -1))
        decay = -steps * self.A_log.float().exp()[:, None]
        y, state = gated_linear.chunk_gla(
            q=c, k=b, v=(x * steps).to(c), g=decay.expand(b.shape), scale=1.0, state_v_first=True, **options
        )
        y = y + x * self.D[:, None]
        return y.flatten(2).to(xbc.dtype), state

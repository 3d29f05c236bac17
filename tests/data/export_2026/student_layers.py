"""The student attentions: FLA layers that know how to start from a teacher's softmax attention.

A student is built as `cls(config, layer_idx, **options)`; `STUDENT_ATTENTION_MAP` names them, and a variant is a line
there. `init_from_teacher` accounts for every tensor of both sides in an `InitReport`.

What no teacher has starts neutral: gates pass everything, short convolutions are the identity, nothing is forgotten fast.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial, wraps

import torch
import torch.nn.functional as F
from fla.layers import (
    DeltaNet,
    ForgettingAttention,
    GatedDeltaNet,
    GatedLinearAttention,
    GatedSlotAttention,
    HGRN2Attention,
    KimiDeltaAttention,
    Mamba2,
    PaTHAttention,
    RWKV7Attention,
    gated_deltanet,
)
from fla.layers import gla as gated_linear
from fla.layers.utils import get_layer_cache, repad_hidden_states, unpad_hidden_states, update_layer_cache
from fla.models.utils import FLALayer
from fla.modules import RMSNorm
from torch import nn
from transformers import initialization as init

from .attention import SoftmaxAttention, left_padding, right_aligned
from .config_distilled_student import StudentConfig
from .fused_ops import fuses, rotate

# Norm weight of students whose memory is not addressed by the teacher's keys: at the start they hold little more than
# running means, which RMSNorm would blow up to the size of an attention that knows what it looks for.
SOFT_START = 0.1
# Where a SiLU gate starts: near 0 it is nearly linear, and learns faster than at 1 or at its minimum, where it is flattest.
OPEN_SILU = 0.3
# FLA advises short convolutions for pretraining from scratch; a student that starts from a teacher does without.
warnings.filterwarnings("ignore", message="ShortConvolution is crucial")
warnings.filterwarnings("ignore", message="According to Bo")  # of RWKV-7, once a layer
logging.getLogger("fla.layers.mamba2").setLevel(logging.ERROR)  # of missing CUDA packages, once a layer


@dataclass
class InitReport:
    """Where each tensor of a student attention came from, and which of the teacher's were left behind (by name). Those that were then
    fitted to batches are in `calibrated` alone."""

    copied: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    calibrated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def expand_kv_heads(weight: torch.Tensor, num_kv_heads: int, num_heads: int) -> torch.Tensor:
    """Repeats each key/value head for the query heads that read it: '(h d) ... -> (h g d) ...', h the kv heads.

    weight: [num_kv_heads * head_dim, ...], a projection's weight or bias. Returns [num_heads * head_dim, ...].
    """
    heads = weight.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias)


def sizes(config: StudentConfig, layer_idx: int) -> dict:
    """What FLA's layers are told of a teacher in the same words."""
    return dict(hidden_size=config.hidden_size, num_heads=config.num_attention_heads, layer_idx=layer_idx,
                norm_eps=config.rms_norm_eps)  # fmt: skip


def expanded_sizes(config: StudentConfig, layer_idx: int) -> dict:
    """The same for layers that reckon their heads' size from hidden_size."""
    expand = config.num_attention_heads * config.head_dim / config.hidden_size
    return sizes(config, layer_idx) | dict(expand_k=expand, expand_v=expand)


class WholeLinear(nn.Linear):
    """A projection that keeps its dtype: bitsandbytes replaces nn.Linear, and no subclass of it.

    On a GPU its output features are padded to a multiple of 8 where they are no multiple of 4: of 9 heads' gates cuBLAS would read
    element by element.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fuses(x) or self.out_features % 4 == 0:
            return super().forward(x)
        missing = -self.out_features % 8
        bias = self.bias if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(x, F.pad(self.weight, (0, 0, 0, missing)), bias)[..., : self.out_features]


class HeadNorm(nn.RMSNorm):
    """The teacher's per-head RMSNorm, on [..., heads x head_dim] or [..., heads, head_dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).view(x.shape)


@dataclass(frozen=True)
class Option:
    """What a hyper-parameter takes: its type, for a number the least and the most, which only a slip of the keyboard exceeds, and the
    switch without which it does nothing."""

    kind: type = int
    minimum: int = 1
    maximum: int = 2**20
    needs: str | None = None

    def __str__(self) -> str:
        return "true or false" if self.kind is bool else f"an integer from {self.minimum} to {self.maximum}"


BIASES = {name: name for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")}
NORMS = {name: name for name in ("q_norm.weight", "k_norm.weight")}
SWITCH = Option(bool)
LEAST_BLOCK = 9  # FLA's kernels round sizes up to powers of 2, and a GPU multiplies blocks of 16 or more
CONVOLUTION = {"conv_size": Option(needs="use_short_conv"), "conv_bias": Option(bool, needs="use_short_conv")}


class StudentAttention:
    """What every student adds to its layer: where its tensors come from, and how the others start.

    OPTIONS: the hyper-parameters that a config may set, and what they take.
    HEAD_DIMS: the sizes of a teacher's heads that its kernels take; None for all.
    SOURCES: our parameter -> the teacher's that it starts from, where both have it. One with as many rows as there are
    query heads takes a key/value projection repeated by head block.
    rope_share: the share of the teacher's rotary frequencies, from the fastest on, that the layer applies.
    fits_decay: whether its heads decay by exp(-exp(A_log) softplus(... + dt_bias)) a token, and by nothing else.
    fits_gate: whether its output gate starts shut, and `open_gate` opens it.
    CROPS: whether its cache holds tokens one by one, so that the last can be forgotten.
    CONSTANT_STATE: whether what it holds keeps its shape from the first token on.
    READS_ON: whether it takes several tokens behind a cache at once.
    TAKES_EMPTY_ROWS: whether it takes a batch in which a row has no token of text, only padding.
    OPENED: the linear maps whose weight a kernel reads itself.
    """

    OPTIONS: dict[str, Option] = {}
    HEAD_DIMS: range | tuple[int, ...] | None = range(LEAST_BLOCK, 257)
    SOURCES = {f"{name}.weight": f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    CROPS = False
    CONSTANT_STATE = True
    READS_ON = True
    TAKES_EMPTY_ROWS = False
    OPENED = ()
    rope_share = 0.0
    fits_decay = False
    fits_gate = False

    def keep_whole(self) -> None:
        """Keeps from quantisation what does not bear it: maps to or from few features, which make gates and decays, and
        those in OPENED."""
        for name, module in self.named_modules():
            if type(module) is nn.Linear and (name in self.OPENED or min(module.weight.shape) < 128):
                module.__class__ = WholeLinear

    @torch.no_grad()
    def init_fresh(self) -> None:
        """Sets what no teacher has to its start. Skips what transformers has just loaded."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                identity = torch.zeros_like(module.weight)
                identity[..., -1] = 1
                init.copy_(module.weight, identity)
                if module.bias is not None:
                    init.zeros_(module.bias)

    def init_decay(self, factor: float = 1.0) -> None:
        """Decay as in Mamba-2 (arXiv 2405.21060): rates A in factor x [1, 16] x time steps log-uniform in [1e-3, 0.1],
        through the inverse of softplus."""
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).mul_(factor).log())
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    @torch.no_grad()
    def set_decay(self, rates: torch.Tensor) -> None:
        """Lets head h forget at rates[h] nats a token, where nothing in the input says otherwise. Only with `fits_decay`."""
        step = rates / self.A_log.float().exp()
        bias = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
        self.dt_bias.copy_(bias.repeat_interleave(self.dt_bias.numel() // bias.numel()))

    @torch.no_grad()
    def init_from_teacher(self, teacher_attn: SoftmaxAttention) -> InitReport:
        """Takes what the teacher has, sets the rest to its neutral start, and accounts for every tensor.

        Raises ValueError if a teacher's tensor does not fit.
        """
        self.init_fresh()
        report, used = InitReport(), set()
        theirs, ours = dict(teacher_attn.named_parameters()), dict(self.named_parameters())
        for name, source in self.SOURCES.items():
            if name not in ours or source not in theirs:
                continue
            tensor, kind = theirs[source], report.copied
            if tensor.shape != ours[name].shape:
                tensor, kind = expand_kv_heads(tensor, teacher_attn.num_kv_heads, teacher_attn.num_heads), report.transformed
            if tensor.shape != ours[name].shape:
                raise ValueError(
                    f"layer {self.layer_idx}: the student's {name} is {tuple(ours[name].shape)}, "
                    f"the teacher's {source} {tuple(theirs[source].shape)}"
                )
            ours[name].copy_(tensor)
            kind.append(name)
            used.add(source)
        report.fresh = [name for name in ours if name not in {*report.copied, *report.transformed}]
        report.dropped = [name for name in theirs if name not in used]
        if self.rope_share < 1:
            report.dropped.append("the slow rope frequencies" if self.rope_share else "rope")
        return report


def any_padding(forward):
    """Makes the forward of a layer that takes padding on the left alone take it anywhere: it right-aligns each row's
    tokens, and moves their outputs back to where the tokens were."""

    @wraps(forward)
    def aligned(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):  # fmt: skip
        length = hidden_states.shape[1]
        if attention_mask is None or length == 1:
            return forward(self, hidden_states, attention_mask, past_key_values, use_cache, position_embeddings)
        real = attention_mask[:, -length:].bool()
        (hidden_states,) = right_aligned(real, hidden_states)
        if position_embeddings is not None:
            position_embeddings = right_aligned(real, *(x.expand(len(real), -1, -1) for x in position_embeddings))
        attention_mask = torch.cat((attention_mask[:, :-length].bool(), left_padding(real.sum(1), length)), 1)
        out, *rest = forward(self, hidden_states, attention_mask, past_key_values, use_cache, position_embeddings)
        back = real.long().argsort(dim=1, stable=True).argsort(1)
        return out.take_along_dim(back[..., None], 1), *rest

    return aligned


def copy_rows(layer: FLALayer, rows: torch.Tensor) -> list[torch.Tensor]:
    """Copies of what a layer of a cache holds of the sequences `rows`, a mask [B]; none before the first token."""
    copies = []
    if layer.state is not None:
        layer._map_state(lambda x: copies.append(x[rows.to(x.device)]))
    return copies


def restore_rows(layer: FLALayer, rows: torch.Tensor, copies: Sequence[torch.Tensor]) -> None:
    """Sets what a layer of a cache holds of the sequences `rows` back to `copies`, which `copy_rows` made; without
    copies to zero. Keys and values that were added since then stay; the attention mask hides them."""
    old = iter(copies)

    def restore(state):
        state = state.clone()
        if copies:
            before = next(old)
            state[rows.to(state.device), : before.shape[1]] = before
        else:
            state[rows.to(state.device)] = 0
        return state

    layer.state = layer._map_state(restore)


class GatedDeltaNetStudent(StudentAttention, GatedDeltaNet):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464) with one key/value head a query head of the teacher.

    factored: K and V go through as many features as the teacher has for them, then through a map to all heads that
    starts as the repetition by head block. decay: factor on the decay at the start. gate_activation: sigmoid, a gate
    that starts open, or silu, one that starts shut, for it has no bias, and that `open_gate` opens.
    """

    OPTIONS = CONVOLUTION | {"allow_neg_eigval": SWITCH}
    fits_decay = True
    SOURCES = StudentAttention.SOURCES | {"k_proj.0.weight": "k_proj.weight", "v_proj.0.weight": "v_proj.weight"}

    def __init__(self, config: StudentConfig, layer_idx: int, *, use_gate: bool, use_short_conv: bool,
                 factored: bool = False, decay: float = 1.0, gate_activation: str = "sigmoid", **options):  # fmt: skip
        super().__init__(
            **sizes(config, layer_idx), head_dim=config.head_dim, expand_v=1, use_gate=use_gate,
            use_short_conv=use_short_conv, output_gate_activation=gate_activation, **options,
        )  # fmt: skip
        self.fits_gate = gate_activation == "silu"
        self.num_kv_heads, self.factored, self.decay = config.num_key_value_heads, factored, decay
        if factored:
            kv_dim = config.num_key_value_heads * config.head_dim
            self.k_proj, self.v_proj = (
                nn.Sequential(linear(config.hidden_size, kv_dim), linear(kv_dim, self.key_dim)) for _ in range(2)
            )

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        self.init_decay(self.decay)
        if self.use_gate:  # the norm weight undoes what the open gate leaves
            init.constant_(self.o_norm.weight, (1 + math.exp(-OPEN_SILU)) / OPEN_SILU if self.fits_gate else 2.0)
            init.zeros_(self.g_proj.weight)
        if self.factored:
            for projection in (self.k_proj, self.v_proj):
                one = torch.eye(projection[1].in_features, device=projection[1].weight.device)
                init.copy_(projection[1].weight, expand_kv_heads(one, self.num_kv_heads, self.num_heads))

    @torch.no_grad()
    def open_gate(self, ones: torch.Tensor) -> None:
        """Lets everything through, as evenly as `ones` [hidden_size] does: its product with what the layer gets is about 1.
        Only with `fits_gate`."""
        self.g_proj.weight.copy_(OPEN_SILU * ones.expand_as(self.g_proj.weight))


class GatedDeltaNetPlainStudent(GatedDeltaNetStudent):
    """Gated DeltaNet without SiLU on v.

    qk_activation: SiLU on q and k. use_norm: RMSNorm on the output of each head. keep_attention: it keeps the teacher's biases, and
    its rotary embedding, after SiLU, in the fastest quarter of the frequencies. Those tell neighbours apart; the slow ones carry
    what is looked up, however far back, and turning them costs recall. So did the teacher's q/k norms, before SiLU.
    """

    SOURCES = GatedDeltaNetStudent.SOURCES | BIASES

    def __init__(self, config: StudentConfig, layer_idx: int, *, use_gate: bool, use_short_conv: bool, use_norm: bool,
                 qk_activation: bool, keep_attention: bool, **options):  # fmt: skip
        super().__init__(config, layer_idx, use_gate=use_gate, use_short_conv=use_short_conv, **options)
        self.qk_activation = nn.SiLU() if qk_activation else nn.Identity()
        if use_short_conv:
            for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
                getattr(self, name).activation = None
        if not use_norm:
            self.o_norm = nn.Identity()
        if keep_attention:
            self.rope_share = 0.25
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, linear(config.hidden_size, self.key_dim, config.attention_bias))
            self.o_proj = linear(self.value_dim, config.hidden_size, config.attention_output_bias)

    def fast_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., head_dim] that turn the share `rope_share` of the frequencies and leave the others."""
        half = self.head_dim // 2  # frequencies, the fastest first, in both halves of a head
        slow = torch.arange(self.head_dim, device=cos.device) % half >= self.rope_share * half
        return cos.masked_fill(slow, 1), sin.masked_fill(slow, 0)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):  # fmt: skip
        """FLA's forward with other activations, and with what `keep_attention` keeps."""
        batch_size, q_len, _ = hidden_states.shape
        last_state = get_layer_cache(self, past_key_values)
        x, indices, cu_seqlens = unpad_hidden_states(hidden_states, None, attention_mask, q_len)
        qkv, conv_state = [self.q_proj(x), self.k_proj(x), self.v_proj(x)], None
        if self.use_short_conv:
            convolutions = self.q_conv1d, self.k_conv1d, self.v_conv1d
            old = (None,) * 3 if last_state is None else last_state["conv_state"]
            qkv, conv_state = zip(*(convolution(x=y, cache=state, output_final_state=use_cache, cu_seqlens=cu_seqlens)
                                    for convolution, y, state in zip(convolutions, qkv, old)))  # fmt: skip
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        q, k = self.qk_activation(q), self.qk_activation(k)
        if self.rope_share:
            cos, sin = (y.expand(batch_size, -1, -1) for y in position_embeddings)
            if indices is not None:
                cos, sin = (y.flatten(0, 1)[indices][None] for y in (cos, sin))
            angles = self.fast_angles(cos, sin)
            q, k = (rotate(y, *angles) for y in (q, k))
        one_by_one = q_len <= 64 and not self.training and not torch.is_grad_enabled()
        # Through FLA's module, where the stand-ins of `cpu_ops` are bound.
        rule = "fused_recurrent_gated_delta_rule" if one_by_one else "chunk_gated_delta_rule"
        o, recurrent_state = getattr(gated_deltanet, rule)(
            q=q, k=k, v=v, g=self.a_proj(x), beta=self.b_proj(x), A_log=self.A_log, dt_bias=self.dt_bias,
            initial_state=last_state["recurrent_state"] if last_state is not None else None,
            output_final_state=use_cache, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=self.allow_neg_eigval, state_v_first=True,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        update_layer_cache(self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=q_len)
        gate = (self.g_proj(x).unflatten(-1, (-1, self.head_dim)),) if self.use_gate else ()
        o = self.o_proj(self.o_norm(o, *gate).flatten(-2))
        return repad_hidden_states(o, indices, batch_size, q_len), None, past_key_values


class KimiDeltaStudent(StudentAttention, KimiDeltaAttention):
    """Kimi Delta Attention (arXiv 2510.26692): a gated delta rule with a decay for every channel."""

    OPTIONS = CONVOLUTION | {"allow_neg_eigval": SWITCH, "use_short_conv": SWITCH}
    fits_decay = True

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**sizes(config, layer_idx), head_dim=config.head_dim, expand_v=1, **options)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        self.init_decay()
        init.zeros_(self.g_proj[1].weight)
        init.zeros_(self.g_proj[1].bias)
        init.constant_(self.o_norm.weight, 2.0)


class DeltaNetStudent(StudentAttention, DeltaNet):
    """DeltaNet (Yang et al., arXiv 2406.06484): the delta rule without decay."""

    OPTIONS = KimiDeltaStudent.OPTIONS

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**expanded_sizes(config, layer_idx), **options)

    def forward(self, hidden_states, *args, **kwargs):
        # FLA's chunked kernel refuses fp32; the recurrent one, slow on long text, takes it.
        self.mode = "fused_recurrent" if hidden_states.dtype == torch.float32 else "chunk"
        return super().forward(hidden_states, *args, **kwargs)


class GatedLinearStudent(StudentAttention, GatedLinearAttention):
    """Gated linear attention (Yang et al., arXiv 2312.06635), its gate a sigmoid so that it can start open."""

    OPTIONS = {"gate_logit_normalizer": Option(), "gate_low_rank_dim": Option(), "use_short_conv": SWITCH,
               "conv_size": CONVOLUTION["conv_size"]}  # fmt: skip

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**expanded_sizes(config, layer_idx), gate_fn="sigmoid", **options)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.zeros_(self.g_proj.weight)
        init.constant_(self.g_norm.weight, 2.0)
        init.zeros_(self.gk_proj[1].bias)


class GatedSlotStudent(StudentAttention, GatedSlotAttention):
    """Gated slot attention (Zhang et al., arXiv 2409.07146): softmax over a fixed number of slots."""

    OPENED = ("o_proj",)
    OPTIONS = {"num_slots": Option(minimum=LEAST_BLOCK), "gate_logit_normalizer": Option(),
               "use_short_conv": SWITCH, "conv_size": CONVOLUTION["conv_size"]}  # fmt: skip

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**expanded_sizes(config, layer_idx), **options)
        self.g_norm = RMSNorm(self.value_dim, eps=config.rms_norm_eps, dtype=torch.float32)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.constant_(self.g_norm.weight, SOFT_START)


class HGRN2Student(StudentAttention, HGRN2Attention):
    """HGRN2 (Qin et al., arXiv 2404.07904): gated linear attention whose keys are what its gates do not keep.

    Queries and values start from the teacher; keys are tied to the forget gate, so the teacher's have no place.
    """

    OPENED = ("o_proj",)
    SOURCES = {"q_proj.weight": "q_proj.weight", "i_proj.weight": "v_proj.weight", "o_proj.weight": "o_proj.weight"}

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim, expand_ratio=config.head_dim,
            layer_idx=layer_idx, norm_eps=config.rms_norm_eps,
        )  # fmt: skip
        for name in ("q_proj", "f_proj", "i_proj"):
            setattr(self, name, linear(config.hidden_size, self.forget_dim))
        self.o_proj = linear(self.input_dim, config.hidden_size)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.constant_(self.g_norm.weight, SOFT_START)


class Mamba2Student(StudentAttention, Mamba2):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060) with a group a head: C, B and x start as the teacher's q, k and v.

    Its q/k/v biases are kept. Without the package mamba_ssm FLA runs it in plain PyTorch, whose memory grows with
    `chunk_size`.
    """

    OPTIONS = {"conv_kernel": Option(), "chunk_size": Option()}
    HEAD_DIMS = None
    SOURCES = {"out_proj.weight": "o_proj.weight", "out_proj.bias": "o_proj.bias"}

    def __init__(self, config: StudentConfig, layer_idx: int, *, chunk_size: int = 32, **options):
        heads, head_dim = config.num_attention_heads, config.head_dim
        super().__init__(
            **sizes(config, layer_idx), head_dim=head_dim, state_size=head_dim, n_groups=heads, chunk_size=chunk_size,
            expand=Fraction(heads * head_dim, config.hidden_size), use_bias=True, **options,  # FLA cuts the product off
        )  # fmt: skip

    @property
    def o_proj(self) -> nn.Linear:
        return self.out_proj

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
        """in_proj holds gate, x, B, C and time steps one below the other."""
        report = super().init_from_teacher(teacher_attn)
        width = self.intermediate_size
        for place, name in enumerate(("v_proj", "k_proj", "q_proj"), 1):
            for part, rows in getattr(teacher_attn, name).named_parameters():
                if len(rows) < width:
                    rows = expand_kv_heads(rows, teacher_attn.num_kv_heads, teacher_attn.num_heads)
                self.in_proj.get_parameter(part)[place * width : (place + 1) * width].copy_(rows)
                report.dropped.remove(f"{name}.{part}")
        report.fresh.remove("in_proj.weight")
        report.transformed.append("in_proj.weight")
        return report

    @any_padding
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, *args):
        state, length = get_layer_cache(self, past_key_values), hidden_states.shape[1]
        if length == 1 or state is None and attention_mask is None:
            return super().forward(hidden_states, None, past_key_values, use_cache)
        return self.go_on(hidden_states, attention_mask, state, past_key_values), None, past_key_values

    def go_on(self, hidden_states, attention_mask, state, past_key_values) -> torch.Tensor:
        """The outputs [B, T, hidden_size] of T tokens, padded on the left. FLA's layer takes one token at a time behind
        a cache, and lets padding decay its state. state: what the cache holds, or None.

        A group a head, so that the scan is gated linear attention with q = C, k = B and v = x times its time steps.
        Padding has time steps of 0: it neither writes nor decays."""
        batch, length, _ = hidden_states.shape
        width, before = self.intermediate_size, self.conv_kernel_size - 1
        gate, xbc, steps = self.in_proj(hidden_states).split([width, self.conv_dim, self.num_heads], -1)
        if state is None:
            past, recurrent_state = xbc.new_zeros(batch, before, self.conv_dim), None
        else:
            past, recurrent_state = state["conv_state"][..., 1:].mT, state["recurrent_state"].float()
        xbc = torch.cat((past, xbc), 1)
        steps = F.softplus(steps.float() + self.dt_bias.float()).clamp(*self.dt_limit)[..., None]
        if attention_mask is not None:
            real = attention_mask[:, -length:].bool()
            (xbc,) = right_aligned(F.pad(real, (before, 0), value=True), xbc)
            steps = steps * real[..., None, None]
        xbc = xbc.mT
        conv_state = xbc[..., -self.conv_kernel_size :]
        xbc = self.act(F.conv1d(xbc, self.conv1d.weight, self.conv1d.bias, groups=self.conv_dim).mT)
        x, b, c = (y.unflatten(-1, (self.num_heads, -1)) for y in xbc.split(width, -1))
        decay = -steps * self.A_log.float().exp()[:, None]
        y, recurrent_state = gated_linear.chunk_gla(
            q=c, k=b, v=(x * steps).to(c), g=decay.expand(b.shape), scale=1.0, state_v_first=True,
            initial_state=recurrent_state, output_final_state=past_key_values is not None,
        )  # fmt: skip
        update_layer_cache(self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=length)
        y = y + x * self.D[:, None]
        return self.out_proj(self.norm(y.flatten(2).to(hidden_states.dtype), gate))


class Shut(nn.Module):
    """The logits of a gate that lets nothing through, [..., width]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.width), -torch.inf)


class RWKV7Student(StudentAttention, RWKV7Attention):
    """RWKV-7 (Peng et al., arXiv 2503.14456), its time mixing: a delta rule with a decay a channel.

    Without the value residual from its first layer, which no teacher has, and which is not there in a hybrid.
    """

    OPTIONS = {f"{name}_low_rank_dim": Option() for name in ("decay", "gate", "a")}
    SOURCES = {"r_proj.weight": "q_proj.weight"} | {f"{n}.weight": f"{n}.weight" for n in ("k_proj", "v_proj", "o_proj")}

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        hidden, wide = config.hidden_size, config.num_attention_heads * config.head_dim
        super().__init__(
            hidden_size=wide, head_dim=config.head_dim, layer_idx=layer_idx, norm_eps=config.rms_norm_eps,
            num_hidden_layers=max(2, config.num_hidden_layers), **options,
        )  # fmt: skip
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.zeros(1, 1, hidden)))
        self.r_proj, self.k_proj, self.v_proj = (linear(hidden, wide) for _ in range(3))
        self.o_proj = linear(wide, hidden)
        for lora in (self.w_lora, self.a_lora, self.g_lora):
            lora.lora[0] = linear(hidden, lora.low_rank_dim)
        self.v_lora = Shut(wide)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        for zero in (*(getattr(self, f"x_{name}") for name in "rwkvag"), self.r_k, self.k_a, self.g_norm.bias,
                     self.w_lora.lora[2].weight, self.a_lora.lora[2].weight, self.a_lora.lora[2].bias,
                     self.g_lora.lora[0].weight):  # fmt: skip
            init.zeros_(zero)
        init.ones_(self.k_k)
        init.ones_(self.g_norm.weight)
        init.constant_(self.w_lora.lora[2].bias, -4.0)  # a decay of exp(-0.011)
        init.constant_(self.g_lora.lora[2].weight, 2 / self.g_lora.low_rank_dim)  # the sum of sigmoid(0) becomes 1

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        """FLA's forward over the real tokens, packed: with a mask it would shift and decay over padding."""
        batch, length, _ = hidden_states.shape
        if length == 1:
            attention_mask = None  # every row has a token of text, see TAKES_EMPTY_ROWS
        x, indices, cu_seqlens = unpad_hidden_states(hidden_states, None, attention_mask, length)
        no_residual = x.new_zeros(*x.shape[:2], self.value_dim)
        out = super().forward(x, None, past_key_values, use_cache, v_first=no_residual, cu_seqlens=cu_seqlens)[0]
        if past_key_values is not None:
            # FLA has counted the tokens of all rows; the cache counts the columns, padding included.
            past_key_values.layers[self.layer_idx]._seen_tokens += length - x.shape[1]
        return repad_hidden_states(out, indices, batch, length), None, past_key_values


class _MaskedCacheStudent(StudentAttention):
    """A softmax-like layer of FLA that takes a cache only with a mask, a mask only in evaluation, and behind cached
    tokens one token at a time: chunked prefill is slow."""

    CONSTANT_STATE = False
    READS_ON = False

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        batch, length, _ = hidden_states.shape
        if past_key_values is None:
            x, indices, cu_seqlens = unpad_hidden_states(hidden_states, None, attention_mask, length)
            out = super().forward(x, cu_seqlens=cu_seqlens)[0]
            return repad_hidden_states(out, indices, batch, length), None, None
        past = past_key_values.get_seq_length(self.layer_idx)
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(batch, past + length, dtype=torch.long)
        if past and length > 1:
            return self.one_by_one(hidden_states, attention_mask, past_key_values), None, past_key_values
        # FLA compiles a helper of one decoding step, for longer than a CPU takes to run it.
        with torch.compiler.set_stance("force_eager" if hidden_states.device.type == "cpu" else "default"):
            return super().forward(hidden_states, attention_mask, past_key_values, use_cache=True)

    def one_by_one(self, hidden_states, attention_mask, past_key_values) -> torch.Tensor:
        """The outputs [B, T, hidden_size] of T tokens that follow those of the cache.

        A step reads a token of every row. Where that is padding, the row gets back what it held before: the state of
        the convolution and PaTH's keys have changed."""
        outputs, layer = [], past_key_values.layers[self.layer_idx]
        first = attention_mask.shape[1] - hidden_states.shape[1]
        padded = not attention_mask[:, first:].all()
        for t, token in enumerate(hidden_states.split(1, 1), first):
            mask = attention_mask[:, : t + 1]
            if padded:
                idle = mask[:, -1] == 0
                mask = F.pad(mask[:, :-1], (0, 1), value=1)
                before = copy_rows(layer, idle)
            outputs.append(self.forward(token, mask, past_key_values, use_cache=True)[0])
            if padded:
                restore_rows(layer, idle, before)
        return torch.cat(outputs, 1)


class PaTHStudent(_MaskedCacheStudent, PaTHAttention):
    """PaTH attention (Yang et al., arXiv 2505.16381): softmax attention whose positions are products of Householder-like
    maps. They start near the identity, and the forget gate, if there is one, open."""

    OPTIONS = {"conv_size": Option(needs="use_w_shortconv"), "conv_bias": Option(bool, needs="use_w_shortconv"),
               "use_low_rank_w": SWITCH, "use_w_shortconv": SWITCH}  # fmt: skip
    HEAD_DIMS = (16, 32, 64, 128)

    def __init__(self, config: StudentConfig, layer_idx: int, *, use_forget_gate: bool, **options):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim, num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads, use_forget_gate=use_forget_gate, layer_idx=layer_idx, **options,
        )  # fmt: skip
        hidden, wide = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj, self.o_proj = linear(hidden, wide), linear(wide, hidden)
        self.k_proj, self.v_proj = linear(hidden, self.kv_dim), linear(hidden, self.kv_dim)
        if isinstance(self.w_proj, nn.Sequential):
            self.w_proj[0] = linear(hidden, self.w_proj[0].out_features)
        else:
            self.w_proj = linear(hidden, self.kv_dim)
        self.bt_proj = linear(hidden, self.num_kv_heads, bias=True)
        if use_forget_gate:
            self.g_proj = linear(hidden, self.num_heads, bias=True)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.zeros_(self.bt_proj.weight)
        init.constant_(self.bt_proj.bias, -4.0)
        if self.use_forget_gate:
            init.zeros_(self.g_proj.weight)
            init.constant_(self.g_proj.bias, 6.0)


class ForgettingStudent(_MaskedCacheStudent, ForgettingAttention):
    """Forgetting Transformer (Lin et al., arXiv 2503.02130): softmax attention with a forget gate in place of RoPE.

    It keeps the teacher's biases and q/k norms; the gate starts open."""

    CROPS = True
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim, num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads, layer_idx=layer_idx,
        )  # fmt: skip
        hidden, wide, bias = config.hidden_size, config.num_attention_heads * config.head_dim, config.attention_bias
        self.q_proj, self.o_proj = linear(hidden, wide, bias), linear(wide, hidden, config.attention_output_bias)
        self.k_proj, self.v_proj = linear(hidden, self.kv_dim, bias), linear(hidden, self.kv_dim, bias)
        self.f_proj = linear(hidden, self.num_heads, bias=True)
        if config.qk_norm:
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.qk_norm, self.q_norm, self.k_norm = True, *(HeadNorm(config.head_dim, eps=eps) for _ in range(2))

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.zeros_(self.f_proj.weight)
        init.constant_(self.f_proj.bias, 6.0)


class SlidingWindowStudent(StudentAttention, SoftmaxAttention):
    """The teacher's own attention, over the last `window_size` tokens, the query's among them (Beltagy et al., arXiv
    2004.05150)."""

    CONSTANT_STATE = False
    TAKES_EMPTY_ROWS = True
    OPTIONS = {"window_size": Option()}
    HEAD_DIMS = None
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS
    rope_share = 1.0

    def __init__(self, config: StudentConfig, layer_idx: int, *, window_size: int = 512):
        super().__init__(config, layer_idx, window_size=window_size)

    forward = any_padding(SoftmaxAttention.forward)


def window_sums(q, k, v, valid, window_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over a window, before its division: the weighted sum of the values [B, T, H, D], and that of the
    weights [B, T, H, 1]. The largest weight of each query is 1.

    q [B, T, H, D], the last T of the S positions of k and v [B, S, H, D]; valid [B, S], False for padding.
    """
    offset, values, weights = k.shape[1] - q.shape[1], [], []
    for start in range(0, q.shape[1], window_size):  # blocks, so that no T x T scores are held
        block = q[:, start : start + window_size]
        low, high = max(0, offset + start - window_size + 1), offset + start + block.shape[1]
        scores = torch.einsum("bthd,bshd->bths", block, k[:, low:high]).float() * q.shape[-1] ** -0.5
        distance = torch.arange(offset + start, high, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        seen = ((distance >= 0) & (distance < window_size))[None, :, None] & valid[:, None, None, low:high]
        scores = scores.masked_fill(~seen, -torch.inf)
        weight = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e4)).exp()  # a padded query sees nothing
        values.append(torch.einsum("bths,bshd->bthd", weight, v[:, low:high].float()))
        weights.append(weight.sum(-1, keepdim=True))
    return torch.cat(values, 1), torch.cat(weights, 1)


class FeatureMap(nn.Module):
    """Hedgehog's feature map (Zhang et al., arXiv 2402.04347): softmax over x W and over -x W, W of each head.

    [..., heads, head_dim] -> [..., heads, 2 feature_dim], non-negative.
    """

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...hd,hdf->...hf", x, self.weight)
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


class LoLCATsStudent(StudentAttention, SoftmaxAttention):
    """LoLCATs (Zhang et al., arXiv 2410.10254): the teacher's softmax over a sliding window, and linear attention with
    learned feature maps over all that is older, under one normaliser."""

    CONSTANT_STATE = False
    TAKES_EMPTY_ROWS = True
    OPTIONS = {"window_size": Option(), "feature_dim": Option(minimum=2)}  # softmax over one feature is 1
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS
    rope_share = 1.0

    def __init__(self, config: StudentConfig, layer_idx: int, *, window_size: int = 64, feature_dim: int | None = None):
        super().__init__(config, layer_idx, window_size=window_size)
        feature_dim = feature_dim or config.head_dim
        self.q_map, self.k_map = (FeatureMap(self.num_heads, self.head_dim, feature_dim) for _ in range(2))
        self.window_log_weight = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        for feature_map in (self.q_map, self.k_map):
            identity = torch.eye(*feature_map.weight.shape[1:], device=feature_map.weight.device)
            init.copy_(feature_map.weight, identity.expand_as(feature_map.weight))
        init.zeros_(self.window_log_weight)

    @any_padding
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):  # fmt: skip
        length, window = hidden_states.shape[1], self.window_size
        last_state = get_layer_cache(self, past_key_values)
        state, normalizer = last_state["recurrent_state"] if last_state is not None else (None, 0)
        q, k, v = self.project(hidden_states, position_embeddings)
        k, v, attention_mask = self.with_past(k, v, attention_mask, past_key_values)
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for x in (k, v))
        valid = k.new_ones(k.shape[:2]) if attention_mask is None else attention_mask
        valid = valid.bool()
        near, near_weight = window_sums(q, k, v, valid, window)
        # What a query's window has just left behind joins the linear part: keys and values `window` positions later.
        features = self.k_map(k) * valid[..., None, None]
        left = slice(k.shape[1] - length, k.shape[1])
        old_k, old_v = (F.pad(x, (0, 0, 0, 0, window, 0))[:, left].to(q) for x in (features, v))
        old_q = self.q_map(q).to(q)
        rule = gated_linear.fused_recurrent_gla if length <= 64 else gated_linear.chunk_gla
        gates = {"gk" if length <= 64 else "g": torch.zeros_like(old_k)}
        far, state = rule(q=old_q, k=old_k, v=old_v, scale=1.0, initial_state=state, output_final_state=use_cache,
                          state_v_first=True, **gates)  # fmt: skip
        sums = normalizer + old_k.float().cumsum(1)
        if past_key_values is not None:
            past_key_values.update(recurrent_state=(state, sums[:, -1:]), layer_idx=self.layer_idx, offset=0)
        weight = self.window_log_weight.float().exp()[:, None]
        total = weight * near_weight + (old_q.float() * sums).sum(-1, keepdim=True)
        out = ((weight * near + far.float()) / total.clamp(min=1e-6)).to(hidden_states.dtype)
        return self.o_proj(out.flatten(2)), None, past_key_values


_gdn, _plain = GatedDeltaNetStudent, GatedDeltaNetPlainStudent
STUDENT_ATTENTION_MAP = {
    "gdn_v1": partial(_gdn, use_gate=False, use_short_conv=True),
    "gdn_v2": partial(_gdn, use_gate=False, use_short_conv=False),
    "gdn_v3": partial(_gdn, use_gate=True, use_short_conv=True),
    "gdn_v4": partial(_gdn, use_gate=True, use_short_conv=False),
    "gdn_v5": partial(_gdn, use_gate=True, use_short_conv=False, factored=True),
    "gdn_v6": partial(_plain, use_gate=False, use_short_conv=False, use_norm=False, qk_activation=False, keep_attention=False),
    "gdn_v7": partial(_plain, use_gate=True, use_short_conv=True, use_norm=True, qk_activation=True, keep_attention=True,
                      decay=0.1),
    "gdn_v8": partial(_gdn, use_gate=True, use_short_conv=True, gate_activation="silu"),
    "kda_v1": partial(KimiDeltaStudent),
    "deltanet_v1": partial(DeltaNetStudent),
    "gla_v1": partial(GatedLinearStudent),
    "gsa_v1": partial(GatedSlotStudent),
    "hgrn2_v1": partial(HGRN2Student),
    "mamba2_v1": partial(Mamba2Student),
    "rwkv7_v1": partial(RWKV7Student),
    "path_v1": partial(PaTHStudent, use_forget_gate=False),
    "path_fox_v1": partial(PaTHStudent, use_forget_gate=True),
    "fox_v1": partial(ForgettingStudent),
    "swa_v1": partial(SlidingWindowStudent),
    "lolcats_v1": partial(LoLCATsStudent),
}


def get_student_attention_class(name: str):
    """The constructor `(config, layer_idx, **options)` behind a student's name. Raises ValueError for unknown names."""
    if name not in STUDENT_ATTENTION_MAP:
        raise ValueError(f"student_model.name: {name!r} is unknown; choose one of {', '.join(STUDENT_ATTENTION_MAP)}")
    return STUDENT_ATTENTION_MAP[name]


def default_of(layer: type, option: str):
    """The value of an option that is not set: that of the nearest constructor which names it."""
    parameters = (inspect.signature(base.__init__).parameters for base in layer.__mro__)
    return next(p[option].default for p in parameters if option in p)


def same_options(name: str, one: dict, other: dict) -> bool:
    """Whether two sets of a student's options make the same layer: one may leave out what the other sets to its default."""
    layer = get_student_attention_class(name).func
    defaults = {key: default_of(layer, key) for key in layer.OPTIONS}
    return defaults | one == defaults | other


def check_student(name: str, options: dict, config: StudentConfig) -> None:
    """Raises ValueError, of one line that names key, value and cure, if there is no such student, it does not take these
    options, or its kernels do not take a teacher of this `config`."""
    student = get_student_attention_class(name)
    layer = student.func
    takes = {key: option for key, option in layer.OPTIONS.items() if student.keywords.get(option.needs, True)}
    known = f"{name} takes {'; '.join(f'{key}: {option}' for key, option in takes.items()) or 'none'}"
    for key, value in options.items():
        path, option = f"student_model.options.{key}", takes.get(key)
        if option is None:
            raise ValueError(f"{path}: unknown; {known}")
        if type(value) is not option.kind or option.kind is int and not option.minimum <= value <= option.maximum:
            raise ValueError(f"{path}: {value!r} must be {option}; {known}")
        if option.needs in takes and not options.get(option.needs, default_of(layer, option.needs)):
            raise ValueError(f"{path}: {value!r} does nothing without {option.needs}: true; set that, or leave {key} out")
    if layer.HEAD_DIMS is not None and config.head_dim not in layer.HEAD_DIMS:
        sizes = layer.HEAD_DIMS
        sizes = f"{sizes[0]} to {sizes[-1]}" if isinstance(sizes, range) else ", ".join(map(str, sizes))
        raise ValueError(f"student_model.name: {name} takes heads of size {sizes}, the teacher's have {config.head_dim}; "
                         "choose another student")  # fmt: skip


def can_calibrate(name: str) -> bool:
    """Whether `train.calibrate_init` can fit a student: not where its norm's kernel reads o_proj's weight, so that nobody
    sees what o_proj gets. Raises ValueError for unknown names."""
    return "o_proj" not in get_student_attention_class(name).func.OPENED


def check_calibration(name: str) -> None:
    """Raises ValueError, of one line, if a student's start cannot be calibrated: see `can_calibrate`."""
    if not can_calibrate(name):
        raise ValueError(f"train.calibrate_init: {name} fuses o_proj with its norm; set it to 0")


def is_student_attention(module: nn.Module) -> bool:
    """Whether a module is one of the linear attentions of this file."""
    return isinstance(module, StudentAttention)

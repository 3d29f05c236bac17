"""What all student attentions share: where their tensors come from, how the others start, and
what they support.

What no teacher has starts neutral: gates are open, short convolutions are the identity, decays
are slow.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps

import torch
import torch.nn.functional as F
from fla.models.utils import FLALayer
from fla.modules import ShortConvolution
from torch import nn
from transformers import initialization as init

from .attention import SoftmaxAttention, left_padding, right_aligned
from .config_distilled_student import StudentConfig
from .fused_ops import use_triton

# FLA advises short convolutions for pretraining from scratch; a student that starts from a teacher
# does without.
warnings.filterwarnings("ignore", message="ShortConvolution is crucial")
warnings.filterwarnings("ignore", message="According to Bo")  # of RWKV-7, once per layer
# Of missing CUDA packages, once per layer.
logging.getLogger("fla.layers.mamba2").setLevel(logging.ERROR)


@dataclass
class InitReport:
    """Where each tensor of a student attention came from, and which of the teacher's were dropped
    (by name). Tensors that were fitted to batches afterwards are in `calibrated` alone."""

    copied: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    calibrated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def expand_kv_heads(weight: torch.Tensor, num_kv_heads: int, num_heads: int) -> torch.Tensor:
    """Repeats each key/value head for the query heads that read it: '(h d) ... -> (h g d) ...', h
    the kv heads.

    weight: [num_kv_heads * head_dim, ...], a projection's weight or bias. Returns [num_heads *
    head_dim, ...].
    """
    heads = weight.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias)


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def sizes(config: StudentConfig, layer_idx: int) -> dict:
    """The constructor arguments that all FLA layers name alike."""
    return dict(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        layer_idx=layer_idx,
        norm_eps=config.rms_norm_eps,
    )


def expanded_sizes(config: StudentConfig, layer_idx: int) -> dict:
    """`sizes`, for layers that compute the size of their heads from hidden_size."""
    expand = config.num_attention_heads * config.head_dim / config.hidden_size
    return sizes(config, layer_idx) | dict(expand_k=expand, expand_v=expand)


class UnquantizedLinear(nn.Linear):
    """A projection that keeps its dtype: bitsandbytes replaces nn.Linear, but no subclass of it.

    On a GPU its output features are padded to a multiple of 8 where they are no multiple of 4: the
    gates of 9 heads, say, would be read element by element by cuBLAS.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not use_triton(x) or self.out_features % 4 == 0:
            return super().forward(x)
        missing = -self.out_features % 8
        weight = F.pad(self.weight, (0, 0, 0, missing))
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(x, weight, bias)[..., : self.out_features]


class HeadNorm(nn.RMSNorm):
    """The teacher's per-head RMSNorm, on [..., heads x head_dim] or [..., heads, head_dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).view(x.shape)


@dataclass(frozen=True)
class Option:
    """The values that a hyper-parameter takes: its type, sanity bounds of a number, and the boolean
    option without which it has no effect."""

    kind: type = int
    minimum: int = 1
    maximum: int = 2**20
    needs: str | None = None

    def __str__(self) -> str:
        return "true or false" if self.kind is bool else f"an integer from {self.minimum} to {self.maximum}"

    def takes(self, value) -> bool:
        if type(value) is not self.kind:
            return False
        return self.kind is not int or self.minimum <= value <= self.maximum


@dataclass(frozen=True)
class State:
    """A tensor that a layer keeps of each sequence: its shape, and its dtype, None for the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


BIASES = {name: name for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")}
NORMS = {name: name for name in ("q_norm.weight", "k_norm.weight")}
SWITCH = Option(bool)
# FLA's kernels round sizes up to powers of 2, and a GPU's matrix units need blocks of at least 16.
LEAST_BLOCK = 9
CONVOLUTION = {
    "conv_size": Option(needs="use_short_conv"),
    "conv_bias": Option(bool, needs="use_short_conv"),
}


class StudentAttention:
    """Mixin of all student attentions: initialisation from a teacher, and what the layer supports.

    OPTIONS: the hyper-parameters that a config may set, and the values they take.
    HEAD_DIMS: the sizes of a teacher's heads that its kernels support; None for all.
    SOURCES: our parameter -> the teacher's that it starts from, where both exist. A parameter with
        as many rows as there are query heads takes a key/value projection repeated by head block.
    rope_share: the share of the teacher's rotary frequencies, fastest first, that it applies.
    fits_decay: whether its heads decay by exp(-exp(A_log) softplus(... + dt_bias)) per token, and
        by nothing else.
    fits_gate: whether its output gate starts closed, and `open_gate` opens it.
    supports_crop: whether its cache holds tokens one by one, so that the last ones can be removed.
    has_constant_state: whether its state keeps its shape from the first token on.
    supports_chunked_prefill: whether it reads several tokens at once with a filled cache.
    heads_are_independent: whether neither a norm nor a parameter spans heads, so that heads can be
        distributed to devices.
    supports_empty_rows: whether a batch may have a row that is all padding.
    weights_read_by_kernel: the projections whose weight is passed to a kernel of FLA directly.
    reads_documents_on_host: whether FLA's functions, or ours, read on the host how many chunks there
        are in packed documents, or how long these are: a CUDA graph cannot.
    has_only_teachers_weights: whether each of its parameters is a copy of the teacher's, of every
        teacher, so that stage 2 can start from the teacher.
    """

    OPTIONS: dict[str, Option] = {}
    HEAD_DIMS: range | tuple[int, ...] | None = range(LEAST_BLOCK, 257)
    SOURCES = {f"{name}.weight": f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    supports_crop = False
    has_constant_state = True
    supports_chunked_prefill = True
    heads_are_independent = True
    supports_empty_rows = False
    weights_read_by_kernel: tuple[str, ...] = ()
    reads_documents_on_host = False
    has_only_teachers_weights = False
    rope_share = 0.0
    fits_decay = False
    fits_gate = False

    def recurrent_state(self) -> State | tuple[State, ...]:
        """What sums up a whole text, in fp32. Only with `has_constant_state`."""
        raise NotImplementedError(f"{type(self).__name__} keeps keys and values")

    def conv_state(self) -> State | tuple[State, ...] | None:
        """The last inputs of the short convolutions; None where there are none."""
        convolutions = [module for module in self.children() if isinstance(module, ShortConvolution)]
        return tuple(State((c.hidden_size, *c.kernel_size)) for c in convolutions) or None

    def states(self) -> dict[str, State | tuple[State, ...] | None]:
        """What a cache holds of each sequence, under the names and in the nesting of FLA's caches.
        Only with `has_constant_state`."""
        return {"recurrent_state": self.recurrent_state(), "conv_state": self.conv_state()}

    def share_of_heads(self, name: str, whole: torch.Tensor, rank: int, devices: int) -> torch.Tensor:
        """What this layer, which has one of `devices` equal shares of the heads, holds of a whole
        layer's parameter `name`. Only with `heads_are_independent`."""
        for dim, (size, own_size) in enumerate(zip(whole.shape, self.get_parameter(name).shape)):
            if size != own_size:
                whole = whole.chunk(devices, dim)[rank]
        return whole

    def exempt_from_quantization(self) -> None:
        """Keeps the dtype of projections that quantisation would harm: those to or from few
        features, which make gates and decays, and those in weights_read_by_kernel."""
        for name, module in self.named_modules():
            if type(module) is not nn.Linear:
                continue
            if name in self.weights_read_by_kernel or min(module.weight.shape) < 128:
                module.__class__ = UnquantizedLinear

    @torch.no_grad()
    def init_fresh(self) -> None:
        """Initialises the parameters that no teacher has. Skips those that transformers has just
        loaded."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                identity = torch.zeros_like(module.weight)
                identity[..., -1] = 1
                init.copy_(module.weight, identity)
                if module.bias is not None:
                    init.zeros_(module.bias)

    def init_decay(self, factor: float = 1.0) -> None:
        """Decay as in Mamba-2 (arXiv 2405.21060): rates A in factor x [1, 16] x time steps
        log-uniform in [1e-3, 0.1], through the inverse of softplus."""
        rates = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16)
        init.copy_(self.A_log, rates.mul_(factor).log())
        log_steps = torch.empty_like(self.dt_bias, dtype=torch.float32)
        steps = log_steps.uniform_(math.log(1e-3), math.log(0.1)).exp()
        init.copy_(self.dt_bias, inverse_softplus(steps))

    @torch.no_grad()
    def set_decay(self, rates: torch.Tensor) -> None:
        """Makes head h decay by rates[h] nats per token where its input is neutral. rates [heads].
        Only with `fits_decay`."""
        bias = inverse_softplus(rates / self.A_log.float().exp())
        self.dt_bias.copy_(bias.repeat_interleave(self.dt_bias.numel() // bias.numel()))

    @torch.no_grad()
    def init_from_teacher(self, teacher_attn: SoftmaxAttention) -> InitReport:
        """Copies what the teacher has, initialises the rest neutrally, and accounts for every
        tensor.

        Raises ValueError if a teacher's tensor does not fit.
        """
        self.init_fresh()
        report = InitReport()
        theirs = dict(teacher_attn.named_parameters())
        ours = dict(self.named_parameters())
        used = set()
        for name, source in self.SOURCES.items():
            if name not in ours or source not in theirs:
                continue
            tensor = theirs[source]
            kind = report.copied
            if tensor.shape != ours[name].shape:
                tensor = expand_kv_heads(tensor, teacher_attn.num_kv_heads, teacher_attn.num_heads)
                kind = report.transformed
            if tensor.shape != ours[name].shape:
                raise ValueError(
                    f"layer {self.layer_idx}: the student's {name} is {tuple(ours[name].shape)}, "
                    f"the teacher's {source} {tuple(theirs[source].shape)}"
                )
            ours[name].copy_(tensor)
            kind.append(name)
            used.add(source)
        taken = {*report.copied, *report.transformed}
        report.fresh = [name for name in ours if name not in taken]
        report.dropped = [name for name in theirs if name not in used]
        if self.rope_share < 1:
            report.dropped.append("the slow rope frequencies" if self.rope_share else "rope")
        return report


def any_padding(forward):
    """Extends the forward of a layer that supports left padding only to padding anywhere: each
    row's tokens are right-aligned, and their outputs moved back to the tokens' positions."""

    @wraps(forward)
    def aligned(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        cache = (past_key_values, use_cache)
        length = hidden_states.shape[1]
        if attention_mask is None or length == 1:
            return forward(self, hidden_states, attention_mask, *cache, position_embeddings, **kwargs)
        real = attention_mask[:, -length:].bool()
        (hidden_states,) = right_aligned(real, hidden_states)
        if position_embeddings is not None:
            angles = [x.expand(len(real), -1, -1) for x in position_embeddings]
            position_embeddings = right_aligned(real, *angles)
        past_mask = attention_mask[:, :-length].bool()
        attention_mask = torch.cat((past_mask, left_padding(real.sum(1), length)), 1)
        out, *rest = forward(self, hidden_states, attention_mask, *cache, position_embeddings)
        original_order = real.long().argsort(dim=1, stable=True).argsort(1)
        return out.take_along_dim(original_order[..., None], 1), *rest

    return aligned


def copy_rows(layer: FLALayer, rows: torch.Tensor) -> list[torch.Tensor]:
    """Copies of what a cache layer holds of the sequences `rows`, a mask [B]; empty before the
    first token."""
    copies = []
    if layer.state is not None:
        layer._map_state(lambda x: copies.append(x[rows.to(x.device)]))
    return copies


def restore_rows(layer: FLALayer, rows: torch.Tensor, copies: Sequence[torch.Tensor]) -> None:
    """Restores what a cache layer held of the sequences `rows`, a mask [B], from `copies` of
    `copy_rows`; zeros it if there are none. Keys and values that were added since then stay: the
    attention mask hides them."""
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

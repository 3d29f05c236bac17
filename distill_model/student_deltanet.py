"""Student attentions with a delta rule: Gated DeltaNet and its variants, Kimi Delta Attention,
DeltaNet, RWKV-7."""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from fla.backends import register
from fla.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention, RWKV7Attention, gated_deltanet
from fla.layers.utils import (
    get_layer_cache,
    repad_hidden_states,
    unpad_hidden_states,
    update_layer_cache,
)
from fla.modules.norm.l2norm import l2norm
from fla.ops.common.gate import fused_beta_sigmoid
from fla.ops.gated_delta_rule.backends import FlashQLABackend
from fla.ops.gated_delta_rule.gate import fused_gdn_gate
from fla.ops.rwkv7 import fused_addcmul
from fla.utils import IS_NVIDIA_HOPPER, has_usable_nvcc
from torch import nn
from transformers import initialization as init

from .config_distilled_student import StudentConfig
from .fused_ops import rotate
from .student_base import (
    BIASES,
    CONVOLUTION,
    SWITCH,
    Option,
    State,
    StudentAttention,
    expand_kv_heads,
    expanded_sizes,
    linear,
    sizes,
)

# The initial logit of a SiLU gate: near 0 SiLU is nearly linear and learns faster than at 1, or at
# its minimum, where it is flattest.
OPEN_SILU = 0.3


@register("gated_delta_rule")
class FlashQLAWithGates(FlashQLABackend):
    """FLA's backend of `chunk_gated_delta_rule` on FlashQLA's kernels, extended to the calls of
    Gated DeltaNet's layers: FLA's own rejects them, for they leave the gates to the kernel. They
    are computed before it here.

    FLA calls it on a GPU of the Hopper generation where flash-qla is installed, for heads of 128
    channels in bf16 or fp16; `FLA_FLASH_QLA=0` switches it off. Packed sequences stay with Triton's
    kernels: FlashQLA would copy the lengths of every batch to the host.
    """

    @classmethod
    def is_available(cls) -> bool:
        return IS_NVIDIA_HOPPER and super().is_available() and has_usable_nvcc()

    def chunk_gated_delta_rule_verifier(self, q, k, v, g, beta, cu_seqlens=None, **options) -> tuple[bool, str | None]:
        if cu_seqlens is not None:
            return False, "cu_seqlens would be copied to the host"
        for name in ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"):
            options.pop(name, None)
        return super().chunk_gated_delta_rule_verifier(q, k, v, g, beta, **options)

    def chunk_gated_delta_rule(
        self,
        q,
        k,
        v,
        g,
        beta,
        A_log=None,
        dt_bias=None,
        use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        use_qk_l2norm_in_kernel=False,
        allow_neg_eigval=False,
        **options,
    ):
        """As FLA's function; a gate is g = -exp(A_log) softplus(g + dt_bias), in fp32."""
        if use_qk_l2norm_in_kernel:  # FlashQLA's own is compiled by Inductor
            q, k = l2norm(q), l2norm(k)
        if use_gate_in_kernel:
            g = fused_gdn_gate(g, A_log, dt_bias)
        if use_beta_sigmoid_in_kernel:
            beta = fused_beta_sigmoid(beta, 2.0 if allow_neg_eigval else 1.0)
        return super().chunk_gated_delta_rule(q, k, v, g, beta, **options)


class GatedDeltaNetStudent(StudentAttention, GatedDeltaNet):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464) with one key/value head per query head of the
    teacher.

    factored: K and V are low-rank projections, of as many features as the teacher has for them; the
        second projection starts as the repetition by head block.
    decay: factor on the decay at the start.
    gate_activation: sigmoid, a gate that starts open; or silu, one that starts closed because it
        has no bias, and that `open_gate` opens.
    """

    OPTIONS = CONVOLUTION | {"allow_neg_eigval": SWITCH}
    fits_decay = True
    SOURCES = StudentAttention.SOURCES | {
        "k_proj.0.weight": "k_proj.weight",
        "v_proj.0.weight": "v_proj.weight",
    }

    def __init__(
        self,
        config: StudentConfig,
        layer_idx: int,
        *,
        use_gate: bool,
        use_short_conv: bool,
        factored: bool = False,
        decay: float = 1.0,
        gate_activation: str = "sigmoid",
        **options,
    ):
        super().__init__(
            **sizes(config, layer_idx),
            head_dim=config.head_dim,
            expand_v=1,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            output_gate_activation=gate_activation,
            **options,
        )
        self.fits_gate = gate_activation == "silu"
        self.num_kv_heads = config.num_key_value_heads
        self.factored = factored
        self.decay = decay
        if factored:
            kv_dim = config.num_key_value_heads * config.head_dim
            hidden = config.hidden_size
            self.k_proj = nn.Sequential(linear(hidden, kv_dim), linear(kv_dim, self.key_dim))
            self.v_proj = nn.Sequential(linear(hidden, kv_dim), linear(kv_dim, self.key_dim))

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_v_dim, self.head_k_dim), torch.float32)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        self.init_decay(self.decay)
        if self.use_gate:  # the norm's weight is the inverse of the gate's initial value
            inverse_of_gate = (1 + math.exp(-OPEN_SILU)) / OPEN_SILU if self.fits_gate else 2.0
            init.constant_(self.o_norm.weight, inverse_of_gate)
            init.zeros_(self.g_proj.weight)
        if self.factored:
            for projection in (self.k_proj, self.v_proj):
                second = projection[1]
                identity = torch.eye(second.in_features, device=second.weight.device)
                repetition = expand_kv_heads(identity, self.num_kv_heads, self.num_heads)
                init.copy_(second.weight, repetition)

    @torch.no_grad()
    def open_gate(self, ones: torch.Tensor) -> None:
        """Opens the gate. ones [hidden_size]: a vector whose dot product with the layer's inputs is
        about 1. Only with `fits_gate`."""
        self.g_proj.weight.copy_(OPEN_SILU * ones.expand_as(self.g_proj.weight))


class GatedDeltaNetPlainStudent(GatedDeltaNetStudent):
    """Gated DeltaNet without SiLU on v.

    qk_activation: SiLU on q and k.
    use_norm: RMSNorm on the output of each head.
    keep_attention: keeps the teacher's biases, and its rotary embedding (after SiLU) in the fastest
        quarter of the frequencies. Those tell neighbouring tokens apart; the slow ones carry the
        content that is looked up at any distance, and rotating them costs recall. So did the
        teacher's q/k norms before SiLU.
    """

    SOURCES = GatedDeltaNetStudent.SOURCES | BIASES

    def __init__(
        self,
        config: StudentConfig,
        layer_idx: int,
        *,
        use_gate: bool,
        use_short_conv: bool,
        use_norm: bool,
        qk_activation: bool,
        keep_attention: bool,
        **options,
    ):
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
        """cos and sin [..., head_dim] that rotate the share `rope_share` of the frequencies and
        leave the others unrotated."""
        half = self.head_dim // 2  # frequencies, the fastest first, in both halves of a head
        slow = torch.arange(self.head_dim, device=cos.device) % half >= self.rope_share * half
        return cos.masked_fill(slow, 1), sin.masked_fill(slow, 0)

    def convolve(
        self, qkv: list[torch.Tensor], last_state: dict | None, use_cache: bool, cu_seqlens: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], tuple | None]:
        """q, k and v [B, T, channels] after their short convolutions, if there are any, and the new
        states of these."""
        if not self.use_short_conv:
            return qkv, None
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        old_states = (None, None, None) if last_state is None else last_state["conv_state"]
        outputs, new_states = [], []
        for convolution, x, old_state in zip(convolutions, qkv, old_states):
            y, new_state = convolution(x=x, cache=old_state, output_final_state=use_cache, cu_seqlens=cu_seqlens)
            outputs.append(y)
            new_states.append(new_state)
        return outputs, tuple(new_states)

    def rotate_fast(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings, indices: torch.Tensor | None, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [B, T, heads, head_dim] after RoPE in the share `rope_share` of the frequencies.
        indices: those of the real tokens where the batch was packed to [1, tokens, ...]."""
        if not self.rope_share:
            return q, k
        cos, sin = (x.expand(batch_size, -1, -1) for x in position_embeddings)
        if indices is not None:
            cos, sin = (x.flatten(0, 1)[indices][None] for x in (cos, sin))
        cos, sin = self.fast_angles(cos, sin)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        cu_seqlens=None,
        **kwargs,
    ):
        """FLA's forward with other activations, and with what `keep_attention` keeps."""
        batch_size, q_len, _ = hidden_states.shape
        last_state = get_layer_cache(self, past_key_values)
        x, indices, cu_seqlens = unpad_hidden_states(hidden_states, cu_seqlens, attention_mask, q_len)
        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        qkv, conv_state = self.convolve(qkv, last_state, use_cache, cu_seqlens)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        q, k = self.qk_activation(q), self.qk_activation(k)
        q, k = self.rotate_fast(q, k, position_embeddings, indices, batch_size)
        use_recurrent_rule = q_len <= 64 and not self.training and not torch.is_grad_enabled()
        # Looked up in FLA's module, where `cpu_ops` binds its replacements.
        rule = "fused_recurrent_gated_delta_rule" if use_recurrent_rule else "chunk_gated_delta_rule"
        o, recurrent_state = getattr(gated_deltanet, rule)(
            q=q,
            k=k,
            v=v,
            g=self.a_proj(x),
            beta=self.b_proj(x),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=None if last_state is None else last_state["recurrent_state"],
            output_final_state=use_cache,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            state_v_first=True,
            cu_seqlens=cu_seqlens,
        )
        update_layer_cache(self, past_key_values, recurrent_state=recurrent_state, conv_state=conv_state, offset=q_len)
        if self.use_gate:
            gate = self.g_proj(x).unflatten(-1, (-1, self.head_dim))
            o = self.o_norm(o, gate)
        else:
            o = self.o_norm(o)
        o = self.o_proj(o.flatten(-2))
        return repad_hidden_states(o, indices, batch_size, q_len), None, past_key_values


class KimiDeltaStudent(StudentAttention, KimiDeltaAttention):
    """Kimi Delta Attention (arXiv 2510.26692): a gated delta rule with a decay per channel."""

    OPTIONS = CONVOLUTION | {"allow_neg_eigval": SWITCH, "use_short_conv": SWITCH}
    fits_decay = True

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        super().__init__(**sizes(config, layer_idx), head_dim=config.head_dim, expand_v=1, **options)

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_v_dim, self.head_k_dim), torch.float32)

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

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_k_dim, self.head_v_dim), torch.float32)

    def forward(self, hidden_states, *args, **kwargs):
        # FLA's chunked kernel refuses fp32; the recurrent one supports it, but is slow on long text.
        self.mode = "fused_recurrent" if hidden_states.dtype == torch.float32 else "chunk"
        return super().forward(hidden_states, *args, **kwargs)


class ClosedGate(nn.Module):
    """The logits of a closed gate: -inf, [..., width]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.width), -torch.inf)


@cache
def keep_inputs_of_rwkv7() -> None:
    """Makes the backward pass of FLA's `fused_addcmul_rwkv7`, whose input is the layer's, write the
    gradient to memory of its own: FLA's writes it over the input, which autograd does not notice."""
    fused_addcmul.addcmul_bwd1 = partial(fused_addcmul.addcmul_bwd1, inplace=False)


class RWKV7Student(StudentAttention, RWKV7Attention):
    """The time mixing of RWKV-7 (Peng et al., arXiv 2503.14456): a delta rule with a decay per
    channel.

    Without the value residual of its first layer: no teacher has one, and in a hybrid the first
    layer may be softmax attention.
    """

    OPTIONS = {f"{name}_low_rank_dim": Option() for name in ("decay", "gate", "a")}
    SOURCES = {"r_proj.weight": "q_proj.weight"} | {
        f"{n}.weight": f"{n}.weight" for n in ("k_proj", "v_proj", "o_proj")
    }

    def __init__(self, config: StudentConfig, layer_idx: int, **options):
        keep_inputs_of_rwkv7()
        hidden = config.hidden_size
        wide = config.num_attention_heads * config.head_dim
        super().__init__(
            hidden_size=wide,
            head_dim=config.head_dim,
            layer_idx=layer_idx,
            norm_eps=config.rms_norm_eps,
            num_hidden_layers=max(2, config.num_hidden_layers),
            **options,
        )
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.zeros(1, 1, hidden)))
        self.r_proj = linear(hidden, wide)
        self.k_proj = linear(hidden, wide)
        self.v_proj = linear(hidden, wide)
        self.o_proj = linear(wide, hidden)
        for lora in (self.w_lora, self.a_lora, self.g_lora):
            lora.lora[0] = linear(hidden, lora.low_rank_dim)
        self.v_lora = ClosedGate(wide)

    def recurrent_state(self) -> State:
        return State((self.num_heads, self.head_dim, self.head_v_dim), torch.float32)

    def conv_state(self) -> State:
        """The last token, for the token shift."""
        return State((self.k_proj.in_features,))

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        token_shifts = [getattr(self, f"x_{name}") for name in "rwkvag"]
        for zero in (
            *token_shifts,
            self.r_k,
            self.k_a,
            self.g_norm.bias,
            self.w_lora.lora[2].weight,
            self.a_lora.lora[2].weight,
            self.a_lora.lora[2].bias,
            self.g_lora.lora[0].weight,
        ):
            init.zeros_(zero)
        init.ones_(self.k_k)
        init.ones_(self.g_norm.weight)
        init.constant_(self.w_lora.lora[2].bias, -4.0)  # a decay of exp(-0.011)
        # The sum over low_rank_dim features of sigmoid(0) becomes 1.
        init.constant_(self.g_lora.lora[2].weight, 2 / self.g_lora.low_rank_dim)

    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, cu_seqlens=None, **kwargs
    ):
        """FLA's forward over the real tokens as a packed batch: given a mask, FLA's token shift and
        decay would include padding."""
        batch, length, _ = hidden_states.shape
        if length == 1:
            attention_mask = None  # every row has a real token, see supports_empty_rows
        x, indices, cu_seqlens = unpad_hidden_states(hidden_states, cu_seqlens, attention_mask, length)
        options = dict(v_first=x.new_zeros(*x.shape[:2], self.value_dim), cu_seqlens=cu_seqlens)
        out = super().forward(x, None, past_key_values, use_cache, **options)[0]
        if past_key_values is not None and x.shape[1] != length:
            # FLA has counted the tokens of all rows; the cache counts columns, padding included.
            past_key_values.layers[self.layer_idx]._seen_tokens += length - x.shape[1]
        return repad_hidden_states(out, indices, batch, length), None, past_key_values

"""Student attentions with a softmax: PaTH, Forgetting Transformer, sliding window, LoLCATs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fla.layers import ForgettingAttention, PaTHAttention
from fla.layers import gla as gated_linear
from fla.layers.utils import get_layer_cache, repad_hidden_states, unpad_hidden_states
from torch import nn
from transformers import initialization as init

from .attention import SoftmaxAttention, right_aligned
from .config_distilled_student import StudentConfig
from .documents import Documents, packed_attention, supports_varlen
from .student_base import (
    BIASES,
    NORMS,
    SWITCH,
    HeadNorm,
    Option,
    StudentAttention,
    any_padding,
    copy_rows,
    linear,
    restore_rows,
)


class _MaskedCacheStudent(StudentAttention):
    """A softmax-like layer of FLA that supports a cache only with a mask, a mask only in
    evaluation, and with a filled cache only one token at a time, so that chunked prefill
    is slow."""

    has_constant_state = False
    supports_chunked_prefill = False

    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, cu_seqlens=None, **kwargs
    ):
        batch, length, _ = hidden_states.shape
        if past_key_values is None:
            x, indices, cu_seqlens = unpad_hidden_states(hidden_states, cu_seqlens, attention_mask, length)
            out = super().forward(x, cu_seqlens=cu_seqlens)[0]
            return repad_hidden_states(out, indices, batch, length), None, None
        past = past_key_values.get_seq_length(self.layer_idx)
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(batch, past + length, dtype=torch.long)
        if past and length > 1:
            return self.one_by_one(hidden_states, attention_mask, past_key_values), None, past_key_values
        # FLA compiles a helper of the decoding step, which takes longer than running it on a CPU.
        stance = "force_eager" if hidden_states.device.type == "cpu" else "default"
        with torch.compiler.set_stance(stance):
            return super().forward(hidden_states, attention_mask, past_key_values, use_cache=True)

    def one_by_one(self, hidden_states, attention_mask, past_key_values) -> torch.Tensor:
        """The outputs [B, T, hidden_size] of T tokens that follow those of the cache.

        A step reads a token of every row. Where that is padding, the row's cache is restored: the
        step has changed the state of the convolution and PaTH's keys.
        """
        outputs = []
        layer = past_key_values.layers[self.layer_idx]
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
    """PaTH attention (Yang et al., arXiv 2505.16381): softmax attention whose position encoding
    is a product of Householder-like matrices. These start near the identity, and the forget gate,
    if there is one, starts open."""

    reads_documents_on_host = True
    OPTIONS = {
        "conv_size": Option(needs="use_w_shortconv"),
        "conv_bias": Option(bool, needs="use_w_shortconv"),
        "use_low_rank_w": SWITCH,
        "use_w_shortconv": SWITCH,
    }
    HEAD_DIMS = (16, 32, 64, 128)

    def __init__(self, config: StudentConfig, layer_idx: int, *, use_forget_gate: bool, **options):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            use_forget_gate=use_forget_gate,
            layer_idx=layer_idx,
            **options,
        )
        hidden = config.hidden_size
        wide = config.num_attention_heads * config.head_dim
        self.q_proj = linear(hidden, wide)
        self.o_proj = linear(wide, hidden)
        self.k_proj = linear(hidden, self.kv_dim)
        self.v_proj = linear(hidden, self.kv_dim)
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
    """Forgetting Transformer (Lin et al., arXiv 2503.02130): softmax attention with a forget gate
    in place of RoPE.

    It keeps the teacher's biases and q/k norms; the gate starts open.
    """

    supports_crop = True
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(
            hidden_size=config.num_attention_heads * config.head_dim,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            layer_idx=layer_idx,
        )
        hidden = config.hidden_size
        wide = config.num_attention_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = linear(hidden, wide, bias)
        self.o_proj = linear(wide, hidden, config.attention_output_bias)
        self.k_proj = linear(hidden, self.kv_dim, bias)
        self.v_proj = linear(hidden, self.kv_dim, bias)
        self.f_proj = linear(hidden, self.num_heads, bias=True)
        if config.qk_norm:
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.qk_norm = True
            self.q_norm = HeadNorm(config.head_dim, eps=eps)
            self.k_norm = HeadNorm(config.head_dim, eps=eps)

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        init.zeros_(self.f_proj.weight)
        init.constant_(self.f_proj.bias, 6.0)


class SlidingWindowStudent(StudentAttention, SoftmaxAttention):
    """The teacher's own attention, over the last `window_size` tokens, the query's among them
    (Beltagy et al., arXiv 2004.05150), and the first `sink_size` ones (Xiao et al., arXiv
    2309.17453, but at their own positions)."""

    has_constant_state = False
    supports_empty_rows = True
    OPTIONS = {"window_size": Option(), "sink_size": Option(minimum=0)}
    HEAD_DIMS = None
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS
    rope_share = 1.0

    def __init__(self, config: StudentConfig, layer_idx: int, *, window_size: int = 512, sink_size: int = 0):
        super().__init__(config, layer_idx, window_size=window_size, sink_size=sink_size)

    forward = any_padding(SoftmaxAttention.forward)

    def softmax_attention(self, q, k, v, attention_mask, past_key_values) -> torch.Tensor:
        """As `SoftmaxAttention`. The first tokens are read without a mask where a kernel can do so; padding
        is on the left. With sinks, each key has its index among the real tokens of its row, from which
        the mask of others follows; a cache holds the sinks and the last window_size keys."""
        q_len = q.shape[1]
        past_len = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if not past_len and supports_varlen(q.device, q.dtype, self.head_dim):
            return self.first_tokens(q, k, v, attention_mask, past_key_values)
        if not self.sink_size:
            return super().softmax_attention(q, k, v, attention_mask, past_key_values)
        if attention_mask is None:
            attention_mask = k.new_ones(1, past_len + q_len, dtype=torch.bool)
        past, new = attention_mask.bool().split([past_len, q_len], 1)
        before = past.sum(1, keepdim=True)  # real tokens of each row
        query = before + new.cumsum(1) - 1
        key, real = query, new
        if past_len:
            held_k, held_v = past_key_values[self.layer_idx]["attn_state"]
            held = self.held_indices(before, held_k.shape[1])
            key, real = torch.cat((held, key), 1), torch.cat((held >= 0, real), 1)
            k, v = torch.cat((held_k, k), 1), torch.cat((held_v, v), 1)
        distance = query[:, :, None] - key[:, None]
        in_reach = (distance < self.window_size) | (key < self.sink_size)[:, None]
        mask = (distance >= 0) & in_reach & real[:, None]
        mask[..., -q_len:] |= torch.eye(q_len, dtype=torch.bool, device=k.device)  # padding, which nobody reads
        if past_key_values is not None:
            self.hold(k, v, real, q_len, past_key_values)
        # With a mask, SDPA's memory-efficient kernel takes no grouped queries.
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)

    def first_tokens(self, q, k, v, attention_mask, past_key_values) -> torch.Tensor:
        """`softmax_attention` with an empty cache or none, each row as a document of a packed row."""
        rows = Documents.of_rows(q, attention_mask)
        packed = (x.flatten(0, 1)[None] for x in (q, k, v))
        out = packed_attention(*packed, rows, self.window_size, self.sink_size).view(q.shape)
        if self.sink_size and past_key_values is not None:
            real = q.new_ones(1, q.shape[1]) if attention_mask is None else attention_mask
            self.hold(k, v, real.bool(), q.shape[1], past_key_values)
        else:
            self.with_past(k, v, attention_mask, past_key_values)
        return out

    def held_indices(self, before: torch.Tensor, length: int) -> torch.Tensor:
        """Of each of the `length` held keys its index among the real tokens of its row, of which
        there have been `before` [B, 1]; negative for padding."""
        count = before.clamp(max=self.sink_size + self.window_size)
        order = torch.arange(length, device=before.device) - (length - count)
        return torch.where(order < self.sink_size, order, order + before - count)

    def hold(self, k, v, real, q_len: int, past_key_values) -> None:
        """Replaces what the cache holds by the sinks and the last keys of k and v [B, T, ...], whose
        real ones come last in each row."""
        size = self.sink_size + self.window_size
        held = past_key_values.update(
            attn_state=(k[:, -q_len:], v[:, -q_len:]),
            layer_idx=self.layer_idx,
            offset=q_len,
            cache_kwargs={"window_size": size},
        )
        length = k.shape[1]
        if length > size:
            k, v = right_aligned(real.expand(len(k), -1), k, v)
            first = length - real.sum(1, keepdim=True).clamp(min=size)
            sinks = first + torch.arange(self.sink_size, device=k.device)
            last = torch.arange(length - self.window_size, length, device=k.device)
            places = torch.cat((sinks, last.expand(len(sinks), -1)), 1)[..., None, None]
            k, v = (x.take_along_dim(places, 1) for x in (k, v))
        elif not real.all():
            k, v = right_aligned(real, k, v)
        held["attn_state"] = (k, v)


def window_sums(
    q, k, v, valid, window_size: int, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised softmax attention over a sliding window: the weighted sum of the values [B, T,
    H, D], and the sum of the weights [B, T, H, 1]. The largest weight of each query is 1.

    q [B, T, H, D], the last T of the S positions of k and v [B, S, H, D]; valid [B, S], False for
    padding; positions [1, S], of each token in its document, which no query looks out of.
    """
    offset = k.shape[1] - q.shape[1]
    values, weights = [], []
    for start in range(0, q.shape[1], window_size):  # in blocks, so that no T x T scores are held
        block = q[:, start : start + window_size]
        low = max(0, offset + start - window_size + 1)
        high = offset + start + block.shape[1]
        scores = torch.einsum("bthd,bshd->bths", block, k[:, low:high]).float()
        scores = scores * q.shape[-1] ** -0.5
        query_position = torch.arange(offset + start, high, device=q.device)
        key_position = torch.arange(low, high, device=q.device)
        distance = query_position[:, None] - key_position
        in_window = (distance >= 0) & (distance < window_size)
        if positions is not None:
            in_window &= distance <= positions[0, offset + start : high, None]
        seen = in_window[None, :, None] & valid[:, None, None, low:high]
        scores = scores.masked_fill(~seen, -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=-1e4)  # -inf for a padded query
        weight = (scores - largest).exp()
        values.append(torch.einsum("bths,bshd->bthd", weight, v[:, low:high].float()))
        weights.append(weight.sum(-1, keepdim=True))
    return torch.cat(values, 1), torch.cat(weights, 1)


class FeatureMap(nn.Module):
    """Hedgehog's feature map (Zhang et al., arXiv 2402.04347): softmax over x W and over -x W, with
    a W per head.

    [..., heads, head_dim] -> [..., heads, 2 feature_dim], non-negative.
    """

    def __init__(self, heads: int, head_dim: int, feature_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...hd,hdf->...hf", x, self.weight)
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


class LoLCATsStudent(StudentAttention, SoftmaxAttention):
    """LoLCATs (Zhang et al., arXiv 2410.10254): the teacher's softmax over a sliding window, and
    linear attention with learned feature maps over all older tokens, under one normaliser."""

    has_constant_state = False
    supports_empty_rows = True
    reads_documents_on_host = True
    OPTIONS = {
        "window_size": Option(),
        "feature_dim": Option(minimum=2),  # softmax over a single feature is 1
    }
    SOURCES = StudentAttention.SOURCES | BIASES | NORMS
    rope_share = 1.0

    def __init__(
        self,
        config: StudentConfig,
        layer_idx: int,
        *,
        window_size: int = 64,
        feature_dim: int | None = None,
    ):
        super().__init__(config, layer_idx, window_size=window_size)
        feature_dim = feature_dim or config.head_dim
        self.q_map = FeatureMap(self.num_heads, self.head_dim, feature_dim)
        self.k_map = FeatureMap(self.num_heads, self.head_dim, feature_dim)
        self.window_log_weight = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def init_fresh(self) -> None:
        super().init_fresh()
        for feature_map in (self.q_map, self.k_map):
            identity = torch.eye(*feature_map.weight.shape[1:], device=feature_map.weight.device)
            init.copy_(feature_map.weight, identity.expand_as(feature_map.weight))
        init.zeros_(self.window_log_weight)

    @any_padding
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        documents=None,
        **kwargs,
    ):
        length = hidden_states.shape[1]
        positions = None if documents is None else documents.positions
        window = self.window_size
        last_state = get_layer_cache(self, past_key_values)
        state, normalizer = (None, 0) if last_state is None else last_state["recurrent_state"]
        q, k, v = self.project(hidden_states, position_embeddings)
        k, v, attention_mask = self.with_past(k, v, attention_mask, past_key_values)
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for x in (k, v))
        valid = k.new_ones(k.shape[:2]) if attention_mask is None else attention_mask
        valid = valid.bool()
        near, near_weight = window_sums(q, k, v, valid, window, positions)
        # Tokens that have left a query's window join the linear part: the keys and values of
        # `window` positions before.
        features = self.k_map(k) * valid[..., None, None]
        queried = slice(k.shape[1] - length, k.shape[1])
        old_k, old_v = (F.pad(x, (0, 0, 0, 0, window, 0))[:, queried].to(q) for x in (features, v))
        if positions is not None:
            old_k = old_k * (positions >= window)[..., None, None]
        old_q = self.q_map(q).to(q)
        no_decay = torch.zeros_like(old_k)
        if length <= 64:
            rule, gates = gated_linear.fused_recurrent_gla, {"gk": no_decay}
        else:
            rule, gates = gated_linear.chunk_gla, {"g": no_decay}
        far, state = rule(
            q=old_q,
            k=old_k,
            v=old_v,
            scale=1.0,
            initial_state=state,
            output_final_state=use_cache,
            state_v_first=True,
            cu_seqlens=None if documents is None else documents.cu_seqlens,
            **gates,
        )
        parts = [old_k] if documents is None else old_k.split(documents.lengths, 1)
        sums = normalizer + torch.cat([part.float().cumsum(1) for part in parts], 1)
        if past_key_values is not None:
            recurrent_state = (state, sums[:, -1:])
            past_key_values.update(recurrent_state=recurrent_state, layer_idx=self.layer_idx, offset=0)
        weight = self.window_log_weight.float().exp()[:, None]
        total = weight * near_weight + (old_q.float() * sums).sum(-1, keepdim=True)
        out = ((weight * near + far.float()) / total.clamp(min=1e-6)).to(hidden_states.dtype)
        return self.o_proj(out.flatten(2)), None, past_key_values

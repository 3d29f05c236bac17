"""Full softmax attention: the teacher's, and that of the layers a hybrid keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .config_distilled_student import StudentConfig
from .documents import Documents, packed_attention
from .fused_ops import rotate


class KeepsDtypes(nn.Module):
    """A module whose buffers keep their dtypes when the module is cast.

    `model.to(torch.bfloat16)`, and with it DeepSpeed's bf16 engine, casts buffers too.
    """

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = getattr(self, name)
            if cast.dtype != buffer.dtype:
                setattr(self, name, buffer.to(cast.device))
        return self


class RotaryEmbedding(KeepsDtypes, LlamaRotaryEmbedding):
    """RoPE of every type that transformers supports, with frequencies that stay in fp32: those of 8
    significant bits move a token at position 10000 by up to 20 positions."""


def sdpa_mask(
    attention_mask: torch.Tensor | None,
    q_len: int,
    k_len: int,
    device: torch.device,
    window_size: int | None = None,
) -> torch.Tensor | CausalBias | None:
    """The boolean mask [B or 1, 1, q_len, k_len] of the last q_len of k_len positions; None where
    SDPA needs none; on a GPU a bias with which SDPA can still use flash attention.

    attention_mask: [B, k_len], 1 for real tokens, 0 for padding; None when nothing is padded.
    window_size: how many tokens a query attends to, itself included; None for all.
    """
    all_in_window = window_size is None or k_len <= window_size
    if attention_mask is None and all_in_window and q_len in (1, k_len):
        return None  # a single query attends to everything; a square mask is `is_causal`
    if attention_mask is None and window_size is None and device.type == "cuda":
        return causal_lower_right(q_len, k_len)
    query = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)
    mask = (query >= key)[None, None]
    if window_size is not None:
        mask = mask & (query - key < window_size)
    if attention_mask is not None:
        # A padded query would have no key, and softmax would return NaN; it attends to itself, and
        # nobody reads the result.
        mask = mask & attention_mask[:, None, None, :].bool() | (query == key)
    return mask


def right_aligned(real: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Moves the real entries of each row to its end, in order, and its padding to the front.

    real: [B, T], True for real entries. tensors: each [B, T, ...].
    """
    order = real.long().argsort(dim=1, stable=True)
    moved = []
    for x in tensors:
        trailing = [1] * (x.ndim - 2)
        moved.append(x.take_along_dim(order.view(*order.shape, *trailing), 1))
    return moved


def left_padding(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """The mask [B, length] of rows that end with `tokens` [B] real tokens (at most `length`)."""
    return torch.arange(length, device=tokens.device) >= length - tokens[:, None]


class SoftmaxAttention(nn.Module):
    """Grouped-query softmax attention with RoPE, optional biases and per-head q/k RMSNorm (Qwen2,
    Qwen3, Llama).

    Called like an FLA layer: returns (output [B, T, hidden_size], None, past_key_values), and keeps
    its keys and values ([B, T, num_key_value_heads, head_dim], after RoPE) in FLA's cache, beside
    the states of linear layers. window_size: how many tokens a query attends to, itself included;
    None for all. sink_size: how many of a text's first tokens it attends to besides.
    """

    def __init__(self, config: StudentConfig, layer_idx: int, window_size: int | None = None, sink_size: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.window_size = window_size
        self.sink_size = sink_size
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        q_dim = self.num_heads * self.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.q_norm = nn.RMSNorm(self.head_dim, eps=eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(
        self, hidden_states: torch.Tensor, position_embeddings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, T, num_heads, head_dim], and k and v [B, T, num_kv_heads, head_dim], after norms
        and RoPE."""
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return rotate(q, *position_embeddings), rotate(k, *position_embeddings), v

    def with_past(
        self, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The cached k and v followed by the new ones, which are added to the cache, and the mask
        of these positions."""
        if past_key_values is not None:
            q_len = k.shape[1]
            new = (k, v)
            if self.window_size is not None and past_key_values.get_seq_length(self.layer_idx):
                # Before the update, which drops what the next token does not attend to.
                past = past_key_values[self.layer_idx]["attn_state"]
                k, v = (torch.cat(pair, 1) for pair in zip(past, new))
            held = past_key_values.update(
                attn_state=new,
                layer_idx=self.layer_idx,
                offset=q_len,
                cache_kwargs={"window_size": self.window_size},
            )
            if self.window_size is None:
                k, v = held["attn_state"]
            elif attention_mask is not None:
                k, v, attention_mask = self.without_gaps(k, v, attention_mask, q_len)
                held["attn_state"] = tuple(x[:, -self.window_size :].contiguous() for x in (k, v))
        if attention_mask is not None:
            attention_mask = attention_mask[:, -k.shape[1] :]
        return k, v, attention_mask

    @staticmethod
    def without_gaps(k, v, attention_mask, q_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Right-aligns each row's keys and values, so that a window counts real tokens only.

        k, v: [B, held + q_len, ...], the held ones right-aligned already. attention_mask: [B, past
        + q_len]. Returns k, v, and their mask [B, held + q_len].
        """
        past_len = attention_mask.shape[1] - q_len
        past, new = attention_mask.bool().split([past_len, q_len], 1)
        held = left_padding(past.sum(1), k.shape[1] - q_len)
        real = torch.cat((held, new), 1)
        return *right_aligned(real, k, v), left_padding(real.sum(1), k.shape[1])

    def softmax_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values,
    ) -> torch.Tensor:
        """Softmax attention [B, T, num_heads, head_dim] of what `project` returns, with the keys
        and values of the cache, to which the new ones are added."""
        q_len = q.shape[1]
        k, v, attention_mask = self.with_past(k, v, attention_mask, past_key_values)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = sdpa_mask(attention_mask, q_len, k.shape[2], q.device, self.window_size)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and q_len > 1,
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        return out.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attend: Callable[..., torch.Tensor] | None = None,
        documents: Documents | None = None,
        **_,
    ):
        """hidden_states [B, T, hidden_size]; attention_mask [B, past + T] of 0 and 1;
        position_embeddings (cos, sin), each [B or 1, T, head_dim]; attend(layer_idx, q, k, v)
        replaces `softmax_attention` in a decoding step: see `decode_step.GraphedDecoder`.
        documents: those of a packed row, B = 1, each of which is read alone."""
        q, k, v = self.project(hidden_states, position_embeddings)
        if documents is not None:
            out = packed_attention(q, k, v, documents, self.window_size, self.sink_size)
        elif attend is None:
            out = self.softmax_attention(q, k, v, attention_mask, past_key_values)
        else:
            out = attend(self.layer_idx, q, k, v)
        return self.o_proj(out.flatten(2)), None, past_key_values

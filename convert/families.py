"""What each teacher family is: one declarative spec a family, and nothing else that knows a family's name.

A new family is a line in `FAMILIES` and a line in tests/test_convert.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """How a Hugging Face `model_type` maps to `StudentConfig`.

    attention_bias, output_bias, mlp_bias: whether q/k/v, o and the MLP carry biases, read from the family's config.
    qk_norm: per-head RMSNorm on q and k.
    """

    attention_bias: Callable[[PreTrainedConfig], bool]
    output_bias: Callable[[PreTrainedConfig], bool]
    mlp_bias: Callable[[PreTrainedConfig], bool] = lambda config: False
    qk_norm: bool = False


FAMILIES = {
    "qwen2": Family(attention_bias=lambda c: True, output_bias=lambda c: False),
    "qwen3": Family(attention_bias=lambda c: c.attention_bias, output_bias=lambda c: c.attention_bias, qk_norm=True),
    "llama": Family(
        attention_bias=lambda c: c.attention_bias,
        output_bias=lambda c: c.attention_bias,
        mlp_bias=lambda c: c.mlp_bias,
    ),
}

# Hugging Face's names, part by part -> ours (which are FLA's). The three families share them.
RENAMED = {
    "embed_tokens": "embeddings",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
# Fields that mean the same on both sides.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)  # fmt: skip
ROPE_TYPES = ("default", "llama3", "linear", "dynamic", "yarn")
ACTIVATIONS = ("silu", "swish")


def rename(name: str) -> str:
    """A Hugging Face parameter name in our terms: model.layers.0.self_attn.q_proj.weight -> model.layers.0.attn..."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a teacher cannot be expressed exactly, or None if it can."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type!r}; supported are {', '.join(FAMILIES)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "sliding-window attention"
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act {config.hidden_act!r}; supported is silu"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"rope_type {rope['rope_type']!r}; supported are {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial rotary embedding ({rope['partial_rotary_factor']})"
    if getattr(config, "quantization_config", None):
        return "quantized weights; name the original checkpoint instead"
    return None

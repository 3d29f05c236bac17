"""The teacher families, one declarative spec per family; no other code knows a family's name.

To add a family, add an entry to `FAMILIES`, a line to tests/test_convert.py and, for `--config`,
its sizes to published.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

# Fields of StudentConfig that Hugging Face's decoder configs have under the same name.
SAME = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "initializer_range",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "dtype",
    )
}
# The types of the fields of a family's config.json, and of its RoPE parameters.
GIVEN = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_heads",
    "max_position_embeddings",
)
DERIVED = (
    "intermediate_size",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_ratio",
)  # computed from others if null
SIZES = GIVEN + DERIVED
FIELDS = {
    **dict.fromkeys(GIVEN, int),
    **dict.fromkeys(DERIVED, int | None),
    **dict.fromkeys(
        ("sliding_window", "window_size", "max_window_layers", "pad_token_id", "bos_token_id"),
        int | None,
    ),
    "eos_token_id": int | list[int] | None,
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "initializer_range", "attention_dropout"), float),
    "rope_theta": float | None,
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "qk_norm",
            "use_cache",
            "use_sliding_window",
        ),
        bool,
    ),
}
ROPE_FIELDS = {
    **dict.fromkeys(
        (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "partial_rotary_factor",
        ),
        float | None,
    ),
    "original_max_position_embeddings": int | None,
}
# Parts of Hugging Face's parameter names -> ours, which are FLA's.
HUGGING_FACE_NAMES = {
    "embed_tokens": "embeddings",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}


@dataclass(frozen=True)
class Family:
    """How a `model_type` maps to `StudentConfig`, and its parameter names to ours.

    config: field of StudentConfig -> the family's field, or a function of the family's config.
    fixed: fields of StudentConfig whose values the family's code fixes.
    weights: part of a parameter's name -> our part; unlisted parts are the same.
    refused: config field -> function of its value that names what we cannot express, or None.
    """

    config: Mapping[str, str | Callable[[PreTrainedConfig], Any]] = field(default_factory=lambda: SAME)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=lambda: HUGGING_FACE_NAMES)
    refused: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)

    def rename(self, name: str) -> str:
        """model.layers.0.self_attn.q_proj.weight -> model.layers.0.attn.q_proj.weight"""
        return ".".join(self.weights.get(part, part) for part in name.split("."))


def _fla_intermediate(config: PreTrainedConfig) -> int:
    """The intermediate_size; where it is null, the one that FLA's GatedMLP computes."""
    if config.intermediate_size is not None:
        return config.intermediate_size
    wanted = int(config.hidden_size * (config.hidden_ratio or 4) * 2 / 3)
    return math.ceil(wanted / 256) * 256


def _sliding_window(size: int | None) -> str | None:
    return f"sliding-window attention over {size} tokens" if size else None


FAMILIES = {
    "qwen2": Family(fixed={"attention_bias": True}),
    "qwen3": Family(
        config=SAME | {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"},
        fixed={"qk_norm": True},
    ),
    "llama": Family(
        config=SAME
        | {
            "attention_bias": "attention_bias",
            "attention_output_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
    ),
    "mistral": Family(refused={"sliding_window": _sliding_window}),
    # FLA's TransformerForCausalLM, whose names we use. It has neither head_dim nor RoPE scaling.
    "transformer": Family(
        config={name: theirs for name, theirs in SAME.items() if name != "rope_parameters"}
        | {
            "intermediate_size": _fla_intermediate,
            "num_attention_heads": "num_heads",
            "num_key_value_heads": lambda config: config.num_kv_heads or config.num_heads,
            "rms_norm_eps": "norm_eps",
            "attention_bias": "qkv_bias",
            "qk_norm": "qk_norm",
            "rope_parameters": lambda config: {
                "rope_type": "default",
                "rope_theta": config.rope_theta,
            },
        },
        fixed={"qk_norm_eps": 1e-5},
        weights={},
        refused={
            "window_size": _sliding_window,
            "attnres_block_size": lambda size: size and "attention residuals",
            "rope_theta": lambda theta: None if theta else "no rotary embedding",
        },
    ),
}
ROPE_TYPES = ("default", "llama3", "linear", "dynamic", "yarn")
ACTIVATIONS = ("silu", "swish")


def unsupported(config: PreTrainedConfig) -> str | None:
    """All reasons why a teacher cannot be expressed exactly, in one line, or None if it can."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type!r}; supported are {', '.join(FAMILIES)}"
    refused = FAMILIES[config.model_type].refused
    reasons = [reason(getattr(config, name)) for name, reason in refused.items()]
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or []
    rope_type = rope.get("rope_type", "default")
    rotary_factor = rope.get("partial_rotary_factor", 1.0)
    quantized = bool(getattr(config, "quantization_config", None))
    others = {
        "sliding-window attention": any(kind != "full_attention" for kind in layer_types),
        f"hidden_act {config.hidden_act!r}; supported is silu": config.hidden_act not in ACTIVATIONS,
        f"rope_type {rope_type!r}; supported are {', '.join(ROPE_TYPES)}": rope_type not in ROPE_TYPES,
        f"partial rotary embedding ({rotary_factor})": rotary_factor != 1.0,
        "quantized weights; name the original checkpoint instead": quantized,
    }
    reasons += [reason for reason, lacking in others.items() if lacking]
    return "; ".join(filter(None, reasons)) or None

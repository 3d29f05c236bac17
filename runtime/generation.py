"""Greedy generation, for evaluation and chat."""

from __future__ import annotations

from transformers import GenerationConfig

PREFILL_CHUNK = 4096  # tokens of a long prompt per forward pass


def greedy(config: GenerationConfig) -> GenerationConfig:
    """Greedy decoding with the BOS, EOS and padding tokens of `config` and none of its other
    settings.

    Penalties, biases, banned tokens and minimum lengths change greedy decoding too: they would
    keep a model from repeating the text that it was asked to find.
    """
    return GenerationConfig(
        do_sample=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )

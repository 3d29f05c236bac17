"""How a model writes where its likeliest text is asked for."""

from __future__ import annotations

from transformers import GenerationConfig


def greedy(config: GenerationConfig) -> GenerationConfig:
    """Greedy decoding that ends where `config` does, with nothing else of it: penalties, biases,
    banned tokens and least lengths act on greedy decoding too, and would keep a model from
    repeating what it was asked to find."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )

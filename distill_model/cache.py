"""The cache of teachers, students and hybrids: FLA's, and what it says of itself for them."""

from __future__ import annotations

import torch
from fla.models.utils import Cache

from .config_distilled_student import StudentConfig
from .student_layers import get_student_attention_class


class HybridCache(Cache):
    """Keys and values [B, tokens, heads, head_dim] of the layers with softmax attention, states of constant size of the others.

    `get_seq_length(layer)` counts the tokens that a layer has read, padding included; beams and batches reorder all alike.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config

    @staticmethod
    def cannot_crop(config: StudentConfig) -> list[int]:
        """The layers of a model that cannot forget its last tokens: their state has taken them in for good."""
        if not config.linear_layers or get_student_attention_class(config.student_name).func.CROPS:
            return []
        return config.linear_layers

    def crop(self, tokens: int) -> None:
        """As transformers' caches: forgets the last -tokens; 0 forgets nothing, a positive number all but the first `tokens`.

        Raises NotImplementedError, with nothing forgotten, where a layer cannot.
        """
        length = self.get_seq_length()
        keep = min(length, int(tokens)) if tokens > 0 else max(0, length + int(tokens))
        if keep < length and (stuck := self.cannot_crop(self.config)):
            raise NotImplementedError(
                f"crop: {self.config.student_name} in layers {stuck} holds a state, which cannot forget its last "
                f"{length - keep} tokens; read the shorter text into a new cache"
            )
        super().crop(keep)

    def clear_rows(self, rows: torch.Tensor) -> None:
        """Sets everything that is held of the sequences `rows`, a mask [B], to zero: the state before the first token."""
        self._transform_states(lambda state: state.masked_fill(rows.view(-1, *[1] * (state.ndim - 1)), 0))

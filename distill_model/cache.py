"""The caches of teachers, students and hybrids: one that grows with the text, and one of a fixed
size for fast decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from fla.models.utils import Cache, FLALayer

from .config_distilled_student import StudentConfig
from .student_base import State
from .student_layers import get_student_attention_class


def state_tensors(state) -> Iterator[torch.Tensor | State]:
    """The tensors of a layer's state, or of its declaration, in order."""
    if isinstance(state, (torch.Tensor, State)):
        yield state
    elif state is not None:
        for part in state.values() if isinstance(state, dict) else state:
            yield from state_tensors(part)


class HybridCache(Cache):
    """Keys and values [B, tokens, heads, head_dim] of the layers with softmax attention, states of
    constant size of the others.

    `get_seq_length(layer)` counts the tokens that a layer has read, padding included; it is the
    same for all beams and sequences of a batch.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in state_tensors(layer.state))

    @staticmethod
    def sequence_bytes(config: StudentConfig, tokens: int, dtype: torch.dtype) -> int:
        """What a model of this dtype keeps of a sequence of `tokens` tokens. Raises NotImplementedError for
        a student without constant state."""
        kept = config.num_hidden_layers - len(config.linear_layers)
        size = 2 * kept * tokens * config.num_key_value_heads * config.head_dim * dtype.itemsize
        if not config.linear_layers:
            return size
        declared = get_student_attention_class(config.student_name).states(config)
        states = [math.prod(state.shape) * (state.dtype or dtype).itemsize for state in state_tensors(declared)]
        return size + len(config.linear_layers) * sum(states)

    @staticmethod
    def cannot_crop(config: StudentConfig) -> list[int]:
        """The layers of a model from whose cache the last tokens cannot be removed, because they
        hold a recurrent state."""
        if not config.linear_layers or get_student_attention_class(config.student_name).supports_crop:
            return []
        return config.linear_layers

    def crop(self, tokens: int) -> None:
        """As transformers' caches: removes the last -tokens of them; 0 removes nothing, a positive
        number all but the first `tokens`.

        Raises NotImplementedError, with nothing removed, where a layer cannot.
        """
        length = self.get_seq_length()
        keep = min(length, int(tokens)) if tokens > 0 else max(0, length + int(tokens))
        if keep < length and (stuck := self.cannot_crop(self.config)):
            raise NotImplementedError(
                f"crop: {self.config.student_name} in layers {stuck} holds a recurrent state, from which the last "
                f"{length - keep} tokens cannot be removed; read the shorter text into a new cache"
            )
        super().crop(keep)


# ------------------------------------------------------------------------------------ static cache
class StaticLayer(FLALayer):
    """The state of one layer for at most `max_len` tokens. Keys and values are buffers [B, max_len,
    heads, head_dim] from the first token on. Other states are new tensors after each text that is
    read; between `fix` and `release` they are updated in place."""

    def __init__(self, max_len: int):
        super().__init__()
        self.max_len = max_len
        self.in_place = False

    def update(self, *, attn_state=None, recurrent_state=None, conv_state=None, offset=1, **rest):
        if attn_state is not None:
            return self.append_keys_and_values(attn_state)
        if not self.in_place:
            return super().update(recurrent_state=recurrent_state, conv_state=conv_state, offset=offset, **rest)
        self.overwrite("recurrent_state", recurrent_state)
        self.overwrite("conv_state", conv_state)
        return self.state

    def append_keys_and_values(self, new: tuple[torch.Tensor, ...]) -> dict:
        """new: keys and values [B, T, heads, head_dim]. Returns those of all tokens so far."""
        begin = self._seen_tokens
        end = begin + new[0].shape[1]
        if end > self.max_len:
            raise ValueError(
                f"past_key_values: a static cache of {self.max_len} tokens has no place for {end}; make a larger one"
            )
        if self.state is None:
            empty = (x.new_zeros(len(x), self.max_len, *x.shape[2:]) for x in new)
            self.state = {"attn_state": tuple(empty)}
        buffers = self.state["attn_state"]
        for buffer, x in zip(buffers, new):
            buffer[:, begin:end] = x
        self._seen_tokens = end
        return {"attn_state": tuple(buffer[:, :end] for buffer in buffers)}

    def overwrite(self, name: str, new) -> None:
        for buffer, tensor in zip(state_tensors(self.state[name]), state_tensors(new)):
            # FLA's convolutions update their state in place.
            if buffer.data_ptr() != tensor.data_ptr():
                buffer.copy_(tensor)

    def fix(self) -> None:
        """From here on states are updated in place."""
        if "recurrent_state" in self.state:
            self.state = self._map_state(lambda x: x.clone(memory_format=torch.contiguous_format))
        self.in_place = True

    def release(self) -> None:
        self.in_place = False

    def crop(self, max_length: int) -> None:
        self._seen_tokens = self._validate_crop(max_length)


@dataclass
class DecodingBuffers:
    """What a decoding step reads and writes beside the layers' states. The addresses stay the same
    from step to step, as a CUDA graph requires.

    first [B]: the position of each sequence's first real token. last [1]: the position of the token
    that is decoded. input_ids, position_ids [B, 1]. logits [B, 1, vocab_size], of the last step.
    graph: the recorded step. is_running: whether a step is being computed; any other update of the
    cache ends decoding.
    """

    first: torch.Tensor
    last: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logits: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    is_running: bool = False


class StaticCache(HybridCache):
    """A cache whose tensors keep their size and address while tokens are decoded one by one by
    `decode_step.GraphedDecoder`.

    max_len: tokens that it can hold. decoding: the buffers of the decoding step, or None while a
    text is read. `generate` makes such a cache for cache_implementation="static". Raises ValueError
    for a model that it does not support.
    """

    PADDING = "attention_mask: a static cache takes padding on the left alone; leave cache_implementation out"

    def __init__(self, config: StudentConfig, max_len: int):
        super().__init__(config)
        if refusal := self.refusal(config):
            raise ValueError(f"cache_implementation: static {refusal}; leave it out")
        self.layer_class_to_replicate = partial(StaticLayer, max_len)
        self.max_len = max_len
        self.decoding: DecodingBuffers | None = None

    @staticmethod
    def refusal(config: StudentConfig) -> str | None:
        """Why a static cache does not support a model; None if it does."""
        name = config.student_name
        if config.linear_layers and not get_student_attention_class(name).supports_static_cache:
            return f"has no place for the state of {name}, which changes its size"
        if config.rope_depends_on_length:
            return "cannot follow RoPE of type dynamic, which depends on the length"
        return None

    def _transform_states(self, function) -> None:
        def write(buffer):
            new = function(buffer)
            if new.shape != buffer.shape:  # one row would be copied to all
                raise ValueError(
                    f"past_key_values: a static cache of {len(buffer)} sequences cannot become one of {len(new)}; "
                    "make another"
                )
            return buffer.copy_(new)

        for layer in self.layers:
            layer._map_state(write)

    def update(self, *args, **kwargs):
        if self.decoding is not None and not self.decoding.is_running:
            self.end_decoding()
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.decoding is not None:
            first = self.decoding.first
            first.copy_(first[beam_idx])

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        self.end_decoding()

    def reset(self) -> None:
        super().reset()
        self.end_decoding()

    def begin_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Prepares single-token steps after the tokens that are held. input_ids [B, 1];
        attention_mask [B, held + 1], 0 for padding. Raises ValueError for padding that is not on
        the left."""
        past = self.get_seq_length()
        first = input_ids.new_zeros(len(input_ids))
        if attention_mask is not None:
            real = attention_mask[:, :past].bool()
            first = real.long().argmax(1)
            if not torch.equal(real.sum(1), past - first):
                raise ValueError(self.PADDING)
        for layer in self.layers:
            layer.fix()
        self.decoding = DecodingBuffers(
            first=first,
            last=input_ids.new_full((1,), past),
            input_ids=torch.zeros_like(input_ids),
            position_ids=torch.zeros_like(input_ids),
        )

    def end_decoding(self) -> None:
        """Drops the buffers of the decoding step and its graph."""
        self.decoding = None
        for layer in self.layers:
            layer.release()

"""The caches of teachers, students and hybrids: one that grows with the text, and one of a fixed size for fast decoding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fla.models.utils import Cache, FLALayer

from .config_distilled_student import StudentConfig
from .decode_step import decode_token, join_projections, untouched
from .fused_ops import decode_attention
from .student_layers import get_student_attention_class


def _tensors(state) -> Iterator[torch.Tensor]:
    """Those of a layer's state, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


class HybridCache(Cache):
    """Keys and values [B, tokens, heads, head_dim] of the layers with softmax attention, states of constant size of the others.

    `get_seq_length(layer)` counts the tokens that a layer has read, padding included; beams and batches reorder all alike.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in _tensors(layer.state))

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


# ------------------------------------------------------------------------------------------------ of a fixed size
class StaticLayer(FLALayer):
    """What one layer holds of at most `max_len` tokens. Keys and values lie in buffers [B, max_len, heads, head_dim] from the first
    token on. Other states come as new tensors while a prompt is read; from `fix` on they stay where they are."""

    def __init__(self, max_len: int):
        super().__init__()
        self.max_len, self.in_place = max_len, False

    def update(self, *, attn_state=None, recurrent_state=None, conv_state=None, offset=1, **rest):
        if attn_state is not None:
            begin, end = self._seen_tokens, self._seen_tokens + attn_state[0].shape[1]
            if end > self.max_len:
                raise ValueError(f"past_key_values: a static cache of {self.max_len} tokens has no place for {end}; make a larger one")
            if self.state is None:
                self.state = {"attn_state": tuple(x.new_zeros(len(x), self.max_len, *x.shape[2:]) for x in attn_state)}
            for buffer, new in zip(self.state["attn_state"], attn_state):
                buffer[:, begin:end] = new
            self._seen_tokens = end
            return {"attn_state": tuple(buffer[:, :end] for buffer in self.state["attn_state"])}
        if not self.in_place:
            return super().update(recurrent_state=recurrent_state, conv_state=conv_state, offset=offset, **rest)
        for name, new in (("recurrent_state", recurrent_state), ("conv_state", conv_state)):
            for place, tensor in zip(_tensors(self.state[name]), _tensors(new)):
                if place.data_ptr() != tensor.data_ptr():  # FLA's convolutions write theirs themselves
                    place.copy_(tensor)
        return self.state

    def fix(self) -> None:
        if "recurrent_state" in self.state:
            self.state = self._map_state(lambda x: x.clone(memory_format=torch.contiguous_format))
        self.in_place = True

    def crop(self, max_length: int) -> None:
        self._seen_tokens = self._validate_crop(max_length)


class StaticCache(HybridCache):
    """A cache whose tensors keep size and place while tokens are decoded one by one. A step of all layers is then the same work
    whatever the text, and on a GPU one CUDA graph, recorded at the first step: Python, which would start its kernels one by
    one, is out of the way. The step is `decode_token`, whose kernels are few, and which gives the weights of a layer another place
    in memory. Where weights are quantised or on several devices, the model's own kernels start one by one as ever.

    max_len: tokens that it holds. `generate` makes one for cache_implementation="static". Raises ValueError for a model that it
    does not serve.
    """

    PADDING = "attention_mask: a static cache takes padding on the left alone; leave cache_implementation out"

    def __init__(self, config: StudentConfig, max_len: int):
        super().__init__(config)
        if refusal := self.refusal(config):
            raise ValueError(f"cache_implementation: static {refusal}; leave it out")
        self.layer_class_to_replicate = partial(StaticLayer, max_len)
        self.max_len, self.decoding, self.graph = max_len, False, None

    @staticmethod
    def refusal(config: StudentConfig) -> str | None:
        """Why it cannot serve a model; None if it can."""
        if config.linear_layers and not get_student_attention_class(config.student_name).func.CONSTANT_STATE:
            return f"has no place for what {config.student_name} holds, which changes its size"
        if config.rope_depends_on_length:
            return "cannot follow RoPE of type dynamic, which depends on the length"
        return None

    def _transform_states(self, function) -> None:
        def write(place):
            new = function(place)
            if new.shape != place.shape:  # one row would be copied to all
                raise ValueError(f"past_key_values: a static cache of {len(place)} sequences cannot become one of {len(new)}; make another")
            return place.copy_(new)

        for layer in self.layers:
            layer._map_state(write)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.decoding:
            self.first.copy_(self.first[beam_idx])

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        self.stop()

    def reset(self) -> None:
        super().reset()
        self.stop()

    def stop(self) -> None:
        """Ends decoding: what comes is a text of several tokens, or none."""
        self.decoding, self.graph = False, None
        for layer in self.layers:
            layer.in_place = False

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Prepares decoding behind the tokens that are held. attention_mask [B, held + 1], 0 for padding on the left alone."""
        past = self.get_seq_length()
        self.first = input_ids.new_zeros(len(input_ids))
        if attention_mask is not None:
            real = attention_mask[:, :past].bool()
            self.first = real.long().argmax(1)
            if not torch.equal(real.sum(1), past - self.first):
                raise ValueError(self.PADDING)
        self.last = input_ids.new_full((1,), past)
        self.input_ids, self.position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for layer in self.layers:
            layer.fix()
        self.decoding = True

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Softmax attention of the token that is decoded, q [B, 1, heads, head_dim], to all that are held and itself, k and v
        [B, 1, kv heads, head_dim]."""
        buffers = self.layers[layer_idx].state["attn_state"]
        first, last = self.first.to(q.device), self.last.to(q.device)  # a model may lie on several
        for buffer, new in zip(buffers, (k, v)):
            buffer.index_copy_(1, last, new)
        return decode_attention(q, *buffers, first, last)

    @torch.no_grad()
    def step(self, model, input_ids, position_ids=None, attention_mask=None) -> torch.Tensor:
        """The logits [B, 1, vocab_size] behind one more token of each sequence, input_ids [B, 1].

        position_ids: [B or 1, 1], or None to count the tokens. attention_mask: as in `begin`; the first step reads all
        of it, later ones the column of their token, if it has one. Raises ValueError for padding that is not on the
        left, and if the cache is full or of another batch size."""
        if not self.decoding:
            self.begin(input_ids, attention_mask)
        has_column = attention_mask is not None and attention_mask.shape[1] > self.get_seq_length()
        if has_column and not attention_mask[:, -1].all():
            raise ValueError(self.PADDING)
        if len(input_ids) != len(self.input_ids):
            raise ValueError(f"input_ids: {len(input_ids)} sequences behind a static cache of {len(self.input_ids)}")
        if self.get_seq_length() >= self.max_len:
            raise ValueError(f"past_key_values: a static cache of {self.max_len} tokens is full; make a larger one")
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_((self.last - self.first)[:, None] if position_ids is None else position_ids)
        if self.graph is None and self.last.is_cuda and self.on_one_device(model):
            with torch.cuda.device(self.last.device):  # the current one may be another, whose stream would record nothing
                self.capture(model)
        if self.graph is None:
            self.run(model)
        else:
            self.graph.replay()
        for layer in self.layers:
            layer._seen_tokens += 1
        return self.logits.clone()

    def run(self, model) -> None:
        if self.in_one_piece(model):
            self.logits = decode_token(model, self.input_ids, self.position_ids, self)
        else:
            hidden_states = model.model(self.input_ids, position_ids=self.position_ids, past_key_values=self, use_cache=True)
            self.logits = model.lm_head(hidden_states.last_hidden_state)
        self.last += 1

    @staticmethod
    def on_one_device(model) -> bool:
        return len({p.device for p in model.parameters()}) == 1 and not getattr(model, "is_quantized", False)

    @classmethod
    def in_one_piece(cls, model) -> bool:
        """Whether `decode_token` serves: it knows nothing of hooks around all layers, nor of casts between them."""
        return cls.on_one_device(model) and untouched(model.model) and not torch.is_autocast_enabled(model.device.type)

    def capture(self, model) -> None:
        """Records `run`. It is tried first, which compiles its kernels; what that changes is put back."""
        if self.in_one_piece(model):
            join_projections(model)
        changed = [self.last, *(x for layer in self.layers if "recurrent_state" in layer.state for x in _tensors(layer.state))]
        before, stream = [x.clone() for x in changed], torch.cuda.Stream()

        def put_back():
            for place, value in zip(changed, before):
                place.copy_(value)

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run(model)
                put_back()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(model)
        self.graph = graph  # not before: one that failed must not be replayed

"""The loop of `generate` with a static cache, decoding asynchronously with one step of lookahead:
a token is launched before the host has read the previous one. On a GPU with short steps the
host-device sync of transformers' loop, and the host's work after it, would take as long as the
model.
"""

from __future__ import annotations

from collections import deque

import torch
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput


def can_sample(model, input_ids: torch.Tensor, generation_config) -> bool:
    """Whether only tokens and the cache are asked for, and a step needs only the last token.
    transformers' loop handles the rest: ids on another device, generation without the cache, and
    adapters that prepend tokens, as PEFT's prompt tuning."""
    outputs = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = any(getattr(generation_config, name) for name in outputs)
    records_outputs = model.config.output_hidden_states or (generation_config.return_dict_in_generate and asked)
    return not (
        records_outputs
        or "prepare_inputs_for_generation" in vars(model)
        or input_ids.device != model.device
        or not generation_config.use_cache
        or generation_config.is_assistant
    )


def tolerates_extra_tokens(watcher) -> bool:
    """Whether a logits processor or a stopping criterion may be called with a token that is dropped
    afterwards. Those outside transformers may keep count, or allow nothing after a last token,
    which on a GPU raises an error that ends the process."""
    is_transformers = type(watcher).__module__.startswith("transformers.generation.")
    return is_transformers and not isinstance(watcher, PrefixConstrainedLogitsProcessor)


def tokens_ahead(cache_is_kept: bool, streamer, watchers, device: torch.device) -> int:
    """How many tokens may be launched after one that may have been the last. They are dropped, but
    the cache has read them, and `watchers`, logits processors and stopping criteria, have seen
    them; and a streamer waits for every token anyway."""
    if cache_is_kept or streamer is not None or device.type != "cuda":
        return 0
    return 1 if all(map(tolerates_extra_tokens, watchers)) else 0


def copy_to_host(flag: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Starts copying a scalar to the host; the event tells when it has arrived."""
    if not flag.is_cuda:
        return flag, None
    on_host = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flag.device))
    return on_host, event


def draw(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """The next tokens [B] of scores [B, vocab_size]."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]
    return scores.argmax(-1)


class EndOfText:
    """Finds out, up to `ahead` tokens late, after how many tokens all sequences have ended."""

    def __init__(self, ahead: int):
        self.ahead = ahead
        self.pending: deque[tuple] = deque()  # length, whether a sequence continues there, its event

    def length(self, length: int, unfinished: torch.Tensor, is_last: bool) -> int | None:
        """The length at which all sequences had ended; None if that is not known yet.

        length: of the text so far. unfinished [B]: the sequences that have not ended there.
        """
        self.pending.append((length, *copy_to_host(unfinished.any())))
        while len(self.pending) > (0 if is_last else self.ahead):
            length, continues, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if not continues:
                return length
        return None


def sample(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer,
    **model_kwargs,
):
    """As `GenerationMixin._sample`, greedy or by multinomial sampling, with the same arguments and
    results; a sampler may have drawn once more after the last token. past_key_values is a
    StaticCache."""
    cache = model_kwargs["past_key_values"]
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
    positions = None if positions is None else positions[:, -1:].clone()
    ids = input_ids
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    ends_early = [type(criterion) for criterion in stopping_criteria] != [MaxLengthCriteria]
    is_padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    cache_is_kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    watchers = (*logits_processor, *stopping_criteria)
    end_of_text = EndOfText(tokens_ahead(cache_is_kept, streamer, watchers, ids.device))
    max_length = stopping_criteria.max_length
    while True:
        scores = logits_processor(ids, logits.to(ids.device, torch.float32, copy=True))
        tokens = draw(scores, generation_config.do_sample)
        if is_padded:
            tokens = torch.where(unfinished, tokens, generation_config._pad_token_tensor.to(tokens.device))
        ids = torch.cat((ids, tokens[:, None]), -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        is_last = max_length is not None and ids.shape[1] >= max_length
        if ends_early:
            unfinished = unfinished & ~stopping_criteria(ids, None)
            end = end_of_text.length(ids.shape[1], unfinished, is_last)
            if end is not None:
                ids = ids[:, :end]
                break
        if is_last:
            break
        positions = None if positions is None else positions + 1
        logits = model(tokens[:, None], mask, positions, cache, use_cache=True).logits[:, -1]
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)
    return ids

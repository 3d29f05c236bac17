"""The loop of `generate` behind a static cache. A token is begun before the host has seen the last one, which transformers' waits for:
on a GPU whose steps are short that wait, and what the host does after it, would take as long as the model."""

from __future__ import annotations

from collections import deque

import torch
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput


def can_sample(model, input_ids: torch.Tensor, generation_config) -> bool:
    """Whether nothing is asked for but tokens and the cache, and a step needs nothing but the last token: transformers' loop moves ids of
    another device, reads the text again where the cache is not to be used, and asks an adapter that comes before the text, as PEFT's
    prompt tuning, for its inputs."""
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    recorded = generation_config.return_dict_in_generate and any(getattr(generation_config, name) for name in asked)
    prepared = "prepare_inputs_for_generation" in vars(model) or input_ids.device != model.device or not generation_config.use_cache
    return not (recorded or prepared or model.config.output_hidden_states or generation_config.is_assistant)


def is_indifferent(watcher) -> bool:
    """Whether a logits processor or a stopping criterion may be shown a token that is dropped. Those that are not transformers' may keep
    count, or allow nothing behind a last token: an error, and on a GPU one that ends the process."""
    return type(watcher).__module__.startswith("transformers.generation.") and not isinstance(watcher, PrefixConstrainedLogitsProcessor)


def tokens_ahead(cache_is_kept: bool, streamer, watchers, device: torch.device) -> int:
    """How many tokens may be begun behind one that may have been the last. They are dropped, but a state has taken them in for good, and
    so have `watchers`, logits processors and stopping criteria; and who streams waits for every token anyway."""
    return 0 if cache_is_kept or streamer is not None or device.type != "cuda" or not all(map(is_indifferent, watchers)) else 1


def note(flag: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A scalar on its way to the host, and what tells that it is there."""
    if not flag.is_cuda:
        return flag, None
    there = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flag.device))
    return there, event


def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, **model_kwargs):
    """What `GenerationMixin._sample` does, greedy or by multinomial sampling, with the same arguments and results; behind the last token
    a sampler may have drawn once more. past_key_values is a StaticCache."""
    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
    positions = None if positions is None else positions[:, -1:].clone()
    ids, unfinished = input_ids, torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends_early = [type(criterion) for criterion in stopping_criteria] != [MaxLengthCriteria]
    cache_is_kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor
    ahead = tokens_ahead(cache_is_kept, streamer, (*logits_processor, *stopping_criteria), input_ids.device)
    unseen: deque[tuple] = deque()  # lengths, and whether a sequence is unfinished there
    while True:
        scores = logits_processor(ids, logits.to(ids.device, torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if padded:
            tokens = torch.where(unfinished, tokens, pad.to(tokens.device))
        ids = torch.cat((ids, tokens[:, None]), -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        last = stopping_criteria.max_length is not None and ids.shape[1] >= stopping_criteria.max_length
        if ends_early:
            unfinished = unfinished & ~stopping_criteria(ids, None)
            unseen.append((ids.shape[1], *note(unfinished.any())))
            while len(unseen) > (0 if last else ahead):
                length, going_on, event = unseen.popleft()
                if event is not None:
                    event.synchronize()
                if not going_on:
                    ids, last = ids[:, :length], True
                    break
        if last:
            break
        positions = None if positions is None else positions + 1
        logits = model(tokens[:, None], mask, positions, cache, use_cache=True).logits[:, -1]
    if streamer is not None:
        streamer.end()
    return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache) if generation_config.return_dict_in_generate else ids

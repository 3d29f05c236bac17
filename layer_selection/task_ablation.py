"""Task accuracy without each layer's attention: greedy answers, scored exactly, by all ablations of
a model at once.

The ablation of a layer shares everything before that layer with the unmodified model: prompts are
read once, and each layer adds one stream of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.data import encode_beginnings

import torch
from fla.models.utils import Cache
from tqdm import tqdm

from distill_model import StudentForCausalLM
from layer_selection.ablation_questions import Question
from layer_selection.ranking import Ranking, rank_samples

# Tokens beyond the correct answer's: what ends it, and a split of its words that is not the
# tokenizer's own.
EXTRA_TOKENS = 2


def read_prompts(model: StudentForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Reads prompts once for the unmodified model and for every layer's ablation.

    ids, mask [B, T], padded on the left. Returns the logits of the next token [(1 + L) B,
    vocab_size], L the layers, and the cache with as many rows: first those of the unmodified model,
    then those without layer 0, 1 ... Before layer l the ablations of l and later layers equal the
    unmodified model, so that l runs on (1 + l) B rows.
    """
    decoder = model.model
    batch = len(ids)
    cache = Cache()
    is_padded = not mask.all()
    hidden = decoder.embeddings(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cos, sin = decoder.position_embeddings(hidden, positions)
    for block in decoder.layers:
        streams = len(hidden) // batch
        output = block.attn(
            block.attn_norm(hidden),
            attention_mask=mask.repeat(streams, 1) if is_padded else None,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(cos.repeat(streams, 1, 1), sin.repeat(streams, 1, 1)),
        )[0]
        hidden = torch.cat([hidden + output, hidden[:batch]])
        hidden = torch.cat([part + block.mlp(block.mlp_norm(part)) for part in hidden.split(batch)])
    rows = torch.arange(len(hidden), device=ids.device)
    for i, layer in enumerate(cache.layers):
        layer.reorder_cache(torch.where(rows < (1 + i) * batch, rows, rows % batch))
    return model.lm_head(decoder.norm(hidden[:, -1])), cache


@contextmanager
def zeroed_attention(model: StudentForCausalLM, ablated: torch.Tensor) -> Iterator[None]:
    """Within the context, zeroes the attention output of one layer in every row. ablated: the layer of each row [B];
    -1: none."""

    def zero(layer: int):
        return lambda module, args, output: (
            output[0].masked_fill((ablated == layer)[:, None, None], 0),
            *output[1:],
        )

    blocks = model.model.layers
    hooks = [block.attn.register_forward_hook(zero(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def left_padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, T] of rows of different lengths."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long, device=device)
    for i, tokens in enumerate(rows):
        ids[i, longest - len(tokens) :] = torch.tensor(tokens)
        mask[i, longest - len(tokens) :] = 1
    return ids, mask


def answer_budget(tokenizer, questions: list[Question]) -> int:
    """How many tokens an answer may take."""
    gold = [question.gold for question in questions]
    encoded = tokenizer(gold, add_special_tokens=False)["input_ids"]
    return EXTRA_TOKENS + max(map(len, encoded))


def decode_until_special(tokenizer, rows: list[list[int]]) -> list[str]:
    """The texts of the rows, each up to its first special token, which ends an answer as a line
    break does."""
    special = set(tokenizer.all_special_ids)
    texts = []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in special), None)
        text = tokenizer.decode(row[:end])
        texts.append(text if end is None else text + "\n")
    return texts


@torch.no_grad()
def continuations(model: StudentForCausalLM, tokenizer, questions: list[Question]) -> list[list[str]]:
    """Greedy continuations of the questions, read as one batch: by the unmodified model, then
    without each layer's attention.

    Raises ValueError if a prompt and its answer are longer than the model's context.
    """
    batch = len(questions)
    prompts = encode_beginnings(tokenizer, [question.prompt for question in questions])
    ids, mask = left_padded(prompts, model.device)
    longest = ids.shape[1]
    budget = answer_budget(tokenizer, questions)
    context = model.config.max_position_embeddings
    if longest + budget > context:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model reads {context}; make the task smaller "
            "(--num_pairs, --num_chains, --num_ucw, --num_words, --pb_max_len)"
        )
    logits, cache = read_prompts(model, ids, mask)
    layers = len(model.model.layers)
    mask = mask.repeat(1 + layers, 1)
    ablated = torch.arange(-1, layers, device=model.device).repeat_interleave(batch)
    written: list[list[int]] = [[] for _ in mask]
    with zeroed_attention(model, ablated):
        for _ in range(budget):
            following = logits.argmax(-1)
            for row, token in zip(written, following.tolist()):
                row.append(token)
            texts = decode_until_special(tokenizer, written)
            if all(questions[i % batch].has_ended(text) for i, text in enumerate(texts)):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = model(
                input_ids=following[:, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
    return [texts[start : start + batch] for start in range(0, len(texts), batch)]


def ablate(
    model: StudentForCausalLM, tokenizer, questions: list[Question], batch_size: int
) -> tuple[list[float], dict[int, list[float]], list[str]]:
    """(Score of every question, layer -> scores without its attention, what the unmodified model
    answers)."""
    # Prompts of similar length are read together: little padding.
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    answers = [[""] * len(questions) for _ in range(1 + model.config.num_hidden_layers)]
    with tqdm(total=len(questions), desc="ablations", unit="question") as bar:
        for start in range(0, len(questions), batch_size):
            batch = by_length[start : start + batch_size]
            written = continuations(model, tokenizer, [questions[i] for i in batch])
            for answer, texts in zip(answers, written):
                for i, text in zip(batch, texts):
                    answer[i] = text
            bar.update(len(batch))
    baseline, *without = [score_all(questions, texts) for texts in answers]
    return baseline, dict(enumerate(without)), answers[0]


def score_all(questions: list[Question], texts: list[str]) -> list[float]:
    return [question.score(text) for question, text in zip(questions, texts)]


def rank_drops(method: str, baseline: list[float], without: dict[int, list[float]], **facts) -> Ranking:
    """Layers by the drop of accuracy without their attention, with intervals over questions.

    baseline, without: scores of every question, of the unmodified model and without each layer.
    facts: of the ranking; a `seed` among them is that of the bootstrap.
    """
    drops = {}
    for layer, scores in without.items():
        drops[layer] = [before - after for before, after in zip(baseline, scores)]
    accuracy = sum(baseline) / len(baseline)
    return rank_samples(method, "drop of accuracy", drops, baseline=accuracy, **facts)

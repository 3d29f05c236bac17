"""Synthetic tasks that need attention, as text: recall of pairs, recall over several hops, copying.

A generator takes a `random.Random` and gives a `Document`: text, and which of its characters a reader of the text
before them can tell. The same documents train a teacher, score every answer in one forward pass (`answer_accuracy`),
and are prompts for generation whose earlier questions show the format. Words are made of syllables, so that no model
knows them.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from runtime.data import beginning

import torch
from torch.nn.utils.rnn import pad_sequence

_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]
WORDS = ["".join(pair) for pair in itertools.permutations(_SYLLABLES, 2)]
random.Random(0).shuffle(WORDS)
NUM_WORDS = 256  # words that documents draw from unless told otherwise


@dataclass(frozen=True)
class Document:
    """A task's text; `answers` are the [start, stop) characters that can be told from the text
    before them, in order."""

    text: str
    answers: list[tuple[int, int]]

    @property
    def prompt(self) -> str:
        """All before the last answer; the answers before it are examples."""
        return self.text[: self.answers[-1][0]]

    @property
    def answer(self) -> str:
        """The last answer, without the space before it."""
        return self.text[slice(*self.answers[-1])].strip()


def _document(head: str, questions: Iterable[tuple[str, str]]) -> Document:
    """`head`, then every question with its answer, separated by commas."""
    text, answers = head, []
    for question, answer in questions:
        text += ("," if answers else "") + question
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    return Document(text + "\n", answers)


def associative_recall(
    rng: random.Random, num_pairs: int = 48, num_queries: int = 16, num_words: int = NUM_WORDS
) -> Document:
    """Pairs of words, then keys that ask for their values (multi-query associative recall, arXiv
    2312.04927)."""
    keys = rng.sample(WORDS[:num_words], num_pairs)
    values = [rng.choice(WORDS[:num_words]) for _ in keys]
    pairs = [f" {key} {value}" for key, value in zip(keys, values)]
    asked = rng.sample(range(num_pairs), min(num_queries, num_pairs))
    return _document(f"recall:{','.join(pairs)} ?", ((f" {keys[i]}", f" {values[i]}") for i in asked))


def multi_hop_recall(
    rng: random.Random,
    num_chains: int = 16,
    num_hops: int = 2,
    num_queries: int = 8,
    num_words: int = NUM_WORDS,
) -> Document:
    """Pairs that form chains of `num_hops` links, shuffled; the first word of a chain asks for all
    that follow it."""
    words = rng.sample(WORDS[:num_words], num_chains * (num_hops + 1))
    chains = [words[i::num_chains] for i in range(num_chains)]
    pairs = [f" {key} {value}" for chain in chains for key, value in itertools.pairwise(chain)]
    rng.shuffle(pairs)
    asked = rng.sample(chains, min(num_queries, num_chains))
    return _document(
        f"hops {num_hops}:{','.join(pairs)} ?",
        ((f" {chain[0]}", f" {' '.join(chain[1:])}") for chain in asked),
    )


def copying(rng: random.Random, length: int = 64, num_words: int = NUM_WORDS) -> Document:
    """Words, then the same words again; every word of the copy is an answer."""
    words = [f" {rng.choice(WORDS[:num_words])}" for _ in range(length)]
    head = f"copy:{''.join(words)} ?"
    starts = itertools.accumulate((len(word) for word in words), initial=len(head))
    return Document(
        f"{head}{''.join(words)}\n",
        [(start, start + len(word)) for start, word in zip(starts, words)],
    )


RECALL_TASKS: dict[str, Callable[..., Document]] = {
    "associative_recall": associative_recall,
    "multi_hop_recall": multi_hop_recall,
    "copying": copying,
}


def encode(documents: list[Document], tokenizer) -> list[tuple[list[int], list[list[int]]]]:
    """For every document its token ids, BOS first where the tokenizer begins every text so, and for
    each of its answers the indices of the tokens that hold it."""
    encoded = tokenizer(
        [d.text for d in documents],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    bos, rows = beginning(tokenizer), []
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"]):
        spans, first = [[] for _ in document.answers], 0
        for i, (start, stop) in enumerate(offsets, len(bos)):
            while first < len(spans) and document.answers[first][1] <= start:
                first += 1
            for span, (begin, _) in zip(spans[first:], document.answers[first:]):
                if begin >= stop:
                    break
                span.append(i)
        rows.append((bos + ids, spans))
    return rows


@torch.no_grad()
def document_accuracies(model, tokenizer, documents: list[Document], batch_size: int = 16) -> list[float]:
    """Of each document the share of answers that greedy decoding would give to the letter, each
    after the text before it.

    One forward pass over whole documents: an answer counts if every token of it is the likeliest
    after the true ones. model: any causal language model of transformers' kind.
    """
    shares = []
    for start in range(0, len(documents), batch_size):
        rows = encode(documents[start : start + batch_size], tokenizer)
        # Padding is on the right, where no real token sees it: no mask is needed.
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
        best, guesses = (x.cpu() for x in model(input_ids=ids.to(model.device), use_cache=False).logits.max(-1))
        if not best.isfinite().all():
            raise ValueError("the model's logits are not finite")
        hit = torch.zeros_like(ids, dtype=torch.bool)
        hit[:, 1:] = guesses[:, :-1] == ids[:, 1:]
        shares += [
            sum(bool(row[span].all()) for span in answers) / len(answers) for row, (_, answers) in zip(hit, rows)
        ]
    return shares


def answer_accuracy(model, tokenizer, documents: list[Document], batch_size: int = 16) -> float:
    """The mean of `document_accuracies`."""
    return statistics.fmean(document_accuracies(model, tokenizer, documents, batch_size))

"""Synthetic recall tasks as text: recall of pairs, recall over several hops, copying, a number in
a long text.

A generator takes a `random.Random` and returns a `Document`: a text, and the spans of it that
follow from the text before them (the answers). The same documents train a teacher, are scored in
one forward pass (`answer_accuracy`), and serve as prompts for generation, whose earlier questions
show the format. Words are built from syllables, so that no model has seen them.
"""

from __future__ import annotations

import itertools
import random
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from runtime.data import beginning

_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]
WORDS = ["".join(pair) for pair in itertools.permutations(_SYLLABLES, 2)]
random.Random(0).shuffle(WORDS)
NUM_WORDS = 256  # default size of the vocabulary that a document draws from
FILLERS = WORDS[-64:]  # words between pairs and questions, which no task asks for

# What surrounds a needle, and what its number belongs to: plain words, so that every model reads them.
HAYSTACK = (
    "The road ran along the river.",
    "A light rain fell in the night.",
    "She read the paper at breakfast.",
    "The bells rang on the hour.",
    "Two dogs slept by the fire.",
    "He walked home through the park.",
    "The boats came in with the tide.",
    "Some leaves lay on the steps.",
    "The shop closed early that day.",
    "They spoke about the weather.",
    "The train was a little late.",
    "Bread and tea stood on the table.",
    "The garden was quiet again.",
    "A cat watched from the window.",
    "The letters were in the drawer.",
    "Snow still lay on the hills.",
)
CITIES = ["Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Prague", "Dublin", "Athens"]
CITIES += ["Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Moscow", "Boston", "Chicago", "Denver"]
PEOPLE = ["Anna", "Ben", "Carl", "Dora", "Emma", "Fred", "Gina", "Hugo", "Ivan", "Jane", "Karl", "Lucy", "Mark", "Nora"]


@dataclass(frozen=True)
class Document:
    """A task's text; `answers` are the [start, stop) character spans that follow from the text
    before them, in order."""

    text: str
    answers: list[tuple[int, int]]

    @property
    def prompt(self) -> str:
        """Everything before the last answer; the earlier answers are its examples."""
        return self.text[: self.answers[-1][0]]

    @property
    def answer(self) -> str:
        """The last answer, without the space before it."""
        return self.text[slice(*self.answers[-1])].strip()


def _document(head: str, questions: Iterable[tuple[str, str]]) -> Document:
    """`head`, then every question with its answer, separated by commas."""
    text = head
    answers = []
    for question, answer in questions:
        text += ("," if answers else "") + question
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    return Document(text + "\n", answers)


def _fillers(rng: random.Random, count: int) -> str:
    """`count` words that lengthen the way from the pairs to the questions."""
    return "".join(f" {rng.choice(FILLERS)}" for _ in range(count))


def associative_recall(
    rng: random.Random,
    num_pairs: int = 48,
    num_queries: int = 16,
    num_words: int = NUM_WORDS,
    num_fillers: int = 0,
) -> Document:
    """Key-value pairs of words, then `num_fillers` other words, then keys whose values are asked for
    (multi-query associative recall, arXiv 2312.04927)."""
    keys = rng.sample(WORDS[:num_words], num_pairs)
    values = [rng.choice(WORDS[:num_words]) for _ in keys]
    pairs = [f" {key} {value}" for key, value in zip(keys, values)]
    asked = rng.sample(range(num_pairs), min(num_queries, num_pairs))
    questions = [(f" {keys[i]}", f" {values[i]}") for i in asked]
    return _document(f"recall:{','.join(pairs)}{_fillers(rng, num_fillers)} ?", questions)


def multi_hop_recall(
    rng: random.Random,
    num_chains: int = 16,
    num_hops: int = 2,
    num_queries: int = 8,
    num_words: int = NUM_WORDS,
    num_fillers: int = 0,
) -> Document:
    """Shuffled pairs that form chains of `num_hops` links, then `num_fillers` other words; a chain's
    first word asks for all words after it."""
    words = rng.sample(WORDS[:num_words], num_chains * (num_hops + 1))
    chains = [words[i::num_chains] for i in range(num_chains)]
    pairs = [f" {key} {value}" for chain in chains for key, value in itertools.pairwise(chain)]
    rng.shuffle(pairs)
    asked = rng.sample(chains, min(num_queries, num_chains))
    questions = [(f" {chain[0]}", f" {' '.join(chain[1:])}") for chain in asked]
    return _document(f"hops {num_hops}:{','.join(pairs)}{_fillers(rng, num_fillers)} ?", questions)


def copying(rng: random.Random, length: int = 64, num_words: int = NUM_WORDS) -> Document:
    """Words, then the same words again; every word of the copy is an answer."""
    words = [f" {rng.choice(WORDS[:num_words])}" for _ in range(length)]
    original = "".join(words)
    head = f"copy:{original} ?"
    starts = itertools.accumulate((len(word) for word in words), initial=len(head))
    answers = [(start, start + len(word)) for start, word in zip(starts, words)]
    return Document(f"{head}{original}\n", answers)


def needle_recall(rng: random.Random, num_sentences: int = 140, num_needles: int = 1) -> Document:
    """Sentences, the same ones in an order that changes, with num_needles others between them that
    give a city a code of five digits; one code is asked for (the needle in a haystack of RULER, arXiv
    2404.06654)."""
    shuffled = (sentence for _ in itertools.count() for sentence in rng.sample(HAYSTACK, len(HAYSTACK)))
    sentences = list(itertools.islice(shuffled, num_sentences))
    keys = rng.sample(CITIES, num_needles)
    codes = [str(rng.randrange(10_000, 100_000)) for _ in keys]
    # Not among the first twentieth, which a prompt that is cut to a length may lose.
    places = [rng.randrange(num_sentences // 20, num_sentences) for _ in keys]
    for place, key, code in sorted(zip(places, keys, codes), reverse=True):
        sentences.insert(place, f"The code of {key} is {code}.")
    question = f" The code of {keys[0]} is"
    return _document(" ".join(sentences), [(question, f" {codes[0]}")])


def two_hop_facts(rng: random.Random, num_people: int = 4, num_digits: int = 3) -> Document:
    """Shuffled sentences of who lives where, and of each city's code; a person asks for the city and
    its code, so that the second sentence follows from the first answer. For teachers that chains of
    unknown words (`multi_hop_recall`) are too hard for."""
    people = rng.sample(PEOPLE, num_people)
    cities = rng.sample(CITIES, num_people)
    codes = [str(rng.randrange(10 ** (num_digits - 1), 10**num_digits)) for _ in cities]
    homes = [f" {person} lives in" for person in people]
    facts = [f" {city}. The code of {city} is {code}" for city, code in zip(cities, codes)]
    sentences = [f"{home} {city}." for home, city in zip(homes, cities)]
    sentences += [f" The code of {city} is {code}." for city, code in zip(cities, codes)]
    rng.shuffle(sentences)
    text = "".join(sentences).strip() + "\n"
    answers = []
    for i in rng.sample(range(num_people), num_people):
        text += homes[i].strip()
        answers.append((len(text), len(text) + len(facts[i])))
        text += f"{facts[i]}.\n"
    return Document(text, answers)


RECALL_TASKS: dict[str, Callable[..., Document]] = {
    "associative_recall": associative_recall,
    "multi_hop_recall": multi_hop_recall,
    "copying": copying,
}


# Those that a model is asked, but not trained on: no mixture has them.
ASKED_TASKS = {**RECALL_TASKS, "two_hop_facts": two_hop_facts, "needle_recall": needle_recall}


def documents(generate: Callable[..., Document]) -> Iterator[Document]:
    """Endless documents of a task with its default options, the same ones at every call."""
    for number in itertools.count():
        yield generate(random.Random(number))


def answer_tokens(
    answers: list[tuple[int, int]], offsets: list[tuple[int, int]], first_index: int = 0
) -> list[list[int]]:
    """For each answer, the indices of the tokens that overlap it.

    answers, offsets: [start, stop) characters of the answers and of the tokens, both in order.
    first_index: of the first token.
    """
    spans: list[list[int]] = [[] for _ in answers]
    first = 0  # the first answer that does not end before the current token
    for i, (start, stop) in enumerate(offsets, first_index):
        while first < len(answers) and answers[first][1] <= start:
            first += 1
        for span, (begin, _) in zip(spans[first:], answers[first:]):
            if begin >= stop:
                break
            span.append(i)
    return spans


def encode(documents: list[Document], tokenizer) -> list[tuple[list[int], list[list[int]]]]:
    """For every document its token ids, which begin as the tokenizer begins every text (BOS or
    nothing), and for each of its answers the indices of the tokens that hold it."""
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    prefix = beginning(tokenizer)
    rows = []
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"]):
        rows.append((prefix + ids, answer_tokens(document.answers, offsets, len(prefix))))
    return rows


def document_accuracies(model, tokenizer, documents: list[Document], batch_size: int = 16) -> list[float]:
    """For each document the share of its answers that greedy decoding reproduces exactly, given the
    text before them.

    One forward pass over whole documents (teacher forcing): an answer counts if each of its tokens
    is the argmax. model: any causal language model with the interface of transformers. Raises
    ValueError if its logits are not finite.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    shares = []
    for start in range(0, len(documents), batch_size):
        rows = encode(documents[start : start + batch_size], tokenizer)
        # Padding is on the right, where no real token attends to it: no mask is needed.
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        highest, predicted = (x.cpu() for x in logits.max(-1))
        if not highest.isfinite().all():
            raise ValueError("the model's logits are not finite")
        correct = torch.zeros_like(ids, dtype=torch.bool)
        correct[:, 1:] = predicted[:, :-1] == ids[:, 1:]
        for row, (_, answers) in zip(correct, rows):
            right = sum(bool(row[span].all()) for span in answers)
            shares.append(right / len(answers))
    return shares


def answer_accuracy(model, tokenizer, documents: list[Document], batch_size: int = 16) -> float:
    """The mean of `document_accuracies`."""
    return statistics.fmean(document_accuracies(model, tokenizer, documents, batch_size))


def generated_answers(model, tokenizer, documents: list[Document], batch_size: int = 16) -> list[str]:
    """What greedy decoding, with a cache, writes in place of the last answer of each document: as many
    tokens as the longest answer has and one more, up to a full stop, comma or new line.

    Prompts lose their first tokens beyond the length of the shortest, so that no batch is padded.
    """
    import torch

    prefix = beginning(tokenizer)
    prompts = tokenizer([document.prompt for document in documents], add_special_tokens=False, verbose=False)
    answers = tokenizer([f" {document.answer}" for document in documents], add_special_tokens=False)
    length = min(map(len, prompts["input_ids"]))
    longest = max(map(len, answers["input_ids"]))
    rows = torch.tensor([prefix + ids[len(ids) - length :] for ids in prompts["input_ids"]])
    texts = []
    for batch in rows.split(batch_size):
        generated = model.generate(
            batch.to(model.device), do_sample=False, max_new_tokens=longest + 1, pad_token_id=tokenizer.eos_token_id
        )
        texts += tokenizer.batch_decode(generated[:, batch.shape[1] :], skip_special_tokens=True)
    return [re.split(r"[.,\n]", text, maxsplit=1)[0].strip() for text in texts]

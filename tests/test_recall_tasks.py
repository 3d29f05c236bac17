"""The synthetic tasks: their answers follow from the text before them, and only exact answers
count."""

import random
import re

from runtime.data import load_tokenizer

import pytest
import torch
from conftest import begin_with_bos, save_tokenizer
from transformers.modeling_outputs import CausalLMOutput

from quickstart.train_tokenizer import train_tokenizer
from recall_tasks import (
    RECALL_TASKS,
    WORDS,
    Document,
    answer_accuracy,
    associative_recall,
    copying,
    encode,
    multi_hop_recall,
)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer((task(rng).text for _ in range(20) for task in RECALL_TASKS.values()), 400)


def answers(document: Document) -> list[str]:
    return [document.text[start:stop].strip() for start, stop in document.answers]


def pairs(document: Document) -> dict[str, str]:
    return dict(re.findall(r"(\w+) (\w+)[, ]", document.text.partition(":")[2].partition("?")[0]))


def test_recall_asks_for_pairs_of_the_text():
    document = associative_recall(random.Random(3), num_pairs=20, num_queries=7)
    asked = re.findall(r" (\w+) (\w+)", document.text.partition("?")[2])
    known = pairs(document)
    assert len(known) == 20 and len(asked) == 7 == len({key for key, _ in asked})
    assert all(known[key] == value for key, value in asked)
    assert answers(document) == [value for _, value in asked]


@pytest.mark.parametrize("hops", [2, 4])
def test_hops_lead_from_question_to_answer(hops):
    document = multi_hop_recall(random.Random(3), num_chains=5, num_hops=hops, num_queries=5)
    known = pairs(document)
    assert len(known) == 5 * hops
    for question in document.text.partition("?")[2].split(","):
        key, *chain = question.split()
        assert len(chain) == hops
        for value in chain:
            assert known[key] == value
            key = value


def test_a_copy_is_a_copy():
    document = copying(random.Random(3), length=9)
    first, second = document.text.removeprefix("copy:").strip().split(" ? ")
    assert first == second and answers(document) == second.split()


def test_same_seed_same_document_and_words_differ():
    assert len(set(WORDS)) == len(WORDS)
    for task in RECALL_TASKS.values():
        assert task(random.Random(5)) == task(random.Random(5)) != task(random.Random(6))


def test_prompt_ends_before_the_last_answer():
    document = associative_recall(random.Random(0), 4, 2)
    assert document.text == f"{document.prompt} {document.answer}\n"


def test_texts_begin_as_the_tokenizer_begins_them(tmp_path):
    """With BOS and without EOS; an answer's tokens are still those of the answer."""
    save_tokenizer(tmp_path)
    bos = begin_with_bos(tmp_path, ends=True)
    tokenizer = load_tokenizer(str(tmp_path))
    for task in RECALL_TASKS.values():
        document = task(random.Random(0))
        ((ids, spans),) = encode([document], tokenizer)
        assert ids[0] == bos and ids.count(bos) == 1 and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == document.text.replace("?", "")  # which this vocabulary lacks
        assert [tokenizer.decode([ids[i] for i in span]).strip() for span in spans] == answers(document)


class Scripted:
    """A model that predicts each next token rightly, except after positions that `spoil` names."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, spoil=lambda ids: torch.zeros_like(ids, dtype=torch.bool)):
        self.vocab_size, self.spoil = vocab_size, spoil

    def __call__(self, input_ids, use_cache):
        following = input_ids.roll(-1, 1)
        following = torch.where(self.spoil(input_ids), (following + 1) % self.vocab_size, following)
        return CausalLMOutput(logits=torch.nn.functional.one_hot(following, self.vocab_size).float())


@pytest.mark.parametrize("name", RECALL_TASKS)
def test_accuracy_counts_whole_answers(name, tokenizer):
    documents = [RECALL_TASKS[name](random.Random(seed)) for seed in range(5)]
    vocab_size, count = len(tokenizer), len(documents[0].answers)
    assert answer_accuracy(Scripted(vocab_size), tokenizer, documents, batch_size=2) == 1
    wrong = answer_accuracy(
        Scripted(vocab_size, lambda ids: torch.ones_like(ids, dtype=torch.bool)),
        tokenizer,
        documents,
    )
    assert wrong == 0

    def last_answer_token(ids):  # the token before the newline, so the model errs in predicting it
        newline = tokenizer.convert_tokens_to_ids("Ċ")
        return ids.roll(-2, 1) == newline

    assert answer_accuracy(Scripted(vocab_size, last_answer_token), tokenizer, documents) == pytest.approx(
        1 - 1 / count
    )

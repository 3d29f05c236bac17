"""What a model keeps of its teacher: held-out figures, recall tasks whose answers are scored to the
letter, and text side by side. Needs no network and no lm-evaluation-harness.

    quality = Quality(teacher, tokenizer, heldout_ids, sizes)
    figures = quality.figures(student)      # {"perplexity": ..., "kl": ..., "needle_1024": ..., ...}

Accuracies are shares of all questions of a task; the recall tasks are read in one forward pass
(`recall_tasks.document_accuracies`), the needles are generated, with a cache.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from evaluation.own_tasks import recall_documents
from heldout import heldout_figures, read_chunks
from recall_tasks import RECALL_TASKS, Document, document_accuracies, generated_answers, two_hop_facts

EXAMPLES = 4  # questions of associative recall that show its form and do not count
PROMPT_TOKENS = 48  # of a sample
NEW_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """How much is measured. needle_lengths: tokens of a prompt, those beyond the teacher's positions are
    left out. batch_tokens: of a forward pass without logits."""

    documents: int = 64  # of a recall task, with 12, 4 and 64 questions each
    needles: int = 200  # of each length
    needle_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    samples: int = 6
    batch_tokens: int = 131_072


def task_documents(count: int) -> dict[str, list[Document]]:
    """Documents of the three recall tasks, the same ones at every call. Their seeds are not those of
    `recall_tasks.documents`, which a mixture trains on."""

    def drawn(generate, **options) -> list[Document]:
        return [generate(random.Random(f"measured {number}"), **options) for number in range(count)]

    pairs = drawn(RECALL_TASKS["associative_recall"], num_pairs=16, num_words=64)
    return {
        "associative_recall": [Document(text.text, text.answers[EXAMPLES:]) for text in pairs],
        "two_hops": drawn(two_hop_facts),
        "copying": drawn(RECALL_TASKS["copying"], num_words=64),
    }


class Quality:
    """Measures models against one teacher, whose outputs on the held-out text are kept.

    heldout: token ids [N, T].
    """

    def __init__(self, teacher, tokenizer, heldout: torch.Tensor, sizes: Sizes):
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.sizes = sizes
        self.batches = list(heldout.to(teacher.device).split(max(1, sizes.batch_tokens // 4 // heldout.shape[1])))
        self.expected = [read_chunks(teacher, batch) for batch in self.batches]
        self.tasks = task_documents(sizes.documents)
        longest = teacher.config.max_position_embeddings
        self.needles = {
            f"needle_{length}": recall_documents("needle_recall", length, 1, tokenizer, sizes.needles)
            for length in sizes.needle_lengths
            if length <= longest
        }
        self.prompts = heldout[: sizes.samples, :PROMPT_TOKENS].to(teacher.device)

    def figures(self, model) -> dict[str, float]:
        """Perplexity, KL in nats, top-1 agreement, an accuracy for each task, each with the standard
        error of its mean as NAME_error, and the seconds that all took."""
        begin = time.perf_counter()
        model.eval()
        heldout = heldout_figures(model, self.batches, self.expected)
        figures = {"perplexity": heldout.perplexity}
        figures["perplexity_error"] = heldout.perplexity * standard_error(heldout.cross_entropy)
        for name, values in (("kl", heldout.kl), ("agreement", heldout.agreement)):
            figures |= mean_and_error(name, values)
        bar = tqdm(total=len(self.tasks) + len(self.needles), desc="tasks", leave=False)
        for name, documents in self.tasks.items():
            figures |= mean_and_error(name, document_accuracies(model, self.tokenizer, documents))
            bar.update()
        for name, documents in self.needles.items():
            figures |= mean_and_error(name, self.needle_scores(model, name, documents))
            bar.update()
        bar.close()
        return figures | {"seconds": round(time.perf_counter() - begin, 1)}

    def needle_scores(self, model, name: str, documents: list[Document]) -> list[float]:
        """1 for each document whose last answer the model generates to the letter, else 0."""
        batch_size = max(1, self.sizes.batch_tokens // int(name.rpartition("_")[2]))
        answers = generated_answers(model, self.tokenizer, documents, batch_size)
        return [float(answer == document.answer) for answer, document in zip(answers, documents, strict=True)]

    @torch.no_grad()
    def samples(self, model) -> list[dict[str, str]]:
        """The beginnings of held-out texts and the model's greedy continuations."""
        output = model.generate(
            self.prompts,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        prompts = self.tokenizer.batch_decode(self.prompts)
        texts = self.tokenizer.batch_decode(output[:, self.prompts.shape[1] :])
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.fmean(values), f"{name}_error": standard_error(values)}

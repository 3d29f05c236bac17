"""Hybrids trained alike for compare_selectors.py, and their figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

from runtime.data import load_tokenizer
from runtime.files import atomic_write_text

from tqdm import tqdm

from layer_selection.bench import Bench
from layer_selection.candidate_training import JointTraining, SequenceKLs
from layer_selection.stopping_rule import StoppingRule
from recall_tasks import Document, answer_accuracy


class MeasuredTraining(JointTraining):
    """Hybrids that keep these sets of layers, trained to the last step. Their figures are added to
    `known` and written to `file` before their last round counts as done."""

    def __init__(
        self,
        bench: Bench,
        rounds: int,
        sets: list[list[int]],
        folder: Path,
        file: Path,
        known: dict,
        documents: list[Document],
    ):
        super().__init__(bench, StoppingRule(rounds=rounds), dict(enumerate(sets)), -1, folder)
        self.file = file
        self.known = known
        self.documents = documents
        self.tokenizer = load_tokenizer(bench.cfg.teacher_model.name)

    def train_round(self, mine: list[int], first: int, last: int, bar: tqdm) -> SequenceKLs:
        kls = super().train_round(mine, first, last, bar)
        if last == self.plan.steps:
            for i in mine:
                self.known[str(self.kept[i])] = self.figures(i, kls[i])
            atomic_write_text(self.file, json.dumps(self.known, indent=1) + "\n")
        return kls

    def figures(self, i: int, kls: list[float]) -> dict[str, float]:
        """Of the i-th hybrid, whose held-out KLs are `kls`."""
        self.candidates[i].to(self.bench.device)
        model = self.candidates[i].hybrid.eval()
        losses = self.bench.cross_entropies(model)
        return {
            "kl": sum(kls) / len(kls),
            "perplexity": math.exp(sum(losses) / len(losses)),
            "recall": answer_accuracy(model, self.tokenizer, self.documents),
        }

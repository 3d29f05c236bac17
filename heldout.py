"""Held-out figures of a model, per chunk of tokens: cross-entropy, KL divergence to a teacher,
top-1 agreement with it.

    teacher_outputs = [read_chunks(teacher, ids) for ids in batches]
    figures = heldout_figures(student, batches, teacher_outputs)
    figures.mean_kl, figures.mean_cross_entropy, figures.perplexity, figures.mean_agreement

A model is read as hidden states and the matrix of its output head, so that the logits of a batch
are never held as a whole: the heads of `distill_model.losses` compute them chunk by chunk. All
values are float32; losses are in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from distill_model.losses import CHUNK_SIZE, linear_cross_entropy, token_kl


@dataclass(frozen=True)
class ModelOutput:
    """A model's predictions for chunks of tokens; their logits are `hidden @ head.T`.

    hidden: [B, T, H], after the final norm. head: [V, H], the weight of the output head.
    """

    hidden: torch.Tensor
    head: torch.Tensor


@torch.no_grad()
def read_chunks(model, ids: torch.Tensor) -> ModelOutput:
    """One forward pass without the head over chunks ids [B, T]; ids are moved to the model's
    device.

    model: a causal language model with the interface of transformers whose logits are linear in the
    hidden states (`check_linear_head`).
    """
    hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state
    return ModelOutput(hidden, model.get_output_embeddings().weight)


@torch.no_grad()
def check_linear_head(model, ids: torch.Tensor) -> None:
    """Raises ValueError if the model's logits for ids [1, T] are not those of `read_chunks`, as
    where a head has a bias or logits are scaled or capped."""
    output = read_chunks(model, ids)
    expected = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    difference = (output.hidden @ output.head.mT).float() - expected
    tolerance = 4 * torch.finfo(output.hidden.dtype).eps * expected.abs().max()
    if not difference.abs().max() <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: its logits are not finite, or not a linear function of hidden states"
        )


@torch.no_grad()
def heldout_cross_entropy(output: ModelOutput, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of each chunk, [B], over the T - 1 predicted tokens of ids [B,
    T]."""
    ids = ids.to(output.hidden.device)
    losses = [
        linear_cross_entropy(hidden[:-1], output.head, chunk[1:])  # [T - 1, H] and [T - 1]
        for hidden, chunk in zip(output.hidden, ids)
    ]
    return torch.stack(losses)


def heldout_kl(student: ModelOutput, teacher: ModelOutput) -> torch.Tensor:
    """KL(teacher || student) of each chunk, [B], the mean over its T positions. Raises ValueError
    if the vocabularies differ."""
    teacher_hidden = teacher.hidden.to(student.hidden.device)
    kl = token_kl(student.hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), student.head, teacher.head)
    return kl.view(student.hidden.shape[:2]).mean(1)


@torch.no_grad()
def top1_agreement(student: ModelOutput, teacher: ModelOutput) -> torch.Tensor:
    """Share of each chunk's T positions at which both models predict the same token, [B]."""
    teacher_hidden = teacher.hidden.to(student.hidden.device)
    agree = []
    rows = zip(
        student.hidden.flatten(0, 1).split(CHUNK_SIZE),
        teacher_hidden.flatten(0, 1).split(CHUNK_SIZE),
    )
    for student_rows, teacher_rows in rows:
        predicted = (student_rows @ student.head.mT).argmax(-1)
        expected = (teacher_rows @ teacher.head.mT).argmax(-1)
        agree.append(predicted == expected)
    return torch.cat(agree).float().view(student.hidden.shape[:2]).mean(1)


@dataclass(frozen=True)
class HeldoutFigures:
    """One value per chunk: cross-entropy and KL in nats per token, agreement from 0 to 1."""

    cross_entropy: list[float]
    kl: list[float]
    agreement: list[float]

    @property
    def mean_cross_entropy(self) -> float:
        return statistics.fmean(self.cross_entropy)

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return math.exp(self.mean_cross_entropy)

    @property
    def mean_kl(self) -> float:
        return statistics.fmean(self.kl)

    @property
    def mean_agreement(self) -> float:
        return statistics.fmean(self.agreement)


def heldout_figures(model, batches: Iterable[torch.Tensor], teacher_outputs: Sequence[ModelOutput]) -> HeldoutFigures:
    """All three figures of `model` from one forward pass per batch.

    batches: token ids [B, T] each. teacher_outputs: what `read_chunks` returned for the teacher on
    the same batches.
    """
    cross_entropy = []
    kl = []
    agreement = []
    for ids, teacher in zip(batches, teacher_outputs, strict=True):
        output = read_chunks(model, ids)
        cross_entropy += heldout_cross_entropy(output, ids).tolist()
        kl += heldout_kl(output, teacher).tolist()
        agreement += top1_agreement(output, teacher).tolist()
    return HeldoutFigures(cross_entropy, kl, agreement)

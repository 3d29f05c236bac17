"""Held-out figures of a model, per chunk of tokens: cross-entropy, KL divergence to a teacher,
top-1 agreement with it.

    teacher_outputs = [read_chunks(teacher, ids) for ids in batches]
    figures = heldout_figures(student, batches, teacher_outputs)
    figures.mean_kl, figures.mean_cross_entropy, figures.perplexity, figures.mean_agreement

A model is read as hidden states and the matrix of its output head, so that the logits of a batch
are never held as a whole: the heads of `distill_model.losses` compute them chunk by chunk. Where
logits are no linear function of hidden states (`has_linear_head`), `read_logits` holds them. All
values are float32; losses are in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from distill_model.losses import CHUNK_SIZE, linear_cross_entropy, predicting_learned, token_kl


@dataclass(frozen=True)
class ModelOutput:
    """A model's predictions for chunks of tokens; their logits are `hidden @ head.T`.

    hidden: [B, T, H], after the final norm. head: [V, H], the weight of the output head; None:
    hidden are the logits, [B, T, V].
    """

    hidden: torch.Tensor
    head: torch.Tensor | None

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[-1] if self.head is None else len(self.head)

    def to(self, device: torch.device) -> ModelOutput:
        return ModelOutput(self.hidden.to(device), None if self.head is None else self.head.to(device))

    def logits(self) -> Iterator[torch.Tensor]:
        """The logits of all B * T positions in fp32, in chunks [N, V]."""
        for rows in self.hidden.flatten(0, 1).split(CHUNK_SIZE):
            yield (rows if self.head is None else rows @ self.head.mT).float()


@torch.no_grad()
def read_chunks(model, ids: torch.Tensor) -> ModelOutput:
    """One forward pass without the head over chunks ids [B, T]; ids are moved to the model's
    device.

    model: a causal language model with the interface of transformers whose logits are linear in the
    hidden states (`has_linear_head`).
    """
    hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state
    return ModelOutput(hidden, model.get_output_embeddings().weight)


@torch.no_grad()
def read_logits(model, ids: torch.Tensor) -> ModelOutput:
    """As `read_chunks`, for any causal language model: its logits are held."""
    return ModelOutput(model(input_ids=ids.to(model.device), use_cache=False).logits, None)


@torch.no_grad()
def has_linear_head(model, ids: torch.Tensor) -> bool:
    """Whether the model's logits for ids [1, T] are those of `read_chunks`; not where its head has
    a bias, or logits are scaled or capped. Raises ValueError if they are not finite."""
    expected = read_logits(model, ids).hidden.float()
    if not expected.isfinite().all():
        raise ValueError("the logits are not finite")
    output = read_chunks(model, ids)
    if output.hidden.shape[-1] != output.head.shape[-1]:
        return False
    difference = (output.hidden @ output.head.mT).float() - expected
    tolerance = 4 * torch.finfo(output.hidden.dtype).eps * expected.abs().max()
    return bool(difference.abs().max() <= tolerance)


def position_weights(loss_mask: torch.Tensor) -> torch.Tensor:
    """The weights of positions, [N, T], that the functions below take, of loss_mask [N, T] bool: the
    tokens that are learned, of all held-out chunks.

    A chunk's figure is then its sum over the positions whose next token is learned, divided by the
    mean number of them per chunk, so that the mean over the chunks is the mean over all learned
    tokens.
    """
    positions = predicting_learned(loss_mask).float()
    return positions / (positions.sum() / len(positions)).clamp(min=1)


@torch.no_grad()
def heldout_cross_entropy(output: ModelOutput, ids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean next-token cross-entropy of each chunk, [B], over the T - 1 predicted tokens of ids [B,
    T]. weights: [B, T], see `position_weights`."""
    ids = ids.to(output.hidden.device)
    losses = []
    for i, (hidden, chunk) in enumerate(zip(output.hidden, ids)):
        labels = chunk[1:]
        if weights is not None:
            labels = labels.masked_fill(weights[i, :-1].to(labels.device) == 0, -100)
        if output.head is None:
            loss = cross_entropy(hidden[:-1].float(), labels)
        else:
            loss = linear_cross_entropy(hidden[:-1], output.head, labels)
        if weights is not None:
            loss = loss * weights[i].sum().to(loss.device)  # all weights that are not 0 are equal
        losses.append(loss)
    return torch.stack(losses)


def _means(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Of values [B, T] the mean over positions, or the sum with weights [B, T]."""
    return values.mean(1) if weights is None else (values * weights.to(values.device)).sum(1)


@torch.no_grad()
def heldout_kl(student: ModelOutput, teacher: ModelOutput, weights: torch.Tensor | None = None) -> torch.Tensor:
    """KL(teacher || student) of each chunk, [B], the mean over its T positions. weights: [B, T], see
    `position_weights`. Raises ValueError if the vocabularies differ."""
    teacher = teacher.to(student.hidden.device)
    if student.head is None or teacher.head is None:
        rows = zip(student.logits(), teacher.logits())
        parts = [_row_kl(ours.log_softmax(-1), theirs.log_softmax(-1)) for ours, theirs in rows]
        kl = torch.cat(parts)
    else:
        kl = token_kl(student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1), student.head, teacher.head)
    return _means(kl.view(student.hidden.shape[:2]), weights)


def _row_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each row, [N], of log-probabilities [N, V]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@torch.no_grad()
def top1_agreement(student: ModelOutput, teacher: ModelOutput) -> torch.Tensor:
    """Share of each chunk's T positions at which both models predict the same token, [B]."""
    teacher = teacher.to(student.hidden.device)
    rows = zip(student.logits(), teacher.logits())
    agree = torch.cat([ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in rows])
    return agree.float().view(student.hidden.shape[:2]).mean(1)


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

"""Held-out figures of a model, per chunk of tokens: cross-entropy, KL divergence to a teacher,
top-1 agreement with it.

    teacher_outputs = [read_chunks(teacher, batch) for batch in batches]
    figures = heldout_figures(student, batches, teacher_outputs)
    figures.mean_kl, figures.mean_cross_entropy, figures.perplexity, figures.mean_agreement

A model is read as hidden states and the matrix of its output head, so that the logits of a batch
are never held as a whole: the heads of `distill_model.losses` compute them chunk by chunk. Where
logits are no linear function of hidden states (`has_linear_head`), `read_logits` holds them. All
values are float32; losses are in nats.

A batch is token ids [B, T], or a mapping {"input_ids": [B, T]}, perhaps with "document_ids" [B, T]:
each document is then read as if it stood alone, and the figures are means over the positions whose
next token is of the same document; or with "loss_mask" [B, T]: over those whose next token is learned.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from distill_model.documents import learned_tokens, predicting_learned
from distill_model.losses import CHUNK_SIZE, linear_cross_entropy, token_kl

Batch = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ModelOutput:
    """A model's predictions for chunks of tokens; their logits are `hidden @ head.T`.

    hidden: [B, T, H], after the final norm. head: [V, H], the weight of the output head; None:
    hidden are the logits, [B, T, V]. counted: [B, T], the positions that figures are means over;
    None: all.
    """

    hidden: torch.Tensor
    head: torch.Tensor | None
    counted: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[-1] if self.head is None else len(self.head)

    def to(self, device: torch.device) -> ModelOutput:
        moved = [None if x is None else x.to(device) for x in (self.hidden, self.head, self.counted)]
        return ModelOutput(*moved)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Of each chunk, [B], over its counted positions, of values [B T]; 0 where none counts."""
        values = values.view(self.hidden.shape[:2])
        if self.counted is None:
            return values.mean(1)
        return (values * self.counted).sum(1) / self.counted.sum(1).clamp(min=1)

    def logits(self) -> Iterator[torch.Tensor]:
        """The logits of all B * T positions in fp32, in chunks [N, V]."""
        for rows in self.hidden.flatten(0, 1).split(CHUNK_SIZE):
            yield (rows if self.head is None else rows @ self.head.mT).float()


def ids_of(batch: Batch) -> torch.Tensor:
    """The token ids [B, T] of a batch."""
    return batch["input_ids"] if isinstance(batch, Mapping) else batch


def counted_of(batch: Batch) -> torch.Tensor:
    """The positions of a batch that figures are means over, [B, T] of bool."""
    learned = None
    if isinstance(batch, Mapping):
        learned = learned_tokens(batch.get("loss_mask"), batch.get("document_ids"))
    if learned is None:
        return torch.ones_like(ids_of(batch), dtype=torch.bool)
    return predicting_learned(learned)


def _read(module, batch: Batch, device: torch.device, field: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`field` of a module's output for a batch, [B, T, ...], and the positions that count.

    A module that does not take document_ids reads each document in a pass of its own.
    """
    ids = ids_of(batch).to(device)
    document_ids = batch.get("document_ids") if isinstance(batch, Mapping) else None
    counted = None
    if isinstance(batch, Mapping) and batch.keys() & {"document_ids", "loss_mask"}:
        counted = counted_of(batch).to(device)
    if document_ids is None:
        return getattr(module(input_ids=ids, use_cache=False), field), counted
    document_ids = document_ids.to(device)
    if "document_ids" in inspect.signature(module.forward).parameters:
        output = module(input_ids=ids, document_ids=document_ids, use_cache=False)
        return getattr(output, field), counted
    rows = []
    for row, documents in zip(ids, document_ids):
        lengths = documents.unique_consecutive(return_counts=True)[1].tolist()
        parts = [getattr(module(input_ids=part[None], use_cache=False), field) for part in row.split(lengths)]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows), counted


@torch.no_grad()
def read_chunks(model, batch: Batch) -> ModelOutput:
    """One forward pass without the head over a batch, which is moved to the model's device.

    model: a causal language model with the interface of transformers whose logits are linear in the
    hidden states (`has_linear_head`).
    """
    hidden, counted = _read(model.base_model, batch, model.device, "last_hidden_state")
    return ModelOutput(hidden, model.get_output_embeddings().weight, counted)


@torch.no_grad()
def read_logits(model, batch: Batch) -> ModelOutput:
    """As `read_chunks`, for any causal language model: its logits are held."""
    logits, counted = _read(model, batch, model.device, "logits")
    return ModelOutput(logits, None, counted)


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


def position_weights(batch: Batch) -> torch.Tensor:
    """The weights of positions, [N, T], that the functions below take, of all held-out chunks.

    A chunk's figure is then its sum over the positions that count (`counted_of`), divided by the mean
    number of them per chunk, so that the mean over the chunks is the mean over all that count.
    """
    positions = counted_of(batch).float()
    return positions / (positions.sum() / len(positions)).clamp(min=1)


@torch.no_grad()
def heldout_cross_entropy(output: ModelOutput, ids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean next-token cross-entropy of each chunk, [B], over the T - 1 predicted tokens of ids [B,
    T], or those at counted positions. weights: [B, T], see `position_weights`."""
    ids = ids.to(output.hidden.device)
    losses = []
    for i, (hidden, chunk) in enumerate(zip(output.hidden, ids)):
        hidden, labels = hidden[:-1], chunk[1:]
        counted = output.counted if weights is None else weights.to(ids.device) > 0
        if counted is not None:
            hidden, labels = hidden[counted[i, :-1]], labels[counted[i, :-1]]
        if not len(labels):
            loss = hidden.new_zeros((), dtype=torch.float32)
        elif output.head is None:
            loss = cross_entropy(hidden.float(), labels)
        else:
            loss = linear_cross_entropy(hidden, output.head, labels)
        if weights is not None:
            loss = loss * weights[i].sum().to(loss.device)  # all weights that are not 0 are equal
        losses.append(loss)
    return torch.stack(losses)


@torch.no_grad()
def heldout_kl(student: ModelOutput, teacher: ModelOutput, weights: torch.Tensor | None = None) -> torch.Tensor:
    """KL(teacher || student) of each chunk, [B], the mean over its counted positions. weights: [B, T],
    see `position_weights`. Raises ValueError if the vocabularies differ."""
    teacher = teacher.to(student.hidden.device)
    if student.head is None or teacher.head is None:
        rows = zip(student.logits(), teacher.logits())
        parts = [_row_kl(ours.log_softmax(-1), theirs.log_softmax(-1)) for ours, theirs in rows]
        kl = torch.cat(parts)
    else:
        kl = token_kl(student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1), student.head, teacher.head)
    if weights is None:
        return student.means(kl)
    return (kl.view(weights.shape) * weights.to(kl.device)).sum(1)


def _row_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each row, [N], of log-probabilities [N, V]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@torch.no_grad()
def top1_agreement(student: ModelOutput, teacher: ModelOutput) -> torch.Tensor:
    """Share of each chunk's counted positions at which both models predict the same token, [B]."""
    teacher = teacher.to(student.hidden.device)
    rows = zip(student.logits(), teacher.logits())
    agree = torch.cat([ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in rows])
    return student.means(agree.float())


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


def heldout_figures(model, batches: Iterable[Batch], teacher_outputs: Sequence[ModelOutput]) -> HeldoutFigures:
    """All three figures of `model` from one forward pass per batch.

    teacher_outputs: what `read_chunks` returned for the teacher on the same batches.
    """
    cross_entropy = []
    kl = []
    agreement = []
    for batch, teacher in zip(batches, teacher_outputs, strict=True):
        output = read_chunks(model, batch)
        cross_entropy += heldout_cross_entropy(output, ids_of(batch)).tolist()
        kl += heldout_kl(output, teacher).tolist()
        agreement += top1_agreement(output, teacher).tolist()
    return HeldoutFigures(cross_entropy, kl, agreement)

"""What a selection minimises: the KL divergence from the teacher, over all tokens or over those
that need recall.

Every objective is a weighted mean of KL(teacher || student) over tokens:

    kl       all tokens of the text
    far_kl   tokens of the text for which the teacher needs far context: its cross-entropy is at
             least FAR_MARGIN nats higher where it sees only the last 1/8 to 1/4 of the sequence
    recall   the answers in documents of associative recall (recall_tasks.py)
    mixture  half kl, half recall, each divided by that of the all-linear student, so that they
             weigh the same

The average over all tokens hardly sees recall, which conversion loses first: few tokens need it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.config import ConfigError
from runtime.data import model_inputs

import torch
from torch.nn.functional import cross_entropy

from distill_model import StudentForCausalLM
from distill_model.losses import token_kl
from heldout import Batch, ModelOutput, counted_of, ids_of, read_chunks
from layer_selection.options import RECALL_OBJECTIVES, RecallOptions
from recall_tasks import associative_recall, encode

FAR_MARGIN = 1.0  # nats
SHORT_CONTEXT = 8  # the short context's length is the sequence's divided by this
MAX_QUERIES = 16  # questions of a document


# ------------------------------------------------------------------------ tokens that need far context
def token_losses(output: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each label, [B, T] in fp32. output: of B x T positions. labels: [B, T]."""
    losses = []
    rows = labels.flatten()
    start = 0
    for logits in output.logits():
        losses.append(cross_entropy(logits, rows[start : start + len(logits)], reduction="none"))
        start += len(logits)
    return torch.cat(losses).view(labels.shape)


@torch.no_grad()
def needs_far_context(teacher: StudentForCausalLM, batch: Batch) -> torch.Tensor:
    """Whether predicting the token after each position needs far context, [B, T] of bool; false at
    the last position, whose next token is unknown, and of each document, if they are read one by
    one.

    batch: of sequences of T tokens, on the teacher's device. The short context: every position is
    also read in a piece of 2 w tokens, w = T // SHORT_CONTEXT, where it stands in the second half.
    """
    ids = ids_of(batch)
    length = ids.shape[1]
    window = max(1, length // SHORT_CONTEXT)
    far = torch.zeros_like(ids, dtype=torch.bool)
    count = (length - 1) // window - 1  # pieces whose labels are all known
    if count < 1:
        return far
    labels = ids[:, window + 1 : window + 1 + count * window]
    full = read_chunks(teacher, batch)
    seen = slice(window, window + labels.shape[1])
    with_all = token_losses(ModelOutput(full.hidden[:, seen], full.head), labels)
    inputs = {"input_ids": ids} if isinstance(batch, torch.Tensor) else batch
    pieces = {}
    for name, tensor in inputs.items():
        windows = tensor[:, : (count + 1) * window].unfold(1, 2 * window, window)  # [B, count, 2 w]
        pieces[name] = windows.flatten(0, 1)
    hidden = read_chunks(teacher, pieces).hidden[:, window:]
    with_few = token_losses(ModelOutput(hidden.reshape(*labels.shape, -1), full.head), labels)
    far[:, seen] = with_few - with_all >= FAR_MARGIN
    return far & counted_of(batch)


# ------------------------------------------------------------------------ documents of recall
def check_settings(known: dict, ours: dict, where: str) -> None:
    """Raises ConfigError, with `where` as its subject, if stored settings are not ours. Those of an
    earlier version may lack the objective kl and the number of sequences, which count as ours."""
    known = {"objective": "kl", "sequences": ours["sequences"]} | known
    for name, value in ours.items():
        there = known.get(name, "unknown")
        if there != value:
            raise ConfigError(f"--output_dir: {where} {name} {there}, not {value}; name another")


def recall_rows(tokenizer, options: RecallOptions, length: int, seed: str) -> Iterator[tuple[list[int], list[bool]]]:
    """Endless rows of documents: (token ids [length], whether the next token belongs to an answer
    [length]). No document is cut; the rest of a row is EOS.

    Raises ValueError if a document is longer than a row.
    """
    rng = random.Random(seed)
    queries = min(options.num_pairs, MAX_QUERIES)
    row: list[int] = []
    answers: list[int] = []
    while True:
        documents = [associative_recall(rng, options.num_pairs, queries, options.num_words) for _ in range(16)]
        for ids, spans in encode(documents, tokenizer):
            if len(ids) + 1 > length:
                raise ValueError(
                    f"--num_pairs: {options.num_pairs} pairs take {len(ids)} tokens, and train.train_seq_len is "
                    f"{length}; lower it"
                )
            if len(row) + len(ids) + 1 > length:
                padding = [tokenizer.eos_token_id] * (length - len(row))
                predicts = [False] * length
                for index in answers:
                    predicts[index - 1] = True
                yield row + padding, predicts
                row = []
                answers = []
            answers += [len(row) + index for span in spans for index in span]
            row += [*ids, tokenizer.eos_token_id]


def take_rows(rows: Iterator, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(Token ids [count, T], whether the next token belongs to an answer [count, T])."""
    drawn = [next(rows) for _ in range(count)]
    ids, predicts = zip(*drawn)
    return torch.tensor(ids, device=device), torch.tensor(predicts, device=device)


# ------------------------------------------------------------------------ measurement
@dataclass(frozen=True)
class HeldoutPart:
    """Sequences, the weights of their tokens, and what the teacher says to them.

    weights: [B, T] on the teacher's device; their sum over all batches is the number of sequences.
    """

    batches: list[Batch]
    weights: list[torch.Tensor]
    teacher_outputs: list[ModelOutput]

    def losses(self, model: StudentForCausalLM) -> list[float]:
        """Weighted sum of KL(teacher || model) of each sequence; their mean is the weighted mean over
        all tokens."""
        losses = []
        for batch, weights, teacher in zip(self.batches, self.weights, self.teacher_outputs):
            output = read_chunks(model, batch)
            hidden, theirs = (x.hidden.flatten(0, 1) for x in (output, teacher))
            kls = token_kl(hidden, theirs, output.head, teacher.head).view(weights.shape)
            losses += (kls * weights).sum(1).tolist()
        return losses


def heldout_part(
    teacher: StudentForCausalLM, batches: list[Batch], selected: list[torch.Tensor], missing: str
) -> HeldoutPart:
    """The part of the selected tokens. selected: [B, T] of bool for each batch. Raises ValueError,
    with the text `missing`, if there are none."""
    total = sum(int(part.sum()) for part in selected)
    if not total:
        raise ValueError(missing)
    sequences = sum(map(len, selected))
    weights = [part.float() * sequences / total for part in selected]
    return HeldoutPart(batches, weights, [read_chunks(teacher, batch) for batch in batches])


class Objective:
    """What a selection minimises, on held-out sequences and in training.

    teacher: on its device. batches: held-out sequences. student: the all-linear one, which
    sets the scale of a mixture. Raises ValueError if no held-out token needs far context, or a
    document of recall is longer than a sequence.
    """

    def __init__(
        self,
        name: str,
        teacher: StudentForCausalLM,
        student: StudentForCausalLM,
        tokenizer,
        batches: list[dict[str, torch.Tensor]],
        recall: RecallOptions,
        seed: int = 0,
    ):
        self.name = name
        self.teacher = teacher
        device = teacher.device
        on_device = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        length = ids_of(on_device[0]).shape[1]
        self.documents = lambda use: recall_rows(tokenizer, recall, length, f"{use} {seed}")
        self.parts: list[HeldoutPart] = []
        if name in ("kl", "mixture"):
            everything = [counted_of(batch) for batch in on_device]
            self.parts.append(heldout_part(teacher, on_device, everything, "there are no held-out tokens"))
        if name == "far_kl":
            far = [needs_far_context(teacher, batch) for batch in on_device]
            missing = "--objective: far_kl: no held-out token needs far context; take another one, or longer sequences"
            self.parts.append(heldout_part(teacher, on_device, far, missing))
        if name in RECALL_OBJECTIVES:
            heldout = self.documents("held out")
            drawn = [take_rows(heldout, len(ids_of(batch)), device) for batch in on_device]
            ids, answers = zip(*drawn)
            self.parts.append(heldout_part(teacher, list(ids), list(answers), "a document has no answer"))
        self.scales = [1.0] * len(self.parts)
        if name == "mixture":
            for i, part in enumerate(self.parts):
                values = part.losses(student)
                self.scales[i] = len(self.parts) * sum(values) / len(values)

    def losses(self, model: StudentForCausalLM) -> list[float]:
        """Of each held-out sequence, in nats (mixture: without a unit); their mean is the objective."""
        by_part = [part.losses(model) for part in self.parts]
        scaled = [[value / scale for value in values] for values, scale in zip(by_part, self.scales)]
        return [sum(values) for values in zip(*scaled)]

    def training_rows(self, parts: list[Batch], draw: str) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """For each micro-batch of a step, of B sequences of text: what to train on in its place, and
        the weights of its tokens [B, T] in fp32. The objective is the sum of weight x KL over the
        step, in which all selected tokens weigh the same, whatever the micro-batch. draw: what the
        documents of recall are drawn by, such as the step.

        recall: B rows of documents, read whole. mixture: as many rows of text as of documents, half
        of B each, rounded up.
        """
        drawn = [self._selected_rows(batch, f"{draw} {i}") for i, batch in enumerate(parts)]
        totals = sum(selected.sum((1, 2)) for _, selected in drawn)
        factors = 1 / (totals.clamp(min=1) * torch.tensor(self.scales, device=totals.device))
        return [(inputs, (selected * factors[:, None, None]).sum(0)) for inputs, selected in drawn]

    def _selected_rows(self, batch: Batch, draw: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What to train on in place of a batch, and by part of the objective the tokens that are
        selected [parts, B, T], bool."""
        ids = ids_of(batch)
        if self.name == "kl":
            return batch, counted_of(batch)[None]
        if self.name == "far_kl":
            return batch, needs_far_context(self.teacher, batch)[None]
        count = len(ids) if self.name == "recall" else -(-len(ids) // 2)
        documents, answers = take_rows(self.documents(f"training {draw}"), count, ids.device)
        if self.name == "recall":
            return {"input_ids": documents}, answers[None]
        text = {name: tensor[:count] for name, tensor in batch.items()}
        rows = {"input_ids": documents, "document_ids": torch.zeros_like(documents, dtype=torch.int32)}
        inputs = {name: torch.cat([tensor, rows[name]]) for name, tensor in model_inputs(text).items()}
        counted = counted_of(text)
        nothing = torch.zeros_like(counted)
        return inputs, torch.stack((torch.cat((counted, nothing)), torch.cat((nothing, answers))))

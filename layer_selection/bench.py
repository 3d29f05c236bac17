"""What layers are measured on: the teacher, the all-linear student, and a fixed set of held-out
sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

from runtime.config import Config, ConfigError, check_cuda_graphs
from runtime.data import LOSS_MASK, load_tokenizer, most_documents, open_chunks_for, read_batch, split_batch
from runtime.teacher_outputs import check_outputs

import torch
from tqdm import tqdm

from convert import load_teacher, load_teacher_config
from distill_model import StudentForCausalLM
from distill_model.student_layers import reads_documents_on_host
from heldout import ModelOutput, heldout_cross_entropy, heldout_kl, ids_of, position_weights, read_chunks
from layer_selection.objective import Objective
from layer_selection.options import RecallOptions, objective_settings
from layer_selection.stage2_runs import check_start
from preflight import notes_on_documents, outputs_key
from stages import compute_dtype, load_initial_student

Figure = TypeVar("Figure")


def heldout_batches(chunks, sequences: int, batch_size: int, missing: str) -> list[dict]:
    """The first `sequences` held-out chunks. Raises ConfigError, beginning with `missing` (the
    option and its value), if the data has no held-out split."""
    if chunks.heldout is None:
        raise ConfigError(f"{missing} has no held-out split; preprocess with --holdout")
    rows = range(min(sequences, len(chunks.heldout)))
    return split_batch(read_batch(chunks.heldout, rows), batch_size)


def heldout_weights(chunks, sequences: int, batch_size: int) -> Sequence[torch.Tensor | None]:
    """The weights of positions of `heldout_batches`, see `position_weights`; None for each batch of
    data without a mask."""
    rows = range(min(sequences, len(chunks.heldout)))
    if LOSS_MASK not in chunks.heldout.column_names:
        return [None] * -(-len(rows) // batch_size)
    return position_weights(read_batch(chunks.heldout, rows)).split(batch_size)


def sequence_kls(
    model: StudentForCausalLM,
    batches,
    teacher_outputs: list[ModelOutput],
    weights: Sequence[torch.Tensor | None],
) -> list[float]:
    """KL(teacher || model) of each sequence of the batches, the mean over its tokens. weights: of
    positions, by batch."""
    kls = []
    for batch, teacher, weight in zip(batches, teacher_outputs, weights, strict=True):
        kls += heldout_kl(read_chunks(model, batch), teacher, weight).tolist()
    return kls


def measure_layer_swaps(
    measure: Callable[[StudentForCausalLM], Figure],
    model: StudentForCausalLM,
    source: StudentForCausalLM,
) -> dict[int, Figure]:
    """Layer -> `measure(model)` with only that layer's attention taken from `source`; `model` is
    unchanged afterwards."""
    figures = {}
    blocks = zip(tqdm(model.model.layers, desc="measuring one layer at a time", unit="layer"), source.model.layers)
    for i, (block, other) in enumerate(blocks):
        own = block.attn
        block.attn = other.attn
        try:
            figures[i] = measure(model)
        finally:
            block.attn = own
    return figures


class Bench:
    """Teacher, all-linear student and held-out sequences of a stage-2 config; the models load when
    first used.

    sequences: how many of the held-out ones. batch_size: of a forward pass. objective: a name of
    `OBJECTIVES`, with its documents of recall. Raises ValueError for data that does not fit the
    teacher or has no held-out split.
    """

    def __init__(
        self,
        cfg: Config,
        sequences: int,
        batch_size: int,
        objective: str = "kl",
        recall: RecallOptions | None = None,
    ):
        self.cfg = cfg
        if cfg.teacher_model.distill_from:
            print("teacher_model.distill_from: layers are selected by their KL to teacher_model.name, not to it")
        self.objective_name = objective
        self.recall = recall or RecallOptions()
        teacher = load_teacher_config(cfg.teacher_model.name)
        self.layers = range(teacher.num_hidden_layers)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(cfg, self.device.type)
        self.tokenizer = load_tokenizer(cfg.teacher_model.name, "teacher_model.name")
        data = cfg.data
        length = cfg.train.train_seq_len
        chunks = open_chunks_for(
            self.tokenizer, teacher.vocab_size, data.cache_dir, length, document_mask=data.document_mask
        )
        for note in notes_on_documents(cfg, chunks):
            print(note)
        self.batches = heldout_batches(chunks, sequences, batch_size, f"data.cache_dir: {data.cache_dir}")
        if cfg.teacher_model.outputs:
            if cfg.teacher_model.distill_from:
                raise ConfigError(
                    "teacher_model.outputs: of teacher_model.distill_from, but layers are selected by their KL to "
                    "teacher_model.name; remove both for the selection"
                )
            check_outputs(cfg.teacher_model.outputs, outputs_key(cfg, chunks))
        self.weights = heldout_weights(chunks, sequences, batch_size)
        self.train = chunks.train
        self.has_documents = chunks.has_documents
        check_cuda_graphs(cfg, self.has_documents and reads_documents_on_host(cfg.student_model.name))

    @cached_property
    def teacher(self) -> StudentForCausalLM:
        teacher = load_teacher(self.cfg.teacher_model.name, self.dtype)
        return teacher.to(self.device).eval().requires_grad_(False)

    @cached_property
    def student(self) -> StudentForCausalLM:
        check_start(self.cfg)
        teacher = None if self.cfg.train.student_init_ckpt else self.teacher
        return load_initial_student(self.cfg, self.dtype, teacher).to(self.device).eval()

    def max_documents(self, rows: int) -> int | None:
        """The most documents of `rows` training sequences; None if they are not read one by one."""
        return most_documents(self.train, rows) if self.has_documents else None

    @property
    def unit(self) -> str:
        """What the objective is called in tables."""
        return "KL" if self.objective_name == "kl" else self.objective_name

    @property
    def num_sequences(self) -> int:
        return sum(len(ids_of(batch)) for batch in self.batches)

    @property
    def settings(self) -> dict:
        """What stored losses must agree in, beside the config."""
        return objective_settings(self.objective_name, self.recall) | {"sequences": self.num_sequences}

    @property
    def num_tokens(self) -> int:
        """That one measurement of the objective reads: a mixture reads as many documents of recall as text."""
        text = sum(ids_of(batch).numel() for batch in self.batches)
        return 2 * text if self.objective_name == "mixture" else text

    @cached_property
    def teacher_outputs(self) -> list[ModelOutput]:
        return [read_chunks(self.teacher, batch) for batch in self.batches]

    @cached_property
    def objective(self) -> Objective:
        return Objective(
            self.objective_name,
            self.teacher,
            self.student,
            self.tokenizer,
            self.batches,
            self.recall,
            self.cfg.train.seed,
        )

    def losses(self, model: StudentForCausalLM) -> list[float]:
        """The objective on each held-out sequence."""
        if self.objective_name == "kl":
            return self.kls(model)
        return self.objective.losses(model)

    def cross_entropies(self, model: StudentForCausalLM) -> list[float]:
        """Mean next-token cross-entropy of each sequence, in nats."""
        losses = []
        for batch, weight in zip(self.batches, self.weights):
            losses += heldout_cross_entropy(read_chunks(model, batch), ids_of(batch), weight).tolist()
        return losses

    def kls(self, model: StudentForCausalLM) -> list[float]:
        """KL(teacher || model) of each sequence, the mean over its tokens, in nats."""
        return sequence_kls(model, self.batches, self.teacher_outputs, self.weights)

"""What is checked and reported before a training run starts: models, data, options without effect,
and the plan.

It reads configs and data, no weights, and writes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runtime.batch_plan import BatchPlan
from runtime.config import (
    Config,
    ConfigError,
    check_cuda_graphs,
    check_kept_layers,
    keys_of_other_stages,
    trained_parts,
)
from runtime.context import RunContext
from runtime.data import (
    LOSS_MASK,
    Chunks,
    DataError,
    data_fingerprint,
    encoded_otherwise,
    load_tokenizer,
    open_chunks_for,
    read_metadata,
)
from runtime.recipes import rates_warning
from runtime.run_folder import EXPORT, zero_stage_of_run
from runtime.teacher_outputs import check_outputs

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from convert import load_teacher_config
from convert.loader import config_fingerprint, weights_fingerprint
from convert_ckpt import student_config
from distill_model import (
    StudentConfig,
    StudentForCausalLM,
    check_calibration,
    check_start_from_teacher,
    check_student,
    get_student_attention_class,
    same_options,
)
from distill_model.fp8 import FP8_DEVICE, FP8_KEY, check_fp8_device
from distill_model.student_layers import reads_documents_on_host
from optim import STATE_BYTES, freeze_parts, parameter_groups
from stages import compute_dtype, use_cuda_graphs
from wrapper import AttentionAlignmentModel

MANY_EPOCHS = 4  # more teach much less than new text would (Muennighoff et al., arXiv 2305.16264)
GIB = 2**30
# What a student and the checkpoint that it starts from must have in common with the teacher.
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def check_run(cfg: Config, plan: BatchPlan, log: Callable[[str], None]) -> Chunks:
    """Checks models and data, logs warnings, and returns the chunks. Raises ValueError for what the
    user can correct."""
    # A missing folder is reported before a model's config is downloaded.
    read_metadata(cfg.data.cache_dir, "data.cache_dir")
    # Before the tokenizer is loaded, whose errors say less about a wrong teacher.
    check_models(cfg)
    for line in options_without_effect(cfg):
        log(line)
    chunks = open_data(cfg, plan)
    if cfg.stage == 2 and cfg.teacher_model.outputs:
        check_outputs(cfg.teacher_model.outputs, outputs_key(cfg, chunks))
    for line in notes_on_data(cfg, plan, chunks):
        log(line)
    if cfg.train.micro_batch_size != "auto" and (warning := calibration_warning(cfg, plan)):
        log(warning)
    return chunks


# ------------------------------------------------------------------------ models
def check_models(cfg: Config) -> None:
    """Raises ValueError if teacher, student and initial checkpoint do not fit together. Reads
    configs, no weights."""
    teacher = load_teacher_config(cfg.teacher_model.name)
    check_kept_layers(cfg, teacher.num_hidden_layers)
    check_student(cfg.student_model.name, cfg.student_model.options, teacher)
    if cfg.stage > 1:
        if cfg.train.student_init_ckpt:
            _check_initial_student(cfg, teacher)
        else:
            kept = len(cfg.student_model.keep_full_attention_layers)
            check_start_from_teacher(cfg.student_model.name, all_kept=kept == teacher.num_hidden_layers)
        _check_trained_parts(cfg, teacher.num_hidden_layers)
    elif cfg.train.calibrate_init:
        check_calibration(cfg.student_model.name)


def _check_initial_student(cfg: Config, teacher: StudentConfig) -> None:
    """Raises ConfigError unless train.student_init_ckpt holds a student of this run's kind and
    teacher."""
    key = f"train.student_init_ckpt: {cfg.train.student_init_ckpt}"
    student = _read_student_config(cfg, key)
    expected = {"student_name": cfg.student_model.name}
    expected |= {name: getattr(teacher, name) for name in SHAPE}
    for name, value in expected.items():
        found = getattr(student, name)
        if found != value:
            raise ConfigError(f"{key} has {name} {found!r}, this run {value!r}; use one that matches")
    options = cfg.student_model.options
    if not same_options(cfg.student_model.name, student.student_options, options):
        raise ConfigError(
            f"{key} has student_options {student.student_options!r}, this run {options!r}; use one that matches"
        )
    kept = set(student.keep_full_attention_layers)
    wanted = set(cfg.student_model.keep_full_attention_layers)
    if cfg.stage == 2 and not kept <= wanted:
        dropped = sorted(kept - wanted)
        raise ConfigError(f"{key} keeps full attention in {sorted(kept)}, of which this run drops {dropped}")
    if cfg.stage == 3 and kept != wanted:
        raise ConfigError(
            f"student_model.keep_full_attention_layers: {sorted(wanted)} must be those of "
            f"{cfg.train.student_init_ckpt}, {sorted(kept)}"
        )


def _check_trained_parts(cfg: Config, num_layers: int) -> None:
    """Raises ConfigError if the parts that are to train are not in the model."""
    kept = len(cfg.student_model.keep_full_attention_layers)
    missing = {"linear_attention": kept == num_layers, "kept_attention": kept == 0}
    parts = trained_parts(cfg.train)
    if all(missing.get(part) for part in parts):
        raise ConfigError(
            f"train.train_only: {', '.join(parts)}: {kept} of {num_layers} layers keep full attention, so this trains "
            "nothing; train other parts"
        )


def check_other_teacher(cfg: Config, tokenizer, vocab_size: int) -> None:
    """Raises ValueError unless teacher_model.distill_from has the tokenizer of teacher_model.name
    and an embedding for each of the student's `vocab_size` ids."""
    name = cfg.teacher_model.distill_from
    key = f"teacher_model.distill_from: {name!r}"
    size = load_teacher_config(name).vocab_size
    other = load_tokenizer(name, "teacher_model.distill_from")
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    differing = sorted(ours.items() ^ theirs.items(), key=lambda item: item[::-1])
    text = differing[0][0] if differing else encoded_otherwise(other, copy.deepcopy(tokenizer.backend_tokenizer))
    if text is not None:
        raise ConfigError(
            f"{key} has another tokenizer than {cfg.teacher_model.name!r} (they differ at {text!r}); "
            "name a teacher with the same one"
        )
    if size < vocab_size:
        raise ConfigError(
            f"{key} has a vocabulary of {size}, fewer than the student's {vocab_size}; name a teacher with as many"
        )


def outputs_key(cfg: Config, chunks: Chunks) -> dict:
    """What stored outputs of the teacher must have been made with: the teacher's config and weights
    (left out where they are not on this machine), tokenizer, data and options."""
    teacher = cfg.teacher_model.distill_from or cfg.teacher_model.name
    key = {
        "teacher_config": config_fingerprint(teacher),
        "teacher_weights": weights_fingerprint(teacher),
        "tokenizer_fingerprint": chunks.metadata["tokenizer_fingerprint"],
        "data": data_fingerprint(chunks.metadata),
        "context_length": chunks.metadata["context_length"],
        "document_mask": chunks.has_documents,
        "top_k": cfg.train.kl_top_k,
        "temperature": cfg.train.kl_temperature,
    }
    return {name: value for name, value in key.items() if value is not None}


def _read_student_config(cfg: Config, key: str) -> StudentConfig:
    """The config of train.student_init_ckpt. Raises ConfigError if there is none, or none of a
    student."""
    folder = Path(cfg.train.student_init_ckpt)
    if not (folder / "config.json").is_file():
        exported = folder / EXPORT
        cure = f"name {exported}" if exported.is_dir() else f"run stage {cfg.stage - 1} first, or name its {EXPORT}"
        raise ConfigError(f"{key} holds no checkpoint; {cure}")
    try:
        return StudentConfig.from_pretrained(cfg.train.student_init_ckpt)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key} has a config.json that cannot be read: {reason}") from None


def calibration_warning(cfg: Config, plan: BatchPlan) -> str | None:
    """A warning if calibration has fewer tokens than inputs to fit, or None.

    The inputs are num_heads x head_dim, of the output projection, or hidden_size, of a gate.
    """
    if not cfg.train.calibrate_init:
        return None
    teacher = load_teacher_config(cfg.teacher_model.name)
    inputs = max(teacher.num_attention_heads * teacher.head_dim, teacher.hidden_size)
    batch = plan.micro_batch_size * plan.seq_len
    tokens = cfg.train.calibrate_init * batch
    if tokens >= inputs:
        return None
    enough = -(-inputs // batch)
    return (
        f"warning: train.calibrate_init: {cfg.train.calibrate_init} is {tokens:,} tokens, fewer than "
        f"the {inputs:,} inputs to fit, so the fit will not generalise beyond them; "
        f"set it to {enough} or more"
    )


# ------------------------------------------------------------------------ options and data
def options_without_effect(cfg: Config) -> list[str]:
    """A line for each option that is set and that this stage ignores."""
    reasons = {"train.gradient_checkpointing": ", which never stores the activations of more than one layer"}
    lines = []
    for name in keys_of_other_stages(cfg):
        lines.append(f"{name}: has no effect in stage {cfg.stage}{reasons.get(name, '')}")
    if cfg.stage == 2 and cfg.train.kd_teacher_use_cache:
        lines.append("train.kd_teacher_use_cache: has no effect, for the teacher reads whole sequences in one pass")
    return lines


def open_data(cfg: Config, plan: BatchPlan) -> Chunks:
    """The chunks, checked against the run.

    The training split is cut to whole batches, so that every step of every epoch has
    train.batch_size sequences; the held-out split is cut to train.eval_batches micro-batches per
    device, unless their size is not chosen yet. Raises DataError.
    """
    folder = cfg.data.cache_dir
    tokenizer = load_tokenizer(cfg.teacher_model.name, "teacher_model.name")
    vocab_size = load_teacher_config(cfg.teacher_model.name).vocab_size
    if cfg.stage == 2 and cfg.teacher_model.distill_from:
        check_other_teacher(cfg, tokenizer, vocab_size)
    chunks = open_chunks_for(
        tokenizer, vocab_size, folder, cfg.train.train_seq_len, document_mask=cfg.data.document_mask
    )
    check_cuda_graphs(cfg, chunks.has_documents and reads_documents_on_host(cfg.student_model.name))
    usable = len(chunks.train) - len(chunks.train) % plan.batch_size
    if not usable:
        raise DataError(
            f"data.cache_dir: {folder} has {len(chunks.train)} chunks, fewer than "
            f"train.batch_size ({plan.batch_size}); preprocess more text or lower it"
        )
    if cfg.train.calibrate_init * plan.micro_batch_size > usable:
        raise DataError(
            f"train.calibrate_init: {cfg.train.calibrate_init} batches of {plan.micro_batch_size} are "
            f"more than the {usable} chunks of {folder}; lower it"
        )
    chunks = replace(chunks, train=chunks.train.select(range(usable)))
    if cfg.stage == 1 and LOSS_MASK in chunks.train.column_names:  # aligns attention at every token
        heldout = chunks.heldout and chunks.heldout.remove_columns(LOSS_MASK)
        chunks = replace(chunks, train=chunks.train.remove_columns(LOSS_MASK), heldout=heldout)
    to_evaluate = with_whole_eval_batches(chunks, cfg, plan)
    return chunks if cfg.train.micro_batch_size == "auto" else to_evaluate


def with_whole_eval_batches(chunks: Chunks, cfg: Config, plan: BatchPlan) -> Chunks:
    """The chunks with as many held-out ones as an evaluation reads, the first. Raises DataError if
    there are fewer than one batch."""
    if chunks.heldout is None:
        return chunks
    per_pass = plan.micro_batch_size * plan.world_size
    batches = min(cfg.train.eval_batches, len(chunks.heldout) // per_pass)
    if not batches:
        raise DataError(
            f"data.cache_dir: {cfg.data.cache_dir} has {len(chunks.heldout)} held-out chunks, fewer than "
            f"one evaluation batch ({per_pass}); preprocess with a larger --holdout"
        )
    return replace(chunks, heldout=chunks.heldout.select(range(batches * per_pass)))


def notes_on_data(cfg: Config, plan: BatchPlan, chunks: Chunks) -> list[str]:
    """What the user should know about the data: how often it is repeated, and an EOS that the
    config does not want."""
    notes = []
    num_chunks = len(chunks.train)
    epochs = plan.epochs(num_chunks)
    sequences = plan.steps * plan.batch_size
    line = f"data: {num_chunks:,} chunks for {sequences:,} sequences: {epochs:.1f} epochs"
    if epochs > MANY_EPOCHS:
        notes.append(
            f"warning: {line}; repeated more than {MANY_EPOCHS} times, text adds little; "
            "preprocess more of it or lower the steps"
        )
    elif epochs > 1:
        notes.append(line)
    notes += notes_on_documents(cfg, chunks)
    notes += notes_on_windows(cfg, chunks)
    adopted_without_eos = chunks.metadata.get("eos_tokens") == 0
    if cfg.train.add_eos_token is False and not adopted_without_eos:
        notes.append(
            "warning: train.add_eos_token: false has no effect; documents end with EOS in "
            f"{cfg.data.cache_dir}, as preprocessing always puts it there; remove the key"
        )
    return notes


def notes_on_documents(cfg: Config, chunks: Chunks) -> list[str]:
    """Whether the documents of a chunk are read one by one, and why not; and a warning if stage 3
    gets short contexts by it."""
    if not chunks.has_documents:
        why = (
            "they do not record where documents begin; preprocess_chunk.py makes ones that do from the tokenised folder"
        )
        if cfg.data.document_mask is False:
            why = "data.document_mask is false"
        return [f"data: chunks are read whole, across their documents: {why}"]
    length = chunks.metadata["context_length"]
    mean = chunks.metadata["documents_in_chunks"]["train"] / chunks.metadata["num_chunks"]
    notes = [f"data: documents are read one by one, {mean:.1f} per chunk on average (data.document_mask)"]
    if cfg.stage == 3 and mean > 2:
        notes.append(
            f"warning: documents have {length / mean:,.0f} of a chunk's {length:,} tokens on average, so stage 3 trains on "
            "contexts of that length; take a corpus of longer documents, or set data.document_mask to false"
        )
    return notes


def notes_on_windows(cfg: Config, chunks: Chunks) -> list[str]:
    """A warning if stage 2 gets contexts that lie within the windows of a student of the teacher's
    weights, whose logits are then the teacher's."""
    student = get_student_attention_class(cfg.student_model.name)
    if cfg.stage != 2 or not student.layer.has_only_teachers_weights:
        return []
    reach = sum(student.value_of(name, cfg.student_model.options) for name in ("window_size", "sink_size"))
    length = chunks.metadata["context_length"]
    whose = "chunks"
    if chunks.has_documents:
        whose = "documents"
        length *= chunks.metadata["num_chunks"] / chunks.metadata["documents_in_chunks"]["train"]
    if length > reach:
        return []
    return [
        f"warning: student_model.options: window and sinks reach {reach} tokens, and {whose} have {length:,.0f} on average: "
        "where they lie within the window the hybrid equals the teacher and learns nothing; take a smaller window_size, or longer text"
    ]


# ------------------------------------------------------------------------ --dry-run
def print_plan(ctx: RunContext) -> None:
    """Logs steps, tokens, parameters, and an estimate of the memory per GPU for weights, gradients,
    optimiser and CUDA graphs. Raises ValueError if the teacher is to run in FP8 and the GPU here
    cannot."""
    cfg, plan = ctx.cfg, ctx.plan
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.teacher_model.precision == "fp8":
        if device == "cuda":
            check_fp8_device(device)
        else:
            ctx.log(f"{FP8_KEY}: the run needs {FP8_DEVICE}")
    teacher_config = load_teacher_config(cfg.teacher_model.name)
    with torch.device("meta"):
        student = StudentForCausalLM(student_config(cfg, teacher_config))
        distilled = cfg.teacher_model.distill_from if cfg.stage == 2 else None
        teacher = StudentForCausalLM(load_teacher_config(distilled) if distilled else teacher_config)
    in_student = student.num_parameters()
    no_teacher = cfg.stage == 3 or (cfg.stage == 2 and cfg.teacher_model.outputs)
    frozen = 0 if no_teacher else _teacher_bytes(cfg, teacher, device)
    frozen_parts = freeze_parts(student, cfg) if cfg.stage > 1 else {}
    model = AttentionAlignmentModel(teacher, student) if cfg.stage == 1 else student
    groups = parameter_groups(model, cfg)
    trained = sum(group.numel for group in groups)
    zero_stage = zero_stage_of_run(cfg, plan.world_size)
    memory = _memory_per_gpu(ctx, model, frozen, zero_stage, device)
    ctx.log(
        f"stage {cfg.stage}: {plan.steps:,} steps x {plan.batch_size} sequences x {plan.seq_len} = "
        f"{plan.tokens:,} tokens"
    )
    per_step = f"{plan.grad_accum} x {plan.micro_batch_size} sequences per step"
    if cfg.train.micro_batch_size == "auto":
        per_step = f"{plan.grad_accum} sequences per step, in micro-batches measured before the first step"
    ctx.log(f"devices: {plan.world_size}, each {per_step}; ZeRO-{zero_stage}")
    ctx.log(f"parameters: {in_student:,} in the student, {trained:,} trained")
    for group in groups:
        ctx.log(f"  {group.numel:>14,}  {group.name}: lr {group.lr:g}, weight decay {group.weight_decay:g}")
    for part, size in frozen_parts.items():
        ctx.log(f"  {size:>14,}  {part}: frozen")
    warning = rates_warning(cfg.stage, in_student, {group.name.partition(",")[0]: group.lr for group in groups})
    if warning:
        ctx.log(warning)
    shares = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    ctx.log(f"memory per GPU: {sum(memory.values()) / GIB:.2f} GiB + activations ({shares})")


def _teacher_bytes(cfg: Config, teacher: StudentForCausalLM, device: str) -> int:
    """Of the weights of a whole teacher; in FP8 those of its MLPs take one byte each."""
    width = compute_dtype(cfg, device).itemsize
    size = teacher.num_parameters() * width
    if cfg.teacher_model.precision == "fp8":
        matrices = [p for block in teacher.model.layers for p in block.mlp.parameters() if p.ndim == 2]
        size -= (width - 1) * sum(p.numel() for p in matrices)
    return size


def _memory_per_gpu(ctx: RunContext, model: nn.Module, frozen: int, zero_stage: int, device: str) -> dict[str, float]:
    """Bytes per device, "cuda" or "cpu", of all but activations. model: what trains. frozen: the
    bytes of a whole teacher."""
    train, world_size = ctx.cfg.train, ctx.world_size
    width = compute_dtype(ctx.cfg, device).itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = trained if ctx.cfg.stage == 1 else sum(p.numel() for p in model.parameters())
    shard_teacher = ctx.cfg.stage == 2 and train.kd_teacher_shard == "always"
    memory = {
        "weights": weights * width / (world_size if zero_stage == 3 else 1),
        "teacher": frozen / (world_size if shard_teacher else 1),
        "gradients": trained * width / (world_size if zero_stage > 1 else 1),
        "optimiser": trained * STATE_BYTES[train.optimizer] / world_size,
    }
    if use_cuda_graphs(ctx.cfg, device, zero_stage, model, ctx.log, shard_teacher, ctx.chunks.has_documents):
        memory["CUDA graphs"] = trained * width  # the gradients that the graphs write
    return memory

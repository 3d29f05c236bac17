"""Building a training stage: its models, the teacher's engine, and the trainer.

A `Stage` is what is trained and how; `build_stage` makes it from a config, `build_trainer` the
trainer from a stage.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

from runtime.checkpoints import UNIVERSAL
from runtime.config import FOR_A_REPLICA, PARTS, Config, trained_parts
from runtime.context import RunContext
from runtime.data import Chunks, model_inputs, most_documents, read_batch, split_batch
from runtime.environment import WANDB_PROJECT
from runtime.run_folder import METRICS
from runtime.teacher_outputs import RowsWithOutputs

import torch
from torch import nn
from tqdm import tqdm
from transformers.initialization import no_init_weights

from convert import load_teacher
from distill_model import DistillationLoss, StudentConfig, StudentForCausalLM
from distill_model.documents import supports_varlen
from distill_model.fp8 import FP8_KEY, check_fp8_device, kl_of, quantize_mlps
from distill_model.student_layers import reads_documents_on_host
from mfu import alignment_flops_per_token, device_peak_flops, training_flops_per_token
from optim import STATE_BYTES, freeze_parts, get_optimizer, get_scheduler, parameter_groups
from wrapper import AttentionAlignmentModel, calibrate

# hf_trainer and transformers' Trainer are imported where they are used: layer selection needs
# neither.

ROOT = Path(__file__).resolve().parent
GIB = 2**30
LARGE_MODEL = 10**9  # parameters from which on CUDA graphs gain little in stages 2 and 3 (docs/performance.md)
# The largest KL(exact teacher || FP8 teacher) accepted, in nats per token: a seventh of the KL that
# the best student of docs/students.md has after stage 2.
FP8_MAX_KL = 0.01
FP8_TOKENS = 2**15  # on which it is measured
Log = Callable[[str], None]


@dataclass
class Stage:
    """What a stage trains and how.

    model: what is trained. trainer_class: a subclass of `hf_trainer.StageTrainer`. flops_per_token:
    of a training step, see mfu.py. teacher: of stage 2, frozen. loss_options: keyword arguments of
    trainer_class. init_report: stage 1's, where each tensor of the students came from, by layer.
    teacher_precision: what `set_teacher_precision` returned.
    """

    model: nn.Module
    trainer_class: type
    flops_per_token: int
    teacher: StudentForCausalLM | None = None
    loss_options: dict = field(default_factory=dict)
    init_report: dict[int, dict] | None = None
    teacher_precision: dict = field(default_factory=dict)


def build_stage(ctx: RunContext) -> Stage:
    """The stage of the config: models with their weights loaded."""
    from transformers import set_seed

    set_seed(ctx.cfg.train.seed)
    dtype = compute_dtype(ctx.cfg, ctx.device)
    if ctx.cfg.teacher_model.precision == "fp8":
        check_fp8_device(ctx.device)
    if ctx.cfg.stage == 1:
        return _build_alignment_stage(ctx, dtype)
    teacher = load_teacher(ctx.cfg.teacher_model.name, dtype) if ctx.cfg.stage == 2 else None
    model = build_student_for_stage2_and_3(ctx.cfg, dtype, ctx.log, teacher)
    if ctx.cfg.stage == 2 and ctx.cfg.teacher_model.outputs:
        teacher = None
    elif ctx.cfg.stage == 2 and ctx.cfg.teacher_model.distill_from:
        teacher = load_kd_teacher(ctx.cfg, dtype, model.config.vocab_size)
    precision = {} if teacher is None else set_teacher_precision(ctx, teacher)
    return replace(logit_stage(ctx.cfg, model, teacher, ctx.log), teacher_precision=precision)


def load_kd_teacher(cfg: Config, dtype: torch.dtype, vocab_size: int) -> StudentForCausalLM:
    """The teacher whose logits stage 2 distils, with the student's vocabulary: rows of another
    teacher's embeddings beyond that are padding, which no token uses."""
    teacher = load_teacher(cfg.teacher_model.distill_from or cfg.teacher_model.name, dtype)
    if teacher.config.vocab_size > vocab_size:
        teacher.resize_token_embeddings(vocab_size, mean_resizing=False)
    return teacher


def _build_alignment_stage(ctx: RunContext, dtype: torch.dtype) -> Stage:
    precision = {}
    model, init_report = build_student_for_stage1(
        ctx.cfg,
        dtype,
        ctx.log,
        recompute=ctx.zero_stage == 3,
        convert_teacher=lambda teacher: precision.update(set_teacher_precision(ctx, teacher)),
    )
    return replace(alignment_stage(ctx.cfg, model, init_report), teacher_precision=precision)


def calibrate_stage(ctx: RunContext, stage: Stage) -> None:
    """Calibrates the students of a run that starts, where train.calibrate_init asks for it."""
    batches = ctx.cfg.train.calibrate_init
    if not batches or ctx.resume is not None:
        return
    fitted = calibrate_students(
        stage.model.to(ctx.device),
        ctx.chunks,
        batches,
        ctx.plan.micro_batch_size,
        ctx.log,
        show_progress=ctx.rank == 0,
    )
    stage.init_report = with_calibrated(stage.init_report, fitted)


def alignment_stage(cfg: Config, model: AttentionAlignmentModel, init_report: dict[int, dict] | None = None) -> Stage:
    """Stage 1 of the given models."""
    from hf_trainer import DistillTrainer

    flops = alignment_flops_per_token(model, cfg.train.train_seq_len)
    return Stage(model, DistillTrainer, flops, init_report=init_report)


def logit_stage(cfg: Config, model: StudentForCausalLM, teacher: StudentForCausalLM | None, log: Log = print) -> Stage:
    """Stage 2 of the given models, without a teacher if its outputs are stored; or stage 3."""
    from hf_trainer import FinetuneTrainer, KDTrainer

    train = cfg.train
    for part, size in freeze_parts(model, cfg).items():
        log(f"frozen: {size:,} parameters of {part}")
    model.set_activation_checkpointing(train.gradient_checkpointing)
    flops = training_flops_per_token(model, train.train_seq_len, teacher)
    if cfg.stage == 3:
        return Stage(model, FinetuneTrainer, flops)
    return Stage(model, KDTrainer, flops, teacher, {"distillation": distillation_loss(cfg)})


def distillation_loss(cfg: Config) -> DistillationLoss:
    """The loss of stage 2."""
    train = cfg.train
    return DistillationLoss(train.kl_temperature, train.kl_weight, train.ce_weight, train.kl, train.kl_top_k)


# ------------------------------------------------------------------------ models
def compute_dtype(cfg: Config, device: str) -> torch.dtype:
    """The dtype of models and activations that train.dtype asks for."""
    use_bf16 = cfg.train.dtype == "bf16" or (cfg.train.dtype == "auto" and device == "cuda")
    return torch.bfloat16 if use_bf16 else torch.float32


def build_student_for_stage1(
    cfg: Config,
    dtype: torch.dtype,
    log: Log = print,
    recompute: bool = False,
    convert_teacher: Callable[[StudentForCausalLM], None] | None = None,
) -> tuple[AttentionAlignmentModel, dict[int, dict]]:
    """The teacher with a linear attention beside each of its attentions; only the linear ones
    train.

    recompute: see `AttentionAlignmentModel`. convert_teacher: called with the teacher once the
    linear attentions have been made from its exact weights. Returns the model and, by layer, the
    fields of the layer's `InitReport`.
    """
    teacher = load_teacher(cfg.teacher_model.name, dtype)
    student, reports = StudentForCausalLM.from_teacher(
        teacher, cfg.student_model.name, student_options=cfg.student_model.options
    )
    init_report = {layer: asdict(report) for layer, report in reports.items()}
    origins = "; ".join(f"{origin}: {' '.join(names)}" for origin, names in init_report[0].items() if names)
    log(f"students: {len(init_report)} x {cfg.student_model.name}; {origins}")
    if convert_teacher is not None:
        convert_teacher(teacher)
    return AttentionAlignmentModel(teacher, student, cfg.train.alignment_loss, recompute), init_report


def build_student_for_stage2_and_3(
    cfg: Config,
    dtype: torch.dtype,
    log: Log = print,
    teacher: StudentForCausalLM | None = None,
) -> StudentForCausalLM:
    """The hybrid: at stage 2 the initial student with the teacher's attention restored in the kept
    layers; at stage 3 the student of stage 2 as it is."""
    kept = cfg.student_model.keep_full_attention_layers
    student = load_initial_student(cfg, dtype, teacher, kept)
    if cfg.stage == 2 and cfg.train.student_init_ckpt:
        student = student.restore_full_attention(teacher, kept)
    config = student.config
    start = "" if cfg.train.student_init_ckpt else "; all weights are the teacher's"
    log(
        f"students: {len(config.linear_layers)} x {config.student_name}; "
        f"full: {config.keep_full_attention_layers}{start}"
    )
    return student


def load_initial_student(
    cfg: Config, dtype: torch.dtype, teacher: StudentForCausalLM | None, kept: Iterable[int] = ()
) -> StudentForCausalLM:
    """The model of train.student_init_ckpt; without it, one that has the weights of `teacher`, and the
    student's attention in all layers but `kept`. Raises RuntimeError if it has others: see
    `check_start_from_teacher`."""
    if cfg.train.student_init_ckpt:
        return StudentForCausalLM.from_pretrained(cfg.train.student_init_ckpt, dtype=dtype)
    config = copy.deepcopy(teacher.config)
    config.student_name = cfg.student_model.name
    config.student_options = dict(cfg.student_model.options)
    config.keep_full_attention_layers = sorted(kept)
    with no_init_weights():  # all weights are loaded below
        student = StudentForCausalLM._from_config(config, dtype=dtype)
    student.tie_weights()
    student.load_state_dict(teacher.state_dict())
    return student


def first_rows(split, count: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    """A batch of the first chunks of a split, at most `count`."""
    batch = read_batch(split, range(min(count, len(split))))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def set_teacher_precision(ctx: RunContext, teacher: StudentForCausalLM) -> dict:
    """Converts the teacher to teacher_model.precision and moves it to the device, for fp8; logs and
    returns what that changes. {} for exact.

    Measured on held-out chunks, or on training chunks where there are none, the same ones on every
    rank. Raises ValueError if the change is larger than FP8_MAX_KL, or FP8 is not supported.
    """
    if ctx.cfg.teacher_model.precision == "exact":
        return {}
    heldout, train = ctx.chunks.heldout, ctx.cfg.train
    split, name = (ctx.chunks.train, "training") if heldout is None else (heldout, "held-out")
    batch = model_inputs(first_rows(split, max(1, FP8_TOKENS // train.train_seq_len), ctx.device))
    tokens = batch["input_ids"].numel()
    kl = kl_of(quantize_mlps, teacher.to(ctx.device).eval(), split_batch(batch, ctx.plan.micro_batch_size))
    measured = f"KL(exact || fp8) is {kl:.3g} nats per token on {tokens:,} {name} tokens"
    if not kl <= FP8_MAX_KL:
        raise ValueError(f"{FP8_KEY}: {measured}, more than {FP8_MAX_KL}; set exact")
    ctx.log(f"{FP8_KEY}: {measured}; up to {FP8_MAX_KL} is accepted")
    return {"precision": "fp8", "kl": kl, "largest_kl": FP8_MAX_KL, "tokens": tokens, "split": name}


def calibrate_students(
    model: AttentionAlignmentModel,
    chunks: Chunks,
    batches: int,
    batch_size: int,
    log: Log = print,
    show_progress: bool = True,
) -> dict[int, list[str]]:
    """Fits what `wrapper.calibrate` fits to the first training chunks, the same ones on every rank.

    Logs the alignment loss before and after, on as many held-out chunks. Returns the names of the
    fitted parameters of each layer's student.
    """
    device = next(model.parameters()).device

    def alignment_loss(parts: list[dict], when: str) -> float:
        bar = tqdm(parts, desc=f"alignment loss {when}", unit="batch", disable=not show_progress)
        return sum(model(**part)["loss"].item() * len(part["input_ids"]) for part in bar) / rows_in(parts)

    def rows_in(parts: list[dict]) -> int:
        return sum(len(part["input_ids"]) for part in parts)

    def first_parts(split, count: int) -> list[dict]:
        return split_batch(first_rows(split, count, device), batch_size)

    parts = first_parts(chunks.train, batches * batch_size)
    length = parts[0]["input_ids"].shape[1]
    if chunks.heldout is None:
        test = parts
        where = "the same tokens, because there are no held-out chunks"
    else:
        test = first_parts(chunks.heldout, rows_in(parts))
        where = f"{rows_in(test) * length:,} held-out tokens"
    with torch.no_grad():
        before = alignment_loss(test, "before")
        fitted = set(calibrate(model, parts, show=show_progress))
        after = alignment_loss(test, "after")
    log(f"calibrated on {rows_in(parts) * length:,} tokens: alignment loss {before:.4g} -> {after:.4g} on {where}")
    names = {}
    for layer, block in enumerate(model.model.layers):
        parameters = block.attn.student_attn.named_parameters()
        names[layer] = [name for name, p in parameters if p in fitted]
    return names


def with_calibrated(init_report: dict[int, dict], fitted: dict[int, list[str]]) -> dict[int, dict]:
    """The report after calibration: `fitted` tensors are in "calibrated" alone."""
    updated = {}
    for layer, report in init_report.items():
        updated[layer] = dict(report, calibrated=fitted[layer])
        for origin in ("copied", "transformed", "fresh"):
            updated[layer][origin] = [name for name in report[origin] if name not in fitted[layer]]
    return updated


# ------------------------------------------------------------------------ engines
def deepspeed_config(name: str) -> dict:
    """A new copy of ds_configs/<name>.json."""
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def student_engine_config(ctx: RunContext) -> dict:
    """DeepSpeed's config of the model that trains."""
    config = deepspeed_config(f"stage_{ctx.zero_stage}")
    if ctx.cfg.stage == 1 or len(trained_parts(ctx.cfg.train)) < len(PARTS):
        # Stage 1 calls the modules of a block one by one: ZeRO-3 cannot gather a block when it is
        # called. And below frozen embeddings the first block's input has no gradient, which would
        # tell ZeRO-3 that the block's backward pass is over.
        config["zero_optimization"].pop("leaf_module", None)
    if ctx.resume and ctx.resume.parent.name == UNIVERSAL:
        config["checkpoint"] = {"load_universal": True}
    return config


def use_cuda_graphs(
    cfg: Config,
    device: str,
    zero_stage: int,
    model: nn.Module,
    log: Log = print,
    sharded_teacher: bool = False,
    has_documents: bool = False,
) -> bool:
    """Whether the passes of a training step run as CUDA graphs. Logs the reason where they cannot be
    used on this GPU and train.cuda_graphs is true, or documents are the reason. has_documents:
    whether documents are read one by one; the passes then need `max_documents`."""
    mode = cfg.train.cuda_graphs
    if not mode or device != "cuda":
        return False
    size = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))  # FP8 weights are buffers
    if mode == "auto" and cfg.stage != 1 and size >= LARGE_MODEL:
        return False
    reason = of_documents = None
    if zero_stage == 3:
        reason = "ZeRO-3 gathers weights during a pass"
    elif sharded_teacher:
        reason = "the head of a sharded teacher is gathered into new memory for each pass"
    elif model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        reason = "RoPE of this type reads lengths on the host"
    elif has_documents:
        reason = of_documents = reason_of_documents(model.config, compute_dtype(cfg, device))
    if of_documents or reason and mode is True:
        log(f"train.cuda_graphs: not used, for {reason}")
    return reason is None


def reason_of_documents(config: StudentConfig, dtype: torch.dtype) -> str | None:
    """Why a model of this config and dtype cannot read documents in CUDA graphs, or None if it can."""
    if config.linear_layers and reads_documents_on_host(config.student_name):
        return f"{config.student_name} reads documents on the host"
    if not supports_varlen(torch.device("cuda"), dtype, config.head_dim):
        return "softmax attention reads documents on the host, in this dtype or on this GPU"
    return None


def bytes_of(model: nn.Module) -> int:
    """Of parameters and buffers; FP8 weights are buffers."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def shard_teacher(cfg: Config, size: int, device: str, world_size: int) -> tuple[bool, str]:
    """Whether to shard a teacher of `size` bytes, and why. All ranks call it together and decide
    alike."""
    mode = cfg.train.kd_teacher_shard
    if mode != "auto":
        return mode == "always", f"kd_teacher_shard is {mode}"
    if cfg.train.kd_teacher_offload == "cpu":
        return True, "kd_teacher_offload is cpu"
    if world_size == 1:
        return False, "there is one process"
    if device != "cuda":
        return False, "memory is shared by the processes of a CPU machine"
    least = torch.tensor(torch.cuda.mem_get_info()[0], device="cuda")
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    free = least.item()
    # A student of the teacher's size takes weights and gradients in the same dtype, and its shard
    # of the optimiser's states.
    need = 3 * size + size // 2 * STATE_BYTES[cfg.train.optimizer] // world_size
    return need > 0.7 * free, f"student and teacher take {need / GIB:.1f} of {free / GIB:.1f} GiB free"


def teacher_engine_config(
    cfg: Config,
    teacher: StudentForCausalLM,
    device: str,
    world_size: int,
    log: Log,
) -> dict | None:
    """DeepSpeed's config of a teacher that is sharded with ZeRO-3, or None where every device holds
    a replica."""
    size = bytes_of(teacher)
    shard, why = shard_teacher(cfg, size, device, world_size)
    log(f"teacher: {'sharded with ZeRO-3' if shard else 'replicated'} ({size / GIB:.2f} GiB; {why})")
    if not shard:
        return None
    if cfg.teacher_model.precision == "fp8":
        raise ValueError(f"{FP8_KEY} needs a replica of the teacher on every GPU; {FOR_A_REPLICA}")
    config = deepspeed_config("stage_2_teacher")
    config["train_micro_batch_size_per_gpu"] = cfg.train.micro_batch_size
    config["bf16"]["enabled"] = teacher.dtype == torch.bfloat16
    if cfg.train.kd_teacher_offload == "cpu":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return config


# ------------------------------------------------------------------------ the trainer
def training_arguments(ctx: RunContext):
    """transformers' TrainingArguments for the run.

    Models must exist before: with a ZeRO-3 config in them, every model built later is sharded while
    it is being built.
    """
    from transformers import TrainingArguments

    train, plan = ctx.cfg.train, ctx.plan
    has_heldout = ctx.chunks.heldout is not None
    return TrainingArguments(
        output_dir=str(ctx.output_dir),
        run_name=str(ctx.output_dir),
        report_to="none",  # W&B has a callback of its own
        deepspeed=student_engine_config(ctx),
        use_cpu=ctx.device == "cpu",
        bf16=compute_dtype(ctx.cfg, ctx.device) == torch.bfloat16,
        seed=train.seed,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.grad_accum,
        max_grad_norm=train.max_grad_norm,
        logging_steps=min(train.logging_steps, plan.every(None)),
        logging_first_step=True,
        save_strategy="steps",
        save_steps=plan.every(train.save_steps),
        save_total_limit=train.save_total_limit,
        eval_strategy="steps" if has_heldout else "no",
        eval_steps=plan.every(train.eval_steps),
        eval_on_start=has_heldout and ctx.resume is None,
        logging_nan_inf_filter=False,  # it would hide the NaN that ends the run
        dataloader_drop_last=True,
        # A SIGTERM to all processes of a job would end the workers, and the run with them. Reading
        # a batch takes less than a millisecond.
        dataloader_num_workers=0,
        dataloader_pin_memory=ctx.device == "cuda",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=False,
    )


def training_rows(cfg: Config, rows, split: str = "train"):
    """The rows of a split of chunks as `collate` takes them, with the teacher's outputs if those are
    stored."""
    rows = rows.with_format("numpy")
    if cfg.stage != 2 or not cfg.teacher_model.outputs:
        return rows
    return RowsWithOutputs(rows, Path(cfg.teacher_model.outputs), split)


def build_trainer(ctx: RunContext, stage: Stage):
    """The Trainer of a stage. All ranks call it together."""
    from hf_trainer import FrozenTeacher, Throughput, Wandb

    cfg, plan, chunks = ctx.cfg, ctx.plan, ctx.chunks
    for group in parameter_groups(stage.model, cfg):
        ctx.log(
            f"optimiser: {group.numel:,} parameters of {group.name}: lr {group.lr:g}, "
            f"weight decay {group.weight_decay:g}"
        )
    if ctx.report_to_wandb:
        os.environ.setdefault("WANDB_PROJECT", WANDB_PROJECT)
        os.environ.setdefault("WANDB_DIR", str(ctx.output_dir))  # offline runs are kept in the run folder
    args = training_arguments(ctx)
    teacher_config = None
    if stage.teacher is not None:
        teacher_config = teacher_engine_config(cfg, stage.teacher, ctx.device, ctx.world_size, ctx.log)
    sharded = teacher_config is not None
    documents = chunks.has_documents
    graphs = use_cuda_graphs(cfg, ctx.device, ctx.zero_stage, stage.model, ctx.log, sharded, documents)
    options = dict(stage.loss_options)
    most = None
    if graphs and documents:
        splits = [split for split in (chunks.train, chunks.heldout) if split is not None]
        most = max(most_documents(split, plan.micro_batch_size) for split in splits)
        options["max_documents"] = most
        ctx.log(f"CUDA graphs: a micro-batch has at most {most} documents; each pass makes room for them")
    if stage.teacher is not None:
        options["teacher"] = FrozenTeacher(stage.teacher, args.device, teacher_config, graphs, most)
    peak = device_peak_flops(ctx.device, compute_dtype(cfg, ctx.device))
    total_peak = None if peak is None else peak * ctx.world_size
    if peak is not None:
        name = torch.cuda.get_device_name()
        ctx.log(f"MFU: relative to {peak / 1e12:g} TFLOP/s per GPU, the dense bf16 peak of {name}")
    return stage.trainer_class(
        model=stage.model,
        args=args,
        train_dataset=training_rows(cfg, chunks.train),
        eval_dataset=chunks.heldout and training_rows(cfg, chunks.heldout, "heldout"),
        make_optimizer=lambda model: get_optimizer(model, cfg),
        make_scheduler=lambda optimizer: get_scheduler(optimizer, cfg, plan),
        callbacks=[Wandb()] if ctx.report_to_wandb else None,
        metrics_path=ctx.output_dir / METRICS,
        throughput=Throughput(plan.tokens_per_step, stage.flops_per_token, total_peak),
        facts=ctx.checkpoint_facts,
        stop=ctx.stop,
        save_minutes=cfg.train.save_minutes,
        watchdog=ctx.watchdog,
        cuda_graphs=graphs,
        **options,
    )

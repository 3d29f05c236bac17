"""Trains one stage from one YAML file, on one or many processes, on GPUs or a CPU.

    deepspeed train.py --cfg configs/qwen2.5_1.5b_gdn_v4/stage1.yaml     # all GPUs of this machine
    python train.py --cfg configs/quickstart/stage1.yaml train.lr=1e-3    # one process; overrides after the file
    python train.py --cfg configs/quickstart/stage2.yaml --dry-run        # steps, tokens, parameters, memory; then stops

Stage 1 aligns attention outputs, stage 2 distils the teacher's logits, stage 3 finetunes on long context. The result is
`<output_dir>/converted-hf/`, a Hugging Face folder that the next stage starts from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.batch_plan import BatchPlan, batch_plan
from runtime.checkpoints import (
    PARTIAL,
    UNIVERSAL,
    CheckpointError,
    checkpoints,
    read_index,
    step_of,
    universal_checkpoint,
)
from runtime.command import run_main
from runtime.config import Config, ConfigError, check_kept_layers, keys_of_other_stages, load_config
from runtime.data import (
    Chunks,
    DataError,
    data_fingerprint,
    load_tokenizer,
    open_chunks,
    open_chunks_for,
)
from runtime.environment import (
    WANDB_PROJECT,
    init_distributed,
    set_up_device,
    set_up_process,
    wandb_wanted,
)
from runtime.files import FolderLockedError, atomic_write_text, locked, one_line
from runtime.guard import REQUEUE, NonFiniteError, StopSignals, Watchdog
from runtime.run_folder import (
    EXPORT,
    INIT_REPORT,
    METRICS,
    check_run_folder,
    is_finished,
    record_run,
    resume_point,
)

ROOT = Path(__file__).resolve().parent
OPTIMIZER_BYTES = {
    "adamw": 12,
    "adamw_8bit": 6,
}  # a parameter: an fp32 master copy, and two moments in fp32 or 8 bits
MANY_EPOCHS = 4  # beyond which repeated text teaches much less than new text (Muennighoff et al., arXiv 2305.16264)
GROUP_OF_8_BITS = (
    2**30
)  # elements; ZeRO-1 and 2 make one tensor of a group, and bitsandbytes' kernels on a GPU count in 32 bits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", required=True, help="YAML file of the stage")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do and need, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="come after the file")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world_size = set_up_process()
    log = partial(print, flush=True) if rank == 0 else lambda *_: None
    with StopSignals() as stop, failures_in_one_line(rank, world_size):
        try:
            prepared = prepare(args, rank, world_size)
        except ValueError as error:
            sys.exit(f"train.py: error: {error}")
        if prepared is None:
            return
        cfg, plan, chunks, report = prepared
        device = set_up_device()
        init_distributed(device, cfg.train.hang_minutes)
        with run_lock(cfg, rank):
            resume = resume_point(cfg, log)
            if resume is None or step_of(resume) < plan.steps:
                with memory_advice(cfg, plan):
                    train_stage(cfg, plan, chunks, device, report, resume, stop, log)
            if rank == 0:
                export(cfg)
        import torch

        torch.distributed.destroy_process_group()


def prepare(
    args: argparse.Namespace, rank: int = 0, world_size: int = 1
) -> tuple[Config, BatchPlan, Chunks, bool] | None:
    """All that can be checked before the ranks meet; writes nothing. Returns (config, batch plan,
    chunks, whether to report to W&B), or None where there is nothing to train. Raises ValueError,
    of one line, for what the user can mend."""
    log = partial(print, flush=True) if rank == 0 else lambda *_: None
    cfg = load_config(args.cfg, args.overrides)
    plan = batch_plan(cfg, world_size)
    check_run_folder(cfg)
    report = wandb_wanted(cfg.train.report_to)
    if cfg.train.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; install it or say adamw"
        )
    if is_finished(cfg, plan.steps) and not args.dry_run:
        log(f"{cfg.train.output_dir}: this run is finished; its result is {cfg.train.output_dir}/{EXPORT}")
        return None
    open_chunks(cfg.data.cache_dir, cfg.train.train_seq_len)  # names a missing folder before a model's config is read
    check_models(cfg)  # says more of a wrong teacher than its tokenizer can
    for line in options_without_effect(cfg):
        log(line)
    chunks = open_data(cfg, plan)
    for line in notes_on_data(cfg, plan, chunks):
        log(line)
    if warning := calibration_warning(cfg):
        log(warning)
    if args.dry_run:
        print_plan(cfg, plan, log)
        return None
    return cfg, plan, chunks, report


def train_stage(
    cfg: Config,
    plan: BatchPlan,
    chunks: Chunks,
    device: str,
    report: bool,
    resume: Path | None,
    stop: StopSignals,
    log,
) -> None:
    """Trains from `resume`, a checkpoint, or from the start. After a signal it exits with REQUEUE,
    its checkpoint saved."""
    rank, output = int(os.environ["RANK"]), Path(cfg.train.output_dir)
    facts = {
        "world_size": plan.world_size,
        "zero_stage": zero_stage(cfg, plan.world_size),
        "data": data_fingerprint(chunks.metadata),
    }
    source = loadable(cfg, resume, facts, log)
    with Watchdog(60 * cfg.train.hang_minutes) as watchdog:
        guards = {
            "stop": stop,
            "save_minutes": cfg.train.save_minutes,
            "watchdog": watchdog,
            "facts": facts,
        }
        try:
            trainer = build_trainer(cfg, plan, chunks, device, report, source, guards, log)
        except ValueError as error:
            raise ConfigError(one_line(error)) from error
        if rank == 0:
            step = step_of(resume) if resume else 0
            record_run(cfg, ROOT, step, world_size=plan.world_size, device=device, tokens=plan.tokens)
            if cfg.stage == 1 and not resume:  # a run that goes on has not calibrated again
                atomic_write_text(output / INIT_REPORT, json.dumps(trainer.model.init_report, indent=1))
            if resume:
                log(f"going on from {resume}")
        trainer.train(resume_from_checkpoint=str(source) if source else None)
    if trainer.guard.stopped:
        step = trainer.state.global_step
        why = trainer.guard.stopped
        log(f"{why}: stopped at step {step} of {plan.steps}; checkpoint-{step} is whole; the same command goes on")
        sys.exit(REQUEUE)
    if cfg.stage == 1 and trainer.layer_errors:
        log(trainer.worst_layers())


def export(cfg: Config) -> None:
    """On one rank alone; the others may have ended."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from convert_ckpt import export_checkpoint

    unset_hf_deepspeed_config()  # under ZeRO-3 a new model would be sharded over all ranks as long as training's config is set
    output = Path(cfg.train.output_dir) / EXPORT
    export_checkpoint(cfg, checkpoints(Path(cfg.train.output_dir))[-1], output)
    print(f"Stage {cfg.stage} is done: {output}", flush=True)


# ------------------------------------------------------------------------------------------------ faults
@contextmanager
def failures_in_one_line(rank: int, world_size: int):
    """Ends the process with one line for what the user can mend, with a traceback and one line that
    names the rank for the rest."""
    who = f"rank {rank} of {world_size} on {socket.gethostname()}"
    try:
        yield
    except NonFiniteError as error:
        sys.exit(f"train.py: error: {error}" if rank == 0 else 1)  # all ranks raise the same
    except (ConfigError, DataError, FolderLockedError, CheckpointError, OSError) as error:
        sys.exit(f"train.py: error: {who}: {one_line(error)}")
    except Exception as error:
        if re.search("Connection (closed|reset) by peer", str(error)):
            sys.exit(f"train.py: {who}: another rank ended first; its own line says why")
        if "No space left" in str(error):
            sys.exit(f"train.py: error: {who}: {one_line(error)}")
        traceback.print_exc()
        sys.exit(f"train.py: {who} failed: {type(error).__name__}: {one_line(error)}")


@contextmanager
def memory_advice(cfg: Config, plan: BatchPlan):
    """Turns an exhausted GPU into one line that names the knobs which are still free, the cheapest
    first."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        train = cfg.train
        fresh = not checkpoints(Path(train.output_dir))  # a run that goes on keeps its optimiser's states
        knobs = {
            f"train.micro_batch_size below {train.micro_batch_size}, which changes no result": train.micro_batch_size
            > 1,
            "train.cuda_graphs=false, which changes no result": train.cuda_graphs
            and zero_stage(cfg, plan.world_size) < 3,
            "train.optimizer=adamw_8bit": train.optimizer == "adamw" and fresh,
            "train.gradient_checkpointing=mlp": cfg.stage > 1 and not train.gradient_checkpointing,
            "train.gradient_checkpointing=true": cfg.stage > 1 and train.gradient_checkpointing is not True,
            "train.kd_teacher_shard=always": cfg.stage == 2
            and train.kd_teacher_shard != "always"
            and plan.world_size > 1,
            "train.kd_teacher_offload=cpu": cfg.stage == 2 and train.kd_teacher_offload == "none",
            "train.zero_stage=3": cfg.stage > 1
            and zero_stage(cfg, plan.world_size) < 3
            and plan.world_size > 1
            and fresh,
            "more GPUs": True,
        }
        free = "; ".join(knob for knob, helps in knobs.items() if helps)
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        raise ConfigError(
            f"out of GPU memory{f' ({wanted[1]} more were wanted)' if wanted else ''}; try {free}"
        ) from None


@contextmanager
def run_lock(cfg: Config, rank: int):
    """Holds the run folder on rank 0; the others go on once it is held."""
    import torch.distributed as dist

    folder = Path(cfg.train.output_dir)
    with locked(folder / ".lock", f"train.output_dir: {folder}") if rank == 0 else nullcontext():
        if rank == 0:
            for left in (PARTIAL, UNIVERSAL):  # of a process that was killed
                shutil.rmtree(folder / left, ignore_errors=True)
        dist.barrier()
        yield


def loadable(cfg: Config, resume: Path | None, facts: dict, log) -> Path | None:
    """`resume` as this run's processes can load it: after a change of their number in DeepSpeed's
    universal format. Raises ConfigError if the run cannot go on from it."""
    if resume is None:
        return None
    theirs = read_index(resume)
    if theirs["data"] != facts["data"]:
        raise ConfigError(
            f"data.cache_dir: has other data than {resume} was trained on; make that again, or name another "
            "train.output_dir"
        )
    if theirs["world_size"] == facts["world_size"]:
        return resume
    change = f"{theirs['world_size']} processes saved {resume.name}, {facts['world_size']} go on from it"
    if cfg.train.optimizer == "adamw_8bit":
        raise ConfigError(
            f"{change}: with train.optimizer adamw_8bit, DeepSpeed's universal checkpoint cannot cut the states; start "
            f"{theirs['world_size']} processes"
        )
    if facts["zero_stage"] == 3 and cfg.stage == 1:
        raise ConfigError(
            f"{change}: with train.zero_stage 3, stage 1's frozen weights are spread over the ranks, which "
            f"DeepSpeed's universal checkpoint leaves out; start {theirs['world_size']} processes"
        )
    log(f"{change}: converting it to DeepSpeed's universal format")
    return universal_checkpoint(resume)


# ------------------------------------------------------------------------------------------------ before a model is built
def notes_on_data(cfg: Config, plan: BatchPlan, chunks: Chunks) -> list[str]:
    """What a user should know of the data before the run: how often it is repeated, and EOS that
    was not wanted."""
    notes = []
    num_chunks = len(chunks.train)
    epochs = plan.epochs(num_chunks)
    line = f"data: {num_chunks:,} chunks for {plan.steps * plan.batch_size:,} sequences: {epochs:.1f} epochs"
    if epochs > MANY_EPOCHS:
        cure = "preprocess more of it or lower the steps"
        notes.append(f"warning: {line}; repeated more than {MANY_EPOCHS} times, text adds little; {cure}")
    elif epochs > 1:
        notes.append(line)
    adopted_without_eos = chunks.metadata.get("eos_tokens") == 0
    if cfg.train.add_eos_token is False and not adopted_without_eos:
        notes.append(
            f"warning: train.add_eos_token: false has no effect; documents end with EOS in {cfg.data.cache_dir}, "
            "as preprocessing always puts it there; remove the key"
        )
    return notes


def options_without_effect(cfg: Config) -> list[str]:
    """A line for each option that is set and that this stage has no use for."""
    lines = [f"{name}: has no effect in stage {cfg.stage}" for name in keys_of_other_stages(cfg)]
    if cfg.stage == 1 and cfg.train.gradient_checkpointing:
        lines.append(
            "train.gradient_checkpointing: has no effect in stage 1, which never stores more than one layer's activations"
        )
    if cfg.stage == 2 and cfg.train.kd_teacher_use_cache:
        lines.append("train.kd_teacher_use_cache: has no effect, for the teacher reads each sequence once, as a whole")
    return lines


def open_data(cfg: Config, plan: BatchPlan) -> Chunks:
    """The chunks, checked against the run. The training part is cut to whole batches, so that no
    step of any epoch is smaller than train.batch_size; the held-out part to train.eval_batches
    micro-batches a device."""
    from convert import load_teacher_config

    tokenizer = load_tokenizer(cfg.teacher_model.name, "teacher_model.name")
    vocab_size = load_teacher_config(cfg.teacher_model.name).vocab_size
    chunks = open_chunks_for(tokenizer, vocab_size, cfg.data.cache_dir, cfg.train.train_seq_len)
    whole = len(chunks.train) - len(chunks.train) % plan.batch_size
    if not whole:
        raise DataError(
            f"data.cache_dir: {cfg.data.cache_dir} has {len(chunks.train)} chunks, fewer than "
            f"train.batch_size ({plan.batch_size}); preprocess more text or lower it"
        )
    if cfg.train.calibrate_init * plan.micro_batch_size > whole:
        raise DataError(
            f"train.calibrate_init: {cfg.train.calibrate_init} batches of {plan.micro_batch_size} are more than the {whole} chunks "
            f"of {cfg.data.cache_dir}; lower it"
        )
    heldout = chunks.heldout
    if heldout is not None:
        per_pass = plan.micro_batch_size * plan.world_size
        batches = min(cfg.train.eval_batches, len(heldout) // per_pass)
        if not batches:
            raise DataError(
                f"data.cache_dir: {cfg.data.cache_dir} has {len(heldout)} held-out chunks, fewer than one "
                f"evaluation batch ({per_pass}); preprocess with a larger --holdout"
            )
        heldout = heldout.select(range(batches * per_pass))
    return Chunks(chunks.train.select(range(whole)), heldout, chunks.metadata)


def check_models(cfg: Config) -> None:
    """Raises ValueError if teacher, student and initial checkpoint cannot go together. Reads
    configs, no weights."""
    from huggingface_hub.errors import StrictDataclassError

    from convert import load_teacher_config
    from distill_model import StudentConfig, check_calibration, check_student, same_options

    teacher = load_teacher_config(cfg.teacher_model.name)
    check_kept_layers(cfg, teacher.num_hidden_layers)
    check_student(cfg.student_model.name, cfg.student_model.options, teacher)
    if cfg.stage == 1:
        if cfg.train.calibrate_init:
            check_calibration(cfg.student_model.name)
        return
    key = f"train.student_init_ckpt: {cfg.train.student_init_ckpt}"
    if not (Path(cfg.train.student_init_ckpt) / "config.json").is_file():
        exported = Path(cfg.train.student_init_ckpt) / EXPORT
        cure = f"name {exported}" if exported.is_dir() else f"run stage {cfg.stage - 1} first"
        raise ConfigError(f"{key} holds no checkpoint; {cure}")
    try:
        student = StudentConfig.from_pretrained(cfg.train.student_init_ckpt)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{key} has a config.json that cannot be read: {' '.join(str(error).split())}") from None
    shape = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )
    for name, ours in (
        ("student_name", cfg.student_model.name),
        *((name, getattr(teacher, name)) for name in shape),
    ):
        if getattr(student, name) != ours:
            raise ConfigError(
                f"{key} has {name} {getattr(student, name)!r}, this run {ours!r}; use one of its own kind"
            )
    if not same_options(cfg.student_model.name, student.student_options, cfg.student_model.options):
        raise ConfigError(
            f"{key} has student_options {student.student_options!r}, this run {cfg.student_model.options!r}; use one of its own kind"
        )
    kept, wanted = (
        set(student.keep_full_attention_layers),
        set(cfg.student_model.keep_full_attention_layers),
    )
    if cfg.stage == 2 and not kept <= wanted:
        raise ConfigError(
            f"{key} keeps full attention in {sorted(kept)}, of which this run drops {sorted(kept - wanted)}"
        )
    if cfg.stage == 3 and kept != wanted:
        raise ConfigError(
            f"student_model.keep_full_attention_layers: {sorted(wanted)} must be those of "
            f"{cfg.train.student_init_ckpt}, {sorted(kept)}"
        )


# ------------------------------------------------------------------------------------------------ the models
def build_student_for_stage1(cfg: Config, dtype, log=print):
    """The teacher with a linear twin beside every attention; only the twins train."""
    from convert import load_teacher
    from distill_model import StudentForCausalLM
    from wrapper import AttentionAlignmentModel

    teacher = load_teacher(cfg.teacher_model.name, dtype)
    student, reports = StudentForCausalLM.from_teacher(
        teacher, cfg.student_model.name, student_options=cfg.student_model.options
    )
    parts = "; ".join(f"{kind}: {' '.join(names)}" for kind, names in vars(reports[0]).items() if names)
    log(f"students: {len(reports)} x {cfg.student_model.name}; {parts}")
    model = AttentionAlignmentModel(teacher, student, cfg.train.alignment_loss, recompute=cfg.train.zero_stage == 3)
    model.init_report = {layer: vars(report) for layer, report in reports.items()}
    return model


def calibrate_students(model, chunks: Chunks, batches: int, batch_size: int, log=print) -> None:
    """Fits decay and output projections of the students to the first training chunks, the same on
    every rank, and says so in `model.init_report`. Reports the alignment loss before and after, on
    as many held-out chunks."""
    import torch
    from tqdm import tqdm

    from wrapper import calibrate

    show = os.environ.get("RANK", "0") == "0"
    device = next(model.parameters()).device

    def rows(split, count):
        return torch.as_tensor(split[: min(count, len(split))]["input_ids"], device=device, dtype=torch.long)

    def loss(ids, when):
        parts = tqdm(ids.split(batch_size), desc=f"alignment loss {when}", unit="batch", disable=not show)
        return sum(model(part)["loss"].item() * len(part) for part in parts) / len(ids)

    ids = rows(chunks.train, batches * batch_size)
    test = ids if chunks.heldout is None else rows(chunks.heldout, len(ids))
    with torch.no_grad():
        before = loss(test, "before")
        fitted = set(calibrate(model, ids.split(batch_size), show=show))
        after = loss(test, "after")
    for layer, block in enumerate(model.model.layers):
        report = model.init_report[layer]
        report["calibrated"] = [name for name, p in block.attn.student_attn.named_parameters() if p in fitted]
        for kind in ("copied", "transformed", "fresh"):
            report[kind] = [name for name in report[kind] if name not in report["calibrated"]]
    where = f"{test.numel():,} held-out tokens"
    if chunks.heldout is None:
        where = "the same tokens, for there are no held-out chunks"
    log(f"calibrated on {ids.numel():,} tokens: alignment loss {before:.4g} -> {after:.4g} on {where}")


def calibration_warning(cfg: Config) -> str | None:
    """A warning if calibration has fewer tokens than inputs to fit, or None. These are heads x
    head_dim, for the output projection, and hidden_size, for a gate."""
    from convert import load_teacher_config

    if not cfg.train.calibrate_init:
        return None
    teacher = load_teacher_config(cfg.teacher_model.name)
    inputs = max(teacher.num_attention_heads * teacher.head_dim, teacher.hidden_size)
    batch = cfg.train.micro_batch_size * cfg.train.train_seq_len
    tokens = cfg.train.calibrate_init * batch
    if tokens >= inputs:
        return None
    enough = -(-inputs // batch)
    return (
        f"warning: train.calibrate_init: {cfg.train.calibrate_init} is {tokens:,} tokens, fewer than the {inputs:,}"
        f" inputs to fit, and the fit will hold for those alone; set it to {enough} or more"
    )


def build_student_for_stage2_and_3(cfg: Config, dtype, log=print, teacher=None):
    """The hybrid: at stage 2 the student of stage 1 with the teacher's attention restored in the
    kept layers; at stage 3 the student of stage 2 as it is."""
    from distill_model import StudentForCausalLM

    student = StudentForCausalLM.from_pretrained(cfg.train.student_init_ckpt, dtype=dtype)
    if cfg.stage == 2:
        student = student.restore_full_attention(teacher, cfg.student_model.keep_full_attention_layers)
    config = student.config
    log(f"students: {len(config.linear_layers)} x {config.student_name}; full: {config.keep_full_attention_layers}")
    return student


@dataclass(frozen=True)
class ParameterGroup:
    name: str
    params: list
    lr: float
    weight_decay: float

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)


def parameter_groups(model, cfg: Config) -> list[ParameterGroup]:
    """The trainable parameters by module: linear attentions (with lr_attn_scope all, every
    attention) take lr_attn, all else lr; only matrices decay."""
    from torch import nn

    from distill_model import is_student_attention
    from distill_model.attention import SoftmaxAttention

    train = cfg.train
    wide = train.lr_attn_scope == "all"
    vectors = {id(p) for m in model.modules() if isinstance(m, nn.Conv1d) for p in m.parameters()}  # a filter a channel
    vectors |= {
        id(p) for name, p in model.named_parameters() if name.endswith(".r_k") or p.squeeze().ndim < 2
    }  # r_k: RWKV-7's, one a head
    attention = {
        id(p)
        for m in model.modules()
        if is_student_attention(m) or wide and isinstance(m, SoftmaxAttention)
        for p in m.parameters()
    }
    groups: dict[tuple[str, bool], list] = {}
    for p in model.parameters():
        if p.requires_grad:
            name = "attention" if wide else "linear attention"
            groups.setdefault((name if id(p) in attention else "the rest", id(p) not in vectors), []).append(p)
    return [
        ParameterGroup(
            f"{name}, {'matrices' if matrix else 'vectors'}",
            params,
            train.lr if name == "the rest" or train.lr_attn is None else train.lr_attn,
            train.weight_decay if matrix else 0.0,
        )
        for (name, matrix), params in groups.items()
    ]


def checkpoint_activations(model, what: bool | str) -> None:
    """Makes a hybrid compute again in the backward pass what `train.gradient_checkpointing` says:
    nothing, "mlp" or all (True)."""
    model.set_activation_checkpointing(what)


def get_optimizer(model, cfg: Config):
    """AdamW over the groups of `parameter_groups`, its moments in fp32 or in 8 bits, quantised by
    blocks (Dettmers et al., arXiv 2110.02861), whose groups are cut at GROUP_OF_8_BITS."""
    groups = [{"params": g.params, "lr": g.lr, "weight_decay": g.weight_decay} for g in parameter_groups(model, cfg)]
    if cfg.train.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW

        groups = [group | {"params": part} for group in groups for part in parts(group["params"], GROUP_OF_8_BITS)]
    else:
        from torch.optim import AdamW
    return AdamW(groups, betas=tuple(cfg.train.betas))


def parts(params: list, limit: int) -> list[list]:
    """The parameters in order, in lists of at most `limit` elements, or of a larger parameter
    alone."""
    cut, size = [[]], 0
    for p in params:
        if cut[-1] and size + p.numel() > limit:
            cut.append([])
            size = 0
        cut[-1].append(p)
        size += p.numel()
    return cut


def get_scheduler(optimizer, cfg: Config, plan: BatchPlan):
    """Linear warm-up, then constant, linear or cosine from each group's peak to final_lr."""
    import math

    import torch

    warmup = min(cfg.train.warmup_steps, plan.warmup_limit)

    def factor(peak: float):
        floor = min(1.0, cfg.train.final_lr / peak) if peak else 1.0

        def at(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min(1.0, (step - warmup) / max(1, plan.steps - warmup))
            shape = {
                "constant": 1.0,
                "linear": 1 - progress,
                "cosine": (1 + math.cos(math.pi * progress)) / 2,
            }
            kind = cfg.train.lr_scheduler_type
            return 1.0 if kind == "constant" else floor + (1 - floor) * shape[kind]

        return at

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


# ------------------------------------------------------------------------------------------------ the trainer
def zero_stage(cfg: Config, world_size: int) -> int:
    """ZeRO's, for a run that goes on its checkpoints': DeepSpeed loads none of ZeRO-3 into ZeRO-1.
    One process has nothing to share with others, and ZeRO-1 copies its gradients once a step
    instead of once a micro-batch."""
    if saved := checkpoints(Path(cfg.train.output_dir)):
        return read_index(saved[-1])["zero_stage"]
    return cfg.train.zero_stage or (1 if world_size == 1 else cfg.stage)


def use_cuda_graphs(
    cfg: Config,
    device: str,
    zero_stage: int,
    model_config,
    log=print,
    sharded_teacher: bool = False,
) -> bool:
    """Whether the passes of a training step run as CUDA graphs. Says why not where
    `train.cuda_graphs` cannot have its way on a GPU."""
    if not cfg.train.cuda_graphs or device != "cuda":
        return False
    reasons = {
        "ZeRO-3 gathers weights during a pass": zero_stage == 3,
        "the head of a sharded teacher is gathered anew for each pass": sharded_teacher,
        "RoPE of this type reads lengths on the host": model_config.rope_parameters["rope_type"]
        in ("dynamic", "longrope"),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        log(f"train.cuda_graphs: not used, for {reason}")
    return reason is None


def deepspeed_config(name: str) -> dict:
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def compute_dtype(cfg: Config, device: str):
    """The torch.dtype of models and activations, as train.dtype says."""
    import torch

    return (
        torch.bfloat16 if cfg.train.dtype == "bf16" or cfg.train.dtype == "auto" and device == "cuda" else torch.float32
    )


def teacher_engine_config(cfg: Config, teacher, device: str, world_size: int, log) -> dict | None:
    """DeepSpeed's config of a sharded teacher, or None where every device holds a replica. Decided
    by free memory."""
    import torch

    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    shard, why = (
        cfg.train.kd_teacher_shard == "always",
        f"kd_teacher_shard is {cfg.train.kd_teacher_shard}",
    )
    if cfg.train.kd_teacher_shard == "auto":
        if cfg.train.kd_teacher_offload == "cpu":
            shard, why = True, "kd_teacher_offload is cpu"
        elif world_size == 1:
            why = "there is one process"
        elif device == "cuda":
            least = torch.tensor(torch.cuda.mem_get_info()[0], device="cuda")
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)  # all ranks shall decide alike
            free = least.item()
            # A student of its size brings weights and gradients in the same dtype and its share of
            # the optimiser's states.
            need = 3 * size + size // 2 * OPTIMIZER_BYTES[cfg.train.optimizer] // world_size
            shard, why = (
                need > 0.7 * free,
                f"student and teacher take {need / 2**30:.1f} of {free / 2**30:.1f} GiB free",
            )
        else:
            why = "memory is shared by the processes of a CPU machine"
    log(f"teacher: {'sharded with ZeRO-3' if shard else 'replicated'} ({size / 2**30:.2f} GiB; {why})")
    if not shard:
        return None
    config = deepspeed_config("stage_2_teacher")
    config["train_micro_batch_size_per_gpu"] = cfg.train.micro_batch_size
    config["bf16"]["enabled"] = teacher.dtype == torch.bfloat16
    if cfg.train.kd_teacher_offload == "cpu":
        config["zero_optimization"]["offload_param"] = {
            "device": "cpu",
            "pin_memory": device == "cuda",
        }
    return config


def build_trainer(
    cfg: Config,
    plan: BatchPlan,
    chunks: Chunks,
    device: str,
    report: bool,
    resume: Path | None,
    guards: dict,
    log,
):
    """Model, optimiser and Trainer of the stage. report: to Weights & Biases, beside metrics.jsonl.
    guards: what the StageTrainer needs to survive."""
    import torch
    from transformers import TrainingArguments, set_seed

    from convert import load_teacher
    from hf_trainer import DistillTrainer, FinetuneTrainer, FrozenTeacher, KDTrainer, Wandb

    train, output = cfg.train, Path(cfg.train.output_dir)
    dtype = compute_dtype(cfg, device)
    bf16 = dtype == torch.bfloat16
    set_seed(train.seed)
    # Models come before TrainingArguments: after them, a ZeRO-3 config would shard every model
    # while it is being built.
    if cfg.stage == 1:
        model = build_student_for_stage1(cfg, dtype, log)
        if train.calibrate_init and resume is None:
            calibrate_students(model.to(device), chunks, train.calibrate_init, train.micro_batch_size, log)
    else:
        teacher = load_teacher(cfg.teacher_model.name, dtype) if cfg.stage == 2 else None
        model = build_student_for_stage2_and_3(cfg, dtype, log, teacher)
        checkpoint_activations(model, train.gradient_checkpointing)
    for group in parameter_groups(model, cfg):
        log(
            f"optimiser: {group.numel:,} parameters of {group.name}: lr {group.lr:g}, weight decay {group.weight_decay:g}"
        )
    if report:
        os.environ.setdefault("WANDB_PROJECT", WANDB_PROJECT)
        os.environ.setdefault("WANDB_DIR", str(output))  # offline runs lie in the run folder
    engine_config = deepspeed_config(f"stage_{guards['facts']['zero_stage']}")
    if (
        cfg.stage == 1
    ):  # it calls the parts of its blocks one by one, so that ZeRO-3 cannot gather a block when it is called
        engine_config["zero_optimization"].pop("leaf_module", None)
    if resume and resume.parent.name == UNIVERSAL:
        engine_config["checkpoint"] = {"load_universal": True}
    args = TrainingArguments(
        output_dir=str(output),
        run_name=str(output),
        report_to="none",  # but for the callback below
        deepspeed=engine_config,
        use_cpu=device == "cpu",
        bf16=bf16,
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
        eval_strategy="steps" if chunks.heldout else "no",
        eval_steps=plan.every(train.eval_steps),
        eval_on_start=chunks.heldout is not None and resume is None,
        logging_nan_inf_filter=False,  # it would hide what ends the run
        dataloader_drop_last=True,
        # Workers would die of a SIGTERM to all processes of a job, and the run of that. A batch is
        # read in less than a millisecond.
        dataloader_num_workers=0,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=False,
    )
    stage, options = {
        1: (DistillTrainer, {}),
        2: (
            KDTrainer,
            {name: getattr(train, name) for name in ("kl_temperature", "kl_weight", "ce_weight")},
        ),
        3: (FinetuneTrainer, {}),
    }[cfg.stage]
    teacher_config = None
    if cfg.stage == 2:
        teacher_config = teacher_engine_config(cfg, teacher, device, plan.world_size, log)
    graphs = use_cuda_graphs(cfg, device, guards["facts"]["zero_stage"], model.config, log, teacher_config is not None)
    if cfg.stage == 2:
        options["teacher"] = FrozenTeacher(teacher, args.device, teacher_config, graphs)
    return stage(
        model=model,
        args=args,
        train_dataset=chunks.train.with_format("numpy"),
        eval_dataset=chunks.heldout and chunks.heldout.with_format("numpy"),
        make_optimizer=lambda model: get_optimizer(model, cfg),
        make_scheduler=lambda optimizer: get_scheduler(optimizer, cfg, plan),
        callbacks=[Wandb()] if report else None,
        metrics_path=output / METRICS,
        tokens_per_step=plan.tokens_per_step,
        cuda_graphs=graphs,
        **guards,
        **options,
    )


# ------------------------------------------------------------------------------------------------ --dry-run
def print_plan(cfg: Config, plan: BatchPlan, log) -> None:
    """Steps, tokens, parameters and an estimate of the memory that weights, gradients and AdamW
    take on a device."""
    import torch

    from convert import load_teacher_config
    from convert_ckpt import student_config
    from distill_model import StudentForCausalLM

    teacher_config = load_teacher_config(cfg.teacher_model.name)
    with torch.device("meta"):
        model = StudentForCausalLM(student_config(cfg, teacher_config))
        teacher = StudentForCausalLM(teacher_config)
    if cfg.stage == 1:
        model.requires_grad_(False)
        for i in model.config.linear_layers:
            model.model.layers[i].attn.requires_grad_(True)
    groups = parameter_groups(model, cfg)
    trainable, total = sum(g.numel for g in groups), sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in teacher.parameters()) if cfg.stage < 3 else 0
    dtype = compute_dtype(cfg, "cuda" if torch.cuda.is_available() else "cpu")
    width, zero, n = dtype.itemsize, zero_stage(cfg, plan.world_size), plan.world_size
    memory = {
        "weights": trainable * width / (n if zero == 3 else 1),
        "teacher": frozen * width / (n if cfg.train.kd_teacher_shard == "always" else 1),
        "gradients": trainable * width / (n if zero > 1 else 1),
        "optimiser": trainable * OPTIMIZER_BYTES[cfg.train.optimizer] / n,
    }
    log(
        f"stage {cfg.stage}: {plan.steps:,} steps x {plan.batch_size} sequences x {plan.seq_len} = {plan.tokens:,} tokens"
    )
    log(f"devices: {n}, each {plan.grad_accum} x {plan.micro_batch_size} sequences a step; ZeRO-{zero}")
    log(f"parameters: {total:,} in the student, {trainable:,} trained")
    for group in groups:
        log(f"  {group.numel:>14,}  {group.name}: lr {group.lr:g}, weight decay {group.weight_decay:g}")
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    log(f"memory a device: {sum(memory.values()) / 2**30:.2f} GiB + activations ({parts})")


def command() -> None:
    """`main`, and the mark that the launch scripts wait for."""
    main()
    job = os.environ.get("JOB_DIR", "")
    if os.path.isdir(job):
        Path(job, f"done_{os.environ['RANK']}").touch()


if __name__ == "__main__":
    run_main(command)

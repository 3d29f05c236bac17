"""Trains one stage from one YAML file, on one or many processes, on GPUs or a CPU.

    deepspeed train.py --cfg configs/qwen2.5_1.5b_gdn_v4/stage1.yaml     # all GPUs of this machine
    python train.py --cfg configs/quickstart/stage1.yaml train.lr=1e-3    # one process; overrides after the file
    python train.py --cfg configs/quickstart/stage2.yaml --dry-run        # steps, tokens, parameters, memory; then stops

Stage 1 aligns attention outputs, stage 2 distils the teacher's logits, stage 3 finetunes on long
context. The result is `<output_dir>/converted-hf/`, a Hugging Face folder that the next stage
starts from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.batch_plan import batch_plan
from runtime.checkpoints import checkpoints, step_of
from runtime.command import run_main
from runtime.config import ConfigError, load_config
from runtime.context import RunContext
from runtime.environment import (
    check_optimizer,
    init_distributed,
    mark_done,
    set_up_device,
    set_up_process,
    wandb_wanted,
)
from runtime.files import atomic_write_text, one_line
from runtime.guard import REQUEUE, StopSignals, Watchdog, failures_in_one_line, memory_advice
from runtime.run_folder import (
    CONFIG,
    EXPORT,
    INIT_REPORT,
    TEACHER_PRECISION,
    check_run_folder,
    is_finished,
    loadable_checkpoint,
    record_run,
    resume_point,
    run_lock,
    with_micro_batch_size_of_run,
    with_recorded_document_mask,
    zero_stage_of_run,
)

if TYPE_CHECKING:
    from stages import Stage

# Modules that import torch or DeepSpeed are imported in functions, after set_up_process() and
# set_up_device().


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", required=True, help="YAML file of the stage")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do and need, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override values of the file")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world_size = set_up_process()
    with StopSignals() as stop, failures_in_one_line(rank, world_size):
        try:
            ctx = prepare(args, rank, world_size)
        except ValueError as error:
            sys.exit(f"train.py: error: {error}")
        if ctx is not None:
            run(replace(ctx, stop=stop))
    mark_done(rank)


def prepare(args: argparse.Namespace, rank: int = 0, world_size: int = 1) -> RunContext | None:
    """Checks everything that can be checked before the ranks meet; writes nothing.

    Returns None where there is nothing to train. Raises ValueError, of one line, for what the user
    can correct.
    """
    log = partial(print, flush=True) if rank == 0 else lambda *_: None
    cfg = load_config(args.cfg, args.overrides)
    cfg = with_recorded_document_mask(cfg, Path(cfg.train.output_dir) / CONFIG, log)
    cfg = with_micro_batch_size_of_run(cfg, world_size)
    plan = batch_plan(cfg, world_size)
    check_run_folder(cfg)
    report_to_wandb = wandb_wanted(cfg.train.report_to)
    check_optimizer(cfg.train.optimizer)
    if is_finished(cfg, plan.steps) and not args.dry_run:
        folder = cfg.train.output_dir
        log(f"{folder}: this run is finished; its result is {folder}/{EXPORT}")
        return None
    from preflight import check_run, print_plan

    chunks = check_run(cfg, plan, log)
    ctx = RunContext(cfg, plan, chunks, rank, log, report_to_wandb)
    if args.dry_run:
        print_plan(ctx)
        return None
    return ctx


def run(ctx: RunContext) -> None:
    """Trains the stage, from its last checkpoint if there is one, and exports the result."""
    cfg = ctx.cfg
    device = set_up_device()
    init_distributed(device, cfg.train.hang_minutes)
    with run_lock(ctx.output_dir, ctx.rank):
        checkpoint = resume_point(cfg, ctx.log)
        zero_stage = zero_stage_of_run(cfg, ctx.world_size)
        ctx = replace(ctx, device=device, resume=checkpoint, zero_stage=zero_stage)
        if checkpoint is None or step_of(checkpoint) < ctx.plan.steps:
            ctx = train_stage(ctx)
        if ctx.rank == 0:
            export(ctx)
    import torch

    torch.distributed.destroy_process_group()


def train_stage(ctx: RunContext) -> RunContext:
    """Trains from ctx.resume, or from the start. After a signal it exits with REQUEUE, its
    checkpoint saved. Returns the context with the config and plan of the training."""
    from cuda_graphs import graphs_in_use
    from micro_batch import with_measured_micro_batch
    from stages import build_stage, build_trainer, calibrate_stage

    checkpoint = ctx.resume
    ctx = replace(ctx, resume=loadable_checkpoint(ctx), watchdog=Watchdog(60 * ctx.cfg.train.hang_minutes))
    with ctx.watchdog:
        with memory_advice(ctx, graphs_in_use), as_config_errors():
            stage = build_stage(ctx)
            if ctx.cfg.train.micro_batch_size == "auto":
                ctx = with_measured_micro_batch(ctx, stage)
        with memory_advice(ctx, graphs_in_use):
            with as_config_errors():
                calibrate_stage(ctx, stage)
                trainer = build_trainer(ctx, stage)
            if ctx.rank == 0:
                record(ctx, step_of(checkpoint) if checkpoint else 0, stage)
            if checkpoint:
                ctx.log(f"resuming from {checkpoint}")
            trainer.train(resume_from_checkpoint=str(ctx.resume) if ctx.resume else None)
    if reason := trainer.guard.stopped:
        step = trainer.state.global_step
        ctx.log(
            f"{reason}: stopped at step {step} of {ctx.plan.steps}; checkpoint-{step} is complete; "
            "rerun the command to resume"
        )
        sys.exit(REQUEUE)
    if ctx.cfg.stage == 1 and trainer.layer_errors:
        ctx.log(trainer.worst_layers())
    return ctx


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Turns the ValueErrors of building models into errors of one line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def record(ctx: RunContext, step: int, stage: Stage) -> None:
    """Writes what the run folder says about the run, which resumes from `step`."""
    root = Path(__file__).resolve().parent
    record_run(ctx.cfg, root, step, world_size=ctx.world_size, device=ctx.device, tokens=ctx.plan.tokens)
    if stage.init_report and not step:  # a resumed run has not calibrated again
        atomic_write_text(ctx.output_dir / INIT_REPORT, json.dumps(stage.init_report, indent=1))
    if stage.teacher_precision:
        atomic_write_text(ctx.output_dir / TEACHER_PRECISION, json.dumps(stage.teacher_precision, indent=1))


def export(ctx: RunContext) -> None:
    """Writes converted-hf from the last checkpoint, on one rank alone; the others may have
    ended."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from convert_ckpt import export_checkpoint

    unset_hf_deepspeed_config()  # a ZeRO-3 config would shard a new model over all ranks
    target = ctx.output_dir / EXPORT
    export_checkpoint(ctx.cfg, checkpoints(ctx.output_dir)[-1], target)
    print(f"Stage {ctx.cfg.stage} is done: {target}", flush=True)


if __name__ == "__main__":
    run_main(main)

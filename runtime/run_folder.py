"""A run folder explains itself: resolved config, commit, versions, metrics.jsonl, checkpoints, converted-hf.

A run is its config, less the keys that do not change what is learnt. Another run may not write into its folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints import (
    PARTIAL,
    UNIVERSAL,
    checkpoints,
    damage,
    newest_good,
    read_index,
    set_aside,
    step_of,
    universal_checkpoint,
)
from .config import Config, ConfigError, dump_config, load_config, to_dict
from .files import atomic_write_text, locked

if TYPE_CHECKING:
    from .context import RunContext

CONFIG, RUN, METRICS, EXPORT = "config.yaml", "run.json", "metrics.jsonl", "converted-hf"
HISTORY = "training.json"  # in an export: the stages that it went through
INIT_REPORT = "init_report.json"  # stage 1: where each tensor of the students came from
# These may change between the parts of one run: how often something is written, and how the work is
# spread.
FREE_KEYS = {
    "logging_steps",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "hang_minutes",
    "eval_steps",
    "eval_batches",
    "report_to",
    "resume_from_checkpoint",
    "micro_batch_size",
    "gradient_checkpointing",
    "cuda_graphs",
    "kd_teacher_shard",
    "kd_teacher_offload",
    "kd_teacher_use_cache",
    "max_length",
    "add_eos_token",
    "output_dir",
}
PACKAGES = (
    "torch",
    "transformers",
    "flash-linear-attention",
    "deepspeed",
    "triton",
    "accelerate",
    "datasets",
)


def _place(value):
    """One spelling for a folder, whatever a config calls it."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_dir() else value


def _identity(cfg: Config) -> dict:
    flat = {
        f"{section}.{key}": _place(value)
        for section, values in to_dict(cfg).items()
        if isinstance(values, dict)
        for key, value in values.items()
        if key not in FREE_KEYS
    }
    return flat | {"stage": cfg.stage}


def difference(theirs: Config, ours: Config) -> str | None:
    """What first makes two configs different runs, as a few words, or None."""
    theirs, ours = _identity(theirs), _identity(ours)
    return next(
        (
            f"{name} is {theirs.get(name)!r} there, {ours[name]!r} here"
            for name in ours
            if ours[name] != theirs.get(name)
        ),
        None,
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _named(cfg: Config) -> Path | None:
    """The checkpoint that the config names to go on from, if it names one."""
    resume = cfg.train.resume_from_checkpoint
    return None if resume in ("auto", True, None, False) else Path(resume)


def _goes_on(cfg: Config) -> bool:
    """Whether the newest checkpoint is meant: by `auto`, or by the name of one that the run has set
    out from already, for the same command goes on with what it has begun."""
    if (named := _named(cfg)) is None:
        return cfg.train.resume_from_checkpoint in ("auto", True)
    folder, named = Path(cfg.train.output_dir).resolve(), named.resolve()
    return named.parent == folder and read_json(folder / RUN).get("set_out_from") == named.name


def check_run_folder(cfg: Config) -> None:
    """Raises ConfigError if the folder belongs to another run, or holds a run and the config says
    not to resume, or the checkpoint to resume from is none of its own. Writes nothing."""
    folder, resume = Path(cfg.train.output_dir), cfg.train.resume_from_checkpoint
    key = f"train.output_dir: {folder}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key} is a file; name a folder")
    if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):  # .lock, .saving: of a killed process
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{key} is not empty and holds no run; name another folder")
        if other := difference(load_config(folder / CONFIG), cfg):
            raise ConfigError(f"{key} holds another run ({other}); name another folder or remove it")
        if resume in (None, False):
            raise ConfigError(
                f"train.resume_from_checkpoint: {resume}, but {folder} holds this run with {len(checkpoints(folder))} checkpoints; "
                "say auto to go on from the newest, name one of them to go on from that, or remove the folder to start anew"
            )
    named = _named(cfg)
    if named and not _goes_on(cfg) and named.absolute() not in [path.absolute() for path in checkpoints(folder)]:
        raise ConfigError(
            f"train.resume_from_checkpoint: {resume} is no whole checkpoint of {folder}; say auto or name a "
            "checkpoint-N folder in it (another run's would be unpickled, and could run code)"
        )


def resume_point(cfg: Config, log=print) -> Path | None:
    """The checkpoint to go on from, or None to start anew; all ranks call it together, after
    check_run_folder.

    Raises CheckpointError if there are only damaged ones, ConfigError if the one that was named is
    damaged.
    """
    import torch.distributed as dist

    folder, resume = Path(cfg.train.output_dir), cfg.train.resume_from_checkpoint
    if (named := _named(cfg)) is None or _goes_on(cfg):
        return newest_good(folder, log)
    named, rank = folder / named.name, dist.get_rank()
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, damage(named, rank, len(parts)))
    if wrong := next((part for part in parts if part), None):
        raise ConfigError(f"train.resume_from_checkpoint: {resume} is damaged ({wrong}); say auto")
    if rank == 0:  # a later auto shall follow this run, not the one that it leaves
        for later in checkpoints(folder):
            if step_of(later) > step_of(named):
                log(f"{later} comes after {named.name}; set aside as {set_aside(later).name}")
    dist.barrier()
    return named


def zero_stage_of_run(cfg: Config, world_size: int) -> int:
    """The DeepSpeed ZeRO stage of the student; reads the index of the newest checkpoint, if there is one.

    A resumed run keeps its ZeRO stage: DeepSpeed loads no checkpoint of ZeRO-3 into ZeRO-1. One
    process has nothing to shard, and ZeRO-1 copies its gradients once per step instead of once per
    micro-batch.
    """
    if saved := checkpoints(Path(cfg.train.output_dir)):
        return read_index(saved[-1])["zero_stage"]
    if cfg.train.zero_stage is not None:
        return cfg.train.zero_stage
    return 1 if world_size == 1 else cfg.stage


def loadable_checkpoint(ctx: RunContext) -> Path | None:
    """ctx.resume as the run's processes can load it: in DeepSpeed's universal format where their number
    has changed. All ranks call it together. Raises ConfigError if the run cannot resume from it."""
    checkpoint = ctx.resume
    if checkpoint is None:
        return None
    saved = read_index(checkpoint)
    if saved["data"] != ctx.checkpoint_facts["data"]:
        raise ConfigError(
            f"data.cache_dir: has other data than {checkpoint} was trained on; make that again, or name another "
            "train.output_dir"
        )
    before = saved["world_size"]
    if before == ctx.world_size:
        return checkpoint
    change = f"{checkpoint.name} was saved by {before} processes and is resumed by {ctx.world_size}"
    if ctx.cfg.train.optimizer == "adamw_8bit":
        raise ConfigError(
            f"{change}: with train.optimizer adamw_8bit, DeepSpeed's universal checkpoint cannot split the optimiser "
            f"states; start {before} processes"
        )
    if ctx.zero_stage == 3 and ctx.cfg.stage == 1:
        raise ConfigError(
            f"{change}: with train.zero_stage 3, stage 1's frozen weights are sharded over the ranks, which "
            f"DeepSpeed's universal checkpoint leaves out; start {before} processes"
        )
    ctx.log(f"{change}: converting it to DeepSpeed's universal format")
    return universal_checkpoint(checkpoint)


@contextmanager
def run_lock(folder: Path, rank: int) -> Iterator[None]:
    """Holds the lock of the run folder on rank 0; the other ranks wait until it is held."""
    import torch.distributed as dist

    with locked(folder / ".lock", f"train.output_dir: {folder}") if rank == 0 else nullcontext():
        if rank == 0:
            for leftover in (PARTIAL, UNIVERSAL):  # of a process that was killed
                shutil.rmtree(folder / leftover, ignore_errors=True)
        dist.barrier()
        yield


def is_finished(cfg: Config, steps: int) -> bool:
    """Whether the run has exported its last step already, and not set out again since. Never when
    it is to set out from a checkpoint that was named."""
    folder = Path(cfg.train.output_dir)
    stages, left = read_json(folder / EXPORT / HISTORY).get("stages"), checkpoints(folder)
    return _goes_on(cfg) and bool(stages) and stages[-1]["steps"] == steps and (not left or step_of(left[-1]) == steps)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record_run(cfg: Config, root: Path, resume_step: int, **facts) -> None:
    """Writes config.yaml and run.json, and cuts metrics.jsonl back to the step that the run goes on
    from."""
    folder = Path(cfg.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / CONFIG, dump_config(cfg))
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "versions": {package: _version(package) for package in PACKAGES},
        "resumed_from_step": resume_step,
        "set_out_from": named.name if (named := _named(cfg)) else None,
        **facts,
    }
    atomic_write_text(folder / RUN, json.dumps(run, indent=2))
    if (folder / METRICS).is_file():
        lines = metrics_until(folder, resume_step) if resume_step else []
        atomic_write_text(folder / METRICS, "".join(f"{line}\n" for line in lines))


def metrics_until(folder: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to and with `step`, without one whose writer was killed
    half-way; [] without the file."""
    metrics = folder / METRICS
    return [line for line in metrics.read_text().splitlines() if _step(line) <= step] if metrics.is_file() else []


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one whose writer was killed half-way."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

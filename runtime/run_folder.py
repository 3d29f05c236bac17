"""The run folder: resolved config, commit, versions, metrics.jsonl, checkpoints, converted-hf.

A run is identified by its config, except for the keys that do not change what is learnt. No other
run may write into its folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .batch_plan import micro_batch_sizes, with_micro_batch_size
from .checkpoints import (
    PARTIAL,
    UNIVERSAL,
    checkpoints,
    damage_on_any_rank,
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

CONFIG = "config.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
EXPORT = "converted-hf"
HISTORY = "training.json"  # in an export: the stages that it went through
INIT_REPORT = "init_report.json"  # stage 1: where each tensor of the students came from
TEACHER_PRECISION = "teacher_precision.json"  # teacher_model.precision fp8: what it changes
# A resumed run may change these: how often something is written, and how the work is distributed.
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
    "flash-qla",
    "deepspeed",
    "triton",
    "accelerate",
    "datasets",
)


def _resolved(value):
    """The same string for the same folder, however a config spells it."""
    if isinstance(value, str) and Path(value).is_dir():
        return str(Path(value).resolve())
    return value


def _identity(cfg: Config) -> dict:
    """{section.key: value} of the keys that make two configs different runs."""
    identity = {}
    for section, values in to_dict(cfg).items():
        if isinstance(values, dict):
            for key, value in values.items():
                if key not in FREE_KEYS:
                    identity[f"{section}.{key}"] = _resolved(value)
    return identity | {"stage": cfg.stage}


def difference(theirs: Config, ours: Config) -> str | None:
    """The first key that makes two configs different runs, with both values, in words; or None."""
    there = _identity(theirs)
    for name, value in _identity(ours).items():
        if value != there.get(name):
            return f"{name} is {there.get(name)!r} there, {value!r} here"
    return None


def recorded_config(file: Path) -> Config:
    """The config that a run or a selection recorded in `file`. One of a version without
    data.document_mask read chunks whole. Raises ConfigError."""
    cfg = load_config(file)
    if "document_mask" in yaml.safe_load(file.read_text(encoding="utf-8"))["data"]:
        return cfg
    return replace(cfg, data=replace(cfg.data, document_mask=False))


def with_recorded_document_mask(cfg: Config, file: Path, log=print) -> Config:
    """The config with the data.document_mask that its run or selection recorded in `file`, where it
    is auto here: what an earlier version began, with another default, is continued as it began. The
    same config without such a file. Raises ConfigError."""
    if cfg.data.document_mask != "auto" or not file.is_file():
        return cfg
    recorded = recorded_config(file).data.document_mask
    if recorded != "auto":
        log(f"data.document_mask: {str(recorded).lower()}, as recorded in {file}")
    return replace(cfg, data=replace(cfg.data, document_mask=recorded))


def read_json(path: Path) -> dict:
    """The content of a JSON file, or {} if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


# ------------------------------------------------------------------------ resuming
def _named(cfg: Config) -> Path | None:
    """The checkpoint that the config names to resume from, or None."""
    resume = cfg.train.resume_from_checkpoint
    return None if resume in ("auto", True, None, False) else Path(resume)


def _uses_newest(cfg: Config) -> bool:
    """Whether to resume from the newest checkpoint: by `auto`, or by the name of a checkpoint that
    this run has resumed from before, so that the same command continues what it has begun."""
    named = _named(cfg)
    if named is None:
        return cfg.train.resume_from_checkpoint in ("auto", True)
    folder = Path(cfg.train.output_dir).resolve()
    named = named.resolve()
    return named.parent == folder and read_json(folder / RUN).get("set_out_from") == named.name


def check_run_folder(cfg: Config) -> None:
    """Raises ConfigError if the folder belongs to another run, or holds a run and the config says
    not to resume, or the checkpoint to resume from is not in it. Writes nothing."""
    folder = Path(cfg.train.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output_dir: {folder} is a file; name a folder")
    # Names with a dot (.lock, .saving) are left by killed processes.
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        _check_run_in_folder(cfg, folder)
    named = _named(cfg)
    if named is None or _uses_newest(cfg):
        return
    if named.absolute() not in [path.absolute() for path in checkpoints(folder)]:
        raise ConfigError(
            f"train.resume_from_checkpoint: {named} is not a complete checkpoint of {folder}; set it to auto or to a "
            "checkpoint-N folder in it (the checkpoint of another run would be unpickled, and could run code)"
        )


def _check_run_in_folder(cfg: Config, folder: Path) -> None:
    """Raises ConfigError unless what the folder holds is this run, to be resumed."""
    key = f"train.output_dir: {folder}"
    resume = cfg.train.resume_from_checkpoint
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{key} is not empty and holds no run; name another folder")
    if other := difference(recorded_config(folder / CONFIG), cfg):
        raise ConfigError(f"{key} holds another run ({other}); name another folder or remove it")
    if resume in (None, False):
        raise ConfigError(
            f"train.resume_from_checkpoint: {resume}, but {folder} holds this run with {len(checkpoints(folder))} "
            "checkpoints; set it to auto to resume from the latest checkpoint, or to one of them to resume from that, "
            "or remove the folder to start from the beginning"
        )


def resume_point(cfg: Config, log=print) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning; all ranks call it
    together, after `check_run_folder`.

    Raises CheckpointError if all checkpoints are damaged, ConfigError if the one that the config
    names is.
    """
    import torch.distributed as dist

    folder = Path(cfg.train.output_dir)
    named = _named(cfg)
    if named is None or _uses_newest(cfg):
        return newest_good(folder, log)
    checkpoint = folder / named.name
    if wrong := damage_on_any_rank(checkpoint):
        raise ConfigError(f"train.resume_from_checkpoint: {named} is damaged ({wrong}); set it to auto")
    if dist.get_rank() == 0:  # a later auto must follow this run, not the one that is abandoned here
        for later in checkpoints(folder):
            if step_of(later) > step_of(checkpoint):
                log(f"{later} comes after {checkpoint.name}; set aside as {set_aside(later).name}")
    dist.barrier()
    return checkpoint


def zero_stage_of_run(cfg: Config, world_size: int) -> int:
    """The DeepSpeed ZeRO stage of the student; reads the index of the newest checkpoint, if there
    is one.

    A resumed run keeps its ZeRO stage: DeepSpeed loads no checkpoint of ZeRO-3 into ZeRO-1. One
    process has nothing to shard, and ZeRO-1 copies its gradients once per step instead of once per
    micro-batch.
    """
    if saved := checkpoints(Path(cfg.train.output_dir)):
        return read_index(saved[-1])["zero_stage"]
    if cfg.train.zero_stage is not None:
        return cfg.train.zero_stage
    return 1 if world_size == 1 else cfg.stage


def with_micro_batch_size_of_run(cfg: Config, world_size: int) -> Config:
    """The config with the number that its run has chosen for train.micro_batch_size auto; the same
    config where the folder holds no run.

    With another number of processes it is the largest number up to the chosen one that divides a
    process's share of the batch.
    """
    file = Path(cfg.train.output_dir) / CONFIG
    if cfg.train.micro_batch_size != "auto" or not file.is_file():
        return cfg
    chosen = load_config(file).train.micro_batch_size
    sizes = micro_batch_sizes(cfg, world_size)
    if chosen == "auto" or not sizes:  # a file that train.py did not write; an error of batch_plan
        return cfg
    return with_micro_batch_size(cfg, max(size for size in sizes if size <= chosen))


def loadable_checkpoint(ctx: RunContext) -> Path | None:
    """ctx.resume as the run's processes can load it: in DeepSpeed's universal format where their
    number has changed. All ranks call it together. Raises ConfigError if the run cannot resume from
    it."""
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
    """Whether the run has exported its last step, and was not resumed from an earlier checkpoint
    since. Never true if it is to be resumed from a checkpoint that the config names."""
    folder = Path(cfg.train.output_dir)
    stages = read_json(folder / EXPORT / HISTORY).get("stages")
    saved = checkpoints(folder)
    if not _uses_newest(cfg) or not stages or stages[-1]["steps"] != steps:
        return False
    return not saved or step_of(saved[-1]) == steps


# ------------------------------------------------------------------------ what is recorded
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record_run(cfg: Config, root: Path, resume_step: int, **facts) -> None:
    """Writes config.yaml and run.json, and truncates metrics.jsonl at the step that the run resumes
    from.

    root: the folder of the code, of which the commit is recorded.
    """
    folder = Path(cfg.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / CONFIG, dump_config(cfg))
    named = _named(cfg)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "versions": {package: _version(package) for package in PACKAGES},
        "resumed_from_step": resume_step,
        "set_out_from": named.name if named else None,
        **facts,
    }
    atomic_write_text(folder / RUN, json.dumps(run, indent=2))
    if (folder / METRICS).is_file():
        lines = metrics_until(folder, resume_step) if resume_step else []
        atomic_write_text(folder / METRICS, "".join(f"{line}\n" for line in lines))


def metrics_until(folder: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to `step`, inclusive, without a line that was cut off when its
    writer was killed; [] without the file."""
    metrics = folder / METRICS
    if not metrics.is_file():
        return []
    return [line for line in metrics.read_text().splitlines() if _step(line) <= step]


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

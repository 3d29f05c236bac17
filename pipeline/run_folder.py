"""A run folder explains itself: resolved config, commit, versions, metrics.jsonl, checkpoints, converted-hf.

A run is its config, less the keys that do not change what is learnt. Another run may not write into its folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .config import Config, ConfigError, dump_config, load_config, to_dict

CONFIG, RUN, METRICS, EXPORT = "config.yaml", "run.json", "metrics.jsonl", "converted-hf"
INIT_REPORT = "init_report.json"  # stage 1: where each tensor of the students came from
# These may change between the parts of one run: how often something is written, and how the work is spread.
FREE_KEYS = {
    "logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_batches", "report_to", "resume_from_checkpoint",
    "micro_batch_size", "gradient_checkpointing", "kd_teacher_shard", "kd_teacher_offload", "kd_teacher_use_cache",
    "max_length", "add_eos_token",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "flash-linear-attention", "deepspeed", "triton", "accelerate", "datasets")


def _identity(cfg: Config) -> dict:
    flat = {f"{section}.{key}": value for section, values in to_dict(cfg).items() if isinstance(values, dict)
            for key, value in values.items() if key not in FREE_KEYS}  # fmt: skip
    return flat | {"stage": cfg.stage}


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. DeepSpeed writes `latest` last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "latest").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def check_run_folder(cfg: Config) -> Path | None:
    """The checkpoint to resume from, or None to start anew. Writes nothing.

    Raises ConfigError if the folder belongs to another run, or holds a run and the config says not to resume.
    """
    folder, resume = Path(cfg.train.output_dir), cfg.train.resume_from_checkpoint
    key = f"train.output_dir: {folder}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{key} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"{key} is not empty and holds no run; name another folder")
        theirs, ours = _identity(load_config(folder / CONFIG)), _identity(cfg)
        if different := [name for name in ours if ours[name] != theirs.get(name)]:
            name = different[0]
            raise ConfigError(
                f"{key} holds another run ({name} is {theirs.get(name)!r} there, {ours[name]!r} here); "
                "name another folder or remove it"
            )
    found = checkpoints(folder)
    if resume in (None, False):
        if found:
            raise ConfigError(
                f"train.resume_from_checkpoint: {resume} with {len(found)} checkpoints in {folder}; "
                "say auto to go on from the newest, or remove the folder to start anew"
            )
        return None
    if resume in ("auto", True):
        return found[-1] if found else None
    if not (Path(resume) / "latest").is_file():
        raise ConfigError(f"train.resume_from_checkpoint: {resume} is no checkpoint; say auto or name a checkpoint-N folder")
    return Path(resume)


def is_finished(cfg: Config) -> bool:
    """Whether the run has exported its result already. Never when a checkpoint to resume from was named."""
    automatic = cfg.train.resume_from_checkpoint in ("auto", True)
    return automatic and (Path(cfg.train.output_dir) / EXPORT / "config.json").is_file()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record_run(cfg: Config, root: Path, resume_step: int, **facts) -> None:
    """Writes config.yaml and run.json, and cuts metrics.jsonl back to the step that the run goes on from."""
    folder = Path(cfg.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(dump_config(cfg))
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git.stdout.strip() or None,
        "python": sys.version.split()[0],
        "versions": {package: _version(package) for package in PACKAGES},
        "resumed_from_step": resume_step,
        **facts,
    }
    (folder / RUN).write_text(json.dumps(run, indent=2))
    metrics = folder / METRICS
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= resume_step]
        metrics.write_text("".join(f"{line}\n" for line in lines if resume_step))

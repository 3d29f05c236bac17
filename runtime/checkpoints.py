"""Checkpoints of a run, written atomically and verified when they are read.

`checkpoint-N` is written under another name, indexed (size and SHA-256 of every file) and then
renamed; only after that are older ones removed. A checkpoint whose files do not match its index is
set aside, and the one before is used. Functions that all ranks call together say so.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from .files import atomic_write_text, sync, why_not_written

INDEX = "index.json"
PARTIAL = ".saving"  # folder of a checkpoint that is being written
UNIVERSAL = ".universal"  # folder of a checkpoint in DeepSpeed's universal format
ASIDE = "set-aside"  # prefix of checkpoints that are not to be used


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or cannot be used; its message is one line."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _folders(run: Path) -> list[Path]:
    """checkpoint-<step>, complete or not, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _folders(folder) if (path / INDEX).is_file()]


def read_index(checkpoint: Path) -> dict:
    """What the checkpoint's writer recorded: facts, and files {name: [bytes, SHA-256]}. Raises
    CheckpointError."""
    try:
        index = json.loads((checkpoint / INDEX).read_text())
        assert isinstance(index["files"], dict)
        return index
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(f"{checkpoint}: its {INDEX} is missing or damaged") from None


def fingerprint(export: Path, digest=None) -> str:
    """A hash of an export's config and weights. digest(file): a hash of its content, `sha256` by
    default."""
    digest = digest or sha256
    files = [file for file in sorted(export.iterdir()) if file.suffix in (".safetensors", ".bin")]
    weights = [(file.name, digest(file)) for file in files]
    config = (export / "config.json").read_text()
    return hashlib.sha256(f"{config} {weights}".encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the checkpoint, or None. Each of `parts` callers checks every parts-th
    file."""
    try:
        files = read_index(checkpoint)["files"]
    except CheckpointError as error:
        return str(error).partition(": ")[2]
    for name in sorted(files)[part::parts]:
        size, digest = files[name]
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def damage_on_any_rank(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint, or None; all ranks call it together, and share the
    reading."""
    import torch.distributed as dist

    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage(checkpoint, dist.get_rank(), len(found)))
    return next((part for part in found if part), None)


def _writer(name: str, world_size: int) -> int:
    """The rank that writes a file of DeepSpeed's or the Trainer's."""
    found = re.search(r"(?:zero_pp_rank_|rng_state_|progress_)(\d+)", name)
    rank = int(found[1]) if found else 0
    return rank if rank < world_size else 0


def save_checkpoint(run: Path, step: int, write: Callable[[], None], facts: dict, keep: int) -> None:
    """Makes run/checkpoint-<step>, atomically; all ranks call it together.

    write() writes to run/PARTIAL/checkpoint-<step>. facts are recorded in the index. The newest
    `keep` checkpoints are kept. Raises CheckpointError on the rank that could not write.
    """
    import torch.distributed as dist

    rank = dist.get_rank()
    target = run / f"checkpoint-{step}"
    partial = run / PARTIAL / target.name
    try:
        if rank == 0:
            shutil.rmtree(run / PARTIAL, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        write()
        dist.barrier()
        files = _indexed_files(partial)
        if rank == 0:
            atomic_write_text(partial / INDEX, json.dumps(facts | {"step": step, "files": files}, indent=1))
            _publish(partial, target)
            _prune(run, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        why = why_not_written(error, run)
        shutil.rmtree(run / PARTIAL, ignore_errors=True)
        saved = checkpoints(run)
        last = f"{saved[-1].name} is complete" if saved else "there is none before it"
        raise CheckpointError(
            f"{target.name} could not be written to {run}: {why}; {last}; fix this and rerun the command"
        ) from error


def _indexed_files(partial: Path) -> dict[str, list]:
    """{name: [bytes, SHA-256]} of all files, synced to disk; all ranks call it together."""
    import torch.distributed as dist

    rank = dist.get_rank()
    world_size = dist.get_world_size()
    ours = {}
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_file() and _writer(name, world_size) == rank:
            sync(path)  # by its writer: on a network file system no other process has the data
            ours[name] = [path.stat().st_size, sha256(path)]
    of_ranks = [None] * world_size
    dist.all_gather_object(of_ranks, ours)
    return {name: entry for files in of_ranks for name, entry in files.items()}


def _publish(partial: Path, target: Path) -> None:
    """Renames a checkpoint that is written and indexed to its final name."""
    for path in (*partial.rglob("*"), partial):
        if path.is_dir():
            sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)


def _prune(run: Path, keep: int) -> None:
    for old in checkpoints(run)[:-keep]:
        # The index goes first: what is left if the process is killed here is not a checkpoint.
        (old / INDEX).unlink()
        shutil.rmtree(old, ignore_errors=True)


def clear_pruned(run: Path) -> None:
    """Removes what a killed process left of checkpoints that it was removing: folders without an
    index that are older than all checkpoints."""
    if complete := checkpoints(run):
        folders = _folders(run)
        for leftover in folders[: folders.index(complete[0])]:
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that must not be used; returns its new path."""
    aside = checkpoint.with_name(f"{ASIDE}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def newest_good(run: Path, log=print) -> Path | None:
    """The newest undamaged checkpoint, or None if there is none at all; all ranks call it together.

    Damaged ones are logged and set aside. Raises CheckpointError if all are damaged.
    """
    import torch.distributed as dist

    rank = dist.get_rank()
    if rank == 0:
        clear_pruned(run)
    found = [_folders(run)]
    dist.broadcast_object_list(found)
    for checkpoint in reversed(found[0]):
        wrong = damage_on_any_rank(checkpoint)
        if not wrong:
            return checkpoint
        if rank == 0:
            aside = set_aside(checkpoint)
            log(f"{checkpoint}: damaged ({wrong}); set aside as {aside.name}, the one before it is used")
    if found[0]:
        raise CheckpointError(
            f"{run}: all its checkpoints are damaged and set aside; bring one back or remove the folder"
        )
    return None


def universal_checkpoint(checkpoint: Path) -> Path:
    """Converts a checkpoint to DeepSpeed's universal format, for another number of processes; all
    ranks call it together.

    The result is in UNIVERSAL beside the checkpoint and takes as much space; remove it once it is
    loaded.
    """
    import torch.distributed as dist
    from deepspeed.checkpoint import ds_to_universal

    folder = checkpoint.parent / UNIVERSAL / checkpoint.name
    if dist.get_rank() == 0:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        tag = (checkpoint / "latest").read_text().strip()
        options = argparse.Namespace(
            input_folder=str(checkpoint / tag),
            output_folder=str(folder / tag),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        try:
            with redirect_stdout(io.StringIO()):
                ds_to_universal.main(options)
            for path in checkpoint.iterdir():
                if path.is_file() and path.name.startswith(("trainer_state", "scheduler", "progress_")):
                    shutil.copy(path, folder)
        except (OSError, RuntimeError) as error:
            why = why_not_written(error, checkpoint.parent)
            raise CheckpointError(
                f"{checkpoint} could not be converted for another number of processes: {why}"
            ) from error
    dist.barrier()
    return folder

"""Checkpoints of a run that are whole or not there, and known to be good.

`checkpoint-N` is written under another name, indexed (size and SHA-256 of every file) and then renamed; only after that
are older ones removed. One whose files no longer match its index is set aside, and the one before is used. The functions
that all ranks call together say so.
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

INDEX, PARTIAL, UNIVERSAL, ASIDE = "index.json", ".saving", ".universal", "set-aside"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or cannot be used; its message is one line."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _folders(run: Path) -> list[Path]:
    """checkpoint-<step>, whole or not, oldest first."""
    return sorted(
        (path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=step_of,
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written whole, oldest first."""
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
    """A hash of an export's config and weights. digest: of a file's content, `sha256` unless given."""
    weights = [
        (f.name, (digest or sha256)(f)) for f in sorted(export.iterdir()) if f.suffix in (".safetensors", ".bin")
    ]
    return hashlib.sha256(f"{(export / 'config.json').read_text()} {weights}".encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the checkpoint, or None. Of `parts` callers each reads every parts-th
    file."""
    try:
        files = read_index(checkpoint)["files"]
    except CheckpointError as error:
        return str(error).partition(": ")[2]
    for name in sorted(files)[part::parts]:
        (size, digest), path = files[name], checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def _writer(name: str) -> int:
    """The rank that writes a file of DeepSpeed's or the Trainer's."""
    found = re.search(r"(?:zero_pp_rank_|rng_state_|progress_)(\d+)", name)
    return int(found[1]) if found else 0


def save_checkpoint(run: Path, step: int, write: Callable[[], None], facts: dict, keep: int) -> None:
    """Makes run/checkpoint-<step>; all ranks call it. write() writes to
    run/PARTIAL/checkpoint-<step>; facts go into the index; of all checkpoints the newest `keep`
    stay. Raises CheckpointError, on the rank that could not write."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    target = run / f"checkpoint-{step}"
    partial = run / PARTIAL / target.name
    try:
        if rank == 0:
            shutil.rmtree(run / PARTIAL, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        write()
        dist.barrier()
        ours = {}
        for path in sorted(partial.rglob("*")):
            name = str(path.relative_to(partial))
            if path.is_file() and (_writer(name) if _writer(name) < world_size else 0) == rank:
                sync(path)  # by its writer: on a network file system nobody else has the data
                ours[name] = [path.stat().st_size, sha256(path)]
        parts = [None] * world_size
        dist.all_gather_object(parts, ours)
        if rank == 0:
            files = {name: entry for part in parts for name, entry in part.items()}
            atomic_write_text(partial / INDEX, json.dumps(facts | {"step": step, "files": files}, indent=1))
            for path in (p for p in (*partial.rglob("*"), partial) if p.is_dir()):
                sync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            sync(run)
            shutil.rmtree(run / PARTIAL, ignore_errors=True)
            for old in checkpoints(run)[:-keep]:
                # The index goes first: what a kill leaves of the rest is no checkpoint.
                (old / INDEX).unlink()
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        why = why_not_written(error, run)
        shutil.rmtree(run / PARTIAL, ignore_errors=True)
        last = checkpoints(run)
        raise CheckpointError(
            f"{target.name} could not be written to {run}: {why}; "
            f"{f'{last[-1].name} is whole' if last else 'there is none before it'}; mend that and start the same command again"
        ) from error


def clear_pruned(run: Path) -> None:
    """Removes what a kill left of checkpoints that were being removed: those without an index,
    older than all with it."""
    if whole := checkpoints(run):
        for rest in _folders(run)[: _folders(run).index(whole[0])]:
            shutil.rmtree(rest, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that shall not be used; returns its new path."""
    aside = checkpoint.with_name(f"{ASIDE}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def newest_good(run: Path, log=print) -> Path | None:
    """The newest undamaged checkpoint, or None where there is none at all; all ranks call it.
    Damaged ones are reported and set aside. Raises CheckpointError if there are only damaged ones.
    """
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        clear_pruned(run)
    found = [_folders(run)]
    dist.broadcast_object_list(found)
    for checkpoint in reversed(found[0]):
        parts = [None] * world_size
        dist.all_gather_object(parts, damage(checkpoint, rank, world_size))
        wrong = next((part for part in parts if part), None)
        if not wrong:
            return checkpoint
        if rank == 0:
            aside = set_aside(checkpoint)
            log(f"{checkpoint}: damaged ({wrong}); set aside as {aside.name}, going on from the one before it")
    if found[0]:
        raise CheckpointError(
            f"{run}: all its checkpoints are damaged and set aside; bring one back or remove the folder"
        )
    return None


def universal_checkpoint(checkpoint: Path) -> Path:
    """The checkpoint for another number of processes, in DeepSpeed's universal format; all ranks
    call it together.

    It lies in UNIVERSAL beside the checkpoint and needs as much room; remove it once it is loaded.
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

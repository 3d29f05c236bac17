"""Which units --tasks and --seq_lens ask for, and what they must download."""

from __future__ import annotations

import difflib
from pathlib import Path

from .options import Options, option_error
from .ruler import DOWNLOADED, ruler_manager
from .tasks import DEFAULT_SEQ_LEN, GROUP_SEQ_LENS, GROUPS, HELDOUT, KL, LOCAL, NEEDLE, RULER, SIZED, Unit

FILE_FORMATS = ("json", "csv", "parquet", "text", "")  # a `dataset_path` of data that are local files


def task_manager(asked: list[str]):
    """lm-evaluation-harness's index of tasks, or the part of it that the names of groups and tasks
    need."""
    names = {name for group in asked for name in GROUPS.get(group, (group,))}
    if names <= {*RULER, *LOCAL, NEEDLE}:
        return ruler_manager()
    from lm_eval.tasks import TaskManager

    print("Tasks: reading lm-evaluation-harness's index, 15 s", flush=True)
    return TaskManager()


def plan(options: Options, manager) -> list[Unit]:
    """The units that --tasks and --seq_lens ask for, each once, in their order.

    Raises ValueError for an unknown task, and for one whose --data or --teacher is missing.
    """
    units: dict[Unit, None] = {}  # a dict, for its order
    for asked in options.tasks:
        lengths = options.seq_lens or GROUP_SEQ_LENS.get(asked, (DEFAULT_SEQ_LEN,))
        for name in members(asked, options):
            for task in tasks_of(name, manager):
                for length in lengths if task in SIZED else (None,):
                    units[Unit(task, length)] = None
    for unit in units:
        if unit.task in HELDOUT and not options.data:
            need = "needs a folder of chunks with a held-out part, from preprocess_chunk.py"
            raise option_error("data", f"{unit.task} {need}")
        if unit.task == KL and not options.teacher:
            need = "needs the checkpoint that the KL is measured against"
            raise option_error("teacher", f"{unit.task} {need}")
    return list(units)


def members(asked: str, options: Options) -> tuple[str, ...]:
    """The names in a group, or the name itself; of `local` those whose --data and --teacher are
    given."""
    names = GROUPS.get(asked, (asked,))
    if asked != "local":
        return names
    missing = set()
    if not options.data:
        missing |= set(HELDOUT)
    if not options.teacher:
        missing.add(KL)
    return tuple(name for name in names if name not in missing)


def tasks_of(name: str, manager) -> list[str]:
    """The task or group of that name, or the tasks with that tag. Raises ValueError if it is
    unknown."""
    if name in LOCAL or name == NEEDLE:
        return [name]
    if name in manager.task_index:
        entry = manager.task_index[name]
        return sorted(entry.tags) if entry.kind.name == "TAG" else [name]
    close = difflib.get_close_matches(name, [*GROUPS, *LOCAL, NEEDLE, *manager.all_tasks], 3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise option_error(
        "tasks",
        f"{name!r} is unknown; {hint}Groups: {', '.join(GROUPS)}; of our own: {', '.join((*LOCAL, NEEDLE))}; "
        "or any of lm-evaluation-harness (lm-eval ls tasks)",
    )


def dataset_of(task: str, manager) -> str | None:
    """What a task downloads: the name of a hub dataset, or a description; None if nothing."""
    if task in SIZED or task in LOCAL:
        return DOWNLOADED.get(task)
    entry = manager.task_index[task]
    config = entry.cfg or {}
    if "group" in config:
        return dataset_of_group(config, manager)
    if "dataset_path" in config:
        path = config["dataset_path"]
        return None if path in FILE_FORMATS else path
    if entry.kind.name == "TAG":
        return dataset_of(sorted(entry.tags)[0], manager)
    return "its dataset"  # the task is Python code


def dataset_of_group(config: dict, manager) -> str | None:
    """`dataset_of` the first task of a group, which stands for the others."""
    first = config["task"][0]
    if not isinstance(first, str):
        first = first.get("task", first.get("group"))
    if isinstance(first, str) and first in manager.task_index:
        return dataset_of(first, manager)
    return "its datasets"


def downloads(units: list[Unit], manager) -> dict[str, str]:
    """Task -> what it must download, unless the Hugging Face cache holds it."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    missing = {}
    for unit in units:
        source = dataset_of(unit.task, manager)
        if source is None:
            continue
        folder = repo_folder_name(repo_id=source.split()[0], repo_type="dataset")
        if not (Path(HF_HUB_CACHE) / folder).is_dir():
            missing[unit.task] = source
    return missing

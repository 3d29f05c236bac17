"""Runs the units that have no result yet, in this process or in one per GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.files import one_line

import torch
from transformers.utils.logging import disable_progress_bar

from .harness import build, harness_model, load_model, measure
from .options import Options, labels, option_error, option_name
from .planning import downloads, plan, task_manager
from .record import Record, results_of
from .tasks import HELDOUT, KL, Unit

WORKER = Path(__file__).resolve().parents[1] / "evaluate.py"


def is_worker() -> bool:
    """Whether this process is a rank of an evaluation that another process started."""
    return "RANK" in os.environ


def evaluate(options: Options, argv: list[str]) -> dict[str, dict[str, dict]]:
    """Runs what is missing and returns label -> unit's key -> result; in a worker {}.

    argv: the arguments of evaluate.py that gave the options, for worker processes.
    """
    disable_progress_bar()  # transformers' own, a line for every file read
    manager = task_manager(options.tasks)
    units = plan(options, manager)
    if is_worker():
        Worker(options, manager).run(units)
        return {}
    missing = downloads(units, manager)
    if missing:
        sources = "; ".join(f"{task} ({source})" for task, source in missing.items())
        print(f"Needs a network, to download: {sources}", flush=True)
    if options.data and any(unit.task in HELDOUT for unit in units):
        how = "their documents are read one by one" if options.document_mask else "they are read whole"
        print(f"Chunks of {options.data}: {how} ({option_name('document_mask')})", flush=True)
    run(options, units, manager, argv)
    return results_of(options, units)


def run(options: Options, units: list[Unit], manager, argv: list[str]) -> None:
    """Runs the units that have no valid result."""
    records = [Record(options, checkpoint) for checkpoint in options.checkpoints]
    todo = [unit for record in records for unit in record.clear(units)]
    if not todo:
        print("Everything is there already.")
        return
    for record in records:
        record.write()
    if options.num_gpus == 1:
        Worker(options, manager).run(units)
    else:
        run_workers(options, units, argv)


def run_workers(options: Options, units: list[Unit], argv: list[str]) -> None:
    """Runs the units in `num_gpus` processes.

    When one of them dies, all are started again, and skip the unit that it died of. Raises
    ValueError if they end before the first unit.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command = [*launcher, f"--nproc-per-node={options.num_gpus}", str(WORKER), *argv]
    while True:
        process = subprocess.Popen(command)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
        crashed = False
        for checkpoint in options.checkpoints:
            crashed |= Record(options, checkpoint).record_crashes(units)
        if code == 0:
            return
        if not crashed:
            problem = f"processes ended with exit code {code} before the first task (see above)"
            raise option_error("num_gpus", f"the {options.num_gpus} {problem}")


class Worker:
    """One rank of an evaluation, or its only process.

    A unit that fails is recorded, and the next one runs. If other ranks would wait for the rank on
    which it failed, that one ends its process instead, and `run_workers` starts all of them again.
    """

    def __init__(self, options: Options, manager):
        self.options = options
        self.manager = manager
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.teacher = None  # loaded for the first KL

    def run(self, units: list[Unit]) -> None:
        """Runs the units that are not in results.json, for every checkpoint."""
        if self.rank:
            os.environ["TQDM_DISABLE"] = "1"
        for checkpoint, label in labels(self.options.checkpoints).items():
            record = Record(self.options, checkpoint)
            todo = [unit for unit in units if unit.key not in record.results]
            if todo:
                self.run_checkpoint(label, record, todo)

    def run_checkpoint(self, label: str, record: Record, todo: list[Unit]) -> None:
        if self.rank == 0:
            record.begin(todo)
        try:
            lm = harness_model(record.checkpoint, self.options.batch_size)
            if self.teacher is None and any(unit.task == KL for unit in todo):
                self.teacher = load_model(self.options.teacher)
        except Exception as error:
            self.fail(record, todo, error)
            return
        for number, unit in enumerate(todo, 1):
            if self.rank == 0:
                record.begin([unit])
                print(f"== {label}, {number}/{len(todo)}: {unit.key}", flush=True)
            self.run_unit(unit, record, lm)
            gc.collect()  # a traceback may hold a batch on the GPU
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        record.end()

    def run_unit(self, unit: Unit, record: Record, lm) -> None:
        start = time.monotonic()
        task = None
        error = None
        try:
            task = build(unit, self.options, self.manager, lm)
        except Exception as failure:  # anything that a task's code or a download raises
            error = failure
        failed = torch.tensor([error is not None], device=lm.device)
        if lm.all_gather(failed).any():
            if self.rank == 0:
                why = "another process could not build its documents"
                if error is not None:
                    why = self.reason(error)
                record.put(unit, {"error": why})
                print(f"   FAILED: {why}", file=sys.stderr, flush=True)
            return
        try:
            result = measure(unit, self.options, task, lm, self.manager, self.teacher)
        except Exception as failure:
            self.fail(record, [unit], failure)
            return
        if self.rank == 0:
            record.put(unit, {**result, "seconds": round(time.monotonic() - start, 1)})

    def fail(self, record: Record, units: list[Unit], error: Exception) -> None:
        """Records that the units failed on this rank."""
        why = self.reason(error)
        print(f"   FAILED: {why}", file=sys.stderr, flush=True)
        if self.world_size > 1:  # the other ranks would wait for this one
            record.died.write_text(why)
            os._exit(1)
        for unit in units:
            record.put(unit, {"error": why})

    def reason(self, error: Exception) -> str:
        """An error in one line."""
        if isinstance(error, torch.OutOfMemoryError):
            setting = f"{option_name('batch_size')} {self.options.batch_size}"
            return f"out of GPU memory; {setting} is too large"
        text = one_line(error)
        return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"

"""Jobs that leave a file, done by one process per GPU: what the benchmarks of many runs share.

A job that is done is not repeated, and one that another process is at is left to it, so that the same
command resumes, and processes need no other order than the list's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.config import ConfigError
from runtime.files import FolderLockedError, atomic_write_text, locked, one_line

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "settings.json"
WAIT = 1.0  # seconds before a process looks again for a job whose needs are met


class JobFailed(Exception):
    """This job cannot be done, for a reason that needs no traceback: one line."""


class OutOfTime(Exception):
    """The job was stopped; the same command resumes it."""


@dataclass(frozen=True)
class Job:
    """Work that leaves `file`, once all of `needs` are there."""

    file: Path
    needs: tuple[Path, ...]
    run: Callable[[], None]

    @property
    def failure(self) -> Path:
        """Why it failed, while it counts as failed."""
        return self.file.with_name(f"{self.file.name}.failed")


def pending(jobs: list[Job]) -> list[Job]:
    """The jobs that are not done, nor failed, nor wait for one that has failed; `jobs` has what a job
    needs before it, or it does not matter."""
    dead: set[Path] = set()
    left = []
    for job in jobs:
        if job.file.is_file():
            continue
        if job.failure.is_file() or dead.intersection(job.needs):
            dead.add(job.file)
        else:
            left.append(job)
    return left


def failures(jobs: list[Job], out: Path) -> list[str]:
    """A line for each job that has failed. out: the folder of all files."""
    failed = [job for job in jobs if job.failure.is_file()]
    return [f"{job.file.relative_to(out)}: failed: {job.failure.read_text().strip()}" for job in failed]


def work(jobs: list[Job], minutes: float | None) -> None:
    """Does jobs that no other process does, the first one that can be done each time, until all are done
    or the time is up."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        missing = pending(jobs)
        if not missing:
            return
        try:
            if not any(all(path.is_file() for path in job.needs) and try_job(job) for job in missing):
                time.sleep(WAIT)
        except OutOfTime:
            return


def try_job(job: Job) -> bool:
    """Does a job, unless it is done or another process is at it; whether it was done here, or
    failed: what goes wrong, such as too little memory, costs this job and those that need it alone."""
    try:
        with locked(job.file.with_name(f".{job.file.name}.job"), str(job.file)):
            if job.file.is_file() or job.failure.is_file():
                return False
            try:
                job.run()
            except FolderLockedError:
                raise
            except (JobFailed, RuntimeError, ValueError, OSError) as error:
                if not isinstance(error, JobFailed):
                    traceback.print_exc()
                print(f"{job.file}: failed: {one_line(error)}", flush=True)
                atomic_write_text(job.failure, f"{one_line(error)}\n")
    except FolderLockedError:
        return False
    return True


def run_script(script: str, **options) -> None:
    """Runs a script of the project with these options, in a process of its own: the processes that
    tokenise import the main script again, which of a benchmark takes them seconds. Raises ConfigError
    if it fails."""
    command = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in options.items())]
    if code := subprocess.run(command).returncode:
        raise ConfigError(f"{script} ended with exit code {code}: see above")


def add_process_options(parser: argparse.ArgumentParser, minutes: str = "no job is begun after so many") -> None:
    """Those that `do_jobs` reads. minutes: what the end of this time means for the command."""
    parser.add_argument("--processes", type=int, help="default: one per GPU, one without")
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def do_jobs(jobs: list[Job], script: str, argv: list[str], args, minutes: float | None) -> None:
    """Does the jobs of a command: here if it is a worker or needs one process, else by `script --worker` in
    args.processes, by default one per GPU. Jobs that failed before are tried again. Raises ConfigError for a
    number of processes that makes no sense, and if a process fails."""
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes: {args.processes} must be at least 1")
    if not args.worker:
        for job in jobs:
            job.failure.unlink(missing_ok=True)
    count = args.processes or max(1, torch.cuda.device_count())
    if args.worker or count == 1:
        work(jobs, minutes)
    else:
        run_processes(count, Path(script).resolve(), argv, args.output_dir, jobs)


def check_same_settings(settings: dict, folder: Path) -> None:
    """Raises ConfigError if `folder` has figures of other settings."""
    file = folder / SETTINGS
    if not file.is_file():
        return
    found = json.loads(file.read_text())
    for name, value in settings.items():
        if found.get(name) != value:
            raise ConfigError(
                f"--output_dir: {folder} has figures with {name} {found.get(name)!r}, not {value!r}; name another"
            )


def claim_folder(settings: dict, folder: Path) -> None:
    """Makes `folder`, whose figures are of these settings alone. Raises ConfigError if it has others."""
    check_same_settings(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def run_processes(count: int, script: Path, argv: list[str], out: Path, jobs: list[Job]) -> None:
    """`script` with --worker in `count` processes, each with a GPU of its own if there are any; they
    log to process_N.log in `out`. Shows how many of `jobs` are done. Raises ConfigError if one fails."""
    gpus = torch.cuda.device_count()
    processes = []
    for i in range(count):
        environment = dict(os.environ)
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[i % gpus] if len(visible) == gpus else str(i % gpus)
        log = open(out / f"process_{i}.log", "a")  # noqa: SIM115 (the child writes to it)
        command = [sys.executable, str(script), *argv, "--worker"]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
    with tqdm(total=len(jobs), desc="jobs") as bar:
        while any(process.poll() is None for process in processes):
            time.sleep(WAIT)
            bar.update(sum(job.file.is_file() for job in jobs) - bar.n)
    codes = [process.returncode for process in processes]
    if any(codes):
        failed = next(i for i, code in enumerate(codes) if code)
        raise ConfigError(f"process {failed} ended with exit code {codes[failed]}: see {out / f'process_{failed}.log'}")

"""Files and folders that are whole or not there, and locks on those that one process may write at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BEAT = 10.0  # seconds between the signs of life of a lock's holder
WATCH = 35.0  # seconds without one after which a holder on another machine counts as dead
SETTLE = 3.0  # seconds in which a job on another machine that starts at the same time has written its name, too


class FolderLockedError(ValueError):
    """Another process writes there; the message is one line that names it."""


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all; one that was there stays until then."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)


FULL = "the file system is full (no space left, or a quota is used up)"


def one_line(error: BaseException) -> str:
    """An error as one line; those of the file system with what to look at."""
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{f'{error.filename}: ' if error.filename else ''}{FULL if full else error.strerror}"
    if "No space left on device" in str(error):  # from libraries that have errors of their own
        return FULL
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def why_not_written(error: BaseException, folder: Path) -> str:
    """Why writing to `folder` failed, in one line: PyTorch hides what the file system said."""
    return FULL if shutil.disk_usage(folder).free < 1 << 20 else one_line(error)


# ------------------------------------------------------------------------------------------------ locks
def _holder(file) -> dict:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # none, or its writer was killed half-way
        return {}


def _stat(path: Path) -> os.stat_result | None:
    """None if it is gone, which another process may bring about at any time."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _watch(path: Path) -> bool:
    """Whether the lock's holder shows a sign of life within WATCH seconds. Counts changes: clocks
    of machines differ."""
    first, end = _stat(path), time.monotonic() + WATCH
    while first is not None and time.monotonic() < end:
        time.sleep(1)
        now = _stat(path)
        if now is None:  # it has ended
            return False
        if now.st_mtime_ns != first.st_mtime_ns:
            return True
    return False


def _busy(what: str, them: dict) -> FolderLockedError:
    job = f", Slurm job {them['job']}" if them.get("job") else ""
    who = f"process {them['pid']} on {them['host']}{job}, since {them['since']}" if them else "another process"
    return FolderLockedError(f"{what} is being written by {who}; wait for it, end it, or name another folder")


def _take(path: Path, what: str):
    """The open, locked file. Raises Busy."""
    us = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    while True:
        file = open(path, "a+")
        locks_work, free = True, True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # some network file systems have no locks
            locks_work = False
        them = _holder(file)
        # A lock that the kernel gives may still be held on another machine, where the file system's
        # locks are local. A requeued job keeps its id, and Slurm runs it once.
        elsewhere = bool(them) and them["host"] != us["host"] and (them["job"] is None or them["job"] != us["job"])
        here = bool(them) and not locks_work and them["host"] == us["host"] and Path(f"/proc/{them['pid']}").exists()
        if not free or here or elsewhere and _watch(path):
            file.close()
            raise _busy(what, them)
        there = _stat(path)
        if there is not None and os.path.samestat(os.fstat(file.fileno()), there):
            file.truncate(0)
            file.write(json.dumps(us))
            file.flush()
            if us["job"] is not None:
                # Two jobs that start together on two machines both come this far where locks are
                # local: the last to write stays.
                os.fsync(file.fileno())
                time.sleep(SETTLE)
                with open(path) as again:
                    if (them := _holder(again)) != us:
                        file.close()
                        raise _busy(what, them)
            return file
        file.close()  # its last holder removed it between our open and our lock


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the block runs. What a killed process left is taken over.

    Raises Busy, with `what` as its subject, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, done = _take(path, what), threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            try:
                os.utime(path)
            except OSError:  # removed with its folder, or the file system is away for a moment
                continue

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        file.close()


# ------------------------------------------------------------------------------------------------ folders
@contextmanager
def atomic_directory(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends, and vanishes if it raises.

    replace: a `folder` that is there stays until the block has ended, and is then replaced. Without
    it, one that is there and not empty makes the end raise OSError. What a killed process left is
    cleared away. Raises Busy if another process makes the same folder.
    """
    temporary, old, lock = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old", "lock"))
    with locked(lock, str(folder)):
        if old.exists() and not folder.exists():  # killed between the two renames below
            os.replace(old, folder)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                sync(file)
            if replace and folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
            sync(folder.parent)
        finally:
            if old.exists() and not folder.exists():  # stopped between the two renames
                os.replace(old, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

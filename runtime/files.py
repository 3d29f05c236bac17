"""Atomic writes of files and folders, and lock files for what one process may write at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

BEAT = 10.0  # seconds between heartbeats of a lock's holder
WATCH = 35.0  # seconds without a heartbeat after which a holder on another machine counts as dead
TURN = 1.0  # seconds between two looks at a lock that another process holds
SETTLE = 3.0  # seconds to wait for another job that takes the same lock at the same time on another machine


class FolderLockedError(ValueError):
    """Another process is writing there; the message is one line that names it."""


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file atomically: until it is complete, the previous one stays."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)


FULL = "the file system is full (no space left, or a quota is used up)"


def one_line(error: BaseException) -> str:
    """An error as one line; for one of the file system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = FULL if full else error.strerror
        return f"{error.filename}: {reason}" if error.filename else reason
    if "No space left on device" in str(error):  # libraries raise errors of their own
        return FULL
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def why_not_written(error: BaseException, folder: Path) -> str:
    """Why writing to `folder` failed, in one line; PyTorch's error hides that the disk is full."""
    return FULL if shutil.disk_usage(folder).free < 1 << 20 else one_line(error)


# -------------------------------------------------------------------------------------------- locks
def _holder(file) -> dict:
    """What the holder wrote into its lock file (host, pid, job, since), or {}."""
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # empty, or its writer was killed while writing
        return {}


def _stat(path: Path) -> os.stat_result | None:
    """None if the file does not exist; another process may remove it at any time."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _watch(path: Path) -> bool:
    """Whether the lock's holder touches the file within WATCH seconds.

    Compares modification times only with each other, since the machines' clocks differ.
    """
    first = _stat(path)
    end = time.monotonic() + WATCH
    while first is not None and time.monotonic() < end:
        time.sleep(1)
        now = _stat(path)
        if now is None:  # the holder has ended
            return False
        if now.st_mtime_ns != first.st_mtime_ns:
            return True
    return False


def _busy(what: str, them: dict) -> FolderLockedError:
    who = "another process"
    if them:
        job = f", Slurm job {them['job']}" if them.get("job") else ""
        who = f"process {them['pid']} on {them['host']}{job}, since {them['since']}"
    return FolderLockedError(f"{what} is being written by {who}; wait for it, end it, or name another folder")


def _try_lock(file) -> bool | None:
    """Whether this process now holds the kernel's lock; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _is_held(path: Path, got_lock: bool | None, us: dict, them: dict) -> bool:
    """Whether the holder `them` of the lock file still runs, whatever the kernel's lock says."""
    if got_lock is False:
        return True
    if not them:
        return False
    if them["host"] == us["host"]:
        return got_lock is None and Path(f"/proc/{them['pid']}").exists()
    # Where the file system's locks are local to a machine, the kernel gives a lock that another
    # machine holds. A requeued job keeps its id, and Slurm runs it only once at a time.
    same_job = them["job"] is not None and them["job"] == us["job"]
    return not same_job and _watch(path)


def _take(path: Path, what: str):
    """The open, locked file. Raises FolderLockedError."""
    us = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    while True:
        file = open(path, "a+")  # noqa: SIM115 (stays open while the lock is held)
        got_lock = _try_lock(file)
        them = _holder(file)
        if _is_held(path, got_lock, us, them):
            file.close()
            raise _busy(what, them)
        there = _stat(path)
        if there is not None and os.path.samestat(os.fstat(file.fileno()), there):
            _write_holder(file, path, what, us)
            return file
        file.close()  # its last holder removed it between our open and our lock


def _write_holder(file, path: Path, what: str, us: dict) -> None:
    """Writes who holds the lock into the file. Raises FolderLockedError if another job did the same
    later."""
    file.truncate(0)
    file.write(json.dumps(us))
    file.flush()
    if us["job"] is None:
        return
    # Two jobs that start together on two machines both come this far where locks are local to a
    # machine: the last to write holds the lock.
    os.fsync(file.fileno())
    time.sleep(SETTLE)
    with open(path) as again:
        them = _holder(again)
    if them != us:
        file.close()
        raise _busy(what, them)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the block runs. The lock of a killed process is taken over.

    Raises FolderLockedError, with `what` as its subject, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _take(path, what)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            try:
                os.utime(path)
            except OSError:  # removed with its folder, or the file system is briefly unavailable
                continue

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def locked_in_turn(path: Path, what: str) -> Iterator[None]:
    """As `locked`, but waits while another process holds the lock, and says once that it does."""
    with ExitStack() as stack:
        waiting = False
        while True:
            try:
                stack.enter_context(locked(path, what))
                break
            except FolderLockedError as error:
                if not waiting:
                    print(f"Waiting: {one_line(error)}", flush=True)
                waiting = True
                time.sleep(TURN)
        yield


# ------------------------------------------------------------------------------------------ folders
def _share(file: Path, folder: Path) -> None:
    """Gives `file` the read permissions of `folder`, which are those of the user's umask."""
    permissions = stat.S_IMODE(file.lstat().st_mode)
    readable = permissions | folder.stat().st_mode & 0o444
    if permissions != readable and not file.is_symlink():
        file.chmod(readable)


@contextmanager
def atomic_directory(folder: Path, replace: bool = False, resumable: bool = False) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block ends, and removed if it raises.

    replace: an existing `folder` stays until the block has ended, and is then replaced. Without it,
    an existing folder that is not empty makes the renaming raise OSError. Remains of a killed
    process are removed. resumable: they, and what a block that raises leaves, are kept for the next
    call. Files that a library made readable by their owner alone, as safetensors does, get the
    folder's read permissions. Raises FolderLockedError if another process is writing the same folder.
    """
    temporary = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, str(folder)):
        if old.exists() and not folder.exists():  # killed between the two renames below
            os.replace(old, folder)
        for left in (old,) if resumable else (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(exist_ok=resumable)
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _share(file, temporary)
                sync(file)
            if replace and folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
            sync(folder.parent)
        finally:
            if old.exists() and not folder.exists():  # interrupted between the two renames
                os.replace(old, folder)
            if not resumable:
                shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

"""Real processes for fault tests, forked from this one, which has imported everything, so that a
start takes a second.

A child behaves as `python train.py ...` does: it has its own process, ranks, signals and files. The
parent never starts a thread of PyTorch's, which a fork would lose.
"""

import contextlib
import io
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds to wait for what takes a few on a quiet machine


class Child:
    """A forked process that runs function(), with its output in a file."""

    def __init__(self, function, log: Path, environment: dict):
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
                sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
                os.environ.update(environment)
                function()
                code = 0
            except SystemExit as error:
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no end after {seconds} s:\n{self.output()[-3000:]}")
            time.sleep(0.02)
        return self.code

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Job:
    """The ranks of one training run. Like a launcher, it ends the other ranks when one has
    failed."""

    def __init__(self, ranks: list[Child]):
        self.ranks = ranks

    def wait(self, seconds=PATIENCE):
        """The exit code of a rank that failed, preferably of one that a signal ended; 0 if none
        failed."""
        end = time.monotonic() + seconds
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if bad := sorted(code for code in codes if code):  # several, if this process slept for long
                grace = time.monotonic() + 20
                while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < grace:
                    time.sleep(0.02)
                self.kill()
                return bad[0]
            if None not in codes:
                return 0
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no end after {seconds} s:\n{self.output()[-3000:]}")
            time.sleep(0.02)

    def wait_for(self, text, seconds=PATIENCE):
        """Until the output holds `text` (a pattern)."""
        end = time.monotonic() + seconds
        while not re.search(text, self.output()):
            assert time.monotonic() < end and any(rank.poll() is None for rank in self.ranks), self.output()[-3000:]
            time.sleep(0.01)

    def kill(self, number=signal.SIGKILL):
        for rank in self.ranks:
            rank.kill(number)

    def output(self):
        return "\n".join(rank.output() for rank in self.ranks)


def free_port():
    """A free port below the range of outgoing connections, one of which might take it before it is
    used."""
    for port in random.SystemRandom().sample(range(12000, 32000), 99):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def start(file, *options, log, ranks=1, hook=None, environment=None):
    """Starts `train.py --cfg file options...` on `ranks` processes; hook(rank) runs first in each,
    to inject its fault."""
    import train

    def body(rank):
        if hook is not None:
            hook(rank)
        train.main(["--cfg", str(file), *map(str, options)])

    port = free_port()
    children = []
    for rank in range(ranks):
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "DS_ACCELERATOR": "cpu",
        }
        values = {name: str(value) for name, value in values.items()} | (environment or {})
        children.append(Child(lambda rank=rank: body(rank), Path(f"{log}.rank{rank}"), values))
    return Job(children)


def import_once():
    """Imports what every child would import for itself. Call it before the first start."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import convert_ckpt  # noqa: F401
    import hf_trainer  # noqa: F401
    import preflight  # noqa: F401
    import stages  # noqa: F401
    import train  # noqa: F401

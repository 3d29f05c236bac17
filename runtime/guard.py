"""What ends a run early, and how: signals, ranks that hang, figures that are not finite."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints import CheckpointError, checkpoints
from .config import ConfigError
from .data import DataError
from .files import FolderLockedError, one_line

if TYPE_CHECKING:
    from .context import RunContext

# Exit code of a run that was told to stop and resumes when it is started again (EX_TEMPFAIL of sysexits.h).
REQUEUE = 75
# Exit code of a run whose ranks make no progress (EX_SOFTWARE).
HUNG = 70


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the message is one line with step, rank, layer and
    what to try."""


class StopSignals:
    """SIGTERM (preemption) and SIGUSR1 (a time limit is near). While `saving` is set they are
    remembered in `received`, for the training loop to save; before and after, with nothing to save,
    they end the process at once, with REQUEUE. So does the file $STOP_FILE of the launch scripts:
    one came before this process listened, and was lost.

    As a context, until its body ends, and the process with it; or, with `to_the_end` False, until
    the process goes on.
    """

    def __init__(self, to_the_end: bool = True):
        self.received: str | None = None
        self.saving = False
        self.to_the_end = to_the_end
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
        if os.path.exists(os.environ.get("STOP_FILE", "")):
            self._handle(signal.SIGUSR1, None)

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        if not self.saving:
            # Not by print: the signal may have come while the same thread was in one, which would
            # raise instead.
            os.write(1, f"{self.received}: stopping; run the same command again\n".encode())
            raise SystemExit(REQUEUE)

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, error, *_) -> None:
        """Where the process ends both are ignored from here on: Python's own end brings back their
        defaults, of which a process that has done its work, or has its exit code, would die."""
        for number, before in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.to_the_end or error is not None else before)


class Watchdog:
    """Ends the process, with every rank's position and the stack, once this rank has not moved for
    `seconds`.

    The ranks tell each other their positions through a store of rank 0's, so that the message can
    name the one that hangs: the others only wait for it. All ranks construct it together, after
    torch.distributed is initialised. As a context it watches its body.
    """

    def __init__(self, seconds: float):
        import torch.distributed as dist

        self.seconds, self.rank, self.world_size = seconds, dist.get_rank(), dist.get_world_size()
        self.moves, self.where, self.last = 0, "the start", time.monotonic()
        self.done = threading.Event()
        self.patience = min(10.0, seconds / 2)  # for rank 0's store, whose process may be the one that hangs
        self.store = self.sharing = None
        if self.world_size > 1:
            address = [None]
            if self.rank == 0:
                host = os.environ.get("MASTER_ADDR", "127.0.0.1")
                self.server = dist.TCPStore(
                    host, 0, self.world_size, True, timedelta(seconds=60), wait_for_workers=False
                )
                address = [(host, self.server.port)]
            dist.broadcast_object_list(address)
            self.store = dist.TCPStore(
                *address[0], self.world_size, False, timedelta(seconds=60), wait_for_workers=False
            )
            self.sharing = threading.Thread(target=self._share, daemon=True)
            self.sharing.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, where: str) -> None:
        """The main thread has come to `where`."""
        self.moves, self.where, self.last = self.moves + 1, where, time.monotonic()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_) -> None:
        """Ends the watch. Python must not end while a thread is inside the store, which is C++:
        that would abort the process."""
        self.done.set()
        if self.sharing is not None:
            self.sharing.join(self.patience)

    def _share(self) -> None:
        """Tells the others where this rank is. A thread of its own: a store that does not answer
        must not stop the watch."""
        told = None
        while not self.done.wait(min(1.0, self.seconds / 8)):
            if told != self.moves:
                told = self.moves
                try:
                    self.store.set(f"position{self.rank}", f"{told} {self.where}")
                except Exception:  # rank 0 is gone: the end of the run says why
                    return

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.seconds / 8)):
            if time.monotonic() - self.last > self.seconds:
                self._end()

    def _ask(self, positions: dict) -> None:
        for rank in range(self.world_size):
            if self.store.check([f"position{rank}"]):
                moves, _, where = self.store.get(f"position{rank}").decode().partition(" ")
                positions[rank] = int(moves), where

    def _end(self) -> None:
        positions = dict.fromkeys(range(self.world_size))
        if self.store is not None:
            answer: dict = {}
            asking = threading.Thread(target=self._ask, args=(answer,), daemon=True)
            asking.start()
            asking.join(self.patience)
            positions |= answer
            if not answer:  # nobody's position is known: it is rank 0 that does not answer
                positions |= {rank: (self.moves, self.where) for rank in range(1, self.world_size)}
        positions[self.rank] = self.moves, self.where
        moves = {rank: at[0] if at else -1 for rank, at in positions.items()}
        behind = [rank for rank, count in moves.items() if count == min(moves.values())]
        others = [rank for rank in behind if rank != self.rank]
        if len(behind) < self.world_size and others:
            where = positions[others[0]]
            why = f"waiting for rank {', '.join(map(str, others))}, which " + (
                f"is at {where[1]}" if where else "does not answer"
            )
        elif len(behind) < self.world_size or self.world_size == 1:
            why = "this rank hangs"
        else:
            why = "all ranks stopped there"
        sys.stdout.flush()
        print(
            f"train.py: rank {self.rank} of {self.world_size} on {socket.gethostname()}: no progress for {self.seconds:.0f} s at "
            f"{self.where}: {why}; checkpoints are kept, the same command goes on (train.hang_minutes sets the patience). "
            "Its stack:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(HUNG)


# ------------------------------------------------------------------------------------------------ errors in one line
@contextmanager
def failures_in_one_line(rank: int, world_size: int) -> Iterator[None]:
    """Ends the process with one line for an error that the user can correct, and with a traceback and
    one line that names the rank for any other."""
    who = f"rank {rank} of {world_size} on {socket.gethostname()}"
    try:
        yield
    except NonFiniteError as error:  # all ranks raise the same one
        sys.exit(f"train.py: error: {error}" if rank == 0 else 1)
    except (ConfigError, DataError, FolderLockedError, CheckpointError, OSError) as error:
        sys.exit(f"train.py: error: {who}: {one_line(error)}")
    except Exception as error:
        if re.search("Connection (closed|reset) by peer", str(error)):
            sys.exit(f"train.py: {who}: another rank ended first; see its own message")
        if "No space left" in str(error):
            sys.exit(f"train.py: error: {who}: {one_line(error)}")
        traceback.print_exc()
        sys.exit(f"train.py: {who} failed: {type(error).__name__}: {one_line(error)}")


@contextmanager
def memory_advice(ctx: RunContext) -> Iterator[None]:
    """Turns an out-of-memory error of the GPU into a ConfigError that names the settings that can
    still be changed, those that cost least first."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = "; ".join(settings_that_save_memory(ctx))
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        amount = f" ({wanted[1]} more were wanted)" if wanted else ""
        raise ConfigError(f"out of GPU memory{amount}; try {settings}") from None


def settings_that_save_memory(ctx: RunContext) -> list[str]:
    """The settings that would lower the run's memory per GPU, those that cost least first.

    A resumed run keeps its optimiser and its ZeRO stage.
    """
    train, stage = ctx.cfg.train, ctx.cfg.stage
    several = ctx.world_size > 1
    sharded_weights = ctx.zero_stage == 3
    fresh = not checkpoints(Path(train.output_dir))
    advice = []
    if train.micro_batch_size > 1:
        advice.append(f"train.micro_batch_size below {train.micro_batch_size}, which changes no result")
    if train.cuda_graphs and not sharded_weights:
        advice.append("train.cuda_graphs=false, which changes no result")
    if train.optimizer == "adamw" and fresh:
        advice.append("train.optimizer=adamw_8bit")
    if stage > 1 and not train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=mlp")
    if stage > 1 and train.gradient_checkpointing is not True:
        advice.append("train.gradient_checkpointing=true")
    if stage == 2 and train.kd_teacher_shard != "always" and several:
        advice.append("train.kd_teacher_shard=always")
    if stage == 2 and train.kd_teacher_offload == "none":
        advice.append("train.kd_teacher_offload=cpu")
    if stage > 1 and not sharded_weights and several and fresh:
        advice.append("train.zero_stage=3")
    return [*advice, "more GPUs"]


# ------------------------------------------------------------------------------------------------ what is not finite
def _finite(value) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or value.isfinite().all().item()
    if isinstance(value, dict):  # Hugging Face's outputs are dicts too
        value = tuple(value.values())
    return not isinstance(value, (tuple, list)) or all(map(_finite, value))


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_not_finite(model, forward: Callable[[], object], backward: Callable[[object], None] | None) -> str | None:
    """Runs forward() and names the first module of `model` with an output that is not finite; or,
    if backward is given, runs backward(forward()) too and names the first parameter with such a
    gradient. None if all are finite."""
    found: list[str] = []

    def output_of(name):
        def hook(module, inputs, output):
            if not found and not _finite(output):
                found.append(f"the output of {name or 'the model'}")

        return hook

    def gradient_of(name):
        def hook(gradient):
            if not found and not _finite(gradient):
                found.append(f"the gradient of {name}")

        return hook

    if backward is None:
        handles = [module.register_forward_hook(output_of(name)) for name, module in model.named_modules()]
    else:
        handles = [p.register_hook(gradient_of(name)) for name, p in model.named_parameters() if p.requires_grad]
    with _hooks(handles):
        result = forward()
        if backward is not None:
            backward(result)
    return found[0] if found else None

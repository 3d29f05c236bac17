"""What ends a run early, and how: signals, ranks that hang, NaN and Inf, and errors in one line."""

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
from typing import TYPE_CHECKING

from .checkpoints import CheckpointError, checkpoints
from .config import ConfigError
from .data import DataError
from .files import FolderLockedError, one_line
from .run_folder import CONFIG

if TYPE_CHECKING:
    from .context import RunContext

# Exit code of a run that was told to stop and resumes when it is started again (EX_TEMPFAIL of
# sysexits.h).
REQUEUE = 75
# Exit code of a run whose ranks make no progress (EX_SOFTWARE).
HUNG = 70


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or Inf; the message is one line with step, rank, layer and
    what to try."""


class StopSignals:
    """Handles SIGTERM (preemption) and SIGUSR1 (a time limit is near).

    While `saving` is set, a signal is stored in `received` and the training loop saves and stops;
    otherwise there is nothing to save and a signal ends the process at once, with REQUEUE. So does
    the file $STOP_FILE, with which the launch scripts pass on a signal that came before this
    process handled signals.

    to_the_end: the process ends after the context, so both signals are ignored after it; otherwise
    the handlers from before are restored.
    """

    def __init__(self, to_the_end: bool = True):
        self.received: str | None = None
        self.saving = False
        self.to_the_end = to_the_end
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self._handle)
        if os.path.exists(os.environ.get("STOP_FILE", "")):
            self._handle(signal.SIGUSR1, None)

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        if not self.saving:
            # Not print(): the signal may have interrupted a print() of this thread, and a nested
            # one raises.
            os.write(1, f"{self.received}: stopping; run the same command again\n".encode())
            raise SystemExit(REQUEUE)

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, error, *_) -> None:
        """Ignores both signals if the process is about to end: Python restores their default
        actions while it exits, which would kill a process that has finished, or replace its exit
        code."""
        process_ends = self.to_the_end or error is not None
        for number, before in self.before.items():
            signal.signal(number, signal.SIG_IGN if process_ends else before)


class Watchdog:
    """Ends the process, with every rank's position and the stack, once this rank has made no
    progress for `seconds`.

    The ranks share their positions through a store of rank 0's, so that the message can name the
    rank that hangs: the others only wait for it. All ranks construct it together, after
    torch.distributed is initialised. As a context manager it watches its body.
    """

    def __init__(self, seconds: float):
        import torch.distributed as dist

        self.seconds = seconds
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.moves = 0  # number of beats
        self.where = "the start"
        self.last = time.monotonic()
        self.done = threading.Event()
        self.patience = min(10.0, seconds / 2)  # for rank 0's store, whose process may be the one that hangs
        self.store = None
        self.sharing = None
        if self.world_size > 1:
            self._connect()
            self.sharing = threading.Thread(target=self._share, daemon=True)
            self.sharing.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _connect(self) -> None:
        """Starts the store on rank 0 and connects all ranks to it."""
        import torch.distributed as dist

        timeout = timedelta(seconds=60)
        address = [None]
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self.server = dist.TCPStore(host, 0, self.world_size, True, timeout, wait_for_workers=False)
            address = [(host, self.server.port)]
        dist.broadcast_object_list(address)
        self.store = dist.TCPStore(*address[0], self.world_size, False, timeout, wait_for_workers=False)

    def beat(self, where: str) -> None:
        """The main thread has come to `where`."""
        self.moves += 1
        self.where = where
        self.last = time.monotonic()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_) -> None:
        """Ends the watch, and waits for the thread that uses the store: a process that exits while
        a thread is in the store's C++ code is aborted."""
        self.done.set()
        if self.sharing is not None:
            self.sharing.join(self.patience)

    def _share(self) -> None:
        """Tells the other ranks the position of this one, in a thread of its own: a store that does
        not answer must not stop the watch."""
        told = None
        while not self.done.wait(min(1.0, self.seconds / 8)):
            if told != self.moves:
                told = self.moves
                try:
                    self.store.set(f"position{self.rank}", f"{told} {self.where}")
                except Exception:  # rank 0 has ended; its own message says why
                    return

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.seconds / 8)):
            if time.monotonic() - self.last > self.seconds:
                self._end()

    def _ask(self, positions: dict) -> None:
        """Fills in the positions that the store has: rank -> (number of beats, where)."""
        for rank in range(self.world_size):
            if self.store.check([f"position{rank}"]):
                moves, _, where = self.store.get(f"position{rank}").decode().partition(" ")
                positions[rank] = (int(moves), where)

    def _positions(self) -> dict[int, tuple[int, str] | None]:
        """The last known position of every rank; None for a rank that does not answer."""
        positions = dict.fromkeys(range(self.world_size))
        if self.store is not None:
            answer: dict = {}
            asking = threading.Thread(target=self._ask, args=(answer,), daemon=True)
            asking.start()
            asking.join(self.patience)
            positions |= answer
            if not answer:  # no position is known: rank 0, which has the store, does not answer
                positions |= {rank: (self.moves, self.where) for rank in range(1, self.world_size)}
        positions[self.rank] = (self.moves, self.where)
        return positions

    def _why(self) -> str:
        """Which rank hangs: the one with the fewest beats."""
        positions = self._positions()
        moves = {rank: position[0] if position else -1 for rank, position in positions.items()}
        behind = [rank for rank, count in moves.items() if count == min(moves.values())]
        others = [rank for rank in behind if rank != self.rank]
        some_are_ahead = len(behind) < self.world_size
        if some_are_ahead and others:
            position = positions[others[0]]
            state = f"is at {position[1]}" if position else "does not answer"
            return f"waiting for rank {', '.join(map(str, others))}, which {state}"
        if some_are_ahead or self.world_size == 1:
            return "this rank hangs"
        return "all ranks stopped there"

    def _end(self) -> None:
        why = self._why()
        sys.stdout.flush()
        print(
            f"train.py: rank {self.rank} of {self.world_size} on {socket.gethostname()}: no progress for "
            f"{self.seconds:.0f} s at {self.where}: {why}; checkpoints are kept, rerun the command to resume "
            "(train.hang_minutes sets the patience). Its stack:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(HUNG)


# ------------------------------------------------------------------------ errors in one line
@contextmanager
def failures_in_one_line(rank: int, world_size: int) -> Iterator[None]:
    """Ends the process with one line for an error that the user can correct, and with a traceback
    and one line that names the rank for any other."""
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
def memory_advice(ctx: RunContext, uses_graphs: Callable[[], bool]) -> Iterator[None]:
    """Turns an out-of-memory error of the GPU into a ConfigError that names the settings that can
    still be changed, those that cost least first.

    uses_graphs: whether passes of the run are CUDA graphs; called when memory is exhausted.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = "; ".join(settings_that_save_memory(ctx, uses_graphs()))
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        amount = f" ({wanted[1]} more were wanted)" if wanted else ""
        raise ConfigError(f"out of GPU memory{amount}; try {settings}") from None


def settings_that_save_memory(ctx: RunContext, uses_graphs: bool) -> list[str]:
    """The settings that would lower the run's memory per GPU, those that cost least first.

    A resumed run keeps its optimiser and its ZeRO stage, and a folder that holds a run takes no
    other: before the first checkpoint these two are for a new folder.
    """
    train = ctx.cfg.train
    size = ctx.plan.micro_batch_size
    fresh = not checkpoints(ctx.output_dir)
    folder = " with a new train.output_dir" if (ctx.output_dir / CONFIG).is_file() else ""
    options = {
        f"train.micro_batch_size below {size}, which changes no result": size > 1,
        "train.cuda_graphs=false, which changes no result": uses_graphs,
        f"train.optimizer=adamw_8bit{folder}": train.optimizer == "adamw" and fresh,
    }
    if ctx.cfg.stage > 1:
        checkpointing = train.gradient_checkpointing
        options["train.gradient_checkpointing=mlp"] = not checkpointing
        options["train.gradient_checkpointing=true"] = checkpointing is not True
    if ctx.cfg.stage == 2:
        options["train.kd_teacher_shard=always"] = train.kd_teacher_shard != "always" and ctx.world_size > 1
        options["train.kd_teacher_offload=cpu"] = train.kd_teacher_offload == "none"
    if ctx.cfg.stage > 1:
        options[f"train.zero_stage=3{folder}"] = ctx.zero_stage < 3 and ctx.world_size > 1 and fresh
    return [setting for setting, helps in options.items() if helps] + ["more GPUs"]


# ------------------------------------------------------------------------ NaN and Inf
def _finite(value) -> bool:
    """Whether all floating-point tensors in a module's output are finite."""
    import torch

    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or value.isfinite().all().item()
    if isinstance(value, dict):  # Hugging Face's outputs are dicts too
        return all(_finite(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in value)
    return True


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_not_finite(model, forward: Callable[[], object], backward: Callable[[object], None] | None) -> str | None:
    """The first output or gradient of `model` that is NaN or Inf, in words, or None.

    Runs forward() and looks at the outputs of all modules; or, if backward is given, runs
    backward(forward()) and looks at the gradients of all parameters.
    """
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

    handles = []
    if backward is None:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(output_of(name)))
    else:
        for name, p in model.named_parameters():
            if p.requires_grad:
                handles.append(p.register_hook(gradient_of(name)))
    with _hooks(handles):
        result = forward()
        if backward is not None:
            backward(result)
    return found[0] if found else None

"""The process environment of a training script: ranks, device, Triton's cache, Weights & Biases."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import warnings
from pathlib import Path

from .config import ConfigError

WANDB_PROJECT = "hybrid-distillation"  # default of the environment variable of that name


def set_up_process() -> tuple[int, int]:
    """Sets the environment variables that DeepSpeed, Triton and PyTorch read; returns (rank, world
    size).

    Call it before they are imported. A process that no launcher started becomes rank 0 of 1.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
        }
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    # Ranks that share a cache folder, perhaps on a network file system, race for its files.
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    os.environ["TRITON_CACHE_DIR"] = str(cache.expanduser().absolute() / f"rank{rank}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    faulthandler.enable()  # a data file that is truncated while it is mapped ends a process with SIGBUS: print where
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    return rank, world_size


def set_up_device() -> str:
    """Returns "cuda" or "cpu", and makes DeepSpeed use it. On a CPU DeepSpeed's shared-memory
    collectives are switched off: compiling them takes a minute, and gloo does the same."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return "cuda"
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return "cpu"


def init_distributed(device: str, hang_minutes: float) -> None:
    """Initialises torch.distributed and DeepSpeed; call it after `set_up_device`.

    PyTorch's timeouts are longer than the watchdog's, whose message is clearer. A single process uses
    no port, so that several such runs can share a machine; runs of several processes need a
    --master_port each.
    """
    from datetime import timedelta

    import deepspeed
    import torch

    backend = "nccl" if device == "cuda" else "gloo"
    timeout = timedelta(minutes=1.5 * hang_minutes + 5)
    if os.environ["WORLD_SIZE"] == "1":
        torch.distributed.init_process_group(
            backend, timeout=timeout, rank=0, world_size=1, store=torch.distributed.HashStore()
        )
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def check_optimizer(name: str) -> None:
    """Raises ConfigError if train.optimizer `name` needs a package that is not installed."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; install it or set it to adamw"
        )


def mark_done(rank: int) -> None:
    """Creates the file done_<rank> in $JOB_DIR, which tells the launch scripts that this rank has
    finished.

    A launcher that was killed exits with 0 too.
    """
    job = os.environ.get("JOB_DIR", "")
    if os.path.isdir(job):
        Path(job, f"done_{rank}").touch()


def wandb_wanted(report_to: str) -> bool:
    """Whether to report to Weights & Biases: as train.report_to says, or with "auto" if W&B's own
    environment variables are set.

    Raises ConfigError if it was asked for and is not installed.
    """
    installed = importlib.util.find_spec("wandb") is not None
    if report_to == "wandb" and not installed:
        raise ConfigError("train.report_to: wandb is not installed; install it or set it to none")
    is_set_up = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    return report_to == "wandb" or (report_to == "auto" and installed and is_set_up)

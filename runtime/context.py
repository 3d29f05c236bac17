"""What a training run is, once it is set up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .batch_plan import BatchPlan
from .config import Config
from .data import Chunks, data_fingerprint
from .guard import StopSignals, Watchdog


@dataclass(frozen=True)
class RunContext:
    """What the parts of a training run share. The fields with defaults are set once the ranks have
    met.

    rank: of this process. log: prints a line on rank 0 and does nothing on the others.
    report_to_wandb: log to Weights & Biases too, beside metrics.jsonl. device: "cuda" or "cpu".
    zero_stage: DeepSpeed ZeRO stage of the student. resume: the checkpoint to load, as these
    processes can load it. stop: the signals of this process. watchdog: ends a rank that hangs.
    """

    cfg: Config
    plan: BatchPlan
    chunks: Chunks
    rank: int
    log: Callable[[str], None]
    report_to_wandb: bool = False
    device: str = "cpu"
    zero_stage: int = 1
    resume: Path | None = None
    stop: StopSignals | None = None
    watchdog: Watchdog | None = None

    @property
    def world_size(self) -> int:
        return self.plan.world_size

    @property
    def output_dir(self) -> Path:
        return Path(self.cfg.train.output_dir)

    @property
    def checkpoint_facts(self) -> dict:
        """What the index of a checkpoint records of its run, to check a resume against."""
        return {
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "data": data_fingerprint(self.chunks.metadata),
        }

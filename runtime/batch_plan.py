"""How many steps a run takes, and how a batch is divided over devices and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import Config, ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """`steps` optimiser steps of batch_size = world_size x grad_accum x micro_batch_size
    sequences."""

    steps: int
    batch_size: int
    micro_batch_size: int
    grad_accum: int
    world_size: int
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def warmup_limit(self) -> int:
        """A tenth of the run, so that warm-up is not most of a short run."""
        return max(1, self.steps // 10)

    def every(self, steps: int | None) -> int:
        """`steps`, or a tenth of the run for None; at most the run's length, so that there is at
        least one checkpoint and one evaluation."""
        return min(self.steps, steps or max(1, self.steps // 10))

    def epochs(self, num_chunks: int) -> float:
        """How often each of `num_chunks` sequences is read."""
        return self.steps * self.batch_size / num_chunks


def micro_batch_sizes(cfg: Config, world_size: int) -> list[int]:
    """The sizes of which a whole number of micro-batches per device makes train.batch_size, in ascending
    order; none where the number of devices does not divide it."""
    share, remainder = divmod(cfg.train.batch_size, world_size)
    return [] if remainder else [size for size in range(1, share + 1) if share % size == 0]


def with_micro_batch_size(cfg: Config, size: int) -> Config:
    return replace(cfg, train=replace(cfg.train, micro_batch_size=size))


def batch_plan(cfg: Config, world_size: int) -> BatchPlan:
    """The plan of a run. Raises ConfigError unless the global batch is exactly train.batch_size.

    With train.micro_batch_size auto, before a size is chosen, it is the plan of micro-batches of one
    sequence.
    """
    train = cfg.train
    micro_batch_size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    per_pass = micro_batch_size * world_size
    if train.batch_size % per_pass:
        nearest = max(1, round(train.batch_size / per_pass)) * per_pass
        raise ConfigError(
            f"train.batch_size: {train.batch_size} must be a multiple of micro_batch_size x devices "
            f"({micro_batch_size} x {world_size} = {per_pass}); try {nearest} or a smaller micro_batch_size"
        )
    tokens_per_step = train.batch_size * train.train_seq_len
    return BatchPlan(
        steps=train.max_steps or max(1, train.target_tokens // tokens_per_step),
        batch_size=train.batch_size,
        micro_batch_size=micro_batch_size,
        grad_accum=train.batch_size // per_pass,
        world_size=world_size,
        seq_len=train.train_seq_len,
    )

"""`train.micro_batch_size: auto`: the size of micro-batches is measured on the GPU before a run's
first step.

Each rank runs forward and backward passes of its stage's loss, before DeepSpeed's engine exists and
so without collectives: a rank that runs out of memory leaves no other waiting. What the engine will
allocate is added by arithmetic. Then the ranks agree.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from runtime.batch_plan import batch_plan, micro_batch_sizes, with_micro_batch_size
from runtime.config import ConfigError
from runtime.context import RunContext

import torch
import torch.distributed as dist
from tqdm import tqdm

from optim import STATE_BYTES
from preflight import calibration_warning, with_whole_eval_batches
from stages import GIB, Stage, bytes_of, first_rows, shard_teacher, training_rows, use_cuda_graphs

MARGIN = 0.08  # of the GPU's memory, for fragmentation and for buffers of DeepSpeed and NCCL
GAIN = 0.03  # of the throughput: what a larger size must add to be worth its memory
# Bytes per parameter that an optimiser step allocates and frees: gradients in fp32, and a flat copy
# of them in bf16 or the square roots of AdamW's second moments.
STEP_BYTES = 6


@dataclass(frozen=True)
class Trial:
    """A size on one rank: the bytes that training with it needs, None if memory ran out, and whether
    the GPU has them; tokens per second of this rank."""

    size: int
    need: int | None
    fits: bool
    speed: float


class GpuMemory:
    """The memory of this process's GPU, and the time of what runs on it. room: bytes that tensors of
    the process may take."""

    def __init__(self):
        free, total = torch.cuda.mem_get_info()
        self.room = free + torch.cuda.memory_reserved() - int(MARGIN * total)

    def measure(self, run: Callable[[], None]) -> tuple[int, float]:
        """The largest number of bytes allocated during run(), and its seconds, once its kernels are
        compiled."""
        repetitions = 2
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for _ in range(repetitions):
            run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), (time.perf_counter() - begin) / repetitions

    def release(self) -> None:
        """Returns what is no longer in use to the GPU."""
        gc.collect()
        torch.cuda.empty_cache()


def memory_of(device: str) -> GpuMemory | None:
    """None for a CPU, where PyTorch does not know how much memory its tensors take."""
    return GpuMemory() if device == "cuda" else None


def with_measured_micro_batch(ctx: RunContext, stage: Stage) -> RunContext:
    """The run with a number for train.micro_batch_size. All ranks call it together and choose alike.

    Raises torch.OutOfMemoryError if not even micro-batches of one sequence fit.
    """
    memory = memory_of(ctx.device)
    if memory is None:
        ctx.log("train.micro_batch_size: auto: 1 on a CPU, whose memory is not measured")
        size = 1
    else:
        size = _measured_size(ctx, stage, memory)
    cfg = with_micro_batch_size(ctx.cfg, size)
    plan = batch_plan(cfg, ctx.world_size)
    if warning := calibration_warning(cfg, plan):
        ctx.log(warning)
    return replace(ctx, cfg=cfg, plan=plan, chunks=with_whole_eval_batches(ctx.chunks, cfg, plan))


def _measured_size(ctx: RunContext, stage: Stage, memory: GpuMemory) -> int:
    sharded_teacher = _shards_teacher(ctx, stage)
    added = _engine_bytes(ctx, stage, sharded_teacher)
    with _left_as_it_was(stage):
        trials = _trials(ctx, stage, memory, added)
    memory.release()
    ranks = [None] * ctx.world_size
    dist.all_gather_object(ranks, (memory.room, trials))
    room = min(room for room, _ in ranks)
    # Up to the first size that does not fit on some rank.
    agreed = [_on_all_ranks(of_size) for of_size in zip(*(trials for _, trials in ranks))]
    if agreed[0].need is None:
        if ctx.zero_stage == 3 or sharded_teacher:
            raise ConfigError(
                "train.micro_batch_size: auto is measured with the whole weights of student and teacher on each GPU, "
                "where they do not fit; set a number"
            )
        raise torch.OutOfMemoryError("micro-batches of one sequence do not fit")
    chosen = _choice(agreed)
    ctx.log(_report(chosen, room, agreed))
    return chosen


def _on_all_ranks(trials: tuple[Trial, ...]) -> Trial:
    """The trial of a size by the ranks' largest need and lowest speed."""
    needs = [trial.need for trial in trials]
    return Trial(
        size=trials[0].size,
        need=None if None in needs else max(needs),
        fits=all(trial.fits for trial in trials),
        speed=min(trial.speed for trial in trials),
    )


def _choice(trials: list[Trial]) -> int:
    """The smallest size that is as fast as any that fits, within GAIN; the smallest of all if none
    leaves the margin."""
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return trials[0].size
    fastest = max(trial.speed for trial in fitting)
    return next(trial.size for trial in fitting if trial.speed >= (1 - GAIN) * fastest)


def _report(chosen: int, room: int, trials: list[Trial]) -> str:
    tried = "; ".join(map(_shown, trials))
    line = f"train.micro_batch_size: auto: {chosen} (GPU memory for training: {room / GIB:.2f} GiB; {tried})"
    if any(trial.fits for trial in trials):
        return line
    return f"{line}; none leaves {MARGIN:.0%} of the GPU's memory free, so it may run out"


def _shown(trial: Trial) -> str:
    if trial.need is None:
        return f"{trial.size}: out of memory"
    too_much = "" if trial.fits else ", too much"
    return f"{trial.size}: {trial.speed:,.0f} tokens/s per GPU, {trial.need / GIB:.2f} GiB{too_much}"


# ------------------------------------------------------------------------ one rank
def _sizes(ctx: RunContext) -> list[int]:
    """The sizes that divide a rank's share of the batch, and for which there are enough chunks to
    evaluate and to calibrate."""
    most = ctx.plan.batch_size
    if ctx.chunks.heldout is not None:
        most = len(ctx.chunks.heldout) // ctx.world_size
    if batches := ctx.cfg.train.calibrate_init:
        most = min(most, len(ctx.chunks.train) // batches)
    return [size for size in micro_batch_sizes(ctx.cfg, ctx.world_size) if size <= most]


def _trials(ctx: RunContext, stage: Stage, memory: GpuMemory, added: int) -> list[Trial]:
    """The sizes in ascending order, up to the first that does not fit. added: bytes that the engine
    will need."""
    sizes = _sizes(ctx)
    trials: list[Trial] = []
    try:
        loss_of = _loss_function(ctx, stage)
        for size in tqdm(sizes, desc="measuring micro-batches", unit="size", disable=ctx.rank > 0):
            if ctx.watchdog is not None:
                ctx.watchdog.beat(f"measuring micro-batches of {size}")
            inputs = first_rows(training_rows(ctx.cfg, ctx.chunks.train), size, ctx.device)
            peak, seconds = memory.measure(lambda inputs=inputs: loss_of(inputs).backward())
            fits = peak + added <= memory.room
            trials.append(Trial(size, peak + added, fits, size * ctx.plan.seq_len / seconds))
            if not fits:
                break
    except torch.OutOfMemoryError:
        trials.append(Trial(sizes[len(trials)], None, False, 0.0))
    return trials


@contextmanager
def _left_as_it_was(stage: Stage) -> Iterator[None]:
    """Restores the devices, modes and gradients of the models."""
    models = [model for model in (stage.model, stage.teacher) if model is not None]
    devices = [next(model.parameters()).device for model in models]
    modes = [(module, module.training) for module in stage.model.modules()]
    try:
        yield
    finally:
        stage.model.zero_grad(set_to_none=True)
        for module, training in modes:
            module.training = training
        for model, device in zip(models, devices):
            model.to(device)


def _loss_function(ctx: RunContext, stage: Stage) -> Callable[[dict], torch.Tensor]:
    """inputs -> the stage's loss, of models on the device without an engine."""
    from hf_trainer import FrozenTeacher, distillation_loss, next_token_loss

    model = stage.model.to(ctx.device).train()
    if ctx.cfg.stage == 1:
        return lambda inputs: model(**inputs)["loss"]
    if ctx.cfg.stage == 3:
        return partial(next_token_loss, model)
    teacher = None
    if stage.teacher is not None:
        teacher = FrozenTeacher(stage.teacher, torch.device(ctx.device))
    return partial(distillation_loss, model, teacher=teacher, **stage.loss_options)


def _shards_teacher(ctx: RunContext, stage: Stage) -> bool:
    if stage.teacher is None:
        return False
    return shard_teacher(ctx.cfg, bytes_of(stage.teacher), ctx.device, ctx.world_size)[0]


def _engine_bytes(ctx: RunContext, stage: Stage, sharded_teacher: bool) -> int:
    """The bytes that a rank needs more with DeepSpeed's engine and CUDA graphs than without.

    Weights that ZeRO-3 divides over the ranks stay counted whole: how much of them is gathered at a
    time depends on the model.
    """
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    added = count * STATE_BYTES[ctx.cfg.train.optimizer] // ctx.world_size
    if ctx.zero_stage > 1:
        added -= gradients - gradients // ctx.world_size
    graphs = use_cuda_graphs(
        ctx.cfg,
        ctx.device,
        ctx.zero_stage,
        stage.model,
        log=lambda _: None,  # build_trainer logs the reason
        sharded_teacher=sharded_teacher,
        has_documents=ctx.chunks.has_documents,
    )
    if graphs:
        # A copy of the gradients; and the activations stay allocated during an optimiser step.
        added += gradients + count * STEP_BYTES // ctx.world_size
    return added

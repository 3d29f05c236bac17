"""Throughput and MFU of a stage by its real trainer, with random weights of a published shape and
random tokens.

    python benchmarks/train_throughput.py --shape qwen2.5-1.5b --stage 1
    python benchmarks/train_throughput.py --shape qwen2.5-1.5b --stage 2 --document_tokens 800
    deepspeed --num_gpus 4 benchmarks/train_throughput.py --shape qwen2.5-7b --stage 2 train.kd_teacher_shard=always

Overrides after the options replace the benchmark's settings, as in train.py. It prints tokens/s per
GPU; MFU against the peak of the GPU's data sheet (see mfu.py), and the same FLOPs against the rate
of a large GEMM in the same run; peak memory; seconds from the start of training to the end of the
first step, which compiles or loads kernels; and where the GPU's time goes: by part of the timed
steps, and by kind of kernel, from a profile of further steps. Where CUPTI is missing or not
permitted there is no profile, and the rest is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from runtime.autotuning import save_kernel_configs
from runtime.batch_plan import BatchPlan, batch_plan
from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.context import RunContext
from runtime.data import DOCUMENT_LENGTHS, Chunks
from runtime.environment import init_distributed, set_up_device, set_up_process
from runtime.run_folder import zero_stage_of_run

import numpy as np
import torch
import yaml
from datasets import Dataset
from torch.autograd import DeviceType
from transformers import TrainerCallback

from benchmarks.kl_head import median_ms
from convert import load_teacher_config
from cuda_graphs import EAGER_CALLS, GraphedForward
from distill_model import StudentConfig, StudentForCausalLM
from distill_model.fp8 import quantize_mlps
from layer_selection.ranking import budget, evenly_spaced
from mfu import device_peak_flops
from micro_batch import with_measured_micro_batch
from stages import Stage, alignment_stage, build_trainer, compute_dtype, logit_stage
from wrapper import AttentionAlignmentModel

# By stage: micro-batch, tokens per sequence, sequences per step and GPU.
BATCHES = {1: (48, 512, 96), 2: (4, 4096, 16), 3: (1, 32768, 2)}
WARM_STEPS = EAGER_CALLS + 2  # with one micro-batch per step, CUDA graphs are replayed from there on
PROFILED_STEPS = 2
# The families of convert/published.yaml, and what their models are called.
FAMILIES = {"qwen2": "qwen2.5", "qwen3": "qwen3", "llama": "llama"}
IDLE = "GPU idle (host-bound)"
# Kinds of kernels, and what their names contain; the first that fits counts.
KINDS = {
    "softmax attention": ("flash", "sdpa", "fmha"),
    "GEMMs": ("gemm", "nvjet", "cutlass", "cublas"),
    "linear attention": (
        "chunk_",
        "fused_recurrent",
        "recompute_w_u",
        "solve_tril",
        "l2norm",
        "gated_delta",
        "gdn_",
        "wy_",
        "layer_norm_gated",
        "cumsum",
        "gla_",
        "kda_",
        "causal_conv",
        "gate_",
        "tilelang_",
    ),
    "losses": ("_kl_rows", "_cross_entropy_rows", "_squared_difference"),
    "optimiser": ("multi_tensor", "adam"),
    "communication": ("nccl",),
}
OTHER = "element-wise and the rest"
NO_PROFILE = (
    "The profile of kernels is missing: PyTorch has no CUPTI here, or may not use it. The figures above do not need it."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        default="qwen2.5-1.5b",
        help="a published size of convert/published.yaml, or a checkpoint's folder, of which config.json is read",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--stage", type=int, choices=BATCHES, required=True)
    parser.add_argument("--student", default="gdn_v4")
    parser.add_argument(
        "--ratio",
        type=float,
        default=0.25,
        help="share of the layers that stay full in stages 2 and 3",
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after the warm-up")
    parser.add_argument(
        "--document_tokens",
        type=int,
        metavar="N",
        help="chunks of documents that are read one by one, of N tokens on average; default: chunks are read whole",
    )
    parser.add_argument(
        "--save_kernel_configs",
        type=Path,
        metavar="FOLDER",
        help="add what FLA's autotuner chose to a FLA_CONFIG_DIR",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="print the longest kernels too, and between which of them the GPU is idle longest",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args()


# ------------------------------------------------------------------------ what is measured
def published_config(shape: str, layers: int | None) -> StudentConfig:
    """The teacher's config of a shape such as qwen2.5-1.5b or of a checkpoint's folder, with other
    `layers` if they are given."""
    if Path(shape).is_dir():
        values = load_teacher_config(shape).to_dict()
        if layers:
            values |= {"num_hidden_layers": layers}
        values["keep_full_attention_layers"] = list(range(values["num_hidden_layers"]))
        return StudentConfig(**values)
    known = published_shapes()
    if shape not in known:
        raise ValueError(f"--shape: {shape} is unknown; choose one of {', '.join(known)}")
    size = known[shape]
    return StudentConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=layers or size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        head_dim=size["head_dim"],
        attention_bias=size.get("bias", shape.startswith("qwen2.5")),
        qk_norm=size.get("qk_norm", shape.startswith("qwen3")),
        tie_word_embeddings=size["tied"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def published_shapes() -> dict[str, dict]:
    """The sizes of convert/published.yaml by name: qwen2.5-0.5b, qwen2.5-1.5b ..."""
    file = Path(__file__).parents[1] / "convert" / "published.yaml"
    shapes = {}
    for family, sizes in yaml.safe_load(file.read_text()).items():
        for size, values in sizes.items():
            shapes[f"{FAMILIES[family]}-{size}"] = values
    return shapes


def benchmark_config(args: argparse.Namespace, kept: list[int], folder: str, world_size: int) -> Config:
    """The config of the stage, as train.py reads it."""
    micro_batch, seq_len, sequences = BATCHES[args.stage]
    values = {
        "stage": args.stage,
        "data": {"cache_dir": "none"},
        "teacher_model": {"name": "none"},
        "student_model": {"name": args.student, "keep_full_attention_layers": kept},
        "train": {
            "output_dir": f"{folder}/run",
            "micro_batch_size": micro_batch,
            "batch_size": sequences * world_size,
            "train_seq_len": seq_len,
            "lr": 1e-5,
            "max_steps": WARM_STEPS + args.steps + PROFILED_STEPS,
            "logging_steps": 1000,
            "save_minutes": None,
            "student_init_ckpt": "none" if args.stage > 1 else None,
        },
    }
    file = Path(folder) / "stage.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(file, args.overrides)


def random_model(config: StudentConfig, dtype: torch.dtype, device: str) -> StudentForCausalLM:
    with torch.device(device):
        return StudentForCausalLM._from_config(config, dtype=dtype).eval()


def random_stage(ctx: RunContext, config: StudentConfig) -> Stage:
    """The stage with random weights, made on the GPU. config: the teacher's."""
    cfg = ctx.cfg
    torch.manual_seed(0)
    teacher = random_model(config, compute_dtype(cfg, ctx.device), ctx.device)
    torch.manual_seed(0)
    with torch.device(ctx.device):
        kept = cfg.student_model.keep_full_attention_layers
        student, _ = StudentForCausalLM.from_teacher(teacher, cfg.student_model.name, kept)
    if cfg.teacher_model.precision == "fp8":
        quantize_mlps(teacher)
    if cfg.stage == 1:
        recompute = ctx.zero_stage == 3
        model = AttentionAlignmentModel(teacher, student, cfg.train.alignment_loss, recompute)
        return alignment_stage(cfg, model)
    return logit_stage(cfg, student, teacher if cfg.stage == 2 else None)


def random_chunks(vocab_size: int, plan: BatchPlan, seed: int, document_tokens: int | None = None) -> Chunks:
    """document_tokens: the mean length of documents, whose lengths are distributed geometrically and
    which chunks cut; None: the chunks record none."""
    rng = np.random.default_rng(seed)
    rows = plan.batch_size * plan.steps
    columns = {"input_ids": rng.integers(0, vocab_size, (rows, plan.seq_len), dtype=np.int32)}
    if document_tokens:
        columns[DOCUMENT_LENGTHS] = [random_lengths(rng, plan.seq_len, document_tokens) for _ in range(rows)]
    return Chunks(Dataset.from_dict(columns), None, {})


def random_lengths(rng: np.random.Generator, total: int, mean: int) -> np.ndarray:
    """Geometric lengths with this mean, the last one cut so that they sum to `total`."""
    ends = np.minimum(rng.geometric(1 / mean, total).cumsum(), total)
    return np.diff(np.unique(ends), prepend=0)


def gemm_rate(device: str) -> float:
    """FLOP/s of a large GEMM in bf16."""
    size = 8192
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    seconds = median_ms(lambda: a @ b) / 1e3
    return 2 * size**3 / seconds


# ------------------------------------------------------------------------ where the time goes
class Parts:
    """The GPU's time by part of a step, gaps included. A mark says which part the kernels that are
    launched after it belong to."""

    def __init__(self):
        self.marks = []

    def mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def split(self, function, inside: str, after: str):
        """The same function with a mark before it and one after it."""

        def marked(*args, **kwargs):
            self.mark(inside)
            result = function(*args, **kwargs)
            self.mark(after)
            return result

        return marked

    def follow(self, trainer, stage: int) -> None:
        """Marks the parts of a trainer's steps from here on."""
        optimizer = trainer.deepspeed.optimizer
        model = trainer.model
        optimizer.step = self.split(optimizer.step, "optimiser", "student")
        if stage == 2:
            trainer.teacher.hidden_states = self.split(trainer.teacher.hidden_states, "teacher", "student")
        if isinstance(model.forward, GraphedForward):  # a CUDA graph cannot be marked inside
            return
        if stage == 1:
            model.forward = self.split(model.forward, "teacher", "student")
            for block in model.model.layers:
                block.attn.teacher_attn.forward = self.split(block.attn.teacher_attn.forward, "teacher", "student")
                block.attn.forward = self.split(block.attn.forward, "teacher", "teacher")
        else:
            model.lm_head.forward = self.split(model.lm_head.forward, "head", "student")

    def totals(self, steps: int) -> list[tuple[str, float]]:
        """Milliseconds per step of each part, the longest first."""
        totals = Counter()
        for (part, start), (_, end) in pairwise(self.marks):
            totals[part] += start.elapsed_time(end)
        return [(part, ms / steps) for part, ms in totals.most_common()]


def kind_of(kernel_name: str) -> str:
    name = kernel_name.lower()
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return OTHER


def breakdown(profile, steps: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Milliseconds per step by kind of kernel and of an idle GPU, the largest first; and the idle
    time by the kernels before and after it. Both are empty if the profile holds no kernel."""
    kernels = [
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.elapsed_us() > 0 and not event.is_user_annotation
    ]
    if not kernels:
        return [], []
    totals = Counter()
    for kernel in kernels:
        totals[kind_of(kernel.name)] += kernel.time_range.elapsed_us()
    waits = idle_times(kernels)
    totals[IDLE] = waits.total()
    return _per_step(totals, steps), _per_step(waits, steps)


def idle_times(kernels: list) -> Counter:
    """Microseconds without a kernel, by the names of the kernels before and after."""
    waits = Counter()
    first, *rest = sorted(kernels, key=lambda kernel: kernel.time_range.start)
    end = first.time_range.end
    last = first.name
    for kernel in rest:
        wait = kernel.time_range.start - end
        if wait > 0:
            waits[f"{last[:70]} -> {kernel.name[:70]}"] += wait
        if kernel.time_range.end > end:
            end = kernel.time_range.end
            last = kernel.name
    return waits


def _per_step(microseconds: Counter, steps: int) -> list[tuple[str, float]]:
    """Milliseconds per step, the largest first."""
    return [(name, us / 1e3 / steps) for name, us in microseconds.most_common()]


def start_profile():
    """A profile of the GPU's kernels that has started; None if this PyTorch was built without
    CUPTI."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    if cuda not in torch.profiler.supported_activities():
        return None
    started = torch.profiler.profile(activities=[cuda])
    started.start()
    return started


def where_time_goes(parts: list[tuple[str, float]], profile, steps: int, kernels: bool) -> str:
    """Tables of milliseconds per micro-batch: by part, and by kind of kernels from `profile`, which
    may be None.

    steps: micro-batches of the profile. kernels: the longest kernels too, and the longest idle
    times between two.
    """
    kinds, waits = breakdown(profile, steps) if profile else ([], [])
    text = _table("part", parts) + _table("kind of kernels", kinds)
    if not kinds:
        return text + NO_PROFILE
    idle = dict(kinds)[IDLE] / sum(ms for _, ms in kinds)
    text += f"The GPU is busy {1 - idle:.0%} of the time.\n"
    if kernels:
        text += "GPU idle between\n" + "".join(f"{ms:8.2f} ms  {between}\n" for between, ms in waits[:20])
        text += profile.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=90)
    return text


def _table(what: str, rows: list[tuple[str, float]]) -> str:
    if not rows:
        return ""
    lines = [f"| time of a micro-batch by {what} | ms |", "|:--|--:|"]
    lines += [f"| {row} | {ms:.1f} |" for row, ms in rows]
    return "\n".join(lines) + "\n\n"


class Clock(TrainerCallback):
    """Times the steps of a trainer, `steps` of them after `warm` others, and profiles those that
    follow."""

    def __init__(self, trainer, stage: int, warm: int, steps: int):
        self.trainer = trainer
        self.stage = stage
        self.warm = warm
        self.steps = steps
        self.times: list[float] = []  # of every step's end
        self.parts = Parts()
        self.totals: list[tuple[str, float]] = []
        self.profile = None
        self.begin = time.perf_counter()

    @property
    def first_step(self) -> float:
        return self.times[0] - self.begin

    @property
    def seconds(self) -> float:
        """Of a timed step."""
        return (self.times[self.warm + self.steps - 1] - self.times[self.warm - 1]) / self.steps

    def on_train_begin(self, args, state, control, **_):
        self.parts.follow(self.trainer, self.stage)

    def on_step_end(self, args, state, control, **_):
        self.parts.mark("student")
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.warm:
            self.parts.marks = self.parts.marks[-1:]
        if state.global_step == self.warm + self.steps and state.is_world_process_zero:
            self.totals = self.parts.totals(self.steps * args.gradient_accumulation_steps)
            self.profile = start_profile()

    def on_train_end(self, args, state, control, **_):
        if self.profile:
            self.profile.stop()


def main() -> None:
    begin = time.perf_counter()
    args = arguments()
    rank, world_size = set_up_process()
    device = set_up_device()
    if device != "cuda":
        sys.exit("train_throughput.py: skipped: it measures GPUs, and this machine has none")
    init_distributed(device, 30)
    config = published_config(args.shape, args.layers)
    layers = config.num_hidden_layers
    kept = evenly_spaced(budget(args.ratio, layers), layers) if args.stage > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        cfg = benchmark_config(args, kept, folder, world_size)
        plan = batch_plan(cfg, world_size)
        ctx = RunContext(
            cfg,
            plan,
            random_chunks(config.vocab_size, plan, rank, args.document_tokens),
            rank,
            log=lambda *_: None,
            device=device,
            zero_stage=zero_stage_of_run(cfg, world_size),
        )
        ctx.output_dir.mkdir()
        rate = gemm_rate(device)
        stage = random_stage(ctx, config)
        if cfg.train.micro_batch_size == "auto":
            ctx = with_measured_micro_batch(replace(ctx, log=print if rank == 0 else ctx.log), stage)
            plan = ctx.plan
        trainer = build_trainer(ctx, stage)
        trainer.args.save_strategy = "no"
        clock = Clock(trainer, args.stage, WARM_STEPS, args.steps)
        trainer.add_callback(clock)
        setup = time.perf_counter() - begin
        trainer.train()
    if rank == 0:
        mean = args.document_tokens
        print(
            f"\n{torch.cuda.get_device_name()} x {world_size}, torch {torch.__version__}; {args.shape}, {layers} layers, "
            f"stage {args.stage}, {args.student}, {len(kept)} kept; "
            f"{plan.grad_accum} x {plan.micro_batch_size} x {plan.seq_len} tokens per step and GPU, "
            + (f"documents of {mean} tokens on average" if mean else "chunks read whole")
        )
        print_table(ctx, stage, clock, rate, setup)
        print(where_time_goes(clock.totals, clock.profile, PROFILED_STEPS * plan.grad_accum, args.kernels))
        if args.save_kernel_configs:
            save_kernel_configs(args.save_kernel_configs)
    torch.distributed.destroy_process_group()


def print_table(ctx: RunContext, stage: Stage, clock: Clock, rate: float, setup: float) -> None:
    """rate: measured FLOP/s of a large GEMM. setup: seconds before training."""
    tokens = ctx.plan.tokens_per_step / ctx.world_size / clock.seconds
    flops = stage.flops_per_token * tokens
    peak = device_peak_flops(ctx.device, compute_dtype(ctx.cfg, ctx.device))
    mfu = "peak unknown" if peak is None else f"{flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"
    share = f"{flops / rate:.0%} of {rate / 1e12:.0f} TFLOP/s"
    # Reserved memory, for what a CUDA graph uses counts as allocated only while it is recorded.
    memory = torch.cuda.max_memory_reserved() / 2**30
    print("| tokens/s per GPU | MFU | FLOPs, of the measured GEMM rate | peak GiB | first step s | set-up s |")
    print("|--:|--:|--:|--:|--:|--:|")
    print(f"| {tokens:,.0f} | {mfu} | {share} | {memory:.1f} | {clock.first_step:.1f} | {setup:.1f} |\n")


if __name__ == "__main__":
    run_main(main)

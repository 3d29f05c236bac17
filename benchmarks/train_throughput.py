"""Tokens a second of a stage, by its real trainer, with random weights of a published shape and random tokens.

    python benchmarks/train_throughput.py --shape qwen2.5-1.5b --stage 1
    deepspeed --num_gpus 4 benchmarks/train_throughput.py --shape qwen2.5-7b --stage 2 train.kd_teacher_shard=always

Settings after the options override the benchmark's, as train.py takes them. It prints tokens a second a device; their matrix
products' share of the rate that large products reach in the same run (attention and linear attention are not counted);
peak memory; seconds from the trainer's first move to the end of the first step, which compiles or loads kernels; and
where the GPU's time goes: by what it works at in the timed steps, and by kinds of kernels, from a profile of further ones.
Where CUPTI is missing or not permitted there is no profile, and the rest is printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from runtime.command import run_main
from runtime.environment import init_distributed, set_up_device, set_up_process

from cuda_graphs import EAGER_CALLS, GraphedForward

# micro-batch, sequence length, sequences a step and device
BATCHES = {1: (48, 512, 96), 2: (4, 4096, 16), 3: (1, 32768, 2)}
FAMILIES = {
    "qwen2": "qwen2.5",
    "qwen3": "qwen3",
    "llama": "llama",
}  # of published.yaml, as people call them
IDLE = "no work (host)"
KINDS = {  # of kernels, by what their names hold; the first that fits
    "softmax attention": ("flash", "sdpa", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
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
    ),
    "losses": ("_kl_rows", "_cross_entropy_rows", "_squared_difference"),
    "optimiser": ("multi_tensor", "adam"),
    "communication": ("nccl",),
}
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
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after some that are not")
    parser.add_argument(
        "--save_kernel_configs",
        type=Path,
        metavar="FOLDER",
        help="add what FLA's autotuner chose to a FLA_CONFIG_DIR",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="print the longest kernels too, and between which of them the GPU waits longest",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args()


def published_config(shape: str, layers: int | None):
    """The teacher's config of a shape such as qwen2.5-1.5b or of a checkpoint's folder, with other
    `layers` if they are given."""
    import yaml

    from convert import load_teacher_config
    from distill_model import StudentConfig

    if Path(shape).is_dir():
        config = load_teacher_config(shape)
        count = layers or config.num_hidden_layers
        return StudentConfig(
            **config.to_dict() | {"num_hidden_layers": count, "keep_full_attention_layers": list(range(count))}
        )
    families = yaml.safe_load((Path(__file__).parents[1] / "convert" / "published.yaml").read_text())
    known = {
        f"{FAMILIES[family]}-{size}": values for family, sizes in families.items() for size, values in sizes.items()
    }
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


def random_model(config, dtype, device):
    import torch

    from distill_model import StudentForCausalLM

    with torch.device(device):
        return StudentForCausalLM._from_config(config, dtype=dtype).eval()


def flops_per_token(teacher, model, stage: int) -> float:
    """Of the matrix products that a training step cannot do without."""
    from torch import nn

    from distill_model import is_student_attention
    from distill_model.modeling_distilled_student import LMHead

    def products(module, *, head=True):
        weights = (
            m.weight for m in module.modules() if isinstance(m, nn.Linear) and (head or not isinstance(m, LMHead))
        )
        return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)  # ZeRO-3 leaves an empty tensor

    if stage == 1:
        students = [m for m in model.modules() if is_student_attention(m)]
        inner = sum(products(m) for m in students)
        back_through = sum(products(m.o_proj) for m in students)  # the inputs need no gradient
        return 2 * (products(model) - inner) + 4 * inner + 2 * back_through
    return (2 * products(teacher) if stage == 2 else 0) + 6 * products(model)


def matmul_rate(device) -> float:
    """FLOP/s of a large product in bf16."""
    import torch

    from benchmarks.kl_head import median_ms

    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3


class Parts:
    """The GPU's time by what it works at, and waits in between. A mark says what the kernels that
    are queued behind it belong to."""

    def __init__(self):
        self.marks = []

    def mark(self, part: str) -> None:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def split(self, function, inside: str, behind: str):
        """The same function, with a mark before it and one behind it."""

        def marked(*args, **kwargs):
            self.mark(inside)
            result = function(*args, **kwargs)
            self.mark(behind)
            return result

        return marked

    def follow(self, trainer, stage: int) -> None:
        """Marks what a stage's trainer does from here on."""
        engine, model = trainer.deepspeed, trainer.model
        engine.optimizer.step = self.split(engine.optimizer.step, "optimiser", "student")
        if isinstance(model.forward, GraphedForward):  # within a graph there is nothing to mark
            if stage == 2:
                trainer.teacher.hidden_states = self.split(trainer.teacher.hidden_states, "teacher", "student")
            return
        if stage == 1:
            model.forward = self.split(model.forward, "teacher", "student")
            for block in model.model.layers:
                block.attn.teacher_attn.forward = self.split(block.attn.teacher_attn.forward, "teacher", "student")
                block.attn.forward = self.split(block.attn.forward, "teacher", "teacher")
            return
        model.lm_head.forward = self.split(model.lm_head.forward, "head", "student")
        if stage == 2:
            trainer.teacher.hidden_states = self.split(trainer.teacher.hidden_states, "teacher", "student")

    def totals(self, steps: int) -> list[tuple[str, float]]:
        """Milliseconds a step of each part, the longest first."""
        totals = Counter()
        for (part, start), (_, end) in pairwise(self.marks):
            totals[part] += start.elapsed_time(end)
        return [(part, ms / steps) for part, ms in totals.most_common()]


def breakdown(profile, steps: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Milliseconds a step by kind of kernel and of a GPU without work, the largest first; and the
    latter by the kernels before and behind it. Both are empty if the profile holds no kernel."""
    from torch.autograd import DeviceType

    kernels = [
        e
        for e in profile.events()
        if e.device_type == DeviceType.CUDA and e.time_range.elapsed_us() > 0 and not e.is_user_annotation
    ]
    if not kernels:
        return [], []
    totals, waits = Counter(), Counter()
    for kernel in kernels:
        name = kernel.name.lower()
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in name for part in parts)),
            "element-wise and the rest",
        )
        totals[kind] += kernel.time_range.elapsed_us()
    first, *rest = sorted(kernels, key=lambda kernel: kernel.time_range.start)
    end, last = first.time_range.end, first.name
    for kernel in rest:
        if (wait := kernel.time_range.start - end) > 0:
            waits[f"{last[:70]} -> {kernel.name[:70]}"] += wait
        if kernel.time_range.end > end:
            end, last = kernel.time_range.end, kernel.name
    totals[IDLE] = waits.total()
    return tuple([(what, us / 1e3 / steps) for what, us in counter.most_common()] for counter in (totals, waits))


def start_profile():
    """A profile of the GPU's kernels that has started; None if this PyTorch was built without
    CUPTI."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        return None
    started = profile(activities=[ProfilerActivity.CUDA])
    started.start()
    return started


def where_time_goes(parts: list[tuple[str, float]], profile, steps: int, kernels: bool) -> str:
    """Tables of milliseconds a step: by part, and by kind of kernels from `profile`, which may be
    None.

    kernels: the longest kernels too, and the longest waits between two.
    """
    kinds, waits = breakdown(profile, steps) if profile else ([], [])
    text = ""
    for what, rows in (("part", parts), ("kind of kernels", kinds)):
        if rows:
            text += f"| time of a micro-batch by {what} | ms |\n|:--|--:|\n"
            text += "".join(f"| {row} | {ms:.1f} |\n" for row, ms in rows) + "\n"
    if not kinds:
        return text + NO_PROFILE
    text += f"The GPU is busy {1 - dict(kinds)[IDLE] / sum(ms for _, ms in kinds):.0%} of the time.\n"
    if kernels:
        text += "No work between\n" + "".join(f"{ms:8.2f} ms  {between}\n" for between, ms in waits[:20])
        text += profile.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=90)
    return text


def save_kernel_configs(folder: Path) -> None:
    """Adds the configurations that this process's kernels run with to the files that FLA reads."""
    import triton
    from fla.ops.utils.cache import AutotuneKey, CachedAutotuner

    folder.mkdir(parents=True, exist_ok=True)
    for tuner in [x for x in gc.get_objects() if isinstance(x, CachedAutotuner) and x.cache]:
        file = folder / f"{tuner.kernel_name}.json"
        entries = json.loads(file.read_text())["autotune_entries"] if file.is_file() else {}
        for key, config in tuner.cache.items():
            values = {
                name: getattr(config, name) for name in ("kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg")
            }
            entries.setdefault(
                AutotuneKey.key_hash(key),
                {"autotune_key": AutotuneKey.normalize_autotune_key(key), "config": values},
            )
        content = {
            "kernel_name": tuner.kernel_name,
            "triton_version": triton.__version__,
            "autotune_entries": entries,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    begin, args = time.perf_counter(), arguments()
    rank, world_size = set_up_process()
    device = set_up_device()
    if device != "cuda":
        sys.exit("train_throughput.py: skipped: it measures GPUs, and this machine has none")
    init_distributed(device, 30)
    from runtime.batch_plan import batch_plan
    from runtime.config import load_config
    from runtime.data import Chunks

    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    import convert
    import train
    from distill_model import StudentForCausalLM
    from layer_selection.ranking import budget, evenly_spaced

    micro, length, batch = BATCHES[args.stage]
    warm, profiled, folder = (
        EAGER_CALLS + 2,
        2,
        tempfile.TemporaryDirectory(),
    )  # with one micro-batch a step, graphs run from there on
    config = published_config(args.shape, args.layers)
    kept = (
        evenly_spaced(budget(args.ratio, config.num_hidden_layers), config.num_hidden_layers) if args.stage > 1 else []
    )
    file = Path(folder.name) / "stage.yaml"
    file.write_text(
        f"stage: {args.stage}\ndata: {{cache_dir: none}}\nteacher_model: {{name: none}}\nstudent_model: {{name: {args.student}, "
        f"keep_full_attention_layers: {kept}}}\n"
        f"train: {{output_dir: {folder.name}/run, micro_batch_size: {micro}, batch_size: {batch * world_size}, train_seq_len: {length}, "
        f"lr: 1e-5, max_steps: {warm + args.steps + profiled}, logging_steps: 1000, student_init_ckpt: {'none' if kept else 'null'}}}\n"
    )
    cfg = load_config(str(file), args.overrides)
    plan = batch_plan(cfg, world_size)
    log = print if rank == 0 else lambda *_: None

    # Random weights in place of a checkpoint's; all else is what train.py does.
    def load_teacher(name, dtype=torch.bfloat16):
        torch.manual_seed(0)
        return random_model(config, dtype, device)

    def build_student(cfg, dtype, log=print, teacher=None):
        torch.manual_seed(0)
        with torch.device(device):
            student = StudentForCausalLM.from_teacher(teacher or load_teacher("", dtype), args.student, kept)[0]
        return student

    convert.load_teacher, train.build_student_for_stage2_and_3 = load_teacher, build_student
    ids = np.random.default_rng(rank).integers(
        0, config.vocab_size, (plan.batch_size * plan.steps, length), dtype=np.int32
    )
    chunks = Chunks(Dataset.from_dict({"input_ids": ids}), None, {})
    rate = matmul_rate(device)

    class Clock(TrainerCallback):
        def __init__(self):
            self.times, self.profile, self.begin, self.parts, self.totals = (
                [],
                None,
                time.perf_counter(),
                Parts(),
                [],
            )

        def on_train_begin(self, *_, **__):
            self.parts.follow(trainer, args.stage)

        def on_step_end(self, args_, state, control, **_):
            self.parts.mark("student")
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            if state.global_step == 1:
                torch.cuda.reset_peak_memory_stats()
            if state.global_step == warm:
                self.parts.marks = self.parts.marks[-1:]
            if state.global_step == warm + args.steps and rank == 0:
                self.totals = self.parts.totals(args.steps * plan.grad_accum)
                self.profile = start_profile()

        def on_train_end(self, *_, **__):
            if self.profile:
                self.profile.stop()

    guards = {
        "stop": None,
        "save_minutes": None,
        "watchdog": None,
        "facts": {"zero_stage": train.zero_stage(cfg, world_size)},
    }
    Path(cfg.train.output_dir).mkdir()
    trainer = train.build_trainer(cfg, plan, chunks, device, False, None, guards, lambda *_: None)
    trainer.args.save_strategy = "no"
    flops = flops_per_token(getattr(getattr(trainer, "teacher", None), "model", None), trainer.model, args.stage)
    clock = Clock()
    trainer.add_callback(clock)
    setup = time.perf_counter() - begin
    trainer.train()
    seconds = (clock.times[warm - 1 + args.steps] - clock.times[warm - 1]) / args.steps
    tokens = plan.tokens_per_step / world_size / seconds
    log(
        f"\n{torch.cuda.get_device_name()} x {world_size}, torch {torch.__version__}; {args.shape}, {config.num_hidden_layers} layers, stage "
        f"{args.stage}, {args.student}, {len(kept)} kept; {plan.grad_accum} x {plan.micro_batch_size} x {plan.seq_len} tokens a step and device"
    )
    log("| tokens/s a device | share of the matmul rate | peak GiB | first step s | set-up s |\n|--:|--:|--:|--:|--:|")
    peak = (
        torch.cuda.max_memory_reserved() / 2**30
    )  # a graph's own memory counts as allocated while it is recorded only
    log(
        f"| {tokens:,.0f} | {flops * tokens / rate:.0%} of {rate / 1e12:.0f} TFLOP/s | {peak:.1f} | "
        f"{clock.times[0] - clock.begin:.1f} | {setup:.1f} |\n"
    )
    if rank == 0:
        print(where_time_goes(clock.totals, clock.profile, profiled * plan.grad_accum, args.kernels))
    if args.save_kernel_configs and rank == 0:
        save_kernel_configs(args.save_kernel_configs)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)

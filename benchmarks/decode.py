"""Prefill and decode speed of a teacher, a hybrid of its shape, and that hybrid without
CUDA graphs, in one run.

    python benchmarks/decode.py --shape qwen2.5-1.5b --kept 7 --output_dir decode_out
    # on a CPU:
    python benchmarks/decode.py --shape qwen2.5-0.5b --layers 4 --kept 1 --contexts 256 1024 --batch_sizes 1 2

Random weights of a published shape and random prompts, through `generate`, greedily. Teacher (all
layers kept) and hybrid decode with cache_implementation="static", on a GPU one CUDA graph replay
per token; "hybrid, eager" is the same hybrid with the dynamic cache, which launches FLA's kernels
one by one, at batch size 1. Prompts are read in chunks of 4096 tokens, by kernels that
are compiled before the clock starts. Times per token are medians over --new_tokens, after the
first few, which compile and record. Beside them are the time of the model alone, a mean without
waits between tokens, and the least number of bytes that a token moves: weights, cache, and
recurrent states twice. The teacher's bytes over the hybrid's are the bytes ratio, the speed-up
at equal memory bandwidth. Printed and written are a table, the ratios (decode.md,
decode.json) and a plot (decode.png).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from itertools import cycle
from pathlib import Path

from runtime.command import run_main

import matplotlib
import torch
from transformers import LogitsProcessor

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.train_throughput import published_config, random_model
from distill_model import StudentConfig, StudentForCausalLM
from distill_model.cache import HybridCache, StaticCache, state_tensors
from distill_model.decode_step import GraphedDecoder
from layer_selection.ranking import evenly_spaced

PREFILL = 4096  # tokens of a prefill chunk
WARM = 4  # tokens whose times do not count
TEACHER = "teacher"
HYBRID = "hybrid"
EAGER = "hybrid, eager"
COLOURS = ("#c98a2b", "#3f6fb5", "#5a9367", "#8250df")  # of the batch sizes


class Clock(LogitsProcessor):
    """Records when it was called with the logits of each token, without a host-device sync."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times = []

    def __call__(self, input_ids=None, scores=None):
        on_gpu = self.device.type == "cuda"
        self.times.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            self.times[-1].record()
        return scores

    def seconds(self) -> list[float]:
        """From one recorded time to the next."""
        pairs = list(zip(self.times, self.times[1:]))
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        self.times[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


@torch.no_grad()
def model_alone(model: StudentForCausalLM, cache: StaticCache, context: int, tokens: int) -> float:
    """Seconds per token of the graph alone, or of the layers where there is none, without the work
    of `generate`: decodes the first `tokens` after `context` again."""
    graph = cache.decoding.graph
    run_step = GraphedDecoder(model, cache).run if graph is None else graph.replay
    cache.decoding.last.fill_(context)
    begin = time.perf_counter()
    for _ in range(tokens):
        run_step()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / tokens


def bytes_a_token(model: StudentForCausalLM, cache: HybridCache) -> int:
    """The least that a token moves, at any batch size: the weights and the cache, read once, and
    the recurrent states, written too."""
    weights = {p for p in model.parameters() if p is not model.model.embeddings.weight}
    weights.add(model.lm_head.weight)  # which may be tied to the embeddings
    batch = len(next(state_tensors(cache.layers[0].state)))
    states = batch * cache.sequence_bytes(model.config, 0, model.dtype)
    return sum(p.nbytes for p in weights) + cache.nbytes + states


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()


def measure(model: StudentForCausalLM, static: bool, context: int, batch_size: int, new_tokens: int) -> dict | None:
    """Tokens/s of prefill and decoding, milliseconds per token, bytes of the cache and peak bytes;
    None if it ran out of memory."""
    device = model.device
    clock = Clock(device)
    free_memory(device)
    ids = torch.randint(1, model.config.vocab_size, (batch_size, context), device=device)
    options = dict(
        do_sample=False,
        pad_token_id=0,
        prefill_chunk_size=PREFILL,
        cache_implementation="static" if static else None,
    )
    try:
        model.generate(ids[:, : 2 * PREFILL], max_new_tokens=2, **options)  # compiles the kernels of prefill
        clock()
        out = model.generate(
            ids,
            max_new_tokens=new_tokens,
            logits_processor=[clock],
            return_dict_in_generate=True,
            **options,
        )
    except torch.OutOfMemoryError:
        return None
    prefill, *tokens = clock.seconds()
    token = statistics.median(tokens[WARM:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    cache = out.past_key_values
    alone = model_alone(model, cache, context, new_tokens - 1) * 1e3 if static else None
    return {
        "prefill": context * batch_size / prefill,
        "decode": batch_size / token,
        "ms": token * 1e3,
        "alone": alone,
        "cache": cache.nbytes,
        "bytes": bytes_a_token(model, cache),
        "peak": peak,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| model | context | batch | prefill tokens/s | decode tokens/s | ms per token | ms without generate | GB per token | TB/s | "
        "cache MiB | peak GiB |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['context']:,}", f"{row['batch_size']}"]
        if "decode" not in row:
            lines.append(f"| {' | '.join(cells)} | out of memory | | | | | | | |")
            continue
        gigabytes = row["bytes"] / 1e9
        cells += [
            f"{row['prefill']:,.0f}",
            f"{row['decode']:,.1f}",
            f"{row['ms']:.2f}",
            f"{row['alone']:.2f}" if row["alone"] else "",
            f"{gigabytes:.2f}",
            f"{gigabytes / row['ms']:.2f}",
            f"{row['cache'] / 2**20:,.1f}",
            f"{row['peak'] / 2**30:.1f}" if row["peak"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(rows: list[dict]) -> list[dict]:
    """The hybrid beside the teacher, for each context and batch size at which both were measured."""
    found = {(row["model"], row["context"], row["batch_size"]): row for row in rows if "decode" in row}
    points = []
    for (model, context, batch_size), hybrid in found.items():
        teacher = found.get((TEACHER, context, batch_size))
        if model == HYBRID and teacher:
            point = {
                "batch_size": batch_size,
                "context": context,
                "speed_up": hybrid["decode"] / teacher["decode"],
                "bytes_ratio": teacher["bytes"] / hybrid["bytes"],
                "cache_share": hybrid["cache"] / teacher["cache"],
            }
            if eager := found.get((EAGER, context, batch_size)):
                point["speed_up_over_eager"] = hybrid["decode"] / eager["decode"]
            points.append(point)
    return points


def ratios(points: list[dict]) -> list[str]:
    """A line for each of the hybrid's figures relative to the teacher and to its own eager decoding."""
    lines = []
    for point in points:
        where = f"context {point['context']:,}, batch {point['batch_size']}"
        lines.append(
            f"{where}: cache {point['cache_share']:.1%} of the teacher's, "
            f"{point['speed_up']:.2f} times its tokens/s; bytes ratio {point['bytes_ratio']:.2f}"
        )
        if "speed_up_over_eager" in point:
            lines.append(f"{where}: {point['speed_up_over_eager']:.2f} times the tokens/s of eager decoding")
    return lines


def plot(points: list[dict], path: Path) -> None:
    """The hybrid's decoding speed-up and its share of the teacher's cache, over the context."""
    figure, (speed, cache) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for colour, batch_size in zip(cycle(COLOURS), sorted({point["batch_size"] for point in points})):
        own = [point for point in points if point["batch_size"] == batch_size]
        own.sort(key=lambda point: point["context"])
        contexts = [point["context"] for point in own]
        speed.plot(contexts, [point["speed_up"] for point in own], "o-", color=colour, label=f"batch {batch_size}")
        bytes_ratio = [point["bytes_ratio"] for point in own]
        speed.plot(contexts, bytes_ratio, ":", color=colour, label=f"batch {batch_size}, bytes ratio")
        # The share is the same for every batch size.
        cache.plot(contexts, [100 * point["cache_share"] for point in own], "o-", color="dimgray")
    speed.axhline(1, color="gray", linewidth=1)
    speed.set_title("Decoding speed-up over the teacher", loc="left")
    cache.set_title("Hybrid's cache, % of the teacher's", loc="left")
    cache.set_ylim(top=100)
    for axis in (speed, cache):
        _context_axis(axis, sorted({point["context"] for point in points}))
    if points:
        speed.legend(loc="upper left", fontsize=9)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _context_axis(axis, contexts: list[int]) -> None:
    """A logarithmic axis of contexts, with a tick at each, over a linear one from 0."""
    names = [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts]
    if contexts:
        axis.set_xscale("log", base=2)
    axis.set_xlabel("context, tokens (logarithmic)")
    axis.set_xticks(contexts, names)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", help="a published size of convert/published.yaml")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--kept", type=int, default=7, help="full-attention layers of the hybrid, evenly spaced")
    parser.add_argument("--student", default="gdn_v4")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--output_dir", type=Path, help="for decode.md, decode.json and decode.png")
    args = parser.parse_args(argv)
    if args.new_tokens < WARM + 2:
        raise ValueError(
            f"--new_tokens: {args.new_tokens} must be at least {WARM + 2}, of which the first {WARM} do not count"
        )
    return args


def measure_all(
    args: argparse.Namespace, config: StudentConfig, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """A row for each model, batch size and context."""
    torch.manual_seed(0)
    teacher = random_model(config, dtype, device)
    kept = evenly_spaced(args.kept, config.num_hidden_layers)
    with torch.device(device):
        hybrid = StudentForCausalLM.from_teacher(teacher, args.student, kept)[0].eval()
    rows = []
    for name, model in ((TEACHER, teacher), (HYBRID, hybrid), (EAGER, hybrid)):
        for batch_size in args.batch_sizes if name != EAGER else [1]:
            for context in args.contexts:
                measured = measure(model, name != EAGER, context, batch_size, args.new_tokens) or {}
                rows.append({"model": name, "context": context, "batch_size": batch_size} | measured)
                print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = published_config(args.shape, args.layers)
    layers = config.num_hidden_layers
    if not 1 <= args.kept < layers:
        raise ValueError(f"--kept: {args.kept} must be between 1 and {layers - 1}, one less than the layers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = measure_all(args, config, dtype, device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    setup = (
        f"{device_name}, torch {torch.__version__}, {dtype}; "
        f"{args.shape}, {layers} layers, {args.student}, {args.kept} kept"
    )
    points = compared(rows)
    text = "\n".join([setup, "", table(rows), "", *ratios(points)])
    print(text)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "decode.md").write_text(text + "\n")
        (args.output_dir / "decode.json").write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")
        plot(points, args.output_dir / "decode.png")


if __name__ == "__main__":
    run_main(main)

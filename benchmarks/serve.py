"""Teacher and hybrid in the same engine: decoding with a full cache, and time to first token, over the context.

    python benchmarks/serve.py --shape qwen2.5-1.5b --output_dir OUT     # in vLLM's environment: docs/serving.md
    python benchmarks/serve.py --plot OUT/serve.json                     # anywhere: OUT/serve.png

On random weights. The teacher is vLLM's own Qwen2 or Llama class, the hybrid the plug-in's; `--vllm_gdn` adds one of
vLLM's own Gated DeltaNet layers, the class of native exports, which bounds what the plug-in could reach. vLLM has that
class from 0.27.1 on.

Decoding: as many sequences of each context as the cache holds, `--max_sequences` at most. Their caches are filled with
random values (serve_fill.py), because reading their prompts takes minutes and decoding takes as long whatever a cache
holds; `--prefill` reads the prompts. The clock starts when all of them have their first token, and stops after
`--new_tokens` more of each; nothing is prefilled in between. Time to first token: one prompt, which is read, no other
load, nothing in the prefix cache; the median of three.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig

# Of the models' own config files; the context is raised to what is measured.
SHAPES = {
    "qwen2.5-1.5b": dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
        attention_bias=True,
    ),
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        attention_bias=False,
    ),
}
TEACHER, HYBRID, VLLM_GDN = "teacher", "hybrid", "hybrid of vLLM's GDN"
NATIVE_CLASS = "Qwen3_5ForCausalLM"  # dense; the older Qwen3-Next takes experts alone
REPEATS = 3  # of the time to first token


# ------------------------------------------------------------------------------------------ models
def student_config(args: argparse.Namespace) -> StudentConfig:
    """The hybrid: layers spread evenly keep full attention."""
    sizes = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    layers = sizes["num_hidden_layers"]
    student = STUDENT_ATTENTION_MAP.get(args.student)
    if student is None or not student.supports_static_cache:
        raise ValueError(f"--student: {args.student} is no student of constant state, such as gdn_v8")
    if not 1 <= args.kept < layers:
        raise ValueError(f"--kept: {args.kept} must be between 1 and {layers - 1}, one less than the layers")
    return StudentConfig(
        **sizes,
        max_position_embeddings=max(args.contexts) + slack(args),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        student_name=args.student,
        keep_full_attention_layers=[(i + 1) * layers // args.kept - 1 for i in range(args.kept)],
        architectures=["StudentForCausalLM"],
    )


def config_values(name: str, config: StudentConfig) -> dict:
    """The config file of one of the models of this shape."""
    if name == HYBRID:
        return config.to_dict() | {"dtype": None}
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps max_position_embeddings tie_word_embeddings rope_parameters"
    )
    values = {key: getattr(config, key) for key in same.split()} | {"hidden_act": "silu"}
    if name == TEACHER:
        kind = "qwen2" if config.attention_bias else "llama"
        return values | {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
    heads = config.num_attention_heads
    return values | {
        "model_type": "qwen3_5_text",
        "architectures": [NATIVE_CLASS],
        "rope_parameters": config.rope_parameters | {"partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "layer_types": config.layer_types,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.head_dim,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
    }


def check_vllm_gdn() -> None:
    """Raises ValueError if this vLLM has no class for a dense hybrid of its own Gated DeltaNet layers."""
    import vllm
    from vllm import ModelRegistry

    if NATIVE_CLASS not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"--vllm_gdn: vLLM {vllm.__version__} has no {NATIVE_CLASS}, the class of such a hybrid without experts; "
            "leave the option out, or use 0.27.1 or later"
        )


def slack(args: argparse.Namespace) -> int:
    """Tokens that a sequence may have beyond its context: those that it decodes while others are prefilled, and those
    that are timed."""
    prefill_steps = -(-args.max_sequences * max(args.contexts) // args.chunk) if args.prefill else 0
    return min(prefill_steps, args.max_slack) + args.new_tokens + 16


def engine_options(text: str) -> dict:
    """What --engine says. Raises ValueError unless it is a JSON object."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--engine: {text} is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f'--engine: {text} must be a JSON object, such as {{"gpu_memory_utilization": 0.8}}')
    return options


def start(name: str, config: StudentConfig, args: argparse.Namespace):
    """A vLLM engine with random weights."""
    from vllm import LLM

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config_values(name, config)))
    cache = {} if args.cache_gib is None else {"kv_cache_memory_bytes": int(args.cache_gib * 2**30)}
    if not args.prefill:
        module = "benchmarks.serve_fill" if __package__ else "serve_fill"
        connector = dict(kv_connector="FilledCache", kv_connector_module_path=module, kv_role="kv_both")
        cache["kv_transfer_config"] = connector
    return LLM(
        str(folder),
        dtype=args.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(args.contexts) + slack(args),
        max_num_seqs=args.max_sequences,
        max_num_batched_tokens=args.chunk,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **cache,
        **engine_options(args.engine),
    )


# ----------------------------------------------------------------------------------------- measures
def add(llm, config: StudentConfig, number: str, context: int, new_tokens: int) -> None:
    """Queues a random prompt of `context` tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    ids = torch.randint(1, config.vocab_size, (context,)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(number, TokensPrompt(prompt_token_ids=ids), sampling)


def first_token_seconds(llm, config: StudentConfig, context: int) -> float:
    """From handing over a prompt of `context` tokens to its first token; the first run, which compiles kernels, does
    not count."""
    times = []
    for repeat in range(REPEATS + 1):
        begin = time.perf_counter()
        add(llm, config, f"first-{context}-{repeat}", context, 1)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def sequences_that_fit(llm, name: str, config: StudentConfig, context: int, args: argparse.Namespace) -> int:
    """How many sequences of this context the cache holds with what they decode, from how many of the longest context
    it holds; at most --max_sequences."""
    cache = llm.llm_engine.vllm_config.cache_config
    linear = 0 if name == TEACHER else len(config.linear_layers)

    def pages(tokens: int) -> int:
        """Of one sequence: a linear layer has one, full attention one for each block of tokens. All are as large."""
        return (config.num_hidden_layers - linear) * -(-tokens // cache.block_size) + linear

    share = pages(max(args.contexts) + slack(args)) / pages(context + slack(args))
    return max(1, min(args.max_sequences, int(0.97 * cache.kv_cache_max_concurrency * share)))


def preemptions(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def decoding(llm, name: str, config: StudentConfig, context: int, args: argparse.Namespace) -> dict:
    """Tokens per second of all sequences together while all of them decode."""
    engine = llm.llm_engine
    count = sequences_that_fit(llm, name, config, context, args)
    before = preemptions(llm)
    names = [f"decode-{context}-{i}" for i in range(count)]
    for number in names:
        add(llm, config, number, context, slack(args))
    lengths: dict[str, int] = {}
    begin = end = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        total = sum(lengths.values())
        if begin is None and len(lengths) == count:
            begin, counted = time.perf_counter(), total
        elif begin is not None and total - counted >= args.new_tokens * count:
            end = time.perf_counter()
            break
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    if end is None:
        cure = f"--max_slack: more than {args.max_slack}" if args.prefill else f"--max_sequences: fewer than {count}"
        raise ValueError(f"{cure}: sequences ended before all of them decoded")
    return {
        "sequences": count,
        "tokens_per_second": (total - counted) / (end - begin),
        "preemptions": preemptions(llm) - before,
    }


def measure(name: str, config: StudentConfig, args: argparse.Namespace) -> Iterator[dict]:
    """A row for each context."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = start(name, config, args)
    for context in args.contexts:
        seconds = first_token_seconds(llm, config, context)
        row = {"model": name, "context": context, "first_token_seconds": seconds}
        yield row | decoding(llm, name, config, context, args)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


# ------------------------------------------------------------------------------------------ results
def row_text(row: dict) -> str:
    cells = [
        row["model"],
        f"{row['context']:,}",
        f"{row['first_token_seconds']:.3f}",
        f"{row['sequences']}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['preemptions']}",
    ]
    return f"| {' | '.join(cells)} |"


def compared(rows: list[dict]) -> list[dict]:
    """Speed-ups over the teacher of each other model, at each context."""
    teacher = {row["context"]: row for row in rows if row["model"] == TEACHER}
    points = []
    for row in rows:
        if row["model"] != TEACHER:
            base = teacher[row["context"]]
            points.append(
                {
                    "model": row["model"],
                    "context": row["context"],
                    "decoding": row["tokens_per_second"] / base["tokens_per_second"],
                    "first_token": base["first_token_seconds"] / row["first_token_seconds"],
                }
            )
    return points


def table(setup: str, rows: list[dict]) -> str:
    """The rows and speed-ups as text."""
    head = (
        "| model | context | first token, s | sequences | decoded tokens/s | preemptions |\n|:--|--:|--:|--:|--:|--:|"
    )
    lines = [f"{p['model']}, context {p['context']:,}: decoding {p['decoding']:.2f} times as fast as the teacher, "
             f"first token {p['first_token']:.2f} times" for p in compared(rows)]  # fmt: skip
    return "\n".join([setup, "", head, *map(row_text, rows), "", *lines])


def side_by_side(runs: list[dict]) -> str:
    """Teacher and hybrid of several runs in one table, a line for each context."""
    lines = [
        "| model | context | first token, s: teacher | hybrid | sequences: teacher | hybrid | decoded tokens/s: teacher "
        "| hybrid | speed-up |\n|:--|--:|--:|--:|--:|--:|--:|--:|--:|"
    ]
    for run in runs:
        name = run["name"]
        models = ({row["context"]: row for row in run["rows"] if row["model"] == model} for model in (TEACHER, HYBRID))
        teacher, hybrid = models
        for context in sorted(teacher):
            pair = teacher[context], hybrid[context]
            cells = [name, f"{context:,}"]
            cells += [f"{row['first_token_seconds']:.3f}" for row in pair]
            cells += [f"{row['sequences']}" for row in pair]
            cells += [f"{row['tokens_per_second']:,.0f}" for row in pair]
            cells.append(f"{pair[1]['tokens_per_second'] / pair[0]['tokens_per_second']:.2f} x")
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    return "\n".join(lines)


def write(setup: str, rows: list[dict], folder: Path) -> None:
    """serve.md and serve.json of the rows so far: a run that is cut short leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve.md").write_text(table(setup, rows) + "\n")
    results = {"setup": setup, "rows": rows, "compared": compared(rows)}
    (folder / "serve.json").write_text(json.dumps(results, indent=1) + "\n")


def read_compared(path: Path) -> list[dict]:
    """The speed-ups of a serve.json. Raises ValueError if it cannot be read as one."""
    try:
        return json.loads(path.read_text())["compared"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--plot: {path} is no readable serve.json; name one that --output_dir has written") from None


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Speed-ups over the teacher, over the context: a line for each list of `compared`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    contexts = sorted({point["context"] for points in curves.values() for point in points})
    names = [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts]
    titles = {"decoding": "Decoding, full cache", "first_token": "Time to first token"}
    for axis, (key, title) in zip(axes, titles.items()):
        for name, points in curves.items():
            own = sorted(points, key=lambda point: point["context"])
            axis.plot([p["context"] for p in own], [p[key] for p in own], marker="o", label=name)
        axis.axhline(1, color="gray", linewidth=1)
        axis.set_title(f"{title}: speed-up over the teacher", loc="left", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, names)
        axis.minorticks_off()
        axis.set_xlabel("context, tokens (logarithmic)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--kept", type=int, default=7, help="full-attention layers of the hybrid, evenly spaced")
    parser.add_argument("--student", default="gdn_v8")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--new_tokens", type=int, default=64, help="timed, of each sequence")
    parser.add_argument("--max_sequences", type=int, default=256)
    parser.add_argument("--prefill", action="store_true", help="read the prompts of the sequences that decode")
    parser.add_argument(
        "--max_slack", type=int, default=1024, help="with --prefill: tokens decoded while other prompts are read"
    )
    parser.add_argument("--chunk", type=int, default=16384, help="tokens of a prefill step")
    parser.add_argument("--cache_gib", type=float, help="of each model's cache; all that is free without it")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm_gdn", action="store_true", help="also a hybrid of vLLM's own Gated DeltaNet")
    parser.add_argument("--engine", default="{}", help="JSON: more arguments of vllm.LLM")
    parser.add_argument("--output_dir", type=Path, help="for serve.md and serve.json")
    parser.add_argument("--plot", type=Path, help="a serve.json: draws serve.png beside it and ends")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.plot:
        points = read_compared(args.plot)
        models = dict.fromkeys(point["model"] for point in points)
        curves = {model: [point for point in points if point["model"] == model] for model in models}
        plot(curves, args.plot.with_suffix(".png"))
        return
    config = student_config(args)
    engine_options(args.engine)
    import vllm
    from vllm.platforms import current_platform

    if args.vllm_gdn:
        check_vllm_gdn()
    torch.manual_seed(0)
    # Asked of the driver: a process that has used CUDA cannot fork engines.
    device = current_platform.get_device_name() if current_platform.is_cuda() else "CPU"
    cache = "all free memory" if args.cache_gib is None else f"{args.cache_gib:g} GiB"
    setup = (
        f"{device}, vLLM {vllm.__version__}, torch {torch.__version__}, {args.dtype}, cache: {cache}; {args.shape}, "
        f"{config.num_hidden_layers} layers, {args.student}, {args.kept} kept; "
        f"caches filled {'by reading prompts' if args.prefill else 'with random values'}"
    )
    rows = []
    for name in (TEACHER, HYBRID, *([VLLM_GDN] if args.vllm_gdn else [])):
        for row in measure(name, config, args):
            rows.append(row)
            print(row_text(row), file=sys.stderr, flush=True)
            if args.output_dir:
                write(setup, rows, args.output_dir)
    print(table(setup, rows))


if __name__ == "__main__":
    try:  # not runtime's run_main, whose packages vLLM's environment need not have
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"serve.py: error: {' '.join(str(error).split())}")

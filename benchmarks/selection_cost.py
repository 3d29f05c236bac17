"""What GA-S2 side by side and stopped early costs, and whether it chooses what a full stage 2 of every layer would.

    python benchmarks/selection_cost.py --cfg STAGE2.yaml --ratio 0.25 --seeds 3 --output_dir cost_out

For each seed, which orders the data: every layer's hybrid through all steps of STAGE2.yaml by itself, with the teacher's work done again and
one measurement at the end; then select_layers.py's way, on the same batches. Prints and writes (cost.md, cost.json) the best layers of
both, whether they are the same up to ties of the full runs, and the second's share of the first's FLOPs (matrix products, measurements
included) and seconds, which do not count the compiling of kernels. Run again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.files import atomic_write_text

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher_config
from layer_selection.full_runs import check_start
from layer_selection.ranking import budget, rank_samples
from layer_selection.select_layers import Bench
from layer_selection.side_by_side import Rounds, rank_hybrids


def compare(cfg: Config, top_k: int, args: argparse.Namespace, folder: Path) -> dict:
    """Choices and costs of both ways at the seed of `cfg`."""
    bench = Bench(cfg, args.sequences, args.batch_size)
    layers = range(bench.teacher.config.num_hidden_layers)
    by_rule = SimpleNamespace(
        rounds=args.rounds,
        window=args.window,
        correlation=args.correlation,
        halving=args.halving,
        top_k=top_k,
    )
    alone = SimpleNamespace(rounds=1, window=0, correlation=1.0, halving=False, top_k=1)

    def importance(kls: dict[int, list[float]]) -> dict[int, list[float]]:
        return {layer: [-kl for kl in values] for layer, values in kls.items()}

    if not (folder / "side_by_side").is_dir():  # something is to be timed: kernels compile before
        first = Rounds(bench, alone, {0: [0]}, -1, folder)
        first.build([0], 0)
        first.train_round([0], 0, 1, tqdm(disable=True))
        del first
    kls, full_seconds, full_share = {}, 0.0, 0.0
    for layer in layers:
        of_layer, facts = Rounds(bench, alone, {layer: [layer]}, -1, folder / f"layer_{layer}").run()
        kls |= of_layer
        full_seconds, full_share = (
            full_seconds + facts["seconds"],
            full_share + facts["share_of_full_runs"] / len(layers),
        )
    full = rank_samples("full runs", "-KL", importance(kls))
    kls, facts = Rounds(bench, by_rule, {layer: [layer] for layer in layers}, -1, folder / "side_by_side").run()
    ours = rank_hybrids("ga_s2", "-KL", importance(kls), facts)
    difference = set(full.keep(top_k)) ^ set(ours.keep(top_k))
    return {
        "full": full.keep(top_k),
        "ours": ours.keep(top_k),
        "ties": full.undecided(top_k),
        "same": difference <= set(full.undecided(top_k)),
        "steps": facts["steps"],
        "of_steps": facts["of_steps"],
        "flops": facts["share_of_full_runs"] / full_share,
        "seconds": facts["seconds"],
        "full_seconds": full_seconds,
    }


def table(results: list[dict]) -> str:
    lines = [
        "| seed | full runs keep | not told apart at the cut | side by side keeps | the same | steps | FLOPs | seconds |",
        "|--:|:--|:--|:--|:-:|--:|--:|--:|",
    ]
    for seed, row in enumerate(results):
        full, ties, ours = (" ".join(map(str, row[name])) for name in ("full", "ties", "ours"))
        lines.append(
            f"| {seed} | {full} | {ties} | {ours} | {'yes' if row['same'] else 'no'} | {row['steps']} of {row['of_steps']} | "
            f"{row['flops']:.1%} | {row['seconds']:.0f} of {row['full_seconds']:.0f}: {row['seconds'] / row['full_seconds']:.1%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="YAML of stage 2")
    parser.add_argument("--ratio", type=float, required=True, help="share of the layers to keep")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, required=True)
    for name, kind, default in (
        ("rounds", int, 20),
        ("window", int, 3),
        ("correlation", float, 0.8),
        ("sequences", int, 64),
        ("batch_size", int, 8),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help="see select_layers.py")
    parser.add_argument("--halving", action="store_true", help="see select_layers.py")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="come after the file")
    args = parser.parse_intermixed_args(argv)
    disable_progress_bar()
    cfg = load_config(args.cfg, args.overrides)
    check_start(cfg)
    top_k, results = (
        budget(args.ratio, load_teacher_config(cfg.teacher_model.name).num_hidden_layers),
        [],
    )
    for seed in range(args.seeds):
        of_seed = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
        results.append(compare(of_seed, top_k, args, args.output_dir / f"seed_{seed}"))
    atomic_write_text(args.output_dir / "cost.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(args.output_dir / "cost.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    run_main(main)

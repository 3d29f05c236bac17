"""What jointly trained, early-stopped GA-S2 costs, and whether it chooses what a full stage 2 of
every layer would.

    python benchmarks/selection_cost.py --cfg STAGE2.yaml --ratio 0.25 --seeds 3 --output_dir cost_out

For each seed, which orders the data: every layer's candidate through all steps of STAGE2.yaml by
itself, with the teacher's work repeated and one measurement at the end; then the joint training of
select_layers.py, on the same batches. Prints and writes (cost.md, cost.json) the best layers of
both, whether they are the same up to ties of the full runs, and the joint training's share of the
full runs' FLOPs (GEMMs, measurements included) and seconds, without the compilation of kernels.
Rerun the command to resume: it does only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.files import atomic_write_text

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher_config
from layer_selection.bench import Bench
from layer_selection.candidate_training import FOLDER, JointTraining, negated, rank_hybrids
from layer_selection.ranking import Ranking, budget, rank_samples
from layer_selection.stage2_runs import check_start
from layer_selection.stopping_rule import StoppingRule, add_rule_options, read_rule


def full_runs(bench: Bench, folder: Path) -> tuple[Ranking, float, float]:
    """(Ranking, seconds, compute in units of the same runs without measurements) of every layer
    trained alone."""
    to_the_end = StoppingRule()
    if not (folder / FOLDER).is_dir():  # there is something to time: kernels compile before
        first = JointTraining(bench, to_the_end, {0: [0]}, -1, folder)
        first.build([0], 0)
        first.train_round([0], 0, 1, tqdm(disable=True))
        del first
    kls = {}
    seconds = 0.0
    share = 0.0
    for layer in bench.layers:
        of_layer, facts = JointTraining(bench, to_the_end, {layer: [layer]}, -1, folder / f"layer_{layer}").run()
        kls |= of_layer
        seconds += facts["seconds"]
        share += facts["share_of_full_runs"] / len(bench.layers)
    return rank_samples("full runs", "-KL", negated(kls)), seconds, share


def compare(cfg: Config, rule: StoppingRule, args: argparse.Namespace, folder: Path) -> dict:
    """Choices and costs of both ways at the seed of `cfg`."""
    bench = Bench(cfg, args.sequences, args.batch_size)
    full, full_seconds, full_share = full_runs(bench, folder)
    kls, facts = JointTraining(bench, rule, {layer: [layer] for layer in bench.layers}, -1, folder / FOLDER).run()
    joint = rank_hybrids("ga_s2", "-KL", negated(kls), facts)
    ties = full.undecided(rule.top_k)
    different = set(full.keep(rule.top_k)) ^ set(joint.keep(rule.top_k))
    return {
        "full": full.keep(rule.top_k),
        "ours": joint.keep(rule.top_k),
        "ties": ties,
        "same": different <= set(ties),
        "steps": facts["steps"],
        "of_steps": facts["of_steps"],
        "flops": facts["share_of_full_runs"] / full_share,
        "seconds": facts["seconds"],
        "full_seconds": full_seconds,
    }


def table(results: list[dict]) -> str:
    lines = [
        "| seed | full runs keep | tied at the cut | joint training keeps | the same | steps | FLOPs | seconds |",
        "|--:|:--|:--|:--|:-:|--:|--:|--:|",
    ]
    for seed, row in enumerate(results):
        full, ties, ours = (" ".join(map(str, row[name])) for name in ("full", "ties", "ours"))
        same = "yes" if row["same"] else "no"
        share = row["seconds"] / row["full_seconds"]
        lines.append(
            f"| {seed} | {full} | {ties} | {ours} | {same} | {row['steps']} of {row['of_steps']} | "
            f"{row['flops']:.1%} | {row['seconds']:.0f} of {row['full_seconds']:.0f}: {share:.1%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cfg", required=True, help="YAML of stage 2")
    add("--ratio", type=float, required=True, help="share of the layers to keep")
    add("--seeds", type=int, default=3)
    add("--output_dir", type=Path, required=True)
    add_rule_options(parser)
    add("--sequences", type=int, default=64, help="held-out sequences to measure on")
    add("--batch_size", type=int, default=8, help="sequences per batch")
    add("overrides", nargs="*", metavar="key.path=value", help="applied after the file")
    args = parser.parse_intermixed_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file read
    cfg = load_config(args.cfg, args.overrides)
    check_start(cfg)
    rule = read_rule(args, budget(args.ratio, load_teacher_config(cfg.teacher_model.name).num_hidden_layers))
    results = []
    for seed in range(args.seeds):
        of_seed = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
        results.append(compare(of_seed, rule, args, args.output_dir / f"seed_{seed}"))
    atomic_write_text(args.output_dir / "cost.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(args.output_dir / "cost.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    run_main(main)

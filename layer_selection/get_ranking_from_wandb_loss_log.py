"""Ranks the layers of a loss_log.json: the lowest loss at equal tokens is the best layer.

    python layer_selection/get_ranking_from_wandb_loss_log.py --ratio 0.25 \
        --log outputs/ga_s2/loss_log.json [--cfg STAGE2.yaml]

A layer's loss is the mean of what it logged in the last tenth of the steps that it is compared at,
which all finished runs have. Layers that a rule stopped come after all that were trained for
longer, because the rule found them worse, and are compared among those that stopped with them.
Written to --output_dir: ranking.json, ranking.png, ranking.md and, with --cfg,
{teacher}_{size}_{student}_hybrid_{ratio}_ga_s2/stage2.yaml with the K best.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from runtime.command import run_main

from layer_selection.ranking import Layer, Ranking, budget, table, write
from layer_selection.wandb_log import FINISHED, read_log

TAIL = 0.1  # of the steps


def tail_mean(history: list, step: int) -> float:
    """The mean of the values of the last tenth of `step` steps, or the last value before that if
    there is none in it.

    history: (step, value) in order. Raises ValueError if all come later than `step`.
    """
    before = [(at, value) for at, value in history if at <= step]
    if not before:
        raise ValueError(
            f"--log: a layer has no value up to step {step}, where another one's end; retrieve all with one --metric"
        )
    last = [value for at, value in before if at > (1 - TAIL) * step]
    if not last:
        last = [before[-1][1]]
    return sum(last) / len(last)


def groups_by_length(layers: dict[int, dict]) -> list[list[int]]:
    """The layers that can be compared with each other, the finished ones first, then those that a
    rule stopped, the later ones first."""
    groups: dict[float, list[int]] = {}
    for layer, entry in layers.items():
        reached = math.inf if entry["state"] == FINISHED else entry["steps"]
        groups.setdefault(reached, []).append(layer)
    return [groups[reached] for reached in sorted(groups, reverse=True)]


def rank_group(layers: dict[int, dict], group: list[int], step: int) -> list[Layer]:
    """By loss at `step`, the lowest first."""
    losses = {layer: tail_mean(layers[layer]["history"], step) for layer in group}
    ranked = []
    for layer in sorted(group, key=lambda layer: (losses[layer], layer)):
        ties = tuple(other for other in sorted(group) if other != layer and losses[other] == losses[layer])
        ranked.append(Layer(layer, -losses[layer], ties=ties))
    return ranked


def rank(log: dict) -> Ranking:
    """Layers by loss at equal steps, those stopped by a rule after those that were trained for
    longer."""
    layers = log["layers"]
    ranked: list[Layer] = []
    steps: dict[int, int] = {}  # layer -> where it was compared
    for group in groups_by_length(layers):
        step = min(layers[layer]["history"][-1][0] for layer in group)
        ranked += rank_group(layers, group, step)
        steps |= dict.fromkeys(group, step)
    stopped = [layer for layer, entry in sorted(layers.items()) if entry["state"] != FINISHED]
    facts = {
        "source": log["source"],
        "compared_at_step": max(steps.values()),
        "stopped_at_step": {layer: steps[layer] for layer in stopped},
    }
    return Ranking("ga_s2", f"-{log['metric']}", ranked, facts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="what retrieve_loss_log_from_wandb.py wrote")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--top-k", type=int, help="how many layers to keep")
    size.add_argument("--ratio", type=float, help="share of the layers to keep: floor(ratio x layers + 0.5)")
    parser.add_argument("--output_dir", type=Path, help="default: the log's folder")
    parser.add_argument("--cfg", help="YAML of stage 2, to be written again with the chosen layers")
    args = parser.parse_args(argv)

    log = read_log(args.log)
    ranking = rank(log)
    count = budget(args.ratio, len(ranking.layers)) if args.ratio is not None else args.top_k
    kept = ranking.keep(count)
    folder = args.output_dir or args.log.parent
    cfg = None
    if args.cfg:
        from layer_selection.stage2_runs import load_stage_2, write_chosen

        cfg = load_stage_2(args.cfg)
        if cfg.teacher_model.name != log["teacher"]:
            raise ValueError(
                f"--cfg: {args.cfg} is of the teacher {cfg.teacher_model.name}, the log of {log['teacher']}"
            )
    write(ranking, count, folder)
    print(table(ranking, count))
    following = ""
    if cfg:
        chosen = write_chosen(cfg, ranking, count, args.ratio, folder)
        following = f"; next: deepspeed train.py --cfg {chosen}"
    print(f"Kept: {kept}{following}")


if __name__ == "__main__":
    run_main(main)

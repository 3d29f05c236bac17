"""Ranks the layers of a loss_log.json: the lowest loss at equal tokens is the best layer.

    python layer_selection/get_ranking_from_wandb_loss_log.py --log outputs/ga_s2/loss_log.json --ratio 0.25 [--cfg STAGE2.yaml]

A layer's loss is the mean of what it logged in the last tenth of the steps that it is compared at, which all finished runs have.
Layers that a rule stopped come behind all that went on longer, the rule having found them worse, and are compared among those that
stopped with them. Written to --output_dir: ranking.json, ranking.png, ranking.md and, with --cfg,
{teacher}_{size}_{student}_hybrid_{ratio}_ga_s2/stage2.yaml with the K best.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from runtime.command import run_main

from layer_selection.ranking import Layer, Ranking, budget, table, write

TAIL = 0.1  # of the steps


def read_log(file: Path) -> dict:
    """A loss log with an entry for every layer. Raises ValueError naming those that are missing or
    unfinished."""
    try:
        log = json.loads(file.read_text())
        layers = {int(layer): entry for layer, entry in log["layers"].items()}
        missing = sorted(set(range(log["num_layers"])) - set(layers))
        unfinished = [
            layer for layer, entry in sorted(layers.items()) if entry["state"] not in ("finished", "stopped by rule")
        ]
        empty = [layer for layer, entry in sorted(layers.items()) if not entry["history"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--log: {file} is no loss log; make it with retrieve_loss_log_from_wandb.py") from None
    for wrong, what in (
        (missing, "missing"),
        (unfinished, "unfinished"),
        (empty, f"without {log['metric']}"),
    ):
        if wrong:
            raise ValueError(f"--log: layers {wrong} of {file} are {what}; train them and retrieve the log again")
    return log | {"layers": layers}


def tail_mean(history: list, step: int) -> float:
    """The mean of the values of the last tenth of `step` steps, or the last value before `step` if
    there is none in it.

    Raises ValueError if all come later.
    """
    before = [(at, value) for at, value in history if at <= step]
    if not before:
        raise ValueError(
            f"--log: a layer has no value up to step {step}, where another one's end; retrieve all with one --metric"
        )
    last = [value for at, value in before if at > (1 - TAIL) * step] or [before[-1][1]]
    return sum(last) / len(last)


def rank(log: dict) -> Ranking:
    """Layers by loss at equal steps, those stopped by rule behind those that went on."""
    layers, ranked, steps = log["layers"], [], {}
    groups = {}  # how far: finished ones together, then the steps at which a rule stopped
    for layer, entry in layers.items():
        groups.setdefault(float("inf") if entry["state"] == "finished" else entry["steps"], []).append(layer)
    for reached in sorted(groups, reverse=True):
        together = groups[reached]
        step = min(layers[layer]["history"][-1][0] for layer in together)
        losses = {layer: tail_mean(layers[layer]["history"], step) for layer in together}
        for layer in sorted(together, key=lambda layer: (losses[layer], layer)):
            ties = tuple(other for other in sorted(together) if other != layer and losses[other] == losses[layer])
            ranked.append(Layer(layer, -losses[layer], ties=ties))
        steps |= dict.fromkeys(together, step)
    stopped = {layer: steps[layer] for layer, entry in sorted(layers.items()) if entry["state"] != "finished"}
    facts = {
        "source": log["source"],
        "compared_at_step": max(steps.values()),
        "stopped_at_step": stopped,
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
    kept, folder = ranking.keep(count), args.output_dir or args.log.parent
    cfg = None
    if args.cfg:
        from layer_selection.full_runs import load_stage_2, write_chosen

        cfg = load_stage_2(args.cfg)
        if cfg.teacher_model.name != log["teacher"]:
            raise ValueError(
                f"--cfg: {args.cfg} is of the teacher {cfg.teacher_model.name}, the log of {log['teacher']}"
            )
    write(ranking, count, folder)
    print(table(ranking, count))
    print(
        f"Kept: {kept}"
        + (f"; next: deepspeed train.py --cfg {write_chosen(cfg, ranking, count, args.ratio, folder)}" if cfg else "")
    )


if __name__ == "__main__":
    run_main(main)

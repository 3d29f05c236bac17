"""Collects the losses of GA-S2's candidates into one loss_log.json, from W&B or from the run
folders.

    # from W&B's service, from W&B's run folders, from our metrics.jsonl:
    python layer_selection/retrieve_loss_log_from_wandb.py --runs D [--entity E --project P]
    python layer_selection/retrieve_loss_log_from_wandb.py --runs D --source offline
    python layer_selection/retrieve_loss_log_from_wandb.py --runs D --source metrics

--runs is the folder that generate_layer_configs_ga_s2.py wrote. A layer's run is identified by its
name or its config's output_dir, both <runs>/layer_<N>/run as that layer's config says; of several,
as after a resume, later ones continue earlier ones. A layer whose run is missing, without the
metric, or not at its last step is an error, and nothing is written. A run that a rule stopped early
is not an error: --stopped_at says at which steps the rule stops, and the log records it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config
from runtime.environment import WANDB_PROJECT
from runtime.files import atomic_write_text

from layer_selection.wandb_log import (
    FINISHED,
    Rows,
    from_metrics,
    from_offline_runs,
    from_service,
    layer_log,
    read_candidates,
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="what generate_layer_configs_ga_s2.py wrote")
    add("--source", choices=("service", "offline", "metrics"), default="service")
    add(
        "--entity",
        default=os.environ.get("WANDB_ENTITY"),
        help="default: WANDB_ENTITY, or the key's own",
    )
    add(
        "--project",
        default=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        help=f"default: WANDB_PROJECT, or {WANDB_PROJECT}",
    )
    add(
        "--wandb_dir",
        type=Path,
        default=os.environ.get("WANDB_DIR"),
        help="offline: where W&B's run folders are; default: WANDB_DIR, or --runs",
    )
    add("--metric", default="eval/loss", help="eval/loss, the held-out KL (default), or train/loss")
    add(
        "--stopped_at",
        type=int,
        nargs="*",
        default=[],
        help="steps at which a rule stops runs early",
    )
    add("--output", type=Path, help="default: <runs>/loss_log.json")
    return parser.parse_args(argv)


def retrieve(wanted: set[str], args: argparse.Namespace) -> tuple[dict[str, Rows], str]:
    """(Output folder of a run -> what it logged, where that was looked for)."""
    if args.source == "service":
        project = f"{args.entity}/{args.project}" if args.entity else args.project
        return from_service(wanted, project), f"the project {project}"
    if args.source == "offline":
        folder = args.wandb_dir or args.runs
        return from_offline_runs(wanted, folder), str(folder)
    return from_metrics(wanted), str(args.runs)


def layer_logs(candidates: dict[int, Config], args: argparse.Namespace) -> dict[int, dict]:
    """Every layer's entry. Raises ValueError naming all layers that have none, and why."""
    found, where = retrieve({cfg.train.output_dir for cfg in candidates.values()}, args)
    layers = {}
    wrong = []
    for layer, cfg in candidates.items():
        name = cfg.train.output_dir
        try:
            if name not in found:
                raise ValueError(f"has no run {name} in {where}")
            layers[layer] = layer_log(cfg, found[name], args.metric, args.stopped_at)
        except ValueError as error:
            wrong.append(f"layer {layer} {error}")
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. Train them: deepspeed train.py --cfg {args.runs}/layer_<N>/stage2.yaml, or name "
            "the steps at which a rule stopped them (--stopped_at), or another --metric"
        )
    return layers


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    teacher, candidates = read_candidates(args.runs)
    layers = layer_logs(candidates, args)
    log = {
        "teacher": teacher,
        "metric": args.metric,
        "source": args.source,
        "num_layers": len(layers),
        "layers": layers,
    }
    output = args.output or args.runs / "loss_log.json"
    atomic_write_text(output, json.dumps(log) + "\n")
    stopped = [layer for layer, entry in layers.items() if entry["state"] != FINISHED]
    suffix = f"; stopped by rule: {stopped}" if stopped else ""
    print(f"{output}: {args.metric} of {len(layers)} layers{suffix}")


if __name__ == "__main__":
    run_main(main)

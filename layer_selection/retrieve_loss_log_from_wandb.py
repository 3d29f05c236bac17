"""The losses of GA-S2's candidates, as one loss_log.json, from W&B or from the run folders.

    python layer_selection/retrieve_loss_log_from_wandb.py --runs outputs/ga_s2 [--entity E --project P]     # W&B's service
    python layer_selection/retrieve_loss_log_from_wandb.py --runs outputs/ga_s2 --source offline             # W&B's run folders
    python layer_selection/retrieve_loss_log_from_wandb.py --runs outputs/ga_s2 --source metrics             # our metrics.jsonl

--runs is the folder that generate_layer_configs_ga_s2.py wrote. A layer's run is known by its name or its config's output_dir, both
<runs>/layer_<N>/run as that layer's config says; of several, as after a resume, later ones go on from earlier ones. A layer whose
run is missing, without the metric, or not at its last step is an error, and nothing is written. A run that a rule has stopped early
is none: --stopped_at says at which steps the rule stops, and the log records it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.environment import WANDB_PROJECT
from runtime.files import atomic_write_text, one_line
from runtime.run_folder import METRICS

from tqdm import tqdm

CANDIDATES = "candidates.json"  # beside the candidates' folders: of which teacher they are, and how many
STEP = "train/global_step"
LOCAL = "--source offline or --source metrics reads what is on this machine."
Rows = list[dict]  # what a run logged, in its order, by W&B's names


def read_candidates(folder: Path) -> tuple[str, dict[int, Config]]:
    """The teacher, and layer -> the config of its run. Raises ValueError if there is not one for
    every layer."""
    try:
        made = json.loads((folder / CANDIDATES).read_text())
        teacher, layers = made["teacher"], made["num_layers"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"--runs: {folder} has no {CANDIDATES}; make it with generate_layer_configs_ga_s2.py"
        ) from None
    return teacher, {layer: load_config(folder / f"layer_{layer}" / "stage2.yaml") for layer in range(layers)}


def need_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("--source: wandb is not installed; install it, or take --source metrics")


# ------------------------------------------------------------------------------------------------ sources
def from_service(wanted: set[str], where: str) -> dict[str, Rows]:
    """What the runs of these output folders logged to W&B's service. where: entity/project, or the
    project alone."""
    need_wandb()
    import wandb

    try:
        api, found = wandb.Api(), {}
        for run in sorted(api.runs(where), key=lambda run: run.created_at):
            for name in wanted & {run.name, run.config.get("output_dir")}:
                found.setdefault(name, []).extend(tqdm(run.scan_history(), desc=name, unit=" rows", leave=False))
        return found
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"WANDB_API_KEY: W&B takes no request without a key ({one_line(error)}); set it. {LOCAL}"
        ) from None
    except (wandb.errors.Error, ValueError) as error:
        why = f"--project: W&B did not give {where} ({one_line(error)}); check --entity and --project."
        raise ValueError(f"{why} {LOCAL}") from None


def read_offline_run(file: Path) -> tuple[str, set[str], Rows]:
    """(When it started, its name and output_dir, rows) of a .wandb file; of one that was cut short,
    what is in it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    started, names, rows = "", set(), []
    for line in done.stdout.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a record that is half written
        content = record.get(record.get("type")) or {}
        if record.get("type") == "run":
            started = content.get("start_time", "")
            names.add(content.get("display_name"))
            content = content.get("config", {})
        if record.get("type") in ("run", "config"):
            names.add(content.get("update", {}).get("output_dir"))
        if record.get("type") == "history":
            rows.append(content["item"])
    if not names:  # W&B writes every 15 s or so: a run that was killed before that has nothing
        tqdm.write(f"{file}: holds no run, passed over ({(done.stderr.strip().splitlines() or ['empty'])[-1]})")
    return started, names - {None}, rows


def from_offline_runs(wanted: set[str], folder: Path) -> dict[str, Rows]:
    """What the runs of these output folders logged into W&B's run folders anywhere under `folder`."""
    need_wandb()
    files, found = sorted(folder.rglob("run-*.wandb")), {}
    if not files:
        raise ValueError(
            f"--wandb_dir: {folder} holds no W&B run (offline-run-*/run-*.wandb); name where they are, or take "
            "--source metrics"
        )
    for _, names, rows in sorted(
        map(read_offline_run, tqdm(files, desc="W&B runs", unit="run")), key=lambda run: run[0]
    ):
        for name in wanted & names:
            found.setdefault(name, []).extend(rows)
    return found


def wandb_name(key: str) -> str:
    """What transformers calls a logged figure in W&B."""
    return STEP if key == "step" else f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def from_metrics(wanted: Iterable[str]) -> dict[str, Rows]:
    """What the runs of these output folders wrote into their metrics.jsonl."""
    found = {}
    for name in wanted:
        file = Path(name) / METRICS
        if file.is_file():
            *whole, rest = file.read_text().split("\n")  # the rest is empty, or a line that is being written
            try:
                found[name] = [{wandb_name(key): value for key, value in json.loads(line).items()} for line in whole]
            except (ValueError, AttributeError):
                raise ValueError(
                    f"{file}: has a line that is no JSON object; take it out, or train into another folder"
                ) from None
    return found


# ------------------------------------------------------------------------------------------------ the log
def layer_log(cfg: Config, rows: Rows, metric: str, stopped_at: list[int]) -> dict:
    """A layer's entry: state, steps, history. Raises ValueError if the run is not complete or lacks
    the metric."""
    rows = [row for row in rows if STEP in row]
    last, planned = max((int(row[STEP]) for row in rows), default=0), batch_plan(cfg, 1).steps
    if last < planned and last not in stopped_at:
        raise ValueError(f"is unfinished, at step {last} of {planned}")
    # A resumed run repeats steps; W&B's service gives "NaN" as a string.
    history = {int(row[STEP]): float(row[metric]) for row in rows if row.get(metric) is not None}
    if not history:
        names = sorted({key for row in rows for key in row if "/" in key and key != STEP})
        raise ValueError(f"has no {metric} in its log, only {', '.join(names)}")
    if wrong := {step: value for step, value in history.items() if not math.isfinite(value)}:
        raise ValueError(f"has {metric} {wrong[min(wrong)]} at step {min(wrong)}, which has no rank")
    state = "finished" if last >= planned else "stopped by rule"
    steps = {"steps": last, "planned_steps": planned}
    return {
        "run": cfg.train.output_dir,
        "state": state,
        **steps,
        "history": sorted(history.items()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="what generate_layer_configs_ga_s2.py wrote")
    parser.add_argument("--source", choices=("service", "offline", "metrics"), default="service")
    parser.add_argument(
        "--entity",
        default=os.environ.get("WANDB_ENTITY"),
        help="default: WANDB_ENTITY, or the key's own",
    )
    parser.add_argument(
        "--project",
        default=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        help=f"default: WANDB_PROJECT, or {WANDB_PROJECT}",
    )
    parser.add_argument(
        "--wandb_dir",
        type=Path,
        default=os.environ.get("WANDB_DIR"),
        help="offline: where W&B's run folders are; default: WANDB_DIR, or --runs",
    )
    parser.add_argument("--metric", default="eval/loss", help="eval/loss, the held-out KL (default), or train/loss")
    parser.add_argument(
        "--stopped_at",
        type=int,
        nargs="*",
        default=[],
        help="steps at which a rule stops runs early",
    )
    parser.add_argument("--output", type=Path, help="default: <runs>/loss_log.json")
    args = parser.parse_args(argv)

    teacher, candidates = read_candidates(args.runs)
    wanted = {cfg.train.output_dir for cfg in candidates.values()}
    if args.source == "service":
        where = f"{args.entity}/{args.project}" if args.entity else args.project
        found, where = from_service(wanted, where), f"the project {where}"
    elif args.source == "offline":
        found, where = (
            from_offline_runs(wanted, args.wandb_dir or args.runs),
            str(args.wandb_dir or args.runs),
        )
    else:
        found, where = from_metrics(wanted), str(args.runs)
    layers, wrong = {}, []
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
    output = args.output or args.runs / "loss_log.json"
    log = {
        "teacher": teacher,
        "metric": args.metric,
        "source": args.source,
        "num_layers": len(layers),
        "layers": layers,
    }
    atomic_write_text(output, json.dumps(log) + "\n")
    stopped = [layer for layer, entry in layers.items() if entry["state"] != "finished"]
    print(f"{output}: {args.metric} of {len(layers)} layers" + (f"; stopped by rule: {stopped}" if stopped else ""))


if __name__ == "__main__":
    run_main(main)

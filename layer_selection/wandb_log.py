"""GA-S2's candidates as separate runs: the folder with their configs, their losses from W&B, and
the loss log.

Three scripts share it: generate_layer_configs_ga_s2.py writes the folder,
retrieve_loss_log_from_wandb.py reads the losses into loss_log.json,
get_ranking_from_wandb_loss_log.py ranks that.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import Config, load_config
from runtime.files import atomic_write_text, one_line
from runtime.run_folder import METRICS

from tqdm import tqdm

CANDIDATES = "candidates.json"  # next to the candidates' folders: their teacher and number
STAGE_2 = "stage2.yaml"
STEP = "train/global_step"
FINISHED = "finished"
STOPPED = "stopped by rule"
LOCAL = "--source offline or --source metrics reads what is on this machine."
Rows = list[dict]  # what a run logged, in its order, by W&B's names


# ------------------------------------------------------------------------ the candidates' folder
def candidate_folder(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}"


def write_candidates(folder: Path, teacher: str, layers: int) -> None:
    atomic_write_text(folder / CANDIDATES, json.dumps({"teacher": teacher, "num_layers": layers}) + "\n")


def read_candidates(folder: Path) -> tuple[str, dict[int, Config]]:
    """The teacher, and layer -> the config of its run. Raises ValueError if there is not one for
    every layer."""
    try:
        made = json.loads((folder / CANDIDATES).read_text())
        teacher = made["teacher"]
        layers = made["num_layers"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"--runs: {folder} has no {CANDIDATES}; make it with generate_layer_configs_ga_s2.py"
        ) from None
    return teacher, {layer: load_config(candidate_folder(folder, layer) / STAGE_2) for layer in range(layers)}


# ------------------------------------------------------------------------ sources
def need_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("--source: wandb is not installed; install it, or take --source metrics")


def from_service(wanted: set[str], where: str) -> dict[str, Rows]:
    """What the runs of these output folders logged to W&B's service. where: entity/project, or the
    project alone."""
    need_wandb()
    import wandb

    found: dict[str, Rows] = {}
    try:
        api = wandb.Api()
        for run in sorted(api.runs(where), key=lambda run: run.created_at):
            for name in wanted & {run.name, run.config.get("output_dir")}:
                rows = tqdm(run.scan_history(), desc=name, unit=" rows", leave=False)
                found.setdefault(name, []).extend(rows)
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"WANDB_API_KEY: W&B takes no request without a key ({one_line(error)}); set it. {LOCAL}"
        ) from None
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(
            f"--project: W&B did not return {where} ({one_line(error)}); check --entity and --project. {LOCAL}"
        ) from None
    return found


@dataclass
class OfflineRun:
    """started: its time, "" if unknown. names: its name and its config's output_dir."""

    started: str
    names: set[str]
    rows: Rows


def read_records(file: Path) -> tuple[list[dict], str]:
    """(The records of a .wandb file that are complete, why it ended where it did)."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    records = []
    for line in done.stdout.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a record that is half written
    errors = done.stderr.strip().splitlines()
    return records, errors[-1] if errors else "empty"


def read_offline_run(file: Path) -> OfflineRun:
    """What is in a .wandb file, also in one of a run that was killed."""
    records, reason = read_records(file)
    started = ""
    names: set[str | None] = set()
    rows = []
    for record in records:
        kind = record.get("type")
        content = record.get(kind) or {}
        if kind == "run":
            started = content.get("start_time", "")
            names.add(content.get("display_name"))
            names.add(content.get("config", {}).get("update", {}).get("output_dir"))
        elif kind == "config":
            names.add(content.get("update", {}).get("output_dir"))
        elif kind == "history":
            rows.append(content["item"])
    if not names:  # W&B writes every 15 s or so: a run that was killed before that has nothing
        tqdm.write(f"{file}: holds no run, skipped ({reason})")
    return OfflineRun(started, names - {None}, rows)


def from_offline_runs(wanted: set[str], folder: Path) -> dict[str, Rows]:
    """What the runs of these output folders logged into W&B's run folders anywhere under
    `folder`."""
    need_wandb()
    files = sorted(folder.rglob("run-*.wandb"))
    if not files:
        raise ValueError(
            f"--wandb_dir: {folder} holds no W&B run (offline-run-*/run-*.wandb); name where they are, or take "
            "--source metrics"
        )
    runs = [read_offline_run(file) for file in tqdm(files, desc="W&B runs", unit="run")]
    found: dict[str, Rows] = {}
    for run in sorted(runs, key=lambda run: run.started):
        for name in wanted & run.names:
            found.setdefault(name, []).extend(run.rows)
    return found


def wandb_name(key: str) -> str:
    """What transformers calls a logged figure in W&B."""
    if key == "step":
        return STEP
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    return f"train/{key}"


def wandb_row(record: dict) -> dict:
    return {wandb_name(key): value for key, value in record.items()}


def from_metrics(wanted: Iterable[str]) -> dict[str, Rows]:
    """What the runs of these output folders wrote into their metrics.jsonl. Raises ValueError for a
    damaged one."""
    found = {}
    for name in wanted:
        file = Path(name) / METRICS
        if not file.is_file():
            continue
        lines = file.read_text().split("\n")
        lines.pop()  # it is empty, or being written
        try:
            found[name] = [wandb_row(json.loads(line)) for line in lines]
        except (ValueError, AttributeError):
            raise ValueError(
                f"{file}: has a line that is no JSON object; take it out, or train into another folder"
            ) from None
    return found


# ------------------------------------------------------------------------ the loss log
def layer_log(cfg: Config, rows: Rows, metric: str, stopped_at: list[int]) -> dict:
    """A layer's entry: run, state, steps, planned_steps, history. Raises ValueError if the run is
    not complete or lacks the metric."""
    rows = [row for row in rows if STEP in row]
    last = max((int(row[STEP]) for row in rows), default=0)
    planned = batch_plan(cfg, 1).steps
    if last < planned and last not in stopped_at:
        raise ValueError(f"is unfinished, at step {last} of {planned}")
    return {
        "run": cfg.train.output_dir,
        "state": FINISHED if last >= planned else STOPPED,
        "steps": last,
        "planned_steps": planned,
        "history": metric_history(rows, metric),
    }


def metric_history(rows: Rows, metric: str) -> list[tuple[int, float]]:
    """(step, value) in order; of a step that was logged again by a resumed run, the later value.
    Raises ValueError if there is none, or one that is not finite."""
    # W&B's service returns "NaN" as a string.
    history = {int(row[STEP]): float(row[metric]) for row in rows if row.get(metric) is not None}
    if not history:
        names = sorted({key for row in rows for key in row if "/" in key and key != STEP})
        raise ValueError(f"has no {metric} in its log, only {', '.join(names)}")
    not_finite = [step for step, value in history.items() if not math.isfinite(value)]
    if not_finite:
        step = min(not_finite)
        raise ValueError(f"has {metric} {history[step]} at step {step}, which has no rank")
    return sorted(history.items())


def read_log(file: Path) -> dict:
    """A loss log with an entry for every layer. Raises ValueError naming those that are missing or
    unfinished."""
    try:
        log = json.loads(file.read_text())
        layers = {int(layer): entry for layer, entry in log["layers"].items()}
        missing = sorted(set(range(log["num_layers"])) - set(layers))
        unfinished = []
        empty = []
        for layer, entry in sorted(layers.items()):
            if entry["state"] not in (FINISHED, STOPPED):
                unfinished.append(layer)
            if not entry["history"]:
                empty.append(layer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--log: {file} is no loss log; make it with retrieve_loss_log_from_wandb.py") from None
    problems = {
        "missing": missing,
        "unfinished": unfinished,
        f"without {log['metric']}": empty,
    }
    for what, wrong in problems.items():
        if wrong:
            raise ValueError(f"--log: layers {wrong} of {file} are {what}; train them and retrieve the log again")
    return log | {"layers": layers}

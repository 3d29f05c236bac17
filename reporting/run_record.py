"""What a run folder of train.py says about its run, read without loading a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config
from runtime.model_card import evaluation
from runtime.run_folder import CONFIG, EXPORT, METRICS, RUN, read_json, recorded_config

STAGES = {
    1: "Stage 1: attention alignment",
    2: "Stage 2: logit distillation",
    3: "Stage 3: longer context",
}

Curve = list[tuple[int, float]]  # (step, value), by step


@dataclass(frozen=True)
class RunRecord:
    """A run: its resolved config, run.json, the lines of metrics.jsonl, and the evaluations of its
    export.

    evaluations: dicts with task, seq_len, metric, score and stderr.
    """

    folder: Path
    config: Config
    facts: dict
    metrics: list[dict]
    evaluations: list[dict]

    @property
    def title(self) -> str:
        return STAGES[self.config.stage]

    def curve(self, name: str) -> Curve:
        """The values of a logged figure. Of a step that was logged twice, by a run that was
        interrupted and resumed, the later value counts."""
        values = {int(line["step"]): float(line[name]) for line in self.metrics if line.get(name) is not None}
        return sorted(values.items())

    def per_layer(self, name: str) -> tuple[list[int], list[list[float]]]:
        """(steps, at each of them the value of every layer) of a figure logged as name/00, name/01
        ..."""
        found = {}
        for line in self.metrics:
            keys = sorted(key for key in line if key.startswith(f"{name}/"))
            if keys:
                found[int(line["step"])] = [line[key] for key in keys]
        steps = sorted(found)
        return steps, [found[step] for step in steps]

    def layer_errors(self) -> tuple[list[int], list[list[float]]]:
        """(steps, relative alignment error of every layer) of stage 1: on held-out text, or on
        training text where there is none held out."""
        steps, errors = self.per_layer("eval_layer_error")
        return (steps, errors) if steps else self.per_layer("layer_error")


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl; one whose writer was killed half-way is left out."""
    lines = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "step" in line:
            lines.append(line)
    return lines


def read_run(folder: Path) -> RunRecord:
    """Raises ValueError if `folder` is no run folder, or has logged nothing yet."""
    if not (folder / CONFIG).is_file() or not (folder / RUN).is_file():
        raise ValueError(
            f"RUN: {folder} holds no run of train.py ({CONFIG}, {RUN}); name its train.output_dir",
        )
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    if not metrics:
        raise ValueError(
            f"RUN: {folder} has logged no step yet ({METRICS}); wait for the first, or resume the run",
        )
    export = folder / EXPORT
    evaluations = evaluation(folder, export) if export.is_dir() else []
    return RunRecord(
        folder,
        recorded_config(folder / CONFIG),
        read_json(folder / RUN),
        metrics,
        evaluations,
    )

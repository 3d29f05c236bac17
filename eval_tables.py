"""The tasks that evaluate.py has names for, and the tables and pictures of their results.

A result is {"task", "seq_len", "metric", "score", "stderr", "higher_is_better", ...}, or {"task", "seq_len", "error"}; results are
label of the checkpoint -> unit's key -> result.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from recall_tasks import RECALL_TASKS

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
RECALL_GENERATION, PERPLEXITY, KL = "recall_generation", "heldout_perplexity", "heldout_kl"
LOCAL = (*RECALL_TASKS, RECALL_GENERATION, PERPLEXITY, KL)
GROUPS = {
    "ruler": RULER,
    "needle": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "commonsense": (
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "piqa",
        "winogrande",
        "boolq",
        "openbookqa",
        "lambada_openai",
    ),
    "mmlu": ("mmlu",),
    "local": LOCAL,
    "generation": ("gsm8k", RECALL_GENERATION),
}


@dataclass(frozen=True)
class Unit:
    """A task, at a length if it has one: what is run, fails and is written down as a whole."""

    task: str
    seq_len: int | None = None

    @property
    def key(self) -> str:
        return self.task if self.seq_len is None else f"{self.task}@{self.seq_len}"


@dataclass(frozen=True)
class Row:
    """A line of the tables: a task, or the mean of a group at a length; of every label its score,
    standard error and error."""

    name: str
    seq_len: int | None
    metric: str
    higher_is_better: bool
    cells: dict[str, dict]  # label -> {"score", "stderr"} or {"error"}; absent: not run
    is_mean: bool = False


def rows(results: dict[str, dict[str, dict]]) -> list[Row]:
    """Rows of label -> unit's key -> result, in the order of `GROUPS`; the mean of a group where
    nothing of it is missing."""
    order = [*dict.fromkeys(name for group in GROUPS.values() for name in group)]
    found = {(r["task"], r["seq_len"]) for tasks in results.values() for r in tasks.values()}
    place = {name: i for i, name in enumerate(order)}
    table = []
    for task, seq_len in sorted(found, key=lambda u: (place.get(u[0], len(place)), u[0], u[1] or 0)):
        cells = {label: r for label, tasks in results.items() if (r := tasks.get(Unit(task, seq_len).key))}
        known = next(
            (cell for cell in cells.values() if "score" in cell),
            {"metric": "", "higher_is_better": True},
        )
        table.append(Row(task, seq_len, known["metric"], known["higher_is_better"], cells))
    for group in ("ruler", "needle", "commonsense"):
        for seq_len in sorted({s for t, s in found if t in GROUPS[group]}, key=lambda s: s or 0):
            members = [row for row in table if row.name in GROUPS[group] and row.seq_len == seq_len]
            cells = {
                label: mean_of([row.cells[label] for row in members])
                for label in results
                if len(members) == len(GROUPS[group]) and all("score" in row.cells.get(label, {}) for row in members)
            }
            if cells:
                table.append(Row(group, seq_len, f"mean of {len(members)}", True, cells, is_mean=True))
    return table


def mean_of(cells: list[dict]) -> dict:
    """Mean score, with the standard error of independent tasks."""
    errors = [cell["stderr"] for cell in cells]
    stderr = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return {"score": statistics.fmean(cell["score"] for cell in cells), "stderr": stderr}


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"


def cell_text(cell: dict | None) -> str:
    if cell is None:
        return ""
    if "error" in cell:
        return "failed"
    return number(cell["score"]) + (f" ± {number(cell['stderr'])}" if cell["stderr"] is not None else "")


def markdown(results: dict[str, dict[str, dict]]) -> str:
    """The results as a Markdown table, and what failed below it."""
    lines = [
        "| task | length | metric | " + " | ".join(results) + " |",
        "|:--|--:|:--|" + "--:|" * len(results),
    ]
    for row in rows(results):
        name = f"**{row.name}**" if row.is_mean else row.name
        cells = " | ".join(cell_text(row.cells.get(label)) for label in results)
        lines.append(f"| {name} | {row.seq_len or ''} | {row.metric}{'' if row.higher_is_better else ' ↓'} | {cells} |")
    for label, tasks in results.items():
        lines += [f"\nFailed: {label}, {key}: {r['error']}" for key, r in tasks.items() if "error" in r]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def picture(path: Path, panels: int, bars: int):
    """Yields the axes of `panels` panels side by side, high enough for so many bars; saves them
    with one legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2 + 4.5 * panels, max(2.6, 1.4 + 0.17 * bars))
    figure, (axes,) = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    yield axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bars(axis, table: list[Row], names: list[str], value) -> None:
    """A group of bars from 0 a row, one a name; value(row, name): (its length, standard error or
    None), or None."""
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        shown = [
            (y + (i - (len(names) - 1) / 2) * width, *found)
            for y, row in enumerate(table)
            if (found := value(row, name))
        ]
        axis.barh(
            [y for y, _, _ in shown],
            [length for _, length, _ in shown],
            width,
            xerr=[error or 0 for _, _, error in shown],
            label=name,
            error_kw={"lw": 0.8},
        )
    axis.set_yticks(range(len(table)), [f"{row.name} {row.seq_len or ''}".strip() for row in table], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)


def over_lengths(table: list[Row], names: list[str]) -> tuple[list[int], dict[str, list[float]], int]:
    """(lengths, every name's mean score at each of them, of how many tasks): of the tasks that all
    names have at all lengths, for others would move the mean."""
    found = {
        (row.name, row.seq_len): row
        for row in table
        if row.seq_len
        and row.higher_is_better
        and not row.is_mean
        and all("score" in row.cells.get(name, {}) for name in names)
    }
    lengths = sorted({length for _, length in found})
    tasks = [
        task for task in dict.fromkeys(task for task, _ in found) if all((task, length) in found for length in lengths)
    ]
    if len(lengths) < 2 or not tasks:
        return [], {}, 0
    means = {
        name: [statistics.fmean(found[task, length].cells[name]["score"] for task in tasks) for length in lengths]
        for name in names
    }
    return lengths, means, len(tasks)


def plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Scores side by side, a panel for each metric where lower is better, and one over the length
    where there are several."""

    def score_of(row: Row, label: str) -> tuple[float, float | None] | None:
        cell = row.cells.get(label, {})
        return (cell["score"], cell["stderr"]) if "score" in cell else None

    table = [row for row in rows(results) if any("score" in cell for cell in row.cells.values())]
    parts: dict[str, list[Row]] = {}
    for row in table:
        parts.setdefault("score" if row.higher_is_better else f"{row.metric}, lower is better", []).append(row)
    lengths, means, count = over_lengths(table, list(results))
    with picture(path, len(parts) + bool(lengths), max(map(len, parts.values())) * len(results)) as axes:
        for axis, (name, part) in zip(axes, parts.items()):
            draw_bars(axis, part, list(results), score_of)
            axis.set_xlabel(name)
            if name == "score":
                axis.set_xlim(right=max(1, axis.get_xlim()[1]))
        for label, points in means.items():
            axes[-1].plot(lengths, points, "o-", label=label)
            axes[-1].set_xscale("log", base=2)
            axes[-1].set_xticks(lengths, [str(n) for n in lengths])
            axes[-1].set(xlabel="length in tokens", ylabel=f"mean score of {count} tasks", ylim=(-0.02, 1.02))

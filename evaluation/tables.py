"""Tables and bar charts of results.

A result is {"task", "seq_len", "metric", "score", "stderr", "higher_is_better", ...}, or {"task",
"seq_len", "error"}. `results` are label of the checkpoint -> unit's key -> result.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from .tasks import GROUPS, KL, PERPLEXITY, RECALL_GENERATION, Unit

# The name of a figure wherever a reader sees it; files keep the keys.
FIGURES = {
    "heldout_loss": "held-out loss",
    PERPLEXITY: "held-out perplexity",
    KL: "held-out KL",
    "top1_agreement": "top-1 agreement",
    "associative_recall": "associative recall",
    "multi_hop_recall": "two-hop recall",
    "copying": "copying",
    RECALL_GENERATION: "generated recall",
}
AVERAGED_GROUPS = ("ruler", "needle", "commonsense")


@dataclass(frozen=True)
class Row:
    """A row of the tables: a task, or the mean of a group at a length, with the cell of every
    label.

    A cell is {"score", "stderr"} or {"error"}; that of a label which has not run the task is
    absent.
    """

    name: str
    seq_len: int | None
    metric: str
    higher_is_better: bool
    cells: dict[str, dict]
    is_mean: bool = False

    @property
    def title(self) -> str:
        """The name that readers see."""
        return FIGURES.get(self.name, self.name)

    def has_score(self, label: str) -> bool:
        return "score" in self.cells.get(label, {})


def rows(results: dict[str, dict[str, dict]]) -> list[Row]:
    """The rows of results, tasks in the order of `GROUPS`, then the means of groups of which
    nothing is missing."""
    table = task_rows(results)
    means = []
    for group in AVERAGED_GROUPS:
        lengths = {row.seq_len for row in table if row.name in GROUPS[group]}
        for seq_len in sorted(lengths, key=lambda length: length or 0):
            members = [row for row in table if row.name in GROUPS[group] and row.seq_len == seq_len]
            if len(members) < len(GROUPS[group]):
                continue
            cells = mean_cells(members, list(results))
            if cells:
                metric = f"mean of {len(members)}"
                means.append(Row(group, seq_len, metric, True, cells, is_mean=True))
    return table + means


def task_rows(results: dict[str, dict[str, dict]]) -> list[Row]:
    """A row per task and length."""
    units = set()
    for tasks in results.values():
        units |= {Unit(result["task"], result["seq_len"]) for result in tasks.values()}
    table = []
    for unit in sorted(units, key=place):
        cells = {label: tasks[unit.key] for label, tasks in results.items() if unit.key in tasks}
        scored = [cell for cell in cells.values() if "score" in cell]
        metric = scored[0]["metric"] if scored else ""
        higher_is_better = scored[0]["higher_is_better"] if scored else True
        table.append(Row(unit.task, unit.seq_len, metric, higher_is_better, cells))
    return table


def place(unit: Unit) -> tuple[int, str, int]:
    """The sort key of a unit: where `GROUPS` names its task first, other tasks by name."""
    known = list(dict.fromkeys(name for group in GROUPS.values() for name in group))
    index = known.index(unit.task) if unit.task in known else len(known)
    return index, unit.task, unit.seq_len or 0


def mean_cells(members: list[Row], labels: list[str]) -> dict[str, dict]:
    """Label -> the mean over the rows, for the labels that have a score in all of them."""
    cells = {}
    for label in labels:
        if all(row.has_score(label) for row in members):
            cells[label] = mean_of([row.cells[label] for row in members])
    return cells


def mean_of(cells: list[dict]) -> dict:
    """Mean score, with the standard error for independent tasks."""
    errors = [cell["stderr"] for cell in cells]
    stderr = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return {"score": statistics.fmean(cell["score"] for cell in cells), "stderr": stderr}


# ---------------------------------------------------------------------------------------- Markdown
def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"


def cell_text(cell: dict | None) -> str:
    """A score and its standard error as text, "failed", or "" where the task was not run."""
    if cell is None:
        return ""
    if "error" in cell:
        return "failed"
    score = number(cell["score"])
    return score if cell["stderr"] is None else f"{score} ± {number(cell['stderr'])}"


def first_columns(row: Row) -> list[str]:
    """Task, length and metric of a row."""
    title = f"**{row.title}**" if row.is_mean else row.title
    metric = row.metric if row.higher_is_better else f"{row.metric} ↓"
    return [title, str(row.seq_len or ""), metric]


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(results: dict[str, dict[str, dict]]) -> str:
    """The results as a Markdown table, with the meaning of ±, a limit of documents and the errors
    below it."""
    lines = [
        table_line(["task", "length", "metric", *results]),
        "|:--|--:|:--|" + "--:|" * len(results),
    ]
    for row in rows(results):
        cells = [cell_text(row.cells.get(label)) for label in results]
        lines.append(table_line([*first_columns(row), *cells]))
    lines.append("\n± is the standard error.")
    found = [result for tasks in results.values() for result in tasks.values()]
    limits = {result.get("settings", {}).get("limit") for result in found} - {None}
    if limits:
        lines.append(f"\nA trial, not for reported scores: at most {max(limits)} documents of each task (LIMIT).")
    for label, tasks in results.items():
        for key, result in tasks.items():
            if "error" in result:
                lines.append(f"\nFailed: {label}, {key}: {result['error']}")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------- bar charts
@contextlib.contextmanager
def figure_axes(path: Path, panels: int, bars: int):
    """Yields the axes of `panels` panels side by side, high enough for `bars` bars; saves the
    figure, with one legend, to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2 + 4.5 * panels, max(2.6, 1.4 + 0.17 * bars))
    figure, grid = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    axes = grid[0]
    yield axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bars(axis, table: list[Row], labels: list[str], value) -> None:
    """Draws a group of bars per row, one bar per label.

    value(row, label): (the bar's length, its standard error or None), or None for no bar.
    """
    height = 0.8 / len(labels)
    for i, label in enumerate(labels):
        offset = (i - (len(labels) - 1) / 2) * height
        positions = []
        lengths = []
        errors = []
        for y, row in enumerate(table):
            found = value(row, label)
            if found is not None:
                positions.append(y + offset)
                lengths.append(found[0])
                errors.append(found[1] or 0)
        axis.barh(positions, lengths, height, xerr=errors, label=label, error_kw={"lw": 0.8})
    names = [f"{row.title} {row.seq_len or ''}".strip() for row in table]
    axis.set_yticks(range(len(table)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)


def over_lengths(table: list[Row], labels: list[str]) -> tuple[list[int], dict[str, list[float]], int]:
    """(lengths, label -> mean score at each of them, the number of tasks in the mean).

    The mean is over the tasks that all labels have at all lengths: others would change it from one
    length to the next. ([], {}, 0) if there are fewer than two lengths or no such task.
    """
    by_task: dict[str, dict[int, dict]] = {}  # task -> length -> cells
    for row in table:
        comparable = row.seq_len and row.higher_is_better and not row.is_mean
        if comparable and all(row.has_score(label) for label in labels):
            by_task.setdefault(row.name, {})[row.seq_len] = row.cells
    lengths = sorted({length for cells in by_task.values() for length in cells})
    complete = [cells for cells in by_task.values() if len(cells) == len(lengths)]
    if len(lengths) < 2 or not complete:
        return [], {}, 0
    means: dict[str, list[float]] = {label: [] for label in labels}
    for label, length in itertools.product(labels, lengths):
        scores = [cells[length][label]["score"] for cells in complete]
        means[label].append(statistics.fmean(scores))
    return lengths, means, len(complete)


def score_and_error(row: Row, label: str) -> tuple[float, float | None] | None:
    """(score, standard error or None), None without a score."""
    if not row.has_score(label):
        return None
    return row.cells[label]["score"], row.cells[label]["stderr"]


def plot(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Draws the scores side by side.

    Every metric of which lower is better has a panel of its own, and so has the mean score over
    the length where there are several lengths.
    """
    labels = list(results)
    table = [row for row in rows(results) if any(row.has_score(label) for label in labels)]
    panels: dict[str, list[Row]] = {}
    for row in table:
        name = "score" if row.higher_is_better else f"{row.metric}, lower is better"
        panels.setdefault(name, []).append(row)
    lengths, means, num_tasks = over_lengths(table, labels)
    most_rows = max(len(part) for part in panels.values())
    with figure_axes(path, len(panels) + bool(lengths), most_rows * len(labels)) as axes:
        for axis, (name, part) in zip(axes, panels.items()):
            draw_bars(axis, part, labels, score_and_error)
            axis.set_xlabel(name)
            if name == "score":
                axis.set_xlim(right=max(1, axis.get_xlim()[1]))
        if lengths:
            draw_over_lengths(axes[-1], lengths, means, num_tasks)


def draw_over_lengths(axis, lengths: list[int], means: dict[str, list[float]], num_tasks: int) -> None:
    for label, scores in means.items():
        axis.plot(lengths, scores, "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("length in tokens")
    axis.set_ylabel(f"mean score of {num_tasks} tasks")
    axis.set_ylim(-0.02, 1.02)

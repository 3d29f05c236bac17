"""Students beside their teacher: what share of the teacher's score a student keeps, as
eval_compare.py defines it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .options import labels
from .tables import Row, cell_text, draw_bars, figure_axes, first_columns, table_line


def share(row: Row, label: str, teacher: str) -> tuple[float, float | None] | None:
    """(a student's share of the teacher's score, its standard error or None); None if there is no
    share."""
    if row.metric == "nats" or not row.has_score(label) or not row.has_score(teacher):
        return None
    score = row.cells[label]["score"]
    reference = row.cells[teacher]["score"]
    divisor = reference if row.higher_is_better else score
    if reference == 0 or divisor == 0:
        return None
    value = score / reference if row.higher_is_better else reference / score
    student_error = row.cells[label]["stderr"]
    teacher_error = row.cells[teacher]["stderr"]
    if student_error is None or teacher_error is None:
        return value, None
    if row.higher_is_better:
        error = math.hypot(student_error, value * teacher_error) / reference
    else:
        error = value * math.hypot(student_error / score, teacher_error / reference)
    return value, error


def total(table: list[Row], label: str, teacher: str) -> float | None:
    """The share over all tasks that both have and of which higher is better: the mean score over
    the teacher's mean score."""
    score = 0.0
    reference = 0.0
    for row in table:
        counted = row.higher_is_better and not row.is_mean
        if counted and row.has_score(label) and row.has_score(teacher):
            score += row.cells[label]["score"]
            reference += row.cells[teacher]["score"]
    return score / reference if reference else None


def percent(found: tuple[float, float | None] | None) -> str:
    """A share and its standard error as text; "" for none."""
    if found is None:
        return ""
    value, stderr = found
    return f"{value:.1%}" if stderr is None else f"{value:.1%} ± {stderr:.1%}"


def comparison_table(table: list[Row], teacher: str, students: list[str]) -> str:
    """The comparison as a Markdown table, with the errors below it."""
    head = ["task", "length", "metric", teacher]
    for student in students:
        head += [student, "share"]
    lines = [table_line(head), "|:--|--:|:--|--:|" + "--:|--:|" * len(students)]
    for row in table:
        cells = [*first_columns(row), cell_text(row.cells.get(teacher))]
        for student in students:
            cells += [cell_text(row.cells.get(student)), percent(share(row, student, teacher))]
        lines.append(table_line(cells))
    totals = [total(table, student, teacher) for student in students]
    if any(value is not None for value in totals):
        cells = ["**all scores**", "", "", ""]
        for value in totals:
            cells += ["", "" if value is None else f"**{value:.1%}**"]
        lines.append(table_line(cells))
    for row in table:
        for label, cell in row.cells.items():
            if "error" in cell:
                lines.append(f"\nFailed: {label}, {row.name} {row.seq_len or ''}: {cell['error']}")
    return "\n".join(lines) + "\n"


def plot_shares(table: list[Row], teacher: str, students: list[str], path: Path) -> None:
    """Draws the share of every task, a bar per student."""
    shown = [row for row in table if any(share(row, student, teacher) for student in students)]
    if not shown:
        return
    with figure_axes(path, 1, len(shown) * len(students)) as (axis,):
        draw_bars(axis, shown, students, lambda row, student: share(row, student, teacher))
        axis.axvline(1, color="black", lw=0.8, linestyle=":")
        axis.set_xlabel(f"share of the score of {teacher}")


def comparison(table: list[Row], teacher: str, students: list[str]) -> dict:
    """The comparison as compare.json holds it."""
    entries = {student: student_entry(table, student, teacher) for student in students}
    return {"teacher": teacher, "students": entries}


def student_entry(table: list[Row], student: str, teacher: str) -> dict:
    tasks = []
    for row in table:
        value, stderr = share(row, student, teacher) or (None, None)
        tasks.append(
            {
                "task": row.name,
                "seq_len": row.seq_len,
                "metric": row.metric,
                "teacher": row.cells.get(teacher),
                "student": row.cells.get(student),
                "share": value,
                "share_stderr": stderr,
            }
        )
    return {"all": total(table, student, teacher), "tasks": tasks}


# -------------------------------------------------------------------------------- files of results
def read_results(file: str) -> tuple[str, dict[str, dict]]:
    """(checkpoint, unit's key -> result) of a checkpoint's results.json. Raises ValueError for
    another file."""
    try:
        content = json.loads(Path(file).read_text())
        return content["checkpoint"], content["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"CHECKPOINT: {file} is no results.json of a checkpoint; "
            "evaluate.py writes it to OUTPUT/PATH__OF__CHECKPOINT/results.json"
        ) from None


def results_of_files(files: list[str]) -> dict[str, dict[str, dict]]:
    """Label -> unit's key -> result, of the units that all files hold. Raises ValueError for other
    files, and for results that were measured with different settings."""
    checkpoints = []
    results = []
    for file in files:
        checkpoint, tasks = read_results(file)
        checkpoints.append(checkpoint)
        results.append(tasks)
    names = labels(checkpoints)
    common = [key for key in results[0] if all(key in tasks for tasks in results)]
    if not common:
        raise ValueError(f"CHECKPOINT: {', '.join(files)} have no task in common")
    for key in common:
        settings = {file: tasks[key]["settings"] for file, tasks in zip(files, results)}
        check_same_settings(key, settings)
    selected = {}
    for checkpoint, tasks in zip(checkpoints, results):
        selected[names[checkpoint]] = {key: tasks[key] for key in common}
    return selected


def check_same_settings(key: str, settings: dict[str, dict]) -> None:
    """Raises ValueError if the results of a unit in several files have different settings.

    settings: file -> settings of its result.
    """
    (first_file, first), *others = settings.items()
    for file, other in others:
        for name in first | other:
            if name != "checkpoint" and first.get(name) != other.get(name):
                raise ValueError(
                    f"CHECKPOINT: {key} in {file} was measured with another {name} "
                    f"({other.get(name)!r}) than in {first_file} ({first.get(name)!r})"
                )

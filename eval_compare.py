"""Teacher and students side by side: score, standard error, and the share of the teacher's score that a student keeps.

    python eval_compare.py TEACHER HYBRID ... --tasks local,ruler --data CHUNKS
    python eval_compare.py teacher/results.json hybrid/results.json

Each is a checkpoint, or the results.json of one that evaluate.py wrote. Checkpoints are evaluated first, as far as their results
are not there already, with evaluate.py's options; of files that is compared what all of them hold. Written to --output:
compare.md, compare.json, compare.png. The exit code is 1 if a task failed.

The share is score / teacher's score; of perplexities teacher's / student's, the factor that a token's probability keeps on
average. A KL has none. Its standard error takes the two scores for independent, and is too large for what the same documents gave.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

from runtime.command import run_main
from runtime.files import atomic_write_text

from eval_tables import Row, cell_text, draw_bars, picture, rows
from evaluate import add_options, evaluate, labels, with_stop_signals


def share(row: Row, label: str, teacher: str) -> tuple[float, float | None] | None:
    """(a student's share of the teacher's score, its standard error); None where there is none."""
    ours, theirs = row.cells.get(label, {}), row.cells.get(teacher, {})
    if (
        "score" not in ours
        or "score" not in theirs
        or row.metric == "nats"
        or theirs["score"] == 0
        or ours["score"] == 0
        and not row.higher_is_better
    ):
        return None
    value = ours["score"] / theirs["score"] if row.higher_is_better else theirs["score"] / ours["score"]
    if None in (ours["stderr"], theirs["stderr"]):
        return value, None
    if not row.higher_is_better:
        return value, value * math.hypot(ours["stderr"] / ours["score"], theirs["stderr"] / theirs["score"])
    return value, math.hypot(ours["stderr"], value * theirs["stderr"]) / theirs["score"]


def total(table: list[Row], label: str, teacher: str) -> float | None:
    """The share over all tasks that both have and where higher is better: mean score over the
    teacher's mean score."""
    pairs = [
        (row.cells[label]["score"], row.cells[teacher]["score"])
        for row in table
        if row.higher_is_better
        and not row.is_mean
        and all("score" in row.cells.get(name, {}) for name in (label, teacher))
    ]
    theirs = sum(score for _, score in pairs)
    return sum(score for score, _ in pairs) / theirs if theirs else None


def percent(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    return f"{found[0]:.1%}" + (f" ± {found[1]:.1%}" if found[1] is not None else "")


def markdown(table: list[Row], teacher: str, students: list[str]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"| task | length | metric | {teacher} | " + " | ".join(f"{name} | share" for name in students) + " |",
        "|:--|--:|:--|--:|" + "--:|--:|" * len(students),
    ]
    for row in table:
        cells = " | ".join(
            f"{cell_text(row.cells.get(name))} | {percent(share(row, name, teacher))}" for name in students
        )
        name = f"**{row.name}**" if row.is_mean else row.name
        lines.append(
            f"| {name} | {row.seq_len or ''} | {row.metric}{'' if row.higher_is_better else ' ↓'} | "
            f"{cell_text(row.cells.get(teacher))} | {cells} |"
        )
    totals = {name: total(table, name, teacher) for name in students}
    if any(value is not None for value in totals.values()):
        lines.append(
            "| **all scores** | | | | "
            + " | ".join(f" | **{percent((v, None)) if v is not None else ''}**" for v in totals.values())
            + " |"
        )
    for row in table:
        lines += [
            f"\nFailed: {name}, {row.name} {row.seq_len or ''}: {cell['error']}"
            for name, cell in row.cells.items()
            if "error" in cell
        ]
    return "\n".join(lines) + "\n"


def plot(table: list[Row], teacher: str, students: list[str], path: Path) -> None:
    """The share of every task, a bar a student."""
    shown = [row for row in table if any(share(row, name, teacher) for name in students)]
    if not shown:
        return
    with picture(path, 1, len(shown) * len(students)) as (axis,):
        draw_bars(axis, shown, students, lambda row, name: share(row, name, teacher))
        axis.axvline(1, color="black", lw=0.8, linestyle=":")
        axis.set_xlabel(f"share of the score of {teacher}")


def from_files(files: list[str]) -> dict[str, dict[str, dict]]:
    """Label -> unit's key -> result, of units that all files hold. Raises ValueError for other
    files, and for results that cannot be compared."""
    found = {}
    for file in files:
        try:
            content = json.loads(Path(file).read_text())
            found[file] = content["checkpoint"], content["tasks"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"CHECKPOINT: {file} is no results.json of a checkpoint; evaluate.py writes it to OUTPUT/PATH__OF__CHECKPOINT/results.json"
            ) from None
    names = labels([checkpoint for checkpoint, _ in found.values()])
    common = [key for key in next(iter(found.values()))[1] if all(key in tasks for _, tasks in found.values())]
    if not common:
        raise ValueError(f"CHECKPOINT: {', '.join(files)} have no task in common")
    for key in common:
        first, *others = (tasks[key]["settings"] for _, tasks in found.values())
        for file, other in zip(files[1:], others):
            if different := [
                name for name in first | other if name != "checkpoint" and first.get(name) != other.get(name)
            ]:
                raise ValueError(
                    f"CHECKPOINT: {key} in {file} was measured with another {different[0]} ({other.get(different[0])!r}) "
                    f"than in {files[0]} ({first.get(different[0])!r})"
                )
    return {names[checkpoint]: {key: tasks[key] for key in common} for checkpoint, tasks in found.values()}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="the teacher first")
    add_options(parser)
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        raise ValueError("CHECKPOINT: one alone; name the teacher, then its students")
    files = [name for name in args.checkpoints if name.endswith(".json")]
    if files and len(files) < len(args.checkpoints):
        raise ValueError(f"CHECKPOINT: {files[0]} is a file of results; name files alone, or checkpoints alone")
    if files:
        results = from_files(files)
    else:
        args.teacher = args.checkpoints[0]
        results = evaluate(args, [*argv, "--teacher", args.teacher])
    table, (teacher, *students) = rows(results), results
    text = markdown(table, teacher, students)
    shares = {
        name: {
            "all": total(table, name, teacher),
            "tasks": [
                {
                    "task": row.name,
                    "seq_len": row.seq_len,
                    "metric": row.metric,
                    "teacher": row.cells.get(teacher),
                    "student": row.cells.get(name),
                    **dict(zip(("share", "share_stderr"), share(row, name, teacher) or (None, None))),
                }
                for row in table
            ],
        }
        for name in students
    }
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        args.output / "compare.json",
        json.dumps({"teacher": teacher, "students": shares}, indent=1) + "\n",
    )
    atomic_write_text(args.output / "compare.md", text)
    plot(table, teacher, students, args.output / "compare.png")
    print(f"\n{text}\nWritten to {args.output}")
    return int(any("error" in cell for row in table for cell in row.cells.values()))


if __name__ == "__main__":
    run_main(partial(with_stop_signals, main))

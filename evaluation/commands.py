"""The two command lines: evaluate.py and eval_compare.py."""

from __future__ import annotations

import argparse
import json
import sys

from runtime.files import atomic_write_text
from runtime.guard import StopSignals

from .compare import comparison, comparison_table, plot_shares, results_of_files
from .options import add_options, read_options
from .tables import markdown, plot, rows
from .tasks import KL

# runner imports torch and lm-evaluation-harness: it is imported in functions, after the options are checked.


def parser_of(description: str | None) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=style)


def evaluate_checkpoints(argv: list[str] | None = None, description: str | None = None) -> int:
    """evaluate.py; returns its exit code, 1 if a task failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(description)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    add_options(parser)
    parser.add_argument("--teacher", help=f"the checkpoint that {KL} is measured against")
    args = parser.parse_args(argv)
    with StopSignals():
        options = read_options(args)
        from .runner import evaluate, is_worker

        results = evaluate(options, argv)
        if is_worker():
            return 0
        found = [result for tasks in results.values() for result in tasks.values()]
        text = markdown(results)
        atomic_write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_write_text(args.output / "results.md", text)
        if len(results) > 1 and any("score" in result for result in found):
            plot(results, args.output / "results.png")
        print(f"\n{text}\nWritten to {args.output}")
        return int(any("error" in result for result in found))


def compare_with_teacher(argv: list[str] | None = None, description: str | None = None) -> int:
    """eval_compare.py; returns its exit code, 1 if a task failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(description)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="the teacher first")
    add_options(parser)
    args = parser.parse_args(argv)
    with StopSignals():
        table, labels = compared_results(args, argv)
        teacher, *students = labels
        text = comparison_table(table, teacher, students)
        args.output.mkdir(parents=True, exist_ok=True)
        content = comparison(table, teacher, students)
        atomic_write_text(args.output / "compare.json", json.dumps(content, indent=1) + "\n")
        atomic_write_text(args.output / "compare.md", text)
        plot_shares(table, teacher, students, args.output / "compare.png")
        print(f"\n{text}\nWritten to {args.output}")
        return int(any("error" in cell for row in table for cell in row.cells.values()))


def compared_results(args: argparse.Namespace, argv: list[str]):
    """(rows, labels with the teacher's first) of files of results, or of checkpoints, which are
    evaluated first."""
    if len(args.checkpoints) < 2:
        raise ValueError("CHECKPOINT: one alone; name the teacher, then its students")
    files = [name for name in args.checkpoints if name.endswith(".json")]
    if files and len(files) < len(args.checkpoints):
        cure = "name files alone, or checkpoints alone"
        raise ValueError(f"CHECKPOINT: {files[0]} is a file of results; {cure}")
    if files:
        results = results_of_files(files)
    else:
        args.teacher = args.checkpoints[0]
        options = read_options(args)
        from .runner import evaluate

        results = evaluate(options, [*argv, "--teacher", args.teacher])
    return rows(results), list(results)

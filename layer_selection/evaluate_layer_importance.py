"""Which layers a task needs: each layer's attention output is zeroed in turn; the drop of accuracy
is its importance.

    python layer_selection/evaluate_layer_importance.py --task associative_recall \
        --model_name Qwen/Qwen2.5-1.5B-Instruct --output_dir importance/qwen2.5_1.5b

For softmax teachers and for our checkpoints (converted-hf). Answers are decoded greedily, up to the
length of the correct one, and scored exactly (task_ablation.py).

Written to --output_dir: results/baseline_<task>.json, results/ablation_<task>.csv,
plots/ablation_<task>.png. Results that are there already are not computed again; those of other
settings are not overwritten.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.command import run_main
from runtime.data import check_special_tokens, load_tokenizer
from runtime.files import atomic_write_text

from layer_selection.ablation_questions import (
    FIXED,
    NOISY,
    SPELLINGS,
    TASKS,
    Question,
    add_options,
    draw_questions,
    question_options,
)
from layer_selection.ranking import Layer, Ranking

SHOWN_QUESTIONS = 3  # written into the results


@dataclass(frozen=True)
class ResultFiles:
    """Where the results of a task are written."""

    baseline: Path
    table: Path
    picture: Path

    @classmethod
    def of(cls, folder: Path, task: str) -> ResultFiles:
        results = folder / "results"
        plots = folder / "plots"
        return cls(
            results / f"baseline_{task}.json",
            results / f"ablation_{task}.csv",
            plots / f"ablation_{task}.png",
        )


def plot(ranking: Ranking, path: Path) -> None:
    """Accuracy without each layer's attention, and the unmodified model's as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline = ranking.facts["baseline"]
    layers = in_order(ranking)
    figure, axis = pyplot.subplots(figsize=(max(5, 0.3 * len(layers)), 3.2), layout="constrained")
    axis.bar(
        [layer.layer for layer in layers],
        [baseline - layer.importance for layer in layers],
        yerr=[
            [layer.high - layer.importance for layer in layers],
            [layer.importance - layer.low for layer in layers],
        ],
        capsize=3,
        color="tab:blue",
        ecolor="grey",
    )
    axis.axhline(baseline, color="black", linestyle="--")
    axis.set(
        xlabel="layer without attention",
        ylabel=f"accuracy (dashed: all layers, {baseline:.1%})",
        ylim=(0, 1.05),
        title=ranking.method.replace("_", " "),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def in_order(ranking: Ranking) -> list[Layer]:
    return sorted(ranking.layers, key=lambda layer: layer.layer)


def csv_table(ranking: Ranking) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "accuracy", "drop", "drop_low", "drop_high"])
    for layer in in_order(ranking):
        accuracy = ranking.facts["baseline"] - layer.importance
        figures = (accuracy, layer.importance, layer.low, layer.high)
        writer.writerow([layer.layer, *(f"{figure:.6f}" for figure in figures)])
    return text.getvalue()


def markdown_table(ranking: Ranking) -> str:
    lines = ["| without | accuracy | drop |", "|--:|--:|--:|"]
    for layer in ranking.layers:
        accuracy = ranking.facts["baseline"] - layer.importance
        drop = f"{layer.importance:.1%} [{layer.low:.1%}, {layer.high:.1%}]"
        lines.append(f"| {layer.layer} | {accuracy:.1%} | {drop} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError, naming the flag, for values that make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", required=True, choices=[*TASKS, *SPELLINGS])
    add(
        "--model_name",
        required=True,
        help="hub name or folder of a teacher, or one of our checkpoints",
    )
    add("--output_dir", type=Path, required=True)
    add("--batch_size", type=int, default=4, help="questions per batch, each with one row per layer")
    add("--seed", type=int, default=0, help="of the questions")
    add_options(parser)
    for name, (value, why) in FIXED.items():
        add(f"--{name}", type=int, default=value, help=f"always {value}: {why}")
    args = parser.parse_args(argv)
    for name, (value, why) in FIXED.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name}: {getattr(args, name)} must be {value}: {why}; leave it out")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size: {args.batch_size} must be at least 1")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir: {args.output_dir} is a file; name a folder")
    return args


def result_settings(args: argparse.Namespace) -> dict:
    """What the results depend on."""
    irrelevant = {"output_dir", "batch_size", *FIXED}
    settings = {name: value for name, value in vars(args).items() if name not in irrelevant}
    if args.task in NOISY:  # earlier results count --noise_ratio as a share of all sentences
        settings["noise_ratio_of"] = "the other sentences"
    return settings


def check_same_settings(settings: dict, baseline: Path, folder: Path) -> None:
    """Raises ValueError if the results in `baseline` are of other settings."""
    theirs = json.loads(baseline.read_text())["settings"]
    for name in settings:
        if settings[name] != theirs.get(name):
            raise ValueError(
                f"--output_dir: {folder} has this task with {name} {theirs.get(name)!r}, not "
                f"{settings[name]!r}; name another folder"
            )


def write_results(
    files: ResultFiles,
    ranking: Ranking,
    settings: dict,
    questions: list[Question],
    answers: list[str],
    scores: list[float],
    seconds: float,
) -> None:
    files.baseline.parent.mkdir(parents=True, exist_ok=True)
    files.picture.parent.mkdir(exist_ok=True)
    atomic_write_text(files.table, csv_table(ranking))
    plot(ranking, files.picture)
    shown = [
        {
            "prompt": question.prompt,
            "answers": question.answers,
            "continuation": text,
            "score": score,
        }
        for question, text, score in zip(questions, answers, scores)
    ]
    content = {
        "settings": settings,
        "accuracy": ranking.facts["baseline"],
        "scores": scores,
        "seconds": round(seconds, 1),
        "questions": shown[:SHOWN_QUESTIONS],
    }
    # Last: where it exists, the other files do too.
    atomic_write_text(files.baseline, json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = result_settings(args)
    files = ResultFiles.of(args.output_dir, args.task)
    if files.baseline.is_file():
        check_same_settings(settings, files.baseline, args.output_dir)
        print(f"{files.baseline}: is there already, made with the same settings")
        return
    questions = draw_questions(args.task, question_options(args), args.seed)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from convert import load_teacher, load_teacher_config
    from layer_selection.task_ablation import ablate, rank_drops

    disable_progress_bar()  # transformers' own, a line for every file read
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model_name, "--model_name")
    check_special_tokens(tokenizer, load_teacher_config(args.model_name).vocab_size, "--model_name")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_teacher(args.model_name, dtype).to(device)
    start = time.monotonic()
    scores, without, answers = ablate(model, tokenizer, questions, args.batch_size)
    ranking = rank_drops(args.task, scores, without)
    seconds = time.monotonic() - start

    write_results(files, ranking, settings, questions, answers, scores, seconds)
    accuracy = ranking.facts["baseline"]
    print(f"{args.task}: {accuracy:.1%} with all layers, {len(questions)} questions, {seconds:.0f} s")
    if not accuracy:
        print("The model answers none of them: the figures say nothing about its layers; make the task easier.")
    print(markdown_table(ranking))


if __name__ == "__main__":
    run_main(main)

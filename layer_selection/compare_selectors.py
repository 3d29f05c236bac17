"""Compares selectors at one budget: the hybrids with the layers that they choose, trained alike and
with several seeds.

    python layer_selection/compare_selectors.py --cfg STAGE2.yaml --ratio 0.25 --seeds 3 \
        --methods gates ga_s2 smart scan uniform --output_dir outputs/selectors

METHOD is one of select_layers.py, also with its objective (gates:mixture), and rounds:remove; --sets
adds layers of your own (middle=11,12,13,14). Runs each method in <output_dir>/<method>/, then stage
2 of STAGE2.yaml for each set of layers (once for methods that chose the same) and for each seed,
which orders the data.
Prints and writes selectors.md, selectors.json and selectors.png: held-out KL to the teacher,
perplexity, and the share of associative-recall questions (recall_tasks.py) that are answered, as
means and half ranges over the seeds. Methods whose range touches the best one's are marked as ties
with it. Rerun it, with more methods or seeds, and it does only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, ConfigError, dump_config
from runtime.files import atomic_write_text, locked_in_turn
from runtime.run_folder import difference, recorded_config, with_recorded_document_mask

from layer_selection.ablation_questions import QuestionOptions
from layer_selection.options import OBJECTIVES, TASK_METHODS, RecallOptions, RoundOptions, TrainingOptions
from layer_selection.ranking import budget
from layer_selection.selection import METHODS, OBJECTIVE_METHODS, SelectionOptions, select
from layer_selection.stage2_runs import STAGE_2, check_start, deepspeed_launcher, load_stage_2
from layer_selection.stopping_rule import CORRELATION, ROUNDS, WINDOW, StoppingRule
from recall_tasks import associative_recall

# Modules that import torch are imported in functions, after arguments and config are checked.

FIGURES = {"kl": "held-out KL", "perplexity": "perplexity", "recall": "recall"}
SETTINGS = (
    "ratio",
    "rounds",
    "sequences",
    "questions",
    "num_pairs",
    "num_words",
)  # that the figures depend on


def claim(cfg: Config, args: argparse.Namespace) -> None:
    """Records in --output_dir what its figures are of. Raises ConfigError if they are of another
    config, budget or measurement."""
    config = args.output_dir / STAGE_2
    settings = args.output_dir / "settings.json"
    ours = {name: getattr(args, name) for name in SETTINGS}
    if settings.is_file() and any(args.output_dir.glob("*/ranking.json")):
        theirs = json.loads(settings.read_text())
        changed = [name for name in ours if ours[name] != theirs[name]]
        if changed:
            name = changed[0]
            other = f"--{name} is {theirs[name]} there, {ours[name]} here"
        else:
            other = difference(recorded_config(config), cfg)
        if other:
            raise ConfigError(
                f"--output_dir: {args.output_dir} compares selectors with other settings ({other}); name another folder"
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config, dump_config(cfg))
    atomic_write_text(settings, json.dumps(ours) + "\n")


def split_method(text: str) -> tuple[str, str, str]:
    """(Method, objective, direction) of METHOD, METHOD:OBJECTIVE or METHOD:remove. Raises ConfigError
    for what there is not."""
    method, *rest = text.split(":")
    objective = "kl"
    direction = "add"
    for word in rest:
        if word in OBJECTIVES and method in OBJECTIVE_METHODS:
            objective = word
        elif word == "remove" and method == "rounds":
            direction = word
        else:
            raise ConfigError(f"--methods: {text}: {method} has no {word!r}; see select_layers.py")
    if method not in METHODS:
        raise ConfigError(f"--methods: {method} is unknown; choose of {', '.join(METHODS)}")
    return method, objective, direction


def selection_options(
    text: str, top_k: int, folder: Path, sequences: int, batch_size: int, recall: RecallOptions, rounds: int = ROUNDS
) -> SelectionOptions:
    """The options of what `split_method` reads, with select_layers.py's defaults. recall: of an
    objective, and of a task's questions."""
    method, objective, direction = split_method(text)
    questions = None
    if method in TASK_METHODS:
        questions = QuestionOptions(num_pairs=recall.num_pairs, vocab_size=recall.num_words)
    rule = StoppingRule(rounds, WINDOW, CORRELATION, top_k=top_k)
    return SelectionOptions(
        method=method,
        top_k=top_k,
        training=TrainingOptions(folder, rule, launcher=deepspeed_launcher(os.environ.get("MASTER_PORT"))),
        sequences=sequences,
        batch_size=batch_size,
        questions=questions,
        objective=objective,
        recall=recall,
        rounds=RoundOptions(direction),
    )


def chosen_layers(cfg: Config, method: str, top_k: int, args: argparse.Namespace) -> list[int]:
    """The layers that a method keeps; selects them unless <output_dir>/<method>/ has its
    ranking."""
    folder = args.output_dir / method.replace(":", "-")
    if not (folder / "ranking.json").is_file():
        recall = RecallOptions(args.num_pairs, args.num_words)
        options = selection_options(method, top_k, folder, args.sequences, args.batch_size, recall, args.rounds)
        print(select(cfg, dataclasses.replace(options, ratio=args.ratio)).summary())
    return json.loads((folder / "ranking.json").read_text())["keep"]


def own_sets(words: list[str], num_layers: int) -> dict[str, list[int]]:
    """Name -> layers of NAME=LAYERS. Raises ConfigError for other words, for a name that is another
    set's or a method's, and for layers that the teacher does not have."""
    sets = {}
    for word in words:
        name, _, layers = word.partition("=")
        try:
            kept = sorted({int(layer) for layer in layers.split(",")})
        except ValueError:
            raise ConfigError(f"--sets: {word} must look like middle=3,4") from None
        of_a_method = name.partition(":")[0] in METHODS
        if not name or of_a_method or name in sets or not set(kept) <= set(range(num_layers)):
            raise ConfigError(f"--sets: {word} must have a name of its own and layers in 0..{num_layers - 1}")
        sets[name] = kept
    return sets


def train_sets(cfg: Config, sets: list[list[int]], seed: int, args: argparse.Namespace) -> list[dict]:
    """Figures of the hybrid of every set after its stage 2, in order; those that the seed's file
    has are read from it."""
    file = args.output_dir / f"seed_{seed}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if missing := [kept for kept in sets if str(kept) not in known]:
        from layer_selection.bench import Bench
        from layer_selection.measured_training import MeasuredTraining

        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
        bench = Bench(cfg, args.sequences, args.batch_size)
        check_start(cfg)
        folder = args.output_dir / f"training_{seed}_{len(known)}"
        rng = random.Random(1)
        size = {"num_pairs": args.num_pairs, "num_words": args.num_words}
        documents = [associative_recall(rng, **size) for _ in range(args.questions)]
        MeasuredTraining(bench, args.rounds, missing, folder, file, known, documents).run()
    return [known[str(kept)] for kept in sets]


def spread(values: list[float], digits: int) -> str:
    """mean ± half the range."""
    mean = sum(values) / len(values)
    half_range = (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half_range:.{digits}f}"


def best_first(results: dict[str, dict]) -> list[str]:
    """The methods, the lowest KL first."""
    return sorted(results, key=lambda method: sum(results[method]["kl"]))


def table(results: dict[str, dict]) -> str:
    """Markdown, the lowest KL first; results: method -> keep, and a list over seeds for each of
    FIGURES."""
    order = best_first(results)
    highest = max(results[order[0]]["kl"])
    lines = ["| selector | layers | held-out KL | perplexity | recall |", "|:--|:--|--:|--:|--:|"]
    for method in order:
        row = results[method]
        tie = " *" if min(row["kl"]) <= highest else ""
        layers = " ".join(map(str, row["keep"]))
        recall = spread([100 * share for share in row["recall"]], 1)
        kl = spread(row["kl"], 4)
        perplexity = spread(row["perplexity"], 3)
        lines.append(f"| `{method}`{tie} | {layers} | {kl} | {perplexity} | {recall} % |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    """One panel per figure, one dot per seed, the selectors in the table's order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = best_first(results)[::-1]
    figure, axes = pyplot.subplots(
        1,
        len(FIGURES),
        figsize=(3.2 * len(FIGURES), 1 + 0.32 * len(order)),
        sharey=True,
        layout="constrained",
    )
    for axis, (name, title) in zip(axes, FIGURES.items()):
        for y, method in enumerate(order):
            values = results[method][name]
            axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.5)
            axis.plot(sum(values) / len(values), y, "|", color="C0", markersize=14, markeredgewidth=2)
        axis.set(xlabel=title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(order)), order)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cfg", required=True, help="YAML of stage 2")
    add("--ratio", type=float, required=True, help="share of the layers to keep, for all methods")
    add(
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="see select_layers.py",
    )
    add("--sets", nargs="+", default=[], metavar="NAME=LAYERS", help="sets of layers to compare with")
    add("--seeds", type=int, default=3)
    add(
        "--only_seed",
        type=int,
        metavar="N",
        help="train the hybrids of seed N alone, for one process per GPU: the first of them selects, the others wait "
        "for that; the command without it writes the table",
    )
    add("--output_dir", type=Path, required=True)
    add("--sequences", type=int, default=64, help="held-out sequences to measure on")
    add("--batch_size", type=int, default=8)
    add("--rounds", type=int, default=ROUNDS, help="see select_layers.py")
    add("--questions", type=int, default=64, help="documents of associative recall")
    add("--num_pairs", type=int, default=64)
    add("--num_words", type=int, default=256)
    add(
        "--overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="applied after the file",
    )
    args = parser.parse_args(argv)
    for method in args.methods:
        split_method(method)
    if args.seeds < 1:
        raise ConfigError(f"--seeds: {args.seeds} must be at least 1")
    if args.only_seed is not None and args.only_seed not in range(args.seeds):
        raise ConfigError(f"--only_seed: {args.only_seed} must be one of 0 to {args.seeds - 1}")
    RecallOptions(args.num_pairs, args.num_words)  # checks them
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_stage_2(args.cfg, args.overrides)
    cfg = with_recorded_document_mask(cfg, args.output_dir / STAGE_2)
    from transformers.utils.logging import disable_progress_bar

    from convert import load_teacher_config
    from layer_selection.candidate_training import check_joint_training

    disable_progress_bar()  # transformers' own, a line for every file read
    check_joint_training(cfg)
    num_layers = load_teacher_config(cfg.teacher_model.name).num_hidden_layers
    top_k = budget(args.ratio, num_layers)
    sets = own_sets(args.sets, num_layers)
    with locked_in_turn(args.output_dir / ".lock", f"--output_dir: {args.output_dir}"):
        claim(cfg, args)
        sets |= {method: chosen_layers(cfg, method, top_k, args) for method in args.methods}
    unique = [list(kept) for kept in dict.fromkeys(map(tuple, sets.values()))]
    if args.only_seed is not None:
        train_sets(cfg, unique, args.only_seed, args)
        return
    by_seed = []  # of each seed: set of layers -> figures
    for seed in range(args.seeds):
        by_seed.append(dict(zip(map(tuple, unique), train_sets(cfg, unique, seed, args))))
    results = {}
    for method, kept in sets.items():
        results[method] = {"keep": kept}
        for name in FIGURES:
            results[method][name] = [figures[tuple(kept)][name] for figures in by_seed]
    plot(results, args.output_dir / "selectors.png")
    atomic_write_text(args.output_dir / "selectors.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(args.output_dir / "selectors.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    run_main(main)

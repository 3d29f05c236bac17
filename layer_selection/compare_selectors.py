"""Selectors at one budget: the hybrids of their layers, trained alike and with seeds, side by side.

    python layer_selection/compare_selectors.py --cfg STAGE2.yaml --ratio 0.25 --methods ga_s2 smart scan mse uniform random \
        --seeds 3 --output_dir outputs/selectors

Runs select_layers.py for each method in <output_dir>/<method>/, then stage 2 of STAGE2.yaml for each set of layers, once for methods that
chose the same, and for each seed, which orders the data. Prints and writes selectors.md, selectors.json and selectors.png: held-out KL
to the teacher, perplexity, and the share of associative-recall questions (recall_tasks.py) that are answered, as means and half
ranges over the seeds. Methods whose range touches the best one's are marked as ties with it. Run again, with more methods or seeds, it
does only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

from runtime.command import run_main

import matplotlib

matplotlib.use("Agg")
from runtime.config import Config, ConfigError, dump_config, load_config
from runtime.data import load_tokenizer
from runtime.files import atomic_write_text
from runtime.run_folder import difference

from matplotlib import pyplot
from transformers.utils.logging import disable_progress_bar

from layer_selection import select_layers
from layer_selection.full_runs import check_start, load_stage_2
from layer_selection.side_by_side import Rounds, check_optimizer
from recall_tasks import answer_accuracy, associative_recall

FIGURES = {"kl": "held-out KL", "perplexity": "perplexity", "recall": "recall"}


class MeasuredRounds(Rounds):
    """Writes the figures of its hybrids to `file`, with those that are `known`, before their last
    round counts as done."""

    def __init__(self, bench, args, sets: list[list[int]], folder: Path, file: Path, known: dict):
        rules = SimpleNamespace(rounds=args.rounds, window=0, correlation=1.0, halving=False, top_k=1)
        super().__init__(bench, rules, dict(enumerate(sets)), -1, folder)
        self.file, self.known, self.tokenizer = (
            file,
            known,
            load_tokenizer(bench.cfg.teacher_model.name),
        )
        rng = random.Random(1)
        self.documents = [
            associative_recall(rng, num_pairs=args.num_pairs, num_words=args.num_words) for _ in range(args.questions)
        ]

    def train_round(self, mine, first, last, bar):
        kls = super().train_round(mine, first, last, bar)
        if last == self.plan.steps:
            for i in mine:
                self.candidates[i].to(self.bench.device)
                model = self.candidates[i].hybrid.eval()
                losses = self.bench.losses(model)
                self.known[str(self.kept[i])] = {
                    "kl": sum(kls[i]) / len(kls[i]),
                    "perplexity": math.exp(sum(losses) / len(losses)),
                    "recall": answer_accuracy(model, self.tokenizer, self.documents),
                }
            atomic_write_text(self.file, json.dumps(self.known, indent=1) + "\n")
        return kls


def claim(cfg: Config, args: argparse.Namespace) -> None:
    """Records in --output_dir what its figures are of. Raises ConfigError if they are of another
    config, budget or measurement."""
    config, settings = args.output_dir / "stage2.yaml", args.output_dir / "settings.json"
    mine = {
        name: getattr(args, name) for name in ("ratio", "rounds", "sequences", "questions", "num_pairs", "num_words")
    }
    if settings.is_file() and any(args.output_dir.glob("*/ranking.json")):
        theirs = json.loads(settings.read_text())
        other = next(
            (f"--{name} is {theirs[name]} there, {mine[name]} here" for name in mine if mine[name] != theirs[name]),
            None,
        )
        if other := other or difference(load_config(config), cfg):
            raise ConfigError(
                f"--output_dir: {args.output_dir} compares selectors otherwise ({other}); name another folder"
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config, dump_config(cfg))
    atomic_write_text(settings, json.dumps(mine) + "\n")


def train_sets(cfg, sets: list[list[int]], seed: int, args: argparse.Namespace) -> list[dict]:
    """Figures of the hybrid of every set after its stage 2, in order; from the seed's file where
    that has them."""
    file = args.output_dir / f"seed_{seed}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if missing := [kept for kept in sets if str(kept) not in known]:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
        bench = select_layers.Bench(cfg, args.sequences, args.batch_size)
        check_start(cfg)
        folder = args.output_dir / f"training_{seed}_{len(known)}"
        MeasuredRounds(bench, args, missing, folder, file, known).run()
    return [known[str(kept)] for kept in sets]


def spread(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(results: dict[str, dict]) -> str:
    """Markdown, the lowest KL first; results: method -> keep, and a list over seeds for each of
    FIGURES."""
    order = sorted(results, key=lambda method: sum(results[method]["kl"]))
    highest = max(results[order[0]]["kl"])
    lines = ["| selector | layers | held-out KL | perplexity | recall |", "|:--|:--|--:|--:|--:|"]
    for method in order:
        row = results[method]
        tie = " *" if min(row["kl"]) <= highest else ""
        recall = spread([100 * share for share in row["recall"]], 1)
        lines.append(
            f"| `{method}`{tie} | {' '.join(map(str, row['keep']))} | {spread(row['kl'], 4)} | "
            f"{spread(row['perplexity'], 3)} | {recall} % |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    """A panel a figure, a dot a seed, the selectors in the table's order."""
    order = sorted(results, key=lambda method: sum(results[method]["kl"]))[::-1]
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="YAML of stage 2")
    parser.add_argument("--ratio", type=float, required=True, help="share of the layers to keep, for all methods")
    parser.add_argument("--methods", nargs="+", choices=select_layers.METHODS, required=True, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences to measure on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20, help="see select_layers.py")
    parser.add_argument("--questions", type=int, default=64, help="documents of associative recall")
    parser.add_argument("--num_pairs", type=int, default=64)
    parser.add_argument("--num_words", type=int, default=256)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key.path=value", help="come after the file")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise ConfigError(f"--seeds: {args.seeds} must be at least 1")
    disable_progress_bar()
    cfg, sets = load_stage_2(args.cfg, args.overrides), {}
    check_optimizer(cfg)
    claim(cfg, args)
    for method in args.methods:
        out = args.output_dir / method
        if not (out / "ranking.json").is_file():
            select_layers.main(
                [
                    "--cfg",
                    args.cfg,
                    "--method",
                    method,
                    "--ratio",
                    str(args.ratio),
                    "--output_dir",
                    str(out),
                    "--rounds",
                    str(args.rounds),
                    "--sequences",
                    str(args.sequences),
                    "--batch_size",
                    str(args.batch_size),
                    "--num_pairs",
                    str(args.num_pairs),
                    "--vocab_size",
                    str(args.num_words),
                    *args.overrides,
                ]
            )
        sets[method] = json.loads((out / "ranking.json").read_text())["keep"]
    unique = [list(kept) for kept in dict.fromkeys(map(tuple, sets.values()))]
    by_seed = [dict(zip(map(tuple, unique), train_sets(cfg, unique, seed, args))) for seed in range(args.seeds)]
    results = {
        method: {"keep": kept} | {name: [figures[tuple(kept)][name] for figures in by_seed] for name in FIGURES}
        for method, kept in sets.items()
    }
    plot(results, args.output_dir / "selectors.png")
    atomic_write_text(args.output_dir / "selectors.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(args.output_dir / "selectors.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    run_main(main)

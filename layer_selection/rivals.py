"""What GA-S2 is compared with: each takes the bench and the options of select_layers.py and returns a ranking.

Those that stand on another method take it as their first argument. L is the number of layers, K how many are kept.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runtime.data import load_tokenizer

from layer_selection.evaluate_layer_importance import ablate, drops
from layer_selection.questions import TASKS, draw_questions
from layer_selection.ranking import Ranking, rank_samples
from layer_selection.side_by_side import rank_hybrids, trained_hybrids

SHORT = {"associative_recall": "ar", "associative_recall_multihop": "ar_multihop"}
TASK_METHODS = {SHORT.get(task, task): task for task in TASKS}
Method = Callable[..., Ranking | None]


def task_ablation(task: str, bench, args: argparse.Namespace) -> Ranking:
    """accuracy(teacher) - accuracy(teacher with the layer's attention output zeroed). Raises
    ValueError if the teacher answers nothing: there is nothing to lose."""
    questions = draw_questions(task, args)
    baseline, without, _ = ablate(
        bench.teacher, load_tokenizer(bench.cfg.teacher_model.name), questions, args.batch_size
    )
    if not any(baseline):
        raise ValueError(
            f"--method: the teacher answers none of {len(questions)} questions of {task}, so they cannot rank its "
            "layers; make the task easier (--num_pairs ...) or take another method"
        )
    return drops(args.method, baseline, without, task=task, seed=args.seed)


def ga_s1(mse: Method, bench, args: argparse.Namespace) -> Ranking:
    """Greedy addition at stage 1 (arXiv 2512.20569): -(sum of the alignment errors e_j of the
    layers j that stay linear).

    Stage 1 feeds every layer the teacher's hidden states, so that restoring one leaves the others'
    errors as they are: the order is that of `mse`.
    """
    errors = mse(bench, args).samples
    totals = [sum(row) for row in zip(*errors.values())]
    others = {layer: [error - total for error, total in zip(values, totals)] for layer, values in errors.items()}
    return rank_samples("ga_s1", "-alignment error of the others", others)


def gr_s2(bench, args: argparse.Namespace) -> Ranking | None:
    """Greedy removal (arXiv 2512.20569): +KL(teacher || student) after stage 2 in which only this
    layer is linear."""
    trained = trained_hybrids(
        bench,
        args,
        {layer: [other for other in bench.layers if other != layer] for layer in bench.layers},
        sign=1,
    )
    return trained and rank_hybrids("gr_s2", "KL", *trained)


def avg_s2(ga_s2: Method, bench, args: argparse.Namespace) -> Ranking | None:
    """(I_GA-S2 + I_GR-S2) / 2 on every held-out sequence (arXiv 2512.20569), by what lies in their
    default folders."""
    if args.halving:
        raise ValueError("--halving: avg_s2 needs every layer at the same tokens; leave it out")
    rankings = []
    for name, method in (("ga_s2", ga_s2), ("gr_s2", gr_s2)):
        own = copy.copy(args)
        own.method, own.output_dir = name, Path(f"{bench.cfg.train.output_dir}_{name}")
        rankings.append(method(bench, own))
    if None in rankings:
        return None
    added, removed = (ranking.samples for ranking in rankings)
    mean = {layer: [(a + r) / 2 for a, r in zip(added[layer], removed[layer], strict=True)] for layer in added}
    return rank_samples("avg_s2", "mean of -KL added and KL removed", mean)


def place(sensitivity: list[float], count: int) -> list[int]:
    """SMART's layers (arXiv 2505.17272): the most sensitive of the first and of the last floor(L /
    K), and between them the others, with steps that differ by one at most, where the sum of
    sensitivities is largest."""
    layers = len(sensitivity)
    end = layers // count
    first = max(range(end), key=sensitivity.__getitem__)
    last = max(range(layers - end, layers), key=sensitivity.__getitem__)
    if count == 1:
        return [first]
    step, rest = divmod(last - first, count - 1)
    best = {first: (sensitivity[first], [first])}  # where the newest layer lies -> (largest sum, the layers)
    for _ in range(count - 1):
        longer = {}
        for at, (total, chosen) in best.items():
            for following in {at + step, at + step + (rest > 0)}:
                if following < layers and (
                    following not in longer or longer[following][0] < total + sensitivity[following]
                ):
                    longer[following] = total + sensitivity[following], [*chosen, following]
        best = longer
    return best[last][1]


def smart(scan: Method, bench, args: argparse.Namespace) -> Ranking:
    """Sensitivity, KL(all-linear) - KL(with this layer restored), and placement (arXiv 2505.17272):
    see `place`.

    The layers that it places come first; what divides them from the others is no tie.
    """
    all_linear = bench.kls(bench.student)
    samples = {
        layer: [kl + value for kl, value in zip(all_linear, values)]
        for layer, values in scan(bench, args).samples.items()
    }
    ranking = rank_samples("smart", "KL that it repairs", samples)
    mean = {layer.layer: layer.importance for layer in ranking.layers}
    placed = place([mean[layer] for layer in sorted(mean)], args.top_k)
    layers = sorted(
        (replace(layer, ties=()) for layer in ranking.layers),
        key=lambda layer: layer.layer not in placed,
    )
    return replace(ranking, layers=layers)

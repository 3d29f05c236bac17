"""The selectors that GA-S2 is compared with. Each takes a `Bench` and returns a `Ranking`.

L is the number of layers, K how many are kept.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

from runtime.data import load_tokenizer, model_inputs, split_batch

import torch

from layer_selection.ablation_questions import QuestionOptions, draw_questions
from layer_selection.bench import Bench, measure_layer_swaps
from layer_selection.candidate_training import (
    ga_s2,
    negated,
    rank_hybrids,
    trained_hybrids,
)
from layer_selection.options import TASK_METHODS, TrainingOptions
from layer_selection.ranking import Ranking, evenly_spaced, rank_samples, rank_scores
from layer_selection.task_ablation import ablate, rank_drops
from wrapper import AttentionAlignmentModel


# ------------------------------------------------------------------------ without measurement
def uniform(bench: Bench, top_k: int) -> Ranking:
    """Evenly spaced layers, one in the middle of each of K equal parts."""
    kept = evenly_spaced(top_k, len(bench.layers))
    return rank_scores("uniform", "kept", {layer: float(layer in kept) for layer in bench.layers})


def random_order(bench: Bench, seed: int) -> Ranking:
    """A random number for each layer."""
    generator = random.Random(seed)
    scores = {layer: generator.random() for layer in bench.layers}
    return rank_scores("random", "random number", scores, seed=seed)


# ------------------------------------------------------------------------ without training
def scan(bench: Bench) -> Ranking:
    """-KL(teacher || the all-linear student with this layer restored), as GA-S2 but without training."""
    return rank_scan(measure_layer_swaps(bench.losses, bench.student, bench.teacher), bench.unit)


def rank_scan(losses: dict[int, list[float]], unit: str = "KL") -> Ranking:
    """losses: layer -> the objective, called `unit`, with this layer restored, on each sequence."""
    return rank_samples("scan", f"-{unit}", negated(losses))


def perplexity(bench: Bench) -> Ranking:
    """Loss of the teacher with only this layer linear (compared in arXiv 2512.20569): high where it
    cannot be replaced."""
    losses = measure_layer_swaps(bench.cross_entropies, bench.teacher, bench.student)
    return rank_samples("ppl", "loss", losses)


def alignment_error(bench: Bench) -> Ranking:
    """Mean squared alignment error of stage 1's layer (compared in arXiv 2512.20569)."""
    model = AttentionAlignmentModel(bench.teacher, bench.student)
    errors = []  # of each sequence, that of every layer
    with torch.no_grad():
        for batch in bench.batches:
            for sequence in split_batch(batch, 1):
                inputs = {name: tensor.to(bench.device) for name, tensor in sequence.items()}
                errors.append(model(**model_inputs(inputs))["layer_losses"].tolist())
    by_layer = {layer: [of_sequence[layer] for of_sequence in errors] for layer in bench.layers}
    return rank_samples("mse", "alignment error", by_layer)


def ga_s1(bench: Bench) -> Ranking:
    """Greedy addition at stage 1 (arXiv 2512.20569): -(sum of the alignment errors of the layers
    that stay linear).

    Stage 1 feeds every layer the teacher's hidden states, so that restoring one does not change the
    others' errors: the order is that of `alignment_error`.
    """
    errors = alignment_error(bench).samples
    totals = [sum(of_sequence) for of_sequence in zip(*errors.values())]
    others = {}
    for layer, values in errors.items():
        others[layer] = [error - total for error, total in zip(values, totals)]
    return rank_samples("ga_s1", "-alignment error of the others", others)


def task_ablation(bench: Bench, method: str, options: QuestionOptions, batch_size: int, seed: int) -> Ranking:
    """Accuracy of the teacher on a synthetic task - its accuracy with this layer's attention output
    zeroed.

    method: names the task. Raises ValueError if the teacher answers nothing: there is no accuracy to lose.
    """
    task = TASK_METHODS[method]
    questions = draw_questions(task, options, seed)
    tokenizer = load_tokenizer(bench.cfg.teacher_model.name)
    baseline, without, _ = ablate(bench.teacher, tokenizer, questions, batch_size)
    if not any(baseline):
        raise ValueError(
            f"--method: the teacher answers none of {len(questions)} questions of {task}, so they "
            "cannot rank its layers; make the task easier (--num_pairs ...) or take another method"
        )
    return rank_drops(method, baseline, without, task=task, seed=seed)


# ------------------------------------------------------------------------ SMART
def smart(bench: Bench, top_k: int) -> Ranking:
    """Sensitivity, KL(all-linear) - KL(with this layer restored), and placement: the most sensitive
    layer among the first and among the last L / K, the others nearly evenly between, at the largest
    sum (arXiv 2505.17272).

    The layers that `place` places come first; those and the others are not compared, so that there are
    no ties.
    """
    all_linear = bench.kls(bench.student)
    samples = {}
    for layer, importance in scan(bench).samples.items():
        samples[layer] = [kl + value for kl, value in zip(all_linear, importance)]
    ranking = rank_samples("smart", "KL that it repairs", samples)
    mean = {layer.layer: layer.importance for layer in ranking.layers}
    placed = place([mean[layer] for layer in sorted(mean)], top_k)
    untied = [dataclasses.replace(layer, ties=()) for layer in ranking.layers]
    untied.sort(key=lambda layer: layer.layer not in placed)
    return dataclasses.replace(ranking, layers=untied)


def place(sensitivity: list[float], count: int) -> list[int]:
    """SMART's layers (arXiv 2505.17272): the most sensitive one of the first and of the last
    floor(L / K), and between them the others, at distances that differ by one at most, where the
    sum of sensitivities is largest."""
    layers = len(sensitivity)
    end = layers // count
    first = most_sensitive(range(end), sensitivity)
    last = most_sensitive(range(layers - end, layers), sensitivity)
    if count == 1:
        return [first]
    step, rest = divmod(last - first, count - 1)
    # The last layer so far -> (the largest sum, its layers).
    best = {first: (sensitivity[first], [first])}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for at, (total, chosen) in best.items():
            for following in {at + step, at + step + (rest > 0)}:
                if following >= layers:
                    continue
                extended = total + sensitivity[following]
                if following not in longer or longer[following][0] < extended:
                    longer[following] = extended, [*chosen, following]
        best = longer
    return best[last][1]


def most_sensitive(layers: Iterable[int], sensitivity: list[float]) -> int:
    return max(layers, key=sensitivity.__getitem__)


# ------------------------------------------------------------------------ with training
def gr_s2(bench: Bench, options: TrainingOptions) -> Ranking | None:
    """Greedy removal (arXiv 2512.20569): +KL(teacher || student) after stage 2 in which only this
    layer is linear."""
    kept = {layer: [other for other in bench.layers if other != layer] for layer in bench.layers}
    trained = trained_hybrids(bench, options, kept, sign=1)
    if trained is None:
        return None
    kls, facts = trained
    return rank_hybrids("gr_s2", bench.unit, kls, facts)


def avg_s2(bench: Bench, options: TrainingOptions) -> Ranking | None:
    """(I_GA-S2 + I_GR-S2) / 2 on every held-out sequence (arXiv 2512.20569); both train in their
    default folders.

    Raises ValueError for successive halving, after which the layers have seen different numbers of
    tokens.
    """
    if options.rule.halving:
        raise ValueError("--halving: avg_s2 needs every layer at the same tokens; leave it out")
    rankings = []
    for name, method in (("ga_s2", ga_s2), ("gr_s2", gr_s2)):
        folder = Path(f"{bench.cfg.train.output_dir}_{name}")
        rankings.append(method(bench, dataclasses.replace(options, output_dir=folder)))
    if None in rankings:
        return None
    added, removed = (ranking.samples for ranking in rankings)
    mean = {}
    for layer in added:
        mean[layer] = [(a + r) / 2 for a, r in zip(added[layer], removed[layer], strict=True)]
    return rank_samples("avg_s2", "mean of -KL added and KL removed", mean)

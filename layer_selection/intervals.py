"""Kept layers at a fixed interval, for engines that derive the layer kinds from one number."""

from __future__ import annotations

import dataclasses

from layer_selection.bench import Bench
from layer_selection.candidate_training import negated, rank_hybrids, trained_hybrids
from layer_selection.layer_sets import MeasuredSets
from layer_selection.options import TrainingOptions
from layer_selection.ranking import Ranking, rank_samples


def phases(interval: int, num_layers: int) -> dict[int, list[int]]:
    """Phase p -> the layers p, p + interval, p + 2 interval ..."""
    return {phase: list(range(phase, num_layers, interval)) for phase in range(min(interval, num_layers))}


def interval_of(kept: list[int], num_layers: int) -> int | None:
    """The n for which `kept` are the layers i with (i + 1) % n == 0, or None.

    Runtimes that read `full_attention_interval` (llama.cpp's and MLX's Qwen3.5) run such sets only:
    the last layer of every n.
    """
    for n in range(1, num_layers + 1):
        if sorted(kept) == [i for i in range(num_layers) if (i + 1) % n == 0]:
            return n
    return None


def best_phase(bench: Bench, method: str, interval: int, options: TrainingOptions) -> tuple[Ranking, int]:
    """(A ranking in which the layers of the best phase come first, then those of the next best one;
    how many layers the best phase has). Importance is that of a layer's phase: the objective with
    all its layers kept, without training (scan) or after stage 2 (ga_s2), with a minus sign."""
    sets = phases(interval, len(bench.layers))
    name = f"{method}_interval_{interval}"
    unit = f"-{bench.unit}"
    if method == "scan":
        softmax, linear = ([block.attn for block in m.model.layers] for m in (bench.teacher, bench.student))
        measured = MeasuredSets(bench.student, softmax, linear, bench.losses)
        losses = {phase: measured.losses(kept) for phase, kept in sets.items()}
        by_phase = rank_samples(name, unit, negated(losses))
    else:
        losses, facts = trained_hybrids(bench, options, sets, sign=-1)
        by_phase = rank_hybrids(name, unit, negated(losses), facts)
    layers = []
    for phase in by_phase.layers:
        ties = tuple(sorted(layer for tied in phase.ties for layer in sets[tied]))
        layers += [dataclasses.replace(phase, layer=layer, ties=ties) for layer in sets[phase.layer]]
    best = by_phase.layers[0].layer
    facts = by_phase.facts | {"interval": interval, "phase": best}
    return dataclasses.replace(by_phase, layers=layers, facts=facts, samples={}), len(sets[best])

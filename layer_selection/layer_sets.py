"""Sets of kept layers, measured as a whole: exchange of single layers, and a ranking around the set
that was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from distill_model import StudentForCausalLM
from layer_selection.ranking import Ranking, rank_samples, ties_of

WIDTH = 4  # layers on either side whose exchanges are tried
Measure = Callable[[StudentForCausalLM], list[float]]


class MeasuredSets:
    """The objective of a model on held-out sequences with any layers kept; each set is measured once.

    model: its attentions may be replaced, and are after every measurement as before. softmax,
    linear: the two attentions of each layer. measure: the objective on each sequence.
    """

    def __init__(
        self,
        model: StudentForCausalLM,
        softmax: list[nn.Module],
        linear: list[nn.Module],
        measure: Measure,
    ):
        self.blocks = model.model.layers
        self.model = model
        self.softmax = softmax
        self.linear = linear
        self.measure = measure
        self.known: dict[frozenset[int], list[float]] = {}

    def losses(self, kept: Iterable[int]) -> list[float]:
        """Of each sequence."""
        kept = frozenset(kept)
        if kept not in self.known:
            before = [block.attn for block in self.blocks]
            training = self.model.training
            try:
                for i, block in enumerate(self.blocks):
                    block.attn = self.softmax[i] if i in kept else self.linear[i]
                self.known[kept] = self.measure(self.model.eval())
            finally:
                for block, attn in zip(self.blocks, before):
                    block.attn = attn
                self.model.train(training)
        return self.known[kept]

    def mean(self, kept: Iterable[int]) -> float:
        losses = self.losses(kept)
        return sum(losses) / len(losses)

    def without(self, kept: frozenset[int]) -> dict[int, float]:
        """Kept layer -> the mean without it, lowest first: the layers that are needed least."""
        means = {layer: self.mean(kept - {layer}) for layer in sorted(kept)}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def with_one_more(self, kept: frozenset[int]) -> dict[int, float]:
        """Every other layer -> the mean with it too, lowest first: the layers that help most."""
        others = [layer for layer in range(len(self.blocks)) if layer not in kept]
        means = {layer: self.mean(kept | {layer}) for layer in others}
        return dict(sorted(means.items(), key=lambda item: item[1]))


def neighbours(sets: MeasuredSets, kept: frozenset[int], width: int = WIDTH) -> list[frozenset[int]]:
    """The sets in which one of the `width` layers that are needed least is exchanged for one of the
    `width` that help most, the most promising first."""
    drop = list(sets.without(kept))[:width]
    take = list(sets.with_one_more(kept))[:width]
    exchanges = [(kept - {out}) | {into} for out in drop for into in take]
    return sorted(exchanges, key=sets.mean)


def exchange(sets: MeasuredSets, kept: Iterable[int]) -> frozenset[int]:
    """Exchanges single layers while the objective falls, always by the best of `neighbours`."""
    kept = frozenset(kept)
    while found := neighbours(sets, kept):
        if sets.mean(found[0]) >= sets.mean(kept):
            break
        kept = found[0]
    return kept


def rank_around(method: str, unit: str, sets: MeasuredSets, kept: Iterable[int]) -> Ranking:
    """A ranking in which `kept` come first.

    Importance on a sequence: of a kept layer, what the objective rises if the other layer that
    helps most takes its place; of another one, minus what it rises if it takes the place of the
    kept layer that is needed least. Where all are kept: what it rises without the layer. A kept
    layer and another one are tied if their exchange was measured, and its difference has a 95 %
    interval with 0.
    """
    kept = frozenset(kept)
    own = sets.losses(kept)
    weakest = next(iter(sets.without(kept)))
    strongest = set(list(sets.with_one_more(kept))[:1])
    samples = {}
    for layer in range(len(sets.blocks)):
        if layer in kept:
            pairs = zip(sets.losses((kept - {layer}) | strongest), own)
        else:
            pairs = zip(own, sets.losses((kept - {weakest}) | {layer}))
        samples[layer] = [more - less for more, less in pairs]
    exchanged = {}  # (kept layer, another one) -> the objective after their exchange
    for out in kept:
        for into in set(samples) - kept:
            other = (kept - {out}) | {into}
            if other in sets.known:
                exchanged[out, into] = sets.known[other]
    tied = ties_of(own, exchanged)
    ranking = rank_samples(method, unit, samples)
    layers = []
    for layer in ranking.layers:
        partners = {a if b == layer.layer else b for a, b in tied if layer.layer in (a, b)}
        layers.append(replace(layer, ties=tuple(sorted(partners))))
    layers.sort(key=lambda layer: layer.layer not in kept)
    return replace(ranking, layers=layers)

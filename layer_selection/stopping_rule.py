"""When jointly trained candidates stop: once their ranking has converged, or half by half
(successive halving)."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

from runtime.config import ConfigError

import numpy

from layer_selection.ranking import rank_samples

ROUNDS = 20
WINDOW = 3
CORRELATION = 0.8


@dataclass(frozen=True)
class StoppingRule:
    """Decides after every round which candidates keep training; with the defaults, all of them to
    the last step.

    rounds: how often a training run is measured. window: rounds over which the best `top_k` layers
    must stay the same for training to end; 0: it never ends early. correlation: the lowest Spearman
    correlation between the orders of two consecutive rounds in that window. halving: the worse half
    stops after rounds 2, 4, 8 ... (successive halving, arXiv 1502.07943). top_k: how many layers
    will be kept.

    Raises ConfigError, naming the command-line option, for values that make no sense.
    """

    rounds: int = 1
    window: int = 0
    correlation: float = 1.0
    halving: bool = False
    top_k: int = 1

    def __post_init__(self):
        for name, least in (("rounds", 1), ("window", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"--{name}: {value} must be at least {least}")
        if not -1 <= self.correlation <= 1:
            raise ConfigError(f"--correlation: {self.correlation} must be between -1 and 1")

    def has_converged(self, rounds: list[dict[int, list[float]]]) -> bool:
        """Whether the last `window` of these rounds agree on the choice.

        rounds: layer -> importance on each sequence. Two choices agree if they differ only in
        layers that the last round cannot tell apart. Layers that halving stopped keep their places
        in the order, after the others, so that from then on the choice decides.
        """
        if not self.window or len(rounds) < self.window:
            return False
        means = [mean_importance(samples) for samples in rounds]
        first = len(rounds) - self.window + 1
        orders = [order_after(means[:done]) for done in range(first, len(rounds) + 1)]
        chosen = [best_layers(order, self.top_k) for order in orders]
        ties = set(rank_samples("", "", rounds[-1]).undecided(self.top_k))
        if not all(choice ^ chosen[-1] <= ties for choice in chosen):
            return False
        correlations = itertools.starmap(rank_correlation, itertools.pairwise(orders))
        return all(value >= self.correlation - 1e-9 for value in correlations)

    def survivors(self, scores: dict[int, float], done: int) -> list[int]:
        """The layers that keep training after `done` rounds, by their importance in the last one:
        with halving, the better half after rounds 2, 4, 8 ..., but never fewer than top_k + 1."""
        count = len(scores)
        is_power_of_two = done & (done - 1) == 0
        if self.halving and done > 1 and is_power_of_two:
            count = max(min(count, self.top_k + 1), math.ceil(count / 2))
        best_first = sorted(scores, key=lambda layer: (-scores[layer], layer))
        return sorted(best_first[:count])


def mean_importance(samples: dict[int, list[float]]) -> dict[int, float]:
    """Over the sequences, of each layer."""
    return {layer: sum(values) / len(values) for layer, values in samples.items()}


def rank_correlation(a: dict[int, float], b: dict[int, float]) -> float:
    """Spearman's correlation over the keys that both have; 1 if that is one key."""
    keys = sorted(set(a) & set(b))
    if len(keys) < 2:
        return 1.0
    ranks = [numpy.argsort(numpy.argsort([values[key] for key in keys])) for values in (a, b)]
    return float(numpy.corrcoef(*ranks)[0, 1])


def order_after(rounds: list[dict[int, float]]) -> dict[int, int]:
    """Layer -> minus its place by the score of the last round; layers that stopped earlier come
    after those that stopped later."""
    order: list[int] = []
    for scores in reversed(rounds):
        remaining = scores.keys() - set(order)
        order += sorted(remaining, key=lambda layer, scores=scores: (-scores[layer], layer))
    return {layer: -place for place, layer in enumerate(order)}


def best_layers(order: dict[int, int], count: int) -> set[int]:
    """The first `count` layers of an order of `order_after`."""
    return {layer for layer, place in order.items() if -place < count}


def add_rule_options(parser) -> None:
    """The flags of a rule that ends training early; `read_rule` reads them. parser: or a group of
    its arguments."""
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements in a training run (%(default)s)")
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help="rounds over which the choice must stay the same for training to end; 0: never ends early (%(default)s)",
    )
    parser.add_argument(
        "--correlation",
        type=float,
        default=CORRELATION,
        help="the lowest rank correlation of the layers from round to round in that window; layers "
        "that --halving stopped keep their places (%(default)s)",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="stop the worse half of the layers after rounds 2, 4, 8 ...",
    )


def read_rule(args: argparse.Namespace, top_k: int) -> StoppingRule:
    return StoppingRule(args.rounds, args.window, args.correlation, args.halving, top_k)

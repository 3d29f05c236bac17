"""The result of every selector: layers by importance, with intervals and ties, as ranking.json,
ranking.png and ranking.md."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime.files import atomic_write_text

import numpy

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (0.025, 0.975)  # quantiles of a 95 % interval
RATIOS = (0.125, 0.25, 0.33, 0.5)  # those that are published


def layers_of(ratio: float, num_layers: int) -> int:
    """floor(ratio x layers + 0.5)."""
    return math.floor(ratio * num_layers + 0.5)


def budget(ratio: float, num_layers: int) -> int:
    """How many layers a ratio keeps: floor(ratio x layers + 0.5), for all methods alike.

    Raises ValueError if that is none, or more than there are.
    """
    keep = layers_of(ratio, num_layers) if math.isfinite(ratio) else 0
    if not 1 <= keep <= num_layers:
        raise ValueError(f"--ratio: {ratio} of {num_layers} layers keeps {keep}; it must keep 1 to {num_layers}")
    return keep


def ratio_of(count: int, num_layers: int, ratios: tuple[float, ...] = RATIOS) -> float:
    """The ratio that keeps `count` layers: the nearest of `ratios` that does, or else the share
    itself, rounded."""
    share = count / num_layers
    same = [ratio for ratio in ratios if layers_of(ratio, num_layers) == count]
    return min(same, key=lambda ratio: abs(ratio - share), default=round(share, 2))


def hybrid_folder(teacher: str, student: str, ratio: float, selector: str) -> str:
    """{teacher}_{size}_{student}_hybrid_{ratio}_{selector}, the name of a folder of configs/.
    teacher: with its size."""
    share = str(ratio).replace(".", "_")
    return f"{teacher}_{student}_hybrid_{share}_{selector}"


def evenly_spaced(count: int, num_layers: int) -> list[int]:
    """`count` layers, each in the middle of one of `count` equal parts."""
    return [int((i + 0.5) * num_layers / count) for i in range(count)]


@dataclass(frozen=True)
class Layer:
    """A layer's importance, more being better, with its 95 % interval (None where the method has no
    spread), and the layers that it is statistically tied with."""

    layer: int
    importance: float
    low: float | None = None
    high: float | None = None
    ties: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Layers, best first.

    unit: what importance is measured in. facts: what made it. samples: layer -> importance on each
    sequence, where it was measured on several; they are not written.
    """

    method: str
    unit: str
    layers: list[Layer]
    facts: dict
    samples: dict[int, list[float]] = field(default_factory=dict, repr=False)

    def keep(self, count: int) -> list[int]:
        """The `count` best layers in order of their index. Raises ValueError if there are fewer."""
        if not 1 <= count <= len(self.layers):
            raise ValueError(f"--top-k: {count} must be between 1 and {len(self.layers)}, the number of layers")
        return sorted(layer.layer for layer in self.layers[:count])

    def undecided(self, count: int) -> list[int]:
        """The layers before and after the cut at the `count` best that are tied across it."""
        outside = {layer.layer for layer in self.layers[count:]}
        tied = set()
        for layer in self.layers[:count]:
            across = outside & set(layer.ties)
            if across:
                tied |= across | {layer.layer}
        return sorted(tied)


def rank_scores(method: str, unit: str, scores: dict[int, float], **facts) -> Ranking:
    """A ranking of single numbers, equal ones in order of their layer."""
    order = sorted(scores, key=lambda layer: (-scores[layer], layer))
    layers = [Layer(layer, float(scores[layer])) for layer in order]
    return Ranking(method, unit, layers, facts)


def ties_of(own: list[float], others: dict[tuple[int, int], list[float]]) -> list[tuple[int, int]]:
    """The keys of `others` whose values differ from `own` by a mean of which the 95 % interval, by
    bootstrap over the same sequences, contains 0."""
    drawn = numpy.random.default_rng(0).integers(len(own), size=(RESAMPLES, len(own)))
    tied = []
    for key, values in others.items():
        differences = numpy.array(values) - numpy.array(own)
        lowest, highest = numpy.quantile(differences[drawn].mean(1), INTERVAL)
        if lowest <= 0 <= highest:
            tied.append(key)
    return tied


def rank_samples(method: str, unit: str, samples: dict[int, list[float]], seed: int = 0, **facts) -> Ranking:
    """A ranking by means over the same sequences, with intervals by bootstrap over sequences.

    samples: layer -> importance on each sequence. seed: of the bootstrap. Two layers are tied if
    the 95 % interval of their paired difference contains 0. Raises ValueError if the samples differ
    in length.
    """
    lengths = {layer: len(values) for layer, values in samples.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the layers were measured on different numbers of sequences: {lengths}")
    ids = sorted(samples)
    values = numpy.array([samples[layer] for layer in ids], dtype=numpy.float64)
    sequences = values.shape[1]
    drawn = numpy.random.default_rng(seed).integers(sequences, size=(RESAMPLES, sequences))
    means = numpy.stack([row[drawn].mean(1) for row in values])  # [layers, resamples]
    low, high = numpy.quantile(means, INTERVAL, axis=1)

    def tied(a: int, b: int) -> bool:
        lowest, highest = numpy.quantile(means[a] - means[b], INTERVAL)
        return a != b and lowest <= 0 <= highest

    order = sorted(range(len(ids)), key=lambda i: -values[i].mean())
    layers = []
    for i in order:
        layers.append(
            Layer(
                layer=ids[i],
                importance=values[i].mean().item(),
                low=low[i].item(),
                high=high[i].item(),
                ties=tuple(sorted(ids[j] for j in order if tied(i, j))),
            )
        )
    return Ranking(method, unit, layers, facts, samples)


def table(ranking: Ranking, count: int) -> str:
    """A Markdown table, best first."""
    kept = set(ranking.keep(count))
    lines = [
        f"| rank | layer | {ranking.unit} | kept | ties with |",
        "|--:|--:|--:|:-:|:--|",
    ]
    for rank, layer in enumerate(ranking.layers, 1):
        importance = f"{layer.importance:.4g}"
        if layer.low is not None:
            importance += f" [{layer.low:.4g}, {layer.high:.4g}]"
        mark = "yes" if layer.layer in kept else ""
        ties = ", ".join(map(str, layer.ties))
        lines.append(f"| {rank} | {layer.layer} | {importance} | {mark} | {ties} |")
    return "\n".join(lines)


def plot(ranking: Ranking, count: int, path: Path) -> None:
    """Importance over the layers: the kept ones in colour, open circles for ties across the cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = set(ranking.keep(count))
    tied = set(ranking.undecided(count))
    layers = sorted(ranking.layers, key=lambda layer: layer.layer)
    size = (max(5, 0.3 * len(layers)), 3.2)
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    for layer in layers:
        errors = None
        if layer.low is not None:
            errors = [[layer.importance - layer.low], [layer.high - layer.importance]]
        color = "tab:blue" if layer.layer in kept else "darkgrey"
        axis.errorbar(
            layer.layer,
            layer.importance,
            errors,
            fmt="o",
            capsize=3,
            color=color,
            ecolor="lightgrey",
            markerfacecolor="white" if layer.layer in tied else color,
        )
    legend = "blue, open: tied" if tied else "blue"
    axis.set(
        xlabel="layer",
        ylabel=ranking.unit,
        title=f"{ranking.method}: {count} of {len(layers)} layers kept ({legend})",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(ranking: Ranking, count: int, folder: Path) -> None:
    """ranking.png, ranking.md with the table, and ranking.json, which comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(ranking, count, folder / "ranking.png")
    content = {name: value for name, value in asdict(ranking).items() if name != "samples"}
    content |= {"keep": ranking.keep(count), "undecided": ranking.undecided(count)}
    atomic_write_text(folder / "ranking.md", table(ranking, count) + "\n")
    atomic_write_text(folder / "ranking.json", json.dumps(content, indent=1) + "\n")

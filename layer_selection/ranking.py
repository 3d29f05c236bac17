"""What every selector ends in: layers by importance, with intervals and ties, as ranking.json,
ranking.png and ranking.md."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime.files import atomic_write_text

import numpy

RESAMPLES = 2000  # of the bootstrap
RATIOS = 0.125, 0.25, 0.33, 0.5  # those that are published


def budget(ratio: float, num_layers: int) -> int:
    """How many layers a ratio keeps: floor(ratio x layers + 0.5), so that methods compare at equal
    budgets.

    Raises ValueError if that is none, or more than there are.
    """
    keep = math.floor(ratio * num_layers + 0.5) if math.isfinite(ratio) else 0
    if not 1 <= keep <= num_layers:
        raise ValueError(f"--ratio: {ratio} of {num_layers} layers keeps {keep}; it must keep 1 to {num_layers}")
    return keep


def ratio_of(count: int, num_layers: int, ratios: tuple[float, ...] = RATIOS) -> float:
    """The ratio that keeps `count` layers: the nearest of `ratios` that does, or else the share
    itself, rounded."""
    share = count / num_layers
    same = [r for r in ratios if math.floor(r * num_layers + 0.5) == count]
    return min(same, key=lambda r: abs(r - share), default=round(share, 2))


def hybrid_folder(teacher: str, student: str, ratio: float, selector: str) -> str:
    """{teacher}_{size}_{student}_hybrid_{ratio}_{selector}, as the folders of configs/ are named;
    `teacher` has its size."""
    return f"{teacher}_{student}_hybrid_{str(ratio).replace('.', '_')}_{selector}"


def evenly_spaced(count: int, num_layers: int) -> list[int]:
    """`count` layers, each in the middle of one of `count` equal parts: the one phase of `uniform`,
    whatever the ratio."""
    return [int((i + 0.5) * num_layers / count) for i in range(count)]


@dataclass(frozen=True)
class Layer:
    """A layer's importance, more being better, with its 95 % interval (None where the method has no
    spread), and the layers next to it in the ranking that it cannot be told from."""

    layer: int
    importance: float
    low: float | None = None
    high: float | None = None
    ties: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Layers, best first. unit: what importance is measured in. facts: what made it. samples: layer
    -> importance on each sequence, where it was measured on several; they are not written."""

    method: str
    unit: str
    layers: list[Layer]
    facts: dict
    samples: dict[int, list[float]] = field(default_factory=dict, repr=False)

    def keep(self, count: int) -> list[int]:
        """The `count` best layers in order of their index. Raises ValueError if there are not as
        many."""
        if not 1 <= count <= len(self.layers):
            raise ValueError(f"--top-k: {count} must be between 1 and {len(self.layers)}, the number of layers")
        return sorted(layer.layer for layer in self.layers[:count])

    def undecided(self, count: int) -> list[int]:
        """Layers on both sides of the cut behind the `count` best that the measurement cannot
        order."""
        ids = [layer.layer for layer in self.layers]
        inside, outside = self.layers[:count], set(ids[count:])
        across = {layer.layer for layer in inside if outside & set(layer.ties)}
        return sorted(across | {tie for layer in inside for tie in layer.ties if tie in outside})


def rank_scores(method: str, unit: str, scores: dict[int, float], **facts) -> Ranking:
    """A ranking of single numbers, equal ones in order of their layer."""
    layers = [
        Layer(layer, float(score)) for layer, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    ]
    return Ranking(method, unit, layers, facts)


def rank_samples(method: str, unit: str, samples: dict[int, list[float]], seed: int = 0, **facts) -> Ranking:
    """A ranking by means over the same sequences, layer -> importance on each: intervals by
    bootstrap over sequences.

    Two layers tie if the 95 % interval of their paired difference holds 0. Raises ValueError if the
    samples differ in length.
    """
    lengths = {layer: len(values) for layer, values in samples.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the layers were measured on different numbers of sequences: {lengths}")
    ids = sorted(samples)
    values = numpy.array([samples[layer] for layer in ids], dtype=numpy.float64)
    drawn = numpy.random.default_rng(seed).integers(values.shape[1], size=(RESAMPLES, values.shape[1]))
    means = numpy.stack([row[drawn].mean(1) for row in values])  # [layers, resamples]
    low, high = numpy.quantile(means, (0.025, 0.975), axis=1)

    def tied(a: int, b: int) -> bool:
        near, far = numpy.quantile(means[a] - means[b], (0.025, 0.975))
        return a != b and near <= 0 <= far

    order = sorted(range(len(ids)), key=lambda i: -values[i].mean())
    layers = [
        Layer(
            ids[i],
            values[i].mean().item(),
            low[i].item(),
            high[i].item(),
            tuple(sorted(ids[j] for j in order if tied(i, j))),
        )
        for i in order
    ]
    return Ranking(method, unit, layers, facts, samples)


def table(ranking: Ranking, count: int) -> str:
    """A Markdown table, best first."""
    kept, lines = (
        set(ranking.keep(count)),
        [f"| rank | layer | {ranking.unit} | kept | ties with |", "|--:|--:|--:|:-:|:--|"],
    )
    for rank, layer in enumerate(ranking.layers, 1):
        interval = "" if layer.low is None else f" [{layer.low:.4g}, {layer.high:.4g}]"
        ties = ", ".join(map(str, layer.ties))
        mark = "yes" if layer.layer in kept else ""
        lines.append(f"| {rank} | {layer.layer} | {layer.importance:.4g}{interval} | {mark} | {ties} |")
    return "\n".join(lines)


def plot(ranking: Ranking, count: int, path: Path) -> None:
    """Importance over the layers: the kept ones in colour, open circles where the measurement does
    not settle which side of the cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept, open_ones = set(ranking.keep(count)), set(ranking.undecided(count))
    layers = sorted(ranking.layers, key=lambda layer: layer.layer)
    figure, axis = pyplot.subplots(figsize=(max(5, 0.3 * len(layers)), 3.2), layout="constrained")
    for layer in layers:
        errors = None if layer.low is None else [[layer.importance - layer.low], [layer.high - layer.importance]]
        color = "tab:blue" if layer.layer in kept else "darkgrey"
        axis.errorbar(
            layer.layer,
            layer.importance,
            errors,
            fmt="o",
            capsize=3,
            color=color,
            ecolor="lightgrey",
            markerfacecolor="white" if layer.layer in open_ones else color,
        )
    tied = ", open: not told apart" if open_ones else ""
    axis.set(
        xlabel="layer",
        ylabel=ranking.unit,
        title=f"{ranking.method}: {count} of {len(layers)} layers kept (blue{tied})",
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

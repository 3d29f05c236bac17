"""The figures of a report, drawn with matplotlib and returned as <img> elements."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib import colormaps
from matplotlib.figure import Figure

from .page import image
from .run_record import Curve, RunRecord

BLUE = "#4a6fa5"
RED = "#c8553d"
SAND = "#d9b382"


def _tidy(axes: Iterable) -> None:
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_losses(axis, train: Curve, heldout: Curve, title: str) -> None:
    axis.plot(*zip(*train), lw=0.9, color=BLUE, label="training")
    if heldout:
        axis.plot(*zip(*heldout), "o-", ms=3, lw=1.2, color=RED, label="held-out")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.legend(fontsize=8, frameon=False)


def loss_curves(panels: dict[str, tuple[Curve, Curve]]) -> str:
    """Side by side, of every title: the training loss, and the held-out loss where it was
    measured."""
    panels = {title: curves for title, curves in panels.items() if curves[0]}
    if not panels:
        return ""
    figure = Figure(figsize=(min(10.5, 4.4 * len(panels)), 3))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, (train, heldout)) in zip(axes, panels.items()):
        _draw_losses(axis, train, heldout, title)
    _tidy(axes)
    figure.tight_layout()
    return image(figure, "training and held-out loss over the steps")


def progress_curves(run: RunRecord) -> str:
    """Learning rate, gradient norm, tokens/s and MFU over the steps, as far as they were logged."""
    names = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens/s",
        "mfu": "MFU",
    }
    curves = {label: run.curve(name) for name, label in names.items()}
    curves = {label: curve for label, curve in curves.items() if curve}
    if not curves:
        return ""
    figure = Figure(figsize=(3.3 * len(curves), 2.4))
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (label, curve) in zip(axes, curves.items()):
        axis.plot(*zip(*curve), lw=0.9, color=BLUE)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    _tidy(axes)
    figure.tight_layout()
    return image(figure, "learning rate and speed over the steps")


def _draw_bars(
    axis,
    before: list[float],
    after: list[float],
    kept: list[int],
    labels: tuple[str, str],
) -> None:
    layers = range(len(before))
    axis.bar([layer - 0.2 for layer in layers], before, 0.38, color=SAND, label=labels[0])
    axis.bar([layer + 0.2 for layer in layers], after, 0.38, color=BLUE, label=labels[1])
    axis.set_xticks(
        list(layers),
        [f"{layer}\nkept" if layer in kept else str(layer) for layer in layers],
    )
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("error / variance of the teacher's output", fontsize=8)
    # Above the bars.
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def alignment_figure(steps: list[int], errors: list[list[float]], kept: list[int]) -> str:
    """Relative alignment error of every layer at the first and last measurement of stage 1, and in
    between.

    steps, errors: of `RunRecord.layer_errors`. kept: layers that a hybrid keeps, marked.
    """
    if not steps:
        return ""
    before = errors[0]
    after = errors[-1]
    figure = Figure(figsize=(10.5, 3.2))
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_bars(bars, before, after, kept, (f"step {steps[0]}", f"step {steps[-1]}"))
    count = len(before)
    for layer in range(count):
        color = colormaps["viridis"](layer / max(1, count - 1) * 0.9)
        values = [error[layer] for error in errors]
        curves.plot(steps, values, "o-", ms=2.5, lw=1, color=color, label=f"layer {layer}")
    curves.set_xlabel("step", fontsize=9)
    columns = -(-count // 12)
    curves.legend(
        fontsize=7,
        frameon=False,
        ncols=columns,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    for axis in (bars, curves):
        axis.set_yscale("log")
    _tidy((bars, curves))
    figure.tight_layout()
    return image(figure, "alignment error of every layer")

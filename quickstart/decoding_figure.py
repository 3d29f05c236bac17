"""Cache and decoding speed over the context, as a figure."""

from __future__ import annotations

from matplotlib.figure import Figure

from quickstart.measure import Decoding
from reporting.page import image

COLORS = ("#c8553d", "#8a8a8a", "#4a6fa5")


def decoding_figure(speeds: list[Decoding]) -> str:
    """Bytes of the cache, and decoded tokens/s, of every model over the context."""
    figure = Figure(figsize=(11, 3.3))
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(speed.name for speed in speeds))
    for name, color in zip(names, COLORS):
        points = [speed for speed in speeds if speed.name == name]
        contexts = [point.context for point in points]
        style = dict(marker="o", markersize=4, color=color, label=name)
        panels[0].plot(contexts, [point.cache_bytes / 2**20 for point in points], **style)
        panels[1].plot(contexts, [point.tokens_per_second for point in points], **style)
    contexts = sorted({speed.context for speed in speeds})
    for panel, label in zip(panels, ("cache, MiB", "decoded tokens/s")):
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("context in tokens", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return image(figure, "bytes of the cache and decoded tokens per second over the context")

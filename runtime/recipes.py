"""Learning rates by size of the model: what `configs/` use, docs/training.md shows, and `--dry-run`
compares a config with."""

from __future__ import annotations

from dataclasses import dataclass

FAR = 3  # a learning rate is far from the advice if it is more than this many times as large or small


@dataclass(frozen=True)
class Recipe:
    """Peak learning rates that were used with models of some size.

    smallest, largest: parameters of these models. stage1: of the student layers. stage2: of all but
    the student layers, which have stage2_attn. stage3: of all weights.
    """

    smallest: float
    largest: float
    stage1: float
    stage2: float
    stage2_attn: float
    stage3: float
    source: str

    @property
    def size(self) -> str:
        """The parameters of the models, in words."""
        sizes = dict.fromkeys((size_text(self.smallest), size_text(self.largest)))
        return " to ".join(sizes)

    def distance(self, parameters: float) -> float:
        """The factor between a number of parameters and the nearest one of these models."""
        return max(self.smallest / parameters, parameters / self.largest, 1)

    def rates(self, stage: int) -> tuple[float, float]:
        """(of the student layers, of the rest) in a stage; stage 1 trains no rest."""
        student_layers = {1: self.stage1, 2: self.stage2_attn, 3: self.stage3}
        rest = {1: self.stage1, 2: self.stage2, 3: self.stage3}
        return student_layers[stage], rest[stage]


RECIPES = (
    Recipe(
        0.7e6,
        40e6,
        2e-3,
        1e-4,
        1e-3,
        3e-4,
        "tried here: the recall teachers of the quickstart (0.7M) and of "
        "[students.md](students.md#comparison) (40M); the quickstart's stage 1 has 3e-3, stage 3 is "
        "the quickstart's alone",
    ),
    Recipe(
        135e6,
        135e6,
        1e-3,
        1.5e-4,
        1.5e-3,
        5e-5,
        "stage 2: the best of four pairs tried here, with one seed and 8M tokens: SmolLM2-135M, weights dequantised from "
        "Q4_1 ([results](results.md)); stage 1 has one rate that was tried, stage 3 was not run",
    ),
    Recipe(
        1.5e9,
        7e9,
        1e-3,
        1e-5,
        1e-4,
        1e-5,
        "published: stage 1 of RADLADS (arXiv 2505.03005), stages 2 and 3 of arXiv 2512.20569; not trained here",
    ),
)


def size_text(parameters: float) -> str:
    """1.5e9 -> "1.5B"."""
    unit, letter = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / unit:.3g}{letter}"


def size_in_name(name: str) -> float:
    """The parameters that a name ends in: "qwen2.5_1.5b" -> 1.5e9."""
    number = name.rpartition("_")[2]
    return float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]


def recipe_for(parameters: float) -> Recipe:
    """The recipe of the nearest size."""
    return min(RECIPES, key=lambda recipe: recipe.distance(parameters))


def rate_text(rate: float) -> str:
    """A learning rate as configs have it: 0.00025 -> "2.5e-4"."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def rates_warning(stage: int, parameters: int, rates: dict[str, float]) -> str | None:
    """A warning if a stage's learning rates are far from the advice for a model of so many
    parameters, or None. rates: by the name of what trains, "the rest" or an attention."""
    recipe = recipe_for(parameters)
    of_student_layers, of_rest = recipe.rates(stage)
    far = []
    for name, rate in rates.items():
        advised = of_rest if name == "the rest" else of_student_layers
        if not advised / FAR <= rate <= advised * FAR:
            far.append(f"{name} {rate_text(rate)} instead of {rate_text(advised)}")
    if not far:
        return None
    return (
        f"warning: train.lr: for {size_text(parameters)} parameters, far from what stage {stage} had "
        f"at {recipe.size}: {', '.join(far)}; see docs/training.md#learning-rates"
    )


def recipes_table() -> str:
    """The recipes as a Markdown table."""
    lines = [
        "| parameters | stage 1 | stage 2 | stage 2, student layers | stage 3 | source |",
        "|--:|--:|--:|--:|--:|---|",
    ]
    for recipe in RECIPES:
        rates = (recipe.stage1, recipe.stage2, recipe.stage2_attn, recipe.stage3)
        cells = [recipe.size, *map(rate_text, rates), recipe.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

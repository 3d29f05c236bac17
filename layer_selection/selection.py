"""A selection: runs one method and writes its ranking and the stage-2 config with the chosen
layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Config, ConfigError
from runtime.guard import StopSignals
from runtime.run_folder import with_recorded_document_mask

from layer_selection.ablation_questions import QuestionOptions
from layer_selection.options import (
    INTERVAL_METHODS,
    OBJECTIVES,
    TASK_METHODS,
    RecallOptions,
    RoundOptions,
    TrainingOptions,
)
from layer_selection.ranking import Ranking, table, write
from layer_selection.stage2_runs import STAGE_2, write_chosen

if TYPE_CHECKING:
    from layer_selection.bench import Bench

# Modules that import torch are imported in functions, after the options are checked.

# The configs that the training of a selection records in --output_dir.
RECORDED = ("side_by_side/candidates.yaml", "gates/gates.yaml", "rounds/rounds.yaml", f"layer_*/{STAGE_2}")


@dataclass(frozen=True)
class SelectionOptions:
    """What one selection is asked for.

    ratio: what top_k was computed from, or None. sequences: held-out ones to measure on.
    batch_size: of sequences, or of a task's questions. seed: of the method `random`, and of a
    task's questions. questions: of a task's ablation, None for other methods. objective, recall:
    what the methods of OBJECTIVE_METHODS minimise. search_tokens: that `gates` trains on, None for
    its default. rounds: of the method `rounds`. interval: keep every interval-th layer, of the best
    phase, instead of top_k layers.

    Raises ConfigError, naming the command-line option, for numbers that make no sense.
    """

    method: str
    top_k: int
    training: TrainingOptions
    ratio: float | None = None
    sequences: int = 64
    batch_size: int = 8
    seed: int = 0
    questions: QuestionOptions | None = None
    objective: str = "kl"
    recall: RecallOptions = field(default_factory=RecallOptions)
    search_tokens: int | None = None
    rounds: RoundOptions = field(default_factory=RoundOptions)
    interval: int | None = None

    def __post_init__(self):
        for name, least in (("sequences", 2), ("batch_size", 1), ("search_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name}: {value} must be at least {least}")
        if self.interval is not None and self.method not in INTERVAL_METHODS:
            raise ConfigError(
                f"--interval: {self.interval} is for --method {' and '.join(INTERVAL_METHODS)}, which measure sets of "
                f"layers; {self.method} does not"
            )
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective: {self.objective} is unknown; choose of {', '.join(OBJECTIVES)}")
        if self.objective != "kl" and self.method not in OBJECTIVE_METHODS:
            raise ConfigError(
                f"--objective: {self.objective} is for --method {', '.join(OBJECTIVE_METHODS)}; {self.method} has its own"
            )
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ConfigError(f"--output_dir: {self.output_dir} is a file; name a folder")

    @property
    def output_dir(self) -> Path:
        return self.training.output_dir


@dataclass(frozen=True)
class Method:
    """A method: a function that takes the bench and some of the options, and returns a `Ranking`, or
    None where a candidate was trained alone. Its docstring has formula and source.

    place: its module in layer_selection and its name. The module, which imports torch, is imported
    when the method is used. arguments: the options that it takes, in order.
    """

    place: str
    arguments: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[..., Ranking | None]:
        module, name = self.place.split(".")
        return getattr(import_module(f"layer_selection.{module}"), name)

    def __call__(self, bench: Bench, options: SelectionOptions) -> Ranking | None:
        return self.function(bench, *(getattr(options, name) for name in self.arguments))


METHODS = {
    "gates": Method("gates.gates", ("top_k", "search_tokens", "output_dir")),
    "rounds": Method("rounds.rounds", ("top_k", "rounds", "output_dir")),
    "ga_s2": Method("candidate_training.ga_s2", ("training",)),
    "gr_s2": Method("baselines.gr_s2", ("training",)),
    "avg_s2": Method("baselines.avg_s2", ("training",)),
    "scan": Method("baselines.scan"),
    "smart": Method("baselines.smart", ("top_k",)),
    "mse": Method("baselines.alignment_error"),
    "ga_s1": Method("baselines.ga_s1"),
    "ppl": Method("baselines.perplexity"),
    **dict.fromkeys(TASK_METHODS, Method("baselines.task_ablation", ("method", "questions", "batch_size", "seed"))),
    "uniform": Method("baselines.uniform", ("top_k",)),
    "random": Method("baselines.random_order", ("seed",)),
}
DEFAULT = "gates"
TRAINED_METHODS = ("ga_s2", "gr_s2", "avg_s2")  # with a training run for every layer
OBJECTIVE_METHODS = ("gates", "rounds", "scan", "ga_s2", "gr_s2")  # those that minimise --objective


@dataclass(frozen=True)
class Selection:
    """A ranking, how many layers it keeps, and the stage-2 config with those."""

    ranking: Ranking
    top_k: int
    chosen: Path

    def summary(self) -> str:
        """The table, what the training took, and what comes next."""
        facts = self.ranking.facts
        lines = [table(self.ranking, self.top_k)]
        if "share_of_full_runs" in facts:
            lines.append(
                f"Trained jointly for {facts['steps']} of {facts['of_steps']} steps: "
                f"{facts['share_of_full_runs']:.1%} of the FLOPs of {facts['candidates']} full runs, "
                f"{facts['seconds']:.0f} s"
            )
        elif "flops" in facts:
            lines.append(
                f"Trained on {facts['tokens'] / 1e6:.1f}M tokens: {facts['flops']:.2g} FLOPs with all measurements, "
                f"{facts['seconds']:.0f} s"
            )
        from layer_selection.intervals import interval_of

        layers = self.ranking.keep(self.top_k)
        kept = f"Kept: {layers}"
        if undecided := self.ranking.undecided(self.top_k):
            kept += f"; statistically tied at the cut: {undecided}"
        lines.append(kept)
        num_layers = len(self.ranking.layers)
        if interval_of(layers, num_layers) is None:
            cure = "--interval chooses among evenly spaced ones (docs/layer_selection.md)"
            if interval := facts.get("interval"):
                needed = ",".join(map(str, range(interval - 1, num_layers, interval)))
                cure = (
                    f"of interval {interval} they need phase {interval - 1}, not {facts['phase']}: for them, train with "
                    f"student_model.keep_full_attention_layers=[{needed}]"
                )
            lines.append(
                "Warning: runtimes that derive the layer kinds from full_attention_interval (llama.cpp, MLX) cannot run "
                f"this set; {cure}"
            )
        lines.append(f"next: deepspeed train.py --cfg {self.chosen}")
        return "\n".join(lines)


def select(cfg: Config, options: SelectionOptions) -> Selection | None:
    """Runs options.method and writes ranking.json, ranking.png, ranking.md and the chosen stage-2
    config to options.output_dir. None where a candidate was trained alone.

    Raises ValueError for what the user can correct. Told to stop by a signal, it exits with
    REQUEUE.
    """
    from layer_selection.bench import Bench
    from layer_selection.intervals import best_phase

    # Joint training handles signals itself; the others have nothing to save where a signal comes
    # here.
    signals = nullcontext() if options.method in TRAINED_METHODS else StopSignals(to_the_end=False)
    with signals:
        recorded = next((file for pattern in RECORDED for file in options.output_dir.glob(pattern)), None)
        if recorded is not None:
            cfg = with_recorded_document_mask(cfg, recorded)
        bench = Bench(cfg, options.sequences, options.batch_size, options.objective, options.recall)
        if options.interval is None:
            ranking, count = METHODS[options.method](bench, options), options.top_k
        else:
            ranking, count = best_phase(bench, options.method, options.interval, options.training)
    if ranking is None:
        return None
    write(ranking, count, options.output_dir)
    chosen = write_chosen(cfg, ranking, count, options.ratio, options.output_dir)
    return Selection(ranking, count, chosen)

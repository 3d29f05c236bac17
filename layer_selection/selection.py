"""A selection: runs one method and writes its ranking and the stage-2 config with the chosen
layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config import Config, ConfigError
from runtime.guard import StopSignals

from layer_selection.ablation_questions import QuestionOptions
from layer_selection.baselines import (
    TASK_METHODS,
    alignment_error,
    avg_s2,
    ga_s1,
    gr_s2,
    perplexity,
    random_order,
    scan,
    smart,
    task_ablation,
    uniform,
)
from layer_selection.bench import Bench
from layer_selection.candidate_training import TrainingOptions, ga_s2
from layer_selection.gates import gates
from layer_selection.intervals import METHODS as INTERVAL_METHODS
from layer_selection.intervals import best_phase, interval_of
from layer_selection.objective import OBJECTIVES, RecallOptions
from layer_selection.ranking import Ranking, table, write
from layer_selection.rounds import RoundOptions, rounds
from layer_selection.stage2_runs import write_chosen


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


Method = Callable[[Bench, SelectionOptions], Ranking | None]


def ablate_task(bench: Bench, options: SelectionOptions) -> Ranking:
    return task_ablation(bench, options.method, options.questions, options.batch_size, options.seed)


def learn_gates(bench: Bench, options: SelectionOptions) -> Ranking:
    return gates(bench, options.top_k, options.search_tokens, options.output_dir)


def go_in_rounds(bench: Bench, options: SelectionOptions) -> Ranking:
    return rounds(bench, options.top_k, options.rounds, options.output_dir)


METHODS: dict[str, Method] = {
    "gates": learn_gates,
    "rounds": go_in_rounds,
    "ga_s2": lambda bench, options: ga_s2(bench, options.training),
    "gr_s2": lambda bench, options: gr_s2(bench, options.training),
    "avg_s2": lambda bench, options: avg_s2(bench, options.training),
    "ga_s1": lambda bench, options: ga_s1(bench),
    "smart": lambda bench, options: smart(bench, options.top_k),
    "scan": lambda bench, options: scan(bench),
    "ppl": lambda bench, options: perplexity(bench),
    "mse": lambda bench, options: alignment_error(bench),
    "uniform": lambda bench, options: uniform(bench, options.top_k),
    "random": lambda bench, options: random_order(bench, options.seed),
    **dict.fromkeys(TASK_METHODS, ablate_task),
}
# Where each method's formula and source are documented.
DOCUMENTED: dict[str, Callable] = {
    "gates": gates,
    "rounds": rounds,
    "ga_s2": ga_s2,
    "gr_s2": gr_s2,
    "avg_s2": avg_s2,
    "scan": scan,
    "smart": smart,
    "mse": alignment_error,
    "ga_s1": ga_s1,
    "ppl": perplexity,
    **dict.fromkeys(TASK_METHODS, task_ablation),
    "uniform": uniform,
    "random": random_order,
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
    # Joint training handles signals itself; the others have nothing to save where a signal comes
    # here.
    signals = nullcontext() if options.method in TRAINED_METHODS else StopSignals(to_the_end=False)
    with signals:
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

"""The options of objectives and of the training of candidates, and the names that they take. It imports
no torch: the scripts check their arguments with it before they import what works with models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime.config import ConfigError

from layer_selection.ablation_questions import TASKS
from layer_selection.stopping_rule import StoppingRule
from recall_tasks import WORDS

OBJECTIVES = ("kl", "far_kl", "recall", "mixture")
RECALL_OBJECTIVES = ("recall", "mixture")  # those with documents of recall
WORDS_OPTION = "--vocab_size (of compare_selectors.py: --num_words)"
SHORT_NAMES = {"associative_recall": "ar", "associative_recall_multihop": "ar_multihop"}
# Method -> the task that it ablates.
TASK_METHODS = {SHORT_NAMES.get(task, task): task for task in TASKS}
INTERVAL_METHODS = ("scan", "ga_s2")  # those that measure sets of layers as a whole
CANDIDATES = 4  # that a round trains


@dataclass(frozen=True)
class TrainingOptions:
    """How a selection trains its candidates.

    full_runs: each by train.py to its last step, instead of jointly. candidate: train this layer
    alone, by train.py, and do not rank. launcher: the command that starts train.py.
    """

    output_dir: Path
    rule: StoppingRule = field(default_factory=StoppingRule)
    full_runs: bool = False
    candidate: int | None = None
    launcher: str = "deepspeed"


@dataclass(frozen=True)
class RoundOptions:
    """direction: add or remove. layers: how many a round adds or removes; None: a quarter of those
    to add or remove in all, at least one. candidates: trained in a round. tokens: of all candidates together; None:
    SHARE of a full stage 2 for every layer.

    Raises ConfigError, naming the command-line option, for values that make no sense.
    """

    direction: str = "add"
    layers: int | None = None
    candidates: int = CANDIDATES
    tokens: int | None = None

    def __post_init__(self):
        if self.direction not in ("add", "remove"):
            raise ConfigError(f"--direction: {self.direction} must be add or remove")
        for name in ("layers", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name}_per_round: {value} must be at least 1")


@dataclass(frozen=True)
class RecallOptions:
    """Documents of associative recall: pairs of key and value, and the words that they draw from.

    Raises ConfigError, naming the command-line option, for numbers that no document can have.
    """

    num_pairs: int = 16
    num_words: int = 256

    def __post_init__(self):
        if self.num_pairs < 1:
            raise ConfigError(f"--num_pairs: {self.num_pairs} must be at least 1")
        if self.num_words > len(WORDS):
            raise ConfigError(f"{WORDS_OPTION}: {self.num_words} must be at most {len(WORDS)}")
        if self.num_words < self.num_pairs:
            raise ConfigError(
                f"--num_pairs: {self.num_pairs} pairs need as many different words, not {self.num_words}; lower it, "
                f"or set {WORDS_OPTION} to that"
            )


def objective_settings(name: str, recall: RecallOptions) -> dict:
    """What figures of an objective must agree in, to be compared."""
    return {"objective": name} | (asdict(recall) if name in RECALL_OBJECTIVES else {})

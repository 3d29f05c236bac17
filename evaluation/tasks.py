"""The tasks and groups that `--tasks` has names for, beside those of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass

from recall_tasks import RECALL_TASKS

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
RECALL_GENERATION = "recall_generation"
PERPLEXITY = "heldout_perplexity"
KL = "heldout_kl"
HELDOUT = (PERPLEXITY, KL)  # measured on the held-out chunks of --data
NEEDLE = "needle_recall"
OWN = (*RECALL_TASKS, NEEDLE, *HELDOUT)  # measured by forward passes over whole documents, without the harness
LOCAL = (*RECALL_TASKS, RECALL_GENERATION, *HELDOUT)  # need no network
SIZED = (*RULER, *RECALL_TASKS, NEEDLE, RECALL_GENERATION)  # their documents are made to a given length
GROUPS = {
    "ruler": RULER,
    "needle": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "commonsense": (
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "piqa",
        "winogrande",
        "boolq",
        "openbookqa",
        "lambada_openai",
    ),
    "mmlu": ("mmlu",),
    "local": LOCAL,
    "generation": ("gsm8k", RECALL_GENERATION),
}
DEFAULT_SEQ_LEN = 4096
GROUP_SEQ_LENS = {"needle": (4096, 16384, 65536, 262144)}  # default lengths of a group that has its own


@dataclass(frozen=True)
class Unit:
    """A task, at a length if it has one. A unit runs, fails and is recorded as a whole."""

    task: str
    seq_len: int | None = None

    @property
    def key(self) -> str:
        return self.task if self.seq_len is None else f"{self.task}@{self.seq_len}"

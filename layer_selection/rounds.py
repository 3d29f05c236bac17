"""GA-S2 given what is kept already: layers are added, or removed, in rounds around the best hybrid
so far.

A round looks at every layer that could be added to (removed from) the current hybrid, measures the
hybrid with it untrained, and trains the `candidates` most promising ones jointly
(candidate_training.py). They start from the current hybrid: a restored layer takes the teacher's
attention, a removed one that of stage 1. The best of them, one or several layers, make the next
hybrid. Once K layers are kept, single layers are exchanged the same way while the objective falls.

A round is short: all of them together take a tenth of a full stage 2 for every layer, if not told
otherwise. GA-S2 ranks each layer alone (arXiv 2512.20569) and takes two that do the same.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import ConfigError, dump_config
from runtime.files import atomic_directory, atomic_write_text, locked
from runtime.guard import REQUEUE
from runtime.run_folder import difference, recorded_config

import torch
from tqdm import tqdm
from transformers.initialization import no_init_weights

from distill_model import StudentForCausalLM
from layer_selection.bench import Bench
from layer_selection.candidate_training import JointTraining, SequenceKLs, check_joint_training, linear_weights
from layer_selection.layer_sets import MeasuredSets, neighbours, rank_around
from layer_selection.objective import check_settings
from layer_selection.options import RoundOptions
from layer_selection.ranking import Ranking
from layer_selection.stopping_rule import StoppingRule

FOLDER = "rounds"  # in --output_dir
STATE = "rounds.json"
CONFIG = "rounds.yaml"
BEST = "best"  # a round's best hybrid
EXCHANGES = 2  # rounds of exchanges that the tokens are planned for
GRAPH_STEPS = 30  # fewer are not worth the recording of CUDA graphs for each candidate
SHARE = 0.1  # of a full stage 2 for every layer, that all rounds take


# ------------------------------------------------------------------------ hybrids
@torch.no_grad()
def with_kept_layers(
    start: StudentForCausalLM, kept: list[int], teacher: StudentForCausalLM, student: StudentForCausalLM
) -> StudentForCausalLM:
    """A copy of `start` that keeps `kept`. Layers that it did not keep take the teacher's attention;
    layers that it no longer keeps take that of `student`, the all-linear one."""
    before = set(start.config.keep_full_attention_layers)
    config = copy.deepcopy(start.config)
    config.keep_full_attention_layers = sorted(kept)
    with no_init_weights():  # all weights are loaded below
        hybrid = type(start)._from_config(config, dtype=start.dtype)
    hybrid.tie_weights()
    state = start.state_dict()
    for source, layers in ((teacher, set(kept) - before), (student, before - set(kept))):
        prefixes = tuple(f"model.layers.{i}.attn." for i in layers)
        if prefixes:
            state = {name: value for name, value in state.items() if not name.startswith(prefixes)}
            state |= {name: value for name, value in source.state_dict().items() if name.startswith(prefixes)}
    hybrid.load_state_dict(state)
    return hybrid


def measured_sets(hybrid: StudentForCausalLM, bench: Bench) -> MeasuredSets:
    """The objective of `hybrid` with other layers kept, without training: see `with_kept_layers`."""
    kept = hybrid.config.keep_full_attention_layers
    softmax = []
    linear = []
    blocks = zip(hybrid.model.layers, bench.teacher.model.layers, bench.student.model.layers)
    for i, (block, of_teacher, of_student) in enumerate(blocks):
        softmax.append(block.attn if i in kept else of_teacher.attn)
        linear.append(of_student.attn if i in kept else block.attn)
    return MeasuredSets(hybrid, softmax, linear, bench.losses)


class RoundTraining(JointTraining):
    """The candidates of a round, which start from `start`; the best one's hybrid is written to
    `folder`/BEST before the round counts as done."""

    def __init__(self, bench: Bench, start: StudentForCausalLM, kept: dict[int, list[int]], folder: Path):
        super().__init__(bench, StoppingRule(), kept, -1, folder)
        self.start = start

    def make_hybrid(self, candidate: int) -> StudentForCausalLM:
        return with_kept_layers(self.start, self.kept[candidate], self.bench.teacher, self.bench.student)

    def train_round(self, mine: list[int], first: int, last: int, bar: tqdm) -> SequenceKLs:
        losses = super().train_round(mine, first, last, bar)
        best = min(losses, key=lambda candidate: sum(losses[candidate]))
        with atomic_directory(self.folder / BEST, replace=True) as folder:
            self.candidates[best].hybrid.save_pretrained(folder)
        return losses


# ------------------------------------------------------------------------ rounds
@dataclass
class Done:
    """A finished round: what it did (add, remove or exchange), the layers that are kept after it,
    the mean objective of each set that it trained, and its cost."""

    action: str
    kept: list[int]
    trained: list[tuple[list[int], float]]
    steps: int
    seconds: float
    tokens: int
    tokens_measured: int
    flops: int


class Rounds:
    """All rounds of a selection, in `folder`, which a stopped one resumes from."""

    def __init__(self, bench: Bench, top_k: int, options: RoundOptions, folder: Path):
        check_joint_training(bench.cfg)
        self.bench = bench
        self.top_k = top_k
        self.options = options
        self.folder = folder
        self.layers = frozenset(bench.layers)
        change = top_k if options.direction == "add" else len(self.layers) - top_k
        self.per_round = options.layers or max(1, change // 4)
        plan = batch_plan(bench.cfg, 1)
        tokens = options.tokens or int(SHARE * len(self.layers) * plan.tokens)
        planned = options.candidates * (-(-change // self.per_round) + EXCHANGES)
        self.steps = min(plan.steps, max(1, tokens // (planned * plan.tokens_per_step)))
        self.history: list[Done] = []

    def settings(self) -> dict:
        """What stored rounds must agree in."""
        return {
            "top_k": self.top_k,
            "direction": self.options.direction,
            "layers_per_round": self.per_round,
            "candidates_per_round": self.options.candidates,
            "steps": self.steps,
        } | self.bench.settings

    def current(self) -> frozenset[int]:
        """The layers that are kept so far."""
        if self.history:
            return frozenset(self.history[-1].kept)
        return frozenset() if self.options.direction == "add" else self.layers

    def hybrid(self) -> StudentForCausalLM:
        """The best hybrid so far, that keeps `current()`."""
        start = self.bench.student
        if self.history:
            folder = self.folder / f"round_{len(self.history)}" / BEST
            start = StudentForCausalLM.from_pretrained(folder, dtype=self.bench.dtype)
        hybrid = with_kept_layers(start, sorted(self.current()), self.bench.teacher, self.bench.student)
        return hybrid.to(self.bench.device).eval()

    def run(self) -> MeasuredSets:
        """Does the rounds that are missing. Returns the sets around the last hybrid. Told to stop by
        a signal, it completes the round and exits with REQUEUE."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", f"--output_dir: {self.folder}"):
            self.load()
            while True:
                hybrid = self.hybrid()
                sets = measured_sets(hybrid, self.bench)
                proposed = self.propose(sets)
                if proposed is None:
                    return sets
                action, candidates = proposed
                self.next_round(action, candidates, hybrid, sets)

    def propose(self, sets: MeasuredSets) -> tuple[str, list[frozenset[int]]] | None:
        """(What the next round does, the sets that it trains, the most promising first), or None at
        the end."""
        kept = self.current()
        count = self.options.candidates
        if len(kept) < self.top_k:
            return "add", [kept | {layer} for layer in list(sets.with_one_more(kept))[:count]]
        if len(kept) > self.top_k:
            return "remove", [kept - {layer} for layer in list(sets.without(kept))[:count]]
        exchanges = [done.kept for done in self.history if done.action == "exchange"]
        before = [done.kept for done in self.history[:-1]]
        if exchanges and sorted(kept) in before:  # the same set again, or one that was left before
            return None
        others = neighbours(sets, kept)[: max(1, count - 1)]
        # The current set trains as long as those that it is compared with.
        return ("exchange", [kept, *others]) if others else None

    def next_round(
        self, action: str, candidates: list[frozenset[int]], start: StudentForCausalLM, sets: MeasuredSets
    ) -> None:
        """Trains the candidates and takes the best. sets: those measured untrained, around `start`."""
        begin = time.perf_counter()
        untrained = [sets.mean(candidate) for candidate in candidates]
        measured = len(sets.known)
        number = len(self.history) + 1
        folder = self.folder / f"round_{number}"
        train = self.bench.cfg.train
        bench = copy.copy(self.bench)  # with the models that are loaded already
        changes = {"max_steps": self.steps, "target_tokens": None, "seed": train.seed + number}
        if self.steps < GRAPH_STEPS:
            changes["cuda_graphs"] = False
        bench.cfg = dataclasses.replace(bench.cfg, train=dataclasses.replace(train, **changes))
        kept = {i: sorted(candidate) for i, candidate in enumerate(candidates)}
        training = RoundTraining(bench, start, kept, folder)
        losses, facts = training.run()
        means = {i: sum(values) / len(values) for i, values in losses.items()}
        order = sorted(means, key=means.__getitem__)
        self.history.append(
            Done(
                action,
                sorted(self.next_set(action, [candidates[i] for i in order])),
                [(kept[i], means[i]) for i in order],
                self.steps,
                round(time.perf_counter() - begin, 3),
                facts["tokens"],
                (measured + len(candidates)) * bench.num_tokens,
                facts["flops"] + measured * self.flops_of_measurement(),
            )
        )
        best = means[order[0]]
        print(f"round {number}: {action}; kept: {self.history[-1].kept}; {bench.unit} {best:.4f}", flush=True)
        if best > untrained[order[0]]:
            print(
                f"Warning: round {number}: training raised the {bench.unit} of {kept[order[0]]}, from "
                f"{untrained[order[0]]:.4f} to {best:.4f}; {self.steps} steps are too few to compare layers by, raise "
                "--search_tokens",
                flush=True,
            )
        self.save()
        if training.received:
            print(f"{training.received}: stopped after round {number}; rerun the command to resume", flush=True)
            sys.exit(REQUEUE)

    def next_set(self, action: str, best_first: list[frozenset[int]]) -> frozenset[int]:
        """The layers that are kept after a round, from the sets that it trained."""
        current = self.current()
        if action == "exchange":
            return best_first[0]
        count = min(self.per_round, abs(self.top_k - len(current)))
        changed = frozenset().union(*(candidate ^ current for candidate in best_first[:count]))
        return current ^ changed

    def flops_of_measurement(self) -> int:
        """Of the GEMMs of one set's measurement."""
        weights = linear_weights(self.bench.student) + linear_weights(self.bench.student.lm_head)
        return 2 * weights * self.bench.num_tokens

    def save(self) -> None:
        content = self.settings() | {"history": [vars(done) for done in self.history]}
        atomic_write_text(self.folder / CONFIG, dump_config(self.bench.cfg))
        atomic_write_text(self.folder / STATE, json.dumps(content, indent=1) + "\n")

    def load(self) -> None:
        """What an earlier process has done. Raises ConfigError if that was another selection."""
        file = self.folder / STATE
        if not file.is_file():
            return
        known = json.loads(file.read_text())
        check_settings(known, self.settings(), f"{self.folder} has rounds of")
        if other := difference(recorded_config(self.folder / CONFIG), self.bench.cfg):
            raise ConfigError(f"--output_dir: {self.folder} has rounds of another config ({other}); name another")
        self.history = [Done(**done) for done in known["history"]]


def rounds(bench: Bench, top_k: int, options: RoundOptions, folder: Path) -> Ranking:
    """What the objective rises by exchanging this layer, in the set found by rounds of GA-S2 given
    the layers that are kept already, with exchange of single layers at the end."""
    training = Rounds(bench, top_k, options, folder / FOLDER)
    sets = training.run()
    history = training.history
    kept = training.current()
    begin = time.perf_counter()
    ranking = rank_around("rounds", f"rise of {bench.unit}", sets, kept)
    facts = {
        "rounds": [{"action": done.action, "kept": done.kept, "objective": done.trained[0][1]} for done in history],
        "steps_per_round": training.steps,
        "tokens": sum(done.tokens for done in history),
        "tokens_measured": sum(done.tokens_measured for done in history) + len(sets.known) * bench.num_tokens,
        "flops": sum(done.flops for done in history) + len(sets.known) * training.flops_of_measurement(),
        "seconds": round(sum(done.seconds for done in history) + time.perf_counter() - begin, 1),
    }
    return dataclasses.replace(ranking, facts=facts)

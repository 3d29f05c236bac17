"""Gates learnt by gradient: which layers keep full attention, in one training of all layers
together.

Every layer's attention is a mixture of its two branches, softmax and linear (those of stage 1),

    y_l = g_l softmax_l(x) + (1 - g_l) linear_l(x),    g_l = sigmoid((a_l + s) / t),

where the shift s makes the gates add up to K at every step. All weights are frozen; the logits a
train on the objective, and the temperature t falls from 1 to FINAL_TEMPERATURE, so that the gates
end near 0 and 1. On the way the K layers of the largest gates are measured as a hybrid, on held-out
sequences. The best of these sets and the last one are improved by exchanging single layers
(layer_sets.py): a mixture of two attentions may do what neither does alone, and misleads the gates.

Architecture logits over frozen weights with aligned linear candidates: DASH, arXiv 2605.20936.
Gates that learn on synthetic retrieval with a pull towards linear attention, cut to the budget:
FlashMorph, arXiv 2606.30562. Here the budget holds throughout, so that no weight of a penalty has
to be chosen.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import ConfigError, dump_config
from runtime.data import model_inputs, read_batch, split_batch
from runtime.files import atomic_write_text, locked
from runtime.guard import REQUEUE, StopSignals
from runtime.run_folder import difference, recorded_config

import torch
from torch import nn
from tqdm import tqdm

from cuda_graphs import GraphedForward
from distill_model.losses import forward_kl
from layer_selection.bench import Bench
from layer_selection.candidate_training import linear_weights, on_device
from layer_selection.layer_sets import MeasuredSets, exchange, rank_around
from layer_selection.objective import check_settings
from layer_selection.ranking import Ranking
from stages import use_cuda_graphs

FOLDER = "gates"  # in --output_dir
STATE = "gates.json"
CONFIG = "gates.yaml"
TOKENS = 12_000_000  # at most, if not told otherwise
CHECKS = 10  # how often the best set so far is measured
FINAL_TEMPERATURE = 0.1
LOGIT_RANGE = 4.0  # the sum of all learning rates: how far a logit can move
BISECTIONS = 40


def budget_gates(logits: torch.Tensor, temperature: torch.Tensor | float, budget: int) -> torch.Tensor:
    """sigmoid((logits + s) / temperature) [L] with the s for which they add up to `budget`.

    The gradient is that of the constrained gates: s moves with the logits. No host-device sync.
    """
    with torch.no_grad():
        margin = 40 * temperature
        low = -logits.max() - margin
        high = -logits.min() + margin
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            too_many = torch.sigmoid((logits + middle) / temperature).sum() > budget
            high = torch.where(too_many, middle, high)
            low = torch.where(too_many, low, middle)
        shift = (low + high) / 2
        gates = torch.sigmoid((logits + shift) / temperature)
        slope = (gates * (1 - gates)).sum().clamp(min=1e-6) / temperature
    # One Newton step on sum(gates) = budget: it hardly changes s, and gives it its gradient.
    excess = torch.sigmoid((logits + shift) / temperature).sum() - budget
    return torch.sigmoid((logits + shift - excess / slope) / temperature)


class GatedAttention(nn.Module):
    """The mixture of two attentions of a layer; its gate is the layer's of `gates`, a list with the
    tensor [L] of this forward pass."""

    def __init__(self, softmax: nn.Module, linear: nn.Module, layer: int, gates: list[torch.Tensor]):
        super().__init__()
        self.softmax = softmax
        self.linear = linear
        self.layer = layer
        self.gates = gates

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None, None]:
        """hidden_states [B, T, hidden_size] -> (the output, of the same shape, None, None)."""
        softmax = self.softmax(hidden_states, **kwargs)[0]
        linear = self.linear(hidden_states, **kwargs)[0]
        gate = self.gates[0][self.layer].to(linear.dtype)
        return torch.lerp(linear, softmax, gate), None, None


class GatedModel(nn.Module):
    """The all-linear student with the teacher's attention beside each of its own; only the gates'
    logits train. top_k: the sum of the gates."""

    def __init__(self, bench: Bench, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.teacher_head = bench.teacher.lm_head.weight
        self.student = bench.student.restore_full_attention(bench.teacher, []).to(bench.device)
        self.student.requires_grad_(False)
        self.student.set_activation_checkpointing(bench.cfg.train.gradient_checkpointing)
        self.gates: list[torch.Tensor] = [torch.empty(0)]
        blocks = self.student.model.layers
        self.linear = [block.attn for block in blocks]
        self.softmax = [block.attn for block in bench.teacher.model.layers]
        for layer, block in enumerate(blocks):
            block.attn = GatedAttention(self.softmax[layer], self.linear[layer], layer, self.gates)
        self.logits = nn.Parameter(torch.zeros(len(blocks), device=bench.device))
        self.register_buffer("temperature", torch.ones((), device=bench.device))

    def forward(
        self,
        input_ids: torch.Tensor,
        token_weights: torch.Tensor,
        teacher_hidden_states: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The objective, sum of token_weights x KL, and the gates [L].

        input_ids, token_weights, document_ids: [B, T]; teacher_hidden_states: [B, T, H], after its final norm;
        max_documents: see `Documents.of`.
        """
        gates = budget_gates(self.logits, self.temperature, self.top_k)
        self.gates[0] = gates
        documents = {"document_ids": document_ids, "max_documents": max_documents}
        hidden = self.student.model(input_ids, use_cache=False, **documents).last_hidden_state
        loss = forward_kl(
            hidden.flatten(0, 1),
            teacher_hidden_states.flatten(0, 1),
            self.student.lm_head.weight,
            self.teacher_head,
            row_weights=token_weights.flatten(),
        )
        return {"loss": loss, "gates": gates}

    @torch.no_grad()
    def largest(self) -> list[int]:
        """The layers of the K largest logits, in order of their index."""
        return sorted(self.logits.topk(self.top_k).indices.tolist())


@dataclass
class Check:
    """The gates after a step, and the objective of the hybrid with the K largest: its mean, and on
    each sequence (None in a check of an earlier version)."""

    step: int
    seconds: float
    gates: list[float]
    kept: list[int]
    objective: float
    losses: list[float] | None = None


class GateTraining:
    """The training of the gates, in `folder`. tokens: how many to train on, or None for the default:
    half of the config's, at most TOKENS.

    The last check is stored with the optimiser's state, and training resumes there.
    """

    def __init__(self, bench: Bench, top_k: int, tokens: int | None, folder: Path):
        if bench.cfg.train.micro_batch_size == "auto":
            raise ConfigError(
                "train.micro_batch_size: auto: train.py measures it for one model; set a number for gates, as "
                "train.micro_batch_size=1 at the end of the command"
            )
        if bench.cfg.teacher_model.outputs:
            raise ConfigError(
                "teacher_model.outputs: gates train on the teacher's whole distributions; remove it for --method gates"
            )
        self.bench = bench
        self.cfg = bench.cfg
        self.folder = folder
        self.plan = batch_plan(bench.cfg, 1)
        self.top_k = top_k
        wanted = min(self.plan.tokens // 2, TOKENS) if tokens is None else tokens
        self.steps = max(1, wanted // self.plan.tokens_per_step)
        self.model = GatedModel(bench, top_k).train()
        self.rate = 2 * LOGIT_RANGE / self.steps  # it falls linearly to 0
        self.optimizer = torch.optim.Adam([self.model.logits], self.rate, (0.9, 0.95))
        self.sets = MeasuredSets(self.model.student, self.model.softmax, self.model.linear, bench.losses)
        self.history: list[Check] = []
        generator = torch.Generator().manual_seed(self.cfg.train.seed)
        rows = len(bench.train)
        epochs = -(-self.steps * self.plan.batch_size // rows)
        self.order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])
        has_documents = bench.has_documents
        graphs = use_cuda_graphs(self.cfg, bench.device.type, 1, bench.student, has_documents=has_documents)
        self.forward, self.teacher_forward = self.model, bench.teacher.model
        if graphs:
            most = bench.max_documents(self.plan.micro_batch_size + 1)  # mixture: as many rows at most
            self.forward = GraphedForward(self.model, max_documents=most)
            self.teacher_forward = GraphedForward(bench.teacher.model, max_documents=most)

    def settings(self) -> dict:
        """What a stored training must agree in."""
        return {"top_k": self.top_k, "steps": self.steps} | self.bench.settings

    def train_step(self, step: int) -> None:
        """The step-th optimiser step, counted from 1."""
        size = self.plan.batch_size
        rows = self.order[(step - 1) * size : step * size].tolist()
        batch = on_device(read_batch(self.bench.train, rows), self.bench.device)
        progress = (step - 1) / self.steps
        self.model.temperature.fill_(FINAL_TEMPERATURE**progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (1 - progress)
        parts = split_batch(batch, self.plan.micro_batch_size)
        for chosen, weights in self.bench.objective.training_rows(parts, str(step)):
            chosen = model_inputs(chosen)
            with torch.no_grad():
                hidden = self.teacher_forward(**chosen, use_cache=False)["last_hidden_state"]
            self.forward(**chosen, token_weights=weights, teacher_hidden_states=hidden)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> list[Check]:
        """Trains what is missing; the history. Told to stop by a signal, it saves at the next check
        and exits with REQUEUE. Raises ConfigError if the folder has another training, or the
        logits are not finite."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", f"--output_dir: {self.folder}"):
            self.load()
            done = self.history[-1].step if self.history else 0
            checks = {self.steps * (i + 1) // CHECKS for i in range(CHECKS)} - {0}
            before = sum(check.seconds for check in self.history)
            begin = time.perf_counter()
            bar = tqdm(total=self.steps, initial=done, desc="gates", unit="step")
            with StopSignals(to_the_end=False) as stop, bar:
                stop.saving = True
                for step in range(done + 1, self.steps + 1):
                    self.train_step(step)
                    bar.update()
                    if step not in checks:
                        continue
                    spent = sum(check.seconds for check in self.history) - before
                    self.check(step, time.perf_counter() - begin - spent, bar)
                    if stop.received and step < self.steps:
                        print(f"{stop.received}: stopped after step {step}; rerun the command to resume", flush=True)
                        sys.exit(REQUEUE)
        return self.history

    def check(self, step: int, seconds: float, bar: tqdm) -> None:
        """Measures the hybrid of the K largest gates, and saves."""
        if not self.model.logits.isfinite().all():
            raise ConfigError(f"gates: the loss is not finite before step {step}; try train.dtype=fp32")
        with torch.no_grad():
            gates = budget_gates(self.model.logits, self.model.temperature, self.top_k)
        kept = self.model.largest()
        found = self.sets.mean(kept)
        rounded = [round(gate, 4) for gate in gates.tolist()]
        self.history.append(Check(step, round(seconds, 3), rounded, kept, found, self.sets.losses(kept)))
        bar.set_postfix({"kept": ",".join(map(str, kept)), self.bench.objective_name: f"{found:.4f}"})
        self.save()

    def save(self) -> None:
        state = self.optimizer.state[self.model.logits]
        tensors = {"logits": self.model.logits.detach(), **{name: state[name] for name in ("exp_avg", "exp_avg_sq")}}
        content = self.settings() | {
            "state": {name: tensor.tolist() for name, tensor in tensors.items()},
            "history": [vars(check) for check in self.history],
        }
        atomic_write_text(self.folder / CONFIG, dump_config(self.cfg))
        atomic_write_text(self.folder / STATE, json.dumps(content) + "\n")

    def load(self) -> None:
        """What an earlier process has done. Raises ConfigError if that was another training."""
        file = self.folder / STATE
        if not file.is_file():
            return
        known = json.loads(file.read_text())
        check_settings(known, self.settings(), f"{self.folder} has gates of")
        if other := difference(recorded_config(self.folder / CONFIG), self.cfg):
            raise ConfigError(f"--output_dir: {self.folder} has gates of another config ({other}); name another")
        self.history = [Check(**check) for check in known["history"]]
        # The ranking's ties and the cost are those of all sets that were measured.
        self.sets.known = {frozenset(check.kept): check.losses for check in self.history if check.losses}
        tensors = {name: torch.tensor(values, device=self.bench.device) for name, values in known["state"].items()}
        with torch.no_grad():
            self.model.logits.copy_(tensors.pop("logits"))
        self.optimizer.state[self.model.logits] = {"step": torch.tensor(float(self.history[-1].step)), **tensors}

    def flops(self) -> int:
        """Of the GEMMs, measurements included. Per token and weight: 2 in a forward pass of teacher,
        student or softmax branch; 2 more for the gradients of activations (weights have none)."""
        teacher, student, head = (
            linear_weights(m) for m in (self.bench.teacher, self.bench.student, self.model.student.lm_head)
        )
        both = student + sum(map(linear_weights, self.model.softmax))
        trained = self.steps * self.plan.tokens_per_step * (2 * teacher + 4 * both)
        return trained + len(self.sets.known) * self.bench.num_tokens * 2 * (student + head)


def gates(bench: Bench, top_k: int, tokens: int | None, folder: Path) -> Ranking:
    """What the objective rises by exchanging this layer, in the set found by gates of all layers that
    train together (arXiv 2605.20936, arXiv 2606.30562) and by exchange of single layers."""
    training = GateTraining(bench, top_k, tokens, folder / FOLDER)
    history = training.run()
    begin = time.perf_counter()
    best = min(history, key=lambda check: check.objective)
    found = [exchange(training.sets, kept) for kept in (best.kept, history[-1].kept)]
    kept = min(found, key=training.sets.mean)
    ranking = rank_around("gates", f"rise of {bench.unit}", training.sets, kept)
    facts = {  # the cost is that of the ranking too
        "learnt": history[-1].kept,
        "gates": history[-1].gates,
        "objective": training.sets.mean(kept),
        "tokens": training.steps * training.plan.tokens_per_step,
        "tokens_measured": len(training.sets.known) * bench.num_tokens,
        "flops": training.flops(),
        "seconds": round(sum(check.seconds for check in history) + time.perf_counter() - begin, 1),
    }
    return dataclasses.replace(ranking, facts=facts)

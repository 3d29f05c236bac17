"""GA-S2's candidates trained jointly on one teacher, until their ranking has converged.

Every candidate is a stage 2 of the config, with its batches, schedule and optimiser. All take the
same steps in turn: the teacher reads each batch once for all of them. After every round each
candidate is measured on the held-out sequences, and a `StoppingRule` decides which of them continue training
(GA-S2's ranking is stable after a quarter to two fifths of its steps: arXiv 2512.20569).

Where the candidates do not all fit into the GPU, idle ones are offloaded to CPU memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.batch_plan import BatchPlan, batch_plan
from runtime.config import Config, ConfigError, dump_config
from runtime.data import DOCUMENT_IDS, INPUT_IDS, LOSS_MASK, model_inputs, read_batch, split_batch
from runtime.files import atomic_directory, atomic_write_text, locked
from runtime.guard import REQUEUE, StopSignals
from runtime.run_folder import difference, recorded_config

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cuda_graphs import GraphedForward
from distill_model import StudentForCausalLM
from distill_model.documents import learned_tokens, predicting_learned
from distill_model.losses import micro_batch_weights
from layer_selection.bench import Bench
from layer_selection.objective import check_settings
from layer_selection.options import TrainingOptions
from layer_selection.ranking import Layer, Ranking, rank_samples
from layer_selection.stage2_runs import train_hybrid
from layer_selection.stopping_rule import StoppingRule
from optim import freeze_parts, get_scheduler, parameter_groups
from stages import distillation_loss, training_rows, use_cuda_graphs

FOLDER = "side_by_side"  # in --output_dir; its name is part of the stored format
HISTORY = "rounds.json"
CONFIG = "candidates.yaml"
STATES = "states"
TEACHER_CACHE_BYTES = 2 << 30  # of the teacher's hidden states that are held at a time
# Of a candidate in bf16: weight, gradient, and AdamW's three tensors in fp32. In fp32, which needs
# no copy, as many.
BYTES_PER_PARAMETER = 16
CPU = torch.device("cpu")
HIDDEN = "teacher_hidden_states"

# The inputs of each micro-batch by name: the chunks, see `runtime.data.collate`, and the teacher's
# hidden states [B, T, H] or its stored outputs.
MicroBatches = list[dict[str, torch.Tensor]]
# Layer -> its candidate's objective, by default KL(teacher || candidate), on each held-out sequence.
SequenceKLs = dict[int, list[float]]


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def master_of(param: nn.Parameter) -> torch.Tensor:
    """An fp32 copy of a parameter, or the parameter itself if it is fp32."""
    return param if param.dtype == torch.float32 else param.detach().float()


class MasterAdamW:
    """AdamW on fp32 master copies of parameters that are not fp32, as in DeepSpeed; of parameters on
    a GPU in fused kernels.

    groups: torch's, of params, lr and weight_decay. make_scheduler(optimiser) returns the schedule.
    """

    def __init__(
        self,
        groups: list[dict],
        betas: tuple[float, float],
        max_grad_norm: float,
        make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    ):
        self.params = [p for group in groups for p in group["params"]]
        self.max_grad_norm = max_grad_norm
        self.masters: list[torch.Tensor] = []
        master_groups = []
        for group in groups:
            masters = [master_of(param) for param in group["params"]]
            master_groups.append(group | {"params": masters})
            self.masters += masters
        self.fused = all(master.is_cuda for master in self.masters)
        self.adamw = torch.optim.AdamW(master_groups, betas=betas, fused=self.fused or None)
        self.scheduler = make_scheduler(self.adamw)

        self.copied = []  # parameters that have a master copy
        self.copies = []
        for param, master in zip(self.params, self.masters):
            if param is not master:
                self.copied.append(param)
                self.copies.append(master)

    @torch.no_grad()
    def step(self) -> None:
        if self.copies:
            gradients = [torch.empty_like(master) for master in self.copies]
            torch._foreach_copy_(gradients, [param.grad for param in self.copied])
            for param, master, gradient in zip(self.copied, self.copies, gradients):
                param.grad = None
                master.grad = gradient
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        self.scheduler.step()
        if self.copies:
            torch._foreach_copy_(self.copied, self.copies)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name, except the schedule's step; only after at least one step."""
        found = {}
        for i, master in enumerate(self.masters):
            state = self.adamw.state[master]
            found[f"{i}.master"] = master
            found[f"{i}.exp_avg"] = state["exp_avg"]
            found[f"{i}.exp_avg_sq"] = state["exp_avg_sq"]
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Restores what `tensors()` returned after `steps` steps."""
        for i, (param, master) in enumerate(zip(self.params, self.masters)):
            master.copy_(tensors[f"{i}.master"])
            self.adamw.state[master] = {
                # The fused kernels read it on the GPU, the others on the CPU.
                "step": torch.tensor(float(steps), device=master.device if self.fused else CPU),
                "exp_avg": tensors[f"{i}.exp_avg"].to(master.device),
                "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(master.device),
            }
            if param is not master:
                param.copy_(master)
        for _ in range(steps):
            self.scheduler.step()

    @torch.no_grad()
    def to(self, device: torch.device) -> None:
        for param, master in zip(self.params, self.masters):
            if param is not master:
                master.data = master.data.to(device)
            state = self.adamw.state.get(master, {})
            for name, value in state.items():
                if name != "step" or self.fused:
                    state[name] = value.to(device)


class Candidate:
    """A hybrid in the middle of its stage 2. cuda_graphs: replay its forward and backward passes as
    CUDA graphs; it must then stay on its GPU. optimizer: `MasterAdamW` or a subclass. max_documents:
    the most documents of a micro-batch, for graphs, if it has any."""

    def __init__(
        self,
        name: str,
        hybrid: StudentForCausalLM,
        cfg: Config,
        plan: BatchPlan,
        cuda_graphs: bool = False,
        optimizer: type[MasterAdamW] = MasterAdamW,
        max_documents: int | None = None,
    ):
        self.name = name
        self.cfg = cfg
        self.hybrid = hybrid.train()
        self.losses: dict[int, torch.Tensor] = {}  # step -> loss, since they were last checked
        hybrid.set_activation_checkpointing(cfg.train.gradient_checkpointing)
        freeze_parts(hybrid, cfg)
        self.forward = GraphedForward(hybrid, max_documents=max_documents) if cuda_graphs else hybrid
        groups = [
            {"params": group.params, "lr": group.lr, "weight_decay": group.weight_decay}
            for group in parameter_groups(hybrid, cfg)
        ]
        self.optimizer = optimizer(
            groups,
            tuple(cfg.train.betas),
            cfg.train.max_grad_norm,
            lambda optimizer: get_scheduler(optimizer, cfg, plan),
        )

    def to(self, device: torch.device) -> None:
        if self.hybrid.device != device:
            self.hybrid.to(device)  # parameters stay the same objects
            self.optimizer.to(device)

    def train(self, step: int, micro_batches: MicroBatches, head_weight: torch.Tensor) -> None:
        """One optimiser step. head_weight: the teacher's, [V, H]. Whether the loss was finite is
        left to `check_losses`: to check it here would be a host-device sync in every step."""
        train = self.cfg.train
        weights = distillation_loss(self.cfg)
        device = self.hybrid.device
        losses = []
        learned = [learned_tokens(inputs.get(LOSS_MASK), inputs.get(DOCUMENT_IDS)) for inputs in micro_batches]
        masks = [None if mask is None else predicting_learned(mask) for mask in learned]
        for inputs, weight in zip(micro_batches, micro_batch_weights(masks, device)):
            inputs = on_device(inputs, device)
            if HIDDEN in inputs:
                inputs["teacher_head_weight"] = head_weight
            loss = self.forward(
                **inputs,
                labels=inputs[INPUT_IDS] if train.ce_weight else None,
                use_cache=False,
                distillation=weights,
            )["loss"]
            loss = loss * weight
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        self.losses[step] = torch.stack(losses).mean()
        self.optimizer.step()

    def check_losses(self) -> None:
        """Raises ConfigError if a loss since the last check was not finite."""
        finite = torch.stack([*self.losses.values()]).isfinite().tolist()
        if not all(finite):
            step = list(self.losses)[finite.index(False)]
            raise ConfigError(
                f"{self.name}: its loss is not finite at step {step}; try a lower train.lr or train.lr_attn"
            )
        self.losses.clear()


def check_joint_training(cfg: Config) -> None:
    """Raises ConfigError unless candidates can train jointly with the config's settings."""
    if cfg.train.micro_batch_size == "auto":
        raise ConfigError(
            "train.micro_batch_size: auto: train.py measures it for one model; set a number for candidates that "
            "train jointly, as train.micro_batch_size=1 at the end of the command, or take --full_runs"
        )
    if cfg.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer: {cfg.train.optimizer}: candidates train jointly with adamw only; "
            "set that, or take --full_runs"
        )


@dataclass
class Round:
    """What a round left in the history: the step at its end, its seconds, and the KLs of the
    candidates that were in it."""

    step: int
    seconds: float
    kl: SequenceKLs

    def means(self) -> dict[int, float]:
        return {layer: sum(kls) / len(kls) for layer, kls in self.kl.items()}


class JointTraining:
    """The candidates of one selection, trained round after round.

    kept: layer -> the layers that its hybrid keeps. sign: of the importance, -1 for -KL. The
    history is stored in `folder`, and a stopped training resumes from its last saved round.
    """

    def __init__(self, bench: Bench, rule: StoppingRule, kept: dict[int, list[int]], sign: int, folder: Path):
        check_joint_training(bench.cfg)
        self.bench = bench
        self.rule = rule
        self.kept = kept
        self.sign = sign
        self.folder = folder
        self.cfg = bench.cfg
        self.plan = batch_plan(bench.cfg, 1)
        self.num_rounds = min(rule.rounds, self.plan.steps)
        self.history: list[Round] = []
        self.ended = False  # whether training was over for the process that wrote the history
        self.received: str | None = None  # the signal that told the training to stop
        self.candidates: dict[int, Candidate] = {}
        self.order = self.draw_order(len(bench.train))
        self.rows = training_rows(bench.cfg, bench.train)

    def draw_order(self, rows: int) -> torch.Tensor:
        """The row of the training data that each sequence is, epoch after epoch."""
        generator = torch.Generator().manual_seed(self.cfg.train.seed)
        epochs = -(-self.plan.steps * self.plan.batch_size // rows)
        return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])

    def scores(self, entry: Round) -> dict[int, float]:
        """Importance of each candidate."""
        return {layer: self.sign * mean for layer, mean in entry.means().items()}

    def importance(self, kls: SequenceKLs) -> dict[int, list[float]]:
        """Of each candidate on each sequence."""
        return {layer: [self.sign * kl for kl in values] for layer, values in kls.items()}

    def last_step(self, done: int) -> int:
        """The step that round `done` ends with."""
        return self.plan.steps * done // self.num_rounds

    def alive(self) -> list[int]:
        """The candidates of the next round."""
        if not self.history:
            return sorted(self.kept)
        return self.rule.survivors(self.scores(self.history[-1]), len(self.history))

    def over(self) -> bool:
        """Whether all rounds are done or the ranking has converged."""
        if len(self.history) == self.num_rounds:
            return True
        return self.rule.has_converged([self.importance(entry.kl) for entry in self.history])

    # ---- batches
    def batches(self, first: int, last: int) -> Iterator[tuple[int, MicroBatches]]:
        """(step, its micro-batches) of steps first + 1 to last."""
        size = self.plan.batch_size
        for step in range(first, last):
            rows = self.order[step * size : (step + 1) * size].tolist()
            batch = on_device(read_batch(self.rows, rows), self.bench.device)
            parts = split_batch(batch, self.plan.micro_batch_size)
            if not self.cfg.teacher_model.outputs:
                parts = [part | {HIDDEN: self.teacher_hidden_states(part)} for part in parts]
            yield step + 1, parts

    @torch.no_grad()
    def teacher_hidden_states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.teacher_forward(**model_inputs(batch), use_cache=False)["last_hidden_state"]

    # ---- candidates
    def make_hybrid(self, layer: int) -> StudentForCausalLM:
        """What the layer's candidate starts from."""
        return self.bench.student.restore_full_attention(self.bench.teacher, self.kept[layer])

    def build(self, mine: list[int], done: int) -> None:
        """Builds the candidates of these layers as they were after round `done`. Raises ConfigError
        if they need more memory than there is."""
        teacher = self.bench.teacher
        student = self.bench.student
        self.resident = self.check_memory(len(mine))
        has_documents = self.bench.has_documents
        device = self.bench.device.type
        graphs = self.resident and use_cuda_graphs(self.cfg, device, 1, student, has_documents=has_documents)
        most = self.bench.max_documents(self.plan.micro_batch_size)
        self.teacher_forward = GraphedForward(teacher.model, max_documents=most) if graphs else teacher.model
        home = self.bench.device if self.resident else CPU
        for layer in mine:
            torch.manual_seed(self.cfg.train.seed)
            hybrid = self.make_hybrid(layer).to(home)  # before its optimiser, which is fused on a GPU
            candidate = Candidate(f"layer {layer}", hybrid, self.cfg, self.plan, graphs, max_documents=most)
            if done:
                state = load_file(self.saved(done) / f"{layer}.safetensors")
                candidate.optimizer.load(state, self.last_step(done))
            self.candidates[layer] = candidate

    def check_memory(self, count: int) -> bool:
        """Whether `count` candidates can all stay on the device. Raises ConfigError if CPU memory
        does not hold them either."""
        parameters = sum(p.numel() for p in self.bench.student.parameters())
        need = BYTES_PER_PARAMETER * parameters * count
        on_gpu = self.bench.device.type == "cuda"
        resident = not on_gpu or need < 0.6 * torch.cuda.mem_get_info()[0]
        free = psutil.virtual_memory().available
        if need > 0.9 * free and not (on_gpu and resident):
            raise ConfigError(
                f"--method: {count} jointly trained candidates need {need / 2**30:.0f} GiB of "
                f"memory, of which {free / 2**30:.0f} are free; take a larger machine, or "
                "--full_runs"
            )
        return resident

    def saved(self, done: int) -> Path:
        """The folder with the states after round `done`."""
        return self.folder / STATES / f"round_{done}"

    def save(self) -> None:
        """Writes the states after the last round; older ones are removed once these are
        complete."""
        done = len(self.history)
        self.saved(done).parent.mkdir(exist_ok=True)
        with atomic_directory(self.saved(done), replace=True) as folder:
            for layer, candidate in self.candidates.items():
                state = candidate.optimizer.tensors()
                state = {name: tensor.contiguous() for name, tensor in state.items()}
                save_file(state, folder / f"{layer}.safetensors")
        for old in range(1, done):
            shutil.rmtree(self.saved(old), ignore_errors=True)

    # ---- the loop
    def train_round(self, mine: list[int], first: int, last: int, bar: tqdm) -> SequenceKLs:
        """Trains these candidates by steps first + 1 to last and measures them."""
        if self.resident:
            self.train_resident(mine, first, last, bar)
        else:
            self.train_offloaded(mine, first, last, bar)
        return {layer: self.measure(self.candidates[layer]) for layer in mine}

    def train_resident(self, mine: list[int], first: int, last: int, bar: tqdm) -> None:
        """Batch by batch: all candidates are on the device."""
        head = self.bench.teacher.lm_head.weight
        for step, micro_batches in self.batches(first, last):
            for layer in mine:
                self.candidates[layer].train(step, micro_batches, head)
                bar.update()

    def train_offloaded(self, mine: list[int], first: int, last: int, bar: tqdm) -> None:
        """Candidate by candidate, over as many steps as TEACHER_CACHE_BYTES of the teacher's hidden
        states."""
        teacher = self.bench.teacher
        head = teacher.lm_head.weight
        bytes_per_token = teacher.config.hidden_size * teacher.dtype.itemsize
        bytes_per_step = self.plan.tokens_per_step * bytes_per_token
        segment = max(1, TEACHER_CACHE_BYTES // bytes_per_step)
        for start in range(first, last, segment):
            cached = []
            for step, micro_batches in self.batches(start, min(last, start + segment)):
                cached.append((step, [on_device(inputs, CPU) for inputs in micro_batches]))
            for layer in mine:
                candidate = self.candidates[layer]
                candidate.to(self.bench.device)
                for step, micro_batches in cached:
                    candidate.train(step, micro_batches, head)
                    bar.update()
                candidate.to(CPU)

    def measure(self, candidate: Candidate) -> list[float]:
        """The objective on each held-out sequence. Raises ConfigError if a loss of its training was not
        finite."""
        candidate.check_losses()
        candidate.to(self.bench.device)
        kls = self.bench.losses(candidate.hybrid.eval())
        candidate.hybrid.train()
        candidate.to(self.bench.device if self.resident else CPU)
        return kls

    def run(self) -> tuple[SequenceKLs, dict]:
        """Trains what is missing. Returns the KLs of every candidate's last round, and facts of the
        training: steps, how many candidates, which of them stopped earlier and when, and the share of
        their full runs' compute that it took."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", f"--output_dir: {self.folder}"):
            self.open_history()
            if not self.over():
                self.resume()
            shutil.rmtree(self.folder / STATES, ignore_errors=True)
        last = {layer: entry for entry in self.history for layer in entry.kl}
        end = self.history[-1].step
        facts = {
            "steps": end,
            "of_steps": self.plan.steps,
            "candidates": len(self.kept),
            "stopped": {layer: entry.step for layer, entry in last.items() if entry.step < end},
            "share_of_full_runs": self.compute_share(),
            "flops": self.spent_flops(),
            "tokens": self.trained_tokens(),
            "seconds": round(sum(entry.seconds for entry in self.history), 1),
        }
        return {layer: entry.kl[layer] for layer, entry in last.items()}, facts

    def open_history(self) -> None:
        """Reads what an earlier process has done. Raises ConfigError if that was another
        selection."""
        config = self.folder / CONFIG
        file = self.folder / HISTORY
        if file.is_file() and (other := difference(recorded_config(config), self.cfg)):
            raise ConfigError(
                f"{self.folder} has candidates of another config ({other}); name another --output_dir or remove it"
            )
        atomic_write_text(config, dump_config(self.cfg))
        if not file.is_file():
            return
        known = json.loads(file.read_text())
        self.check_history(known, file)
        self.ended = known["over"]
        self.history = []
        for entry in known["history"]:
            kls = {int(layer): values for layer, values in entry["kl"].items()}
            self.history.append(Round(entry["step"], entry["seconds"], kls))

    def check_history(self, known: dict, file: Path) -> None:
        """Raises ConfigError if a stored history is of an older version or of another selection."""
        if missing := {"rounds", "kept", "over", "history"} - set(known):
            raise ConfigError(
                f"--output_dir: {file} is of an older version, without "
                f"{', '.join(sorted(missing))}; remove that folder or name another --output_dir"
            )
        kept = {str(layer): layers for layer, layers in self.kept.items()}
        if known["rounds"] != self.num_rounds or known["kept"] != kept:
            raise ConfigError(
                f"--output_dir: {self.folder} has other candidates or --rounds {known['rounds']}; name another"
            )
        objective = known.get("objective", "kl")
        if objective != self.bench.objective_name:
            raise ConfigError(
                f"--objective: {self.folder} was measured by {objective}, not {self.bench.objective_name}; "
                "set that, or name another --output_dir"
            )
        measured = len(next(iter(known["history"][0]["kl"].values())))
        if measured != self.bench.num_sequences:
            raise ConfigError(
                f"--sequences: {self.folder} was measured on {measured} sequences, not "
                f"{self.bench.num_sequences}; set that number, or name another --output_dir"
            )
        check_settings(known, self.bench.settings, f"{self.folder} was measured with")

    def write_history(self) -> None:
        known = {
            "rounds": self.num_rounds,
            "kept": self.kept,
            "over": self.over(),
            **self.bench.settings,
            "history": [vars(entry) for entry in self.history],
        }
        atomic_write_text(self.folder / HISTORY, json.dumps(known))

    def resume(self) -> None:
        """Trains from the last saved round. Raises ConfigError if training had ended by another
        rule: its states are gone."""
        if self.ended:
            rule = self.rule
            raise ConfigError(
                f"--output_dir: {self.folder} has candidates whose training ended after round "
                f"{len(self.history)} of {self.num_rounds}, before their ranking converged for "
                f"--top-k {rule.top_k}, --window {rule.window} and --correlation "
                f"{rule.correlation}; --window 1 ranks what is there, another --output_dir trains "
                "from the start"
            )
        saved = [done for done in range(1, len(self.history) + 1) if self.saved(done).is_dir()]
        self.history = self.history[: max(saved, default=0)]
        self.train()

    def train(self) -> None:
        """Round after round. Told to stop by a signal, it completes the round, saves, and exits
        with REQUEUE."""
        done = len(self.history)
        saved_at = time.monotonic()
        self.build(self.alive(), done)
        bar = tqdm(
            total=self.plan.steps * len(self.kept),
            desc="candidates' steps, at most",
            unit="step",
            initial=self.last_step(done) * len(self.kept),
        )
        with StopSignals(to_the_end=False) as stop, bar:
            stop.saving = True
            while not self.over():
                self.next_round(bar)
                minutes = self.cfg.train.save_minutes
                save_is_due = minutes is not None and time.monotonic() - saved_at > 60 * minutes
                if stop.received or save_is_due:
                    self.save()
                    saved_at = time.monotonic()
                self.received = stop.received
                if stop.received and not self.over():
                    after = f"stopped after round {len(self.history)}"
                    print(f"{stop.received}: {after}; rerun the command to resume", flush=True)
                    sys.exit(REQUEUE)

    def next_round(self, bar: tqdm) -> None:
        """Trains and measures one round and writes it into the history."""
        begin = time.perf_counter()
        alive = self.alive()
        done = len(self.history)
        for layer in self.candidates.keys() - set(alive):
            del self.candidates[layer]
        kls = self.train_round(alive, self.last_step(done), self.last_step(done + 1), bar)
        seconds = round(time.perf_counter() - begin, 3)
        self.history.append(Round(self.last_step(done + 1), seconds, kls))
        self.write_history()
        scores = self.scores(self.history[-1])
        best = sorted(scores, key=lambda layer: -scores[layer])[: self.rule.top_k]
        bar.set_postfix({"best": ",".join(map(str, sorted(best))), "training": len(alive)})

    def compute_share(self) -> float:
        """FLOPs over those of a full run for every candidate, evaluations included."""
        teacher = linear_weights(self.bench.teacher)
        student = linear_weights(self.bench.student)
        return self.spent_flops() / (self.plan.tokens * (2 * teacher + 6 * student) * len(self.kept))

    def trained_tokens(self) -> int:
        """Of all candidates together."""
        starts = [0, *(entry.step for entry in self.history)]
        steps = [(entry.step - start) * len(entry.kl) for start, entry in zip(starts, self.history)]
        return sum(steps) * self.plan.tokens_per_step

    def spent_flops(self) -> int:
        """FLOPs of the GEMMs, evaluations included.

        Per token and weight: 2 in a forward pass of teacher or student, 6 in a training step.
        """
        teacher = linear_weights(self.bench.teacher)
        student = linear_weights(self.bench.student)
        head = linear_weights(self.bench.teacher.lm_head)
        heldout_tokens = self.bench.num_tokens
        spent = 0
        before = 0
        for entry in self.history:
            tokens = (entry.step - before) * self.plan.tokens_per_step
            spent += tokens * (2 * teacher + 6 * student * len(entry.kl))
            spent += heldout_tokens * 2 * (student + head) * len(entry.kl)
            before = entry.step
        return spent


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers, biases not counted."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


# ------------------------------------------------------------------------ selection
def trained_hybrids(
    bench: Bench, options: TrainingOptions, kept: dict[int, list[int]], sign: int
) -> tuple[SequenceKLs, dict] | None:
    """The held-out KLs of every layer's hybrid after stage 2, and facts of the training.

    Jointly, or where full runs are wanted or the folder has some, by train.py in layer_<N>/. None
    where `candidate` was trained alone. Raises ConfigError for successive halving of full runs.
    """
    folders = {layer: options.output_dir / f"layer_{layer}" for layer in kept}
    has_full_runs = any(map(Path.is_dir, folders.values()))
    if not (options.full_runs or options.candidate is not None or has_full_runs):
        return JointTraining(bench, options.rule, kept, sign, options.output_dir / FOLDER).run()
    if options.rule.halving:
        raise ConfigError(
            "--halving: full runs are trained to the end; leave it out, or name an --output_dir "
            "without layer_<N> folders"
        )
    mine = kept if options.candidate is None else [options.candidate]
    kls = {}
    for layer in tqdm(mine, desc="candidates", unit="layer"):
        kls[layer] = train_hybrid(bench, options.launcher, kept[layer], folders[layer])
    return (kls, {}) if options.candidate is None else None


def rank_hybrids(method: str, unit: str, importance: dict[int, list[float]], facts: dict) -> Ranking:
    """By importance on each held-out sequence. Those that halving stopped come last, later ones
    first, without intervals, because they trained on fewer tokens."""
    stopped = facts.get("stopped", {})
    finished = {layer: values for layer, values in importance.items() if layer not in stopped}
    ranking = rank_samples(method, unit, finished, **facts)
    means = {layer: sum(values) / len(values) for layer, values in importance.items()}
    order = sorted(stopped, key=lambda layer: (-stopped[layer], -means[layer]))
    layers = ranking.layers + [Layer(layer, means[layer]) for layer in order]
    return replace(ranking, layers=layers, samples=importance)


def negated(kls: SequenceKLs) -> SequenceKLs:
    """-KL on each sequence, as importance: more is better."""
    return {layer: [-kl for kl in values] for layer, values in kls.items()}


def ga_s2(bench: Bench, options: TrainingOptions) -> Ranking | None:
    """Greedy addition at stage 2 (arXiv 2512.20569): -KL(teacher || student) after stage 2 in which
    only this layer is full attention.

    None where `options.candidate` was trained alone."""
    trained = trained_hybrids(bench, options, {layer: [layer] for layer in bench.layers}, sign=-1)
    if trained is None:
        return None
    kls, facts = trained
    return rank_hybrids("ga_s2", f"-{bench.unit}", negated(kls), facts)

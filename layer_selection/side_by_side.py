"""Hybrids trained side by side on one teacher, until their order has settled: GA-S2 for a fraction of its full runs.

Every candidate is a stage 2 of the config, with its batches, schedule and optimiser, of which all take the same steps in
turn: the teacher reads a batch once for all of them. After every round each is measured on the held-out sequences. Training
ends when, over a window of rounds, the best K were the same up to ties and the order of all hardly changed (that of GA-S2 is stable
after a quarter to two fifths of its steps: arXiv 2512.20569). With successive halving (arXiv 1502.07943), the worse
half of the candidates ends after rounds 2, 4, 8 ...

Where the candidates do not all fit into the GPU, those not at work wait in the machine's memory.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runtime.batch_plan import BatchPlan, batch_plan
from runtime.config import Config, ConfigError, dump_config, load_config
from runtime.files import atomic_directory, atomic_write_text, locked
from runtime.guard import REQUEUE, StopSignals
from runtime.run_folder import difference

import numpy
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cuda_graphs import GraphedForward
from distill_model import DistillationLoss, StudentForCausalLM
from layer_selection.full_runs import train_hybrid
from layer_selection.ranking import Layer, Ranking, rank_samples
from optim import get_scheduler, parameter_groups
from stages import use_cuda_graphs

HISTORY, CONFIG, STATES = "rounds.json", "candidates.yaml", "states"
CACHE_BYTES = 2 << 30  # of the teacher's hidden states that are held at a time
BYTES_A_PARAMETER = (
    16  # of a candidate in bf16: weight, gradient, and AdamW's three in fp32; in fp32 as well, without a copy
)


class MasterAdamW:
    """AdamW on fp32 copies of parameters that are not fp32, as DeepSpeed keeps them.

    groups: torch's, of params, lr and weight_decay. make_scheduler(optimiser) gives the schedule.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], max_grad_norm: float, make_scheduler):
        self.params = [p for group in groups for p in group["params"]]
        self.max_grad_norm = max_grad_norm
        copies = [[p if p.dtype == torch.float32 else p.detach().float() for p in group["params"]] for group in groups]
        self.masters = [m for group in copies for m in group]
        self.adamw = torch.optim.AdamW([group | {"params": m} for group, m in zip(groups, copies)], betas=betas)
        self.scheduler = make_scheduler(self.adamw)

        copied = [(param, master) for param, master in zip(self.params, self.masters) if param is not master]
        self.copied, self.copies = [param for param, _ in copied], [master for _, master in copied]

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
        """Everything but the schedule's step, by name; after at least one step."""
        found = {}
        for i, master in enumerate(self.masters):
            state = self.adamw.state[master]
            found |= {
                f"{i}.master": master,
                f"{i}.exp_avg": state["exp_avg"],
                f"{i}.exp_avg_sq": state["exp_avg_sq"],
            }
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Goes on behind `steps` steps from what `tensors()` gave."""
        for i, (param, master) in enumerate(zip(self.params, self.masters)):
            master.copy_(tensors[f"{i}.master"])
            self.adamw.state[master] = {
                "step": torch.tensor(float(steps)),
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
            for name, value in self.adamw.state.get(master, {}).items():
                if name != "step":
                    self.adamw.state[master][name] = value.to(device)


class Candidate:
    """A hybrid in the middle of its stage 2. cuda_graphs: replay its passes as CUDA graphs; it must
    stay on its GPU then."""

    def __init__(
        self,
        name: str,
        hybrid: StudentForCausalLM,
        cfg: Config,
        plan: BatchPlan,
        cuda_graphs: bool = False,
    ):
        self.name, self.cfg, self.plan, self.hybrid = name, cfg, plan, hybrid.train()
        self.forward = GraphedForward(hybrid) if cuda_graphs else hybrid
        self.losses: dict[int, torch.Tensor] = {}  # of the steps since they were last checked
        hybrid.set_activation_checkpointing(cfg.train.gradient_checkpointing)
        groups = [
            {"params": g.params, "lr": g.lr, "weight_decay": g.weight_decay} for g in parameter_groups(hybrid, cfg)
        ]
        self.optimizer = MasterAdamW(
            groups,
            tuple(cfg.train.betas),
            cfg.train.max_grad_norm,
            lambda optimizer: get_scheduler(optimizer, cfg, plan),
        )

    def to(self, device: torch.device) -> None:
        if self.hybrid.device != device:
            self.hybrid.to(device)  # parameters stay the same objects
            self.optimizer.to(device)

    def train(
        self,
        step: int,
        micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
        head_weight: torch.Tensor,
    ) -> None:
        """One step on micro-batches of token ids and the teacher's hidden states. `check_losses`
        tells whether it went well: to ask after every step would make the GPU wait."""
        train, device = self.cfg.train, self.hybrid.device
        losses = []
        for ids, hidden in micro_batches:
            ids = ids.to(device)
            loss = self.forward(
                input_ids=ids,
                labels=ids if train.ce_weight else None,
                teacher_hidden_states=hidden.to(device),
                teacher_head_weight=head_weight,
                distillation=DistillationLoss(train.kl_temperature, train.kl_weight, train.ce_weight),
                use_cache=False,
            )["loss"]
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


# ------------------------------------------------------------------------------------------------ when to stop
def rank_correlation(a: dict[int, float], b: dict[int, float]) -> float:
    """Spearman's, over the keys of both."""
    keys = sorted(set(a) & set(b))
    ranks = [numpy.argsort(numpy.argsort([values[key] for key in keys])) for values in (a, b)]
    return float(numpy.corrcoef(*ranks)[0, 1]) if len(keys) > 1 else 1.0


def order_after(rounds: list[dict[int, float]]) -> dict[int, int]:
    """-place of every layer by its score in the last of `rounds`; those that stopped come behind,
    the later ones first."""
    order: list[int] = []
    for scores in reversed(rounds):
        order += sorted(scores.keys() - set(order), key=lambda layer: (-scores[layer], layer))
    return {layer: -place for place, layer in enumerate(order)}


def settled(rounds: list[dict[int, list[float]]], top_k: int, window: int, correlation: float) -> bool:
    """Whether in the last `window` rounds, importance by layer on each sequence, the best `top_k`
    were the same ones, up to layers that the last round cannot tell apart, and each round's order
    of all layers had at least `correlation` with the next one's. Of layers that halving stopped the
    order stays, so that behind it the choice decides. window 0: never."""
    if not window or len(rounds) < window:
        return False
    scores = [{layer: sum(values) / len(values) for layer, values in samples.items()} for samples in rounds]
    orders = [order_after(scores[:done]) for done in range(len(rounds) - window + 1, len(rounds) + 1)]
    best = [{layer for layer, place in order.items() if -place < top_k} for order in orders]
    undecided = set(rank_samples("", "", rounds[-1]).undecided(top_k))
    return all(chosen ^ best[-1] <= undecided for chosen in best) and all(
        rank_correlation(a, b) >= correlation - 1e-9 for a, b in zip(orders, orders[1:])
    )


def survivors(scores: dict[int, float], top_k: int, done: int) -> list[int]:
    """Who goes on after `done` rounds of successive halving: after 2, 4, 8 ... the better half,
    never fewer than top_k + 1."""
    halve = done > 1 and done & (done - 1) == 0
    count = max(min(len(scores), top_k + 1), math.ceil(len(scores) / 2)) if halve else len(scores)
    return sorted(sorted(scores, key=lambda layer: (-scores[layer], layer))[:count])


# ------------------------------------------------------------------------------------------------ the rounds
def check_optimizer(cfg: Config) -> None:
    """Raises ConfigError unless candidates can train side by side as the config says."""
    if cfg.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer: {cfg.train.optimizer}: side by side, candidates train with adamw; set that, or take --full_runs"
        )


class Rounds:
    """The candidates of one selection. kept: layer -> the layers that its hybrid keeps. sign: of
    the importance, -1 for -KL. Its history lies in `folder`, and a stopped one goes on from its
    last saved round."""

    def __init__(self, bench, args, kept: dict[int, list[int]], sign: int, folder: Path):
        self.bench, self.args, self.kept, self.sign, self.folder = bench, args, kept, sign, folder
        check_optimizer(bench.cfg)
        self.cfg, self.plan = bench.cfg, batch_plan(bench.cfg, 1)
        self.rounds = min(args.rounds, self.plan.steps)
        self.history: list[dict] = []  # a round: step, seconds, kl of each candidate that is in it
        self.ended = False  # whether training was over by the rules of the process that wrote the history
        order = torch.Generator().manual_seed(self.cfg.train.seed)
        rows = -(-self.plan.steps * self.plan.batch_size // len(bench.train))
        self.order = torch.cat([torch.randperm(len(bench.train), generator=order) for _ in range(rows)])
        self.candidates: dict[int, Candidate] = {}

    def scores(self, entry: dict) -> dict[int, float]:
        return {layer: self.sign * sum(kls) / len(kls) for layer, kls in entry["kl"].items()}

    def last_step(self, done: int) -> int:
        return self.plan.steps * done // self.rounds

    def alive(self) -> list[int]:
        """Who trains in the next round."""
        if not self.history:
            return sorted(self.kept)
        scores = self.scores(self.history[-1])
        return survivors(scores, self.args.top_k, len(self.history)) if self.args.halving else sorted(scores)

    def over(self) -> bool:
        rounds = [
            {layer: [self.sign * kl for kl in kls] for layer, kls in entry["kl"].items()} for entry in self.history
        ]
        return len(rounds) == self.rounds or settled(rounds, self.args.top_k, self.args.window, self.args.correlation)

    # ---- batches
    def batches(self, first: int, last: int) -> Iterator[tuple[int, list]]:
        """(step, its micro-batches with the teacher's hidden states) of steps first + 1 to last."""
        size, micro = self.plan.batch_size, self.plan.micro_batch_size
        for step in range(first, last):
            rows = self.order[step * size : (step + 1) * size].tolist()
            ids = torch.as_tensor(self.bench.train[rows]["input_ids"], dtype=torch.long, device=self.bench.device)
            yield step + 1, [(part, self.hidden_states(part)) for part in ids.split(micro)]

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.read(input_ids=ids, use_cache=False)["last_hidden_state"]

    # ---- candidates
    def build(self, mine: list[int], done: int) -> None:
        teacher, student = self.bench.teacher, self.bench.student
        need = BYTES_A_PARAMETER * sum(p.numel() for p in student.parameters()) * len(mine)
        on_gpu, memory = self.bench.device.type == "cuda", psutil.virtual_memory().available
        self.resident = not on_gpu or need < 0.6 * torch.cuda.mem_get_info()[0]
        if need > 0.9 * memory and not (on_gpu and self.resident):
            raise ConfigError(
                f"--method: {len(mine)} candidates side by side need {need / 2**30:.0f} GiB of memory, of which "
                f"{memory / 2**30:.0f} are free; take a larger machine, or --full_runs"
            )
        graphs = self.resident and use_cuda_graphs(self.cfg, self.bench.device.type, 1, teacher.config)
        self.read = GraphedForward(teacher.model) if graphs else teacher.model
        for layer in mine:
            torch.manual_seed(self.cfg.train.seed)
            hybrid = student.restore_full_attention(teacher, self.kept[layer])
            self.candidates[layer] = candidate = Candidate(f"layer {layer}", hybrid, self.cfg, self.plan, graphs)
            if done:
                candidate.optimizer.load(load_file(self.saved(done) / f"{layer}.safetensors"), self.last_step(done))
            candidate.to(self.bench.device if self.resident else torch.device("cpu"))

    def saved(self, done: int) -> Path:
        return self.folder / STATES / f"round_{done}"

    def save(self) -> None:
        """The states behind the last round; older ones go once these are whole."""
        done = len(self.history)
        self.saved(done).parent.mkdir(exist_ok=True)
        with atomic_directory(self.saved(done), replace=True) as folder:
            for layer, candidate in self.candidates.items():
                save_file(
                    {k: v.contiguous() for k, v in candidate.optimizer.tensors().items()},
                    folder / f"{layer}.safetensors",
                )
        for old in range(1, done):
            shutil.rmtree(self.saved(old), ignore_errors=True)

    # ---- the loop
    def train_round(self, mine: list[int], first: int, last: int, bar) -> dict[int, list[float]]:
        head, device, parked = (
            self.bench.teacher.lm_head.weight,
            self.bench.device,
            torch.device("cpu"),
        )
        tokens = self.plan.tokens_per_step * self.bench.teacher.config.hidden_size * self.bench.teacher.dtype.itemsize
        segment = 1 if self.resident else max(1, CACHE_BYTES // tokens)
        for start in range(first, last, segment):
            stop = min(last, start + segment)
            cached = (
                None
                if self.resident
                else [(n, [(i.cpu(), h.cpu()) for i, h in parts]) for n, parts in self.batches(start, stop)]
            )
            if self.resident:
                for step, parts in self.batches(start, stop):
                    for layer in mine:
                        self.candidates[layer].train(step, parts, head)
                        bar.update()
                continue
            for layer in mine:
                candidate = self.candidates[layer]
                candidate.to(device)
                for step, parts in cached:
                    candidate.train(step, parts, head)
                    bar.update()
                candidate.to(parked)
        kls = {}
        for layer in mine:
            candidate = self.candidates[layer]
            candidate.check_losses()
            candidate.to(device)
            kls[layer] = self.bench.kls(candidate.hybrid.eval())
            candidate.hybrid.train()
            candidate.to(device if self.resident else parked)
        return kls

    def run(self) -> tuple[dict[int, list[float]], dict]:
        """Trains what is missing. Returns the KLs of every candidate's last round on each held-out
        sequence, and facts of the training: steps, who stopped before and when, and the share of
        full runs' compute that it took."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", f"--output_dir: {self.folder}"):
            self.open_history()
            if not self.over():
                if self.ended:
                    raise ConfigError(
                        f"--output_dir: {self.folder} has candidates whose training ended behind round {len(self.history)} of {self.rounds}, "
                        f"before their order settled for --top-k {self.args.top_k}, --window {self.args.window} and --correlation "
                        f"{self.args.correlation}; --window 1 ranks what is there, another --output_dir trains anew"
                    )
                done = max(
                    (n for n in range(1, len(self.history) + 1) if self.saved(n).is_dir()),
                    default=0,
                )
                self.history = self.history[:done]
                self.train()
            shutil.rmtree(self.folder / STATES, ignore_errors=True)
        last = {layer: entry for entry in self.history for layer in entry["kl"]}
        end = self.history[-1]["step"]
        stopped = {layer: entry["step"] for layer, entry in last.items() if entry["step"] < end}
        facts = {
            "steps": end,
            "of_steps": self.plan.steps,
            "stopped": stopped,
            "share_of_full_runs": self.share(),
            "seconds": round(sum(entry["seconds"] for entry in self.history), 1),
        }
        return {layer: entry["kl"][layer] for layer, entry in last.items()}, facts

    def open_history(self) -> None:
        """Reads what an earlier process has done. Raises ConfigError if that was another selection."""
        file, trained = self.folder / CONFIG, (self.folder / HISTORY).is_file()
        if trained and (other := difference(load_config(file), self.cfg)):
            raise ConfigError(
                f"{self.folder} has candidates of another config ({other}); name another --output_dir or remove it"
            )
        atomic_write_text(file, dump_config(self.cfg))
        if trained:
            known = json.loads((self.folder / HISTORY).read_text())
            if missing := {"rounds", "kept", "over", "history"} - set(known):
                raise ConfigError(
                    f"--output_dir: {self.folder / HISTORY} is of an older version, without {', '.join(sorted(missing))}; "
                    "remove that folder or name another --output_dir"
                )
            if (known["rounds"], known["kept"]) != (
                self.rounds,
                {str(k): v for k, v in self.kept.items()},
            ):
                raise ConfigError(
                    f"--output_dir: {self.folder} has other candidates or --rounds {known['rounds']}; name another"
                )
            there, here = (
                len(next(iter(known["history"][0]["kl"].values()))),
                sum(map(len, self.bench.batches)),
            )
            if there != here:
                raise ConfigError(
                    f"--sequences: {self.folder} was measured on {there} sequences, not {here}; say so, or name another --output_dir"
                )
            self.ended = known["over"]
            self.history = [entry | {"kl": {int(k): v for k, v in entry["kl"].items()}} for entry in known["history"]]

    def train(self) -> None:
        """Round after round. Told to stop by a signal, it ends the round, saves and exits with
        REQUEUE."""
        done, saved = len(self.history), time.monotonic()
        self.build(self.alive(), done)
        total = self.plan.steps * len(self.kept)
        with (
            StopSignals(to_the_end=False) as stop,
            tqdm(
                total=total,
                desc="candidates' steps, at most",
                unit="step",
                initial=self.last_step(done) * len(self.kept),
            ) as bar,
        ):
            stop.saving = True
            while not self.over():
                begin, alive, done = time.perf_counter(), self.alive(), len(self.history)
                for layer in [layer for layer in self.candidates if layer not in alive]:
                    del self.candidates[layer]
                kls = self.train_round(alive, self.last_step(done), self.last_step(done + 1), bar)
                seconds = round(time.perf_counter() - begin, 3)
                self.history.append({"step": self.last_step(done + 1), "seconds": seconds, "kl": kls})
                known = {
                    "rounds": self.rounds,
                    "kept": self.kept,
                    "over": self.over(),
                    "history": self.history,
                }
                atomic_write_text(self.folder / HISTORY, json.dumps(known))
                scores = self.scores(self.history[-1])
                best = sorted(scores, key=lambda layer: -scores[layer])[: self.args.top_k]
                bar.set_postfix({"best": ",".join(map(str, sorted(best))), "training": len(alive)})
                minutes = self.cfg.train.save_minutes
                if stop.received or minutes is not None and time.monotonic() - saved > 60 * minutes:
                    self.save()
                    saved = time.monotonic()
                if stop.received and not self.over():
                    print(
                        f"{stop.received}: stopped behind round {len(self.history)}; the same command goes on",
                        flush=True,
                    )
                    sys.exit(REQUEUE)

    def share(self) -> float:
        """FLOPs of the matrix products over those of a full run for every candidate, evaluations
        included."""

        def products(model) -> int:
            return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

        teacher, student, head = (
            products(part) for part in (self.bench.teacher, self.bench.student, self.bench.teacher.lm_head)
        )
        heldout = sum(batch.numel() for batch in self.bench.batches)
        spent, before = 0, 0
        for entry in self.history:
            tokens = (entry["step"] - before) * self.plan.tokens_per_step
            spent += tokens * (2 * teacher + 6 * student * len(entry["kl"])) + heldout * 2 * (student + head) * len(
                entry["kl"]
            )
            before = entry["step"]
        return spent / (self.plan.tokens * (2 * teacher + 6 * student) * len(self.kept))


def trained_hybrids(bench, args, kept: dict[int, list[int]], sign: int) -> tuple[dict[int, list[float]], dict] | None:
    """The held-out KLs of every layer's hybrid after stage 2, and facts of their training: side by
    side, or where the user wants full runs or the folder has some, by train.py in layer_<N>/. None
    where --candidate has trained one alone."""
    folders = {layer: args.output_dir / f"layer_{layer}" for layer in kept}
    if not (args.full_runs or args.candidate is not None or any(folder.is_dir() for folder in folders.values())):
        return Rounds(bench, args, kept, sign, args.output_dir / "side_by_side").run()
    if args.halving:
        raise ConfigError(
            "--halving: full runs go to their end; leave it out, or name an --output_dir without layer_<N> folders"
        )
    mine = kept if args.candidate is None else [args.candidate]
    kls = {
        layer: train_hybrid(bench, args.launcher, kept[layer], folders[layer])
        for layer in tqdm(mine, desc="candidates", unit="layer")
    }
    return (kls, {}) if args.candidate is None else None


def rank_hybrids(method: str, unit: str, importance: dict[int, list[float]], facts: dict) -> Ranking:
    """By importance on each held-out sequence; those that halving stopped come last, the later ones
    first, without intervals, for they trained on fewer tokens."""
    stopped = facts.get("stopped", {})
    going = rank_samples(
        method,
        unit,
        {layer: values for layer, values in importance.items() if layer not in stopped},
        **facts,
    )
    means = {layer: sum(values) / len(values) for layer, values in importance.items()}
    order = sorted(stopped, key=lambda layer: (-stopped[layer], -means[layer]))
    return replace(
        going,
        layers=going.layers + [Layer(layer, means[layer]) for layer in order],
        samples=importance,
    )

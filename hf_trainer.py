"""The trainers of the three stages: transformers' Trainer with what each stage's loss needs, and no loop of our own."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

from runtime.checkpoints import PARTIAL, UNIVERSAL, save_checkpoint
from runtime.data import collate
from runtime.files import one_line
from runtime.guard import NonFiniteError, StopSignals, Watchdog, first_not_finite

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cuda_graphs import GraphedForward, switch_off_all
from distill_model import DistillationLoss, StudentForCausalLM


class MetricsFile(TrainerCallback):
    """Appends every logged figure to metrics.jsonl, from rank 0."""

    def __init__(self, path: Path, tokens_per_step: int):
        self.path, self.tokens_per_step, self.start = path, tokens_per_step, time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero and self.path.is_file() and (lines := self.path.read_text().splitlines()):
            self.start -= json.loads(lines[-1])["seconds"]  # a run that goes on: its parts' times together

    def on_log(self, args, state, control, logs=None, **_):
        # The summary of the Trainer's end comes at every end, also of a run that goes on later.
        if (
            state.is_world_process_zero
            and logs
            and not ("train_runtime" in logs and state.global_step < state.max_steps)
        ):
            seconds = round(time.perf_counter() - self.start, 3)
            line = {
                "step": state.global_step,
                "tokens": state.global_step * self.tokens_per_step,
                "seconds": seconds,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line | logs) + "\n")


def guarded(event: str):
    """W&B's callback of that name, which an error ends for good, and not the run."""

    def call(self, *args, **options):
        if self._wandb is None:
            return
        try:
            getattr(super(Wandb, self), event)(*args, **options)
        except Exception as error:  # of many kinds
            print(f"W&B ended ({one_line(error)}); metrics.jsonl goes on without it", flush=True)
            self._wandb = None

    return call


class Wandb(WandbCallback):
    """W&B's, which cannot end a run: a SIGTERM to all processes of a job ends W&B's service too,
    before the run has saved."""

    on_train_begin, on_log, on_save, on_train_end = map(
        guarded, ("on_train_begin", "on_log", "on_save", "on_train_end")
    )


class LossBar(ProgressCallback):
    """A progress bar that shows loss and learning rate in place, instead of a printed line a step."""

    def __init__(self):
        super().__init__()
        self.shown = {}

    def on_prediction_step(self, args, state, control, **_):
        """No bar within the bar: an evaluation takes a few batches."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and self.training_bar is not None:
            self.shown |= {name: f"{logs[name]:.3g}" for name in ("loss", "eval_loss", "learning_rate") if name in logs}
            self.training_bar.set_postfix(self.shown, refresh=False)


class Guard(TrainerCallback):
    """Makes all ranks agree, once a step, on what only one may know: that a signal came, that a
    checkpoint is due by time, that a loss is not finite.

    stop: the process's signals, or None. minutes: between checkpoints, or None.
    """

    def __init__(self, trainer: StageTrainer, stop: StopSignals | None, minutes: float | None):
        self.trainer, self.stop, self.minutes = trainer, stop, minutes
        self.stopped: str | None = None  # why training ended before its last step

    def on_train_begin(self, args, state, control, **_):
        state.compute_steps(
            args, state.max_steps
        )  # a resumed state brings the intervals of the config that it was saved under
        self.trainer.finish_resuming()
        use_foreach_grad_norm(self.trainer.deepspeed.optimizer)
        self.last_save = time.monotonic()
        if self.stop is not None:
            self.stop.saving = True

    def on_save(self, args, state, control, **_):
        self.last_save = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        due = self.minutes is not None and time.monotonic() - self.last_save > 60 * self.minutes
        stop = self.stop is not None and self.stop.received is not None
        flags = torch.tensor([stop, due, False], dtype=torch.int32, device=args.device)
        flags[2] = self.trainer.losses_not_finite()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, due, bad = flags.tolist()
        if bad:  # and yet the gradients were finite, or DeepSpeed would have skipped the step
            raise NonFiniteError(
                f"step {state.global_step}: a loss is not finite, though its gradients are; the checkpoints are kept"
            )
        control.should_save |= bool(stop or due)
        if stop and state.global_step < state.max_steps:
            self.stopped = (
                self.stop.received if self.stop is not None and self.stop.received else "a signal to another rank"
            )
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        if self.stop is not None:
            self.stop.saving = False


def use_foreach_grad_norm(optimizer) -> None:
    """Of DeepSpeed's ZeRO-1 and 2: takes the norms of all gradients by one call, and lets them tell
    whether all are finite, as they do anyway. DeepSpeed asks each bf16 gradient before that, by
    thirteen operations, and then takes its norm by two more: of the 280 gradients of stage 1 at
    Qwen2.5-1.5B's shape 4,200 a step, whose starting a GPU waits for."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import get_norm_dtype

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return
    joined = optimizer.get_grad_norm_direct

    def norm(gradients, params, norm_type=2):
        norms = torch.stack(torch._foreach_norm(gradients, norm_type, dtype=get_norm_dtype()))
        return joined([norms], params[:1], norm_type)  # a norm of norms; and the sum over ranks

    optimizer.get_grad_norm_direct = norm
    optimizer.check_overflow = lambda partition_gradients=True: None


class StageTrainer(Trainer):
    """What the stages share. Subclasses give `forward_loss`.

    make_optimizer(model) and make_scheduler(optimizer) build them when the Trainer asks: with
    DeepSpeed it forgets those that it was given and would train with its own defaults. facts: what
    a checkpoint's index says of its run. stop, save_minutes: see Guard. watchdog: told of every
    move, if given. cuda_graphs: replay the passes of a training step as CUDA graphs.
    """

    def __init__(
        self,
        *args,
        make_optimizer,
        make_scheduler,
        metrics_path: Path,
        tokens_per_step: int,
        facts: dict,
        stop: StopSignals | None = None,
        save_minutes: float | None = None,
        watchdog: Watchdog | None = None,
        cuda_graphs: bool = False,
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate, **kwargs)
        if cuda_graphs:
            self.model.forward = GraphedForward(self.model)
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.facts, self.watchdog = facts, watchdog
        self._micro_batches: list[tuple[dict, torch.Tensor]] = []  # inputs and loss, of this step
        # Every micro-batch has the same number of tokens and its loss is a mean: the Trainer shall
        # divide by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossBar)
        self.add_callback(MetricsFile(metrics_path, tokens_per_step))
        self.guard = Guard(self, stop, save_minutes)
        self.add_callback(self.guard)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        self.resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model=None):
        self.optimizer = self.make_optimizer(self.model)
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.make_scheduler(optimizer or self.optimizer)
        return self.lr_scheduler

    def forward_loss(self, model, inputs) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how its loss is computed")

    def beat(self, doing: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(f"step {self.state.global_step + 1}, {doing}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.beat(f"forward of micro-batch {len(self._micro_batches)}")
        loss = self.forward_loss(model, inputs)
        self._micro_batches.append((inputs, loss.detach()))
        self.beat(f"backward of micro-batch {len(self._micro_batches) - 1}")
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.gradient_state.sync_gradients and not math.isfinite(self.deepspeed.get_global_grad_norm()):
            self.diverged(
                self.state.global_step + 1
            )  # DeepSpeed has skipped the step: the weights are those that did it
        return loss

    def losses_not_finite(self) -> torch.Tensor:
        """Whether one of the step's losses is not; forgets them. A tensor, for nothing shall wait
        for the device here."""
        bad = ~torch.stack([loss for _, loss in self._micro_batches]).isfinite().all()
        self._micro_batches.clear()
        return bad

    def diverged(self, step: int) -> None:
        """Goes through the step's micro-batches again to find what is not finite, and raises
        Diverged on all ranks."""
        model, n = self.model_wrapped, self.args.world_size
        bad, found = [None] * n, [None] * n
        dist.all_gather_object(bad, not all(math.isfinite(loss.item()) for _, loss in self._micro_batches))
        of_gradients = not any(bad)
        switch_off_all()  # the search hooks every module's forward pass, and needs the graphs' memory

        def backward(loss):
            model.set_gradient_accumulation_boundary(False)
            model.backward(loss, scale_wrt_gas=False)

        names = [
            first_not_finite(
                self.model,
                lambda: self.forward_loss(model, inputs),
                backward if of_gradients else None,
            )
            for inputs, _ in self._micro_batches
        ]
        dist.all_gather_object(found, (next((name for name in names if name), None), socket.gethostname()))
        ranks = [rank for rank in range(n) if of_gradients or bad[rank]]
        rank = next((rank for rank in ranks if found[rank][0]), ranks[0])
        where = found[rank][0] or ("a gradient" if of_gradients else "the loss")
        layer = re.search(r"layers\.(\d+)\b", where)
        raise NonFiniteError(
            f"step {step}: {where} is not finite on rank {rank} ({found[rank][1]}){f', in layer {int(layer[1])}' if layer else ''}; "
            "the checkpoints before it are kept. Try a lower train.lr or train.lr_attn, a longer train.warmup_steps, a lower "
            "train.max_grad_norm, or train.dtype fp32"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.beat("evaluation")
        with torch.no_grad():
            return self.forward_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # -------------------------------------------------------------------------------------------- checkpoints
    def save_model(self, output_dir=None, _internal_call=False):
        """Nothing: DeepSpeed's checkpoint beside it holds the weights, and the export makes
        converted-hf from that."""

    def _get_output_dir(self, trial):
        """Where the Trainer writes its checkpoints, and looks for old ones to remove:
        `save_checkpoint` moves and removes."""
        return str(Path(self.args.output_dir) / PARTIAL)

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        self.beat("saving")

        def write():
            super(StageTrainer, self)._save_checkpoint(model, trial)
            path = Path(self._get_output_dir(trial)) / f"checkpoint-{step}" / f"progress_{self.args.process_index}.json"
            path.write_text(json.dumps(self.logging_state()))

        save_checkpoint(Path(self.args.output_dir), step, write, self.facts, self.args.save_total_limit)
        self.beat("saved")

    def logging_state(self) -> dict:
        """What is summed up between two logs, on this rank: a checkpoint may lie between them."""
        return {
            "loss": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    def finish_resuming(self) -> None:
        """What neither the Trainer nor DeepSpeed restores."""
        if self.resumed_from is None:
            return
        files = sorted(Path(self.resumed_from).glob("progress_*.json"))
        ours = Path(self.resumed_from) / f"progress_{self.args.process_index}.json"
        files = [ours] if len(files) == self.args.world_size else files
        self.load_logging_state([json.loads(file.read_text()) for file in files])
        if Path(self.resumed_from).parent.name == UNIVERSAL:
            # Loading it, DeepSpeed's ZeRO-3 gives every group the settings of the first, and all
            # states one step counter, which each of them would then count up.
            rates = self.lr_scheduler.get_last_lr()
            for group, settings, lr in zip(self.optimizer.param_groups, self._settings, rates, strict=True):
                group.update(settings | {"lr": lr})
            for state in self.deepspeed.optimizer.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
            dist.barrier()
            if self.is_world_process_zero():
                shutil.rmtree(Path(self.resumed_from).parent, ignore_errors=True)

    def load_logging_state(self, states: list[dict]) -> None:
        """states: this rank's, or after a change of world size those of all ranks before it, of
        which it takes the mean."""
        self._tr_loss += sum(state["loss"] for state in states) / len(states)
        self._total_loss_scalar, self._globalstep_last_logged = (
            states[0]["total"],
            states[0]["logged_step"],
        )


class DistillTrainer(StageTrainer):
    """Stage 1: aligns attention outputs; logs the loss of every layer as layer_loss/00 ..., and as
    layer_error/00 ... that loss over the variance of the teacher's output, which compares between
    layers: see `relative_errors` in wrapper.py.

    layer_errors: the last that were logged, of held-out text, or of training where there is none;
    empty before.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # [sum of (losses, variances) [2, layers], count] of training and of evaluation, since they
        # were last logged
        self._layers = {True: [], False: []}
        self.layer_errors: list[float] = []

    def forward_loss(self, model, inputs):
        outputs = model(**inputs)
        total, count = self._layers[model.training] or (0, 0)
        new = torch.stack((outputs["layer_losses"], outputs["layer_variances"]))
        self._layers[model.training] = [total + new, count + 1]
        return outputs["loss"]

    def log(self, logs, *args, **kwargs):
        training = "loss" in logs
        if (training or "eval_loss" in logs) and self._layers[training]:
            total, count = self._layers[training]
            losses, variances = self.accelerator.reduce(total / count, reduction="mean")
            errors = self.model.relative_errors(losses, variances)
            figures = {"layer_loss": losses, "layer_error": errors}
            for name, values in zip(figures, torch.stack(tuple(figures.values())).tolist()):
                prefix = name if training else f"eval_{name}"
                logs = logs | {f"{prefix}/{i:02}": value for i, value in enumerate(values)}
            if not training or self.eval_dataset is None:
                self.layer_errors = errors.tolist()
            self._layers[training] = []
        super().log(logs, *args, **kwargs)

    def worst_layers(self, count: int = 3) -> str:
        """The layers with the largest relative error, in one line."""
        order = sorted(range(len(self.layer_errors)), key=self.layer_errors.__getitem__, reverse=True)
        worst = ", ".join(f"{i} ({self.layer_errors[i]:.3g})" for i in order[:count])
        text = "training" if self.eval_dataset is None else "held-out"
        return (
            f"worst aligned layers on {text} text, by error over the variance of the teacher's output: {worst}; "
            f"median {statistics.median(self.layer_errors):.3g}"
        )

    def logging_state(self):
        layers = self._layers[True]
        return super().logging_state() | {"layers": layers and [layers[0].tolist(), layers[1]]}

    def load_logging_state(self, states):
        super().load_logging_state(states)
        if states[0]["layers"] and isinstance(states[0]["layers"][0][0], list):  # older checkpoints have no variances
            totals = torch.tensor([state["layers"][0] for state in states], device=self.args.device)
            self._layers[True] = [totals.mean(0), states[0]["layers"][1]]


class FrozenTeacher:
    """A teacher for its hidden states: replicated on every device, or sharded by ZeRO-3 where
    `engine_config` is given.

    engine_config: a DeepSpeed config with ZeRO stage 3, or None. cuda_graphs: replay the forward
    pass of a replica as a CUDA graph.
    """

    def __init__(
        self,
        model: StudentForCausalLM,
        device: torch.device,
        engine_config: dict | None = None,
        cuda_graphs: bool = False,
    ):
        self.model, self.sharded = model.eval().requires_grad_(False), engine_config is not None
        if self.sharded:
            import deepspeed

            self.engine = deepspeed.initialize(model=self.model, config=engine_config)[0].eval()
        else:
            self.model.to(device)
        self.forward = GraphedForward(self.model.model) if cuda_graphs and not self.sharded else self.model.model

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """After the final norm, [B, T, hidden_size]."""
        return self.forward(input_ids=input_ids, use_cache=False)["last_hidden_state"]

    def gathered_head(self):
        """A context in which `head_weight` is whole."""
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([self.head_weight])

    @property
    def head_weight(self) -> torch.Tensor:
        return self.model.lm_head.weight


class KDTrainer(StageTrainer):
    """Stage 2: forward KL to the teacher's logits, computed inside the student's forward()."""

    def __init__(
        self,
        *args,
        teacher: FrozenTeacher,
        kl_temperature=1.0,
        kl_weight=1.0,
        ce_weight=0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.distillation = DistillationLoss(kl_temperature, kl_weight, ce_weight)

    def forward_loss(self, model, inputs):
        hidden_states = self.teacher.hidden_states(inputs["input_ids"])
        with self.teacher.gathered_head():
            return model(
                **inputs,
                labels=inputs["input_ids"] if self.distillation.ce_weight else None,
                teacher_hidden_states=hidden_states,
                teacher_head_weight=self.teacher.head_weight,
                distillation=self.distillation,
                use_cache=False,
            )["loss"]


class FinetuneTrainer(StageTrainer):
    """Stage 3: next-token cross-entropy on long sequences."""

    def forward_loss(self, model, inputs):
        return model(**inputs, labels=inputs["input_ids"], use_cache=False)["loss"]

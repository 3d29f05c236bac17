"""The trainers of the three stages: transformers' Trainer with each stage's loss; there is no
second training loop."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import statistics
import time
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path

from runtime.checkpoints import PARTIAL, UNIVERSAL, save_checkpoint
from runtime.data import DOCUMENT_IDS, DOCUMENT_LENGTHS, INPUT_IDS, LOSS_MASK, collate
from runtime.files import one_line
from runtime.guard import NonFiniteError, StopSignals, Watchdog, first_not_finite

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cuda_graphs import GraphedForward, switch_off_all
from distill_model import DistillationLoss, StudentForCausalLM
from distill_model.documents import PADDING, learned_tokens, predicting_learned
from distill_model.losses import micro_batch_weights

LOSS_WEIGHT = "loss_weight"  # of a micro-batch, beside its inputs

# What the progress bar shows, and how.
BAR_FORMATS = {
    "loss": "{:.3g}",
    "eval_loss": "{:.3g}",
    "learning_rate": "{:.3g}",
    "tokens_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
}


class MetricsFile(TrainerCallback):
    """Appends everything that is logged to metrics.jsonl, from rank 0."""

    def __init__(self, path: Path, tokens_per_step: int):
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero or not self.path.is_file():
            return
        if lines := self.path.read_text().splitlines():
            self.start -= json.loads(lines[-1])["seconds"]  # of a resumed run: the time of all its parts

    def on_log(self, args, state, control, logs=None, **_):
        # The Trainer also logs its summary when a run stops early; only a complete run has one
        # here.
        is_early_summary = "train_runtime" in (logs or {}) and state.global_step < state.max_steps
        if not state.is_world_process_zero or not logs or is_early_summary:
            return
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line | logs) + "\n")


def _ignores_errors(event: str):
    """WandbCallback's method of that name; an error in it ends the logging to W&B, not the run."""

    def call(self, *args, **options):
        if self._wandb is None:
            return
        try:
            getattr(super(Wandb, self), event)(*args, **options)
        except Exception as error:  # W&B raises errors of many kinds
            print(f"W&B ended ({one_line(error)}); metrics.jsonl continues without it", flush=True)
            self._wandb = None

    return call


class Wandb(WandbCallback):
    """transformers' callback of W&B, which cannot end a run: a SIGTERM to all processes of a job
    ends W&B's service too, before the run has saved."""

    on_train_begin = _ignores_errors("on_train_begin")
    on_log = _ignores_errors("on_log")
    on_save = _ignores_errors("on_save")
    on_train_end = _ignores_errors("on_train_end")


class ProgressBar(ProgressCallback):
    """A progress bar with loss, learning rate, tokens/s and MFU, instead of a printed line per log.

    Its estimate of the time left counts the steps of this process alone, so that it is right after
    a resume too.
    """

    def __init__(self):
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **_):
        """No second bar: an evaluation takes a few batches."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and self.training_bar is not None:
            for name, form in BAR_FORMATS.items():
                if name in logs:
                    self.shown[name] = form.format(logs[name])
            self.training_bar.set_postfix(self.shown, refresh=False)


class Throughput(TrainerCallback):
    """Tokens per second over all GPUs, and MFU, of the steps since they were last logged.
    Evaluations and checkpoints are not counted.

    flops_per_token: of a training step, see mfu.py. peak_flops: of all GPUs together, or None where
    it is not known; MFU is left out then. Add it after `Guard`, which waits for the GPU after each
    step.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.steps = 0
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        self.seconds += now - self.begin
        self.steps += 1
        self.begin = now

    def on_evaluate(self, args, state, control, **_):
        self.begin = time.perf_counter()

    def on_save(self, args, state, control, **_):
        self.begin = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """tokens_per_second and, where the peak is known, mfu; resets the counters."""
        tokens_per_second = self.steps * self.tokens_per_step / self.seconds
        self.steps = 0
        self.seconds = 0.0
        figures = {"tokens_per_second": round(tokens_per_second, 1)}
        if self.peak_flops is not None:
            figures["mfu"] = round(tokens_per_second * self.flops_per_token / self.peak_flops, 4)
        return figures


class Guard(TrainerCallback):
    """Makes all ranks agree, once per step, on what only one of them may know: that a signal came,
    that a checkpoint is due by time, that a loss is NaN or Inf.

    stop: the process's signals, or None. minutes: between checkpoints, or None.
    """

    def __init__(self, trainer: StageTrainer, stop: StopSignals | None, minutes: float | None):
        self.trainer = trainer
        self.stop = stop
        self.minutes = minutes
        self.stopped: str | None = None  # why training ended before its last step

    def on_train_begin(self, args, state, control, **_):
        # A loaded state has the intervals of the config that it was saved under.
        state.compute_steps(args, state.max_steps)
        self.trainer.finish_resuming()
        use_foreach_grad_norm(self.trainer.deepspeed.optimizer)
        self.last_save = time.monotonic()
        if self.stop is not None:
            self.stop.saving = True

    def on_save(self, args, state, control, **_):
        self.last_save = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        signalled = self.stop is not None and self.stop.received is not None
        due = self.minutes is not None and time.monotonic() - self.last_save > 60 * self.minutes
        flags = torch.tensor([signalled, due, False], dtype=torch.int32, device=args.device)
        flags[2] = self.trainer.losses_not_finite()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        must_stop, save_is_due, not_finite = flags.tolist()
        if not_finite:  # with finite gradients: for others DeepSpeed would have skipped the step
            raise NonFiniteError(
                f"step {state.global_step}: a loss is not finite, though its gradients are; the checkpoints are kept"
            )
        control.should_save |= bool(must_stop or save_is_due)
        if must_stop and state.global_step < state.max_steps:
            received = None if self.stop is None else self.stop.received
            self.stopped = received or "a signal to another rank"
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        if self.stop is not None:
            self.stop.saving = False


def use_foreach_grad_norm(optimizer) -> None:
    """Makes DeepSpeed's ZeRO-1 and 2 compute the norms of all gradients in one foreach call, and
    tell from them whether all gradients are finite.

    DeepSpeed checks each bf16 gradient with thirteen operations and takes its norm with two more:
    for the 280 gradients of stage 1 at Qwen2.5-1.5B's shape 4,200 kernel launches per step, which a
    GPU waits for.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import get_norm_dtype

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return
    norm_over_ranks = optimizer.get_grad_norm_direct

    def norm(gradients, params, norm_type=2):
        norms = torch.stack(torch._foreach_norm(gradients, norm_type, dtype=get_norm_dtype()))
        return norm_over_ranks([norms], params[:1], norm_type)  # the norm of the norms, reduced over ranks

    optimizer.get_grad_norm_direct = norm
    optimizer.check_overflow = lambda partition_gradients=True: None


class StageTrainer(Trainer):
    """What the stages share. Subclasses implement `forward_loss`.

    make_optimizer(model), make_scheduler(optimizer): called when the Trainer asks for them. With
    DeepSpeed it drops those that it was given and would train with its own defaults. throughput:
    measures the steps. facts: what a checkpoint's index records of its run. stop, save_minutes: see
    `Guard`. watchdog: told about all progress, if given. cuda_graphs: replay the passes of a
    training step as CUDA graphs; max_documents: the most documents of a micro-batch, which they then
    need, if it has any.
    """

    def __init__(
        self,
        *args,
        make_optimizer,
        make_scheduler,
        metrics_path: Path,
        throughput: Throughput,
        facts: dict,
        stop: StopSignals | None = None,
        save_minutes: float | None = None,
        watchdog: Watchdog | None = None,
        cuda_graphs: bool = False,
        max_documents: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate, **kwargs)
        if cuda_graphs:
            self.model.forward = GraphedForward(self.model, max_documents=max_documents)
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler
        self.throughput = throughput
        self.facts = facts
        self.watchdog = watchdog
        self._micro_batches: list[tuple[dict, torch.Tensor]] = []  # inputs and loss, of this step
        # The loss of a micro-batch is a mean over its tokens, weighted where a mask makes their
        # number vary: the Trainer has to divide by the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self.guard = Guard(self, stop, save_minutes)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressBar)
        self.add_callback(MetricsFile(metrics_path, throughput.tokens_per_step))
        self.add_callback(self.guard)
        self.add_callback(throughput)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        self.resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model=None):
        self.optimizer = self.make_optimizer(self.model)
        self._group_settings = []
        for group in self.optimizer.param_groups:
            self._group_settings.append({name: value for name, value in group.items() if name != "params"})
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.make_scheduler(optimizer or self.optimizer)
        return self.lr_scheduler

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = logs | self.throughput.figures()
        super().log(logs, *args, **kwargs)

    def forward_loss(self, model, inputs) -> torch.Tensor:
        """The loss of a micro-batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must say how its loss is computed")

    def counted(self, inputs: dict) -> torch.Tensor | None:
        """The positions [B, T] that the loss of a micro-batch is the mean over, bool; None: all."""
        learned = learned_tokens(inputs.get(LOSS_MASK), inputs.get(DOCUMENT_IDS))
        return None if learned is None else predicting_learned(learned)

    def beat(self, doing: str) -> None:
        """Tells the watchdog about progress."""
        if self.watchdog is not None:
            self.watchdog.beat(f"step {self.state.global_step + 1}, {doing}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.beat(f"forward of micro-batch {len(self._micro_batches)}")
        weight = inputs.pop(LOSS_WEIGHT, None)
        loss = self.forward_loss(model, inputs)
        if weight is not None:
            loss = loss * weight
        self._micro_batches.append((inputs, loss.detach()))
        self.beat(f"backward of micro-batch {len(self._micro_batches) - 1}")
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, with their weights if not all positions count: see
        `micro_batch_weights`."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [self.counted(batch) for batch in batches]
        if masks and masks[0] is not None:
            for batch, weight in zip(batches, micro_batch_weights(masks, device, self.args.world_size)):
                batch[LOSS_WEIGHT] = weight
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        is_last_micro_batch = self.accelerator.gradient_state.sync_gradients
        if is_last_micro_batch and not math.isfinite(self.deepspeed.get_global_grad_norm()):
            # DeepSpeed has skipped the step, so the weights are those that gave this gradient.
            self.raise_non_finite(self.state.global_step + 1)
        return loss

    def losses_not_finite(self) -> torch.Tensor:
        """Whether a loss of the step is NaN or Inf, as a tensor to avoid a host-device sync;
        forgets the losses."""
        bad = ~torch.stack([loss for _, loss in self._micro_batches]).isfinite().all()
        self._micro_batches.clear()
        return bad

    def raise_non_finite(self, step: int) -> None:
        """Runs the step's micro-batches again to find what is not finite, and raises
        NonFiniteError, the same on all ranks."""
        loss_is_bad = not all(math.isfinite(loss.item()) for _, loss in self._micro_batches)
        bad_losses = self._gathered(loss_is_bad)
        search_gradients = not any(bad_losses)
        found = self._gathered((self._first_not_finite(search_gradients), socket.gethostname()))
        suspects = [rank for rank, bad in enumerate(bad_losses) if bad or search_gradients]
        rank = next((rank for rank in suspects if found[rank][0]), suspects[0])
        name, host = found[rank]
        where = name or ("a gradient" if search_gradients else "the loss")
        layer = re.search(r"layers\.(\d+)\b", where)
        in_layer = f", in layer {int(layer[1])}" if layer else ""
        raise NonFiniteError(
            f"step {step}: {where} is not finite on rank {rank} ({host}){in_layer}; the checkpoints before it are kept. "
            "Try a lower train.lr or train.lr_attn, a longer train.warmup_steps, a lower train.max_grad_norm, or "
            "train.dtype fp32"
        )

    def _gathered(self, value) -> list:
        """The value of every rank."""
        values = [None] * self.args.world_size
        dist.all_gather_object(values, value)
        return values

    def _first_not_finite(self, search_gradients: bool) -> str | None:
        """The first output, or gradient, that is not finite in this step's micro-batches, or
        None."""
        model = self.model_wrapped
        switch_off_all()  # the search hooks every module's forward pass, and needs the CUDA graphs' memory

        def backward(loss):
            model.set_gradient_accumulation_boundary(False)
            model.backward(loss, scale_wrt_gas=False)

        names = []
        for inputs, _ in self._micro_batches:
            forward = partial(self.forward_loss, model, inputs)
            names.append(first_not_finite(self.model, forward, backward if search_gradients else None))
        return next((name for name in names if name), None)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.beat("evaluation")
        with torch.no_grad():
            loss = self.forward_loss(model, self._prepare_inputs(inputs)).detach()
        counted = self.counted(inputs)
        if counted is not None:  # the Trainer takes the mean over batches of equal size
            loss = loss * counted.sum().to(loss.device) / self.counted_per_batch
        return loss, None, None

    @cached_property
    def counted_per_batch(self) -> float:
        """Positions that count, per held-out batch, on average."""
        columns = self.eval_dataset[:]
        names = [name for name in (INPUT_IDS, LOSS_MASK, DOCUMENT_LENGTHS) if name in columns]
        rows = [dict(zip(names, row)) for row in zip(*(columns[name] for name in names))]
        counted = self.counted(collate(rows))
        batches = len(rows) / self.args.per_device_eval_batch_size
        return max(1, counted.sum().item()) / batches

    # -------------------------------------------------------------------- checkpoints
    def save_model(self, output_dir=None, _internal_call=False):
        """Does nothing: DeepSpeed's checkpoint holds the weights, and converted-hf is exported from
        it."""

    def _get_output_dir(self, trial):
        """Where the Trainer writes its checkpoint, and looks for old ones to remove.
        `save_checkpoint` moves the new one to its place and removes the old ones."""
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
        """What this rank has summed up since the last log, for a checkpoint between two logs."""
        return {
            "loss": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    def finish_resuming(self) -> None:
        """Restores what neither the Trainer nor DeepSpeed restores."""
        if self.resumed_from is None:
            return
        folder = Path(self.resumed_from)
        files = sorted(folder.glob("progress_*.json"))
        if len(files) == self.args.world_size:
            files = [folder / f"progress_{self.args.process_index}.json"]
        self.load_logging_state([json.loads(file.read_text()) for file in files])
        if folder.parent.name == UNIVERSAL:
            self._repair_universal_optimizer()
            dist.barrier()
            if self.is_world_process_zero():
                shutil.rmtree(folder.parent, ignore_errors=True)

    def _repair_universal_optimizer(self) -> None:
        """After loading a universal checkpoint: DeepSpeed's ZeRO-3 gives every group the settings
        of the first, and all states one step counter, which each of them would then increment."""
        rates = self.lr_scheduler.get_last_lr()
        for group, settings, lr in zip(self.optimizer.param_groups, self._group_settings, rates, strict=True):
            group.update(settings | {"lr": lr})
        for state in self.deepspeed.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def load_logging_state(self, states: list[dict]) -> None:
        """states: this rank's, or after a change of world size those of all ranks that saved; their
        mean is loaded."""
        self._tr_loss += sum(state["loss"] for state in states) / len(states)
        self._total_loss_scalar = states[0]["total"]
        self._globalstep_last_logged = states[0]["logged_step"]


class DistillTrainer(StageTrainer):
    """Stage 1: aligns attention outputs.

    Logs the loss of every layer as layer_loss/00 ..., and as layer_error/00 ... that loss over the
    variance of the teacher's output, which can be compared between layers: see `relative_errors` in
    wrapper.py.

    layer_errors: those logged last, on held-out text, or on training text where nothing is held
    out; empty before.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Of training (True) and of evaluation (False), since they were last logged: [sum of
        # (losses, variances) [2, layers], each times the share of its micro-batch that counts; sum
        # of these shares].
        self._layers = {True: [], False: []}
        self.layer_errors: list[float] = []

    def counted(self, inputs):
        """Attention is aligned at every token, but not at padding."""
        documents = inputs.get(DOCUMENT_IDS)
        return None if documents is None else documents != PADDING

    def forward_loss(self, model, inputs):
        outputs = model(**inputs)
        total, count = self._layers[model.training] or (0, 0)
        new = torch.stack((outputs["layer_losses"], outputs["layer_variances"]))
        counted = self.counted(inputs)
        share = 1.0 if counted is None else counted.float().mean()
        self._layers[model.training] = [total + new * share, count + share]
        return outputs["loss"]

    def log(self, logs, *args, **kwargs):
        training = "loss" in logs
        if (training or "eval_loss" in logs) and self._layers[training]:
            logs = logs | self._layer_figures(training)
        super().log(logs, *args, **kwargs)

    def _layer_figures(self, training: bool) -> dict[str, float]:
        """The mean losses and relative errors of all layers since the last log; resets the sums."""
        total, count = self._layers[training]
        count = torch.as_tensor(count, device=total.device)
        losses, variances = self.accelerator.reduce(total) / self.accelerator.reduce(count)
        errors = self.model.relative_errors(losses, variances)
        prefix = "" if training else "eval_"
        loss_values, error_values = torch.stack((losses, errors)).tolist()
        figures = {f"{prefix}layer_loss/{i:02}": value for i, value in enumerate(loss_values)}
        figures |= {f"{prefix}layer_error/{i:02}": value for i, value in enumerate(error_values)}
        if not training or self.eval_dataset is None:
            self.layer_errors = error_values
        self._layers[training] = []
        return figures

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
        layers = []
        if self._layers[True]:
            total, count = self._layers[True]
            layers = [total.tolist(), float(count)]
        return super().logging_state() | {"layers": layers}

    def load_logging_state(self, states):
        super().load_logging_state(states)
        layers = states[0]["layers"]
        if not layers or not isinstance(layers[0][0], list):  # checkpoints of older versions have no variances
            return
        totals = torch.tensor([state["layers"][0] for state in states], device=self.args.device)
        counts = [state["layers"][1] for state in states]
        self._layers[True] = [totals.mean(0), sum(counts) / len(counts)]


class FrozenTeacher:
    """A teacher that gives hidden states: a replica on every device, or sharded with ZeRO-3.

    engine_config: a DeepSpeed config with ZeRO stage 3, or None for a replica. cuda_graphs: replay
    the forward pass of a replica as a CUDA graph. max_documents: see `StageTrainer`.
    """

    def __init__(
        self,
        model: StudentForCausalLM,
        device: torch.device,
        engine_config: dict | None = None,
        cuda_graphs: bool = False,
        max_documents: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.sharded = engine_config is not None
        if self.sharded:
            import deepspeed

            self.engine = deepspeed.initialize(model=self.model, config=engine_config)[0].eval()
        else:
            self.model.to(device)
        self.forward = self.model.model
        if cuda_graphs and not self.sharded:
            self.forward = GraphedForward(self.model.model, max_documents=max_documents)

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [B, T] -> the hidden states after the final norm, [B, T, hidden_size].
        document_ids: see `StudentModel.forward`."""
        documents = {} if document_ids is None else {DOCUMENT_IDS: document_ids}
        return self.forward(input_ids=input_ids, use_cache=False, **documents)["last_hidden_state"]

    def gathered_head(self):
        """A context in which `head_weight` is not sharded."""
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([self.head_weight])

    @property
    def head_weight(self) -> torch.Tensor:
        return self.model.lm_head.weight


def distillation_loss(
    model, inputs: dict, teacher: FrozenTeacher | None, distillation: DistillationLoss
) -> torch.Tensor:
    """Stage 2's loss of a micro-batch, a scalar. teacher: None where `inputs` hold its outputs."""
    options = {
        "labels": inputs[INPUT_IDS] if distillation.ce_weight else None,
        "distillation": distillation,
        "use_cache": False,
    }
    if teacher is None:
        return model(**inputs, **options)["loss"]
    hidden = teacher.hidden_states(inputs[INPUT_IDS], inputs.get(DOCUMENT_IDS))
    with teacher.gathered_head():
        return model(
            **inputs,
            **options,
            teacher_hidden_states=hidden,
            teacher_head_weight=teacher.head_weight,
        )["loss"]


def next_token_loss(model, inputs: dict) -> torch.Tensor:
    """Stage 3's loss of a micro-batch, a scalar."""
    return model(**inputs, labels=inputs["input_ids"], use_cache=False)["loss"]


class KDTrainer(StageTrainer):
    """Stage 2: the divergence from the teacher's distribution, computed inside the student's
    forward(). teacher: None where the rows of the data hold its outputs."""

    def __init__(self, *args, distillation: DistillationLoss, teacher: FrozenTeacher | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.distillation = distillation

    def forward_loss(self, model, inputs):
        return distillation_loss(model, inputs, self.teacher, self.distillation)


class FinetuneTrainer(StageTrainer):
    """Stage 3: next-token cross-entropy on long sequences."""

    def forward_loss(self, model, inputs):
        return next_token_loss(model, inputs)

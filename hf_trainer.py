"""The trainers of the three stages: transformers' Trainer with what each stage's loss needs, and no loop of our own."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from distill_model import StudentForCausalLM
from pipeline.data import collate


class MetricsFile(TrainerCallback):
    """Appends every logged figure to metrics.jsonl, from rank 0."""

    def __init__(self, path: Path, tokens_per_step: int):
        self.path, self.tokens_per_step, self.start = path, tokens_per_step, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and logs:
            seconds = round(time.perf_counter() - self.start, 3)
            line = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step, "seconds": seconds}
            with self.path.open("a") as file:
                file.write(json.dumps(line | logs) + "\n")


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


class StageTrainer(Trainer):
    """What the stages share. Subclasses give `forward_loss`.

    make_optimizer(model) and make_scheduler(optimizer) build them when the Trainer asks: with DeepSpeed it forgets those
    that it was given and would train with its own defaults.
    """

    def __init__(self, *args, make_optimizer, make_scheduler, metrics_path: Path, tokens_per_step: int, **kwargs):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        # Every micro-batch has the same number of tokens and its loss is a mean: the Trainer shall divide by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossBar)
        self.add_callback(MetricsFile(metrics_path, tokens_per_step))

    def create_optimizer(self, model=None):
        self.optimizer = self.make_optimizer(self.model)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.make_scheduler(optimizer or self.optimizer)
        return self.lr_scheduler

    def forward_loss(self, model, inputs) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how its loss is computed")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.forward_loss(model, inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.forward_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def save_model(self, output_dir=None, _internal_call=False):
        """Nothing: DeepSpeed's checkpoint beside it holds the weights, and the export makes converted-hf from that."""


class DistillTrainer(StageTrainer):
    """Stage 1: aligns attention outputs; logs the loss of every layer as layer_loss/00 ..."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._layer_losses = {True: [], False: []}  # of training and of evaluation, since they were last logged

    def forward_loss(self, model, inputs):
        outputs = model(**inputs)
        self._layer_losses[model.training].append(outputs["layer_losses"])
        return outputs["loss"]

    def log(self, logs, *args, **kwargs):
        training = "loss" in logs
        if (training or "eval_loss" in logs) and self._layer_losses[training]:
            mean = torch.stack(self._layer_losses[training]).mean(0)
            mean = self.accelerator.reduce(mean, reduction="mean").tolist()
            prefix = "layer_loss" if training else "eval_layer_loss"
            logs = logs | {f"{prefix}/{i:02}": value for i, value in enumerate(mean)}
            self._layer_losses[training].clear()
        super().log(logs, *args, **kwargs)


class FrozenTeacher:
    """A teacher for its hidden states: replicated on every device, or sharded by ZeRO-3 where `engine_config` is given.

    engine_config: a DeepSpeed config with ZeRO stage 3, or None.
    """

    def __init__(self, model: StudentForCausalLM, device: torch.device, engine_config: dict | None = None):
        self.model, self.sharded = model.eval().requires_grad_(False), engine_config is not None
        if self.sharded:
            import deepspeed

            self.engine = deepspeed.initialize(model=self.model, config=engine_config)[0].eval()
        else:
            self.model.to(device)

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """After the final norm, [B, T, hidden_size]."""
        return self.model.model(input_ids, use_cache=False).last_hidden_state

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

    def __init__(self, *args, teacher: FrozenTeacher, kl_temperature=1.0, kl_weight=1.0, ce_weight=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.loss_options = dict(kl_temperature=kl_temperature, kl_weight=kl_weight, ce_weight=ce_weight)

    def forward_loss(self, model, inputs):
        hidden_states = self.teacher.hidden_states(inputs["input_ids"])
        with self.teacher.gathered_head():
            return model(
                **inputs,
                labels=inputs["input_ids"] if self.loss_options["ce_weight"] else None,
                teacher_hidden_states=hidden_states,
                teacher_head_weight=self.teacher.head_weight,
                use_cache=False,
                **self.loss_options,
            ).loss


class FinetuneTrainer(StageTrainer):
    """Stage 3: next-token cross-entropy on long sequences."""

    def forward_loss(self, model, inputs):
        return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss

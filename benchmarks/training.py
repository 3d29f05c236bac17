"""Stages 1 and 2 without a launcher, for benchmarks that train many small students in one
process."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch

from distill_model import StudentForCausalLM, is_student_attention
from layer_selection.candidate_training import MasterAdamW
from wrapper import AttentionAlignmentModel, calibrate

BETAS = (0.9, 0.95)
CLIP = 1.0
WARMUP = 10
FLOOR = 0.02  # the last learning rate over the peak


def optimizer(groups: list[tuple[list[torch.nn.Parameter], float]], steps: int) -> MasterAdamW:
    """For groups of (parameters, peak learning rate): linear warm-up and cosine decay."""

    def factor(step: int) -> float:
        progress = min(1, step / max(1, steps))
        cosine = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
        return min((step + 1) / WARMUP, cosine)

    groups = [{"params": params, "lr": rate, "weight_decay": 0.0} for params, rate in groups]
    return MasterAdamW(groups, BETAS, CLIP, lambda adamw: torch.optim.lr_scheduler.LambdaLR(adamw, factor))


def stage_1(
    teacher: StudentForCausalLM,
    student: StudentForCausalLM,
    batches: Iterable[torch.Tensor],
    steps: int,
    learning_rate: float,
    measure_after: Iterable[int] = (),
    calibration: list[torch.Tensor] | None = None,
) -> Iterator[int]:
    """Aligns the student's attentions with the teacher's outputs, see `AttentionAlignmentModel`; yields each step of
    `measure_after` when it is done, 0 being before the first.

    batches: token ids [B, T]. calibration: batches for `wrapper.calibrate`, or None.
    """
    model = AttentionAlignmentModel(copy.deepcopy(teacher), student)
    if calibration:
        calibrate(model, [{"input_ids": ids} for ids in calibration])
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = optimizer([(trained, learning_rate)], steps)
    if 0 in measure_after:
        yield 0
    for step, ids in zip(range(1, steps + 1), batches):
        model(ids)["loss"].backward()
        adamw.step()
        if step in measure_after:
            yield step


def stage_2(
    teacher: StudentForCausalLM,
    hybrid: StudentForCausalLM,
    batches: Iterable[torch.Tensor],
    steps: int,
    learning_rate: float,
    learning_rate_attention: float,
) -> None:
    """Distils the teacher's logits into the hybrid, all of whose weights train. batches: token ids
    [B, T]."""
    linear = set()
    for module in hybrid.modules():
        if is_student_attention(module):
            linear.update(id(p) for p in module.parameters())
    parameters = list(hybrid.train().parameters())
    attention = [p for p in parameters if id(p) in linear]
    rest = [p for p in parameters if id(p) not in linear]
    adamw = optimizer([(attention, learning_rate_attention), (rest, learning_rate)], steps)
    for _, ids in zip(range(steps), batches):
        with torch.no_grad():
            hidden = teacher.model(ids, use_cache=False).last_hidden_state
        loss = hybrid(
            input_ids=ids,
            use_cache=False,
            teacher_hidden_states=hidden,
            teacher_head_weight=teacher.lm_head.weight,
        ).loss
        loss.backward()
        adamw.step()

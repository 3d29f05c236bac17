"""Stages 1 and 2 without a launcher, for benchmarks that train many small students in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch

from distill_model import StudentForCausalLM, is_student_attention
from layer_selection.candidate_training import MasterAdamW
from wrapper import AttentionAlignmentModel, calibrate

BETAS, CLIP, WARMUP, FLOOR = (
    (0.9, 0.95),
    1.0,
    10,
    0.02,
)  # FLOOR: the last learning rate over the peak


def optimizer(groups: list[tuple[list[torch.nn.Parameter], float]], steps: int) -> MasterAdamW:
    """For (parameters, learning rate), with warm-up and cosine."""

    def factor(i):
        return min(
            (i + 1) / WARMUP,
            FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1, i / max(1, steps)))) / 2,
        )

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
    """Trains the student's attentions to the teacher's outputs; yields the steps of `measure_after`
    as they are reached, 0 being before the first."""
    model = AttentionAlignmentModel(copy.deepcopy(teacher), student)
    if calibration:
        calibrate(model, calibration)
    adamw = optimizer([([p for p in model.parameters() if p.requires_grad], learning_rate)], steps)
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
    """Trains all of the hybrid to the teacher's logits."""
    linear = {id(p) for m in hybrid.modules() if is_student_attention(m) for p in m.parameters()}
    parameters = list(hybrid.train().parameters())
    adamw = optimizer(
        [
            ([p for p in parameters if id(p) in linear], learning_rate_attention),
            ([p for p in parameters if id(p) not in linear], learning_rate),
        ],
        steps,
    )
    for _, ids in zip(range(steps), batches):
        with torch.no_grad():
            hidden = teacher.model(ids, use_cache=False).last_hidden_state
        hybrid(
            input_ids=ids,
            use_cache=False,
            teacher_hidden_states=hidden,
            teacher_head_weight=teacher.lm_head.weight,
        ).loss.backward()
        adamw.step()

"""Stages 1 and 2 without a launcher, for benchmarks that train many small students in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch

from distill_model import StudentForCausalLM, is_student_attention
from wrapper import AttentionAlignmentModel, calibrate

BETAS, CLIP, WARMUP, FLOOR = (0.9, 0.95), 1.0, 10, 0.02  # FLOOR: the last learning rate over the peak


class MasterAdamW:
    """AdamW with warm-up and cosine, on fp32 copies of parameters that are not fp32, as DeepSpeed keeps them."""

    def __init__(self, groups: list[tuple[list[torch.nn.Parameter], float]], steps: int):
        self.params = [p for params, _ in groups for p in params]
        masters = [[p if p.dtype == torch.float32 else p.detach().float() for p in params] for params, _ in groups]
        self.masters = [m for group in masters for m in group]
        rates = [rate for _, rate in groups]
        self.adamw = torch.optim.AdamW([dict(params=m, lr=r) for m, r in zip(masters, rates)], betas=BETAS, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda i: min((i + 1) / WARMUP, FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1, i / steps))) / 2)
        )

    @torch.no_grad()
    def step(self) -> None:
        for param, master in zip(self.params, self.masters):
            if param is not master:
                master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.adamw.step()
        self.adamw.zero_grad()
        self.scheduler.step()
        for param, master in zip(self.params, self.masters):
            if param is not master:
                param.copy_(master)


def stage_1(
    teacher: StudentForCausalLM, student: StudentForCausalLM, batches: Iterable[torch.Tensor], steps: int,
    learning_rate: float, measure_after: Iterable[int] = (), calibration: list[torch.Tensor] | None = None,
) -> Iterator[int]:  # fmt: skip
    """Trains the student's attentions to the teacher's outputs; yields the steps of `measure_after` as they are reached,
    0 being before the first."""
    model = AttentionAlignmentModel(copy.deepcopy(teacher), student)
    if calibration:
        calibrate(model, calibration)
    optimizer = MasterAdamW([([p for p in model.parameters() if p.requires_grad], learning_rate)], steps)
    if 0 in measure_after:
        yield 0
    for step, ids in zip(range(1, steps + 1), batches):
        model(ids)["loss"].backward()
        optimizer.step()
        if step in measure_after:
            yield step


def stage_2(
    teacher: StudentForCausalLM, hybrid: StudentForCausalLM, batches: Iterable[torch.Tensor], steps: int,
    learning_rate: float, learning_rate_attention: float,
) -> None:  # fmt: skip
    """Trains all of the hybrid to the teacher's logits."""
    linear = {id(p) for m in hybrid.modules() if is_student_attention(m) for p in m.parameters()}
    parameters = list(hybrid.train().parameters())
    optimizer = MasterAdamW([([p for p in parameters if id(p) in linear], learning_rate_attention),
                             ([p for p in parameters if id(p) not in linear], learning_rate)], steps)  # fmt: skip
    for _, ids in zip(range(steps), batches):
        with torch.no_grad():
            hidden = teacher.model(ids, use_cache=False).last_hidden_state
        hybrid(input_ids=ids, use_cache=False, teacher_hidden_states=hidden,
               teacher_head_weight=teacher.lm_head.weight).loss.backward()  # fmt: skip
        optimizer.step()

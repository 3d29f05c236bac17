"""Distillation and language-model losses that never hold all logits.

The heads take hidden states and the output matrix, walk over the rows in chunks, and compute the gradients of a chunk
while its logits are at hand; backward only scales them. Peak memory is chunk_size x vocabulary, whatever the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK_SIZE = 1024  # rows of logits held at a time


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Distance of two attention outputs [..., D], a scalar in fp32.

    mse: the mean of the squared difference. l2: the mean over tokens of |student - teacher|_2 / sqrt(D), the loss of
    RADLADS (arXiv 2505.03005). Raises ValueError for another kind.
    """
    difference = student.float() - teacher.float()
    if kind == "mse":
        return difference.square().mean()
    if kind == "l2":
        return torch.linalg.vector_norm(difference, dim=-1).mean() / difference.shape[-1] ** 0.5
    raise ValueError(f"train.alignment_loss: {kind!r} is unknown; choose mse or l2")


class _LinearLoss(torch.autograd.Function):
    """sum_i loss(hidden_i @ weight.T) / denominator, chunk by chunk.

    `rows(start, stop, logits)` gives the summed loss of a chunk and, over the logits in place, its gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rows, denominator, chunk_size):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), chunk_size):
            chunk = hidden[start : start + chunk_size]
            loss, gradient = rows(start, start + len(chunk), (chunk @ weight.mT).float())
            total += loss
            if need_hidden or need_weight:
                gradient = gradient.div_(denominator).to(hidden.dtype)
            if need_hidden:
                d_hidden[start : start + len(chunk)] = gradient @ weight
            if need_weight:
                d_weight += gradient.mT @ chunk
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total / denominator

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * d_loss).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int = CHUNK_SIZE
) -> torch.Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T), a scalar in fp32; 0 if every label is ignored.

    hidden [N, H], weight [V, H], labels [N] with -100 for rows to ignore.
    """
    valid = labels != -100

    def rows(start, stop, logits):
        target, keep = labels[start:stop].clamp(min=0)[:, None], valid[start:stop, None]
        log_probs = F.log_softmax(logits, -1)
        loss = -(log_probs.gather(-1, target) * keep).sum()
        gradient = log_probs.exp_()
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        return loss, gradient.mul_(keep)

    return _LinearLoss.apply(hidden, weight, rows, valid.sum().clamp(min=1), chunk_size)


def forward_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """temperature^2 * mean over rows of KL(teacher || student), a scalar in fp32 (Hinton et al., arXiv 1503.02531).

    student_hidden [N, H_s], teacher_hidden [N, H_t], student_weight [V, H_s], teacher_weight [V, H_t]. The gradient
    flows to the student's two tensors only. Raises ValueError if the vocabularies differ.
    """
    if len(student_weight) != len(teacher_weight):
        raise ValueError(f"student and teacher vocabularies differ: {len(student_weight)} and {len(teacher_weight)}")
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()

    def rows(start, stop, logits):
        student = F.log_softmax(logits.div_(temperature), -1)
        teacher = F.log_softmax((teacher_hidden[start:stop] @ teacher_weight.mT).float().div_(temperature), -1)
        target = teacher.exp()
        loss = (target * (teacher - student)).sum() * temperature**2
        return loss, student.exp_().sub_(target).mul_(temperature)

    return _LinearLoss.apply(student_hidden, student_weight, rows, len(student_hidden), chunk_size)

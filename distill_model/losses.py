"""Distillation and language-model losses that never materialise all logits.

They take hidden states and the output projection's weight, iterate over the rows in chunks, and
compute the gradients of a chunk while its logits are in memory; backward only scales them. Peak
memory is chunk_size x vocabulary, whatever the batch. On a GPU the softmaxes of a chunk are one
Triton kernel, which reads the logits twice and overwrites them with their gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .divergences import TopTokens, divergence_rows, fused_divergence, top_token_rows, top_tokens
from .documents import predicting_learned
from .fused_ops import device_guard, mean_squared_error, scaled, use_triton

DIVERGENCES = ("forward", "reverse", "jsd", "topk")
# Rows of logits in memory at a time: on a GPU enough for GEMMs at full speed.
CHUNK_SIZE = 1024
CHUNK_SIZE_GPU = 4096
# Of the kernels of the cross-entropy and of the KL; measured on an H200 at a vocabulary of 151936.
BLOCK = 2048
WARPS = 4
KL_BLOCK = 4096
KL_WARPS = 8
LN_2 = tl.constexpr(math.log(2))
LEAST = tl.constexpr(-1e38)  # below all logits; unlike -inf its difference from itself is 0


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Distance of two attention outputs [..., D], a scalar in fp32.

    mse: the mean of the squared difference. l2: the mean over tokens of |student - teacher|_2 /
    sqrt(D), the loss of RADLADS (arXiv 2505.03005). Raises ValueError for another kind.
    """
    if kind == "mse":
        return mean_squared_error(student, teacher)
    if kind == "l2":
        distance = torch.linalg.vector_norm(student.float() - teacher.float(), dim=-1)
        return distance.mean() / student.shape[-1] ** 0.5
    raise ValueError(f"train.alignment_loss: {kind!r} is unknown; choose mse or l2")


@triton.jit
def _kl_rows(student, teacher, loss, vocabulary, scale, BLOCK: tl.constexpr):
    """KL(teacher || student) of a row of logits; its gradient overwrites the student's logits.

    scale: log2(e) / temperature, for softmaxes in base 2. One pass computes both normalisers and
    E_teacher[t - s]: KL = E[t - s] - lse(t) + lse(s). Each group of 8 neighbouring columns of the
    blocks keeps maxima and sums of its own, within a thread; they are joined once, after the pass.
    The second pass takes the blocks backwards, as the last ones are still in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * vocabulary
    teacher += row * vocabulary
    GROUPS: tl.constexpr = BLOCK // 8
    columns = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None]
    max_s = tl.full([GROUPS], LEAST, tl.float32)
    max_t = tl.full([GROUPS], LEAST, tl.float32)
    sum_s = tl.zeros([GROUPS], tl.float32)
    sum_t = tl.zeros([GROUPS], tl.float32)
    cross = tl.zeros([GROUPS], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(student + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        t = tl.load(teacher + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        new_s = tl.maximum(max_s, tl.max(s, 1))
        new_t = tl.maximum(max_t, tl.max(t, 1))
        old_t = tl.exp2(max_t - new_t)
        weight = tl.exp2(t - new_t[:, None])
        sum_s = sum_s * tl.exp2(max_s - new_s) + tl.sum(tl.exp2(s - new_s[:, None]), 1)
        sum_t = sum_t * old_t + tl.sum(weight, 1)
        cross = cross * old_t + tl.sum(tl.where(inside, weight * (t - s), 0.0), 1)
        max_s, max_t = new_s, new_t
    top_s = tl.max(max_s, 0)
    top_t = tl.max(max_t, 0)
    share_t = tl.exp2(max_t - top_t)
    total_t = tl.sum(sum_t * share_t, 0)
    lse_s = top_s + tl.log2(tl.sum(sum_s * tl.exp2(max_s - top_s), 0))
    lse_t = top_t + tl.log2(total_t)
    tl.store(loss + row, (tl.sum(cross * share_t, 0) / total_t - lse_t + lse_s) * LN_2)
    blocks = tl.cdiv(vocabulary, BLOCK)
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK
        inside = start + columns < vocabulary
        s = tl.load(student + start + columns, mask=inside).to(tl.float32) * scale
        t = tl.load(teacher + start + columns, mask=inside).to(tl.float32) * scale
        tl.store(student + start + columns, tl.exp2(s - lse_s) - tl.exp2(t - lse_t), mask=inside)


@triton.jit
def _cross_entropy_rows(logits, labels, loss, vocabulary, BLOCK: tl.constexpr):
    """Cross-entropy of a row of logits, which its gradient overwrites; both 0 where the label is
    -100."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    valid = (label != -100).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    lse = largest + tl.log(tl.sum(total, 0))
    target = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
    tl.store(loss + row, (lse - target) * valid)
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside).to(tl.float32)
        gradient = tl.exp(x - lse) - tl.where(start + columns == label, 1.0, 0.0)
        tl.store(logits + start + columns, gradient * valid, mask=inside)


class _LinearLoss(torch.autograd.Function):
    """scale x sum_i loss(hidden_i @ weight.T), chunk by chunk.

    `rows(start, stop, logits)` returns the summed loss of a chunk and its gradient, for which it
    may overwrite `logits`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rows, scale, chunk_size):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), chunk_size):
            chunk = hidden[start : start + chunk_size]
            loss, gradient = rows(start, start + len(chunk), chunk @ weight.mT)
            total += loss
            gradient = gradient.to(hidden.dtype)
            if need_hidden:
                d_hidden[start : start + len(chunk)] = gradient @ weight
            if need_weight:
                accumulate(d_weight, gradient.mT, chunk)
            del gradient  # before the next chunk's logits are computed
        ctx.save_for_backward(d_hidden, d_weight, scale)
        ctx.weight_dtype = weight.dtype
        return total * scale

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight, scale = ctx.saved_tensors
        factor = d_loss * scale
        if d_hidden is not None:
            d_hidden = scaled(d_hidden, factor)
        if d_weight is not None:
            out = torch.empty_like(d_weight, dtype=ctx.weight_dtype)
            d_weight = torch.mul(d_weight, factor, out=out)
        return d_hidden, d_weight, None, None, None


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in fp32, total's dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@device_guard
def linear_loss(hidden, weight, rows, fused_rows, scale, chunk_size):
    """See `_LinearLoss`. fused_rows: `rows` with Triton kernels, for a GPU."""
    if not torch.is_grad_enabled():  # otherwise gradients would be computed in vain
        hidden, weight = hidden.detach(), weight.detach()
    fused = use_triton(hidden)
    chunk_size = chunk_size or (CHUNK_SIZE_GPU if fused else CHUNK_SIZE)
    return _LinearLoss.apply(hidden, weight, fused_rows if fused else rows, scale, chunk_size)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int | None = None
) -> torch.Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T), a scalar in fp32; 0 if every label is
    ignored.

    hidden [N, H], weight [V, H], labels [N] with -100 for rows to ignore.
    """
    valid = labels != -100

    def rows(start, stop, logits):
        target = labels[start:stop].clamp(min=0)[:, None]
        keep = valid[start:stop, None]
        log_probs = F.log_softmax(logits.float(), -1)
        loss = -(log_probs.gather(-1, target) * keep).sum()
        gradient = log_probs.exp_()
        gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))
        return loss, gradient.mul_(keep)

    def fused_rows(start, stop, logits):
        loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _cross_entropy_rows[(len(logits),)](
            logits, labels[start:stop], loss, logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
        return loss.sum(), logits

    scale = 1 / valid.sum().clamp(min=1)
    return linear_loss(hidden, weight, rows, fused_rows, scale, chunk_size)


def check_vocabularies(student_weight: torch.Tensor, teacher_weight: torch.Tensor) -> None:
    """Raises ValueError if the output matrices [V, H] are of different vocabularies."""
    if len(student_weight) != len(teacher_weight):
        raise ValueError(f"student and teacher vocabularies differ: {len(student_weight)} and {len(teacher_weight)}")


def _fused_kl(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each row of logits, which their gradient overwrites."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    scale = math.log2(math.e) / temperature
    _kl_rows[(len(logits),)](logits, teacher, loss, logits.shape[1], scale, BLOCK=KL_BLOCK, num_warps=KL_WARPS)
    return loss


def mean_scale(hidden: torch.Tensor, learned: torch.Tensor | None, factor: float) -> torch.Tensor:
    """factor / the number of rows of hidden [N, H] that are `learned` (at least 1; None: all), a
    scalar in fp32."""
    if learned is None:
        return hidden.new_full((), factor / len(hidden), dtype=torch.float32)
    return factor / learned.sum().clamp(min=1).float()


def forward_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """temperature^2 * mean over rows of KL(teacher || student), a scalar in fp32, 0 without rows
    (Hinton et al., arXiv 1503.02531).

    student_hidden [N, H_s], teacher_hidden [N, H_t], student_weight [V, H_s], teacher_weight [V,
    H_t]. row_weights [N] in fp32: the sum of weight x KL instead of the mean. The gradient flows to
    the student's two tensors only. Raises ValueError if the vocabularies differ.
    """
    check_vocabularies(student_weight, teacher_weight)
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()

    def weighted(start: int, stop: int, losses: torch.Tensor, gradient: torch.Tensor):
        """The chunk's loss, and its gradient in place."""
        if row_weights is not None:
            weights = row_weights[start:stop]
            losses = losses * weights
            gradient.mul_(weights[:, None])
        return losses.sum() * temperature, gradient

    def rows(start, stop, logits):
        student = F.log_softmax(logits.float() / temperature, -1)
        teacher = teacher_hidden[start:stop] @ teacher_weight.mT
        teacher = F.log_softmax(teacher.float() / temperature, -1)
        target = teacher.exp()
        losses = (target * (teacher - student)).sum(-1)
        return weighted(start, stop, losses, student.exp_().sub_(target))

    def fused_rows(start, stop, logits):
        losses = _fused_kl(logits, teacher_hidden[start:stop] @ teacher_weight.mT, temperature)
        return weighted(start, stop, losses, logits)

    divisor = max(1, len(student_hidden)) if row_weights is None else 1
    scale = student_hidden.new_full((), temperature / divisor, dtype=torch.float32)
    return linear_loss(student_hidden, student_weight, rows, fused_rows, scale, chunk_size)


def _row_loss(student_hidden, student_weight, pair, temperature, chunk_size, learned):
    """temperature^2 * mean over rows of a divergence, a scalar in fp32. pair(start, stop, logits,
    fused) returns a chunk's divergences and its gradient, for which it may overwrite `logits`.
    learned: as in `divergence`."""

    def rows(start, stop, logits, fused=False):
        divergences, gradient = pair(start, stop, logits, fused)
        if learned is not None:
            divergences = divergences * learned[start:stop]
            gradient = gradient.mul_(learned[start:stop, None])
        return divergences.sum() * temperature, gradient

    scale = mean_scale(student_hidden, learned, temperature)
    return linear_loss(student_hidden, student_weight, rows, partial(rows, fused=True), scale, chunk_size)


def divergence(
    kind: str,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    learned: torch.Tensor | None = None,
    top_k: int = 64,
) -> torch.Tensor:
    """temperature^2 * mean over rows of a divergence of teacher and student, a scalar in fp32; the
    tensors are those of `forward_kl`.

    kind: forward, KL(teacher || student); reverse, KL(student || teacher) (Gu et al., arXiv
    2306.08543); jsd, the Jensen-Shannon divergence; topk, the forward KL over the teacher's top_k
    tokens and, as one event, all others. learned: bool [N], the rows to take the mean of (0 if there
    are none); None: all. Raises ValueError for another kind, and if the vocabularies
    differ.
    """
    if kind == "forward":
        args = (student_hidden, teacher_hidden, student_weight, teacher_weight)
        weights = None if learned is None else learned * mean_scale(student_hidden, learned, 1.0)
        return forward_kl(*args, temperature, chunk_size, weights)
    if kind not in DIVERGENCES:
        raise ValueError(f"train.kl: {kind!r} is unknown; choose {', '.join(DIVERGENCES)}")
    check_vocabularies(student_weight, teacher_weight)
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()

    def pair(start, stop, logits, fused):
        teacher = teacher_hidden[start:stop] @ teacher_weight.mT
        if kind == "topk":
            return top_token_rows(logits, top_tokens(teacher, top_k, temperature), temperature, fused)
        if fused:
            return fused_divergence(kind, logits, teacher, temperature), logits
        return divergence_rows(kind, logits, teacher, temperature)

    return _row_loss(student_hidden, student_weight, pair, temperature, chunk_size, learned)


def top_token_kl(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher: TopTokens,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    learned: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `divergence` of the kind topk, for a teacher's stored top tokens, [N, k] and [N], in fp16:
    their masses are made to sum to 1 again."""
    values, log_rest = teacher.values.float(), teacher.log_rest.float()
    total = torch.logaddexp(values.logsumexp(-1), log_rest)
    normalised = TopTokens(values - total[:, None], teacher.ids, log_rest - total)

    def pair(start, stop, logits, fused):
        rows = TopTokens(*(part[start:stop] for part in normalised))
        return top_token_rows(logits, rows, temperature, fused)

    return _row_loss(student_hidden, student_weight, pair, temperature, chunk_size, learned)


def next_token_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens, a scalar in fp32. hidden [B, T, H]; weight [V, H];
    labels [B, T], aligned with hidden, -100 ignored."""
    return linear_cross_entropy(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())


def micro_batch_weights(
    masks: list[torch.Tensor | None], device: torch.device, world_size: int = 1
) -> list[torch.Tensor | float]:
    """What the loss of each micro-batch of a step is multiplied by before their mean is taken, over
    all ranks, so that it is the mean over all counted positions of the step: a micro-batch's number
    of them, relative to the mean number.

    masks: bool [B, T] of this rank's micro-batches, True for the positions that their losses are the
    means over; None for all, for which the weights are 1. All ranks call it together.
    """
    if masks[0] is None:
        return [1.0] * len(masks)
    counts = torch.stack([mask.sum() for mask in masks]).to(device)
    total = counts.sum()
    if world_size > 1:
        torch.distributed.all_reduce(total)
    return list(counts * (len(masks) * world_size) / total.clamp(min=1))


@dataclass(frozen=True)
class DistillationLoss:
    """kl_weight * tau^2 KL(teacher || student), tau = kl_temperature (Hinton et al., arXiv
    1503.02531), the mean over all positions; plus, where ce_weight is not 0, ce_weight *
    cross-entropy of the next tokens. With a mask both are means over `predicting_learned`. kl,
    kl_top_k: another `divergence` instead of the KL."""

    kl_temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    kl: str = "forward"
    kl_top_k: int = 64

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        teacher_tokens: TopTokens | None = None,
    ) -> torch.Tensor:
        """A scalar in fp32. hidden [B, T, H_s] and teacher_hidden [B, T, H_t] after the final norm;
        weight [V, H_s] and teacher_weight [V, H_t] of the heads; labels [B, T], for ce_weight, -100
        ignored; loss_mask [B, T] bool, the tokens that are learned, None: all. teacher_tokens [B, T, k]:
        stored, instead of teacher_hidden and teacher_weight."""
        student_rows = hidden.flatten(0, 1)
        learned = None if loss_mask is None else predicting_learned(loss_mask).flatten()
        if teacher_tokens is not None:
            tokens = TopTokens(*(part.flatten(0, 1) for part in teacher_tokens))
            kl = top_token_kl(student_rows, weight, tokens, self.kl_temperature, learned=learned)
        else:
            kl = divergence(
                self.kl,
                student_rows,
                teacher_hidden.flatten(0, 1),
                weight,
                teacher_weight,
                self.kl_temperature,
                learned=learned,
                top_k=self.kl_top_k,
            )
        loss = self.kl_weight * kl
        if self.ce_weight:
            loss = loss + self.ce_weight * next_token_loss(hidden, weight, labels)
        return loss


@device_guard
@torch.no_grad()
def token_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of each token, [N] in fp32, of the tensors that `forward_kl` takes. No
    gradient. Raises ValueError if the vocabularies differ."""
    check_vocabularies(student_weight, teacher_weight)
    fused = use_triton(student_hidden)
    chunk_size = chunk_size or (CHUNK_SIZE_GPU if fused else CHUNK_SIZE)
    kls = []
    for student, teacher in zip(student_hidden.split(chunk_size), teacher_hidden.split(chunk_size)):
        student = student @ student_weight.mT
        teacher = teacher @ teacher_weight.mT
        if fused:
            kls.append(_fused_kl(student, teacher, 1.0))
        else:
            student = F.log_softmax(student.float(), -1)
            teacher = F.log_softmax(teacher.float(), -1)
            kls.append((teacher.exp() * (teacher - student)).sum(-1))
    return torch.cat(kls)

"""Divergences between the distributions of a teacher and a student, row by row of logits, with
their gradients: reverse KL, Jensen-Shannon divergence, and KL on the teacher's top tokens.

For a row of logits s of the student and t of the teacher, and a temperature tau: q = softmax(s /
tau), p = softmax(t / tau). Gradients are with respect to s / tau. On a GPU a chunk's rows are one
Triton kernel, whose gradients overwrite the student's logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# Of the kernels, as those of losses.py.
BLOCK = 2048
WARPS = 4
ROWS = 512  # of logits in fp32 at a time, of which top tokens are taken


class TopTokens(NamedTuple):
    """A teacher's distributions, by their most likely tokens.

    values [..., k]: log-probabilities of the tokens `ids` [..., k]. log_rest [...]: the logarithm of
    the mass of all other tokens, -inf if there is none.
    """

    values: torch.Tensor
    ids: torch.Tensor
    log_rest: torch.Tensor


def top_tokens(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopTokens:
    """The k most likely tokens of each row of logits [N, V], of all of them if k >= V, in fp32."""
    k = min(k, logits.shape[-1])
    parts = []
    for rows in logits.split(ROWS):
        rows = rows.float() / temperature
        values, ids = rows.topk(k, dim=-1)
        normaliser = rows.logsumexp(-1)
        log_rest = rows.scatter_(-1, ids, -float("inf")).logsumexp(-1) - normaliser
        parts.append((values - normaliser[:, None], ids, log_rest))
    return TopTokens(*(torch.cat(part) for part in zip(*parts)))


# ------------------------------------------------------------------------ PyTorch
def divergence_rows(
    kind: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence [N], gradient [N, V]) of logits [N, V], in fp32.

    reverse: KL(q || p), the sum of q (log q - log p), with the gradient q (log q - log p - KL).
    jsd: half of KL(p || m) + KL(q || m) with m = (p + q) / 2, and the gradient half of q (log q -
    log m - KL(q || m)).
    """
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    q = log_q.exp()
    if kind == "reverse":
        difference = log_q - log_p
        divergence = (q * difference).sum(-1)
        return divergence, q * (difference - divergence[:, None])
    p = log_p.exp()
    log_m = ((p + q) / 2).log()
    # Where both are 0 in fp32 so is their share.
    to_student = torch.where(q > 0, log_q - log_m, 0.0)
    to_teacher = torch.where(p > 0, log_p - log_m, 0.0)
    of_student = (q * to_student).sum(-1)
    divergence = (of_student + (p * to_teacher).sum(-1)) / 2
    return divergence, q * (to_student - of_student[:, None]) / 2


def top_token_rows(
    student: torch.Tensor, teacher: TopTokens, temperature: float, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL [N], gradient [N, V]) of the student's logits [N, V], which may be overwritten.

    The KL of the distributions over the teacher's k top tokens and, as one event, all others: the
    sum of p (log p - log q) over the k tokens, plus that of the rest's masses P and Q. Its gradient
    is q - p at the tokens, and q (1 - P / Q) elsewhere. It is at most KL(p || q), and equal to it if
    k is the vocabulary.
    """
    ids = teacher.ids.long()
    log_p = teacher.values.float()
    log_rest_p = teacher.log_rest.float()
    chosen = student.gather(-1, ids).float() / temperature
    logits = student.scatter_(-1, ids, -float("inf"))
    log_chosen = chosen.logsumexp(-1)
    if fused:
        log_rest = torch.empty_like(log_chosen)
        _rest_rows[(len(logits),)](
            logits,
            log_chosen,
            log_rest_p,
            log_rest,
            logits.shape[1],
            1 / temperature,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        gradient = logits
    else:
        logits = logits.float() / temperature
        log_rest = logits.logsumexp(-1)
    normaliser = torch.logaddexp(log_rest, log_chosen)
    log_rest_q = log_rest - normaliser
    log_q = chosen - normaliser[:, None]
    if not fused:
        factor = 1 - (log_rest_p - log_rest_q).exp()
        factor = torch.where(log_rest == -float("inf"), 0.0, factor)
        gradient = (logits - normaliser[:, None]).exp() * factor[:, None]
    gradient.scatter_(-1, ids, (log_q.exp() - log_p.exp()).to(gradient.dtype))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    of_rest = log_rest_p.exp() * (log_rest_p - log_rest_q)
    return divergence + torch.where(log_rest_p == -float("inf"), 0.0, of_rest), gradient


# ------------------------------------------------------------------------ kernels
@triton.jit
def _divergence_rows(student, teacher, loss, vocabulary, inverse_temperature, JSD: tl.constexpr, BLOCK: tl.constexpr):
    """Reverse KL, or with JSD the Jensen-Shannon divergence, of a row of logits; its gradient
    overwrites the student's logits. See `divergence_rows`.

    The first pass computes both normalisers and E_q[s - t]: KL(q || p) = E[s - t] - lse(s) +
    lse(t). The JSD takes another, for the mixture needs both normalisers.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * vocabulary
    teacher += row * vocabulary
    columns = tl.arange(0, BLOCK)
    max_s = -float("inf")
    max_t = -float("inf")
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(student + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        new_s = tl.maximum(max_s, tl.max(s, 0))
        new_t = tl.maximum(max_t, tl.max(t, 0))
        old_s = tl.exp(max_s - new_s)
        weight = tl.exp(s - new_s)
        sum_s = sum_s * old_s + weight
        sum_t = sum_t * tl.exp(max_t - new_t) + tl.exp(t - new_t)
        cross = cross * old_s + tl.where(inside, weight * (s - t), 0.0)
        max_s, max_t = new_s, new_t
    total_s = tl.sum(sum_s, 0)
    lse_s = max_s + tl.log(total_s)
    lse_t = max_t + tl.log(tl.sum(sum_t, 0))
    mean = tl.sum(cross, 0) / total_s - lse_s + lse_t
    if JSD:
        of_student = tl.zeros([BLOCK], tl.float32)
        of_teacher = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            s = tl.load(student + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
            q = tl.exp(s - lse_s)
            p = tl.exp(t - lse_t)
            log_m = tl.log((p + q) / 2)
            of_student += tl.where(inside & (q > 0), q * (s - lse_s - log_m), 0.0)
            of_teacher += tl.where(inside & (p > 0), p * (t - lse_t - log_m), 0.0)
        mean = tl.sum(of_student, 0)
        tl.store(loss + row, (mean + tl.sum(of_teacher, 0)) / 2)
    else:
        tl.store(loss + row, mean)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(student + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        q = tl.exp(s - lse_s)
        if JSD:
            p = tl.exp(t - lse_t)
            difference = tl.where(q > 0, s - lse_s - tl.log((p + q) / 2), 0.0)
            gradient = q * (difference - mean) / 2
        else:
            gradient = q * (s - lse_s - t + lse_t - mean)
        tl.store(student + start + columns, gradient, mask=inside)


@triton.jit
def _rest_rows(logits, log_chosen, log_rest_p, log_rest, vocabulary, inverse_temperature, BLOCK: tl.constexpr):
    """Of a row of logits, in which the teacher's tokens are -inf: the logarithm of the sum of exp of
    the others, and their gradient, which overwrites them. See `top_token_rows`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    columns = tl.arange(0, BLOCK)
    lowest = -1.0e30  # in place of -inf, whose differences are NaN
    largest = lowest
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        new = tl.maximum(largest, tl.max(tl.maximum(x, lowest), 0))
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    rest = largest + tl.log(tl.sum(total, 0))
    chosen = tl.load(log_chosen + row)
    top = tl.maximum(rest, chosen)
    normaliser = top + tl.log(tl.exp(rest - top) + tl.exp(chosen - top))
    factor = 1 - tl.exp(tl.load(log_rest_p + row) - (rest - normaliser))
    factor = tl.where(rest > lowest, factor, 0.0)
    tl.store(log_rest + row, rest)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        tl.store(logits + start + columns, tl.exp(x - normaliser) * factor, mask=inside)


def fused_divergence(kind: str, logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """As `divergence_rows`: the divergences [N]; the gradient overwrites `logits`."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _divergence_rows[(len(logits),)](
        logits,
        teacher,
        loss,
        logits.shape[1],
        1 / temperature,
        JSD=kind == "jsd",
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return loss

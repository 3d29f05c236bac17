"""The distillation head beside FLA's, Liger's where it is installed, and the four GEMMs that every
head needs.

    python benchmarks/kl_head.py [--tokens 16384 --hidden 1536 --vocab 151936]

Forward and backward pass on random hidden states in bf16, on a GPU. Times are medians within one
process, also given as ratios to the GEMMs: the student's logits, the teacher's, and the two
gradients. Memory is the peak above the inputs. The error is that of the gradient of the hidden
states against float64, on the first rows, relative to its norm. The other divergences of train.kl
follow, and topk on stored outputs, which needs no teacher's logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from functools import partial

from runtime.command import run_main

import torch

from distill_model.divergences import TopTokens, top_tokens
from distill_model.losses import DIVERGENCES, divergence, forward_kl, top_token_kl

REFERENCE_ROWS = 128
TOP_K = 64


def median_ms(function, repeats: int = 7) -> float:
    """The median time of a call on the GPU, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


def peak_gib(function) -> float:
    """The largest memory during a call, above what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def heads() -> dict:
    """Name -> (kind of the divergence, function of (student_hidden, teacher_hidden, student_weight,
    teacher_weight) -> loss)."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    found = {
        "ours": ("forward", forward_kl),
        "FLA": ("forward", lambda s, t, w, tw: fused_kl_div_loss(s, t, w, tw)),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        found["Liger"] = ("forward", lambda s, t, w, tw: LigerFusedLinearJSD(jsd_beta=0.0)(s, w, t, tw, None))
    for kind in DIVERGENCES[1:]:
        found[kind] = (kind, partial(divergence, kind, top_k=TOP_K))
    return found


@dataclass
class Inputs:
    """student, teacher: hidden states [n, h]. weight, teacher_weight: of the LM heads, [v, h]."""

    student: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor
    teacher_weight: torch.Tensor


def random(*shape: int, scale: float) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def random_inputs(tokens: int, hidden: int, vocab: int) -> Inputs:
    student = random(tokens, hidden, scale=1.0)
    noise = random(tokens, hidden, scale=1.0)
    weight = random(vocab, hidden, scale=2 * hidden**-0.5)
    teacher_weight = random(vocab, hidden, scale=2 * hidden**-0.5)
    teacher = 0.8 * student + 0.6 * noise
    return Inputs(student.requires_grad_(), teacher, weight.requires_grad_(), teacher_weight)


def reference_gradient(inputs: Inputs, rows: int, kind: str) -> torch.Tensor:
    """Of the mean divergence over all tokens with respect to the first `rows` hidden states, in
    float64, by autograd."""
    hidden = inputs.student.detach()[:rows].double().requires_grad_()
    s = (hidden @ inputs.weight.detach().double().mT).log_softmax(-1)
    t = (inputs.teacher[:rows].double() @ inputs.teacher_weight.double().mT).log_softmax(-1)
    if kind == "topk":
        ids = t.topk(TOP_K, -1).indices
        s, t = ([x.gather(-1, ids), x.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)] for x in (s, t))
        s, t = torch.cat(s, -1), torch.cat(t, -1)
    if kind == "reverse":
        s, t = t, s
    if kind == "jsd":
        m = (s.exp() / 2 + t.exp() / 2).log()
        total = ((t.exp() * (t - m)).sum() + (s.exp() * (s - m)).sum()) / 2
    else:
        total = (t.exp() * (t - s)).sum()
    return torch.autograd.grad(total / len(inputs.student), hidden)[0]


def stored_head(inputs: Inputs):
    """The head on stored outputs, with the arguments of the others."""
    parts = []
    for rows in inputs.teacher.split(4096):
        parts.append(top_tokens(rows @ inputs.teacher_weight.mT, TOP_K))
    values, ids, log_rest = (torch.cat(part) for part in zip(*parts))
    stored = TopTokens(values.half(), ids.int(), log_rest.half())
    return lambda s, t, w, tw: top_token_kl(s, w, stored)


def gemms_ms(inputs: Inputs) -> float:
    """The time of the four GEMMs, over 4096 tokens at a time."""
    student = inputs.student.detach()
    weight = inputs.weight.detach()
    rows = min(len(student), 4096)
    gradient = random(rows, len(weight), scale=1e-3)

    def gemms():
        for _ in range(len(student) // rows):
            student[:rows] @ weight.mT
            inputs.teacher[:rows] @ inputs.teacher_weight.mT
            gradient @ weight
            gradient.mT @ student[:rows]

    return median_ms(gemms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kl_head.py: skipped: the fused head runs on a GPU, and this machine has none")
    inputs = random_inputs(args.tokens, args.hidden, args.vocab)
    floor = gemms_ms(inputs)
    flops = 2 * 4 * args.tokens * args.hidden * args.vocab
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {args.tokens} tokens x {args.hidden}, "
        f"vocabulary {args.vocab}, bf16"
    )
    print(f"the four GEMMs: {floor:.1f} ms, {flops / floor / 1e9:.0f} TFLOP/s\n")
    print("| head | ms | over the GEMMs | peak memory GiB | loss | gradient error |")
    print("|:--|--:|--:|--:|--:|--:|")
    found = heads() | {"topk, stored": ("topk", stored_head(inputs))}
    for name, (kind, head) in found.items():
        reference = reference_gradient(inputs, REFERENCE_ROWS, kind)

        def step(head=head):
            inputs.student.grad = inputs.weight.grad = None
            loss = head(inputs.student, inputs.teacher, inputs.weight, inputs.teacher_weight)
            loss.backward()
            return loss

        loss = step().item()
        difference = inputs.student.grad[:REFERENCE_ROWS].double() - reference
        error = (difference.norm() / reference.norm()).item()
        ms = median_ms(step)
        inputs.student.grad = inputs.weight.grad = None  # they are part of the peak
        memory = peak_gib(step)
        print(f"| {name} | {ms:.1f} | {ms / floor:.2f} | {memory:.2f} | {loss:.5f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    run_main(main)

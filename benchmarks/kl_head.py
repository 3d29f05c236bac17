"""The distillation head beside FLA's, Liger's where it is installed, and the matrix products that no head can do without.

    python benchmarks/kl_head.py [--tokens 16384 --hidden 1536 --vocab 151936]

Forward and backward on random hidden states in bf16, on a GPU. Times are medians of one process, and read as ratios to
the products: the student's logits, the teacher's, and the two gradients. Memory is the peak above the inputs. The error is
that of the hidden states' gradient against float64, on the first rows, relative to its norm.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from runtime.command import run_main

import torch

from distill_model import forward_kl

REFERENCE_ROWS = 128


def median_ms(function, repeats: int = 7) -> float:
    """The median time of a call on the GPU, after two that warm up."""
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
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def heads() -> dict:
    """Name -> function of (student_hidden, teacher_hidden, student_weight, teacher_weight)."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    found = {"ours": forward_kl, "FLA": lambda s, t, w, tw: fused_kl_div_loss(s, t, w, tw)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        found["Liger"] = lambda s, t, w, tw: LigerFusedLinearJSD(jsd_beta=0.0)(s, w, t, tw, None)
    return found


def reference_gradient(s, t, w, tw, total: int) -> torch.Tensor:
    """Of the mean over `total` rows, in float64."""
    probabilities = [(a.double() @ b.double().mT).softmax(-1) for a, b in ((s, w), (t, tw))]
    return (probabilities[0] - probabilities[1]) @ w.double() / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=151936)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kl_head.py: skipped: the fused head runs on a GPU, and this machine has none")
    n, h, v = args.tokens, args.hidden, args.vocab
    random = lambda *shape, scale: (torch.randn(*shape, device="cuda") * scale).bfloat16()
    student, teacher = (random(n, h, scale=1.0) for _ in range(2))
    teacher = (0.8 * student + 0.6 * teacher).detach()
    weight, teacher_weight = (random(v, h, scale=2 * h**-0.5) for _ in range(2))
    student.requires_grad_(), weight.requires_grad_()

    rows, gradient = min(n, 4096), random(min(n, 4096), v, scale=1e-3)

    def products():
        for _ in range(n // rows):
            student.detach()[:rows] @ weight.detach().mT
            teacher[:rows] @ teacher_weight.mT
            gradient @ weight.detach()
            gradient.mT @ student.detach()[:rows]

    floor = median_ms(products)
    flops = 2 * 4 * n * h * v
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {n} tokens x {h}, vocabulary {v}, bf16")
    print(f"the four matrix products: {floor:.1f} ms, {flops / floor / 1e9:.0f} TFLOP/s\n")
    print("| head | ms | over the products | peak memory GiB | loss | gradient error |\n|:--|--:|--:|--:|--:|--:|")
    reference = reference_gradient(
        student.detach()[:REFERENCE_ROWS],
        teacher[:REFERENCE_ROWS],
        weight.detach(),
        teacher_weight,
        n,
    )
    for name, head in heads().items():

        def step(head=head):
            student.grad = weight.grad = None
            loss = head(student, teacher, weight, teacher_weight)
            loss.backward()
            return loss

        loss = step().item()
        error = ((student.grad[:REFERENCE_ROWS].double() - reference).norm() / reference.norm()).item()
        time, memory = median_ms(step), peak_gib(step)
        print(
            f"| {name} | {time:.1f} | {time / floor:.2f} | {memory:.2f} | {loss:.5f} | {error:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main)

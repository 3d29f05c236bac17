"""Throughput of hybrids that are trained jointly on one teacher, as layer selection trains them.

    python benchmarks/candidates_throughput.py
    python benchmarks/candidates_throughput.py train.cuda_graphs=false
    # on a CPU:
    python benchmarks/candidates_throughput.py --candidates 2 --steps 1 \\
        train.batch_size=2 train.micro_batch_size=2 train.train_seq_len=64

Random weights of the recall teacher's shape (benchmarks/recall_teacher.py) and random tokens. It prints the tokens/s of all
candidates together; the teacher's forward pass, which they share, is included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.environment import set_up_process

import torch
from datasets import Dataset
from tqdm import tqdm

from benchmarks.recall_teacher import FULL
from cuda_graphs import GraphedForward
from distill_model import StudentConfig, StudentForCausalLM
from layer_selection.candidate_training import JointTraining
from layer_selection.stopping_rule import StoppingRule

NUM_LAYERS = FULL.shape["num_hidden_layers"]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def random_chunks(count: int, length: int) -> Dataset:
    """`count` sequences of random tokens."""
    return Dataset.from_dict({"input_ids": torch.randint(FULL.vocab_size, (count, length)).tolist()})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--student", default="gdn_v7")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, after as many warm-up steps")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="of the stage 2 that each candidate trains",
    )
    args = parser.parse_intermixed_args()
    if args.candidates not in range(1, NUM_LAYERS + 1):
        raise ValueError(f"--candidates: {args.candidates} must be from 1 to {NUM_LAYERS}, for each keeps one layer")
    return args


def stage_2_config(args: argparse.Namespace) -> Config:
    file = Path(__file__).parents[1] / "configs" / "quickstart" / "stage2.yaml"
    overrides = [
        "train.batch_size=16",
        "train.micro_batch_size=16",
        f"train.train_seq_len={FULL.context_length}",
        f"train.max_steps={2 * args.steps}",
        "train.target_tokens=null",
        f"train.dtype={'bf16' if DEVICE == 'cuda' else 'fp32'}",
    ]
    return load_config(file, [*overrides, *args.overrides])


def random_teacher() -> StudentForCausalLM:
    shape = {name: value for name, value in FULL.shape.items() if name != "initializer_range"}
    config = StudentConfig(
        vocab_size=FULL.vocab_size,
        qk_norm=True,
        tie_word_embeddings=True,
        keep_full_attention_layers=list(range(NUM_LAYERS)),
        **shape,
    )
    return StudentForCausalLM(config).to(DEVICE, DTYPE).eval().requires_grad_(False)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    args = parse_args()
    set_up_process()
    torch.manual_seed(0)
    teacher = random_teacher()
    student = StudentForCausalLM.from_teacher(teacher, args.student)[0].to(DEVICE).eval()
    cfg = stage_2_config(args)
    bench = SimpleNamespace(
        cfg=cfg,
        teacher=teacher,
        student=student,
        device=teacher.device,
        train=random_chunks(cfg.train.batch_size * 4, cfg.train.train_seq_len),
        has_documents=False,
        max_documents=lambda rows: None,
        losses=lambda hybrid: [0.0],
    )
    candidates = list(range(args.candidates))
    kept = {layer: [layer] for layer in candidates}
    training = JointTraining(bench, StoppingRule(), kept, -1, Path("."))
    training.build(candidates, 0)
    for first in (0, args.steps):  # the first round is the warm-up
        synchronize()
        begin = time.perf_counter()
        training.train_round(candidates, first, first + args.steps, tqdm(disable=True))
        synchronize()
        seconds = time.perf_counter() - begin
    rate = args.steps * training.plan.tokens_per_step * len(candidates) / seconds
    graphs = isinstance(training.teacher_forward, GraphedForward)
    print(
        f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}; {len(candidates)} x {args.student}, "
        f"{training.plan.batch_size} x {training.plan.seq_len} tokens per step, "
        f"CUDA graphs {'on' if graphs else 'off'}: {rate:,.0f} tokens/s"
        + (f"; {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB" if DEVICE == "cuda" else "")
    )


if __name__ == "__main__":
    run_main(main)

"""Throughput of hybrids that are trained jointly on one teacher, as layer selection trains them.

    python benchmarks/candidates_throughput.py
    python benchmarks/candidates_throughput.py train.cuda_graphs=false

Random weights of the recall teacher's shape (benchmarks/recall_teacher.py) and random tokens. It prints the tokens/s of all
candidates together; the teacher's forward pass, which they share, is included.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from runtime.command import run_main
from runtime.config import Config, load_config
from runtime.environment import set_up_process

import torch
from tqdm import tqdm

from benchmarks.recall_teacher import FULL
from cuda_graphs import GraphedForward
from distill_model import StudentConfig, StudentForCausalLM
from layer_selection.candidate_training import JointTraining
from layer_selection.stopping_rule import StoppingRule

NUM_LAYERS = FULL.shape["num_hidden_layers"]


class RandomChunks:
    """`count` sequences of random tokens, indexed as a dataset of chunks."""

    def __init__(self, count: int, length: int):
        self.rows = torch.randint(FULL.vocab_size, (count, length)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices) -> dict:
        return {"input_ids": [self.rows[i] for i in indices]}


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
        "train.dtype=bf16",
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
    return StudentForCausalLM(config).bfloat16().cuda().eval().requires_grad_(False)


def main() -> None:
    args = parse_args()
    set_up_process()
    if not torch.cuda.is_available():
        sys.exit("candidates_throughput.py: skipped: it measures GPUs, and this machine has none")
    torch.manual_seed(0)
    teacher = random_teacher()
    student = StudentForCausalLM.from_teacher(teacher, args.student)[0].cuda().eval()
    cfg = stage_2_config(args)
    bench = SimpleNamespace(
        cfg=cfg,
        teacher=teacher,
        student=student,
        device=teacher.device,
        train=RandomChunks(cfg.train.batch_size * 4, cfg.train.train_seq_len),
        has_documents=False,
        losses=lambda hybrid: [0.0],
    )
    candidates = list(range(args.candidates))
    kept = {layer: [layer] for layer in candidates}
    training = JointTraining(bench, StoppingRule(), kept, -1, Path("."))
    training.build(candidates, 0)
    for first in (0, args.steps):  # the first round is the warm-up
        torch.cuda.synchronize()
        begin = time.perf_counter()
        training.train_round(candidates, first, first + args.steps, tqdm(disable=True))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    rate = args.steps * training.plan.tokens_per_step * len(candidates) / seconds
    graphs = isinstance(training.teacher_forward, GraphedForward)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(candidates)} x {args.student}, "
        f"{training.plan.batch_size} x {training.plan.seq_len} tokens per step, "
        f"CUDA graphs {'on' if graphs else 'off'}: {rate:,.0f} tokens/s; "
        f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    run_main(main)

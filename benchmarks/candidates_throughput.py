"""Tokens a second of hybrids that train side by side on one teacher, as layer selection trains them.

    python benchmarks/candidates_throughput.py
    python benchmarks/candidates_throughput.py train.cuda_graphs=true

Random weights of the recall teacher's shape (benchmarks/recall_teacher.py) and random tokens. It prints the tokens that all candidates
together read in a second; the teacher's forward pass, which they share, is in the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from runtime.command import run_main
from runtime.environment import set_up_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--student", default="gdn_v7")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, after as many that are not")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="of the stage 2 that each candidate trains",
    )
    args = parser.parse_intermixed_args()
    set_up_process()
    from runtime.config import load_config

    import torch
    from tqdm import tqdm

    from benchmarks.recall_teacher import FULL
    from distill_model import StudentConfig, StudentForCausalLM
    from layer_selection.candidate_training import JointTraining
    from layer_selection.stopping_rule import StoppingRule

    if not torch.cuda.is_available():
        sys.exit("candidates_throughput.py: skipped: it measures GPUs, and this machine has none")
    torch.manual_seed(0)
    shape = {name: value for name, value in FULL.shape.items() if name != "initializer_range"}
    layers = list(range(shape["num_hidden_layers"]))
    if args.candidates not in range(1, len(layers) + 1):
        raise ValueError(f"--candidates: {args.candidates} must be from 1 to {len(layers)}, for each keeps one layer")
    config = StudentConfig(
        vocab_size=FULL.vocab_size,
        qk_norm=True,
        tie_word_embeddings=True,
        keep_full_attention_layers=layers,
        **shape,
    )
    teacher = StudentForCausalLM(config).bfloat16().cuda().eval().requires_grad_(False)
    student = StudentForCausalLM.from_teacher(teacher, args.student)[0].cuda().eval()
    file = Path(__file__).parents[1] / "configs" / "quickstart" / "stage2.yaml"
    steps = [
        "train.batch_size=16",
        "train.micro_batch_size=16",
        f"train.train_seq_len={FULL.context_length}",
        f"train.max_steps={2 * args.steps}",
        "train.target_tokens=null",
        "train.dtype=bf16",
    ]
    cfg = load_config(str(file), [*steps, *args.overrides])
    rows = torch.randint(FULL.vocab_size, (cfg.train.batch_size * 4, cfg.train.train_seq_len)).tolist()

    class Chunks(list):
        def __getitem__(self, at):
            return {"input_ids": [list.__getitem__(self, i) for i in at]}

    bench = SimpleNamespace(
        cfg=cfg,
        teacher=teacher,
        student=student,
        device=teacher.device,
        train=Chunks(rows),
        kls=lambda hybrid: [0.0],
    )
    mine = layers[: args.candidates]
    rounds = JointTraining(bench, StoppingRule(), {layer: [layer] for layer in mine}, -1, Path("."))
    rounds.build(mine, 0)
    seconds = []
    for first in (0, args.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        rounds.train_round(mine, first, first + args.steps, tqdm(disable=True))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    tokens = args.steps * rounds.plan.tokens_per_step * len(mine) / seconds[1]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(mine)} x {args.student}, {rounds.plan.batch_size} x "
        f"{rounds.plan.seq_len} tokens a step, CUDA graphs {'on' if cfg.train.cuda_graphs else 'off'}: {tokens:,.0f} tokens/s; "
        f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    run_main(main)

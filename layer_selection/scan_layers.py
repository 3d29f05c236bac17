"""A quick choice of the layers that keep full attention: restore one at a time, train nothing, measure the KL.

    python -m layer_selection.scan_layers --student OUT/stage1/converted-hf --teacher OUT/teacher \
        --data OUT/data/chunked_context256 --output_dir OUT/layer_scan

For each layer, only it gets the teacher's softmax attention back in the all-linear student of stage 1; the KL to the
teacher on training chunks says how much that layer alone repairs. The K layers with the lowest KL are kept. It prints a
table and writes layer_scan.json: {"all_linear_kl", "layers": [{"layer", "kl"}], "keep": [...]}.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher
from distill_model import StudentForCausalLM


@torch.no_grad()
def mean_kl(student: StudentForCausalLM, teacher: StudentForCausalLM, batches, teacher_hidden) -> float:
    """Mean over all tokens of KL(teacher || student). batches and teacher_hidden: lists of [B, T]
    and [B, T, H]."""
    head, total = teacher.lm_head.weight, 0.0
    for ids, hidden in zip(batches, teacher_hidden):
        out = student(input_ids=ids, use_cache=False, teacher_hidden_states=hidden, teacher_head_weight=head)
        total += out.loss.item() * ids.numel()
    return total / sum(ids.numel() for ids in batches)


@torch.no_grad()
def scan(
    student: StudentForCausalLM, teacher: StudentForCausalLM, batches: list[torch.Tensor]
) -> tuple[float, list[float]]:
    """(KL of the all-linear student, KL with layer i restored for each i). The student comes back
    unchanged."""
    hidden = [teacher.model(input_ids=ids, use_cache=False).last_hidden_state for ids in batches]
    baseline = mean_kl(student, teacher, batches, hidden)
    restored = []
    for mine, theirs in zip(tqdm(student.model.layers, desc="scan", unit="layer"), teacher.model.layers):
        linear, mine.attn = mine.attn, theirs.attn
        try:
            restored.append(mean_kl(student, teacher, batches, hidden))
        finally:
            mine.attn = linear
    return baseline, restored


def choose(kls: list[float], keep: int) -> list[int]:
    """The `keep` layers with the lowest KL, in order of their index."""
    return sorted(sorted(range(len(kls)), key=kls.__getitem__)[:keep])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="stage 1's converted-hf")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="a folder written by preprocess_chunk.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--keep", type=int, help="how many layers to keep; default: a quarter")
    parser.add_argument("--chunks", type=int, default=24, help="training chunks to measure on")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()

    disable_progress_bar()  # transformers' own, a line for every file read
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = StudentForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device).eval()
    teacher = load_teacher(args.teacher).to(device)
    layers = student.config.num_hidden_layers
    keep = max(1, layers // 4) if args.keep is None else args.keep
    if not 1 <= keep <= layers:
        raise ValueError(f"--keep: {keep} must be between 1 and the student's {layers} layers")
    if student.config.keep_full_attention_layers:
        raise ValueError(f"--student: {args.student} keeps layers already; pass stage 1's all-linear converted-hf")
    tokenizer = load_tokenizer(args.teacher, "--teacher")
    train = open_chunks_for(tokenizer, teacher.config.vocab_size, args.data, key="--data", model_key="--teacher").train
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.chunks].tolist()
    ids = torch.as_tensor(train[rows]["input_ids"], dtype=torch.long, device=device)
    baseline, kls = scan(student, teacher, list(ids.split(args.batch_size)))
    kept = choose(kls, keep)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "all_linear_kl": baseline,
        "layers": [{"layer": i, "kl": kl} for i, kl in enumerate(kls)],
        "keep": kept,
    }
    partial = args.output_dir / "layer_scan.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.output_dir / "layer_scan.json")
    print(f"{'restored':>9}  {'KL':>8}  kept\n{'none':>9}  {baseline:8.4f}")
    for i, kl in enumerate(kls):
        print(f"{i:>9}  {kl:8.4f}  {'yes' if i in kept else ''}")
    print(f"Kept: {kept}; {ids.numel()} training tokens a layer, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)

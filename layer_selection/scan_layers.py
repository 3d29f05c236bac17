"""A quick choice of the layers that keep full attention: restore one at a time, train nothing,
measure the KL.

    python -m layer_selection.scan_layers --student OUT/stage1/converted-hf --teacher OUT/teacher \
        --data OUT/data/chunked_context256 --output_dir OUT/layer_scan

`select_layers.py --method scan` without a stage-2 config. For each layer, only it gets the
teacher's softmax attention back in the all-linear student of stage 1; the KL to the teacher on
held-out chunks says how much that layer alone repairs. The K layers with the lowest KL are kept. It
prints a table and writes layer_scan.json: {"all_linear_kl", "layers": [{"layer", "kl"}], "keep":
[...]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_write_text

if TYPE_CHECKING:
    import torch

    from distill_model import StudentForCausalLM

# Modules that import torch are imported in functions, after the arguments are read.


def load_models(args: argparse.Namespace) -> tuple[StudentForCausalLM, StudentForCausalLM]:
    """(Student, teacher), in bf16 on a GPU and fp32 on a CPU. Raises ValueError if the student is
    not all-linear."""
    import torch

    from convert import load_teacher
    from distill_model import StudentForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = StudentForCausalLM.from_pretrained(args.student, dtype=dtype).to(device).eval()
    if student.config.keep_full_attention_layers:
        raise ValueError(f"--student: {args.student} keeps layers already; pass stage 1's all-linear converted-hf")
    teacher = load_teacher(args.teacher, dtype).to(device).eval()
    return student, teacher


def scan(
    student: StudentForCausalLM,
    teacher: StudentForCausalLM,
    batches: list[dict],
    weights: Sequence[torch.Tensor | None],
) -> tuple[list[float], dict[int, list[float]]]:
    """(KL of the all-linear student, layer -> KL with that layer restored), each on every sequence
    of the batches, whose positions have these weights."""
    from heldout import read_chunks
    from layer_selection.bench import measure_layer_swaps, sequence_kls

    teacher_outputs = [read_chunks(teacher, batch) for batch in batches]

    def kls(model: StudentForCausalLM) -> list[float]:
        return sequence_kls(model, batches, teacher_outputs, weights)

    return kls(student), measure_layer_swaps(kls, student, teacher)


def table(all_linear: float, kls: dict[int, float], kept: list[int]) -> str:
    lines = [f"{'restored':>9}  {'KL':>8}  kept", f"{'none':>9}  {all_linear:8.4f}"]
    for layer, kl in kls.items():
        mark = "yes" if layer in kept else ""
        lines.append(f"{layer:>9}  {kl:8.4f}  {mark}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="stage 1's converted-hf")
    parser.add_argument("--teacher", required=True)
    parser.add_argument(
        "--data",
        required=True,
        help="a folder written by preprocess_chunk.py, with a held-out split",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--keep", type=int, help="how many layers to keep; default: a quarter")
    parser.add_argument(
        "--document_mask",
        choices=("auto", "false", "true"),
        default="auto",
        help="true: read the documents of a chunk one by one, as data.document_mask does; auto: where the chunks record "
        "them (auto)",
    )
    parser.add_argument("--chunks", type=int, default=24, help="held-out chunks to measure on")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    from heldout import ids_of
    from layer_selection.baselines import rank_scan
    from layer_selection.bench import heldout_batches, heldout_weights

    disable_progress_bar()  # transformers' own, a line for every file read
    start = time.monotonic()
    student, teacher = load_models(args)
    layers = student.config.num_hidden_layers
    keep = max(1, layers // 4) if args.keep is None else args.keep
    if not 1 <= keep <= layers:
        raise ValueError(f"--keep: {keep} must be between 1 and the student's {layers} layers")
    tokenizer = load_tokenizer(args.teacher, "--teacher")
    chunks = open_chunks_for(
        tokenizer,
        teacher.config.vocab_size,
        args.data,
        key="--data",
        model_key="--teacher",
        document_mask={"auto": "auto", "false": False, "true": True}[args.document_mask],
    )
    batches = heldout_batches(chunks, args.chunks, args.batch_size, f"--data: {args.data}")
    weights = heldout_weights(chunks, args.chunks, args.batch_size)

    all_linear, by_sequence = scan(student, teacher, batches, weights)
    kept = rank_scan(by_sequence).keep(keep)
    kls = {layer: statistics.fmean(values) for layer, values in by_sequence.items()}
    result = {
        "all_linear_kl": statistics.fmean(all_linear),
        "layers": [{"layer": layer, "kl": kl} for layer, kl in kls.items()],
        "keep": kept,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.output_dir / "layer_scan.json", json.dumps(result, indent=1) + "\n")
    print(table(result["all_linear_kl"], kls, kept))
    tokens = sum(ids_of(batch).numel() for batch in batches)
    print(f"Kept: {kept}; {tokens} held-out tokens per layer, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)

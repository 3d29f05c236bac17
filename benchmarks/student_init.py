"""How good each student's start is: quality right after surgery, and after some steps of stage 1.

    python benchmarks/student_init.py --teacher quickstart_out/teacher --data quickstart_out/data/chunked_context256
    python benchmarks/student_init.py --random            # a random teacher of Qwen2.5's kind: output errors alone

For every student, with one layer replaced and with all: held-out perplexity (of trained teachers), and the error of the
attention outputs, squared and relative to the teacher's mean square, averaged over layers; at the start and after each
of --steps. A start must not explode: with all layers replaced, its perplexity is at most that of the teacher without
attention, the first row; the exit code is 1 where it is not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile

from runtime.command import run_main
from runtime.data import open_chunks

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.training import stage_1
from convert import load_teacher
from convert.loader import KEY
from distill_model import (
    STUDENT_ATTENTION_MAP,
    StudentForCausalLM,
    can_calibrate,
    check_calibration,
)
from quickstart.measure import alignment, mean_loss
from quickstart.train_teacher import token_ids

BATCH_SIZE, LEARNING_RATE = 4, 3e-3


def random_teacher() -> StudentForCausalLM:
    """Qwen2.5's kind at a small size: biases, six query heads a key/value head, tied."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_teacher(folder)


def without_attention(teacher: StudentForCausalLM, ids: torch.Tensor) -> float:
    """The loss of the teacher with every attention output 0."""
    hooks = [
        layer.attn.register_forward_hook(lambda m, i, out: (torch.zeros_like(out[0]), *out[1:]))
        for layer in teacher.model.layers
    ]
    loss = mean_loss(teacher, ids)
    for hook in hooks:
        hook.remove()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a trained teacher")
    parser.add_argument("--data", help="chunks with a held-out part, of preprocess_chunk.py")
    parser.add_argument("--random", action="store_true", help="a random teacher on random tokens instead")
    parser.add_argument(
        "--students",
        nargs="+",
        choices=sorted(STUDENT_ATTENTION_MAP),
        help="default: all, with --calibrate those that it fits",
    )
    parser.add_argument("--steps", nargs="*", type=int, default=[50, 500], help="steps of stage 1 to measure after")
    parser.add_argument("--layer", type=int, default=0, help="the layer that is replaced alone")
    parser.add_argument(
        "--calibrate",
        type=int,
        default=0,
        help="batches of a calibrated start, as train.calibrate_init",
    )
    parser.add_argument("--chunks", type=int, default=32, help="held-out chunks to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.random == bool(args.teacher and args.data):
        parser.error("give --teacher and --data, or --random")
    if args.calibrate:
        for name in args.students or ():
            check_calibration(name)
    students = args.students or [
        name for name in sorted(STUDENT_ATTENTION_MAP) if not args.calibrate or can_calibrate(name)
    ]

    device, last = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        max(args.steps, default=0),
    )
    generator = torch.Generator().manual_seed(args.seed)
    if args.random:
        teacher = random_teacher().to(device)
        heldout, *batches = torch.randint(
            0, 4096, (last + args.calibrate + 1, BATCH_SIZE, 256), generator=generator
        ).to(device)
    else:
        teacher = load_teacher(args.teacher).to(device)
        chunks = open_chunks(args.data, key="--data", vocab_size=teacher.config.vocab_size)
        heldout = token_ids(chunks.heldout, range(min(args.chunks, len(chunks.heldout)))).to(device)
        rows = torch.randint(0, len(chunks.train), (last + args.calibrate, BATCH_SIZE), generator=generator).tolist()
        batches = [token_ids(chunks.train, row).to(device) for row in rows]
    layers = range(teacher.config.num_hidden_layers)
    if args.layer not in layers:
        raise ValueError(f"--layer: {args.layer} must be one of the teacher's, 0 to {layers[-1]}")

    def perplexity(loss: float) -> str:
        return "" if args.random else f"{math.exp(loss):.1f}"

    bound = math.inf if args.random else without_attention(teacher, heldout)
    print(f"teacher: perplexity {perplexity(mean_loss(teacher, heldout))}; without attention {perplexity(bound)}")
    print(
        "| student | steps | error | perplexity | one layer: error | one layer: perplexity |\n|:--|--:|--:|--:|--:|--:|"
    )
    exploded = []
    for name in tqdm(students, desc="students", unit="student"):
        torch.manual_seed(args.seed)
        student = StudentForCausalLM.from_teacher(teacher, name)[0].to(device)
        for step in stage_1(teacher, student, batches[:last], last, LEARNING_RATE, {0, *args.steps}, batches[last:]):
            student.eval()
            errors, loss = alignment(student, teacher, heldout[:8]), mean_loss(student, heldout)
            alone = student.restore_full_attention(teacher, [i for i in layers if i != args.layer]).to(device).eval()
            tqdm.write(
                f"| {name} | {step} | {sum(errors) / len(errors):.3f} | {perplexity(loss)} | {errors[args.layer]:.3f} | "
                f"{perplexity(mean_loss(alone, heldout))} |",
                file=sys.stdout,
            )
            if step == 0 and not loss <= bound:
                exploded.append(name)
            student.train()
    if exploded:
        sys.exit(f"worse than no attention at the start: {', '.join(exploded)}")


def command() -> None:
    """`main`, with errors in terms of its own options."""
    try:
        main()
    except ValueError as error:
        text = str(error).replace(KEY, "--teacher").replace("train.calibrate_init", "--calibrate")
        raise ValueError(text) from error


if __name__ == "__main__":
    run_main(command)

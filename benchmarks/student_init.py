"""How good each student's initialisation is: its quality at the start, and after some steps of
stage 1.

    python benchmarks/student_init.py --teacher quickstart_out/teacher --data
    quickstart_out/data/chunked_context256 python benchmarks/student_init.py --random            #
    a random teacher of Qwen2.5's kind: output errors alone

For every student, with one layer replaced and with all: held-out perplexity (of trained
teachers), and the error of the attention outputs, squared and relative to the teacher's mean
square, averaged over layers; at the start and after each of --steps. An initialisation must not
explode: with all layers replaced, its perplexity is at most that of the teacher without
attention, which the first line shows; the exit code is 1 where it is not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile

from runtime.command import run_main
from runtime.data import open_chunks, split_batch

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

BATCH_SIZE = 4
LEARNING_RATE = 3e-3


def random_teacher() -> StudentForCausalLM:
    """A small teacher like Qwen2.5: biases, six query heads per key/value head, tied embeddings."""
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
    """The loss of the teacher with all attention outputs set to 0."""

    def zero_output(module, inputs, outputs):
        return torch.zeros_like(outputs[0]), *outputs[1:]

    hooks = [layer.attn.register_forward_hook(zero_output) for layer in teacher.model.layers]
    loss = mean_loss(teacher, split_batch({"input_ids": ids}, BATCH_SIZE))
    for hook in hooks:
        hook.remove()
    return loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a trained teacher")
    parser.add_argument("--data", help="chunks with a held-out part, of preprocess_chunk.py")
    parser.add_argument("--random", action="store_true", help="a random teacher on random tokens instead")
    parser.add_argument(
        "--students",
        nargs="+",
        choices=sorted(STUDENT_ATTENTION_MAP),
        help="default: all; with --calibrate those that can be calibrated",
    )
    parser.add_argument("--steps", nargs="*", type=int, default=[50, 500], help="steps of stage 1 to measure after")
    parser.add_argument("--layer", type=int, default=0, help="the layer that is replaced alone")
    parser.add_argument(
        "--calibrate",
        type=int,
        default=0,
        help="batches for calibrating the initialisation, as train.calibrate_init",
    )
    parser.add_argument("--chunks", type=int, default=32, help="held-out chunks to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.random == bool(args.teacher and args.data):
        parser.error("give --teacher and --data, or --random")
    if args.calibrate:
        for name in args.students or ():
            check_calibration(name)
    if not args.students:
        args.students = [name for name in sorted(STUDENT_ATTENTION_MAP) if not args.calibrate or can_calibrate(name)]
    return args


def load(args: argparse.Namespace, device: torch.device) -> tuple[StudentForCausalLM, torch.Tensor, list[torch.Tensor]]:
    """The teacher, held-out token ids [chunks, T], and batches [BATCH_SIZE, T] for training,
    followed by those for calibration."""
    generator = torch.Generator().manual_seed(args.seed)
    batches = max(args.steps, default=0) + args.calibrate
    if args.random:
        teacher = random_teacher().to(device)
        heldout, *training = torch.randint(0, 4096, (batches + 1, BATCH_SIZE, 256), generator=generator).to(device)
        return teacher, heldout, training
    teacher = load_teacher(args.teacher).to(device)
    chunks = open_chunks(args.data, key="--data", vocab_size=teacher.config.vocab_size)
    heldout = token_ids(chunks.heldout, range(min(args.chunks, len(chunks.heldout)))).to(device)
    rows = torch.randint(0, len(chunks.train), (batches, BATCH_SIZE), generator=generator).tolist()
    return teacher, heldout, [token_ids(chunks.train, row).to(device) for row in rows]


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, heldout, batches = load(args, device)
    layers = range(teacher.config.num_hidden_layers)
    if args.layer not in layers:
        raise ValueError(f"--layer: {args.layer} must be one of the teacher's, 0 to {layers[-1]}")
    other_layers = [i for i in layers if i != args.layer]

    def perplexity(loss: float) -> str:
        return "" if args.random else f"{math.exp(loss):.1f}"

    measured = split_batch({"input_ids": heldout}, BATCH_SIZE)
    bound = math.inf if args.random else without_attention(teacher, heldout)
    print(f"teacher: perplexity {perplexity(mean_loss(teacher, measured))}; without attention {perplexity(bound)}")
    print("| student | steps | error | perplexity | one layer: error | one layer: perplexity |")
    print("|:--|--:|--:|--:|--:|--:|")
    exploded = []
    last = max(args.steps, default=0)
    measured_steps = {0, *args.steps}
    for name in tqdm(args.students, desc="students", unit="student"):
        torch.manual_seed(args.seed)
        student = StudentForCausalLM.from_teacher(teacher, name)[0].to(device)
        training = stage_1(teacher, student, batches[:last], last, LEARNING_RATE, measured_steps, batches[last:])
        for step in training:
            student.eval()
            errors = alignment(student, teacher, heldout[:8])
            loss = mean_loss(student, measured)
            with_one_linear = student.restore_full_attention(teacher, other_layers).to(device).eval()
            error = sum(errors) / len(errors)
            tqdm.write(
                f"| {name} | {step} | {error:.3f} | {perplexity(loss)} | "
                f"{errors[args.layer]:.3f} | {perplexity(mean_loss(with_one_linear, measured))} |",
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

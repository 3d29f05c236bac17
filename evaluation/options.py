"""The options that evaluate.py and eval_compare.py share, checked before a model is loaded."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.data import check_special_tokens, load_tokenizer, open_chunks

from recall_tasks import NUM_WORDS, WORDS

from .tasks import DEFAULT_SEQ_LEN, GROUPS, KL, PERPLEXITY


@dataclass(frozen=True)
class Options:
    """What one call evaluates, and how."""

    checkpoints: list[str]
    tasks: list[str]  # names of groups and tasks, as they were typed
    seq_lens: list[int]  # []: the default lengths
    batch_size: str  # a number, or "auto"
    num_gpus: int
    limit: int | None  # documents of a task; None: all
    output: Path
    data: str | None  # a folder of chunks
    num_words: int
    teacher: str | None  # the checkpoint that the held-out KL is measured against
    document_mask: bool  # whether the documents of a chunk are read one by one


def option_name(name: str) -> str:
    """An option as the user set it: `--name`, or eval.sh's variable NAME, which sets EVAL_SH."""
    return name.upper() if "EVAL_SH" in os.environ else f"--{name}"


def option_error(name: str, message: str) -> ValueError:
    """The error for an option's value, which begins with the option's name."""
    return ValueError(f"{option_name(name)}: {message}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both scripts take."""
    groups = ", ".join(GROUPS)
    parser.add_argument("--tasks", default="ruler", help=f"separated by commas; groups: {groups} (ruler)")
    parser.add_argument(
        "--seq_lens",
        default="",
        help=f"lengths in tokens of tasks that are made to a length, by commas ({DEFAULT_SEQ_LEN})",
    )
    parser.add_argument("--batch_size", default="8", help="documents per batch and GPU, or auto (8)")
    parser.add_argument("--num_gpus", type=int, help="processes, one per GPU (all visible; 1 on a CPU)")
    parser.add_argument(
        "--limit",
        type=int,
        help="evaluate only the first LIMIT documents of a task; for trials, not for reported scores",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    parser.add_argument(
        "--data",
        help=f"chunks of preprocess_chunk.py with a held-out part, for {PERPLEXITY} and {KL}",
    )
    parser.add_argument(
        "--document_mask",
        choices=("auto", "false", "true"),
        default="auto",
        help="true: read the documents of a chunk of --data one by one, as data.document_mask does; auto: where the "
        "chunks record them (auto)",
    )
    parser.add_argument(
        "--num_words",
        type=int,
        default=NUM_WORDS,
        help=f"different words in the recall tasks ({NUM_WORDS})",
    )


def read_options(args: argparse.Namespace) -> Options:
    """The options of parsed arguments: `add_options`, checkpoints and teacher.

    Raises ValueError, naming the option, for values that no evaluation can use.
    """
    tasks = split_list(args.tasks)
    if not tasks:
        raise option_error("tasks", f"names no task; groups: {', '.join(GROUPS)}")
    try:
        seq_lens = [int(text) for text in split_list(args.seq_lens)]
    except ValueError:
        message = f"{args.seq_lens!r} must be numbers of tokens, separated by commas"
        raise option_error("seq_lens", message) from None
    check_numbers(args, seq_lens)
    document_mask = False
    if args.data:
        chunks = open_chunks(args.data, key=option_name("data"), document_mask="auto")
        document_mask = chunks.has_documents and args.document_mask != "false"
        if args.document_mask == "true" and not chunks.has_documents:
            cure = "make the chunks again with preprocess_chunk.py, or leave it out"
            raise option_error("document_mask", f"{args.data} does not record where documents begin; {cure}")
    check_checkpoints(args.checkpoints, args.teacher)
    return Options(
        checkpoints=args.checkpoints,
        tasks=tasks,
        seq_lens=seq_lens,
        batch_size=args.batch_size,
        num_gpus=visible_gpus() if args.num_gpus is None else args.num_gpus,
        limit=args.limit,
        output=args.output,
        data=args.data,
        num_words=args.num_words,
        teacher=args.teacher,
        document_mask=document_mask,
    )


def split_list(text: str) -> list[str]:
    return [item for item in re.split(r"[\s,]+", text) if item]


def check_numbers(args: argparse.Namespace, seq_lens: list[int]) -> None:
    counts = {
        "seq_lens": seq_lens,
        "limit": [args.limit],
        "num_gpus": [args.num_gpus],
        "num_words": [args.num_words],
    }
    for name, values in counts.items():
        too_small = [value for value in values if value is not None and value < 1]
        if too_small:
            raise option_error(name, f"{too_small[0]} must be at least 1")
    if args.num_words > len(WORDS):
        limit = f"{len(WORDS)}, the number of words that there are"
        raise option_error("num_words", f"{args.num_words} must be at most {limit}")
    if not re.fullmatch(r"[1-9]\d*|auto", args.batch_size):
        raise option_error("batch_size", f"{args.batch_size!r} must be a number, or auto")


def check_checkpoints(checkpoints: list[str], teacher: str | None) -> None:
    """Raises ValueError unless every config and tokenizer loads and every token has an embedding."""
    labels(checkpoints)
    for checkpoint in checkpoints:
        vocab_size = check_config("CHECKPOINT", checkpoint)
        check_special_tokens(load_tokenizer(checkpoint, "CHECKPOINT"), vocab_size, "CHECKPOINT")
    if teacher:
        check_config(option_name("teacher"), teacher)


def check_config(key: str, checkpoint: str) -> int:
    """The size of the checkpoint's vocabulary. Raises ValueError, naming the option `key`, unless
    its config loads."""
    from convert.loader import KEY, source_config

    try:
        return vocabulary_size(source_config(checkpoint))
    except ValueError as error:
        raise ValueError(str(error).replace(KEY, key)) from None


def vocabulary_size(config) -> int:
    """Of a model's config; where it has several, as multimodal models do, of its text model's."""
    return getattr(config, "vocab_size", None) or config.get_text_config().vocab_size


def visible_gpus() -> int:
    """The number of visible GPUs; 1 without a GPU."""
    import torch

    return max(1, torch.cuda.device_count())


def path_parts(checkpoint: str) -> list[str]:
    """The parts of a checkpoint's path that name it; `converted-hf`, as every export is called, is
    none."""
    parts = [part for part in Path(checkpoint).parts if part not in ("/", ".", "..")]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "converted-hf" else parts


def labels(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoint -> the shortest end of its path that distinguishes it from the others. Raises
    ValueError if one is named twice."""
    parts = [path_parts(checkpoint) for checkpoint in checkpoints]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise ValueError(f"CHECKPOINT: {checkpoints[i]} is named twice")
    for length in range(1, 1 + max(map(len, parts))):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return dict(zip(checkpoints, ends))
    raise AssertionError(f"{checkpoints}: paths that differ have ends that differ")

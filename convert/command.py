"""The command line that the scripts convert_from_<family>.py share."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(description: str, *families: str, argv: list[str] | None = None) -> None:
    """Converts a model of one of `families`.

    Raises ValueError, of one line, if the model cannot be converted or the result not written.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="hub name or folder; models in FLA's format or this project's are accepted too",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the result; default: each tensor keeps its own",
    )
    parser.add_argument(
        "--config",
        metavar="SIZE",
        help="fail unless the model has this published size, such as 7b",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "fla", "student"),
        default="auto",
        help="fla: FLA's transformer; student: this project's; auto: fla where that is exact",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare source and result layer by layer in fp32",
    )
    args = parser.parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    from .converter import convert_checkpoint

    disable_progress_bar()  # transformers prints one per file
    try:
        convert_checkpoint(args.model, args.output, families, args.precision, args.config, args.format, args.verify)
    except OSError as error:  # a full disk, a folder without write permission
        raise ValueError(f"{error.filename or args.output}: {error.strerror or error}; nothing was written") from None

"""The command line that the scripts convert_from_<family>.py share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from .converter import PRECISIONS, convert_checkpoint


def main(description: str, *families: str, argv: list[str] | None = None) -> None:
    """Converts a checkpoint of one of `families`; what is wrong ends in one line and a non-zero
    exit code."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="hub name or folder; FLA's and our own checkpoints are taken too",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to be made")
    parser.add_argument("--precision", choices=PRECISIONS, help="dtype of the result; default: that of every tensor")
    parser.add_argument(
        "--config",
        metavar="SIZE",
        help="fail unless the checkpoint has this published size, such as 7b",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "fla", "student"),
        default="auto",
        help="fla: FLA's transformer; student: ours; auto: fla where it is exact",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare source and result in fp32, layer by layer",
    )
    args = parser.parse_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file
    try:
        convert_checkpoint(args.model, args.output, families, args.precision, args.config, args.format, args.verify)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename or args.output}: {error.strerror or error}; nothing was written")

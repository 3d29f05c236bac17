"""Writes report.html into run folders of train.py: curves, alignment of each layer, evaluation,
samples, environment.

    python report.py outputs/qwen2.5_1.5b_gdn_v4/stage1 outputs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage2
    python report.py quickstart_out/stage2 --samples 3     # loads the exported model for three continuations

A page needs no other file and no network. A run may still be training; results of evaluate.py that
lie in its folder are shown. Of several folders, each that holds no run is named in one line, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.command import run_main
from runtime.files import one_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a train.output_dir")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        help="held-out beginnings to continue (%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.samples < 0:
        raise ValueError(f"--samples: {args.samples} must be at least 0")
    from reporting.run_page import write_run_report

    failed = 0
    for folder in args.runs:
        try:
            print(write_run_report(folder, args.samples))
        except (ValueError, OSError) as error:
            print(f"report.py: error: {one_line(error)}", file=sys.stderr)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    run_main(main)

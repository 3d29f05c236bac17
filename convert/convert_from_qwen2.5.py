"""Converts Qwen2.5 (and Qwen2) to FLA's format or ours.

    python convert/convert_from_qwen2.5.py --model Qwen/Qwen2.5-1.5B-Instruct --config 1.5b --output DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from wherever this is called

from convert.command import main  # noqa: E402

if __name__ == "__main__":
    main(__doc__, "qwen2")

"""Converts Qwen3 to FLA's format or ours.

    python convert/convert_from_qwen3.py --model Qwen/Qwen3-1.7B --config 1.7b --output DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from wherever this is called

from convert.command import main  # noqa: E402

if __name__ == "__main__":
    main(__doc__, "qwen3")

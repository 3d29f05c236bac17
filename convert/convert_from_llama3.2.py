"""Converts Llama 3, 3.1, 3.2 and 3.3, models of that type such as SmolLM2, and Mistral where it is expressible, to FLA's format or ours.

    python convert/convert_from_llama3.2.py --model meta-llama/Llama-3.2-3B-Instruct --config 3b --output DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from wherever this is called

from convert.command import main  # noqa: E402

if __name__ == "__main__":
    main(__doc__, "llama", "mistral")

"""Converts Qwen3 to FLA's format or this project's.

python convert/convert_from_qwen3.py --model Qwen/Qwen3-1.7B --config 1.7b --output DIR
"""

from functools import partial

from runtime.command import run_main

from convert.command import main

if __name__ == "__main__":
    run_main(partial(main, __doc__, "qwen3"))

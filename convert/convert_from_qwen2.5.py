"""Converts Qwen2.5 (and Qwen2) to FLA's format or this project's.

python convert/convert_from_qwen2.5.py --model Qwen/Qwen2.5-1.5B-Instruct --config 1.5b --output DIR
"""

from functools import partial

from runtime.command import run_main

from convert.command import main

if __name__ == "__main__":
    run_main(partial(main, __doc__, "qwen2"))

"""Converts Llama 3, 3.1, 3.2 and 3.3, models of that type such as SmolLM2, and Mistral without a
sliding window, to FLA's format or this project's.

python convert/convert_from_llama3.2.py --model meta-llama/Llama-3.2-3B-Instruct --config 3b --output DIR
"""

from functools import partial

from runtime.command import run_main

from convert.command import main

if __name__ == "__main__":
    run_main(partial(main, __doc__, "llama", "mistral"))

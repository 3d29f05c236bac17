"""Chats with a model in the terminal; answers are streamed.

    python chat.py --model outputs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage3/converted-hf
    echo "def main(" | python chat.py --model quickstart_out/stage2/converted-hf --temperature 0

--model is an export or any teacher. With a chat template the model reads the conversation so far;
without one it continues the text so far. /reset clears that, Ctrl-C stops an answer, /exit or
Ctrl-D ends the program. Only answers go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Iterator

from runtime.command import run_main

COMMANDS = ("/reset", "/exit")


def read_lines() -> Iterator[str]:
    """What the user types, without empty lines, until the input ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # tokenizers refuse the surrogates of invalid bytes
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            stripped = line.strip()
            if stripped:
                yield stripped if stripped in COMMANDS else line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments. Raises ValueError for values that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="maximum tokens of an answer")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: greedy decoding, without penalties; default: that of the model's generation config",
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= (args.temperature or 0) < math.inf:
        raise ValueError("--max_new_tokens must be at least 1 and --temperature a number of at least 0")
    return args


def chosen_device(wanted: str | None) -> str:
    """The device `wanted`, or by default the GPU where there is one. Raises ValueError if there is none."""
    import torch

    if wanted not in (None, "cpu") and not torch.cuda.is_available():
        raise ValueError(f"--device: {wanted} is not there; leave it out")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device = chosen_device(args.device)
    from transformers.utils import logging

    from chat_session import Answer, load, refuse_nan

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in a terminal)
    logging.set_verbosity_error()
    model, conversation = load(args)
    config = model.config
    layers = f"full attention in {config.keep_full_attention_layers}"
    if config.linear_layers:
        layers = f"{len(config.linear_layers)} x {config.student_name}, {layers}"
    has_template = bool(conversation.tokenizer.chat_template)
    mode = "chat" if has_template else "no chat template: it continues the text"
    print(f"{args.model}: {layers}; {mode}; /reset, /exit", file=sys.stderr)
    for line in read_lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        inputs = conversation.add_user(line).to(args.device)
        answer = Answer(conversation.tokenizer)
        try:
            model.generate(**inputs, streamer=answer, logits_processor=[refuse_nan])
        except KeyboardInterrupt:
            answer.end()
        conversation.add_answer(answer.text)


if __name__ == "__main__":
    run_main(main)

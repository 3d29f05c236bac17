"""Talks to a model in the terminal; the answer appears as it is made.

    python chat.py --model outputs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage3/converted-hf
    echo "def main(" | python chat.py --model quickstart_out/stage2/converted-hf --temperature 0

--model is an export or any teacher. With a chat template it hears the conversation so far; without one it goes on with the
text so far. /reset forgets that, Ctrl-C stops an answer, /exit or Ctrl-D ends. Answers alone go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path

from runtime.command import run_main
from runtime.data import (
    check_special_tokens,
    encode_beginnings,
    load_tokenizer,
    out_of_vocabulary,
)
from runtime.files import one_line
from runtime.generation import greedy

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding, GenerationConfig, TextStreamer
from transformers.utils import logging

from convert import load_teacher, load_teacher_config
from convert.loader import KEY
from distill_model.cache import StaticCache

COMMANDS = ("/reset", "/exit")
PREFILL = 4096  # tokens of a long prompt that are read at a time


class Answer(TextStreamer):
    """Prints an answer as it is made, and keeps it in `text`."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


class Conversation:
    """What was said so far: messages if the tokenizer has a chat template, else text."""

    def __init__(self, tokenizer, vocab_size: int, system: str | None):
        if system is not None and not tokenizer.chat_template:
            raise ValueError("--system: the model has no chat template; leave it out")
        self.tokenizer, self.vocab_size, self.system = tokenizer, vocab_size, system
        self.reset()

    def reset(self) -> None:
        self.text = ""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def log(self, line: str):
        """Adds what the user says; returns input_ids and attention_mask [1, T] of all so far.
        Raises ValueError if the text or the chat template has a token that the model lacks."""
        heard = self._heard(line)
        if heard["input_ids"].numel() and (largest := heard["input_ids"].max().item()) >= self.vocab_size:
            raise out_of_vocabulary(
                f"--model: {self.tokenizer.convert_ids_to_tokens(largest)!r} in the text has the id",
                largest,
                self.vocab_size,
            )
        return heard

    def _heard(self, line: str):
        if not self.tokenizer.chat_template:
            self.text += ("\n" if self.text else "") + line
            ids = torch.tensor(encode_beginnings(self.tokenizer, [self.text]), dtype=torch.long)
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self.messages.append({"role": "user", "content": line})
        try:
            return self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:  # a mistake in it, or what it raises itself, such as for a system message
            cure = "mend chat_template" if self.system is None else "leave --system out, or mend chat_template"
            raise ValueError(
                f"--model: its chat template refuses the conversation ({one_line(error)}); {cure}"
            ) from None

    def hear(self, answer: str) -> None:
        """Adds what the model said."""
        self.text += answer
        self.messages.append({"role": "assistant", "content": answer})


def generation_config(args: argparse.Namespace, model, eos_token_id: int | None) -> GenerationConfig:
    """The model's own, if it has one, with what the arguments say; greedy decoding if the
    temperature is 0. Raises OSError if a folder's cannot be read."""
    try:
        config = GenerationConfig.from_pretrained(args.model)
    except OSError:
        if (Path(args.model) / "generation_config.json").is_file():
            raise
        config = model.generation_config
    if args.temperature == 0:
        config = greedy(config)
    elif args.temperature is not None:
        config.do_sample, config.temperature = True, args.temperature
    if config.eos_token_id is None:
        config.eos_token_id = eos_token_id
    config.max_new_tokens, config.prefill_chunk_size = (
        args.max_new_tokens,
        None if model.config.rope_depends_on_length else PREFILL,
    )
    if model.device.type == "cuda" and StaticCache.refusal(model.config) is None:
        config.cache_implementation = "static"  # a token is one CUDA graph
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:  # nothing is padded, but generate asks for one
        config.pad_token_id = 0
    return config


def finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that ends an answer of nothing: a model that diverged is silent, or
    samples from what is no distribution."""
    if scores.isnan().any():
        raise ValueError("--model: its logits are not finite")
    return scores


def lines():
    """What the user types, without the empty lines."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                yield line.strip() if line.strip() in COMMANDS else line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer, at most")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: the likeliest token, without penalties; default: as the model's generation config says",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= (args.temperature or 0) < math.inf:
        raise ValueError("--max_new_tokens must be at least 1 and --temperature a number of at least 0")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device: {args.device} is not there; leave it out")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in a terminal)
    logging.set_verbosity_error()
    config = load_teacher_config(args.model)
    tokenizer = load_tokenizer(args.model, "--model")
    check_special_tokens(tokenizer, config.vocab_size, "--model")
    conversation = Conversation(tokenizer, config.vocab_size, args.system)
    model = load_teacher(args.model, config.dtype or torch.float32).to(args.device)
    model.generation_config = generation_config(args, model, conversation.tokenizer.eos_token_id)
    layers = f"{len(config.linear_layers)} x {config.student_name}, " if config.linear_layers else ""
    how = "chat" if conversation.tokenizer.chat_template else "no chat template: it goes on with the text"
    print(
        f"{args.model}: {layers}full attention in {config.keep_full_attention_layers}; {how}; /reset, /exit",
        file=sys.stderr,
    )
    for line in lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        answer = Answer(conversation.tokenizer)
        try:
            model.generate(**conversation.log(line).to(args.device), streamer=answer, logits_processor=[finite])
        except KeyboardInterrupt:
            answer.end()
        conversation.hear(answer.text)


def command() -> None:
    """`main`, with errors in terms of its own options."""
    sys.stdin.reconfigure(errors="replace")  # other encodings would come as surrogates, which no tokenizer takes
    try:
        main()
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error).replace(KEY, "--model")) from error


if __name__ == "__main__":
    run_main(command)

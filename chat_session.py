"""A conversation with a model, behind chat.py."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from runtime.data import check_special_tokens, encode_beginnings, load_tokenizer, out_of_vocabulary
from runtime.files import one_line
from runtime.generation import PREFILL_CHUNK, greedy

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding, GenerationConfig, TextStreamer

from convert import load_teacher, load_teacher_config
from convert.loader import KEY
from distill_model.cache import StaticCache


class Answer(TextStreamer):
    """Prints an answer while it is generated, and keeps it in `text`."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


class Conversation:
    """The conversation so far: messages if the tokenizer has a chat template, otherwise text."""

    def __init__(self, tokenizer, vocab_size: int, system: str | None):
        if system is not None and not tokenizer.chat_template:
            raise ValueError("--system: the model has no chat template; leave it out")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.system = system
        self.reset()

    def reset(self) -> None:
        self.text = ""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def add_user(self, line: str) -> BatchEncoding:
        """Adds what the user says; returns input_ids and attention_mask [1, T] of the conversation.
        Raises ValueError if the text or the chat template has a token that the model lacks."""
        encoded = self._encode(line)
        ids = encoded["input_ids"]
        largest = ids.max().item() if ids.numel() else 0
        if largest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            where = f"--model: {token!r} in the text has the id"
            raise out_of_vocabulary(where, largest, self.vocab_size)
        return encoded

    def _encode(self, line: str) -> BatchEncoding:
        if not self.tokenizer.chat_template:
            self.text += ("\n" if self.text else "") + line
            ids = torch.tensor(encode_beginnings(self.tokenizer, [self.text]), dtype=torch.long)
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self.messages.append({"role": "user", "content": line})
        try:
            return self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:  # a mistake in it, or its own refusal, as of a system message
            cure = "fix chat_template"
            if self.system is not None:
                cure = f"leave --system out, or {cure}"
            message = f"its chat template refuses the conversation ({one_line(error)}); {cure}"
            raise ValueError(f"--model: {message}") from None

    def add_answer(self, answer: str) -> None:
        """Adds what the model said."""
        self.text += answer
        self.messages.append({"role": "assistant", "content": answer})


def generation_config(args: argparse.Namespace, model, eos_token_id: int | None) -> GenerationConfig:
    """The model's own, if it has one, with the settings of the arguments; greedy decoding if the
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
        config.do_sample = True
        config.temperature = args.temperature
    if config.eos_token_id is None:
        config.eos_token_id = eos_token_id
    config.max_new_tokens = args.max_new_tokens
    config.prefill_chunk_size = None if model.config.rope_depends_on_length else PREFILL_CHUNK
    if model.device.type == "cuda" and StaticCache.refusal(model.config) is None:
        config.cache_implementation = "static"  # one CUDA-graph replay per token
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:  # nothing is padded, but `generate` requires one
        config.pad_token_id = 0
    return config


def refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that raises ValueError for NaN: a diverged model would answer nothing, or
    sampling would fail."""
    if scores.isnan().any():
        raise ValueError("--model: its logits are not finite")
    return scores


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turns errors of the loader into ValueErrors of one line that name --model."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error).replace(KEY, "--model")) from error


def load(args: argparse.Namespace):
    """(model, conversation). Raises ValueError or OSError if --model cannot be used; what its config
    and tokenizer show is found before the weights are loaded."""
    with checkpoint_errors():
        config = load_teacher_config(args.model)
    tokenizer = load_tokenizer(args.model, "--model")
    check_special_tokens(tokenizer, config.vocab_size, "--model")
    conversation = Conversation(tokenizer, config.vocab_size, args.system)
    with checkpoint_errors():
        model = load_teacher(args.model, config.dtype or torch.float32)
    model = model.to(args.device)
    model.generation_config = generation_config(args, model, tokenizer.eos_token_id)
    return model, conversation

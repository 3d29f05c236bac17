"""A byte-level BPE tokenizer for a corpus of the user's own.

    python -m quickstart.train_tokenizer --corpus NAME_OR_FOLDER --output_dir DIR

It is saved as a Hugging Face tokenizer with an end-of-text token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.command import run_main
from runtime.corpora import Corpus

EOS = "<|endoftext|>"


def limited(texts: Iterator[str], max_chars: int) -> Iterator[str]:
    """The texts until they have `max_chars` characters together."""
    for text in texts:
        yield text
        max_chars -= len(text)
        if max_chars <= 0:
            return


def train_tokenizer(texts: Iterator[str], vocab_size: int):
    """A byte-level BPE tokenizer over `texts`, a PreTrainedTokenizerFast with EOS as its only
    special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--corpus",
        required=True,
        help="a file or folder of text or tables, or a hub dataset's name",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--text_field",
        default="text",
        help="the column of a table that holds the text",
    )
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out files that cannot be read",
    )
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument(
        "--max_chars",
        type=int,
        default=20_000_000,
        help="how much text the tokenizer learns from",
    )
    args = parser.parse_args(argv)
    start = time.monotonic()
    source = Corpus(args.corpus, args.text_field, skip_bad_files=args.skip_bad_files)
    print(source.selection())
    texts = (document.text for document in source.documents())
    tokenizer = train_tokenizer(limited(texts, args.max_chars), args.vocab_size)
    if left_out := source.left_out():
        print(left_out)
    tokenizer.save_pretrained(args.output_dir)
    print(
        f"Tokenizer: {len(tokenizer)} entries in {args.output_dir}, {time.monotonic() - start:.0f} s",
    )


if __name__ == "__main__":
    run_main(main)

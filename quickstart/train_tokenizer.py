"""The corpus and its tokenizer.

    python -m quickstart.train_tokenizer --output_dir quickstart_out/tokenizer --stdlib_dir quickstart_out/corpus
    python -m quickstart.train_tokenizer --output_dir DIR --corpus NAME_OR_FOLDER

Without --corpus it first copies the source text of the standard library that runs it (without its tests and without
installed packages) to --stdlib_dir: real text that is always there. Then it trains a byte-level BPE tokenizer and saves
it as a Hugging Face tokenizer with an end-of-text token.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.command import run_main
from runtime.corpora import Corpus

EOS = "<|endoftext|>"
# encodings/ is tables of characters: a sixth of the bytes, next to nothing to learn, and noise in
# every loss curve.
NOT_CORPUS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "encodings",
}


def stdlib_files() -> list[Path]:
    """The Python files of the running interpreter's standard library, sorted, without tests,
    character tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not NOT_CORPUS & set(f.relative_to(root).parts[:-1]))


def copy_stdlib(folder: Path, max_files: int | None = None) -> int:
    """Copies the standard library's readable files into `folder`, which appears complete or not at
    all.

    Returns their number. Raises ValueError if this interpreter comes without sources.
    """
    if folder.is_dir():
        return sum(1 for _ in folder.rglob("*.py"))
    root = Path(sysconfig.get_paths()["stdlib"])
    files = stdlib_files()
    if not files:
        raise ValueError(f"{root}: holds no Python sources; pass a corpus to quickstart.sh")
    if max_files and max_files < len(files):
        files = files[:: -(-len(files) // max_files)]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copied = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a handful of files is deliberately in other encodings
        target = partial / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        copied += 1
    partial.rename(folder)
    return copied


def limited(texts: Iterator[str], max_chars: int) -> Iterator[str]:
    """The texts until `max_chars` characters have gone by."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--corpus", help="a file or folder of text or tables, or a hub dataset's name")
    parser.add_argument("--stdlib_dir", type=Path, help="where the standard library goes when --corpus is absent")
    parser.add_argument("--text_field", default="text", help="the column of a table that holds the text")
    parser.add_argument("--skip_bad_files", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--max_files", type=int, help="take only about so many files of the standard library")
    parser.add_argument("--max_chars", type=int, default=20_000_000, help="how much text the tokenizer learns from")
    args = parser.parse_args()
    if (args.corpus is None) == (args.stdlib_dir is None):
        parser.error("give either --corpus or --stdlib_dir")
    start = time.monotonic()
    corpus = args.corpus
    if corpus is None:
        corpus = str(args.stdlib_dir)
        print(f"Corpus: {copy_stdlib(args.stdlib_dir, args.max_files)} files of Python's standard library in {corpus}")
    source = Corpus(corpus, args.text_field, skip_bad_files=args.skip_bad_files)
    print(source.selection())
    texts = (document.text for document in source.documents())
    tokenizer = train_tokenizer(limited(texts, args.max_chars), args.vocab_size)
    if left_out := source.left_out():
        print(left_out)
    tokenizer.save_pretrained(args.output_dir)
    print(f"Tokenizer: {len(tokenizer)} entries in {args.output_dir}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)

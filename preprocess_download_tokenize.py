"""Tokenises a corpus, from the Hugging Face hub or local files, in constant memory.

    python preprocess_download_tokenize.py --dataset_name robbiegwaldd/dclm-10B --tokenizer Qwen/Qwen2.5-1.5B-Instruct \
        --output_dir data/tokenized
    python preprocess_download_tokenize.py --mix chats.jsonl:0.7 robbiegwaldd/dclm-10B:0.2 synthetic:recall:0.1 \
        --loss_on assistant --max_tokens 100_000_000 --tokenizer Qwen/Qwen2.5-1.5B-Instruct --output_dir data/mixed

Documents end with the tokenizer's EOS, and begin with its BOS if the tokenizer puts one before
every text. Every k-th document is held out and never trained on; of a text file that is large, or
the only one, the end is. The name of a control token in a text (`<|im_end|>` in a web page) is
encoded as text, unless --allow_special_tokens is given. With --loss_on, conversations go through
the teacher's chat template. The result is keyed by corpus, tokenizer and options: the same command
does nothing again, resumes after an interruption, and another one with the same --output_dir is
refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.command import run_main
from runtime.conversations import LOSS_ON, Conversations
from runtime.corpora import BrokenOff, Corpus, Document
from runtime.data import (
    METADATA,
    SPLITS,
    DataError,
    beginning,
    is_done,
    load_tokenizer,
    tokenizer_fingerprint,
)
from runtime.encoding import DocumentEncoder, EncodingPool
from runtime.files import atomic_directory
from runtime.mixtures import STATE, Mixture, Source, SplitFiles, quotas, resumable_state

SYNTHETIC = "synthetic:"
RECALL = "recall"  # short for associative_recall
# The options that decide the content of the data folder.
KEY_OPTIONS = (
    "dataset_config",
    "split",
    "text_field",
    "max_length",
    "max_tokens",
    "holdout",
    "skip_bad_files",
    "allow_special_tokens",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument(
        "--dataset_name",
        help="hub name, or a file or folder of text or tables (.jsonl, .csv, .parquet ...)",
    )
    corpus.add_argument(
        "--mix",
        nargs="+",
        metavar="NAME:SHARE",
        help="several corpora, each with its share of the tokens; synthetic:recall, synthetic:multi_hop_recall and "
        "synthetic:copying are made up; ends at --max_tokens or with the text of the first that has no more",
    )
    parser.add_argument("--tokenizer", required=True, help="hub name or folder of the teacher's tokenizer")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument(
        "--text_field", default="text", help="column that holds the text, or with --loss_on the messages"
    )
    parser.add_argument(
        "--loss_on",
        choices=LOSS_ON,
        help="read conversations (a column messages, or prompt and completion) through the tokenizer's chat template, "
        "and learn all of the text, the assistant's turns, or only the last of them",
    )
    parser.add_argument("--chat_template", help="a Jinja file, or the name of one of the tokenizer's templates")
    parser.add_argument("--max_length", type=int, help="cut documents after this many tokens")
    parser.add_argument(
        "--num_proc", type=int, default=min(8, os.cpu_count() or 1), help="processes that tokenise (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="documents tokenised at a time")
    parser.add_argument("--remove_columns", nargs="*", default=[], help="columns of a hub dataset to skip")
    parser.add_argument(
        "--max_tokens", type=whole_number, help="stop after exactly this many tokens, inside a document if need be"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.01,
        help="fraction of the documents, and of --max_tokens, to hold out; 0 for none",
    )
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out local files that cannot be read; rows before a bad one are kept",
    )
    parser.add_argument(
        "--allow_special_tokens",
        action="store_true",
        help="encode a control token's name in a text as that token, for text that a chat template has written",
    )
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises DataError for options that no run can have."""
    for name in ("max_length", "num_proc", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name}: {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise DataError(f"--holdout: {args.holdout} must be a share of the documents, from 0 to below 1")
    if args.chat_template and not args.loss_on:
        raise DataError("--chat_template: is for conversations; say by --loss_on what of them is learned")
    if args.mix:
        shares = parse_mix(args.mix)
        if args.max_tokens is None and all(name.startswith(SYNTHETIC) for name in shares):
            raise DataError("--mix: synthetic text has no end; give --max_tokens")


def whole_number(text: str) -> int:
    return int(text.replace("_", ""))


def parse_mix(words: list[str]) -> dict[str, float]:
    """{name: share} of NAME:SHARE. Raises DataError unless the shares are positive and sum to 1."""
    shares: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition(":")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not name or not 0 < share <= 1:
            raise DataError(f"--mix: {word} must be NAME:SHARE with a share above 0 and at most 1, as a.jsonl:0.7")
        if name in shares:
            raise DataError(f"--mix: {name} is named twice; give it once, with the sum of its shares")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"--mix: the shares sum to {sum(shares.values()):g}, not 1; correct them")
    return shares


class SyntheticCorpus:
    """Endless documents of a task of recall_tasks.py, the same ones in every run. Raises DataError
    for a name that is none."""

    def __init__(self, name: str):
        from recall_tasks import RECALL_TASKS

        task = name.removeprefix(SYNTHETIC)
        tasks = {RECALL: RECALL_TASKS["associative_recall"], **RECALL_TASKS}
        if task not in tasks:
            raise DataError(f"--mix: {name} is unknown; choose {', '.join(SYNTHETIC + known for known in tasks)}")
        self.name = self.key = name
        self.generate = tasks[task]

    def documents(self, holdout: float) -> Iterator[Document]:
        from recall_tasks import documents

        for document in documents(self.generate):
            yield Document(document.text)

    def selection(self) -> str:
        return f"corpus: {self.name}"

    def left_out(self) -> str:
        return ""


def build_sources(args: argparse.Namespace, tokenizer) -> list[Source]:
    """The corpora with their shares. Raises DataError for one that must not be read."""
    shares = parse_mix(args.mix) if args.mix else {args.dataset_name: 1.0}
    bos, eos = beginning(tokenizer), tokenizer.eos_token_id
    sources = []
    for name, share in shares.items():
        if name.startswith(SYNTHETIC):
            corpus = SyntheticCorpus(name)
        else:
            corpus = Corpus(
                name,
                args.text_field,
                args.dataset_config,
                args.split,
                args.remove_columns,
                args.skip_bad_files,
                conversations=bool(args.loss_on),
                option="--mix" if args.mix else "--dataset_name",
            )
        sources.append(Source(corpus, share, args, bos, eos))
    return sources


def tokenize(
    args: argparse.Namespace, encoder: DocumentEncoder, sources: list[Source], folder: Path, key: dict
) -> dict:
    """Writes train.arrow and heldout.arrow to `folder`; returns {split: {documents, tokens}}.
    Resumes what an interrupted run of the same key has left there."""
    from tqdm import tqdm

    state = resumable_state(folder, key)
    with_mask = args.loss_on in ("assistant", "completion")
    splits = SplitFiles(folder, quotas(args.max_tokens, args.holdout), with_mask, state and state["splits"])
    mixture = Mixture(sources, splits, folder, key)
    done = total_tokens(splits.counts)
    if done:
        print(f"{args.output_dir}: resuming after {done:,} tokens")
    bar = tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=args.max_tokens, initial=done)
    with EncodingPool(encoder, args.num_proc, args.batch_size) as pool, bar:
        for i, source in enumerate(sources):
            source.start(pool, splits, state and state["sources"][i])
        mixture.fill(bar)
    check_splits(args, sources, splits.counts)
    splits.close()
    report_limits(args, splits, mixture)
    return splits.counts


def check_splits(args: argparse.Namespace, sources: list[Source], counts: dict) -> None:
    """Raises DataError if a split is empty, or most of the corpus would be held out."""
    option, name = ("--mix", "the mixture") if args.mix else ("--dataset_name", args.dataset_name)
    for split in SPLITS:
        if not counts[split]["documents"] and (split == "train" or args.holdout):
            left_out = "; ".join(filter(None, (source.corpus.left_out() for source in sources))) or "it is too small"
            raise DataError(f"{option}: {name} gave no text for the {split} part; {left_out}")
    held = counts["heldout"]["tokens"] / total_tokens(counts)
    if held > 0.5 > args.holdout:
        raise DataError(
            f"--holdout: {args.holdout} would hold out {held:.0%} of {name}, "
            "whose first document is most of it; cut that into several, or use --holdout 0"
        )


def report_limits(args: argparse.Namespace, splits: SplitFiles, mixture: Mixture) -> None:
    """Prints what --max_tokens cut, if the corpus has fewer tokens, and what a mixture holds."""
    for split in splits.cut:
        print(f"--max_tokens: the last document of the {split} part is cut, its rest is dropped")
    total = total_tokens(splits.counts)
    if args.max_tokens and total < args.max_tokens:
        print(f"--max_tokens: the corpus has no more than {total:,} of {args.max_tokens:,} tokens")
    if args.mix:
        parts = [f"{source.progress.tokens / total:.1%} {source.corpus.name}" for source in mixture.sources]
        print(f"mixture: {', '.join(parts)}")
        if mixture.ended:
            print(f"--mix: ends with {mixture.ended.corpus.name}, which has no more text")


def total_tokens(counts: dict) -> int:
    return sum(counts[split]["tokens"] for split in SPLITS)


def describe(args: argparse.Namespace, sources: list[Source], tokenizer, conversations: Conversations | None) -> dict:
    """The metadata that decides the content of the data folder."""
    corpora = [[source.corpus.key, source.share] for source in sources]
    key = {"kind": "tokenized", "corpus": corpora if args.mix else corpora[0][0]}
    key |= {name: getattr(args, name) for name in KEY_OPTIONS}
    key["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    if bos := beginning(tokenizer):
        key["bos_token_id"] = bos[0]
    if conversations is not None:
        key["loss_on"] = args.loss_on
        key["chat_template"] = hashlib.sha256(conversations.template.encode()).hexdigest()[:16]
    return key


def write(args: argparse.Namespace, tokenizer, encoder: DocumentEncoder, sources: list[Source], key: dict) -> dict:
    """Writes the data folder, atomically; returns {split: {documents, tokens}}. After a kill, or
    where the hub broke off, the same command resumes."""
    with atomic_directory(args.output_dir, resumable=True) as folder:
        try:
            counts = tokenize(args, encoder, sources, folder, key)
        except BrokenOff:
            raise
        except DataError:
            shutil.rmtree(folder)
            raise
        metadata = {
            **key,
            "dataset_name": args.dataset_name or " ".join(args.mix),
            "tokenizer": args.tokenizer,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            **counts,
        }
        if args.mix:
            metadata["mixture"] = [
                {"name": source.corpus.name, "share": source.share, "tokens": source.progress.tokens}
                for source in sources
            ]
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
        (folder / STATE).unlink(missing_ok=True)
    return counts


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    quotas(args.max_tokens, args.holdout)
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    sources = build_sources(args, tokenizer)
    conversations = Conversations(tokenizer, args.loss_on, args.chat_template) if args.loss_on else None
    key = describe(args, sources, tokenizer, conversations)
    if is_done(args.output_dir, key):
        print(f"{args.output_dir}: already exists, made with the same corpus, tokenizer and options")
        return
    encoder = DocumentEncoder(tokenizer, args.allow_special_tokens, conversations)
    for source in sources:
        print(source.corpus.selection())
    start = time.perf_counter()
    counts = write(args, tokenizer, encoder, sources, key)
    for source in sources:
        if left_out := source.corpus.left_out():
            print(left_out)
    seconds = time.perf_counter() - start
    total = total_tokens(counts)
    documents = sum(counts[split]["documents"] for split in SPLITS)
    print(
        f"{args.output_dir}: {total:,} tokens ({counts['heldout']['tokens']:,} held out) of "
        f"{documents:,} documents in {seconds:.0f} s, {total / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    run_main(main)

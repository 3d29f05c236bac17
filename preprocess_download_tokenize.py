"""Tokenises a corpus, from the Hugging Face hub or local files, in constant memory.

    python preprocess_download_tokenize.py --dataset_name robbiegwaldd/dclm-10B --tokenizer Qwen/Qwen2.5-1.5B-Instruct \
        --output_dir data/tokenized

Documents end with the tokenizer's EOS, and begin with its BOS if the tokenizer puts one before
every text. Every k-th document is held out and never trained on; of a text file that is large, or
the only one, the end is. The name of a control token in a text (`<|im_end|>` in a web page) is
encoded as text, unless --allow_special_tokens is given. The result is keyed by corpus, tokenizer
and options: the same command does nothing again, and another one with the same --output_dir is
refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import time
from pathlib import Path

from runtime.command import run_main
from runtime.corpora import Corpus, Document
from runtime.data import (
    METADATA,
    SPLITS,
    DataError,
    beginning,
    is_done,
    load_tokenizer,
    tokenizer_fingerprint,
)
from runtime.files import atomic_directory

# The form of added tokens that structure a text: <tool_call>, [INST].
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

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
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="hub name, or a file or folder of text or tables (.jsonl, .csv, .parquet ...)",
    )
    parser.add_argument("--tokenizer", required=True, help="hub name or folder of the teacher's tokenizer")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--max_length", type=int, help="cut documents after this many tokens")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="tokenizer threads")
    parser.add_argument("--batch_size", type=int, default=256, help="documents tokenised at a time")
    parser.add_argument("--remove_columns", nargs="*", default=[], help="columns of a hub dataset to skip")
    parser.add_argument(
        "--max_tokens", type=int, help="stop after exactly this many tokens, inside a document if need be"
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
        help="encode a control token's name in a text as that token, for chat-templated text",
    )
    args = parser.parse_args(argv)
    for name in ("max_length", "num_proc", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name}: {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise DataError(f"--holdout: {args.holdout} must be a share of the documents, from 0 to below 1")
    return args


def held_out(index: int, share: float) -> bool:
    """Whether document `index` is held out: the first one and evenly spread others, at any corpus
    length."""
    return math.floor(index * share) != math.floor((index - 1) * share)


def text_encoder(tokenizer, allow_special_tokens: bool):
    """A tokenizers.Tokenizer that encodes texts of any length as the tokenizer does.

    Without allow_special_tokens, a control token's name in a text is encoded as text. Control
    tokens are the special tokens, and added tokens that look like a tag. Raises DataError if the
    tokenizer can encode a name only as the control token.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = None
    state["padding"] = None
    control = [token for token in state["added_tokens"] if token["special"] or TAG.fullmatch(token["content"])]
    if allow_special_tokens:
        return Tokenizer.from_str(json.dumps(state))
    for token in control:
        token["special"] = True
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True  # as ordinary text
    for token in control:
        name = token["content"]
        ids = encoder.encode(name, add_special_tokens=False).ids
        if name != tokenizer.unk_token and token["id"] in ids:
            raise DataError(
                f"--tokenizer: has no encoding of the text {name!r} but the control token; use --allow_special_tokens"
            )
    return encoder


def quotas(max_tokens: int | None, holdout: float) -> dict[str, float]:
    """The most tokens that each split takes. Raises DataError if none are left to train on."""
    if max_tokens is None:
        return dict.fromkeys(SPLITS, math.inf)
    heldout = max(1, round(max_tokens * holdout)) if holdout else 0
    if heldout >= max_tokens:
        raise DataError(f"--max_tokens: {max_tokens} leaves nothing to train on beside --holdout {holdout}; raise it")
    return {"train": max_tokens - heldout, "heldout": heldout}


class SplitWriters:
    """The Arrow files of the splits, how many tokens each may still take, and what it holds.

    counts: {split: {documents, tokens}}, where parts of a large document count as documents. cut:
    splits whose last document did not fit in full.
    """

    def __init__(self, folder: Path, quotas: dict[str, float]):
        from datasets import Features, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        features = Features({"input_ids": Sequence(Value("int32"))})
        self._writers = {split: ArrowWriter(features=features, path=str(folder / f"{split}.arrow")) for split in SPLITS}
        self._rows: dict[str, list] = {split: [] for split in SPLITS}
        self._room = dict(quotas)
        self.counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        self.cut: list[str] = []

    def is_full(self, split: str) -> bool:
        return not self._room[split]

    def all_full(self) -> bool:
        return not any(self._room.values())

    def add(self, split: str, ids: list[int], ends: bool) -> int:
        """Takes as many of a document's next ids as fit and returns their number.

        ends: whether the document ends with them.
        """
        room = self._room[split]
        fits = len(ids) < room or (len(ids) == room and ends)
        if room and not fits:
            self.cut.append(split)
        taken = ids[: min(room, len(ids))]
        if taken:
            self._rows[split].append(taken)
            self._room[split] -= len(taken)
            self.counts[split]["documents"] += 1
            self.counts[split]["tokens"] += len(taken)
        return len(taken)

    def write(self) -> None:
        """Writes what was added since the last call."""
        for split, rows in self._rows.items():
            if rows:
                self._writers[split].write_batch({"input_ids": rows})
                self._rows[split] = []

    def finalize(self) -> None:
        for writer in self._writers.values():
            writer.finalize()


class DocumentBuilder:
    """Turns encoded parts of documents into training ids: adds BOS and EOS, cuts at --max_length,
    chooses the split.

    split: that of the last part.
    """

    def __init__(self, args: argparse.Namespace, tokenizer, splits: SplitWriters):
        self.args = args
        self.splits = splits
        self.bos = beginning(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.split = SPLITS[0]
        self._index = 0  # of the document, among those whose split the corpus leaves open
        self._length = 0  # of the document so far, in tokens
        self._begins = True  # whether the next part begins a document

    def _choose(self, heldout: bool | None) -> str:
        if heldout is None:
            heldout = held_out(self._index, self.args.holdout)
            if self.splits.is_full(SPLITS[heldout]):  # so that both splits get their share
                heldout = not heldout
        return SPLITS[heldout]

    def add(self, part: Document, ids: list[int]) -> list[int]:
        """The training ids of a part, which the tokenizer encodes as `ids`."""
        if self._begins:
            self.split = self._choose(part.heldout)
            ids = self.bos + ids
            self._length = 0
        if self.args.max_length is not None:
            ids = ids[: self.args.max_length - self._length]
        self._length += len(ids)
        self._begins = part.ends
        if part.ends:
            self._index += part.heldout is None
            if self._length:
                ids = [*ids, self.eos]
        return ids


def tokenize(args: argparse.Namespace, tokenizer, corpus: Corpus, folder: Path) -> dict:
    """Writes train.arrow and heldout.arrow to `folder`; returns {split: {documents, tokens}}."""
    from tqdm import tqdm

    splits = SplitWriters(folder, quotas(args.max_tokens, args.holdout))
    builder = DocumentBuilder(args, tokenizer, splits)
    encoder = text_encoder(tokenizer, args.allow_special_tokens)
    parts = corpus.documents(args.holdout)
    with tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=args.max_tokens) as progress:
        while not splits.all_full() and (batch := list(itertools.islice(parts, args.batch_size))):
            texts = []
            for part in batch:
                # The held-out end of a large file may be longer than its quota: the rest is not encoded.
                unused = part.heldout is not None and splits.is_full(SPLITS[part.heldout])
                texts.append("" if unused else part.text)
            for part, encoding in zip(batch, encoder.encode_batch_fast(texts, add_special_tokens=False)):
                ids = builder.add(part, encoding.ids)
                progress.update(splits.add(builder.split, ids, part.ends))
            splits.write()
    check_splits(args, corpus, splits.counts)
    splits.finalize()
    report_limits(args, splits)
    return splits.counts


def check_splits(args: argparse.Namespace, corpus: Corpus, counts: dict) -> None:
    """Raises DataError if a split is empty, or most of the corpus would be held out."""
    for split in SPLITS:
        if not counts[split]["documents"] and (split == "train" or args.holdout):
            left_out = corpus.left_out() or "it is too small"
            raise DataError(f"--dataset_name: {args.dataset_name} gave no text for the {split} part; {left_out}")
    held = counts["heldout"]["tokens"] / total_tokens(counts)
    if held > 0.5 > args.holdout:
        raise DataError(
            f"--holdout: {args.holdout} would hold out {held:.0%} of {args.dataset_name}, "
            "whose first document is most of it; cut that into several, or use --holdout 0"
        )


def report_limits(args: argparse.Namespace, splits: SplitWriters) -> None:
    """Prints what --max_tokens cut, and if the corpus has fewer tokens."""
    for split in splits.cut:
        print(f"--max_tokens: the last document of the {split} part is cut, its rest is dropped")
    total = total_tokens(splits.counts)
    if args.max_tokens and total < args.max_tokens:
        print(f"--max_tokens: the corpus has no more than {total:,} of {args.max_tokens:,} tokens")


def total_tokens(counts: dict) -> int:
    return sum(counts[split]["tokens"] for split in SPLITS)


def describe(args: argparse.Namespace, corpus: Corpus, tokenizer) -> dict:
    """The metadata that decides the content of the data folder."""
    key = {"kind": "tokenized", "corpus": corpus.key}
    key |= {name: getattr(args, name) for name in KEY_OPTIONS}
    key["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    if bos := beginning(tokenizer):
        key["bos_token_id"] = bos[0]
    return key


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    corpus = Corpus(
        args.dataset_name,
        args.text_field,
        args.dataset_config,
        args.split,
        args.remove_columns,
        args.skip_bad_files,
    )
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    key = describe(args, corpus, tokenizer)
    if is_done(args.output_dir, key):
        print(f"{args.output_dir}: already exists, made with the same corpus, tokenizer and options")
        return
    print(corpus.selection())
    start = time.perf_counter()
    with atomic_directory(args.output_dir) as folder:
        counts = tokenize(args, tokenizer, corpus, folder)
        metadata = {
            **key,
            "dataset_name": args.dataset_name,
            "tokenizer": args.tokenizer,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            **counts,
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
    if left_out := corpus.left_out():
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

"""Tokenises a corpus, from the Hugging Face hub or local files, in constant memory.

    python preprocess_download_tokenize.py --dataset_name robbiegwaldd/dclm-10B --tokenizer Qwen/Qwen2.5-1.5B-Instruct \
        --output_dir data/tokenized

Documents end with the tokenizer's EOS, and begin with its BOS if it puts one before every text. Every k-th document is held out,
so that it is never trained on; of a text file that is large, or the only one, it is the end. The result is
keyed by corpus, tokenizer and options: a second call does nothing, a different one into the same folder is refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

from pipeline.data import (
    METADATA, SPLITS, DataError, beginning, corpus_key, documents, is_done, load_tokenizer,
    tokenizer_fingerprint,
)  # fmt: skip
from pipeline.files import complete_or_absent, one_line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="hub name, or a file or folder of text, json, jsonl or parquet")
    parser.add_argument("--tokenizer", required=True, help="hub name or folder of the teacher's tokenizer")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--max_length", type=int, help="cut documents after this many tokens")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="tokenizer threads")
    parser.add_argument("--batch_size", type=int, default=256, help="documents tokenised at a time")
    parser.add_argument("--remove_columns", nargs="*", default=[], help="columns not to be read at all")
    parser.add_argument("--max_tokens", type=int, help="stop after this many tokens")
    parser.add_argument("--holdout", type=float, default=0.01, help="share of documents held out; 0 for none")
    args = parser.parse_args(argv)
    for name in ("max_length", "num_proc", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DataError(f"--{name}: {value} must be at least 1")
    if not 0 <= args.holdout < 1:
        raise DataError(f"--holdout: {args.holdout} must be a share of the documents, from 0 to below 1")
    return args


def held_out(index: int, share: float) -> bool:
    """Whether document `index` is held out: evenly spread, the first one included, whatever the corpus' length."""
    return math.floor(index * share) != math.floor((index - 1) * share)


def tokenize(args: argparse.Namespace, tokenizer, folder: Path) -> dict:
    """Writes train.arrow and heldout.arrow to `folder`; returns {split: {documents, tokens}}."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    features = Features({"input_ids": Sequence(Value("int32"))})
    writers = {split: ArrowWriter(features=features, path=str(folder / f"{split}.arrow")) for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    stream = documents(args.dataset_name, args.dataset_config, args.split, args.text_field, args.remove_columns, args.holdout)
    index, total, cut = 0, 0, {"truncation": True, "max_length": args.max_length} if args.max_length else {}
    bos, length = beginning(tokenizer), 0  # length: how much of the document there is
    with tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=args.max_tokens) as progress:
        while batch := list(itertools.islice(stream, args.batch_size)):
            encoded = tokenizer([document.text for document in batch], add_special_tokens=False, **cut)["input_ids"]
            rows = {split: [] for split in SPLITS}
            for ids, (_, ends, held) in zip(encoded, batch):
                split = SPLITS[held_out(index, args.holdout) if held is None else held]
                ids = (ids if length else bos + ids)[: args.max_length and args.max_length - length]
                if held and args.max_tokens and counts[split]["tokens"] >= args.holdout * args.max_tokens:
                    ids = []  # the end of a large file may be more than its share of what is asked for
                length += len(ids)
                if ends:
                    ids += [tokenizer.eos_token_id] if length else []
                    index, length = index + (held is None), 0
                if ids:  # of a document that is not cut off already
                    rows[split].append(ids)
                    counts[split]["documents"] += 1  # large ones in parts
                counts[split]["tokens"] += len(ids)
                total += len(ids)
                progress.update(len(ids))
                if args.max_tokens and total >= args.max_tokens:
                    break
            for split in SPLITS:
                if rows[split]:
                    writers[split].write_batch({"input_ids": rows[split]})
            if args.max_tokens and total >= args.max_tokens:
                break
    for split in SPLITS:
        if not counts[split]["documents"] and (split == "train" or args.holdout):
            raise DataError(f"--dataset_name: {args.dataset_name} gave no text for the {split} part")
        writers[split].finalize()
    held = counts["heldout"]["tokens"] / sum(counts[split]["tokens"] for split in SPLITS)
    if held > 0.5 > args.holdout:
        raise DataError(f"--holdout: {args.holdout} would hold out {held:.0%} of {args.dataset_name}, whose first document is most of it; "
                        "cut that into several, or say --holdout 0")  # fmt: skip
    return counts


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(args.num_proc), "true"
    key = {
        "kind": "tokenized",
        "corpus": corpus_key(args.dataset_name),
        **{name: getattr(args, name) for name in ("dataset_config", "split", "text_field", "max_length", "max_tokens", "holdout")},
    }  # fmt: skip
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    key["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    if bos := beginning(tokenizer):
        key["bos_token_id"] = bos[0]
    if is_done(args.output_dir, key):
        print(f"{args.output_dir}: is there already, made with the same corpus, tokenizer and options")
        return
    start = time.perf_counter()
    with complete_or_absent(args.output_dir) as folder:
        counts = tokenize(args, tokenizer, folder)
        metadata = {
            **key, "dataset_name": args.dataset_name, "tokenizer": args.tokenizer, "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id, **counts,
        }  # fmt: skip
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
    seconds, total = time.perf_counter() - start, sum(c["tokens"] for c in counts.values())
    print(f"{args.output_dir}: {total:,} tokens ({counts['heldout']['tokens']:,} held out) of "
          f"{sum(c['documents'] for c in counts.values()):,} documents in {seconds:.0f} s, {total / seconds:,.0f} tokens/s")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"preprocess_download_tokenize.py: error: {one_line(error)}")

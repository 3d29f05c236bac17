"""Tokenises a corpus, from the Hugging Face hub or local files, in constant memory.

    python preprocess_download_tokenize.py --dataset_name robbiegwaldd/dclm-10B --tokenizer Qwen/Qwen2.5-1.5B-Instruct \
        --output_dir data/tokenized

Documents end with the tokenizer's EOS, and begin with its BOS if it puts one before every text. Every k-th document is
held out, so that it is never trained on; of a text file that is large, or the only one, it is the end. The name of a
control token in a text (`<|im_end|>` in a web page) is encoded as text, unless --allow_special_tokens is given. The
result is keyed by corpus, tokenizer and options: a second call does nothing, a different one into the same folder is
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
from runtime.corpora import Corpus
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

TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # the look of added tokens that structure a text: <tool_call>, [INST]

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
        help="hub name, or file or folder of text or tables (.jsonl, .csv, .parquet ...)",
    )
    parser.add_argument("--tokenizer", required=True, help="hub name or folder of the teacher's tokenizer")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dataset_config", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--max_length", type=int, help="cut documents after this many tokens")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="tokenizer threads")
    parser.add_argument("--batch_size", type=int, default=256, help="documents tokenised at a time")
    parser.add_argument("--remove_columns", nargs="*", default=[], help="columns of a hub dataset not to be read")
    parser.add_argument("--max_tokens", type=int, help="stop at exactly this many tokens, within a document")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.01,
        help="share of documents, and of --max_tokens, held out; 0 for none",
    )
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out local files that cannot be read; rows before a fault are kept",
    )
    parser.add_argument(
        "--allow_special_tokens",
        action="store_true",
        help="encode the name of a control token as that token, for chat-templated text",
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
    """Whether document `index` is held out: evenly spread, the first one included, whatever the
    corpus' length."""
    return math.floor(index * share) != math.floor((index - 1) * share)


def text_encoder(tokenizer, allow_special_tokens: bool):
    """A tokenizers.Tokenizer that encodes texts of any length as the tokenizer does.

    Without allow_special_tokens, a control token's name in a text is encoded as its characters.
    Control tokens are the special tokens, and added tokens that look like a tag. Raises DataError
    if the tokenizer can encode a name only as the control token.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    control = [token for token in state["added_tokens"] if token["special"] or TAG.fullmatch(token["content"])]
    if not allow_special_tokens:
        for token in control:
            token["special"] = True
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = not allow_special_tokens
    for token in control if not allow_special_tokens else ():
        name = token["content"]
        if name != tokenizer.unk_token and token["id"] in encoder.encode(name, add_special_tokens=False).ids:
            raise DataError(
                f"--tokenizer: has no encoding of the text {name!r} but the control token; say --allow_special_tokens"
            )
    return encoder


def quotas(max_tokens: int | None, holdout: float) -> dict[str, float]:
    """How many tokens each split takes at most. Raises DataError if none are left to train on."""
    if max_tokens is None:
        return dict.fromkeys(SPLITS, math.inf)
    heldout = max(1, round(max_tokens * holdout)) if holdout else 0
    if heldout >= max_tokens:
        raise DataError(f"--max_tokens: {max_tokens} leaves nothing to train on beside --holdout {holdout}; raise it")
    return {"train": max_tokens - heldout, "heldout": heldout}


def tokenize(args: argparse.Namespace, tokenizer, corpus: Corpus, folder: Path) -> dict:
    """Writes train.arrow and heldout.arrow to `folder`; returns {split: {documents, tokens}}."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    features = Features({"input_ids": Sequence(Value("int32"))})
    writers = {split: ArrowWriter(features=features, path=str(folder / f"{split}.arrow")) for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    room = quotas(args.max_tokens, args.holdout)
    encoder = text_encoder(tokenizer, args.allow_special_tokens)
    bos = beginning(tokenizer)
    stream = corpus.documents(args.holdout)
    index = 0  # of the document, not counting those whose split is fixed
    length = 0  # tokens of the document so far
    begins = True
    cut = []
    with tqdm(desc="tokenising", unit=" tokens", unit_scale=True, total=args.max_tokens) as progress:
        while any(room.values()) and (batch := list(itertools.islice(stream, args.batch_size))):
            # What has no room is not worth encoding: the rest of a large file's end.
            texts = ["" if held is not None and not room[SPLITS[held]] else text for text, _, held in batch]
            encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
            rows = {split: [] for split in SPLITS}
            for encoding, (_, ends, held) in zip(encoded, batch):
                ids = encoding.ids
                if begins:
                    split = SPLITS[held_out(index, args.holdout) if held is None else held]
                    if held is None and not room[split]:  # so that both splits get their share
                        split = SPLITS[split == "train"]
                    ids = bos + ids
                    length = 0
                ids = ids[: args.max_length and args.max_length - length]
                length += len(ids)
                begins = ends
                if ends:
                    ids += [tokenizer.eos_token_id] if length else []
                    index += held is None
                if room[split] and (len(ids) > room[split] or len(ids) == room[split] and not ends):
                    cut.append(split)
                if ids := ids[: min(room[split], len(ids))]:
                    rows[split].append(ids)
                    counts[split]["documents"] += 1  # large ones in parts
                    counts[split]["tokens"] += len(ids)
                    room[split] -= len(ids)
                    progress.update(len(ids))
            for written in filter(rows.get, SPLITS):  # split goes on with the document
                writers[written].write_batch({"input_ids": rows[written]})
    for split in SPLITS:
        if not counts[split]["documents"] and (split == "train" or args.holdout):
            left_out = corpus.left_out() or "it is too small"
            raise DataError(f"--dataset_name: {args.dataset_name} gave no text for the {split} part; {left_out}")
        writers[split].finalize()
    total = sum(counts[split]["tokens"] for split in SPLITS)
    held = counts["heldout"]["tokens"] / total
    if held > 0.5 > args.holdout:
        raise DataError(
            f"--holdout: {args.holdout} would hold out {held:.0%} of {args.dataset_name}, whose first document is most of it; "
            "cut that into several, or say --holdout 0"
        )
    for split in cut:
        print(f"--max_tokens: the last document of the {split} part is cut, its rest is dropped")
    if args.max_tokens and total < args.max_tokens:
        print(f"--max_tokens: the corpus has no more than {total:,} of {args.max_tokens:,} tokens")
    return counts


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = (
        str(args.num_proc),
        "true",
    )
    corpus = Corpus(
        args.dataset_name,
        args.text_field,
        args.dataset_config,
        args.split,
        args.remove_columns,
        args.skip_bad_files,
    )
    key = {
        "kind": "tokenized",
        "corpus": corpus.key,
        **{name: getattr(args, name) for name in KEY_OPTIONS},
    }
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    key["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    if bos := beginning(tokenizer):
        key["bos_token_id"] = bos[0]
    if is_done(args.output_dir, key):
        print(f"{args.output_dir}: is there already, made with the same corpus, tokenizer and options")
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
    seconds, total = time.perf_counter() - start, sum(c["tokens"] for c in counts.values())
    print(
        f"{args.output_dir}: {total:,} tokens ({counts['heldout']['tokens']:,} held out) of "
        f"{sum(c['documents'] for c in counts.values()):,} documents in {seconds:.0f} s, {total / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    run_main(main)

"""Cuts a tokenised dataset into chunks of one length: what `data.cache_dir` names.

    python preprocess_chunk.py --tokenized_dataset_path data/tokenized --context_length 512 --output_dir data

writes data/chunked_context512/. Documents are joined end to end (EOS stands between them) and cut;
with --packing fit they stay whole where they fit a chunk, and at most 1 % of a chunk is padding. The
chunks record where documents begin. The held-out part stays apart; the last, incomplete chunk of
each part is dropped.

    python preprocess_chunk.py --adopt data_cache/chunked_context512 --tokenizer TEACHER --output_dir data

converts chunks that `datasets` saved: a folder of rows of input_ids, as hybrid-distillation makes
it. They are checked against the tokenizer and copied; the folder itself is not changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import compress
from pathlib import Path

from runtime.adopt import AGAIN, HELDOUT_SPLITS, Saved, check_rows, check_tokenizer, open_saved, source_key
from runtime.command import run_main
from runtime.data import (
    DOCUMENT_LENGTHS,
    INPUT_IDS,
    LARGEST,
    LOSS_MASK,
    METADATA,
    SPLITS,
    DataError,
    is_done,
    is_saved_dataset,
    load_tokenizer,
    open_split,
    read_metadata,
    tokenizer_fingerprint,
)
from runtime.files import atomic_directory
from runtime.old_flags import refuse_old_flags
from runtime.packing import PACKING, CutPacker, FitPacker, packer_of

DTYPES = ("uint16", "uint32", "int32", "int64")
HOLDOUT = 0.01  # default fraction of the chunks of --adopt


class ChunkWriter:
    """The Arrow file of a split's chunks; chunks of which nothing is learned are left out.

    count: chunks so far. largest: their largest token id. documents: how many documents, or parts
    of one, are in them; padding: how many tokens are not of any.
    """

    def __init__(self, path: Path, length: int, dtype: str, has_documents: bool, has_mask: bool):
        from datasets import Features, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        columns = {INPUT_IDS: Sequence(Value(dtype), length=length)}
        if has_mask:
            columns[LOSS_MASK] = Sequence(Value("bool"), length=length)
        if has_documents:
            columns[DOCUMENT_LENGTHS] = Sequence(Value("int32"))
        self.writer = ArrowWriter(features=Features(columns), path=str(path))
        self.dtype = dtype
        self.count = self.largest = self.documents = self.padding = 0

    def write(self, rows: dict[str, list]) -> None:
        if LOSS_MASK in rows:
            learned = [mask[1:].any() for mask in rows[LOSS_MASK]]  # a chunk's first token is never predicted
            rows = {name: list(compress(values, learned)) for name, values in rows.items()}
        if not rows.get(INPUT_IDS):
            return
        rows[INPUT_IDS] = [ids.astype(self.dtype) for ids in rows[INPUT_IDS]]
        self.writer.write_batch(rows)
        self.count += len(rows[INPUT_IDS])
        self.largest = max(self.largest, *(int(ids.max()) for ids in rows[INPUT_IDS]))
        for ids, lengths in zip(rows[INPUT_IDS], rows.get(DOCUMENT_LENGTHS, ())):
            self.documents += len(lengths)
            self.padding += len(ids) - int(lengths.sum())


def chunk(dataset, packer: CutPacker | FitPacker, dtype: str, path: Path, description: str) -> ChunkWriter:
    """Writes the chunks of `dataset` to the arrow file `path`. Raises DataError if `dtype` cannot
    hold an id."""
    import numpy
    import pyarrow.compute
    from tqdm import tqdm

    has_mask = LOSS_MASK in dataset.column_names
    writer = ChunkWriter(path, packer.length, dtype, has_documents=packer.eos is not None, has_mask=has_mask)
    with tqdm(total=len(dataset), desc=description, unit=" documents", unit_scale=True) as progress:
        for batch in dataset.with_format("arrow").iter(batch_size=256):
            column = batch[INPUT_IDS].combine_chunks()
            ids = column.flatten().to_numpy(zero_copy_only=False)
            if len(ids) and ids.max() > numpy.iinfo(dtype).max:
                raise DataError(f"--dtype: {dtype} cannot hold the token id {ids.max()}; take int32")
            lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
            learned = None
            if has_mask:
                learned = batch[LOSS_MASK].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            writer.write(packer.add(ids, lengths, learned))
            progress.update(len(batch))
    writer.write(packer.finish())
    writer.writer.finalize()
    return writer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    refuse_old_flags("preprocess_chunk.py", argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenized_dataset_path", type=Path, help="output of preprocess_download_tokenize.py")
    source.add_argument("--adopt", type=Path, help="folder of chunks that datasets' save_to_disk wrote")
    parser.add_argument(
        "--context_length",
        type=int,
        help="tokens per chunk, the config's train.train_seq_len; --adopt: the length of the rows",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="folder in which to create chunked_context<N>")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="integer type on disk; default: one large enough for the vocabulary",
    )
    parser.add_argument(
        "--packing",
        choices=PACKING,
        help="cut (default): documents are joined end to end and cut; fit: documents stay whole where they fit a "
        "chunk, and at most 1 %% of a chunk is padding",
    )
    parser.add_argument("--tokenizer", help="--adopt: hub name or folder of the tokenizer that made the chunks")
    parser.add_argument(
        "--holdout",
        type=float,
        help="--adopt: fraction of the chunks to hold out, the last ones; 0: none; "
        f"default: {HOLDOUT}, or the folder's own split ({', '.join(HELDOUT_SPLITS)})",
    )
    args = parser.parse_args(argv)
    if args.adopt and not args.tokenizer:
        raise DataError("--adopt: needs --tokenizer, the one that made the chunks")
    if args.tokenized_dataset_path and args.context_length is None:
        raise DataError("--context_length: missing; give the tokens per chunk, train.train_seq_len")
    if args.tokenized_dataset_path and (args.tokenizer or args.holdout is not None):
        raise DataError("--tokenizer, --holdout: are for --adopt; give them to preprocess_download_tokenize.py")
    if args.adopt and args.packing:
        raise DataError("--packing: is for documents, of --tokenized_dataset_path; --adopt keeps chunks as they are")
    if args.context_length is not None and args.context_length < 2:
        raise DataError(f"--context_length: {args.context_length} must be at least 2")
    if args.holdout is not None and not 0 <= args.holdout < 1:
        raise DataError(f"--holdout: {args.holdout} must be a share of the chunks, from 0 to below 1")
    return args


def storage_dtype(wanted: str | None, vocab_size: int) -> str:
    """The integer type on disk: `wanted`, or one large enough for the vocabulary.

    Raises DataError if `wanted` is too small.
    """
    if wanted == "uint16" and vocab_size > 1 << 16:
        raise DataError(f"--dtype: uint16 cannot hold a vocabulary of {vocab_size}; take int32")
    return wanted or ("uint16" if vocab_size <= 1 << 16 else "int32")


def write_chunks(output: Path, key: dict, datasets: dict) -> None:
    """Writes the chunk folder `output`, atomically.

    key: its metadata without the counts. datasets: {split: dataset, or None if the split is empty},
    of documents if the key has a packing.
    """
    start = time.perf_counter()
    length = key["context_length"]
    packing = key.get("packing")
    eos = key["eos_token_id"] if packing else None
    written = {}
    with atomic_directory(output) as folder:
        for split in SPLITS:
            if datasets[split] is not None:
                packer = packer_of(packing, length, eos)
                file = folder / f"{split}.arrow"
                written[split] = chunk(datasets[split], packer, key["dtype"], file, f"chunking {split}")
        counts = {split: written[split].count if split in written else 0 for split in SPLITS}
        if not counts["train"]:
            if key["train"]["tokens"] >= length:
                raise DataError(f"--context_length: no chunk of {length} tokens holds a token to be learned")
            raise DataError(f"--context_length: {length} is more than the {key['train']['tokens']} training tokens")
        found = {
            "num_chunks": counts["train"],
            "heldout_chunks": counts["heldout"],
            LARGEST: max(part.largest for part in written.values()),
        }
        if packing:
            found["documents_in_chunks"] = {split: part.documents for split, part in written.items()}
            found["padding"] = {split: part.padding for split, part in written.items()}
        metadata = key | found
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
    seconds = time.perf_counter() - start
    tokens = sum(counts.values()) * length
    padding = f", {sum(found['padding'].values()) / tokens:.2%} padding" if packing == "fit" else ""
    print(
        f"{output}: {counts['train']:,} chunks of {length} tokens ({counts['heldout']:,} held out{padding}) "
        f"in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"
    )


def cut(args: argparse.Namespace) -> None:
    """Makes chunks from the output of preprocess_download_tokenize.py."""
    try:
        source = read_metadata(args.tokenized_dataset_path)
    except DataError:
        source = {}
    if source.get("kind") != "tokenized":
        folder = args.tokenized_dataset_path
        cure = f"; it has no EOS between documents: {AGAIN}" if is_saved_dataset(folder) else ""
        raise DataError(f"--tokenized_dataset_path: {folder} was not made by preprocess_download_tokenize.py{cure}")
    dtype = storage_dtype(args.dtype, source["vocab_size"])
    packing = args.packing or PACKING[0]
    key = {**source, "kind": "chunks", "context_length": args.context_length, "dtype": dtype, "packing": packing}
    output = args.output_dir / f"chunked_context{args.context_length}"
    if is_done(output, key):
        print(f"{output}: already exists, made from the same tokens")
        if DOCUMENT_LENGTHS not in open_split(output, "train").column_names:
            print(f"{output} does not record where documents begin; for data.document_mask, remove it and run again")
        return
    datasets = dict.fromkeys(SPLITS)
    for split in SPLITS:
        if rows := source[split]["documents"]:
            datasets[split] = open_split(args.tokenized_dataset_path, split, rows)
    write_chunks(output, key, datasets)


def adopt(args: argparse.Namespace) -> None:
    """Converts chunks that `datasets` saved, after checking them against --tokenizer."""
    source = args.adopt
    saved = open_saved(source)
    length = row_length(args, saved)
    output = args.output_dir / f"chunked_context{length}"
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise DataError(f"--output_dir: {output} is, or is in, the folder to be adopted; name another")
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    holdout = HOLDOUT if args.holdout is None else args.holdout
    key = {
        "kind": "chunks",
        "corpus": source_key(source),
        "holdout": saved.heldout_name or holdout,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "context_length": length,
        "dtype": storage_dtype(args.dtype, vocab_size),
    }
    if is_done(output, key):
        print(f"{output}: already exists, adopted from the same chunks")
        return
    if saved.heldout_name:
        splits = {"train": saved.train, saved.heldout_name: saved.heldout}
        rows = {"train": saved.train, "heldout": saved.heldout}
    else:
        splits = {"train": saved.train}
        rows = hold_out_end(saved.train, holdout)
    eos = 0
    for name, split in splits.items():
        eos += check_rows(source, name, split, length, vocab_size, tokenizer.eos_token_id)
    warn(args, saved, tokenizer, eos)
    key |= {"eos_tokens": eos, "dataset_name": str(source), "tokenizer": args.tokenizer}
    write_chunks(output, key, rows)


def row_length(args: argparse.Namespace, saved: Saved) -> int:
    """The length of the rows to be adopted. Raises DataError if options do not fit the folder."""
    source = args.adopt
    if saved.heldout_name and args.holdout is not None:
        raise DataError(f"--holdout: {source} has its own split to hold out, {saved.heldout_name}; leave --holdout out")
    length = len(saved.train[0]["input_ids"] or [])
    if length < 2:
        raise DataError(f"--adopt: {source}: row 0 of train has {length} tokens, and must have at least 2; {AGAIN}")
    if args.context_length not in (None, length):
        raise DataError(f"--context_length: {args.context_length}, but {source} has rows of {length}; leave it out")
    return length


def warn(args: argparse.Namespace, saved: Saved, tokenizer, eos_count: int) -> None:
    """Prints what is doubtful about the chunks. Raises DataError if another tokenizer made them."""
    source = args.adopt
    warnings = [check_tokenizer(source, saved.train, tokenizer, args.tokenizer)]
    if not eos_count:
        warnings.append(
            f"{source} holds no EOS ({tokenizer.eos_token}): nothing says where a document ends, and the "
            f"model learns to write on from one into the next; to separate them, {AGAIN}"
        )
    if saved.left_out:
        warnings.append(f"{source}: ignored: {', '.join(saved.left_out)}")
    for warning in filter(None, warnings):
        print(f"warning: {warning}", file=sys.stderr)


def hold_out_end(dataset, share: float) -> dict:
    """{heldout: the last `share` of the chunks (None for 0), train: the others}.

    So at most one document, which was cut into several chunks, is in both. Raises DataError if no
    chunk is left to train on.
    """
    held = max(1, round(share * len(dataset))) if share else 0
    first = len(dataset) - held
    if not first:
        raise DataError(f"--holdout: {share} of {len(dataset)} chunks leaves none to train on; use --holdout 0")
    heldout = dataset.select(range(first, len(dataset))) if held else None
    return {"train": dataset.select(range(first)), "heldout": heldout}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.adopt:
        adopt(args)
    else:
        cut(args)


if __name__ == "__main__":
    run_main(main)

"""Cuts a tokenised dataset into chunks of one length: what `data.cache_dir` names.

    python preprocess_chunk.py --tokenized_dataset_path data/tokenized --context_length 512 --output_dir data

writes data/chunked_context512/. Documents are joined end to end (EOS stands between them); the held-out part stays
apart; the last, incomplete chunk of each part is dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from pipeline.data import LARGEST, METADATA, SPLITS, DataError, is_done, open_split, read_metadata
from pipeline.files import complete_or_absent, one_line

DTYPES = ("uint16", "int32", "int64")


def chunk(dataset, length: int, dtype: str, path: Path, description: str) -> tuple[int, int]:
    """Writes the chunks of `dataset` to the arrow file `path`; returns how many there are, and the largest token id in them.

    Raises DataError if `dtype` cannot hold an id.
    """
    import numpy
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    writer = ArrowWriter(features=Features({"input_ids": Sequence(Value(dtype), length=length)}), path=str(path))
    rest = numpy.empty(0, dtype)
    count = largest = 0
    with tqdm(total=len(dataset), desc=description, unit=" documents", unit_scale=True) as progress:
        for batch in dataset.with_format("arrow").iter(batch_size=256):
            ids = batch["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if len(ids) and ids.max() > numpy.iinfo(dtype).max:
                raise DataError(f"--dtype: {dtype} cannot hold the token id {ids.max()}; take int32")
            ids = numpy.concatenate((rest, ids.astype(dtype)))
            full = len(ids) // length
            if full:
                largest = max(largest, int(ids[: full * length].max()))
                writer.write_batch({"input_ids": list(ids[: full * length].reshape(full, length))})
            rest, count = ids[full * length :], count + full
            progress.update(len(batch))
    writer.finalize()
    return count, largest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenized_dataset_path", required=True, type=Path, help="folder of preprocess_download_tokenize.py")
    parser.add_argument("--context_length", required=True, type=int, help="tokens per chunk; train.train_seq_len")
    parser.add_argument("--output_dir", required=True, type=Path, help="chunked_context<N> is made in here")
    parser.add_argument("--dtype", choices=DTYPES, help="integer type on disk; default: the smallest that holds the vocabulary")
    args = parser.parse_args(argv)
    if args.context_length < 2:
        raise DataError(f"--context_length: {args.context_length} must be at least 2")
    try:
        source = read_metadata(args.tokenized_dataset_path)
    except DataError:
        source = {}
    if source.get("kind") != "tokenized":
        raise DataError(f"--tokenized_dataset_path: {args.tokenized_dataset_path} was not made by preprocess_download_tokenize.py")
    dtype = args.dtype or ("uint16" if source["vocab_size"] <= 1 << 16 else "int32")
    if dtype == "uint16" and source["vocab_size"] > 1 << 16:
        raise DataError(f"--dtype: uint16 cannot hold a vocabulary of {source['vocab_size']}; take int32")
    key = {**source, "kind": "chunks", "context_length": args.context_length, "dtype": dtype}
    output = args.output_dir / f"chunked_context{args.context_length}"
    if is_done(output, key):
        print(f"{output}: is there already, made from the same tokens")
        return
    start = time.perf_counter()
    with complete_or_absent(output) as folder:
        counts = dict.fromkeys(SPLITS, 0)
        largest = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            if source[split]["documents"]:
                rows, file = source[split]["documents"], folder / f"{split}.arrow"
                dataset = open_split(args.tokenized_dataset_path, split, rows)
                counts[split], largest[split] = chunk(dataset, args.context_length, dtype, file, f"chunking {split}")
        if not counts["train"]:
            raise DataError(f"--context_length: {args.context_length} is more than the {source['train']['tokens']} training tokens")
        metadata = {**key, "num_chunks": counts["train"], "heldout_chunks": counts["heldout"], LARGEST: max(largest.values())}
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
    seconds, tokens = time.perf_counter() - start, sum(counts.values()) * args.context_length
    print(f"{output}: {counts['train']:,} chunks of {args.context_length} tokens ({counts['heldout']:,} held out) "
          f"in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"preprocess_chunk.py: error: {one_line(error)}")

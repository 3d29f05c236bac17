"""Opens and checks chunk folders that `datasets` saved, as hybrid-distillation's
preprocess_chunk.py does.

Such a folder holds rows of `input_ids`, but does not record which tokenizer made them. It is never
written to.
"""

from __future__ import annotations

import hashlib
import json
import random
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from runtime.data import METADATA, DataError, is_saved_dataset
from runtime.files import one_line

import numpy
import pyarrow
import pyarrow.compute
from tqdm import tqdm

READ = ("input_ids", "attention_mask")  # columns; the second only to refuse padded rows
HELDOUT_SPLITS = ("heldout", "validation", "test")  # the first of these that a folder has is held out
AGAIN = "make the chunks again with preprocess_download_tokenize.py and preprocess_chunk.py"
TOKENS_AT_A_TIME = 1 << 21  # checked together
SAMPLED_ROWS = 32
SAMPLED_TOKENS = 512  # at the beginning of a sampled row
# When a row's ids are decoded and encoded again, the right tokenizer reproduces at least 99.4 % of
# 512 tokens; it misses some at the ends of rows and documents, which are cut inside a word or joined
# without EOS. Wrong tokenizers reproduced at most 91 % over all rows: Qwen2.5's and Llama 3's with
# each other's ids, and BPEs of 4096 entries that were trained on different texts.
LEAST_REPRODUCED = 0.95


class Saved(NamedTuple):
    """The splits of a folder, with the columns in READ. left_out names the other splits and
    columns."""

    train: object
    heldout: object | None  # None if the folder has no such split
    heldout_name: str
    left_out: list[str]


def source_key(folder: Path) -> str:
    """Identifies a folder's content by a hash of the names, sizes and modification times of its
    files."""
    stats = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            stat = file.stat()
            stats.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return f"adopted-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"


def open_saved(folder: Path) -> Saved:
    """Opens a folder that `datasets` saved, memory-mapped. Raises DataError if it is no such
    folder, or holds no token ids."""
    splits = _load(folder)
    if "train" not in splits:
        names = ", ".join(splits)
        raise DataError(f"--adopt: {folder} has no split named train, only {names}; name the folder of one of them")
    heldout_name = next((name for name in HELDOUT_SPLITS if name in splits), "")
    wanted = {name: splits[name] for name in ("train", heldout_name) if name}
    left_out = [f"split {name}" for name in splits if name not in wanted]
    for name, dataset in wanted.items():
        _check_columns(folder, name, dataset)
        read = [column for column in READ if column in dataset.column_names]
        ignored = [column for column in dataset.column_names if column not in read]
        left_out += [f"column {column} of {name}" for column in ignored]
        wanted[name] = dataset.select_columns(read)
    return Saved(wanted["train"], wanted.get(heldout_name), heldout_name, left_out)


def _load(folder: Path) -> dict:
    """{split: dataset} of a folder that `datasets` saved; a single dataset counts as train."""
    from datasets import Dataset, load_from_disk

    if (folder / METADATA).is_file():
        raise DataError(f"--adopt: {folder} holds a {METADATA}: it needs no adoption; name it in data.cache_dir")
    if not is_saved_dataset(folder):
        raise DataError(
            f"--adopt: {folder} is no folder of datasets' save_to_disk; name one with a state.json or dataset_dict.json"
        )
    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:  # a file is missing or truncated, or no row
        raise DataError(f"--adopt: {folder} does not open ({one_line(error)}); copy it again, or {AGAIN}") from None
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _check_columns(folder: Path, split: str, dataset) -> None:
    """Raises DataError unless the columns to be read are lists of integers."""
    types = pyarrow.types
    if "input_ids" not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise DataError(f"--adopt: {folder} has no column input_ids in {split}, only {names}; name a folder of chunks")
    for column in READ:
        if column not in dataset.column_names:
            continue
        kind = dataset.features.arrow_schema.field(column).type
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not is_list or not types.is_integer(kind.value_type):
            raise DataError(f"--adopt: {folder} has {column} of type {kind} in {split}; it must be lists of integers")


def _matrix(column, length: int) -> numpy.ndarray:
    """A column of lists of `length` values as [rows, length]; nulls must have been refused."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, length)


def check_rows(folder: Path, split: str, dataset, length: int, vocab_size: int, eos: int) -> int:
    """Reads all of a split and returns the number of EOS in it.

    Raises DataError, naming the row, for a row that has not `length` ids, holds one outside
    0 .. vocab_size - 1, or is padded.
    """
    start = 0  # of the batch, in rows
    count = 0

    def refuse(wrong: numpy.ndarray, values: numpy.ndarray, message: str) -> None:
        """Raises DataError if any of `values`, [rows] or [rows, length], is marked in `wrong`.

        message: with {value} and {row}.
        """
        if wrong.any():
            place = tuple(numpy.argwhere(wrong)[0])
            row = f"row {start + place[0]} of {split}"
            raise DataError(f"--adopt: {folder}: {message.format(row=row, value=values[place])}")

    outside = (
        "{row} holds the id {value}, which is none of the tokenizer's, 0 to "
        f"{vocab_size - 1}; name in --tokenizer the one that made the chunks"
    )
    with tqdm(total=len(dataset), desc=f"checking {split}", unit=" chunks", unit_scale=True) as progress:
        for batch in dataset.with_format("arrow").iter(batch_size=max(1, TOKENS_AT_A_TIME // length)):
            for name in batch.column_names:
                lengths = pyarrow.compute.list_value_length(batch[name])
                lengths = pyarrow.compute.fill_null(lengths, 0).to_numpy()
                other_length = f"{{row}} has {{value}} values in {name}, not {length}; {AGAIN}"
                refuse(lengths != length, lengths, other_length)
                flat = batch[name].combine_chunks().flatten()
                nulls = flat.is_null().to_numpy(zero_copy_only=False).reshape(-1, length)
                refuse(nulls, nulls, f"{{row}} has a null in {name}; {AGAIN}")
            ids = _matrix(batch["input_ids"], length)
            refuse((ids < 0) | (ids >= vocab_size), ids, outside)
            if "attention_mask" in batch.column_names:
                mask = _matrix(batch["attention_mask"], length)
                refuse(mask == 0, mask, f"{{row}} is padded (its attention_mask has a 0); {AGAIN}")
            count += int((ids == eos).sum())
            start += len(ids)
            progress.update(len(ids))
    return count


def share_reproduced(tokenizer, segments: list[list[int]]) -> float:
    """The fraction of the tokens of `segments` that decoding and encoding again reproduces."""
    kept = total = 0
    for ids in segments:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        matches = SequenceMatcher(None, ids, again, autojunk=False).get_matching_blocks()
        kept += sum(block.size for block in matches)
        total += max(len(ids), len(again))
    return kept / total


def sample_segments(dataset, added: set[int]) -> list[list[int]]:
    """Runs of token ids from rows evenly spread over a dataset, split at the ids `added`: added
    tokens such as EOS."""
    rows = min(SAMPLED_ROWS, len(dataset))
    segments = []
    for i in range(rows):
        segment = []
        for token in dataset[i * len(dataset) // rows]["input_ids"][:SAMPLED_TOKENS]:
            if token in added:
                segments.append(segment)
                segment = []
            else:
                segment.append(token)
        segments.append(segment)
    return [segment for segment in segments if segment]


def check_tokenizer(folder: Path, dataset, tokenizer, name: str) -> str | None:
    """Raises DataError if the tokenizer `name` did not make these ids.

    A tokenizer encodes a text in one way only; another tokenizer's ids, decoded and encoded again
    by it, rarely give the same ids. Returns a warning if this tokenizer reproduces any ids, so that
    nothing can be concluded.
    """
    added = set(tokenizer.added_tokens_decoder)
    segments = sample_segments(dataset, added)
    if not segments:
        raise DataError(
            f"--adopt: {folder} holds only added tokens of {name}; name in --tokenizer the one that made the chunks"
        )
    share = share_reproduced(tokenizer, segments)
    if share < LEAST_REPRODUCED:
        raise DataError(
            f"--tokenizer: {name} did not make {folder}: decoding and encoding a sample reproduces {share:.0%} of its "
            f"tokens, with the right one at least {LEAST_REPRODUCED:.0%}; name the one that made it"
        )
    rng = random.Random(0)
    shuffled = [rng.sample(segment, len(segment)) for segment in segments]
    if share_reproduced(tokenizer, shuffled) < LEAST_REPRODUCED:
        return None
    return f"{name} reproduces any ids, even in random order: this cannot show whether it made {folder}"

"""Corpora, tokenised documents and fixed-length chunks on disk, with metadata that says what made them.

Every data folder holds `train.arrow`, `heldout.arrow` and `metadata.json`; the arrow files are memory-mapped, so
neither writing nor reading needs memory for the corpus. Folders are written under a temporary name and renamed when
complete: one that exists is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "heldout")
METADATA = "metadata.json"
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")  # json and jsonl
PIECE, LINE = 1 << 20, 1 << 12  # characters of a text file read at a time, and the most of a line


class DataError(ValueError):
    """Data that cannot be used; its message is one line naming file or option, value and cure."""


# ------------------------------------------------------------------------------------------------ tokenizers
def load_tokenizer(name_or_path: str, key: str = "tokenizer"):
    """The tokenizer of a checkpoint or folder. Raises DataError, naming the option `key`, if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        folder = Path(name_or_path)
        settings = folder / "tokenizer_config.json"
        # AutoTokenizer trusts config.json's model_type more than the tokenizer itself and would put Qwen2's in place
        # of a home-made one.
        generic = settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") in (
            "PreTrainedTokenizerFast",
            "TokenizersBackend",
        )
        # trust_remote_code unsaid would ask at a terminal, and hang a job.
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{key}: {name_or_path!r} has no tokenizer that loads ({reason}); name a folder or a hub's model with one") from None
    if tokenizer.eos_token_id is None:
        raise DataError(f"{key}: {name_or_path!r} has a tokenizer without an EOS token to put between documents; set eos_token")
    return tokenizer


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what decides the ids: the vocabulary, merges and normalisation, and EOS; not of where it lies."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("padding", "truncation"):
        state.pop(volatile, None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ folders
def data_fingerprint(metadata: dict) -> str:
    """A hash of what decides a data folder's content; not of where its corpus and tokenizer lay."""
    content = {name: value for name, value in metadata.items() if name not in ("dataset_name", "tokenizer")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_saved_dataset(folder: Path) -> bool:
    """Whether this is a folder of `datasets.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_metadata(folder: str | Path, key: str | None = None) -> dict:
    """The metadata of a data folder. Raises DataError, naming the option `key`, if the folder is missing or not one of ours."""
    folder, option = Path(folder), f"{key}: " if key else ""
    if not folder.is_dir():
        raise DataError(f"{option}{folder}: no such folder; make it with preprocess_chunk.py")
    try:
        return json.loads((folder / METADATA).read_text())
    except (OSError, ValueError):
        cure = "make the folder anew with preprocess_chunk.py"
        if is_saved_dataset(folder):
            cure = f"if it holds chunks: python preprocess_chunk.py --adopt {folder} --tokenizer TEACHER --output_dir DIR"
        raise DataError(f"{option}{folder}: holds no readable {METADATA}; {cure}") from None


def is_done(folder: Path, key: dict) -> bool:
    """Whether `folder` already holds what `key` describes. Raises DataError if it holds something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = read_metadata(folder)
    for name, value in key.items():
        if found.get(name) != value:
            raise DataError(f"{folder}: was made with {name} {found.get(name)!r}, not {value!r}; choose another --output_dir or remove it")
    return True


# ------------------------------------------------------------------------------------------------ corpora
class Document(NamedTuple):
    """A document of a corpus, or a piece of a large one: whether it ends it, and whether that is held out; None: as its turn comes."""

    text: str
    ends: bool = True
    heldout: bool | None = None


def _text_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.name[0] != ".")
    if not files:
        raise DataError(f"--dataset_name: {path} holds no files")
    return files


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    if path.exists():
        return True
    # Hub names are `name` or `owner/name`; anything else can only have meant a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in (".txt", *TABLES):
        raise DataError(f"--dataset_name: {name} does not exist")
    return False


def corpus_key(name: str) -> str:
    """What identifies a corpus: a hub name, or a hash of the names, sizes and times of local files."""
    if not _is_local(name):
        return name
    root = Path(name).expanduser()
    stats = [(str(f.relative_to(root)), (s := f.stat()).st_size, s.st_mtime_ns) for f in _text_files(root)]
    return f"local-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"


def _kind(file: Path) -> str | None:
    """What reads a table, None for a file of another kind."""
    inner = Path(file.stem).suffix
    return TABLES.get(inner if file.suffix in COMPRESSED and inner != ".parquet" else file.suffix)


def _characters(file: Path) -> int | None:
    """How many a text file has, None for one that is not UTF-8."""
    try:
        with file.open(encoding="utf-8") as text:
            return sum(map(len, iter(lambda: text.read(PIECE), "")))
    except UnicodeDecodeError:
        return None


def _lines(text) -> Iterator[str]:
    """What an open text file has left, long lines in parts."""
    return iter(lambda: text.readline(LINE), "")


def _pieces(lines: Iterator[str], heldout: bool | None = None) -> Iterator[Document]:
    """A document of these lines as pieces of about PIECE characters."""
    piece, size = [], 0
    for line in lines:
        if size >= PIECE:
            yield Document("".join(piece), False, heldout)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if size:
        yield Document("".join(piece), True, heldout)


def _end_and_beginning(file: Path, beginning: float) -> Iterator[Document]:
    """A text file as two documents: what comes behind so many characters, held out, and what before, not; never nothing in either."""
    with file.open(encoding="utf-8") as text:
        size = lines = 0
        for line, _ in itertools.pairwise(_lines(text)):  # all but the last
            size, lines = size + len(line), lines + 1
            if size >= beginning:
                break
        text.seek(0)
        deque(itertools.islice(_lines(text), lines), maxlen=0)
        yield from _pieces(_lines(text), True)
        text.seek(0)
        yield from _pieces(itertools.islice(_lines(text), lines), False)


def _rows(table, text_field: str, source: str) -> Iterator[Document]:
    for row in table:
        if text_field not in row:
            raise DataError(f"--text_field: {text_field!r} is no column of {source}; its columns are {', '.join(row)}")
        if row[text_field]:
            yield Document(row[text_field])


def documents(
    name: str, config: str | None, split: str, text_field: str, remove_columns: list[str], holdout: float = 0.0
) -> Iterator[Document]:
    """Streams a hub dataset or local text, parquet, json or jsonl files, the latter two also compressed (.gz, .bz2, .xz).

    Text files of any other suffix are a document each; those that are not UTF-8 are skipped, and counted at the end. Of one that is
    large, or the only one, the end is held out, of the share `holdout`.
    """
    from datasets import load_dataset

    if not _is_local(name):
        try:
            table = load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # the hub's clients raise a dozen kinds for a name, a network, a token
            raise DataError(f"--dataset_name: {name!r} is no local path and the hub did not give it ({str(error).splitlines()[0]})") from None
        yield from _rows(table.remove_columns(remove_columns) if remove_columns else table, text_field, name)
        return
    files, skipped, characters = _text_files(Path(name).expanduser()), [], cache(_characters)
    alone = len(list(itertools.islice((file for file in files if _kind(file) or characters(file)), 2))) == 1
    for file in files:
        if kind := _kind(file):
            table = load_dataset(kind, data_files=str(file), split="train", streaming=True)
            yield from _rows(table.remove_columns(remove_columns) if remove_columns else table, text_field, str(file))
        elif (size := characters(file)) is None:
            skipped.append(file)
        elif holdout and (alone or size > PIECE):
            yield from _end_and_beginning(file, (1 - holdout) * size)
        else:
            with file.open(encoding="utf-8") as text:
                yield from _pieces(_lines(text))
    if skipped:
        print(f"{name}: {len(skipped)} of {len(files)} files are not UTF-8 and were left out, the first {skipped[0]}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ chunks
@dataclass(frozen=True)
class Chunks:
    """Fixed-length token sequences: datasets with a column `input_ids`, and what made them."""

    train: object
    heldout: object | None  # None where nothing was held out
    metadata: dict


def open_chunks(cache_dir: str, train_seq_len: int, fingerprint: str | None = None, key: str = "data.cache_dir") -> Chunks:
    """The chunks of `cache_dir`, which the option `key` named, memory-mapped. Raises DataError if they are missing or made for
    another run."""
    metadata = read_metadata(cache_dir, key)
    if metadata.get("context_length") != train_seq_len:
        raise DataError(
            f"{key}: {cache_dir} holds chunks of {metadata.get('context_length')} tokens, but "
            f"train.train_seq_len is {train_seq_len}; make others with preprocess_chunk.py --context_length {train_seq_len}"
        )
    if fingerprint not in (None, metadata["tokenizer_fingerprint"]):
        raise DataError(
            f"{key}: {cache_dir} was made with the tokenizer {metadata['tokenizer']}, which is not the "
            "teacher's; preprocess again with --tokenizer set to the teacher"
        )
    train = open_split(Path(cache_dir), "train", metadata["num_chunks"])
    heldout = open_split(Path(cache_dir), "heldout", metadata["heldout_chunks"]) if metadata["heldout_chunks"] else None
    return Chunks(train, heldout, metadata)


def open_split(folder: Path, split: str, rows: int | None = None):
    """The memory-mapped dataset of a data folder's split. Raises DataError if it cannot be read or has not so many rows."""
    from datasets import Dataset

    file = folder / f"{split}.arrow"
    try:
        dataset = Dataset.from_file(str(file))
    except (OSError, ValueError):
        raise DataError(f"{file}: missing or damaged; remove {folder} and preprocess again") from None
    if rows not in (None, len(dataset)):
        raise DataError(f"{file}: damaged, it has {len(dataset):,} of {rows:,} rows; remove {folder} and preprocess again")
    return dataset


def collate(rows: list[dict]) -> dict:
    """A batch {"input_ids": [B, T] int64}. No attention mask: an all-ones one sends FLA's layers down their slow path."""
    import numpy
    import torch

    return {"input_ids": torch.from_numpy(numpy.stack([row["input_ids"] for row in rows]).astype("int64"))}

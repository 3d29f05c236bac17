"""Tokenizers, tokenised documents and fixed-length chunks on disk, with metadata that says what made them.

Every data folder holds `train.arrow`, `heldout.arrow` and `metadata.json`; the arrow files are memory-mapped, so
neither writing nor reading needs memory for the corpus. Folders are written under a temporary name and renamed when
complete: one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "heldout")
METADATA = "metadata.json"
# The values of options that a folder's metadata does not mention: it was made before they existed.
FORMERLY = {"allow_special_tokens": True, "skip_bad_files": False}


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
    found = FORMERLY | read_metadata(folder)
    for name, value in key.items():
        if found.get(name) != value:
            raise DataError(f"{folder}: was made with {name} {found.get(name)!r}, not {value!r}; choose another --output_dir or remove it")
    return True


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

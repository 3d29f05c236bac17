"""A teacher's most likely tokens at every position of a folder of chunks, on disk.

The folder that store_teacher.py writes holds, for each split of the chunks, memory-mapped arrays
over rows [N], positions [T] and the k top tokens:

- `<split>.values.npy`, fp16 [N, T, k]: their log-probabilities;
- `<split>.ids.npy`, uint16 or uint32 [N, T, k]: their ids;
- `<split>.log_rest.npy`, fp16 [N, T]: the logarithm of the mass of all other tokens;

and `metadata.json`, which says of which teacher, tokenizer and data they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy

from .data import METADATA, SPLITS, TEACHER_COLUMNS, DataError

KIND = "teacher_outputs"
KEY = "teacher_model.outputs"
# The columns of a training batch.
VALUES, IDS, LOG_REST = TEACHER_COLUMNS
ARRAYS = {VALUES: "values", IDS: "ids", LOG_REST: "log_rest"}


def open_arrays(folder: Path, split: str, create: dict | None = None) -> dict[str, numpy.ndarray]:
    """Column -> memory-mapped array of a split. create: the metadata, to create those that are
    missing and open them for writing. Raises DataError if one cannot be read."""
    arrays = {}
    for column, name in ARRAYS.items():
        file = folder / f"{split}.{name}.npy"
        try:
            if create and not file.exists():
                shape = (create["rows"][split], create["context_length"], create["top_k"])
                kind = id_dtype(create["vocab_size"]) if column == IDS else numpy.float16
                shape = shape[:2] if column == LOG_REST else shape
                arrays[column] = numpy.lib.format.open_memmap(file, "w+", kind, shape)
            else:
                arrays[column] = numpy.load(file, mmap_mode="r+" if create else "r")
        except (OSError, ValueError):
            folder = file.parent
            raise DataError(f"{file}: missing or damaged; remove {folder} and run store_teacher.py again") from None
    return arrays


def id_dtype(vocab_size: int) -> type:
    return numpy.uint16 if vocab_size <= 1 << 16 else numpy.uint32


class RowsWithOutputs:
    """A split of chunks whose rows have the teacher's outputs too; of the rows that the split was
    cut to, the first ones."""

    def __init__(self, rows, folder: Path, split: str):
        self.rows = rows
        self.arrays = open_arrays(folder, split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> dict:
        found = dict(self.rows[index])
        for column, array in self.arrays.items():
            found[column] = array[index]
        return found


def check_outputs(folder: str, expected: dict) -> None:
    """Raises DataError unless `folder` holds complete outputs whose metadata has these values."""
    path = Path(folder)
    try:
        metadata = json.loads((path / METADATA).read_text())
    except (OSError, ValueError):
        metadata = {}
    if metadata.get("kind") != KIND:
        raise DataError(f"{KEY}: {folder} was not written by store_teacher.py; run it with this config")
    causes = {
        "teacher_config": "of another teacher",
        "teacher_weights": "of another teacher",
        "tokenizer_fingerprint": "made with another tokenizer",
        "data": "of another data set than data.cache_dir",
    }
    for name, value in expected.items():
        found = metadata.get(name)
        if found != value:
            what = causes.get(name, f"with {name} {found}, this run has {value}")
            cure = f"they are of {metadata['teacher']} on {metadata['dataset']}; run store_teacher.py with this config"
            if name == "document_mask":
                cure = f"set data.document_mask to {str(found).lower()}, or run store_teacher.py with this config"
            raise DataError(f"{KEY}: {folder} holds outputs {what}; {cure}")
    for split in SPLITS:
        for column, array in (open_arrays(path, split) if metadata["rows"][split] else {}).items():
            if len(array) != metadata["rows"][split]:
                raise DataError(f"{KEY}: {folder}: {ARRAYS[column]} of {split} is damaged; run store_teacher.py again")

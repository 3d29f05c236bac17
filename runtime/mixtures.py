"""Tokenised data from one corpus, or from several in given shares of tokens: the split of
documents, their files, and how an interrupted run resumes."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from .data import INPUT_IDS, LOSS_MASK, SPLITS, DataError
from .encoding import Encoded, EncodingPool
from .files import atomic_write_text

STATE = "state.json"  # of a run that is not complete
WRITE_TOKENS = 1 << 20  # that are collected before they are written
SAVE_SECONDS = 60.0  # between two states on disk
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's stream format


def held_out(index: int, share: float) -> bool:
    """Whether document `index` is held out: the first one and evenly spread others, at any corpus
    length."""
    return math.floor(index * share) != math.floor((index - 1) * share)


def quotas(max_tokens: int | None, holdout: float) -> dict[str, float]:
    """The most tokens that each split takes. Raises DataError if none are left to train on."""
    if max_tokens is None:
        return dict.fromkeys(SPLITS, math.inf)
    heldout = max(1, round(max_tokens * holdout)) if holdout else 0
    if heldout >= max_tokens:
        raise DataError(f"--max_tokens: {max_tokens} leaves nothing to train on beside --holdout {holdout}; raise it")
    return {"train": max_tokens - heldout, "heldout": heldout}


class ArrowFile:
    """A dataset's Arrow file, whose writing can resume at a known offset.

    with_mask: besides the ids there is a column that says which tokens are learned. size: of what
    is complete, in bytes; None for a new file.
    """

    def __init__(self, path: Path, with_mask: bool, size: int | None = None):
        from datasets import Features, Sequence, Value

        columns = {INPUT_IDS: Sequence(Value("int32"))}
        if with_mask:
            columns[LOSS_MASK] = Sequence(Value("bool"))
        self.schema = Features(columns).arrow_schema
        self.rows: list[tuple[numpy.ndarray, numpy.ndarray | None]] = []
        if size is None:
            self.file = path.open("wb")
            self.file.write(self.schema.serialize())
        else:
            self.file = path.open("r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def write(self) -> None:
        """Writes the rows that were added since the last call."""
        import pyarrow

        if not self.rows:
            return
        lengths = [len(ids) for ids, _ in self.rows]
        offsets = pyarrow.array(numpy.cumsum([0, *lengths]), pyarrow.int32())
        columns = [pyarrow.array(numpy.concatenate([ids for ids, _ in self.rows]), pyarrow.int32())]
        if LOSS_MASK in self.schema.names:
            masks = [numpy.ones(len(ids), bool) if mask is None else mask for ids, mask in self.rows]
            columns.append(pyarrow.array(numpy.concatenate(masks)))
        arrays = [pyarrow.ListArray.from_arrays(offsets, column) for column in columns]
        batch = pyarrow.RecordBatch.from_arrays(arrays, schema=self.schema)
        self.file.write(batch.serialize())
        self.rows = []

    def save(self) -> int:
        """Makes what was written safe from a crash; returns its size."""
        self.write()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.write()
        self.file.write(END_OF_STREAM)
        self.file.close()


class SplitFiles:
    """The files of the splits, how many tokens each may still take, and what it holds.

    counts: {split: {documents, tokens}}, where parts of a large document count as documents. cut:
    splits whose last document did not fit in full. state: what `state()` returned in the run that
    is resumed.
    """

    def __init__(self, folder: Path, quotas: dict[str, float], with_mask: bool, state: dict | None = None):
        sizes = state["sizes"] if state else {}
        self.files = {split: ArrowFile(folder / f"{split}.arrow", with_mask, sizes.get(split)) for split in SPLITS}
        self.counts = state["counts"] if state else {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        self.cut: list[str] = state["cut"] if state else []
        self._room = {split: quotas[split] - self.counts[split]["tokens"] for split in SPLITS}

    def state(self) -> dict:
        """What is on disk; JSON."""
        sizes = {split: file.save() for split, file in self.files.items()}
        return {"sizes": sizes, "counts": self.counts, "cut": self.cut}

    def is_full(self, split: str) -> bool:
        return not self._room[split]

    def all_full(self) -> bool:
        return not any(self._room.values())

    def add(self, split: str, ids: numpy.ndarray, learned: numpy.ndarray | None, ends: bool) -> int:
        """Takes as many of a document's next ids as fit and returns their number.

        learned: which are, None: all. ends: whether the document ends with them.
        """
        room = self._room[split]
        fits = len(ids) < room or (len(ids) == room and ends)
        if room and not fits:
            self.cut.append(split)
        taken = min(room, len(ids))
        if taken:
            self.files[split].rows.append((ids[:taken], None if learned is None else learned[:taken]))
            self._room[split] -= taken
            self.counts[split]["documents"] += 1
            self.counts[split]["tokens"] += taken
        return taken

    def write(self) -> None:
        """Writes what was added since the last call."""
        for file in self.files.values():
            file.write()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


@dataclass
class Progress:
    """How far a source has been read. parts: of documents, from the beginning. index: of the
    document, among those whose split the corpus leaves open. length: of the document so far, in
    tokens. begins: whether the next part begins a document. tokens: taken so far. split: of the
    last part."""

    parts: int = 0
    index: int = 0
    length: int = 0
    begins: bool = True
    tokens: int = 0
    split: str = SPLITS[0]


class Source:
    """A corpus of a mixture: turns its encoded parts into training ids: adds BOS and EOS, cuts at
    --max_length, chooses the split.

    corpus: has documents(holdout), name and left_out(). share: of the mixture's tokens. ids: BOS
    (or nothing) and EOS.
    """

    def __init__(self, corpus, share: float, options, bos: list[int], eos: int):
        self.corpus = corpus
        self.share = share
        self.options = options
        self.bos = bos
        self.eos = eos
        self.progress = Progress()
        self.stream: Iterator | None = None

    def start(self, pool: EncodingPool, splits: SplitFiles, progress: dict | None) -> None:
        """Begins to read, after the parts that a run before has read."""
        if progress:
            self.progress = Progress(**progress)
        parts = itertools.islice(self.corpus.documents(self.options.holdout), self.progress.parts, None)

        def unused(part) -> bool:
            # The held-out end of a large file may be longer than its quota: the rest is not encoded.
            return part.heldout is not None and splits.is_full(SPLITS[part.heldout])

        self.stream = pool.stream(parts, unused)

    def _choose(self, heldout: bool | None, splits: SplitFiles) -> str:
        if heldout is None:
            heldout = held_out(self.progress.index, self.options.holdout)
            if splits.is_full(SPLITS[heldout]):  # so that both splits get their share
                heldout = not heldout
        return SPLITS[heldout]

    def take(self, splits: SplitFiles) -> int | None:
        """Adds the next part to its split; returns the tokens taken, or None if there is no more."""
        item = next(self.stream, None)
        if item is None:
            return None
        part, encoded = item
        self.progress.parts += 1
        if isinstance(encoded, str):
            self.corpus.bad_conversation(encoded)
            return 0
        tokens = sum(self._add(splits, part, document) for document in encoded)
        self.progress.begins = part.ends
        self.progress.index += part.ends and part.heldout is None
        self.progress.tokens += tokens
        return tokens

    def _add(self, splits: SplitFiles, part, document: Encoded) -> int:
        progress, ids, learned = self.progress, document.ids, document.learned
        if progress.begins:
            if not document.with_last:
                progress.split = self._choose(part.heldout, splits)
            progress.length = 0
            if ids[: len(self.bos)].tolist() != self.bos:  # a chat template may have written it
                ids, learned = _joined(self.bos, ids), None if learned is None else _joined([False], learned)
        if self.options.max_length is not None:
            room = self.options.max_length - progress.length
            ids, learned = ids[:room], None if learned is None else learned[:room]
        progress.length += len(ids)
        if part.ends and progress.length:
            ids = _joined(ids, [self.eos])
            learned = None if learned is None else _joined(learned, [document.eos_is_learned])
        return splits.add(progress.split, ids, learned, part.ends)


def _joined(first, second) -> numpy.ndarray:
    dtype = getattr(first, "dtype", None) or second.dtype
    return numpy.concatenate((numpy.asarray(first, dtype), numpy.asarray(second, dtype)))


@dataclass
class Mixture:
    """Sources, and the splits that they fill. key: of the metadata, which a resumed run must have.
    ended: the source whose text ended first, if one did."""

    sources: list[Source]
    splits: SplitFiles
    folder: Path
    key: dict
    ended: Source | None = field(default=None, init=False)

    def next_source(self) -> Source:
        """The source that has the fewest tokens for its share; one within a document goes on."""
        for source in self.sources:
            if not source.progress.begins:
                return source
        return min(self.sources, key=lambda source: source.progress.tokens / source.share)

    def fill(self, progress_bar) -> None:
        """Takes documents until the splits are full, or a source has no more text."""
        saved = time.monotonic()
        since = 0
        while not self.splits.all_full():
            source = self.next_source()
            tokens = source.take(self.splits)
            if tokens is None:
                self.ended = source
                break
            progress_bar.update(tokens)
            since += tokens
            if since > WRITE_TOKENS:
                self.splits.write()
                since = 0
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()

    def save(self) -> None:
        """Writes the state from which the same command resumes."""
        state = {"key": self.key, "splits": self.splits.state()}
        state["sources"] = [vars(source.progress) for source in self.sources]
        atomic_write_text(self.folder / STATE, json.dumps(state))


def resumable_state(folder: Path, key: dict) -> dict | None:
    """The state that an interrupted run of the same `key` has left in `folder`, or None; what else
    it holds is removed."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        state = {}
    if state.get("key") == json.loads(json.dumps(key)):
        return state
    for file in folder.iterdir():
        file.unlink()
    return None

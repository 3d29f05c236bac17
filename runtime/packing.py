"""Packs tokenised documents into chunks of one length, and keeps where documents begin.

A packer is given the rows of a tokenised split, in order, and returns rows of chunks: `input_ids`,
and as `document_lengths` the number of tokens of each document, or part of one, in the chunk. What
is left of the chunk after them is padding. Where only some tokens are learned, whether each is goes
with it, as `loss_mask`; padding is not learned.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

import numpy

from .data import DOCUMENT_LENGTHS, INPUT_IDS, LOSS_MASK

PACKING = ("cut", "fit")
LARGEST_WASTE = 0.01  # of a chunk, as padding
POOL_TOKENS = 1 << 22  # documents to choose from: many more than chunks, so that most gaps are filled

Rows = dict[str, list]


def _tokens(ids: numpy.ndarray, learned: numpy.ndarray | None) -> numpy.ndarray:
    """[N, 1] of ids [N], or [N, 2] with whether each is learned [N]."""
    return ids[:, None] if learned is None else numpy.stack((ids, learned), 1)


def _rows(chunks: list[numpy.ndarray]) -> Rows:
    """The columns of chunks of `_tokens`."""
    rows = {INPUT_IDS: [chunk[:, 0] for chunk in chunks]}
    if chunks and chunks[0].shape[1] > 1:
        rows[LOSS_MASK] = [chunk[:, 1].astype(bool) for chunk in chunks]
    return rows


class CutPacker:
    """Joins the documents end to end and cuts them into chunks; the last, incomplete one is dropped.

    eos: the token that ends a document; a row that does not end with it goes on in the next row.
    None: nothing is known of documents, and the chunks have no `document_lengths`.
    """

    def __init__(self, length: int, eos: int | None):
        self.length = length
        self.eos = eos
        self.rest = numpy.empty((0, 1), "int64")  # tokens that do not yet fill a chunk
        self.begins = numpy.zeros(1, "int64")  # where documents begin in them and after them

    def add(self, ids: numpy.ndarray, lengths: numpy.ndarray, learned: numpy.ndarray | None = None) -> Rows:
        """The chunks that are full with the next rows: their ids, joined, their lengths, and which
        tokens are learned."""
        ends = len(self.rest) + lengths.cumsum()
        if self.eos is not None:
            ended = ids[lengths.cumsum()[lengths > 0] - 1] == self.eos
            self.begins = numpy.concatenate((self.begins, ends[lengths > 0][ended]))
        tokens = _tokens(ids, learned)
        if len(self.rest):
            tokens = numpy.concatenate((self.rest, tokens))
        full = len(tokens) // self.length
        whole, self.rest = numpy.split(tokens, [full * self.length])
        rows = _rows(list(whole.reshape(full, self.length, tokens.shape[1])))
        if self.eos is not None:
            rows[DOCUMENT_LENGTHS] = self._document_lengths(full)
        return rows

    def _document_lengths(self, full: int) -> list[numpy.ndarray]:
        """Of the first `full` chunks; forgets the documents that begin in them."""
        edges = numpy.arange(full + 1) * self.length
        inside = self.begins < edges[-1]
        bounds = numpy.unique(numpy.concatenate((edges, self.begins[inside])))
        self.begins = self.begins[~inside] - edges[-1]
        return numpy.split(numpy.diff(bounds), numpy.searchsorted(bounds, edges[1:-1]))[:full]

    def finish(self) -> Rows:
        return {}


class FitPacker:
    """Best-fit packing: documents stay whole where they fit a chunk.

    A document longer than a chunk is cut into whole chunks and a rest. A chunk begins with the
    oldest document of a pool and takes the longest that fits until none does. A gap of at most
    LARGEST_WASTE of the chunk is padded with EOS; a larger one is filled with the beginning of a
    document, whose rest stays in the pool.
    """

    def __init__(self, length: int, eos: int):
        self.length = length
        self.eos = eos
        self.parts: list[numpy.ndarray] = []  # of the document that the last row did not end
        self.pool: dict[int, numpy.ndarray] = {}  # by number, the oldest first
        self.numbers: dict[int, deque[int]] = {}  # length -> documents of the pool, the oldest first
        self.lengths: list[int] = []  # of the pool's documents, each once, sorted
        self.tokens = 0  # in the pool
        self.added = 0

    def add(self, ids: numpy.ndarray, lengths: numpy.ndarray, learned: numpy.ndarray | None = None) -> Rows:
        """As `CutPacker.add`."""
        for row in numpy.split(_tokens(ids, learned), lengths.cumsum()[:-1]):
            self.parts.append(row)
            if len(row) and row[-1, 0] == self.eos:
                self._end_document()
        return self._pack(POOL_TOKENS)

    def finish(self) -> Rows:
        self._end_document()
        return self._pack(0)

    def _end_document(self) -> None:
        document = numpy.concatenate(self.parts) if self.parts else ()
        self.parts = []
        for start in range(0, len(document), self.length):
            self._put(document[start : start + self.length])

    def _put(self, document: numpy.ndarray) -> None:
        size = len(document)
        if size not in self.numbers:
            self.numbers[size] = deque()
            insort(self.lengths, size)
        self.numbers[size].append(self.added)
        self.pool[self.added] = document
        self.added += 1
        self.tokens += size

    def _take(self, size: int) -> numpy.ndarray:
        """The oldest document of this length, removed from the pool."""
        number = self.numbers[size].popleft()
        if not self.numbers[size]:
            del self.numbers[size]
            self.lengths.remove(size)
        self.tokens -= size
        return self.pool.pop(number)

    def _pack(self, keep: int) -> Rows:
        """Chunks from the pool until it holds no more than `keep` tokens, or not a whole chunk."""
        chunks = []
        lengths = []
        while self.tokens > keep and self.tokens >= self.length - self._waste():
            chunk = self._chunk()
            lengths.append(numpy.array([len(document) for document in chunk]))
            padding = numpy.zeros((self.length - sum(map(len, chunk)), chunk[0].shape[1]), "int64")
            padding[:, 0] = self.eos
            chunks.append(numpy.concatenate((*chunk, padding)))
        return _rows(chunks) | {DOCUMENT_LENGTHS: lengths}

    def _waste(self) -> int:
        return int(LARGEST_WASTE * self.length)

    def _chunk(self) -> list[numpy.ndarray]:
        """The documents of the next chunk."""
        chunk = [self._take(len(next(iter(self.pool.values()))))]
        room = self.length - len(chunk[0])
        while room and self.lengths and self.lengths[0] <= room:
            chunk.append(self._take(self.lengths[bisect_right(self.lengths, room) - 1]))
            room -= len(chunk[-1])
        if room > self._waste():
            document = self._take(self.lengths[-1])
            chunk.append(document[:room])
            self._put(document[room:])
        return chunk


def packer_of(packing: str, length: int, eos: int | None) -> CutPacker | FitPacker:
    return FitPacker(length, eos) if packing == "fit" else CutPacker(length, eos)

"""Documents as token ids, and which of the tokens are learned; encoded by several processes, in
order and in constant memory."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy

from .conversations import Conversations
from .corpora import Document
from .data import DataError

BATCH_CHARACTERS = 1 << 18  # of a batch that a process encodes at a time, at least
# Characters that this process encodes before it starts others, which takes seconds.
OWN_CHARACTERS = 1 << 23
WAITING = 3  # batches per process that are encoded ahead of their use

CACHED_WORDS = 1 << 19  # whose ids a process remembers
LONGEST_WORD = 64  # in characters, of those
# Joins words that are encoded in one call. No word holds it, for it holds a place of WORDS; and none
# of its beginnings is one of its ends, so that it is found only where it was put.
SEPARATOR = "a b"

# Places in a text at which every tokenizer that `splits_at_words` accepts separates pre-tokens: a
# space between ASCII characters that are no spaces, and what follows an ASCII letter or digit if it is
# a line break or ASCII punctuation.
WORDS = re.compile(r"(?<=[!-~])(?= [!-~])|(?<=[0-9A-Za-z])(?=[\n!-/:-@\[-`{-~])")
# The pre-tokens of Llama 3, with up to three digits in one, and of Qwen.
PATTERNS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)

# The form of added tokens that structure a text: <tool_call>, [INST].
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class Encoded(NamedTuple):
    """A document, or a part of one, as ids [N].

    learned: bool [N], which of them are learned; None: all. eos_is_learned: whether an EOS that
    ends the document is. with_last: it belongs to the split of the document before it.
    """

    ids: numpy.ndarray
    learned: numpy.ndarray | None = None
    eos_is_learned: bool = True
    with_last: bool = False


def text_encoder(tokenizer, allow_special_tokens: bool):
    """A tokenizers.Tokenizer that encodes texts of any length as the tokenizer does.

    Without allow_special_tokens, a control token's name in a text is encoded as text. Control
    tokens are the special tokens, and added tokens that look like a tag. Raises DataError if the
    tokenizer can encode a name only as the control token.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = None
    state["padding"] = None
    control = [token for token in state["added_tokens"] if token["special"] or TAG.fullmatch(token["content"])]
    if allow_special_tokens:
        return Tokenizer.from_str(json.dumps(state))
    for token in control:
        token["special"] = True
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True  # as ordinary text
    for token in control:
        name = token["content"]
        ids = encoder.encode(name, add_special_tokens=False).ids
        if name != tokenizer.unk_token and token["id"] in ids:
            raise DataError(
                f"--tokenizer: has no encoding of the text {name!r} but the control token; use --allow_special_tokens"
            )
    return encoder


def splits_at_words(encoder) -> bool:
    """Whether a tokenizers.Tokenizer encodes a text as its `WORDS` one by one: byte-level
    BPE whose pre-tokens are those of GPT-2, Llama 3 or Qwen, perhaps with digits apart.

    In their patterns a space can only begin a pre-token or be one of several spaces, neither line
    break nor punctuation follows a letter or digit in a pre-token, and only white space looks ahead,
    which WORDS never ends with. NFC does not compose ASCII characters. No added token may hold such a
    place, unless it is encoded as text.
    """
    state = json.loads(encoder.to_str())
    found = [token for token in state["added_tokens"] if not (token["special"] and encoder.encode_special_tokens)]
    model = state["model"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and _steps(state["normalizer"], "normalizers") in ([], [{"type": "NFC"}])
        and _has_known_words(_steps(state["pre_tokenizer"], "pretokenizers"))
        and all(map(_lies_in_a_word, found))
    )


def _steps(state: dict | None, name: str) -> list[dict]:
    """The steps of a normaliser or pre-tokeniser, which may be a sequence of them."""
    return [] if state is None else state.get(name, [state])


def _has_known_words(steps: list[dict]) -> bool:
    """Whether these pre-tokenisers are those of GPT-2, perhaps with digits apart, of Llama 3 or Qwen."""
    if not steps:
        return False
    last = {name: value for name, value in steps[-1].items() if name != "trim_offsets"}
    by_level = {"type": "ByteLevel", "add_prefix_space": False}
    if last == by_level | {"use_regex": True}:
        digits = {"type": "Digits", "individual_digits": True}
        return all(step == digits for step in steps[:-1])
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS
    ]
    return last == by_level | {"use_regex": False} and len(steps) == 2 and steps[0] in splits


def _lies_in_a_word(token: dict) -> bool:
    """Whether an added token is found in a word of `WORDS` as it is in the text, and never in the end
    of a word with the beginning of SEPARATOR."""
    content = token["content"]
    strips = token["lstrip"] or token["rstrip"] or token["single_word"]
    if strips or content.endswith(SEPARATOR[0]):
        return False
    return not re.search(r"\s", content) and not WORDS.search(content)


class TextEncoder:
    """Encodes texts with a tokenizers.Tokenizer, without special tokens.

    Where the tokenizer encodes words independently (`splits_at_words`), each word is encoded once
    and its ids are remembered: looking a word up takes a fraction of the time. words: those that are
    known from the beginning, with their ids as bytes of int32.
    """

    def __init__(self, encoder, words: dict[str, bytes] | None = None):
        self.encoder = encoder
        self.by_words = splits_at_words(encoder)
        self._ids = words or {}
        if self.by_words:
            from tokenizers import AddedToken

            self._words_encoder = _copy(encoder.to_str(), encoder.encode_special_tokens)
            # Found before the text is normalised, which would compose its end with a diacritic.
            self._words_encoder.add_tokens([AddedToken(SEPARATOR, normalized=False)])
            self._separator = self._words_encoder.token_to_id(SEPARATOR)

    def __getstate__(self) -> tuple[str, bool, dict[str, bytes]]:
        """What another process needs: a tokenizers.Tokenizer forgets encode_special_tokens when it is
        pickled."""
        return self.encoder.to_str(), self.encoder.encode_special_tokens, self._ids

    def __setstate__(self, state: tuple[str, bool, dict[str, bytes]]) -> None:
        text, as_text, words = state
        self.__init__(_copy(text, as_text), words)

    def __call__(self, texts: list[str]) -> list[numpy.ndarray]:
        """The ids of each text, int32."""
        if not self.by_words:
            encodings = self.encoder.encode_batch_fast(texts, add_special_tokens=False)
            return [numpy.array(encoding.ids, numpy.int32) for encoding in encodings]
        if len(self._ids) > CACHED_WORDS:
            self._ids.clear()
        words = [WORDS.split(text) for text in texts]
        different = set(itertools.chain.from_iterable(words))
        new = [word for word in different if word not in self._ids]
        if new:
            self._ids.update(zip(new, self._encode_words(new), strict=True))
        found = [numpy.frombuffer(b"".join(map(self._ids.__getitem__, row)), numpy.int32) for row in words]
        for word in new:
            if len(word) > LONGEST_WORD:
                del self._ids[word]
        return found

    def _encode_words(self, words: list[str]) -> Iterator[bytes]:
        """The ids of each word, as bytes of int32. One call with all of them joined takes half the
        time of a list of words."""
        (encoding,) = self._words_encoder.encode_batch_fast([SEPARATOR.join(words)], add_special_tokens=False)
        ids = numpy.array(encoding.ids, numpy.int32)
        ends = numpy.flatnonzero(ids == self._separator).tolist()
        for start, stop in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)]):
            yield ids[start:stop].tobytes()


def _copy(text: str, as_text: bool):
    """The tokenizers.Tokenizer of this JSON. as_text: its encode_special_tokens."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(text)
    encoder.encode_special_tokens = as_text
    return encoder


class DocumentEncoder:
    """Encodes documents: texts, and with `conversations` conversations too. Raises DataError as
    `text_encoder` does."""

    def __init__(self, tokenizer, allow_special_tokens: bool, conversations: Conversations | None = None):
        self.text = TextEncoder(text_encoder(tokenizer, allow_special_tokens))
        self.conversations = conversations
        if conversations is not None:
            self.chat = text_encoder(tokenizer, True)  # a template writes control tokens by name
            self.special = numpy.array(tokenizer.all_special_ids)

    def __call__(self, parts: list[Document]) -> list[list[Encoded] | str]:
        """What each part becomes: one document, or of a conversation perhaps several; for one that
        cannot be learned its place and the reason."""
        encoded = []
        for part, ids in zip(parts, self.text([part.text for part in parts])):
            encoded.append([Encoded(ids)] if part.messages is None else self._conversation(part))
        return encoded

    def _conversation(self, part: Document) -> list[Encoded] | str:
        try:
            documents = self.conversations.documents(part.messages)
        except DataError as error:
            return f"{part.place}: {error}"
        return [self._document(*document, number > 0) for number, document in enumerate(documents)]

    def _document(self, text: str, spans: list[tuple[int, int]], with_last: bool) -> Encoded:
        """A rendered conversation, whose `spans` are learned."""
        ids, starts, stops = [], [], []
        place = 0
        for piece in self.conversations.stand_in.split(text):
            if self.conversations.stand_in.fullmatch(piece):
                name = self.conversations.name_of(piece)
                new = self.text([name])[0].tolist()
                offsets = [(0, 1)] * len(new)
            else:
                encoding = self.chat.encode(piece, add_special_tokens=False)
                new, offsets = encoding.ids, encoding.offsets
            ids += new
            starts += [place + start for start, _ in offsets]
            stops += [place + stop for _, stop in offsets]
            place += len(piece)
        ids = numpy.array(ids, numpy.int32)
        if self.conversations.loss_on == "all":
            return Encoded(ids, with_last=with_last)
        starts, stops = numpy.array(starts), numpy.array(stops)
        learned = numpy.zeros(len(ids), bool)
        for first, last in spans:
            # A token without characters of its own belongs to where it stands.
            learned |= (starts < last) & ((stops > first) | ((starts == stops) & (starts >= first)))
        in_last_turn = ids[learned & (stops > spans[-1][0])]
        ends_itself = bool(numpy.isin(in_last_turn, self.special).any())
        return Encoded(ids, learned, not ends_itself, with_last)


_encoder: DocumentEncoder | None = None  # of a worker process


def _start_worker(encoder: DocumentEncoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode(parts: list[Document]) -> list[list[Encoded] | str]:
    return _encoder(parts)


class EncodingPool:
    """Encodes streams of documents with `processes` processes, which it starts once OWN_CHARACTERS
    have been encoded without them. A context manager: the processes end with it."""

    def __init__(self, encoder: DocumentEncoder, processes: int, batch_size: int):
        self.encoder = encoder
        self.processes = processes
        self.batch_size = batch_size
        self._characters = 0
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, parts: list[Document]) -> Future:
        if self._executor is None:
            self._characters += sum(map(_size, parts))
            if self.processes == 1 or self._characters <= OWN_CHARACTERS:
                done = Future()
                done.set_result(self.encoder(parts))
                return done
            self._executor = ProcessPoolExecutor(
                self.processes, multiprocessing.get_context("spawn"), _start_worker, (self.encoder,)
            )
        return self._executor.submit(_encode, parts)

    def stream(
        self, parts: Iterator[Document], unused: Callable[[Document], bool]
    ) -> Iterator[tuple[Document, list[Encoded] | str]]:
        """Each part, without its text, and what it becomes. unused: whether nobody will read a
        part, whose text is then not encoded. Raises DataError if a process dies."""
        waiting: deque[tuple[list[Document], Future]] = deque()
        for batch in _batches(parts, self.batch_size):
            batch = [part._replace(text="") if unused(part) else part for part in batch]
            shells = [part._replace(text="", messages=None) for part in batch]
            waiting.append((shells, self._submit(batch)))
            if waiting[0][1].done() or len(waiting) > WAITING * self.processes:
                yield from _collect(*waiting.popleft())
        while waiting:
            yield from _collect(*waiting.popleft())


def _collect(shells: list[Document], future: Future) -> Iterator[tuple[Document, list[Encoded] | str]]:
    try:
        encoded = future.result()
    except BrokenProcessPool:
        raise DataError("--num_proc: a process that tokenised died, perhaps for lack of memory; lower it") from None
    yield from zip(shells, encoded)


def _size(part: Document) -> int:
    """The characters of a part; of a conversation, about."""
    return len(part.text) if part.messages is None else len(str(part.messages))


def _batches(parts: Iterator[Document], most: int) -> Iterator[list[Document]]:
    """At most `most` parts each, and fewer if they are long."""
    batch: list[Document] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += _size(part)
        if len(batch) == most or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

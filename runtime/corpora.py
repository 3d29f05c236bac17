"""Reads a corpus document by document: a dataset of the Hugging Face hub, or local text files and
tables.

A folder is read with its subfolders, symlinked ones included. A file's suffix, in upper or lower
case, decides how it is read:

- tables (TABLES, all but parquet also compressed) give one document per row, from the column `text_field`;
- every other file that is UTF-8 is one document.

Hidden files, documentation beside tables, and files that are not text are left out and counted.
Archives, and tables whose suffix does not say that they are tables, are refused by name.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from runtime.data import DataError
from runtime.files import one_line

PIECE = 1 << 20  # characters of a text file per part of its document
LINE = 1 << 12  # longest line, in characters, that is read at once
HEAD = 1 << 16  # bytes at the beginning of a file by which its kind is recognised
SPARSE = 1000  # rows of JSON without the text column after which the column counts as missing

# Text files of these names describe the tables beside them.
DOCUMENTATION = re.compile(
    "(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|code_of_conduct|dataset_card)([._-].*)?",
    re.IGNORECASE,
)
# Written by the datasets library.
DATASET_INFO = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CONTAINERS = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh9": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"PAR1\x15": "a parquet table",
    b"ARROW1\0\0": "an Arrow table",
    b"Obj\x01": "an Avro table",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3\0": "a SQLite database",
    b"WARC/1.": "a WARC archive",
}
# Suffixes of containers that their first bytes do not always identify.
CONTAINER_SUFFIXES = (
    ".arrow",
    ".bin",
    ".br",
    ".lzma",
    ".npy",
    ".orc",
    ".pickle",
    ".pkl",
    ".tar",
    ".tfrecord",
    ".zip",
)


class BrokenOff(DataError):
    """The hub did not give the rest of a dataset; the same command may resume."""


class Document(NamedTuple):
    """A document of a corpus, or a part of a large one.

    ends: whether the document ends with this part. heldout: whether it is held out; None if the
    caller decides. messages: of a conversation, whose text is ""; place: where it was read.
    """

    text: str
    ends: bool = True
    heldout: bool | None = None
    messages: list | None = None
    place: str = ""


# ------------------------------------------------------------------------------------------- tables
def _zstd(file: Path) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


# Suffix of a compressed file -> function that opens it for reading the decompressed bytes.
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def _open(file: Path):
    """The bytes of a file, decompressed."""
    opener = COMPRESSED.get(file.suffix.lower())
    return opener(file) if opener else file.open("rb")


# Columns of which a table must have one alternative: the text, or what makes a conversation.
Columns = tuple[tuple[str, ...], ...]
CONVERSATION: Columns = (("messages",), ("prompt", "completion"))


def _present(alternatives: Columns, columns) -> tuple[str, ...] | None:
    """The first alternative that is all there, or None."""
    return next((names for names in alternatives if all(name in columns for name in names)), None)


def _no_column(alternatives: Columns, columns) -> DataError:
    wanted = " or ".join(" and ".join(repr(name) for name in names) for names in alternatives)
    cure = "name the one that holds the text by --text_field"
    if alternatives[-1] not in CONVERSATION and len(alternatives) == 1 and _present(CONVERSATION, columns):
        cure += ", or use --loss_on to read conversations"
    return DataError(f"has no column {wanted}, only {', '.join(columns)}; {cure}")


def _json_rows(file: Path, alternatives: Columns) -> Iterator[dict | None]:
    """The values of JSON Lines, None for a blank line. An array, or an object over several lines,
    is read at once."""
    with _open(file) as lines:
        for number, line in enumerate(lines):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            if number == 0 and (text.lstrip()[:1] == "[" or text.strip() == "{"):
                value = json.loads(text + lines.read().decode("utf-8"))
                yield from value if isinstance(value, list) else [value]
            else:
                yield json.loads(text) if text.strip() else None


def _csv_rows(file: Path, alternatives: Columns, delimiter: str) -> Iterator[dict | None]:
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(reader, list(alternatives[0]))
        if _present(alternatives, header) is None:
            raise _no_column(alternatives, header)
        for cells in reader:
            if cells and len(cells) != len(header):
                raise csv.Error(f"has {len(cells)} fields, but the header has {len(header)}")
            yield dict(zip(header, cells)) if cells else None


def _parquet_rows(file: Path, alternatives: Columns) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        if not table.metadata.num_rows:
            return
        names = _present(alternatives, table.schema_arrow.names)
        if names is None:
            raise _no_column(alternatives, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=128, columns=list(names)):
            yield from batch.to_pylist()


TABLES = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
}
# The errors of the readers for a damaged file; those of pyarrow, JSON and UTF-8 are subclasses.
FAULTS = (OSError, EOFError, ValueError, RuntimeError, csv.Error, zlib.error, lzma.LZMAError)


def _suffix(file: Path) -> str:
    """The suffix in lower case; for a compressed file with the one before it: `.jsonl.zst`."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() + suffix if suffix in COMPRESSED else suffix


def _reader(file: Path):
    """The function that yields the rows of a table, None for a file of another kind."""
    if file.suffix.lower() not in COMPRESSED:
        return TABLES.get(file.suffix.lower())
    inner = Path(file.stem).suffix.lower()
    return None if inner == ".parquet" else TABLES.get(inner)  # parquet compresses by itself


def _reason(error: Exception) -> str:
    """What is wrong with a row, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON, or was cut short ({error.msg}); repair or remove the file"
    return f"cannot be read ({one_line(error)}); repair or remove the file"


def _type_and_cure(value) -> tuple[str, str]:
    """What kind of value was found where text is expected, and what to do about it."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        cure = "use --loss_on all, assistant or completion to read conversations"
        return "a conversation (a list of messages)", cure
    cures = {
        list: "join its parts to one string",
        bytes: "decode it to a string",
        dict: "write the part of it that is the text to a column of strings",
    }
    return f"of type {type(value).__name__}", cures.get(type(value), "name a column of strings")


def prompt_and_completion(prompt, completion) -> list[dict]:
    """The messages of a prompt and its completion, each a text or a list of messages."""
    messages = []
    for role, part in (("user", prompt), ("assistant", completion)):
        messages += [{"role": role, "content": part}] if isinstance(part, str) else part
    return messages


def _well_formed(text: str) -> str:
    """The text with U+FFFD for unpaired surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --------------------------------------------------------------------------------------- text files
def _characters(file: Path) -> int | None:
    """The number of characters of a text file; None if it is not UTF-8 or has NUL characters."""
    size = 0
    try:
        with file.open(encoding="utf-8-sig") as text:
            for piece in iter(lambda: text.read(PIECE), ""):
                if "\0" in piece:
                    return None
                size += len(piece)
    except UnicodeDecodeError:
        return None
    return size


def _lines(text) -> Iterator[str]:
    """The remaining lines of an open text file, long ones in parts."""
    return iter(lambda: text.readline(LINE), "")


def _parts(lines: Iterator[str], heldout: bool | None = None) -> Iterator[Document]:
    """A document of these lines in parts of about PIECE characters."""
    part: list[str] = []
    size = 0
    for line in lines:
        if size >= PIECE:
            yield Document("".join(part), False, heldout)
            part = []
            size = 0
        part.append(line)
        size += len(line)
    if size:
        yield Document("".join(part), True, heldout)


def _end_and_beginning(file: Path, beginning: float) -> Iterator[Document]:
    """A text file as two documents, cut after about `beginning` characters: first the end, held
    out, then the beginning.

    Neither is empty.
    """
    with file.open(encoding="utf-8-sig") as text:
        size = 0
        lines = 0  # of the beginning
        for line, _ in itertools.pairwise(_lines(text)):  # all but the last
            size += len(line)
            lines += 1
            if size >= beginning:
                break
        text.seek(0)
        deque(itertools.islice(_lines(text), lines), maxlen=0)  # skips the beginning
        yield from _parts(_lines(text), True)
        text.seek(0)
        yield from _parts(itertools.islice(_lines(text), lines), False)


# ----------------------------------------------------------------------------------- what a file is
def _begins_as_json(head: str, whole: bool) -> bool:
    """Whether a text seems, by its first characters, to consist of JSON objects or an array of
    them.

    It does not if prose follows an object. whole: whether `head` is the whole text.
    """
    start = re.match(r'\s*(\[?)\s*(?=\{\s*["}])', head)
    if start is None:
        return False
    try:
        end = json.JSONDecoder().raw_decode(head, start.end())[1]
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos > len(head) - 16
        return cut and not whole
    except RecursionError:
        return True
    following = {"", ",", "]"} if start[1] else {"", "{"}
    return head[end:].lstrip()[:1] in following


def _begins_as_csv(head: str, whole: bool, text_field: str) -> bool:
    """Whether a text seems, by its first characters, to be a header of plain names and rows of as
    many cells. whole: whether `head` is the whole text."""
    head = head.lstrip()
    header = head.partition("\n")[0].rstrip("\r")
    for delimiter in ",\t;|":
        names = [name.strip('"') for name in header.split(delimiter)]
        plain = all(re.fullmatch(r"[A-Za-z_][\w.-]*", name) for name in names)
        if len(names) < 2 or not plain:
            continue
        lines = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
        rows = [row for row in lines if row]
        if not whole:  # the last one may be cut
            rows.pop()
        enough = 2 if text_field in names else 3
        if len(rows) >= enough and all(len(row) == len(names) for row in rows):
            return True
    return False


def _container(file: Path, head: bytes) -> str | None:
    """The kind of container that a file is, by its first bytes or its suffix, or None."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    for magic, kind in CONTAINERS.items():
        if head.startswith(magic):
            return kind
    if file.suffix.lower() in (*COMPRESSED, *CONTAINER_SUFFIXES):
        return f"a {_suffix(file)} file"
    return None


def _is_text(file: Path, text_field: str) -> bool:
    """Whether a file without a table's suffix begins as text.

    Raises DataError for what must not be read as text: a container, or a table under another
    suffix.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    whole = len(head) < HEAD
    if container := _container(file, head):
        raise DataError(f"{file}: is {container}, which is not read; unpack it, or convert it to text or .jsonl")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=whole)
    except UnicodeDecodeError:
        return False
    if "\0" in text:
        return False
    if _begins_as_json(text, whole):
        cure = "rename it to .jsonl (one object per line) or .json (an array)"
        raise DataError(f"{file}: holds JSON under a suffix of text; {cure}")
    if _begins_as_csv(text, whole, text_field):
        raise DataError(f"{file}: holds a table under a suffix of text; rename it to .csv or .tsv")
    return True


# ------------------------------------------------------------------------------------------ corpora
def _is_local(name: str, option: str) -> bool:
    path = Path(name).expanduser()
    if path.exists():
        return True
    # Hub names are `name` or `owner/name`; anything else must be meant as a path.
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or path.suffix.lower() in (".txt", *TABLES, *COMPRESSED):
        raise DataError(f"{option}: {name} does not exist")
    return False


def _is_documentation(file: Path) -> bool:
    """Whether a file's name is that of a description of tables beside it."""
    if _reader(file):
        return file.name.lower() in DATASET_INFO
    return DOCUMENTATION.fullmatch(file.name) is not None


class Corpus:
    """A hub dataset or local files, and a record of which files and rows are left out.

    name: a file, a folder or a hub dataset. text_field: the column of a table that holds the text.
    config, split and remove_columns: of a hub dataset. skip_bad_files: leave out and count local
    files that cannot be read; of a damaged one, the rows before the fault are kept. conversations:
    read conversations too, from `text_field` or the columns CONVERSATION. option: that named the
    corpus.

    `key` identifies the corpus: the hub name, or a hash of the names, sizes and modification times
    of the files that are read. Raises DataError, of one line: here for files that must not be read,
    in `documents` for faults found while reading.
    """

    def __init__(
        self,
        name: str,
        text_field: str = "text",
        config: str | None = None,
        split: str = "train",
        remove_columns: list[str] | None = None,
        skip_bad_files: bool = False,
        conversations: bool = False,
        option: str = "--dataset_name",
    ):
        self.name = name
        self.option = option
        self.text_field = text_field
        self.conversations = conversations
        self.alternatives: Columns = ((text_field,),)
        if conversations:
            self.alternatives = (
                (*CONVERSATION, (text_field,)) if text_field == "text" else ((text_field,), *CONVERSATION)
            )
        self.config = config
        self.split = split
        self.remove_columns = remove_columns
        self.skip_bad_files = skip_bad_files
        self.files: list[Path] = []
        self._left_out: dict[str, list] = {}  # reason: [count, the first]
        self.key = name
        if _is_local(name, option):
            self.root = Path(name).expanduser()
            self.files = self._select(self._candidates())
            stats = []
            for file in self.files:
                stat = file.stat()
                stats.append((str(file.relative_to(self.root)), stat.st_size, stat.st_mtime_ns))
            self.key = f"local-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"

    # ---------------------------------------------------------------------------------- which files
    def _candidates(self) -> list[Path]:
        """The files that are not hidden, each once."""
        if self.root.is_file():
            return [self.root]
        files: dict[str, Path] = {}  # by the path that links lead to
        # Names of tables come first: a link's name may have the suffix that its target lacks, as in
        # the hub's cache.
        for file in sorted(self._visible_files(), key=lambda file: (_reader(file) is None, file)):
            if not file.is_file():
                self._leave_out("broken links or no regular files", file)
            elif files.setdefault(os.path.realpath(file), file) is not file:
                self._leave_out("linked twice", file)
        return sorted(files.values())

    def _visible_files(self) -> list[Path]:
        """All files of the folder that are not hidden, nor in a hidden folder; links are followed."""
        found: list[Path] = []
        folders_seen: set[str] = set()

        def refuse(error: OSError):
            raise error

        for folder, folders, names in os.walk(self.root, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in folders_seen:
                self._leave_out("linked twice", folder)
                folders.clear()
                continue
            folders_seen.add(real)
            for hidden in sorted(name for name in (*folders, *names) if name.startswith(".")):
                self._leave_out("hidden", os.path.join(folder, hidden))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        return found

    def _select(self, files: list[Path]) -> list[Path]:
        """Those of the files that are read."""
        tables = [file for file in files if _reader(file) and not _is_documentation(file)]
        described = {folder for file in tables for folder in file.parents}
        selected = []
        bad = []
        for file in files:
            if _is_documentation(file) and file.parent in described and file != self.root:
                self._leave_out("documentation beside tables", file)
                continue
            try:
                if file.stat().st_size == 0:
                    self._leave_out("empty", file)
                elif self._is_read(file):
                    selected.append(file)
                else:
                    self._leave_out("not text (UTF-8)", file)
            except (DataError, OSError) as error:
                bad.append(one_line(error))
        if bad and not self.skip_bad_files:
            more = f" (and {len(bad) - 1} more files that are not read)" if len(bad) > 1 else ""
            raise DataError(f"{bad[0]}{more}, or leave such files out with --skip_bad_files")
        for message in bad:
            self._leave_out("bad files", message)
        if not selected:
            raise DataError(f"{self.option}: {self.root} holds no files to read{self._list_left_out(': left out ')}")
        return selected

    def _is_read(self, file: Path) -> bool:
        """Whether a file is a table or text. Raises DataError or OSError for a bad one."""
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(f"{file}: is a pointer of Git LFS and not the file itself; run git lfs pull")
        return _reader(file) is not None or _is_text(file, self.text_field)

    # ---------------------------------------------------------------------------- what was left out
    def _leave_out(self, why: str, what: str | Path) -> None:
        self._left_out.setdefault(why, [0, str(what)])[0] += 1

    def _bad(self, source: str | Path, reason: str) -> None:
        """Leaves out the rest of a file, or raises DataError without skip_bad_files."""
        if not self.files:
            raise DataError(f"{source}: {reason}")
        if not self.skip_bad_files:
            raise DataError(f"{source}: {reason}, or leave out the rest of the file with --skip_bad_files")
        self._leave_out("bad files", f"{source}: {reason}")

    def bad_conversation(self, message: str) -> None:
        """Leaves out a conversation that cannot be learned, or raises DataError without
        skip_bad_files."""
        if not self.skip_bad_files:
            raise DataError(f"{message}, or leave such conversations out with --skip_bad_files")
        self._leave_out("conversations", message)

    def _list_left_out(self, prefix: str) -> str:
        """What was left out since the last call, by reason: the number and the first one; "" if
        nothing was."""
        reasons = []
        for why, (count, first) in self._left_out.items():
            example = first if count == 1 else f"the first: {first}"
            reasons.append(f"{count:,} {why} ({example})")
        self._left_out = {}
        text = prefix + "; ".join(reasons) if reasons else ""
        return text.encode(errors="backslashreplace").decode()  # file names may not be valid UTF-8

    def selection(self) -> str:
        """One line: how many files of each kind are read, and which are left out before reading."""
        if not self.files:
            return f"corpus: {self.name} of the hub, split {self.split}"
        kinds = Counter(_suffix(file) or "without suffix" for file in self.files).most_common()
        named = [f"{count:,} {kind}" for kind, count in kinds[:6]]
        if len(kinds) > 6:
            named.append(f"{sum(count for _, count in kinds[6:]):,} of {len(kinds) - 6} other kinds")
        return f"corpus: reads {', '.join(named)}{self._list_left_out('; leaves out ')}"

    def left_out(self) -> str:
        """One line: what was left out while reading; "" if nothing was."""
        return self._list_left_out("corpus: left out ")

    # -------------------------------------------------------------------------------------- reading
    def _value(self, row: int, value, columns: dict) -> str | list | None:
        """The text or the messages of a row, None if it has neither. Adds the row's columns to the
        keys of `columns`. Raises DataError."""
        if not isinstance(value, dict):
            cure = f"write one with the column {self.text_field!r}"
            raise DataError(f"row {row}: is of type {type(value).__name__}, not an object with columns; {cure}")
        if _present(self.alternatives, columns) is None:
            columns.update(dict.fromkeys(value))
            if _present(self.alternatives, columns) is None and row >= SPARSE:
                raise _no_column(self.alternatives, columns)
        names = _present(self.alternatives, [name for name, cell in value.items() if cell is not None])
        if names is None:
            return None
        if names == CONVERSATION[1]:
            return self._pair(row, value)
        found = value[names[0]]
        if isinstance(found, str):
            return _well_formed(found)
        if self.conversations and isinstance(found, list):
            return found
        kind, cure = _type_and_cure(found)
        raise DataError(f"row {row}, column {names[0]!r}: is {kind}, not text; {cure}")

    def _pair(self, row: int, value: dict) -> list:
        """The messages of a prompt and its completion."""
        for name in CONVERSATION[1]:
            if not isinstance(value[name], (str, list)):
                kind, cure = _type_and_cure(value[name])
                raise DataError(f"row {row}, column {name!r}: is {kind}, not text; {cure}")
        return prompt_and_completion(value["prompt"], value["completion"])

    def _table(self, rows: Iterator, source: str | Path) -> Iterator[Document]:
        """The documents in a table's rows, up to the first bad row."""
        row = 0
        columns: dict = {}
        blank: list[int] = []  # rows without text, until the column is known to exist
        try:
            for row, value in enumerate(rows, 1):
                found = None if value is None else self._value(row, value, columns)
                if isinstance(found, list):
                    yield Document("", messages=found, place=f"{source}: row {row}")
                elif found:
                    yield Document(found)
                elif value is not None:
                    blank.append(row)
                if blank and _present(self.alternatives, columns):
                    for number in blank:
                        self._leave_out("rows without text", f"row {number} of {source}")
                    blank = []
            if columns and _present(self.alternatives, columns) is None:
                raise _no_column(self.alternatives, columns)
        except BrokenOff as error:
            raise BrokenOff(f"{source}: {error}") from None
        except DataError as error:
            self._bad(source, str(error))
        except FAULTS as error:
            self._bad(source, f"row {row + 1}: {_reason(error)}")
        else:
            if not columns:
                self._leave_out("empty", source)

    def _hub_rows(self) -> Iterator[dict]:
        from datasets import load_dataset

        try:
            table = load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # many kinds: a wrong name, no network, no token
            raise DataError(f"is no local path and the hub did not give it ({one_line(error)})") from None
        try:
            yield from table.remove_columns(self.remove_columns) if self.remove_columns else table
        except Exception as error:
            raise BrokenOff(f"the hub's split {self.split} broke off ({one_line(error)}); start again") from None

    def documents(self, holdout: float = 0.0) -> Iterator[Document]:
        """Streams the documents.

        holdout: the fraction held out of a large text file, or of the only one; it is cut off the
        end.
        """
        if not self.files:
            yield from self._table(self._hub_rows(), f"{self.option}: {self.name}")
            return
        characters = cache(_characters)
        with_text = (file for file in self.files if _reader(file) or characters(file))
        alone = len(list(itertools.islice(with_text, 2))) == 1  # reads at most two files in advance
        for file in self.files:
            if reader := _reader(file):
                yield from self._table(reader(file, self.alternatives), file)
            elif (size := characters(file)) is None:
                self._leave_out("not text (UTF-8)", file)
            elif size == 0:
                self._leave_out("empty", file)
            elif holdout and (alone or size > PIECE):
                yield from _end_and_beginning(file, (1 - holdout) * size)
            else:
                with file.open(encoding="utf-8-sig") as text:
                    yield from _parts(_lines(text))

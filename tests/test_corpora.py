"""Corpora: which files are read as documents, what is left out and reported, what is refused, and
how tables are read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile

from runtime.corpora import Corpus
from runtime.data import DataError

import numpy
import pyarrow
import pytest
from datasets import Dataset, load_dataset

TEXTS = ["one", 'two, "quoted"\nand two lines\n', "drei — ü 文字", "None", "12"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def texts_of(source, **options):
    return [document.text for document in Corpus(str(source), **options).documents()]


def refusal(source, **options) -> str:
    """The message with which a corpus is refused, one line."""
    with pytest.raises(DataError) as error:
        texts_of(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def said(source, **options) -> tuple[list[str], str]:
    """The texts, and the messages about the selection and after reading."""
    corpus = Corpus(str(source), **options)
    selection = corpus.selection()
    return [document.text for document in corpus.documents()], f"{selection}\n{corpus.left_out()}"


def write(folder, files: dict):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def delimited(delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def parquet(rows) -> bytes:
    data = io.BytesIO()
    Dataset.from_list(rows).to_parquet(data)
    return data.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# ------------------------------------------------------------------------------------------- tables
TABLES = {
    ".jsonl": jsonl(ROWS),
    ".ndjson": "\ufeff" + jsonl(ROWS).replace("\n", "\r\n\r\n"),
    ".json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    ".csv": "\ufeff" + delimited(","),
    ".tsv": delimited("\t"),
    ".parquet": parquet(ROWS),
}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", TABLES)
@pytest.mark.parametrize("packed", PACK)
def test_tables_of_every_suffix_in_upper_and_lower_case(tmp_path, suffix, packed):
    content = TABLES[suffix] if isinstance(TABLES[suffix], bytes) else TABLES[suffix].encode()
    for name in (suffix + packed, (suffix + packed).upper()):
        file = tmp_path / f"table{name}"
        file.write_bytes(PACK[packed](content))
        if suffix == ".parquet" and packed:
            assert f"table{name}: is " in refusal(file) and "unpack" in refusal(file)
        else:
            assert texts_of(file) == TEXTS


def test_tables_give_the_texts_that_the_datasets_library_reads(tmp_path):
    """For JSON Lines and parquet with columns of several types."""
    rows = [{"text": f"{i} " + "é\u2028x" * i, "meta": {"n": i}, "score": i / 3} for i in range(300)]
    write(tmp_path, {"a.jsonl": jsonl(rows), "b.parquet": parquet(rows)})
    for file, kind in (("a.jsonl", "json"), ("b.parquet", "parquet")):
        theirs = load_dataset(kind, data_files=str(tmp_path / file), split="train", streaming=True)
        assert texts_of(tmp_path / file) == [row["text"] for row in theirs]


def test_zstd_of_several_frames(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(jsonl(ROWS).encode()) + zstd(jsonl(ROWS).encode()))
    assert texts_of(tmp_path / "a.jsonl.zst") == 2 * TEXTS


def test_columns_that_change_from_row_to_row(tmp_path):
    """Rows without the text column are counted; a file without it is refused with the columns that
    it has."""
    rows = [
        {"other": 1},
        {"text": None},
        {"text": "a", "other": "of another type"},
        {"text": ""},
        {"text": "b", "other": [1]},
    ]
    texts, line = said(write(tmp_path / "some", {"a.jsonl": jsonl(rows)}))
    assert texts == ["a", "b"] and f"left out 3 rows without text (the first: row 1 of {tmp_path}/some/a.jsonl)" in line
    none = {
        "a.jsonl": jsonl([{"content": "x", "n": 1}]),
        "a.csv": "content,n\nx,1\n",
        "a.parquet": parquet([{"content": "x", "n": 1}]),
    }
    for name, content in none.items():
        file = write(tmp_path / "none", {name: content}) / name
        message = f"{file}: has no column 'text', only content, n; name the one that holds the text by --text_field"
        assert message in refusal(file)
        assert texts_of(file, text_field="content") == ["x"]
    texts, line = said(write(tmp_path / "none", {"b.jsonl": jsonl(ROWS)}), skip_bad_files=True)
    assert texts == TEXTS and "3 bad files" in line and "rows without text" not in line
    endless = write(tmp_path, {"endless.jsonl": jsonl([{"content": "x"}] * 5000) + "no JSON"}) / "endless.jsonl"
    assert "has no column 'text', only content" in refusal(endless)


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
NO_TEXT = {
    "conversation": (
        CONVERSATION,
        r"a conversation \(a list of messages\), not text; use --loss_on all, assistant or completion",
    ),
    "strings": (["a", "b"], "of type list, not text; join its parts"),
    "object": ({"content": "a"}, "of type dict, not text; write the part"),
    "number": (3, "of type int, not text; name a column of strings"),
    "bytes": (b"abc", "of type bytes, not text; decode it"),
}


@pytest.mark.parametrize(
    "kind, suffix",
    [(kind, suffix) for kind in NO_TEXT for suffix in (".jsonl", ".parquet") if (kind, suffix) != ("bytes", ".jsonl")],
)
def test_values_that_are_no_text_are_refused(tmp_path, kind, suffix):
    value, message = NO_TEXT[kind]
    rows = [{"body": None}, {"body": value}, {"body": value}]
    file = write(tmp_path, {f"a{suffix}": parquet(rows) if suffix == ".parquet" else jsonl(rows)}) / f"a{suffix}"
    expected = f"{re.escape(str(file))}: row 2, column 'body': is {message}"
    assert re.match(expected, refusal(file, text_field="body"))


def test_rows_that_are_no_objects_are_refused(tmp_path):
    for name, content in {"a.json": '["one", "two"]', "b.jsonl": '{"text": "x"}\n"two"\n'}.items():
        row = 2 if name == "b.jsonl" else 1
        file = write(tmp_path, {name: content}) / name
        assert f"{name}: row {row}: is of type str, not an object with columns" in refusal(file)


def test_unpaired_surrogates_are_replaced(tmp_path):
    """JSON can escape them, but UTF-8 cannot hold them, and tokenizers do not accept them."""
    file = write(tmp_path, {"a.jsonl": '{"text": "cut \\ud83d here, not \\ud83d\\ude00"}\n'}) / "a.jsonl"
    assert texts_of(file) == ["cut \ufffd here, not \U0001f600"]


# ------------------------------------------------------------------------------ bad and empty files
LINES = jsonl(ROWS).encode()
BROKEN = {
    "latin.jsonl": (
        LINES + b'{"text": "caf\xe9"}\n',
        6,
        "is not UTF-8 (byte 0xe9); convert the file to UTF-8",
    ),
    "cut.jsonl": (LINES + b'\n{"text": "cut he', 7, "is not JSON, or was cut short"),
    "cut.jsonl.gz": (
        gzip.compress(LINES, mtime=0)[:-12],
        None,
        "cannot be read (Compressed file ended",
    ),
    "cut.jsonl.zst": (zstd(LINES)[:-3], None, "cannot be read (Truncated compressed stream"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-30], None, "cannot be read (Compressed file ended"),
    "no gzip.jsonl.gz": (LINES, 1, "cannot be read (Not a gzipped file"),
    "ragged.csv": (
        b"id,text\n0,one\n1,two\n2,three, and more\n",
        3,
        "has 3 fields, but the header has 2",
    ),
    "cut.csv": (b'id,text\n0,one\n1,"two', 2, "cannot be read (unexpected end of data"),
    "cut.parquet": (parquet(ROWS)[:-20], 1, "cannot be read (Parquet magic bytes not found"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_row_and_may_be_skipped(tmp_path, name):
    """The rows before the fault are kept, once; the other files are read completely."""
    content, row, reason = BROKEN[name]
    others = {"a.jsonl": jsonl([{"text": "before"}]), "c.jsonl": jsonl([{"text": "after"}])}
    corpus = write(tmp_path, others | {f"b/{name}": content})
    line = refusal(corpus)
    assert reason in line and "--skip_bad_files" in line
    assert re.match(f"{re.escape(str(corpus / 'b' / name))}: row {row or '[0-9]+'}: ", line)
    texts, line = said(corpus, skip_bad_files=True)
    assert f"left out 1 bad files ({corpus}/b/{name}: row" in line and reason in line
    kept = [text.removesuffix("\n") for text in texts[1:-1]]
    assert texts[0] == "before" and texts[-1] == "after"
    all_texts = ["one", "two"] if name.endswith("csv") else [text.removesuffix("\n") for text in TEXTS]
    assert kept == all_texts[: len(kept)]
    assert row is None or len(kept) == min(row - 1, len(all_texts))


def test_many_bad_files_are_counted(tmp_path):
    bad = {f"{i}.jsonl": b"\xff" for i in (1, 2, 3)} | {"data.zip": b"PK\x03\x04"}
    corpus = write(tmp_path, {"0.jsonl": jsonl(ROWS)} | bad)
    texts, line = said(corpus, skip_bad_files=True)
    assert texts == TEXTS
    assert f"leaves out 1 bad files ({corpus}/data.zip: is a zip archive" in line
    assert f"left out 3 bad files (the first: {corpus}/1.jsonl: row 1: is not UTF-8" in line


def test_empty_files_are_counted(tmp_path):
    empty = {
        "a.jsonl": "",
        "b.jsonl": "\n\n",
        "c.parquet": parquet(ROWS[:0]),
        "d.csv": "id,text\n",
        "e.json": "[]",
        "f.txt": "",
        "g.parquet": "",
        "h.jsonl.gz": gzip.compress(b""),
        "i.jsonl.zst": zstd(b""),
    }
    texts, line = said(write(tmp_path, empty | {"z.jsonl": jsonl(ROWS)}))
    assert texts == TEXTS
    assert sum(int(count) for count in re.findall(r"(\d+) empty \(", line)) == len(empty)


def test_a_folder_of_empty_files_is_refused(tmp_path):
    corpus = write(tmp_path, {"a.txt": "", "b.jsonl": ""})
    assert "holds no files to read: left out 2 empty (the first: " in refusal(corpus)


# ----------------------------------------------------------------------------- which files are read
def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path):
    corpus = write(tmp_path, {"a.txt": "one", os.fsdecode(b".\xfe"): "hidden"})
    _, line = said(corpus)
    assert "leaves out 1 hidden" in line and line.encode()


def test_hidden_files_and_folders_are_left_out(tmp_path):
    corpus = write(
        tmp_path / ".corpus",
        {
            "a.txt": "text",
            "sub/b.py": "x = 1\n",
            ".git/config": "[user]\n email = a@example.org\n",
            ".env": "KEY=secret",
            "sub/.cache/x/c.txt": "no",
            "sub/.DS_Store": "no",
        },
    )
    texts, line = said(corpus)
    assert texts == ["text", "x = 1\n"]
    assert line.strip() == f"corpus: reads 1 .txt, 1 .py; leaves out 4 hidden (the first: {corpus}/.env)"
    key = Corpus(str(corpus)).key
    (corpus / ".git" / "HEAD").write_text("another commit")
    assert Corpus(str(corpus)).key == key
    (corpus / "sub" / "b.py").write_text("x = 12\n")
    assert Corpus(str(corpus)).key != key


def test_symlinks_are_followed_once(tmp_path):
    """Cycles end; a file with several names is read once, under the name whose suffix tells its
    kind."""
    outside = write(tmp_path / "outside", {"x/far.txt": "far", "blob": jsonl([{"text": "row"}])})
    corpus = write(tmp_path / "corpus", {"a.txt": "near"})
    (corpus / "link").symlink_to(outside / "x", target_is_directory=True)
    (corpus / "table.jsonl").symlink_to(outside / "blob")
    assert texts_of(corpus) == ["near", "far", "row"]
    assert said(corpus)[1].strip() == "corpus: reads 2 .txt, 1 .jsonl"
    (corpus / "cycle").symlink_to(corpus, target_is_directory=True)
    (corpus / "again.txt").symlink_to(corpus / "a.txt")
    (corpus / "blob").symlink_to(outside / "blob")
    (corpus / "gone.jsonl").symlink_to(outside / "gone.jsonl")
    texts, line = said(corpus)
    assert sorted(texts) == ["far", "near", "row"]
    assert "leaves out 3 linked twice" in line and f"1 broken links or no regular files ({corpus}/gone.jsonl)" in line


def test_documentation_beside_tables_is_left_out(tmp_path):
    """In the tables' folder or above it; without tables, a README is a text like any other."""
    card = {
        "README.md": "---\nlicense: mit\n---\n",
        "LICENSE": "MIT",
        "dataset_infos.json": "{}",
        ".gitattributes": "*.zst filter=lfs\n",
    }
    texts = {"code/README.md": "of code", "notes.txt": "notes"}
    corpus = write(tmp_path / "a", card | texts | {"data/0.jsonl.zst": zstd(jsonl(ROWS).encode())})
    texts, line = said(corpus)
    assert texts == ["of code", *TEXTS, "notes"]
    assert "3 documentation beside tables (the first: " in line and "1 hidden" in line and "1 .jsonl.zst" in line
    without_tables = write(tmp_path / "b", {"README.md": "hello", "LICENSE": "MIT", "a.py": "x\n"})
    assert texts_of(without_tables) == ["MIT", "hello", "x\n"]
    assert texts_of(corpus / "README.md") == [card["README.md"]]


def archive_of(kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=data, mode="w") as archive:
            member = tarfile.TarInfo("a.txt")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    return data.getvalue()


def arrays() -> bytes:
    data = io.BytesIO()
    numpy.save(data, numpy.zeros(3))
    return data.getvalue()


CONTAINERS = {
    "a.zip": archive_of("zip"),
    "a.docx": archive_of("zip"),
    "book.epub": archive_of("zip"),
    "no suffix": archive_of("zip"),
    "a.tar": archive_of("tar"),
    "a.tar.gz": gzip.compress(archive_of("tar")),
    "a.tar.zst": zstd(archive_of("tar")),
    "misnamed.txt": archive_of("tar"),
    "a.txt.gz": gzip.compress(b"text"),
    "a.gz": gzip.compress(b"{}"),
    "a.7z": b"7z\xbc\xaf\x27\x1c",
    "a.rar": b"Rar!\x1a\x07\x01\0",
    "a.pdf": b"%PDF-1.7\nall of it ASCII\n",
    "ids.bin": bytes(64),
    "ids.npy": arrays(),
    "data-0.arrow": b"ARROW1\0\0",
    "part-0": parquet(ROWS),
    "a.parquet.gz": gzip.compress(parquet(ROWS)),
    "A.ZIP": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_refused_by_name(tmp_path, name):
    corpus = write(tmp_path, {"a.txt.old": "text", name: CONTAINERS[name]})
    line = refusal(corpus)
    assert line.startswith(f"{corpus / name}: is ") and line.endswith("--skip_bad_files")
    assert ", which is not read; unpack it, or convert it to text" in line
    assert texts_of(corpus, skip_bad_files=True) == ["text"]


def test_a_git_lfs_pointer_is_refused(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    for name in ("a.parquet", "b.txt", "c.jsonl.zst"):
        file = write(tmp_path, {name: pointer}) / name
        assert f"{name}: is a pointer of Git LFS and not the file itself; run git lfs pull" in refusal(file)


LONG = "word " * 30_000  # longer than the part by which a file's kind is recognised
AS_TEXT = {
    "lines": ("shard.dat", jsonl(ROWS), ".jsonl"),
    "one line": ("data.txt", json.dumps(ROWS[0]), ".jsonl"),
    "long line": ("part-00000", jsonl([{"text": LONG}, {"text": "b"}]), ".jsonl"),
    "array": ("shard", json.dumps([{"text": LONG}, {"text": "b"}]), ".jsonl"),
    "notebook": ("a.ipynb", json.dumps({"cells": [], "nbformat": 4}, indent=1), ".jsonl"),
    "csv": ("data.txt", delimited(","), ".csv"),
    "tsv": ("data", "text\tid\nhello, you\t1\n", ".csv"),
    "long csv": (
        "data.old",
        f'title,body\none,"{LONG}"\n'.replace(LONG, LONG[:40_000]) * 3,
        ".csv",
    ),
}


@pytest.mark.parametrize("kind", AS_TEXT)
def test_tables_under_a_suffix_of_text_are_refused(tmp_path, kind):
    name, content, cure = AS_TEXT[kind]
    corpus = write(tmp_path, {"a.txt": "text", name if name != "a.txt" else "b.txt": content})
    line = refusal(corpus)
    assert line.startswith(f"{corpus}/{name}: holds ") and "under a suffix of text; rename it to " + cure in line


PROSE = {
    "a template": '{"name"} is what we call it, and {"more"}.\n',
    "an object, then prose": '{"a": 1}\nis what the server answers.\n',
    "numbers": "1,2,3\n4,5,6\n7,8,9\n",
    "a poem": "Rose, oh pure contradiction, joy\nof being No-one's sleep, under so\nmany lids.\n",
    "code": "import os, sys\nx, y = 1, 2\na, b = 3, 4\n",
    "a footnote": '[1] {"a"} is a set.\n',
    "a Python literal": "{'a': 1}\n{'b': 2}\n",
    "a table of Markdown": "|a|b|\n|-|-|\n|1|2|\n",
    "names": "yes,no\n",
    "ORC": "ORC is a monster, BZh and Rar! are its cries\n",
}


@pytest.mark.parametrize("kind", PROSE)
def test_text_that_resembles_a_table_is_read_as_text(tmp_path, kind):
    file = write(tmp_path, {"a.txt": PROSE[kind]}) / "a.txt"
    assert texts_of(file) == [PROSE[kind]]


def test_files_that_are_not_text_are_left_out(tmp_path):
    """NUL and Latin-1, also far into the file, and UTF-16; a byte order mark is not part of a text."""
    corpus = write(
        tmp_path,
        {
            "a.txt": "\ufefftext",
            "b.jpg": b"\xff\xd8\xff\xe0",
            "c.o": b"ELF\0\0",
            "d.txt": "text".encode("utf-16"),
            "e.txt": b"x" * 70_000 + b"\0",
            "f.txt": b"x" * 70_000 + b"\xe9 ",
        },
    )
    texts, line = said(corpus)
    assert texts == ["text"]
    assert f"3 not text (UTF-8) (the first: {corpus}/b.jpg)" in line
    assert f"2 not text (UTF-8) (the first: {corpus}/e.txt)" in line


def test_the_files_read_are_reported_by_kind_and_number(tmp_path):
    names = [*(f"{i}.s{i}" for i in range(8)), "a.TXT", "b.txt", "Makefile"]
    corpus = write(tmp_path, dict.fromkeys(names, "x"))
    expected = "corpus: reads 2 .txt, 1 .s0, 1 .s1, 1 .s2, 1 .s3, 1 .s4, 4 of 4 other kinds"
    assert Corpus(str(corpus)).selection() == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_read_permission_are_named(tmp_path):
    corpus = write(tmp_path, {"a.txt": "text", "b.txt": "secret", "sub/c.txt": "text"})
    (corpus / "b.txt").chmod(0)
    assert "b.txt: Permission denied" in refusal(corpus)
    assert texts_of(corpus, skip_bad_files=True) == ["text", "text"]

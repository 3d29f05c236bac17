"""Preprocessing: every token is there once, in order; caches are keyed; bad input is named and leaves nothing behind."""

import json

import numpy
import pytest
from conftest import save_tokenizer

import preprocess_chunk
import preprocess_download_tokenize as tokenize_script
from pipeline.data import DataError, collate, load_tokenizer, open_chunks, open_split, tokenizer_fingerprint

DOCUMENTS = [f"def f{i}(x):\n    return x + {i} * {'y' * (i % 7)}\n" * (1 + i % 3) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:03}.py").write_text(text)
    return folder


def tokenize(corpus, tokenizer_dir, output, *options):
    tokenize_script.main(["--dataset_name", str(corpus), "--tokenizer", tokenizer_dir, "--output_dir", str(output), *options])
    return output


def chunk(tokenized, length, output, *options):
    preprocess_chunk.main(["--tokenized_dataset_path", str(tokenized), "--context_length", str(length), "--output_dir",
                           str(output), *options])  # fmt: skip
    return output / f"chunked_context{length}"


def ids_of(folder, split):
    return [i for row in open_split(folder, split) for i in row["input_ids"]]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_every_document_once_with_eos(tmp_path, corpus, tokenizer_dir, kind):
    if kind == "jsonl":
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS))
    elif kind == "parquet":
        from datasets import Dataset

        corpus = tmp_path / "corpus.parquet"
        Dataset.from_dict({"text": DOCUMENTS, "id": list(range(40))}).to_parquet(str(corpus))
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0.1", "--batch_size", "7")
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in DOCUMENTS]
    train, heldout = ([row["input_ids"] for row in open_split(out, split)] for split in ("train", "heldout"))
    assert len(heldout) == 4 and heldout[0] == expected[0]
    assert sorted(train + heldout) == sorted(expected)
    assert train == [ids for ids in expected if ids not in heldout]


def test_chunks_are_the_documents_end_to_end(tmp_path, corpus, tokenizer_dir):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0.1")
    folder = chunk(out, 32, tmp_path / "data")
    chunks = open_chunks(str(folder), 32, tokenizer_fingerprint(load_tokenizer(tokenizer_dir)))
    for split, dataset in (("train", chunks.train), ("heldout", chunks.heldout)):
        flat = ids_of(out, split)
        assert len(dataset) == len(flat) // 32
        assert ids_of(folder, split) == flat[: len(dataset) * 32]
    assert chunks.metadata["num_chunks"] == len(chunks.train) and chunks.metadata["dtype"] == "uint16"
    batch = collate([chunks.train.with_format("numpy")[i] for i in (0, 1)])
    assert set(batch) == {"input_ids"} and batch["input_ids"].shape == (2, 32)
    assert numpy.array_equal(batch["input_ids"][1], chunks.train[1]["input_ids"])


def test_large_text_files_are_read_in_pieces(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("pipeline.data.PIECE", 100)
    file = tmp_path / "book.txt"
    file.write_text("".join(DOCUMENTS))
    out = tokenize(file, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0")
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = ids_of(out, "train")
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == "".join(DOCUMENTS)
    assert open_chunks(str(chunk(out, 16, tmp_path)), 16).heldout is None


def test_options(tmp_path, corpus, tokenizer_dir):
    cut = tokenize(corpus, tokenizer_dir, tmp_path / "cut", "--max_length", "5")
    assert max(len(row["input_ids"]) for row in open_split(cut, "train")) == 6  # 5 and EOS
    few = tokenize(corpus, tokenizer_dir, tmp_path / "few", "--max_tokens", "200")
    total = len(ids_of(few, "train")) + len(ids_of(few, "heldout"))
    assert 200 <= total < 200 + 100
    wide = chunk(cut, 16, tmp_path, "--dtype", "int64")
    assert open_split(wide, "train").features["input_ids"].feature.dtype == "int64"


def test_a_second_call_does_nothing_and_another_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized")
    before = (out / "train.arrow").stat().st_mtime_ns
    tokenize(corpus, tokenizer_dir, out)
    assert "is there already" in capsys.readouterr().out and (out / "train.arrow").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="max_length None, not 9"):
        tokenize(corpus, tokenizer_dir, out, "--max_length", "9")
    (corpus / "new.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="corpus"):
        tokenize(corpus, tokenizer_dir, out)
    save_tokenizer(tmp_path / "other", extra="zzz")
    with pytest.raises(DataError, match="tokenized: was made with"):
        tokenize(corpus, str(tmp_path / "other"), out)
    folder = chunk(out, 16, tmp_path)
    with pytest.raises(DataError, match="dtype"):
        chunk(out, 16, tmp_path, "--dtype", "int32")
    with pytest.raises(DataError, match="16 tokens, but train.train_seq_len is 32"):
        open_chunks(str(folder), 32)
    with pytest.raises(DataError, match="not the teacher's"):
        open_chunks(str(folder), 16, "another")


def test_fingerprint_is_of_the_content(tmp_path, tokenizer_dir):
    for name, extra in (("same", None), ("other", "zzz")):
        save_tokenizer(tmp_path / name, extra=extra)
    mine, same, other = (tokenizer_fingerprint(load_tokenizer(str(f))) for f in (tokenizer_dir, tmp_path / "same", tmp_path / "other"))
    assert mine == same != other


BAD = {
    "no/such/corpus/here": "no/such/corpus/here does not exist",
    "missing.jsonl": "missing.jsonl does not exist",
}


@pytest.mark.parametrize("name", BAD)
def test_a_missing_corpus_is_named(tmp_path, tokenizer_dir, name):
    with pytest.raises(DataError, match=BAD[name]):
        tokenize(name, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing_behind(tmp_path, corpus, tokenizer_dir):
    table = tmp_path / "table.jsonl"
    table.write_text('{"content": "x"}\n')
    (tmp_path / "empty").mkdir()
    cases = [
        (table, [], "--text_field: 'text' is no column of .*content"),
        (tmp_path / "empty", [], "empty holds no files"),
        (corpus, ["--holdout", "1.5"], "--holdout: 1.5"),
        (corpus, ["--max_tokens", "0"], "--max_tokens: 0"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message):
            tokenize(source, tokenizer_dir, tmp_path / "out", *options)
    with pytest.raises(DataError, match="--tokenizer: .*has no tokenizer that loads .*; name a folder or"):
        tokenize(corpus, str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(DataError, match="was not made by preprocess_download_tokenize.py"):
        chunk(corpus, 16, tmp_path / "data")
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized")
    with pytest.raises(DataError, match="--context_length: 999999 is more than"):
        chunk(out, 999999, tmp_path / "data")
    for folder in (tmp_path / "out", tmp_path / "data"):
        assert not folder.exists() or not any(folder.iterdir())


def test_missing_chunks_are_named(tmp_path):
    with pytest.raises(DataError, match="data.cache_dir: .*nowhere: no such folder; make it with preprocess_chunk.py"):
        open_chunks(str(tmp_path / "nowhere"), 16)

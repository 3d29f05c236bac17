"""Preprocessing: every token is there once, in order; caches are keyed; bad input is named and leaves nothing behind."""

import gzip
import json

from runtime.data import (
    DataError,
    collate,
    load_tokenizer,
    open_chunks,
    open_split,
    tokenizer_fingerprint,
)

import numpy
import pytest
from conftest import save_tokenizer
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

import preprocess_chunk
import preprocess_download_tokenize as tokenize_script

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
    tokenize_script.main(
        [
            "--dataset_name",
            str(corpus),
            "--tokenizer",
            tokenizer_dir,
            "--output_dir",
            str(output),
            *options,
        ]
    )
    return output


def chunk(tokenized, length, output, *options):
    preprocess_chunk.main(
        [
            "--tokenized_dataset_path",
            str(tokenized),
            "--context_length",
            str(length),
            "--output_dir",
            str(output),
            *options,
        ]
    )
    return output / f"chunked_context{length}"


def ids_of(folder, split):
    return [i for row in open_split(folder, split) for i in row["input_ids"]]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_every_document_once_with_eos(tmp_path, corpus, tokenizer_dir, kind):
    if kind == "jsonl":
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS))
    elif kind == "parquet":
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
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    file = tmp_path / "book.txt"
    file.write_text("".join(DOCUMENTS))
    out = tokenize(file, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0")
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = ids_of(out, "train")
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == "".join(DOCUMENTS)
    assert open_chunks(str(chunk(out, 16, tmp_path)), 16).heldout is None


def test_the_end_of_a_large_text_is_held_out(tmp_path, tokenizer_dir, monkeypatch):
    """In one part, and no more of it than the share of --max_tokens; --max_length cuts the text,
    and not every piece."""
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = ["".join(DOCUMENTS[i::4]) for i in range(4)]
    for i, text in enumerate(texts):
        (corpus / f"{i}.txt").write_text(text)
    tokenizer = load_tokenizer(tokenizer_dir)
    (corpus / "4.txt").write_text("short\n")
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0.25")
    train, heldout = (tokenizer.decode(ids_of(out, split)).split(tokenizer.eos_token) for split in ("train", "heldout"))
    assert train[4:] == [""] and heldout[4:] == ["short\n", ""]
    assert [a + b for a, b in zip(train[:4], heldout)] == texts
    assert all(0 < len(b) <= 0.25 * len(text) for b, text in zip(heldout, texts))
    few = tokenize(corpus, tokenizer_dir, tmp_path / "few", "--holdout", "0.25", "--max_tokens", "400")
    assert (len(ids_of(few, "heldout")), len(ids_of(few, "train"))) == (100, 300)
    (corpus / "4.txt").unlink()
    cut = tokenize(corpus, tokenizer_dir, tmp_path / "cut", "--holdout", "0", "--max_length", "60")
    ids = ids_of(cut, "train")
    assert len(ids) == 4 * 61 and ids[60::61] == 4 * [tokenizer.eos_token_id]


@pytest.mark.parametrize("lines", [True, False])
def test_the_end_of_a_lone_text_is_held_out(tmp_path, tokenizer_dir, monkeypatch, lines):
    monkeypatch.setattr("runtime.corpora.LINE", 50)
    corpus, text = (
        tmp_path / "corpus",
        "".join(DOCUMENTS) if lines else "".join(DOCUMENTS).replace("\n", " "),
    )
    corpus.mkdir()
    (corpus / "book.txt").write_text(text)
    (corpus / "a cover.jpg").write_bytes(b"\xff\xd8\xff")
    (corpus / "an empty one.txt").touch()
    tokenizer = load_tokenizer(tokenizer_dir)
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0.2")
    train, heldout = (tokenizer.decode(ids_of(out, split)) for split in ("train", "heldout"))
    assert train.replace(tokenizer.eos_token, "") + heldout.replace(tokenizer.eos_token, "") == text
    assert train.endswith(tokenizer.eos_token) and heldout.endswith(tokenizer.eos_token)
    assert 0.2 * len(text) - 100 < len(heldout) <= 0.2 * len(text) + len(tokenizer.eos_token)


def test_files_that_are_not_text_are_counted(tmp_path, tokenizer_dir, monkeypatch, capsys):
    """Wherever the byte is that is not UTF-8; tables may be compressed."""
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(DOCUMENTS[0])
    (corpus / "b.txt").write_bytes("".join(DOCUMENTS).encode() + b"caf\xe9\n")
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": DOCUMENTS[1]}).encode()))
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--holdout", "0")
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(ids_of(out, "train")).split(tokenizer.eos_token) == [
        DOCUMENTS[0],
        DOCUMENTS[1],
        "",
    ]
    said = capsys.readouterr().out
    assert "corpus: reads 1 .txt, 1 .jsonl.gz; leaves out" in said and f"1 not text (UTF-8) ({corpus}/b.txt)" in said


def test_documents_begin_as_the_tokenizer_lets_texts_begin(tmp_path, corpus, tokenizer_dir, monkeypatch):
    """With a BOS before each, as Llama 3's does; a folder that was made without is refused."""
    without = tokenize(corpus, tokenizer_dir, tmp_path / "without", "--holdout", "0")
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    with_bos = tokenize(corpus, str(tmp_path / "tokenizer"), tmp_path / "with", "--holdout", "0")
    eos = [tokenizer.eos_token_id]
    assert ids_of(with_bos, "train") == [i for text in DOCUMENTS for i in tokenizer(text)["input_ids"] + eos]
    assert ids_of(with_bos, "train").count(tokenizer.bos_token_id) == len(DOCUMENTS)
    assert json.loads((with_bos / "metadata.json").read_text())["bos_token_id"] == tokenizer.bos_token_id
    metadata = json.loads((without / "metadata.json").read_text())
    assert "bos_token_id" not in metadata
    metadata["tokenizer_fingerprint"] = json.loads((with_bos / "metadata.json").read_text())["tokenizer_fingerprint"]
    (without / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=f"without: was made with bos_token_id None, not {tokenizer.bos_token_id}"):
        tokenize(corpus, str(tmp_path / "tokenizer"), without, "--holdout", "0")


CONTROL, ORDINARY = ("<|im_end|>", "<tool_call>", "[INST]"), ("        ", "lambda")


@pytest.fixture
def control_tokenizer(tmp_path, tokenizer_dir):
    """With control tokens, special and not, and with ordinary tokens that were added; it declares a
    length of 8 tokens."""
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_tokens(list(ORDINARY))
    tokenizer.add_tokens([AddedToken(CONTROL[0], special=True), *CONTROL[1:]])
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path / "control_tokenizer")
    return str(tmp_path / "control_tokenizer")


def test_control_tokens_in_a_text_are_text(tmp_path, control_tokenizer):
    """Against the tokenizer's file without its control tokens; other added tokens stay, and no
    length of the tokenizer's cuts."""
    texts = [f"lambda x:\n        return '{name}<eos>'  # {name}\n" * 3 for name in CONTROL]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = tmp_path / "control_tokenizer" / "tokenizer.json"
    state = json.loads(file.read_text())
    bare = state | {"added_tokens": [token for token in state["added_tokens"] if token["content"] in ORDINARY]}
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(state | {"truncation": cut}))
    eos = [load_tokenizer(control_tokenizer).eos_token_id]
    for name, reference, options in (
        ("text", bare, []),
        ("control", state, ["--allow_special_tokens"]),
    ):
        out = tokenize(corpus, control_tokenizer, tmp_path / name, "--holdout", "0", *options)
        reference = Tokenizer.from_str(json.dumps(reference))
        assert [row["input_ids"] for row in open_split(out, "train")] == [
            reference.encode(text).ids + eos for text in texts
        ]
    ids = {token["id"] for token in state["added_tokens"] if token["content"] in CONTROL}
    assert (
        len(ids) == 3
        and not ids & set(ids_of(tmp_path / "text", "train"))
        and ids < set(ids_of(tmp_path / "control", "train"))
    )


def test_a_folder_from_before_control_tokens_were_text(tmp_path, corpus, tokenizer_dir):
    """Is one with --allow_special_tokens: known as such, refused as another, and still good for
    training."""
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--allow_special_tokens")
    metadata = json.loads((out / "metadata.json").read_text())
    for option in ("allow_special_tokens", "skip_bad_files"):
        del metadata[option]
    (out / "metadata.json").write_text(json.dumps(metadata))
    before = (out / "train.arrow").stat().st_mtime_ns
    tokenize(corpus, tokenizer_dir, out, "--allow_special_tokens")
    assert (out / "train.arrow").stat().st_mtime_ns == before
    with pytest.raises(
        DataError,
        match="was made with allow_special_tokens True, not False; choose another --output_dir",
    ):
        tokenize(corpus, tokenizer_dir, out)
    assert open_chunks(str(chunk(out, 16, tmp_path)), 16, tokenizer_fingerprint(load_tokenizer(tokenizer_dir))).train


def test_a_tokenizer_that_has_no_other_encoding_of_a_control_token(tmp_path, corpus):
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "x": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="?").save_pretrained(
        tmp_path / "words"
    )
    with pytest.raises(
        DataError,
        match="--tokenizer: has no encoding of the text '<eos>' but the control token; say --allow_special_tokens",
    ):
        tokenize(corpus, str(tmp_path / "words"), tmp_path / "out")
    tokenize(corpus, str(tmp_path / "words"), tmp_path / "out", "--allow_special_tokens")


def test_long_documents_give_no_warning(tmp_path, corpus, control_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    out = tokenize(corpus, control_tokenizer, tmp_path / "out", "--holdout", "0")
    assert len(ids_of(out, "train")) > 1000 and not said


@pytest.mark.parametrize("kind", ["files", "table", "one large file", "large files"])
@pytest.mark.parametrize("max_tokens, holdout", [(700, 0.1), (1001, 0.01), (333, 0.25), (64, 0.0)])
def test_max_tokens_is_exact(tmp_path, corpus, tokenizer_dir, monkeypatch, capsys, kind, max_tokens, holdout):
    """In both parts; all but the last document of a part are whole, none is in both, and a cut one
    is said."""
    if kind == "table":
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    elif "large" in kind:
        monkeypatch.setattr("runtime.corpora.PIECE", 100)
        corpus = tmp_path / "large"
        corpus.mkdir()
        for i in range(1 if "one" in kind else 4):
            (corpus / f"{i}.txt").write_text("".join(DOCUMENTS) if "one" in kind else "".join(DOCUMENTS[i::4]))
    results = []
    for batch_size in ("3", "256"):
        options = [
            "--holdout",
            str(holdout),
            "--max_tokens",
            str(max_tokens),
            "--batch_size",
            batch_size,
        ]
        out = tokenize(corpus, tokenizer_dir, tmp_path / batch_size, *options)
        results.append(
            [ids_of(out, split) for split in ("train", "heldout")] if holdout else [ids_of(out, "train"), []]
        )
    assert results[0] == results[1]
    train, heldout = results[0]
    assert (len(train), len(heldout)) == (
        max_tokens - round(max_tokens * holdout),
        round(max_tokens * holdout),
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    said = capsys.readouterr().out
    *whole, last = tokenizer.decode(train).split(tokenizer.eos_token)
    assert bool(last) == ("--max_tokens: the last document of the train part is cut, its rest is dropped" in said)
    if "large" not in kind:
        *held, last_held = tokenizer.decode(heldout).split(tokenizer.eos_token)
        assert whole and not set(whole) & set(held) and set(whole + held) <= set(DOCUMENTS)
        assert any(text.startswith(last) for text in DOCUMENTS) and any(
            text.startswith(last_held) for text in DOCUMENTS
        )


def test_a_corpus_smaller_than_max_tokens(tmp_path, corpus, tokenizer_dir, capsys):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "out", "--max_tokens", "1_000_000")
    total = len(ids_of(out, "train")) + len(ids_of(out, "heldout"))
    assert f"--max_tokens: the corpus has no more than {total:,} of 1,000,000 tokens" in capsys.readouterr().out


def test_a_hub_dataset_is_checked_as_local_tables_are(tmp_path, tokenizer_dir, monkeypatch, capsys):
    rows = [{"text": None if i == 3 else text, "id": i} for i, text in enumerate(DOCUMENTS)]
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *args, **options: Dataset.from_list(rows).to_iterable_dataset(),
    )
    out = tokenize("owner/name", tokenizer_dir, tmp_path / "out", "--holdout", "0", "--remove_columns", "id")
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(ids_of(out, "train")).split(tokenizer.eos_token) == DOCUMENTS[:3] + DOCUMENTS[4:] + [""]
    assert "corpus: left out 1 rows without text (row 4 of --dataset_name: owner/name)" in capsys.readouterr().out
    with pytest.raises(DataError, match="--dataset_name: owner/name: row 1, column 'id': is of type int, not text"):
        tokenize(
            "owner/name",
            tokenizer_dir,
            tmp_path / "other",
            "--text_field",
            "id",
            "--skip_bad_files",
        )

    def broken():
        yield from rows[:5]
        raise ConnectionResetError("the hub is gone")

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: broken())
    with pytest.raises(
        DataError,
        match=r"--dataset_name: owner/name: the hub's split train broke off \(the hub is gone\)",
    ):
        tokenize("owner/name", tokenizer_dir, tmp_path / "broken", "--skip_bad_files")
    assert not (tmp_path / "broken").exists()


def test_a_first_document_that_is_most_of_a_corpus(tmp_path, tokenizer_dir):
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("".join(DOCUMENTS), *DOCUMENTS[:3])))
    with pytest.raises(
        DataError,
        match="--holdout: 0.01 would hold out 9.% of .*table.jsonl, whose first document is most of it",
    ):
        tokenize(table, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options(tmp_path, corpus, tokenizer_dir):
    cut = tokenize(corpus, tokenizer_dir, tmp_path / "cut", "--max_length", "5")
    assert max(len(row["input_ids"]) for row in open_split(cut, "train")) == 6  # 5 and EOS
    few = tokenize(corpus, tokenizer_dir, tmp_path / "few", "--max_tokens", "200")
    assert (len(ids_of(few, "train")), len(ids_of(few, "heldout"))) == (198, 2)
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
    with pytest.raises(DataError, match="tokenized holds no chunks; cut its documents with preprocess_chunk.py"):
        open_chunks(str(out))
    assert open_chunks(str(folder)).metadata["context_length"] == 16


def test_fingerprint_is_of_the_content(tmp_path, tokenizer_dir):
    for name, extra in (("same", None), ("other", "zzz")):
        save_tokenizer(tmp_path / name, extra=extra)
    mine, same, other = (
        tokenizer_fingerprint(load_tokenizer(str(f))) for f in (tokenizer_dir, tmp_path / "same", tmp_path / "other")
    )
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
        (
            table,
            [],
            "table.jsonl: has no column 'text', only content; name the one that holds the text by --text_field",
        ),
        (tmp_path / "empty", [], "empty holds no files"),
        (corpus, ["--holdout", "1.5"], "--holdout: 1.5"),
        (corpus, ["--max_tokens", "0"], "--max_tokens: 0"),
        (
            corpus,
            ["--max_tokens", "1"],
            "--max_tokens: 1 leaves nothing to train on beside --holdout 0.01",
        ),
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
    with pytest.raises(
        DataError,
        match="data.cache_dir: .*nowhere: no such folder; make it with preprocess_chunk.py",
    ):
        open_chunks(str(tmp_path / "nowhere"), 16)

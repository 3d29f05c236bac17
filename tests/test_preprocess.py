"""Preprocessing keeps every token once and in order, recognises what is done, and names bad input
without leaving output."""

import gzip
import itertools
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
from conftest import options, save_tokenizer
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


def tokenize(corpus, tokenizer_dir, output, *more, **values):
    paths = options(dataset_name=corpus, tokenizer=tokenizer_dir, output_dir=output)
    tokenize_script.main([*paths, *options(**values), *more])
    return output


def chunk(tokenized, length, output, **values):
    paths = options(tokenized_dataset_path=tokenized, output_dir=output)
    preprocess_chunk.main([*paths, *options(context_length=length, **values)])
    return output / f"chunked_context{length}"


def write_jsonl(file, texts):
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return file


def ids_of(folder, split):
    return list(itertools.chain.from_iterable(rows_of(folder, split)))


def rows_of(folder, split):
    return [row["input_ids"] for row in open_split(folder, split)]


def texts_of(folder, split, tokenizer):
    """The decoded documents of a split; "" after the last EOS."""
    return tokenizer.decode(ids_of(folder, split)).split(tokenizer.eos_token)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_every_document_once_with_eos(tmp_path, corpus, tokenizer_dir, kind):
    if kind == "jsonl":
        corpus = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    elif kind == "parquet":
        corpus = tmp_path / "corpus.parquet"
        Dataset.from_dict({"text": DOCUMENTS, "id": list(range(40))}).to_parquet(str(corpus))
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", holdout=0.1, batch_size=7)
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in DOCUMENTS]
    train = rows_of(out, "train")
    heldout = rows_of(out, "heldout")
    assert len(heldout) == 4 and heldout[0] == expected[0]
    assert sorted(train + heldout) == sorted(expected)
    assert train == [ids for ids in expected if ids not in heldout]


def test_chunks_are_the_documents_end_to_end(tmp_path, corpus, tokenizer_dir):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", holdout=0.1)
    folder = chunk(out, 32, tmp_path / "data")
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer_dir))
    chunks = open_chunks(str(folder), 32, fingerprint, document_mask="auto")
    for split, dataset in (("train", chunks.train), ("heldout", chunks.heldout)):
        flat = ids_of(out, split)
        assert len(dataset) == len(flat) // 32
        assert ids_of(folder, split) == flat[: len(dataset) * 32]
    assert chunks.metadata["num_chunks"] == len(chunks.train) and chunks.metadata["dtype"] == "uint16"
    batch = collate([chunks.train.with_format("numpy")[i] for i in (0, 1)])
    assert set(batch) == {"input_ids", "document_ids"} and batch["input_ids"].shape == (2, 32)
    assert numpy.array_equal(batch["input_ids"][1], chunks.train[1]["input_ids"])


def test_large_text_files_are_read_in_parts(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    file = tmp_path / "book.txt"
    file.write_text("".join(DOCUMENTS))
    out = tokenize(file, tokenizer_dir, tmp_path / "tokenized", holdout=0)
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = ids_of(out, "train")
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == "".join(DOCUMENTS)
    assert open_chunks(str(chunk(out, 16, tmp_path)), 16).heldout is None


def test_the_end_of_a_large_text_is_held_out(tmp_path, tokenizer_dir, monkeypatch):
    """It is one document, and of --max_tokens no more than the share to hold out; --max_length cuts
    the text as a whole, not each of its parts."""
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = ["".join(DOCUMENTS[i::4]) for i in range(4)]
    for i, text in enumerate(texts):
        (corpus / f"{i}.txt").write_text(text)
    tokenizer = load_tokenizer(tokenizer_dir)
    (corpus / "4.txt").write_text("short\n")
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", holdout=0.25)
    train = texts_of(out, "train", tokenizer)
    heldout = texts_of(out, "heldout", tokenizer)
    assert train[4:] == [""] and heldout[4:] == ["short\n", ""]
    assert [a + b for a, b in zip(train[:4], heldout)] == texts
    assert all(0 < len(b) <= 0.25 * len(text) for b, text in zip(heldout, texts))
    few = tokenize(corpus, tokenizer_dir, tmp_path / "few", holdout=0.25, max_tokens=400)
    assert (len(ids_of(few, "heldout")), len(ids_of(few, "train"))) == (100, 300)
    (corpus / "4.txt").unlink()
    cut = tokenize(corpus, tokenizer_dir, tmp_path / "cut", holdout=0, max_length=60)
    ids = ids_of(cut, "train")
    assert len(ids) == 4 * 61 and ids[60::61] == 4 * [tokenizer.eos_token_id]


@pytest.mark.parametrize("lines", [True, False])
def test_the_end_of_the_only_text_is_held_out(tmp_path, tokenizer_dir, monkeypatch, lines):
    monkeypatch.setattr("runtime.corpora.LINE", 50)
    text = "".join(DOCUMENTS)
    if not lines:
        text = text.replace("\n", " ")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "book.txt").write_text(text)
    (corpus / "a cover.jpg").write_bytes(b"\xff\xd8\xff")
    (corpus / "an empty one.txt").touch()
    tokenizer = load_tokenizer(tokenizer_dir)
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", holdout=0.2)
    train, heldout = (tokenizer.decode(ids_of(out, split)) for split in ("train", "heldout"))
    assert train.replace(tokenizer.eos_token, "") + heldout.replace(tokenizer.eos_token, "") == text
    assert train.endswith(tokenizer.eos_token) and heldout.endswith(tokenizer.eos_token)
    assert 0.2 * len(text) - 100 < len(heldout) <= 0.2 * len(text) + len(tokenizer.eos_token)


def test_files_that_are_not_text_are_counted(tmp_path, tokenizer_dir, monkeypatch, capsys):
    """Wherever the invalid byte is; tables may be compressed."""
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text(DOCUMENTS[0])
    (corpus / "b.txt").write_bytes("".join(DOCUMENTS).encode() + b"caf\xe9\n")
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": DOCUMENTS[1]}).encode()))
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", holdout=0)
    assert texts_of(out, "train", load_tokenizer(tokenizer_dir)) == [DOCUMENTS[0], DOCUMENTS[1], ""]
    said = capsys.readouterr().out
    assert "corpus: reads 1 .txt, 1 .jsonl.gz; leaves out" in said and f"1 not text (UTF-8) ({corpus}/b.txt)" in said


def test_documents_begin_with_bos_if_the_tokenizer_adds_one(tmp_path, corpus, tokenizer_dir, monkeypatch):
    """As Llama 3's does; an existing folder without BOS is refused."""
    without = tokenize(corpus, tokenizer_dir, tmp_path / "without", holdout=0)
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("runtime.corpora.PIECE", 100)
    with_bos = tokenize(corpus, str(tmp_path / "tokenizer"), tmp_path / "with", holdout=0)
    eos = [tokenizer.eos_token_id]
    assert rows_of(with_bos, "train") == [tokenizer(text)["input_ids"] + eos for text in DOCUMENTS]
    assert ids_of(with_bos, "train").count(tokenizer.bos_token_id) == len(DOCUMENTS)
    assert json.loads((with_bos / "metadata.json").read_text())["bos_token_id"] == tokenizer.bos_token_id
    metadata = json.loads((without / "metadata.json").read_text())
    assert "bos_token_id" not in metadata
    metadata["tokenizer_fingerprint"] = json.loads((with_bos / "metadata.json").read_text())["tokenizer_fingerprint"]
    (without / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=f"without: was made with bos_token_id None, not {tokenizer.bos_token_id}"):
        tokenize(corpus, str(tmp_path / "tokenizer"), without, holdout=0)


CONTROL = ("<|im_end|>", "<tool_call>", "[INST]")
ORDINARY = ("        ", "lambda")


@pytest.fixture
def control_tokenizer(tmp_path, tokenizer_dir):
    """With control tokens, special and not, with added ordinary tokens, and a model_max_length of 8
    tokens."""
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_tokens(list(ORDINARY))
    tokenizer.add_tokens([AddedToken(CONTROL[0], special=True), *CONTROL[1:]])
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path / "control_tokenizer")
    return str(tmp_path / "control_tokenizer")


def test_control_tokens_in_a_text_are_text(tmp_path, control_tokenizer):
    """As the tokenizer without its control tokens encodes it; other added tokens stay, and no
    maximum length of the tokenizer cuts the text."""
    texts = [f"lambda x:\n        return '{name}<eos>'  # {name}\n" * 3 for name in CONTROL]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    file = tmp_path / "control_tokenizer" / "tokenizer.json"
    state = json.loads(file.read_text())
    bare = state | {"added_tokens": [token for token in state["added_tokens"] if token["content"] in ORDINARY]}
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(state | {"truncation": cut}))
    eos = [load_tokenizer(control_tokenizer).eos_token_id]
    for name, reference, more in (("text", bare, []), ("control", state, ["--allow_special_tokens"])):
        out = tokenize(corpus, control_tokenizer, tmp_path / name, *more, holdout=0)
        reference = Tokenizer.from_str(json.dumps(reference))
        assert rows_of(out, "train") == [reference.encode(text).ids + eos for text in texts]
    ids = {token["id"] for token in state["added_tokens"] if token["content"] in CONTROL}
    assert len(ids) == 3
    assert not ids & set(ids_of(tmp_path / "text", "train"))
    assert ids < set(ids_of(tmp_path / "control", "train"))


def test_a_folder_without_the_newer_options_in_its_metadata(tmp_path, corpus, tokenizer_dir):
    """It counts as made with --allow_special_tokens: the same command accepts it, another one
    refuses it, and it can be trained on."""
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized", "--allow_special_tokens")
    metadata = json.loads((out / "metadata.json").read_text())
    for option in ("allow_special_tokens", "skip_bad_files"):
        del metadata[option]
    (out / "metadata.json").write_text(json.dumps(metadata))
    before = (out / "train.arrow").stat().st_mtime_ns
    tokenize(corpus, tokenizer_dir, out, "--allow_special_tokens")
    assert (out / "train.arrow").stat().st_mtime_ns == before
    message = "was made with allow_special_tokens True, not False; choose another --output_dir"
    with pytest.raises(DataError, match=message):
        tokenize(corpus, tokenizer_dir, out)
    assert open_chunks(str(chunk(out, 16, tmp_path)), 16, tokenizer_fingerprint(load_tokenizer(tokenizer_dir))).train


def test_a_tokenizer_that_can_encode_a_name_only_as_the_control_token(tmp_path, corpus):
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "x": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="?")
    words.save_pretrained(tmp_path / "words")
    message = "--tokenizer: has no encoding of the text '<eos>' but the control token; use --allow_special_tokens"
    with pytest.raises(DataError, match=message):
        tokenize(corpus, str(tmp_path / "words"), tmp_path / "out")
    tokenize(corpus, str(tmp_path / "words"), tmp_path / "out", "--allow_special_tokens")


def test_long_documents_give_no_warning(tmp_path, corpus, control_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    out = tokenize(corpus, control_tokenizer, tmp_path / "out", holdout=0)
    assert len(ids_of(out, "train")) > 1000 and not said


@pytest.mark.parametrize("kind", ["files", "table", "one large file", "large files"])
@pytest.mark.parametrize("max_tokens, holdout", [(700, 0.1), (1001, 0.01), (333, 0.25), (64, 0.0)])
def test_max_tokens_is_exact(tmp_path, corpus, tokenizer_dir, monkeypatch, capsys, kind, max_tokens, holdout):
    """In both splits; all but the last document of a split are complete, none is in both, and a cut
    document is reported."""
    if kind == "table":
        corpus = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    elif "large" in kind:
        monkeypatch.setattr("runtime.corpora.PIECE", 100)
        corpus = tmp_path / "large"
        corpus.mkdir()
        files = 1 if "one" in kind else 4
        for i in range(files):
            (corpus / f"{i}.txt").write_text("".join(DOCUMENTS[i::files]))
    results = []
    for batch_size in (3, 256):
        out = tmp_path / str(batch_size)
        tokenize(corpus, tokenizer_dir, out, holdout=holdout, max_tokens=max_tokens, batch_size=batch_size)
        results.append((ids_of(out, "train"), ids_of(out, "heldout") if holdout else []))
    assert results[0] == results[1]
    train, heldout = results[0]
    assert len(heldout) == round(max_tokens * holdout)
    assert len(train) == max_tokens - len(heldout)
    tokenizer = load_tokenizer(tokenizer_dir)
    said = capsys.readouterr().out
    *complete, last = tokenizer.decode(train).split(tokenizer.eos_token)
    assert bool(last) == ("--max_tokens: the last document of the train part is cut, its rest is dropped" in said)
    if "large" not in kind:
        *held, last_held = tokenizer.decode(heldout).split(tokenizer.eos_token)
        assert complete and not set(complete) & set(held)
        assert set(complete + held) <= set(DOCUMENTS)
        for beginning in (last, last_held):
            assert any(text.startswith(beginning) for text in DOCUMENTS)


def test_a_corpus_smaller_than_max_tokens(tmp_path, corpus, tokenizer_dir, capsys):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "out", max_tokens="1_000_000")
    total = len(ids_of(out, "train")) + len(ids_of(out, "heldout"))
    assert f"--max_tokens: the corpus has no more than {total:,} of 1,000,000 tokens" in capsys.readouterr().out


def test_a_hub_dataset_is_checked_as_local_tables_are(tmp_path, tokenizer_dir, monkeypatch, capsys):
    rows = [{"text": None if i == 3 else text, "id": i} for i, text in enumerate(DOCUMENTS)]
    hub = Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: hub)
    out = tokenize("owner/name", tokenizer_dir, tmp_path / "out", holdout=0, remove_columns="id")
    assert texts_of(out, "train", load_tokenizer(tokenizer_dir)) == DOCUMENTS[:3] + DOCUMENTS[4:] + [""]
    assert "corpus: left out 1 rows without text (row 4 of --dataset_name: owner/name)" in capsys.readouterr().out
    with pytest.raises(DataError, match="--dataset_name: owner/name: row 1, column 'id': is of type int, not text"):
        tokenize("owner/name", tokenizer_dir, tmp_path / "other", "--skip_bad_files", text_field="id")

    def broken():
        yield from rows[:5]
        raise ConnectionResetError("the hub is gone")

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: broken())
    message = r"--dataset_name: owner/name: the hub's split train broke off \(the hub is gone\)"
    with pytest.raises(DataError, match=message):
        tokenize("owner/name", tokenizer_dir, tmp_path / "broken", "--skip_bad_files")
    assert not (tmp_path / "broken").exists()


def test_a_corpus_that_is_mostly_its_first_document_is_refused(tmp_path, tokenizer_dir):
    table = write_jsonl(tmp_path / "table.jsonl", ["".join(DOCUMENTS), *DOCUMENTS[:3]])
    message = "--holdout: 0.01 would hold out 9.% of .*table.jsonl, whose first document is most of it"
    with pytest.raises(DataError, match=message):
        tokenize(table, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options(tmp_path, corpus, tokenizer_dir):
    cut = tokenize(corpus, tokenizer_dir, tmp_path / "cut", max_length=5)
    assert max(map(len, rows_of(cut, "train"))) == 6  # 5 and EOS
    few = tokenize(corpus, tokenizer_dir, tmp_path / "few", max_tokens=200)
    assert (len(ids_of(few, "train")), len(ids_of(few, "heldout"))) == (198, 2)
    wide = chunk(cut, 16, tmp_path, dtype="int64")
    assert open_split(wide, "train").features["input_ids"].feature.dtype == "int64"


def test_the_same_command_does_nothing_again_and_another_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    out = tokenize(corpus, tokenizer_dir, tmp_path / "tokenized")
    before = (out / "train.arrow").stat().st_mtime_ns
    tokenize(corpus, tokenizer_dir, out)
    assert "already exists" in capsys.readouterr().out and (out / "train.arrow").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="max_length None, not 9"):
        tokenize(corpus, tokenizer_dir, out, max_length=9)
    (corpus / "new.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="corpus"):
        tokenize(corpus, tokenizer_dir, out)
    save_tokenizer(tmp_path / "other", extra="zzz")
    with pytest.raises(DataError, match="tokenized: was made with"):
        tokenize(corpus, str(tmp_path / "other"), out)
    folder = chunk(out, 16, tmp_path)
    with pytest.raises(DataError, match="dtype"):
        chunk(out, 16, tmp_path, dtype="int32")
    with pytest.raises(DataError, match="16 tokens, but train.train_seq_len is 32"):
        open_chunks(str(folder), 32)
    with pytest.raises(DataError, match="not the teacher's"):
        open_chunks(str(folder), 16, "another")
    with pytest.raises(DataError, match="tokenized holds no chunks; cut its documents with preprocess_chunk.py"):
        open_chunks(str(out))
    assert open_chunks(str(folder)).metadata["context_length"] == 16


def test_the_fingerprint_depends_on_the_content_only(tmp_path, tokenizer_dir):
    for name, extra in (("same", None), ("other", "zzz")):
        save_tokenizer(tmp_path / name, extra=extra)
    folders = (tokenizer_dir, str(tmp_path / "same"), str(tmp_path / "other"))
    first, same, other = (tokenizer_fingerprint(load_tokenizer(folder)) for folder in folders)
    assert first == same != other


BAD = {
    "no/such/corpus/here": "no/such/corpus/here does not exist",
    "missing.jsonl": "missing.jsonl does not exist",
}


@pytest.mark.parametrize("name", BAD)
def test_a_missing_corpus_is_named(tmp_path, tokenizer_dir, name):
    with pytest.raises(DataError, match=BAD[name]):
        tokenize(name, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_no_output(tmp_path, corpus, tokenizer_dir):
    table = tmp_path / "table.jsonl"
    table.write_text('{"content": "x"}\n')
    (tmp_path / "empty").mkdir()
    no_column = "table.jsonl: has no column 'text', only content; name the one that holds the text by --text_field"
    cases = [
        (table, {}, no_column),
        (tmp_path / "empty", {}, "empty holds no files"),
        (corpus, {"holdout": 1.5}, "--holdout: 1.5"),
        (corpus, {"max_tokens": 0}, "--max_tokens: 0"),
        (corpus, {"max_tokens": 1}, "--max_tokens: 1 leaves nothing to train on beside --holdout 0.01"),
    ]
    for source, values, message in cases:
        with pytest.raises(DataError, match=message):
            tokenize(source, tokenizer_dir, tmp_path / "out", **values)
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
    message = "data.cache_dir: .*nowhere: no such folder; make it with preprocess_chunk.py"
    with pytest.raises(DataError, match=message):
        open_chunks(str(tmp_path / "nowhere"), 16)

"""Chunks record where documents begin; packing loses and repeats nothing, and wastes at most 1 %."""

import json

from runtime.data import (
    DataError,
    collate,
    open_chunks,
    read_batch,
    split_batch,
)
from runtime.packing import packer_of

import numpy
import pytest
import torch
from conftest import options
from datasets import Dataset, Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter

import preprocess_chunk

EOS = 0


def documents(sizes, seed=0):
    """Documents of these numbers of tokens; every token but EOS is unique, so that it can be traced."""
    ids = numpy.random.default_rng(seed).permutation(sum(sizes)) + 1
    parts = numpy.split(ids, numpy.cumsum(sizes)[:-1])
    for part in parts:
        part[-1] = EOS
    return parts


def pack(packing, length, rows, batch=3):
    """[(chunk's ids, its documents)] of rows that come in batches."""
    packer = packer_of(packing, length, EOS)
    found = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        found.append(packer.add(numpy.concatenate(part), numpy.array([len(row) for row in part])))
    found.append(packer.finish())
    chunks = []
    for rows in found:
        for ids, lengths in zip(rows.get("input_ids", ()), rows.get("document_lengths", ()), strict=True):
            assert len(ids) == length and lengths.min() > 0
            chunks.append((ids, numpy.split(ids, lengths.cumsum())[:-1]))
    return chunks


def test_cut_chunks_record_where_documents_begin():
    """Rows that do not end with EOS go on in the next row; the borders are those of a loop over the
    tokens."""
    texts = documents([1, 5, 40, 2, 3, 16, 16, 32, 1, 1, 9, 14])
    rows = [part for text in texts for part in numpy.array_split(text, 1 + len(text) // 10)]
    stream = numpy.concatenate(texts)
    chunks = pack("cut", 16, rows)
    assert len(chunks) == len(stream) // 16
    for i, (ids, found) in enumerate(chunks):
        assert numpy.array_equal(ids, stream[16 * i : 16 * (i + 1)])
        expected = [[]]
        for token in ids:
            expected[-1].append(token)
            if token == EOS:
                expected.append([])
        assert [list(part) for part in found] == [part for part in expected if part]


@pytest.mark.parametrize("length", [100, 1000])
def test_fit_keeps_documents_whole_and_wastes_little(length):
    sizes = numpy.random.default_rng(length).lognormal(4.5, 1.2, 400).astype(int) + 1
    texts = documents(sizes)
    place = {token: (i, at) for i, text in enumerate(texts) for at, token in enumerate(text[:-1])}
    chunks = pack("fit", length, texts)
    seen = []
    for ids, parts in chunks:
        padding = ids[sum(map(len, parts)) :]
        assert len(padding) <= 0.01 * length and not padding.any()
        for part in parts:
            real = part[part != EOS]
            if len(real):  # in order, of one document
                text, at = place[real[0]]
                assert numpy.array_equal(texts[text][at : at + len(part)], part)
            seen += list(real)
    assert len(set(seen)) == len(seen)  # nothing twice
    total = sum(len(text) - 1 for text in texts)
    assert total - len(seen) < length  # no more than a chunk is dropped at the end
    whole = {tuple(part) for _, parts in chunks for part in parts}
    short = [text for text in texts if len(text) <= length]
    assert sum(tuple(text) in whole for text in short) > 0.95 * len(short)


def test_fit_fills_gaps_that_no_document_fits():
    """Documents of 60 of 100 tokens: a chunk takes one and the beginning of another."""
    chunks = pack("fit", 100, documents([60] * 10))
    assert [[len(part) for part in parts] for _, parts in chunks][0] == [60, 40]
    assert len(chunks) == 6


@pytest.mark.parametrize("packing", ["cut", "fit"])
def test_the_loss_mask_goes_with_its_tokens(packing):
    """Learned are multiples of 3, EOS among them; padding is not."""
    rows = documents(numpy.random.default_rng(0).integers(1, 150, 90))
    packer = packer_of(packing, 100, EOS)
    parts = []
    for start in range(0, len(rows), 7):
        ids = numpy.concatenate(rows[start : start + 7])
        parts.append(packer.add(ids, numpy.array([len(row) for row in rows[start : start + 7]]), ids % 3 == 0))
    parts.append(packer.finish())
    count = padding = 0
    for part in parts:
        columns = (part.get(name, ()) for name in ("input_ids", "loss_mask", "document_lengths"))
        for ids, learned, lengths in zip(*columns, strict=True):
            text = lengths.sum()
            assert learned.dtype == bool and numpy.array_equal(learned[:text], ids[:text] % 3 == 0)
            assert not learned[text:].any()
            count += 1
            padding += len(ids) - text
    assert count > 50 and (padding > 0) == (packing == "fit")


@pytest.fixture
def tokenized(tmp_path):
    """A folder as preprocess_download_tokenize.py writes it, of documents of many sizes."""
    folder = tmp_path / "tokenized"
    folder.mkdir()
    counts = {}
    for seed, (split, number) in enumerate({"train": 60, "heldout": 20}.items()):
        sizes = numpy.random.default_rng(seed).integers(1, 50, number)
        writer = ArrowWriter(
            features=Features({"input_ids": Sequence(Value("int32"))}), path=str(folder / f"{split}.arrow")
        )
        writer.write_batch({"input_ids": [text % 90 + (text > 0) for text in documents(sizes, seed)]})
        writer.finalize()
        counts[split] = {"documents": number, "tokens": int(sizes.sum())}
    key = dict(kind="tokenized", tokenizer_fingerprint="a", tokenizer="t", vocab_size=96, eos_token_id=EOS)
    (folder / "metadata.json").write_text(json.dumps(key | counts))
    return folder


def chunk(tokenized, output, **more):
    preprocess_chunk.main(options(tokenized_dataset_path=tokenized, context_length=32, output_dir=output, **more))
    return output / "chunked_context32"


@pytest.mark.parametrize("packing", ["cut", "fit"])
def test_batches_say_which_document_a_token_is_of(tmp_path, tokenized, packing, capsys):
    folder = chunk(tokenized, tmp_path / "data", packing=packing)
    assert ("padding" in capsys.readouterr().out) == (packing == "fit")
    chunks = open_chunks(str(folder), 32, document_mask="auto")
    metadata = chunks.metadata
    assert metadata["packing"] == packing
    for split, dataset in (("train", chunks.train), ("heldout", chunks.heldout)):
        batch = read_batch(dataset, range(len(dataset)))
        ids, groups = batch["input_ids"], batch["document_ids"]
        assert ids.dtype == torch.int64 and groups.dtype == torch.int32
        assert int((groups == -1).sum()) == metadata["padding"][split]
        assert sum(int(row.max()) + 1 for row in groups) == metadata["documents_in_chunks"][split]
        for row, row_groups, lengths in zip(ids, groups, dataset["document_lengths"]):
            expected = [i for i, length in enumerate(lengths) for _ in range(length)]
            assert row_groups.tolist() == expected + [-1] * (32 - len(expected))
            if packing == "cut":  # a document ends where EOS is
                assert torch.equal(row_groups[1:] - row_groups[:-1], (row[:-1] == EOS).int())
    parts = split_batch(batch, 3)
    assert sum(len(part["input_ids"]) for part in parts) == len(ids)
    for name in batch:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    again = collate([chunks.train.with_format("numpy")[i] for i in (2, 5)])
    assert all(torch.equal(again[name], value) for name, value in read_batch(chunks.train, [2, 5]).items())


def test_the_document_mask_can_be_left_out(tmp_path, tokenized):
    folder = str(chunk(tokenized, tmp_path / "data"))
    for wanted, names in ((True, 2), ("auto", 2), (False, 1)):
        chunks = open_chunks(folder, document_mask=wanted)
        assert len(chunks.train.column_names) == len(chunks.heldout.column_names) == names


def test_chunks_of_older_versions_have_no_document_mask(tmp_path, tokenized, capsys):
    """They train as before, the same command finds them done, and asking for the mask says how to
    get it."""
    folder = chunk(tokenized, tmp_path / "data")
    metadata = json.loads((folder / "metadata.json").read_text())
    for name in ("packing", "documents_in_chunks", "padding"):
        del metadata[name]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    for split in ("train", "heldout"):
        file = folder / f"{split}.arrow"
        features = Features({"input_ids": Sequence(Value("uint16"), length=32)})
        writer = ArrowWriter(features=features, path=str(tmp_path / split))
        writer.write_batch({"input_ids": Dataset.from_file(str(file))["input_ids"][:]})
        writer.finalize()
        (tmp_path / split).replace(file)
    for wanted in ("auto", False):
        assert set(read_batch(open_chunks(str(folder), document_mask=wanted).train, [0])) == {"input_ids"}
    with pytest.raises(
        DataError, match="data.document_mask: true, but .*train.arrow does not record .*preprocess_chunk"
    ):
        open_chunks(str(folder), document_mask=True)
    capsys.readouterr()
    chunk(tokenized, tmp_path / "data")
    assert "for data.document_mask, remove it" in capsys.readouterr().out
    with pytest.raises(DataError, match="was made with packing 'cut', not 'fit'"):
        chunk(tokenized, tmp_path / "data", packing="fit")


@pytest.mark.parametrize("lengths", [[20, 13], [], [5, 0, 5], [40, -8]])
def test_document_lengths_that_do_not_fit_are_refused(tmp_path, tokenized, lengths):
    folder = chunk(tokenized, tmp_path / "data")
    dataset = Dataset.from_file(str(folder / "heldout.arrow"))
    rows = dataset[:]
    rows["document_lengths"][3] = lengths
    writer = ArrowWriter(features=dataset.features, path=str(tmp_path / "new"))
    writer.write_batch(rows)
    writer.finalize()
    (tmp_path / "new").replace(folder / "heldout.arrow")
    with pytest.raises(DataError, match="heldout.arrow: row 3 of document_lengths does not fit a chunk of 32 tokens"):
        open_chunks(str(folder), document_mask="auto")
    assert open_chunks(str(folder), document_mask=False).heldout.num_rows == len(dataset)


def test_packing_is_for_documents(tmp_path):
    with pytest.raises(DataError, match="--packing: is for documents"):
        preprocess_chunk.main(options(adopt=tmp_path, tokenizer="t", output_dir=tmp_path / "data", packing="fit"))

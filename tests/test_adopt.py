"""Chunk folders that `datasets` saved are adopted if they are valid and made by the tokenizer; else
one line says why not."""

import argparse
import hashlib
import inspect
import json
from pydoc_data.topics import topics

from runtime.data import DataError, load_tokenizer, open_chunks, tokenizer_fingerprint

import numpy
import pyarrow
import pytest
from conftest import options, random_teacher, save_tokenizer, write_config
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import preprocess_chunk
import train

LENGTH = 32
CODE = inspect.getsource(argparse)[:40_000]
PROSE = "\n".join(topics.values())[:40_000]  # Python's manual


def trained_tokenizer(folder, text, vocab_size=1000):
    """Saves a byte-level BPE tokenizer that was trained on `text`, with an EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two with the same vocabulary size and alphabet: {name: folder}."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = {"code": CODE, "prose": PROSE}
    return {name: trained_tokenizer(folder / name, text) for name, text in texts.items()}


def chunk_rows(tokenizer_dir, text=CODE, length=LENGTH):
    """[chunks, length], without EOS."""
    ids = load_tokenizer(tokenizer_dir)(text)["input_ids"]
    return numpy.array(ids[: len(ids) // length * length]).reshape(-1, length)


def save_as_hybrid_distillation(folder, rows, dtype="uint32"):
    """Saves rows as its preprocess_chunk.py does: one column of fixed-size lists."""
    flat = pyarrow.array(rows.flatten(), type=pyarrow.type_for_alias(dtype))
    lists = pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    Dataset(pyarrow.Table.from_arrays([lists], names=["input_ids"])).save_to_disk(folder)
    return folder


def contents(folder):
    """{file: (hash, time of its last change)}"""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[str(file.relative_to(folder))] = (digest, file.stat().st_mtime_ns)
    return found


def adopt(source, tokenizer_dir, output, **values):
    preprocess_chunk.main(options(adopt=source, tokenizer=tokenizer_dir, output_dir=output, **values))
    return str(output / f"chunked_context{LENGTH}")


def all_rows(chunks):
    rows = chunks.train["input_ids"][:]
    if chunks.heldout is not None:
        rows += chunks.heldout["input_ids"][:]
    return rows


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_chunks_are_adopted_unchanged(tmp_path, tokenizers, capsys, dtype):
    rows = chunk_rows(tokenizers["code"])
    source = save_as_hybrid_distillation(tmp_path / "data_cache" / f"chunked_context{LENGTH}", rows, dtype)
    before = contents(source)
    folder = adopt(source, tokenizers["code"], tmp_path / "data", holdout=0.1)
    assert contents(source) == before
    tokenizer = load_tokenizer(tokenizers["code"])
    chunks = open_chunks(folder, LENGTH, tokenizer_fingerprint(tokenizer))
    assert all_rows(chunks) == rows.tolist()
    assert len(chunks.heldout) == round(0.1 * len(rows))
    assert chunks.metadata["vocab_size"] == len(tokenizer) and chunks.metadata["eos_tokens"] == 0
    assert chunks.metadata["eos_token_id"] == tokenizer.eos_token_id
    assert "holds no EOS (<eos>): nothing says where a document ends" in capsys.readouterr().err
    adopt(source, tokenizers["code"], tmp_path / "data", holdout=0.1)
    assert "already exists" in capsys.readouterr().out
    with pytest.raises(DataError, match="was made with holdout 0.1, not 0.2"):
        adopt(source, tokenizers["code"], tmp_path / "data", holdout=0.2)
    save_as_hybrid_distillation(source, rows[1:], dtype)
    with pytest.raises(DataError, match="was made with corpus 'adopted-.*', not 'adopted-"):
        adopt(source, tokenizers["code"], tmp_path / "data", holdout=0.1)


def test_folders_of_older_versions_of_datasets_are_read(tmp_path, tokenizers):
    """Written here as datasets 3 does: lists are of the type Sequence, in several shards."""
    rows = chunk_rows(tokenizers["code"])
    values = {"dtype": "uint32", "_type": "Value"}
    features = {"input_ids": {"feature": values, "length": LENGTH, "_type": "Sequence"}}
    schema = pyarrow.schema(
        [("input_ids", pyarrow.list_(pyarrow.uint32(), LENGTH))],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    source = tmp_path / "source"
    source.mkdir()
    shards = [f"data-{i:05}-of-00003.arrow" for i in range(3)]
    for shard, part in zip(shards, numpy.array_split(rows, 3)):
        flat = pyarrow.array(part.flatten(), type=pyarrow.uint32())
        with pyarrow.ipc.new_stream(source / shard, schema) as stream:
            lists = pyarrow.FixedSizeListArray.from_arrays(flat, LENGTH)
            stream.write_batch(pyarrow.record_batch([lists], schema=schema))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state = {
        "_data_files": [{"filename": shard} for shard in shards],
        "_fingerprint": "0123456789abcdef",
        "_split": None,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
    }
    (source / "dataset_info.json").write_text(json.dumps(info))
    (source / "state.json").write_text(json.dumps(state))
    assert all_rows(open_chunks(adopt(source, tokenizers["code"], tmp_path / "data"), LENGTH)) == rows.tolist()


def test_a_heldout_split_is_used_and_ignored_columns_are_reported(tmp_path, tokenizers, capsys):
    rows = chunk_rows(tokenizers["code"]).tolist()
    rows[3][5] = load_tokenizer(tokenizers["code"]).eos_token_id
    masks = [[1] * LENGTH] * 90
    splits = {
        "train": Dataset.from_dict({"input_ids": rows[:90], "labels": rows[:90], "attention_mask": masks}),
        "validation": Dataset.from_dict({"input_ids": rows[90:95]}),
        "extra": Dataset.from_dict({"input_ids": rows[95:]}),
    }
    DatasetDict(splits).save_to_disk(tmp_path / "source")
    chunks = open_chunks(adopt(tmp_path / "source", tokenizers["code"], tmp_path / "data"), LENGTH)
    assert chunks.train["input_ids"][:] == rows[:90] and chunks.heldout["input_ids"][:] == rows[90:95]
    shown = capsys.readouterr().err
    assert "ignored: split extra, column labels of train" in shown and "holds no EOS" not in shown
    message = "--holdout: .* has its own split to hold out, validation; leave --holdout out"
    with pytest.raises(DataError, match=message):
        adopt(tmp_path / "source", tokenizers["code"], tmp_path / "other", holdout=0.1)


@pytest.mark.parametrize("made_by, named", [("code", "prose"), ("prose", "code")])
@pytest.mark.parametrize("text", [CODE, PROSE])
def test_another_tokenizer_of_the_same_size_is_refused(tmp_path, tokenizers, made_by, named, text):
    source = save_as_hybrid_distillation(tmp_path / "source", chunk_rows(tokenizers[made_by], text))
    message = f"--tokenizer: .*{named} did not make .*source: .* reproduces .* tokens, with the right one at least 95%"
    with pytest.raises(DataError, match=message):
        adopt(source, tokenizers[named], tmp_path / "data")
    assert not any((tmp_path / "data").rglob("*"))
    open_chunks(adopt(source, tokenizers[made_by], tmp_path / "data"), LENGTH)


def test_short_documents_with_eos_are_recognised_as_the_tokenizers(tmp_path, tokenizers):
    tokenizer = load_tokenizer(tokenizers["code"])
    ids = []
    for line in CODE.splitlines():
        ids += [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
    rows = numpy.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    source = save_as_hybrid_distillation(tmp_path / "source", rows)
    folder = adopt(source, tokenizers["code"], tmp_path / "data", holdout=0)
    assert all_rows(open_chunks(folder, LENGTH)) == rows.tolist()


def test_a_tokenizer_that_reproduces_any_ids_gives_a_warning(tmp_path, capsys):
    """Here one whose tokens are single characters."""
    save_tokenizer(tmp_path / "characters")
    source = save_as_hybrid_distillation(tmp_path / "source", chunk_rows(tmp_path / "characters"))
    adopt(source, tmp_path / "characters", tmp_path / "data")
    assert "characters reproduces any ids, even in random order" in capsys.readouterr().err


def broken(rows, kind):
    """Rows with one fault, as a dataset."""
    column = "tokens" if kind == "column" else "input_ids"
    rows = rows.tolist()
    if kind == "length":
        rows[7] = rows[7][:-1]
    elif kind == "large":
        rows[7][3] = 1000
    elif kind == "negative":
        rows[7][3] = -100
    elif kind == "null":
        rows[7][3] = None
    elif kind == "empty row":
        rows[7] = None
    elif kind == "text":
        rows = [["a"] * LENGTH for _ in rows]
    elif kind == "flat":
        rows = [row[0] for row in rows]
    elif kind == "padded":
        mask = [[1] * LENGTH for _ in rows]
        mask[7][-1] = 0
        return Dataset.from_dict({"input_ids": rows, "attention_mask": mask})
    elif kind == "nothing":
        rows = []
    return Dataset.from_dict({column: rows})


BROKEN = {
    "length": "source: row 7 of train has 31 values in input_ids, not 32; make the chunks again",
    "large": "row 7 of train holds the id 1000, which is none of the tokenizer's, 0 to 999; name in --tokenizer",
    "negative": "row 7 of train holds the id -100",
    "null": "row 7 of train has a null in input_ids",
    "empty row": "row 7 of train has 0 values in input_ids, not 32",
    "text": "has input_ids of type .* in train; it must be lists of integers",
    "flat": "has input_ids of type int32 in train",
    "padded": r"row 7 of train is padded \(its attention_mask has a 0\)",
    "column": "has no column input_ids in train, only tokens",
    "nothing": "source does not open .*; copy it again, or make the chunks again",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_chunks_are_refused_with_their_row(tmp_path, tokenizers, kind):
    broken(chunk_rows(tokenizers["code"]), kind).save_to_disk(tmp_path / "source")
    with pytest.raises(DataError, match=BROKEN[kind]) as error:
        adopt(tmp_path / "source", tokenizers["code"], tmp_path / "data")
    assert "\n" not in str(error.value) and not any((tmp_path / "data").rglob("*"))


def test_unsuitable_folders_and_options_are_refused(tmp_path, tokenizers):
    tokenizer = tokenizers["code"]
    rows = chunk_rows(tokenizer)
    source = save_as_hybrid_distillation(tmp_path / f"chunked_context{LENGTH}", rows)
    folder = adopt(source, tokenizer, tmp_path / "data")
    DatasetDict({"all": load_from_disk(source)}).save_to_disk(tmp_path / "all")
    (tmp_path / "plain").mkdir()
    cut_short = save_as_hybrid_distillation(tmp_path / "cut_short", rows)
    arrow = next(cut_short.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:1000])
    cases = [
        (folder, {}, "--adopt: .* holds a metadata.json: it needs no adoption"),
        (tmp_path / "plain", {}, "--adopt: .*plain is no folder of datasets' save_to_disk"),
        (tmp_path / "nowhere", {}, "--adopt: .*nowhere is no folder of datasets' save_to_disk"),
        (tmp_path / "all", {}, "has no split named train, only all"),
        (cut_short, {}, "--adopt: .*cut_short does not open"),
        (source, {"context_length": 64}, "--context_length: 64, but .* has rows of 32"),
        (source, {"holdout": 1.0}, "--holdout: 1.0 must be a share"),
        (source, {"holdout": 0.999}, "leaves none to train on; use --holdout 0"),
    ]
    for path, values, message in cases:
        with pytest.raises(DataError, match=message):
            adopt(path, tokenizer, tmp_path / "out", **values)
    for output in (tmp_path, source):
        with pytest.raises(DataError, match="is, or is in, the folder to be adopted; name another"):
            adopt(source, tokenizer, output)
    with pytest.raises(DataError, match="--adopt: needs --tokenizer"):
        preprocess_chunk.main(options(adopt=source, output_dir=tmp_path / "out"))
    tokens = options(tokenized_dataset_path="x", output_dir="y")
    with pytest.raises(DataError, match="--tokenizer, --holdout: are for --adopt"):
        preprocess_chunk.main([*tokens, "--context_length", "8", "--holdout", "0"])
    with pytest.raises(DataError, match="--context_length: missing"):
        preprocess_chunk.main(tokens)
    assert not (tmp_path / "out").exists()


def test_naming_a_saved_folder_shows_the_command_that_adopts_it(tmp_path, tokenizers):
    source = save_as_hybrid_distillation(tmp_path / "source", chunk_rows(tokenizers["code"]))
    command = "python preprocess_chunk.py --adopt .*source --tokenizer TEACHER --output_dir DIR"
    with pytest.raises(DataError, match=f"data.cache_dir: .*source: holds no readable metadata.json; .*: {command}"):
        open_chunks(str(source), LENGTH)
    tokens = options(tokenized_dataset_path=source, context_length=8, output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="--tokenized_dataset_path: .* it has no EOS between documents: make"):
        preprocess_chunk.main(tokens)


def test_a_run_trains_on_adopted_chunks(tmp_path, tokenizers):
    """What train.py checks before it starts: the folder, the tokenizer, the counts."""
    random_teacher(tmp_path / "teacher", vocab_size=1000)
    load_tokenizer(tokenizers["code"]).save_pretrained(tmp_path / "teacher")
    source = save_as_hybrid_distillation(tmp_path / "source", chunk_rows(tokenizers["code"]))
    folder = adopt(source, tmp_path / "teacher", tmp_path / "data")
    file = write_config(tmp_path, 1, str(tmp_path / "teacher"), folder)
    ctx = train.prepare(train.parse_args(["--cfg", str(file)]))
    plan, chunks = ctx.plan, ctx.chunks
    rows = chunk_rows(tokenizers["code"]).tolist()
    assert chunks.metadata["num_chunks"] + chunks.metadata["heldout_chunks"] == len(rows)
    assert plan.steps == 4 and chunks.train["input_ids"][:] == rows[: len(chunks.train)] and chunks.heldout

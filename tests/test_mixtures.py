"""Mixtures keep their shares, and an interrupted or parallel run gives the result of an undisturbed
one."""

import itertools
import json
import random
import re
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

from runtime import encoding, mixtures
from runtime.data import DataError, data_fingerprint, load_tokenizer, open_split, read_metadata

import pytest
from conftest import options, save_tokenizer
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import preprocess_download_tokenize as tokenize_script
from recall_tasks import copying, documents

WORDS = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def corpora(tmp_path):
    """Three tables whose documents, of different lengths, name their table and number."""
    files = []
    for number, word in enumerate(WORDS):
        rows = [{"text": f"{word} {i} " + "x" * (i * (7 + number) % 50)} for i in range(200)]
        file = tmp_path / f"{word}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(file)
    return files


def tokenize(source, tokenizer_dir, output, *more, **values):
    source = ["--mix", *source] if isinstance(source, list) else ["--dataset_name", str(source)]
    paths = options(tokenizer=tokenizer_dir, output_dir=output)
    tokenize_script.main([*source, *paths, *options(**values), *more])
    return output


def rows_of(folder):
    return {split: open_split(folder, split)["input_ids"][:] for split in ("train", "heldout")}


def texts_of(folder, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    return [tokenizer.decode(row) for row in rows_of(folder)["train"]]


def test_shares_are_kept_at_every_moment(tmp_path, corpora, tokenizer_dir, capsys):
    shares = (0.6, 0.3, 0.1)
    mix = [f"{file}:{share}" for file, share in zip(corpora, shares)]
    out = tokenize(mix, tokenizer_dir, tmp_path / "out", max_tokens=4000, holdout=0)
    taken = dict.fromkeys(WORDS, 0)
    numbers = {word: [] for word in WORDS}
    for text, ids in zip(texts_of(out, tokenizer_dir), rows_of(out)["train"]):
        word, number, _ = text.split(" ", 2)
        taken[word] += len(ids)
        numbers[word].append(int(number))
        for share, word in zip(shares, WORDS):
            assert abs(taken[word] - share * sum(taken.values())) < 70  # the longest document
    assert sum(taken.values()) == 4000
    assert all(found == list(range(len(found))) for found in numbers.values())
    metadata = read_metadata(out)
    assert [part["tokens"] for part in metadata["mixture"]] == list(taken.values())
    assert [share for _, share in metadata["corpus"]] == list(shares)
    assert "mixture: " in capsys.readouterr().out
    again = tokenize(mix, tokenizer_dir, tmp_path / "again", max_tokens=4000, holdout=0)
    assert rows_of(again) == rows_of(out)
    assert data_fingerprint(metadata) == data_fingerprint(read_metadata(again))
    with pytest.raises(DataError, match="out: was made with corpus"):
        tokenize([mix[0][:-3] + "0.5", mix[1][:-3] + "0.4", mix[2]], tokenizer_dir, out, max_tokens=4000, holdout=0)


def test_a_mixture_ends_with_the_first_corpus_that_does(tmp_path, corpora, tokenizer_dir, capsys):
    mix = [f"{corpora[0]}:0.1", "synthetic:copying:0.9"]
    corpora[0].write_text("".join(json.dumps({"text": f"alpha {i}"}) + "\n" for i in range(20)))
    out = tokenize(mix, tokenizer_dir, tmp_path / "out", holdout=0)
    assert f"--mix: ends with {corpora[0]}, which has no more text" in capsys.readouterr().out
    texts = texts_of(out, tokenizer_dir)
    made = [document.text.replace("?", "") + "<eos>" for document in itertools.islice(documents(copying), 9)]
    assert [text for text in texts if "alpha" in text] == [f"alpha {i}<eos>" for i in range(20)]
    assert [text for text in texts if "copy" in text] == made[:3]


def test_bad_mixtures_are_one_line(tmp_path, corpora, tokenizer_dir):
    a, b, _ = map(str, corpora)
    cases = [
        ([f"{a}:0.7", f"{b}:0.2"], "--mix: the shares sum to 0.9, not 1; correct them"),
        ([f"{a}:0.5", f"{a}:0.5"], "--mix: .*alpha.jsonl is named twice"),
        ([a], "--mix: .* must be NAME:SHARE with a share above 0 and at most 1, as a.jsonl:0.7"),
        ([f"{a}:-1", f"{b}:2"], "--mix: .*alpha.jsonl:-1 must be NAME:SHARE"),
        ([f"{a}:0.5", "synthetic:recal:0.5"], "--mix: synthetic:recal is unknown; choose synthetic:recall, synth"),
        (["synthetic:recall:1"], "--mix: synthetic text has no end; give --max_tokens"),
        ([f"{a}:0.5", "missing.jsonl:0.5"], "--mix: missing.jsonl does not exist"),
    ]
    for mix, message in cases:
        with pytest.raises(DataError, match=message):
            tokenize(mix, tokenizer_dir, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_interrupted_mixture_resumes_to_the_same_data(tmp_path, corpora, tokenizer_dir, monkeypatch, capsys):
    """At every document: the files on disk may be longer than the last state says."""
    mix = [f"{corpora[0]}:0.5", f"{corpora[1]}:0.3", "synthetic:recall:0.2"]
    values = {"max_tokens": 3000, "holdout": 0.2, "batch_size": 3}
    whole = tokenize(mix, tokenizer_dir, tmp_path / "whole", **values)
    monkeypatch.setattr(mixtures, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(mixtures, "WRITE_TOKENS", 150)
    take = mixtures.Source.take
    calls = itertools.count()

    def killed(source, splits):
        if next(calls) % 25 == 24:
            raise KeyboardInterrupt
        return take(source, splits)

    monkeypatch.setattr(mixtures.Source, "take", killed)
    starts = 0
    while True:
        starts += 1
        try:
            tokenize(mix, tokenizer_dir, tmp_path / "parts", **values)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "parts").exists()
    assert starts > 2 and "parts: resuming after " in capsys.readouterr().out
    assert rows_of(tmp_path / "parts") == rows_of(whole)
    assert read_metadata(tmp_path / "parts") == read_metadata(whole)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        "heldout.arrow",
        "metadata.json",
        "train.arrow",
    ]


def test_the_state_of_another_command_is_not_resumed(tmp_path, corpora, tokenizer_dir, monkeypatch, capsys):
    monkeypatch.setattr(mixtures, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(mixtures, "WRITE_TOKENS", 100)
    hub = [{"text": f"row {i} " + "y" * (i % 30)} for i in range(60)]
    broken = {"at": 40}

    def rows(*_, **__):
        yield from hub[: broken["at"]]
        if broken["at"] < 60:
            raise ConnectionResetError("gone")

    monkeypatch.setattr("datasets.load_dataset", rows)
    with pytest.raises(DataError, match="broke off"):
        tokenize("owner/name", tokenizer_dir, tmp_path / "out", batch_size=4)
    broken["at"] = 60
    tokenize("owner/name", tokenizer_dir, tmp_path / "out", batch_size=4)
    assert "resuming" in capsys.readouterr().out
    whole = tokenize("owner/name", tokenizer_dir, tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(whole)
    broken["at"] = 40
    with pytest.raises(DataError, match="broke off"):
        tokenize("owner/name", tokenizer_dir, tmp_path / "other", batch_size=4)
    broken["at"] = 60
    capsys.readouterr()
    other = tokenize("owner/name", tokenizer_dir, tmp_path / "other", max_length=5)
    assert "resuming" not in capsys.readouterr().out
    assert max(map(len, rows_of(other)["train"])) == 6


ALPHABET = [
    "a",
    "B",
    "z",
    "7",
    "42",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    ".",
    ",",
    "'s",
    "'",
    "(",
    "-",
    "_",
    "é",
    "e\u0301",
    "中",
]
ALPHABET += [
    "\u00a0",
    "\u3000",
    "\x1c",
    "😀",
    "ﬁ",
    "½",
    "٣",
    "<tool>",
    "<|",
    "zz",
    "[x]",
    "$",
    "~",
    "`",
    "\u200b",
    "\u0301",
    "\u0307",
    "don't",
    "x1",
    encoding.SEPARATOR,
]


def byte_level(kind, texts):
    """A byte-level BPE tokenizer, trained on these texts, with the pre-tokens of `kind`."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    before = {"gpt2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    for name, pattern in zip(("llama3", "qwen"), encoding.PATTERNS):
        before[name] = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before[kind], level])
    tokenizer.normalizer = {"qwen": normalizers.NFC(), "gpt2": normalizers.Sequence([])}.get(kind)
    initial = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=initial, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<|", "zz"])
    tokenizer.add_special_tokens(["<tool>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen"])
def test_words_one_by_one_are_the_text(kind, monkeypatch):
    """Against the library on whole texts, of characters on which patterns differ; also when the cache
    is full."""
    rng = random.Random(kind)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(60))) for _ in range(3000)] + ["", " ", "\n", "x" * 100]
    tokenizer = byte_level(kind, texts[:500])
    encoder = encoding.TextEncoder(tokenizer)
    assert encoder.by_words
    monkeypatch.setattr(encoding, "CACHED_WORDS", 300)
    for start in range(0, len(texts), 100):
        part = texts[start : start + 100]
        expected = [found.ids for found in tokenizer.encode_batch(part, add_special_tokens=False)]
        assert [ids.tolist() for ids in encoder(part)] == expected
    assert max(map(len, encoder._ids)) <= encoding.LONGEST_WORD


def test_tokenizers_whose_words_depend_on_each_other_are_not_split(tokenizer_dir):
    plain = byte_level("gpt2", ["a b c"])
    assert encoding.TextEncoder(plain).by_words
    changes = {
        "added token with a boundary": lambda t: t.add_tokens(["a.b"]),
        "special tokens that are found": lambda t: setattr(t, "encode_special_tokens", False),
        "added token with a space": lambda t: t.add_tokens(["two words"]),
        "added token that hides a separator": lambda t: t.add_tokens([AddedToken("xora", normalized=False)]),
        "added token that strips": lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)]),
        "prefix space": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "no pattern": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)),
        "metaspace": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        "none": lambda t: setattr(t, "pre_tokenizer", None),
        "lower case": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        "dropout": lambda t: setattr(t.model, "dropout", 0.1),
    }
    for name, change in changes.items():
        tokenizer = Tokenizer.from_str(plain.to_str())
        tokenizer.encode_special_tokens = True
        change(tokenizer)
        encoder = encoding.TextEncoder(tokenizer)
        assert not encoder.by_words, name
        if name != "dropout":
            text = "a b  c\nd xor b"
            assert encoder([text])[0].tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_several_processes_give_the_data_of_one(tmp_path, corpora, tokenizer_dir, monkeypatch):
    one = tokenize(corpora[0], tokenizer_dir, tmp_path / "one", num_proc=1, batch_size=5)
    monkeypatch.setattr(encoding, "OWN_CHARACTERS", 2000)
    several = tokenize(corpora[0], tokenizer_dir, tmp_path / "several", num_proc=2, batch_size=5)
    assert rows_of(one) == rows_of(several)


# Runs the script sys.argv[1] as its command does, and prints what a process that tokenises has imported.
SHOW_WORKER = """
import runpy, sys
from runtime import encoding

end = encoding.EncodingPool.__exit__

def show(pool, *error):
    print("imported:", *pool._executor.submit(eval, "sorted(__import__('sys').modules)").result())
    end(pool, *error)

encoding.EncodingPool.__exit__ = show
encoding.OWN_CHARACTERS = 0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_process_that_tokenises_imports_no_torch(tmp_path, corpora, tokenizer_dir):
    """It imports the main script again, which therefore imports none before it reads its arguments."""
    words = ["--dataset_name", corpora[0], *options(tokenizer=tokenizer_dir, output_dir=tmp_path / "out", num_proc=2)]
    command = [sys.executable, "-c", SHOW_WORKER, tokenize_script.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (imported,) = re.findall("^imported: (.*)", done.stdout, re.MULTILINE)
    assert {"runtime.encoding", "__mp_main__"} <= set(imported.split())
    assert not {"torch", "transformers"} & set(imported.split())


def test_no_more_is_read_than_the_processes_need(tokenizer_dir, monkeypatch):
    """So memory does not grow with the corpus, which may have no end."""
    read = itertools.count()

    def parts():
        for i in read:
            yield encoding.Document(f"text {i}")

    encoder = encoding.DocumentEncoder(load_tokenizer(tokenizer_dir), False)
    monkeypatch.setattr(encoding, "OWN_CHARACTERS", 0)
    pool = encoding.EncodingPool(encoder, 2, batch_size=4)
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", lambda *_: Inline(encoder))
    stream = pool.stream(parts(), lambda part: False)
    assert [len(item[1]) for item in itertools.islice(stream, 6)] == [1] * 6
    assert next(read) <= 4 * (encoding.WAITING * 2 + 3)


class Inline:
    """An executor whose results come when they are asked for; without an encoder, whose processes die."""

    def __init__(self, encoder):
        self.encoder = encoder

    def submit(self, _, parts):
        future = Future()
        future.done = lambda: False
        if self.encoder is None:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(self.encoder(parts))
        return future

    def shutdown(self, **_):
        pass


def test_a_dead_process_is_one_line(tmp_path, corpora, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(encoding, "OWN_CHARACTERS", 0)
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", lambda *_: Inline(None))
    with pytest.raises(DataError, match="--num_proc: a process that tokenised died, perhaps for lack of memory"):
        tokenize(corpora[0], tokenizer_dir, tmp_path / "out", num_proc=2)


def test_a_hub_dataset_is_not_read_beyond_max_tokens(tmp_path, tokenizer_dir, monkeypatch):
    read = []

    def rows(*_, streaming, **__):
        assert streaming
        for i in itertools.count():
            read.append(i)
            yield {"text": f"row {i}"}

    monkeypatch.setattr("datasets.load_dataset", rows)
    out = tokenize("owner/name", tokenizer_dir, tmp_path / "out", max_tokens=500, batch_size=10)
    assert sum(map(len, itertools.chain(*rows_of(out).values()))) == 500 and len(read) < 100
    assert Dataset.from_file(str(out / "train.arrow")).features["input_ids"].feature.dtype == "int32"

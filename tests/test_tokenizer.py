"""Published tokenizers encode as their tokenizer.json says, whatever class and settings are named
beside it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.config import load_config
from runtime.data import (
    DataError,
    data_fingerprint,
    fix_tokenizer_class,
    load_tokenizer,
    open_chunks,
    open_split,
    tokenizer_fingerprint,
)

import pytest
from conftest import make_chunks, options, python_texts, random_teacher, save_tokenizer, write_config
from lm_eval.api.instance import Instance
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

import preprocess_download_tokenize
import train

TEXT = "the quick  brown fox jumps over 1234 lazy dogs;\n    if x:\n\treturn cafés, naïve cafe\u0301s 日本語 😀 <eos>x <eos> don't"
WORDS = ["the quick brown fox jumps over the lazy dog and returns 12 cafés"] * 9


def trained(tokenizer, trainer=trainers.BpeTrainer, **values):
    special_tokens = ["<unk>", "<bos>", "<eos>", "<|endoftext|>"]
    trainer = trainer(vocab_size=400, special_tokens=special_tokens, show_progress=False, **values)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def byte_level():
    """Like GPT-2's, with BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def digit_groups():
    """Like Llama 3's: digits in groups of three, and vocabulary entries that no merge produces."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    state = json.loads(trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()).to_str())
    state["model"]["vocab"] |= {"Ġlazydog": len(state["model"]["vocab"])}
    state["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(state))


def compatible_forms():
    """With a normalizer that other classes do not have."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def metaspace():
    """Like sentencepiece's, with spaces as ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return trained(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")


KINDS = (byte_level, digit_groups, compatible_forms, metaspace, unigram)


def publish(folder, raw, class_name, model_type=None, **settings):
    """Saves a tokenizer as a model's folder has it; returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<bos>", "eos_token": "<eos>"}
    if class_name:
        values["tokenizer_class"] = class_name
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "class_name",
    [
        "LlamaTokenizerFast",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "GPT2TokenizerFast",
        "GemmaTokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "NobodysTokenizer",
        None,
    ],
)
def test_the_tokenizer_encodes_as_its_file_under_any_class_name(tmp_path, kind, class_name):
    raw = kind()
    for model_type in ("llama", "qwen2", "qwen3", "mistral"):
        tokenizer = load_tokenizer(publish(tmp_path / model_type, raw, class_name, model_type))
        ids = tokenizer(TEXT)["input_ids"]
        assert ids == raw.encode(TEXT).ids, model_type
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert text == raw.decode(ids, skip_special_tokens=False)


def qwen2():
    """Like the one that Qwen2.5's own class builds."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
    "kind, class_name, model_type",
    [
        (qwen2, "Qwen2Tokenizer", "qwen2"),
        (qwen2, "Qwen2Tokenizer", "qwen3"),
        (digit_groups, "PreTrainedTokenizerFast", "llama"),
        (byte_level, "TokenizersBackend", "mistral"),
    ],
)
def test_data_made_with_ordinary_tokenizers_stays_usable(tmp_path, kind, class_name, model_type):
    """Their fingerprint is that of the tokenizer that transformers loads, as when the data was
    made."""
    settings = {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    folder = publish(tmp_path, kind(), class_name, model_type, **settings)
    assert tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))


def test_settings_are_kept_when_another_class_loads_the_tokenizer(tmp_path):
    settings = {
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "chat_template": "{{ messages[0].content }}",
        "model_max_length": 77,
        "padding_side": "left",
        "additional_special_tokens": ["<more>"],
    }
    raw = byte_level()
    tokenizer = load_tokenizer(publish(tmp_path, raw, "LlamaTokenizerFast", "llama", **settings))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<unk>")
    assert tokenizer.chat_template == settings["chat_template"]
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer("<more>", add_special_tokens=False)["input_ids"] == [raw.get_vocab_size()]
    assert tokenizer.name_or_path == str(tmp_path)


def test_added_tokens_have_the_properties_in_the_file(tmp_path):
    """Not those in tokenizer_config.json: here that they absorb the spaces around them."""
    raw = byte_level()
    properties = {
        "content": "<eos>",
        "lstrip": True,
        "rstrip": True,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    added = {"added_tokens_decoder": {str(raw.token_to_id("<eos>")): properties}}
    text = "a <eos> b"
    tokenizer = load_tokenizer(publish(tmp_path, raw, "PreTrainedTokenizerFast", "llama", **added))
    assert tokenizer(text)["input_ids"] == raw.encode(text).ids


def test_truncation_in_the_file_is_ignored(tmp_path):
    raw = byte_level()
    expected = raw.encode(TEXT).ids
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    assert load_tokenizer(publish(tmp_path, raw, "LlamaTokenizerFast"))(TEXT)["input_ids"] == expected


def test_an_eos_token_that_the_vocabulary_lacks_is_refused(tmp_path):
    folder = publish(tmp_path, byte_level(), "LlamaTokenizerFast", "llama", eos_token="<|im_end|>")
    message = r"^--tokenizer: '.*' has the EOS token '<\|im_end\|>', which its tokenizer.json lacks; set eos_token"
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(folder, "--tokenizer")
    assert "\n" not in str(error.value)


def test_code_in_a_models_folder_does_not_run(tmp_path):
    """A tokenizer class in a Python file: the tokenizer loads without it."""
    code = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Mine(PreTrainedTokenizerFast): pass\n"
    )
    raw = byte_level()
    auto_map = {"AutoTokenizer": [None, "mine.Mine"]}
    for class_name in ("Mine", "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        folder = publish(tmp_path / class_name, raw, class_name, "llama", auto_map=auto_map)
        Path(folder, "mine.py").write_text(code)
        assert load_tokenizer(folder)(TEXT)["input_ids"] == raw.encode(TEXT).ids
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_is_found_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    raw = byte_level()
    repository = tmp_path / "models--somebody--model"
    publish(repository / "snapshots" / "abc", raw, "LlamaTokenizerFast", "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer("somebody/model")(TEXT)["input_ids"] == raw.encode(TEXT).ids


def test_a_corpus_is_tokenised_as_the_file_says(tmp_path):
    """As for DeepSeek's distilled models: a byte-level tokenizer under the name of a class that
    drops the spaces."""
    raw = byte_level()
    folder = publish(tmp_path / "teacher", raw, "LlamaTokenizerFast", "llama")
    (tmp_path / "text.txt").write_text(TEXT[:40])
    paths = options(dataset_name=tmp_path / "text.txt", tokenizer=folder, output_dir=tmp_path / "out")
    preprocess_download_tokenize.main([*paths, *options(holdout=0)])
    assert raw.decode(open_split(tmp_path / "out", "train")[0]["input_ids"]) == TEXT[:40]


# ------------------------------------------------------------------------------------------ exports
@pytest.mark.parametrize("model_type", ["distilled_student", "qwen3_5_text", "transformer"])
def test_an_exported_tokenizer_loads_as_the_file_says(tmp_path, model_type):
    """By AutoTokenizer, under every model type that we write, and without references to the
    teacher's code."""
    raw = digit_groups()
    settings = {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "chat_template": "{{ 1 }}"}
    for class_name in ("LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "Mine", None):
        folder = publish(tmp_path / str(class_name), raw, class_name, model_type, **settings)
        before = (Path(folder) / "tokenizer.json").read_bytes()
        fix_tokenizer_class(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer(TEXT)["input_ids"] == raw.encode(TEXT).ids, class_name
        assert tokenizer.eos_token == "<eos>" and tokenizer.chat_template == "{{ 1 }}"
        assert (Path(folder) / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_that_loads_correctly_is_exported_unchanged(tmp_path):
    folder = Path(publish(tmp_path, qwen2(), "Qwen2Tokenizer", "qwen3"))
    before = (folder / "tokenizer_config.json").read_bytes()
    fix_tokenizer_class(folder)
    assert (folder / "tokenizer_config.json").read_bytes() == before


@pytest.fixture
def teacher(tmp_path):
    """A model whose byte-level tokenizer names another class, with tokenizer code in its folder."""
    folder = tmp_path / "teacher"
    random_teacher(folder, "qwen3", vocab_size=512, head_dim=12, rms_norm_eps=1e-5)
    config = (folder / "config.json").read_text()
    auto_map = {"AutoTokenizer": [None, "tokenizer_of_mine.Mine"]}
    publish(folder, byte_level(), "LlamaTokenizerFast", auto_map=auto_map)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer_of_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return str(folder)


def export_as_training_does(teacher, folder, monkeypatch):
    import convert_ckpt
    from convert import load_teacher
    from distill_model import StudentForCausalLM

    student = StudentForCausalLM.from_teacher(load_teacher(teacher), "gdn_v8", [1])[0]
    cfg = load_config(write_config(folder.parent, 2, teacher, "data"), ["student_model.name=gdn_v8"])
    monkeypatch.setattr(convert_ckpt, "trained_state", lambda *_: student.state_dict())
    monkeypatch.setattr(convert_ckpt, "write_card", lambda *_: None)
    convert_ckpt.export_checkpoint(cfg, folder, folder)


def test_every_export_keeps_the_tokenizer(teacher, tmp_path, monkeypatch):
    """Training's export, the conversions and the native export, loaded by transformers alone in
    another process."""
    from convert.converter import convert_checkpoint
    from convert.export_native import export_native

    folders = [tmp_path / name for name in ("trained", "fla", "student", "native")]
    export_as_training_does(teacher, folders[0], monkeypatch)
    convert_checkpoint(teacher, folders[1], ("qwen3",), format="fla", verify=False)
    convert_checkpoint(teacher, folders[2], ("qwen3",), format="student", verify=False)
    shutil.copy(Path(teacher) / "tokenizer_config.json", folders[0])  # as in exports of an earlier version
    export_native(str(folders[0]), folders[3])
    fix_tokenizer_class(folders[0])
    assert not list(tmp_path.glob("[!t]*/tokenizer*.py")) and not (folders[0] / "tokenizer_of_mine.py").exists()
    code = (
        "import sys, json\n"
        "from transformers import AutoTokenizer\n"
        "tokenizers = [AutoTokenizer.from_pretrained(name, trust_remote_code=False) for name in sys.argv[1:]]\n"
        f"print(json.dumps([tokenizer({TEXT!r})['input_ids'] for tokenizer in tokenizers]))"
    )
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = Tokenizer.from_file(f"{teacher}/tokenizer.json").encode(TEXT).ids
    assert json.loads(done.stdout.splitlines()[-1]) == [expected] * 4
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------- against the model
TEXTS = python_texts(12)


def grown(folder, **settings):
    """Saves a teacher with 96 embeddings whose tokenizer also has the token 96, <|im_end|>.
    settings: of the tokenizer. Returns the folder's name."""
    random_teacher(folder, "qwen3")
    save_tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"filler{i}": i for i in range(len(vocabulary), 96)}
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"].append({"id": 96, "content": "<|im_end|>", **off, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(state))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


def in_one_line(pattern, function, *args):
    with pytest.raises((DataError, SystemExit), match=pattern) as error:
        function(*args)
    assert "\n" not in str(error.value)


def dry_run(cfg):
    train.prepare(train.parse_args(["--cfg", str(cfg), "--dry-run"]))


def test_an_eos_token_that_the_model_lacks_is_refused_everywhere(tmp_path):
    import chat
    from evaluation.commands import evaluate_checkpoints
    from layer_selection import evaluate_layer_importance
    from layer_selection.bench import Bench

    name = grown(tmp_path / "teacher", eos_token="<|im_end|>")
    data = make_chunks(tmp_path, name, TEXTS)
    message = (
        rf": EOS of '{name}', '<\|im_end\|>', has the id 96, but the model has a vocabulary of 96; take the tokenizer"
    )
    stage1, stage2 = (str(write_config(tmp_path, stage, name, data, batch_size=2)) for stage in (1, 2))
    in_one_line(f"^teacher_model.name{message}", dry_run, stage1)
    in_one_line(f"^teacher_model.name{message}", Bench, load_config(stage2), 4, 2)
    in_one_line(f"^--model{message}", chat.main, ["--model", name])
    in_one_line(
        f"^CHECKPOINT{message}",
        evaluate_checkpoints,
        [name, "--tasks", "copying", "--output", str(tmp_path / "out"), "--num_gpus", "1"],
    )
    in_one_line(
        f"^--model_name{message}",
        evaluate_layer_importance.main,
        [
            "--task",
            "phone_book",
            "--model_name",
            name,
            "--output_dir",
            str(tmp_path / "importance"),
        ],
    )
    assert not any((tmp_path / folder).exists() for folder in ("stage1", "out", "importance"))


def test_chunks_are_checked_by_their_largest_id(tmp_path):
    """Not by the tokenizer's size. The metadata of earlier versions lacks the largest id, so that
    the chunks are read."""
    texts = [*TEXTS, "a<|im_end|>b" * 40]
    data = Path(make_chunks(tmp_path, grown(tmp_path / "teacher"), texts, more=["--allow_special_tokens"]))
    metadata = json.loads((data / "metadata.json").read_text())
    rows = [*open_split(data, "train"), *open_split(data, "heldout")]
    largest = max(max(row["input_ids"]) for row in rows)
    assert metadata["max_token_id"] == largest == 96
    old = {name: value for name, value in metadata.items() if name != "max_token_id"}
    for content in (metadata, old):
        (data / "metadata.json").write_text(json.dumps(content))
        message = f"^DATA: {data} holds the token id 96, but the model has a vocabulary of 96; take"
        in_one_line(message, open_chunks, data, 32, None, "DATA", 96)
        assert open_chunks(str(data), 32, vocab_size=97).heldout is not None
    assert data_fingerprint(old) == data_fingerprint(metadata), "a run must resume with chunks that were made again"
    cfg = write_config(tmp_path, 1, str(tmp_path / "teacher"), str(data), batch_size=2)
    in_one_line(f"^data.cache_dir: {data} holds the token id 96", dry_run, cfg)


def test_a_token_that_occurs_in_no_chunk_is_accepted(tmp_path, capsys):
    name = grown(tmp_path / "teacher")
    cfg = write_config(tmp_path, 1, name, make_chunks(tmp_path, name, TEXTS), batch_size=2)
    dry_run(cfg)
    assert "parameters: " in capsys.readouterr().out


def test_a_dtype_too_small_for_an_id_is_refused(tmp_path):
    """A vocabulary with gaps has ids beyond its size."""
    raw = byte_level()
    state = json.loads(raw.to_str())
    state["model"]["vocab"] |= {"Ġgap": 70_000}
    state["model"]["ignore_merges"] = True
    name = publish(tmp_path / "teacher", Tokenizer.from_str(json.dumps(state)), "PreTrainedTokenizerFast")
    message = "^--dtype: uint16 cannot hold the token id 70000; take int32$"
    in_one_line(message, make_chunks, tmp_path, name, ["a gap of words " * 20] * 3)


def test_a_text_with_a_token_outside_the_vocabulary_is_refused(tmp_path):
    """Padding, which is masked, may be such a token."""
    import chat_session
    from evaluation.harness import harness_model

    name = grown(tmp_path / "teacher", pad_token="<|im_end|>")
    lm = harness_model(name, "2")
    arguments = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 3}
    texts = [
        [Instance("generate_until", {}, (text, arguments), i) for i, text in enumerate(pair)]
        for pair in (("abc", "a"), ("abc<|im_end|>", "a"))
    ]
    alone = harness_model(name, "1").generate_until(texts[0], disable_tqdm=True)
    assert lm.generate_until(texts[0], disable_tqdm=True) == alone
    in_one_line(
        r"^CHECKPOINT: '<\|im_end\|>' in a text has the id 96, but",
        lambda: lm.generate_until(texts[1], disable_tqdm=True),
    )
    conversation = chat_session.Conversation(load_tokenizer(name), 96, None)
    assert conversation.add_user("abc")["input_ids"].shape == (1, 3)
    in_one_line(r"^--model: '<\|im_end\|>' in the text has the id 96, but", conversation.add_user, "<|im_end|>")

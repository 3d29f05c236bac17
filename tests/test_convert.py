"""Teachers that we load, and their conversions, give Hugging Face's logits; what cannot be exact is
refused by name."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.config import load_config

import pytest
import torch
import yaml
from conftest import options, random_teacher, save_tokenizer, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from convert import converter, load_teacher, load_teacher_config
from convert.command import main as convert
from convert.converter import PUBLISHED, check_size, write_weights
from convert.families import FAMILIES
from convert.loader import ModelFolder, copy_sidecars, to_student_config
from convert_ckpt import student_config as trained_config
from distill_model import StudentForCausalLM

ROOT = Path(__file__).parent.parent

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
TEACHERS = {
    "qwen2, biases": ("qwen2", {}),
    "qwen2, tied, padded vocabulary": ("qwen2", dict(tie_word_embeddings=True, vocab_size=128)),
    "qwen2, yarn": (
        "qwen2",
        dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)),
    ),
    "qwen3, q/k norms, free head_dim": ("qwen3", dict(rms_norm_eps=1e-3)),
    "qwen3, biases, one kv head": ("qwen3", dict(attention_bias=True, num_key_value_heads=1)),
    "llama": ("llama", {}),
    "llama, every bias, no grouping": (
        "llama",
        dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    ),
    "llama3 rope scaling": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "linear rope scaling": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "dynamic rope scaling": (
        "llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ),
    "mistral without a window": ("mistral", dict(sliding_window=None, head_dim=24)),
    "grouped by 7": ("qwen2", dict(hidden_size=112, num_attention_heads=14, num_key_value_heads=2)),
    "grouped by 5": ("qwen3", dict(num_attention_heads=10, num_key_value_heads=2)),
    "grouped by 8, hidden / heads is not whole": (
        "qwen3",
        dict(hidden_size=44, num_attention_heads=8, num_key_value_heads=1),
    ),
}


def run(family, source, output, **more):
    """Converts `source` to `output`. more: options of the script."""
    convert("", family, argv=options(model=source, output=output, **more))


@pytest.mark.parametrize("name", TEACHERS)
def test_logits_equal_hugging_face(tmp_path, name):
    kind, overrides = TEACHERS[name]
    theirs = random_teacher(tmp_path, kind, **overrides)
    ours = load_teacher(str(tmp_path))
    for length in (1, 37, 91):  # 91 is beyond the context length of 64
        ids = torch.randint(0, theirs.config.vocab_size, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_conversion_gives_the_same_logits(tmp_path, name, precision, capsys, monkeypatch):
    kind, overrides = TEACHERS[name]
    theirs = random_teacher(tmp_path / "source", kind, **overrides)
    save_tokenizer(tmp_path / "source")
    monkeypatch.setattr(converter, "SHARD_BYTES", 40_000)
    more = {"precision": precision} if precision else {}
    run(kind, tmp_path / "source", tmp_path / "out", format="student", **more)
    difference = float(capsys.readouterr().out.partition("largest difference to the source: ")[2].split()[0])
    assert difference < 1e-4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(ours, StudentForCausalLM) and ours.dtype == (torch.bfloat16 if precision else torch.float32)
    if precision:
        ours = ours.float()
        for parameter in theirs.parameters():  # not buffers: RoPE frequencies must not be rounded
            parameter.data = parameter.data.bfloat16().float()
    ids = torch.randint(0, theirs.config.vocab_size, (2, 91))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    again = load_teacher(str(tmp_path / "out"))
    for (key, a), (_, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a.float(), b), key


def test_tokenizer_template_and_generation_config_are_copied(tmp_path):
    random_teacher(tmp_path / "source", "llama")
    save_tokenizer(tmp_path / "source")
    files = {
        "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "generation_config.json": json.dumps({"eos_token_id": [3, 7, 9], "temperature": 0.6, "do_sample": True}),
    }
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    run("llama", tmp_path / "source", tmp_path / "out")
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / kind) for kind in ("source", "out")]
    assert tokenizers[0]("def f")["input_ids"] == tokenizers[1]("def f")["input_ids"]
    assert tokenizers[1].apply_chat_template([{"content": "ab"}], tokenize=False) == "ab"


FLA = {
    "qwen2, biases": ("qwen2", {}),
    "tied, padded vocabulary": ("qwen2", dict(tie_word_embeddings=True, vocab_size=128)),
    "llama": ("llama", dict(head_dim=12)),
    "q/k norms": ("qwen3", dict(head_dim=12, rms_norm_eps=1e-5)),
    "mistral": (
        "mistral",
        dict(
            head_dim=12,
            sliding_window=None,
            rope_parameters=dict(rope_type="default", rope_theta=5e4),
        ),
    ),
}


@pytest.mark.parametrize("name", FLA)
def test_fla_loads_our_output_and_we_load_its(tmp_path, name):
    from fla.models import TransformerForCausalLM

    kind, overrides = FLA[name]
    theirs = random_teacher(tmp_path / "source", kind, **overrides)
    run(kind, tmp_path / "source", tmp_path / "fla")
    model, report = TransformerForCausalLM.from_pretrained(tmp_path / "fla", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = model.float().eval()
    ids = torch.randint(0, theirs.config.vocab_size, (2, 91))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "saved by fla")
        torch.testing.assert_close(
            load_teacher(str(tmp_path / "saved by fla"))(ids).logits, expected, atol=1e-4, rtol=1e-4
        )
    assert model.config.eos_token_id == theirs.config.eos_token_id
    assert model.config.bos_token_id == theirs.config.bos_token_id


def edited(folder, change, **config):
    """Applies `change` to a model's stored tensors, by name, and sets these fields of its config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


def add_head(tensors):
    embeddings = tensors.get("model.embed_tokens.weight", tensors.get("model.embeddings.weight"))
    tensors["lm_head.weight"] = torch.randn_like(embeddings)


def copy_embeddings(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def rename_embeddings(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def add_frequencies(factor):
    def change(tensors):
        half = tensors["model.layers.1.self_attn.q_proj.weight"].shape[0] // 4 // 2
        frequencies = (1e4 ** -(torch.arange(half) / half)).bfloat16()
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = factor * frequencies

    return change


def add_index(folder):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ODD_FILES = {
    "a head of its own, tied by the config": (add_head, "read as not tied"),
    "a head equal to the embeddings": (copy_embeddings, None),
    "the head alone": (rename_embeddings, None),
    "the config's frequencies": (add_frequencies(1), None),
    "other frequencies": (add_frequencies(0.25), "inv_freq differs from config.json"),
    "an index of other files": (None, "not the files of model.safetensors.index.json"),
}


@pytest.mark.parametrize("case", ODD_FILES)
@pytest.mark.parametrize("head_dim", [12, 16])  # converted to FLA's format and to ours
def test_odd_files_are_read_as_transformers_reads_them(tmp_path, recwarn, case, head_dim):
    change, warning = ODD_FILES[case]
    source = tmp_path / "source"
    rope = {"rope_type": "default", "rope_theta": 1e4}
    random_teacher(source, "llama", tie_word_embeddings=True, head_dim=head_dim, rope_parameters=rope)
    edited(source, change) if change else add_index(source)
    ids = torch.randint(0, 96, (2, 37))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
        run("llama", source, tmp_path / "out")
        for folder in (source, tmp_path / "out"):
            torch.testing.assert_close(load_teacher(str(folder))(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert load_teacher_config(str(source)).tie_word_embeddings == (case != "a head of its own, tied by the config")
    warnings = [str(w.message) for w in recwarn if str(source) in str(w.message)]
    if warning is None:
        assert not warnings
    else:
        assert warnings and all(warning in line and "\n" not in line for line in warnings), warnings


def test_a_model_that_must_be_downloaded_first_is_loaded_the_same(tmp_path, monkeypatch):
    """Its config is read before its weights have been downloaded."""
    model = random_teacher(tmp_path / "source", "llama", tie_word_embeddings=True)
    model.bfloat16().save_pretrained(tmp_path / "source")
    edited(tmp_path / "source", add_head, dtype=None)
    monkeypatch.setattr("convert.loader.local_folder", lambda name: None)
    assert load_teacher_config(str(tmp_path / "source")).tie_word_embeddings
    config = load_teacher(str(tmp_path / "source")).config
    assert not config.tie_word_embeddings and ModelFolder(str(tmp_path / "source")).config.dtype == torch.bfloat16


def test_the_warning_about_an_untied_head_comes_once(tmp_path, recwarn):
    random_teacher(tmp_path, "llama", tie_word_embeddings=True)
    edited(tmp_path, add_head)
    load_teacher_config(str(tmp_path))
    load_teacher_config(str(tmp_path))
    ModelFolder(str(tmp_path))
    assert len([w for w in recwarn if "read as not tied" in str(w.message)]) == 1


def test_a_separate_head_in_flas_format_is_not_tied(tmp_path):
    random_teacher(tmp_path / "source", "llama", tie_word_embeddings=True, head_dim=12)
    run("llama", tmp_path / "source", tmp_path / "fla")
    edited(tmp_path / "fla", add_head)
    run("llama", tmp_path / "fla", tmp_path / "out")
    ids = torch.randint(0, 96, (2, 37))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "fla", dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(load_teacher(str(tmp_path / "out"))(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_verification_does_not_rely_on_our_loader(tmp_path, monkeypatch):
    """If we tied a head that transformers does not tie, verification would fail, and nothing would
    be written."""
    random_teacher(tmp_path / "source", "llama", tie_word_embeddings=True)
    edited(tmp_path / "source", add_head)
    monkeypatch.setattr("convert.loader.has_own_head", lambda *_: False)
    for more in ({}, {"precision": "bfloat16"}):
        with pytest.raises(ValueError, match="and its conversion differ by"):
            run("llama", tmp_path / "source", tmp_path / "out", **more)
        assert not (tmp_path / "out").exists()


def drop(name):
    return lambda tensors: tensors.pop(name)


def pad_head(tensors):
    tensors["lm_head.weight"] = torch.cat((tensors["lm_head.weight"], torch.zeros(32, 48)))


def add_layer(tensors):
    layer = {name: x for name, x in tensors.items() if "layers.3" in name}
    tensors.update({name.replace("layers.3", "layers.4"): x.clone() for name, x in layer.items()})


def add_scale(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(80, 1)


def quantise(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)


def add_twice(tensors):
    tensors["model.embeddings.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("lm_head.weight"), "the first is lm_head.weight; .* set tie_word_embeddings to true"),
        (drop("model.embed_tokens.weight"), "the first is model.embeddings.weight"),
        (pad_head, r"lm_head.weight is \(128, 48\), config.json implies the shape \(96, 48\)"),
        (
            add_layer,
            r"model.layers.4.input_layernorm.weight is \(48,\), config.json implies no such tensor",
        ),
        (add_scale, "up_proj.weight_scale is .* implies no such tensor"),
        (quantise, "up_proj.weight is of dtype F8_E4M3, of quantised weights"),
        (add_twice, "model.embeddings.weight is stored twice"),
    ],
)
def test_no_tensor_is_invented_or_dropped(tmp_path, change, message):
    random_teacher(tmp_path / "source", "llama", tie_word_embeddings=False)
    edited(tmp_path / "source", change)
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(str(tmp_path / "source"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, overrides, reason",
    [
        ("qwen3", {}, "head_dim 16"),
        ("qwen3", dict(head_dim=12), "eps 1e-06 in the q/k norms"),
        ("llama", dict(head_dim=12, rope_parameters=LLAMA3), "RoPE scaling (llama3)"),
        ("llama", dict(head_dim=12, attention_bias=True), "a bias in o_proj"),
        ("llama", dict(head_dim=12, mlp_bias=True), "biases in the MLP"),
    ],
)
def test_models_that_fla_cannot_express_use_our_format(tmp_path, capsys, kind, overrides, reason):
    random_teacher(tmp_path / "source", kind, **overrides)
    with pytest.raises(ValueError, match="--format: fla cannot express"):
        run(kind, tmp_path / "source", tmp_path / "out", format="fla")
    assert not (tmp_path / "out").exists()
    run(kind, tmp_path / "source", tmp_path / "out")
    assert reason in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "distilled_student"


def test_a_llama_that_lost_its_rope_scaling_warns(tmp_path):
    from fla.models import TransformerConfig

    shape = dict(hidden_size=8, num_heads=2, num_hidden_layers=1, vocab_size=128256)
    TransformerConfig(**shape, max_position_embeddings=131072, rope_theta=5e5).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="lost its RoPE scaling.*meta-llama"):
        load_teacher_config(str(tmp_path))


SIZES = [(kind, size) for kind, sizes in yaml.safe_load(PUBLISHED.read_text()).items() for size in sizes]


@pytest.mark.parametrize("kind, size", SIZES)
def test_published_sizes_have_the_same_parameters(kind, size):
    shape = yaml.safe_load(PUBLISHED.read_text())[kind][size]
    rope = {"rope_type": "default", "rope_theta": 5e5 if kind == "llama" else 1e6}
    if scaling := shape.get("rope"):
        rope |= {
            "rope_type": scaling["type"],
            "factor": scaling["factor"],
            "low_freq_factor": scaling["low"],
            "high_freq_factor": scaling["high"],
            "original_max_position_embeddings": scaling["original"],
        }
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=shape["tied"],
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
        ours = StudentForCausalLM(to_student_config(config))
    ours.tie_weights()
    theirs.tie_weights()
    expected = {FAMILIES[kind].rename(name): p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == expected
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    check_size(ours.config, kind, size)
    sizes = yaml.safe_load(PUBLISHED.read_text())[kind]
    other = next(name for name in sizes if name[-2:] != size[-2:])
    with pytest.raises(ValueError, match=f"--config: the checkpoint is no {other}: .* instead of"):
        check_size(ours.config, kind, other)


def test_the_teachers_loss_equals_hugging_faces(tmp_path):
    """Stage 2's KL of an untrained hybrid to our teacher equals the one computed from logits of
    Hugging Face's class."""
    theirs = random_teacher(tmp_path, "llama", tie_word_embeddings=True, rope_parameters=LLAMA3)
    teacher = load_teacher(str(tmp_path))
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4", [1])[0]
    ids = torch.randint(0, theirs.config.vocab_size, (2, 33))
    with torch.no_grad():
        hidden = teacher.model(ids).last_hidden_state
        loss = student(ids, teacher_hidden_states=hidden, teacher_head_weight=teacher.lm_head.weight).loss
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (theirs, student))
        torch.testing.assert_close(loss.double(), (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-6)
        own = teacher(ids, labels=ids).loss
        torch.testing.assert_close(own, theirs(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_a_kept_layer_equals_the_teachers_bit_for_bit(tmp_path):
    random_teacher(tmp_path, "qwen2", tie_word_embeddings=True)
    teacher = load_teacher(str(tmp_path))
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4", [2])[0]
    hidden = torch.randn(2, 21, teacher.config.hidden_size)
    positions = teacher.model.position_embeddings(hidden)
    a, b = (model.model.layers[2](hidden, position_embeddings=positions) for model in (teacher, student))
    assert torch.equal(a, b)


def test_our_own_format_is_accepted_as_a_teacher(tmp_path, teacher_dir):
    teacher = load_teacher(teacher_dir)
    teacher.save_pretrained(tmp_path)
    again = load_teacher(str(tmp_path))
    assert again.lm_head.weight is again.model.embeddings.weight
    for (name, a), (_, b) in zip(teacher.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "student"}, "is a student of the KL-guided layer selection paper's code"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "gemma2"}, "gemma2"),
        (
            {"rope_parameters": {"rope_type": "of tomorrow", "rope_theta": 1e4}},
            "rope_type 'of tomorrow'",
        ),
        (
            {
                "use_sliding_window": True,
                "max_window_layers": 2,
                "layer_types": None,
                "sliding_window": 8,
            },
            "sliding",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(tmp_path, change, message):
    random_teacher(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_teacher_config(str(tmp_path))


def test_all_unsupported_features_are_named_at_once(tmp_path):
    random_teacher(tmp_path, "mistral", sliding_window=16, hidden_act="gelu")
    with pytest.raises(ValueError, match="attention over 16 tokens; hidden_act 'gelu'; supported is silu$"):
        load_teacher_config(str(tmp_path))


def set_config(folder, **changes):
    """Writes config.json with these fields; ... leaves a field out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    "written, meant",
    [
        ({"rms_norm_eps": "1e-3"}, {"rms_norm_eps": 1e-3}),
        ({"rms_norm_eps": 0}, {"rms_norm_eps": 0.0}),
        ({"hidden_size": "48", "num_hidden_layers": 4.0, "head_dim": "16", "vocab_size": "96"}, {}),
        (
            {"max_position_embeddings": "64", "initializer_range": "0.2", "pad_token_id": "0"},
            {"pad_token_id": 0},
        ),
        ({"eos_token_id": ["1", 2]}, {"eos_token_id": [1, 2]}),
        (
            {"rope_parameters": ..., "rope_theta": "5e4"},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        ),
        (
            {
                "rope_parameters": ...,
                "rope_theta": 5e4,
                "rope_scaling": {"type": "linear", "factor": "2.0"},
            },
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
        ),
        (
            {"rope_parameters": {**{name: str(value) for name, value in LLAMA3.items()}}},
            {"rope_parameters": LLAMA3},
        ),
    ],
)
def test_numbers_written_as_text_are_read(tmp_path, written, meant):
    """The logits equal those of Hugging Face's model, whose config has numbers."""
    random_teacher(tmp_path / "source", "qwen3")
    set_config(tmp_path / "source", **meant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    set_config(tmp_path / "source", **written)
    run("qwen3", tmp_path / "source", tmp_path / "out")
    ids = torch.randint(0, 96, (2, 91))
    with torch.no_grad():
        ours = load_teacher(str(tmp_path / "out"))
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert load_teacher_config(str(tmp_path / "out")).eos_token_id == theirs.config.eos_token_id


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' is of type str; it must be float"),
        (
            {"num_hidden_layers": None},
            "num_hidden_layers: None is of type NoneType; it must be int",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide the 4 attention heads"),
        ({"head_dim": 15}, "head_dim: 15 must be even"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings: 'false' is of type str; it must be bool",
        ),
        (
            {"pad_token_id": 96},
            "pad_token_id: 96 is outside the vocabulary of 96 ids; name one of them, or null",
        ),
        ({"bos_token_id": [1]}, r"bos_token_id: \[1\] is of type list; it must be int or null"),
        (
            {"layer_types": ["full_attention"] * 3},
            r"`num_hidden_layers` \(4\) must be .* of `layer_types` \(3\)",
        ),
        ({"layer_types": "full_attention"}, "Field 'layer_types' with value 'full_attention'"),
        ({"hidden_act": None}, "Field 'hidden_act' expected str"),
        ({"dtype": "bf16"}, "dtype: 'bf16' must be bfloat16"),
        ({"dtype": "int8"}, "dtype: 'int8' must be bfloat16"),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps: nan must be a number of at least 0"),
        ({"model_type": ["qwen3"]}, r"model_type: \['qwen3'\] must be a name"),
        ({"rope_parameters": "linear"}, "rope_parameters: 'linear' must be a mapping"),
        (
            {"rope_parameters": {"rope_theta": "many"}},
            "rope_parameters.rope_theta: 'many' is of type str",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor: 0.0 of the rotary embedding",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": [2.0]},
            r"rope_scaling: \[2.0\] must be a mapping",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "linear"}},
            "Missing required keys .*'factor'",
        ),
        (
            {"rope_parameters": ..., "rope_theta": None},
            "rope_theta: None of the rotary embedding must be above 0",
        ),
    ],
)
def test_an_impossible_config_is_refused_in_one_line(tmp_path, change, message):
    random_teacher(tmp_path, "qwen3")
    set_config(tmp_path, **change)
    with pytest.raises(ValueError, match=f"^teacher_model.name: .*config.json: .*{message}") as error:
        load_teacher_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_our_own_config_is_checked_the_same_way(tmp_path, teacher_dir):
    load_teacher(teacher_dir).save_pretrained(tmp_path)
    set_config(tmp_path, rms_norm_eps="1e-3", num_hidden_layers="4")
    config = load_teacher_config(str(tmp_path))
    assert config.rms_norm_eps == 1e-3 and config.num_hidden_layers == 4
    assert load_teacher(str(tmp_path)).config.rms_norm_eps == 1e-3
    for change, message in (
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' is of type str"),
        ({"pad_token_id": 96}, "pad_token_id: 96 is outside"),
        ({"keep_full_attention_layers": [9]}, "must be different layers in 0..3"),
    ):
        set_config(tmp_path, **{"rms_norm_eps": 1e-3, "pad_token_id": None} | change)
        with pytest.raises(ValueError, match=f"^teacher_model.name: .*config.json: .*{message}"):
            load_teacher_config(str(tmp_path))


@pytest.mark.parametrize("content", ["[1]", "null", '"qwen3"', "{"])
def test_a_config_that_is_no_json_object_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    message = f"^teacher_model.name: '{tmp_path}' is neither a folder with a config.json"
    with pytest.raises(ValueError, match=message) as error:
        load_teacher_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_config_without_a_dtype_gets_that_of_the_weights(tmp_path):
    random_teacher(tmp_path / "source", "qwen3").bfloat16().save_pretrained(tmp_path / "source")
    set_config(tmp_path / "source", dtype=...)
    assert load_teacher_config(str(tmp_path / "source")).dtype == torch.bfloat16
    run("qwen3", tmp_path / "source", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    cfg = load_config(write_config(tmp_path, 1, str(tmp_path / "source"), "data"))
    dtype = trained_config(cfg, load_teacher_config(str(tmp_path / "source"))).dtype
    assert dtype in (torch.bfloat16, "bfloat16")


def test_a_student_ties_its_head_if_its_teacher_does(tmp_path):
    """An export that tied a head which the teacher does not tie would lose the head."""
    random_teacher(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    cfg = load_config(write_config(tmp_path, 1, str(tmp_path / "source"), "data"))
    assert trained_config(cfg, load_teacher_config(str(tmp_path / "source"))).tie_word_embeddings
    edited(tmp_path / "source", add_head)
    assert not trained_config(cfg, load_teacher_config(str(tmp_path / "source"))).tie_word_embeddings


def test_code_of_a_teacher_is_not_run_even_after_a_yes(tmp_path, monkeypatch):
    """transformers would ask at a terminal whether to run it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'boom')!r})\n")
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ValueError, match="'own'; supported are"):
        load_teacher_config(str(tmp_path))
    assert not (tmp_path / "boom").exists()


def test_folders_are_not_copied_as_sidecars(tmp_path):
    (tmp_path / "teacher" / "tokenizer_old").mkdir(parents=True)
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_sidecars(str(tmp_path / "teacher"), tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]


def test_a_sliding_window_of_mistral_is_refused(tmp_path):
    random_teacher(tmp_path, "mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding-window attention over 16 tokens"):
        load_teacher_config(str(tmp_path))


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="teacher_model.name: 'no/such/folder/anywhere'"):
        load_teacher_config("no/such/folder/anywhere")


def damage_drop(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_shape(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_extra(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.sinks": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_remove(folder):
    (folder / "model.safetensors").unlink()


def damage_index(folder):
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys([*names, "model.layers.9.mlp.up_proj.weight"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damage_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    names = load_file(folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damage_family(folder):
    set_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_drop, "1 tensors are missing, the first is model.layers.2.mlp.up_proj.weight"),
        (
            damage_shape,
            r"model.safetensors: model.norm.weight is \(3,\), config.json implies the shape \(48,\)",
        ),
        (damage_extra, "self_attn.sinks is .* implies no such tensor"),
        (damage_truncate, "model.safetensors: damaged or truncated"),
        (damage_remove, "model.safetensors is missing"),
        (damage_index, "index.json: model.layers.9.mlp.up_proj.weight is not in model.safetensors"),
        (damage_shard, "model-00001-of-00002.safetensors is missing"),
        (damage_family, "model_type 'gpt2'"),
    ],
)
def test_a_damaged_model_is_named_and_leaves_no_output(tmp_path, damage, message):
    random_teacher(tmp_path / "source", "qwen3")
    damage(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        load_teacher(str(tmp_path / "source"))
    with pytest.raises(ValueError, match=message) as error:
        run("qwen3", tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["source"]


def test_a_conversion_that_differs_fails_and_leaves_no_output(tmp_path, monkeypatch):
    random_teacher(tmp_path / "source", "qwen3")

    def changed(tensors):
        for name, tensor in tensors:
            yield name, tensor + 0.01 if "layers.3.mlp.up" in name else tensor

    monkeypatch.setattr(converter, "write_weights", lambda tensors, folder: write_weights(changed(tensors), folder))
    with pytest.raises(ValueError, match="--verify: .* differ by"):
        run("qwen3", tmp_path / "source", tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_full_disk_leaves_no_output(tmp_path, monkeypatch):
    random_teacher(tmp_path / "source", "qwen3")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(converter, "save_file", full)
    with pytest.raises(ValueError, match="out: No space left on device; nothing was written"):
        run("qwen3", tmp_path / "source", tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_an_existing_output_and_another_family_are_refused(tmp_path):
    random_teacher(tmp_path / "source", "qwen3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    paths = (tmp_path / "source", tmp_path / "out")
    with pytest.raises(ValueError, match="--output: .*out already exists"):
        run("qwen3", *paths)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="of type qwen3; this script is for qwen2"):
        run("qwen2", *paths)
    with pytest.raises(ValueError, match="--config: the checkpoint is no 8b: layers 4 instead of 36"):
        run("qwen3", *paths, config="8b")
    with pytest.raises(ValueError, match="--config: 9b is no published size"):
        run("qwen3", *paths, config="9b")
    assert os.listdir(tmp_path) == ["source"]


SCRIPTS = {"qwen2.5": "qwen2", "qwen3": "qwen3", "llama3.2": "llama"}


def run_script(name, source, output, monkeypatch):
    """Runs a script as __main__ in this process."""
    script = ROOT / "convert" / f"convert_from_{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options(model=source, output=output)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_converts_its_family(tmp_path, monkeypatch, name):
    random_teacher(tmp_path / "source", SCRIPTS[name])
    assert run_script(name, tmp_path / "source", tmp_path / "out", monkeypatch) is None
    assert (tmp_path / "out" / "model.safetensors").is_file()
    error = run_script(name, tmp_path / "source", tmp_path / "out", monkeypatch)
    assert error.startswith(f"convert_from_{name}.py: error: --output: ") and "out already exists" in error


def test_a_script_runs_from_another_folder(tmp_path):
    random_teacher(tmp_path / "source", "qwen3")
    command = [sys.executable, ROOT / "convert" / "convert_from_qwen3.py", *options(model="source", output="out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()

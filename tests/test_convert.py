"""A teacher read by us gives Hugging Face's logits; what cannot be read exactly is refused by name."""

import json

import pytest
import torch
from conftest import random_teacher
from safetensors.torch import load_file, save_file

from convert import load_teacher, load_teacher_config

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
TEACHERS = {
    "qwen2, biases": ("qwen2", {}),
    "qwen2, tied, padded vocabulary": ("qwen2", dict(tie_word_embeddings=True, vocab_size=128)),
    "qwen2, yarn": ("qwen2", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
                                                       original_max_position_embeddings=16))),
    "qwen3, q/k norms, free head_dim": ("qwen3", dict(rms_norm_eps=1e-3)),
    "qwen3, biases, one kv head": ("qwen3", dict(attention_bias=True, num_key_value_heads=1)),
    "llama": ("llama", {}),
    "llama, every bias, no grouping": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama3 rope scaling": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "linear rope scaling": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "dynamic rope scaling": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
}  # fmt: skip


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


def test_our_own_checkpoint_is_a_teacher_too(tmp_path, teacher_dir):
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
        ({"use_sliding_window": True, "max_window_layers": 2, "layer_types": None, "sliding_window": 8}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(tmp_path, change, message):
    random_teacher(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_teacher_config(str(tmp_path))


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="teacher_model.name: 'no/such/folder/anywhere'"):
        load_teacher_config("no/such/folder/anywhere")


def test_damaged_checkpoints_are_named(tmp_path):
    random_teacher(tmp_path, "qwen3")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    short = {k: v for k, v in tensors.items() if k != "model.layers.2.mlp.up_proj.weight"}
    save_file(short, file)
    with pytest.raises(ValueError, match="1 tensors are missing.*layers.2.mlp.up_proj"):
        load_teacher(str(tmp_path))
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="model.norm.weight"):
        load_teacher(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        load_teacher(str(tmp_path))

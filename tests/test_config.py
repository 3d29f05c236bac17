"""Configs: every shipped file parses, users' files load unchanged, bad input ends in one line that
names the key."""

import json
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import (
    ConfigError,
    check_kept_layers,
    dump_config,
    keys_of_other_stages,
    load_config,
)

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GOOD = {
    "stage": 2,
    "data": {"cache_dir": "chunks"},
    "teacher_model": {"name": "teacher"},
    "student_model": {"name": "gdn_v4", "keep_full_attention_layers": [0, 4]},
    "train": {
        "output_dir": "out",
        "student_init_ckpt": "stage1/converted-hf",
        "target_tokens": 1000,
        "batch_size": 4,
        "train_seq_len": 16,
        "lr": 1e-4,
    },
}


def load(tmp_path, *overrides, values=GOOD):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(file, overrides)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_config_parses(file):
    cfg = load_config(file)
    assert cfg.data.document_mask == (False if "quickstart" in file.parts else "auto")
    assert cfg.train.output_dir.endswith(f"stage{cfg.stage}")
    batch_plan(cfg, 1)
    if "quickstart" not in file.parts:
        batch_plan(cfg, 8)


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_every_deepspeed_config_parses(file):
    stages = {"stage_1.json": 1, "stage_2.json": 2, "stage_2_teacher.json": 3, "stage_3.json": 3}
    assert json.loads(file.read_text())["zero_optimization"]["stage"] == stages[file.name]


def test_a_users_file_loads_unchanged(tmp_path):
    file = tmp_path / "stage1.yaml"
    file.write_text("""
stage: 1
data: {cache_dir: data/chunked_context512}
teacher_model: {name: Qwen/Qwen2.5-1.5B-Instruct}
student_model: {name: gdn_v4, keep_full_attention_layers: []}
train:
  target_tokens: 600_000_000
  batch_size: 96
  micro_batch_size: 12
  train_seq_len: 512
  max_length: 512
  add_eos_token: True
  lr: 1e-3
  lr_attn: 1e-4
  lr_scheduler_type: cosine
  max_grad_norm: 1.0
  output_dir: out
  student_init_ckpt: None
  resume_from_checkpoint: None
  gradient_checkpointing: False
  kd_teacher_offload: none
  kd_teacher_use_cache: False
""")
    cfg = load_config(file)
    assert cfg.train.target_tokens == 600_000_000
    assert cfg.train.lr == 1e-3
    assert cfg.train.resume_from_checkpoint is None
    assert batch_plan(cfg, 8).steps == 600_000_000 // (96 * 512)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(cfg))
    assert load_config(again) == cfg


def test_overrides_come_after_the_file(tmp_path):
    overrides = [
        "train.lr=5e-5",
        "train.max_steps=7",
        "train.target_tokens=null",
        "student_model.keep_full_attention_layers=[3]",
    ]
    cfg = load(tmp_path, *overrides)
    assert cfg.train.lr == 5e-5
    assert cfg.student_model.keep_full_attention_layers == [3]
    assert batch_plan(cfg, 1).steps == 7


BAD = {
    "train.learning_rate=1": "train.learning_rate: unknown key",
    "train.lr_atn=1": r"train.lr_atn: unknown key; did you mean train.lr_attn\?",
    "modle={}": "modle: unknown key",
    "train.hidden_weight=0.1": "train.hidden_weight: was removed",
    # A variable that is not set, not null.
    "train.student_init_ckpt=": "train.student_init_ckpt: '' is empty; give a value, or null$",
    "train.student_init_ckpt=''": "train.student_init_ckpt: '' is empty; give a value, or null$",
    "teacher_model.distill_from=": "teacher_model.distill_from: '' is empty; give a value, or null$",
    "teacher_model.outputs= ": "teacher_model.outputs: '' is empty; give a value, or null$",
    "train.resume_from_checkpoint=": "train.resume_from_checkpoint: '' is empty; give a value, or null$",
    "train.output_dir=": "train.output_dir: '' is empty; give a value$",
    "train.lr_attn=": "train.lr_attn: '' is of type str; it must be float or null$",
    "train.cuda_graphs=": "train.cuda_graphs: '' must be one of auto, True, False$",
    "stage=4": "stage: 4 must be one of 1, 2, 3",
    "train.lr=fast": "train.lr: 'fast' is of type str; it must be float",
    "train.lr=-1.0": "train.lr: -1.0 must be at least 0",
    "train.batch_size=4.5": "train.batch_size: 4.5 is of type float; it must be int",
    "train.batch_size=true": "train.batch_size: True is of type bool",
    "train.batch_size=null": "train.batch_size: None",
    "train.gradient_checkpointing=1": "train.gradient_checkpointing: 1 is of type int; it must be bool or str",
    "train.gradient_checkpointing=all": "train.gradient_checkpointing: 'all' must be one of False, True, mlp",
    "train.kd_teacher_shard=maybe": "train.kd_teacher_shard: 'maybe' must be one of auto, always, never",
    "train.max_steps=5": "either target_tokens or train.max_steps, and not both; for 5 steps, add train.target_tokens=null",
    "train.max_length=32": r"train.max_length: 32 must equal train.train_seq_len \(16\)",
    "train.betas=[0.9]": "train.betas",
    "train.kl_weight=0": "train.kl_weight: 0",
    "student_model.keep_full_attention_layers=[1, 1]": r"keep_full_attention_layers: \[1, 1\] names a layer twice",
    "student_model.keep_full_attention_layers=[-1]": "negative layer",
    "student_model.keep_full_attention_layers=[a]": r"keep_full_attention_layers\[0\]: 'a'",
    "data=5": "data: 5 must be a mapping",
    "data={}": "data.cache_dir: missing",
    "train.train_only=[attention]": "train.train_only: 'attention' is no part of a model; choose of linear_attention, kept",
    "train.freeze=mlp": "train.freeze: 'mlp' is of type str; it must be list",
    "train.freeze=[linear_attention, kept_attention, norms, mlp, embeddings]": "leaves nothing to train; remove a part",
    "trainlr": "override 'trainlr': must look like key.path=value",
    "train.lr=[": "not valid YAML",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input(tmp_path, override):
    with pytest.raises(ConfigError, match=BAD[override]) as error:
        load(tmp_path, override)
    assert "\n" not in str(error.value)


def test_only_stage_2_may_start_from_the_teacher(tmp_path):
    """Whether its student can, the models decide."""
    assert load(tmp_path, "train.student_init_ckpt=null").train.student_init_ckpt is None
    with pytest.raises(
        ConfigError, match="train.student_init_ckpt: missing; stage 3 starts from stage 2's converted-hf"
    ):
        load(tmp_path, "stage=3", "train.student_init_ckpt=null")


def test_what_trains_is_said_once(tmp_path):
    message = r"train.freeze: \['mlp'\] with train.train_only \['norms'\]; give one of them"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "train.freeze=[mlp]", "train.train_only=[norms]")


def test_an_offloaded_teacher_must_be_sharded(tmp_path):
    load(tmp_path, "train.kd_teacher_offload=cpu")
    with pytest.raises(
        ConfigError,
        match="train.kd_teacher_offload: cpu is for a sharded teacher, .* never; set that to auto",
    ):
        load(tmp_path, "train.kd_teacher_offload=cpu", "train.kd_teacher_shard=never")


def test_stage_1_with_kept_layers(tmp_path):
    with pytest.raises(ConfigError, match=r"keep_full_attention_layers: \[0, 4\] must be \[\] in stage 1"):
        load(tmp_path, "stage=1", "train.student_init_ckpt=null")


@pytest.mark.parametrize(
    "stage, set_to, unread",
    [
        (
            1,
            {
                "kd_teacher_offload": "cpu",
                "kd_teacher_shard": "never",
                "kd_teacher_use_cache": True,
                "kl_temperature": 2.0,
                "alignment_loss": "l2",
            },
            ["kl_temperature", "kd_teacher_shard", "kd_teacher_offload", "kd_teacher_use_cache"],
        ),
        (
            2,
            {
                "kd_teacher_offload": "cpu",
                "kl_weight": 0.5,
                "ce_weight": 0.5,
                "alignment_loss": "l2",
            },
            ["alignment_loss"],
        ),
        (
            3,
            {"kd_teacher_use_cache": True, "kl_weight": 0.5, "ce_weight": 0.5},
            ["kl_weight", "ce_weight", "kd_teacher_use_cache"],
        ),
        (1, {"kd_teacher_offload": "none", "kl_weight": 1.0}, []),
    ],
)
def test_keys_that_a_stage_does_not_read_are_known(tmp_path, stage, set_to, unread):
    values = {**GOOD, "stage": stage, "train": GOOD["train"] | set_to}
    if stage == 1:
        values["student_model"] = {"name": "gdn_v4"}
        del values["train"]["student_init_ckpt"]
    assert keys_of_other_stages(load(tmp_path, values=values)) == [f"train.{name}" for name in unread]


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("stage: [")
    with pytest.raises(ConfigError, match="broken.yaml: not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_kept_layers_must_exist(tmp_path):
    cfg = load(tmp_path)
    check_kept_layers(cfg, 5)
    with pytest.raises(ConfigError, match=r"\[4\] out of range; the teacher's layers are 0..3"):
        check_kept_layers(cfg, 4)


@pytest.mark.parametrize("batch, micro, world, accum", [(4, 1, 1, 4), (4, 2, 2, 1), (96, 12, 8, 1), (96, 3, 8, 4)])
def test_batch_plan_is_exact(tmp_path, batch, micro, world, accum):
    plan = batch_plan(load(tmp_path, f"train.batch_size={batch}", f"train.micro_batch_size={micro}"), world)
    assert plan.grad_accum == accum
    assert plan.grad_accum * micro * world == batch
    assert plan.steps == max(1, 1000 // (batch * 16))
    assert plan.tokens == plan.steps * batch * 16


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(ConfigError, match=r"train.batch_size: 4 must be a multiple of .*\(3 x 2 = 6\).*try 6"):
        batch_plan(load(tmp_path, "train.micro_batch_size=3"), 2)


def test_saves_and_evals_happen_within_the_run(tmp_path):
    plan = batch_plan(load(tmp_path, "train.target_tokens=320"), 1)
    assert plan.steps == 5
    assert plan.every(1000) == 5
    assert plan.every(None) == 1
    assert plan.every(2) == 2

"""The YAML files of a training stage, as typed and checked dataclasses.

`load_config(path, overrides)` merges defaults < file < `key.path=value` overrides and checks all that can be checked
without reading a model or data. Everything wrong is a `ConfigError` of one line: key, value, cure.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

SCHEDULERS = ("constant", "linear", "cosine")


class ConfigError(ValueError):
    """A config that cannot be run; its message is one line naming key, value and cure."""


def key(
    default: Any = MISSING,
    help: str = "",
    choices: tuple = (),
    minimum: float | None = None,
    stages: tuple = (1, 2, 3),
) -> Any:
    """A config field: what it means (for docs/config.md), what values it takes, and the stages that
    read it."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "stages": stages}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    cache_dir: str = key(help="folder of chunks that preprocess_chunk.py wrote: `DIR/chunked_context512`")


@dataclass(frozen=True)
class TeacherConfig:
    name: str = key(help="teacher: a Hugging Face name or a folder, see Teachers")


@dataclass(frozen=True)
class StudentModelConfig:
    name: str = key(help="linear attention of the student, see Students")
    keep_full_attention_layers: list[int] = key([], help="0-based layers that keep softmax attention; [] in stage 1")
    options: dict = key({}, help="hyper-parameters of the linear attention, see Students")


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str = key(help="run folder: resolved config, metrics.jsonl, checkpoints, converted-hf")
    batch_size: int = key(help="sequences per optimiser step, over all devices", minimum=1)
    train_seq_len: int = key(help="tokens per sequence; the context length of the chunks", minimum=2)
    lr: float = key(help="peak learning rate of everything that is not linear attention", minimum=0)
    micro_batch_size: int = key(1, help="sequences per device and forward pass", minimum=1)
    target_tokens: int | None = key(
        None,
        help="training tokens; steps = target_tokens // (batch_size x train_seq_len)",
        minimum=1,
    )
    max_steps: int | None = key(None, help="optimiser steps, instead of target_tokens", minimum=1)
    lr_attn: float | None = key(None, help="peak learning rate of the linear attention modules; null: lr", minimum=0)
    lr_attn_scope: str = key(
        "linear",
        help="what takes lr_attn: the linear attentions, or all attentions",
        choices=("linear", "all"),
    )
    lr_scheduler_type: str = key("cosine", help="shape of the learning rate after warm-up", choices=SCHEDULERS)
    warmup_steps: int = key(50, help="steps of linear warm-up (at most a tenth of the run)", minimum=0)
    final_lr: float = key(1e-5, help="learning rate at the end of cosine and linear, at most the peak", minimum=0)
    weight_decay: float = key(0.0, help="AdamW's decay, on matrices only", minimum=0)
    betas: list[float] = key([0.9, 0.95], help="AdamW's betas")
    optimizer: str = key(
        "adamw",
        help="adamw, or adamw_8bit (bitsandbytes): its states take 2 bytes a parameter instead of 8",
        choices=("adamw", "adamw_8bit"),
    )
    max_grad_norm: float = key(1.0, help="gradient norm at which gradients are clipped; 0: never", minimum=0)
    student_init_ckpt: str | None = key(None, help="start of stage 2 (stage 1's converted-hf) and stage 3 (stage 2's)")
    max_length: int | None = key(None, help="accepted; must equal train_seq_len")
    add_eos_token: bool | None = key(
        None,
        help="accepted; preprocessing always puts EOS between documents, so that false is a warning",
    )
    resume_from_checkpoint: str | bool | None = key(
        "auto",
        help="auto or true: go on from the newest undamaged checkpoint in output_dir, if any; null: refuse if output_dir holds a run; a checkpoint-N folder of output_dir: from that one, once; given again, from the newest",
    )
    gradient_checkpointing: bool | str = key(
        False,
        help="stages 2 and 3: what backward computes again instead of storing it: mlp, what is inside the MLPs, or true, all of a layer but its input; stage 1 never stores more than a layer's",
        choices=(False, True, "mlp"),
    )
    alignment_loss: str = key(
        "mse",
        help="stage 1: mse, or l2 (norm over sqrt(D), RADLADS)",
        choices=("mse", "l2"),
        stages=(1,),
    )
    calibrate_init: int = key(
        0,
        help="stage 1: fit decay and output projections to so many batches of micro_batch_size sequences before the first step; 0: none",
        minimum=0,
    )
    kl_temperature: float = key(1.0, help="stage 2: temperature tau; the loss is tau^2 KL", minimum=1e-3, stages=(2,))
    kl_weight: float = key(1.0, help="stage 2: weight of the KL", minimum=0, stages=(2,))
    ce_weight: float = key(0.0, help="stage 2: weight of the next-token cross-entropy", minimum=0, stages=(2,))
    kd_teacher_shard: str = key(
        "auto",
        help="stage 2: shard the teacher with ZeRO-3; auto: replicate it where it fits",
        choices=("auto", "always", "never"),
        stages=(2,),
    )
    kd_teacher_offload: str = key(
        "none",
        help="stage 2: keep a sharded teacher's weights in CPU memory",
        choices=("none", "cpu"),
        stages=(2,),
    )
    kd_teacher_use_cache: bool = key(
        False, help="accepted; the teacher's forward pass has no use for a KV cache", stages=(2,)
    )
    zero_stage: int | None = key(
        None,
        help="DeepSpeed ZeRO stage; null: the training stage's own number, but 1 for one process, where there is nothing to shard; a run that goes on keeps its own, so say 3 if more GPUs shall go on with it",
        choices=(None, 1, 2, 3),
    )
    cuda_graphs: bool = key(
        False,
        help="on a GPU: replay a step's forward and backward passes as CUDA graphs, so that the GPU does not wait for Python: several times as fast for a small model, for memory of their own (see Performance); not under ZeRO-3, nor with a sharded teacher",
    )
    dtype: str = key(
        "auto",
        help="compute dtype; auto: bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp32"),
    )
    save_steps: int | None = key(None, help="steps between checkpoints; null: a tenth of the run", minimum=1)
    save_minutes: float | None = key(
        30.0,
        help="minutes after which a checkpoint is due, besides save_steps; null: never",
        minimum=0,
    )
    save_total_limit: int = key(2, help="checkpoints kept", minimum=1)
    eval_steps: int | None = key(None, help="steps between held-out evaluations; null: a tenth of the run", minimum=1)
    eval_batches: int = key(16, help="micro-batches of a held-out evaluation during training", minimum=1)
    logging_steps: int = key(10, help="steps between logged metrics", minimum=1)
    report_to: str = key(
        "auto",
        help="wandb or none; auto: wandb if WANDB_API_KEY or WANDB_MODE is set",
        choices=("auto", "wandb", "none"),
    )
    hang_minutes: float = key(
        30.0,
        help="minutes without progress after which a rank that hangs ends the run",
        minimum=0.01,
    )
    seed: int = key(42, help="seed of data order and fresh weights", minimum=0)


@dataclass(frozen=True)
class Config:
    stage: int = key(
        help="1 align attention outputs, 2 distil logits, 3 finetune on long context",
        choices=(1, 2, 3),
    )
    data: DataConfig = key()
    teacher_model: TeacherConfig = key()
    student_model: StudentModelConfig = key()
    train: TrainConfig = key()


def convert_value(path: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, or ConfigError. Numbers that YAML 1.1 leaves as text (1e-4, 600_000_000)
    become numbers."""
    if value == "None":
        value = None
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    origins = [typing.get_origin(option) or option for option in options]
    if isinstance(value, str) and not {str, bool} & set(origins):
        try:
            value = float(value.replace("_", ""))
            value = int(value) if value.is_integer() and int in origins else value
        except ValueError:
            pass
    if isinstance(value, float) and value.is_integer() and float not in origins and int in origins:
        value = int(value)
    if type(value) is int and float in origins and int not in origins:
        value = float(value)
    if type(value) not in origins:
        wanted = " or ".join(
            "null" if option is type(None) else getattr(option, "__name__", str(option)) for option in options
        )
        raise ConfigError(f"{path}: {value!r} is of type {type(value).__name__}; it must be {wanted}")
    for option in options:
        if typing.get_origin(option) is list and isinstance(value, list):
            return [convert_value(f"{path}[{i}]", item, typing.get_args(option)[0]) for i, item in enumerate(value)]
    return value


def _build(cls: type, values: Any, path: str = "") -> Any:
    """The dataclass `cls` from a mapping; ConfigError for unknown, missing or ill-typed keys."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'}: {values!r} must be a mapping of keys to values")
    known, hints, built = {f.name: f for f in fields(cls)}, typing.get_type_hints(cls), {}
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{prefix}{name}: unknown key; {cure}")
    for name, spec in known.items():
        full = f"{prefix}{name}"
        if is_dataclass(hints[name]):
            built[name] = _build(hints[name], values.get(name, {}), full)
        elif name in values:
            value = built[name] = convert_value(full, values[name], hints[name])
            choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
            if choices and value not in choices:
                raise ConfigError(f"{full}: {value!r} must be one of {', '.join(map(str, choices))}")
            if minimum is not None and value is not None and value < minimum:
                raise ConfigError(f"{full}: {value} must be at least {minimum}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"{full}: missing; {spec.metadata['help']}")
    return cls(**built)


def _check(cfg: Config) -> None:
    """The combinations that no run can have."""
    train, kept = cfg.train, cfg.student_model.keep_full_attention_layers
    if (train.target_tokens is None) == (train.max_steps is None):
        raise ConfigError("train.target_tokens: give either target_tokens or train.max_steps, and not both")
    if train.max_length not in (None, train.train_seq_len):
        raise ConfigError(
            f"train.max_length: {train.max_length} must equal train.train_seq_len ({train.train_seq_len})"
        )
    if len(set(kept)) != len(kept):
        raise ConfigError(f"student_model.keep_full_attention_layers: {kept} names a layer twice; list each once")
    if any(layer < 0 for layer in kept):
        raise ConfigError(f"student_model.keep_full_attention_layers: {kept} has a negative layer; layers count from 0")
    if cfg.stage == 1 and kept:
        raise ConfigError(f"student_model.keep_full_attention_layers: {kept} must be [] in stage 1, which trains all")
    if cfg.stage > 1 and not train.student_init_ckpt:
        raise ConfigError(
            f"train.student_init_ckpt: missing; stage {cfg.stage} starts from stage {cfg.stage - 1}'s converted-hf"
        )
    if cfg.stage > 1 and train.calibrate_init:
        raise ConfigError(
            f"train.calibrate_init: {train.calibrate_init} is for stage 1, whose students start from the teacher; remove it"
        )
    if cfg.stage == 1 and train.student_init_ckpt:
        raise ConfigError("train.student_init_ckpt: stage 1 starts from the teacher; remove it")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"train.betas: {train.betas} must be two numbers in [0, 1)")
    if cfg.stage == 2 and train.kd_teacher_offload == "cpu" and train.kd_teacher_shard == "never":
        raise ConfigError(
            "train.kd_teacher_offload: cpu is for a sharded teacher, but train.kd_teacher_shard is never; say auto"
        )
    if cfg.stage == 2 and train.kl_weight == train.ce_weight == 0:
        raise ConfigError("train.kl_weight: 0 with train.ce_weight 0 leaves no loss; give one of them a weight")


def _override(values: dict, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: must look like key.path=value, for example train.lr=1e-4")
    *parents, name = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not valid YAML") from None


def load_config(path: str | Path, overrides: typing.Iterable[str] = ()) -> Config:
    """The checked config of a stage. Raises ConfigError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --cfg an existing YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    for override in overrides:
        if not isinstance(values, dict):
            break
        _override(values, override)
    try:
        cfg = _build(Config, values)
        _check(cfg)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return cfg


def keys_of_other_stages(cfg: Config) -> list[str]:
    """The keys of `train` that are set to something and that the config's stage does not read."""
    unread = [spec for spec in fields(TrainConfig) if cfg.stage not in spec.metadata["stages"]]
    return [f"train.{spec.name}" for spec in unread if getattr(cfg.train, spec.name) != spec.default]


def check_kept_layers(cfg: Config, num_layers: int) -> None:
    """Raises ConfigError if a kept layer lies outside a teacher of `num_layers`."""
    kept = cfg.student_model.keep_full_attention_layers
    if outside := [layer for layer in kept if layer >= num_layers]:
        raise ConfigError(
            f"student_model.keep_full_attention_layers: {outside} out of range; the teacher's layers are 0..{num_layers - 1}"
        )


def to_dict(cfg: Any) -> dict:
    """The resolved config as plain nested dicts, in the order of the fields."""
    return {f.name: to_dict(v) if is_dataclass(v := getattr(cfg, f.name)) else v for f in fields(cfg)}


def dump_config(cfg: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False)


def reference() -> str:
    """The config reference of docs/config.md, a Markdown table made from the fields."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    hints = typing.get_type_hints(Config)
    for section in fields(Config):
        parts = fields(hints[section.name]) if is_dataclass(hints[section.name]) else [section]
        for spec in parts:
            name = spec.name if spec is section else f"{section.name}.{spec.name}"
            default = (
                spec.default
                if spec.default is not MISSING
                else ("required" if spec.default_factory is MISSING else spec.default_factory())
            )
            default = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            lines.append(f"| `{name}` | {default} | {spec.metadata['help']} |")
    return "\n".join(lines)

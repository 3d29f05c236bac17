"""The YAML files of a training stage, as typed and checked dataclasses.

`load_config(path, overrides)` merges defaults < file < `key.path=value` overrides and checks all
that can be checked without reading a model or data. Everything wrong is a `ConfigError` of one
line: key, value, cure.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

FOR_OLD_FILES = "Allowed so that files of fla-org/hybrid-distillation load"
FOR_A_REPLICA = "set train.kd_teacher_shard=never and train.kd_teacher_offload=none, or precision: exact"
SCHEDULERS = ("constant", "linear", "cosine")
# Parts of a student model, for train.train_only and train.freeze.
PARTS = ("linear_attention", "kept_attention", "norms", "mlp", "embeddings")
# The types of values, as docs/config.md names them.
SHOWN_TYPES = {
    bool: "true, false",
    dict: "mapping",
    float: "number",
    int: "whole number",
    list: "list",
    str: "text",
    type(None): "null",
}


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
    read it.

    choices: the values; with `minimum`, the values besides numbers from that on.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "stages": stages}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    cache_dir: str = key(help="folder of chunks that preprocess_chunk.py wrote: `DIR/chunked_context512`")
    document_mask: bool | str = key(
        "auto",
        help=(
            "read the documents of a chunk one by one, see docs/data.md#documents. auto: where the chunks record "
            "where documents begin, as preprocess_chunk.py makes them; a run keeps what it started with"
        ),
        choices=("auto", True, False),
    )


@dataclass(frozen=True)
class TeacherConfig:
    name: str = key(help="teacher: a Hugging Face name or a folder, see docs/teachers.md")
    distill_from: str | None = key(
        None,
        help=(
            "another teacher whose logits are distilled, with the same tokenizer, usually larger; the student "
            "starts from `name`, see docs/training.md#another-teacher. null: `name`"
        ),
        stages=(2,),
    )
    outputs: str | None = key(
        None,
        help=(
            "folder of the teacher's top tokens that store_teacher.py wrote for these chunks; with kl topk, stage 2 then "
            "needs no teacher in memory, see docs/training.md#stored-teacher-outputs"
        ),
        stages=(2,),
    )
    precision: str = key(
        "exact",
        help=(
            "exact: train.dtype. fp8: the frozen teacher's MLPs in FP8, refused if that changes its "
            "predictions, see docs/training.md#teacher-in-fp8"
        ),
        choices=("exact", "fp8"),
        stages=(1, 2),
    )


@dataclass(frozen=True)
class StudentModelConfig:
    name: str = key(help="student layer, see docs/students.md")
    keep_full_attention_layers: list[int] = key(
        [],
        help="layers that keep full attention, counted from 0; [] in stage 1",
    )
    options: dict = key(
        {},
        help="hyper-parameters of the student layer, see docs/students.md#options",
    )


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str = key(help="run folder: resolved config, metrics.jsonl, checkpoints, converted-hf")
    batch_size: int = key(
        help="sequences per optimiser step, over all devices",
        minimum=1,
    )
    train_seq_len: int = key(
        help="tokens per sequence; the context length of the chunks",
        minimum=2,
    )
    lr: float = key(
        help="peak learning rate of all trained weights but those that lr_attn is for",
        minimum=0,
    )
    micro_batch_size: int | str = key(
        1,
        help=(
            "sequences per device and forward pass. auto: measured on the GPU before a run's first step, "
            "see docs/training.md#micro-batch-size"
        ),
        choices=("auto",),
        minimum=1,
    )
    target_tokens: int | None = key(
        None,
        help="training tokens; steps = target_tokens // (batch_size x train_seq_len)",
        minimum=1,
    )
    max_steps: int | None = key(
        None,
        help="optimiser steps, instead of target_tokens",
        minimum=1,
    )
    lr_attn: float | None = key(
        None,
        help="peak learning rate of the modules that lr_attn_scope names; null: lr",
        minimum=0,
    )
    lr_attn_scope: str = key(
        "linear",
        help="linear: lr_attn is for the student layers; all: for the kept layers' attention too",
        choices=("linear", "all"),
    )
    train_only: list[str] = key(
        [],
        help=(
            f"parts that train, of {', '.join(PARTS)}; [] trains all. linear_attention: the student layers. norms: those "
            "outside attention. embeddings: input embeddings and output head. What is frozen needs no gradients or "
            "optimiser states"
        ),
        stages=(2, 3),
    )
    freeze: list[str] = key(
        [],
        help="parts that do not train, instead of train_only",
        stages=(2, 3),
    )
    lr_scheduler_type: str = key(
        "cosine",
        help="shape of the learning-rate schedule after warm-up",
        choices=SCHEDULERS,
    )
    warmup_steps: int = key(
        50,
        help="steps of linear warm-up (at most a tenth of the run)",
        minimum=0,
    )
    final_lr: float = key(
        1e-5,
        help="learning rate at the end of cosine and linear schedules, at most the peak",
        minimum=0,
    )
    weight_decay: float = key(
        0.0,
        help="AdamW's weight decay, on matrices only",
        minimum=0,
    )
    betas: list[float] = key([0.9, 0.95], help="AdamW's betas")
    optimizer: str = key(
        "adamw",
        help="adamw, or adamw_8bit (bitsandbytes): 2 bytes of moments per parameter, not 8",
        choices=("adamw", "adamw_8bit"),
    )
    max_grad_norm: float = key(
        1.0,
        help="gradient clipping: the largest global norm; 0: no clipping",
        minimum=0,
    )
    student_init_ckpt: str | None = key(
        None,
        help="converted-hf folder of the stage before, from which this stage starts; stage 2 can start from the teacher "
        "instead (null) if the student has no weights of its own (swa_v1)",
        stages=(2, 3),
    )
    max_length: int | None = key(
        None,
        help="no effect; must equal train_seq_len. " + FOR_OLD_FILES,
    )
    add_eos_token: bool | None = key(
        None,
        help="no effect; false gives a warning, because EOS always separates documents. " + FOR_OLD_FILES,
    )
    resume_from_checkpoint: str | bool | None = key(
        "auto",
        help=(
            "auto or true: resume from the newest undamaged checkpoint in output_dir, if any. "
            "null: start, or end with an error if output_dir has a run. "
            "A checkpoint-N folder of output_dir: the first start resumes from it and sets later "
            "checkpoints aside; the same command, rerun, resumes from the newest"
        ),
    )
    gradient_checkpointing: bool | str = key(
        False,
        help=(
            "activation checkpointing. false: none. mlp: activations inside the MLPs are recomputed. "
            "true: all activations of a layer are"
        ),
        choices=(False, True, "mlp"),
        stages=(2, 3),
    )
    alignment_loss: str = key(
        "mse",
        help=("mse, or l2: the norm of the difference over sqrt(hidden size), as in RADLADS (arXiv 2505.03005)"),
        choices=("mse", "l2"),
        stages=(1,),
    )
    calibrate_init: int = key(
        0,
        help=(
            "before the first step, fit decay, gates and output projections in closed form to this "
            "many batches of micro_batch_size sequences, see docs/students.md#calibrated-start; "
            "0: do not"
        ),
        minimum=0,
        stages=(1,),
    )
    kl: str = key(
        "forward",
        help=(
            "divergence of stage 2: forward, KL(teacher || student); reverse, KL(student || teacher); jsd, "
            "Jensen-Shannon; topk, the forward KL over the teacher's kl_top_k most likely tokens and, as one event, all "
            "others"
        ),
        choices=("forward", "reverse", "jsd", "topk"),
        stages=(2,),
    )
    kl_top_k: int = key(
        64,
        help="tokens of kl topk",
        minimum=1,
        stages=(2,),
    )
    kl_temperature: float = key(
        1.0,
        help="temperature tau of teacher and student; the loss is tau^2 times the divergence",
        minimum=1e-3,
        stages=(2,),
    )
    kl_weight: float = key(
        1.0,
        help="weight of the divergence",
        minimum=0,
        stages=(2,),
    )
    ce_weight: float = key(
        0.0,
        help="weight of the next-token cross-entropy",
        minimum=0,
        stages=(2,),
    )
    kd_teacher_shard: str = key(
        "auto",
        help="shard the teacher with ZeRO-3; auto: if its replicas do not fit",
        choices=("auto", "always", "never"),
        stages=(2,),
    )
    kd_teacher_offload: str = key(
        "none",
        help="keep the weights of a sharded teacher in CPU memory",
        choices=("none", "cpu"),
        stages=(2,),
    )
    kd_teacher_use_cache: bool = key(
        False,
        help="no effect. " + FOR_OLD_FILES,
        stages=(2,),
    )
    zero_stage: int | None = key(
        None,
        help=(
            "DeepSpeed's ZeRO stage. null: equal to the training stage; 1 on one process. "
            "A run keeps what it started with: set 3 at the start to resume on more GPUs with "
            "sharded parameters"
        ),
        choices=(None, 1, 2, 3),
    )
    cuda_graphs: bool | str = key(
        "auto",
        help=(
            "on a GPU: replay the forward and backward passes of a step as CUDA graphs, which "
            "avoids the overhead of kernel launches: several times as fast for a small model, at "
            "the cost of extra memory, see docs/performance.md#cuda-graphs. auto: in stage 1, and for "
            "models of less than a billion parameters. Not used with ZeRO-3 or a sharded teacher; nor with "
            "document_mask in fp32 or for some students, see docs/data.md#documents"
        ),
        choices=("auto", True, False),
    )
    dtype: str = key(
        "auto",
        help="compute dtype; auto: bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp32"),
    )
    save_steps: int | None = key(
        None,
        help="steps between checkpoints; null: a tenth of the run",
        minimum=1,
    )
    save_minutes: float | None = key(
        30.0,
        help="longest time between checkpoints in minutes, besides save_steps; null: no limit",
        minimum=0,
    )
    save_total_limit: int = key(2, help="number of checkpoints to keep", minimum=1)
    eval_steps: int | None = key(
        None,
        help="steps between held-out evaluations; null: a tenth of the run",
        minimum=1,
    )
    eval_batches: int = key(
        16,
        help="micro-batches per held-out evaluation during training",
        minimum=1,
    )
    logging_steps: int = key(10, help="steps between logged metrics", minimum=1)
    report_to: str = key(
        "auto",
        help="wandb or none; auto: wandb if WANDB_API_KEY or WANDB_MODE is set",
        choices=("auto", "wandb", "none"),
    )
    hang_minutes: float = key(
        30.0,
        help="minutes without progress after which a hanging rank ends the run",
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


# ------------------------------------------------------------------------ values
def convert_value(path: str, value: Any, kind: Any) -> Any:
    """`value` as a value of the annotation `kind`, or ConfigError, which names it `path`."""
    if value == "None":
        value = None
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    allowed = [typing.get_origin(option) or option for option in options]
    if isinstance(value, str) and (int in allowed or str not in allowed) and bool not in allowed:
        value = _number_from_text(value)
    value = _as_wanted_number(value, allowed)
    if type(value) not in allowed:
        wanted = " or ".join(_shown_type(option) for option in options)
        raise ConfigError(f"{path}: {value!r} is of type {type(value).__name__}; it must be {wanted}")
    if not isinstance(value, list):
        return value
    (list_kind,) = (option for option in options if typing.get_origin(option) is list)
    (item_kind,) = typing.get_args(list_kind)
    return [convert_value(f"{path}[{i}]", item, item_kind) for i, item in enumerate(value)]


def _shown_type(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))


def _number_from_text(text: str) -> float | str:
    """The number that YAML 1.1 leaves as text (1e-4, 600_000_000), or the text."""
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text


def _as_wanted_number(value: Any, allowed: list[type]) -> Any:
    """A whole float as int, or an int as float, where only the other type is allowed."""
    if isinstance(value, float) and value.is_integer() and int in allowed and float not in allowed:
        return int(value)
    if type(value) is int and float in allowed and int not in allowed:
        return float(value)
    return value


# Keys that were removed, with the value at which they did nothing: the configs that runs recorded have them.
REMOVED = {"train.hidden_weight": 0.0, "train.hidden_layers": [], "train.alignment_target": "attention"}


def _build(cls: type, values: Any, path: str = "") -> Any:
    """The dataclass `cls` from a mapping; ConfigError for unknown, missing or ill-typed keys."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'}: {values!r} must be a mapping of keys to values")
    prefix = f"{path}." if path else ""
    known = {spec.name: spec for spec in fields(cls)}
    hints = typing.get_type_hints(cls)
    _check_names(values, known, prefix)
    built = {}
    for name, spec in known.items():
        full = f"{prefix}{name}"
        if is_dataclass(hints[name]):
            built[name] = _build(hints[name], values.get(name, {}), full)
        elif name in values:
            built[name] = convert_value(full, values[name], hints[name])
            _check_value(full, built[name], spec)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"{full}: missing; {spec.metadata['help']}")
    return cls(**built)


def _check_names(values: dict, known: dict, prefix: str) -> None:
    for name, value in values.items():
        full = f"{prefix}{name}"
        if full in REMOVED:
            if value != REMOVED[full]:
                raise ConfigError(f"{full}: was removed, because it gained nothing (docs/recipes.md); leave it out")
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{full}: unknown key; {cure}")


def _check_value(path: str, value: Any, spec: Field) -> None:
    choices = spec.metadata["choices"]
    minimum = spec.metadata["minimum"]
    if value in choices or value is None and not choices:
        return
    if value == "" and not choices:
        cure = ", or null" if "None" in spec.type else ""
        raise ConfigError(f"{path}: '' is empty; give a value{cure}")
    if minimum is not None and not isinstance(value, str):
        if value < minimum:
            raise ConfigError(f"{path}: {value} must be at least {minimum}")
    elif choices:
        numbers = "" if minimum is None else f"a number of at least {minimum} or "
        raise ConfigError(f"{path}: {value!r} must be {numbers}one of {', '.join(map(str, choices))}")


# ------------------------------------------------------------------------ combinations
def _check(cfg: Config) -> None:
    """Raises ConfigError for combinations that no run can have."""
    _check_numbers(cfg.train)
    _check_parts(cfg.train)
    _check_layers(cfg)
    _check_start(cfg)
    if cfg.teacher_model.precision == "fp8":
        _check_fp8(cfg)
    if cfg.stage == 2:
        _check_distillation(cfg.train)
        if cfg.teacher_model.outputs and cfg.train.kl != "topk":
            raise ConfigError(
                f"train.kl: {cfg.train.kl} needs all logits, of which teacher_model.outputs holds the top ones; set topk"
            )


def _check_numbers(train: TrainConfig) -> None:
    if (train.target_tokens is None) == (train.max_steps is None):
        cure = "" if train.max_steps is None else f"; for {train.max_steps} steps, add train.target_tokens=null"
        raise ConfigError(f"train.target_tokens: give either target_tokens or train.max_steps, and not both{cure}")
    if train.max_length not in (None, train.train_seq_len):
        raise ConfigError(
            f"train.max_length: {train.max_length} must equal train.train_seq_len ({train.train_seq_len})"
        )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"train.betas: {train.betas} must be two numbers in [0, 1)")


def _check_parts(train: TrainConfig) -> None:
    for name in ("train_only", "freeze"):
        for part in getattr(train, name):
            if part not in PARTS:
                raise ConfigError(f"train.{name}: {part!r} is no part of a model; choose of {', '.join(PARTS)}")
    if train.train_only and train.freeze:
        raise ConfigError(f"train.freeze: {train.freeze} with train.train_only {train.train_only}; give one of them")
    if not trained_parts(train):
        raise ConfigError(f"train.freeze: {train.freeze} leaves nothing to train; remove a part")


def trained_parts(train: TrainConfig) -> list[str]:
    """The parts that train.train_only and train.freeze leave to train."""
    return [part for part in train.train_only or PARTS if part not in train.freeze]


def _check_layers(cfg: Config) -> None:
    kept = cfg.student_model.keep_full_attention_layers
    path = f"student_model.keep_full_attention_layers: {kept}"
    if len(set(kept)) != len(kept):
        raise ConfigError(f"{path} names a layer twice; list each once")
    if any(layer < 0 for layer in kept):
        raise ConfigError(f"{path} has a negative layer; layers count from 0")
    if cfg.stage == 1 and kept:
        raise ConfigError(f"{path} must be [] in stage 1, which trains all")


def _check_start(cfg: Config) -> None:
    train = cfg.train
    if cfg.stage == 1:
        if train.student_init_ckpt:
            raise ConfigError("train.student_init_ckpt: stage 1 starts from the teacher; remove it")
        return
    if cfg.stage == 3 and not train.student_init_ckpt:
        raise ConfigError("train.student_init_ckpt: missing; stage 3 starts from stage 2's converted-hf")
    if train.calibrate_init:
        raise ConfigError(
            f"train.calibrate_init: {train.calibrate_init} is for stage 1, whose students start from the teacher; "
            "remove it"
        )


def _check_fp8(cfg: Config) -> None:
    key = "teacher_model.precision: fp8"
    if cfg.stage == 3:
        raise ConfigError(f"{key} is for stages 1 and 2, stage 3 has no teacher; remove it")
    if cfg.train.dtype == "fp32":
        raise ConfigError(f"{key} needs train.dtype bf16, not fp32; set one of them to another value")
    if cfg.stage == 2 and (cfg.train.kd_teacher_shard == "always" or cfg.train.kd_teacher_offload == "cpu"):
        raise ConfigError(f"{key} needs a replica of the teacher on every GPU; {FOR_A_REPLICA}")


def _check_distillation(train: TrainConfig) -> None:
    if train.kd_teacher_offload == "cpu" and train.kd_teacher_shard == "never":
        raise ConfigError(
            "train.kd_teacher_offload: cpu is for a sharded teacher, but train.kd_teacher_shard is never; "
            "set that to auto"
        )
    if train.kl_weight == train.ce_weight == 0:
        raise ConfigError("train.kl_weight: 0 with train.ce_weight 0 leaves no loss; give one of them a weight")


# ------------------------------------------------------------------------ files
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
        # YAML reads nothing as null, but key=$VARIABLE without a value is a mistake.
        values[name] = yaml.safe_load(text) if text.strip() else ""
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
    """The keys of `teacher_model` and `train` that are set to something and that the config's stage
    does not read."""
    names = []
    for section in ("teacher_model", "train"):
        values = getattr(cfg, section)
        for spec in fields(values):
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            if getattr(values, spec.name) != default and cfg.stage not in spec.metadata["stages"]:
                names.append(f"{section}.{spec.name}")
    return names


def check_kept_layers(cfg: Config, num_layers: int) -> None:
    """Raises ConfigError if a kept layer lies outside a teacher of `num_layers`."""
    kept = cfg.student_model.keep_full_attention_layers
    if outside := [layer for layer in kept if layer >= num_layers]:
        raise ConfigError(
            f"student_model.keep_full_attention_layers: {outside} out of range; "
            f"the teacher's layers are 0..{num_layers - 1}"
        )


def check_cuda_graphs(cfg: Config, reads_documents: bool) -> None:
    """Raises ConfigError if CUDA graphs are wanted, and the student reads documents on the host."""
    if cfg.train.cuda_graphs is True and reads_documents:
        raise ConfigError(
            f"train.cuda_graphs: true replays passes without the host, but {cfg.student_model.name} reads documents "
            "there; set it to auto, or data.document_mask to false"
        )


def to_dict(cfg: Any) -> dict:
    """The resolved config as plain nested dicts, in the order of the fields."""
    values = {spec.name: getattr(cfg, spec.name) for spec in fields(cfg)}
    return {name: to_dict(value) if is_dataclass(value) else value for name, value in values.items()}


def dump_config(cfg: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False)


def reference() -> str:
    """The config reference of docs/config.md, a Markdown table made from the fields."""
    lines = ["| key | default | allowed | stages | meaning |", "|---|---|---|---|---|"]
    for name, spec, kind in _all_keys():
        stages = ", ".join(map(str, spec.metadata["stages"]))
        meaning = re.sub(r"docs/(\w+\.md)(#[\w-]+)?", r"[\1](\1\2)", spec.metadata["help"])
        cells = [f"`{name}`", _shown_default(spec), _shown_values(spec, kind), stages, meaning]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _all_keys() -> list[tuple[str, Field, Any]]:
    """(path, field, annotation) of every key; those without effect come last."""
    hints = typing.get_type_hints(Config)
    keys = []
    for section in fields(Config):
        kind = hints[section.name]
        if not is_dataclass(kind):
            keys.append((section.name, section, kind))
            continue
        own_hints = typing.get_type_hints(kind)
        for spec in fields(kind):
            keys.append((f"{section.name}.{spec.name}", spec, own_hints[spec.name]))
    return sorted(keys, key=lambda item: item[1].metadata["help"].startswith("no effect"))


def _shown_values(spec: Field, kind: Any) -> str:
    """The values that a key takes: its choices, or its types and minimum."""
    choices = [_as_yaml(choice) for choice in spec.metadata["choices"]]
    minimum = spec.metadata["minimum"]
    if choices and minimum is None:
        return ", ".join(choices)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    options = [option for option in options if not (choices and option is str)]
    shown = ", ".join([*(SHOWN_TYPES[typing.get_origin(option) or option] for option in options), *choices])
    return shown if minimum is None else shown.replace("number", f"number >= {minimum:g}")


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown_default(spec: Field) -> str:
    """The default as YAML spells it."""
    if spec.default_factory is not MISSING:
        return str(spec.default_factory())
    return "required" if spec.default is MISSING else _as_yaml(spec.default)

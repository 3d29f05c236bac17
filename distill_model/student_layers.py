"""The student attentions by name. A variant is a line of `STUDENT_ATTENTION_MAP`; the layers are
in student_deltanet.py, student_gla.py and student_softmax.py. These files stay flat siblings: an
exported checkpoint carries what the model imports, and only flat relative imports are exported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config_distilled_student import StudentConfig
from .student_base import Option, StudentAttention
from .student_deltanet import (
    DeltaNetStudent,
    GatedDeltaNetPlainStudent,
    GatedDeltaNetStudent,
    KimiDeltaStudent,
    RWKV7Student,
)
from .student_gla import GatedLinearStudent, GatedSlotStudent, HGRN2Student, Mamba2Student
from .student_softmax import ForgettingStudent, LoLCATsStudent, PaTHStudent, SlidingWindowStudent


@dataclass(frozen=True)
class StudentSpec:
    """A student: its layer, and the constructor arguments that make the variant.

    Called as `(config, layer_idx, **options)` it builds the layer. What it supports is what its
    layer supports: see `StudentAttention`.
    """

    layer: type[StudentAttention]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: StudentConfig, layer_idx: int, **options) -> StudentAttention:
        return self.layer(config, layer_idx, **self.settings, **options)

    @property
    def options(self) -> dict[str, Option]:
        """The options that a config may set: not those whose `needs` the variant switches off."""
        options = self.layer.OPTIONS.items()
        return {key: option for key, option in options if self.settings.get(option.needs, True)}

    def value_of(self, name: str, options: Mapping[str, Any]):
        """The constructor argument `name` under these options of a config: set by them, by the
        variant, or the default of the nearest constructor that names it."""
        if name in options:
            return options[name]
        if name in self.settings:
            return self.settings[name]
        return default_of(self.layer, name)

    def states(self, config: StudentConfig) -> dict:
        """What a layer of this student in a model of `config` keeps of each sequence: see
        `StudentAttention.states`. Allocates nothing."""
        with torch.device("meta"):
            return self(config, config.linear_layers[0], **config.student_options).states()

    @property
    def supports_crop(self) -> bool:
        return self.layer.supports_crop

    @property
    def supports_chunked_prefill(self) -> bool:
        return self.layer.supports_chunked_prefill

    @property
    def supports_static_cache(self) -> bool:
        return self.layer.has_constant_state

    @property
    def supports_calibration(self) -> bool:
        """Not where a kernel reads o_proj's weight: o_proj's input is then never materialised."""
        return "o_proj" not in self.layer.weights_read_by_kernel


STUDENT_ATTENTION_MAP = {
    "gdn_v1": StudentSpec(GatedDeltaNetStudent, dict(use_gate=False, use_short_conv=True)),
    "gdn_v2": StudentSpec(GatedDeltaNetStudent, dict(use_gate=False, use_short_conv=False)),
    "gdn_v3": StudentSpec(GatedDeltaNetStudent, dict(use_gate=True, use_short_conv=True)),
    "gdn_v4": StudentSpec(GatedDeltaNetStudent, dict(use_gate=True, use_short_conv=False)),
    "gdn_v5": StudentSpec(GatedDeltaNetStudent, dict(use_gate=True, use_short_conv=False, factored=True)),
    "gdn_v6": StudentSpec(
        GatedDeltaNetPlainStudent,
        dict(use_gate=False, use_short_conv=False, use_norm=False, qk_activation=False, keep_attention=False),
    ),
    "gdn_v7": StudentSpec(
        GatedDeltaNetPlainStudent,
        dict(use_gate=True, use_short_conv=True, use_norm=True, qk_activation=True, keep_attention=True, decay=0.1),
    ),
    "gdn_v8": StudentSpec(GatedDeltaNetStudent, dict(use_gate=True, use_short_conv=True, gate_activation="silu")),
    "kda_v1": StudentSpec(KimiDeltaStudent),
    "deltanet_v1": StudentSpec(DeltaNetStudent),
    "gla_v1": StudentSpec(GatedLinearStudent),
    "gsa_v1": StudentSpec(GatedSlotStudent),
    "hgrn2_v1": StudentSpec(HGRN2Student),
    "mamba2_v1": StudentSpec(Mamba2Student),
    "rwkv7_v1": StudentSpec(RWKV7Student),
    "path_v1": StudentSpec(PaTHStudent, dict(use_forget_gate=False)),
    "path_fox_v1": StudentSpec(PaTHStudent, dict(use_forget_gate=True)),
    "fox_v1": StudentSpec(ForgettingStudent),
    "swa_v1": StudentSpec(SlidingWindowStudent),
    "lolcats_v1": StudentSpec(LoLCATsStudent),
}


def get_student_attention_class(name: str) -> StudentSpec:
    """The student of this name; call it as `(config, layer_idx, **options)` to build a layer.
    Raises ValueError for unknown names."""
    if name not in STUDENT_ATTENTION_MAP:
        known = ", ".join(STUDENT_ATTENTION_MAP)
        raise ValueError(f"student_model.name: {name!r} is unknown; choose one of {known}")
    return STUDENT_ATTENTION_MAP[name]


def default_of(layer: type, option: str):
    """The default of a constructor argument, of the nearest class in the hierarchy that
    names it."""
    for base in layer.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        if option in parameters:
            return parameters[option].default
    raise KeyError(option)


def same_options(name: str, one: dict, other: dict) -> bool:
    """Whether two sets of a student's options make the same layer: one may leave out what the other
    sets to its default."""
    layer = get_student_attention_class(name).layer
    defaults = {key: default_of(layer, key) for key in layer.OPTIONS}
    return defaults | one == defaults | other


def check_student(name: str, options: dict, config: StudentConfig) -> None:
    """Raises ValueError, of one line that names key, value and cure, if there is no such student,
    it does not take these options, or its kernels do not support the teacher of this `config`."""
    student = get_student_attention_class(name)
    check_options(name, student, options)
    head_dims = student.layer.HEAD_DIMS
    if head_dims is not None and config.head_dim not in head_dims:
        supported = ", ".join(map(str, head_dims))
        if isinstance(head_dims, range):
            supported = f"{head_dims[0]} to {head_dims[-1]}"
        raise ValueError(
            f"student_model.name: {name} takes heads of size {supported}, the teacher's have {config.head_dim}; "
            "choose another student"
        )


def check_options(name: str, student: StudentSpec, options: dict) -> None:
    """Raises ValueError, of one line, for an option that the student does not take."""
    known = student.options
    listing = "; ".join(f"{key}: {option}" for key, option in known.items()) or "none"
    for key, value in options.items():
        path = f"student_model.options.{key}"
        if key not in known:
            raise ValueError(f"{path}: unknown; {name} takes {listing}")
        option = known[key]
        if not option.takes(value):
            raise ValueError(f"{path}: {value!r} must be {option}; {name} takes {listing}")
        if option.needs in known and not student.value_of(option.needs, options):
            raise ValueError(
                f"{path}: {value!r} does nothing without {option.needs}: true; set that, or leave {key} out"
            )


def can_calibrate(name: str) -> bool:
    """Whether `train.calibrate_init` can fit a student. Raises ValueError for unknown names."""
    return get_student_attention_class(name).supports_calibration


def check_calibration(name: str) -> None:
    """Raises ValueError, of one line, if a student's start cannot be calibrated: see
    `can_calibrate`."""
    if not can_calibrate(name):
        raise ValueError(f"train.calibrate_init: {name} fuses o_proj with its norm; set it to 0")


def check_start_from_teacher(name: str, all_kept: bool = False) -> None:
    """Raises ValueError, of one line, if stage 2 cannot start from the teacher, without a stage 1,
    because a student has weights of its own. all_kept: no layer holds the student's attention."""
    if not all_kept and not get_student_attention_class(name).layer.has_only_teachers_weights:
        raise ValueError(
            f"train.student_init_ckpt: missing; {name} has weights that the teacher lacks: run stage 1 first and name "
            "its converted-hf"
        )


def reads_documents_on_host(name: str) -> bool:
    """Whether a student reads documents on the host, which rules out CUDA graphs: see
    `StudentAttention`. Raises ValueError for unknown names."""
    return get_student_attention_class(name).layer.reads_documents_on_host


def is_student_attention(module: nn.Module) -> bool:
    """Whether a module is one of the student attentions."""
    return isinstance(module, StudentAttention)

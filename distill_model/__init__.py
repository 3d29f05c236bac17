"""The model library: one class for teachers, linear students and hybrids. Needs torch,
transformers, fla and triton."""

from transformers import AutoConfig, AutoModelForCausalLM

from .config_distilled_student import FOREIGN, StudentConfig
from .losses import DistillationLoss
from .modeling_distilled_student import (
    STUDENT_ATTENTION_MAP,
    StudentBlock,
    StudentForCausalLM,
    StudentModel,
    forward_kl,
    get_student_attention_class,
)
from .student_base import InitReport
from .student_layers import (
    StudentSpec,
    can_calibrate,
    check_calibration,
    check_start_from_teacher,
    check_student,
    is_student_attention,
    same_options,
)

AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModelForCausalLM.register(StudentConfig, StudentForCausalLM)
for _kind in FOREIGN:  # so that transformers' own loaders give the reason as well
    AutoConfig.register(_kind, type("ForeignConfig", (StudentConfig,), {"model_type": _kind}))

__all__ = [
    "STUDENT_ATTENTION_MAP",
    "DistillationLoss",
    "InitReport",
    "StudentBlock",
    "StudentConfig",
    "StudentForCausalLM",
    "StudentModel",
    "StudentSpec",
    "can_calibrate",
    "check_calibration",
    "check_start_from_teacher",
    "check_student",
    "forward_kl",
    "get_student_attention_class",
    "is_student_attention",
    "same_options",
]

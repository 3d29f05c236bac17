"""Teachers: Hugging Face checkpoints read exactly into `StudentForCausalLM`."""

from .loader import load_teacher, load_teacher_config

__all__ = ["load_teacher", "load_teacher_config"]

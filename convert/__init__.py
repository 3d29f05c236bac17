"""Teachers: model folders of Hugging Face, FLA or this project, loaded exactly into
`StudentForCausalLM`, and converted."""

from .loader import copy_sidecars, load_teacher, load_teacher_config

__all__ = ["copy_sidecars", "load_teacher", "load_teacher_config"]

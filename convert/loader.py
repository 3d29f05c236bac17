"""Reads a teacher checkpoint, a folder or a hub name, into `StudentForCausalLM` with every layer kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from distill_model import StudentConfig, StudentForCausalLM

from .families import FAMILIES, SHARED_FIELDS, rename, unsupported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _source_config(name_or_path: str):
    """The checkpoint's own config. Raises ValueError, naming the checkpoint, if there is none."""
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"teacher_model.name: {name_or_path!r} is neither a folder with a config.json "
            f"nor a model that the Hugging Face hub gave ({reason})"
        ) from None


def load_teacher_config(name_or_path: str) -> StudentConfig:
    """The teacher's architecture as a `StudentConfig`, from its config alone; no weight is read.

    Raises ValueError if the checkpoint is not there or cannot be expressed exactly.
    """
    config = _source_config(name_or_path)
    if isinstance(config, StudentConfig):
        return config
    if reason := unsupported(config):
        raise ValueError(f"teacher_model.name: {name_or_path!r} cannot be read exactly: {reason}")
    family = FAMILIES[config.model_type]
    return StudentConfig(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        attention_bias=family.attention_bias(config),
        attention_output_bias=family.output_bias(config),
        mlp_bias=family.mlp_bias(config),
        qk_norm=family.qk_norm,
    )


def _weight_files(name_or_path: str) -> list[Path]:
    """The checkpoint's safetensors files. Raises ValueError naming the file that is missing."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(name_or_path, allow_patterns=["*.safetensors", INDEX]))
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        names = [SINGLE]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"teacher_model.name: {os.fspath(folder / name)} is missing; fetch the checkpoint again")
    return [folder / name for name in names]


@torch.no_grad()
def load_teacher(name_or_path: str, dtype: torch.dtype = torch.float32) -> StudentForCausalLM:
    """The teacher, in `dtype`, on the CPU, in eval mode. Weights stream from the files one tensor at a time.

    Raises ValueError if the checkpoint cannot be expressed exactly, lacks a tensor, or holds one that has no place.
    """
    config = load_teacher_config(name_or_path)
    if isinstance(_source_config(name_or_path), StudentConfig):
        return StudentForCausalLM.from_pretrained(name_or_path, dtype=dtype).eval()
    with no_init_weights():
        model = StudentForCausalLM(config).to(dtype)
    model.tie_weights()
    missing = dict(model.named_parameters())  # tied weights appear once, under the embedding's name
    for file in _weight_files(name_or_path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    ours = rename(name)
                    if ours == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old checkpoints store what the config already says
                    parameter = missing.pop(ours, None)
                    tensor = tensors.get_tensor(name)
                    if parameter is None or parameter.shape != tensor.shape:
                        expected = "no such tensor" if parameter is None else f"the shape {tuple(parameter.shape)}"
                        raise ValueError(f"{file}: {name} is {tuple(tensor.shape)}, its config implies {expected}")
                    parameter.copy_(tensor)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); fetch the checkpoint again") from None
    if missing:
        raise ValueError(f"{name_or_path}: {len(missing)} tensors are missing, the first is {next(iter(missing))}")
    return model.eval()

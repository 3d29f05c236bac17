"""Reads a teacher checkpoint, a folder or a hub name, into `StudentForCausalLM` with every layer kept.

Weights stream from the safetensors files, one tensor at a time. Names and shapes are checked against the config before
the first of them is read.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from distill_model import StudentConfig, StudentForCausalLM
from distill_model.config_distilled_student import FOREIGN

from pipeline.run_folder import EXPORT

from .families import FAMILIES, Family, unsupported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "teacher_model.name"
OURS = Family(weights={})
LLAMA_3_VOCABULARY = 128256
# What belongs to a checkpoint beside config and weights: tokenizer, chat template, generation config, card and licence.
SIDECARS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
            "generation_config.json", "README.md", "LICENSE*", "NOTICE*")  # fmt: skip


def source_config(name_or_path: str) -> PreTrainedConfig:
    """The checkpoint's own config. Raises ValueError, naming the checkpoint, if there is none that we know."""
    try:
        # trust_remote_code unsaid would ask at a terminal, and run it for a y.
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        try:
            model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
        except (OSError, ValueError):
            model_type = None
        if model_type in FOREIGN:
            raise ValueError(f"{KEY}: {name_or_path!r} is {FOREIGN[model_type]} (model_type {model_type!r})") from None
        if (Path(name_or_path) / EXPORT / "config.json").is_file():
            raise ValueError(f"{KEY}: {name_or_path!r} is a run folder; name {Path(name_or_path) / EXPORT}") from None
        if model_type is not None and model_type not in FAMILIES:
            reason = f"model_type {model_type!r}; supported are {', '.join(FAMILIES)}"
        raise ValueError(
            f"{KEY}: {name_or_path!r} is neither a folder with a config.json that we know "
            f"nor a model that the Hugging Face hub gave ({reason})"
        ) from None


def load_teacher_config(name_or_path: str) -> StudentConfig:
    """The teacher's architecture as a `StudentConfig`, from its config alone; no weight is read.

    Raises ValueError if the checkpoint is not there or cannot be expressed exactly.
    """
    config = source_config(name_or_path)
    if isinstance(config, StudentConfig):
        return config
    if reason := unsupported(config):
        raise ValueError(f"{KEY}: {name_or_path!r} cannot be read exactly: {reason}")
    if (config.model_type == "transformer" and config.vocab_size == LLAMA_3_VOCABULARY
            and config.max_position_embeddings > 8192):  # fmt: skip
        warnings.warn(
            f"{name_or_path}: looks like a Llama 3.1 or later in FLA's format, which has lost its RoPE scaling (llama3): "
            "most of its frequencies are wrong; name the original, such as meta-llama/Llama-3.2-3B-Instruct",
            stacklevel=2,
        )
    return student_config(config)


def student_config(config: PreTrainedConfig) -> StudentConfig:
    """A family's config in our terms."""
    family = FAMILIES[config.model_type]
    values = {ours: theirs(config) if callable(theirs) else getattr(config, theirs) for ours, theirs in family.config.items()}
    head_dim = getattr(config, "head_dim", None) or values["hidden_size"] // values["num_attention_heads"]
    return StudentConfig(**values, **family.fixed, head_dim=head_dim)


def checkpoint_folder(name_or_path: str, *patterns: str) -> Path:
    """A checkpoint's folder; of a hub name, the cached one with the files of these patterns."""
    folder = Path(name_or_path)
    return folder if folder.is_dir() else Path(snapshot_download(name_or_path, allow_patterns=list(patterns)))


def copy_sidecars(name_or_path: str, folder: Path) -> None:
    """Copies tokenizer, chat template, generation config, card and licence of a checkpoint, as they are; no code."""
    source = checkpoint_folder(name_or_path, *SIDECARS)
    for file in (file for pattern in SIDECARS for file in source.glob(pattern) if file.is_file() and file.suffix != ".py"):
        shutil.copy(file, folder)


class Checkpoint:
    """The safetensors files of a checkpoint, under our parameter names.

    config: the model's StudentConfig. model_type: of the checkpoint. folder: where it lies. shapes: our name -> shape, for every tensor. Raises ValueError, naming file, tensor and
    cure, if a file is missing or damaged, the index and the files disagree, or the tensors are not those that the
    config implies.
    """

    def __init__(self, name_or_path: str):
        self.config = load_teacher_config(name_or_path)
        self.model_type = source_config(name_or_path).model_type
        self.family = FAMILIES.get(self.model_type, OURS)
        self.folder = checkpoint_folder(name_or_path, "model*.safetensors", "*.json", *SIDECARS)
        self.files = self._files()
        self.shapes: dict[str, torch.Size] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        held: dict[str, str] = {}
        for file in self.files:
            with self._open(file) as tensors:
                for name in tensors.keys():
                    held[name], ours = file.name, self.family.rename(name)
                    # Old checkpoints store frequencies that the config gives, and some a head that they tie.
                    tied = ours == "lm_head.weight" and self.config.tie_word_embeddings
                    if not (tied or name.endswith("rotary_emb.inv_freq")):
                        self.shapes[ours] = torch.Size(tensors.get_slice(name).get_shape())
                        self._where[ours] = file, name
        for name, file in self._index().items():
            if held.get(name) != file:
                raise ValueError(f"{self.folder / INDEX}: {name} is not in {file}; fetch the checkpoint again")
        self._check()

    def _index(self) -> dict[str, str]:
        """Tensor -> file, as the index says; empty without one."""
        index = self.folder / INDEX
        return json.loads(index.read_text())["weight_map"] if index.is_file() else {}

    def _files(self) -> list[Path]:
        names = sorted(set(self._index().values())) or [SINGLE]
        for name in names:
            if not (self.folder / name).is_file():
                raise ValueError(f"{KEY}: {os.fspath(self.folder / name)} is missing; fetch the checkpoint again")
        return [self.folder / name for name in names]

    def _open(self, file: Path):
        try:
            return safe_open(file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); fetch the checkpoint again") from None

    def _check(self) -> None:
        expected = self.expected()
        for ours, shape in self.shapes.items():
            if expected.get(ours) != shape:
                file, name = self._where[ours]
                wanted = f"the shape {tuple(expected[ours])}" if ours in expected else "no such tensor"
                raise ValueError(
                    f"{file}: {name} is {tuple(shape)}, config.json implies {wanted}; "
                    "take config and weights of one checkpoint"
                )
        if missing := [name for name in expected if name not in self.shapes]:
            raise ValueError(
                f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the checkpoint again"
            )

    def expected(self) -> dict[str, torch.Size]:
        """Our name -> shape, for every parameter that the config implies; a tied head has none."""
        with torch.device("meta"):
            model = StudentForCausalLM(self.config)
        model.tie_weights()
        return {name: p.shape for name, p in model.named_parameters()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (our name, tensor), file by file; at most one file is open."""
        for file in self.files:
            with self._open(file) as tensors:
                for name in tensors.keys():
                    ours = self.family.rename(name)
                    if self._where.get(ours) == (file, name):
                        yield ours, tensors.get_tensor(name)

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows of our tensor `name`."""
        file, theirs = self._where[name]
        with self._open(file) as tensors:
            return tensors.get_slice(theirs)[index] if isinstance(index, slice) else tensors.get_tensor(theirs)[index]

    def state(self, prefix: str, theirs: bool = False) -> dict[str, torch.Tensor]:
        """The tensors under our `prefix` in fp32, named from there on, with theirs by the source's names."""
        state = {}
        for ours, (file, name) in self._where.items():
            if ours.startswith(prefix):
                with self._open(file) as tensors:
                    key = name.split(".", prefix.count("."))[-1] if theirs else ours[len(prefix) :]
                    state[key] = tensors.get_tensor(name).float()
        return state


@torch.no_grad()
def load_teacher(name_or_path: str, dtype: torch.dtype = torch.float32) -> StudentForCausalLM:
    """The teacher, in `dtype`, on the CPU, in eval mode.

    Raises ValueError if the checkpoint cannot be expressed exactly, is damaged, lacks a tensor or holds one too many.
    """
    checkpoint = Checkpoint(name_or_path)
    with no_init_weights():
        model = StudentForCausalLM._from_config(checkpoint.config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.tensors():
        parameters[name].copy_(tensor)
    return model.eval()

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
from contextlib import ExitStack
from pathlib import Path

from runtime.config import ConfigError, convert_value
from runtime.files import one_line
from runtime.run_folder import EXPORT

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from distill_model import StudentConfig, StudentForCausalLM
from distill_model.attention import RotaryEmbedding
from distill_model.config_distilled_student import FOREIGN

from .families import FAMILIES, FIELDS, ROPE_FIELDS, SIZES, Family, unsupported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "teacher_model.name"
OURS = Family(weights={})
LLAMA_3_VOCABULARY = 128256
EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"
# safetensors' names of the dtypes that a weight may have.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPARED_ROWS = 8192  # of embeddings and head, in memory at a time
# What belongs to a checkpoint beside config and weights: tokenizer, chat template, generation
# config, card and licence.
SIDECARS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)


def source_config(name_or_path: str) -> PreTrainedConfig:
    """The checkpoint's own config. Raises ValueError, naming the checkpoint, if there is none that
    we know."""
    values, model_type = {}, None
    try:
        values = PreTrainedConfig.get_config_dict(name_or_path)[0]
        model_type = values.get("model_type")
        if not isinstance(model_type, str | None):
            raise ConfigError(f"{KEY}: {name_or_path!r}: config.json: model_type: {model_type!r} must be a name")
        if model_type in (*FAMILIES, StudentConfig.model_type):
            return built_config(name_or_path, values)
        # trust_remote_code unsaid would ask at a terminal, and run it for a y.
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except ConfigError:
        raise
    except StrictDataclassError as error:  # of our own type
        raise ConfigError(f"{KEY}: {name_or_path!r}: config.json: {' '.join(str(error).split())}") from None
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # the last three: what is no object
        reason = one_line(error)
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


def built_config(name_or_path: str, values: dict) -> PreTrainedConfig:
    """A family's config, or ours, from what config.json holds, where numbers may be written as
    text.

    Raises ConfigError, of one line, for a value of another type, and for values that do not go
    together.
    """
    where = f"{KEY}: {name_or_path!r}: config.json:"
    values = dict(values)
    for name in values.keys() & FIELDS.keys():
        values[name] = convert_value(f"{where} {name}", values[name], FIELDS[name])
    for name in values.keys() & {"rope_parameters", "rope_scaling"}:
        if values[name] is not None and not isinstance(values[name], dict):
            raise ConfigError(
                f"{where} {name}: {values[name]!r} must be a mapping like {{'rope_type': 'default'}}, or null"
            )
        rope = dict(values[name] or {})
        for field in rope.keys() & ROPE_FIELDS.keys():
            rope[field] = convert_value(f"{where} {name}.{field}", rope[field], ROPE_FIELDS[field])
        values[name] = rope or None
    try:
        check_sizes(values)
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values, name_or_path=name_or_path)
        check_values(config)
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{where} {' '.join(reason.split())}") from None
    return config


def check_sizes(values: dict) -> None:
    """Raises ValueError if a size is below 1, or the dtype is none, in what config.json holds."""
    for name in SIZES:
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"{name}: {values[name]} must be at least 1")
    for name in ("dtype", "torch_dtype"):
        dtype = getattr(torch, str(values.get(name)), None)
        if values.get(name) is not None and dtype not in FLOATS.values():
            raise ValueError(f"{name}: {values[name]!r} must be bfloat16, float16 or float32, or left out")


def check_values(config: PreTrainedConfig) -> None:
    """Raises an error if values of a family's config, or of ours, do not go together."""
    ours = config if isinstance(config, StudentConfig) else to_student_config(config)
    if ours.num_attention_heads % ours.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads: {ours.num_key_value_heads} must divide the {ours.num_attention_heads} "
            "attention heads"
        )
    if ours.head_dim % 2:
        raise ValueError(f"head_dim: {ours.head_dim} must be even, for the rotary embedding turns pairs")
    if ours.pad_token_id is not None and not -ours.vocab_size <= ours.pad_token_id < ours.vocab_size:
        raise ValueError(
            f"pad_token_id: {ours.pad_token_id} is outside the vocabulary of {ours.vocab_size} ids; "
            "name one of them, or null"
        )
    if not ours.rms_norm_eps >= 0:  # nor NaN
        raise ValueError(f"rms_norm_eps: {ours.rms_norm_eps} must be a number of at least 0")
    for name in ("rope_theta", "factor"):
        value = (ours.rope_parameters or {}).get(name, 1.0)
        if config.model_type != "transformer" and not (value or 0) > 0:  # in FLA's, no theta means no rotary embedding
            raise ValueError(f"{name}: {value} of the rotary embedding must be above 0")


def load_teacher_config(name_or_path: str) -> StudentConfig:
    """The teacher's architecture as a `StudentConfig`, from its config.

    As in transformers, a head that the config ties, but whose weights in the files differ from the
    embeddings, is not tied, and a dtype that the config lacks is that of the first weight. Where
    the weights are not on this machine, the config alone counts.

    Raises ValueError if the checkpoint is not there or cannot be expressed exactly.
    """
    config, folder = config_alone(name_or_path), local_folder(name_or_path)
    return config if folder is None else as_stored(config, folder, family_of(name_or_path))


def family_of(name_or_path: str) -> Family:
    return FAMILIES.get(source_config(name_or_path).model_type, OURS)


def as_stored(config: StudentConfig, folder: Path, family: Family) -> StudentConfig:
    """The config with the dtype that it lacks, and not tied where the files in `folder` hold a head
    of its own."""
    if config.dtype is None:
        config.dtype = stored_dtype(folder)
    if config.tie_word_embeddings and has_own_head(folder, family):
        warnings.warn(
            f"{folder}: config.json ties the head to the embeddings (tie_word_embeddings), but the file's {HEAD} "
            "differs from them: it is read as not tied, as transformers does",
            stacklevel=1,  # so that Python shows it once, however many lines lead here
        )
        config.tie_word_embeddings = False
    return config


def config_alone(name_or_path: str) -> StudentConfig:
    """The teacher's architecture as its config.json has it."""
    config = source_config(name_or_path)
    if isinstance(config, StudentConfig):
        return config
    if reason := unsupported(config):
        raise ValueError(f"{KEY}: {name_or_path!r} cannot be read exactly: {reason}")
    if (
        config.model_type == "transformer"
        and config.vocab_size == LLAMA_3_VOCABULARY
        and config.max_position_embeddings > 8192
    ):
        warnings.warn(
            f"{name_or_path}: looks like a Llama 3.1 or later in FLA's format, which has lost its RoPE scaling (llama3): "
            "most of its frequencies are wrong; name the original, such as meta-llama/Llama-3.2-3B-Instruct",
            stacklevel=2,
        )
    return to_student_config(config)


def to_student_config(config: PreTrainedConfig) -> StudentConfig:
    """A family's config in our terms."""
    family = FAMILIES[config.model_type]
    values = {
        ours: theirs(config) if callable(theirs) else getattr(config, theirs) for ours, theirs in family.config.items()
    }
    head_dim = getattr(config, "head_dim", None) or values["hidden_size"] // values["num_attention_heads"]
    return StudentConfig(**values, **family.fixed, head_dim=head_dim)


def checkpoint_folder(name_or_path: str, *patterns: str) -> Path:
    """A checkpoint's folder; of a hub name, the cached one with the files of these patterns."""
    folder = Path(name_or_path)
    return folder if folder.is_dir() else Path(snapshot_download(name_or_path, allow_patterns=list(patterns)))


def local_folder(name_or_path: str) -> Path | None:
    """A checkpoint's folder, if it is on this machine."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    cached = (try_to_load_from_cache(name_or_path, file) for file in (SINGLE, INDEX))
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def index_of(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a folder says. Empty without one, and for an index of other
    files beside model.safetensors: transformers reads that one alone."""
    if not (folder / INDEX).is_file():
        return {}
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return {} if (folder / SINGLE).is_file() and set(index.values()) != {SINGLE} else index


def weight_files(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(set(index_of(folder).values())) or [SINGLE]]


def open_weights(file: Path):
    """Opens a safetensors file. Raises ValueError, naming it, if it is damaged."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); fetch the checkpoint again") from None


def rows_of(file: Path, name: str, index: slice | torch.Tensor) -> torch.Tensor:
    """Rows of a file's tensor."""
    with open_weights(file) as tensors:
        return tensors.get_slice(name)[index] if isinstance(index, slice) else tensors.get_tensor(name)[index]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of a checkpoint's first floating-point weight."""
    for file in filter(Path.is_file, weight_files(folder)):
        with open_weights(file) as tensors:
            dtypes = (tensors.get_slice(name).get_dtype() for name in tensors.keys())
            if found := next((FLOATS[dtype] for dtype in dtypes if dtype in FLOATS), None):
                return found
    return None


def has_own_head(folder: Path, family: Family) -> bool:
    """Whether a checkpoint's files hold embeddings and a head that differs from them."""
    found = {}
    for file in filter(Path.is_file, weight_files(folder)):
        with open_weights(file) as tensors:
            found |= {family.rename(name): (file, name) for name in tensors.keys()}
    found = {name: place for name, place in found.items() if name in (EMBEDDINGS, HEAD)}
    if len(found) < 2:
        return False
    with ExitStack() as stack:
        one, other = (stack.enter_context(open_weights(file)).get_slice(name) for file, name in found.values())
        rows = one.get_shape()[0]
        if one.get_shape() != other.get_shape():
            return True
        parts = (slice(start, min(start + COMPARED_ROWS, rows)) for start in range(0, rows, COMPARED_ROWS))
        return not all(torch.equal(one[part].float(), other[part].float()) for part in parts)


def copy_sidecars(name_or_path: str, folder: Path) -> None:
    """Copies tokenizer, chat template, generation config, card and licence of a checkpoint, as they
    are; no code."""
    source = checkpoint_folder(name_or_path, *SIDECARS)
    for file in (
        file for pattern in SIDECARS for file in source.glob(pattern) if file.is_file() and file.suffix != ".py"
    ):
        shutil.copy(file, folder)


class ModelFolder:
    """The safetensors files of a checkpoint, under our parameter names.

    config: the model's StudentConfig. model_type: of the checkpoint. folder: where it lies. shapes:
    our name -> shape, for every tensor. Every tensor of the files is used, equal to one that is, or
    named in a warning. Raises ValueError, naming file, tensor and cure, if a file is missing or
    damaged, the index and the files disagree, a tensor is there twice or quantised, or the tensors
    are not those that the config implies.
    """

    def __init__(self, name_or_path: str):
        config = config_alone(name_or_path)  # refuses before weights are fetched
        self.model_type, self.family = (
            source_config(name_or_path).model_type,
            family_of(name_or_path),
        )
        self.folder = checkpoint_folder(name_or_path, "model*.safetensors", "*.json", *SIDECARS)
        self.config = as_stored(config, self.folder, self.family)
        self.files = weight_files(self.folder)
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"{KEY}: {os.fspath(file)} is missing; fetch the checkpoint again")
        self.shapes: dict[str, torch.Size] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._read_headers()
        self._check()

    def _read_headers(self) -> None:
        """Finds every tensor of the files, and what it is for."""
        held: dict[str, str] = {}
        frequencies = {}
        for file in self.files:
            with open_weights(file) as tensors:
                for name in tensors.keys():
                    view, ours = tensors.get_slice(name), self.family.rename(name)
                    if name in held or ours in self._where:
                        first = self._where[ours][1] if ours in self._where else f"{held[name]}'s"
                        raise ValueError(f"{file}: {name} is there twice, also as {first}; fetch the checkpoint again")
                    held[name] = file.name
                    if name.endswith("rotary_emb.inv_freq"):  # of old checkpoints
                        frequencies[name] = tensors.get_tensor(name)
                        continue
                    if view.get_dtype() not in FLOATS:
                        raise ValueError(
                            f"{file}: {name} is of dtype {view.get_dtype()}, of quantised weights; "
                            "name the original checkpoint"
                        )
                    self.shapes[ours] = torch.Size(view.get_shape())
                    self._where[ours] = file, name
        index = index_of(self.folder)
        if (self.folder / INDEX).is_file() and not index:
            warnings.warn(
                f"{self.folder}: as in transformers, {SINGLE} is read, not the files of {INDEX} beside it",
                stacklevel=3,
            )
        for name, file in index.items():
            if held.get(name) != file:
                raise ValueError(f"{self.folder / INDEX}: {name} is not in {file}; fetch the checkpoint again")
        self._check_frequencies(frequencies)
        if self.config.tie_word_embeddings and HEAD in self._where:  # equal to the embeddings, or there instead of them
            shape, where = self.shapes.pop(HEAD), self._where.pop(HEAD)
            self.shapes.setdefault(EMBEDDINGS, shape)
            self._where.setdefault(EMBEDDINGS, where)

    def _check_frequencies(self, frequencies: dict[str, torch.Tensor]) -> None:
        """Warns if the RoPE frequencies that a file holds are not the config's, which are taken, as
        in transformers."""
        expected = RotaryEmbedding(self.config).inv_freq
        for name, tensor in frequencies.items():
            if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=1e-2, atol=0):
                warnings.warn(
                    f"{self.folder}: {name} differs from config.json's rotary embedding, which is taken, "
                    "as in transformers",
                    stacklevel=3,
                )
                return

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
            tie = ", or set tie_word_embeddings to true in config.json if its head is tied"
            raise ValueError(
                f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the checkpoint again"
                + (tie if missing[0] in (EMBEDDINGS, HEAD) else "")
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
            names = {name: ours for ours, (place, name) in self._where.items() if place == file}
            with open_weights(file) as tensors:
                for name, ours in names.items():
                    yield ours, tensors.get_tensor(name)

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows of our tensor `name`."""
        return rows_of(*self._where[name], index)

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under our `prefix` in fp32, named from there on."""
        state = {}
        for ours, (file, name) in self._where.items():
            if ours.startswith(prefix):
                with open_weights(file) as tensors:
                    state[ours[len(prefix) :]] = tensors.get_tensor(name).float()
        return state


@torch.no_grad()
def load_teacher(name_or_path: str, dtype: torch.dtype = torch.float32) -> StudentForCausalLM:
    """The teacher, in `dtype`, on the CPU, in eval mode.

    Raises ValueError if the checkpoint cannot be expressed exactly, is damaged, lacks a tensor or
    holds one too many.
    """
    checkpoint = ModelFolder(name_or_path)
    with no_init_weights():
        model = StudentForCausalLM._from_config(checkpoint.config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.tensors():
        parameters[name].copy_(tensor)
    return model.eval()

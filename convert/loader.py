"""Loads a teacher, from a folder or a hub name, into `StudentForCausalLM` with every layer kept.

Weights stream from the safetensors files, one tensor at a time. Names and shapes are checked
against the config before the first tensor is read.
"""

from __future__ import annotations

import hashlib
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

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
KEY = "teacher_model.name"
OURS = Family(weights={})  # of this project's own format
LLAMA_3_VOCABULARY = 128256
EMBEDDINGS = "model.embeddings.weight"
HEAD = "lm_head.weight"
# safetensors' names of the dtypes that a weight may have.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of a weight file's fingerprint.
SAMPLES = 64
SAMPLE_BYTES = 4096
COMPARED_ROWS = 8192  # of embeddings and head, in memory at a time
# Files of a model folder beside config and weights: tokenizer, chat template, generation config,
# card and licence.
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
    """The model's own config. Raises ValueError, naming the model, if it has none that we know."""
    model_type = None
    try:
        values = PreTrainedConfig.get_config_dict(name_or_path)[0]
        model_type = values.get("model_type")
        if not isinstance(model_type, str | None):
            raise ConfigError(f"{KEY}: {name_or_path!r}: config.json: model_type: {model_type!r} must be a name")
        if model_type in (*FAMILIES, StudentConfig.model_type):
            return built_config(name_or_path, values)
        # Without trust_remote_code, transformers would ask at a terminal and run the code for a y.
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except ConfigError:
        raise
    except StrictDataclassError as error:  # a value of the wrong type in our own format
        raise ConfigError(f"{KEY}: {name_or_path!r}: config.json: {' '.join(str(error).split())}") from None
    # The last three: config.json holds no object.
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{KEY}: {name_or_path!r} {why_no_config(name_or_path, model_type, error)}") from None


def why_no_config(name_or_path: str, model_type: str | None, error: Exception) -> str:
    """Why a model has no config that we know, given its model_type (None: not found) and the error."""
    if model_type in FOREIGN:
        return f"is {FOREIGN[model_type]} (model_type {model_type!r})"
    export = Path(name_or_path) / EXPORT
    if (export / "config.json").is_file():
        return f"is a run folder; name {export}"
    reason = one_line(error)
    if model_type is not None and model_type not in FAMILIES:
        reason = f"model_type {model_type!r}; supported are {', '.join(FAMILIES)}"
    return f"is neither a folder with a config.json that we know nor a model that the Hugging Face hub gave ({reason})"


def built_config(name_or_path: str, values: dict) -> PreTrainedConfig:
    """A family's config, or ours, from the content of config.json, where numbers may be strings.

    Raises ConfigError, of one line, for a value of another type and for inconsistent values.
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
    """Raises ValueError if a size in config.json's content is below 1, or its dtype unknown."""
    for name in SIZES:
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"{name}: {values[name]} must be at least 1")
    for name in ("dtype", "torch_dtype"):
        dtype = getattr(torch, str(values.get(name)), None)
        if values.get(name) is not None and dtype not in FLOATS.values():
            raise ValueError(f"{name}: {values[name]!r} must be bfloat16, float16 or float32, or left out")


def check_values(config: PreTrainedConfig) -> None:
    """Raises ValueError if values of a family's config, or of ours, are inconsistent."""
    ours = config if isinstance(config, StudentConfig) else to_student_config(config)
    if ours.num_attention_heads % ours.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads: {ours.num_key_value_heads} must divide the {ours.num_attention_heads} "
            "attention heads"
        )
    if ours.head_dim % 2:
        raise ValueError(f"head_dim: {ours.head_dim} must be even, for the rotary embedding rotates pairs")
    if ours.pad_token_id is not None and not -ours.vocab_size <= ours.pad_token_id < ours.vocab_size:
        raise ValueError(
            f"pad_token_id: {ours.pad_token_id} is outside the vocabulary of {ours.vocab_size} ids; "
            "name one of them, or null"
        )
    if not ours.rms_norm_eps >= 0:  # nor NaN
        raise ValueError(f"rms_norm_eps: {ours.rms_norm_eps} must be a number of at least 0")
    for name in ("rope_theta", "factor"):
        value = (ours.rope_parameters or {}).get(name, 1.0)
        # In FLA's format, no theta means no rotary embedding.
        if config.model_type != "transformer" and not (value or 0) > 0:
            raise ValueError(f"{name}: {value} of the rotary embedding must be above 0")


def load_teacher_config(name_or_path: str) -> StudentConfig:
    """The teacher's architecture as a `StudentConfig`, from its config.

    As in transformers, a head that the config ties, but whose weights in the files differ from the
    embeddings, is not tied, and a dtype that the config lacks is that of the first weight. Where
    the weights are not on this machine, only the config is read.

    Raises ValueError if the model does not exist or cannot be expressed exactly.
    """
    source = source_config(name_or_path)
    family = family_of(source)
    config = exact_config(source, name_or_path)
    folder = local_folder(name_or_path)
    return config if folder is None else as_stored(config, folder, family)


def family_of(source: PreTrainedConfig) -> Family:
    return FAMILIES.get(source.model_type, OURS)


def as_stored(config: StudentConfig, folder: Path, family: Family) -> StudentConfig:
    """Sets what the weight files in `folder` decide: a dtype that the config lacks, and that a head
    which differs from the embeddings is not tied. Changes `config` and returns it."""
    if config.dtype is None:
        config.dtype = stored_dtype(folder)
    if config.tie_word_embeddings and has_own_head(folder, family):
        warnings.warn(
            f"{folder}: config.json ties the head to the embeddings (tie_word_embeddings), but the file's {HEAD} "
            "differs from them: it is read as not tied, as transformers does",
            stacklevel=1,  # attributed to this line, so that Python shows it once
        )
        config.tie_word_embeddings = False
    return config


def exact_config(source: PreTrainedConfig, name_or_path: str) -> StudentConfig:
    """The `source_config` of `name_or_path` as a StudentConfig.

    Raises ValueError if that cannot express it exactly.
    """
    if isinstance(source, StudentConfig):
        return source
    if reason := unsupported(source):
        raise ValueError(f"{KEY}: {name_or_path!r} cannot be read exactly: {reason}")
    is_llama_3 = source.model_type == "transformer" and source.vocab_size == LLAMA_3_VOCABULARY
    if is_llama_3 and source.max_position_embeddings > 8192:
        warnings.warn(
            f"{name_or_path}: looks like a Llama 3.1 or later in FLA's format, which has lost its RoPE scaling "
            "(llama3): most of its frequencies are wrong; name the original, such as "
            "meta-llama/Llama-3.2-3B-Instruct",
            stacklevel=2,
        )
    return to_student_config(source)


def to_student_config(config: PreTrainedConfig) -> StudentConfig:
    """A family's config as a StudentConfig."""
    family = FAMILIES[config.model_type]
    values = {}
    for ours, theirs in family.config.items():
        values[ours] = theirs(config) if callable(theirs) else getattr(config, theirs)
    head_dim = getattr(config, "head_dim", None) or values["hidden_size"] // values["num_attention_heads"]
    return StudentConfig(**values, **family.fixed, head_dim=head_dim)


def model_folder(name_or_path: str, *patterns: str) -> Path:
    """A model's folder; for a hub name, the cached one, with files of these patterns downloaded."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(name_or_path, allow_patterns=list(patterns)))


def local_folder(name_or_path: str) -> Path | None:
    """A model's folder with its weights, or None if it is not on this machine."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    cached = (try_to_load_from_cache(name_or_path, file) for file in (SINGLE, INDEX))
    return next((Path(file).parent for file in cached if isinstance(file, str)), None)


def index_of(folder: Path) -> dict[str, str]:
    """Tensor -> file, from the folder's index. Empty without an index, and for one that names other
    files than a model.safetensors beside it: transformers then reads only that file."""
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
        tensor = tensors.get_slice(name) if isinstance(index, slice) else tensors.get_tensor(name)
        return tensor[index]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of a model's first floating-point weight."""
    for file in filter(Path.is_file, weight_files(folder)):
        with open_weights(file) as tensors:
            for name in list(tensors.keys()):
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in FLOATS:
                    return FLOATS[dtype]
    return None


def has_own_head(folder: Path, family: Family) -> bool:
    """Whether a model's files hold embeddings and a head that differs from them."""
    places = {}
    for file in filter(Path.is_file, weight_files(folder)):
        with open_weights(file) as tensors:
            places |= {family.rename(name): (file, name) for name in list(tensors.keys())}
    if not places.keys() >= {EMBEDDINGS, HEAD}:
        return False
    with ExitStack() as stack:

        def opened(name: str):
            file, stored_name = places[name]
            return stack.enter_context(open_weights(file)).get_slice(stored_name)

        embeddings = opened(EMBEDDINGS)
        head = opened(HEAD)
        if embeddings.get_shape() != head.get_shape():
            return True
        rows = embeddings.get_shape()[0]
        for start in range(0, rows, COMPARED_ROWS):
            part = slice(start, min(start + COMPARED_ROWS, rows))
            if not torch.equal(embeddings[part].float(), head[part].float()):
                return True
        return False


def copy_sidecars(name_or_path: str, folder: Path) -> None:
    """Copies a model's tokenizer, chat template, generation config, card and licence unchanged; no
    code."""
    source = model_folder(name_or_path, *SIDECARS)
    for pattern in SIDECARS:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix != ".py":
                shutil.copy(file, folder)


def config_fingerprint(name_or_path: str) -> str:
    """A hash of what load_teacher_config reads."""
    values = load_teacher_config(name_or_path).to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        values.pop(volatile, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_fingerprint(name_or_path: str) -> str | None:
    """A hash of samples of a model's weight files, spread evenly over them, and of their sizes; None
    if they are not on this machine."""
    folder = local_folder(name_or_path)
    if folder is None or not all(file.is_file() for file in weight_files(folder)):
        return None
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(i * size // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class ModelFolder:
    """The safetensors files of a model, under our parameter names.

    config: the model's StudentConfig. model_type: in its config.json. folder: its path. shapes: our
    name -> shape, for every tensor. Every tensor of the files is used, equal to one that is used,
    or named in a warning. Raises ValueError, naming file, tensor and cure, if a file is missing or
    damaged, the index and the files disagree, a tensor is stored twice or quantised, or the tensors
    are not those that the config implies.
    """

    def __init__(self, name_or_path: str):
        source = source_config(name_or_path)
        self.model_type = source.model_type
        self.family = family_of(source)
        config = exact_config(source, name_or_path)  # may raise, before weights are downloaded
        self.folder = model_folder(name_or_path, "model*.safetensors", "*.json", *SIDECARS)
        self.config = as_stored(config, self.folder, self.family)
        self.files = weight_files(self.folder)
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"{KEY}: {os.fspath(file)} is missing; fetch the checkpoint again")
        self.shapes: dict[str, torch.Size] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._read_headers()
        self._check_shapes()

    def _read_headers(self) -> None:
        """Fills `shapes` and `_where` from the headers of the files, and checks the files against
        the index."""
        stored: dict[str, str] = {}  # the files' tensor names -> file name
        frequencies = {}
        for file in self.files:
            with open_weights(file) as tensors:
                for name in list(tensors.keys()):
                    ours = self.family.rename(name)
                    if name in stored or ours in self._where:
                        first = self._where[ours][1] if ours in self._where else f"{stored[name]}'s"
                        raise ValueError(f"{file}: {name} is stored twice, also as {first}; fetch the checkpoint again")
                    stored[name] = file.name
                    if name.endswith("rotary_emb.inv_freq"):  # of old checkpoints
                        frequencies[name] = tensors.get_tensor(name)
                    else:
                        self._add(ours, file, name, tensors.get_slice(name))
        self._check_index(stored)
        self._check_frequencies(frequencies)
        # A tied head is stored beside equal embeddings, or in their place.
        if self.config.tie_word_embeddings and HEAD in self._where:
            self.shapes.setdefault(EMBEDDINGS, self.shapes.pop(HEAD))
            self._where.setdefault(EMBEDDINGS, self._where.pop(HEAD))

    def _add(self, ours: str, file: Path, name: str, view) -> None:
        """Notes our parameter `ours`, which is the tensor `name` of `file`."""
        dtype = view.get_dtype()
        if dtype not in FLOATS:
            raise ValueError(f"{file}: {name} is of dtype {dtype}, of quantised weights; name the original checkpoint")
        self.shapes[ours] = torch.Size(view.get_shape())
        self._where[ours] = file, name

    def _check_index(self, stored: dict[str, str]) -> None:
        """Raises ValueError if the index names a tensor that the files (tensor -> file name) lack."""
        index = index_of(self.folder)
        if (self.folder / INDEX).is_file() and not index:
            warnings.warn(
                f"{self.folder}: as in transformers, {SINGLE} is read, not the files of {INDEX} beside it",
                stacklevel=4,
            )
        for name, file in index.items():
            if stored.get(name) != file:
                raise ValueError(f"{self.folder / INDEX}: {name} is not in {file}; fetch the checkpoint again")

    def _check_frequencies(self, frequencies: dict[str, torch.Tensor]) -> None:
        """Warns if stored RoPE frequencies differ from the config's, which are used, as in
        transformers."""
        expected = RotaryEmbedding(self.config).inv_freq
        for name, tensor in frequencies.items():
            same_shape = tensor.shape == expected.shape
            if not same_shape or not torch.allclose(tensor.float(), expected, rtol=1e-2, atol=0):
                warnings.warn(
                    f"{self.folder}: {name} differs from config.json's rotary embedding, which is used, "
                    "as in transformers",
                    stacklevel=3,
                )
                return

    def _check_shapes(self) -> None:
        """Raises ValueError unless the tensors' names and shapes are those that the config implies."""
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
            cure = "fetch the checkpoint again"
            if missing[0] in (EMBEDDINGS, HEAD):
                cure += ", or set tie_word_embeddings to true in config.json if its head is tied"
            raise ValueError(f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; {cure}")

    def expected(self) -> dict[str, torch.Size]:
        """Our name -> shape, for every parameter that the config implies; a tied head is left out."""
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
        """The tensors whose names begin with our `prefix`, in fp32, named by what follows it."""
        state = {}
        for ours, (file, name) in self._where.items():
            if ours.startswith(prefix):
                with open_weights(file) as tensors:
                    state[ours[len(prefix) :]] = tensors.get_tensor(name).float()
        return state


@torch.no_grad()
def load_teacher(name_or_path: str, dtype: torch.dtype = torch.float32) -> StudentForCausalLM:
    """The teacher, in `dtype`, on the CPU, in eval mode.

    Raises ValueError if the model cannot be expressed exactly, or its files are damaged, lack a
    tensor or hold an unknown one.
    """
    source = ModelFolder(name_or_path)
    with no_init_weights():
        model = StudentForCausalLM._from_config(source.config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    for name, tensor in source.tensors():
        parameters[name].copy_(tensor)
    return model.eval()

"""Converts a teacher to FLA's `transformer` format or this project's, one tensor at a time, and
verifies the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.data import fix_tokenizer_class
from runtime.files import atomic_directory

import torch
import yaml
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from distill_model import StudentConfig, StudentForCausalLM

from .families import FAMILIES
from .loader import INDEX, SINGLE, ModelFolder, copy_sidecars
from .verify import TOLERANCE, largest_difference

SHARD_BYTES = 500 * 1000**2  # tensors held in memory until their file is written
FLA_QK_NORM_EPS = FAMILIES["transformer"].fixed["qk_norm_eps"]
PUBLISHED = Path(__file__).with_name("published.yaml")


def shape_of(config: StudentConfig) -> dict:
    """A model's sizes under the keys of published.yaml."""
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }


def check_size(config: StudentConfig, family: str, size: str) -> None:
    """Raises ValueError unless `config` has the family's published `size`.

    size: a key of published.yaml such as 7b or 3.2-3b; the part after the dash (3b) is enough.
    """
    sizes = yaml.safe_load(PUBLISHED.read_text()).get(family, {})
    candidates = {}
    for name, shape in sizes.items():
        if size in (name, name.rpartition("-")[2]):
            candidates[name] = shape
    if not candidates:
        raise ValueError(f"--config: {size} is no published size; choose one of {', '.join(sizes)}")
    found = shape_of(config)
    differences = []
    for shape in candidates.values():
        different = [name for name in found if found[name] != shape[name]]
        differences.append([f"{name} {found[name]} instead of {shape[name]}" for name in different])
    if all(differences):
        raise ValueError(
            f"--config: the checkpoint is no {size}: {', '.join(differences[0])}; name its size or leave --config out"
        )


def fla_lacks(config: StudentConfig) -> str | None:
    """What of a model FLA's TransformerConfig cannot express, or None if it can express all of it."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    qk_norm_eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    other_eps = config.qk_norm and qk_norm_eps != FLA_QK_NORM_EPS
    reasons = {
        f"linear layers ({config.student_name})": bool(config.linear_layers),
        f"head_dim {config.head_dim}": config.head_dim * config.num_attention_heads != config.hidden_size,
        f"RoPE scaling ({rope_type})": rope_type != "default",
        f"eps {qk_norm_eps:g} in the q/k norms (its own is {FLA_QK_NORM_EPS:g})": other_eps,
        "a bias in o_proj": config.attention_output_bias,
        "biases in the MLP": config.mlp_bias,
    }
    return ", ".join(reason for reason, lacking in reasons.items() if lacking) or None


def fla_config(config: StudentConfig):
    """The model as FLA's TransformerConfig; `fla_lacks` must be None."""
    from fla.models import TransformerConfig

    values = {}
    for name, field in FAMILIES["transformer"].config.items():
        if isinstance(field, str):
            values[field] = getattr(config, name)
    values["hidden_act"] = "swish"  # FLA's name for silu
    return TransformerConfig(
        **values,
        intermediate_size=config.intermediate_size,
        num_kv_heads=config.num_key_value_heads,
        rope_theta=(config.rope_parameters or {}).get("rope_theta", 10000.0),
        architectures=["TransformerForCausalLM"],
    )


def shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Groups (name, tensor) pairs into dicts of at most SHARD_BYTES, or of one larger tensor."""
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
            held = 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
    yield shard


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> int:
    """Writes the tensors to `folder` as safetensors, sharded with an index if need be.

    Returns their size in bytes.
    """
    written = []  # the tensors' names in each file
    total = 0
    for shard in shards(tensors):
        save_file(shard, folder / f"shard-{len(written)}", metadata={"format": "pt"})
        written.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        del shard  # frees its memory before the next one is read
    weight_map = {}
    for i, names in enumerate(written):
        final = SINGLE if len(written) == 1 else f"model-{i + 1:05}-of-{len(written):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return total


def check_output(output: Path) -> None:
    """Raises ValueError if `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} already exists; remove it or name another folder")


def chosen_format(wanted: str, lacks: str | None) -> str:
    """fla or student. wanted: these or auto. lacks: what FLA's format cannot express."""
    if wanted == "fla" and lacks:
        raise ValueError(f"--format: fla cannot express {lacks}; take student")
    if wanted != "auto":
        return wanted
    return "student" if lacks else "fla"


def save_config(config: StudentConfig, format: str, folder: Path) -> None:
    """Writes config.json in fla's or the student's format; for the latter, also the model's code."""
    if format == "fla":
        fla_config(config).save_pretrained(folder)
        return
    with torch.device("meta"):
        model = StudentForCausalLM(config)
    config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)


def with_progress(source: ModelFolder, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of `source`, in `dtype` if given, under a progress bar."""
    count = sum(shape.numel() for shape in source.shapes.values())
    with tqdm(total=count, desc="converting", unit=" weights", unit_scale=True) as progress:
        for name, tensor in source.tensors():
            yield name, tensor if dtype is None else tensor.to(dtype)
            progress.update(tensor.numel())


def convert_checkpoint(
    name_or_path: str,
    output: Path,
    families: tuple[str, ...],
    precision: str | None = None,
    size: str | None = None,
    format: str = "auto",
    verify: bool = True,
    log: Callable[[str], None] = print,
) -> None:
    """Writes the teacher to the folder `output`, atomically.

    families: the model types that are accepted, beside FLA's and this project's. precision: of the
    result; None keeps each tensor's dtype. size: the published size that the model must have.
    format: fla, student, or auto, which is fla where that is exact. verify: compare source and
    result.

    Raises ValueError for what cannot be converted, and if the result differs from its source.
    """
    check_output(output)
    source = ModelFolder(name_or_path)
    if source.model_type not in (*families, "transformer", StudentConfig.model_type):
        raise ValueError(
            f"--model: {name_or_path} is of type {source.model_type}; this script is for {', '.join(families)}"
        )
    config = source.config
    if size is not None:
        check_size(config, families[0], size)
    lacks = fla_lacks(config)
    format = chosen_format(format, lacks)
    named = "FLA transformer" if format == "fla" else "student"
    why = f" (FLA cannot express {lacks})" if lacks else ""
    log(f"{name_or_path} -> {output}, as {named}{why}")
    dtype = None if precision is None else getattr(torch, precision)
    if dtype is not None:
        config.dtype = dtype

    with atomic_directory(output) as folder:
        copy_sidecars(name_or_path, folder)
        save_config(config, format, folder)
        fix_tokenizer_class(folder)
        total = write_weights(with_progress(source, dtype), folder)
        if verify:
            difference = largest_difference(source, ModelFolder(str(folder)), dtype)
            log(f"largest difference to the source: {difference:.1e}")
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"--verify: {name_or_path} and its conversion differ by {difference:.1e}; nothing was written"
                )
    parameters = sum(shape.numel() for shape in source.shapes.values())
    log(f"{output}: {parameters:,} parameters, {total / 1e9:.2f} GB")

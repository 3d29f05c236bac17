"""Converts a teacher checkpoint to FLA's `transformer` format or to ours, one tensor at a time, and proves it."""

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

SHARD_BYTES = 500 * 1000**2  # tensors that are held until their file is written
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLA_QK_NORM_EPS = FAMILIES["transformer"].fixed["qk_norm_eps"]
PUBLISHED = Path(__file__).with_name("published.yaml")


def shape_of(config: StudentConfig) -> dict:
    """What published.yaml says of a model."""
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
    """Raises ValueError unless `config` is the family's published `size`: 7b, or 3.2-3b, for which
    3b does too."""
    sizes = yaml.safe_load(PUBLISHED.read_text()).get(family, {})
    candidates = {name: shape for name, shape in sizes.items() if size in (name, name.rpartition("-")[2])}
    if not candidates:
        raise ValueError(f"--config: {size} is no published size; choose one of {', '.join(sizes)}")
    differences = []
    for shape in candidates.values():
        found = shape_of(config)
        differences.append([f"{k} {found[k]} instead of {shape[k]}" for k in found if found[k] != shape[k]])
    if all(differences):
        raise ValueError(
            f"--config: the checkpoint is no {size}: {', '.join(differences[0])}; name its size or leave --config out"
        )


def fla_lacks(config: StudentConfig) -> str | None:
    """What FLA's TransformerConfig cannot say of a model, or None if it says all."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    qk_norm_eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    reasons = {
        f"linear layers ({config.student_name})": bool(config.linear_layers),
        f"head_dim {config.head_dim}": config.head_dim * config.num_attention_heads != config.hidden_size,
        f"RoPE scaling ({rope_type})": rope_type != "default",
        f"eps {qk_norm_eps:g} in the q/k norms (its own is {FLA_QK_NORM_EPS:g})": config.qk_norm
        and qk_norm_eps != FLA_QK_NORM_EPS,
        "a bias in o_proj": config.attention_output_bias,
        "biases in the MLP": config.mlp_bias,
    }
    return ", ".join(reason for reason, lacking in reasons.items() if lacking) or None


def fla_config(config: StudentConfig):
    """The model as FLA's TransformerConfig; `fla_lacks` must be None."""
    from fla.models import TransformerConfig

    theirs = {name: field for name, field in FAMILIES["transformer"].config.items() if isinstance(field, str)}
    return TransformerConfig(
        **{field: getattr(config, name) for name, field in theirs.items()}
        | {"hidden_act": "swish"},  # its name for silu
        intermediate_size=config.intermediate_size,
        num_kv_heads=config.num_key_value_heads,
        rope_theta=(config.rope_parameters or {}).get("rope_theta", 10000.0),
        architectures=["TransformerForCausalLM"],
    )


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> int:
    """Writes the tensors to `folder` as safetensors, sharded with an index if need be; returns
    their bytes."""
    shards, names, total = [{}], [], 0

    def write() -> None:
        names.append((f"shard-{len(names)}", list(shards[-1])))
        save_file(shards[-1], folder / names[-1][0], metadata={"format": "pt"})
        shards[-1] = {}

    held = 0
    for name, tensor in tensors:
        if shards[-1] and held + tensor.nbytes > SHARD_BYTES:
            write()
            held = 0
        shards[-1][name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    write()
    weight_map = {}
    for i, (name, parts) in enumerate(names, 1):
        final = SINGLE if len(names) == 1 else f"model-{i:05}-of-{len(names):05}.safetensors"
        (folder / name).rename(folder / final)
        weight_map |= dict.fromkeys(parts, final)
    if len(names) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return total


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
    """Writes the teacher to the folder `output`, complete or not at all.

    families: the model types that are taken, beside FLA's and ours. precision: of the result; None
    keeps the dtype of every tensor. size: a published one that the checkpoint must have. format:
    fla, student, or auto, which is fla where that is exact. verify: compare source and result.

    Raises ValueError for what cannot be converted, and if the result differs from its source.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} is there already; remove it or name another folder")
    source = ModelFolder(name_or_path)
    if source.model_type not in (*families, "transformer", StudentConfig.model_type):
        raise ValueError(
            f"--model: {name_or_path} is of type {source.model_type}; this script is for {', '.join(families)}"
        )
    config = source.config
    if size is not None:
        check_size(config, families[0], size)
    lacks = fla_lacks(config)
    if format == "fla" and lacks:
        raise ValueError(f"--format: fla cannot express {lacks}; take student")
    format = format if format != "auto" else "student" if lacks else "fla"
    log(
        f"{name_or_path} -> {output}, as {'FLA transformer' if format == 'fla' else 'student'}"
        + (f" (FLA cannot express {lacks})" if lacks else "")
    )
    dtype = PRECISIONS.get(precision)
    if dtype is not None:
        config.dtype = dtype

    with atomic_directory(output) as folder:
        copy_sidecars(name_or_path, folder)
        if format == "fla":
            fla_config(config).save_pretrained(folder)
        else:
            with torch.device("meta"):
                model = StudentForCausalLM(config)
            config.architectures = [type(model).__name__]
            custom_object_save(model, folder, config=config)
            config.save_pretrained(folder)
        fix_tokenizer_class(folder)
        count = sum(shape.numel() for shape in source.shapes.values())

        def converted():
            with tqdm(total=count, desc="converting", unit=" weights", unit_scale=True) as progress:
                for name, tensor in source.tensors():
                    yield name, tensor if dtype is None else tensor.to(dtype)
                    progress.update(tensor.numel())

        total = write_weights(converted(), folder)
        if verify:
            difference = largest_difference(source, ModelFolder(str(folder)), dtype)
            log(f"largest difference to the source: {difference:.1e}")
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"--verify: {name_or_path} and its conversion differ by {difference:.1e}; nothing was written"
                )
    log(f"{output}: {count:,} parameters, {total / 1e9:.2f} GB")

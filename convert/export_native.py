"""Writes a hybrid as `Qwen3_5ForCausalLM`, which transformers, vLLM and SGLang load without this
project's code.

    python convert/export_native.py --model outputs/qwen3_1.7b/stage2/converted-hf --output DIR

That architecture's linear layers are gated delta nets with short convolutions and a SiLU gate. Its
full layers are Qwen3's attention with an output gate; the export sets that gate to 1/2 and doubles
o_proj. Hybrids that it cannot express are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from runtime.command import run_main
from runtime.data import fix_tokenizer_class
from runtime.files import atomic_directory
from runtime.model_card import write_native_card

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3_5TextConfig
from transformers.utils.logging import set_verbosity_error

from convert.converter import check_output, write_weights
from convert.families import ACTIVATIONS, SAME
from convert.loader import KEY, ModelFolder, copy_sidecars
from convert.verify import TOKENS, TOLERANCE
from distill_model import STUDENT_ATTENTION_MAP, StudentBlock, StudentConfig, StudentSpec
from distill_model.attention import RotaryEmbedding
from distill_model.student_deltanet import GatedDeltaNetStudent
from distill_model.student_layers import default_of

ARCHITECTURE = "Qwen3_5ForCausalLM"
# Parameters of a linear layer. Theirs -> ours, where theirs stacks those of q, k and v:
STACKED = {"in_proj_qkv.weight": "{}_proj.weight", "conv1d.weight": "{}_conv1d.weight"}
# Ours -> theirs:
LINEAR = {
    "g_proj.weight": "in_proj_z.weight",
    "b_proj.weight": "in_proj_b.weight",
    "a_proj.weight": "in_proj_a.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}


def student_lacks(student: StudentSpec, options: dict) -> list[str]:
    """What keeps a linear attention, an entry of STUDENT_ATTENTION_MAP with options, from being
    Qwen3.5's."""
    if student.layer is not GatedDeltaNetStudent:
        return ["another layer than its gated delta net"]

    def setting(name):
        return student.value_of(name, options)

    reasons = {
        "no short convolution": not setting("use_short_conv"),
        "no output gate": not setting("use_gate"),
        "a sigmoid in its gate": setting("use_gate") and setting("gate_activation") != "silu",
        "factored K and V": setting("factored"),
        "conv_bias": setting("conv_bias"),
        "allow_neg_eigval": setting("allow_neg_eigval"),
    }
    return [reason for reason, lacking in reasons.items() if lacking]


NATIVE_STUDENTS = [name for name, student in STUDENT_ATTENTION_MAP.items() if not student_lacks(student, {})]


def native_export_refusals(config: StudentConfig) -> list[str]:
    """Every reason why a model cannot be written as `Qwen3_5ForCausalLM`, each with its cure; empty
    if it can.

    Those that need another teacher come first, then another stage 1, then another stage 2.
    """
    student = STUDENT_ATTENTION_MAP[config.student_name] if config.linear_layers else None
    lacks = student_lacks(student, config.student_options) if student else []
    eps = config.rms_norm_eps
    qk_norm_eps = eps if config.qk_norm_eps is None else config.qk_norm_eps
    qwen3 = "distil a Qwen3 teacher"
    other_eps = config.qk_norm and qk_norm_eps != eps
    no_full_layer = "no layer is full, and transformers counts its cache's tokens there; keep one full"
    reasons = {
        f"the full attention has no q/k norms, and no norm does nothing; {qwen3}": not config.qk_norm,
        f"the q/k norms have eps {qk_norm_eps:g}, the others {eps:g}; {qwen3}": other_eps,
        f"the attention has biases, which vLLM's class has no place for; {qwen3} without": (
            config.attention_bias or config.attention_output_bias
        ),
        f"the MLP has biases; {qwen3}": config.mlp_bias,
        f"the MLP's activation is {config.hidden_act}, not SiLU; {qwen3}": config.hidden_act not in ACTIVATIONS,
        f"{config.student_name} has {', '.join(lacks)}; train {' or '.join(NATIVE_STUDENTS)} with none of that": lacks,
        no_full_layer: not config.keep_full_attention_layers,
    }
    return [reason for reason, lacking in reasons.items() if lacking]


def native_export_refusal(config: StudentConfig) -> str | None:
    """`native_export_refusals` in one line, numbered if there are several; None if there are none."""
    reasons = native_export_refusals(config)
    if len(reasons) > 1:
        reasons = [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    return f"{ARCHITECTURE} cannot express it: {'; '.join(reasons)}" if reasons else None


def native_config(config: StudentConfig) -> Qwen3_5TextConfig:
    """The model's config as Qwen3.5's; `native_export_refusal` must be None."""
    layer_types = ["linear_attention"] * config.num_hidden_layers
    for layer in config.keep_full_attention_layers:
        layer_types[layer] = "full_attention"
    conv_size = config.student_options.get("conv_size", default_of(GatedDeltaNetStudent, "conv_size"))
    values = {name: getattr(config, name) for name in SAME} | {
        "hidden_act": "silu",
        "head_dim": config.head_dim,
        "rope_parameters": {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,  # older transformers read it here; the default is 1/4
        "mamba_ssm_dtype": "float32",  # of recurrent states in vLLM, which would take the model's dtype
        "layer_types": layer_types,
        "linear_conv_kernel_dim": conv_size,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.head_dim,
        "linear_num_key_heads": config.num_attention_heads,
        "linear_num_value_heads": config.num_attention_heads,
    }
    return Qwen3_5TextConfig(**values, architectures=[ARCHITECTURE])


def full_attention(attn: dict[str, torch.Tensor], native: Qwen3_5TextConfig) -> dict[str, torch.Tensor]:
    """Softmax attention. Theirs has an output gate, which is half of each head's rows of q_proj:
    they become 0, whose sigmoid is 1/2, and o_proj is doubled. Its norms multiply by 1 + weight."""
    attn = dict(attn)
    heads = attn["q_proj.weight"].unflatten(0, (native.num_attention_heads, -1))
    attn["q_proj.weight"] = torch.cat((heads, torch.zeros_like(heads)), 1).flatten(0, 1)
    attn["o_proj.weight"] = 2 * attn["o_proj.weight"]
    for name in ("q_norm.weight", "k_norm.weight"):
        attn[name] = attn[name] - 1
    return {f"self_attn.{name}": tensor for name, tensor in attn.items()}


def linear_attention(attn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gated delta net: the same tensors under other names, with q, k and v stacked."""
    attn = dict(attn)
    native = {}
    for theirs, ours in STACKED.items():
        native[theirs] = torch.cat([attn.pop(ours.format(part)) for part in "qkv"])
    native |= {LINEAR[name]: tensor for name, tensor in attn.items()}
    return {f"linear_attn.{name}": tensor for name, tensor in native.items()}


def with_norms_near_one(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same block, with powers of two moved from its norms to the projections that read them:
    theirs multiply by 1 + weight, which in bf16 is coarse for a norm far below 1."""
    block = dict(block)
    for norm, module, output in (("attn_norm", "attn", "o_proj"), ("mlp_norm", "mlp", "down_proj")):
        scale = 2.0 ** block[f"{norm}.weight"].abs().median().clamp(min=2.0**-20).log2().round()
        block[f"{norm}.weight"] = block[f"{norm}.weight"] / scale
        projections = [name for name in block if name.startswith(f"{module}.") and name.endswith("_proj.weight")]
        for name in projections:
            if name != f"{module}.{output}.weight":
                block[name] = block[name] * scale
    return block


def native_block(block: dict[str, torch.Tensor], native: Qwen3_5TextConfig, full: bool) -> dict[str, torch.Tensor]:
    """A block's tensors under their names, from those under our names (both without the block's
    prefix)."""
    block = with_norms_near_one(block)
    attn = {name.removeprefix("attn."): tensor for name, tensor in block.items() if name.startswith("attn.")}
    return {
        "input_layernorm.weight": block["attn_norm.weight"] - 1,
        **(full_attention(attn, native) if full else linear_attention(attn)),
        "post_attention_layernorm.weight": block["mlp_norm.weight"] - 1,
        **{name: tensor for name, tensor in block.items() if name.startswith("mlp.")},
    }


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The largest difference, relative to our largest absolute value (at least 1); on the CPU."""
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).cpu()


@torch.no_grad()
def native_tensors(
    source: ModelFolder, native: Qwen3_5TextConfig, differences: list[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (their name, tensor) in fp32.

    Random tokens, at positions from 0 and from beyond the context length, run through each block of
    both models as it is converted; the relative difference of its outputs is added to
    `differences`.
    """
    # Imported after distill_model: without a GPU this module imports FLA's functions, which
    # distill_model has replaced by plain PyTorch.
    from transformers.models.qwen3_5.modeling_qwen3_5 import (
        Qwen3_5DecoderLayer,
        Qwen3_5RMSNorm,
        Qwen3_5TextRotaryEmbedding,
    )

    config = source.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, TOKENS), generator=generator)
    positions = (torch.arange(TOKENS) + torch.tensor([[0], [config.max_position_embeddings]])).to(device)

    def loaded(module, state):
        module.load_state_dict(state)
        return module.to(device).eval()

    (embeddings,) = source.state("model.embeddings.").values()
    yield "model.embed_tokens.weight", embeddings
    ours = theirs = embeddings[ids].to(device)
    rotary = RotaryEmbedding(config).to(device)(ours, positions)
    their_rotary = Qwen3_5TextRotaryEmbedding(native).to(device)(theirs, positions.expand(3, -1, -1))
    for i in tqdm(range(config.num_hidden_layers), desc="exporting", unit="layer"):
        block = source.state(f"model.layers.{i}.")
        their_block = native_block(block, native, native.layer_types[i] == "full_attention")
        ours = loaded(StudentBlock(config, i), block)(ours, position_embeddings=rotary)
        theirs = loaded(Qwen3_5DecoderLayer(native, i), their_block)(theirs, position_embeddings=their_rotary)
        differences.append(relative_difference(ours, theirs))
        yield from ((f"model.layers.{i}.{name}", tensor) for name, tensor in their_block.items())
    norm = source.state("model.norm.")
    their_norm = {"weight": norm["weight"] - 1}
    ours = loaded(torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps), norm)(ours)
    theirs = loaded(Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps), their_norm)(theirs)
    differences.append(relative_difference(ours, theirs))
    yield "model.norm.weight", their_norm["weight"]
    if not config.tie_word_embeddings:
        yield "lm_head.weight", source.state("lm_head.")["weight"]


def without_loss(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` where that is exact, else unchanged: a norm's weight minus 1 may need
    more bits than the weight."""
    short = tensor.to(dtype)
    return short if torch.equal(short.to(tensor.dtype), tensor) else tensor


def export_native(name_or_path: str, output: Path) -> None:
    """Writes a hybrid to the folder `output` as `Qwen3_5ForCausalLM`, with its tokenizer and
    generation config, atomically.

    Raises ValueError if that cannot express it, and if the result differs from its source.
    """
    check_output(output)
    source = ModelFolder(name_or_path)
    if source.model_type != StudentConfig.model_type:
        raise ValueError(
            f"--model: {name_or_path} is of type {source.model_type}, no hybrid of ours; name a converted-hf folder"
        )
    if reason := native_export_refusal(source.config):
        raise ValueError(f"--model: {name_or_path}: {reason}")
    native = native_config(source.config)
    dtype = native.dtype or torch.float32
    differences: list[torch.Tensor] = []
    with atomic_directory(output) as folder:
        copy_sidecars(name_or_path, folder)
        write_native_card(source.folder, folder, ARCHITECTURE)
        native.save_pretrained(folder)
        fix_tokenizer_class(folder)
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(native).save_pretrained(folder)
        tensors = native_tensors(source, native, differences)
        total = write_weights(((name, without_loss(tensor, dtype)) for name, tensor in tensors), folder)
        difference = torch.stack(differences).max().item()  # NaN if any is NaN
        if not difference <= TOLERANCE:
            raise ValueError(f"{name_or_path} and its export differ by {difference:.1e}; nothing was written")
    print(
        f"{name_or_path} -> {output}, as {ARCHITECTURE}: {total / 1e9:.2f} GB, "
        f"largest difference to the source {difference:.1e}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="converted-hf folder of a run, or a hub name")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    args = parser.parse_args(argv)
    set_verbosity_error()  # transformers' advice to install kernels
    try:
        export_native(args.model, args.output)
    except ValueError as error:
        raise ValueError(str(error).replace(KEY, "--model")) from None


if __name__ == "__main__":
    run_main(main)

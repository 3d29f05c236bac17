"""Exports a training checkpoint as a Hugging Face folder: `<output_dir>/converted-hf/`.

    python convert_ckpt.py --cfg configs/quickstart/stage1.yaml [--checkpoint outputs/stage1/checkpoint-100]
    python convert_ckpt.py --cfg configs/quickstart/stage2.yaml --push-to-hub me/my-hybrid

train.py calls `export_checkpoint` at the end of a run. The script is for checkpoints of unfinished
runs, for updating the model card with later evaluation results, and for uploading to the hub.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoints import CheckpointError, checkpoints, damage
from runtime.command import run_main
from runtime.config import PARTS, Config, ConfigError, load_config, trained_parts
from runtime.data import fix_tokenizer_class
from runtime.files import atomic_directory, one_line
from runtime.model_card import write_card
from runtime.run_folder import CONFIG, EXPORT, RUN, difference, recorded_config, with_recorded_document_mask

from httpx import HTTPError
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    import torch

    from distill_model import StudentConfig

# Modules that import torch are imported in functions, after the arguments are checked.
SHARD_SIZE = "5GB"


def student_config(cfg: Config, teacher: StudentConfig) -> StudentConfig:
    """The config of the model that a stage trains."""
    from distill_model import StudentConfig

    values = teacher.to_dict() | {
        "student_name": cfg.student_model.name,
        "student_options": cfg.student_model.options,
        "keep_full_attention_layers": sorted(cfg.student_model.keep_full_attention_layers),
    }
    for name in ("model_type", "architectures"):  # the teacher's
        values.pop(name, None)
    return StudentConfig(**values)


def frozen_state(cfg: Config) -> dict[str, torch.Tensor]:
    """The weights that train.train_only and train.freeze leave as they were at the start, for not
    every checkpoint of DeepSpeed holds them."""
    import torch

    from convert import load_teacher
    from optim import freeze_parts
    from stages import build_student_for_stage2_and_3

    teacher = load_teacher(cfg.teacher_model.name) if cfg.stage == 2 else None
    start = build_student_for_stage2_and_3(cfg, torch.float32, lambda *_: None, teacher)
    freeze_parts(start, cfg)
    return {name: p.detach() for name, p in start.named_parameters() if not p.requires_grad}


def trained_state(cfg: Config, checkpoint: Path, config: StudentConfig) -> dict[str, torch.Tensor]:
    """All weights of the trained model in fp32, by parameter name, from DeepSpeed's shards (ZeRO 1,
    2 or 3)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from convert import load_teacher
    from wrapper import student_attention_state

    state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    if cfg.stage == 1:  # all but the student's attention is the frozen teacher's, whose head was not saved
        teacher = load_teacher(cfg.teacher_model.name).state_dict()
        outside_attention = {name: tensor for name, tensor in teacher.items() if ".attn." not in name}
        state = outside_attention | student_attention_state(state)
    elif len(trained_parts(cfg.train)) < len(PARTS):
        state |= frozen_state(cfg)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embeddings.weight"]
    return state


def export_checkpoint(cfg: Config, checkpoint: Path, output: Path) -> None:
    """Writes `checkpoint` of the run `cfg` to `output`, with tokenizer, generation config and model
    card, atomically, in the dtype that the teacher was saved in.

    Raises RuntimeError if the checkpoint lacks a weight of the model or holds one that the model
    does not know.
    """
    import torch
    from transformers.initialization import no_init_weights

    from convert import copy_sidecars, load_teacher_config
    from distill_model import StudentForCausalLM

    config = student_config(cfg, load_teacher_config(cfg.teacher_model.name))
    with no_init_weights():
        model = StudentForCausalLM(config).to(config.dtype or torch.float32)
    model.tie_weights()
    model.load_state_dict(trained_state(cfg, checkpoint, config))
    with atomic_directory(output, replace=True) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        copy_sidecars(cfg.teacher_model.name, folder)
        fix_tokenizer_class(folder)
        write_card(cfg, checkpoint, folder, config)


@contextmanager
def hub(name: str) -> Iterator[HfApi]:
    """The hub's client for uploads to the model `name`. Raises ValueError, of one line, if uploads
    are impossible, and for the hub's errors in the block."""
    key = f"--push-to-hub: {name}"
    validate_repo_id(name)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{key}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise ValueError(f"{key}: not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write")
    try:
        yield HfApi()
    except HTTPError as error:
        raise ValueError(
            f"{key}: the hub failed ({one_line(error)}); see that name and token may write, and try again"
        ) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", required=True, help="YAML of the stage, or <output_dir>/config.yaml")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint-N folder of the run; default: the latest")
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="upload the result, with its card, as the hub's model NAME",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as for train.py")
    return parser.parse_intermixed_args(argv)


def check_run(cfg: Config, cfg_file: str) -> None:
    """Raises ConfigError if `cfg`, read from `cfg_file`, is not of the run in its output_dir."""
    folder = Path(cfg.train.output_dir)
    run_config = folder / CONFIG
    beside = Path(cfg_file).parent
    is_run_config = Path(cfg_file).name == CONFIG and (beside / RUN).is_file()
    if is_run_config and beside.resolve() != folder.resolve():  # the run folder was copied or moved
        raise ConfigError(
            f"train.output_dir: {folder} is not where {cfg_file} lies; add train.output_dir={beside} for the run there"
        )
    if run_config.is_file() and (other := difference(recorded_config(run_config), cfg)):
        raise ConfigError(f"--cfg: {cfg_file} is not of the run in {folder} ({other}); name {run_config}")


def chosen_checkpoint(folder: Path, wanted: Path | None) -> Path:
    """The checkpoint `wanted` of the run in `folder`, None for the latest.

    Raises ConfigError if there is none, CheckpointError if it is damaged.
    """
    found = checkpoints(folder)
    if wanted:  # will be unpickled, so only this run's own are accepted
        found = [path for path in found if path.absolute() == wanted.absolute()]
    if not found and wanted:
        raise ConfigError(f"--checkpoint: {wanted} is not a complete checkpoint of {folder}; name one of that run")
    if not found:
        raise ConfigError(f"--checkpoint: {folder} has no complete checkpoint; train first")
    if wrong := damage(found[-1]):
        raise CheckpointError(f"--checkpoint: {found[-1]} is damaged ({wrong}); name another one of {folder}")
    return found[-1]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.cfg, args.overrides)
    folder = Path(cfg.train.output_dir)
    cfg = with_recorded_document_mask(cfg, folder / CONFIG)
    check_run(cfg, args.cfg)
    checkpoint = chosen_checkpoint(folder, args.checkpoint)
    if args.push_to_hub:
        with hub(args.push_to_hub) as api:  # fails before the work
            api.create_repo(args.push_to_hub, exist_ok=True)
    export_checkpoint(cfg, checkpoint, folder / EXPORT)
    print(f"{checkpoint} -> {folder / EXPORT}")
    if args.push_to_hub:
        with hub(args.push_to_hub) as api:
            api.upload_folder(
                repo_id=args.push_to_hub,
                folder_path=folder / EXPORT,
                commit_message=f"Stage {cfg.stage}",
            )
        print(f"{folder / EXPORT} -> https://huggingface.co/{args.push_to_hub}")


if __name__ == "__main__":
    run_main(main)

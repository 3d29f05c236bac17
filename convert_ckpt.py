"""A training checkpoint as a Hugging Face folder: `<output_dir>/converted-hf/`.

    python convert_ckpt.py --cfg configs/quickstart/stage1.yaml [--checkpoint outputs/stage1/checkpoint-100]

train.py calls `export_checkpoint` when it is done; the script is for checkpoints of runs that are not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from convert import copy_sidecars, load_teacher, load_teacher_config
from distill_model import StudentConfig, StudentForCausalLM
from pipeline.checkpoints import CheckpointError, checkpoints, damage
from pipeline.config import Config, ConfigError, load_config
from pipeline.files import complete_or_absent, one_line
from pipeline.run_folder import EXPORT
from wrapper import student_attention_state


def student_config(cfg: Config, teacher: StudentConfig) -> StudentConfig:
    """The config of the model that a stage trains."""
    values = teacher.to_dict() | {
        "student_name": cfg.student_model.name,
        "student_options": cfg.student_model.options,
        "keep_full_attention_layers": sorted(cfg.student_model.keep_full_attention_layers),
    }
    return StudentConfig(**{name: value for name, value in values.items() if name not in ("model_type", "architectures")})


def trained_state(cfg: Config, checkpoint: Path, config: StudentConfig) -> dict[str, torch.Tensor]:
    """All weights of the trained model in fp32, from DeepSpeed's shards (ZeRO 1, 2 or 3), under the model's names."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    if cfg.stage == 1:  # the checkpoint's other weights are the frozen teacher's, less its head
        outside = {k: v for k, v in load_teacher(cfg.teacher_model.name).state_dict().items() if ".attn." not in k}
        state = outside | student_attention_state(state)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embeddings.weight"]
    return state


def export_checkpoint(cfg: Config, checkpoint: Path, output: Path) -> None:
    """Writes `checkpoint` of the run `cfg` to `output`, with tokenizer and generation config, complete or not at all,
    in the dtype that the teacher was saved in.

    Raises RuntimeError if the checkpoint lacks a weight of the model or holds one that the model does not know.
    """
    config = student_config(cfg, load_teacher_config(cfg.teacher_model.name))
    with no_init_weights():
        model = StudentForCausalLM(config).to(config.dtype or torch.float32)
    model.tie_weights()
    model.load_state_dict(trained_state(cfg, checkpoint, config))
    with complete_or_absent(output, replace=True) as folder:
        model.save_pretrained(folder)
        copy_sidecars(cfg.teacher_model.name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", required=True, help="YAML of the stage, or <output_dir>/config.yaml")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint-N folder of the run; default: the newest")
    parser.add_argument("overrides", nargs="*", help="key.path=value, as for train.py")
    args = parser.parse_args()
    cfg = load_config(args.cfg, args.overrides)
    folder = Path(cfg.train.output_dir)
    found = checkpoints(folder)
    if args.checkpoint:  # unpickled: it must be this run's own
        found = [path for path in found if path.absolute() == args.checkpoint.absolute()]
    if not found:
        raise ConfigError(f"--checkpoint: {args.checkpoint or folder} is or holds no whole checkpoint of {folder}; train first")
    if wrong := damage(found[-1]):
        raise CheckpointError(f"--checkpoint: {found[-1]} is damaged ({wrong}); name another one of {folder}")
    export_checkpoint(cfg, found[-1], folder / EXPORT)
    print(f"{found[-1]} -> {folder / EXPORT}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"convert_ckpt.py: error: {one_line(error)}")

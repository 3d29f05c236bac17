"""Writes the stage-2 configs of GA-S2's candidates, one per layer of the teacher, each with only
that layer restored.

    python layer_selection/generate_layer_configs_ga_s2.py --cfg STAGE2.yaml \
        --output_dir outputs/ga_s2 [key.path=value ...]
    deepspeed train.py --cfg outputs/ga_s2/layer_0/stage2.yaml  # and all others, in any order
    python layer_selection/retrieve_loss_log_from_wandb.py --runs outputs/ga_s2
    python layer_selection/get_ranking_from_wandb_loss_log.py --ratio 0.25 \
        --log outputs/ga_s2/loss_log.json

Teacher, data, stage-1 student and everything else come from STAGE2.yaml and the overrides; runs
write to <output_dir>/layer_<N>/run. These scripts are select_layers.py --method ga_s2 step by step,
for runs whose losses are in W&B.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, ConfigError, dump_config
from runtime.files import atomic_write_text
from runtime.old_flags import refuse_old_flags
from runtime.run_folder import difference, recorded_config, with_recorded_document_mask

from layer_selection.stage2_runs import candidate_config, load_stage_2
from layer_selection.wandb_log import STAGE_2, candidate_folder, write_candidates


def write_configs(made: dict[Path, Config]) -> None:
    """Writes all of them, or none: raises ConfigError if a file holds another config."""
    for file, cfg in made.items():
        if file.is_file() and (other := difference(recorded_config(file), cfg)):
            raise ConfigError(
                f"--output_dir: {file} is of other candidates ({other}); name another folder or remove it"
            )
    for file, cfg in made.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, dump_config(cfg))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", required=True, help="YAML of stage 2; the layers that it keeps do not matter")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="applied after the file")
    argv = sys.argv[1:] if argv is None else argv
    needed = "besides: --cfg, a YAML of stage 2 with all else, and student_init_ckpt where the student needs one"
    refuse_old_flags("generate_layer_configs_ga_s2.py", argv, needed)
    args = parser.parse_intermixed_args(argv)

    cfg = load_stage_2(args.cfg, args.overrides)
    cfg = with_recorded_document_mask(cfg, candidate_folder(args.output_dir, 0) / STAGE_2)
    from convert import load_teacher_config

    layers = load_teacher_config(cfg.teacher_model.name).num_hidden_layers
    made = {}
    for layer in range(layers):
        folder = candidate_folder(args.output_dir, layer)
        made[folder / STAGE_2] = candidate_config(cfg, [layer], folder)
    write_configs(made)
    write_candidates(args.output_dir, cfg.teacher_model.name, layers)
    print(
        f"{args.output_dir}: {layers} configs; for each: deepspeed train.py --cfg {args.output_dir}/layer_<N>/{STAGE_2}"
    )


if __name__ == "__main__":
    run_main(main)

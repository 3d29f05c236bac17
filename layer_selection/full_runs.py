"""A hybrid through a whole stage 2 by train.py, and its held-out KL: what a selector with a training run a layer is made of."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

from convert import load_teacher_config
from convert.loader import Checkpoint
from distill_model import StudentForCausalLM
from pipeline.config import Config, ConfigError, dump_config, load_config
from pipeline.files import write_whole
from pipeline.guard import REQUEUE
from pipeline.run_folder import EXPORT, difference
from train import check_models

ROOT = Path(__file__).resolve().parents[1]
HELDOUT_KL, STAGE_2 = "heldout_kl.json", "stage2.yaml"


def with_layers(cfg: Config, kept: list[int], output_dir: Path) -> Config:
    """The stage-2 config that keeps `kept` and writes to output_dir."""
    return dataclasses.replace(
        cfg,
        student_model=dataclasses.replace(cfg.student_model, keep_full_attention_layers=kept),
        train=dataclasses.replace(cfg.train, output_dir=str(output_dir)),
    )


def check_start(cfg: Config) -> None:
    """Raises ValueError if train.student_init_ckpt is not what stage 1 made of this teacher for this student. Reads configs and the
    embeddings, which stage 1 leaves as they are."""
    check_models(cfg)
    start, teacher = cfg.train.student_init_ckpt, cfg.teacher_model.name
    if kept := load_teacher_config(start).keep_full_attention_layers:
        raise ConfigError(f"train.student_init_ckpt: {start} keeps layers {kept}; name stage 1's all-linear converted-hf")
    ours, theirs = (Checkpoint(name).rows("model.embeddings.weight", slice(0, None)) for name in (start, teacher))
    if not torch.equal(ours.to(theirs.dtype), theirs):
        raise ConfigError(f"train.student_init_ckpt: {start} was not made from {teacher} by stage 1, their embeddings differ; name "
                          "stage 1's converted-hf of this teacher")  # fmt: skip


def run_to_its_end(command: list[str]) -> tuple[int, bool]:
    """Its exit code, and whether a SIGTERM came, which is handed on: this process must not end while the run still saves."""
    received = []
    with subprocess.Popen(command) as run:

        def hand_on(*_):
            received.append(True)
            run.terminate()

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            return run.wait(), bool(received)
        finally:
            signal.signal(signal.SIGTERM, before)


def train_hybrid(bench, launcher: str, kept: list[int], folder: Path) -> list[float]:
    """KL(teacher || student) of each held-out sequence after stage 2 with `kept` restored; does in `folder` what is missing.

    Raises ConfigError if the run fails or the folder has that of another config. Told to stop, it exits with REQUEUE.
    """
    cfg, measured = with_layers(bench.cfg, kept, folder / "run"), folder / HELDOUT_KL
    if (folder / STAGE_2).is_file() and (other := difference(load_config(folder / STAGE_2), cfg)):
        raise ConfigError(f"{folder} has a run of another config ({other}); name another --output_dir or remove it")
    if not measured.is_file():
        check_start(bench.cfg)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / STAGE_2, dump_config(cfg))
        code, stopped = run_to_its_end([*launcher.split(), str(ROOT / "train.py"), "--cfg", str(folder / STAGE_2)])
        if code == REQUEUE or code and stopped:  # DeepSpeed's launcher loses the exit code of a run that SIGTERM has stopped
            sys.exit(REQUEUE)
        if code:
            layer = folder.name.replace("_", " ")
            raise ConfigError(f"{layer}: its run in {folder / 'run'} ended with exit code {code}; see above, and run again")
        model = StudentForCausalLM.from_pretrained(folder / "run" / EXPORT, dtype=bench.dtype).to(bench.device).eval()
        write_whole(measured, json.dumps(bench.kls(model)) + "\n")
    return json.loads(measured.read_text())

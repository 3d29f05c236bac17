"""The stage-2 configs of a selection: of its hybrids, each trained by train.py and measured here, and of what it chose."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from runtime.config import Config, ConfigError, dump_config, load_config
from runtime.files import atomic_write_text
from runtime.guard import REQUEUE
from runtime.run_folder import EXPORT, difference

import torch

from convert import load_teacher_config
from convert.loader import ModelFolder
from distill_model import StudentForCausalLM
from layer_selection.ranking import Ranking, hybrid_folder, ratio_of
from preflight import check_models

ROOT = Path(__file__).resolve().parents[1]
HELDOUT_KL, STAGE_2 = "heldout_kl.json", "stage2.yaml"


def load_stage_2(file: str, overrides: list[str] | None = None) -> Config:
    """The config of --cfg. Raises ConfigError if it is of another stage."""
    cfg = load_config(file, overrides or [])
    if cfg.stage != 2:
        raise ConfigError(f"--cfg: {file} is of stage {cfg.stage}; name a stage-2 file")
    return cfg


def with_layers(cfg: Config, kept: list[int], output_dir: Path) -> Config:
    """The stage-2 config that keeps `kept` and writes to output_dir."""
    return dataclasses.replace(
        cfg,
        student_model=dataclasses.replace(cfg.student_model, keep_full_attention_layers=kept),
        train=dataclasses.replace(cfg.train, output_dir=str(output_dir)),
    )


def teacher_name(name: str) -> str:
    """{teacher}_{size} of a teacher: qwen2.5_1.5b, llama3.2_3b; of one whose name has no size, the
    number of its parameters."""
    last = Path(name).resolve().name.lower()
    if found := re.match(r"(.+?)[-_](\d+(?:\.\d+)?[bm])(?![a-z0-9])", last):
        return f"{re.sub(r'[-_](?=[0-9])', '', found[1])}_{found[2]}"
    with torch.device("meta"):
        count = sum(p.numel() for p in StudentForCausalLM(load_teacher_config(name)).parameters())
    unit, letter = (10**9, "b") if count >= 10**9 else (10**6, "m")
    return f"{last}_{count / unit:.1f}".removesuffix(".0") + letter


def write_chosen(cfg: Config, ranking: Ranking, count: int, ratio: float | None, folder: Path) -> Path:
    """Writes the stage-2 config with the `count` best layers, named as the folders of configs/ are,
    and returns its path. Its run folder lies beside it: no two choices share one. ratio: what
    `count` was asked for by, or None."""
    name = hybrid_folder(
        teacher_name(cfg.teacher_model.name),
        cfg.student_model.name,
        ratio or ratio_of(count, len(ranking.layers)),
        ranking.method,
    )
    file = folder / name / STAGE_2
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, dump_config(with_layers(cfg, ranking.keep(count), file.parent / "stage2")))
    return file


def check_start(cfg: Config) -> None:
    """Raises ValueError if train.student_init_ckpt is not what stage 1 made of this teacher for
    this student. Reads configs and the embeddings, which stage 1 leaves as they are."""
    check_models(cfg)
    start, teacher = cfg.train.student_init_ckpt, cfg.teacher_model.name
    if kept := load_teacher_config(start).keep_full_attention_layers:
        raise ConfigError(
            f"train.student_init_ckpt: {start} keeps layers {kept}; name stage 1's all-linear converted-hf"
        )
    ours, theirs = (ModelFolder(name).rows("model.embeddings.weight", slice(0, None)) for name in (start, teacher))
    if not torch.equal(ours.to(theirs.dtype), theirs):
        raise ConfigError(
            f"train.student_init_ckpt: {start} was not made from {teacher} by stage 1, their embeddings differ; name "
            "stage 1's converted-hf of this teacher"
        )


def run_to_its_end(command: list[str]) -> tuple[int, bool]:
    """Its exit code, and whether a SIGTERM came, which is handed on: this process must not end
    while the run still saves."""
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
    """KL(teacher || student) of each held-out sequence after stage 2 with `kept` restored; does in
    `folder` what is missing.

    Raises ConfigError if the run fails or the folder has that of another config. Told to stop, it
    exits with REQUEUE.
    """
    cfg, measured = with_layers(bench.cfg, kept, folder / "run"), folder / HELDOUT_KL
    if (folder / STAGE_2).is_file() and (other := difference(load_config(folder / STAGE_2), cfg)):
        raise ConfigError(f"{folder} has a run of another config ({other}); name another --output_dir or remove it")
    kls = json.loads(measured.read_text()) if measured.is_file() else []
    if len(kls) != sum(map(len, bench.batches)):  # missing, or of another --sequences; train.py knows what is finished
        check_start(bench.cfg)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / STAGE_2, dump_config(cfg))
        code, stopped = run_to_its_end([*launcher.split(), str(ROOT / "train.py"), "--cfg", str(folder / STAGE_2)])
        if (
            code == REQUEUE or code and stopped
        ):  # DeepSpeed's launcher loses the exit code of a run that SIGTERM has stopped
            sys.exit(REQUEUE)
        if code:
            layer = folder.name.replace("_", " ")
            raise ConfigError(
                f"{layer}: its run in {folder / 'run'} ended with exit code {code}; see above, and run again"
            )
        model = StudentForCausalLM.from_pretrained(folder / "run" / EXPORT, dtype=bench.dtype).to(bench.device).eval()
        kls = bench.kls(model)
        atomic_write_text(measured, json.dumps(kls) + "\n")
    return kls

"""The stage-2 configs of a selection, of its candidates and of what it chose; and candidates as
runs of train.py."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Config, ConfigError, dump_config, load_config
from runtime.files import atomic_write_text
from runtime.guard import REQUEUE
from runtime.run_folder import EXPORT, difference, recorded_config

from layer_selection.options import RecallOptions, objective_settings
from layer_selection.ranking import Ranking, hybrid_folder, ratio_of

if TYPE_CHECKING:
    import torch

# Modules that import torch are imported in functions: scripts read their config with this one first.

ROOT = Path(__file__).resolve().parents[1]
STAGE_2 = "stage2.yaml"
SIZE_IN_NAME = re.compile(r"(.+?)[-_](\d+(?:\.\d+)?[bm])(?![a-z0-9])")


def heldout_file(objective: str, recall: RecallOptions) -> str:
    """The file in a candidate's folder with its objective on each held-out sequence: heldout_kl.json,
    heldout_recall_<pairs>_<words>.json ..."""
    return f"heldout_{'_'.join(map(str, objective_settings(objective, recall).values()))}.json"


HELDOUT_KL = heldout_file("kl", RecallOptions())


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


def candidate_config(cfg: Config, kept: list[int], folder: Path) -> Config:
    """The stage-2 config of a candidate that trains alone, in `folder`/run: with the exact teacher, as
    those that train jointly."""
    teacher = dataclasses.replace(cfg.teacher_model, precision="exact")
    return with_layers(dataclasses.replace(cfg, teacher_model=teacher), kept, folder / "run")


def teacher_name(name: str) -> str:
    """{teacher}_{size} of a teacher: qwen2.5_1.5b, llama3.2_3b; if its name has no size, its number
    of parameters."""
    last = Path(name).resolve().name.lower()
    if found := SIZE_IN_NAME.match(last):
        family = re.sub(r"[-_](?=[0-9])", "", found[1])
        return f"{family}_{found[2]}"
    import torch

    from convert import load_teacher_config
    from distill_model import StudentForCausalLM

    with torch.device("meta"):
        count = sum(p.numel() for p in StudentForCausalLM(load_teacher_config(name)).parameters())
    unit, letter = (10**9, "b") if count >= 10**9 else (10**6, "m")
    size = f"{count / unit:.1f}".removesuffix(".0")
    return f"{last}_{size}{letter}"


def write_chosen(cfg: Config, ranking: Ranking, count: int, ratio: float | None, folder: Path) -> Path:
    """Writes the stage-2 config with the `count` best layers into a folder named like those of
    configs/; returns its path. Its run folder is next to it, so that no two choices share one.
    ratio: what `count` was computed from, or None."""
    name = hybrid_folder(
        teacher_name(cfg.teacher_model.name),
        cfg.student_model.name,
        ratio or ratio_of(count, len(ranking.layers)),
        ranking.method,
    )
    file = folder / name / STAGE_2
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = with_layers(cfg, ranking.keep(count), file.parent / "stage2")
    atomic_write_text(file, dump_config(chosen))
    return file


def embeddings(name: str) -> torch.Tensor:
    """[V, H], of a checkpoint."""
    from convert.loader import ModelFolder

    return ModelFolder(name).rows("model.embeddings.weight", slice(0, None))


def check_start(cfg: Config) -> None:
    """Raises ValueError if train.student_init_ckpt is not what stage 1 made of this teacher for
    this student, or is missing though the student needs a stage 1. Reads configs and the
    embeddings, which stage 1 does not change."""
    import torch

    from convert import load_teacher_config
    from distill_model import check_start_from_teacher
    from preflight import check_models

    check_models(cfg)
    start = cfg.train.student_init_ckpt
    if not start:
        check_start_from_teacher(cfg.student_model.name)  # even where the config keeps all layers
        return
    teacher = cfg.teacher_model.name
    if kept := load_teacher_config(start).keep_full_attention_layers:
        raise ConfigError(
            f"train.student_init_ckpt: {start} keeps layers {kept}; name stage 1's all-linear converted-hf"
        )
    both = [embeddings(start), embeddings(teacher)]
    coarser = min((each.dtype for each in both), key=lambda dtype: dtype.itemsize)
    if not torch.equal(*(each.to(coarser) for each in both)):
        raise ConfigError(
            f"train.student_init_ckpt: {start} was not made from {teacher} by stage 1, their "
            "embeddings differ; name stage 1's converted-hf of this teacher"
        )


# ------------------------------------------------------------------------ full runs
def deepspeed_launcher(port: str | None) -> str:
    """The command that starts train.py in this environment. port: for the processes to meet, or
    None for DeepSpeed's default."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return f"{launcher} --master_port {port}" if port else launcher


def run_to_completion(command: list[str]) -> tuple[int, bool]:
    """Runs a command and returns (exit code, whether a SIGTERM came). The signal is forwarded, and
    this process waits: it must not end while the run still saves."""
    received = []
    with subprocess.Popen(command) as run:

        def forward(*_):
            received.append(True)
            run.terminate()

        before = signal.signal(signal.SIGTERM, forward)
        try:
            return run.wait(), bool(received)
        finally:
            signal.signal(signal.SIGTERM, before)


def train_with_script(cfg: Config, launcher: str, folder: Path) -> None:
    """Trains `cfg` with train.py, which resumes or skips what is already there.

    Raises ConfigError if the run fails. Exits with REQUEUE if it was told to stop.
    """
    file = folder / STAGE_2
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, dump_config(cfg))
    command = [*launcher.split(), str(ROOT / "train.py"), "--cfg", str(file)]
    code, stopped = run_to_completion(command)
    # DeepSpeed's launcher does not pass on the exit code of a run that SIGTERM has stopped.
    if code == REQUEUE or code and stopped:
        sys.exit(REQUEUE)
    if code:
        layer = folder.name.replace("_", " ")
        raise ConfigError(
            f"{layer}: its run in {cfg.train.output_dir} ended with exit code {code}; see above, and rerun the command"
        )


def train_hybrid(bench, launcher: str, kept: list[int], folder: Path) -> list[float]:
    """The objective on each held-out sequence after stage 2 with `kept` restored; trains and measures
    in `folder` what is missing there.

    bench: a `Bench`. Raises ConfigError if the run fails or the folder has that of another config.
    Told to stop, it exits with REQUEUE.
    """
    cfg = candidate_config(bench.cfg, kept, folder)
    written = folder / STAGE_2
    if written.is_file() and (other := difference(recorded_config(written), cfg)):
        raise ConfigError(f"{folder} has a run of another config ({other}); name another --output_dir or remove it")
    measured = folder / heldout_file(bench.objective_name, bench.recall)
    kls = json.loads(measured.read_text()) if measured.is_file() else []
    if len(kls) == bench.num_sequences:
        return kls
    # Not measured yet, or on another number of sequences; train.py itself skips a finished run.
    check_start(bench.cfg)
    train_with_script(cfg, launcher, folder)
    from distill_model import StudentForCausalLM

    model = StudentForCausalLM.from_pretrained(folder / "run" / EXPORT, dtype=bench.dtype)
    kls = bench.losses(model.to(bench.device).eval())
    atomic_write_text(measured, json.dumps(kls) + "\n")
    return kls

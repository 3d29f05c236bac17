"""On a GPU: the three stages in bf16 through FLA's kernels, beside the same stages in fp32 on the CPU, and a run that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from conftest import write_config
from pipeline.guard import REQUEUE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).parents[2]
STEPS = 24


def start(file, *options, gpu=True):
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": str(20000 + hash(str(file)) % 20000)}  # fmt: skip
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    log = Path(file).with_suffix(".log").open("a")
    command = [sys.executable, "train.py", "--cfg", str(file), *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(process, file):
    assert process.wait(400) == 0, Path(file).with_suffix(".log").read_text()[-3000:]


def losses(folder, name="loss"):
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line[name] for line in lines if name in line])


def configs(folder, teacher_dir, data_dir, stage, **changes):
    folder.mkdir(exist_ok=True)
    return write_config(folder, stage, teacher_dir, data_dir, max_steps=STEPS, eval_steps=STEPS, save_steps=6, **changes)


@pytest.fixture(scope="module")
def both(tmp_path_factory, teacher_dir, data_dir):
    """Folders with the three stages: of the GPU in bf16, and of the CPU in fp32."""
    folder = tmp_path_factory.mktemp("both")
    for stage in (1, 2, 3):
        files = [configs(folder / name, teacher_dir, data_dir, stage) for name in ("gpu", "cpu")]
        runs = [start(files[0]), start(files[1], gpu=False)]
        for process, file in zip(runs, files):
            finish(process, file)
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_fall_and_follow_the_cpu(both, stage):
    gpu, cpu = (losses(both / name / f"stage{stage}") for name in ("gpu", "cpu"))
    assert len(gpu) == len(cpu) == STEPS
    assert gpu[-6:].mean() < 0.9 * gpu[:6].mean(), gpu
    torch.testing.assert_close(gpu, cpu, rtol=0.1, atol=1e-3)
    before, after = losses(both / "gpu" / f"stage{stage}", "eval_loss")[[0, -1]]
    assert after < before


def term_all(process):
    """As Slurm and DeepSpeed's launcher do it."""
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.terminate()


@pytest.mark.parametrize("stage, end, code", [(1, subprocess.Popen.kill, -signal.SIGKILL), (2, subprocess.Popen.kill, -signal.SIGKILL),
                                              (1, term_all, REQUEUE)])  # fmt: skip
def test_killed_and_resumed(both, tmp_path, teacher_dir, data_dir, stage, end, code):
    initial = {"student_init_ckpt": str(both / "gpu" / "stage1" / "converted-hf")} if stage == 2 else {}
    file = configs(tmp_path / "run", teacher_dir, data_dir, stage, **initial)
    output = tmp_path / "run" / f"stage{stage}"
    process, limit = start(file), time.monotonic() + 300
    while not list(output.glob("checkpoint-1*")):
        assert process.poll() is None and time.monotonic() < limit, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    end(process)
    assert process.wait(60) == code, file.with_suffix(".log").read_text()[-3000:]
    finish(start(file), file)
    assert "resum" in file.with_suffix(".log").read_text().lower()
    lines = {line["step"]: line["loss"] for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in line}
    torch.testing.assert_close(torch.tensor([lines[step] for step in sorted(lines)]), losses(both / "gpu" / f"stage{stage}"), rtol=0.02, atol=1e-3)

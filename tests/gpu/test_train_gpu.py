"""On a GPU: the three stages in bf16 through FLA's kernels against the same stages in fp32 on the
CPU, a killed run, and several GPUs against one."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from runtime.config import load_config
from runtime.guard import REQUEUE

import psutil
import pytest
import torch
from conftest import write_config
from one_config import environment_of_one_config
from processes import free_port
from test_candidate_training import check_master_adamw

from distill_model import StudentForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_on_master_copies(dtype):
    check_master_adamw("cuda", dtype)


def start(file, *options, gpu=True, rank=0, world_size=1, port=None, variables=None):
    """Starts a rank of a run. port: on which the ranks meet."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
    }
    environment |= variables or {}
    if not gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    log = Path(file).with_suffix(".log").open("a")
    command = [sys.executable, "train.py", "--cfg", str(file), *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(process, file, seconds=400):
    def log():
        return Path(file).with_suffix(".log").read_text()[-3000:]

    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"no end after {seconds} s:\n{log()}")
    assert code == 0, log()


def losses(folder, name="loss"):
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line[name] for line in lines if name in line])


def configs(folder, teacher_dir, data_dir, stage, **changes):
    folder.mkdir(exist_ok=True)
    return write_config(
        folder,
        stage,
        teacher_dir,
        data_dir,
        max_steps=STEPS,
        eval_steps=STEPS,
        save_steps=6,
        **changes,
    )


def start_of(folder, stage):
    return {"student_init_ckpt": str(folder / "cpu" / f"stage{stage - 1}" / "converted-hf")} if stage > 1 else {}


@pytest.fixture(scope="module")
def both(tmp_path_factory, teacher_dir, data_dir):
    """Folders with the three stages: on the GPU in bf16, and on the CPU in fp32. The GPU's stages
    start from the CPU's exports, so that errors of bf16 do not add up over the stages."""
    folder = tmp_path_factory.mktemp("both")
    for stage in (1, 2, 3):
        changes = {"cuda_graphs": False, **start_of(folder, stage)}
        files = [configs(folder / name, teacher_dir, data_dir, stage, **changes) for name in ("gpu", "cpu")]
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
    model = StudentForCausalLM.from_pretrained(both / "gpu" / f"stage{stage}" / "converted-hf")
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cuda_graphs_change_no_loss_and_no_weight(both, tmp_path, teacher_dir, data_dir, stage):
    """A small model's steps are replayed without being asked for, where chunks are read whole."""
    changes = {"document_mask": False, **start_of(both, stage)}
    for name, graphs in (("replayed", "auto"), ("launched", False)):
        file = configs(tmp_path / name, teacher_dir, data_dir, stage, cuda_graphs=graphs, **changes)
        finish(start(file), file)
    folders = [tmp_path / name / f"stage{stage}" for name in ("replayed", "launched")]
    assert torch.equal(*map(losses, folders))
    replayed, launched = (
        StudentForCausalLM.from_pretrained(folder / "converted-hf").state_dict() for folder in folders
    )
    assert all(torch.equal(weight, launched[name]) for name, weight in replayed.items())


def term_all(process):
    """Sends SIGTERM to all processes, as Slurm and DeepSpeed's launcher do."""
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.terminate()


@pytest.mark.parametrize(
    "stage, end, code",
    [
        (1, subprocess.Popen.kill, -signal.SIGKILL),
        (2, subprocess.Popen.kill, -signal.SIGKILL),
        (1, term_all, REQUEUE),
    ],
)
def test_killed_and_resumed(both, tmp_path, teacher_dir, data_dir, stage, end, code):
    file = configs(tmp_path / "run", teacher_dir, data_dir, stage, **start_of(both, stage))
    output = tmp_path / "run" / f"stage{stage}"
    process, limit = start(file), time.monotonic() + 300
    while not list(output.glob("checkpoint-1*")):
        assert process.poll() is None, file.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < limit, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    end(process)
    assert process.wait(60) == code, file.with_suffix(".log").read_text()[-3000:]
    finish(start(file), file)
    assert "resum" in file.with_suffix(".log").read_text().lower()
    lines = {
        line["step"]: line["loss"]
        for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    }
    resumed = torch.tensor([lines[step] for step in sorted(lines)])
    torch.testing.assert_close(resumed, losses(both / "gpu" / f"stage{stage}"), rtol=0, atol=0)


def test_measured_micro_batches(both, tmp_path, teacher_dir, data_dir):
    """train.micro_batch_size auto takes more than one sequence, keeps the number when the run is
    killed and resumed, and has the losses of one sequence at a time, within the rounding of bf16."""
    changes = {"micro_batch_size": "auto", **start_of(both, 2)}
    file = configs(tmp_path / "run", teacher_dir, data_dir, 2, **changes)
    output = tmp_path / "run" / "stage2"
    process, limit = start(file), time.monotonic() + 300
    while not list(output.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < limit, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    chosen = load_config(output / "config.yaml").train.micro_batch_size
    assert chosen in (2, 4)
    process.kill()
    process.wait(60)
    finish(start(file), file)
    log = file.with_suffix(".log").read_text()
    (line,) = (line for line in log.splitlines() if "train.micro_batch_size: auto" in line)
    print(line)
    assert f"auto: {chosen} (" in line and "resuming from" in log
    assert load_config(output / "config.yaml").train.micro_batch_size == chosen
    torch.testing.assert_close(losses(output), losses(both / "gpu" / "stage2"), rtol=0.1, atol=1e-3)


# The train settings of stage 2 by how its models are sharded.
SHARDING = {
    "ZeRO-1": {"zero_stage": 1, "kd_teacher_shard": "never", "cuda_graphs": False},
    "ZeRO-1, CUDA graphs": {"zero_stage": 1, "kd_teacher_shard": "never"},
    "ZeRO-2": {"zero_stage": 2, "kd_teacher_shard": "never", "cuda_graphs": False},
    "ZeRO-2, CUDA graphs": {"zero_stage": 2, "kd_teacher_shard": "never"},
    "ZeRO-2, teacher ZeRO-3": {"zero_stage": 2, "kd_teacher_shard": "always"},
    "ZeRO-3": {"zero_stage": 3, "kd_teacher_shard": "never"},
}
# Relative, of a loss. In bf16 ZeRO-2 adds up the gradients of micro-batches in bf16: 2.0e-2 on two H200s.
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}


def distil(folder, teacher_dir, data_dir, stage1, dtype, world_size, sharding):
    """The losses of 20 steps of stage 2 on a global batch of 4 sequences.

    Adam's first steps amplify rounding: on a CPU two processes are within 5e-7 of one in fp32 at
    these learning rates, and within 6e-5 at the ten times higher ones of the other tests.
    """
    folder.mkdir()
    rates = {"lr": 2e-4, "lr_attn": 4e-4, "final_lr": 1e-4}
    file = write_config(
        folder,
        2,
        teacher_dir,
        data_dir,
        max_steps=20,
        save_steps=20,
        eval_steps=20,
        dtype=dtype,
        document_mask=False,  # so that CUDA graphs can be compared too
        student_init_ckpt=str(stage1),
        **rates,
        **sharding,
    )
    variables = environment_of_one_config() if dtype == "fp32" else {}
    port = free_port()
    ranks = [
        start(file, rank=rank, world_size=world_size, port=port, variables=variables) for rank in range(world_size)
    ]
    try:
        for process in ranks:
            finish(process, file)
    finally:
        for process in ranks:  # those that still wait for a rank that failed
            process.kill()
    return losses(folder / "stage2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher_dir, data_dir):
    """dtype -> a stage 1 to start from, and the losses of stage 2 on one GPU."""
    folder = tmp_path_factory.mktemp("alone")
    file = write_config(folder, 1, teacher_dir, data_dir)
    finish(start(file, gpu=False), file)
    stage1 = folder / "stage1" / "converted-hf"
    return cache(
        lambda dtype: (
            stage1,
            distil(folder / dtype, teacher_dir, data_dir, stage1, dtype, 1, {"cuda_graphs": False}),
        )
    )


@pytest.mark.parametrize("sharding", SHARDING)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_several_gpus_have_the_losses_of_one(alone, tmp_path, teacher_dir, data_dir, world_size, sharding, dtype):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    stage1, expected = alone(dtype)
    got = distil(tmp_path / "run", teacher_dir, data_dir, stage1, dtype, world_size, SHARDING[sharding])
    assert len(got) == len(expected) == 20
    spread = ((got - expected).abs() / expected).max().item()
    print(f"{world_size} GPUs, {sharding}, {dtype}: losses within {spread:.1e} of one GPU's")
    assert spread < LIMITS[dtype], (got, expected)

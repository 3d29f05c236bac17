"""Evaluation with one process per GPU, compared with one GPU and the CPU."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from one_config import environment_of_one_config
from test_evaluate import ROOT, read, same_scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LIMIT = 300  # seconds


def evaluate(options, runs):
    """The scores that evaluate.py finds in each of `runs`: its folder of results -> (number of GPUs,
    environment variables). They go side by side, and all of them and their workers end within LIMIT."""
    processes = {}
    end = time.monotonic() + LIMIT
    try:
        for output, (num_gpus, variables) in runs.items():
            command = [sys.executable, "evaluate.py", *options, "--num_gpus", str(num_gpus), "--output", str(output)]
            environment = os.environ | environment_of_one_config() | variables
            with log_of(output).open("w") as file:
                processes[output] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
        for output, process in processes.items():
            code = process.wait(max(0, end - time.monotonic()))
            assert code == 0, log_of(output).read_text()[-3000:]
    except subprocess.TimeoutExpired:
        pytest.fail(f"{output.name}: no end after {LIMIT} s:\n{log_of(output).read_text()[-3000:]}")
    finally:
        for process in processes.values():
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
    return [read(output) for output in runs]


def log_of(output):
    return output.with_suffix(".log")


def test_several_gpus_score_as_one(teacher_dir, student_dir, data_dir, tmp_path):
    """13 documents, which the GPUs share unevenly; fp32 GEMMs without TF32."""
    options = [
        teacher_dir,
        student_dir,
        "--tasks",
        "local",
        "--seq_lens",
        "96,300",
        "--limit",
        "13",
        "--data",
        data_dir,
        "--teacher",
        teacher_dir,
    ]
    if (gpus := torch.cuda.device_count()) < 2:
        pytest.skip("needs 2 GPUs")
    runs = {"cpu": (1, {"CUDA_VISIBLE_DEVICES": ""}), "one": (1, {}), "all": (gpus, {})}
    cpu, one, several = evaluate(options, {tmp_path / name: run for name, run in runs.items()})
    assert cpu.keys() == one.keys() == several.keys() and len(cpu) == 2
    for checkpoint in cpu:
        same_scores(one[checkpoint], several[checkpoint], 1e-4)
        same_scores(cpu[checkpoint], one[checkpoint], 1e-3)

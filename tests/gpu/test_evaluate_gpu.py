"""Evaluation with one process per GPU, compared with one GPU and the CPU."""

import os
import subprocess
import sys

import psutil
import pytest
import torch
from one_config import environment_of_one_config
from test_evaluate import ROOT, read, same_scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
LIMIT = 300  # seconds


def evaluate(options, output, num_gpus, **variables):
    """The scores that evaluate.py finds; it and all its workers end within LIMIT."""
    command = [sys.executable, "evaluate.py", *options, "--num_gpus", str(num_gpus), "--output", str(output)]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        environment = os.environ | environment_of_one_config() | variables
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            each.kill()
        pytest.fail(f"{output.name}: no end after {LIMIT} s:\n{log.read_text()[-3000:]}")
    assert code == 0, log.read_text()[-3000:]
    return read(output)


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
    cpu = evaluate(options, tmp_path / "cpu", 1, CUDA_VISIBLE_DEVICES="")
    one = evaluate(options, tmp_path / "one", 1)
    several = evaluate(options, tmp_path / "all", gpus)
    assert cpu.keys() == one.keys() == several.keys() and len(cpu) == 2
    for checkpoint in cpu:
        same_scores(one[checkpoint], several[checkpoint], 1e-4)
        same_scores(cpu[checkpoint], one[checkpoint], 1e-3)

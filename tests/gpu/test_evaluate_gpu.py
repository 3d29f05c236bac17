"""Evaluation with one process per GPU, compared with one GPU and the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from test_evaluate import ROOT, read, same_scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


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
    for name, count, visible in (("cpu", 1, {"CUDA_VISIBLE_DEVICES": ""}), ("one", 1, {}), ("all", gpus, {})):
        command = [sys.executable, "evaluate.py", *options, "--num_gpus", str(count), "--output", str(tmp_path / name)]
        environment = os.environ | {"TRITON_F32_DEFAULT": "tf32x3"} | visible
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cpu, one, several = (read(tmp_path / name) for name in ("cpu", "one", "all"))
    assert cpu.keys() == one.keys() == several.keys() and len(cpu) == 2
    for checkpoint in cpu:
        same_scores(one[checkpoint], several[checkpoint], 1e-4)
        same_scores(cpu[checkpoint], one[checkpoint], 1e-3)

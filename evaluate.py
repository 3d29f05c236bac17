"""Evaluates checkpoints with lm-evaluation-harness, and with tasks of our own that need no
network.

    python evaluate.py outputs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage3/converted-hf   # RULER at 4096
    python evaluate.py TEACHER STUDENT --tasks local --seq_lens 512,2048 --data CHUNKS --teacher TEACHER

A checkpoint is a folder or a hub name: one of ours, or a plain Hugging Face one. --tasks takes
groups, tasks of our own (both in evaluation/tasks.py) and any name that lm-evaluation-harness
knows. With several GPUs there is one process per GPU, and the documents of a task are sharded
across them.

Each checkpoint has OUTPUT/PATH__OF__CHECKPOINT/results.json, written after every task: the same
command, run again, resumes with what is missing, what failed, and what was measured with other
settings or by an older procedure. The tables of this call are OUTPUT/results.md and results.json,
with results.png for several checkpoints. The exit code is 1 if a task failed; the others run all
the same.
"""

from functools import partial

from runtime.command import run_main

from evaluation.commands import evaluate_checkpoints

if __name__ == "__main__":
    run_main(partial(evaluate_checkpoints, description=__doc__))

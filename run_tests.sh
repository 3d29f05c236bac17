#!/usr/bin/env bash
# Runs the tests; creates .venv if it is missing. Arguments go to pytest:  bash run_tests.sh tests/test_losses.py -x
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
export HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "Tests: tiny random models, no network, no GPU; at most 10 minutes on two quiet cores (without the marks slow, slurm, faults, gpu)"
start=$SECONDS
status=0
# By default all tests, with a process per core and whole files per process, in the order that tests/conftest.py gives.
[[ $# -gt 0 ]] || set -- -n "$(env -u OMP_NUM_THREADS nproc)" --dist loadfile --no-loadscope-reorder
python -m pytest -m "not slow and not slurm and not faults and not gpu" "$@" || status=$?
say "Tests: $([[ $status == 0 ]] && echo passed || echo "failed (pytest's exit code $status)") after $((SECONDS - start)) s"
exit "$status"

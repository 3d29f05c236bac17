#!/usr/bin/env bash
#SBATCH --job-name=selection
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Layer selection, by default GA-S2. In a job array, each task evaluates one candidate layer; without an array, missing layers
# are evaluated and all are ranked. METHOD=gates, the default of select_layers.py, trains in one job without an array.
#
#   sbatch --array=0-27 launch_selection.sh, then  sbatch launch_selection.sh     or, on this machine:  bash launch_selection.sh
#
# CFG: the stage-2 config (configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage2.yaml). METHOD (ga_s2). RATIO: the share of layers
# to keep (as many as CFG keeps; 0.25 if it keeps none). OVERRIDES: key.path=value ..., such as train.micro_batch_size=8 where CFG has
# `auto`, which gates and joint training of candidates do not take. More settings are in launch_common.sh. Arguments that begin with --cfg
# replace all of these; select_layers.py --slurm uses that.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/launch_common.sh ]] || here=${SLURM_SUBMIT_DIR:?submit from the folder of the project} # sbatch runs a copy
source "$here/launch_common.sh"
CFG=${CFG:-configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage2.yaml}
prepare "$CFG${SLURM_ARRAY_TASK_ID:+, layer $SLURM_ARRAY_TASK_ID}"
read -r -a overrides <<<"${OVERRIDES:-}"
[[ ${1:-} == --cfg ]] ||
    set -- --cfg "$CFG" --method "${METHOD:-ga_s2}" ${RATIO:+--ratio "$RATIO"} "$@" ${overrides[@]+"${overrides[@]}"}
supervise python layer_selection/select_layers.py "$@" ${SLURM_ARRAY_TASK_ID:+--candidate "$SLURM_ARRAY_TASK_ID"}

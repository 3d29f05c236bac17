#!/usr/bin/env bash
#SBATCH --job-name=stage2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Stage 2: the hybrid learns the teacher's logits.
#
#   sbatch [--nodes=4] launch_stage2.sh [key.path=value ...]     or, on this machine:  bash launch_stage2.sh
#
# CFG: the config (configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage2.yaml). RANKING: a
# ranking.json of layer selection with the layers to keep; by default the config's. The other settings are in launch_common.sh.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/launch_common.sh ]] || here=${SLURM_SUBMIT_DIR:?submit from the folder of the project} # sbatch runs a copy
source "$here/launch_common.sh"
kept=$(kept_layers)
train "${CFG:-configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage2.yaml}" ${kept:+"$kept"} "$@"

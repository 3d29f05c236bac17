#!/usr/bin/env bash
#SBATCH --job-name=evaluation
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Evaluates checkpoints with lm-evaluation-harness and tasks of our own; they are folders (from the project's) or hub names.
#
#   sbatch [--gpus-per-node=8] eval.sh CHECKPOINT...     or, on this machine:  bash eval.sh CHECKPOINT...
#
# TASKS        ruler, commonsense, mmlu, generation, needle, local, or names of tasks, separated by commas   (ruler)
# SEQ_LENS     lengths in tokens of tasks that are made to a length: RULER, recall      (4096; needle: up to 262144)
# BATCH_SIZE   documents per batch and GPU, or auto                                                              (8)
# NUM_GPUS     processes, one per GPU; documents are sharded across them                           (all visible GPUs)
# LIMIT        evaluate only the first LIMIT documents of a task                                              (all)
# OUTPUT       folder of results.json, results.md, results.png                                  (outputs/evaluation)
# DATA         chunks of preprocess_chunk.py, for held-out perplexity and KL                                   (none)
# DOCUMENT_MASK  true: read the documents of a chunk of DATA one by one; auto: where the chunks record them     (auto)
# TEACHER      the checkpoint that the KL is measured against                                                  (none)
# NUM_WORDS    different words in the recall tasks                                                              (256)
#
# The same command, run again, resumes with what is missing. Exit code 1: a task failed; the others ran.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/launch_common.sh ]] || here=${SLURM_SUBMIT_DIR:?submit from the folder of the project} # sbatch runs a copy
[[ -n ${VENV:-} ]] || source "$here/setup.sh"
source "$here/launch_common.sh"
[[ $# != 0 ]] || die "CHECKPOINT: none; usage: [TASKS=...] bash eval.sh CHECKPOINT..."
export EVAL_SH=1 # evaluate.py's messages then name the variables above
options=()
for name in TASKS SEQ_LENS BATCH_SIZE NUM_GPUS LIMIT OUTPUT DATA DOCUMENT_MASK TEACHER NUM_WORDS; do
    [[ -z ${!name:-} ]] || options+=("--${name,,}" "${!name}")
done
prepare "${TASKS:-ruler}"
supervise python evaluate.py "$@" ${options[@]+"${options[@]}"}

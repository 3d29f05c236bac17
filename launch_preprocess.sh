#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Makes chunks from a corpus, on CPUs. Finished folders are not made again; folders are written atomically.
#
#   sbatch launch_preprocess.sh     or, on this machine:  bash launch_preprocess.sh
#
# DATASET: hub name, file or folder (robbiegwaldd/dclm-10B). TOKENIZER: of the teacher (Qwen/Qwen2.5-1.5B-Instruct).
# Arguments go to preprocess_download_tokenize.py: sbatch launch_preprocess.sh --skip_bad_files
# DATA_DIR (data/qwen2.5_1.5b), CONTEXT_LENGTHS (512 4096 16384), MAX_TOKENS (900000000), HOLDOUT (0.01), NUM_PROC (the job's cores),
# PACKING (cut).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/launch_common.sh ]] || here=${SLURM_SUBMIT_DIR:?submit from the folder of the project} # sbatch runs a copy
source "$here/launch_common.sh"
DATA_DIR=${DATA_DIR:-data/qwen2.5_1.5b}
python preprocess_download_tokenize.py --dataset_name "${DATASET:-robbiegwaldd/dclm-10B}" --tokenizer "${TOKENIZER:-Qwen/Qwen2.5-1.5B-Instruct}" \
    --max_tokens "${MAX_TOKENS:-900000000}" --holdout "${HOLDOUT:-0.01}" --num_proc "${NUM_PROC:-${SLURM_CPUS_PER_TASK:-$(nproc)}}" \
    --output_dir "$DATA_DIR/tokenized" "$@"
for length in ${CONTEXT_LENGTHS:-512 4096 16384}; do
    python preprocess_chunk.py --tokenized_dataset_path "$DATA_DIR/tokenized" --context_length "$length" --packing "${PACKING:-cut}" \
        --output_dir "$DATA_DIR"
done

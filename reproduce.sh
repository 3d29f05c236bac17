#!/usr/bin/env bash
# One published choice of layers: data, stages 1 and 2, RULER at 4096 and the export, on all GPUs of this machine.
#
#   bash reproduce.sh qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2      # a folder of configs/ with a stage2.yaml
#   DRY_RUN=1 bash reproduce.sh ...                              # prints the commands and runs none
#
# What is finished is not done again: folders of one teacher share their data, those of one student layer its stage 1.
# DATASET (robbiegwaldd/dclm-10B), MAX_TOKENS (900000000): of the corpus.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
die() { printf '%s\n' "$*" >&2; exit 1; }
[[ $# == 1 ]] || die "usage: bash reproduce.sh ROW, a folder of configs/ such as qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2"
ROW=$1 STAGE1=configs/${1%_hybrid_*}/stage1.yaml STAGE2=configs/$1/stage2.yaml
[[ $ROW == *_hybrid_* && -f $STAGE1 && -f $STAGE2 ]] || die "ROW: $ROW is not a folder of configs/ with a hybrid; choose one of configs/*_hybrid_*"

# value FILE KEY: a value of one of the files that write_configs.py makes.
value() { sed -n "s/^ *$2: //p" "$1"; }

run() {
    printf '%q ' "$@"
    echo
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

TEACHER=$(value "$STAGE2" name | head -n 1) DATA=$(dirname "$(value "$STAGE2" cache_dir)")
RESULT=$(value "$STAGE2" output_dir)/converted-hf
[[ -n ${DRY_RUN:-} ]] || source setup.sh
run python preprocess_download_tokenize.py --dataset_name "${DATASET:-robbiegwaldd/dclm-10B}" --tokenizer "$TEACHER" \
    --max_tokens "${MAX_TOKENS:-900000000}" --output_dir "$DATA/tokenized"
for config in "$STAGE1" "$STAGE2"; do
    run python preprocess_chunk.py --tokenized_dataset_path "$DATA/tokenized" --context_length "$(value "$config" train_seq_len)" \
        --output_dir "$DATA"
    run deepspeed train.py --cfg "$config"
done
run env TASKS=ruler SEQ_LENS=4096 OUTPUT="${RESULT%/*}/evaluation" bash eval.sh "$RESULT"
run python convert_ckpt.py --cfg "$STAGE2" # once more, for a model card with these results

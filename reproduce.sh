#!/usr/bin/env bash
# One choice of layers: data, stages 1 and 2, evaluation beside the teacher, model card and reports, on all GPUs of this machine.
#
#   bash reproduce.sh qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2      # a folder of configs/ with a stage2.yaml
#   DRY_RUN=1 bash reproduce.sh ...                              # prints the commands and runs none
#
# What is finished is not done again: folders of one teacher share their data, those of one student layer its stage 1. A stage 2
# that starts from the teacher (no train.student_init_ckpt) has no stage 1.
# TEACHER      where the teacher's weights are, if not at its hub name: a folder                (hub name)
# DATASET      corpus: a hub name, a file or a folder                       (robbiegwaldd/dclm-10B)
# MAX_TOKENS   of the corpus                                    (one and a half times those of stage 2)
# TASKS        of eval.sh, at SEQ_LENS; ruler needs a network, niah_single_1 and five others do not (ruler)
# SEQ_LENS     their lengths in tokens                                                           (4096)
# RECALL_LENS  lengths of the recall tasks in tokens, above a window                          (512,2048)
# LIMIT and other settings of eval.sh reach it through the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
die() { printf '%s\n' "$*" >&2; exit 1; }
[[ $# == 1 ]] || die "usage: bash reproduce.sh ROW, a folder of configs/ such as qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2"
ROW=$1 STAGE2=configs/$1/stage2.yaml

# value FILE KEY: a value of one of the files that write_configs.py makes.
value() { sed -n "s/^ *$2: //p" "$1"; }

STAGES=("$STAGE2")
if [[ -f $STAGE2 && -n $(value "$STAGE2" student_init_ckpt) ]]; then STAGES=("configs/${ROW%_hybrid_*}/stage1.yaml" "$STAGE2"); fi
[[ $ROW == *_hybrid_* && -f $STAGE2 && -f ${STAGES[0]} ]] || die "ROW: $ROW is not a folder of configs/ with a hybrid; choose one of configs/*_hybrid_*"

run() {
    printf '%q ' "$@"
    echo
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

WEIGHTS=()
TEACHER=${TEACHER:-}
TEACHER=${TEACHER%/}
[[ -z $TEACHER ]] || WEIGHTS=("teacher_model.name=$TEACHER")
TEACHER=${TEACHER:-$(value "$STAGE2" name | head -n 1)} CHUNKS=$(value "$STAGE2" cache_dir)
DATA=$(dirname "$CHUNKS") RUN2=$(value "$STAGE2" output_dir)
TOKENS=$(value "$STAGE2" target_tokens)
if [[ -z ${DRY_RUN:-} ]]; then
    if [[ -n ${VENV:-} ]]; then source "$VENV/bin/activate"; else source setup.sh; fi
fi
run python preprocess_download_tokenize.py --dataset_name "${DATASET:-robbiegwaldd/dclm-10B}" --tokenizer "$TEACHER" \
    --max_tokens "${MAX_TOKENS:-$((${TOKENS//_/} * 3 / 2))}" --output_dir "$DATA/tokenized"
runs=()
for config in "${STAGES[@]}"; do
    runs+=("$(value "$config" output_dir)")
    run python preprocess_chunk.py --tokenized_dataset_path "$DATA/tokenized" --context_length "$(value "$config" train_seq_len)" \
        --output_dir "$DATA"
    run deepspeed train.py --cfg "$config" ${WEIGHTS[@]+"${WEIGHTS[@]}"}
done
results=()
for checkpoint in "$TEACHER" "$RUN2/converted-hf"; do
    output=$RUN2/evaluation name=${checkpoint%/converted-hf}
    name=${name#/}
    [[ $checkpoint != "$TEACHER" ]] || output=$DATA/evaluation # of all folders of this teacher
    run env TASKS="${TASKS:-ruler}" SEQ_LENS="${SEQ_LENS:-4096}" OUTPUT="$output" bash eval.sh "$checkpoint"
    run env TASKS=local,needle_recall SEQ_LENS="${RECALL_LENS:-512,2048}" DATA="$CHUNKS" TEACHER="$TEACHER" OUTPUT="$output" bash eval.sh "$checkpoint"
    results+=("$output/${name//\//__}/results.json")
done
run python eval_compare.py "${results[@]}" --output "$RUN2/evaluation"
run python convert_ckpt.py --cfg "$STAGE2" ${WEIGHTS[@]+"${WEIGHTS[@]}"} # once more, for a model card with these results
run python report.py "${runs[@]}" --samples 3

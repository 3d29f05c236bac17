#!/usr/bin/env bash
# From a softmax teacher to a hybrid, end to end on real text: teacher, data, three training stages, report.
#
#   bash quickstart.sh [--tiny] [--skip_bad_files] [CORPUS]
#
# CORPUS: a hub dataset's name, a file or folder of text or tables; the standard library's sources without one.
# --skip_bad_files: leave out and count files of CORPUS that cannot be read.
# --tiny (or QUICKSTART_TINY=1): every step in seconds, to see that it runs; nothing is learnt.
# QUICKSTART_OUT: the folder for all results (quickstart_out). Run again, it goes on behind the last finished step.
set -euo pipefail

TINY=${QUICKSTART_TINY:-}
[[ $TINY == 0 ]] && TINY=
CORPUS= BAD_FILES=()
for argument in "$@"; do
    case $argument in
        --tiny) TINY=1 ;;
        --skip_bad_files) BAD_FILES=(--skip_bad_files) ;;
        -*) echo "$argument: unknown option; usage: bash quickstart.sh [--tiny] [--skip_bad_files] [CORPUS]" >&2; exit 2 ;;
        *) [[ -z $CORPUS ]] || { echo "$argument: a second corpus; give one at most" >&2; exit 2; }; CORPUS=$argument ;;
    esac
done
# Paths count from where the command was typed, not from here.
[[ -e $CORPUS ]] && CORPUS=$(realpath "$CORPUS")
OUT=quickstart_out
[[ -n ${QUICKSTART_OUT:-} ]] && OUT=$(realpath -m "$QUICKSTART_OUT")
cd "$(dirname "$0")"
source ./setup.sh

# One process with all cores: on two cores, two processes train no faster and start slower.
CORES=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CORES} TQDM_MININTERVAL=${TQDM_MININTERVAL:-2}
if ! python -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then
    export DS_ACCELERATOR=cpu
fi

if [[ $TINY ]]; then
    TOKENIZER=(--vocab_size 512 --max_files 40) TOKENS=(--max_tokens 60000 --holdout 0.2) TEACHER=(--tiny --steps 20)
    TRAIN=(train.max_steps=4 train.batch_size=2 train.micro_batch_size=2 train.save_steps=4 train.eval_steps=2 train.eval_batches=1)
    SCAN=(--chunks 4 --batch_size 4) REPORT=(--tiny --chunks 4) CONTEXT=64 LONG=128 LIMIT=4
else
    TOKENIZER=() TOKENS=(--max_tokens 4000000 --holdout 0.02) TEACHER=() TRAIN=() SCAN=() REPORT=() CONTEXT=256 LONG=512 LIMIT=50
fi
SHORT_DATA=$OUT/data/chunked_context$CONTEXT LONG_DATA=$OUT/data/chunked_context$LONG

# stage_overrides STAGE: what differs from configs/quickstart/stageN.yaml, one a line; nothing in a plain stage 1.
stage_overrides() {
    local kept
    if [[ $OUT != quickstart_out || $TINY ]]; then
        printf '%s\n' "teacher_model.name=$OUT/teacher" "train.output_dir=$OUT/stage$1"
        if [[ $1 == 3 ]]; then
            printf '%s\n' "data.cache_dir=$LONG_DATA" "train.train_seq_len=$LONG"
        else
            printf '%s\n' "data.cache_dir=$SHORT_DATA" "train.train_seq_len=$CONTEXT"
        fi
        if [[ $1 != 1 ]]; then
            printf '%s\n' "train.student_init_ckpt=$OUT/stage$(($1 - 1))/converted-hf"
        fi
    fi
    if [[ $1 != 1 ]]; then
        kept=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["keep"])' "$OUT/layer_scan/layer_scan.json")
        printf '%s\n' "student_model.keep_full_attention_layers=${kept// /}"
    fi
    [[ ${#TRAIN[@]} == 0 ]] || printf '%s\n' "${TRAIN[@]}"
}

# step NAME PRODUCT TEXT COMMAND...: runs the command, unless the same one has made PRODUCT before.
STEP=0 STEPS=11
step() {
    local name=$1 product=$2 text=$3 start=$SECONDS stamp=$OUT/.done/$1
    shift 3
    STEP=$((STEP + 1))
    local made_by="$*"
    for argument in "$@"; do
        [[ $argument == configs/*.yaml ]] && made_by+=" $(cksum <"$argument")"
    done
    if [[ -e $stamp && "$(<"$stamp")" != "$made_by" ]]; then
        die "$OUT: holds the results of another quickstart (step '$name' differs); remove it or set QUICKSTART_OUT to another folder."
    fi
    if [[ -e $stamp && -e $product ]]; then
        say "$STEP/$STEPS $text: done before ($product)"
        return
    fi
    say "$STEP/$STEPS $text"
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@" || die "$STEP/$STEPS $name failed (above); mend that and start quickstart.sh again, finished steps are kept."
    [[ -e $product ]] || die "$STEP/$STEPS $name left no $product."
    printf '%s\n' "$made_by" >"$stamp"
    printf '   %s s\n' "$((SECONDS - start))"
}

train_stage() {
    local overrides
    overrides=$(stage_overrides "$1")
    mapfile -t overrides <<<"$overrides"
    [[ -n ${overrides[0]} ]] || overrides=()
    step "stage$1" "$OUT/stage$1/converted-hf/config.json" "$2" \
        deepspeed --num_gpus 1 train.py --cfg "configs/quickstart/stage$1.yaml" ${overrides[@]+"${overrides[@]}"}
}

mkdir -p "$OUT/.done"
BEGIN=$SECONDS
if [[ $CORPUS ]]; then
    SOURCE=(--corpus "$CORPUS") DATASET=$CORPUS
else
    SOURCE=(--stdlib_dir "$OUT/corpus") DATASET=$OUT/corpus
fi
say "Quickstart: results in $OUT, $([[ $TINY ]] && echo 'tiny, 3 minutes' || echo 'at most 10 minutes on two cores')"
step tokenizer "$OUT/tokenizer/tokenizer.json" "Corpus and BPE tokenizer, 10 s" \
    python -m quickstart.train_tokenizer --output_dir "$OUT/tokenizer" "${SOURCE[@]}" ${TOKENIZER[@]+"${TOKENIZER[@]}"} ${BAD_FILES[@]+"${BAD_FILES[@]}"}
step tokens "$OUT/data/tokenized" "Corpus to tokens, 20 s" \
    python preprocess_download_tokenize.py --dataset_name "$DATASET" --tokenizer "$OUT/tokenizer" \
    --output_dir "$OUT/data/tokenized" ${TOKENS[@]+"${TOKENS[@]}"} ${BAD_FILES[@]+"${BAD_FILES[@]}"}
step chunks "$SHORT_DATA/metadata.json" "Chunks of $CONTEXT tokens, for stages 1 and 2, 10 s" \
    python preprocess_chunk.py --tokenized_dataset_path "$OUT/data/tokenized" --context_length "$CONTEXT" --output_dir "$OUT/data"
step long_chunks "$LONG_DATA/metadata.json" "Chunks of $LONG tokens, for stage 3, 10 s" \
    python preprocess_chunk.py --tokenized_dataset_path "$OUT/data/tokenized" --context_length "$LONG" --output_dir "$OUT/data"
step teacher "$OUT/teacher/config.json" "Teacher: a small Qwen3 from scratch, 2 to 3 minutes" \
    python -m quickstart.train_teacher --data "$SHORT_DATA" --tokenizer "$OUT/tokenizer" --output_dir "$OUT/teacher" ${TEACHER[@]+"${TEACHER[@]}"}
train_stage 1 "Stage 1: each layer's linear attention learns the teacher's output, 1 minute"
step layer_scan "$OUT/layer_scan/layer_scan.json" "Layer scan: which quarter keeps full attention, 30 s" \
    python -m layer_selection.scan_layers --student "$OUT/stage1/converted-hf" --teacher "$OUT/teacher" \
    --data "$SHORT_DATA" --output_dir "$OUT/layer_scan" ${SCAN[@]+"${SCAN[@]}"}
train_stage 2 "Stage 2: the hybrid learns the teacher's logits, 1 to 2 minutes"
train_stage 3 "Stage 3: the hybrid goes on at context $LONG, without the teacher, 2 to 3 minutes"
step evaluation "$OUT/evaluation/results.md" "Evaluation: recall and held-out text through lm-evaluation-harness, 1 minute" \
    python evaluate.py "$OUT/teacher" "$OUT/stage2/converted-hf" "$OUT/stage3/converted-hf" --tasks local --seq_lens 256 \
    --data "$SHORT_DATA" --teacher "$OUT/teacher" --limit "$LIMIT" --output "$OUT/evaluation"
step report "$OUT/report.html" "Report: every model on held-out text, 40 s" \
    python -m quickstart.report --out "$OUT" --context "$CONTEXT" --long_context "$LONG" ${REPORT[@]+"${REPORT[@]}"}
printf '\nThe whole: %s s. Pictures and samples: %s\n\n' "$((SECONDS - BEGIN))" "$OUT/report.html"
cat "$OUT/report.txt"

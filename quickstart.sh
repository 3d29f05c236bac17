#!/usr/bin/env bash
# From a softmax teacher to a hybrid, end to end: data, three training stages, layer selection, evaluation, report.
#
#   bash quickstart.sh [--tiny] [--train_teacher] [--skip_bad_files] [CORPUS]
#
# Without CORPUS it distils quickstart/teacher, a small model that recalls what it has read, on the standard library's
# sources and recall tasks. The report shows who recalls: the teacher, the all-linear student, the hybrid.
# CORPUS: a hub dataset's name, a file or folder of text or tables. A teacher is trained from scratch on it.
# --train_teacher: train the teacher that recalls instead of taking the stored one; by estimate 40 minutes on two cores.
# --skip_bad_files: leave out and count files of CORPUS that cannot be read.
# --tiny (or QUICKSTART_TINY=1): fewer steps and questions, without the comparison of kept layers.
# QUICKSTART_OUT: the folder for all results (quickstart_out). Run again, it resumes after the last completed step.
set -euo pipefail

TINY=${QUICKSTART_TINY:-}
[[ $TINY == 0 ]] && TINY=
CORPUS= TRAIN_TEACHER= BAD_FILES=()
USAGE="usage: bash quickstart.sh [--tiny] [--train_teacher] [--skip_bad_files] [CORPUS]"
for argument in "$@"; do
    case $argument in
        --tiny) TINY=1 ;;
        --train_teacher) TRAIN_TEACHER=1 ;;
        --skip_bad_files) BAD_FILES=(--skip_bad_files) ;;
        -*) echo "$argument: unknown option; $USAGE" >&2; exit 2 ;;
        *) [[ -z $CORPUS ]] || { echo "$argument: a second corpus; give one at most" >&2; exit 2; }; CORPUS=$argument ;;
    esac
done
if [[ $CORPUS && $TRAIN_TEACHER ]]; then
    echo "--train_teacher: a teacher is always trained on a CORPUS; leave the option out" >&2; exit 2
fi
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

CONTEXT=256 LONG=512 DATA=$OUT/data LIMIT=64 CONTEXTS=(256 1024 4096 16384)
STAGE1=() STAGE2=() STAGE3=() # overrides of configs/quickstart/stageN.yaml
VOCABULARY=() TOKENS=(--holdout 0.02) TEACHER_SIZE=() REPORT=()
if [[ $CORPUS && $TINY ]]; then # to see that every step runs; nothing is learnt
    CONTEXT=64 LONG=128 LIMIT=4 CONTEXTS=(256 1024)
    VOCABULARY=(--vocab_size 512) TOKENS=(--max_tokens 60000 --holdout 0.2) TEACHER_SIZE=(--tiny --steps 20) REPORT=(--tiny)
    STAGE1=(train.max_steps=4 train.save_steps=4 train.eval_steps=2 train.eval_batches=1 train.batch_size=2 train.micro_batch_size=2)
    STAGE2=("${STAGE1[@]}" "train.train_seq_len=$CONTEXT") STAGE3=("${STAGE1[@]}" "train.train_seq_len=$LONG")
    STAGE1+=("train.train_seq_len=$CONTEXT")
elif [[ $CORPUS ]]; then # a larger teacher, on text alone
    TOKENS=(--max_tokens 4000000 --holdout 0.02)
    STAGE1=(train.max_steps=100 train.save_steps=100 train.batch_size=4 train.micro_batch_size=4)
    STAGE2=(train.max_steps=120 train.save_steps=120 train.batch_size=4 train.micro_batch_size=4)
    STAGE3=(train.max_steps=100 train.save_steps=100 train.batch_size=8 train.micro_batch_size=8 train.lr=1e-3 train.final_lr=5e-5)
elif [[ $TINY ]]; then
    LIMIT=16 CONTEXTS=(256 1024 4096)
    STAGE2=(train.max_steps=24 train.save_steps=24)
    STAGE3=(train.max_steps=8 train.save_steps=8 train.eval_steps=4)
fi
SHORT_DATA=$DATA/chunked_context$CONTEXT LONG_DATA=$DATA/chunked_context$LONG
TEACHER=quickstart/teacher
[[ $TRAIN_TEACHER ]] && TEACHER=$OUT/recall_teacher/teacher
[[ $CORPUS ]] && TEACHER=$OUT/teacher

# stage_overrides STAGE [FOLDER KEPT]: what differs from configs/quickstart/stageN.yaml, one per line.
stage_overrides() {
    local stage=$1 folder=${2:-stage$1} kept=${3:-} data=$SHORT_DATA
    [[ $stage == 3 ]] && data=$LONG_DATA
    [[ $TEACHER == quickstart/teacher ]] || printf '%s\n' "teacher_model.name=$TEACHER"
    if [[ $OUT != quickstart_out || $folder != stage$stage ]]; then
        printf '%s\n' "train.output_dir=$OUT/$folder"
    fi
    [[ $OUT == quickstart_out && $CONTEXT == 256 ]] || printf '%s\n' "data.cache_dir=$data"
    if [[ $OUT != quickstart_out ]]; then
        [[ $stage == 1 ]] || printf '%s\n' "train.student_init_ckpt=$OUT/stage$((stage - 1))/converted-hf"
    fi
    [[ -z $kept ]] || printf '%s\n' "student_model.keep_full_attention_layers=$kept"
    case $stage in
        1) [[ ${#STAGE1[@]} == 0 ]] || printf '%s\n' "${STAGE1[@]}" ;;
        2) [[ ${#STAGE2[@]} == 0 ]] || printf '%s\n' "${STAGE2[@]}" ;;
        3) [[ ${#STAGE3[@]} == 0 ]] || printf '%s\n' "${STAGE3[@]}" ;;
    esac
}

# step NAME PRODUCT TEXT COMMAND...: runs the command, unless the same one has made PRODUCT before.
STEP=0 STEPS=10
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
    "$@" || die "$STEP/$STEPS $name failed (above); fix that and start quickstart.sh again, it resumes at this step."
    [[ -e $product ]] || die "$STEP/$STEPS $name left no $product."
    printf '%s\n' "$made_by" >"$stamp"
    printf '   %s s\n' "$((SECONDS - start))"
}

# train STAGE TEXT [FOLDER KEPT]
train() {
    local stage=$1 text=$2 folder=${3:-stage$1} overrides
    mapfile -t overrides < <(stage_overrides "$stage" "$folder" "${4:-}")
    step "$folder" "$OUT/$folder/converted-hf/config.json" "$text" \
        python train.py --cfg "configs/quickstart/stage$stage.yaml" ${overrides[@]+"${overrides[@]}"}
}

if [[ $CORPUS || ! $TINY ]]; then # the teacher's training, or the comparison of kept layers
    STEPS=$((STEPS + 1))
fi
mkdir -p "$OUT/.done"
SETTINGS="tiny=${TINY:-0} train_teacher=${TRAIN_TEACHER:-0} corpus=$CORPUS ${BAD_FILES[*]-}"
if [[ -e $OUT/.done/settings && "$(<"$OUT/.done/settings")" != "$SETTINGS" ]]; then
    die "$OUT: holds the results of another quickstart ($(<"$OUT/.done/settings")); remove it or set QUICKSTART_OUT to another folder."
fi
printf '%s\n' "$SETTINGS" >"$OUT/.done/settings"
BEGIN=$SECONDS
if [[ $CORPUS ]]; then
    TOKENIZER=$OUT/tokenizer DATASET=$CORPUS
    say "Quickstart: results in $OUT; a teacher is trained on $CORPUS, $([[ $TINY ]] && echo 3 || echo 15) minutes on two cores"
    step tokenizer "$OUT/tokenizer/tokenizer.json" "BPE tokenizer" \
        python -m quickstart.train_tokenizer --corpus "$CORPUS" --output_dir "$TOKENIZER" \
        ${VOCABULARY[@]+"${VOCABULARY[@]}"} ${BAD_FILES[@]+"${BAD_FILES[@]}"}
else
    TOKENIZER=$TEACHER DATASET=$OUT/corpus
    say "Quickstart: results in $OUT, $([[ $TINY ]] && echo 2 || echo 3) minutes on two quiet cores$([[ $TRAIN_TEACHER ]] && echo ', after the training of the teacher')"
    if [[ $TRAIN_TEACHER ]]; then
        STEPS=$((STEPS + 1))
        step teacher "$TEACHER/config.json" "Teacher: a small Qwen3 that recalls, from scratch" \
            python benchmarks/recall_teacher.py --size quickstart --seed 1 --output_dir "$OUT/recall_teacher"
    fi
    step corpus "$OUT/corpus/tasks.jsonl" "Corpus: the standard library's sources, and recall tasks" \
        python -m quickstart.corpus --output_dir "$OUT/corpus"
fi
step tokens "$DATA/tokenized" "Corpus to tokens" \
    python preprocess_download_tokenize.py --dataset_name "$DATASET" --tokenizer "$TOKENIZER" --output_dir "$DATA/tokenized" \
    "${TOKENS[@]}" ${BAD_FILES[@]+"${BAD_FILES[@]}"}
step chunks "$SHORT_DATA/metadata.json" "Chunks of $CONTEXT tokens, for stages 1 and 2" \
    python preprocess_chunk.py --tokenized_dataset_path "$DATA/tokenized" --context_length "$CONTEXT" --output_dir "$DATA"
step long_chunks "$LONG_DATA/metadata.json" "Chunks of $LONG tokens, for stage 3" \
    python preprocess_chunk.py --tokenized_dataset_path "$DATA/tokenized" --context_length "$LONG" --output_dir "$DATA"
if [[ $CORPUS ]]; then
    step teacher "$TEACHER/config.json" "Teacher: a small Qwen3 from scratch, 2 to 3 minutes" \
        python -m quickstart.train_teacher --data "$SHORT_DATA" --tokenizer "$TOKENIZER" --output_dir "$TEACHER" \
        ${TEACHER_SIZE[@]+"${TEACHER_SIZE[@]}"}
fi
train 1 "Stage 1: each layer's linear attention learns the teacher's attention output"
# Selection ignores the kept layers of the config, but they must exist: a teacher of one's own may have fewer layers.
ANY_LAYER=
[[ $CORPUS ]] && ANY_LAYER="[0]"
mapfile -t OVERRIDES < <(stage_overrides 2 stage2 "$ANY_LAYER")
step selection "$OUT/selection/ranking.json" "Layer selection: which quarter of the layers keeps full attention" \
    python layer_selection/select_layers.py --cfg configs/quickstart/stage2.yaml --method scan --ratio 0.25 \
    --output_dir "$OUT/selection" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
KEPT=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["keep"])' "$OUT/selection/ranking.json")
train 2 "Stage 2: the hybrid learns the teacher's logits" stage2 "${KEPT// /}"
if [[ $CORPUS ]]; then
    EVALUATED=(stage1 stage2 stage3) TASKS=(--tasks heldout_perplexity,heldout_kl)
else
    EVALUATED=(stage1 stage2 stage3) TASKS=(--tasks local --seq_lens "$CONTEXT" --num_words 64) REPORT=(--recall)
    if [[ ! $TINY ]]; then
        EVALUATED+=(even)
        train 2 "Stage 2 again, for comparison: as many layers kept, evenly spaced" even "[1,4]"
    fi
fi
EVALUATED=("${EVALUATED[@]/#/$OUT/}")
EVALUATED=("${EVALUATED[@]/%//converted-hf}")
train 3 "Stage 3: the hybrid trains on context $LONG, without the teacher" stage3 "${KEPT// /}"
step evaluation "$OUT/evaluation/results.md" "Evaluation: recall and held-out text, through lm-evaluation-harness" \
    python evaluate.py "$TEACHER" "${EVALUATED[@]}" "${TASKS[@]}" \
    --data "$SHORT_DATA" --document_mask false --teacher "$TEACHER" --limit "$LIMIT" --output "$OUT/evaluation"
step report "$OUT/report.html" "Report: every model on held-out text, answers, cache and decoding speed" \
    python -m quickstart.report --out "$OUT" --teacher "$TEACHER" --chunks "$LIMIT" --contexts "${CONTEXTS[@]}" ${REPORT[@]+"${REPORT[@]}"}
printf '\n%s s in all.\n\n' "$((SECONDS - BEGIN))"
cat "$OUT/report.txt"
printf '\nCurves, questions and answers, layer selection, decoding speed: %s\n' "$OUT/report.html"

#!/usr/bin/env bash
# Submits the whole pipeline to Slurm, each job to start when the one before has succeeded, and prints the job ids.
#
#   bash launch_pipeline.sh
#
# CONFIGS: folder with stage2.yaml and stage3.yaml (configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2); stage1.yaml is there, or in
# the folder whose name is the part before _hybrid_. There is no stage 1 if stage2.yaml starts from the teacher
# (no train.student_init_ckpt). LAYERS: number of the teacher's layers (from its config).
# RANKING: the selection's result (<output_dir of stage 2>_ga_s2/ranking.json); stages 2 and 3 keep its layers, as many as
# stage2.yaml keeps unless RATIO is set. PARALLEL: candidate layers at a time (8).
# TOKENIZER, DATA_DIR, CONTEXT_LENGTHS of launch_preprocess.sh: by default what the configs name.
# SBATCH_ARGS: options for every job, SBATCH_TRAIN: for the stages (such as --nodes=4). The settings of launch_preprocess.sh,
# launch_selection.sh, eval.sh and launch_common.sh reach their jobs through the environment, as do sbatch's own
# (SBATCH_PARTITION ...).
set -Eeuo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
command -v sbatch >/dev/null || die "sbatch: not found; without Slurm, run the launch_*.sh one after the other with bash."
CONFIGS=${CONFIGS:-configs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2}
STAGE1=$CONFIGS/stage1.yaml
[[ -f $STAGE1 ]] || STAGE1=${CONFIGS%_hybrid_*}/stage1.yaml
mapfile -t facts < <(python - "$STAGE1" "$CONFIGS" "${LAYERS:-}" "${METHOD:-ga_s2}" <<'PY'
import sys
from pathlib import Path

from runtime.config import load_config

stages = [load_config(f"{sys.argv[2]}/stage{stage}.yaml") for stage in (2, 3)]
ranking, result = f"{stages[0].train.output_dir}_{sys.argv[4]}/ranking.json", f"{stages[1].train.output_dir}/converted-hf"
first = "no"
if stages[0].train.student_init_ckpt:
    stages.insert(0, load_config(sys.argv[1]))
    first = "yes"
else:
    from distill_model import check_start_from_teacher

    check_start_from_teacher(stages[0].student_model.name)
layers = sys.argv[3]
if not layers:
    from convert import load_teacher_config

    layers = load_teacher_config(stages[0].teacher_model.name).num_hidden_layers
print(layers, ranking, result, first, stages[0].teacher_model.name, Path(stages[0].data.cache_dir).parent,
      *{stage.train.train_seq_len: None for stage in stages}, sep="\n")
PY
)
[[ ${#facts[@]} -ge 7 ]] || die "CONFIGS: $CONFIGS has no stages that can be read (above)."
LAYERS=${facts[0]} RANKING=${RANKING:-${facts[1]}} RESULT=${facts[2]} HAS_STAGE1=${facts[3]}

SUBMITTED=()
trap '[[ ${#SUBMITTED[@]} == 0 ]] || { echo "submitting failed (above); cancelling ${SUBMITTED[*]}" >&2; scancel "${SUBMITTED[@]}"; }' ERR

# submit NAME AFTER SBATCH-ARGUMENTS...: sets JOB. A job whose predecessor failed is cancelled instead of waiting forever.
submit() {
    local name=$1 after=$2
    shift 2
    read -r -a common <<<"${SBATCH_ARGS:-}"
    JOB=$(sbatch --parsable ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} --job-name="$name" ${common[@]+"${common[@]}"} "$@")
    JOB=${JOB%%;*} # of a federation: id;cluster
    SUBMITTED+=("$JOB")
    printf '%-12s %s%s\n' "$name" "$JOB" "${after:+ after $after}"
}

read -r -a nodes <<<"${SBATCH_TRAIN:-}"
TOKENIZER=${TOKENIZER:-${facts[4]}} DATA_DIR=${DATA_DIR:-${facts[5]}} CONTEXT_LENGTHS=${CONTEXT_LENGTHS:-${facts[*]:6}} \
    submit preprocess "" launch_preprocess.sh
[[ $HAS_STAGE1 == no ]] || CFG=$STAGE1 submit stage1 "$JOB" ${nodes[@]+"${nodes[@]}"} launch_stage1.sh
# The other methods train no candidates, so they are not run as an array.
[[ ${METHOD:-ga_s2} != @(ga_s2|gr_s2|avg_s2) ]] ||
    CFG=$CONFIGS/stage2.yaml submit candidates "$JOB" --array="0-$((LAYERS - 1))%${PARALLEL:-8}" launch_selection.sh
CFG=$CONFIGS/stage2.yaml submit selection "$JOB" launch_selection.sh
CFG=$CONFIGS/stage2.yaml RANKING=$RANKING submit stage2 "$JOB" ${nodes[@]+"${nodes[@]}"} launch_stage2.sh
CFG=$CONFIGS/stage3.yaml RANKING=$RANKING submit stage3 "$JOB" ${nodes[@]+"${nodes[@]}"} launch_stage3.sh
submit evaluation "$JOB" eval.sh "$RESULT"

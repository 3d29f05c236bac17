# Functions of launch_*.sh; sourced, never run. Its settings are environment variables, which sbatch exports to the job.
#
#   VENV                 the virtual environment                                   (.venv)
#   DEVICE               cuda or cpu                                               (cuda if there is nvidia-smi)
#   PROCESSES_PER_NODE   processes on each node                                    (the node's GPUs in the job; 1 on a CPU)
#   MASTER_ADDR MASTER_PORT   where the ranks meet                                 (the first node; from the job's id)
#   TRITON_CACHE_DIR     compiled kernels, one folder per rank, on a local disk    ($TMPDIR/triton-$USER)
#   DEEPSPEED_ENV        names of further variables for .deepspeed_env             (none)
#   OVERRIDES            key.path=value ..., added to the arguments                (none)
#
# Keys (HF_TOKEN, WANDB_API_KEY) are passed only through the environment, which sbatch and srun export: they are in no
# file, no log and no command line. Exit code 75: stopped by SIGTERM or SIGUSR1 after saving a checkpoint; under Slurm the
# job has been requeued, elsewhere rerun the command to resume.

say() { printf '== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

PROJECT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$PROJECT_DIR"
VENV=${VENV:-.venv}
[[ -f $VENV/bin/activate ]] ||
    die "VENV: $VENV is no virtual environment; on a machine with a network, run 'source setup.sh' in $PROJECT_DIR once."
source "$VENV/bin/activate"
export PYTHONPATH=$PROJECT_DIR${PYTHONPATH:+:$PYTHONPATH} # an environment in which the project is not installed will do
REQUEUE=75 # runtime/guard.py

# make_job_dir: creates a private folder of this job, which all its nodes see; it is removed when the script ends.
make_job_dir() {
    JOB_DIR=$PROJECT_DIR/.launch/${SLURM_JOB_ID:-$(hostname)-$$}
    mkdir -p "$JOB_DIR"
    chmod 700 "$JOB_DIR"
    STOP_FILE=$JOB_DIR/stop
    rm -f "$JOB_DIR/requeue" "$JOB_DIR/failed" "$JOB_DIR"/done_* "$STOP_FILE"
    trap 'rm -rf "$JOB_DIR"' EXIT
    trap 'stopped=1; touch "$STOP_FILE"' USR1 TERM # until `supervise` forwards them
    export JOB_DIR STOP_FILE
}

# write_deepspeed_env: a file for launchers that do not inherit the environment. It holds no secrets.
write_deepspeed_env() {
    export DS_ENV_FILE=$JOB_DIR/.deepspeed_env
    (umask 077 && : >"$DS_ENV_FILE")
    local name
    for name in TRITON_CACHE_DIR HF_HOME WANDB_ENTITY WANDB_PROJECT ${DEEPSPEED_ENV:-}; do
        case ${name^^} in
            *KEY* | *TOKEN | *TOKEN_* | *SECRET* | *PASSW* | *CREDENTIAL*)
                die "DEEPSPEED_ENV: $name looks like a secret, which must not be written to a file; export it instead, every rank inherits it." ;;
        esac
        [[ -z ${!name:-} ]] || printf '%s=%s\n' "$name" "${!name}" >>"$DS_ENV_FILE"
    done
}

# plan_nodes: sets NODES, PROCESSES_PER_NODE, the host file and the rendezvous address.
plan_nodes() {
    if [[ -z ${DEVICE:-} ]]; then
        DEVICE=cpu
        command -v nvidia-smi >/dev/null && DEVICE=cuda
    fi
    NODES=(localhost)
    [[ -z ${SLURM_JOB_NODELIST:-} ]] || mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [[ $DEVICE == cpu ]]; then
        export DS_ACCELERATOR=cpu
        PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-1}
    else
        PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)}}
    fi
    local cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as in setup.sh
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > PROCESSES_PER_NODE ? cores / PROCESSES_PER_NODE : 1))}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}
    # Seconds between updates of a progress bar: fewer lines in a log file.
    export TQDM_MININTERVAL=${TQDM_MININTERVAL:-$([[ -t 2 ]] && echo 1 || echo 30)}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # A port below the range of outgoing connections, one of which might take it before the ranks connect.
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        MASTER_ADDR=${MASTER_ADDR:-${NODES[0]}} MASTER_PORT=${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}
    else
        MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
        MASTER_PORT=${MASTER_PORT:-$(python -c 'import random, socket
for port in random.sample(range(12000, 32000), 99):
    try: socket.create_server(("", port)).close()
    except OSError: continue
    break
print(port)')}
    fi
    printf "%s slots=$PROCESSES_PER_NODE\n" "${NODES[@]}" >"$JOB_DIR/hostfile"
    export DEVICE PROCESSES_PER_NODE MASTER_ADDR MASTER_PORT
}

# Runs the command on each node. SIGUSR1 would kill DeepSpeed's launchers, so they are made to ignore it; train.py, which
# they start, saves on it. A launcher that gets SIGTERM loses its ranks' exit code.
ON_NODE='
trap "" USR1
trap stopped=1 TERM
[[ $DEVICE != cpu ]] || unset CUDA_VISIBLE_DEVICES # DeepSpeed would read the value that Slurm sets as CPU slots
if [[ $1 == deepspeed ]]; then
    if [[ $DEVICE == cuda && -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != "$(seq -s, 0 $((PROCESSES_PER_NODE - 1)))" ]]; then
        echo "$(hostname): CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES, but DeepSpeed would use GPUs 0 to" \
            "$((PROCESSES_PER_NODE - 1)); ask for whole nodes." >&2
        exit 1
    fi
    set -- deepspeed --node_rank "${SLURM_NODEID:-0}" "${@:2}"
fi
code=0 why=
"$@" || code=$?
first=$((${SLURM_NODEID:-0} * PROCESSES_PER_NODE))
# A launcher that was killed exits with 0, but then train.py has not created this file.
if [[ $1 == deepspeed && $code == 0 && ! -e $JOB_DIR/done_$first ]]; then
    code=1 why=": the launcher of DeepSpeed was killed"
fi
if [[ $code == 75 || $code != 0 && -n ${stopped:-} ]]; then
    touch "$JOB_DIR/requeue"
elif [[ $code != 0 ]]; then
    touch "$JOB_DIR/failed" # before srun sends SIGTERM to the other nodes because of it
    [[ $code != 247 && $code != 137 ]] || why=": a rank was killed, perhaps for memory"
    echo "== $(hostname), ranks $first to $((first + PROCESSES_PER_NODE - 1)): ended with exit code $code$why" >&2
fi
exit $code'

# forward TARGET: forwards a signal to the command. Processes that do not handle signals yet will find STOP_FILE.
forward() {
    stopped=1
    touch "$STOP_FILE" 2>/dev/null || true
    kill -USR1 -- "$1" 2>/dev/null || true
}

# supervise COMMAND...: runs it on all nodes, forwards signals, requeues the job if need be, and exits.
supervise() {
    local child target code=0
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
            --export=ALL --kill-on-bad-exit=1 bash -c "$ON_NODE" on_node "$@" &
        child=$!
        target=$child # only this shell gets Slurm's signal (--signal=B:...); srun forwards it to all processes of the step
    else
        set -m # starts the command in its own process group, so that signals reach all of it
        bash -c "$ON_NODE" on_node "$@" &
        child=$!
        set +m
        target=-$child
        trap 'kill -TERM -- $target 2>/dev/null || true' INT
    fi
    trap 'forward "$target"' USR1 TERM
    [[ -z ${stopped:-} ]] || forward "$target"
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a trap interrupts wait
    wait "$child" || code=$?
    # Ranks whose launcher was killed may still run; Slurm kills those of its jobs.
    [[ $code == 0 || -n ${SLURM_JOB_ID:-} ]] || kill -KILL -- "$target" 2>/dev/null || true
    if [[ $code != 0 && ! -e $JOB_DIR/failed && (-e $JOB_DIR/requeue || -n ${stopped:-}) ]]; then
        code=$REQUEUE
        # A cancelled job is stopped by signals too, but must not be requeued.
        if [[ -n ${SLURM_JOB_ID:-} && $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
            say "$(date '+%F %T') stopped by a signal; requeued, it will resume from its checkpoint"
            rm -rf "$JOB_DIR"
            scontrol requeue "$SLURM_JOB_ID"
            sleep 60 # until Slurm ends this script; if it exited by itself, the job would count as ended
        fi
    fi
    [[ $code == 0 ]] || say "$(date '+%F %T') ended with exit code $code"
    exit "$code"
}

# kept_layers: prints the override that keeps the layers chosen in RANKING, if that is set.
kept_layers() {
    [[ -z ${RANKING:-} ]] || python - "$RANKING" <<'PY' || die "RANKING: $RANKING holds no layers to keep; run launch_selection.sh first."
import json, sys

keep = json.load(open(sys.argv[1]))["keep"]
print(f"student_model.keep_full_attention_layers={keep}".replace(" ", ""))
PY
}

# prepare NAME: must run before `supervise`; prints NAME, the nodes and the processes.
prepare() {
    make_job_dir
    plan_nodes
    write_deepspeed_env
    local again=${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}
    say "$(date '+%F %T') $1 on ${#NODES[@]} x $PROCESSES_PER_NODE processes ($DEVICE): ${NODES[*]}$again"
}

# train CONFIG [key.path=value ...]: runs train.py on all nodes and exits.
train() {
    local overrides
    prepare "$1"
    read -r -a overrides <<<"${OVERRIDES:-}"
    supervise deepspeed --hostfile "$JOB_DIR/hostfile" --no_ssh --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        train.py --cfg "$@" ${overrides[@]+"${overrides[@]}"}
}

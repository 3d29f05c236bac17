"""Which layers keep full attention: one command from stage 1's student to a ready stage-2 config.

    python layer_selection/select_layers.py --cfg STAGE2.yaml --ratio 0.25
    # GA-S2: one layer, as an array task does; all layers as an array, then the ranking:
    python layer_selection/select_layers.py --cfg STAGE2.yaml --method ga_s2 --top-k 7 --candidate 3
    python layer_selection/select_layers.py --cfg STAGE2.yaml --method ga_s2 --top-k 7 --slurm

STAGE2.yaml names teacher, data, the all-linear student (train.student_init_ckpt, where the student
needs one) and the training of a candidate. Of the layers that it keeps only their number matters:
as many are chosen without --top-k, --ratio and --interval. The methods, by the importance that ranks
a layer:

    gates    the default: what the objective rises by exchanging this layer, in the set found by
             gates of all layers that train together (gates.py; arXiv 2605.20936, arXiv 2606.30562)
    rounds   the same, in the set found by rounds that add (or remove) layers around the best hybrid
             so far (rounds.py)
    ga_s2    -KL(teacher || student) on held-out text after stage 2 with only this layer restored
             (arXiv 2512.20569)
  baselines:
    gr_s2    +KL after stage 2 with all but this layer restored (arXiv 2512.20569)
    avg_s2   the mean of both (arXiv 2512.20569)
    ga_s1    -(sum of the other layers' alignment errors after stage 1): a restored layer has none
             (arXiv 2512.20569)
    scan     -KL as for ga_s2, without training
    smart    sensitivity, KL(all-linear) - KL(with this layer restored), and placement: the most
             sensitive layer among the first and among the last L / K of L, the others nearly evenly
             between, at the largest sum (arXiv 2505.17272)
    ppl      loss of the teacher with only this layer linear: high where it cannot be replaced
             (compared in arXiv 2512.20569)
    mse      mean squared alignment error of stage 1's layer (compared in arXiv 2512.20569)
    ar, ar_multihop, synthetic_retrieval, variable_tracking, common_words_extraction,
    frequent_words_extraction, phone_book
             accuracy(teacher) - accuracy(teacher with this layer's attention output zeroed), see
             evaluate_layer_importance.py; ar is compared in arXiv 2512.20569, the sources of the
             tasks are in ablation_questions.py
    uniform  evenly spaced, one in the middle of each of K equal parts, for every ratio
    random   a random number, by --seed

Written to --output_dir: ranking.json, ranking.png, ranking.md, and
{teacher}_{size}_{student}_hybrid_{ratio}_{method}/stage2.yaml with the K best layers, which trains
in a folder of its own. ga_s2 and gr_s2 train all candidates jointly on one teacher until their
ranking has converged, or with --full_runs and --candidate each to the end with train.py in
<output_dir>/layer_<N>/. gates and rounds train on one device, from the linear layers of stage 1,
which gates do not train. Rerun the command to resume: it does only what is missing. avg_s2 uses the
default folders of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, ConfigError

from layer_selection.ablation_questions import add_options, question_options
from layer_selection.options import (
    CANDIDATES,
    OBJECTIVES,
    RECALL_OBJECTIVES,
    TASK_METHODS,
    RecallOptions,
    RoundOptions,
    TrainingOptions,
)
from layer_selection.ranking import budget
from layer_selection.selection import (
    DEFAULT,
    METHODS,
    OBJECTIVE_METHODS,
    TRAINED_METHODS,
    SelectionOptions,
    select,
)
from layer_selection.stage2_runs import check_start, deepspeed_launcher, heldout_file, load_stage_2
from layer_selection.stopping_rule import add_rule_options, read_rule

ROOT = Path(__file__).resolve().parents[1]
TRAINED = " or ".join(TRAINED_METHODS)
FORMER_DEFAULT = "ga_s2"
DEFAULT_RATIO = 0.25
OF_FORMER_DEFAULT = ("candidate", "slurm", "full_runs", "halving", "rounds", "window", "correlation", "interval")


# ------------------------------------------------------------------------ options
def make_parser() -> argparse.ArgumentParser:
    # --slurm passes the arguments on without itself: each of its jobs would submit itself again if
    # it were abbreviated.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cfg", required=True, help="YAML of stage 2")
    add("--method", choices=METHODS, help=f"see above ({DEFAULT})")
    add_number_of_layers(parser)
    add("--output_dir", type=Path, help="default: <train.output_dir>_<method>")
    add_training_options(parser)
    add("--sequences", type=int, default=64, help="held-out sequences to measure on (%(default)s)")
    add(
        "--batch_size",
        type=int,
        default=8,
        help="sequences, or questions of a task, per batch (%(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the method random, and of a task's questions (%(default)s)",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        default="kl",
        help=f"what {', '.join(OBJECTIVE_METHODS)} minimise, see objective.py; recall and mixture take documents of "
        "--num_pairs and --vocab_size (%(default)s)",
    )
    add(
        "--search_tokens",
        type=int,
        help="tokens that gates trains on (default: half of the config's, at most 12M); about how many all candidates "
        "of rounds train on together (default: a tenth of the config's for every layer)",
    )
    add("--direction", default="add", help="rounds: add layers, or remove them (%(default)s)")
    add("--layers_per_round", type=int, help="rounds: layers per round; default: a quarter of those to add or remove")
    add(
        "--candidates_per_round",
        type=int,
        default=CANDIDATES,
        help="rounds: hybrids that a round trains, chosen by their figures without training (%(default)s)",
    )
    add_options(parser)
    add("overrides", nargs="*", metavar="key.path=value", help="applied after the file")
    return parser


def add_number_of_layers(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--top-k",
        type=int,
        help=f"how many layers to keep; default: as many as the config, {DEFAULT_RATIO} of all if it keeps none",
    )
    size.add_argument("--ratio", type=float, help="share of the layers to keep: floor(ratio x layers + 0.5)")
    size.add_argument(
        "--interval",
        type=int,
        metavar="N",
        help="keep every N-th layer, of the best phase; with scan or ga_s2",
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"training of candidates ({', '.join(TRAINED_METHODS)})")
    add_rule_options(group)
    add = group.add_argument
    add(
        "--full_runs",
        action="store_true",
        help="train each candidate to the end with train.py, not all jointly",
    )
    add("--candidate", type=int, help="train only this layer's candidate, and do not rank")
    add(
        "--slurm",
        action="store_true",
        help="submit one array task per layer (PARALLEL at a time, 8), and the ranking after it; "
        "SBATCH_ARGS: options for both",
    )
    add(
        "--launcher",
        # The launch scripts set MASTER_PORT.
        default=deepspeed_launcher(os.environ.get("MASTER_PORT")),
        help="what starts train.py",
    )


def default_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The method of a command without --method. Raises ConfigError for an option that it does not
    take: written for the former default, the command would do something else."""
    for name in OF_FORMER_DEFAULT:
        if getattr(args, name) != parser.get_default(name):
            raise ConfigError(
                f"--{name}: is not for the default method, {DEFAULT}; add --method {FORMER_DEFAULT}, the default before"
            )
    print(f"Method: {DEFAULT}, the default (in earlier versions {FORMER_DEFAULT}); --method names another")
    return DEFAULT


def layers_to_keep(args: argparse.Namespace, cfg: Config, layers: int) -> int:
    """How many of a teacher's layers are kept; 1, of the phases, with --interval. Without an option,
    as many as the config keeps. Raises ConfigError, naming the option, where the teacher does not have
    so many."""
    if args.candidate is not None and args.candidate not in range(layers):
        raise ConfigError(f"--candidate: {args.candidate} must be a layer in 0..{layers - 1}")
    if args.interval is not None:
        if not 1 <= args.interval <= layers:
            raise ConfigError(f"--interval: {args.interval} must be between 1 and the teacher's {layers} layers")
        return 1
    top_k = args.top_k
    if args.ratio is not None:
        top_k = budget(args.ratio, layers)
    elif top_k is None:
        kept = len(cfg.student_model.keep_full_attention_layers)
        top_k = kept or budget(DEFAULT_RATIO, layers)
        source = f"as many as {args.cfg} keeps" if kept else f"{DEFAULT_RATIO} of all, as {args.cfg} keeps none"
        print(f"Layers to keep: {top_k} of {layers}, {source}; --top-k or --ratio choose otherwise")
    if not 1 <= top_k <= layers:
        raise ConfigError(f"--top-k: {top_k} must be between 1 and the teacher's {layers} layers")
    return top_k


def read_options(args: argparse.Namespace, cfg: Config, top_k: int) -> SelectionOptions:
    """The typed options of a selection that keeps so many layers. Raises ConfigError, naming the option,
    for those that make no sense, whatever the teacher."""
    if args.interval is not None and (args.candidate is not None or args.slurm or args.full_runs):
        raise ConfigError("--interval: its candidates train jointly; leave --candidate, --slurm and --full_runs out")
    if args.candidate is not None and args.method not in TRAINED_METHODS:
        raise ConfigError(f"--candidate: {args.candidate} needs --method {TRAINED}")
    training = TrainingOptions(
        output_dir=args.output_dir or Path(f"{cfg.train.output_dir}_{args.method}"),
        rule=read_rule(args, top_k),
        full_runs=args.full_runs,
        candidate=args.candidate,
        launcher=args.launcher,
    )
    recall = RecallOptions()
    if args.objective in RECALL_OBJECTIVES:
        recall = RecallOptions(args.num_pairs, args.vocab_size)
    return SelectionOptions(
        method=args.method,
        top_k=top_k,
        training=training,
        ratio=args.ratio,
        sequences=args.sequences,
        batch_size=args.batch_size,
        seed=args.seed,
        questions=question_options(args) if args.method in TASK_METHODS else None,
        objective=args.objective,
        interval=args.interval,
        recall=recall,
        search_tokens=args.search_tokens,
        rounds=RoundOptions(args.direction, args.layers_per_round, args.candidates_per_round, args.search_tokens),
    )


# ------------------------------------------------------------------------ Slurm
def sbatch(arguments: list[str], cfg_file: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sbatch", "--parsable", *arguments],
        env=os.environ | {"CFG": cfg_file},
        capture_output=True,
        text=True,
    )


def submit(options: SelectionOptions, cfg: Config, cfg_file: str, arguments: list[str], layers: int) -> None:
    """Submits this command, `arguments`, as an array of the layers that are missing, and once more
    to rank them after it.

    Raises ConfigError if there is no Slurm, or the command would not mean the same where its jobs
    run.
    """
    training = options.training
    if options.method not in TRAINED_METHODS or training.candidate is not None or training.rule.halving:
        raise ConfigError(
            f"--slurm: trains every layer to its end, with --method {TRAINED}, without --candidate and --halving"
        )
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm: there is no sbatch here; leave it out, or run this where jobs are submitted")
    if Path.cwd() != ROOT:
        raise ConfigError(f"--slurm: jobs run in {ROOT}; run this command there")
    check_start(cfg)
    folders = [training.output_dir / f"layer_{layer}" for layer in range(layers)]
    measured = heldout_file(options.objective, options.recall)
    missing = [layer for layer in range(layers) if not (folders[layer] / measured).is_file()]
    array = f"--array={','.join(map(str, missing))}%{os.environ.get('PARALLEL', 8)}"
    user_options = os.environ.get("SBATCH_ARGS", "").split()
    command = ["launch_selection.sh", "--cfg", cfg_file, "--full_runs", *arguments]
    job = None
    for name, own_options in (("candidates", [array]), ("selection", [])):
        if name == "candidates" and not missing:
            continue
        after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] if job else []
        job_options = [f"--job-name={name}", *own_options, *after, *user_options]
        done = sbatch([*job_options, *command], cfg_file)
        if done.returncode:
            if job:
                subprocess.run(["scancel", job])
            raise ConfigError(f"--slurm: sbatch refused {name} ({done.stderr.strip()})")
        job = done.stdout.strip().partition(";")[0]  # a federation of clusters prints id;cluster
        print(f"{name:<12} {job}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    args.method = args.method or default_method(parser, args)
    cfg = load_stage_2(args.cfg, args.overrides)
    read_options(args, cfg, top_k=1)  # checks what needs no teacher
    from transformers.utils.logging import disable_progress_bar

    from convert import load_teacher_config

    disable_progress_bar()  # transformers' own, a line for every file read
    layers = load_teacher_config(cfg.teacher_model.name).num_hidden_layers
    options = read_options(args, cfg, layers_to_keep(args, cfg, layers))
    if args.slurm:
        submit(options, cfg, args.cfg, [word for word in argv if word != "--slurm"], layers)
        return
    selection = select(cfg, options)
    if selection is not None:
        print(selection.summary())


if __name__ == "__main__":
    run_main(main)

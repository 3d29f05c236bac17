"""Which layers keep full attention: one command from stage 1's student to a ready stage-2 config.

    python layer_selection/select_layers.py --cfg configs/quickstart/stage2.yaml --method ga_s2 --ratio 0.25
    python layer_selection/select_layers.py --cfg STAGE2.yaml --method ga_s2 --top-k 7 --candidate 3   # one array task of many
    python layer_selection/select_layers.py --cfg STAGE2.yaml --method ga_s2 --top-k 7 --slurm         # all of them, then the ranking

STAGE2.yaml names teacher, data, the all-linear student (train.student_init_ckpt) and what a training run is; the layers that it
keeps do not matter here. Methods, importance being what a layer is ranked by:

    ga_s2    -KL(teacher || student) on held-out text after stage 2 with only this layer restored (arXiv 2512.20569)
    gr_s2    +KL after stage 2 with all but this layer restored (arXiv 2512.20569)
    avg_s2   the mean of both (arXiv 2512.20569)
    ga_s1    -(sum of the other layers' alignment errors after stage 1), for a restored layer has none (arXiv 2512.20569)
    scan     -KL as of ga_s2, without training
    smart    sensitivity, KL(all-linear) - KL(with this layer restored), and placement: the most sensitive layer among the first
             and among the last L / K of L, the others nearly evenly between, at the largest sum (arXiv 2505.17272)
    ppl      loss of the teacher with only this layer linear (high: it cannot be replaced; as arXiv 2512.20569 compares it)
    mse      alignment error of stage 1's layer, mean squared (as arXiv 2512.20569 compares it)
    ar, ar_multihop, synthetic_retrieval, variable_tracking, common_words_extraction, frequent_words_extraction, phone_book
             accuracy(teacher) - accuracy(teacher, this layer's attention output zeroed), see evaluate_layer_importance.py;
             ar as arXiv 2512.20569 compares it, the tasks' own sources in questions.py
    uniform  evenly spaced, one in the middle of each of K equal parts, for every ratio
    random   by --seed

Written to --output_dir: ranking.json, ranking.png, ranking.md, and {teacher}_{size}_{student}_hybrid_{ratio}_{method}/stage2.yaml with
the K best, which trains in a folder of its own. ga_s2 and gr_s2 train all hybrids side by side on
one teacher until their order has settled (side_by_side.py), or with --full_runs and --candidate in <output_dir>/layer_<N>/ with
train.py to the end. Run again they do only what is missing, and a finished layer is never trained twice. avg_s2 uses their default
folders.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, ConfigError
from runtime.data import load_tokenizer, open_chunks_for
from runtime.guard import StopSignals

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher, load_teacher_config
from distill_model import StudentForCausalLM
from distill_model.losses import linear_cross_entropy, token_kl
from layer_selection.full_runs import HELDOUT_KL, check_start, load_stage_2, write_chosen
from layer_selection.questions import add_options
from layer_selection.ranking import (
    Ranking,
    budget,
    evenly_spaced,
    rank_samples,
    rank_scores,
    table,
    write,
)
from layer_selection.rivals import TASK_METHODS, avg_s2, ga_s1, gr_s2, smart, task_ablation
from layer_selection.side_by_side import rank_hybrids, trained_hybrids
from stages import compute_dtype
from wrapper import AttentionAlignmentModel

ROOT = Path(__file__).resolve().parents[1]


class Bench:
    """Teacher, all-linear student and the fixed held-out sequences that all layers are measured on."""

    def __init__(self, cfg: Config, sequences: int, batch_size: int):
        self.cfg, self.batch_size = cfg, batch_size
        teacher = load_teacher_config(cfg.teacher_model.name)
        self.layers = range(teacher.num_hidden_layers)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(cfg, self.device.type)
        tokenizer = load_tokenizer(cfg.teacher_model.name, "teacher_model.name")
        chunks = open_chunks_for(tokenizer, teacher.vocab_size, cfg.data.cache_dir, cfg.train.train_seq_len)
        if chunks.heldout is None:
            raise ConfigError(f"data.cache_dir: {cfg.data.cache_dir} has no held-out part; preprocess with --holdout")
        self.train = chunks.train
        rows = range(min(sequences, len(chunks.heldout)))
        self.batches = torch.as_tensor(chunks.heldout[rows]["input_ids"], dtype=torch.long).split(batch_size)

    @cached_property
    def teacher(self) -> StudentForCausalLM:
        return load_teacher(self.cfg.teacher_model.name, self.dtype).to(self.device).eval().requires_grad_(False)

    @cached_property
    def student(self) -> StudentForCausalLM:
        check_start(self.cfg)
        student = StudentForCausalLM.from_pretrained(self.cfg.train.student_init_ckpt, dtype=self.dtype)
        return student.to(self.device).eval()

    @cached_property
    @torch.no_grad()
    def teacher_hidden_states(self) -> list[torch.Tensor]:
        """After the final norm, of each held-out batch."""
        return [self.teacher.model(ids.to(self.device), use_cache=False).last_hidden_state for ids in self.batches]

    @torch.no_grad()
    def losses(self, model: StudentForCausalLM) -> list[float]:
        """Mean next-token cross-entropy of each sequence."""
        losses = []
        for ids in self.batches:
            ids = ids.to(self.device)
            hidden = model.model(ids, use_cache=False).last_hidden_state
            losses += [linear_cross_entropy(h[:-1], model.lm_head.weight, row[1:]) for h, row in zip(hidden, ids)]
        return torch.stack(losses).tolist()

    @torch.no_grad()
    def kls(self, model: StudentForCausalLM) -> list[float]:
        """KL(teacher || model) of each sequence, the mean over its tokens."""
        heads, kls = (model.lm_head.weight, self.teacher.lm_head.weight), []
        for ids, theirs in zip(self.batches, self.teacher_hidden_states):
            ours = model.model(ids.to(self.device), use_cache=False).last_hidden_state
            kls.append(token_kl(ours.flatten(0, 1), theirs.flatten(0, 1), *heads).view(ids.shape).mean(1))
        return torch.cat(kls).tolist()

    def swapped(self, measure, into: StudentForCausalLM, source: StudentForCausalLM) -> dict[int, list[float]]:
        """`measure` of `into` with the attention of one layer taken from `source`, for every layer."""
        figures = {}
        for i, (mine, other) in enumerate(
            zip(tqdm(into.model.layers, desc="layers", unit="layer"), source.model.layers)
        ):
            own, mine.attn = mine.attn, other.attn
            try:
                figures[i] = measure(into)
            finally:
                mine.attn = own
        return figures


# ------------------------------------------------------------------------------------------------ methods
def scan(bench: Bench, args) -> Ranking:
    kls = bench.swapped(bench.kls, bench.student, bench.teacher)
    return rank_samples("scan", "-KL", {layer: [-kl for kl in values] for layer, values in kls.items()})


def ppl(bench: Bench, args) -> Ranking:
    return rank_samples("ppl", "loss", bench.swapped(bench.losses, bench.teacher, bench.student))


def mse(bench: Bench, args) -> Ranking:
    model = AttentionAlignmentModel(bench.teacher, bench.student)
    with torch.no_grad():
        errors = [
            model(row.to(bench.device)[None])["layer_losses"].tolist() for batch in bench.batches for row in batch
        ]
    return rank_samples("mse", "alignment error", {i: [row[i] for row in errors] for i in bench.layers})


def uniform(bench: Bench, args) -> Ranking:
    kept = evenly_spaced(args.top_k, len(bench.layers))
    return rank_scores("uniform", "kept", {layer: float(layer in kept) for layer in bench.layers})


def randomly(bench: Bench, args) -> Ranking:
    scores, generator = {}, random.Random(args.seed)
    for layer in bench.layers:
        scores[layer] = generator.random()
    return rank_scores("random", "random number", scores, seed=args.seed)


def ga_s2(bench: Bench, args) -> Ranking | None:
    trained = trained_hybrids(bench, args, {layer: [layer] for layer in bench.layers}, sign=-1)
    if trained is None:
        return None
    kls, facts = trained
    return rank_hybrids("ga_s2", "-KL", {layer: [-kl for kl in values] for layer, values in kls.items()}, facts)


METHODS = {
    "ga_s2": ga_s2,
    "gr_s2": gr_s2,
    "avg_s2": partial(avg_s2, ga_s2),
    "ga_s1": partial(ga_s1, mse),
    "smart": partial(smart, scan),
    "scan": scan,
    "ppl": ppl,
    "mse": mse,
    "uniform": uniform,
    "random": randomly,
    **{method: partial(task_ablation, task) for method, task in TASK_METHODS.items()},
}
TRAINED = ("ga_s2", "gr_s2", "avg_s2")  # with a training run for every layer


def submit(args: argparse.Namespace, cfg: Config, words: list[str], layers: int) -> None:
    """Sends to Slurm this command, `words`, as an array of the layers that are missing, and once
    more behind it to rank them.

    Raises ConfigError if there is no Slurm, or the command would not mean the same where its jobs
    run.
    """
    if args.method not in TRAINED or args.candidate is not None or args.halving:
        raise ConfigError(
            f"--slurm: trains every layer to its end, with --method {' or '.join(TRAINED)}, without --candidate and --halving"
        )
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm: there is no sbatch here; leave it out, or go where jobs are submitted")
    if Path.cwd() != ROOT:
        raise ConfigError(f"--slurm: jobs run in {ROOT}; run this command there")
    check_start(cfg)
    missing = [layer for layer in range(layers) if not (args.output_dir / f"layer_{layer}" / HELDOUT_KL).is_file()]
    array = [f"--array={','.join(map(str, missing))}%{os.environ.get('PARALLEL', 8)}"]
    job = None
    for name, options in (("candidates", array), ("selection", []))[not missing :]:
        after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] if job else []
        done = subprocess.run(
            [
                "sbatch",
                "--parsable",
                f"--job-name={name}",
                *options,
                *after,
                *os.environ.get("SBATCH_ARGS", "").split(),
                "launch_selection.sh",
                "--cfg",
                args.cfg,
                "--full_runs",
                *words,
            ],
            env=os.environ | {"CFG": args.cfg},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            if job:
                subprocess.run(["scancel", job])
            raise ConfigError(f"--slurm: sbatch refused {name} ({done.stderr.strip()})")
        job = done.stdout.strip().partition(";")[0]  # of a federation: id;cluster
        print(f"{name:<12} {job}")


def main(argv: list[str] | None = None) -> None:
    # --slurm hands the words on without itself: an abbreviation of it would submit itself again from each of its jobs.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", required=True, help="YAML of stage 2")
    parser.add_argument("--method", choices=METHODS, default="ga_s2", help="see above (%(default)s)")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--top-k", type=int, help="how many layers to keep")
    size.add_argument("--ratio", type=float, help="share of the layers to keep: floor(ratio x layers + 0.5)")
    parser.add_argument("--output_dir", type=Path, help="default: <train.output_dir>_<method>")
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help=f"{', '.join(TRAINED)}: measurements in a training run (%(default)s)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=3,
        help="rounds over which the choice must stand for training to end; 0: it goes to its end (%(default)s)",
    )
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.8,
        help="of the order of the layers from round to round in that window, at least; those that "
        "--halving stopped keep their places (%(default)s)",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="the worse half of the layers ends after rounds 2, 4, 8 ...",
    )
    parser.add_argument(
        "--full_runs",
        action="store_true",
        help="each layer by train.py to its end, not side by side",
    )
    parser.add_argument(
        "--candidate",
        type=int,
        help=f"{', '.join(TRAINED)}: train this layer alone, and do not rank",
    )
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="submit each layer as a task of an array (PARALLEL at a time, 8), and the "
        "ranking behind it; SBATCH_ARGS: options for both",
    )
    port = f" --master_port {os.environ['MASTER_PORT']}" if "MASTER_PORT" in os.environ else ""  # the launch scripts'
    parser.add_argument(
        "--launcher",
        default=f"{Path(sys.executable).with_name('deepspeed')}{port}",
        help="what starts train.py",
    )
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences to measure on (%(default)s)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="sequences, or questions of a task, at a time (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random, and of a task's questions (%(default)s)")
    add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="come after the file")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(argv)

    disable_progress_bar()  # transformers' own, a line for every file read
    cfg = load_stage_2(args.cfg, args.overrides)
    args.output_dir = args.output_dir or Path(f"{cfg.train.output_dir}_{args.method}")
    layers = load_teacher_config(cfg.teacher_model.name).num_hidden_layers
    args.top_k = budget(args.ratio, layers) if args.ratio is not None else args.top_k
    if not 1 <= args.top_k <= layers:
        raise ConfigError(f"--top-k: {args.top_k} must be between 1 and the teacher's {layers} layers")
    if args.candidate is not None and (args.method not in TRAINED or not 0 <= args.candidate < layers):
        raise ConfigError(
            f"--candidate: {args.candidate} needs --method {' or '.join(TRAINED)} and a layer in 0..{layers - 1}"
        )
    for name, least in (("rounds", 1), ("window", 0), ("sequences", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}: {getattr(args, name)} must be at least {least}")
    if not -1 <= args.correlation <= 1:
        raise ConfigError(f"--correlation: {args.correlation} must be between -1 and 1")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ConfigError(f"--output_dir: {args.output_dir} is a file; name a folder")
    if args.slurm:
        return submit(args, cfg, [word for word in argv if word != "--slurm"], layers)
    # Training handles signals itself; what takes minutes keeps nothing and starts anew when it is
    # requeued.
    with StopSignals(to_the_end=False) if args.method not in TRAINED else nullcontext():
        ranking = METHODS[args.method](Bench(cfg, args.sequences, args.batch_size), args)
    if ranking is None:
        return
    write(ranking, args.top_k, args.output_dir)
    chosen = write_chosen(cfg, ranking, args.top_k, args.ratio, args.output_dir)
    print(table(ranking, args.top_k))
    undecided = f"; not told apart at the cut: {ranking.undecided(args.top_k)}" if ranking.undecided(args.top_k) else ""
    if "share_of_full_runs" in ranking.facts:
        facts = ranking.facts
        print(
            f"Trained side by side for {facts['steps']} of {facts['of_steps']} steps: {facts['share_of_full_runs']:.1%} of the FLOPs of "
            f"{layers} full runs, {facts['seconds']:.0f} s"
        )
    print(f"Kept: {ranking.keep(args.top_k)}{undecided}; next: deepspeed train.py --cfg {chosen}")


if __name__ == "__main__":
    run_main(main)

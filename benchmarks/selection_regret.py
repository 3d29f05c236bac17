"""How far from the best set of kept layers a selector is, where all sets can be trained.

    python benchmarks/selection_regret.py --output_dir regret_out                # all GPUs of this machine
    python benchmarks/selection_regret.py --output_dir regret_out --minutes 8    # a part; rerun the command for the rest

For every teacher (recall_teacher.py, one a seed) and student: stage 1, then stage 2 of every set of
K layers, and every selector on the same all-linear student. With --seeds, stage 2 of further seeds
trains the sets that matter: the --best of the first seed, and those that selectors chose. The regret
of a selector is the held-out KL of its set, the mean over the seeds, over that of the best set; beside
it the difference of their recall, and what the selector cost. Everything is done by one process per GPU
(--processes), each of which trains several sets side by side; a job that is done is not repeated.

METHOD is one of select_layers.py, also as METHOD:OBJECTIVE (gates:mixture), and rounds:remove.
Written to --output_dir: regret.md, regret.json (all sets and all choices; docs/regret*.json: those of
the documentation) and regret.png. At the default sizes 84 sets x 4 pairs of teacher and student take
84 x 4 x 200 steps of 8192 tokens, 550M in all. With --num_pairs 48 --num_chains 20 --num_fillers 16
--num_words 256 --sets_at_once 7 --processes 12 all jobs after the teachers took about 4 minutes of
four H200s; --help lists what makes it smaller.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.command import run_main
from runtime.config import Config, ConfigError, dump_config, load_config
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_directory, atomic_write_text, one_line

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.jobs import Job, add_process_options, claim_folder, do_jobs, failures
from benchmarks.recall_teacher import DEMANDED, DIFFICULTY, difficulty, scale_of
from benchmarks.training import stage_1
from convert import load_teacher
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM, can_calibrate
from layer_selection.bench import Bench
from layer_selection.candidate_training import JointTraining
from layer_selection.compare_selectors import selection_options, split_method
from layer_selection.measured_training import MeasuredTraining
from layer_selection.options import RecallOptions
from layer_selection.selection import select
from layer_selection.stopping_rule import StoppingRule
from quickstart.train_teacher import token_ids
from recall_tasks import Document

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "gates",
    "gates:mixture",
    "rounds",
    "rounds:mixture",
    "ga_s2",
    "scan",
    "smart",
    "mse",
    "ppl",
    "ar",
    "ar_multihop",
    "uniform",
    "random",
)
CALIBRATION_BATCHES = 8
MEASUREMENTS = 4  # of a set in its stage 2: they tell after how many steps sets can be told apart
COLOURS = "tab10"


class SetTraining(MeasuredTraining):
    """Also records the held-out KL of each hybrid on the way, by step."""

    def figures(self, i: int, kls: list[float]) -> dict:
        earlier = {entry.step: entry.means()[i] for entry in self.history}
        return super().figures(i, kls) | {"kl_by_step": earlier}


# ------------------------------------------------------------------------ jobs
@dataclass(frozen=True)
class Case:
    """A teacher's seed and a student."""

    teacher: int
    student: str

    @property
    def name(self) -> str:
        return f"teacher{self.teacher}-{self.student}"


class Regret:
    """All jobs of a command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = args.output_dir
        self.cases = [Case(seed, student) for student in args.students for seed in range(args.teachers)]

    # ---- where things are
    def teacher(self, seed: int) -> Path:
        return self.out / f"teacher_{seed}"

    def config(self, case: Case) -> Path:
        return self.out / case.name / "stage2.yaml"

    def truths(self, case: Case, top_k: int) -> list[Path]:
        """Of the first seed, which trains all sets."""
        names = (f"sets_k{top_k}_seed0_part{part}.json" for part in range(len(self.parts(top_k))))
        return [self.out / case.name / name for name in names]

    def choices(self, case: Case, top_k: int) -> dict[tuple[str, int], Path]:
        """Of every method and seed."""
        pairs = itertools.product(self.args.methods, range(self.args.selector_seeds))
        folder = self.out / case.name
        return {(m, seed): folder / f"choice_k{top_k}_seed{seed}_{m.replace(':', '-')}.json" for m, seed in pairs}

    def further(self, case: Case, top_k: int, seed: int) -> list[Path]:
        """Of a seed after the first, as many as its sets may fill. Other options ask for other sets, and so have
        other files."""
        args = self.args
        most = args.best + len(args.methods) * args.selector_seeds
        wanted = zlib.crc32(json.dumps([args.best, args.selector_seeds, args.methods]).encode())
        parts = range(math.ceil(most / args.sets_at_once))
        return [self.out / case.name / f"sets_k{top_k}_seed{seed}_{wanted:08x}_part{part}.json" for part in parts]

    # ---- what there is to do
    def layers(self) -> int:
        return scale_of(self.args.size).shape["num_hidden_layers"]

    def parts(self, top_k: int) -> list[list[list[int]]]:
        """All sets of K layers, in parts that train side by side."""
        sets = [list(kept) for kept in itertools.combinations(range(self.layers()), top_k)]
        size = self.args.sets_at_once
        return [sets[start : start + size] for start in range(0, len(sets), size)]

    def jobs(self) -> Iterator[Job]:
        args = self.args
        for seed in range(args.teachers):
            yield Job(self.teacher(seed) / "teacher.json", (), partial(self.train_teacher, seed))
        for case in self.cases:
            needs = (self.teacher(case.teacher) / "teacher.json",)
            yield Job(self.config(case), needs, partial(self.align, case))
        for top_k, case in itertools.product(args.top_k, self.cases):
            for file, sets in zip(self.truths(case, top_k), self.parts(top_k)):
                yield Job(file, (self.config(case),), partial(self.train_sets, case, sets, 0, file))
            for (method, seed), file in self.choices(case, top_k).items():
                yield Job(file, (self.config(case),), partial(self.choose, case, top_k, seed, method, file))
        for seed, top_k, case in itertools.product(range(1, args.seeds), args.top_k, self.cases):
            needs = (*self.truths(case, top_k), *self.choices(case, top_k).values())
            files = self.further(case, top_k, seed)
            for part, file in enumerate(files):
                run = partial(self.train_further, case, top_k, seed, part, len(files), file)
                yield Job(file, needs, run)

    # ---- the work
    def train_teacher(self, seed: int) -> None:
        """By recall_teacher.py, which fails if the teacher recalls too little; the table says so."""
        folder = self.teacher(seed)
        words = [f"--{name}={getattr(self.args, name)}" for name in DIFFICULTY if getattr(self.args, name) is not None]
        if self.args.teacher_steps:
            words.append(f"--max_steps={self.args.teacher_steps}")
        script = ROOT / "benchmarks" / "recall_teacher.py"
        command = [sys.executable, str(script), "--output_dir", str(folder), "--size", self.args.size, f"--seed={seed}"]
        code = subprocess.run([*command, *words]).returncode
        if not (folder / "teacher.json").is_file():
            raise ValueError(f"--output_dir: {folder}: the teacher's training ended with exit code {code}, see above")

    def chunks(self, seed: int) -> Path:
        return self.teacher(seed) / "data" / f"chunked_context{scale_of(self.args.size).context_length}"

    def stage_2(self, case: Case) -> Config:
        args = self.args
        file = ROOT / "configs" / "quickstart" / "stage2.yaml"
        return load_config(
            file,
            [
                f"teacher_model.name={self.teacher(case.teacher) / 'teacher'}",
                f"data.cache_dir={self.chunks(case.teacher)}",
                f"student_model.name={case.student}",
                "student_model.keep_full_attention_layers=[0]",
                f"train.output_dir={self.out / case.name / 'runs'}",
                f"train.student_init_ckpt={self.out / case.name / 'student'}",
                f"train.max_steps={args.stage2_steps}",
                f"train.batch_size={args.batch_size}",
                f"train.micro_batch_size={args.batch_size}",
                f"train.train_seq_len={scale_of(args.size).context_length}",
                f"train.lr={args.lr}",
                f"train.lr_attn={args.lr_attn}",
            ],
        )

    def align(self, case: Case) -> None:
        """Stage 1: the all-linear student, calibrated where its kind can be."""
        args = self.args
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        folder = str(self.teacher(case.teacher) / "teacher")
        teacher = load_teacher(folder, dtype).to(device).eval()
        torch.manual_seed(case.teacher)
        student = StudentForCausalLM.from_teacher(teacher, case.student)[0].to(device)
        tokenizer = load_tokenizer(folder)
        chunks = open_chunks_for(tokenizer, teacher.config.vocab_size, str(self.chunks(case.teacher))).train

        def batches(seed: str) -> Iterator[torch.Tensor]:
            rng = random.Random(seed)
            while True:
                yield token_ids(chunks, rng.sample(range(len(chunks)), args.batch_size)).to(device)

        calibration = None
        if can_calibrate(case.student):
            calibration = list(itertools.islice(batches("calibration"), CALIBRATION_BATCHES))
        done = stage_1(
            teacher, student, batches("stage 1"), args.stage1_steps, args.lr_stage1, (args.stage1_steps,), calibration
        )
        for _ in tqdm(done, desc=f"stage 1 of {case.name}"):
            pass
        with atomic_directory(self.out / case.name / "student", replace=True) as temporary:
            student.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        atomic_write_text(self.config(case), dump_config(self.stage_2(case)))

    def with_seed(self, case: Case, seed: int) -> Config:
        cfg = load_config(self.config(case))
        return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))

    def hardest(self) -> dict[str, int]:
        return {name: getattr(self.args, name) for name in DIFFICULTY if getattr(self.args, name) is not None}

    def questions(self) -> list[Document]:
        """Held-out documents of both recall tasks, as hard as the teacher has learnt."""
        asked = scale_of(self.args.size, self.hardest()).tasks.documents("regret", self.args.questions, hardest=True)
        return [*asked["associative_recall"], *asked["multi_hop_recall"]]

    def train_sets(self, case: Case, sets: list[list[int]], seed: int, file: Path) -> None:
        """Stage 2 of these sets side by side; their held-out KL, also on the way, perplexity and recall."""
        bench = Bench(self.with_seed(case, seed), self.args.sequences, self.args.batch_size)
        folder = file.with_suffix("")
        known: dict = {}
        SetTraining(bench, MEASUREMENTS, sets, folder, file, known, self.questions()).run()
        shutil.rmtree(folder)

    def wanted(self, case: Case, top_k: int) -> list[list[int]]:
        """The sets that seeds after the first train: the best of the first seed, and those chosen."""
        first = trained(self.truths(case, top_k))
        names = sorted(first, key=lambda kept: first[kept]["kl"])[: self.args.best]
        chosen = (json.loads(file.read_text()).get("keep") for file in self.choices(case, top_k).values())
        names += [str(kept) for kept in chosen if kept]
        return [json.loads(kept) for kept in dict.fromkeys(names)]

    def of_seed(self, case: Case, top_k: int, seed: int) -> dict[str, dict]:
        """Set -> its figures, of all sets that this command and earlier ones have trained."""
        return trained((self.out / case.name).glob(f"sets_k{top_k}_seed{seed}_*.json"))

    def train_further(self, case: Case, top_k: int, seed: int, part: int, parts: int, file: Path) -> None:
        """Those of `wanted` that this file is for and that no command before has trained."""
        known = self.of_seed(case, top_k, seed)
        sets = [kept for kept in self.wanted(case, top_k)[part::parts] if str(kept) not in known]
        if sets:
            self.train_sets(case, sets, seed, file)
        else:
            atomic_write_text(file, "{}\n")

    def choose(self, case: Case, top_k: int, seed: int, method: str, file: Path) -> None:
        """A selector's set and what it cost, or why it chose none. Kernels are compiled before its time is taken."""
        args = self.args
        cfg = self.with_seed(case, seed)
        self.warm_up(cfg)
        folder = file.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # its cost is that of a whole selection
        tasks = scale_of(args.size, self.hardest()).tasks
        recall = RecallOptions(tasks.ranges["associative_recall"]["num_pairs"][1], tasks.num_words)
        options = selection_options(method, top_k, folder, args.sequences, args.batch_size, recall)
        begin = time.perf_counter()
        try:
            selection = select(cfg, dataclasses.replace(options, seed=seed))
        except ValueError as error:  # such as a teacher that answers none of a task's questions
            result = {"error": one_line(error)}
        else:
            seconds = time.perf_counter() - begin
            facts = selection.ranking.facts
            result = {"keep": selection.ranking.keep(top_k), "seconds": round(seconds, 2)}
            result |= {name: facts.get(name) for name in ("tokens", "flops")}
        atomic_write_text(file, json.dumps(result) + "\n")
        shutil.rmtree(folder, ignore_errors=True)

    def warm_up(self, cfg: Config) -> None:
        """Compiles the kernels of a step and of a measurement, once in a process and student."""
        warm = self.__dict__.setdefault("warm", set())
        if cfg.student_model.name in warm:
            return
        warm.add(cfg.student_model.name)
        bench = Bench(cfg, 2, self.args.batch_size)
        training = JointTraining(bench, StoppingRule(), {0: [0]}, -1, self.out)
        training.build([0], 0)
        training.train_round([0], 0, 1, tqdm(disable=True))


# ------------------------------------------------------------------------ the table
def trained(files: Iterable[Path]) -> dict[str, dict]:
    """Set -> its figures in these files."""
    return {kept: figures for file in files for kept, figures in json.loads(file.read_text()).items()}


def read_sets(regret: Regret, case: Case, top_k: int) -> dict[str, dict]:
    """Set -> the means of its figures over the seeds that have trained it, and its KL by seed. A seed counts once it
    has trained all its sets; empty if the first has not."""
    files = regret.truths(case, top_k)
    if not all(file.is_file() for file in files):
        return {}
    by_set = {kept: {0: figures} for kept, figures in trained(files).items()}
    for seed in range(1, regret.args.seeds):
        if all(file.is_file() for file in regret.further(case, top_k, seed)):
            for kept, figures in regret.of_seed(case, top_k, seed).items():
                by_set[kept][seed] = figures
    return {
        kept: {name: statistics.fmean(run[name] for run in runs.values()) for name in ("kl", "recall")}
        | {"kl_by_seed": {str(seed): run["kl"] for seed, run in runs.items()}}
        for kept, runs in by_set.items()
    }


def kl_by_seed(figures: dict) -> dict[str, float]:
    """Of a set; those that were stored before there were seeds have the first one."""
    return figures.get("kl_by_seed", {"0": figures["kl"]})


def best_of(sets: dict[str, dict]) -> str:
    """The set of the lowest mean KL, of those that most seeds have trained."""
    seeds = max(len(kl_by_seed(figures)) for figures in sets.values())
    return min((kept for kept in sets if len(kl_by_seed(sets[kept])) == seeds), key=lambda kept: sets[kept]["kl"])


def over_best(figures: dict, best: dict) -> tuple[float, list[float]]:
    """The regret of a set: its mean KL over that of the best set, of the seeds that have trained it; and the
    regret of each of them."""
    its, lowest = kl_by_seed(figures), kl_by_seed(best)
    seeds = [seed for seed in its if seed in lowest]
    by_seed = [its[seed] / lowest[seed] for seed in seeds]
    return sum(its[seed] for seed in seeds) / sum(lowest[seed] for seed in seeds), by_seed


def collect(regret: Regret) -> dict:
    """All that is there: the sets of every case and K, and of every choice its regret, the recall
    that it loses to the best set, and its cost."""
    cases = []
    choices = []
    errors = []
    for case, top_k in itertools.product(regret.cases, regret.args.top_k):
        sets = read_sets(regret, case, top_k)
        if not sets:
            continue
        best = best_of(sets)
        cases.append({"case": case.name, "top_k": top_k, "best": best, "sets": sets})
        for (method, seed), file in regret.choices(case, top_k).items():
            if file.is_file():
                chosen = json.loads(file.read_text())
                if "error" in chosen:
                    errors.append(f"`{method}`, {case.name}, K = {top_k}: {chosen['error']}")
                    continue
                figures = sets[str(chosen["keep"])]
                chosen["regret"], chosen["regret_by_seed"] = over_best(figures, sets[best])
                chosen["recall_lost"] = sets[best]["recall"] - figures["recall"]
                choices.append({"case": case.name, "top_k": top_k, "seed": seed, "method": method, **chosen})
    teachers = {}
    for seed in range(regret.args.teachers):
        file = regret.teacher(seed) / "teacher.json"
        if file.is_file():
            teacher = json.loads(file.read_text())
            teachers[seed] = {name: teacher[name] for name in ("parameters", "associative_recall", "multi_hop_recall")}
    settings = {name: str(value) for name, value in sorted(vars(regret.args).items()) if name in SETTINGS}
    return {"settings": settings, "teachers": teachers, "cases": cases, "choices": choices, "errors": errors}


def by_method(choices: list[dict]) -> dict[str, list[dict]]:
    """The choices of each method, the lowest mean regret first."""
    methods: dict[str, list[dict]] = {}
    for choice in choices:
        methods.setdefault(choice["method"], []).append(choice)
    order = sorted(methods, key=lambda method: statistics.fmean(choice["regret"] for choice in methods[method]))
    return {method: methods[method] for method in order}


def mean_of(choices: list[dict], name: str) -> float | None:
    values = [choice[name] for choice in choices if choice[name] is not None]
    return statistics.fmean(values) if values else None


def spread(by_seed: list[float]) -> float | None:
    """Standard deviation over seeds, if there are several."""
    return statistics.stdev(by_seed) if len(by_seed) > 1 else None


def with_spread(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def selector_row(method: str, choices: list[dict]) -> str:
    """Of the first table; the spread is that of a set's regret over seeds, the mean over its cases."""
    deviations = [spread(choice.get("regret_by_seed", [])) for choice in choices]
    known = [deviation for deviation in deviations if deviation is not None]
    tokens, flops = mean_of(choices, "tokens"), mean_of(choices, "flops")
    cells = [
        with_spread(mean_of(choices, "regret"), statistics.fmean(known) if known else None, 2),
        f"{max(choice['regret'] for choice in choices):.2f}",
        f"{100 * mean_of(choices, 'recall_lost'):.1f} points",
        f"{mean_of(choices, 'seconds'):.1f}",
        "" if tokens is None else f"{tokens / 1e6:.2f}M",
        "" if flops is None else f"{flops:.2g}",
    ]
    return f"| `{method}` | {' | '.join(cells)} |"


def case_row(case: dict, choices: list[dict]) -> str:
    """Of the second table. choices: of all cases and methods."""
    sets = case["sets"]
    best = sets[case["best"]]
    mine = [choice for choice in choices if (choice["case"], choice["top_k"]) == (case["case"], case["top_k"])]
    even = [choice for choice in mine if choice["method"] == "uniform"]
    cells = [
        case["case"],
        str(case["top_k"]),
        case["best"].strip("[]"),
        with_spread(best["kl"], spread(list(kl_by_seed(best).values())), 4),
        f"{100 * best['recall']:.1f} %",
        f"{statistics.median(figures['kl'] for figures in sets.values()):.4f}",
        f"{100 * sets[str(even[0]['keep'])]['recall']:.1f} %" if even else "",
    ]
    return f"| {' | '.join(cells)} |"


def seeds_line(case: dict) -> str:
    """How many seeds a case has, and in how many of them its best set is the best."""
    sets = [kl_by_seed(figures) for figures in case["sets"].values()]
    seeds = list(kl_by_seed(case["sets"][case["best"]]))
    rivals = [by_seed for by_seed in sets if len(by_seed) == len(seeds)]
    lowest = kl_by_seed(case["sets"][case["best"]])
    won = sum(lowest[seed] == min(by_seed[seed] for by_seed in rivals) for seed in seeds)
    return (
        f"{case['case']}, K = {case['top_k']}: {len(rivals)} of {len(sets)} sets were trained with {len(seeds)} seeds; "
        f"the best set has the lowest KL in {won} of them."
    )


def table(results: dict) -> str:
    """Markdown: the selectors by their mean regret, and the cases with their best sets; ± is the standard deviation
    over the seeds of stage 2."""
    lines = [
        "| selector | mean regret | highest | recall lost | seconds | tokens trained | FLOPs |",
        "|:--|--:|--:|--:|--:|--:|--:|",
        *(selector_row(method, choices) for method, choices in by_method(results["choices"]).items()),
        "",
        "| case | K | best set | its KL | its recall | median KL of all sets | evenly spaced: recall |",
        "|:--|--:|:--|--:|--:|--:|--:|",
        *(case_row(case, results["choices"]) for case in results["cases"]),
    ]
    for case in results["cases"]:
        if len(kl_by_seed(case["sets"][case["best"]])) > 1:
            lines += ["", seeds_line(case)]
    for seed, teacher in results["teachers"].items():
        recall = teacher["associative_recall"]
        warning = f"; less than {DEMANDED:.0%}, train it longer" if recall < DEMANDED else ""
        lines += ["", f"Teacher {seed}: {teacher['parameters'] / 1e6:.1f}M parameters, recall {recall:.1%}{warning}."]
    for error in results["errors"]:
        lines += ["", error]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Regret of each selector, a dot for each case, K and seed; on top that of all sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    methods = by_method(results["choices"])
    names = ["all sets", *methods]
    groups = list(dict.fromkeys((case["case"].partition("-")[2], case["top_k"]) for case in results["cases"]))
    colours = pyplot.get_cmap(COLOURS).colors
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    for number, group in enumerate(groups):
        offset = 0.5 * ((number + 0.5) / len(groups) - 0.5)
        colour = colours[number % len(colours)]
        everything = []
        for case in results["cases"]:
            if (case["case"].partition("-")[2], case["top_k"]) == group:
                best = case["sets"][case["best"]]
                everything += [over_best(figures, best)[0] for figures in case["sets"].values()]
        label = f"{group[0]}, K = {group[1]}"
        axis.plot(everything, [offset] * len(everything), "|", color=colour, alpha=0.7, label=label)
        for place, choices in enumerate(methods.values(), 1):
            mine = [c["regret"] for c in choices if (c["case"].partition("-")[2], c["top_k"]) == group]
            axis.plot(mine, [place + offset] * len(mine), "o", color=colour, markersize=4, alpha=0.8)
    for place, choices in enumerate(methods.values(), 1):
        mean = statistics.fmean(choice["regret"] for choice in choices)
        axis.plot([mean, mean], [place - 0.35, place + 0.35], color="black", linewidth=1.5)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="held-out KL over that of the best set (line: mean)")
    axis.grid(axis="x", which="both", alpha=0.25)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    figure.legend(loc="outside upper center", ncols=len(groups), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(regret: Regret, jobs: list[Job], failed: list[str]) -> str:
    """Writes regret.json, regret.md and regret.png; the table. failed: a line for each job that failed."""
    results = collect(regret)
    text = table(results)
    missing = sum(not job.file.is_file() for job in jobs)
    if missing:
        text += f"\n\n{missing} of {len(jobs)} jobs are missing; rerun the command."
    text += "".join(f"\n\n{line}" for line in failed)
    if results["choices"]:
        plot(results, regret.out / "regret.png")
    atomic_write_text(regret.out / "regret.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(regret.out / "regret.md", text + "\n")
    return text


# ------------------------------------------------------------------------ the command
SETTINGS = (
    "size",
    "stage1_steps",
    "stage2_steps",
    "batch_size",
    "lr",
    "lr_attn",
    "lr_stage1",
    "sequences",
    "questions",
    "sets_at_once",
    "teacher_steps",
    *DIFFICULTY,
)  # that the stored figures depend on


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add(
        "--size",
        choices=("hard", "deep", "full", "quickstart", "tiny"),
        default="hard",
        help="of the teachers (%(default)s)",
    )
    add("--teachers", type=int, default=2, help="how many, by seed (%(default)s)")
    add("--teacher_steps", type=int, help="at most; default: of the size")
    for name, what in DIFFICULTY.items():
        add(f"--{name}", type=int, help=f"{what}; default: of the size")
    add("--students", nargs="+", default=["gdn_v7", "gla_v1"])
    add("--top_k", nargs="+", type=int, default=[2, 3], help="how many layers are kept")
    add(
        "--seeds",
        type=int,
        default=1,
        help="of the order of stage 2's data; only the first trains all sets (%(default)s)",
    )
    add(
        "--best",
        type=int,
        default=6,
        help="sets of the first seed that the others train, and those chosen (%(default)s)",
    )
    add("--selector_seeds", type=int, default=1, help="with which each selector chooses (%(default)s)")
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="selectors")
    add("--stage1_steps", type=int, default=300)
    add("--stage2_steps", type=int, default=200)
    add("--batch_size", type=int, default=16, help="sequences per step")
    add("--lr_stage1", type=float, default=2e-3)
    add("--lr", type=float, default=1e-4)
    add("--lr_attn", type=float, default=1e-3)
    add("--sequences", type=int, default=64, help="held-out sequences to measure on")
    add("--questions", type=int, default=32, help="documents of each recall task")
    add("--sets_at_once", type=int, default=14, help="that a process trains side by side")
    add_process_options(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense, or if the folder has other figures."""
    layers = scale_of(args.size, difficulty(args)).shape["num_hidden_layers"]
    for name in args.students:
        if name not in STUDENT_ATTENTION_MAP:
            raise ConfigError(f"--students: {name} is unknown; choose of {', '.join(STUDENT_ATTENTION_MAP)}")
    for top_k in args.top_k:
        if not 1 <= top_k < layers:
            raise ConfigError(f"--top_k: {top_k} must be between 1 and {layers - 1}")
    counts = ("teachers", "seeds", "best", "selector_seeds", "stage1_steps", "stage2_steps", "batch_size", "questions")
    for name in (*counts, "sets_at_once"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: {getattr(args, name)} must be at least 1")
    if args.teacher_steps is not None and args.teacher_steps < 1:
        raise ConfigError(f"--teacher_steps: {args.teacher_steps} must be at least 1")
    if args.sequences < 2:
        raise ConfigError(f"--sequences: {args.sequences} must be at least 2")
    for method in args.methods:
        split_method(method)
    claim_folder({name: getattr(args, name) for name in SETTINGS}, args.output_dir)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file read
    if not args.worker:
        check(args)
    regret = Regret(args)
    jobs = list(regret.jobs())
    for job in jobs:
        job.file.parent.mkdir(parents=True, exist_ok=True)
    do_jobs(jobs, __file__, argv, args, args.minutes)
    failed = failures(jobs, args.output_dir)
    if not args.worker:
        print(report(regret, jobs, failed))
    return int(bool(failed) and not args.worker)


if __name__ == "__main__":
    run_main(main)

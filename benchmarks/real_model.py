"""Hybrids of a real teacher, from its name and a corpus to one table: what each choice of layers, student,
data and length of training keeps of the teacher, with controls and seeds.

    python benchmarks/real_model.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --corpus text.jsonl --output_dir out
    python benchmarks/real_model.py ... --minutes 8      # stops after so many; rerun the command for the rest

The rows are those of --rows (real_model.yaml, which explains itself). One process per GPU takes the next
job that can be done: text, stage 1 (once for all rows that share it), selection, stage 2, measurement,
each by the project's own scripts. A job that is done is not repeated, one that is stopped goes on.

Written to --output_dir: results.md (the table), samples.md (what the models write), results.json (all
figures), results_needles.png, results_kept.png, results_tokens.png, results_alignment.png; rows/, logs/.
--collect DIR copies them and what is small of the runs. A row that fails is named in the table with its
reason; rerun to try again.
Several such commands may run on one --output_dir of a host at once, as with other GPUs in CUDA_VISIBLE_DEVICES:
each job is done by one of them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from runtime.command import run_main
from runtime.config import ConfigError, load_config
from runtime.data import load_tokenizer, open_chunks_for, read_batch
from runtime.files import atomic_write_text, locked
from runtime.guard import REQUEUE
from runtime.run_folder import EXPORT, METRICS, RUN

import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from benchmarks.jobs import SETTINGS, Job, JobFailed, OutOfTime, add_process_options, do_jobs, failures, pending, work
from benchmarks.model_quality import Quality, Sizes
from benchmarks.real_model_report import write_report
from convert import load_teacher, load_teacher_config
from distill_model import StudentForCausalLM, check_start_from_teacher, check_student, get_student_attention_class
from layer_selection.select_layers import layers_to_keep, read_options
from layer_selection.select_layers import make_parser as selection_parser
from layer_selection.selection import METHODS
from layer_selection.stage2_runs import load_stage_2

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_suffix(".yaml")
TEACHER = "teacher"  # the row of the teacher itself
SAVING = 120  # seconds that a run that was told to stop has for its checkpoint
MEASURING = 45  # seconds that must be left for a measurement
NEVER = 1_000_000_000  # steps between checkpoints
LEAST = 30  # seconds that must be left for a script to begin
SMALL = 4_000_000  # bytes of a file that --collect copies
SECTIONS = {"data": dict, "heldout": dict, "defaults": dict, "rows": list}  # of --rows
OURS = {"output_dir", "student_init_ckpt", "seed"}  # keys of `train:` that no row sets
COSTS = ("tokens", "tokens_measured", "flops", "seconds")  # facts of a ranking


# ------------------------------------------------------------------------ rows
def digest(*settings) -> str:
    """A short name of settings that are JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Row:
    """A line of the table, of one seed: see real_model.yaml. kept: layers, "all", "none", or a
    selector's options, those of `source` if it has the layers that another row chooses; stage1, stage2:
    keys of `train:` and `data`, None: left out; selection: those that a selector measures and trains
    with, None: those of stage 2."""

    name: str
    kept: list[int] | str | dict
    student: str
    options: dict = field(default_factory=dict)
    stage1: dict | None = None
    stage2: dict | None = None
    selection: dict | None = None
    seed: int = 0
    selector: str | None = None
    over_kept: str | None = None
    over_tokens: str | None = None
    over_length: str | None = None
    source: Row | None = None

    @property
    def slug(self) -> str:
        """The name of its files, another one for other settings."""
        words = re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")
        settings = [self.kept, self.student, self.options, self.stage1, self.stage2]
        if chooser := self.chooser:
            settings += [chooser.start, chooser.selecting]
        return f"{words}-seed{self.seed}-{digest(*settings)}"

    @property
    def start(self) -> str:
        """The folder of its stage 1, which other rows share; without one, a name for the teacher's weights."""
        return f"{self.student}-{digest(self.student, self.options, self.stage1)}"

    @property
    def chooser(self) -> Row | None:
        """The row whose selector chooses the layers; None without one."""
        return (self.source or self) if isinstance(self.kept, dict) else None

    @property
    def selecting(self) -> dict:
        """What its selector measures and trains with: keys of `train:` and `data`."""
        return self.selection or self.stage2

    @property
    def shared_choice(self) -> str | None:
        """A key of rows that differ in top_k alone, where one ranking of the layers serves every top_k;
        None for a method whose ranking is made for one."""
        if not isinstance(self.kept, dict) or "top_k" in METHODS[self.kept["method"]].arguments:
            return None
        return digest(self.start, {**self.kept, "top_k": None}, self.selecting)

    @property
    def texts(self) -> list[tuple[str, int]]:
        """(data, length) of each stage."""
        return [text_of(stage) for stage in (self.stage1, self.stage2) if stage]


def text_of(stage: dict) -> tuple[str, int]:
    return stage["data"], stage["train_seq_len"]


@dataclass(frozen=True)
class Plan:
    """The content of --rows. top_k: `Row.shared_choice` -> the most layers that a row of it keeps."""

    rows: list[Row]
    data: dict[str, dict]
    heldout: dict
    top_k: dict[str, int] = field(default_factory=dict)


def merged(defaults: dict, row: dict) -> dict:
    """A row with what it leaves out; of a stage only the keys that it names differ."""
    result = defaults | row
    for stage in ("stage1", "stage2", "selection"):
        if isinstance(row.get(stage), dict):
            result[stage] = {**(defaults.get(stage) or {}), **row[stage]}
    return result


def read_content(file: Path) -> dict:
    """The YAML of --rows with its sections."""
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--rows: {file}: not valid YAML ({' '.join(str(error).split())})") from None
    for name, kind in SECTIONS.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ConfigError(f"--rows: {file}: {name}: must be a {kind.__name__}; {ROWS.name} explains the file")
    for row in content["rows"]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ConfigError(f"--rows: {file}: rows: {row} must be a dict with a name")
    return content


def read_plan(file: Path) -> Plan:
    """Raises ConfigError, naming file and row, for what cannot be."""
    content = read_content(file)
    rows = []
    for given in content["rows"]:
        values = merged(content["defaults"], given)
        seeds = values.pop("seeds", [0])
        try:
            rows += [Row(**values, seed=seed) for seed in seeds]
        except TypeError as error:
            raise ConfigError(f"--rows: {file}: {given['name']}: {error}") from None
    rows = with_sources(rows, file)
    plan = Plan(rows, content["data"], content["heldout"])
    check_data(plan, file)
    by_name: dict[str, Row] = {}
    seen = set()
    for row in rows:
        where = f"--rows: {file}: {row.name}"
        if (row.name, row.seed) in seen:
            raise ConfigError(f"{where} is there twice with seed {row.seed}; give each seed once")
        seen.add((row.name, row.seed))
        first = by_name.setdefault(row.name, row)
        if replace(row, seed=first.seed) != first:
            raise ConfigError(f"{where}: its seeds differ in more than the seed; name one of them otherwise")
        check_row(row, plan, where)
    for row in rows:
        if key := row.shared_choice if row.source is None else None:
            plan.top_k[key] = max(row.kept["top_k"], plan.top_k.get(key, 0))
    return plan


def with_sources(rows: list[Row], file: Path) -> list[Row]:
    """The rows, those with `kept: {same_as: NAME}` with the row of that name and its selector's options."""
    named = {row.name: row for row in reversed(rows)}
    found = []
    for row in rows:
        if isinstance(row.kept, dict) and "same_as" in row.kept:
            source = named.get(row.kept["same_as"])
            if len(row.kept) > 1 or source is None or not isinstance(source.kept, dict) or "same_as" in source.kept:
                raise ConfigError(
                    f"--rows: {file}: {row.name}: kept: {row.kept}: same_as, alone, must name a row whose layers a "
                    "method chooses"
                )
            row = replace(row, source=source, kept=source.kept)
        found.append(row)
    return found


def check_data(plan: Plan, file: Path) -> None:
    for name, spec in plan.data.items():
        if not isinstance(spec, dict) or not isinstance(spec.get("mix"), dict):
            raise ConfigError(f"--rows: {file}: data: {name}: needs `mix`, the shares of its corpora")
    if missing := {"data", "length", "sequences"} - plan.heldout.keys():
        raise ConfigError(f"--rows: {file}: heldout: needs {', '.join(sorted(missing))}")
    if plan.heldout["data"] not in plan.data:
        raise ConfigError(
            f"--rows: {file}: heldout: data {plan.heldout['data']} is not under data:; name one of {', '.join(plan.data)}"
        )


def check_row(row: Row, plan: Plan, where: str) -> None:
    get_student_attention_class(row.student)
    if isinstance(row.kept, dict):
        if row.kept.get("method") not in METHODS:
            raise ConfigError(f"{where}: kept: {row.kept} names no method of select_layers.py ({', '.join(METHODS)})")
        if not isinstance(row.kept.get("top_k"), int):
            raise ConfigError(f"{where}: kept: {row.kept} needs top_k, the number of layers")
        if not row.chooser.selecting:
            raise ConfigError(
                f"{where}: kept: {row.kept} chooses for a stage 2; give the row one, or `selection`, or name the layers"
            )
    elif not isinstance(row.kept, list) and row.kept not in ("all", "none"):
        raise ConfigError(f"{where}: kept: {row.kept!r} must be layers, all, none, or a method")
    if row.over_tokens and not row.stage2:
        raise ConfigError(f"{where}: over_tokens: {row.over_tokens} is over tokens of stage 2; give the row one")
    for stage in filter(None, (row.stage1, row.stage2, row.selection)):
        if not isinstance(stage, dict):
            raise ConfigError(f"{where}: a stage must be a dict or null, not {stage!r}")
        if missing := {"data", "target_tokens", "train_seq_len"} - stage.keys():
            raise ConfigError(f"{where}: a stage needs {', '.join(sorted(missing))}; give it there or in the defaults")
        if ours := OURS & stage.keys():
            raise ConfigError(f"{where}: {', '.join(sorted(ours))}: set by this benchmark; remove it")
    used = [*row.texts, *([text_of(row.chooser.selecting)] if row.chooser else [])]
    if unknown := {data for data, _ in used} - plan.data.keys():
        raise ConfigError(f"{where}: data {', '.join(unknown)} is not under data:; name one of {', '.join(plan.data)}")


# ------------------------------------------------------------------------ the experiment
class Experiment:
    """All jobs of a command line. end: when its time is up, by time.time()."""

    def __init__(self, args: argparse.Namespace, plan: Plan):
        self.args = args
        self.plan = plan
        self.out = args.output_dir
        self.end = args.until or math.inf

    # ---- where things are
    def chunks(self, data: str, length: int) -> Path:
        return self.out / "data" / data / f"chunked_context{length}"

    def start(self, row: Row) -> Path:
        """The export of its stage 1, which stage 2 begins with."""
        return self.out / "starts" / row.start / EXPORT

    def selector(self, chooser: Row) -> dict:
        """The options of select_layers.py. A ranking that serves every top_k is made for the largest, so
        that halving does not stop layers that a row needs."""
        top_k = self.plan.top_k.get(chooser.shared_choice, chooser.kept["top_k"])
        return {**chooser.kept, "top_k": top_k}

    def choice(self, chooser: Row) -> Path:
        """The ranking of a selector, which rows share that choose with the same text and training."""
        options = self.selector(chooser)
        words = [chooser.start, *(f"{key}-{value}" for key, value in options.items()), digest(chooser.selecting)]
        return self.out / "choices" / "_".join(words) / "ranking.json"

    def run_folder(self, row: Row) -> Path:
        """Of stage 2, which rows share that keep the same layers, however these were chosen. They must
        have been chosen."""
        layers = self.layers(row)
        settings = digest(layers, row.student, row.options, row.stage1, row.stage2)
        return self.out / "runs" / f"{row.student}-{len(layers)}-kept-{settings}-seed{row.seed}"

    def result(self, name: str) -> Path:
        return self.out / "rows" / f"{name}.json"

    # ---- what there is to do
    def jobs(self) -> list[Job]:
        """In the order of the rows, each after what it needs."""
        heldout = (self.plan.heldout["data"], self.plan.heldout["length"])
        jobs: dict[Path, Job] = {}
        for row in self.plan.rows:
            for job in (*self.text_jobs([*row.texts, heldout]), *self.row_jobs(row)):
                jobs.setdefault(job.file, job)
            # Behind the first row's training, which nothing should wait for.
            teacher = self.measurement(TEACHER, [self.mark("text", *heldout)], self.measure_teacher)
            jobs.setdefault(teacher.file, teacher)
        return list(jobs.values())

    def mark(self, *words) -> Path:
        """The file that says that a job is done whose product is a folder."""
        return self.out / "jobs" / "_".join(map(str, words))

    def marked(self, mark: Path, needs: list[Path], run: Callable[..., None], *args) -> Job:
        def run_and_mark() -> None:
            run(*args)
            atomic_write_text(mark, "done\n")

        return Job(mark, tuple(needs), run_and_mark)

    def text_jobs(self, texts: list[tuple[str, int]]) -> Iterator[Job]:
        for data, length in texts:
            tokens = self.mark("text", data)
            yield self.marked(tokens, [], self.tokenize, data)
            yield self.marked(self.mark("text", data, length), [tokens], self.cut, data, length)

    def start_jobs(self, row: Row) -> Iterator[Job]:
        """Its stage 1, if it has one."""
        if row.stage1:
            yield self.marked(self.mark("start", row.start), [self.mark("text", *text_of(row.stage1))], self.align, row)

    def row_jobs(self, row: Row) -> Iterator[Job]:
        starts = list(self.start_jobs(row))
        yield from starts
        needs = [*(job.file for job in starts), *(self.mark("text", *text) for text in row.texts)]
        if row.chooser:
            choice = self.mark("choice", self.choice(row.chooser).parent.name)
            yield from self.choice_jobs(row.chooser, choice)
            needs.append(choice)
        if row.stage2:
            trained = self.mark("trained", row.slug)
            yield self.marked(trained, needs, self.train, row)
            needs = [trained]
        needs.append(self.mark("text", self.plan.heldout["data"], self.plan.heldout["length"]))
        yield self.measurement(row.slug, needs, self.measure, row)

    def choice_jobs(self, chooser: Row, choice: Path) -> Iterator[Job]:
        text = text_of(chooser.selecting)
        yield from self.text_jobs([text, *chooser.texts[:1]])
        starts = list(self.start_jobs(chooser))
        yield from starts
        yield self.marked(choice, [*(job.file for job in starts), self.mark("text", *text)], self.choose, chooser)

    def measurement(self, name: str, needs: list[Path], run: Callable[..., None], *args) -> Job:
        """In this process."""

        def run_in_time() -> None:
            if self.end - time.time() < MEASURING:
                raise OutOfTime
            try:
                run(*args)
            finally:
                gc.collect()
                torch.cuda.empty_cache()

        return Job(self.result(name), tuple(needs), run_in_time)

    # ---- scripts
    def script(self, log: str, script: str, *words) -> None:
        """Runs a script of the project until the time is up. Raises OutOfTime or JobFailed."""
        file = self.out / "logs" / f"{log}.log"
        if self.end - time.time() < LEAST:
            raise OutOfTime
        begin = time.time()
        command = [sys.executable, str(ROOT / script), *map(str, words)]
        with open(file, "a") as output:
            print(f"$ {' '.join(command)}", file=output, flush=True)
            print(f"{log}: {script}", flush=True)
            with subprocess.Popen(command, stdout=output, stderr=output) as process:
                code = wait_until(process, self.end)
            seconds = time.time() - begin
            print(f"# {script}: exit code {code} after {seconds:.1f} s", file=output, flush=True)
        if code == REQUEUE or code and time.time() >= self.end:
            raise OutOfTime
        if code:
            last = [line for line in file.read_text(errors="replace").splitlines() if line.strip()][-2]
            raise JobFailed(f"{script} ended with exit code {code}: {last.strip()[:300]}; see {file}")

    def seconds(self, log: str) -> float:
        """What the commands of a log took together; those that failed do not count."""
        file = self.out / "logs" / f"{log}.log"
        text = file.read_text(errors="replace") if file.is_file() else ""
        return sum(map(float, re.findall(rf"^# \S+: exit code (?:0|{REQUEUE}) after ([\d.]+) s$", text, re.M)))

    # ---- the work
    def tokenize(self, data: str) -> None:
        spec = self.plan.data[data]
        mix = {self.args.corpus if name == "corpus" else name: share for name, share in spec["mix"].items()}
        corpus = ["--mix", *(f"{name}:{share}" for name, share in mix.items())]
        if len(mix) == 1:
            corpus = ["--dataset_name", *mix]
        if tokens := spec.get("max_tokens"):
            corpus += ["--max_tokens", tokens]
        words = ["--tokenizer", self.args.teacher, "--output_dir", self.out / "data" / data / "tokenized"]
        self.script(f"text_{data}", "preprocess_download_tokenize.py", *corpus, *words)

    def cut(self, data: str, length: int) -> None:
        folder = self.out / "data" / data
        words = ["--tokenized_dataset_path", folder / "tokenized", "--context_length", length, "--output_dir", folder]
        self.script(f"text_{data}_{length}", "preprocess_chunk.py", *words)

    def write_config(
        self, row: Row, stage: int, file: Path, kept: list[int], folder: Path, selecting: bool = False
    ) -> None:
        """selecting: the stage 2 that a selector measures and trains with."""
        values = dict(row.selecting if selecting else row.stage1 if stage == 1 else row.stage2)
        data = values.pop("data")
        # No checkpoint at every tenth of a short run: writing 20 GB takes as long as many steps.
        train = {"output_dir": str(folder), "save_minutes": 5, "save_steps": NEVER, "report_to": "none", **values}
        if stage == 2:
            start = str(self.start(row)) if row.stage1 else None
            train |= {"student_init_ckpt": start, "seed": 42 + row.seed}
        config = {
            "stage": stage,
            # Whole chunks, as all rows of docs/results.md were trained and `quality` measures them.
            "data": {"cache_dir": str(self.chunks(data, values["train_seq_len"])), "document_mask": False},
            "teacher_model": {"name": self.args.teacher},
            "student_model": {"name": row.student, "options": row.options, "keep_full_attention_layers": kept},
            "train": train,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, yaml.safe_dump(config, sort_keys=False))

    def align(self, row: Row) -> None:
        folder = self.start(row).parent
        file = folder.with_suffix(".yaml")
        self.write_config(row, 1, file, [], folder)
        self.script(f"start_{row.start}", "train.py", "--cfg", file)
        remove_checkpoints(folder)

    def choose(self, chooser: Row) -> None:
        folder = self.choice(chooser).parent
        file = folder / "stage2.yaml"
        self.write_config(chooser, 2, file, [0], folder / "run", selecting=True)
        words = self.selector_words(chooser, file, folder)
        self.script(f"choice_{folder.name}", "layer_selection/select_layers.py", *words)

    def selector_words(self, chooser: Row, file: Path, folder: Path) -> list[str]:
        """The command line of select_layers.py; an option that is `true` is a flag."""
        options = self.selector(chooser)
        words = ["--cfg", file, "--method", options.pop("method"), "--top-k", options.pop("top_k")]
        for name, value in options.items():
            words += [f"--{name}"] if value is True else [f"--{name}", value]
        return list(map(str, [*words, "--output_dir", folder]))

    def layers(self, row: Row) -> list[int]:
        """That the row keeps."""
        if isinstance(row.kept, list):
            return row.kept
        if row.chooser:
            ranked = json.loads(self.choice(row.chooser).read_text())["layers"]
            return sorted(layer["layer"] for layer in ranked[: row.kept["top_k"]])
        count = load_teacher_config(self.args.teacher).num_hidden_layers
        return list(range(count)) if row.kept == "all" else []

    def train(self, row: Row) -> None:
        folder = self.run_folder(row)
        done = self.mark("run", folder.name)
        with locked(done.with_name(f".{done.name}.run"), str(folder)):  # another row may have the same layers
            if done.is_file():
                return
            file = folder.with_suffix(".yaml")
            self.write_config(row, 2, file, self.layers(row), folder)
            self.script(f"run_{folder.name}", "train.py", "--cfg", file)
            remove_checkpoints(folder)
            atomic_write_text(done, "done\n")

    # ---- measurement
    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def teacher(self) -> StudentForCausalLM:
        return load_teacher(self.args.teacher, self.dtype).to(self.device).eval()

    @cached_property
    def quality(self) -> Quality:
        tokenizer = load_tokenizer(self.args.teacher)
        spec = self.plan.heldout
        chunks = open_chunks_for(
            tokenizer, self.teacher.config.vocab_size, str(self.chunks(spec["data"], spec["length"]))
        ).heldout
        if chunks is None:
            raise JobFailed(f"--rows: heldout: {spec['data']} has no held-out part of {spec['length']} tokens")
        ids = read_batch(chunks, range(min(spec["sequences"], len(chunks))))["input_ids"]
        sizes = Sizes(
            documents=self.args.questions, needles=self.args.needles, needle_lengths=tuple(self.args.needle_lengths)
        )
        return Quality(self.teacher, tokenizer, ids, sizes)

    def measure_teacher(self) -> None:
        self.store(TEACHER, self.teacher, {"heldout": self.plan.heldout})

    def measure(self, row: Row) -> None:
        if row.stage2:
            model = StudentForCausalLM.from_pretrained(self.run_folder(row) / EXPORT, dtype=self.dtype)
        elif row.stage1:
            model = StudentForCausalLM.from_pretrained(self.start(row), dtype=self.dtype)
            model = model.restore_full_attention(self.teacher, self.layers(row))
        else:
            torch.manual_seed(0)
            model = StudentForCausalLM.from_teacher(self.teacher, row.student, self.layers(row), row.options)[0]
        model.to(self.device)
        seconds = {"stage1": self.seconds(f"start_{row.start}"), "stage2": 0.0}
        if row.stage2:
            seconds["stage2"] = self.seconds(f"run_{self.run_folder(row).name}")
        facts = {"layers": self.layers(row), "start": row.start, "train_seconds": seconds}
        if row.chooser:
            facts["selection"] = self.selection_cost(row.chooser)
        self.store(row.slug, model, facts)

    def selection_cost(self, chooser: Row) -> dict:
        """COSTS as the ranking has them, and the seconds of the whole command."""
        ranking = self.choice(chooser)
        facts = json.loads(ranking.read_text())["facts"]
        found = {name: facts[name] for name in COSTS if name in facts}
        return {"command_seconds": self.seconds(f"choice_{ranking.parent.name}")} | found

    @torch.no_grad()
    def store(self, name: str, model: StudentForCausalLM, facts: dict) -> None:
        figures = self.quality.figures(model)
        if not all(math.isfinite(value) for value in figures.values()):
            raise JobFailed(f"{name}: its figures are not finite")
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        content = {**facts, "gpu": gpu, "figures": figures, "samples": self.quality.samples(model)}
        atomic_write_text(self.result(name), json.dumps(content, indent=1) + "\n")
        print(f"{name}: {figures}", flush=True)

    def wanted(self) -> dict[Path, dict]:
        """The file of each row's result -> its name, seed and settings."""
        rows = {}
        for row in self.plan.rows:
            settings = asdict(replace(row, source=None))
            names = {key: settings.pop(key) for key in ("name", "seed")}
            rows[self.result(row.slug)] = {**names, "settings": settings}
        return rows


def wait_until(process: subprocess.Popen, end: float) -> int:
    """The exit code of a process that is told to stop at `end`."""
    try:
        return process.wait(None if end == math.inf else max(0.0, end - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(SAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def remove_checkpoints(run: Path) -> None:
    """Of a finished run: its export is what is needed."""
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)


# ------------------------------------------------------------------------ the command
def collect(out: Path, target: Path) -> None:
    """Copies what is small: reports, rows, logs, configs, and the record of every run."""
    patterns = ["*.md", "*.json", "*.png", "*.yaml", "rows/*", "logs/*", "process_*.log", "choices/*/ranking.*"]
    for folder in ("starts", "runs"):
        patterns += [f"{folder}/*.yaml", *(f"{folder}/*/{name}" for name in (METRICS, RUN, "config.yaml", "*.png"))]
        patterns += [f"{folder}/*/{EXPORT}/README.md"]
    for pattern in patterns:
        for file in out.glob(pattern):
            if file.is_file() and not file.name.startswith(".") and file.stat().st_size < SMALL:
                copy = target / file.relative_to(out)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="a Hugging Face name or a folder")
    add("--corpus", required=True, help="text, as preprocess_download_tokenize.py takes it")
    add("--output_dir", type=Path, required=True)
    add("--rows", type=Path, default=ROWS, help="YAML file (%(default)s)")
    add("--only", nargs="+", metavar="NAME", help="rows with these names alone")
    add("--collect", type=Path, metavar="DIR", help="where copies of the small results go")
    add("--dry_run", action="store_true", help="checks all rows and prints the jobs in order")
    add_process_options(parser, minutes="stops after so many; what runs saves a checkpoint then")
    add("--questions", type=int, default=64, help="documents of each recall task (%(default)s)")
    add("--needles", type=int, default=200, help="prompts of each length (%(default)s)")
    add("--needle_lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], metavar="TOKENS")
    add("--until", type=float, help=argparse.SUPPRESS)
    return parser


def check_configs(experiment: Experiment) -> None:
    """Raises ConfigError, naming the row, for what the teacher's layers, a student or a stage do not take."""
    teacher = load_teacher_config(experiment.args.teacher)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage.yaml"
        for row in experiment.plan.rows:
            kept = [0] if row.chooser else experiment.layers(row)
            try:
                check_student(row.student, row.options, teacher)
                if row.stage2 and not row.stage1:
                    check_start_from_teacher(row.student, all_kept=len(kept) == teacher.num_hidden_layers)
                if row.chooser:
                    check_selector(experiment, row.chooser, file, teacher.num_hidden_layers)
                for stage in [number for number, values in ((1, row.stage1), (2, row.stage2)) if values]:
                    experiment.write_config(row, stage, file, [] if stage == 1 else kept, file.parent)
                    load_config(file)
                if outside := [layer for layer in kept if layer not in range(teacher.num_hidden_layers)]:
                    raise ConfigError(f"kept: {outside} out of the teacher's layers 0..{teacher.num_hidden_layers - 1}")
            except ValueError as error:
                reason = str(error).removeprefix(f"{file}: ")
                raise ConfigError(f"--rows: {experiment.args.rows}: {row.name}: {reason}") from None


def check_selector(experiment: Experiment, chooser: Row, file: Path, num_layers: int) -> None:
    """Raises ConfigError for what select_layers.py would refuse. file: where a config can be written."""
    if not chooser.stage1:
        check_start_from_teacher(chooser.student)
    experiment.write_config(chooser, 2, file, [0], file.parent / "run", selecting=True)
    parser = selection_parser()

    def refuse(message: str) -> None:
        raise ConfigError(f"kept: {chooser.kept}: {message}")

    parser.error = refuse
    args = parser.parse_intermixed_args(experiment.selector_words(chooser, file, file.parent / "choice"))
    cfg = load_stage_2(str(file))
    read_options(args, cfg, layers_to_keep(args, cfg, num_layers))


def check(args: argparse.Namespace, plan: Plan) -> None:
    """Raises ConfigError for numbers that make no sense, or if the folder has figures of another
    teacher, corpus or measurement, or text of another mixture under a name."""
    for name in ("questions", "needles"):
        if getattr(args, name) < 2:
            raise ConfigError(f"--{name}: {getattr(args, name)} must be at least 2")
    file = args.output_dir / SETTINGS
    ours = {name: getattr(args, name) for name in ("teacher", "corpus", "questions", "needles", "needle_lengths")}
    ours |= {"heldout": plan.heldout}
    texts = plan.data
    if file.is_file():
        theirs = json.loads(file.read_text())
        texts = theirs.pop("data")
        for name in texts.keys() & plan.data.keys():
            if texts[name] != plan.data[name]:
                raise ConfigError(
                    f"--rows: {args.rows}: data: {name} is other text in {args.output_dir}; name it otherwise"
                )
        texts |= plan.data
        for name, value in ours.items():
            if theirs[name] != value:
                raise ConfigError(
                    f"--output_dir: {args.output_dir} has {name} {theirs[name]}, not {value}; name another"
                )
    for folder in ("jobs", "rows", "logs", "starts", "runs", "choices"):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps({**ours, "data": texts}) + "\n")


def selected(plan: Plan, names: list[str] | None) -> Plan:
    """Raises ConfigError for a name that no row has."""
    known = {row.name for row in plan.rows}
    if unknown := set(names or ()) - known:
        raise ConfigError(f"--only: {', '.join(sorted(unknown))}: no such row; there are: {'; '.join(sorted(known))}")
    return plan if names is None else replace(plan, rows=[row for row in plan.rows if row.name in names])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    disable_progress_bar()
    plan = selected(read_plan(args.rows), args.only)
    if args.minutes is not None and args.until is None:
        args.until = time.time() + 60 * args.minutes
        argv = [*argv, "--until", str(args.until)]
    experiment = Experiment(args, plan)
    jobs = experiment.jobs()
    minutes = None if args.until is None else (args.until - time.time()) / 60
    if args.worker:
        work(jobs, minutes)
        return 0
    check_configs(experiment)
    if args.dry_run:
        for job in jobs:
            print(f"{'done' if job.file.is_file() else 'to do':<6} {job.file.relative_to(args.output_dir)}")
        return 0
    check(args, plan)
    try:
        do_jobs(jobs, __file__, argv, args, minutes)
    finally:
        failed = failures(jobs, args.output_dir)
        left = len(pending(jobs))
        everything = Experiment(args, read_plan(args.rows))
        print(write_report(args.output_dir, everything.result(TEACHER), everything.wanted(), failed, left))
        if args.collect:
            collect(args.output_dir, args.collect)
    return REQUEUE if left else int(bool(failed))


if __name__ == "__main__":
    run_main(main)

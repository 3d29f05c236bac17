"""What the options of a recipe buy and cost: each against a control, with several seeds.

    python benchmarks/recall_teacher.py --output_dir recall_out
    python benchmarks/ablations.py --teacher recall_out --output_dir ablations_out   # all GPUs

A run is stage 2 of a hybrid with evenly spaced kept layers, from a stage 1 that all runs of a seed
share. Seeds differ in fresh weights and in the order of the data. The larger teacher of one variant is
grown from the teacher (recall_teacher.py --grow). Teachers and runs are measured on the first held-out
chunks, which are of recall documents, read whole and one document at a time, and on the hardest recall
questions that the teacher has learnt. KL is to the teacher, also for the variant that learns from the
larger one.

The first table is of chunks read whole, the second of documents. They have means over the seeds and, for
the difference to the control, the 95 % interval of Student's t over the seeds' paired differences.
Tokens/s are of the steps after the first few, which compile.

One process per GPU does what no other does (--processes for more, whose speeds share a GPU); rerun
the command to resume. Written to --output_dir: ablations.json, ablations.md and process logs
(docs/recipes.json: that of the documentation).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.command import run_main
from runtime.config import Config, ConfigError, load_config
from runtime.data import (
    DOCUMENT_IDS,
    INPUT_IDS,
    load_tokenizer,
    most_documents,
    open_chunks_for,
    read_batch,
    split_batch,
)
from runtime.files import atomic_directory, atomic_write_text

import torch
from transformers.utils.logging import disable_progress_bar

import store_teacher
from benchmarks.jobs import Job, add_process_options, claim_folder, do_jobs, failures, run_script
from benchmarks.recall_teacher import GROWN_STEPS, scale_of
from benchmarks.training import stage_1
from convert import load_teacher
from distill_model import StudentForCausalLM
from heldout import heldout_figures, read_chunks
from hf_trainer import FrozenTeacher
from layer_selection.candidate_training import Candidate, MasterAdamW
from layer_selection.ranking import budget, evenly_spaced
from recall_tasks import Document, answer_accuracy
from stages import load_kd_teacher, use_cuda_graphs

ROOT = Path(__file__).resolve().parents[1]
CONTROL = "control"
EAGER_STEPS = 5  # that compile kernels and record graphs; not in the speed
EVAL_BATCH_SIZE = 8
# Text that is the messages one after another: the recall documents that the teacher has learnt.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
MIXED, TEXT, ALL, ANSWERS = "text and recall", "text", "conversations", "conversations, answers"
LOSS_ON = {ALL: "all", ANSWERS: "assistant"}  # of the tokeniser, by the data that it makes
CHARACTERS = 4  # of a token of a recall document, at most


@dataclass(frozen=True)
class Variant:
    """A recipe that differs from the variant `control`. overrides: of the stage-2 config. data: which
    chunks. larger: learns from the larger teacher. stored: learns from top tokens that are stored. masters:
    whether the optimiser has fp32 master weights."""

    name: str
    overrides: tuple[str, ...] = ()
    control: str = CONTROL
    data: str = MIXED
    larger: bool = False
    stored: bool = False
    masters: bool = True

    @property
    def file(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


VARIANTS = (
    Variant(CONTROL),
    Variant("kl: reverse", ("train.kl=reverse",)),
    Variant("kl: jsd", ("train.kl=jsd",)),
    Variant("kl: topk", ("train.kl=topk",)),
    Variant("kl_temperature: 2", ("train.kl_temperature=2",)),
    Variant("stored teacher outputs", ("train.kl=topk",), control="kl: topk", stored=True),
    Variant("distill_from: larger teacher", larger=True),
    Variant("train_only: linear attention", ("train.train_only=[linear_attention]",)),
    Variant("train_only: all attention", ("train.train_only=[linear_attention,kept_attention]",)),
    Variant("document_mask", ("data.document_mask=true",)),
    Variant("text without recall", data=TEXT),
    Variant("recall conversations alone", data=ALL),
    Variant("loss_on: assistant", control="recall conversations alone", data=ANSWERS),
    Variant("no fp32 master weights", masters=False),
)
# Teachers, which have figures too, each in one run; rows of the table.
TEACHER, LARGER = "teacher", "larger teacher"
# In the table of documents.
READ_ALONE = (CONTROL, "document_mask", "recall conversations alone", "loss_on: assistant")
# Figure -> its column, the factor it is shown with, its digits, and its unit.
FIGURES = {
    "kl": ("KL", 1, 4, ""),
    "perplexity": ("perplexity", 1, 2, ""),
    "recall": ("recall", 100, 1, " %"),
}


class PlainAdamW(MasterAdamW):
    """AdamW on the parameters themselves, whatever their dtype."""

    def __init__(self, groups, betas, max_grad_norm, make_scheduler):
        self.params = self.masters = [p for group in groups for p in group["params"]]
        self.max_grad_norm = max_grad_norm
        self.copied = self.copies = []
        self.adamw = torch.optim.AdamW(groups, betas=betas)
        self.scheduler = make_scheduler(self.adamw)


class Ablations:
    """All jobs of a command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = args.output_dir
        self.scale = scale_of(args.size)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.variants = [variant for variant in VARIANTS if self.refusal(variant) is None]
        if args.variants:
            self.variants = [variant for variant in self.variants if variant.name in args.variants]

    def refusal(self, variant: Variant) -> str | None:
        """Why a variant is left out, or None."""
        if not variant.masters and self.dtype == torch.float32:
            return "needs a GPU: weights are fp32 on a CPU"
        return None

    # ---- where things are
    def student(self, seed: int) -> Path:
        return self.out / f"stage1_seed{seed}"

    @property
    def larger(self) -> Path:
        return self.out / "larger"

    def conversations(self, loss_on: str) -> Path:
        return self.out / "data" / loss_on

    def made(self, loss_on: str) -> Path:
        """The file that says that these conversations are chunked."""
        return self.out / "data" / f"{loss_on}.json"

    def chunks(self, data: str) -> Path:
        name = f"chunked_context{self.scale.context_length}"
        if data in LOSS_ON:
            return self.conversations(LOSS_ON[data]) / name
        folder = self.args.teacher / "data"
        return (folder / "text" if data == TEXT else folder) / name

    def run_file(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / f"{variant.file}-seed{seed}.json"

    def teacher_file(self, name: str) -> Path:
        """The file with the figures of `TEACHER` or `LARGER`."""
        return self.out / "runs" / f"{name.replace(' ', '_')}.json"

    def results(self, variants: Iterable[Variant]) -> list[Path]:
        """The files with figures, of teachers and of the runs of variants."""
        names = [TEACHER] + [LARGER] * any(variant.larger for variant in variants)
        runs = itertools.product(variants, range(self.args.seeds))
        return [*map(self.teacher_file, names), *(self.run_file(variant, seed) for variant, seed in runs)]

    def jobs(self) -> Iterator[Job]:
        """The longest first."""
        seeds = range(self.args.seeds)
        if any(variant.larger for variant in self.variants):
            yield Job(self.teacher_file(LARGER), (), self.grow)
        for loss_on in {LOSS_ON[variant.data]: None for variant in self.variants if variant.data in LOSS_ON}:
            yield Job(self.made(loss_on), (), partial(self.make_conversations, loss_on))
        for seed in seeds:
            yield Job(self.student(seed) / "config.json", (), partial(self.align, seed))
        yield Job(self.teacher_file(TEACHER), (), self.measure_teacher)
        for seed, variant in itertools.product(seeds, self.variants):
            needs = [self.student(seed) / "config.json"]
            if variant.data in LOSS_ON:
                needs.append(self.made(LOSS_ON[variant.data]))
            if variant.larger:
                needs.append(self.teacher_file(LARGER))
            yield Job(self.run_file(variant, seed), tuple(needs), partial(self.run, variant, seed))

    # ---- models and data
    @cached_property
    def teacher(self) -> StudentForCausalLM:
        return load_teacher(str(self.args.teacher / "teacher"), self.dtype).to(self.device).eval()

    @cached_property
    def tokenizer(self):
        return load_tokenizer(str(self.args.teacher / "teacher"))

    @cached_property
    def kept(self) -> list[int]:
        layers = self.teacher.config.num_hidden_layers
        return evenly_spaced(budget(self.args.ratio, layers), layers)

    def open(self, data: str, document_mask: bool = False):
        return open_chunks_for(
            self.tokenizer, self.teacher.config.vocab_size, str(self.chunks(data)), document_mask=document_mask
        )

    def heldout(self, document_mask: bool):
        """Batches of held-out chunks, read whole or one document at a time, and what the teacher makes of
        them."""
        rows = self.open(MIXED, document_mask).heldout
        batch = read_batch(rows, range(min(self.args.eval_chunks, len(rows))))
        batches = split_batch({name: tensor.to(self.device) for name, tensor in batch.items()}, EVAL_BATCH_SIZE)
        return batches, [read_chunks(self.teacher, part) for part in batches]

    @cached_property
    def read_whole(self):
        return self.heldout(document_mask=False)

    @cached_property
    def read_alone(self):
        return self.heldout(document_mask=True)

    @cached_property
    def questions(self) -> dict[str, list[Document]]:
        return self.scale.tasks.documents("ablations", self.args.questions, hardest=True)

    def make_conversations(self, loss_on: str) -> None:
        """Chunks of recall documents, whose answers are the assistant's turns."""
        args, context = self.args, self.scale.context_length
        folder = self.conversations(loss_on)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "recall.jsonl"
        if not corpus.is_file():  # the tokenised data are of this file alone: a new one would be another corpus
            atomic_write_text(corpus, self.recall_conversations())
        (folder / "template.jinja").write_text(TEMPLATE)
        tokenized = folder / "tokenized"
        run_script(
            "preprocess_download_tokenize.py",
            dataset_name=corpus,
            chat_template=folder / "template.jinja",
            tokenizer=args.teacher / "tokenizer",
            loss_on=loss_on,
            output_dir=tokenized,
        )
        run_script("preprocess_chunk.py", tokenized_dataset_path=tokenized, output_dir=folder, context_length=context)
        atomic_write_text(self.made(loss_on), "{}\n")

    def recall_conversations(self) -> str:
        """A line of JSON for each, as many as stage 2 reads."""
        args = self.args
        missing = CHARACTERS * args.steps * args.batch_size * self.scale.context_length
        parts = (self.scale.tasks.interleaved(f"conversations {part}", 64) for part in itertools.count())
        lines = []
        for document in itertools.chain.from_iterable(parts):
            lines.append(json.dumps({"messages": messages_of(document)}) + "\n")
            missing -= len(document.text)
            if missing <= 0:
                break
        return "".join(lines)

    def batches(self, rows, seed: int, stage: int, steps: int) -> Iterator[dict]:
        """The same rows in the same order for every variant that reads these chunks."""
        rng = random.Random(f"{stage} {seed}")
        for _ in range(steps):
            yield read_batch(rows, rng.choices(range(len(rows)), k=self.args.batch_size))

    # ---- the work
    def align(self, seed: int) -> None:
        """Stage 1: the all-linear student."""
        args = self.args
        torch.manual_seed(seed)
        student = StudentForCausalLM.from_teacher(self.teacher, args.student)[0].to(self.device)
        read = self.batches(self.open(MIXED).train, seed, 1, args.stage1_steps)
        batches = (batch[INPUT_IDS].to(self.device) for batch in read)
        done = stage_1(self.teacher, student, batches, args.stage1_steps, args.lr_stage1)
        for _ in done:
            pass
        with atomic_directory(self.student(seed), replace=True) as temporary:
            student.save_pretrained(temporary)

    def config(self, variant: Variant, seed: int) -> Config:
        args = self.args
        teacher = args.teacher / "teacher"
        settings = {
            "data.cache_dir": self.chunks(variant.data),
            "data.document_mask": False,  # of all variants but the one that is named after it
            "teacher_model.name": teacher,
            "student_model.name": args.student,
            "student_model.keep_full_attention_layers": self.kept,
            "train.output_dir": self.out / "unused",
            "train.student_init_ckpt": self.student(seed),
            "train.max_steps": args.steps,
            "train.batch_size": args.batch_size,
            "train.micro_batch_size": args.batch_size,
            "train.train_seq_len": self.scale.context_length,
            "train.lr": args.lr,
            "train.lr_attn": args.lr_attn,
            "train.seed": seed,
        }
        if variant.larger:
            settings["teacher_model.distill_from"] = self.larger / "teacher"
        overrides = [f"{name}={value}" for name, value in settings.items()]
        return load_config(ROOT / "configs" / "quickstart" / "stage2.yaml", [*overrides, *variant.overrides])

    def run(self, variant: Variant, seed: int) -> None:
        """Stage 2 of a variant; its figures."""
        cfg = self.config(variant, seed)
        student = StudentForCausalLM.from_pretrained(self.student(seed), dtype=self.dtype)
        hybrid = student.restore_full_attention(self.teacher, self.kept).to(self.device)
        tokens_per_second = self.train(variant, cfg, hybrid)
        figures = {"variant": variant.name, "seed": seed, **self.figures(hybrid.eval())}
        figures["tokens_per_second"] = round(tokens_per_second, 1)
        atomic_write_text(self.run_file(variant, seed), json.dumps(figures) + "\n")
        del hybrid, student
        gc.collect()

    def figures(self, model: StudentForCausalLM) -> dict:
        """Of a model that does not train: on held-out chunks, on their documents, and recall."""
        whole = heldout_figures(model, *self.read_whole)
        alone = heldout_figures(model, *self.read_alone)
        recall = {task: answer_accuracy(model, self.tokenizer, asked) for task, asked in self.questions.items()}
        return {
            "kl": whole.mean_kl,
            "perplexity": whole.perplexity,
            "documents": {"kl": alone.mean_kl, "perplexity": alone.perplexity},
            "recall": statistics.fmean(recall.values()),
            **recall,
        }

    def measure_teacher(self) -> None:
        self.write_teacher(TEACHER, self.teacher)

    def write_teacher(self, name: str, model: StudentForCausalLM) -> None:
        figures = {"variant": name, "seed": 0, **self.figures(model)}
        atomic_write_text(self.teacher_file(name), json.dumps(figures) + "\n")

    def grow(self) -> None:
        """The larger teacher; its figures."""
        args = self.args
        run_script(
            "benchmarks/recall_teacher.py",
            output_dir=self.larger,
            grow=args.teacher,
            size=args.size,
            max_steps=args.larger_steps,
            seed=1,  # another than the teacher's default: other recall documents
        )
        larger = load_teacher(str(self.larger / "teacher"), self.dtype).to(self.device).eval()
        self.write_teacher(LARGER, larger)

    def train(self, variant: Variant, cfg: Config, hybrid: StudentForCausalLM) -> float:
        """Trains the hybrid; tokens/s."""
        args = self.args
        chunks = self.open(variant.data, cfg.data.document_mask)
        documents = chunks.has_documents
        graphs = use_cuda_graphs(cfg, self.device.type, 1, hybrid, has_documents=documents)
        most = most_documents(chunks.train, args.batch_size) if graphs and documents else None
        optimizer = MasterAdamW if variant.masters else PlainAdamW
        candidate = Candidate(variant.name, hybrid, cfg, batch_plan(cfg, 1), graphs, optimizer, most)
        teacher = self.teacher
        if variant.larger:
            teacher = load_kd_teacher(cfg, self.dtype, hybrid.config.vocab_size)
        frozen = FrozenTeacher(teacher, self.device, None, graphs, most)
        batches = self.batches(chunks.train, cfg.train.seed, 2, args.steps)
        if variant.stored:
            batches = iter([self.with_top_tokens(batch, cfg) for batch in batches])
        for step, batch in enumerate(batches, 1):
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            if not variant.stored:
                hidden = frozen.hidden_states(batch[INPUT_IDS], batch.get(DOCUMENT_IDS))
                batch["teacher_hidden_states"] = hidden
            candidate.train(step, [batch], frozen.head_weight)
            if step == min(EAGER_STEPS, args.steps - 1):
                self.synchronize()
                begin = time.perf_counter()
        self.synchronize()
        seconds = time.perf_counter() - begin
        candidate.check_losses()
        return (args.steps - min(EAGER_STEPS, args.steps - 1)) * batch[INPUT_IDS].numel() / seconds

    def with_top_tokens(self, batch: dict, cfg: Config) -> dict:
        """The batch with what store_teacher.py would store of it."""
        on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
        found = store_teacher.outputs(self.teacher, on_device, cfg.train.kl_top_k, cfg.train.kl_temperature)
        return batch | {name: torch.as_tensor(array) for name, array in found.items()}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def messages_of(document: Document) -> list[dict]:
    """A recall document as a conversation: what is between the answers is asked by the user."""
    messages = []
    place = 0
    for start, stop in document.answers:
        messages.append({"role": "user", "content": document.text[place:start]})
        messages.append({"role": "assistant", "content": document.text[start:stop]})
        place = stop
    return messages


# ------------------------------------------------------------------------ the table
def interval(differences: list[float]) -> tuple[float, float | None]:
    """The mean of paired differences, and half the width of its 95 % interval by Student's t; None
    for fewer than two."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    from scipy.stats import t

    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, float(t.ppf(0.975, len(differences) - 1)) * error


def difference_cell(runs: dict[int, dict], control: dict[int, dict], figure: str) -> str:
    """The difference to the control, of the seeds that both have; in bold if its interval does not
    hold 0."""
    _, factor, digits, _ = FIGURES[figure]
    pairs = [factor * (run[figure] - control[seed][figure]) for seed, run in runs.items() if seed in control]
    if not pairs:
        return ""
    mean, half = interval(pairs)
    if half is None:
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def mean_cell(runs: dict[int, dict], figure: str) -> str:
    """The mean over the seeds, ± half their range."""
    _, factor, digits, unit = FIGURES[figure]
    values = [factor * run[figure] for run in runs.values()]
    if not values:
        return ""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{half}{unit}"


def teacher_row(name: str, runs: dict[int, dict]) -> list[str]:
    """A teacher's cells, as those of `row`."""
    cells = [name, ""]
    for figure in FIGURES:
        cells += [mean_cell(runs, figure), ""]
    return cells


def row(variant: Variant, runs: dict[int, dict], control: dict[int, dict]) -> list[str]:
    """A variant's cells: means, and differences from the control."""
    cells = [f"`{variant.name}`", "" if variant.name == CONTROL else variant.control]
    for figure in FIGURES:
        cells.append(mean_cell(runs, figure))
        cells.append("" if variant.name == CONTROL else difference_cell(runs, control, figure))
    return cells


def table(runs: list[dict], variants: Iterable[Variant] = VARIANTS, teachers: Iterable[str] = (TEACHER, LARGER)) -> str:
    """Markdown: teachers and variants in their order; those without runs have empty cells."""
    by_name: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], {})[run["seed"]] = run
    columns = ["variant", "against"]
    for name, *_ in FIGURES.values():
        columns += [name, "difference"]
    rows = [teacher_row(name, by_name.get(name, {})) for name in teachers]
    rows += [row(variant, by_name.get(variant.name, {}), by_name.get(variant.control, {})) for variant in variants]
    lines = [f"| {' | '.join(columns)} |", "|:--|:--|" + "--:|" * (len(columns) - 2)]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def documents_table(runs: list[dict]) -> str:
    """The same figures, of documents that are read one at a time, for `READ_ALONE`."""
    alone = [run | run["documents"] for run in runs if "documents" in run]
    return table(alone, [variant for variant in VARIANTS if variant.name in READ_ALONE], [TEACHER])


def report(ablations: Ablations, failed: list[str]) -> str:
    """Writes ablations.json and ablations.md of the runs that are there, also of variants that this command
    leaves out; the tables. failed: a line for each job that failed."""
    runs = [json.loads(file.read_text()) for file in ablations.results(VARIANTS) if file.is_file()]
    text = f"Held-out chunks read whole:\n\n{table(runs)}\n\n"
    text += f"Held-out documents read one at a time:\n\n{documents_table(runs)}"
    for variant in VARIANTS:
        if reason := ablations.refusal(variant):
            text += f"\n\n`{variant.name}` is left out: it {reason}."
    wanted = ablations.results(ablations.variants)
    if missing := [file for file in wanted if not file.is_file()]:
        text += f"\n\n{len(missing)} of {len(wanted)} results are missing; rerun the command."
    text += "".join(f"\n\n{line}" for line in failed)
    lines = ",\n  ".join(map(json.dumps, runs))
    results = f'{{"settings": {json.dumps(settings_of(ablations.args))},\n "runs": [\n  {lines}\n]}}\n'
    atomic_write_text(ablations.out / "ablations.json", results)
    atomic_write_text(ablations.out / "ablations.md", text + "\n")
    return text


# ------------------------------------------------------------------------ the command
NOT_SETTINGS = ("output_dir", "seeds", "variants", "processes", "minutes", "worker")  # of which no figure depends


def settings_of(args: argparse.Namespace) -> dict:
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="output folder of recall_teacher.py")
    add("--size", choices=("full", "hard", "tiny"), default="full", help="of the teacher (%(default)s)")
    add("--output_dir", type=Path, required=True)
    add("--student", default="gdn_v7")
    add("--seeds", type=int, default=3)
    add("--ratio", type=float, default=0.25, help="share of the layers that keep full attention")
    add("--stage1_steps", type=int, default=200)
    add("--steps", type=int, default=200, help="of stage 2")
    add("--batch_size", type=int, default=16, help="sequences per step")
    add("--lr_stage1", type=float, default=2e-3)
    add("--lr", type=float, default=1e-4)
    add("--lr_attn", type=float, default=1e-3)
    add("--eval_chunks", type=int, default=64, help="held out (%(default)s)")
    add("--larger_steps", type=int, default=GROWN_STEPS, help="that the larger teacher trains (%(default)s)")
    names = [variant.name for variant in VARIANTS]
    add("--variants", nargs="+", choices=names, metavar="NAME", help="only these; default: all")
    add("--questions", type=int, default=32, help="documents of each recall task")
    add_process_options(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense, or if the folder has other figures."""
    for name in ("seeds", "stage1_steps", "batch_size", "eval_chunks", "larger_steps", "questions"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: {getattr(args, name)} must be at least 1")
    if not 0 < args.ratio < 1:
        raise ConfigError(f"--ratio: {args.ratio:g} must be between 0 and 1")
    if args.steps < 2:
        raise ConfigError(f"--steps: {args.steps} must be at least 2")
    if not (args.teacher / "teacher" / "config.json").is_file():
        raise ConfigError(f"--teacher: {args.teacher} has no teacher; name an output folder of recall_teacher.py")
    claim_folder(settings_of(args), args.output_dir)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file read
    if not args.worker:
        check(args)
    ablations = Ablations(args)
    jobs = list(ablations.jobs())
    for job in jobs:
        job.file.parent.mkdir(parents=True, exist_ok=True)
    do_jobs(jobs, __file__, argv, args, args.minutes)
    failed = failures(jobs, args.output_dir)
    if not args.worker:
        print(report(ablations, failed))
    return int(bool(failed) and not args.worker)


if __name__ == "__main__":
    run_main(main)

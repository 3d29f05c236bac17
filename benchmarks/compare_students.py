"""Compares all students at one token budget, with several seeds: which one to use.

    python benchmarks/recall_teacher.py --output_dir recall_out
    python benchmarks/compare_students.py --teacher recall_out/teacher --data recall_out/data/chunked_context512 \
        --output_dir recall_out/students

Each run is stage 1 of the all-linear student, then stage 2 of a hybrid that keeps evenly spaced
layers. Its figures, on held-out text and tasks, are written to
<output_dir>/runs/<student>-seed<N>.json. Rerun the command to resume: it does only what is missing;
--shard I/N does a part of it, for several processes at once. The table, of means and half ranges
over seeds, is printed and written to students.md, their recall is plotted in students.png, and all
runs with their settings go to students.json (docs/students.json: those of the documentation).
`NAME+calibrated` starts as with train.calibrate_init. Students within the best one's range are
marked as ties with it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_write_text

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.jobs import check_same_settings, claim_folder
from benchmarks.training import stage_1, stage_2
from convert import load_teacher
from convert.export_native import native_export_refusal
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM, can_calibrate
from heldout import HeldoutFigures, heldout_figures, read_chunks
from layer_selection.ranking import budget, evenly_spaced
from quickstart.measure import alignment
from quickstart.train_teacher import token_ids
from recall_tasks import RECALL_TASKS, Document, answer_accuracy

OPTIONS = {"swa_v1": {"window_size": 64}}  # its default covers a whole chunk
CALIBRATED = "+calibrated"
CALIBRATION_BATCHES = 8
STATE_LENGTH = 256  # tokens after which a layer's cache is measured
QUESTIONS = 64  # documents of each task
EVAL_BATCH_SIZE = 8
ALIGNMENT_CHUNKS = 16
RECALL_SERIES = [
    ("all_linear_recall", "every layer a student layer, after stage 1", "#c98a2b"),
    ("associative_recall", "hybrid, after stage 2", "#3f6fb5"),
]
COLUMNS = [
    "student",
    "alignment error",
    "all-linear KL",
    "hybrid KL, half of stage 1",
    "hybrid KL, all of stage 1",
    "hybrid KL, after stage 2",
    "recall",
    "two-hop recall",
    "copying",
    "state per layer",
    "parameters per layer",
    "native export",
]
EVERYTHING = [
    *STUDENT_ATTENTION_MAP,
    *(name + CALIBRATED for name in ("gdn_v4", "gdn_v7", "gdn_v8")),
]


def size_in_bytes(x) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    if isinstance(x, dict):
        return sum(map(size_in_bytes, x.values()))
    if isinstance(x, (list, tuple)):
        return sum(map(size_in_bytes, x))
    return 0


@torch.no_grad()
def state_bytes(model: StudentForCausalLM, layer: int, length: int) -> int:
    """What a layer's cache holds after `length` tokens of one sequence, in bytes."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    cache = model.model(ids, use_cache=True).past_key_values
    return size_in_bytes(cache[layer])


def hardest_questions(context: int, num_words: int) -> dict[str, list[Document]]:
    """Task -> documents, as hard as fits: each is at most as long as a chunk of `context`
    tokens."""
    size = context // 8
    options = {
        "associative_recall": {"num_pairs": size},
        "copying": {"length": 2 * size},
        "multi_hop_recall": {"num_chains": 3 * size // 8},
    }
    rng = random.Random(1)
    questions = {}
    for task, make in RECALL_TASKS.items():
        questions[task] = [make(rng, num_words=num_words, **options[task]) for _ in range(QUESTIONS)]
    return questions


class Comparison:
    """What all runs share: teacher, data, questions and settings."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.teacher = load_teacher(args.teacher, dtype).to(self.device).eval()
        self.tokenizer = load_tokenizer(args.teacher)
        teacher = self.teacher.config
        chunks = open_chunks_for(self.tokenizer, teacher.vocab_size, args.data, key="--data", model_key="--teacher")
        self.train = chunks.train
        rows = range(min(args.eval_chunks, len(chunks.heldout)))
        self.heldout = token_ids(chunks.heldout, rows).to(self.device)
        self.heldout_batches = self.heldout.split(EVAL_BATCH_SIZE)
        self.teacher_outputs = [read_chunks(self.teacher, ids) for ids in self.heldout_batches]
        layers = teacher.num_hidden_layers
        self.kept = evenly_spaced(budget(args.ratio, layers), layers)
        self.questions = hardest_questions(chunks.metadata["context_length"], args.num_words)

    def batches(self, seed: str, count: int) -> Iterator[torch.Tensor]:
        """Token ids [B, T] of `count` batches, the same for every student of a seed."""
        size = self.args.batch_size
        chunks = range(len(self.train))
        rows = [random.Random(f"{seed} {i}").sample(chunks, size) for i in range(count)]
        return (token_ids(self.train, row).to(self.device) for row in rows)

    def accuracy(self, model: StudentForCausalLM) -> dict[str, float]:
        accuracies = {}
        for task, documents in self.questions.items():
            accuracies[task] = answer_accuracy(model.eval(), self.tokenizer, documents)
        return accuracies

    def hybrid(self, student: StudentForCausalLM) -> StudentForCausalLM:
        return student.restore_full_attention(self.teacher, self.kept).to(self.device).eval()

    def figures(self, model: StudentForCausalLM) -> HeldoutFigures:
        return heldout_figures(model, self.heldout_batches, self.teacher_outputs)

    def run(self, name: str, seed: int) -> dict:
        """Both stages of a student; its figures."""
        begin = time.perf_counter()
        torch.manual_seed(seed)
        student_name = name.removesuffix(CALIBRATED)
        options = OPTIONS.get(student_name)
        student, _ = StudentForCausalLM.from_teacher(self.teacher, student_name, (), options)
        student = student.to(self.device)
        calibration = None
        if name.endswith(CALIBRATED):
            calibration = list(self.batches(f"calibration {seed}", CALIBRATION_BATCHES))
        exports_natively = native_export_refusal(self.hybrid(student).config) is None
        figures = {"student": name, "seed": seed, "native_export": exports_natively}
        figures |= self.run_stage_1(student, seed, calibration)
        hybrid = self.hybrid(student)
        figures |= self.run_stage_2(hybrid, seed)
        return figures | {"seconds": round(time.perf_counter() - begin, 1)}

    def run_stage_1(self, student: StudentForCausalLM, seed: int, calibration: list[torch.Tensor] | None) -> dict:
        """Trains the all-linear student; its figures, and its hybrid's on the way."""
        args = self.args
        figures = {}
        batches = self.batches(f"stage 1 {seed}", args.stage1_steps)
        measured = (0, args.stage1_steps // 2, args.stage1_steps)
        training = stage_1(self.teacher, student, batches, args.stage1_steps, args.lr_stage1, measured, calibration)
        for step in training:
            figures[f"hybrid_kl_after_{step}"] = self.figures(self.hybrid(student.eval())).mean_kl
            student.train()
        errors = alignment(student.eval(), self.teacher, self.heldout[:ALIGNMENT_CHUNKS])
        return figures | {
            "alignment_error": sum(errors) / len(errors),
            "all_linear_kl": self.figures(student).mean_kl,
            "all_linear_recall": self.accuracy(student)["associative_recall"],
        }

    def run_stage_2(self, hybrid: StudentForCausalLM, seed: int) -> dict:
        """Trains the hybrid; its figures, and the size of a linear layer."""
        args = self.args
        batches = self.batches(f"stage 2 {seed}", args.stage2_steps)
        stage_2(self.teacher, hybrid, batches, args.stage2_steps, args.lr_stage2, args.lr_attn_stage2)
        layer = hybrid.config.linear_layers[0]
        attention = hybrid.model.layers[layer].attn
        heldout = self.figures(hybrid.eval())
        sizes = [state_bytes(hybrid, layer, length) for length in (STATE_LENGTH, 2 * STATE_LENGTH)]
        return {
            "loss": heldout.mean_cross_entropy,
            "kl": heldout.mean_kl,
            "agreement": heldout.mean_agreement,
            **self.accuracy(hybrid),
            "state_bytes": sizes[0],
            "state_grows": sizes[1] > sizes[0],
            "parameters": sum(p.numel() for p in attention.parameters()),
        }


# ------------------------------------------------------------------------ the table
def spread(values: list[float], digits: int, percent: bool = False) -> str:
    """mean ± half the range."""
    scale = 100 if percent else 1
    mean = sum(values) / len(values)
    half_range = (max(values) - min(values)) / 2
    return f"{mean * scale:.{digits}f} ± {half_range * scale:.{digits}f}"


def cells(runs: list[dict], stage1_steps: int) -> list[str]:
    """A student's row after its name."""
    column = {key: [run[key] for run in runs] for key in runs[0] if key != "student"}
    first = runs[0]
    grows = " at 256 tokens, grows" if first["state_grows"] else ""
    return [
        spread(column["alignment_error"], 3),
        spread(column["all_linear_kl"], 2),
        spread(column[f"hybrid_kl_after_{stage1_steps // 2}"], 2),
        spread(column[f"hybrid_kl_after_{stage1_steps}"], 2),
        spread(column["kl"], 3),
        *(f"{spread(column[task], 1, percent=True)} %" for task in RECALL_TASKS),
        f"{first['state_bytes'] / 1024:.0f} KiB{grows}",
        f"{first['parameters'] / 1e6:.2f}M",
        "yes" if first["native_export"] else "",
    ]


def by_student(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each student, lowest mean KL after stage 2 first."""
    students: dict[str, list[dict]] = {}
    for run in runs:
        students.setdefault(run["student"], []).append(run)
    order = sorted(students, key=lambda name: statistics.fmean(run["kl"] for run in students[name]))
    return {name: students[name] for name in order}


def table(runs: list[dict], stage1_steps: int) -> str:
    """A Markdown table, lowest KL after stage 2 first; * marks the best and those whose range
    touches the best one's."""
    students = by_student(runs)
    best = next(iter(students.values()))
    highest = max(run["kl"] for run in best)
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for name, its_runs in students.items():
        tie = " *" if min(run["kl"] for run in its_runs) <= highest else ""
        row = " | ".join([f"`{name}`{tie}", *cells(its_runs, stage1_steps)])
        lines.append(f"| {row} |")
    return "\n".join(lines)


def plot_order(students: dict[str, list[dict]]) -> list[str]:
    """The names of students whose cache grows, then those of the others; by the hybrid's mean
    recall, the best first."""

    def key(name: str) -> tuple:
        runs = students[name]
        hybrid = statistics.fmean(run["associative_recall"] for run in runs)
        all_linear = statistics.fmean(run["all_linear_recall"] for run in runs)
        return not runs[0]["state_grows"], -hybrid, -all_linear

    return sorted(students, key=key)


def plot(runs: list[dict], path: Path, teacher: tuple[str, float] | None = None) -> None:
    """Associative recall of each student, with student layers only and as a hybrid, and of the
    teacher.

    teacher: its label and recall. A dot is the mean over the seeds, the bar behind it their range.
    Students whose cache grows stand apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    students = by_student(runs)
    names = plot_order(students)[::-1]  # the first is drawn at the bottom
    growing = [name for name in names if students[name][0]["state_grows"]]
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.24 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        means = []
        for key, label, colour in RECALL_SERIES:
            values = [100 * run[key] for run in students[name]]
            means.append(statistics.fmean(values))
            axis.barh(place, max(values) - min(values), 0.28, min(values), color=colour, alpha=0.45)
            axis.plot(means[-1], place, "o", color=colour, label=None if place else label)
        axis.plot(means, [place, place], color="gray", linewidth=1, zorder=0)
    if teacher:
        label, recall = teacher
        axis.axvline(100 * recall, color="#4a4a4a", linestyle="--", linewidth=1, label=label, zorder=0)
    if growing:
        axis.axhline(len(names) - len(growing) - 0.5, color="gray", linewidth=0.8, linestyle=":")
    labels = [f"{name} (cache grows)" if name in growing else name for name in names]
    axis.set_yticks(range(len(names)), labels)
    axis.set(xlim=(-2, 102), ylim=(-0.7, len(names) - 0.3))
    axis.set_xlabel("associative recall: % of the answers that are correct")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if names:
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def stored(settings: dict, runs: list[dict]) -> str:
    """As JSON, one line per run."""
    lines = ",\n  ".join(map(json.dumps, runs))
    return f'{{"settings": {json.dumps(settings)},\n "runs": [\n  {lines}\n]}}\n'


# ------------------------------------------------------------------------ the command
def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True)
    add("--data", required=True, help="chunks with a held-out split, of preprocess_chunk.py")
    add("--output_dir", type=Path, required=True)
    add(
        "--students",
        nargs="+",
        default=EVERYTHING,
        help="default: all, some of them calibrated too",
    )
    add("--seeds", type=int, default=3)
    add("--ratio", type=float, default=0.25, help="share of the layers that keep full attention")
    add("--stage1_steps", type=int, default=200)
    add("--stage2_steps", type=int, default=200)
    add("--batch_size", type=int, default=16, help="sequences per step")
    add("--lr_stage1", type=float, default=2e-3)
    add("--lr_stage2", type=float, default=1e-4)
    add("--lr_attn_stage2", type=float, default=1e-3)
    add("--eval_chunks", type=int, default=64)
    add(
        "--num_words",
        type=int,
        default=256,
        help="words of the tasks; as the teacher was trained on",
    )
    add("--shard", default="0/1", metavar="I/N", help="do only the I-th of N parts of the students")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, naming the option, for students and numbers that make no sense."""
    for name in args.students:
        base = name.removesuffix(CALIBRATED)
        if base not in STUDENT_ATTENTION_MAP:
            raise ValueError(f"--students: {base} is unknown; choose of {', '.join(STUDENT_ATTENTION_MAP)}")
    for name in args.students:
        if name.endswith(CALIBRATED) and not can_calibrate(name.removesuffix(CALIBRATED)):
            raise ValueError(f"--students: {name}: its o_proj is fused with its norm; leave {CALIBRATED} out")
    for name in ("seeds", "stage1_steps", "stage2_steps", "batch_size", "eval_chunks", "num_words"):
        value = getattr(args, name)
        if value < 1:
            raise ValueError(f"--{name}: {value} must be at least 1")


def read_shard(text: str) -> tuple[int, int]:
    """(I, N) of I/N. Raises ValueError for another text."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--shard: {text} must look like 0/4") from None
    if not 0 <= index < count:
        raise ValueError(f"--shard: {text} must be one of 0/{count} to {count - 1}/{count}")
    return index, count


def run_settings(args: argparse.Namespace) -> dict:
    """What the figures of a run depend on."""
    others = ("output_dir", "students", "seeds", "shard")
    return {name: value for name, value in sorted(vars(args).items()) if name not in others}


def report(args: argparse.Namespace, settings: dict, folder: Path) -> str:
    """Writes students.md and students.json of the runs that are there; returns the table."""
    wanted = [folder / f"{name}-seed{seed}.json" for name in args.students for seed in range(args.seeds)]
    runs = [json.loads(file.read_text()) for file in wanted if file.is_file()]
    text = table(runs, args.stage1_steps) if runs else ""
    if len(runs) < len(wanted):
        text += f"\n\n{len(wanted) - len(runs)} of {len(wanted)} runs are missing."
    (args.output_dir / "students.md").write_text(text + "\n")
    (args.output_dir / "students.json").write_text(stored(settings, runs))
    plot(runs, args.output_dir / "students.png")
    return text


def main() -> None:
    args = make_parser().parse_args()
    check(args)
    index, count = read_shard(args.shard)

    disable_progress_bar()  # transformers' own, a line for every file read
    settings = run_settings(args)
    check_same_settings(settings, args.output_dir)
    folder = args.output_dir / "runs"
    files = {}
    for name in args.students[index::count]:
        for seed in range(args.seeds):
            files[name, seed] = folder / f"{name}-seed{seed}.json"
    missing = {run: file for run, file in files.items() if not file.is_file()}
    # Before the folder is bound to settings that may be wrong.
    comparison = Comparison(args) if missing else None
    claim_folder(settings, args.output_dir)
    folder.mkdir(exist_ok=True)
    for (name, seed), file in tqdm(missing.items(), desc="runs", unit="run", disable=not missing):
        figures = comparison.run(name, seed)
        atomic_write_text(file, json.dumps(figures, indent=1) + "\n")
    print(report(args, settings, folder))


if __name__ == "__main__":
    run_main(main)

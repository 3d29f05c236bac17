"""All students at one token budget, with seeds: which to use.

    python benchmarks/recall_teacher.py --output_dir recall_out
    python benchmarks/compare_students.py --teacher recall_out/teacher --data recall_out/data/chunked_context512 \
        --output_dir recall_out/students

Each run is stage 1 of the all-linear student, then stage 2 of a hybrid that keeps evenly spaced layers. Its figures, on
held-out text and tasks, lie in <output_dir>/runs/<student>-seed<N>.json; run again, the command does only what is missing, and
--shard I/N does a part of it, for several processes at once. The table, of means and half ranges over seeds, is printed
and written to students.md, their recall is plotted in students.png, and all runs with their settings go to students.json
(docs/students.json: those of the documentation). `NAME+calibrated` starts as with train.calibrate_init. Students within the
best one's spread are marked as ties with it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for

import matplotlib
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.training import stage_1, stage_2
from convert import load_teacher
from convert.export_native import native_export_refusal
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM, can_calibrate
from layer_selection.ranking import budget, evenly_spaced
from quickstart.report import alignment, measure
from quickstart.train_teacher import token_ids
from recall_tasks import RECALL_TASKS, answer_accuracy

OPTIONS = {"swa_v1": {"window_size": 64}}  # its default sees all of a chunk
CALIBRATED, CALIBRATION_BATCHES, STATE_LENGTH = "+calibrated", 8, 256
QUESTIONS = 64  # documents of each task
RECALL_SERIES = [
    ("all_linear_recall", "every layer a student layer, after stage 1", "#c98a2b"),
    ("associative_recall", "hybrid, after stage 2", "#3f6fb5"),
]


@torch.no_grad()
def state_bytes(model: StudentForCausalLM, layer: int, length: int) -> int:
    """What a layer's cache holds after `length` tokens of one sequence, in bytes."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    cache = model.model(ids, use_cache=True).past_key_values

    def size(x) -> int:
        if isinstance(x, torch.Tensor):
            return x.numel() * x.element_size()
        return sum(map(size, x.values() if isinstance(x, dict) else x)) if isinstance(x, (dict, list, tuple)) else 0

    return size(cache[layer])


class Bench:
    """What all runs share: teacher, data, questions and settings."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.teacher, self.tokenizer = (
            load_teacher(args.teacher, dtype).to(self.device).eval(),
            load_tokenizer(args.teacher),
        )
        chunks = open_chunks_for(
            self.tokenizer,
            self.teacher.config.vocab_size,
            args.data,
            key="--data",
            model_key="--teacher",
        )
        context = chunks.metadata["context_length"]
        self.train = chunks.train
        self.heldout = token_ids(chunks.heldout, range(min(args.eval_chunks, len(chunks.heldout)))).to(self.device)
        self.hidden = self.hidden_states(self.heldout)
        self.kept = evenly_spaced(budget(args.ratio, layers := self.teacher.config.num_hidden_layers), layers)
        # The hardest questions that fit: a document of a task is at most as long as a chunk.
        size = context // 8
        rng, options = (
            random.Random(1),
            {
                "associative_recall": {"num_pairs": size},
                "copying": {"length": 2 * size},
                "multi_hop_recall": {"num_chains": 3 * size // 8},
            },
        )
        self.questions = {
            task: [RECALL_TASKS[task](rng, num_words=args.num_words, **options[task]) for _ in range(QUESTIONS)]
            for task in RECALL_TASKS
        }

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.teacher.model(batch, use_cache=False).last_hidden_state for batch in ids.split(8)])

    def batches(self, seed: str, size: int, count: int) -> list[torch.Tensor]:
        """The same for every student of a seed."""
        rows = [random.Random(f"{seed} {i}").sample(range(len(self.train)), size) for i in range(count)]
        return (token_ids(self.train, row).to(self.device) for row in rows)

    def accuracy(self, model: StudentForCausalLM) -> dict[str, float]:
        return {task: answer_accuracy(model.eval(), self.tokenizer, asked) for task, asked in self.questions.items()}

    def hybrid(self, student: StudentForCausalLM) -> StudentForCausalLM:
        return student.restore_full_attention(self.teacher, self.kept).to(self.device).eval()

    def kl(self, model: StudentForCausalLM) -> float:
        return measure(model, self.teacher, self.heldout, self.hidden)[1]

    def run(self, name: str, seed: int) -> dict:
        """Both stages of a student; its figures."""
        args, begin = self.args, time.perf_counter()
        torch.manual_seed(seed)
        student_name = name.removesuffix(CALIBRATED)
        student = StudentForCausalLM.from_teacher(self.teacher, student_name, (), OPTIONS.get(student_name))[0].to(
            self.device
        )
        calibration = name.endswith(CALIBRATED) and list(
            self.batches(f"calibration {seed}", args.batch_size, CALIBRATION_BATCHES)
        )
        figures = {
            "student": name,
            "seed": seed,
            "native_export": native_export_refusal(self.hybrid(student).config) is None,
        }
        half = args.stage1_steps // 2
        for step in stage_1(
            self.teacher,
            student,
            self.batches(f"stage 1 {seed}", args.batch_size, args.stage1_steps),
            args.stage1_steps,
            args.lr_stage1,
            (0, half, args.stage1_steps),
            calibration or None,
        ):
            figures[f"hybrid_kl_after_{step}"] = self.kl(self.hybrid(student.eval()))
            student.train()
        errors = alignment(student.eval(), self.teacher, self.heldout[:16])
        figures |= {
            "alignment_error": sum(errors) / len(errors),
            "all_linear_kl": self.kl(student),
            "all_linear_recall": self.accuracy(student)["associative_recall"],
        }
        hybrid = self.hybrid(student)
        stage_2(
            self.teacher,
            hybrid,
            self.batches(f"stage 2 {seed}", args.batch_size, args.stage2_steps),
            args.stage2_steps,
            args.lr_stage2,
            args.lr_attn_stage2,
        )
        layer = hybrid.config.linear_layers[0]
        attention = hybrid.model.layers[layer].attn
        loss, kl, agreement = measure(hybrid.eval(), self.teacher, self.heldout, self.hidden)
        sizes = [state_bytes(hybrid, layer, n) for n in (STATE_LENGTH, 2 * STATE_LENGTH)]
        return figures | {
            "loss": loss,
            "kl": kl,
            "agreement": agreement,
            **self.accuracy(hybrid),
            "state_bytes": sizes[0],
            "state_grows": sizes[1] > sizes[0],
            "parameters": sum(p.numel() for p in attention.parameters()),
            "seconds": round(time.perf_counter() - begin, 1),
        }


def spread(values: list[float], digits: int, percent: bool = False) -> str:
    """mean ± half the range."""
    scale, digits = (100, 1) if percent else (1, digits)
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean * scale:.{digits}f} ± {half * scale:.{digits}f}"


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
        "| student | alignment error | KL, half of stage 1 | after stage 1 | after stage 2 | recall | two-hop recall | copying | "
        "state per layer | parameters per layer | native export |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for name, runs in students.items():
        column = {key: [run[key] for run in runs] for key in runs[0] if key != "student"}
        tie = " *" if min(column["kl"]) <= highest else ""
        grows = " at 256 tokens, grows" if runs[0]["state_grows"] else ""
        lines.append(
            f"| `{name}`{tie} | {spread(column['alignment_error'], 3)} | "
            f"{spread(column[f'hybrid_kl_after_{stage1_steps // 2}'], 2)} | "
            f"{spread(column[f'hybrid_kl_after_{stage1_steps}'], 2)} | {spread(column['kl'], 3)} | "
            + "".join(f"{spread(column[task], 1, percent=True)} % | " for task in RECALL_TASKS)
            + f"{runs[0]['state_bytes'] / 1024:.0f} KiB{grows} | {runs[0]['parameters'] / 1e6:.2f}M | "
            f"{'yes' if runs[0]['native_export'] else ''} |"
        )
    return "\n".join(lines)


def plot_order(students: dict[str, list[dict]]) -> list[str]:
    """The names of students whose cache grows, then those of the others; by the hybrid's mean recall, the best first."""

    def key(name: str) -> tuple:
        runs = students[name]
        means = [
            statistics.fmean(run[series] for run in runs) for series in ("associative_recall", "all_linear_recall")
        ]
        return not runs[0]["state_grows"], *(-mean for mean in means)

    return sorted(students, key=key)


def plot(runs: list[dict], path: Path, teacher: tuple[str, float] | None = None) -> None:
    """Associative recall of each student, with student layers only and as a hybrid, and of the teacher.

    teacher: its label and recall. A dot is the mean over the seeds, the bar behind it their range. Students whose cache grows stand apart.
    """
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
    """As JSON, a line a run."""
    lines = ",\n  ".join(map(json.dumps, runs))
    return f'{{"settings": {json.dumps(settings)},\n "runs": [\n  {lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="chunks with a held-out part, of preprocess_chunk.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    everything = [
        *STUDENT_ATTENTION_MAP,
        *(name + CALIBRATED for name in ("gdn_v4", "gdn_v7", "gdn_v8")),
    ]
    parser.add_argument(
        "--students",
        nargs="+",
        default=everything,
        help="default: all, some of them calibrated too",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the layers that keep full attention")
    parser.add_argument("--stage1_steps", type=int, default=200)
    parser.add_argument("--stage2_steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16, help="sequences a step")
    parser.add_argument("--lr_stage1", type=float, default=2e-3)
    parser.add_argument("--lr_stage2", type=float, default=1e-4)
    parser.add_argument("--lr_attn_stage2", type=float, default=1e-3)
    parser.add_argument("--eval_chunks", type=int, default=64)
    parser.add_argument("--num_words", type=int, default=256, help="words of the tasks; as the teacher learnt them")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do only the I-th of N parts of the students")
    args = parser.parse_args()
    names = [name.removesuffix(CALIBRATED) for name in args.students]
    if unknown := [name for name in names if name not in STUDENT_ATTENTION_MAP]:
        raise ValueError(f"--students: {unknown[0]} is unknown; choose of {', '.join(STUDENT_ATTENTION_MAP)}")
    if fused := [
        name for name in args.students if name.endswith(CALIBRATED) and not can_calibrate(name.removesuffix(CALIBRATED))
    ]:
        raise ValueError(f"--students: {fused[0]}: its o_proj is fused with its norm; leave {CALIBRATED} out")
    for name in ("seeds", "stage1_steps", "stage2_steps", "batch_size", "eval_chunks", "num_words"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name}: {value} must be at least 1")
    try:
        index, count = map(int, args.shard.split("/"))
    except ValueError:
        raise ValueError(f"--shard: {args.shard} must look like 0/4") from None
    if not 0 <= index < count:
        raise ValueError(f"--shard: {args.shard} must be one of 0/{count} to {count - 1}/{count}")

    disable_progress_bar()  # transformers' own, a line for every file read
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in ("output_dir", "students", "seeds", "shard")}
    folder, kept_settings = args.output_dir / "runs", args.output_dir / "settings.json"
    if kept_settings.is_file() and (found := json.loads(kept_settings.read_text())) != settings:
        name = next(k for k in settings if settings[k] != found.get(k))
        raise ValueError(
            f"--output_dir: {args.output_dir} holds runs with {name} {found.get(name)!r}, not {settings[name]!r}; "
            "name another"
        )
    mine = [(name, seed) for name in args.students[index::count] for seed in range(args.seeds)]
    todo = [(name, seed) for name, seed in mine if not (folder / f"{name}-seed{seed}.json").is_file()]
    bench = Bench(args) if todo else None  # before the folder is bound to settings that may be wrong
    folder.mkdir(parents=True, exist_ok=True)
    kept_settings.write_text(json.dumps(settings, indent=1) + "\n")
    if todo:
        for name, seed in tqdm(todo, desc="runs", unit="run"):
            figures = bench.run(name, seed)
            partial = folder / f".{name}-seed{seed}.partial"
            partial.write_text(json.dumps(figures, indent=1) + "\n")
            partial.rename(folder / f"{name}-seed{seed}.json")
    wanted = [folder / f"{name}-seed{seed}.json" for name in args.students for seed in range(args.seeds)]
    runs = [json.loads(file.read_text()) for file in wanted if file.is_file()]
    text = table(runs, args.stage1_steps) if runs else ""
    if len(runs) < len(wanted):
        text += f"\n\n{len(wanted) - len(runs)} of {len(wanted)} runs are missing."
    (args.output_dir / "students.md").write_text(text + "\n")
    (args.output_dir / "students.json").write_text(stored(settings, runs))
    plot(runs, args.output_dir / "students.png")
    print(text)


if __name__ == "__main__":
    run_main(main)

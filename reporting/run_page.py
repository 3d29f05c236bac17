"""The report of one run folder."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from runtime.config import dump_config
from runtime.files import atomic_write_text
from runtime.run_folder import EXPORT, INIT_REPORT

from evaluation.tables import FIGURES, cell_text

from .figures import alignment_figure, loss_curves, progress_curves
from .page import note, page, table
from .run_record import RunRecord, read_run

REPORT = "report.html"
ALIGNMENT_NOTE = (
    "Squared error of each layer's linear attention over the variance of the teacher's attention output: 0 is the "
    "teacher's output, 1 is as good as its mean."
)


def number(value: float) -> str:
    return f"{value:.4g}"


def facts_table(run: RunRecord) -> str:
    """Model, data, schedule and speed."""
    config = run.config
    student = config.student_model
    train = config.train
    last = run.metrics[-1]
    tokens = last.get("tokens", 0)
    kept = student.keep_full_attention_layers
    layers = f"full attention in layers {kept}" if kept else "all layers"
    rows = {
        "teacher": config.teacher_model.name,
        "student": f"{student.name}; {layers}",
        "data": f"{config.data.cache_dir}, {train.train_seq_len} tokens per sequence",
        "steps": f"{last['step']}, {train.batch_size} sequences each",
        "tokens": f"{tokens:,}",
        "device": f"{run.facts.get('world_size', 1)} x {run.facts.get('device', 'unknown')}",
    }
    if seconds := last.get("seconds"):
        rows["time"] = f"{seconds:,.0f} s, {tokens / seconds:,.0f} tokens/s on average"
    speeds = [value for _, value in run.curve("mfu")]
    if speeds:
        rows["MFU"] = f"{speeds[-1]:.1%} at the last step"
    return table(("", ""), rows.items(), "text")


def heldout_table(run: RunRecord) -> str:
    """Training and held-out loss, first and last."""
    rows = []
    for name, label in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        if curve := run.curve(name):
            ends = [f"{number(value)} (step {step})" for step, value in (curve[0], curve[-1])]
            rows.append((label, *ends))
    return table(("", "first", "last"), rows) if rows else ""


def evaluation_table(run: RunRecord) -> str:
    """Results of evaluate.py and lm-evaluation-harness that lie in the run folder."""
    rows = []
    for result in run.evaluations:
        name = FIGURES.get(result["task"], result["task"])
        length = str(result.get("seq_len") or "")
        score = cell_text({"stderr": None, **result})
        rows.append((name, length, result.get("metric", ""), score))
    return table(("task", "length", "metric", "score"), rows) if rows else ""


def folded(title: str, text: str) -> str:
    """A text that a click unfolds."""
    summary = f"<summary>{escape(title)}</summary>"
    return f"<details>{summary}<pre>{escape(text)}</pre></details>"


def environment(run: RunRecord) -> str:
    facts = run.facts
    packages = facts.get("versions", {})
    versions = [(package, version or "not installed") for package, version in packages.items()]
    rows = [
        ("started", str(facts.get("started"))),
        ("commit", facts.get("git") or "unknown"),
        ("Python", str(facts.get("python"))),
        *versions,
    ]
    command = " ".join(facts.get("command", []))
    config = folded("Resolved config", dump_config(run.config))
    return f"<pre>{escape(command)}</pre>" + table(("", ""), rows, "text") + config


def initialisation(run: RunRecord) -> str:
    """Where the student's tensors came from, of stage 1."""
    file = run.folder / INIT_REPORT
    if not file.is_file():
        return ""
    return folded(INIT_REPORT, json.dumps(json.loads(file.read_text()), indent=1))


def samples_section(samples: list[tuple[str, str]]) -> str:
    """Held-out beginnings, bold, and what the model continues them with."""
    return "".join(f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" for prompt, text in samples)


def alignment_section(run: RunRecord, kept: list[int] | None = None) -> str:
    steps, errors = run.layer_errors()
    figure = alignment_figure(steps, errors, kept or [])
    return figure + note(ALIGNMENT_NOTE) if figure else ""


def run_sections(run: RunRecord, samples: list[tuple[str, str]]) -> dict[str, str]:
    return {
        "Run": facts_table(run),
        "Loss": heldout_table(run) + loss_curves({run.title: (run.curve("loss"), run.curve("eval_loss"))}),
        "Progress": progress_curves(run),
        "Alignment of each layer's attention": alignment_section(run),
        "Evaluation": evaluation_table(run),
        "Samples": samples_section(samples),
        "Initialisation of the students": initialisation(run),
        "Environment": environment(run),
    }


def write_run_report(folder: Path, samples: int = 0) -> Path:
    """Writes `folder`/report.html and returns its path. Raises ValueError if `folder` is no run
    folder.

    samples: how many held-out beginnings the run's export continues; it is loaded for that.
    """
    run = read_run(folder)
    texts = []
    if samples:
        from .samples import continuations

        texts = continuations(run, samples)
    finished = (folder / EXPORT).is_dir()
    introduction = note(f"{folder}" + ("" if finished else "; not finished, nothing exported yet"))
    path = folder / REPORT
    atomic_write_text(path, page(run.title, introduction, run_sections(run, texts)))
    return path

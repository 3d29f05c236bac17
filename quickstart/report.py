"""The quickstart's report: every model measured on held-out text, its recall, its answers, its
decoding speed.

    python -m quickstart.report --out quickstart_out --teacher quickstart/teacher --recall

It writes report.html, report.json and report.txt, the table that quickstart.sh prints last. The
exit code is 1 if one of the measures fails (`recall_measures`, `heldout_measures`,
`loss_measures`), unless --tiny.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for, read_batch, split_batch

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher
from distill_model import StudentForCausalLM
from evaluation.own_tasks import recall_documents
from evaluation.tables import FIGURES, cell_text
from evaluation.tables import rows as evaluation_rows
from heldout import read_chunks
from quickstart.checks import (
    ALL_LINEAR,
    EVEN,
    HYBRID,
    LONG,
    RESTORED,
    TEACHER,
    UNTRAINED,
    Check,
    heldout_measures,
    loss_measures,
    recall_measures,
)
from quickstart.decoding_figure import decoding_figure
from quickstart.measure import (
    BATCH_SIZE,
    Decoding,
    HeldoutData,
    ModelFigures,
    answer,
    decoding,
    figures_of,
    generated,
)
from quickstart.train_teacher import unigram_entropy
from recall_tasks import Document
from reporting.figures import loss_curves
from reporting.page import note, page, table
from reporting.run_page import alignment_section, environment
from reporting.run_record import read_run

SHOWN_LAST = (TEACHER, ALL_LINEAR, EVEN, HYBRID, LONG)  # in the terminal

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 60
QUESTIONS = {"associative_recall": 2, "multi_hop_recall": 1}  # shown with the answers of the models


STAGE_3_NOTE = "Stage 3 trains on text, without the teacher: the loss on text falls, the KL to the teacher rises."
DECODING_NOTE = "Measured in this run, for one sequence after as many random tokens: the median token's time."


@dataclass(frozen=True)
class Sample:
    """A text and how the models continue it. expected: the right answer, or None where there is
    none."""

    prompt: str
    written: dict[str, str]
    expected: str | None = None


# ---------------------------------------------------------------------------------- measuring
class Quickstart:
    """The quickstart's folder: its models, and the data that they are measured on."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(args.teacher, "--teacher")
        self.teacher = load_teacher(args.teacher).to(self.device).eval()
        self.runs = {stage: read_run(args.out / f"stage{stage}") for stage in (1, 2, 3)}
        self.kept = self.runs[2].config.student_model.keep_full_attention_layers

    def heldout(self, stage: int, count: int) -> dict[str, torch.Tensor]:
        """At most `count` held-out sequences of a stage's data."""
        config = self.runs[stage].config
        vocab_size = self.teacher.config.vocab_size
        chunks = open_chunks_for(
            self.tokenizer,
            vocab_size,
            config.data.cache_dir,
            config.train.train_seq_len,
            document_mask=config.data.document_mask,
        ).heldout
        batch = read_batch(chunks, range(min(count, len(chunks))))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def data(self) -> HeldoutData:
        args = self.args
        chunks = split_batch(self.heldout(2, args.chunks), BATCH_SIZE)
        long_chunks = split_batch(self.heldout(3, max(1, args.chunks // 4)), BATCH_SIZE // 2)
        documents = self.documents("associative_recall")[: args.chunks] if args.recall else []
        outputs = [read_chunks(self.teacher, batch) for batch in chunks]
        return HeldoutData(chunks, long_chunks, outputs, documents)

    def documents(self, task: str) -> list[Document]:
        """Those of evaluate.py at the context length of stage 2."""
        length = self.runs[2].config.train.train_seq_len
        return recall_documents(task, length, self.args.num_words, self.tokenizer)

    def exported(self, name: str) -> StudentForCausalLM:
        folder = self.args.out / name / "converted-hf"
        model = StudentForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(self.device).eval()

    def untrained(self) -> StudentForCausalLM:
        student = self.runs[1].config.student_model
        torch.manual_seed(0)
        model, _ = StudentForCausalLM.from_teacher(self.teacher, student.name, [], student.options)
        return model.to(self.device).eval()

    def restored(self) -> StudentForCausalLM:
        return self.exported("stage1").restore_full_attention(self.teacher, self.kept).to(self.device).eval()

    def models(self) -> dict[str, Callable[[], StudentForCausalLM]]:
        """Name -> what loads or builds it."""
        found = {
            TEACHER: lambda: self.teacher,
            UNTRAINED: self.untrained,
            ALL_LINEAR: lambda: self.exported("stage1"),
            RESTORED: self.restored,
            EVEN: lambda: self.exported("even"),
            HYBRID: lambda: self.exported("stage2"),
            LONG: lambda: self.exported("stage3"),
        }
        if not (self.args.out / "even").is_dir():  # left out with --tiny, and without recall
            del found[EVEN]
        return found

    def question(self, models: dict[str, StudentForCausalLM], document: Document) -> Sample:
        """A document's last question, with the answer of every model."""
        written = {name: answer(model, self.tokenizer, document) for name, model in models.items()}
        return Sample(document.prompt, written, document.answer)

    def samples(self, models: dict[str, StudentForCausalLM], ids: torch.Tensor) -> list[Sample]:
        """Questions with the models' answers where the teacher recalls, else continuations of
        held-out text."""
        if self.args.recall:
            return [
                self.question(models, document)
                for task, count in QUESTIONS.items()
                for document in self.documents(task)[-count:]
            ]
        prompt = self.tokenizer.decode(ids[len(ids) // 2, :PROMPT_TOKENS])
        written = {name: generated(model, self.tokenizer, prompt, SAMPLE_TOKENS) for name, model in models.items()}
        return [Sample(prompt, written)]


# ---------------------------------------------------------------------------------- the report
def number(value: float | None, kind: str) -> str:
    return "" if value is None else format(value, kind)


def summary(results: dict[str, ModelFigures], speeds: list[Decoding], names: tuple[str, ...]) -> tuple[list, list]:
    """(head, rows) of the models' table; the cache and the speed are those at the longest
    context."""
    context = max(speed.context for speed in speeds)
    at_context = {speed.name: speed for speed in speeds if speed.context == context}
    keys = ("associative_recall", "heldout_kl", "top1_agreement")
    head = ["model", *(FIGURES[key] for key in keys)]
    head += [f"cache at {context:,} tokens", "decode tokens/s"]
    rows = []
    for name in names:
        figures = results[name]
        row = [
            name,
            number(figures.associative_recall, ".1%"),
            f"{figures.heldout_kl:.4f}",
            f"{figures.top1_agreement:.1%}",
        ]
        if speed := at_context.get(name):
            row += [f"{speed.cache_bytes / 2**20:.2f} MiB", f"{speed.tokens_per_second:,.0f}"]
        else:
            row += ["", ""]
        rows.append(row)
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def marked(sample: Sample) -> str:
    """A question's prompt as HTML: the question bold, and the pair that answers it marked where it
    stands."""
    context, _, question = sample.prompt.rpartition(",")
    first_word = sample.expected.split()[0]
    pair = escape(f"{question} {first_word}")
    context = escape(context).replace(pair, f"<mark>{pair}</mark>", 1)
    return f"{context},<b>{escape(question)} ...?</b>"


def sample_section(samples: list[Sample]) -> str:
    parts = []
    for sample in samples:
        if sample.expected is None:
            for name, text in sample.written.items():
                written = f"<b>{escape(sample.prompt)}</b>{escape(text)}"
                parts.append(f"<h3>{escape(name)}</h3><pre>{written}</pre>")
            continue
        answers = []
        for name, text in sample.written.items():
            verdict = ("good", "right") if text == sample.expected else ("bad", "wrong")
            cells = f"<td>{escape(name)}</td><td><code>{escape(text)}</code></td>"
            answers.append(f'<tr>{cells}<td class="{verdict[0]}">{verdict[1]}</td></tr>')
        parts.append(f'<pre>{marked(sample)}</pre><table class="text">{"".join(answers)}</table>')
    return "".join(parts)


def selection_section(out: Path, kept: list[int]) -> str:
    ranking = json.loads((out / "selection" / "ranking.json").read_text())
    rows = []
    for layer in ranking["layers"]:
        mark = "kept" if layer["layer"] in kept else ""
        rows.append([str(layer["layer"]), f"{-layer['importance']:.4f}", mark])
    text = (
        f"layer_selection/select_layers.py --method {ranking['method']}: held-out KL to the teacher "
        "with full attention restored in that layer alone, without training. The layers with the "
        "lowest keep full attention."
    )
    return table(("layer", FIGURES["heldout_kl"], ""), rows) + note(text)


def evaluation_section(out: Path) -> str:
    results = json.loads((out / "evaluation" / "results.json").read_text())
    rows = []
    for row in evaluation_rows(results):
        cells = [cell_text(row.cells.get(label)) for label in results]
        rows.append([row.title, str(row.seq_len or ""), row.metric, *cells])
    return table(("task", "length", "metric", *results), rows) + note(
        "By evaluate.py, as for any checkpoint.",
    )


def measures_section(checks: list[Check]) -> str:
    items = []
    for text, met in checks:
        kind, word = ("good", "met") if met else ("failed", "FAILED")
        items.append(f'<li><span class="{kind}">{word}</span>: {escape(text)}</li>')
    return f"<ul>{''.join(items)}</ul>"


def introduction(recall: bool, kept: list[int]) -> str:
    layers = f"layers {' and '.join(map(str, kept))}"
    if not recall:
        return note(f"The hybrid keeps full attention in {layers}. Losses and KL in nats per token, on held-out text.")
    return note(
        "The teacher answers questions about words that it has read. The same model with linear "
        f"attention in every layer cannot. The hybrid, with full attention in {layers} alone, can, "
        "with a smaller cache. Held-out KL in nats per token, on documents that no student was "
        "trained on; they are made like those of the training data."
    )


def losses_table(quickstart: Quickstart, results: dict[str, ModelFigures]) -> str:
    """Held-out loss at both context lengths."""
    lengths = [quickstart.runs[stage].config.train.train_seq_len for stage in (2, 3)]
    rows = [[r.name, f"{r.heldout_loss:.3f}", f"{r.long_loss:.3f}"] for r in results.values()]
    return table(("model", *(f"{length} tokens" for length in lengths)), rows)


def report_page(
    quickstart: Quickstart,
    results: dict[str, ModelFigures],
    speeds: list[Decoding],
    samples: list[Sample],
    checks: list[Check],
) -> str:
    out = quickstart.args.out
    runs = quickstart.runs
    kept = quickstart.kept
    recall = quickstart.args.recall
    head, rows = summary(results, speeds, tuple(results))
    curves = {run.title: (run.curve("loss"), run.curve("eval_loss")) for run in runs.values()}
    sections = {
        "Models": table(head, rows) + note(STAGE_3_NOTE),
        "Questions and answers" if recall else "Samples": sample_section(samples),
        "Cache and decoding speed": decoding_figure(speeds) + note(DECODING_NOTE),
        "What must be seen": measures_section(checks),
        "Which layers keep full attention": selection_section(out, kept),
        "Training": loss_curves(curves),
        "Alignment of each layer's attention in stage 1": alignment_section(runs[1], kept),
        FIGURES["heldout_loss"].capitalize(): losses_table(quickstart, results),
        "Evaluation": evaluation_section(out),
        "Environment": environment(runs[2]),
    }
    return page("From a softmax teacher to a hybrid", introduction(recall, kept), sections)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--teacher", required=True)
    parser.add_argument(
        "--recall",
        action="store_true",
        help="the teacher recalls: measure that too",
    )
    parser.add_argument(
        "--num_words",
        type=int,
        default=64,
        help="of the recall documents (%(default)s)",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=64,
        help="held-out chunks and documents (%(default)s)",
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[256, 1024, 4096, 16384],
        help="to decode after",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="measure, but exit with 0 whatever was seen",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file read
    start = time.monotonic()
    quickstart = Quickstart(args)
    data = quickstart.data()
    results = {}
    shown = {}
    for name, build in tqdm(quickstart.models().items(), desc="models", unit="model"):
        model = build()
        results[name] = figures_of(name, model, quickstart.tokenizer, data)
        if name in (TEACHER, ALL_LINEAR, HYBRID):
            shown[name] = model
    samples = quickstart.samples(shown, data.ids)
    pairs = [(name, context) for context in args.contexts for name in shown]
    bar = tqdm(pairs, desc="decoding")
    speeds = [decoding(name, shown[name], context) for name, context in bar]
    curves = {stage: run.curve("eval_loss") for stage, run in quickstart.runs.items()}
    checks = heldout_measures(results, unigram_entropy(data.ids.cpu())) + loss_measures(curves)
    if args.recall:
        checks = recall_measures(results) + checks
    names = tuple(name for name in SHOWN_LAST if name in results)
    html = report_page(quickstart, results, speeds, samples, checks)
    (args.out / "report.html").write_text(html, encoding="utf-8")
    (args.out / "report.txt").write_text(markdown(*summary(results, speeds, names)))
    content = {
        "models": [asdict(figures) for figures in results.values()],
        "decoding": [asdict(speed) for speed in speeds],
        "kept": quickstart.kept,
        "samples": [asdict(sample) for sample in samples],
        "measures": checks,
    }
    (args.out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    for check, met in checks:
        print(f"{'met   ' if met else 'FAILED'}  {check}")
    print(f"Report: {args.out / 'report.html'}, {time.monotonic() - start:.0f} s")
    return int(not args.tiny and not all(met for _, met in checks))


if __name__ == "__main__":
    run_main(main)

"""What the quickstart achieved: every model on the way measured on held-out text, as a table and as report.html.

    python -m quickstart.report --out quickstart_out

It writes report.html, report.json and report.txt, the table that quickstart.sh prints last.
The models are the teacher, the all-linear student before and after stage 1, the hybrid before and after stage 2, and
the hybrid after stage 3. The exit code is 1 if a measure fails (`measures`), unless --tiny.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher
from distill_model import StudentForCausalLM
from evaluation.tables import cell_text
from evaluation.tables import rows as evaluation_rows

STAGES = {
    1: "Stage 1: attention alignment",
    2: "Stage 2: logit distillation",
    3: "Stage 3: longer context",
}
PROMPT_TOKENS, SAMPLE_TOKENS, BATCH_SIZE = 24, 60, 8


@dataclass
class Result:
    """A model's held-out figures: loss and KL in nats a token, next-token agreement with the
    teacher, text."""

    name: str
    loss: float
    kl: float
    agreement: float
    long_loss: float
    sample: str


@torch.no_grad()
def measure(
    model: StudentForCausalLM, teacher: StudentForCausalLM, ids: torch.Tensor, hidden: torch.Tensor
) -> tuple[float, float, float]:
    """(loss, KL(teacher || model), share of positions with the teacher's argmax) over ids [N, T].

    hidden [N, T, H]: the teacher's hidden states on them, after its final norm.
    """
    loss = kl = agreement = 0.0
    for batch, teacher_hidden in zip(ids.split(BATCH_SIZE), hidden.split(BATCH_SIZE)):
        ours = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        theirs = teacher.lm_head(teacher_hidden).float().log_softmax(-1)
        loss -= ours[:, :-1].gather(-1, batch[:, 1:, None]).mean().item() * len(batch)
        kl += (theirs.exp() * (theirs - ours)).sum(-1).mean().item() * len(batch)
        agreement += (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item() * len(batch)
    return loss / len(ids), kl / len(ids), agreement / len(ids)


@torch.no_grad()
def mean_loss(model: StudentForCausalLM, ids: torch.Tensor) -> float:
    """Mean next-token cross-entropy over ids [N, T]."""
    losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() * len(b) for b in ids.split(BATCH_SIZE // 2)]
    return sum(losses) / len(ids)


@torch.no_grad()
def alignment(student: StudentForCausalLM, teacher: StudentForCausalLM, ids: torch.Tensor) -> list[float]:
    """Per layer: the mean squared error of the student's attention, fed the teacher's hidden
    states, over the variance of the teacher's attention output, its mean squared deviation from
    each feature's mean over the tokens. 0 is perfect, 1 as good as a constant. Stage 1 logs the
    same as layer_error/00 ..."""
    errors = []

    def compare(index):
        def hook(module, args, kwargs, output):
            ours = student.model.layers[index].attn(*args, **kwargs)[0]
            theirs = output[0].flatten(0, 1)
            errors.append(((ours.flatten(0, 1) - theirs).square().mean() / theirs.var(0, correction=0).mean()).item())

        return hook

    hooks = [
        layer.attn.register_forward_hook(compare(i), with_kwargs=True) for i, layer in enumerate(teacher.model.layers)
    ]
    try:
        teacher.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@torch.no_grad()
def sample(model: StudentForCausalLM, tokenizer, prompt: torch.Tensor) -> str:
    """The greedy continuation of prompt [1, T]."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id or 0,
    )
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def read_losses(run_folder: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """((step, training loss) ..., (step, held-out loss) ...) from a run folder's metrics.jsonl.

    Where a step was logged twice, by a run that was interrupted and resumed, the later line counts.
    """
    train, heldout = {}, {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            train[int(record["step"])] = float(record["loss"])
        if "eval_loss" in record:
            heldout[int(record["step"])] = float(record["eval_loss"])
    return sorted(train.items()), sorted(heldout.items())


def read_layer_errors(run_folder: Path) -> tuple[list[int], list[list[float]]]:
    """(steps, for each of them the relative error of every layer) from stage 1's metrics.jsonl, of
    held-out text if it has that."""
    found = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for prefix in ("layer_error/", "eval_layer_error/"):
            if errors := [record[name] for name in sorted(record) if name.startswith(prefix)]:
                found.setdefault(prefix, {})[int(record["step"])] = errors
    curves = found.get("eval_layer_error/") or found.get("layer_error/") or {}
    steps = sorted(curves)
    return steps, [curves[step] for step in steps]


def per_step(curve: list[tuple[int, float]]) -> list[float]:
    """The loss of every step, from a curve whose points are means over the steps since the point
    before."""
    starts = [0, *(step for step, _ in curve)]
    return [loss for start, (step, loss) in zip(starts, curve) for _ in range(step - start)]


def measures(
    results: list[Result], losses: dict[int, list[tuple[int, float]]], teacher: dict
) -> list[tuple[str, bool]]:
    """Each thing that must be seen, with whether it was.

    results: as `main` builds them, the teacher first. losses: training losses by stage. teacher:
    train_teacher's json.
    """
    reference, before1, after1, before2, after2, _ = results
    checks = [
        (
            f"teacher: held-out loss {teacher['heldout_loss']:.3f} at least 0.5 under the unigram entropy "
            f"{teacher['unigram_entropy']:.3f}",
            teacher["heldout_loss"] <= teacher["unigram_entropy"] - 0.5,
        )
    ]
    for stage, curve in losses.items():
        steps = per_step(curve)
        tenth = max(1, len(steps) // 10)
        first, last = sum(steps[:tenth]) / tenth, sum(steps[-tenth:]) / tenth
        text = f"stage {stage}: mean loss of the last tenth {last:.4f} below the first's {first:.4f}"
        checks.append((text, last < first))
    for worse, better in ((before1, after1), (after1, before2), (before2, after2)):
        checks.append(
            (
                f"KL falls: {worse.name} {worse.kl:.4f} > {better.name} {better.kl:.4f}",
                better.kl < worse.kl,
            )
        )
    checks.append(
        (
            f"KL after stage 2 {after2.kl:.4f} at most half of that after stage 1 {after1.kl:.4f}",
            after2.kl <= after1.kl / 2,
        )
    )
    excess = after2.loss / reference.loss - 1
    checks.append((f"held-out loss after stage 2 within 2 % of the teacher's: {excess:+.2%}", excess <= 0.02))
    return checks


def table(results: list[Result], long_context: int) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| model | held-out loss | KL to teacher | same next token | loss at {long_context} |",
        "|:--|--:|--:|--:|--:|",
    ]
    lines += [f"| {r.name} | {r.loss:.3f} | {r.kl:.4f} | {r.agreement:.1%} | {r.long_loss:.3f} |" for r in results]
    return "\n".join(lines)


def picture(figure) -> str:
    """A matplotlib figure as an <img> that needs no file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def loss_curves(curves: dict[int, tuple[list, list]], teacher_losses: list[float]) -> str:
    """One panel for the teacher, one a stage: training loss, and held-out loss where it was
    measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3))
    axes = figure.subplots(1, 1 + len(curves))
    axes[0].plot(range(1, len(teacher_losses) + 1), teacher_losses, lw=0.8, color="#4a6fa5")
    axes[0].set_title("Teacher: next-token loss", fontsize=10)
    for axis, (stage, (train, heldout)) in zip(axes[1:], curves.items()):
        axis.plot(*zip(*train), lw=0.9, color="#4a6fa5", label="training")
        if heldout:
            axis.plot(*zip(*heldout), "o-", ms=3, lw=1.2, color="#c8553d", label="held-out")
        axis.set_title(STAGES[stage], fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return picture(figure)


def alignment_figure(
    before: list[float],
    after: list[float],
    kept: list[int],
    steps: list[int],
    errors: list[list[float]],
) -> str:
    """Per layer, the relative error of the linear attention before and after stage 1, and during
    it. errors: see `read_layer_errors`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2))
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = range(len(before))
    bars.bar([i - 0.2 for i in layers], before, 0.38, color="#d9b382", label="before stage 1")
    bars.bar([i + 0.2 for i in layers], after, 0.38, color="#4a6fa5", label="after stage 1")
    bars.set_xticks(list(layers), [f"{i}\nkept" if i in kept else str(i) for i in layers])
    bars.set_xlabel("layer", fontsize=9)
    bars.set_ylabel("error / variance of the teacher's output", fontsize=8)
    bars.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))  # above the bars
    for i in layers:
        color = colormaps["viridis"](i / max(1, len(before) - 1) * 0.9)
        curves.plot(
            steps,
            [error[i] for error in errors],
            "o-",
            ms=2.5,
            lw=1,
            color=color,
            label=f"layer {i}",
        )
    curves.set_title("During stage 1", fontsize=10)
    curves.set_xlabel("step", fontsize=9)
    curves.legend(
        fontsize=7,
        frameon=False,
        ncols=-(-len(before) // 12),
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    for axis in (bars, curves):
        axis.set_yscale("log")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return picture(figure)


STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: #f6f6f4; padding: .7rem 1rem; overflow-x: auto; font-size: 13px; white-space: pre-wrap; }
img { max-width: 100%; } .met { color: #2c6e49; } .failed { color: #b3261e; font-weight: 600; } .note { color: #666; }
"""


def page(results, checks, prompt, pictures, scan, kept, evaluation, long_context) -> str:
    """report.html: self-contained, nothing to fetch."""

    def rows(cells, tag="td"):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head = [
        "model",
        "held-out loss",
        "KL to the teacher",
        "same next token",
        f"loss at {long_context}",
    ]
    body = [[r.name, f"{r.loss:.3f}", f"{r.kl:.4f}", f"{r.agreement:.1%}", f"{r.long_loss:.3f}"] for r in results]
    scanned = [[str(e["layer"]), f"{e['kl']:.4f}", "kept" if e["layer"] in kept else ""] for e in scan["layers"]]
    measured = [
        [
            f"{row.name} {row.seq_len or ''}",
            row.metric,
            *(cell_text(cell) for cell in row.cells.values()),
        ]
        for row in evaluation_rows(evaluation)
    ]
    samples = "".join(
        f"<h3>{html.escape(r.name)}</h3><pre><b>{html.escape(prompt)}</b>{html.escape(r.sample)}</pre>" for r in results
    )
    verdicts = "".join(
        f'<li class="{"met" if met else "failed"}">{"met" if met else "FAILED"}: {html.escape(text)}</li>'
        for text, met in checks
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>From a softmax teacher to a hybrid</title><style>{STYLE}</style>
<h1>From a softmax teacher to a hybrid</h1>
<table>{rows(head, "th")}{"".join(rows(r) for r in body)}</table>
<p class="note">Losses and KL in nats a token, on text that no model was trained on.</p>
<h2>What must be seen</h2><ul>{verdicts}</ul>
<h2>Training</h2>{pictures[0]}
<h2>Alignment of each layer's attention</h2>{pictures[1]}
<p class="note">Squared error of the linear attention over the variance of the teacher's output, held-out text.</p>
<h2>Which layers keep full attention</h2>
<p>KL to the teacher on training chunks with only that layer restored, without training; none restored:
{scan["all_linear_kl"]:.4f}.</p>
<table>{rows(["layer", "KL", ""], "th")}{"".join(rows(r) for r in scanned)}</table>
<h2>Evaluation</h2>
<table>{rows(["task and length", "metric", *evaluation], "th")}{"".join(rows(r) for r in measured)}</table>
<p class="note">By evaluate.py, as for any checkpoint. This teacher has not learnt to recall, and its students have nothing of it
to lose: benchmarks/recall_teacher.py trains one that has.</p>
<h2>Samples</h2><p class="note">Greedy continuations of the same held-out beginning (bold).</p>{samples}
</html>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--context", type=int, default=256, help="context length of stages 1 and 2")
    parser.add_argument("--long_context", type=int, default=512, help="context length of stage 3")
    parser.add_argument("--chunks", type=int, default=64, help="held-out chunks to measure on")
    parser.add_argument("--tiny", action="store_true", help="measure, but do not demand")
    args = parser.parse_args()

    disable_progress_bar()  # transformers' own, a line for every file read
    out, start = args.out, time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(str(out / "teacher"))
    teacher = load_teacher(str(out / "teacher")).to(device)

    def heldout(context: int, count: int) -> torch.Tensor:
        chunks = open_chunks_for(
            tokenizer,
            teacher.config.vocab_size,
            str(out / "data" / f"chunked_context{context}"),
            context,
        ).heldout
        return torch.as_tensor(chunks[: min(count, len(chunks))]["input_ids"], dtype=torch.long, device=device)

    ids, long_ids = (
        heldout(args.context, args.chunks),
        heldout(args.long_context, max(1, args.chunks // 4)),
    )
    prompt = ids[len(ids) // 2 : len(ids) // 2 + 1, :PROMPT_TOKENS]
    scan = json.loads((out / "layer_scan" / "layer_scan.json").read_text())

    def exported(stage: int) -> StudentForCausalLM:
        folder = out / f"stage{stage}" / "converted-hf"
        return StudentForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    with torch.no_grad():
        hidden = torch.cat([teacher.model(b, use_cache=False).last_hidden_state for b in ids.split(BATCH_SIZE)])
    student = exported(1)
    kept = exported(2).config.keep_full_attention_layers
    torch.manual_seed(0)
    untrained = StudentForCausalLM.from_teacher(
        teacher, student.config.student_name, [], student.config.student_options
    )[0].eval()
    aligned = (
        alignment(untrained, teacher, ids[:BATCH_SIZE]),
        alignment(student, teacher, ids[:BATCH_SIZE]),
    )
    models = {
        "teacher": lambda: teacher,
        "all-linear, before stage 1": lambda: untrained,
        "all-linear, after stage 1": lambda: student,
        "hybrid, before stage 2": lambda: student.restore_full_attention(teacher, kept).eval(),
        "hybrid, after stage 2": lambda: exported(2),
        "hybrid, after stage 3": lambda: exported(3),
    }
    results = []
    for name, build in tqdm(models.items(), desc="report", unit="model"):
        model = build()
        figures = measure(model, teacher, ids, hidden)
        results.append(Result(name, *figures, mean_loss(model, long_ids), sample(model, tokenizer, prompt)))
    curves = {stage: read_losses(out / f"stage{stage}") for stage in STAGES}
    taught = json.loads((out / "teacher.json").read_text())
    checks = measures(results, {stage: train for stage, (train, _) in curves.items()}, taught)
    evaluation = json.loads((out / "evaluation" / "results.json").read_text())
    during = read_layer_errors(out / "stage1")
    pictures = loss_curves(curves, taught["losses"]), alignment_figure(*aligned, kept, *during)
    text = page(
        results,
        checks,
        tokenizer.decode(prompt[0]),
        pictures,
        scan,
        kept,
        evaluation,
        args.long_context,
    )
    (out / "report.html").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(
        json.dumps({"models": [asdict(r) for r in results], "kept": kept, "measures": checks}, indent=1) + "\n"
    )
    for check, met in checks:
        print(f"{'met   ' if met else 'FAILED'}  {check}")
    (out / "report.txt").write_text(table(results, args.long_context) + "\n")
    print(f"Report: {out / 'report.html'}, {time.monotonic() - start:.0f} s")
    if args.tiny or all(met for _, met in checks):
        return 0
    print(table(results, args.long_context))
    return 1


if __name__ == "__main__":
    run_main(main)

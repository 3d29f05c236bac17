"""The tables and the plots of real_model.py, from the JSON files of its rows."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from runtime.config import ConfigError
from runtime.files import atomic_write_text
from runtime.run_folder import METRICS, RUN

from reporting.run_record import read_run

TASKS = ("associative_recall", "two_hops", "copying")
SAMPLES = 2  # that results.md shows
LEAST = 0.1  # accuracy of the teacher below which a share of it says nothing
PLOTS = {
    "results_needles.png": "Needles found over the length of the text",
    "results_kept.png": "Perplexity, KL and recall over the number of kept layers",
    "results_tokens.png": "Perplexity, KL and recall over the tokens of stage 2",
    "results_alignment.png": "Relative alignment error of each layer after stage 1",
}


# ------------------------------------------------------------------------ rows
def read_rows(out: Path, teacher: Path, wanted: dict[Path, dict]) -> dict:
    """{"teacher": its figures or None, "rows": one per seed, "alignment": errors of starts by layer,
    "code": commits and versions that trained them}. wanted: file of a row -> name, seed and settings."""
    rows = [{**json.loads(file.read_text()), **row} for file, row in wanted.items() if file.is_file()]
    alignment = {}
    for start in dict.fromkeys(row["start"] for row in rows):
        folder = out / "starts" / start
        if (folder / METRICS).is_file():
            steps, errors = read_run(folder).layer_errors()
            if steps:
                alignment[start] = errors[-1]
    return {
        "teacher": json.loads(teacher.read_text()) if teacher.is_file() else None,
        "rows": rows,
        "alignment": alignment,
        "code": sorted({code_of(run) for run in out.glob(f"*/*/{RUN}")}),
    }


def code_of(run: Path) -> str:
    facts = json.loads(run.read_text())
    return f"commit {facts['git'] or 'unknown'}, torch {facts['versions']['torch']}"


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    """Name -> its seeds, in the order of the rows. Raises ConfigError if they keep different layers: where a
    choice was made anew between them."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    for name, seeds in found.items():
        if len({tuple(row["layers"]) for row in seeds}) > 1:
            raise ConfigError(f"{name}: its seeds keep different layers; remove its files of rows/ and rerun")
    return found


def tasks_of(teacher: dict) -> list[str]:
    """The teacher's recall tasks and needles."""
    return [*TASKS, *needles_of(teacher)]


def needles_of(teacher: dict) -> list[str]:
    """In order of length."""
    needles = [name for name in teacher["figures"] if name.startswith("needle_") and not name.endswith("_error")]
    return sorted(needles, key=tokens_of)


def tokens_of(needle: str) -> int:
    """Of the prompts of `needle_N`."""
    return int(needle.rpartition("_")[2])


def share(row: dict, teacher: dict, task: str) -> float | None:
    """Of the teacher's accuracy; None where it answers too few questions itself."""
    whole = teacher["figures"][task]
    return row["figures"][task] / whole if whole >= LEAST else None


def recall(row: dict, teacher: dict) -> float:
    """The mean share over all tasks; NaN, which no plot shows, if the teacher answers too few of all."""
    shares = [value for task in tasks_of(teacher) if (value := share(row, teacher, task)) is not None]
    return statistics.fmean(shares) if shares else math.nan


def ratio(row: dict, teacher: dict) -> float:
    """Perplexity over the teacher's."""
    return row["figures"]["perplexity"] / teacher["figures"]["perplexity"]


# ------------------------------------------------------------------------ the table
def spread(values: list[float | None], digits: int, percent: bool = False) -> str:
    """Mean ± half the range over the seeds."""
    if None in values:
        return "–"
    values = [100 * value for value in values] if percent else values
    half_range = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    mean = round(statistics.fmean(values), digits) + 0.0  # no minus sign before zero
    return f"{mean:.{digits}f}{half_range}"


def heading(task: str) -> str:
    return task.replace("_", " ")


def thousands(tokens: int) -> str:
    """1024 -> 1k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def millions(row: dict) -> str:
    """Tokens of both stages."""
    stages = (row["settings"]["stage1"], row["settings"]["stage2"])
    return " + ".join(f"{stage['target_tokens'] / 1e6:g}" if stage else "0" for stage in stages)


def table(results: dict) -> str:
    """Markdown: a line per name, the mean over its seeds, with their spread but for the needles. Recall is the
    share of the teacher's."""
    teacher, names = results["teacher"], by_name(results["rows"])
    if teacher is None:
        return "No figures yet."
    needles = needles_of(teacher)
    lengths = " / ".join(thousands(tokens_of(needle)) for needle in needles)
    head = ["", "kept", "M tokens", "perplexity ratio", "KL", *map(heading, TASKS), f"needles {lengths}", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|:--|--:|--:|{'--:|' * (len(head) - 3)}"]
    figures = teacher["figures"]
    own = [f"{100 * figures[task]:.1f} ± {196 * figures[f'{task}_error']:.1f}" for task in TASKS]
    own.append(" / ".join(f"{100 * figures[needle]:.0f}" for needle in needles))
    perplexity = f"(perplexity {figures['perplexity']:.2f})"
    lines.append(f"| the teacher itself, % of the questions | all | | {perplexity} | 0 | {' | '.join(own)} | |")
    for name, rows in names.items():
        cells = [name, str(len(rows[0]["layers"])), millions(rows[0])]
        cells += [spread([ratio(row, teacher) for row in rows], 3)]
        cells += [spread([row["figures"]["kl"] for row in rows], 3)]
        cells += [spread([share(row, teacher, task) for row in rows], 0, percent=True) for task in TASKS]
        found = [spread([share(row, teacher, needle) for row in rows], 0, percent=True) for needle in needles]
        means = [each.partition(" ")[0] for each in found]
        lines.append(f"| {' | '.join([*cells, ' / '.join(means)])} | {len(rows)} |")
    return "\n".join(lines)


def sets_table(results: dict) -> str:
    """Markdown: the layers of each row, how often it predicts the teacher's token, and what it took."""
    lines = [
        "| | student | layers | same top 1, % | stage 1, s | stage 2, s | measured in, s | GPU |",
        "|:--|:--|:--|--:|--:|--:|--:|:--|",
    ]
    for name, rows in by_name(results["rows"]).items():
        first = rows[0]
        student = "" if first["settings"]["kept"] == "all" else f"`{first['settings']['student']}`"
        seconds = [spread([row["train_seconds"][stage] for row in rows], 0) for stage in ("stage1", "stage2")]
        seconds.append(spread([row["figures"]["seconds"] for row in rows], 0))
        same = spread([row["figures"]["agreement"] for row in rows], 1, percent=True)
        layers = layer_list(first["layers"])
        lines.append(f"| {name} | {student} | {layers} | {same} | {' | '.join(seconds)} | {gpus(rows)} |")
    if results.get("code"):
        lines += ["", f"Trained by {'; '.join(results['code'])}."]
    return "\n".join(lines)


def gpus(rows: list[dict]) -> str:
    """On which the seeds of a row ran; with the seeds where they differ."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row["gpu"], []).append(row["seed"])
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{gpu} (seed {' '.join(map(str, seeds))})" for gpu, seeds in found.items())


def layer_list(layers: list[int]) -> str:
    """0 1 2 5: those that follow each other as 0-2."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs]
    return " ".join(parts) or "none"


# ------------------------------------------------------------------------ selectors
def by_selector(rows: list[dict]) -> dict[int, dict[str, list[dict]]]:
    """Number of layers -> selector -> its seeds, of the rows that name one; most layers first."""
    found: dict[int, dict[str, list[dict]]] = {}
    for row in rows:
        if selector := row["settings"].get("selector"):
            found.setdefault(len(row["layers"]), {}).setdefault(selector, []).append(row)
    return dict(sorted(found.items(), reverse=True))


def difference(rows: list[dict], others: list[dict], figure) -> tuple[float, float] | None:
    """(mean, half the range) of figure(row) - figure(other) over the seeds that both have; None without any."""
    theirs = {row["seed"]: figure(row) for row in others}
    values = [figure(row) - theirs[row["seed"]] for row in rows if row["seed"] in theirs]
    return (statistics.fmean(values), (max(values) - min(values)) / 2) if values else None


def compared(rows: list[dict], others: list[dict], figure, digits: int) -> str:
    """`difference`, bold where there are several seeds and it is beyond their spread."""
    found = difference(rows, others, figure)
    if found is None:
        return "–"
    mean, half_range = found
    several = len({row["seed"] for row in rows} & {row["seed"] for row in others}) > 1
    text = f"{mean:+.{digits}f}" + (f" ± {half_range:.{digits}f}" if several else "")
    return f"**{text}**" if several and abs(mean) > half_range else text


def costs(row: dict, trained: dict | None) -> list[str]:
    """M tokens trained on, FLOPs, seconds of the command and of its training, and the latter's share of
    those of `trained`, the cost of ga_s2."""
    cost = row.get("selection", {})
    cells = [
        f"{cost['tokens'] / 1e6:.1f}" if "tokens" in cost else "",
        f"{cost['flops']:.1e}" if "flops" in cost else "",
    ]
    cells += [f"{cost[name]:.0f}" if name in cost else "" for name in ("command_seconds", "seconds")]
    part = trained and "seconds" in cost
    return [*cells, f"{100 * cost['seconds'] / trained['seconds']:.0f} %" if part else ""]


def selectors_table(results: dict) -> str:
    """Markdown: what each selector chose, its cost, and the KL and the recall of its hybrid against those of
    the first selector of as many layers, seed by seed. Empty if no row is a selector's."""
    teacher, groups = results["teacher"], by_selector(results["rows"])
    if teacher is None or not groups:
        return ""
    first = next(iter(next(iter(groups.values()))))
    head = [
        "K",
        "selector",
        "layers",
        "M tokens",
        "FLOPs",
        "command, s",
        "training, s",
        "of `ga_s2`'s",
        "KL",
        "recall, %",
    ]
    head += [f"KL against {first}", "recall, points", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|--:|:--|:--|{'--:|' * (len(head) - 3)}"]

    def kl(row: dict) -> float:
        return row["figures"]["kl"]

    def percent(row: dict) -> float:
        return 100 * recall(row, teacher)

    for count, selectors in groups.items():
        others = next(iter(selectors.values()))
        trained = [rows[0] for rows in selectors.values() if chosen_by(rows[0]) == "ga_s2"]
        for name, rows in selectors.items():
            cells = [str(count), name, layer_list(rows[0]["layers"])]
            cells += costs(rows[0], trained[0].get("selection") if trained else None)
            cells += [spread([kl(row) for row in rows], 3), spread([percent(row) for row in rows], 1)]
            against = ["", ""]
            if rows is not others:
                against = [compared(rows, others, kl, 3), compared(rows, others, percent, 1)]
            lines.append(f"| {' | '.join([*cells, *against])} | {len(rows)} |")
    return "\n".join(lines)


def chosen_by(row: dict) -> str | None:
    kept = row["settings"]["kept"]
    return kept["method"] if isinstance(kept, dict) else None


# ------------------------------------------------------------------------ samples
def best_hybrid(results: dict) -> dict | None:
    """The row of the lowest KL that keeps some of the layers and is trained."""
    most = max((len(row["layers"]) for row in results["rows"] if row["settings"]["kept"] == "all"), default=math.inf)
    rows = [row for row in results["rows"] if row["settings"]["stage2"] and 0 < len(row["layers"]) < most]
    return min(rows, key=lambda row: row["figures"]["kl"], default=None)


def side_by_side(results: dict) -> str:
    """Markdown: the first held-out texts, as the teacher and the best hybrid go on. Empty without a hybrid."""
    best = best_hybrid(results)
    if results["teacher"] is None or best is None:
        return ""
    lines = ["| text | the teacher goes on | the hybrid goes on |", "|:--|:--|:--|"]
    for theirs, ours in list(zip(results["teacher"]["samples"], best["samples"]))[:SAMPLES]:
        cells = (in_cell(text) for text in (theirs["prompt"], theirs["text"], ours["text"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"Greedy continuations of held-out texts; the hybrid is *{best['name']}*.", "", *lines])


def in_cell(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would read."""
    words = " ".join(text.split())
    for sign in "\\`*_{}[]<>|#&~$":
        words = words.replace(sign, f"\\{sign}")
    return words


def samples(results: dict) -> str:
    """Markdown: the beginnings of held-out texts, and how the teacher and the first seed of each row go on."""
    teacher, names = results["teacher"], by_name(results["rows"])
    if teacher is None:
        return ""
    parts = []
    for number, sample in enumerate(teacher["samples"]):
        parts += [f"## Text {number + 1}", block(sample["prompt"]), "The teacher goes on:", block(sample["text"])]
        for name, rows in names.items():
            parts += [f"{name}:", block(rows[0]["samples"][number]["text"])]
    return "\n\n".join(parts)


def block(text: str) -> str:
    """Quoted, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# ------------------------------------------------------------------------ plots
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def series(results: dict, key: str, x) -> dict[str, dict[float, list[dict]]]:
    """Line -> x -> the rows at that point; of the rows whose settings name a line under `key`."""
    lines: dict[str, dict[float, list[dict]]] = {}
    for row in results["rows"]:
        if label := row["settings"].get(key):
            lines.setdefault(label, {}).setdefault(x(row), []).append(row)
    return {label: dict(sorted(points.items())) for label, points in sorted(lines.items())}


def plot_quality(results: dict, key: str, x, label: str, path: Path, log: bool) -> None:
    """Perplexity ratio, KL and mean recall against x: a dot per seed, a line through the means; nothing
    as long as no line has two points."""
    teacher, lines = results["teacher"], series(results, key, x)
    if teacher is None or max(map(len, lines.values()), default=0) < 2:
        return
    panels = {
        "perplexity over the teacher's": (lambda row: ratio(row, teacher), 1),
        "KL to the teacher, nats": (lambda row: row["figures"]["kl"], 0),
        "recall, mean % of the teacher's": (lambda row: 100 * recall(row, teacher), 100),
    }
    plot = pyplot()
    figure, axes = plot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, (value, of_teacher)) in zip(axes, panels.items()):
        axis.axhline(of_teacher, color="grey", linewidth=1, linestyle=":", label="teacher")
        for name, points in lines.items():
            means = [statistics.fmean(map(value, rows)) for rows in points.values()]
            (line,) = axis.plot(list(points), means, "-", label=name)
            dots = [(place, value(row)) for place, rows in points.items() for row in rows]
            axis.plot(*zip(*dots), "o", color=line.get_color(), markersize=4)
        axis.set(xlabel=label, title=title)
        axis.grid(alpha=0.3)
        if log:
            axis.set_xscale("log")
        axis.set_xticks(sorted({place for points in lines.values() for place in points}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[2].set_ylim(bottom=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plot.close(figure)


def plot_needles(results: dict, path: Path) -> None:
    """The needles that the teacher and the rows whose settings name a line find, against the length of
    the text: a dot per seed, a line through the means."""
    teacher, lines = results["teacher"], series(results, "over_length", lambda row: 0)
    if teacher is None or not lines:
        return
    needles = needles_of(teacher)
    lengths = [tokens_of(needle) for needle in needles]
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(10, 4), layout="constrained")

    def found(row: dict) -> list[float]:
        return [100 * row["figures"][needle] for needle in needles]

    axis.plot(lengths, found(teacher), "o:", color="grey", markersize=4, label="teacher")
    for name, points in sorted(lines.items(), key=lambda line: -statistics.fmean(found(line[1][0][0]))):
        seeds = [found(row) for row in points[0]]
        (line,) = axis.plot(lengths, list(map(statistics.fmean, zip(*seeds))), "-", label=name)
        for values in seeds:
            axis.plot(lengths, values, "o", color=line.get_color(), markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set(xlabel="tokens of the text", ylabel="needles found, %", ylim=(0, 103))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)
    plot.close(figure)


def plot_alignment(results: dict, path: Path) -> None:
    """The relative error of each layer's attention output at the end of stage 1."""
    if not results["alignment"]:
        return
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(9, 3.6), layout="constrained")
    for start, errors in results["alignment"].items():
        axis.plot(range(len(errors)), errors, "o-", markersize=3, label=start.rpartition("-")[0])
    axis.set(xlabel="layer", yscale="log", ylabel="error / variance of the teacher's output")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plot.close(figure)


def plots(results: dict, folder: Path) -> None:
    """The files of PLOTS for which there are figures."""
    plot_needles(results, folder / "results_needles.png")
    plot_quality(
        results, "over_kept", lambda row: len(row["layers"]), "layers kept", folder / "results_kept.png", log=False
    )
    plot_quality(
        results, "over_tokens", stage2_millions, "million tokens of stage 2", folder / "results_tokens.png", log=True
    )
    plot_alignment(results, folder / "results_alignment.png")


def stage2_millions(row: dict) -> float:
    return row["settings"]["stage2"]["target_tokens"] / 1e6


# ------------------------------------------------------------------------ all of it
def write_report(out: Path, teacher: Path, wanted: dict[Path, dict], failures: list[str], left: int) -> str:
    """Writes results.md, samples.md, results.json and the plots; returns the text of results.md.
    teacher, wanted: see `read_rows`."""
    results = read_rows(out, teacher, wanted)
    parts = [table(results), selectors_table(results), side_by_side(results), sets_table(results), *failures]
    if left:
        parts.append(f"{left} jobs are missing; rerun the command.")
    text = "\n\n".join(filter(None, parts)) + "\n"
    atomic_write_text(out / "results.md", text)
    atomic_write_text(out / "samples.md", samples(results) + "\n")
    atomic_write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    plots(results, out)
    return text

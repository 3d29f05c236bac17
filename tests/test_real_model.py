"""The table of a real model, at a size where nothing is learnt: jobs, resuming, rows, report."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import runtime.data
from runtime.config import ConfigError, load_config

import pytest
import torch
from conftest import random_teacher, save_tokenizer

from benchmarks import jobs, model_quality, real_model, real_model_report
from convert import load_teacher
from recall_tasks import CITIES, generated_answers, needle_recall, two_hop_facts

ROOT = Path(__file__).parents[1]
STAGE = "data: text, target_tokens: 128, train_seq_len: 32, batch_size: 2, micro_batch_size: 2, lr: 1.0e-3"
ROWS = f"""
data:
  text: {{mix: {{corpus: 1.0}}}}
  recall: {{mix: {{corpus: 0.9, "synthetic:recall": 0.1}}, max_tokens: 9000}}
heldout: {{data: text, length: 32, sequences: 4}}
defaults:
  student: gdn_v7
  stage1: {{{STAGE}}}
  stage2: {{{STAGE}, lr_attn: 1.0e-3}}
  selection: {{{STAGE.replace("len: 32", "len: 64")}, lr_attn: 1.0e-3}}
rows:
- {{name: two kept, kept: [0, 2], over_kept: chosen, over_tokens: two, stage2: {{data: recall}}}}
- {{name: one kept, kept: {{method: uniform, top_k: 1}}, over_kept: chosen}}
- {{name: window, kept: [0, 2], student: swa_v1, options: {{window_size: 8, sink_size: 2}}, stage1: null, stage2: null, over_length: windows}}
- {{name: all kept, kept: all, over_tokens: two, stage1: null, stage2: {{ce_weight: 1.0, kl_weight: 0.0, target_tokens: 192}}}}
- {{name: two kept, kept: [0, 2], over_kept: chosen, over_tokens: two, stage2: {{data: recall}}, seeds: [1]}}
"""
GATES = "{method: gates, top_k: 2, objective: mixture, num_pairs: 2, vocab_size: 16, sequences: 2, search_tokens: 128}"
GA_S2 = "{method: ga_s2, top_k: TOP_K, rounds: 4, window: 0, halving: true, sequences: 2}"
SELECTORS = f"""
- {{name: two by gates, selector: gates, kept: {GATES}, seeds: [0, 1]}}
- {{name: two by ga_s2, selector: ga_s2, kept: {GA_S2.replace("TOP_K", "2")}, selection: {{target_tokens: 512}}}}
- {{name: one by ga_s2, selector: ga_s2, kept: {GA_S2.replace("TOP_K", "1")}, selection: {{target_tokens: 512}}}}
- {{name: longer, kept: {{same_as: two by gates}}, stage2: {{target_tokens: 192}}}}
- {{name: other student, student: gla_v1, kept: {{same_as: two by gates}}}}
- {{name: untrained, kept: {{same_as: two by ga_s2}}, stage2: null}}
- {{name: none, kept: none}}
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random model of SmolLM2's kind, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    random_teacher(folder, "llama", tie_word_embeddings=True, max_position_embeddings=512)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def command(tmp_path, llama):
    """The command line for a small corpus, without --rows."""
    texts = tmp_path / "texts"
    texts.mkdir()
    pages = sorted((ROOT / "docs").glob("*.md"))
    for page in pages:
        (texts / f"{page.stem}.txt").write_text(page.read_text()[:2000])
    (tmp_path / "rows.yaml").write_text(ROWS)
    words = ["--teacher", llama, "--corpus", texts, "--output_dir", tmp_path / "out", "--rows", tmp_path / "rows.yaml"]
    words += ["--questions", "2", "--needles", "3", "--needle_lengths", "256", "--collect", tmp_path / "collected"]
    return list(map(str, words))


@pytest.mark.slow
def test_from_a_corpus_to_the_table(command, tmp_path, capsys):
    """All rows, by scripts of the project; then nothing is repeated."""
    assert real_model.main([*command, "--processes", "2"]) == 0
    shown = capsys.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 5 and results["teacher"]["figures"]["kl"] == 0
    rows = {(row["name"], row["seed"]): row for row in results["rows"]}
    assert rows["two kept", 0]["start"] == rows["one kept", 0]["start"] == rows["two kept", 1]["start"]
    assert len(rows["one kept", 0]["layers"]) == 1 and rows["all kept", 0]["layers"] == [0, 1, 2, 3]
    assert rows["two kept", 0]["figures"]["kl"] != rows["two kept", 1]["figures"]["kl"] > 0
    assert rows["window", 0]["figures"]["kl"] > 0 and rows["window", 0]["train_seconds"]["stage2"] == 0
    assert list(results["alignment"]) == [rows["two kept", 0]["start"]] and len(*results["alignment"].values()) == 4
    text = (out / "results.md").read_text()
    assert text in shown and "missing" not in text and text.count("| two kept |") == 2 and "Trained by commit" in text
    for name in real_model_report.PLOTS:
        assert (tmp_path / "collected" / name).stat().st_size > 10_000
    assert (tmp_path / "collected" / "samples.md").read_text().count("\n## Text") == 4 - 1
    assert not list(out.glob("*/*/checkpoint-*"))
    logs = {file: file.read_text() for file in (out / "logs").iterdir()}
    assert real_model.main(command) == 0
    assert {file: file.read_text() for file in (out / "logs").iterdir()} == logs


@pytest.mark.slow
def test_selectors_from_a_corpus_to_their_table(command, tmp_path, capsys):
    """Two commands at once do each job once; one training of ga_s2 serves both numbers of layers; other rows have
    the layers of gates; and rows that keep the same layers share stage 2."""
    (tmp_path / "rows.yaml").write_text(ROWS.partition("rows:")[0] + "rows:" + SELECTORS)
    words = [sys.executable, real_model.__file__, *command]
    with subprocess.Popen([*words, "--processes", "2"], stdout=subprocess.DEVNULL) as other:
        assert real_model.main(command) == 0
    assert other.returncode == 0
    out = tmp_path / "out"
    rows = {(row["name"], row["seed"]): row for row in json.loads((out / "results.json").read_text())["rows"]}
    layers = {name: row["layers"] for (name, _), row in rows.items()}
    assert len(rows) == 8 and layers["longer"] == layers["other student"] == layers["two by gates"]
    assert set(layers["one by ga_s2"]) < set(layers["two by ga_s2"]) == set(layers["untrained"])
    starts = {rows[name, 0]["start"] for name in ("other student", "two by gates")}
    assert len(starts) == 2
    assert len(list((out / "choices").iterdir())) == 2
    ranking = json.loads(next(out.glob("choices/*ga_s2*top_k-2*/ranking.json")).read_text())
    order = [layer["layer"] for layer in ranking["layers"]]
    assert layers["one by ga_s2"] == order[:1] and ranking["facts"]["stopped"]
    for name in ("one by ga_s2", "two by ga_s2"):
        assert rows[name, 0]["selection"]["tokens"] == ranking["facts"]["tokens"]
    logs = {file.name: file.read_text() for file in (out / "logs").glob("*.log")}
    assert all(text.count("\n# ") == 1 for text in logs.values())
    trained = {
        (tuple(row["layers"]), json.dumps(row["settings"]["stage2"]), row["start"], row["seed"])
        for row in rows.values()
    }
    assert sum(name.startswith("run_") for name in logs) == len({each for each in trained if each[1] != "null"})
    text = (out / "results.md").read_text()
    assert "| 2 | ga_s2 | " in text and "| 1 | ga_s2 | " in text and "the hybrid goes on" in text
    assert not list(out.glob("jobs/.*"))  # no lock is left


def test_out_of_time_and_failures(command, tmp_path, monkeypatch, capsys):
    """Time that is up ends the command with the code of an interrupted run; a script that fails costs
    the rows that need it alone, and is tried again by the next command."""
    assert real_model.main([*command, "--minutes", "0"]) == 75
    assert "jobs are missing; rerun the command." in capsys.readouterr().out
    asked = []

    def script(self, log, script, *words):
        asked.append(log)
        raise jobs.JobFailed("train.py ended with exit code 1: no space")

    monkeypatch.setattr(real_model.Experiment, "script", script)
    for _ in range(2):
        asked.clear()
        assert real_model.main([*command, "--only", "window", "one kept"]) == 1
        assert asked == ["text_text"]
        assert "\n\njobs/text_text: failed: train.py ended with exit code 1: no space\n" in capsys.readouterr().out


def test_changed_rows_are_new_ones_and_changed_text_is_refused(command, tmp_path, capsys):
    """A result counts for the settings that it was measured with alone."""
    assert real_model.main([*command, "--minutes", "0"]) == 75
    file = tmp_path / "rows.yaml"
    before = real_model.read_plan(file).rows
    file.write_text(ROWS.replace("lr_attn: 1.0e-3", "lr_attn: 2.0e-3").replace("over_tokens: two", "over_tokens: 2"))
    after = real_model.read_plan(file).rows
    trained = [row.stage2 is not None for row in before]
    assert [a.slug != b.slug for a, b in zip(after, before)] == trained and [
        a.start == b.start for a, b in zip(after, before)
    ]
    known = {"figures": figures(0.1, 0.3), "layers": [0], "start": "none", "gpu": "CPU", "samples": []}
    known |= {"train_seconds": {"stage1": 1.0, "stage2": 2.0}}
    out = tmp_path / "out"
    for name, kl in (("teacher", 0.0), (before[0].slug, 0.1), (after[0].slug, 0.2)):
        (out / "rows" / f"{name}.json").write_text(json.dumps(known | {"figures": figures(kl, 0.5)}))
    real_model.main([*command, "--minutes", "0"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| two kept |"))
    assert "| 0.200 |" in line and line.endswith("| 1 |")
    file.write_text(ROWS.replace("0.9,", "0.8,").replace('recall": 0.1', 'recall": 0.2'))
    with pytest.raises(ConfigError, match="data: recall is other text in .*out; name it otherwise"):
        real_model.main([*command, "--minutes", "0"])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kept: all", "kept: most", "all kept: kept: 'most' must be layers, all, none, or a method"),
        ("method: uniform", "method: evenly", "one kept: kept: .* names no method of select_layers.py"),
        ("name: window", "name: all kept", "all kept is there twice with seed 0"),
        ("seeds: [1]", "seeds: [0]", "two kept is there twice with seed 0"),
        ("data: recall}, seeds", "data: text}, seeds", "two kept: its seeds differ in more than the seed"),
        ("{method: uniform, top_k: 1}", "{same_as: two kept}", "one kept: kept: .* must name a row whose layers a"),
        ("{method: uniform, top_k: 1}", "{same_as: no row}", "one kept: kept: .* must name a row whose layers a"),
        ("{data: recall}}", "{data: talk}}", "two kept: data talk is not under data"),
        ("student: swa_v1", "students: swa_v1", "window: .*unexpected keyword argument 'students'"),
        ("student: swa_v1", "student: swa_v9", "'swa_v9' is unknown; choose one of"),
        (ROWS, "", "data: must be a dict"),
        (ROWS, "rows: [", r"rows.yaml: not valid YAML \("),
        ("heldout:", "held:", "heldout: must be a dict"),
        ("- {name: window,", "- window\n- {name: window,", "rows: window must be a dict with a name"),
        ("mix: {corpus: 1.0}", "max_tokens: 9", "data: text: needs `mix`"),
        ("length: 32, sequences: 4", "sequences: 4", "heldout: needs length"),
        ("heldout: {data: text", "heldout: {data: talk", "heldout: data talk is not under data"),
        (", top_k: 1", "", "one kept: kept: .* needs top_k"),
        ("top_k: 1", "top_k: one", "one kept: kept: .* needs top_k, the number of layers"),
        ("top_k: 1}", "top_k: 1}, stage2: null, selection: null", "one kept: kept: .* chooses for a stage 2"),
        (
            "options: {window",
            "over_tokens: two, options: {window",
            "window: over_tokens: two is over tokens of stage 2",
        ),
        ("{ce_weight: 1.0", "{output_dir: x, ce_weight: 1.0", "all kept: output_dir: set by this benchmark"),
        (
            "stage2: {ce_weight: 1.0, kl_weight: 0.0, target_tokens: 192}",
            "stage2: text",
            "all kept: a stage must be a dict or null, not 'text'",
        ),
    ],
)
def test_rows_that_cannot_be(tmp_path, old, new, message):
    file = tmp_path / "rows.yaml"
    file.write_text(ROWS.replace(old, new, 1) if old != "{data: recall}}" else ROWS.replace(old, new))
    with pytest.raises(ConfigError if "swa_v9" not in message else ValueError, match=message):
        real_model.read_plan(file)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kept: [0, 2], student", "kept: [0, 4], student", r"window: kept: \[4\] out of the teacher's layers 0..3"),
        ("sink_size: 2", "sinks: 2", "window: student_model.options.sinks: unknown"),
        ("ce_weight: 1.0", "ce_wait: 1.0", "all kept: train.ce_wait: unknown"),
        ("kept: all", "kept: [0]", "all kept: train.student_init_ckpt: missing; gdn_v7 has weights that"),
        ("top_k: 1}", "top_k: 1}, stage1: null, stage2: null", "one kept: train.student_init_ckpt: missing; gdn_v7"),
        ("lr_attn: 1.0e-3", "lr_attn: fast", "two kept: train.lr_attn: "),
        ("top_k: 1", "top_k: 5", "one kept: --top-k: 5 must be between 1 and the teacher's 4 layers"),
        ("top_k: 1", "top_k: 1, samples: 5", "one kept: kept: .*unrecognized arguments: --samples"),
        ("top_k: 1", "top_k: 1, sequences: many", "one kept: kept: .*argument --sequences: invalid int value: 'many'"),
        (
            "method: uniform, ",
            "method: scan, objective: recall, num_pairs: 300, ",
            "one kept: --num_pairs: 300 pairs need",
        ),
    ],
)
def test_rows_that_no_stage_takes_are_refused_before_anything_is_written(command, tmp_path, old, new, message):
    file = tmp_path / "rows.yaml"
    assert old in ROWS
    file.write_text(ROWS.replace(old, new))
    with pytest.raises(ConfigError, match=f"^--rows: {file}: {message}"):
        real_model.main(command)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_jobs_and_writes_nothing(command, tmp_path, capsys):
    assert real_model.main([*command, "--dry_run", "--only", "window"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("-")[0] for line in lines[-4:]] == [
        "to do  jobs/text_text",
        "to do  jobs/text_text_32",
        "to do  rows/window",
        "to do  rows/teacher.json",
    ]
    assert not (tmp_path / "out").exists()


def test_a_choice_depends_on_what_its_selector_trains_with_alone(tmp_path):
    """Not on the rates of stage 2, which may be found later; and what has the layers of another row's choice is
    another row for another choice."""
    file = tmp_path / "rows.yaml"
    text = ROWS + SELECTORS
    file.write_text(text)
    before = {row.name: row for row in real_model.read_plan(file).rows}
    file.write_text(
        text.replace("  stage2: {data: text, target_tokens: 128", "  stage2: {data: text, target_tokens: 64")
    )
    plan = real_model.read_plan(file)
    after = {row.name: row for row in plan.rows}
    experiment = real_model.Experiment(SimpleNamespace(output_dir=tmp_path, until=None), plan)
    names = ["two by gates", "two by ga_s2", "one by ga_s2"]
    assert [experiment.choice(before[name]) for name in names] == [experiment.choice(after[name]) for name in names]
    assert experiment.choice(after["two by ga_s2"]) == experiment.choice(after["one by ga_s2"])
    assert (
        before["two by gates"].slug != after["two by gates"].slug
        and before["untrained"].slug == after["untrained"].slug
    )
    file.write_text(text.replace("objective: mixture", "objective: recall"))
    changed = {row.name: row for row in real_model.read_plan(file).rows}
    assert changed["longer"].slug != before["longer"].slug and changed["none"].slug == before["none"].slug


def test_a_choice_belongs_to_the_stage_2_that_it_was_made_for(tmp_path):
    """GA-S2 and others train or measure on it: rows that share a start may differ there."""
    file = tmp_path / "rows.yaml"
    other = "- {name: other text, kept: {method: uniform, top_k: 1}, selection: {data: recall}}\n"
    same = "- {name: again, kept: {method: uniform, top_k: 1}}\n"
    file.write_text(ROWS + other + same)
    plan = real_model.read_plan(file)
    rows = {row.name: row for row in plan.rows}
    experiment = real_model.Experiment(SimpleNamespace(output_dir=tmp_path, until=None), plan)
    assert rows["one kept"].start == rows["other text"].start
    assert experiment.choice(rows["one kept"]) == experiment.choice(rows["again"])
    assert experiment.choice(rows["one kept"]) != experiment.choice(rows["other text"])


def test_the_rows_of_the_file_can_be_planned(tmp_path):
    """Each job stands behind what it needs, rows share texts and stage 1, and their configs load."""
    plan = real_model.read_plan(real_model.ROWS)
    args = SimpleNamespace(output_dir=tmp_path, until=None, teacher="T", corpus="C")
    experiment = real_model.Experiment(args, plan)
    for row in plan.rows:
        for stage, values in ((1, row.stage1), (2, row.stage2)):
            if values:
                experiment.write_config(
                    row, stage, tmp_path / "stage.yaml", [] if stage == 1 else [0], tmp_path / "run"
                )
                cfg = load_config(tmp_path / "stage.yaml")
                assert cfg.train.lr == values["lr"] and cfg.student_model.name == row.student
                assert bool(cfg.train.student_init_ckpt) == (stage == 2 and row.stage1 is not None)
    todo = experiment.jobs()
    done = set()
    for job in todo:
        assert set(job.needs) <= done
        done.add(job.file)
    students = {row.student for row in plan.rows if row.stage1}
    starts = {row.start for row in plan.rows if row.stage1}
    assert {job.file.name for job in todo if job.file.name.startswith("start_")} == {f"start_{name}" for name in starts}
    assert len(starts) == len(students)
    assert sum("ga_s2" in job.file.name and job.file.name.startswith("choice_") for job in todo) == 1


def test_a_process_is_told_to_stop_when_the_time_is_up(tmp_path, monkeypatch):
    """By SIGTERM, after which it may take its time to save."""
    args = SimpleNamespace(output_dir=tmp_path, until=time.time() + 3600, teacher="T", corpus="C")
    experiment = real_model.Experiment(args, real_model.read_plan(real_model.ROWS))
    (tmp_path / "logs").mkdir()
    script = tmp_path / "slow.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(real_model, "LEAST", 1)
    experiment.end = time.time() + 4
    with pytest.raises(jobs.OutOfTime):
        experiment.script("slow", str(script))
    assert "saved" in (tmp_path / "logs" / "slow.log").read_text()
    assert experiment.seconds("slow") > 1
    with pytest.raises(jobs.OutOfTime):  # no more time for anything
        experiment.script("slow", str(script))
    experiment.end = float("inf")
    script.write_text("raise SystemExit('data.cache_dir: is not there')\n")
    seconds = experiment.seconds("slow")
    with pytest.raises(jobs.JobFailed, match="ended with exit code 1: data.cache_dir: is not there; see"):
        experiment.script("slow", str(script))
    assert experiment.seconds("slow") == seconds  # of what failed nothing is left


def figures(kl, recall, perplexity=12.0):
    found = {"perplexity": perplexity, "kl": kl, "agreement": 0.8, "associative_recall": recall, "seconds": 3.0}
    found |= {"two_hops": 0.05, "copying": 0.9, "needle_1024": 1.0, "needle_512": 0.5}
    return found | {f"{name}_error": 0.01 for name in found}


def test_the_table_has_means_spreads_and_shares():
    settings = {
        "student": "gdn_v7",
        "kept": [0, 8],
        "stage1": {"target_tokens": 20e6},
        "stage2": {"target_tokens": 5e6},
    }
    row = {"name": "8 kept", "layers": [0, 8], "settings": settings, "gpu": "H100", "train_seconds": {}}
    rows = [row | {"seed": seed, "figures": figures(kl, recall)} for seed, kl, recall in ((0, 0.1, 0.3), (1, 0.2, 0.6))]
    teacher = {"figures": figures(0.0, 0.6, 10.0) | {"two_hops": 0.08}}
    lines = real_model_report.table({"teacher": teacher, "rows": rows}).splitlines()
    assert "| needles 512 / 1k |" in lines[0]
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[:5] == ["8 kept", "2", "20 + 5", "1.200 ± 0.000", "0.150 ± 0.050"]
    assert cells[5:7] == ["75 ± 25", "–"]  # the teacher answers too few of two hops
    assert cells[-2:] == ["100 / 100", "2"]
    assert "60.0 ± 2.0" in lines[2] and "50 / 100" in lines[2]


def test_the_table_of_sets_has_the_gpu_of_each_seed():
    assert real_model_report.gpus([{"gpu": "H200", "seed": 0}, {"gpu": "H200", "seed": 1}]) == "H200"
    seeds = [{"gpu": gpu, "seed": seed} for seed, gpu in enumerate(("H200", "H100", "H200"))]
    assert real_model_report.gpus(seeds) == "H200 (seed 0 2), H100 (seed 1)"
    assert real_model_report.spread([-4e-5, 1e-5], 3) == "0.000 ± 0.000"


def test_the_plot_of_needles_has_the_mean_and_each_seed_by_length(tmp_path, monkeypatch):
    plot = real_model_report.pyplot()
    monkeypatch.setattr(plot, "close", lambda figure: None)
    rows = []
    for seed, found in enumerate((0.2, 0.6)):
        measured = figures(0.1, 0.3) | {"needle_1024": found}
        rows.append({"seed": seed, "settings": {"over_length": "ours"}, "figures": measured})
    rows.append({"seed": 0, "settings": {"over_length": None}, "figures": figures(0.1, 0.3)})
    teacher = {"figures": figures(0.0, 0.6)}
    real_model_report.plot_needles({"teacher": teacher, "rows": rows}, tmp_path / "needles.png")
    lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in plot.gca().lines]
    monkeypatch.undo()
    plot.close("all")
    assert (tmp_path / "needles.png").is_file() and lines[0] == ("teacher", [512, 1024], [50, 100])
    assert lines[1] == ("ours", [512, 1024], [50, pytest.approx(40)])
    assert [values for _, _, values in lines[2:]] == [[50, 20], [50, 60]]


def test_selectors_are_compared_seed_by_seed():
    """Bold where the difference is larger than half its range; of seeds that both have alone."""
    teacher = {"figures": figures(0.0, 0.6) | {"two_hops": 0.08}}
    rows = []
    for name, method, kls in (
        ("gates", "gates", (0.1, 0.2)),
        ("one by one", "ga_s2", (0.15, 0.26, 0.9)),
        ("ar", "ar", (0.2, 0.15)),
    ):
        settings = {"selector": name, "kept": {"method": method}}
        row = {"name": name, "layers": [0, 1, 2, 8], "settings": settings, "selection": {"command_seconds": 40.0}}
        if method != "ar":
            row["selection"] |= {"tokens": 4e6, "flops": 2e15, "seconds": 30 if method == "gates" else 150}
        rows += [row | {"seed": seed, "figures": figures(kl, 0.3)} for seed, kl in enumerate(kls)]
    lines = real_model_report.selectors_table({"teacher": teacher, "rows": rows}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == [
        "4",
        "gates",
        "0-2 8",
        "4.0",
        "2.0e+15",
        "40",
        "30",
        "20 %",
        "0.150 ± 0.050",
        "87.5 ± 0.0",
        "",
        "",
        "2",
    ]
    assert cells[1][7] == "100 %" and cells[1][-3:] == ["**+0.055 ± 0.005**", "+0.0 ± 0.0", "3"]
    assert cells[2][3:8] == ["", "", "40", "", ""] and cells[2][-3] == "+0.025 ± 0.075"


# ------------------------------------------------------------------------ what is measured
def test_the_first_questions_of_recall_are_examples():
    for document in model_quality.task_documents(3)["associative_recall"]:
        questions = document.text.partition("?")[2].split(",")
        counted = [document.text[start:stop].strip() for start, stop in document.answers]
        assert len(questions) == 16 and counted == [question.split()[1] for question in questions[4:]]


def test_needles_and_facts_follow_from_their_text():
    for seed in range(20):
        document = needle_recall(random.Random(seed), num_sentences=40, num_needles=3)
        city = document.text.split()[-3]
        assert f"The code of {city} is {document.answer}." in document.prompt and city in CITIES
        assert document.prompt.count("The code of") == 4 and document.answer.isdecimal() and len(document.answer) == 5
        facts = two_hop_facts(random.Random(seed))
        sentences, *asked = facts.text.splitlines()
        assert len(asked) == len(facts.answers) == 4
        for line, (start, stop) in zip(asked, facts.answers):
            home, code = line.split(". ")
            assert f"{home}." in sentences and code in sentences and facts.text[start:stop] in line


def test_generated_answers_are_those_of_greedy_decoding(llama):
    """The same as a search with full forward passes, of prompts that are cut to one length."""
    model = load_teacher(llama).eval()
    tokenizer = runtime.data.load_tokenizer(llama)
    documents = [needle_recall(random.Random(seed), num_sentences=3) for seed in range(5)]
    found = generated_answers(model, tokenizer, documents, batch_size=2)
    encoded = [tokenizer(document.prompt, add_special_tokens=False)["input_ids"] for document in documents]
    length = min(map(len, encoded))
    for document, ids, answer in zip(documents, encoded, found):
        ids = torch.tensor([ids[-length:]])
        for _ in range(len(tokenizer(f" {document.answer}", add_special_tokens=False)["input_ids"]) + 1):
            with torch.no_grad():
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        text = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        assert answer == text.replace(",", ".").replace("\n", ".").split(".")[0].strip()


def test_quality_of_the_teacher_is_exact_and_of_a_changed_model_is_not(llama):
    teacher = load_teacher(llama).eval()
    tokenizer = runtime.data.load_tokenizer(llama)
    ids = torch.randint(0, 96, (5, 40), generator=torch.Generator().manual_seed(0))
    sizes = model_quality.Sizes(documents=2, needles=3, needle_lengths=(256, 1024), samples=2)
    quality = model_quality.Quality(teacher, tokenizer, ids, sizes)
    found = quality.figures(teacher)
    with torch.no_grad():
        logits = teacher(ids).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1
    assert "needle_256" in found and "needle_1024" not in found  # it has 512 positions
    other = load_teacher(llama).eval()
    with torch.no_grad():
        other.model.layers[1].attn.o_proj.weight.mul_(3)
        theirs = other(ids).logits.double().log_softmax(-1)
    changed = quality.figures(other)
    expected = (logits.softmax(-1) * (logits.log_softmax(-1) - theirs)).sum(-1).mean()
    assert changed["kl"] == pytest.approx(expected.item(), rel=1e-4)
    assert [sample["prompt"] for sample in quality.samples(other)] == tokenizer.batch_decode(ids[:2, :48])

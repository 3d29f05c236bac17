"""report.py: a page for every run folder, made of what the run has logged."""

import json
import re

from runtime.config import dump_config, load_config
from runtime.run_folder import CONFIG, METRICS, RUN

import pytest
import yaml

import report
from reporting.page import page, table
from reporting.run_record import read_run

FACTS = {
    "started": "2026-01-02T03:04:05+0000",
    "command": ["train.py", "--cfg", "stage.yaml"],
    "git": "0123abc",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "triton": None},
    "world_size": 1,
    "device": "cpu",
}


def run_folder(folder, lines, stage=1):
    """A run folder as train.py leaves it while it trains."""
    settings = {
        "stage": stage,
        "data": {"cache_dir": "chunks"},
        "teacher_model": {"name": "a <teacher>"},
        "student_model": {
            "name": "gdn_v4",
            "keep_full_attention_layers": [] if stage == 1 else [1],
        },
        "train": {
            "output_dir": str(folder),
            "batch_size": 4,
            "train_seq_len": 32,
            "lr": 1e-3,
            "max_steps": 2,
        },
    }
    if stage > 1:
        settings["train"]["student_init_ckpt"] = "stage1/converted-hf"
    folder.mkdir(exist_ok=True)
    (folder / "input.yaml").write_text(yaml.safe_dump(settings))
    (folder / CONFIG).write_text(dump_config(load_config(folder / "input.yaml")))
    (folder / RUN).write_text(json.dumps(FACTS))
    (folder / METRICS).write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return folder


LINES = [
    {"step": 0, "eval_loss": 4.0, "eval_layer_error/00": 8.0, "eval_layer_error/01": 16.0},
    {
        "step": 1,
        "tokens": 128,
        "seconds": 2.0,
        "loss": 3.0,
        "learning_rate": 1e-3,
        "layer_error/00": 0.5,
    },
    {"step": 2, "tokens": 256, "seconds": 4.0, "loss": 2.0, "tokens_per_second": 64.0, "mfu": 0.25},
    {
        "step": 2,
        "tokens": 256,
        "seconds": 4.0,
        "eval_loss": 2.5,
        "eval_layer_error/00": 1.0,
        "eval_layer_error/01": 2.0,
    },
]


def test_the_page_of_a_run_shows_what_it_logged_and_needs_no_other_file(tmp_path, capsys):
    folder = run_folder(tmp_path / "stage1", LINES)
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    html = (folder / "report.html").read_text()
    for text in (
        "Stage 1: attention alignment",
        "a &lt;teacher&gt;",
        "0123abc",
        "not installed",
        "25.0%",
        "256",
        "2.5 (step 2)",
    ):
        assert text in html
    assert html.count("data:image/png;base64,") == 3  # losses, progress, alignment
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "Evaluation" not in html and "not finished" in html


def test_a_run_without_stage_1_has_no_alignment(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert report.main([str(run_folder(tmp_path / "stage2", lines, stage=2))]) == 0
    html = (tmp_path / "stage2" / "report.html").read_text()
    assert "Stage 2: logit distillation" in html and "full attention in layers [1]" in html
    assert "Alignment" not in html


def test_a_folder_that_is_no_run_is_one_line_and_the_others_get_their_page(tmp_path, capsys):
    run = run_folder(tmp_path / "run", LINES)
    silent = run_folder(tmp_path / "silent", [])
    assert report.main([str(tmp_path), str(silent), str(run)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(error.startswith("report.py: error: RUN: ") for error in errors)
    assert f"{tmp_path} holds no run of train.py" in errors[0] and "has logged no step yet" in errors[1]
    assert (run / "report.html").is_file() and not (silent / "report.html").exists()


def test_samples_need_an_export(tmp_path, capsys):
    run = run_folder(tmp_path / "run", LINES)
    assert report.main([str(run), "--samples", "1"]) == 1
    assert "--samples: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="--samples: -1 must be at least 0"):
        report.main([str(run), "--samples", "-1"])


def test_a_step_logged_twice_counts_once_and_a_broken_line_not_at_all(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 1, "eval_loss": 1.5},
        '{"step": 3, "lo',
    ]
    run = read_run(run_folder(tmp_path / "run", lines))
    assert (run.curve("loss"), run.curve("eval_loss")) == ([(1, 2.0), (2, 1.0)], [(2, 1.5)])


def test_layer_errors_are_of_heldout_text_where_there_is_some(tmp_path):
    """Of a step that an interrupted run logged twice, the last."""
    train = {
        "step": 1,
        "loss": 3.0,
        "layer_loss/00": 9.0,
        "layer_error/00": 0.5,
        "layer_error/01": 0.25,
    }
    assert read_run(run_folder(tmp_path / "train", [train])).layer_errors() == ([1], [[0.5, 0.25]])
    pairs = ((4, 9), (0, 8), (4, 1))
    heldout = [{"step": step, "eval_layer_error/01": 2 * error, "eval_layer_error/00": error} for step, error in pairs]
    run = read_run(run_folder(tmp_path / "heldout", [train, *heldout]))
    assert run.layer_errors() == ([0, 4], [[8, 16], [1, 2]])


def test_texts_are_escaped_and_empty_sections_left_out():
    html = page("a < b", "", {"Shown": table(("x",), [("<i>",)]), "Empty": ""})
    assert "&lt;i&gt;" in html and "a &lt; b" in html and "Empty" not in html

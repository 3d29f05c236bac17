"""The W&B scripts: configs for every layer, losses from real offline runs or metrics.jsonl, and
their ranking."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from runtime.config import load_config

import pytest
import wandb

from layer_selection import (
    generate_layer_configs_ga_s2,
    get_ranking_from_wandb_loss_log,
    retrieve_loss_log_from_wandb,
)

LOSSES = {
    0: [0.9, 0.5, 0.3],
    1: [0.8, 0.2, 0.1],
    2: [0.7, 0.6, 0.4],
    3: [0.9, 0.3, 0.2],
}  # at steps 1, 10, 20


@pytest.fixture
def runs(stage2, tmp_path):
    folder = tmp_path / "candidates"
    generate_layer_configs_ga_s2.main(["--cfg", str(stage2), "--output_dir", str(folder), "train.max_steps=20"])
    return folder


def log_offline(folder, runs):
    """Real offline runs, (name, rows) one after the other, in a process of their own."""
    script = """
import json, os, sys, wandb
folder, runs = json.loads(sys.argv[1])
os.makedirs(folder, exist_ok=True)
for name, rows in runs:
    run = wandb.init(mode="offline", project="p", name=name, dir=folder)
    run.config.update({"output_dir": name})
    for row in rows:
        run.log(row)
    run.finish()
"""
    subprocess.run(
        [sys.executable, "-c", script, json.dumps([str(folder), runs])],
        check=True,
        capture_output=True,
    )


def rows_of(losses, steps=(1, 10, 20)):
    return [{"eval/loss": loss, "train/loss": 2 * loss, "train/global_step": step} for step, loss in zip(steps, losses)]


def write_metrics(runs, losses=LOSSES, steps=(1, 10, 20)):
    for layer, values in losses.items():
        folder = runs / f"layer_{layer}" / "run"
        folder.mkdir(exist_ok=True)
        lines = [
            json.dumps({"step": step, "loss": value if isinstance(value, str) else 2 * value})
            + "\n"
            + json.dumps({"step": step, "eval_loss": value})
            for step, value in zip(steps, values)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def retrieve(runs, *options):
    retrieve_loss_log_from_wandb.main(["--runs", str(runs), *options])
    return json.loads((runs / "loss_log.json").read_text())


def rank(runs, *options):
    get_ranking_from_wandb_loss_log.main(["--log", str(runs / "loss_log.json"), *options])
    return json.loads((runs / "ranking.json").read_text())


def test_a_config_for_every_layer_of_the_teacher(runs, stage2):
    asked = load_config(stage2)
    for layer in range(4):
        cfg = load_config(runs / f"layer_{layer}" / "stage2.yaml")
        assert cfg.student_model.keep_full_attention_layers == [layer] and cfg.train.max_steps == 20
        assert cfg.train.output_dir == str(runs / f"layer_{layer}" / "run")
        assert cfg.train.student_init_ckpt == asked.train.student_init_ckpt
    assert sorted(path.name for path in runs.iterdir()) == [
        "candidates.json",
        *(f"layer_{layer}" for layer in range(4)),
    ]
    again = ["--cfg", str(stage2), "--output_dir", str(runs)]
    generate_layer_configs_ga_s2.main([*again, "train.max_steps=20"])
    with pytest.raises(
        ValueError,
        match=r"layer_0/stage2.yaml is of other candidates \(train.max_steps is 20 there, 30 here\)",
    ):
        generate_layer_configs_ga_s2.main([*again, "train.max_steps=30"])


def test_candidates_of_an_earlier_version_keep_reading_chunks_whole(tmp_path, stage2):
    """Of one without data.document_mask."""
    command = ["--cfg", str(stage2), "--output_dir", str(tmp_path)]
    generate_layer_configs_ga_s2.main([*command, "data.document_mask=false"])
    files = list(tmp_path.glob("layer_*/stage2.yaml"))
    for file in files:
        file.write_text(file.read_text().replace("  document_mask: false\n", ""))
        assert load_config(file).data.document_mask == "auto"
    generate_layer_configs_ga_s2.main(command)
    assert len(files) == 4 and not any(load_config(file).data.document_mask for file in files)


def test_offline_runs_and_metrics_give_the_same_ranking(runs, tmp_path, stage2, monkeypatch):
    """Layer 1's run was stopped and resumed in a second W&B run, which repeats step 10."""
    write_metrics(runs)
    local = retrieve(runs, "--source", "metrics")
    logged = [(str(runs / f"layer_{layer}" / "run"), rows_of(LOSSES[layer])) for layer in (0, 2, 3)]
    logged += [(str(runs / "layer_1" / "run"), rows_of([0.8, 99.0], (1, 10)))]
    logged += [(str(runs / "layer_1" / "run"), rows_of(LOSSES[1][1:], (10, 20)))]
    log_offline(tmp_path / "wandb", logged)
    log = retrieve(runs, "--source", "offline", "--wandb_dir", str(tmp_path / "wandb"))
    assert log == local | {"source": "offline"} and log["layers"]["1"]["history"] == [
        [1, 0.8],
        [10, 0.2],
        [20, 0.1],
    ]
    ranking = rank(runs, "--ratio", "0.5", "--cfg", str(stage2))
    assert [layer["layer"] for layer in ranking["layers"]] == [1, 3, 0, 2] and ranking["keep"] == [
        1,
        3,
    ]
    assert ranking["layers"][0]["importance"] == pytest.approx(-0.1) and ranking["facts"]["compared_at_step"] == 20
    (chosen,) = runs.glob("*_gdn_v4_hybrid_0_5_ga_s2")
    cfg = load_config(chosen / "stage2.yaml")
    assert cfg.student_model.keep_full_attention_layers == [1, 3] and cfg.train.output_dir == str(chosen / "stage2")
    assert (runs / "ranking.png").stat().st_size > 5000
    retrieve(runs, "--source", "metrics", "--metric", "train/loss")
    assert rank(runs, "--top-k", "1")["layers"][0]["importance"] == pytest.approx(-0.2)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))  # W&B's own variable, where its runs were told to go
    assert retrieve(runs, "--source", "offline") == log


def test_missing_and_unfinished_layers_are_named(runs):
    write_metrics(runs)
    (runs / "layer_3" / "run" / "metrics.jsonl").unlink()
    write_metrics(runs, {1: LOSSES[1]}, (1, 5, 10))
    both = "layer 1 is unfinished, at step 10 of 20; layer 3 has no run .*layer_3/run in .*Train them: deepspeed"
    with pytest.raises(ValueError, match=both):
        retrieve(runs, "--source", "metrics")
    assert not (runs / "loss_log.json").exists()


@pytest.mark.parametrize("loss", [float("nan"), "NaN", float("inf")])
def test_a_loss_that_is_not_finite_is_refused(runs, loss):
    write_metrics(runs, LOSSES | {2: [0.7, 0.6, loss]})
    with pytest.raises(ValueError, match="layer 2 has eval/loss (nan|inf) at step 20"):
        retrieve(runs, "--source", "metrics")
    assert not (runs / "loss_log.json").exists()


def test_a_damaged_metrics_file_is_named(runs):
    write_metrics(runs)
    file = runs / "layer_3" / "run" / "metrics.jsonl"
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(
        ValueError,
        match="layer_3/run/metrics.jsonl: has a line that is no JSON object; take it out",
    ):
        retrieve(runs, "--source", "metrics")


def test_stopped_by_rule_is_a_state(runs):
    """Layers 2 and 0 stop at step 10 and come after 1 and 3, although layer 0 had a lower loss
    there than 3 at its last step."""
    losses = {0: [0.9, 0.15], 1: LOSSES[1], 2: [0.7, 0.6], 3: LOSSES[3]}
    write_metrics(runs, losses)
    log = retrieve(runs, "--source", "metrics", "--stopped_at", "5", "10")
    assert {layer: (entry["state"], entry["steps"]) for layer, entry in log["layers"].items()} == {
        "0": ("stopped by rule", 10),
        "1": ("finished", 20),
        "2": ("stopped by rule", 10),
        "3": ("finished", 20),
    }
    ranking = rank(runs, "--top-k", "2")
    assert [layer["layer"] for layer in ranking["layers"]] == [1, 3, 0, 2]
    assert ranking["facts"]["stopped_at_step"] == {"0": 10, "2": 10}


def test_equal_losses_are_ties(runs):
    write_metrics(runs, LOSSES | {3: LOSSES[0]})
    retrieve(runs, "--source", "metrics")
    assert [(layer["layer"], layer["ties"]) for layer in rank(runs, "--top-k", "2")["layers"]] == [
        (1, []),
        (0, [3]),
        (3, [0]),
        (2, []),
    ]
    assert json.loads((runs / "ranking.json").read_text())["undecided"] == [0, 3]


def test_the_training_loss_is_averaged_over_the_last_tenth(runs):
    steps = range(1, 21)
    write_metrics(
        runs,
        {layer: [1.0] * 18 + [0.1 * layer + 0.5, 0.1 * layer - 0.1] for layer in range(4)},
        steps,
    )
    retrieve(runs, "--source", "metrics", "--metric", "train/loss")
    ranking = rank(runs, "--top-k", "1")
    means = {layer["layer"]: layer["importance"] for layer in ranking["layers"]}
    assert means == pytest.approx({layer: -(0.2 * layer + 0.4) for layer in range(4)})


def test_bad_input(runs, tmp_path, capsys):
    with pytest.raises(ValueError, match="--runs: .* has no candidates.json; make it with generate_layer_configs"):
        retrieve(tmp_path)
    with pytest.raises(ValueError, match="--wandb_dir: .* holds no W&B run"):
        retrieve(runs, "--source", "offline")
    write_metrics(runs)
    with pytest.raises(
        ValueError,
        match="layer 0 has no eval/los in its log, only eval/loss, train/loss; layer 1 has no",
    ):
        retrieve(runs, "--source", "metrics", "--metric", "eval/los")
    (tmp_path / "offline-run").mkdir()
    (tmp_path / "offline-run" / "run-x.wandb").write_bytes(b"no log")
    with pytest.raises(ValueError, match="layer 0 has no run .*; layer 1 has no run"):
        retrieve(runs, "--source", "offline", "--wandb_dir", str(tmp_path / "offline-run"))
    assert "run-x.wandb: holds no run, skipped" in capsys.readouterr().out
    retrieve(runs, "--source", "metrics")
    log = runs / "loss_log.json"
    whole = json.loads(log.read_text())
    for break_it, message in (
        (lambda log: log["layers"].pop("2"), r"layers \[2\] of .* are missing"),
        (
            lambda log: log["layers"]["1"].update(state="running"),
            r"layers \[1\] of .* are unfinished",
        ),
        (
            lambda log: log["layers"]["3"].update(history=[]),
            r"layers \[3\] of .* are without eval/loss",
        ),
        (lambda log: log.pop("layers"), "is no loss log"),
    ):
        broken = json.loads(json.dumps(whole))
        break_it(broken)
        log.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            rank(runs, "--top-k", "1")
    log.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="--top-k: 5 must be between 1 and 4"):
        rank(runs, "--top-k", "5")
    other = tmp_path / "other.yaml"
    other.write_text((runs / "layer_0" / "stage2.yaml").read_text().replace(whole["teacher"], "Qwen/other"))
    with pytest.raises(ValueError, match="--cfg: .* is of the teacher Qwen/other, the log of "):
        rank(runs, "--top-k", "1", "--cfg", str(other))
    with pytest.raises(ValueError, match="is of stage 1; name a stage-2 file"):
        rank(runs, "--top-k", "1", "--cfg", "configs/qwen3_8b_gdn_v4/stage1.yaml")
    assert not (runs / "ranking.json").exists()


def test_no_key(runs):
    """W&B's own client, in a process without a key."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "HOME": str(runs),
        "NETRC": str(runs / "none"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, retrieve_loss_log_from_wandb.__file__, "--runs", str(runs)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1 and done.stderr.startswith("retrieve_loss_log_from_wandb.py: error: WANDB_API_KEY: ")
    assert "--source offline or --source metrics" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


class Service:
    """The part of wandb.Api that is used, with runs as it returns them."""

    def __init__(self, runs):
        self.found = {"me/mine": runs}

    def runs(self, path):
        if path not in self.found:
            raise ValueError(f"Could not find project {path}")
        return self.found[path]


def service_run(created, name, output_dir, rows):
    return SimpleNamespace(
        created_at=created,
        name=name,
        config={"output_dir": output_dir},
        scan_history=lambda: iter(rows),
    )


def test_the_service(runs, monkeypatch):
    """Renamed runs are identified by their output_dir, those of others are ignored, later ones
    continue earlier ones."""
    folders = {layer: str(runs / f"layer_{layer}" / "run") for layer in range(4)}
    there = [
        service_run("2026-01-01", f"renamed {layer}", folders[layer], rows_of(LOSSES[layer])) for layer in (0, 2, 3)
    ]
    there += [service_run("2026-02-02", folders[1], "x", rows_of(LOSSES[1][1:], (10, 20)))]
    there += [service_run("2026-01-01", "else", "y", [{}])]
    there += [service_run("2026-02-01", folders[1], "x", rows_of([0.8, 99.0], (1, 10)))]
    monkeypatch.setattr(wandb, "Api", lambda: Service(there))
    log = retrieve(runs, "--entity", "me", "--project", "mine")
    write_metrics(runs)
    assert log == retrieve(runs, "--source", "metrics") | {"source": "service"}
    monkeypatch.setenv("WANDB_ENTITY", "me")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert retrieve(runs) == log
    with pytest.raises(
        ValueError,
        match="--project: W&B did not return me/other .*Could not find.*check --entity and --project",
    ):
        retrieve(runs, "--entity", "me", "--project", "other")
    there.pop(0)
    with pytest.raises(ValueError, match="layer 0 has no run .*layer_0/run in the project me/mine"):
        retrieve(runs, "--entity", "me", "--project", "mine")


@pytest.mark.slow
def test_the_scripts_from_configs_to_a_ranking(stage2, tmp_path):
    """The scripts with real training runs that log to W&B offline: its logs agree with
    metrics.jsonl."""
    generate_layer_configs_ga_s2.main(["--cfg", str(stage2), "--output_dir", str(tmp_path), "train.report_to=wandb"])
    root = os.path.dirname(os.path.dirname(retrieve_loss_log_from_wandb.__file__))
    for layer in range(4):
        subprocess.run(
            [
                sys.executable,
                f"{root}/train.py",
                "--cfg",
                str(tmp_path / f"layer_{layer}" / "stage2.yaml"),
            ],
            check=True,
            env=os.environ | {"WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"},
        )
    log, local = (
        retrieve(tmp_path, "--source", "offline"),
        retrieve(tmp_path, "--source", "metrics"),
    )
    for layer, entry in log["layers"].items():
        assert entry["history"] == [[step, pytest.approx(value)] for step, value in local["layers"][layer]["history"]]
        assert entry["state"] == "finished" and entry["steps"] == 2
    assert rank(tmp_path, "--ratio", "0.25")["keep"] == [2]

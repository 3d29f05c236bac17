"""Layer selection from a stage-2 config: every method, resuming, and bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from runtime.config import dump_config, load_config
from runtime.data import open_chunks
from runtime.guard import REQUEUE

import pytest
import yaml
from conftest import LENGTH, mean_kl, read_alone

from convert import load_teacher
from distill_model import StudentForCausalLM
from layer_selection import baselines, bench, intervals, select_layers, stage2_runs
from layer_selection.stage2_runs import HELDOUT_KL, teacher_name
from layer_selection.write_configs import PUBLISHED


def flags(**options) -> list[str]:
    """The words of a command line: --name value for every option, --name alone where the value is
    True."""
    words = []
    for name, value in options.items():
        words.append("--top-k" if name == "top_k" else f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def select(stage2, out, *words, **options):
    """Runs select_layers.py on six held-out sequences; its ranking.json, or None if it wrote
    none."""
    defaults = flags(cfg=stage2, output_dir=out, sequences=6, batch_size=4)
    select_layers.main([*defaults, *words, *flags(**options)])
    ranking = out / "ranking.json"
    return json.loads(ranking.read_text()) if ranking.is_file() else None


@pytest.mark.parametrize("method", ["scan", "ppl", "mse"])
def test_a_layer_with_a_large_error_ranks_first(stage2, tmp_path, method):
    ranking = select(stage2, tmp_path, method=method, ratio=0.25)
    assert ranking["keep"] == [2] and sorted(layer["layer"] for layer in ranking["layers"]) == [
        0,
        1,
        2,
        3,
    ]
    assert all(layer["low"] <= layer["importance"] <= layer["high"] for layer in ranking["layers"])
    folder = tmp_path / f"{Path(load_config(stage2).teacher_model.name).name}_0.1m_gdn_v4_hybrid_0_25_{method}"
    chosen, asked = load_config(folder / "stage2.yaml"), load_config(stage2)
    assert chosen.student_model.keep_full_attention_layers == [2]
    assert chosen.train == dataclasses.replace(asked.train, output_dir=str(folder / "stage2")), (
        "a run folder of its own"
    )


def test_scan_is_the_kl_with_one_layer_restored(stage2, tmp_path, teacher_dir):
    """Against a hybrid that is built for every layer, on the held-out sequences."""
    ranking = select(stage2, tmp_path, method="scan", top_k=1)
    teacher = load_teacher(teacher_dir)
    student = StudentForCausalLM.from_pretrained(load_config(stage2).train.student_init_ckpt)
    chunks = open_chunks(load_config(stage2).data.cache_dir, LENGTH, document_mask="auto")
    for layer in ranking["layers"]:
        hybrid = student.restore_full_attention(teacher, [layer["layer"]]).eval()
        kls = [mean_kl(*predicted) for predicted, _ in read_alone(chunks.heldout, 6, hybrid, teacher)]
        assert layer["importance"] == pytest.approx(-sum(kls) / 6, rel=1e-4)


@pytest.mark.parametrize(
    "file", ["side_by_side/candidates.yaml", "gates/gates.yaml", "rounds/rounds.yaml", "layer_3/stage2.yaml"]
)
def test_a_selection_that_read_chunks_whole_keeps_that(stage2, tmp_path, capsys, file):
    """One that a version began whose data.document_mask was false unless set; new ones read documents."""
    recorded = tmp_path / file
    recorded.parent.mkdir()
    recorded.write_text(dump_config(load_config(stage2, ["data.document_mask=false"])))
    users = tmp_path / "new" / "stage2.yaml"  # a user's own file is no record
    users.parent.mkdir()
    users.write_text(Path(stage2).read_text())
    for folder, kept, said in (
        (tmp_path, False, f"data.document_mask: false, as recorded in {recorded}\ndata: chunks are read whole"),
        (tmp_path / "new", "auto", "data: documents are read one by one"),
    ):
        select(stage2, folder, method="uniform", top_k=1)
        (chosen,) = folder.glob("*_gdn_v4_hybrid_*/stage2.yaml")
        assert load_config(chosen).data.document_mask == kept
        assert said in capsys.readouterr().out


def test_teachers_are_named_as_in_configs():
    for folder, facts in yaml.safe_load(PUBLISHED.read_text())["teachers"].items():
        assert teacher_name(facts["name"]) == folder
    assert [
        teacher_name(name) for name in ("teachers/qwen2.5_1.5b", "fla-hub/transformer-1.3B-100B", "a/SmolLM2-135M")
    ] == ["qwen2.5_1.5b", "transformer_1.3b", "smollm2_135m"]


def test_top_k_names_the_ratio_that_keeps_as_many(stage2, tmp_path):
    select(stage2, tmp_path, method="uniform", top_k=3)
    (folder,) = tmp_path.glob("*_gdn_v4_hybrid_*")
    assert folder.name.endswith("_hybrid_0_75_uniform") and (folder / "stage2.yaml").is_file()


def test_uniform_and_random(stage2, tmp_path):
    assert select(stage2, tmp_path / "u", method="uniform", top_k=2)["keep"] == [1, 3]
    first, again, other = (
        select(stage2, tmp_path / f"r{i}", method="random", top_k=2, seed=seed)["layers"]
        for i, seed in enumerate("112")
    )
    assert first == again != other


def test_finished_candidates_are_not_trained_again(stage2, tmp_path):
    for layer, kl in enumerate((0.3, 0.1, 0.2, 0.4)):
        (tmp_path / f"layer_{layer}").mkdir()
        (tmp_path / f"layer_{layer}" / HELDOUT_KL).write_text(json.dumps([kl, kl + 0.01]))
    options = ["--method", "ga_s2", "--top-k", "2", "--launcher", "false", "--sequences", "2"]
    assert select(stage2, tmp_path, *options)["keep"] == [1, 2]
    (tmp_path / "ranking.json").unlink()
    for incomplete in ("[0.4]", None):  # of another number of sequences, or not there
        file = tmp_path / "layer_3" / HELDOUT_KL
        file.write_text(incomplete) if incomplete else file.unlink()
        with pytest.raises(ValueError, match="layer 3: its run in .* exit code 1"):
            select(stage2, tmp_path, *options)
    assert not (tmp_path / "ranking.json").exists()


@pytest.mark.slow
def test_ga_s2_trains_what_is_missing(stage2, tmp_path):
    for layer in (0, 3):
        (tmp_path / f"layer_{layer}").mkdir()
        (tmp_path / f"layer_{layer}" / HELDOUT_KL).write_text(json.dumps([9.0] * 6))
    assert select(stage2, tmp_path, method="ga_s2", top_k=1, launcher=sys.executable, candidate=1) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_0", "layer_1", "layer_3"]
    written = (tmp_path / "layer_1" / HELDOUT_KL).stat().st_mtime_ns
    ranking = select(stage2, tmp_path, method="ga_s2", top_k=1, launcher=sys.executable)
    assert ranking["keep"] == [2] and (tmp_path / "layer_1" / HELDOUT_KL).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "options, message",
    [
        (["--top-k", "5"], "--top-k: 5 must be between 1 and the teacher's 4 layers"),
        (["--ratio", "0.01"], "--ratio: 0.01 of 4 layers keeps 0"),
        (
            ["--top-k", "1", "--method", "ga_s2", "--candidate", "4"],
            "--candidate: 4 must be a layer in 0..3",
        ),
        (
            ["--top-k", "1", "--method", "mse", "--candidate", "1"],
            "--candidate: 1 needs --method ga_s2",
        ),
        (["--interval", "5", "--method", "scan"], "--interval: 5 must be between 1 and the teacher's 4 layers"),
        (["--interval", "2", "--method", "mse"], "--interval: 2 is for --method scan and ga_s2"),
        (["--interval", "2", "--method", "ga_s2", "--full_runs"], "--interval: its candidates train jointly; leave"),
        (["--top-k", "1", "--method", "ga_s2", "--rounds", "0"], "--rounds: 0 must be at least 1"),
        (["--top-k", "1", "--sequences", "1"], "--sequences: 1 must be at least 2"),
        (["--top-k", "1", "--batch_size", "0"], "--batch_size: 0 must be at least 1"),
        (["--top-k", "1", "--method", "ga_s2", "--correlation", "nan"], "--correlation: nan must be between -1 and 1"),
        (["--top-k", "1", "stage=3"], "is of stage 3; name a stage-2 file"),
    ],
)
def test_bad_input(stage2, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        select(stage2, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--candidate", "0"],
        ["--slurm"],
        ["--full_runs"],
        ["--halving"],
        ["--rounds", "4"],
        ["--window", "0"],
        ["--correlation", "0.5"],
    ],
)
def test_a_command_for_the_former_default_does_not_become_another(stage2, tmp_path, options):
    message = f"^{options[0]}: is not for the default method, gates; add --method ga_s2, the default before$"
    with pytest.raises(ValueError, match=message):
        select(stage2, tmp_path / "out", "--top-k", "1", *options)
    with pytest.raises(ValueError, match="^--interval: is not for the default method, gates"):
        select(stage2, tmp_path / "out", "--interval", "2")
    assert not (tmp_path / "out").exists()


def test_gates_is_the_default_and_says_so(stage2, tmp_path, capsys):
    train = ["train.max_steps=2", "train.batch_size=2"]
    named = select(stage2, tmp_path / "named", *train, method="gates", top_k=1)
    assert "the default" not in capsys.readouterr().out
    ranking = select(stage2, tmp_path / "out", *train, top_k=1)
    shown = capsys.readouterr().out
    assert shown.startswith("Method: gates, the default (in earlier versions ga_s2); --method names another\n")
    assert ranking["method"] == "gates" and ranking["layers"] == named["layers"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("method", ["scan", "ppl", "mse", "smart", "ga_s1"])
def test_a_signal_makes_untrained_methods_exit_to_be_requeued(stage2, tmp_path, monkeypatch, method, number):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the launch scripts hand it on
    # Where it begins to measure.
    module, name = (baselines, "AttentionAlignmentModel") if method in ("mse", "ga_s1") else (bench, "tqdm")
    monkeypatch.setattr(module, name, lambda *args, **options: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        select(stage2, tmp_path / "out", method=method, top_k=1)
    assert end.value.code == REQUEUE and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert select(stage2, tmp_path / "out", method=method, top_k=1)["keep"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An sbatch that records its arguments."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{tmp_path}/submitted\nwc -l <{tmp_path}/submitted\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(select_layers.ROOT)
    return tmp_path / "submitted"


def test_slurm_gets_missing_layers_as_an_array_and_the_ranking_after_it(stage2, tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SBATCH_ARGS", "--partition=p --mem=1G")
    out = tmp_path / "out"
    measured = out / "layer_1" / HELDOUT_KL
    measured.parent.mkdir(parents=True)
    measured.write_text("[1.0, 1.0]")
    assert select(stage2, out, "--method", "ga_s2", "--top-k", "2", "--slurm", "train.lr=1e-3") is None
    same = (
        f"--partition=p --mem=1G launch_selection.sh --cfg {stage2} --full_runs --cfg {stage2} --output_dir {out} --sequences 6 "
        "--batch_size 4 --method ga_s2 --top-k 2 train.lr=1e-3"
    )
    assert slurm.read_text().splitlines() == [
        f"--parsable --job-name=candidates --array=0,2,3%8 {same}",
        f"--parsable --job-name=selection --dependency=afterok:1 --kill-on-invalid-dep=yes {same}",
    ]
    for layer in (0, 2, 3):
        (out / f"layer_{layer}").mkdir()
        (out / f"layer_{layer}" / HELDOUT_KL).write_text("[1.0, 1.0]")
    select(stage2, out, "--method", "ga_s2", "--top-k", "2", "--slurm", "train.lr=1e-3")
    assert slurm.read_text().splitlines()[2:] == [f"--parsable --job-name=selection {same}"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--method", "mse"],
            "--slurm: trains every layer to its end, with --method ga_s2 or gr_s2 or avg_s2",
        ),
        (["--method", "ga_s2", "--halving"], "--slurm: trains every layer to its end"),
        ([], "--slurm: is not for the default method, gates; add --method ga_s2, the default before"),
        (
            ["--method", "ga_s2", "train.student_init_ckpt=/nowhere"],
            "train.student_init_ckpt: /nowhere holds no checkpoint",
        ),
    ],
)
def test_invalid_commands_are_not_submitted(stage2, tmp_path, slurm, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        select(stage2, tmp_path / "out", "--top-k", "2", "--slurm", *options)
    with pytest.raises(SystemExit):  # its jobs would submit themselves again
        select(stage2, tmp_path / "out", "--top-k", "2", "--slu")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--slurm: jobs run in .*; run this command there"):
        select(stage2, tmp_path / "out", "--method", "ga_s2", "--top-k", "2", "--slurm")
    assert not slurm.exists()


def test_the_launch_script_passes_a_complete_command_on(tmp_path):
    """As --slurm submits it: without its own defaults, and with the task's layer at the end."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\necho "python $*"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "VENV": str(tmp_path),
        "DEVICE": "cpu",
        "MASTER_PORT": "1",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    for arguments, command in (
        ("--cfg a.yaml --top-k 2", "--cfg a.yaml --top-k 2 --candidate 3"),
        ("train.lr=1", "--cfg c.yaml --method ga_s2 train.lr=1 --candidate 3"),
        ("RATIO=0.5 train.lr=1", "--cfg c.yaml --method ga_s2 --ratio 0.5 train.lr=1 --candidate 3"),
    ):
        words = arguments.split()
        settings = dict(word.split("=") for word in words if word.startswith("RATIO="))
        done = subprocess.run(
            ["bash", str(select_layers.ROOT / "launch_selection.sh"), *words[len(settings) :]],
            capture_output=True,
            text=True,
            env=environment | settings | {"CFG": "c.yaml"},
        )
        assert (
            done.returncode == 0
            and done.stdout.splitlines()[-1] == f"python layer_selection/select_layers.py {command}"
        ), done


@pytest.mark.parametrize("kept, chosen", [([1], 1), ([0, 1, 3], 3), ([], 1)])
def test_as_many_layers_as_the_config_keeps_are_chosen(stage2, tmp_path, capsys, kept, chosen):
    """Of four; a quarter where it keeps none. An option goes before it."""
    override = f"student_model.keep_full_attention_layers={kept}"
    ranking = select(stage2, tmp_path / "out", override, method="uniform")
    assert len(ranking["keep"]) == chosen
    assert f"Layers to keep: {chosen} of 4" in capsys.readouterr().out
    (chosen_config,) = (tmp_path / "out").glob("*/stage2.yaml")
    assert load_config(chosen_config).student_model.keep_full_attention_layers == ranking["keep"]
    assert len(select(stage2, tmp_path / "other", override, method="uniform", ratio=0.5)["keep"]) == 2


def test_candidates_alone_train_on_the_exact_teacher(stage2, tmp_path):
    """As those that train jointly; what was chosen trains as the config says."""
    cfg = load_config(stage2, ["train.dtype=bf16", "teacher_model.precision=fp8"])
    candidate = stage2_runs.candidate_config(cfg, [1], tmp_path)
    assert (cfg.teacher_model.precision, candidate.teacher_model.precision) == ("fp8", "exact")
    assert candidate.student_model.keep_full_attention_layers == [1]
    assert candidate.train.output_dir == str(tmp_path / "run")
    with pytest.raises(ValueError, match="layer 1: its run in .* exit code 1"):
        select(
            stage2,
            tmp_path / "out",
            *flags(method="ga_s2", top_k=1, candidate=1, launcher="false"),
            "train.dtype=bf16",
            "teacher_model.precision=fp8",
        )
    assert load_config(tmp_path / "out" / "layer_1" / "stage2.yaml").teacher_model.precision == "exact"
    assert stage2_runs.with_layers(cfg, [1], tmp_path).teacher_model.precision == "fp8"


def test_an_output_dir_that_is_a_file_is_refused(stage2, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir: .*out is a file; name a folder"):
        select(stage2, tmp_path / "out", method="uniform", top_k=1)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("method", ["scan", "ga_s2"])
def test_an_interval_keeps_the_best_phase(stage2, tmp_path, method, capsys):
    """Layer 2, with the large error, is in the first phase of two and the third of three; the last
    layers of each n can be expressed as an interval."""
    ranking = select(stage2, tmp_path / "2", method=method, interval=2)
    assert ranking["keep"] == [0, 2] and ranking["facts"]["phase"] == 0 and ranking["facts"]["interval"] == 2
    scores = {layer["layer"]: layer["importance"] for layer in ranking["layers"]}
    assert scores[0] == scores[2] > scores[1] == scores[3]
    shown = capsys.readouterr().out
    assert "Warning: runtimes that derive the layer kinds from full_attention_interval" in shown
    assert "they need phase 1, not 0: for them, train with student_model.keep_full_attention_layers=[1,3]" in shown
    assert ("of the FLOPs of 2 full runs" in shown) == (method == "ga_s2")
    assert shown.splitlines()[-1].startswith("next: deepspeed train.py --cfg ")
    assert select(stage2, tmp_path / "3", method=method, interval=3)["keep"] == [2]
    assert "Warning" not in capsys.readouterr().out
    (chosen,) = (tmp_path / "2").glob(f"*_hybrid_0_5_{method}_interval_2/stage2.yaml")
    assert load_config(chosen).student_model.keep_full_attention_layers == [0, 2]


def test_the_scan_of_an_interval_measures_whole_sets(stage2, tmp_path):
    ranking = select(stage2, tmp_path, method="scan", interval=3)
    held_out = bench.Bench(load_config(stage2), 6, 4)
    for layer in ranking["layers"]:
        kept = [i for i in range(4) if i % 3 == layer["layer"] % 3]
        kls = held_out.kls(held_out.student.restore_full_attention(held_out.teacher, kept).eval())
        assert layer["importance"] == pytest.approx(-sum(kls) / len(kls), rel=1e-4)


def test_sets_that_an_interval_expresses():
    expressed = {n: [i for i in range(8) if (i + 1) % n == 0] for n in range(1, 9)}
    assert all(intervals.interval_of(kept, 8) == n for n, kept in expressed.items() if len(kept) != 1)
    assert intervals.interval_of([7], 8) == 8 and intervals.interval_of([4], 8) == 5
    assert intervals.interval_of([0, 4], 8) is None and intervals.interval_of([3], 8) is None

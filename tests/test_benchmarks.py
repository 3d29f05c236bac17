"""The recall teacher and the comparison of students, at a size where nothing is learnt."""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from runtime.batch_plan import BatchPlan

import pytest
import torch
from datasets import Dataset
from torch.autograd import DeviceType
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import preprocess_chunk
import preprocess_download_tokenize
from benchmarks import (
    ablations,
    compare_students,
    decode,
    jobs,
    recall_teacher,
    selection_regret,
    serve,
    student_init,
    train_throughput,
)
from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, StudentForCausalLM
from hf_trainer import FrozenTeacher
from wrapper import AttentionAlignmentModel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recall_dir(tmp_path_factory):
    """A recall teacher that has seen four batches."""
    folder = tmp_path_factory.mktemp("recall")
    tiny = dataclasses.replace(recall_teacher.TINY, task_documents=600, text_files=20, text_rows=2, task_rows=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_teacher, "TINY", tiny)
        with pytest.raises(SystemExit, match="--max_steps: too few, held-out recall is"):
            recall_teacher.main(["--output_dir", str(folder), "--tiny", "--max_steps", "4"])
    torch.use_deterministic_algorithms(False)  # of the whole process
    return folder


def test_recall_teacher_is_a_plain_checkpoint_with_its_history(recall_dir, capsys):
    result = json.loads((recall_dir / "teacher.json").read_text())
    assert result["history"][-1]["step"] == 4 and result["tokens"] == 4 * 4 * 128
    assert (recall_dir / "teacher.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(recall_dir / "teacher")
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.num_parameters() == result["parameters"]
    with pytest.raises(SystemExit, match="--max_steps: too few, held-out recall is"):  # as the first time
        recall_teacher.main(["--output_dir", str(recall_dir), "--tiny"])
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "was begun with size 'tiny', not 'full'; name another"),
        (["--tiny", "--seed", "1"], "was begun with seed 0, not 1; name another"),
        (
            ["--tiny", "--text", str(ROOT / "docs")],
            f"was begun with text None, not '{ROOT / 'docs'}'; name another",
        ),
    ],
)
def test_a_folder_belongs_to_one_recall_teacher(recall_dir, options, message):
    with pytest.raises(ValueError, match=f"--output_dir: .* {message}"):
        recall_teacher.main(["--output_dir", str(recall_dir), *options])


def test_difficulty_is_a_choice(recall_dir):
    """What is not chosen stays, to the document."""
    for size in ("full", "quickstart"):
        mix = {"full": recall_teacher.FULL, "quickstart": recall_teacher.QUICKSTART}[size].tasks
        assert recall_teacher.scale_of(size).tasks.interleaved(0, 5) == mix.interleaved(0, 5)
    harder = recall_teacher.scale_of("hard", {"num_pairs": 100, "num_words": 600, "num_fillers": 9}).tasks
    (document,) = harder.documents(0, 1, hardest=True)["associative_recall"]
    pairs = document.text.partition(" ?")[0].removeprefix("recall:").split(",")
    assert len(pairs) == 100 and len(pairs[-1].split()) == 2 + 9 and harder.num_words == 600
    assert harder.ranges["multi_hop_recall"]["num_fillers"] == (0, 9)
    with pytest.raises(ValueError, match="--num_pairs: 3 must be at least 8, the easiest of --size hard"):
        recall_teacher.main(["--output_dir", "unused", "--size", "hard", "--num_pairs", "3"])
    with pytest.raises(ValueError, match="was begun with num_pairs None, not 9; name another"):
        recall_teacher.main(["--output_dir", str(recall_dir), "--tiny", "--num_pairs", "9"])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--num_words", "119"],
            "--num_words: 119 are too few for 96 pairs and 40 chains of three words, which need 120",
        ),
        (["--num_pairs", "513"], "--num_words: 512 are too few for 513 pairs and 40 chains .*, which need 513"),
        (["--num_chains", "171"], "--num_words: 512 are too few for 96 pairs and 171 chains .*, which need 513"),
        (["--num_words", "5487"], "--num_words: 5487 must be at most 5486, the words that are no fillers"),
    ],
)
def test_documents_that_cannot_be_are_refused(tmp_path, options, message):
    """By the benchmark of selectors before it claims its folder."""
    for main in (recall_teacher.main, selection_regret.main):
        with pytest.raises(ValueError, match=f"^{message}"):
            main(["--output_dir", str(tmp_path / "out"), "--size", "hard", *options])
    assert not (tmp_path / "out").exists()
    assert recall_teacher.scale_of("hard", {"num_words": 120}).tasks.documents(0, 9, hardest=True)


def test_task_rows_are_fresh_and_mark_answers_alone(recall_dir):
    tokenizer = recall_teacher.load_tokenizer(str(recall_dir / "tokenizer"))
    rows = recall_teacher.TaskRows(tokenizer, recall_teacher.TINY, seed=3)
    drawn = [row for row, _ in zip(rows, range(40))]
    assert len({tuple(ids.tolist()) for ids, _ in drawn}) == 40 and all(len(ids) == 128 for ids, _ in drawn)
    ids, is_answer = drawn[0]
    text = tokenizer.decode(ids)
    answers = tokenizer.decode(ids[is_answer]).split()
    assert 0 < is_answer.float().mean() < 0.5
    assert answers and all(answer in text.partition("?")[2] for answer in answers)


def test_training_masks_are_windows_but_for_one_layer_in_turn():
    """Against transformers' own sliding window, row by row; the model that is saved has none."""
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, head_dim=16, initializer_range=0.5)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    ids = torch.randint(32, (7, 19))
    plain = model.eval()(ids).logits
    recall_teacher.mask_training(model, recall_teacher.training_masks(7, 3, 19, (1, 2), 5))
    assert torch.equal(model(ids).logits, plain)
    got = model.train()(ids).logits
    rows = {1: (0, 3, 6), 2: (1, 4), None: (2, 5)}  # the layer that is far -> the rows of its turn
    for far, its in rows.items():
        kinds = ["full_attention" if far in (i, None) else "sliding_attention" for i in range(3)]
        window = dict(use_sliding_window=True, sliding_window=5, layer_types=kinds)
        oracle = Qwen3ForCausalLM(Qwen3Config(**sizes, **window)).eval()
        oracle.load_state_dict(model.state_dict())
        torch.testing.assert_close(got[list(its)], oracle(ids[list(its)]).logits)
    assert not torch.allclose(got[0], plain[0], atol=1e-3)


def test_the_deep_teacher_trains_with_its_masks(recall_dir, monkeypatch):
    tokenizer = recall_teacher.load_tokenizer(str(recall_dir / "tokenizer"))
    chunks = str(recall_dir / "data" / "text" / "chunked_context128")
    text = recall_teacher.open_chunks_for(tokenizer, len(tokenizer), chunks, 128).train
    scale = dataclasses.replace(recall_teacher.TINY, text_rows=2, task_rows=2)
    losses = []
    for far in ((), (1, 2)):
        torch.manual_seed(0)
        model = recall_teacher.untrained_teacher(tokenizer, scale.shape)
        far_scale = dataclasses.replace(scale, far_layers=far, window=4)
        schedule = recall_teacher.Schedule.of(4)
        losses.append(recall_teacher.Training(model, tokenizer, text, far_scale, schedule, 0).step(1))
    assert (losses[0] != losses[1]).all() and recall_teacher.DEEP.far_layers and not recall_teacher.HARD.far_layers
    assert recall_teacher.deepened(recall_teacher.DEEP).far_layers == (6, 10)


def grow_recall_teacher(recall_dir, out, *options):
    """With the small batches of `recall_dir`."""
    tiny = dataclasses.replace(recall_teacher.TINY, text_rows=2, task_rows=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_teacher, "TINY", tiny)
        patch.setattr(recall_teacher, "DEMANDED", 0.0)
        patch.setattr(recall_teacher, "new_files", lambda: sorted((ROOT / "benchmarks").glob("*.py")))
        recall_teacher.main(["--output_dir", str(out), "--grow", str(recall_dir), "--size", "tiny", *options])
    torch.use_deterministic_algorithms(False)  # of the whole process


def test_a_teacher_that_grows_begins_as_the_smaller_one(recall_dir, tmp_path):
    """It computes the same before its first step, and then all its layers train."""
    ids = torch.randint(32, (2, 19))
    small = Qwen3ForCausalLM.from_pretrained(recall_dir / "teacher")
    scale = recall_teacher.deepened(recall_teacher.TINY)
    large = recall_teacher.untrained_teacher(recall_teacher.load_tokenizer(str(recall_dir / "tokenizer")), scale.shape)
    recall_teacher.grow(small, large)
    assert len(large.model.layers) == 2 * len(small.model.layers)
    assert torch.equal(large(ids).logits, small(ids).logits)
    grow_recall_teacher(recall_dir, tmp_path / "large", "--max_steps", "3", "--seed", "1")
    trained = Qwen3ForCausalLM.from_pretrained(tmp_path / "large" / "teacher")
    result = json.loads((tmp_path / "large" / "teacher.json").read_text())
    assert result["parameters"] == trained.num_parameters() > 1.5 * small.num_parameters()
    assert [row["step"] for row in result["history"]] == [3]
    for layer in trained.model.layers:
        assert layer.self_attn.o_proj.weight.any() and layer.mlp.down_proj.weight.any()
    assert not torch.equal(trained(ids).logits, small(ids).logits)
    files = recall_teacher.new_files()
    assert len(files) > 500 and all("torch" in file.parts for file in files)
    tokenizers = [folder / "teacher" / "tokenizer.json" for folder in (recall_dir, tmp_path / "large")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_a_growing_teacher_learns_at_a_rate_that_rises_and_falls():
    schedule = recall_teacher.Schedule.without_constant_part(800)
    factors = [schedule.factor(step) for step in range(1, 801)]
    assert factors.index(max(factors)) == 99 and max(factors) == 1 and factors[-1] == recall_teacher.FLOOR
    middle = (1 + recall_teacher.FLOOR) / 2
    assert factors[449] == pytest.approx(middle)
    assert recall_teacher.Schedule.without_constant_part(1).factor(1) == 0.01


def test_teachers_that_cannot_grow_are_refused(recall_dir, tmp_path):
    (tmp_path / "grown").mkdir()
    for name in ("settings.json", "teacher.json"):
        shutil.copy(recall_dir / name, tmp_path / "grown")
    settings = json.loads((recall_dir / "settings.json").read_text())
    (tmp_path / "grown" / "settings.json").write_text(json.dumps(settings | {"grow": "recall_out"}))
    tiny = ["--size", "tiny"]
    for folder, options, message in (
        (tmp_path, tiny, f"--grow: {tmp_path} has no teacher; name an output folder"),
        (recall_dir, [], f"--size: the teacher of {recall_dir} has 'tiny', not 'full'; give the same"),
        (recall_dir, [*tiny, "--num_pairs", "9"], f"--num_pairs: the teacher of {recall_dir} has None, not 9"),
        (recall_dir, [*tiny, "--text", str(tmp_path)], "--text: --grow has text of its own"),
        (recall_dir, [*tiny, "--output_dir", str(recall_dir)], f"--output_dir: {recall_dir} has the teacher that"),
        (tmp_path / "grown", tiny, f"--grow: the teacher of {tmp_path / 'grown'} has grown already"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            recall_teacher.main(["--output_dir", str(tmp_path / "out"), "--grow", str(folder), *options])
    assert not (tmp_path / "out").exists()


def compare(monkeypatch, recall_dir, out, *options):
    monkeypatch.setattr(compare_students, "QUESTIONS", 4)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "compare_students.py",
            "--teacher",
            str(recall_dir / "teacher"),
            "--data",
            str(recall_dir / "data" / "chunked_context128"),
            "--output_dir",
            str(out),
            "--students",
            "gdn_v7+calibrated",
            "swa_v1",
            "--stage1_steps",
            "2",
            "--stage2_steps",
            "1",
            "--batch_size",
            "2",
            "--eval_chunks",
            "2",
            "--num_words",
            "32",
            *options,
        ],
    )
    compare_students.main()


def test_comparison_is_resumable(recall_dir, tmp_path, monkeypatch, capsys):
    compare(monkeypatch, recall_dir, tmp_path, "--seeds", "2", "--shard", "1/2")
    assert "2 of 4 runs are missing" in capsys.readouterr().out
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert sorted(files) == ["swa_v1-seed0.json", "swa_v1-seed1.json"]
    compare(monkeypatch, recall_dir, tmp_path, "--seeds", "2")
    assert all((tmp_path / "runs" / name).stat().st_mtime_ns == written for name, written in files.items())
    shown = capsys.readouterr().out
    assert "missing" not in shown and (tmp_path / "students.md").read_text() == shown
    assert "`gdn_v7+calibrated`" in shown and "| 22 KiB |" in shown and "| 32 KiB |" in shown
    with pytest.raises(ValueError, match="lr_stage2 0.0001, not 0.5"):
        compare(monkeypatch, recall_dir, tmp_path, "--lr_stage2", "0.5")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--students", "gdn_v99"], "--students: gdn_v99 is unknown"),
        (
            ["--students", "swa_v1", "gsa_v1+calibrated"],
            "--students: gsa_v1.calibrated: its o_proj is fused with its norm; leave .calibrated out",
        ),
        (["--shard", "2/2"], "--shard: 2/2 must be one of 0/2 to 1/2"),
        (["--shard", "half"], "--shard: half must look like 0/4"),
        (["--stage1_steps", "-4"], "--stage1_steps: -4 must be at least 1"),
        (["--batch_size", "0"], "--batch_size: 0 must be at least 1"),
        (["--ratio", "7"], "--ratio: 7.0 of 4 layers keeps 28"),
        (["--teacher", "nowhere"], "'nowhere' is neither a folder"),
    ],
)
def test_bad_input(recall_dir, tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        compare(monkeypatch, recall_dir, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_students_whose_range_touches_the_best_are_ties():
    def run(student, seed, kl):
        return {
            "student": student,
            "seed": seed,
            "kl": kl,
            "state_grows": False,
            "native_export": student == "a",
            "state_bytes": 1024,
            "parameters": 1,
            **dict.fromkeys(
                (
                    "alignment_error",
                    "all_linear_kl",
                    "hybrid_kl_after_1",
                    "hybrid_kl_after_2",
                    "all_linear_recall",
                    *compare_students.RECALL_TASKS,
                ),
                0.5,
            ),
        }

    runs = [
        run(name, seed, kl)
        for name, kls in {"a": (1.0, 1.2), "b": (1.19, 1.4), "c": (1.21, 1.3)}.items()
        for seed, kl in enumerate(kls)
    ]
    rows = compare_students.table(runs, 2).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| `a` *", "| `c`", "| `b` *"]
    assert "1.100 ± 0.100" in rows[0] and [row.endswith("| yes |") for row in rows] == [
        True,
        False,
        False,
    ]


def init_rows(monkeypatch, capsys, *options):
    """The rows of the table, cells per row, and the first lines before it."""
    monkeypatch.setattr(sys, "argv", ["student_init.py", *map(str, options)])
    student_init.main()
    lines = capsys.readouterr().out.splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \w+_v\d", line)
    ], lines


def test_student_init_measures_every_start(recall_dir, monkeypatch, capsys):
    data = [
        "--teacher",
        recall_dir / "teacher",
        "--data",
        recall_dir / "data" / "chunked_context128",
        "--chunks",
        2,
    ]
    monkeypatch.setattr(student_init, "without_attention", lambda *_: math.inf)  # of a teacher that has learnt nothing
    rows, lines = init_rows(monkeypatch, capsys, *data, "--students", "gdn_v7", "swa_v1", "--steps", 2)
    assert [row[:2] for row in rows] == [
        ["gdn_v7", "0"],
        ["gdn_v7", "2"],
        ["swa_v1", "0"],
        ["swa_v1", "2"],
    ]
    assert lines[0].startswith("teacher: perplexity ") and rows[2][2] == rows[2][4] == "0.000"  # its window sees all
    assert f"perplexity {rows[2][3]};" in lines[0] and 0 < float(rows[1][2]) < float(rows[0][2])
    calibrated, _ = init_rows(monkeypatch, capsys, *data, "--calibrate", 1, "--steps")  # all that it fits
    assert {row[0] for row in calibrated} == set(STUDENT_ATTENTION_MAP) - {"gsa_v1", "hgrn2_v1"}
    assert float(dict((row[0], row[2]) for row in calibrated)["gdn_v7"]) < float(rows[0][2])
    with pytest.raises(ValueError, match="--layer: 4 must be one of the teacher's, 0 to 3"):
        init_rows(monkeypatch, capsys, *data, "--layer", 4)
    monkeypatch.setattr(student_init, "load_teacher", None)  # refused before it is read
    with pytest.raises(ValueError, match="calibrate_init: gsa_v1 fuses o_proj with its norm"):
        init_rows(monkeypatch, capsys, *data, "--calibrate", 1, "--students", "gdn_v4", "gsa_v1")


def test_a_start_that_explodes_fails(recall_dir, monkeypatch, capsys):
    monkeypatch.setattr(student_init, "without_attention", lambda *_: 0.0)
    with pytest.raises(SystemExit, match="worse than no attention at the start: swa_v1"):
        init_rows(
            monkeypatch,
            capsys,
            "--teacher",
            recall_dir / "teacher",
            "--data",
            recall_dir / "data" / "chunked_context128",
            "--chunks",
            2,
            "--students",
            "swa_v1",
            "--steps",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [["kl_head.py"], ["train_throughput.py", "--stage", "1"]])
def test_benchmarks_of_gpus_are_skipped_without_one(command):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / command[0], *command[1:]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f"{command[0]}: skipped: " in done.stderr


@pytest.mark.slow
def test_throughput_of_joint_candidates():
    options = ["--candidates", "2", "--steps", "1", "train.batch_size=2", "train.micro_batch_size=2"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "candidates_throughput.py", *options, "train.train_seq_len=64"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x gdn_v7, 2 x 64 tokens per step" in done.stdout


def test_the_time_of_kernels_and_between_them():
    def event(name, start, end, device=DeviceType.CUDA):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=False)

    events = [
        event("nvjet_b", 3000, 4000),
        event("nvjet_a", 0, 2000),
        event("a copy", 1500, 2500),
        event("_kl_rows", 4000, 4500),
        event("nvjet_a", 9500, 9600),
        event("a copy", 9900, 9950),
        event("aten::mm", 0, 9999, DeviceType.CPU),
    ]
    kinds, waits = train_throughput.breakdown(SimpleNamespace(events=lambda: events), 2)
    assert dict(kinds) == {
        "GEMMs": 1.55,
        "element-wise and the rest": 0.525,
        "losses": 0.25,
        "GPU idle (host-bound)": 2.9,
    }
    assert waits == [
        ("_kl_rows -> nvjet_a", 2.5),
        ("a copy -> nvjet_b", 0.25),
        ("nvjet_a -> a copy", 0.15),
    ]
    assert sum(ms for _, ms in kinds) - 0.25 == pytest.approx(9950 / 2 / 1e3)  # two overlap for 0.5 ms


def test_a_profile_without_kernels_is_said_to_be_missing():
    """What PyTorch's profiler gives where CUPTI may not be used: events of the CPU, or none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(8, 8) @ torch.ones(8, 8)
    parts = [("student", 12.3), ("optimiser", 4.0)]
    empty = SimpleNamespace(events=list)
    for without in (profile, empty, None):
        shown = train_throughput.where_time_goes(parts, without, 2, kernels=True)
        assert "| student | 12.3 |\n| optimiser | 4.0 |" in shown and "kind of kernels" not in shown
        assert shown.endswith(train_throughput.NO_PROFILE)


def test_a_profile_with_kernels_is_not_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(
        train_throughput,
        "breakdown",
        lambda *_: ([("losses", 1.5), ("GPU idle (host-bound)", 0.5)], [("a -> b", 0.25)]),
    )
    table = SimpleNamespace(table=lambda **_: "the longest")
    profile = SimpleNamespace(key_averages=lambda: table)
    shown = train_throughput.where_time_goes([("student", 2.0)], profile, 2, kernels=True)
    assert (
        "| losses | 1.5 |" in shown
        and "busy 75% of" in shown
        and "    0.25 ms  a -> b\nthe longest" in shown
        and train_throughput.NO_PROFILE not in shown
    )
    assert "the longest" not in train_throughput.where_time_goes([("student", 2.0)], profile, 2, kernels=False)


@pytest.mark.skipif(
    torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities(),
    reason="this PyTorch has CUPTI",
)
def test_no_profile_is_started_by_a_pytorch_without_cupti():
    assert train_throughput.start_profile() is None


@pytest.mark.parametrize(
    "stage, expected",
    [
        (1, "teacher 0 teacher 1 teacher 2 student 3 teacher 4 student 5 optimiser 6 student 7"),
        (2, "teacher 0 student 1 head 2 student 3 optimiser 4 student 5"),
        (3, "head 0 student 1 optimiser 2 student 3"),
    ],
)
def test_the_time_of_parts(stage, expected, monkeypatch):
    """With a clock that ticks at every mark, and no GPU: what comes when in a step, and how long it
    takes."""
    ticks = count()

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time = next(ticks)

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    small = StudentConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    teacher, ids = StudentForCausalLM(small), torch.randint(100, (1, 5))
    model = StudentForCausalLM.from_teacher(teacher, "gdn_v2")[0]
    if stage == 1:
        model = AttentionAlignmentModel(teacher, model)
    trainer = SimpleNamespace(
        model=model,
        deepspeed=SimpleNamespace(optimizer=torch.optim.SGD(model.parameters())),
        teacher=FrozenTeacher(StudentForCausalLM(small), "cpu"),
    )
    parts = train_throughput.Parts()
    parts.follow(trainer, stage)
    if stage == 2:
        trainer.teacher.hidden_states(ids)
    model(ids)
    trainer.deepspeed.optimizer.step()
    assert " ".join(f"{part} {event.time}" for part, event in parts.marks) == expected
    names = expected.split()[:-2:2]
    assert dict(parts.totals(2)) == {name: names.count(name) / 2 for name in names}


def test_published_shapes():
    with pytest.raises(ValueError, match="--shape: gpt2 is unknown; choose one of qwen2.5-0.5b"):
        train_throughput.published_config("gpt2", 2)
    config = train_throughput.published_config("qwen2.5-0.5b", 2)
    assert (config.hidden_size, config.num_hidden_layers) == (896, 2)
    assert (config.attention_bias, config.qk_norm) == (True, False)


def test_decode(tmp_path, monkeypatch, capsys):
    """The cache's share is that of what is held; a size that exhausts the memory is a line of the
    table, and the others are measured."""
    small = StudentConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    generate = StudentForCausalLM.generate

    def exhausted(self, ids, **options):
        if len(ids) == 3:
            raise torch.OutOfMemoryError
        return generate(self, ids, **options)

    monkeypatch.setattr(decode, "published_config", lambda *_: small)
    monkeypatch.setattr(StudentForCausalLM, "generate", exhausted)
    decode.main(
        [
            "--kept",
            "1",
            "--contexts",
            "50",
            "90",
            "--batch_sizes",
            "1",
            "2",
            "3",
            "--new_tokens",
            "7",
            "--output_dir",
            str(tmp_path),
        ]
    )
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "decode.md").read_text() and (tmp_path / "decode.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 + 2 and shown.count("out of memory") == 4
    by = {(row["model"], row["context"], row["batch_size"]): row for row in rows}
    assert all((row["alone"] is None) == (row["model"] == decode.EAGER) for row in rows if "decode" in row)
    tokens = 90 + 7 - 1  # the last one is not read
    keys_and_values, state = 2 * tokens * 2 * 16 * 4, 4 * 16 * 16 * 4
    assert by["teacher", 90, 2]["cache"] == 2 * 4 * keys_and_values and by["hybrid", 90, 2]["cache"] == 2 * (
        keys_and_values + 3 * state
    )
    teacher, hybrid = by["teacher", 90, 2], by["hybrid", 90, 2]
    layer = 3 * 32 * 48 + 2 * 32  # of fp32 weights: MLP and norms
    assert teacher["bytes"] == teacher["cache"] + 4 * (4 * (layer + 4 * 32 * 64 - 2 * 32 * 32) + 32 + 32 * 100)
    more = by["hybrid", 90, 2]["bytes"] - by["hybrid", 90, 1]["bytes"]
    assert more == keys_and_values + 2 * 3 * state and hybrid["bytes"] > hybrid["cache"] + 2 * 3 * state + 4 * 4 * layer
    assert f"bytes ratio {teacher['bytes'] / hybrid['bytes']:.2f}" in shown
    share = f"context 90, batch 2: cache {(keys_and_values + 3 * state) / (4 * keys_and_values):.1%} of the teacher's"
    assert share in shown and shown.count("of eager decoding") == 2
    for options, message in (
        (["--kept", "4"], "--kept: 4 must be between 1 and 3"),
        (["--new_tokens", "5"], "--new_tokens: 5 must be at least 6"),
    ):
        with pytest.raises(ValueError, match=message):
            decode.main(options)


@pytest.mark.parametrize("shape", serve.SHAPES)
def test_served_models_have_the_same_sizes(shape):
    """The config files that vLLM gets, built by transformers and by this project's class."""
    config = serve.student_config(serve.parse_arguments(["--shape", shape, "--kept", "6", "--layers", "12"]))
    assert config.keep_full_attention_layers == [1, 3, 5, 7, 9, 11]
    sizes = set()
    for name in (serve.TEACHER, serve.HYBRID, serve.VLLM_GDN):
        values = serve.config_values(name, config)
        theirs = AutoConfig.for_model(**values)
        assert theirs.architectures == values["architectures"]
        heads = theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim
        sizes.add((theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, *heads))
    assert len(sizes) == 1


def test_serving_results_are_compared_and_drawn(tmp_path):
    def row(model, context, speed, seconds):
        measured = {"tokens_per_second": speed, "first_token_seconds": seconds, "sequences": 4, "preemptions": 0}
        return {"model": model, "context": context} | measured

    rows = [row(serve.TEACHER, 1024, 100, 2.0), row(serve.TEACHER, 2048, 50, 4.0)]
    rows += [row(serve.HYBRID, 1024, 150, 1.0), row(serve.HYBRID, 2048, 200, 1.6)]
    points = serve.compared(rows)
    assert [(p["context"], p["decoding"], p["first_token"]) for p in points] == [(1024, 1.5, 2.0), (2048, 4.0, 2.5)]
    for done in range(1, len(rows) + 1):  # as a run that is cut short leaves them
        serve.write("setup", rows[:done], tmp_path)
        assert len(json.loads((tmp_path / "serve.json").read_text())["rows"]) == done
    assert "| hybrid | 2,048 | 1.600 | 4 | 200 | 0 |" in (tmp_path / "serve.md").read_text()
    assert json.loads((tmp_path / "serve.json").read_text())["compared"] == points
    table = serve.side_by_side([{"name": "tiny", "rows": rows[::-1]}]).splitlines()
    assert table[2] == "| tiny | 1,024 | 2.000 | 1.000 | 4 | 4 | 100 | 150 | 1.50 x |"
    assert table[3:] == ["|  | 2,048 | 4.000 | 1.600 | 4 | 4 | 50 | 200 | 4.00 x |"]
    serve.main(["--plot", str(tmp_path / "serve.json")])
    assert (tmp_path / "serve.png").stat().st_size > 10_000


def test_a_vllm_without_a_dense_class_of_its_gated_delta_net_is_refused(monkeypatch):
    known = ["Qwen3NextForCausalLM"]
    registry = SimpleNamespace(get_supported_archs=lambda: known)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.26.0", ModelRegistry=registry))
    with pytest.raises(ValueError, match="^--vllm_gdn: vLLM 0.26.0 has no Qwen3_5ForCausalLM, .* 0.27.1 or later$"):
        serve.check_vllm_gdn()
    known.append("Qwen3_5ForCausalLM")
    serve.check_vllm_gdn()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kept", "99"], "--kept: 99 must be between 1 and 27, one less than the layers"),
        (["--student", "swa_v1"], "--student: swa_v1 is no student of constant state, such as gdn_v8"),
        (["--engine", "{a}"], "--engine: {a} is no JSON: .*"),
        (["--engine", "[1]"], "--engine: [[]1[]] must be a JSON object, .*"),
        (["--plot", "missing.json"], "--plot: missing.json is no readable serve.json; .*"),
    ],
)
def test_serving_refuses_bad_options_in_one_line(options, message, monkeypatch):
    """Where vLLM is not installed too."""
    monkeypatch.setattr("sys.argv", ["serve.py", *options])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(serve.__file__, run_name="__main__")
    assert re.fullmatch(f"serve.py: error: {message}", error.value.code)


def test_random_documents_fill_their_chunks():
    plan = BatchPlan(batch_size=4, micro_batch_size=2, grad_accum=2, seq_len=300, steps=50, world_size=1)
    chunks = train_throughput.random_chunks(96, plan, 0, document_tokens=20)
    lengths = chunks.train["document_lengths"]
    assert chunks.has_documents and len(lengths) == 200
    assert all(sum(row) == 300 and min(row) > 0 for row in lengths)
    assert 18 < 200 * 300 / sum(map(len, lengths)) < 22
    assert not train_throughput.random_chunks(96, plan, 0).has_documents


def regret(out, *options):
    """On the teacher in `out`."""
    words = ["--output_dir", str(out), "--size", "tiny", "--teachers", "1", "--students", "gdn_v7", "--top_k", "1"]
    words += ["--stage1_steps", "2", "--stage2_steps", "2", "--batch_size", "2", "--sequences", "4"]
    selection_regret.main([*words, "--questions", "2", "--sets_at_once", "3", *options])
    return json.loads((out / "regret.json").read_text())


def test_regret_of_selectors_over_all_sets(recall_dir, tmp_path, capsys, monkeypatch):
    """Every set is trained once; a choice is compared with the best of them; nothing is repeated."""
    shutil.copytree(recall_dir, tmp_path / "teacher_0")
    methods = ["uniform", "scan", "gates:recall", "ga_s2"]
    results = regret(tmp_path, "--methods", *methods, "ar")  # the teacher answers no question
    methods.append("ar")
    assert results["errors"] == [
        "`ar`, teacher0-gdn_v7, K = 1: --method: the teacher answers none of 100 questions of associative_recall, so "
        "they cannot rank its layers; make the task easier (--num_pairs ...) or take another method"
    ]
    (case,) = results["cases"]
    assert sorted(case["sets"]) == ["[0]", "[1]", "[2]", "[3]"] and case["top_k"] == 1
    kls = {kept: figures["kl"] for kept, figures in case["sets"].items()}
    assert case["best"] == min(kls, key=kls.get) and len(set(kls.values())) == 4
    assert [choice["method"] for choice in results["choices"]] == methods[:-1]
    for choice in results["choices"]:
        assert choice["regret"] == kls[str(choice["keep"])] / min(kls.values()) >= 1 and choice["seconds"] > 0
    by_method = {choice["method"]: choice for choice in results["choices"]}
    assert by_method["ga_s2"]["flops"] > 0 and by_method["uniform"]["tokens"] is None
    shown = capsys.readouterr().out
    assert (tmp_path / "regret.md").read_text() in shown and "missing" not in shown
    assert "| teacher0-gdn_v7 | 1 |" in shown and "less than 90%, train it longer" in shown
    assert (tmp_path / "regret.png").stat().st_size > 10_000
    for name in ("train_sets", "choose", "align", "train_teacher"):
        monkeypatch.setattr(selection_regret.Regret, name, lambda *_: pytest.fail("repeated"))
    assert regret(tmp_path, "--methods", *methods) == results
    some = regret(tmp_path, "--methods", *methods, "random", "--minutes", "0")
    assert some["choices"] == results["choices"] and "1 of 10 jobs are missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--output_dir: .* has figures with stage2_steps 2, not 3; name another"):
        regret(tmp_path, "--stage2_steps", "3")
    with pytest.raises(ValueError, match="--top_k: 4 must be between 1 and 3"):
        regret(tmp_path, "--top_k", "4")


def test_further_seeds_train_the_best_and_the_chosen_sets(recall_dir, tmp_path, capsys, monkeypatch):
    shutil.copytree(recall_dir, tmp_path / "teacher_0")
    trained = []
    train_sets = selection_regret.Regret.train_sets

    def counted(self, case, sets, seed, file):
        trained.extend((seed, str(kept)) for kept in sets)
        train_sets(self, case, sets, seed, file)

    monkeypatch.setattr(selection_regret.Regret, "train_sets", counted)
    seeds = ["--seeds", "3", "--best", "1"]
    results = regret(tmp_path, "--methods", "uniform", *seeds)
    (case,) = results["cases"]
    (choice,) = results["choices"]
    first = {kept: figures["kl_by_seed"]["0"] for kept, figures in case["sets"].items()}
    wanted = {min(first, key=first.get), str(choice["keep"])}
    assert sorted(trained) == sorted([(0, kept) for kept in first] + [(s, kept) for kept in wanted for s in (1, 2)])
    assert {kept for kept, figures in case["sets"].items() if len(figures["kl_by_seed"]) == 3} == wanted
    shown = capsys.readouterr().out
    assert f"K = 1: {len(wanted)} of 4 sets were trained with 3 seeds" in shown and "missing" not in shown
    for kept in wanted:
        kls = case["sets"][kept]["kl_by_seed"].values()
        assert case["sets"][kept]["kl"] == pytest.approx(sum(kls) / 3) and len(set(kls)) == 3
    assert case["best"] in wanted and case["sets"][case["best"]]["kl"] == min(case["sets"][k]["kl"] for k in wanted)
    assert regret(tmp_path, "--methods", "uniform", *seeds) == results
    # A further method adds what it chose to these seeds; all sets are those of the first seed and no more.
    trained.clear()
    added = regret(tmp_path, "--methods", "uniform", "--seeds", "2", "--best", "4")
    assert sorted(trained) == [(1, kept) for kept in sorted(first) if kept not in wanted]
    assert all(len(figures["kl_by_seed"]) == 2 for figures in added["cases"][0]["sets"].values())


def test_regret_is_the_ratio_of_means_over_the_seeds_of_a_set():
    def figures(*kls):
        return {"kl": sum(kls) / len(kls), "recall": 0.5, "kl_by_seed": {str(s): kl for s, kl in enumerate(kls)}}

    sets = {"[0]": figures(1.0, 3.0), "[1]": figures(3.0, 2.0), "[2]": figures(0.5)}  # too few seeds to be the best
    assert selection_regret.best_of(sets) == "[0]"
    assert selection_regret.over_best(sets["[1]"], sets["[0]"]) == (1.25, [3.0, 2 / 3])
    assert selection_regret.over_best(sets["[2]"], sets["[0]"]) == (0.5, [0.5])  # of the first seed alone
    choice = {"case": "c", "top_k": 1, "method": "uniform", "keep": [1], "seconds": 1, "tokens": None, "flops": None}
    choice |= {"recall_lost": 0.0, "regret": 1.25, "regret_by_seed": [3.0, 2.0]}
    case = {"case": "c", "top_k": 1, "best": "[0]", "sets": sets}
    text = selection_regret.table({"choices": [choice], "cases": [case], "teachers": {}, "errors": []})
    assert "| `uniform` | 1.25 ± 0.71 | 1.25 |" in text and "| c | 1 | 0 | 2.0000 ± 1.4142 |" in text
    assert "c, K = 1: 2 of 3 sets were trained with 2 seeds; the best set has the lowest KL in 1 of them." in text


@pytest.mark.parametrize(
    "option, message",
    [
        ("--sequences", "--sequences: 1 must be at least 2"),
        ("--num_pairs", "--num_pairs: 1 must be at least 2, the easiest of --size tiny"),
    ],
)
def test_a_refused_comparison_of_selectors_does_not_claim_its_folder(tmp_path, option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        regret(tmp_path / "out", option, "1")
    with pytest.raises(ValueError, match="^--teacher_steps: 0 must be at least 1"):
        regret(tmp_path / "out", "--teacher_steps", "0")
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_the_benchmark_is_that_of_its_command(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        selection_regret.subprocess,
        "run",
        lambda command: commands.append(command[1:]) or SimpleNamespace(returncode=3),
    )
    regret(tmp_path, "--teacher_steps", "7", "--num_pairs", "9")
    report = (tmp_path / "regret.md").read_text()
    assert "failed: --output_dir: " in report and "the teacher's training ended with exit code 3" in report
    script = str(ROOT / "benchmarks" / "recall_teacher.py")
    settings = [
        "--output_dir",
        str(tmp_path / "teacher_0"),
        "--size",
        "tiny",
        "--seed=0",
        "--num_pairs=9",
        "--max_steps=7",
    ]
    assert commands == [[script, *settings]]


def test_a_job_is_done_by_one_process(tmp_path):
    """Not while another one holds it, not before its needs are there, and only until time is up."""
    done = []
    first = jobs.Job(tmp_path / "a", (), lambda: (done.append("a"), (tmp_path / "a").touch()))
    second = jobs.Job(tmp_path / "b", (tmp_path / "a",), lambda: (done.append("b"), (tmp_path / "b").touch()))
    jobs.work([second, first], None)
    assert done == ["a", "b"]
    (tmp_path / "a").unlink()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)",
            str(tmp_path / ".a.job"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        assert not jobs.try_job(first) and done == ["a", "b"]
    finally:
        holder.kill()
        holder.wait()
    assert jobs.try_job(first) and done == ["a", "b", "a"]


def test_a_job_that_fails_costs_those_that_need_it_alone(tmp_path, capsys):
    """Too little memory of one run must not end the process, nor every other one that takes the job next."""
    done = []

    def fails():
        done.append("bad")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    bad = jobs.Job(tmp_path / "bad", (), fails)
    needs = jobs.Job(tmp_path / "needs", (tmp_path / "bad",), lambda: done.append("needs"))
    good = jobs.Job(tmp_path / "good", (), lambda: (done.append("good"), (tmp_path / "good").touch()))
    args = SimpleNamespace(processes=1, worker=False, output_dir=tmp_path)
    jobs.do_jobs([bad, needs, good], __file__, [], args, None)
    assert done == ["bad", "good"] and "Traceback" in capsys.readouterr().err
    assert jobs.failures([bad, needs, good], tmp_path) == ["bad: failed: CUDA out of memory. Tried to allocate 20 GiB"]
    jobs.do_jobs([bad, needs, good], __file__, [], args, None)
    assert done == ["bad", "good", "bad"]  # tried again by the next command
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"^--processes: {number} must be at least 1"):
            jobs.do_jobs([], __file__, [], SimpleNamespace(processes=number, worker=False), None)


# ------------------------------------------------------------------------ ablations
def ablation_words(recall_dir, out):
    words = ["--teacher", str(recall_dir), "--size", "tiny", "--output_dir", str(out), "--steps", "3"]
    return [*words, "--stage1_steps", "2", "--batch_size", "2", "--eval_chunks", "2", "--questions", "1"]


def ablate(recall_dir, out, *options):
    ablations.main([*ablation_words(recall_dir, out), *options])


def test_ablations_resume_and_compare_with_their_control(recall_dir, tmp_path, monkeypatch, capsys):
    """Stored outputs change nothing; other recipes do. A teacher's KL to itself is 0, and a larger teacher
    has grown from it."""
    names = ["control", "kl: topk", "stored teacher outputs", "distill_from: larger teacher", "document_mask"]
    names.append("loss_on: assistant")
    run_script = ablations.run_script

    def run_here(script, **options):
        if script != "benchmarks/recall_teacher.py":
            return run_script(script, **options)
        grow_recall_teacher(recall_dir, options["output_dir"], f"--max_steps={options['max_steps']}")

    monkeypatch.setattr(ablations, "run_script", run_here)
    words = ["--seeds", "1", "--larger_steps", "3", "--variants", *names]
    ablate(recall_dir, tmp_path, *words)
    shown = capsys.readouterr().out
    runs = {run["variant"]: run for run in json.loads((tmp_path / "ablations.json").read_text())["runs"]}
    assert list(runs) == ["teacher", "larger teacher", *names]
    assert runs["teacher"]["kl"] == runs["teacher"]["documents"]["kl"] == 0 < runs["larger teacher"]["kl"]
    kls = {name: runs[name]["kl"] for name in names}
    assert kls["stored teacher outputs"] == pytest.approx(kls["kl: topk"], rel=1e-3)
    assert len({round(kl, 6) for name, kl in kls.items() if name not in names[2:3]}) == len(names) - 1
    for figure in ("kl", "perplexity"):
        assert all(run[figure] != run["documents"][figure] for name, run in runs.items() if name != "teacher")
    whole, _, alone = shown.partition("Held-out documents read one at a time:")
    assert [whole.count(f"| `{name}` |") for name in names] == [1] * len(names)
    assert [alone.count(f"| `{name}` |") for name in names] == [name in ablations.READ_ALONE for name in names]
    masks = Dataset.from_file(str(tmp_path / "data/assistant/chunked_context128/train.arrow"))["loss_mask"]
    assert 0 < sum(map(sum, masks)) < 128 * len(masks)
    monkeypatch.setattr(ablations.Ablations, "train", lambda *_: pytest.fail("repeated"))
    ablate(recall_dir, tmp_path, *words)
    again = capsys.readouterr().out
    assert shown.endswith(again) and again.startswith("Held-out chunks read whole:")
    ablate(recall_dir, tmp_path, "--seeds", "1", "--larger_steps", "3", "--variants", "control")
    assert "missing" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "ablations.json").read_text())["runs"]) == len(runs)
    with pytest.raises(ValueError, match="has figures with steps '3', not '4'; name another"):
        ablate(recall_dir, tmp_path, *words, "--steps", "4")


def test_the_table_of_ablations_has_paired_intervals():
    """By hand: differences 1 and 3 have the mean 2, the standard deviation sqrt(2) and t(0.975, 1) =
    12.706, so the half width 12.706; 1.9 and 2.1 have 1.27."""
    runs = [
        {"variant": name, "seed": seed, "kl": kl, "perplexity": 2.0, "recall": recall}
        for name, figures in (
            ("control", [(10.0, 0.5), (20.0, 0.7)]),
            ("kl: reverse", [(11.0, 0.519), (23.0, 0.721)]),
        )
        for seed, (kl, recall) in enumerate(figures)
    ]
    text = ablations.table([*runs, {"variant": "teacher", "seed": 0, "kl": 0.0, "perplexity": 1.5, "recall": 0.99}])
    assert text.splitlines()[2:4] == [
        "| teacher |  | 0.0000 |  | 1.50 |  | 99.0 % |  |",
        "| larger teacher |  |  |  |  |  |  |  |",
    ]
    lines = {line.split("`")[1]: line for line in text.splitlines()[4:]}
    assert list(lines) == [variant.name for variant in ablations.VARIANTS]
    cells = [cell.strip() for cell in lines["kl: reverse"].split("|")[2:-1]]
    assert cells[0:3] == ["control", "17.0000 ± 6.0000", "+2.0000 ± 12.7062"]
    assert cells[5:] == ["62.0 ± 10.1 %", "**+2.0 ± 1.3**"]
    assert set(lines["kl: jsd"].split("|")[3:-1]) == {"  "}
    assert ablations.interval([0.5]) == (0.5, None)
    runs[0]["documents"] = {"kl": 3.0, "perplexity": 4.0}
    row = "| `control` |  | 3.0000 |  | 4.00 |  | 50.0 % |  |"
    mask = "| `document_mask` | control |  |  |  |  |  |  |"
    assert ablations.documents_table(runs).splitlines()[3:5] == [row, mask]


def test_conversations_that_were_left_half_made_are_finished(recall_dir, tmp_path, monkeypatch):
    """Killed between its scripts, the job finds the corpus that its tokenised data are of."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    job = ablations.Ablations(ablations.make_parser().parse_args(ablation_words(recall_dir, tmp_path)))
    scripts = [preprocess_download_tokenize]

    def run_here(script, **options):
        if script.removesuffix(".py") not in [module.__name__ for module in scripts]:
            raise KeyboardInterrupt
        sys.modules[script.removesuffix(".py")].main([f"--{name}={value}" for name, value in options.items()])

    monkeypatch.setattr(ablations, "run_script", run_here)
    with pytest.raises(KeyboardInterrupt):
        job.make_conversations("assistant")
    assert (tmp_path / "data/assistant/tokenized/metadata.json").is_file() and not job.made("assistant").exists()
    scripts.append(preprocess_chunk)
    job.make_conversations("assistant")
    assert job.made("assistant").is_file() and job.chunks(ablations.ANSWERS).is_dir()


def test_recall_documents_as_conversations_have_the_same_text():
    for document in recall_teacher.TINY.tasks.interleaved(0, 3):
        messages = ablations.messages_of(document)
        text = "".join(message["content"] for message in messages)
        assert document.text.startswith(text) and document.text[len(text) :].strip() == ""
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert answers == [document.text[slice(*span)] for span in document.answers]


def test_ablations_that_cannot_be_are_refused(recall_dir, tmp_path):
    for options, message in (
        (["--steps", "1"], "--steps: 1 must be at least 2"),
        (["--seeds", "0"], "--seeds: 0 must be at least 1"),
        (["--ratio", "1.5"], "--ratio: 1.5 must be between 0 and 1"),
        (["--larger_steps", "0"], "--larger_steps: 0 must be at least 1"),
        (["--teacher", str(tmp_path)], "--teacher: .* has no teacher"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            ablate(recall_dir, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()

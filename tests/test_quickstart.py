"""The quickstart: its own parts, and a smoke run of the whole at a tiny size."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def quickstart(out, *arguments):
    environment = os.environ | {"QUICKSTART_OUT": str(out), "OMP_NUM_THREADS": "1"}
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "QUICKSTART_TINY",
    ):  # W&B only where a user has set it up
        environment.pop(name, None)
    return subprocess.run(
        ["bash", str(ROOT / "quickstart.sh"), *arguments],
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_smoke(tmp_path):
    out = tmp_path / "out"
    first = quickstart(out, "--tiny")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    table = first.stdout.rstrip().splitlines()[-8:]
    assert table[0].startswith("| model |") and table[2].startswith("| teacher |")
    assert [line.split("|")[1].strip() for line in table[3:]] == [
        "all-linear, before stage 1",
        "all-linear, after stage 1",
        "hybrid, before stage 2",
        "hybrid, after stage 2",
        "hybrid, after stage 3",
    ]

    page = (out / "report.html").read_text()
    for task in (
        "associative_recall 256",
        "recall_generation 256",
        "heldout_perplexity",
        "heldout_kl",
    ):
        assert f"<td>{task}" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)

    teacher = json.loads((out / "teacher" / "config.json").read_text())
    assert teacher["architectures"] == ["Qwen3ForCausalLM"] and not list((out / "teacher").glob("*.py"))
    kept = json.loads((out / "layer_scan" / "layer_scan.json").read_text())["keep"]
    for stage, layers in ((1, []), (2, kept), (3, kept)):
        config = json.loads((out / f"stage{stage}" / "converted-hf" / "config.json").read_text())
        assert config["keep_full_attention_layers"] == layers

    second = quickstart(out, "--tiny")
    assert second.returncode == 0 and second.stdout.count("done before") == 11
    assert second.stdout.rstrip().splitlines()[-8:] == table

    other = quickstart(out, "--tiny", str(tmp_path))
    assert other.returncode != 0 and "holds the results of another quickstart" in other.stderr


def test_relative_errors_of_stage_1_are_read_and_drawn(tmp_path):
    """Of held-out text where there is some; of a step that an interrupted run logged twice, the
    last."""
    from quickstart.report import alignment_figure, read_layer_errors

    def write(*lines):
        (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        return read_layer_errors(tmp_path)

    train = {
        "step": 1,
        "loss": 3.0,
        "layer_loss/00": 9.0,
        "layer_error/00": 0.5,
        "layer_error/01": 0.25,
    }
    assert write(train) == ([1], [[0.5, 0.25]])
    pairs = ((4, 9), (0, 8), (4, 1))
    heldout = [{"step": step, "eval_layer_error/01": 2 * error, "eval_layer_error/00": error} for step, error in pairs]
    steps, errors = write(train, *heldout)
    assert (steps, errors) == ([0, 4], [[8, 16], [1, 2]])
    figure = alignment_figure(errors[0], errors[-1], [1], steps, errors)
    assert figure.startswith('<img alt="" src="data:image/png;base64,')


def test_unknown_option_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    run = quickstart(out, "--tyni")
    assert run.returncode != 0 and "--tyni" in run.stderr and not out.exists()


def test_standard_library_without_tests_and_packages(tmp_path):
    from quickstart.train_tokenizer import copy_stdlib, stdlib_files

    parts = {part for file in stdlib_files() for part in file.parts}
    assert len(stdlib_files()) > 300 and not parts & {"site-packages", "idle_test"}
    copied = copy_stdlib(tmp_path / "corpus", max_files=10)
    assert copied == len(list((tmp_path / "corpus").rglob("*.py"))) and 5 <= copied <= 10
    assert copy_stdlib(tmp_path / "corpus") == copied  # there already: left alone


def test_tokenizer_is_lossless_after_saving(tmp_path):
    from transformers import AutoTokenizer

    from quickstart.train_tokenizer import EOS, train_tokenizer

    texts = ["def f(x):\n\treturn x  # naïve\n", "class A: pass\n"] * 20
    train_tokenizer(iter(texts), vocab_size=300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    unseen = "  Größe = {1: '日本'}\r\n"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen
    assert tokenizer.eos_token == EOS and tokenizer.convert_tokens_to_ids(EOS) == tokenizer.eos_token_id


def test_the_tokenizer_learns_from_what_is_trained_on(tmp_path):
    """Not from hidden files; a bad file ends it with one line, or is left out."""
    corpus = tmp_path / "corpus"
    (corpus / ".git").mkdir(parents=True)
    (corpus / ".git" / "config").write_text("qqqqqqqq " * 500)
    (corpus / "a.jsonl").write_text(json.dumps({"text": "zzzzzzzz " * 500}) + "\n")
    (corpus / "b.jsonl").write_text('{"text": "cut sho')
    command = [
        sys.executable,
        "-m",
        "quickstart.train_tokenizer",
        "--corpus",
        corpus,
        "--output_dir",
        tmp_path / "tokenizer",
    ]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    bad = subprocess.run([*command, "--vocab_size", "300"], **options)
    assert bad.returncode == 1 and not (tmp_path / "tokenizer").exists()
    assert re.fullmatch(
        f"train_tokenizer.py: error: {corpus}/b.jsonl: row 1: is not JSON, .*--skip_bad_files\n",
        bad.stderr,
    )
    done = subprocess.run([*command, "--vocab_size", "300", "--skip_bad_files"], **options)
    assert done.returncode == 0 and "leaves out 1 hidden" in done.stdout and "left out 1 bad files" in done.stdout
    tokens = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("zz" in token for token in tokens) and not any("qq" in token for token in tokens)


def test_unigram_entropy():
    from quickstart.train_teacher import unigram_entropy

    assert unigram_entropy(torch.tensor([[1, 1], [2, 5]])) == pytest.approx(1.5 * math.log(2))


def test_scan_restores_one_layer_and_leaves_the_student_as_it_was(teacher_dir):
    from convert import load_teacher
    from distill_model import StudentForCausalLM
    from layer_selection.scan_layers import choose, scan

    teacher = load_teacher(teacher_dir)
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0].eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    ids = torch.randint(0, teacher.config.vocab_size, (4, 24))
    baseline, kls = scan(student, teacher, [ids[:2], ids[2:]])
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def naive(model):
        with torch.no_grad():
            ours, theirs = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, teacher))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()

    assert baseline == pytest.approx(naive(student), rel=1e-4)
    for layer, kl in enumerate(kls):
        assert kl == pytest.approx(naive(student.restore_full_attention(teacher, [layer]).eval()), rel=1e-4)
    assert choose([0.3, 0.1, 0.4, 0.2], 2) == [1, 3]


def test_report_alignment_is_zero_for_the_teacher_itself(teacher_dir):
    from convert import load_teacher
    from quickstart.report import alignment, measure

    teacher = load_teacher(teacher_dir)
    ids = torch.randint(0, teacher.config.vocab_size, (2, 16))
    assert alignment(copy.deepcopy(teacher), teacher, ids) == [0.0] * teacher.config.num_hidden_layers
    with torch.no_grad():
        hidden = teacher.model(ids, use_cache=False).last_hidden_state
        reference = teacher(ids, labels=ids, use_cache=False).loss.item()
    loss, kl, agreement = measure(teacher, teacher, ids, hidden)
    assert loss == pytest.approx(reference, rel=1e-5) and abs(kl) < 1e-6 and agreement == 1


GOOD = [(4.5, 0.0), (5.3, 0.8), (4.6, 0.08), (4.53, 0.03), (4.52, 0.015), (4.4, 0.05)]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({2: (4.6, 0.9)}, "KL falls"),
        ({4: (4.52, 0.03)}, "KL falls"),
        ({2: (4.6, 0.031), 3: (4.53, 0.029), 4: (4.52, 0.016)}, "at most half"),
        ({4: (4.6, 0.015)}, "within 2 %"),
    ],
)
def test_report_measures(change, failed):
    from quickstart.report import Result, measures

    figures = [change.get(i, figure) for i, figure in enumerate(GOOD)]
    results = [Result(f"model {i}", loss, kl, 1.0, loss, "") for i, (loss, kl) in enumerate(figures)]
    falling = [(step, 1 / step) for step in range(1, 21)]
    checks = measures(results, {1: falling, 2: falling, 3: falling}, {"heldout_loss": 4.5, "unigram_entropy": 6.0})
    missed = [text for text, met in checks if not met]
    assert (not missed) if failed is None else len(missed) == 1 and failed in missed[0]
    rising = [(step, loss) for step, (_, loss) in enumerate(falling[::-1], 1)]
    checks = measures(results, {1: falling, 2: rising}, {"heldout_loss": 5.9, "unigram_entropy": 6.0})
    assert sum(not met for _, met in checks) == len(missed) + 2


def test_a_logged_mean_counts_for_each_of_its_steps():
    from quickstart.report import per_step

    assert per_step([(1, 5.0), (3, 4.0), (6, 1.0)]) == [5.0, 4.0, 4.0, 1.0, 1.0, 1.0]


def test_a_step_logged_twice_counts_once(tmp_path):
    from quickstart.report import read_losses

    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 1, "eval_loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_losses(tmp_path) == ([(1, 2.0), (2, 1.0)], [(2, 1.5)])

"""The quickstart: its own parts, and (slow) runs of the whole at a tiny size."""

import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import recall_teacher
from heldout import read_chunks
from quickstart.checks import heldout_measures, loss_measures, recall_measures
from quickstart.corpus import QUICKSTART_TASKS
from quickstart.measure import ModelFigures
from recall_tasks import answer_accuracy

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
        timeout=1200,
    )


@pytest.mark.slow
def test_the_tiny_quickstart_shows_recall(tmp_path):
    """Teacher, all-linear student and hybrid in the table that it prints last, with all measures
    met; run again, it resumes; another one is refused there."""
    out = tmp_path / "out"
    first = quickstart(out, "--tiny")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    table = [line for line in first.stdout.splitlines() if line.startswith("| ")][-5:]
    assert table[0].startswith("| model | associative recall | held-out KL | top-1 agreement | cache at 4,096 tokens |")
    assert [line.split("|")[1].strip() for line in table[1:]] == [
        "teacher",
        "all-linear, after stage 1",
        "hybrid, after stage 2",
        "hybrid, after stage 3",
    ]
    report = json.loads((out / "report.json").read_text())
    assert all(met for _, met in report["measures"]) and sum("recall" in text for text, _ in report["measures"]) >= 3
    assert report["kept"] == [3, 5]  # where this teacher's recall is
    for sample in report["samples"]:
        assert sample["written"]["teacher"] == sample["expected"] != sample["written"]["all-linear, after stage 1"]

    page = (out / "report.html").read_text()
    for figure in ("associative recall", "generated recall", "held-out perplexity", "held-out KL"):
        assert f"<td>{figure}" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)

    for stage, layers in ((1, []), (2, [3, 5]), (3, [3, 5])):
        config = json.loads((out / f"stage{stage}" / "converted-hf" / "config.json").read_text())
        assert config["keep_full_attention_layers"] == layers

    evaluated = json.loads((out / "evaluation" / "results.json").read_text())
    figures = {model["name"]: model for model in report["models"]}
    for name, label in (("teacher", "teacher"), ("hybrid, after stage 2", "stage2")):
        for figure, key in (
            ("associative_recall", "associative_recall@256"),
            ("heldout_kl", "heldout_kl"),
        ):
            assert figures[name][figure] == pytest.approx(evaluated[label][key]["score"], rel=1e-3, abs=1e-4)

    second = quickstart(out, "--tiny")
    assert second.returncode == 0 and second.stdout.count("done before") == 10
    assert "10/10 Report" in second.stdout
    assert [line for line in second.stdout.splitlines() if line.startswith("| ")][-5:] == table

    other = quickstart(out, "--tiny", str(tmp_path))
    assert other.returncode != 0 and "holds the results of another quickstart" in other.stderr


@pytest.mark.slow
def test_a_teacher_is_trained_on_a_users_corpus(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for file in sorted((ROOT / "docs").glob("*.md")):
        (corpus / file.name).write_text(file.read_text() * 3)
    (corpus / "bad.jsonl").write_text('{"text": "cut sho')
    out = tmp_path / "out"
    done = quickstart(out, "--tiny", "--skip_bad_files", "corpus")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    teacher = json.loads((out / "teacher" / "config.json").read_text())
    assert teacher["architectures"] == ["Qwen3ForCausalLM"] and not list((out / "teacher").glob("*.py"))
    assert "left out 1 bad files" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")][-5:]
    assert table[0].startswith("| model | held-out KL | top-1 agreement |")
    assert "<h2>Samples</h2>" in (out / "report.html").read_text()


def test_the_stored_teacher_matches_its_manifest():
    """Its files have the hashes that are written down beside them, with the command and the seed
    that made them."""
    manifest = json.loads((ROOT / "quickstart" / "teacher.json").read_text())
    folder = ROOT / "quickstart" / "teacher"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == sorted(manifest["sha256"])
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == manifest["sha256"][file.name]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert f"--size quickstart --seed {manifest['seed']} " in manifest["command"]
    config = json.loads((folder / "config.json").read_text())
    shape = recall_teacher.QUICKSTART.shape
    assert {name: config[name] for name in shape} == shape
    assert "--size quickstart --seed 1 " in (ROOT / "quickstart.sh").read_text()  # what --train_teacher runs


def test_the_stored_teacher_recalls():
    from runtime.data import load_tokenizer

    from convert import load_teacher
    from quickstart.measure import answer, decoding

    folder = str(ROOT / "quickstart" / "teacher")
    teacher, tokenizer = load_teacher(folder).eval(), load_tokenizer(folder)
    documents = QUICKSTART_TASKS.documents("not seen", 4, hardest=True)
    for task, asked in documents.items():
        assert answer_accuracy(teacher, tokenizer, asked) > 0.9, task
    document = documents["associative_recall"][0]
    assert answer(teacher, tokenizer, document) == document.answer
    short, long = (decoding("teacher", teacher, context, new_tokens=8) for context in (64, 128))
    assert long.cache_bytes > 1.5 * short.cache_bytes and long.tokens_per_second > 0


def test_the_corpus_is_written_once(tmp_path):
    from quickstart import corpus

    corpus.make_corpus(tmp_path / "corpus", QUICKSTART_TASKS, 9, 5, seed=0)
    lines = (tmp_path / "corpus" / "tasks.jsonl").read_text().splitlines()
    starts = [json.loads(line)["text"].partition(" ")[0] for line in lines]
    assert starts == ["recall:", "hops", "copy:"] * 3
    before = (tmp_path / "corpus" / "tasks.jsonl").stat().st_mtime_ns
    corpus.make_corpus(tmp_path / "corpus", QUICKSTART_TASKS, 900, 5, seed=1)
    assert (tmp_path / "corpus" / "tasks.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--tyni"], "--tyni: unknown option"),
        (["--train_teacher", "texts"], "--train_teacher: a teacher is always trained on a CORPUS"),
        (["one", "two"], "two: a second corpus"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_written(tmp_path, arguments, named):
    out = tmp_path / "out"
    run = quickstart(out, *arguments)
    assert run.returncode == 2 and named in run.stderr and not out.exists()


def test_standard_library_without_tests_and_packages(tmp_path):
    from quickstart.corpus import copy_stdlib, stdlib_files

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


def test_report_alignment_is_zero_for_the_teacher_itself(teacher_dir):
    from convert import load_teacher
    from quickstart.measure import HeldoutData, alignment, figures_of

    teacher = load_teacher(teacher_dir)
    ids = torch.randint(0, teacher.config.vocab_size, (2, 16))
    assert alignment(copy.deepcopy(teacher), teacher, ids) == [0.0] * teacher.config.num_hidden_layers
    with torch.no_grad():
        reference = teacher(ids, labels=ids, use_cache=False).loss.item()
    chunks = [{"input_ids": ids}]
    figures = figures_of("teacher", teacher, None, HeldoutData(chunks, chunks, [read_chunks(teacher, ids)], []))
    assert figures.heldout_loss == pytest.approx(reference, rel=1e-5) == figures.long_loss
    assert abs(figures.heldout_kl) < 1e-6 and figures.top1_agreement == 1 and figures.associative_recall is None


NAMES = (
    "teacher",
    "all-linear, before stage 1",
    "all-linear, after stage 1",
    "hybrid, before stage 2",
    "hybrid, after stage 2",
    "hybrid, after stage 3",
    "hybrid, evenly spaced layers",
)
GOOD = [(4.5, 0.0), (5.3, 0.8), (4.6, 0.08), (4.53, 0.03), (4.52, 0.015), (4.4, 0.05), (4.55, 0.06)]
RECALL = [1.0, 0.0, 0.05, 0.9, 0.98, 0.95, 0.1]


def model_figures(figures=GOOD, recall=RECALL):
    return {
        name: ModelFigures(name, loss, kl, 1.0, loss, share) for name, (loss, kl), share in zip(NAMES, figures, recall)
    }


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
def test_measures_of_heldout_text(change, failed):
    results = model_figures([change.get(i, figure) for i, figure in enumerate(GOOD)])
    missed = [text for text, met in heldout_measures(results, entropy=6.0) if not met]
    assert (not missed) if failed is None else len(missed) == 1 and failed in missed[0]
    assert sum(not met for _, met in heldout_measures(results, entropy=4.9)) == len(missed) + 1


def test_measures_of_losses():
    falling = [(0, 2.0), (4, 2.1), (8, 1.9)]
    level = [(0, 2.0), (4, 1.9), (8, 2.0)]
    assert [met for _, met in loss_measures({1: falling, 2: level, 3: falling})] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({0: 0.94}, "teacher recalls"),
        ({2: 0.31}, "all-linear, after stage 1, does not"),
        ({4: 0.89}, "hybrid, after stage 2, recalls again"),
        ({5: 0.89}, "hybrid, after stage 3, recalls again"),
        ({6: 0.5}, "hybrid, evenly spaced layers, does not"),
    ],
)
def test_measures_of_recall(change, failed):
    results = model_figures(recall=[change.get(i, share) for i, share in enumerate(RECALL)])
    missed = [text for text, met in recall_measures(results) if not met]
    assert (not missed) if failed is None else len(missed) == 1 and missed[0].startswith(failed)


def test_the_table_leaves_out_what_was_not_measured():
    from quickstart.measure import Decoding
    from quickstart.report import summary

    speeds = [Decoding("teacher", 64, 9, 2**20), Decoding("teacher", 128, 5, 2**21)]
    head, rows = summary(model_figures(), speeds, NAMES[:3])
    assert head[1] == "associative recall" and head[-2:] == [
        "cache at 128 tokens",
        "decode tokens/s",
    ]
    assert rows[0][-2:] == ["2.00 MiB", "5"] and rows[2][1] == "5.0%" and rows[2][-1] == ""
    head, rows = summary(model_figures(recall=[None] * 7), speeds, NAMES[:3])
    assert head[1] == "held-out KL" and len(rows[0]) == len(head) == 5


def test_a_question_marks_the_pair_that_answers_it():
    from quickstart.report import Sample, sample_section

    sample = Sample("recall: ba be, <a> di ? ba be, <a>", {"teacher": "di", "student": "be"}, "di")
    html = sample_section([sample])
    assert "<mark> &lt;a&gt; di</mark>" in html and "<b> &lt;a&gt; ...?</b>" in html
    assert html.count(">right<") == html.count(">wrong<") == 1

"""Evaluation: lm-evaluation-harness on tiny models, scores against independent ones, failures, comparison with a teacher."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from runtime.checkpoints import sha256
from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks

import datasets
import pytest
import torch
from conftest import begin_with_bos, mean_kl, random_teacher, read_alone, save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import evaluation.commands
from convert import load_teacher
from distill_model import StudentForCausalLM
from evaluation.own_tasks import recall_documents
from evaluation.tasks import GROUPS, LOCAL, RECALL_GENERATION, RULER, Unit
from recall_tasks import NUM_WORDS, RECALL_TASKS, answer_accuracy

ROOT = Path(__file__).parent.parent


def command_line(*words):
    """evaluate.py on one process; returns its exit code."""
    return evaluation.commands.evaluate_checkpoints([*map(str, words), "--num_gpus", "1"])


def run(*checkpoints, **options):
    """`command_line`, with options as keywords."""
    words = list(checkpoints)
    for name, value in options.items():
        words += [f"--{name}", value]
    return command_line(*words)


def read(output):
    return json.loads((output / "results.json").read_text())


def test_local_tasks_end_to_end(teacher_dir, student_dir, data_dir, tmp_path, capsys):
    """Teacher and student through lm-evaluation-harness; every figure is compared with one that was
    computed without the evaluation."""
    options = dict(tasks="local", seq_lens="128,200", data=data_dir, teacher=teacher_dir, limit=6, output=tmp_path)
    options["document_mask"] = "false"  # as the figures below
    assert run(teacher_dir, student_dir, **options) == 0
    found = read(tmp_path)
    teacher, student = (found[label] for label in (Path(teacher_dir).name, Path(student_dir).parent.name))
    assert {key.split("@")[0] for key in teacher} == set(LOCAL) and list(teacher) == list(student)
    assert teacher["heldout_kl"]["score"] == pytest.approx(0, abs=1e-6)

    tokenizer = load_tokenizer(student_dir)
    model = AutoModelForCausalLM.from_pretrained(student_dir).eval()
    for task in RECALL_TASKS:
        for length in (128, 200):
            documents = recall_documents(task, length, NUM_WORDS, tokenizer)[:6]
            assert student[f"{task}@{length}"]["score"] == pytest.approx(
                answer_accuracy(model, tokenizer, documents)
            ), task
            assert student[f"{task}@{length}"]["samples"] == 6
    ids = torch.tensor(open_chunks(data_dir, 32).heldout[:6]["input_ids"], dtype=torch.long)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, load_teacher(teacher_dir)))
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean(-1)
    loss = torch.nn.functional.cross_entropy(ours[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(-1)
    assert student["heldout_kl"]["score"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert student["heldout_kl"]["stderr"] == pytest.approx(kl.std().item() / math.sqrt(6), rel=1e-4)
    assert student["heldout_perplexity"]["score"] == pytest.approx(loss.mean().exp().item(), rel=1e-4)
    assert student["heldout_perplexity"]["metrics"]["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)

    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 1 + len(teacher) - 1 and table in capsys.readouterr().out and "failed" not in table
    assert "± is the standard error." in table and "at most 6 documents of each task (LIMIT)" in table
    assert (tmp_path / "results.png").stat().st_size > 10_000

    files = list(tmp_path.glob("*/results.json"))
    before = [json.loads(file.read_text()) for file in files]
    assert len(files) == 2 and run(teacher_dir, student_dir, **options) == 0
    assert "Everything is there already" in capsys.readouterr().out
    assert [json.loads(file.read_text()) for file in files] == before
    assert run(student_dir, **options | {"limit": 5}) == 0, "another limit is another result"
    assert {r["samples"] for r in read(tmp_path)[Path(student_dir).parent.name].values()} == {5}


def test_documents_are_read_one_by_one(teacher_dir, student_dir, data_dir, tmp_path, capsys):
    """Held-out figures with the documents of a chunk alone, where it records them; they are not those
    of whole chunks, which are measured on request."""
    options = dict(tasks="heldout_kl,heldout_perplexity", data=data_dir, teacher=teacher_dir, limit=6, output=tmp_path)
    assert run(student_dir, **options, document_mask="false") == 0
    (whole,) = read(tmp_path).values()
    assert f"Chunks of {data_dir}: they are read whole (--document_mask)" in capsys.readouterr().out
    assert run(student_dir, **options) == 0
    assert f"Chunks of {data_dir}: their documents are read one by one" in capsys.readouterr().out
    (found,) = read(tmp_path).values()
    assert run(student_dir, **options, document_mask="true") == 0
    assert "Everything is there already." in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(student_dir).eval()
    heldout = open_chunks(data_dir, 32, document_mask="auto").heldout
    alone = read_alone(heldout, 6, model, load_teacher(teacher_dir))
    kl = sum(mean_kl(*predicted) for predicted, _ in alone) / 6
    loss = sum(torch.nn.functional.nll_loss(ours, tokens).item() for (ours, _), tokens in alone) / 6
    assert found["heldout_kl"]["score"] == pytest.approx(kl, rel=1e-4) != whole["heldout_kl"]["score"]
    assert found["heldout_perplexity"]["score"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_results_of_an_older_procedure_are_measured_again(teacher_dir, data_dir, tmp_path, monkeypatch):
    """Except those on chunks, for which there has been one procedure only."""
    options = dict(
        tasks="copying,recall_generation,heldout_perplexity", seq_lens=128, data=data_dir, limit=1, output=tmp_path
    )
    assert run(teacher_dir, **options) == 0
    (file,) = tmp_path.glob("*/results.json")
    content = json.loads(file.read_text())
    for result in content["tasks"].values():
        result["settings"].pop("procedure", None)  # as results were written before this setting existed
        result["score"] = -1.0
    file.write_text(json.dumps(content))
    assert run(teacher_dir, **options) == 0
    scores = {key: result["score"] for key, result in json.loads(file.read_text())["tasks"].items()}
    assert [key for key, score in scores.items() if score == -1.0] == ["heldout_perplexity"] and len(scores) == 3


def test_a_rewritten_export_is_recognised_by_its_content(teacher_dir, tmp_path, capsys, monkeypatch):
    """Its weights are hashed once, and again only when their file has changed; other weights are
    another checkpoint."""
    folder = tmp_path / "run" / "converted-hf"
    read_files = []
    student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", [1])[0]
    student.save_pretrained(folder)
    save_tokenizer(folder)
    monkeypatch.setattr(evaluation.record, "sha256", lambda file: (read_files.append(file.name), sha256(file))[1])
    options = dict(tasks="copying", seq_lens=128, limit=1, output=tmp_path / "out")
    assert run(folder, **options) == 0 and run(folder, **options) == 0
    assert capsys.readouterr().out.count("Everything is there already") == 1 and read_files == ["model.safetensors"]
    before = (folder / "model.safetensors").stat()
    student.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns > before.st_mtime_ns
    assert run(folder, **options) == 0 and len(read_files) == 2
    assert "Everything is there already" in capsys.readouterr().out
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    student.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size == before.st_size
    assert run(folder, **options) == 0 and len(read_files) == 3
    assert "Everything is there already" not in capsys.readouterr().out


class Oracle:
    """A model that knows the documents: it continues any prefix of them, or is wrong in every
    token."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="qwen3", max_position_embeddings=4096, vocab_size=96)

    def __init__(self, tokenizer, texts, wrong):
        self.documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self.wrong, self.batches = wrong, []

    def following(self, ids: list[int]) -> list[int]:
        """The next token after each of the tokens."""
        best = max(self.documents, key=lambda document: len(os.path.commonprefix([document, ids])))
        return [(token + self.wrong) % 96 for token in (best + [0] * len(ids))[1 : len(ids) + 1]]

    def __call__(self, input_ids, **kwargs):
        following = torch.tensor([self.following(row) for row in input_ids.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 96).float() * 20)

    def generate(self, input_ids, attention_mask, max_length, stopping_criteria, **kwargs):
        self.batches.append(attention_mask)
        rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        while max(map(len, rows)) < max_length - (~attention_mask.bool()).sum(1).min():
            rows = [[*row, self.following(row)[-1]] for row in rows]
        new = [row[int(mask.sum()) :] for row, mask in zip(rows, attention_mask)]
        return torch.cat([input_ids, torch.tensor(new)], 1)


@pytest.mark.parametrize("wrong, score", [(0, 1.0), (1, 0.0)])
def test_gold_answers_score_one_and_wrong_ones_zero(teacher_dir, tmp_path, monkeypatch, wrong, score):
    tokenizer = load_tokenizer(teacher_dir)
    made = [recall_documents(task, 160, NUM_WORDS, tokenizer) for task in RECALL_TASKS]
    oracle = Oracle(tokenizer, [document.text for documents in made for document in documents], wrong)
    monkeypatch.setattr(evaluation.harness, "load_model", lambda checkpoint: oracle)
    tasks = ",".join((*RECALL_TASKS, RECALL_GENERATION))
    assert run(teacher_dir, tasks=tasks, seq_lens=160, limit=9, batch_size=4, output=tmp_path) == 0
    results = read(tmp_path)[Path(teacher_dir).name]
    assert len(results) == 4 and {r["score"] for r in results.values()} == {score}
    assert len(oracle.batches) == 3


@pytest.mark.parametrize("name", ["teacher", "gdn_v4", "fox_v1"])
def test_long_prompts_use_chunked_prefill(teacher_dir, tmp_path, monkeypatch, name):
    """As a needle at 262144 tokens needs it; but not with a layer that would process all chunks but
    the first token by token."""
    folder = teacher_dir
    lengths = []
    forward = torch.nn.Embedding.forward
    if name != "teacher":
        folder = tmp_path / name
        StudentForCausalLM.from_teacher(load_teacher(teacher_dir), name, [1])[0].save_pretrained(folder)
        save_tokenizer(folder)
    monkeypatch.setattr(evaluation.harness, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (lengths.append(ids.shape[1]), forward(self, ids))[1]
    )
    assert run(folder, tasks="recall_generation", seq_lens=200, limit=2, output=tmp_path / "out") == 0
    chunks = lengths[: lengths.index(1)]
    assert sum(chunks) > 128
    if name == "fox_v1":
        assert len(chunks) == 1
    else:
        assert set(chunks[:-1]) == {64} and chunks[-1] <= 64


def test_dynamic_rope_turns_chunked_prefill_off(teacher_dir, tmp_path):
    model = load_teacher(teacher_dir)
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    model.save_pretrained(tmp_path)
    prefill = [
        evaluation.harness.load_model(str(folder)).generation_config.prefill_chunk_size
        for folder in (teacher_dir, tmp_path)
    ]
    assert prefill == [evaluation.harness.PREFILL_CHUNK, None]


SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_length": 60,
    "bad_words_ids": [[5]],
    "suppress_tokens": [*range(5, 40)],
    "sequence_bias": [[[7], 9.0]],
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": [1, 9.0],
    "renormalize_logits": True,
}


def test_generation_is_greedy_whatever_the_checkpoint_says(tmp_path):
    """Compared with the argmax of full forward passes; the checkpoint's EOS tokens and the task's own
    settings apply."""
    from lm_eval.api.instance import Instance

    model = random_teacher(tmp_path, "qwen2")
    save_tokenizer(tmp_path)
    tokenizer, prompt = load_tokenizer(str(tmp_path)), "abc abc abc abc"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    new = ids[0, -12:].tolist()
    assert tokenizer.eos_token_id not in new

    def written(ends, **asked):
        (tmp_path / "generation_config.json").write_text(json.dumps({**SAMPLING, "eos_token_id": ends}))
        lm = evaluation.harness.harness_model(str(tmp_path), "1")
        request = Instance("generate_until", {}, (prompt, {"until": ["\n\n"], "max_gen_toks": 12, **asked}), 0)
        return lm.generate_until([request], disable_tqdm=True)[0]

    assert written(0) == tokenizer.decode(new)
    stop = next(i for i in range(1, 12) if new[i] not in new[:i])
    assert written([0, new[stop]]) == tokenizer.decode(new[: stop + 1])
    assert written(0, suppress_tokens=new) != tokenizer.decode(new)


@pytest.mark.parametrize("ends", [False, True])
def test_every_text_begins_with_the_tokenizers_bos(tmp_path, monkeypatch, ends):
    """In all tasks of our own, as in training; it counts in their lengths. An EOS that the tokenizer
    appends to a text is left out."""
    random_teacher(tmp_path)
    save_tokenizer(tmp_path)
    bos, seen, forward = begin_with_bos(tmp_path, ends), [], torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (seen.extend(ids.tolist()), forward(self, ids))[1]
    )
    for task in (*RECALL_TASKS, RECALL_GENERATION):
        seen.clear()
        assert run(tmp_path, tasks=task, seq_lens=100, limit=3, batch_size=1, output=tmp_path / "out") == 0
        texts = [row for row in seen if len(row) > 1]
        assert len(texts) >= 3 and all(row[0] == bos and row.count(bos) == 1 and len(row) <= 100 for row in texts), task
        assert not any(load_tokenizer(str(tmp_path)).eos_token_id in row for row in texts), task


def test_the_mean_over_lengths_is_of_the_same_tasks():
    """A task that is missing at a length or for a checkpoint would change the mean."""

    def scores(**tasks):
        return {
            Unit(task, n).key: result(task, score, 0.1, n)
            for task, found in tasks.items()
            for n, score in found.items()
        }

    results = {
        "a": scores(copying={96: 0.5, 200: 0.25}, multi_hop_recall={96: 0.9, 200: 0.7}, associative_recall={96: 1.0}),
        "b": scores(copying={96: 0.1, 200: 0.0}, multi_hop_recall={96: 0.9}),
    }
    assert evaluation.tables.over_lengths(evaluation.tables.rows(results), ["a", "b"]) == (
        [96, 200],
        {"a": [0.5, 0.25], "b": [0.1, 0.0]},
        1,
    )
    assert evaluation.tables.over_lengths(evaluation.tables.rows({"b": scores(copying={96: 0.1})}), ["b"]) == (
        [],
        {},
        0,
    )


def test_every_metric_of_which_lower_is_better_has_a_panel(tmp_path, monkeypatch):
    """Perplexity and KL on one axis would hide the KL."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: figures.append(self))
    tasks = {
        r["task"]: r
        for r in (
            result("piqa", 0.5, 0.1),
            result("heldout_perplexity", 300.0, 9.0, higher=False, metric="perplexity"),
            result("heldout_kl", 0.2, 0.01, higher=False, metric="nats"),
        )
    }
    evaluation.tables.plot({"a": tasks, "b": tasks}, tmp_path / "x.png")
    assert [axis.get_xlabel() for axis in figures[0].axes] == [
        "score",
        "perplexity, lower is better",
        "nats, lower is better",
    ]
    assert [bar.get_width() for bar in figures[0].axes[2].patches] == [0.2, 0.2]


@pytest.mark.parametrize("task", [*RECALL_TASKS, "needle_recall"])
def test_recall_documents_fill_their_length_and_are_reproducible(teacher_dir, task):
    tokenizer = load_tokenizer(teacher_dir)
    for length in (200, 500) if task == "needle_recall" else (100, 500):
        documents = recall_documents(task, length, 32, tokenizer, 20)
        longest = max(len(ids) for ids in tokenizer([d.text for d in documents])["input_ids"])
        assert length / 2 < longest <= length
        assert (
            documents == recall_documents(task, length, 32, tokenizer, 20) and len(set(d.text for d in documents)) == 20
        )
    with pytest.raises(ValueError, match="--seq_lens: 10 tokens are too few"):
        recall_documents(task, 10, 32, tokenizer)
    if task not in ("copying", "needle_recall"):
        with pytest.raises(ValueError, match="different words; there are"):
            recall_documents(task, 100_000, 32, tokenizer)


def test_a_failing_task_does_not_stop_the_others(teacher_dir, tmp_path, capfd, monkeypatch):
    """One has no network, one too short a length, one fails while it is measured; two succeed, and
    the failed ones are tried again."""
    inner = evaluation.runner.measure

    def broken(unit, *args):
        if unit.task == "copying":
            raise RuntimeError("no such kernel\nand a traceback")
        return inner(unit, *args)

    options = dict(
        tasks="niah_single_2,copying,ruler_cwe,associative_recall,multi_hop_recall",
        seq_lens=128,
        limit=2,
        output=tmp_path,
    )
    monkeypatch.setattr(evaluation.runner, "measure", broken)
    monkeypatch.setitem(evaluation.ruler.SHORTEST, "niah_single_2", 1)
    assert run(teacher_dir, **options) == 1
    shown = capfd.readouterr()
    assert "Needs a network, to download: niah_single_2 (baber/paul_graham_essays and nltk's punkt_tab)\n" in shown.out
    results = read(tmp_path)[Path(teacher_dir).name]
    assert "paul_graham_essays" in results["niah_single_2@128"]["error"]
    assert results["copying@128"]["error"] == "RuntimeError: no such kernel"
    assert results["ruler_cwe@128"]["error"] == "--seq_lens: 128 is too short for ruler_cwe; it needs 2048"
    assert all("score" in results[f"{task}@128"] for task in ("associative_recall", "multi_hop_recall"))
    table = (tmp_path / "results.md").read_text()
    assert table.count("| failed |") == 3 and "\nFailed: " in table and shown.err.count("FAILED: ") == 3

    monkeypatch.setattr(evaluation.runner, "measure", inner)
    assert run(teacher_dir, **options) == 1
    again = read(tmp_path)[Path(teacher_dir).name]
    assert "score" in again["copying@128"] and again["associative_recall@128"] == results["associative_recall@128"]


def test_a_model_that_diverged_has_no_score(teacher_dir, data_dir, tmp_path):
    model = load_teacher(teacher_dir)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    save_tokenizer(tmp_path / "nan")
    options = dict(tasks="copying,heldout_perplexity", seq_lens=128, data=data_dir)
    assert run(tmp_path / "nan", **options, output=tmp_path / "out") == 1
    (results,) = read(tmp_path / "out").values()
    assert len(results) == 2 and all("not finite" in result["error"] for result in results.values())


def test_a_checkpoint_that_does_not_load_does_not_stop_the_others(teacher_dir, tmp_path):
    broken = tmp_path / "broken"
    random_teacher(broken)
    (broken / "model.safetensors").write_bytes(b"damaged")
    save_tokenizer(broken)
    options = dict(tasks="copying", seq_lens=128, limit=1, output=tmp_path / "out")
    assert run(broken, teacher_dir, **options) == 1
    results = read(tmp_path / "out")
    assert "error" in results["broken"]["copying@128"] and "score" in results[Path(teacher_dir).name]["copying@128"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "rular"], r"--tasks: 'rular' is unknown; did you mean ruler"),
        (["--tasks", "heldout_kl", "--teacher", "TEACHER"], "--data: heldout_kl needs"),
        (["--tasks", "heldout_kl", "--data", "DATA"], "--teacher: heldout_kl needs"),
        (["--data", "/nowhere"], "^--data: /nowhere: no such folder; make it with preprocess_chunk.py$"),
        (["--data", "TEACHER"], "^--data: .*: holds no readable metadata.json; make"),
        (
            ["--data", "TOKENS"],
            "^--data: .*tokenized holds no chunks; cut its documents with preprocess_chunk.py --tokenized_dataset_path",
        ),
        (["--teacher", "/nowhere"], "--teacher: '/nowhere' is neither a folder"),
        (["--seq_lens", "4k"], "--seq_lens: '4k' must be numbers"),
        (["--limit", "0"], "--limit: 0 must be at least 1"),
        (["--num_words", "100000"], "--num_words: 100000 must be at most [0-9]+, the number of words that there are"),
        (["--batch_size", "many"], "--batch_size: 'many' must be a number, or auto"),
        (["--tasks", " , "], "--tasks: names no task"),
        (["TEACHER"], "is named twice"),
        (["no/such-model"], "CHECKPOINT: 'no/such-model' is neither a folder"),
        (["/no/such/folder"], "CHECKPOINT: '/no/such/folder' is neither a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(teacher_dir, data_dir, tmp_path, options, message):
    folders = {
        "TEACHER": teacher_dir,
        "DATA": data_dir,
        "TOKENS": str(Path(data_dir).parent / "tokenized"),
    }
    options = [folders.get(option, option) for option in options]
    with pytest.raises(ValueError, match=message) as error:
        command_line(teacher_dir, *options, "--output", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_predecessor_is_refused_by_name(teacher_dir, tmp_path):
    """Wherever it is named, with the reason; its K and V would be in another order."""
    (tmp_path / "config.json").write_text('{"model_type": "student"}')
    with pytest.raises(ValueError, match="model_type: 'student' is a student of the KL-guided .* orders K and V"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for argv in ([tmp_path, "--tasks", "copying"], [teacher_dir, "--tasks", "copying", "--teacher", tmp_path]):
        with pytest.raises(ValueError, match=f": '{tmp_path}' is a student of the KL-guided .* orders K and V"):
            command_line(*argv, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", [evaluation.commands.evaluate_checkpoints, evaluation.commands.compare_with_teacher])
def test_an_unusable_output_folder_ends_in_one_line(teacher_dir, student_dir, tmp_path, monkeypatch, main):
    """A file in its place, and damaged results: before any task, with what to fix."""
    (tmp_path / "file").touch()
    damaged = evaluation.record.Record(SimpleNamespace(output=tmp_path / "out"), student_dir).file
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"tasks": ')
    monkeypatch.setattr(evaluation.runner, "Worker", None)
    monkeypatch.setattr(sys, "argv", ["a.py"])
    for output, message in (
        (tmp_path / "file", f"{tmp_path / 'file'}.*: Not a directory"),
        (tmp_path / "out", f"--output: {damaged} holds no"),
    ):
        argv = [teacher_dir, student_dir, "--tasks", "copying", "--output", str(output), "--num_gpus", "1"]
        with pytest.raises(SystemExit, match=f"^a.py: error: {message}") as error:
            run_main(partial(main, argv))
        assert "\n" not in str(error.value.code)
    assert damaged.read_text() == '{"tasks": '


def test_groups_and_lengths(data_dir):
    def asked(tasks, **options):
        args = SimpleNamespace(**{"tasks": tasks.split(","), "seq_lens": [], "data": None, "teacher": None, **options})
        return evaluation.planning.plan(args, evaluation.ruler.ruler_manager())

    assert asked("ruler") == [Unit(task, 4096) for task in RULER] and len(RULER) == 13
    assert {unit.seq_len for unit in asked("needle")} == {4096, 16384, 65536, 262144}
    assert len(asked("ruler,niah_single_1,needle", seq_lens=[4096, 8192])) == 26, "each once"
    assert [unit.task for unit in asked("local")] == [*RECALL_TASKS, "recall_generation"]
    assert len(asked("local", data=data_dir)) == 5 and len(asked("local", data=data_dir, teacher="x")) == 6


def test_labels_in_tables_distinguish_checkpoints():
    assert evaluation.options.labels(["a/stage2/converted-hf", "a/stage3/converted-hf"]) == {
        "a/stage2/converted-hf": "stage2",
        "a/stage3/converted-hf": "stage3",
    }
    assert list(
        evaluation.options.labels(["a/stage3/converted-hf", "/b/stage3/converted-hf", "Qwen/Qwen3-1.7B"]).values()
    ) == ["a/stage3", "b/stage3", "Qwen/Qwen3-1.7B"]


def test_every_task_of_the_groups_is_known_and_its_download_named():
    """The names are lm-evaluation-harness's own, and what they download is read from its index."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    fetched = {name: evaluation.planning.dataset_of(name, manager) for group in GROUPS.values() for name in group}
    assert {name for name in fetched if name not in LOCAL} <= set(manager.all_tasks)
    assert fetched["hellaswag"] == "Rowan/hellaswag" and fetched["mmlu"] == "cais/mmlu" and "gsm8k" in fetched["gsm8k"]
    offline = {name for name, source in fetched.items() if source is None}
    assert offline == {
        *LOCAL,
        "niah_single_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "ruler_vt",
        "ruler_cwe",
        "ruler_fwe",
    }
    units = evaluation.planning.plan(SimpleNamespace(tasks=["ai2_arc"], seq_lens=[], data=None, teacher=None), manager)
    assert [unit.key for unit in units] == ["arc_challenge", "arc_easy"], "a tag is its tasks"


def test_tasks_import_the_library_evaluate_and_not_the_script(monkeypatch):
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    monkeypatch.syspath_prepend(ROOT)
    evaluation.harness.import_evaluate_library()
    assert callable(sys.modules["evaluate"].load)
    assert Path(sys.modules["evaluate"].__file__).parent.parent != ROOT and str(ROOT) == sys.path[0]


@pytest.fixture(scope="module", autouse=True)
def rulers_cache(tmp_path_factory):
    """The folder of RULER's documents."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder / "ruler"


@pytest.fixture(scope="module")
def ruler(teacher_dir):
    """Builds RULER's tasks as the evaluation does."""
    lm = SimpleNamespace(tokenizer=load_tokenizer(teacher_dir))
    return lambda unit, limit=None: evaluation.harness.build(unit, SimpleNamespace(limit=limit), None, lm)


def test_rulers_documents_do_not_depend_on_the_tasks_before(ruler, rulers_cache):
    units = [Unit("ruler_cwe", 2048), Unit("niah_single_1", 1024), Unit("ruler_fwe", 1024)]

    def texts(unit):
        docs = list(ruler(unit).test_docs())
        assert len(docs) == 500 and {doc["max_length"] for doc in docs} == {unit.seq_len}
        return [doc["input"] for doc in docs]

    first = {unit: texts(unit) for unit in units}
    shutil.rmtree(rulers_cache)
    assert all(texts(unit) == first[unit] for unit in reversed(units))


@pytest.mark.parametrize(
    "unit",
    [Unit("ruler_cwe", 2100), Unit("niah_single_1", 1100), Unit("niah_multikey_3", 1100), Unit("ruler_fwe", 1100)],
    ids=lambda unit: unit.key,
)
def test_only_the_requested_number_of_rulers_documents_is_made(ruler, unit, monkeypatch):
    """They are the first of the 500."""
    encoded, inner = [], PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, text: (encoded.append(text), inner(self, text))[1]
    )
    few = list(ruler(unit, limit=3).test_docs())
    assert len(few) == 3 and len(encoded) < 200
    assert few == list(ruler(unit).test_docs())[:3] and len(encoded) > 500


def test_rulers_documents_are_made_once_per_tokenizer(teacher_dir, student_dir, tmp_path, monkeypatch):
    """For teacher and student, and for a later call; not for another tokenizer."""
    made, inner = [], evaluation.ruler.generate
    monkeypatch.setattr(
        evaluation.ruler,
        "generate",
        lambda unit, tokenizer, count: (made.append((unit.seq_len, count)), inner(unit, tokenizer, count))[1],
    )

    def evaluated(output, checkpoints):
        assert run(*checkpoints, tasks="niah_single_1", seq_lens=1030, limit=1, output=tmp_path / output) == 0

    evaluated("a", (teacher_dir, student_dir))
    evaluated("b", (teacher_dir,))
    assert made == [(1030, 1)]
    other = tmp_path / "other"
    random_teacher(other)
    save_tokenizer(other, extra="zzz")
    evaluated("c", (other,))
    assert made == [(1030, 1)] * 2


def test_rulers_documents_are_written_atomically(ruler, rulers_cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    before = set(rulers_cache.glob(".*")), set(rulers_cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.ruler, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            ruler(Unit("niah_single_1", 1060), limit=1)
    assert (set(rulers_cache.glob(".*")), set(rulers_cache.iterdir())) == before
    assert len(list(ruler(Unit("niah_single_1", 1060), limit=1).test_docs())) == 1


def test_no_code_of_a_checkpoint_is_run(tmp_path, teacher_dir):
    """By RULER's tasks, which in lm-evaluation-harness itself open a tokenizer by its path."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(teacher_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}})
    )
    (folder / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Mine\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(*args): pass\n"
    )
    assert run(folder, tasks="niah_single_1,copying", seq_lens=1024, limit=1, output=tmp_path / "out") == 0
    assert not (tmp_path / "ran").exists()


def test_what_a_task_does_not_need_is_not_downloaded(ruler, monkeypatch):
    """nltk's sentence splitter: the generators download it when they are imported, though only the
    tasks with essays use it."""
    import nltk

    for module in ("prepare_niah", "niah_utils"):
        monkeypatch.delitem(sys.modules, f"lm_eval.tasks.ruler.{module}", raising=False)
    monkeypatch.setattr(nltk.data, "find", lambda name: (_ for _ in ()).throw(LookupError(name)))
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("it was downloaded"))
    assert len(ruler(Unit("niah_single_1", 1040), limit=1).test_docs()) == 1


def test_a_missing_sentence_splitter_is_named(ruler, monkeypatch):
    """In one line, where a task needs it."""
    import nltk
    from lm_eval.tasks.ruler import prepare_niah

    monkeypatch.setattr(prepare_niah, "get_haystack", lambda type_haystack: ["some", "words"])
    monkeypatch.setattr(nltk.data, "find", lambda name: (_ for _ in ()).throw(LookupError(name)))
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(ValueError, match="^nltk's punkt_tab is missing and could not be downloaded; run [^\\n]*$"):
        ruler(Unit("niah_single_2", 1024), limit=1)


def test_rulers_gold_answers_score_one(ruler):
    task = ruler(Unit("niah_single_1", 1024))
    doc = next(iter(task.test_docs()))
    assert doc["outputs"][0] in doc["input"]
    assert task.process_results(doc, [" ".join(doc["outputs"])])["1024"] == 1
    assert task.process_results(doc, ["something else"])["1024"] == 0


def test_ruler_through_the_harness(teacher_dir, tmp_path, monkeypatch):
    """At a length that its configuration does not list and that is longer than the model's config
    allows: nothing is truncated."""
    from lm_eval.models.huggingface import HFLM

    prompts = []

    def generate(self, context, max_length, stop, **kwargs):
        prompts.extend(self.tokenizer.decode(row[row != self.tokenizer.pad_token_id]) for row in context)
        answers = [re.search(r"is: (\d+)", prompt)[1] for prompt in prompts[-len(context) :]]
        answers = [answers[0], *("9" for _ in answers[1:])]  # the first of a batch is right
        new = [self.tokenizer(f" {answer}")["input_ids"] for answer in answers]
        width = max(map(len, new))
        return torch.cat([context, torch.tensor([ids + [0] * (width - len(ids)) for ids in new])], 1)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    options = dict(tasks="niah_single_1", seq_lens="1024,1536", limit=4, batch_size=4)
    assert run(teacher_dir, **options, output=tmp_path) == 0
    results = read(tmp_path)[Path(teacher_dir).name]
    assert len(prompts) == 8 and all(prompt.startswith("A special magic number is hidden") for prompt in prompts)
    for length in (1024, 1536):
        assert results[f"niah_single_1@{length}"]["score"] == 0.25
        assert results[f"niah_single_1@{length}"]["stderr"] == pytest.approx(0.25)  # of 1, 0, 0, 0: std 0.5 / sqrt(4)


def test_endless_variable_tracking_is_refused(ruler):
    with pytest.raises(ValueError, match="ruler_vt: the tokenizer makes"):
        ruler(Unit("ruler_vt", 4096))


# ------------------------------------------------------------------------------------------------ comparison
def result(task, score, stderr, seq_len=None, higher=True, metric="acc", **settings):
    return {
        "task": task,
        "seq_len": seq_len,
        "metric": metric,
        "score": score,
        "stderr": stderr,
        "higher_is_better": higher,
        "samples": 10,
        "settings": {"checkpoint": "x", "limit": None, **settings},
    }


def write(folder, *results, failed=()):
    tasks = {Unit(r["task"], r["seq_len"]).key: r for r in results}
    tasks |= {
        key: {"task": key, "seq_len": None, "error": "no network", "settings": {"checkpoint": "x", "limit": None}}
        for key in failed
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"checkpoint": str(folder), "tasks": tasks}))
    return str(folder / "results.json")


def test_comparison_recomputed_by_hand(tmp_path, capsys):
    ruler = [result(task, 0.8, 0.03, 4096) for task in RULER]
    worse = [result(task, 0.6, 0.04, 4096) for task in RULER]
    files = [
        write(
            tmp_path / "teacher",
            result("piqa", 0.8, 0.02),
            result("arc_easy", 0.5, 0.05),
            result("boolq", 0.0, 0.0),
            result("heldout_perplexity", 10.0, 0.5, higher=False, metric="perplexity"),
            result("heldout_kl", 0.0, 0.0, higher=False, metric="nats"),
            *ruler,
        ),
        write(
            tmp_path / "hybrid",
            result("piqa", 0.6, 0.03),
            result("arc_easy", 0.5, 0.05),
            result("boolq", 0.5, 0.1),
            result("heldout_perplexity", 12.5, 0.5, higher=False, metric="perplexity"),
            result("heldout_kl", 0.2, 0.01, higher=False, metric="nats"),
            result("gsm8k", 0.1, 0.1),
            *worse,
        ),
    ]
    assert evaluation.commands.compare_with_teacher([*files, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["teacher"] == "teacher"
    tasks = {row["task"]: row for row in found["students"]["hybrid"]["tasks"]}
    assert tasks["piqa"]["share"] == pytest.approx(0.75)
    # Of 0.6 / 0.8 with relative errors of 0.05 and 0.025.
    assert tasks["piqa"]["share_stderr"] == pytest.approx(0.75 * math.sqrt(0.05**2 + 0.025**2))
    assert tasks["heldout_perplexity"]["share"] == pytest.approx(0.8)
    assert tasks["heldout_perplexity"]["share_stderr"] == pytest.approx(0.8 * math.sqrt(0.05**2 + 0.04**2))
    assert tasks["boolq"]["share"] is None and tasks["heldout_kl"]["share"] is None and "gsm8k" not in tasks
    assert tasks["ruler"]["student"]["score"] == pytest.approx(0.6) and tasks["ruler"]["share"] == pytest.approx(0.75)
    assert tasks["ruler"]["student"]["stderr"] == pytest.approx(0.04 / math.sqrt(13))
    assert "commonsense" not in tasks, "not all of it was measured"
    assert found["students"]["hybrid"]["all"] == pytest.approx(
        (0.6 + 0.5 + 0.5 + 13 * 0.6) / (0.8 + 0.5 + 0 + 13 * 0.8)
    )
    table = (tmp_path / "out" / "compare.md").read_text()
    assert (
        "| piqa |  | acc | 0.800 ± 0.020 | 0.600 ± 0.030 | 75.0% ± 4.2% |" in table and table in capsys.readouterr().out
    )
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_comparison_of_what_cannot_be_compared(tmp_path):
    teacher = write(tmp_path / "a", result("piqa", 0.8, 0.02))
    limited = write(tmp_path / "b", result("piqa", 0.8, 0.02) | {"settings": {"checkpoint": "y", "limit": 5}})
    newer = write(tmp_path / "e", result("piqa", 0.8, 0.02, procedure=2))
    other = write(tmp_path / "c", result("boolq", 0.8, 0.02))
    failed, tables = write(tmp_path / "d", failed=["piqa"]), str(tmp_path / "tables.json")
    Path(tables).write_text('{"a": {"piqa": {"score": 0.8}}}')  # the tables of one call
    for files, message in (
        ((teacher, limited), "another limit"),
        ((teacher, newer), r"another procedure \(2\)"),
        ((teacher, other), "no task in common"),
        ((teacher,), "one alone"),
        ((teacher, "folder"), "files alone, or checkpoints alone"),
        (
            (teacher, str(tmp_path / "none.json")),
            r"none.json is no results.json .* to OUTPUT/PATH__OF__CHECKPOINT/results.json$",
        ),
        ((teacher, tables), "tables.json is no results.json of a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.commands.compare_with_teacher([*files, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert evaluation.commands.compare_with_teacher([teacher, failed, "--output", str(tmp_path / "out")]) == 1
    assert "Failed: d, piqa" in (tmp_path / "out" / "compare.md").read_text()


def test_comparison_evaluates_checkpoints(teacher_dir, student_dir, data_dir, tmp_path):
    options = (
        "--tasks",
        "associative_recall,heldout_kl,heldout_perplexity",
        "--seq_lens",
        "96",
        "--limit",
        "3",
        "--data",
        data_dir,
    )
    assert (
        evaluation.commands.compare_with_teacher(
            [teacher_dir, student_dir, *options, "--output", str(tmp_path), "--num_gpus", "1"]
        )
        == 0
    )
    found = json.loads((tmp_path / "compare.json").read_text())
    rows = {row["task"]: row for row in found["students"][Path(student_dir).parent.name]["tasks"]}
    assert (
        rows["heldout_kl"]["teacher"]["score"] == pytest.approx(0, abs=1e-6)
        and rows["heldout_kl"]["student"]["score"] > 0.01
    )
    ratio = rows["heldout_perplexity"]["teacher"]["score"] / rows["heldout_perplexity"]["student"]["score"]
    assert rows["heldout_perplexity"]["share"] == pytest.approx(ratio)


# ------------------------------------------------------------------------------------------------ the script
def script(*checkpoints, **environment):
    environment = os.environ | {
        "VENV": os.environ.get("VIRTUAL_ENV", ".venv"),
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        ["bash", "eval.sh", *checkpoints], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def test_the_script_passes_its_variables_on(student_dir, tmp_path):
    done = script(
        student_dir, TASKS="copying", SEQ_LENS="128", LIMIT="3", BATCH_SIZE="2", NUM_WORDS="16", OUTPUT=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = read(tmp_path)[Path(student_dir).parent.name]["copying@128"]
    assert found["samples"] == 3 and found["settings"]["limit"] == 3 and found["settings"]["num_words"] == 16
    assert "| copying | 128 | acc |" in done.stdout


def test_the_script_says_what_is_wrong(tmp_path):
    done = script()
    assert done.returncode == 1 and done.stderr == "CHECKPOINT: none; usage: [TASKS=...] bash eval.sh CHECKPOINT...\n"
    done = script("/no/such/folder", OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert re.search("^evaluate.py: error: CHECKPOINT: '/no/such/folder' is neither", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    done = script("/no/such/folder", LIMIT="0")
    assert done.returncode == 1 and "evaluate.py: error: LIMIT: 0 must be at least 1\n" in done.stderr


def same_scores(one, two, rel):
    """Asserts that two results of a checkpoint agree, errors included. rel: the tolerance of a score;
    that of a standard error is ten times as large."""
    assert one.keys() == two.keys()
    for key, result in one.items():
        if "error" in result:
            assert result["error"] == two[key]["error"]
            continue
        assert result["samples"] == two[key]["samples"]
        assert two[key]["score"] == pytest.approx(result["score"], rel=rel, abs=1e-6), key
        assert two[key]["stderr"] == pytest.approx(result["stderr"], rel=10 * rel, abs=1e-6), key


@pytest.mark.slow
def test_two_processes_score_as_one(teacher_dir, student_dir, data_dir, tmp_path):
    """An odd number of documents is sharded across two; a failure in the middle of a task ends the
    processes, and they are started again."""
    other = tmp_path / "other"  # a teacher with another vocabulary: measuring the KL fails
    random_teacher(other, vocab_size=100)
    save_tokenizer(other)
    tasks = "associative_recall,heldout_kl,recall_generation,ruler_cwe,heldout_perplexity"
    variables = {"TASKS": tasks, "SEQ_LENS": "96", "LIMIT": "7", "DATA": data_dir, "TEACHER": str(other)}
    found = []
    for count in ("1", "2"):
        done = script(student_dir, **variables, OUTPUT=str(tmp_path / count), NUM_GPUS=count)
        assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
        found.append(read(tmp_path / count)[Path(student_dir).parent.name])
    one, two = found
    same_scores(one, two, 1e-5)
    assert len(one) == 5 and all(
        result["samples"] == (7 if "@" in key else min(7, result["samples"]))
        for key, result in one.items()
        if "error" not in result
    )
    assert [key for key in one if "error" in one[key]] == ["heldout_kl", "ruler_cwe@96"]

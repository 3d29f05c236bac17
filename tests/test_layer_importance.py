"""Task ablations: exact scores, and zeroed layers that agree with Hugging Face's own model with a
zeroed layer."""

import argparse
import csv
import json
import random
import re

from runtime.data import load_tokenizer

import pytest
import torch
from conftest import begin_with_bos, save_tokenizer
from test_select_layers import flags
from transformers import AutoModelForCausalLM

from convert import load_teacher
from distill_model import StudentForCausalLM
from layer_selection import evaluate_layer_importance, task_ablation
from layer_selection.ablation_questions import (
    TASKS,
    Question,
    QuestionOptions,
    add_options,
    draw_questions,
    question_options,
)
from layer_selection.task_ablation import EXTRA_TOKENS, continuations

SMALL = flags(
    num_pairs=3,
    num_chains=2,
    num_hops=2,
    freq_cw=3,
    freq_ucw=1,
    num_cw=2,
    num_ucw=3,
    vocab_size=30,
    num_words=60,
    pb_min_len=2,
    pb_max_len=4,
)


def draw(task, *flags, seed=0, num_samples=5):
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["--num_samples", str(num_samples), *flags])
    return draw_questions(task, question_options(args), seed)


# ------------------------------------------------------------------------------------------------ questions
@pytest.mark.parametrize("task", TASKS)
def test_only_the_answer_scores(task):
    for question in draw(task):
        gold = question.gold
        assert question.score(f"{gold}\n") == 1 and question.score(f"{gold}\nWhat is the number of x? 7\n") == 1
        assert question.score("") == question.score("\n") == question.score(" ,,\n") == 0
        for wrong in (
            "{}7",
            "7{}",
            "not {}",
            "{} {}",
            "-{}",
            "{}.",
        ):  # they hold the right characters
            assert question.score(" " + ", ".join(wrong.format(a, a) for a in question.answers) + "\n") == 0
        assert question.score(gold) == pytest.approx(1 - 1 / len(question.answers))  # nothing ends it: it may go on


def test_a_number_with_the_right_digits_is_wrong():
    question = Question("", ("1234567",))
    assert [question.score(f" {text}\n") for text in ("1234567", "12345678", "01234567", "234567", "1 234567")] == [
        1,
        0,
        0,
        0,
        0,
    ]


def test_several_answers_count_in_any_order_but_no_more_than_are_asked_for():
    question = Question("", ("a", "b", "c"))
    assert question.score(" c, a,b\n") == 1 and question.score(" a, a, a\n") == pytest.approx(1 / 3)
    assert question.score(" x, y, z, a, b, c\n") == 0 and question.score(" x, b\n") == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", TASKS)
def test_questions_follow_from_seed_and_options(task):
    assert draw(task, num_samples=3) == draw(task, num_samples=8)[:3] != draw(task, num_samples=3, seed=1)


def test_the_text_contains_the_answers():
    """Each answer is found again by other means than those that made it."""
    for question in draw("synthetic_retrieval", num_samples=20):
        text, key = (
            question.prompt.split("\n")[0],
            question.prompt.removesuffix("?").rsplit(" ", 1)[1],
        )
        assert question.answers == (dict(re.findall(r"number of (\w+) is (\d+)", text))[key],)
        sentences = text.split(". ")
        assert sum("number of" in sentence for sentence in sentences) == len(sentences) / 2 == 16
    for question in draw("phone_book", num_samples=20):
        book = dict(re.findall(r"^([A-Z]\w+ [A-Z]\w+): (.*)$", question.prompt, re.MULTILINE))
        assert 20 <= len(book) <= 40
        assert question.answers == (book[re.search(r"number of ([\w ]+)\?$", question.prompt)[1]],)
    for question in draw("variable_tracking", num_samples=20):
        *_, text, asked = question.prompt.split("\n")
        values = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(value, value)  # assigned before it is used
        assert len(values) == 4 * 5 and len(question.answers) == 5
        assert set(question.answers) == {name for name, value in values.items() if value == re.search(r"\d+", asked)[0]}
    for task, separator in (
        ("common_words_extraction", r"\. (\w+)"),
        ("frequent_words_extraction", r"(\w+)"),
    ):
        for question in draw(task):
            words = re.findall(separator, question.prompt.split("\n")[-2])
            most = sorted(set(words), key=words.count)[-len(question.answers) :]
            assert set(most) == set(question.answers)
            assert task[0] == "f" or (words.count(most[0]), len(words)) == (30, 10 * 30 + 50 * 3)


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2.5])
def test_noise_ratio_counts_fillers_per_informative_sentence(ratio):
    retrieval, *_ = draw("synthetic_retrieval", "--noise_ratio", str(ratio), "--num_pairs", "20")
    sentences = retrieval.prompt.split("\n")[0].removesuffix(".").split(". ")
    signal = sum("number of" in sentence for sentence in sentences)
    assert (signal, len(sentences) - signal) == (20, 20 * ratio)
    tracking, *_ = draw("variable_tracking", "--noise_ratio", str(ratio), "--num_chains", "2", "--num_hops", "4")
    sentences = tracking.prompt.split("\n")[-2].removesuffix(".").split(". ")
    signal = sum(sentence.startswith("VAR ") for sentence in sentences)
    assert (signal, len(sentences) - signal) == (10, 10 * ratio)


@pytest.mark.parametrize("task", TASKS)
def test_examples_show_the_format(task):
    """Others of its kind come before the question, each with an answer of as many items."""
    for question in draw(task):
        if question.ends == ",\n":
            *shown, asked = question.prompt.partition("?")[2].split(",")
            assert shown and all(len(pair.split()) == len(f"{asked} {question.gold}".split()) for pair in shown)
        else:
            *shown, asked = question.prompt.split("\n")
            kind = re.sub(r"\d+|(?<=of )[\w ]+", r"[\\w ]+", re.escape(asked).replace(r"\ ", " "))
            answers = [match[1] for line in shown if (match := re.fullmatch(rf"{kind} (.+)", line))]
            assert answers and all(len(answer.split(", ")) == len(question.answers) for answer in answers)


BAD = {
    "--num_pairs 0": "--num_pairs: 0 must be at least 1",
    "--noise_ratio -0.5": "--noise_ratio: -0.5 must be from 0 to 1000",
    "--noise_ratio nan": "--noise_ratio: nan must be from 0 to 1000",
    "--freq_cw 3": "--freq_cw: 3 must be more than --freq_ucw, 3",
    "--pb_min_len 50": "--pb_min_len: 50 must be at most --pb_max_len, 40",
    "--ar_max_hops 1": "--ar_max_hops: 1 must be at least 2",
    "--vocab_size 100000": "--vocab_size: 100000 must be at most",
    "--zeta_alpha 0": "--zeta_alpha: 0.0",
    "--num_samples 0": "--num_samples: 0",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_options(flags):
    with pytest.raises(ValueError, match=BAD[flags]):
        draw("phone_book", *flags.split())


def test_impossible_options_are_refused():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="--num_pairs: needs 16 different words; set --vocab_size"):
        TASKS["associative_recall"](rng, QuestionOptions(vocab_size=8))
    with pytest.raises(
        ValueError,
        match="--num_words: 20 words, the most frequent coming .* do not tell 3 from the next",
    ):
        TASKS["frequent_words_extraction"](rng, QuestionOptions(num_words=20))
    with pytest.raises(ValueError, match="--num_ucw: .* are too many"):
        TASKS["common_words_extraction"](rng, QuestionOptions(num_ucw=5000))


# ------------------------------------------------------------------------------------------------ ablations
PROMPTS = [
    "a b c a b c",
    "x",
    "one two 12 34, one",
    "the quick brown fox jumps over",
]  # of different lengths, so padded


def greedy(model, tokenizer, prompt, steps):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, -steps:])


@torch.no_grad()
def test_ablations_equal_hugging_faces_model_with_a_zeroed_layer(teacher_dir):
    """All layers at once, padded, with a cache, against one layer, one prompt, no cache, in another
    implementation."""
    tokenizer = load_tokenizer(teacher_dir)
    questions = [Question(prompt, ("a" * 8,), ends="\0") for prompt in PROMPTS]
    untouched, *without = continuations(load_teacher(teacher_dir), tokenizer, questions)
    oracle, steps = (
        AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval(),
        EXTRA_TOKENS + 9,
    )

    def expected():
        return [greedy(oracle, tokenizer, prompt, steps).partition("<eos>")[0] for prompt in PROMPTS]

    assert [text.rstrip("\n") for text in untouched] == [text.rstrip("\n") for text in expected()]
    seen = {tuple(untouched)}
    for layer, texts in zip(oracle.model.layers, without, strict=True):
        hook = layer.self_attn.register_forward_hook(
            lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
        )
        assert [text.rstrip("\n") for text in texts] == [text.rstrip("\n") for text in expected()]
        hook.remove()
        seen.add(tuple(texts))
    assert len(seen) > 3  # the layers do matter


@torch.no_grad()
def test_prompts_begin_as_the_tokenizer_begins_texts(teacher_dir, tmp_path, monkeypatch):
    """With BOS after the padding, and without EOS at their end."""
    save_tokenizer(tmp_path)
    bos, read = begin_with_bos(tmp_path, ends=True), []
    inner = task_ablation.read_prompts
    monkeypatch.setattr(
        task_ablation,
        "read_prompts",
        lambda model, ids, mask: (read.append((ids, mask)), inner(model, ids, mask))[1],
    )
    tokenizer = load_tokenizer(str(tmp_path))
    continuations(load_teacher(teacher_dir), tokenizer, [Question("a b c", ("d",)), Question("ab", ("d",))])
    ((ids, mask),) = read
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask)] == [
        [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in ("a b c", "ab")
    ]


@pytest.mark.parametrize("student", ["gdn_v4", "gdn_v3", "gla_v1", "lolcats_v1"])
def test_our_checkpoints(teacher_dir, tmp_path, student):
    """A hybrid that was saved, its linear layers ablated too: against a model without the layer's
    attention, uncached."""
    tokenizer = load_tokenizer(teacher_dir)
    torch.manual_seed(0)
    StudentForCausalLM.from_teacher(load_teacher(teacher_dir), student, [1])[0].save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path))
    questions = [Question(prompt, ("a" * 8,), ends="\0") for prompt in PROMPTS]
    untouched, *without = continuations(model, tokenizer, questions)
    for i, texts in enumerate([untouched, *without]):
        hooks = (
            [model.model.layers[i - 1].attn.register_forward_hook(lambda m, a, out: (out[0] * 0, *out[1:]))]
            if i
            else []
        )
        expected = [greedy(model, tokenizer, prompt, EXTRA_TOKENS + 9).partition("<eos>")[0] for prompt in PROMPTS]
        assert [text.rstrip("\n") for text in texts] == [text.rstrip("\n") for text in expected]
        for hook in hooks:
            hook.remove()


def evaluate(teacher_dir, out, *flags):
    where = ["--model_name", str(teacher_dir), "--output_dir", str(out)]
    evaluate_layer_importance.main([*where, "--batch_size", "2", *SMALL, *flags])


@pytest.fixture(scope="module")
def long_teacher(tmp_path_factory):
    from conftest import random_teacher, save_tokenizer

    folder = tmp_path_factory.mktemp("long")
    random_teacher(folder, "qwen3", tie_word_embeddings=True, max_position_embeddings=4096)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("task", [*TASKS, "associative_recall_mutihop"])
def test_every_task_writes_its_files(task, long_teacher, tmp_path, capsys):
    evaluate(long_teacher, tmp_path, "--task", task, "--num_samples", "3")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        f"plots/ablation_{task}.png",
        f"results/ablation_{task}.csv",
        f"results/baseline_{task}.json",
    ]
    baseline = json.loads((tmp_path / "results" / f"baseline_{task}.json").read_text())
    rows = list(csv.DictReader((tmp_path / "results" / f"ablation_{task}.csv").open()))
    assert len(baseline["scores"]) == 3 and [int(row["layer"]) for row in rows] == [0, 1, 2, 3]
    assert all(float(row["drop"]) == pytest.approx(baseline["accuracy"] - float(row["accuracy"])) for row in rows)
    assert (
        baseline["accuracy"] == 0 and "the figures say nothing" in capsys.readouterr().out
    )  # it has not learnt anything


def test_results_with_the_former_noise_ratio_are_refused(long_teacher, tmp_path):
    options = (
        "--task",
        "variable_tracking",
        "--num_samples",
        "1",
        "--num_chains",
        "2",
        "--num_hops",
        "1",
        "--noise_ratio",
        "0.5",
    )
    evaluate(long_teacher, tmp_path, *options)
    file = tmp_path / "results" / "baseline_variable_tracking.json"
    content = json.loads(file.read_text())
    del content["settings"]["noise_ratio_of"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match="has this task with noise_ratio_of None, not 'the other sentences'; name another folder",
    ):
        evaluate(long_teacher, tmp_path, *options)


def test_finished_results_are_kept_and_other_settings_are_refused(long_teacher, tmp_path, capsys):
    evaluate(long_teacher, tmp_path, "--task", "phone_book", "--num_samples", "2")
    file = tmp_path / "results" / "baseline_phone_book.json"
    written = file.stat().st_mtime_ns
    evaluate(
        long_teacher,
        tmp_path,
        "--task",
        "phone_book",
        "--num_samples",
        "2",
        "--K",
        "3",
        "--pb_few_shots",
        "3",
    )
    assert "is there already" in capsys.readouterr().out and file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="has this task with num_samples 2, not 3; name another folder"):
        evaluate(long_teacher, tmp_path, "--task", "phone_book", "--num_samples", "3")


def test_bad_input(teacher_dir, tmp_path):
    with pytest.raises(ValueError, match="a prompt has .* tokens, but the model reads 64; make the task smaller"):
        evaluate(teacher_dir, tmp_path, "--task", "phone_book", "--num_samples", "2")
    for flag, message in (
        ("--K", "--K: 4 must be 3: frequent_words_extraction asks for so many words; leave it out"),
        ("--pb_few_shots", "--pb_few_shots: 4 must be 3: phone_book shows two answered questions"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(teacher_dir, tmp_path, "--task", "phone_book", flag, "4")
    with pytest.raises(ValueError, match="'nowhere'"):
        evaluate("nowhere", tmp_path, "--task", "phone_book")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir: .*file is a file; name a folder"):
        evaluate(teacher_dir, tmp_path / "file", "--task", "phone_book")
    assert not (tmp_path / "results").exists()

"""The baselines of GA-S2: each against its formula, computed by other means."""

import itertools
import json
import random
import sys

from runtime.config import load_config
from runtime.data import load_tokenizer, open_chunks

import pytest
import torch
import yaml
from conftest import mean_kl, random_teacher, read_alone, save_tokenizer
from test_select_layers import LENGTH, select

from convert import load_teacher
from distill_model import StudentForCausalLM
from layer_selection import baselines
from layer_selection.ablation_questions import Question
from layer_selection.baselines import place
from layer_selection.options import TASK_METHODS
from layer_selection.selection import METHODS
from layer_selection.stage2_runs import HELDOUT_KL, STAGE_2, check_start
from layer_selection.task_ablation import continuations
from layer_selection.write_configs import PUBLISHED


def importance(ranking):
    return {layer["layer"]: layer["importance"] for layer in ranking["layers"]}


def allowed(chosen, layers):
    """Whether SMART may place a set so, for some sensitivities."""
    count = len(chosen)
    steps = [b - a for a, b in itertools.pairwise(chosen)]
    return chosen[0] < layers // count and chosen[-1] >= layers - layers // count and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("layers, count", [(8, 2), (9, 4), (12, 3), (12, 5), (13, 7), (6, 6), (7, 1)])
def test_placement_is_the_best_of_all(layers, count):
    """Against all sets: of those that keep the most sensitive ends and nearly even steps, the
    largest sum."""
    rng = random.Random(layers * count)
    for _ in range(20):
        sensitivity = [rng.gauss(0, 1) for _ in range(layers)]
        chosen, end = place(sensitivity, count), layers // count
        if count == 1:
            assert chosen == [sensitivity.index(max(sensitivity))]
            continue
        first, last = (max(part, key=sensitivity.__getitem__) for part in (range(end), range(layers - end, layers)))
        sets = [
            s
            for s in itertools.combinations(range(layers), count)
            if s[0] == first and s[-1] == last and allowed(s, layers)
        ]
        assert sum(sensitivity[i] for i in chosen) == pytest.approx(max(sum(sensitivity[i] for i in s) for s in sets))
        assert tuple(chosen) in sets


def test_published_sets_of_smart_follow_its_placement():
    for facts in yaml.safe_load(PUBLISHED.read_text())["teachers"].values():
        for chosen in facts.get("set", {}).get("smart", []):
            assert allowed(chosen, facts["layers"])
            wanted = [float(layer in chosen) for layer in range(facts["layers"])]
            assert place(wanted, len(chosen)) == chosen


def test_smart_ranks_its_layers_first(stage2, tmp_path):
    scanned = importance(select(stage2, tmp_path / "scan", method="scan", top_k=2))
    ranking = select(stage2, tmp_path / "smart", method="smart", top_k=2)
    repaired = importance(ranking)
    offset = repaired[0] - scanned[0]  # KL of the all-linear student
    assert repaired == pytest.approx({layer: kl + offset for layer, kl in scanned.items()}, abs=1e-6)
    cfg = load_config(stage2)
    chunks = open_chunks(cfg.data.cache_dir, LENGTH, document_mask="auto")
    student = StudentForCausalLM.from_pretrained(cfg.train.student_init_ckpt).eval()
    teacher = load_teacher(cfg.teacher_model.name)
    kls = [mean_kl(*predicted) for predicted, _ in read_alone(chunks.heldout, 6, student, teacher)]
    assert offset == pytest.approx(sum(kls) / 6, rel=1e-4)
    assert (
        sorted(layer["layer"] for layer in ranking["layers"][:2])
        == ranking["keep"]
        == place([repaired[i] for i in range(4)], 2)
    )
    assert ranking["undecided"] == [] and 2 in ranking["keep"]


def test_ga_s1_is_the_error_of_the_others(stage2, tmp_path):
    errors = importance(select(stage2, tmp_path / "mse", method="mse", top_k=1))
    ranking = select(stage2, tmp_path / "ga_s1", method="ga_s1", top_k=1)
    others = {layer: -sum(error for other, error in errors.items() if other != layer) for layer in errors}
    assert importance(ranking) == pytest.approx(others, rel=1e-5) and ranking["keep"] == [2]


def measured(folder, kls):
    for layer, values in enumerate(kls):
        (folder / f"layer_{layer}").mkdir(parents=True)
        (folder / f"layer_{layer}" / HELDOUT_KL).write_text(json.dumps(values))


REMOVED, ADDED = (
    [[0.3, 0.2], [0.5, 0.6], [0.1, 0.1], [0.4, 0.0]],
    [[0.1, 0.1], [0.9, 0.7], [0.2, 0.3], [0.4, 0.5]],
)


def test_gr_s2_keeps_what_hurts_most_when_it_is_removed(stage2, tmp_path):
    measured(tmp_path, REMOVED)
    ranking = select(stage2, tmp_path, method="gr_s2", top_k=2, launcher="false", sequences=2)
    assert [layer["layer"] for layer in ranking["layers"]] == [1, 0, 3, 2] and ranking["keep"] == [
        0,
        1,
    ]


def test_avg_s2_is_the_mean_of_both(stage2, tmp_path):
    measured(tmp_path / "run_ga_s2", ADDED)
    measured(tmp_path / "run_gr_s2", REMOVED)
    ranking = select(
        stage2,
        tmp_path / "out",
        f"train.output_dir={tmp_path}/run",
        method="avg_s2",
        top_k=2,
        launcher="false",
        sequences=2,
    )
    mean = {layer: (sum(REMOVED[layer]) - sum(ADDED[layer])) / 4 for layer in range(4)}
    assert importance(ranking) == pytest.approx(mean)
    assert [layer["layer"] for layer in ranking["layers"]] == sorted(mean, key=mean.get, reverse=True)


def test_a_failed_run_or_one_of_another_config_ends_in_one_line(stage2, tmp_path):
    measured(tmp_path, REMOVED)
    (tmp_path / "layer_3" / HELDOUT_KL).unlink()
    with pytest.raises(ValueError, match="layer 3: its run in .* ended with exit code 1"):
        select(stage2, tmp_path, method="gr_s2", top_k=2, launcher="false", sequences=2)
    kept = load_config(tmp_path / "layer_3" / STAGE_2).student_model.keep_full_attention_layers
    assert kept == [0, 1, 2] and not (tmp_path / "ranking.json").exists()
    with pytest.raises(
        ValueError,
        match=r"layer_3 has a run of another config \(train.lr is 0.0001 there, 0.5 here\); name",
    ):
        select(stage2, tmp_path, "train.lr=0.5", method="gr_s2", top_k=2, launcher="false", sequences=2)


@pytest.mark.slow
def test_gr_s2_trains_with_one_linear_layer(stage2, tmp_path):
    for layer in range(len(REMOVED)):
        if layer != 2:
            (tmp_path / f"layer_{layer}").mkdir()
            (tmp_path / f"layer_{layer}" / HELDOUT_KL).write_text(json.dumps([0.0] * 6))
    ranking = select(stage2, tmp_path, method="gr_s2", top_k=1, launcher=sys.executable)
    hybrid = StudentForCausalLM.from_pretrained(tmp_path / "layer_2" / "run" / "converted-hf")
    assert hybrid.config.keep_full_attention_layers == [0, 1, 3] and ranking["keep"] == [2]


PROMPTS = ["a b c a b c", "x", "one two 12 34, one", "the quick brown fox"]


def test_task_ablation_ranks_by_the_drop_of_accuracy(stage2, tmp_path, monkeypatch, teacher_dir):
    """Each question asks for what this teacher answers, so that an ablation can only lose
    accuracy."""
    tokenizer, teacher = load_tokenizer(teacher_dir), load_teacher(teacher_dir)
    untouched, *without = continuations(
        teacher, tokenizer, [Question(prompt, ("aa",), ends="\0") for prompt in PROMPTS]
    )
    asked = [Question(prompt, (text[:2].strip(),), ends=text[2]) for prompt, text in zip(PROMPTS, untouched)]
    asked = [question for question in asked if question.score(untouched[PROMPTS.index(question.prompt)])]
    assert asked
    monkeypatch.setattr(baselines, "draw_questions", lambda task, options, seed: asked)
    ranking = select(stage2, tmp_path, method="ar", top_k=2)
    texts = [[row[PROMPTS.index(question.prompt)] for question in asked] for row in without]
    lost = [1 - sum(question.score(text) for question, text in zip(asked, row)) / len(asked) for row in texts]
    assert importance(ranking) == pytest.approx(dict(enumerate(lost))) and max(lost) > 0
    assert (
        ranking["method"] == "ar"
        and ranking["facts"]["baseline"] == 1
        and ranking["facts"]["task"] == "associative_recall"
    )


@pytest.mark.parametrize("method", TASK_METHODS)
def test_a_teacher_that_answers_nothing_cannot_be_ranked_by_it(method, stage2, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    random_teacher(folder, "qwen3", tie_word_embeddings=True, max_position_embeddings=8192)
    save_tokenizer(folder)
    with pytest.raises(
        ValueError,
        match="--method: the teacher answers none of 2 questions of .*; make the task easier",
    ):
        select(
            stage2,
            tmp_path / "out",
            f"teacher_model.name={folder}",
            method=method,
            top_k=1,
            num_samples=2,
            num_pairs=4,
            num_ucw=5,
            num_cw=3,
            freq_cw=4,
        )
    assert not (tmp_path / "out").exists()


def test_a_start_in_bf16_is_of_its_teacher_in_fp32(stage2, tmp_path):
    """Stage 1 on a GPU exports the rounded embeddings of a teacher whose file is in fp32."""
    teacher = load_teacher(load_config(stage2).teacher_model.name, torch.float32)
    embeddings = teacher.model.embeddings.weight
    assert not torch.equal(embeddings.bfloat16().float(), embeddings)
    StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0].bfloat16().save_pretrained(tmp_path / "start")
    check_start(load_config(stage2, [f"train.student_init_ckpt={tmp_path / 'start'}"]))


def test_a_student_of_another_teacher_or_kind(stage2, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    other = random_teacher(folder, "qwen3", tie_word_embeddings=True)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    other.save_pretrained(folder)
    save_tokenizer(folder)
    for method in ("scan", "ga_s1", "gr_s2"):
        with pytest.raises(
            ValueError,
            match="student_init_ckpt: .* was not made from .* by stage 1, their embeddings differ",
        ):
            select(stage2, tmp_path, f"teacher_model.name={folder}", method=method, top_k=1)
    with pytest.raises(ValueError, match="train.student_init_ckpt: .* has student_name 'gdn_v4', this run 'gla_v1'"):
        select(stage2, tmp_path, "student_model.name=gla_v1", method="smart", top_k=1)
    start = tmp_path / "hybrid"
    StudentForCausalLM.from_teacher(load_teacher(load_config(stage2).teacher_model.name), "gdn_v4", [0])[
        0
    ].save_pretrained(start)
    with pytest.raises(
        ValueError,
        match=r"train.student_init_ckpt: .* keeps layers \[0\]; name stage 1's all-linear converted-hf",
    ):
        select(stage2, tmp_path, f"train.student_init_ckpt={start}", method="mse", top_k=1)
    assert not (tmp_path / "ranking.json").exists() and not (tmp_path / "layer_0").exists()


def test_all_methods_keep_the_same_number(stage2, tmp_path, monkeypatch):
    """A ratio is one budget, whatever the method: the same count in ranking.json and in
    stage2.yaml, and the same files."""
    for method in ("scan", "smart", "ppl", "mse", "ga_s1", "uniform", "random"):
        ranking = select(stage2, tmp_path / method, method=method, ratio=0.4)
        assert len(ranking["keep"]) == 2 and len(ranking["layers"]) == 4
        written = sorted(path for path in (tmp_path / method).iterdir() if not path.name.startswith("ranking."))
        (chosen,) = [path for path in written if path.name.endswith(f"_gdn_v4_hybrid_0_4_{method}")]
        assert load_config(chosen / "stage2.yaml").student_model.keep_full_attention_layers == ranking["keep"]
        assert written == [chosen] and {path.name for path in (tmp_path / method).glob("ranking.*")} == {
            "ranking.json",
            "ranking.md",
            "ranking.png",
        }
    assert METHODS.keys() >= {
        "ga_s2",
        "gr_s2",
        "avg_s2",
        "ar",
        "ar_multihop",
        "variable_tracking",
        "phone_book",
    }

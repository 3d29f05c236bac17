"""Rounds around the best hybrid so far: what they start from, their order, resuming, and stopping."""

import json
import signal

from runtime.config import load_config
from runtime.guard import REQUEUE

import pytest
import torch
from test_select_layers import flags, select

from layer_selection import rounds
from layer_selection.bench import Bench
from layer_selection.candidate_training import Candidate
from layer_selection.options import RecallOptions, RoundOptions
from layer_selection.rounds import Rounds, measured_sets, with_kept_layers

STEPS = ["train.max_steps=8", "train.lr=1e-3", "train.lr_attn=3e-3"]


def history(folder):
    return json.loads((folder / "rounds" / "rounds.json").read_text())["history"]


def test_a_hybrid_keeps_what_it_has_learnt_in_the_layers_that_stay(stage2):
    bench = Bench(load_config(stage2), 4, 4)
    start = bench.student.restore_full_attention(bench.teacher, [1, 2])
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.01)
    hybrid = with_kept_layers(start, [2, 3], bench.teacher, bench.student)
    assert hybrid.config.keep_full_attention_layers == [2, 3] and start.config.keep_full_attention_layers == [1, 2]
    sources = {1: bench.student, 3: bench.teacher}
    for name, value in hybrid.state_dict().items():
        layer = int(name.split(".")[2]) if ".attn." in name else None
        assert torch.equal(value, sources.get(layer, start).state_dict()[name]), name
    sets = measured_sets(start.eval(), bench)
    assert sets.losses([2, 3]) == pytest.approx(bench.kls(hybrid.eval()), rel=1e-4)
    assert sets.losses([1, 2]) == pytest.approx(bench.kls(start), rel=1e-4)


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_rounds_find_the_layer_with_a_large_error(stage2, tmp_path, direction):
    options = flags(method="rounds", top_k=1, direction=direction, candidates_per_round=2, search_tokens=2000)
    ranking = select(stage2, tmp_path, *options, *STEPS)
    assert ranking["keep"] == [2]
    done = history(tmp_path)
    actions = [entry["action"] for entry in done]
    assert actions[0] == direction and actions[-1] == "exchange"
    assert [len(entry["kept"]) for entry in done[:3]] == ([1, 1] if direction == "add" else [3, 2, 1])[: len(done[:3])]
    assert done[-1]["kept"] == [2] and [2] in [kept for kept, _ in done[-1]["trained"]]
    facts = ranking["facts"]
    assert facts["tokens"] == sum(entry["tokens"] for entry in done) and facts["flops"] > 0
    for before, entry in zip(done, done[1:]):
        if entry["action"] == "exchange":
            assert all(len(set(kept) - set(before["kept"])) <= 1 for kept, _ in entry["trained"])
            assert entry["kept"] == entry["trained"][0][0]


def test_a_round_takes_several_layers_and_starts_from_the_last_one(stage2, tmp_path, monkeypatch):
    """Training is replaced: what counts are the sets and what they start from."""
    starts = []
    make = rounds.RoundTraining.make_hybrid

    def recorded(self, candidate):
        starts.append(self.start.config.keep_full_attention_layers)
        return make(self, candidate)

    monkeypatch.setattr(rounds.RoundTraining, "make_hybrid", recorded)
    bench = Bench(load_config(stage2, STEPS), 4, 4)
    training = Rounds(bench, 3, RoundOptions(layers=2, candidates=3, tokens=1), tmp_path / "rounds")
    training.run()
    first, second, *exchanges = training.history
    assert [first.action, second.action] == ["add", "add"] and {entry.action for entry in exchanges} == {"exchange"}
    best_two = {layer for kept, _ in first.trained[:2] for layer in kept}
    assert set(first.kept) == best_two and len(second.kept) == 3 and best_two < set(second.kept)
    assert starts[:3] == [[]] * 3 and starts[3] == first.kept
    assert exchanges[-1].kept in [entry.kept for entry in training.history[:-1]]


@pytest.mark.parametrize("change, warned", [(-10, False), (10, True)])
def test_rounds_say_where_training_leaves_a_set_worse(stage2, tmp_path, monkeypatch, capsys, change, warned):
    train_round = rounds.RoundTraining.train_round

    def changed(self, *arguments):
        losses = train_round(self, *arguments)
        return {i: [loss + change for loss in values] for i, values in losses.items()}

    monkeypatch.setattr(rounds.RoundTraining, "train_round", changed)
    bench = Bench(load_config(stage2, STEPS), 4, 4)
    Rounds(bench, 1, RoundOptions(candidates=2, tokens=1), tmp_path / "rounds").run()
    (kept, mean), *_ = history(tmp_path)[0]["trained"]
    untrained = bench.kls(bench.student.restore_full_attention(bench.teacher, kept).eval())
    warning = (
        f"Warning: round 1: training raised the KL of {kept}, from {sum(untrained) / 4:.4f} to {mean:.4f}; 1 steps are "
        "too few to compare layers by, raise --search_tokens"
    )
    assert (warning in capsys.readouterr().out) == warned


def test_stopped_rounds_resume_to_the_same_result(stage2, tmp_path, monkeypatch):
    options = [*flags(method="rounds", top_k=2, candidates_per_round=2, search_tokens=2000), *STEPS]
    whole = select(stage2, tmp_path / "whole", *options)
    train = Candidate.train

    def stopped(self, step, *rest):
        if len(self.hybrid.config.keep_full_attention_layers) == 2:
            signal.raise_signal(signal.SIGTERM)
        train(self, step, *rest)

    monkeypatch.setattr(Candidate, "train", stopped)
    with pytest.raises(SystemExit) as end:
        select(stage2, tmp_path / "parts", *options)
    assert end.value.code == REQUEUE and len(history(tmp_path / "parts")) == 2
    monkeypatch.setattr(Candidate, "train", train)
    assert select(stage2, tmp_path / "parts", *options)["layers"] == whole["layers"]
    monkeypatch.setattr(Candidate, "train", lambda *_: pytest.fail("trained again"))
    assert select(stage2, tmp_path / "parts", *options)["keep"] == whole["keep"]
    with pytest.raises(ValueError, match="--output_dir: .* has rounds of top_k 2, not 1; name another"):
        select(stage2, tmp_path / "parts", *flags(method="rounds", top_k=1), *STEPS)
    with pytest.raises(ValueError, match="has rounds of sequences 6, not 4; name another"):
        select(stage2, tmp_path / "parts", *options, sequences=4)
    with pytest.raises(ValueError, match="has rounds of another config .*train.lr"):
        select(stage2, tmp_path / "parts", *options, "train.lr=1e-2")


def test_rounds_agree_in_the_documents_that_they_minimise(stage2, tmp_path):
    bench = Bench(load_config(stage2), 4, 4, "recall", RecallOptions(1, 8))
    Rounds(bench, 1, RoundOptions(), tmp_path).save()
    Rounds(bench, 1, RoundOptions(), tmp_path).load()
    for recall, stored in ((RecallOptions(2, 8), "num_pairs 1, not 2"), (RecallOptions(1, 9), "num_words 8, not 9")):
        other = Bench(load_config(stage2), 4, 4, "recall", recall)
        with pytest.raises(ValueError, match=f"has rounds of {stored}; name another"):
            Rounds(other, 1, RoundOptions(), tmp_path).load()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"direction": "both"}, "--direction: both must be add or remove"),
        ({"layers_per_round": 0}, "--layers_per_round: 0 must be at least 1"),
        ({"candidates_per_round": 0}, "--candidates_per_round: 0 must be at least 1"),
        ({"search_tokens": 0}, "--search_tokens: 0 must be at least 1"),
    ],
)
def test_bad_input(stage2, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        select(stage2, tmp_path / "out", *flags(method="rounds", top_k=1, **options))
    assert not (tmp_path / "out").exists()

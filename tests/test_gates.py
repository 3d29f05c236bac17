"""Gates over both attentions of every layer: their budget and gradient, training and resuming; and
sets of layers that are measured as a whole."""

import json
from types import SimpleNamespace

from runtime.config import load_config

import pytest
import torch
from test_cuda_graphs import use_stand_ins
from test_objective import naive_kls, whole
from test_select_layers import flags, select
from torch import nn

import cuda_graphs
from heldout import ids_of, read_chunks
from layer_selection import gates
from layer_selection.bench import Bench
from layer_selection.gates import GatedModel, GateTraining, budget_gates
from layer_selection.layer_sets import MeasuredSets, exchange, rank_around
from layer_selection.objective import RecallOptions

STEPS = ["train.max_steps=5", "train.batch_size=2"]


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("budget", [1, 3, 6])
def test_gates_add_up_and_have_the_gradient_of_a_constrained_function(budget, temperature):
    torch.manual_seed(budget)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(7, dtype=torch.float64)
    found = budget_gates(logits, temperature, budget)
    assert found.sum().item() == pytest.approx(budget, abs=1e-6)
    assert torch.equal(found.argsort(), logits.argsort())
    (found @ direction).backward()
    step = 1e-6
    for i in range(7):
        moved = []
        for sign in (1, -1):
            shifted = logits.detach().clone()
            shifted[i] += sign * step
            moved.append(budget_gates(shifted, temperature, budget) @ direction)
        assert logits.grad[i].item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).item(), abs=1e-4)
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-8), "a shift of all logits changes nothing"
    far_apart = budget_gates(torch.tensor([9.0, -9.0, 9.0, -9.0]), 0.01, 2)
    assert far_apart.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-6)


@pytest.fixture
def bench(stage2):
    return Bench(load_config(stage2, STEPS), 6, 4)


def naive_objective(bench, model, batch, weights):
    return (naive_kls(bench.teacher, model, batch) * weights).sum()


def test_the_loss_is_that_of_the_hybrid_and_its_gradient_that_of_the_gates(bench):
    model = GatedModel(bench, 2).train()
    batch = {name: tensor[:3] for name, tensor in whole(bench.batches).items()}
    ids = batch["input_ids"]
    weights = torch.rand(ids.shape) / ids.numel()
    inputs = batch | {
        "token_weights": weights,
        "teacher_hidden_states": bench.teacher.model(**batch, use_cache=False).last_hidden_state,
    }
    with torch.no_grad():
        model.logits.copy_(torch.tensor([9.0, -9.0, -9.0, 9.0]))
        model.temperature.fill_(0.1)
        hybrid = bench.student.restore_full_attention(bench.teacher, [0, 3]).train()
        assert model(**inputs)["loss"].item() == pytest.approx(
            naive_objective(bench, hybrid, batch, weights).item(), rel=1e-4
        )
        model.logits.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
        model.temperature.fill_(1.0)
    model(**inputs)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["logits"]
    for i in range(4):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                model.logits[i] += step
                losses.append(model(**inputs)["loss"].item())
                model.logits[i] -= step
        assert model.logits.grad[i].item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05, abs=2e-3)


def history(folder):
    known = json.loads((folder / "gates" / "gates.json").read_text())["history"]
    return [{name: value for name, value in check.items() if name != "seconds"} for check in known]


def test_gates_find_the_layer_with_a_large_error(stage2, tmp_path, monkeypatch):
    options = [*flags(method="gates", top_k=1, search_tokens=320), *STEPS]
    ranking = select(stage2, tmp_path, *options)
    assert ranking["keep"] == [2] and ranking["layers"][0]["importance"] > 0 > ranking["layers"][1]["importance"]
    facts = ranking["facts"]
    assert facts["tokens"] == 320 and facts["flops"] > 0 and sum(facts["gates"]) == pytest.approx(1, abs=1e-3)
    assert [check["step"] for check in history(tmp_path)] == list(range(1, 6))
    assert (tmp_path / "ranking.png").stat().st_size > 10_000
    monkeypatch.setattr(GateTraining, "train_step", lambda *_: pytest.fail("trained again"))
    again = select(stage2, tmp_path, *options)
    assert again["layers"] == ranking["layers"] and again["facts"]["objective"] == facts["objective"]
    with pytest.raises(ValueError, match="--output_dir: .* has gates of top_k 1, not 2; name another"):
        select(stage2, tmp_path, *flags(method="gates", top_k=2, search_tokens=320), *STEPS)
    with pytest.raises(ValueError, match="has gates of another config .*train.seed"):
        select(stage2, tmp_path, *options, "train.seed=7")


@pytest.mark.parametrize("objective", ["kl", "mixture"])
def test_the_cost_has_all_tokens_that_are_measured(stage2, tmp_path, monkeypatch, objective):
    read = []

    def counted(model, batch):
        read.append((model, ids_of(batch).numel()))
        return read_chunks(model, batch)

    for module in ("bench", "objective"):
        monkeypatch.setattr(f"layer_selection.{module}.read_chunks", counted)
    bench = Bench(load_config(stage2, STEPS), 6, 4, objective, RecallOptions(1, 8))
    facts = gates.gates(bench, 2, 320, tmp_path).facts
    of_sets = [tokens for model, tokens in read if model not in (bench.teacher, bench.student)]
    assert facts["tokens_measured"] == sum(of_sets) > 0


@pytest.mark.parametrize("objective", ["kl", "mixture"])
def test_a_stopped_training_resumes_to_the_same_gates(stage2, tmp_path, monkeypatch, objective):
    options = flags(method="gates", top_k=2, search_tokens=320, objective=objective, num_pairs=1, vocab_size=8)
    whole = select(stage2, tmp_path / "whole", *options, *STEPS)
    step = GateTraining.train_step

    def stopped(self, number):
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(GateTraining, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        select(stage2, tmp_path / "parts", *options, *STEPS)
    assert len(history(tmp_path / "parts")) == 3
    monkeypatch.setattr(GateTraining, "train_step", step)
    parts = select(stage2, tmp_path / "parts", *options, *STEPS)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    for ranking in (whole, parts):
        del ranking["facts"]["seconds"]
    assert parts == whole, "the same ties, and the same cost"
    with pytest.raises(ValueError, match="has gates of sequences 6, not 4; name another"):
        select(stage2, tmp_path / "parts", *options, *STEPS, sequences=4)
    if objective == "mixture":
        for other, stored in (({"num_pairs": 2}, "num_pairs 1, not 2"), ({"vocab_size": 9}, "num_words 8, not 9")):
            with pytest.raises(ValueError, match=f"has gates of {stored}; name another"):
                select(stage2, tmp_path / "parts", *options, *STEPS, **other)


def test_a_resumed_training_knows_all_sets_that_it_has_measured(bench, tmp_path, monkeypatch):
    """What is tied and what was measured depend on them."""
    largest = iter([[0, 1], [2, 3], [0, 1], [1, 3], [0, 2]])
    monkeypatch.setattr(GatedModel, "largest", lambda _: next(largest))
    training = GateTraining(bench, 2, 320, tmp_path)
    training.run()
    again = GateTraining(bench, 2, 320, tmp_path)
    again.load()
    assert len(again.sets.known) == 4 and again.sets.known == training.sets.known
    assert again.flops() == training.flops()


def test_gates_of_an_earlier_version_resume_if_they_learnt_text(stage2, tmp_path, monkeypatch):
    """Without what was not stored: the number of sequences, the documents, and the losses of checks."""
    options = [*flags(method="gates", top_k=1, search_tokens=64), *STEPS]
    ranking = select(stage2, tmp_path, *options)
    file = tmp_path / "gates" / "gates.json"
    known = json.loads(file.read_text())
    del known["sequences"]
    for check in known["history"]:
        del check["losses"]
    file.write_text(json.dumps(known))
    monkeypatch.setattr(GateTraining, "train_step", lambda *_: pytest.fail("trained again"))
    assert select(stage2, tmp_path, *options)["keep"] == ranking["keep"]
    file.write_text(json.dumps(known | {"objective": "recall"}))
    with pytest.raises(ValueError, match="has gates of num_pairs unknown, not 1; name another"):
        select(stage2, tmp_path, *options, *flags(objective="recall", num_pairs=1, vocab_size=8))


def test_a_micro_batch_size_to_be_measured_is_refused(stage2, tmp_path):
    with pytest.raises(ValueError, match="train.micro_batch_size: auto: .*; set a number for gates"):
        select(stage2, tmp_path, *flags(method="gates", top_k=1), "train.micro_batch_size=auto")


@pytest.mark.parametrize("document_mask, objective", [("false", "kl"), ("true", "kl"), ("true", "mixture")])
def test_cuda_graph_replay_learns_the_same_gates(stage2, tmp_path, monkeypatch, document_mask, objective):
    """A stand-in replaces the graphs."""
    monkeypatch.setattr(cuda_graphs, "_record", None)
    monkeypatch.setattr(cuda_graphs, "_free_memory", None)
    use_stand_ins()
    cfg = load_config(stage2, [*STEPS, f"data.document_mask={document_mask}"])
    found = []
    for graphs in (True, False):
        monkeypatch.setattr(gates, "use_cuda_graphs", lambda *_, graphs=graphs, **__: graphs)
        training = GateTraining(Bench(cfg, 2, 2, objective, RecallOptions(1, 8)), 1, 320, tmp_path / str(graphs))
        found.append([check.gates for check in training.run()])
        assert (getattr(training.forward, "forward_graph", None) is not None) == graphs
    assert found[0] == found[1] and found[0][0] != found[0][-1]


def test_sets_are_measured_as_hybrids(bench):
    model = bench.student.restore_full_attention(bench.teacher, [])
    softmax = [block.attn for block in bench.teacher.model.layers]
    linear = [block.attn for block in model.model.layers]
    sets = MeasuredSets(model, softmax, linear, bench.losses)
    for kept in ([], [1], [0, 2], [0, 1, 2, 3]):
        hybrid = bench.student.restore_full_attention(bench.teacher, kept).eval()
        assert sets.losses(kept) == pytest.approx(bench.kls(hybrid), rel=1e-4, abs=1e-6)
    assert [block.attn for block in model.model.layers] == linear and len(sets.known) == 4


def made_up_sets(values, layers=6):
    """Sets whose objective on two sequences is values(set) plus and minus a little."""
    blocks = [nn.Module() for _ in range(layers)]
    for block in blocks:
        block.attn = None
    model = SimpleNamespace(
        model=SimpleNamespace(layers=blocks), eval=lambda: None, train=lambda mode: None, training=False
    )
    sets = MeasuredSets(model, list("s" * layers), list("l" * layers), None)

    def measure(_):
        kept = {i for i, block in enumerate(blocks) if block.attn == "s"}
        return [values(kept) - 0.01, values(kept) + 0.01]

    sets.measure = measure
    return sets


def test_exchange_finds_layers_that_work_together():
    """Layers 0 and 1 each look best alone; 4 and 5 are worth more, but only together."""

    def values(kept):
        return 9 - (0 in kept) - 0.8 * (1 in kept) - 0.3 * len(kept & {4, 5}) - 3 * ({4, 5} <= kept)

    sets = made_up_sets(values)
    assert exchange(sets, [0, 4]) == exchange(sets, [2, 5]) == {4, 5}
    assert exchange(sets, [2, 3]) == {0, 1}, "a pair that only two exchanges at once would improve"
    ranking = rank_around("gates", "KL", sets, {4, 5})
    assert ranking.keep(2) == [4, 5] and [layer.layer for layer in ranking.layers[2:4]] == [0, 1]
    assert [layer.importance for layer in ranking.layers[:4]] == pytest.approx([2.3, 2.3, -2.3, -2.5])
    assert not ranking.undecided(2)
    assert exchange(sets, range(6)) == set(range(6)), "there is nothing to exchange"
    everything = rank_around("gates", "KL", sets, range(6))
    assert everything.keep(2) == [4, 5] and everything.layers[0].importance == pytest.approx(3.3)


def test_layers_are_tied_that_can_be_exchanged():
    sets = made_up_sets(lambda kept: 3 - len(kept & {1, 2}) / (1 + ({1, 2} <= kept)))
    kept = exchange(sets, [0])
    assert kept in ({1}, {2})
    other = {1, 2} - kept
    assert rank_around("gates", "KL", sets, kept).undecided(1) == sorted(kept | other) == [1, 2]

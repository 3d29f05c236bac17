"""Joint training of candidates: steps equal to a plain loop, resuming to the same result,
offloading, and the stopping rules."""

import json
import shutil
import signal

from runtime.batch_plan import batch_plan
from runtime.config import load_config

import pytest
import torch
from test_cuda_graphs import use_stand_ins
from test_select_layers import flags, select
from tqdm import tqdm

import cuda_graphs
from benchmarks import selection_cost
from layer_selection import bench, candidate_training, compare_selectors
from layer_selection.bench import Bench
from layer_selection.candidate_training import Candidate, JointTraining, MasterAdamW
from layer_selection.stopping_rule import StoppingRule, order_after, rank_correlation

STEPS = ["train.max_steps=8", "train.lr=1e-3", "train.lr_attn=3e-3", "train.save_minutes=0"]


def history(folder):
    entries = json.loads((folder / "side_by_side" / "rounds.json").read_text())["history"]
    return [(entry["step"], entry["kl"]) for entry in entries]


def test_a_finished_selection_trains_nothing(stage2, tmp_path, monkeypatch):
    options = [*flags(method="ga_s2", top_k=1, rounds=2, window=0, sequences=2), *STEPS]
    ranking = select(stage2, tmp_path, *options)
    assert ranking["facts"]["steps"] == 8 and not ranking["facts"]["stopped"]
    assert [step for step, _ in history(tmp_path)] == [4, 8] and not (tmp_path / "side_by_side" / "states").exists()
    # The teacher's work, two parts of eight, is done once for four hybrids; the measurements are
    # added to that.
    assert 26 / 32 < ranking["facts"]["share_of_full_runs"] < 0.95
    monkeypatch.setattr(Candidate, "train", lambda *_: pytest.fail("trained again"))
    assert select(stage2, tmp_path, *options) == ranking
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # what runs next in the process can be stopped again


def test_training_ends_when_the_ranking_has_converged(stage2, tmp_path):
    ranking = select(stage2, tmp_path, *STEPS, method="gr_s2", top_k=1, rounds=8, window=2, correlation=-1)
    rounds = [{int(k): sum(v) for k, v in kl.items()} for _, kl in history(tmp_path)]
    best = [max(scores, key=scores.get) for scores in rounds]
    assert best[-2] in {best[-1], *ranking["undecided"]} and ranking["keep"] == [best[-1]]
    assert ranking["facts"]["steps"] == len(rounds) < 8


def test_candidates_that_another_rule_stopped_are_not_trained_again(stage2, tmp_path, monkeypatch):
    """Their states are gone: another K ranks what is there if told to, and never trains from the
    first step."""
    options = ["--method", "ga_s2", "--rounds", "8", "--correlation", "-1", *STEPS]
    select(stage2, tmp_path, *options, top_k=1, window=2)
    known = history(tmp_path)
    assert len(known) < 8
    monkeypatch.setattr(Candidate, "train", lambda *_: pytest.fail("trained again"))
    with pytest.raises(
        ValueError,
        match=f"ended after round {len(known)} of 8, before .* --top-k 2, --window 8 .*; --window 1 ranks",
    ):
        select(stage2, tmp_path, *options, top_k=2, window=8)
    assert history(tmp_path) == known
    assert len(select(stage2, tmp_path, *options, top_k=2, window=1)["keep"]) == 2
    with pytest.raises(ValueError, match="--sequences: .* was measured on 6 sequences, not 5"):
        select(stage2, tmp_path, *options, top_k=1, window=2, sequences=5)


@pytest.mark.parametrize("masked, documents", [(False, False), (True, False), (True, True)])
def test_steps_equal_those_of_a_plain_loop(stage2, masked, documents):
    cfg = load_config(
        stage2,
        [
            "train.max_steps=5",
            "train.lr=1e-3",
            "train.lr_attn=3e-3",
            "train.weight_decay=0.1",
            "train.micro_batch_size=1",
            "train.ce_weight=0.5",
            "train.lr_scheduler_type=constant",
            "train.warmup_steps=0",
        ],
    )
    bench, plan = Bench(cfg, 4, 2), batch_plan(cfg, 1)
    assert (
        bench.dtype == torch.float32 and Bench(load_config(stage2, ["train.dtype=bf16"]), 4, 2).dtype == torch.bfloat16
    )
    torch.manual_seed(0)
    ids = torch.randint(0, 90, (5, 2, 32))
    hybrid = bench.student.restore_full_attention(bench.teacher, [1])
    candidate = Candidate("one", bench.student.restore_full_attention(bench.teacher, [1]), cfg, plan)
    fast = {id(p) for i in (0, 2, 3) for p in hybrid.model.layers[i].attn.parameters()}
    groups = [
        {
            "params": [p for p in hybrid.parameters() if (id(p) in fast) == linear and (p.ndim > 1) == matrix],
            "lr": 3e-3 if linear else 1e-3,
            "weight_decay": 0.1 if matrix else 0.0,
        }
        for linear in (True, False)
        for matrix in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    groups = {}
    if documents:  # two in the first sequence, three in the second
        groups = {"document_ids": torch.arange(32).expand(2, -1) // torch.tensor([[16], [12]])}
    for step, batch in enumerate(ids):
        with torch.no_grad():
            target = bench.teacher(input_ids=batch, use_cache=False, **groups).logits.log_softmax(-1)
            hidden = bench.teacher.model(batch, use_cache=False, **groups).last_hidden_state
        mask = torch.rand(batch.shape) < 0.3 if masked else None
        micro_batches = [
            {"input_ids": batch[i : i + 1], "teacher_hidden_states": hidden[i : i + 1]} for i in range(len(batch))
        ]
        if masked:
            micro_batches = [part | {"loss_mask": mask[i : i + 1]} for i, part in enumerate(micro_batches)]
        if documents:
            all_groups = groups["document_ids"]
            micro_batches = [part | {"document_ids": all_groups[i : i + 1]} for i, part in enumerate(micro_batches)]
            mask = mask.clone()
            mask[0, 16] = mask[1, 12] = mask[1, 24] = False  # each begins a document
        candidate.train(step, micro_batches, bench.teacher.lm_head.weight)
        logits = hybrid.train()(input_ids=batch, use_cache=False, **groups).logits
        ours = logits.log_softmax(-1)
        kl = (target.exp() * (target - ours)).sum(-1)
        labels = batch if mask is None else batch.masked_fill(~mask, -100)
        loss = kl.mean() if mask is None else kl[:, :-1][mask[:, 1:]].mean()
        loss = loss + 0.5 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hybrid.parameters(), cfg.train.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
    start = dict(bench.student.restore_full_attention(bench.teacher, [1]).named_parameters())
    for (name, a), b in zip(candidate.hybrid.named_parameters(), hybrid.parameters()):
        assert (a - b).norm() < 0.02 * (b - start[name]).norm(), (
            name
        )  # AdamW turns rounding of tiny gradients into steps


def adamw_in_float64(start, gradients, rates, decays):
    """Decoupled weight decay and AdamW's formulas, with gradients clipped to a norm of 1 and rates that
    fall as 1 / step."""
    values = [p.double() for p in start]
    first = [torch.zeros_like(p) for p in values]
    second = [torch.zeros_like(p) for p in values]
    for step, given in enumerate(gradients, 1):
        given = [g.double() for g in given]
        norm = sum(g.square().sum() for g in given).sqrt()
        assert norm > 1
        for i, g in enumerate(given):
            first[i] = 0.9 * first[i] + 0.1 * g / norm
            second[i] = 0.95 * second[i] + 0.05 * (g / norm).square()
            move = first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.95**step)).sqrt() + 1e-8)
            values[i] = values[i] - rates[i] / step * (decays[i] * values[i] + move)
    return values


def check_master_adamw(device, dtype):
    """Five steps, with storing, loading and offloading between them, against AdamW in float64."""
    torch.manual_seed(0)
    start = [torch.randn(shape).to(dtype) for shape in ((7, 5), (3,), (4, 1, 2))]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(5)]
    rates, decays = (1e-2, 1e-2, 3e-2), (0.1, 0.1, 0.0)

    def restart():
        model = torch.nn.ParameterList(p.clone().to(device) for p in start)
        groups = [
            {"params": [*model][:2], "lr": rates[0], "weight_decay": decays[0]},
            {"params": [*model][2:], "lr": rates[2], "weight_decay": decays[2]},
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR
        return model, MasterAdamW(groups, (0.9, 0.95), 1.0, lambda adamw: schedule(adamw, lambda step: 1 / (1 + step)))

    model, optimizer = restart()
    for step, given in enumerate(gradients):
        if step == 2:
            stored = {name: tensor.detach().cpu().clone() for name, tensor in optimizer.tensors().items()}
            model, optimizer = restart()
            optimizer.load(stored, step)
        if step in (0, 2, 3):
            for place in ("cpu", device):
                model.to(place)
                optimizer.to(torch.device(place))
        for param, gradient in zip(model, given):
            param.grad = gradient.clone().to(device)  # clipping changes it
        optimizer.step()
    for param, master, expected in zip(model, optimizer.masters, adamw_in_float64(start, gradients, rates, decays)):
        torch.testing.assert_close(master.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_on_master_copies(dtype):
    check_master_adamw("cpu", dtype)


def test_a_stopped_selection_resumes_to_the_same_result(stage2, tmp_path, monkeypatch):
    options = ["--method", "ga_s2", "--top-k", "1", "--rounds", "4", "--window", "0", *STEPS]
    select(stage2, tmp_path / "whole", *options)
    train = Candidate.train

    def stopped(self, step, *rest):
        if step == 6:
            raise KeyboardInterrupt
        train(self, step, *rest)

    monkeypatch.setattr(Candidate, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        select(stage2, tmp_path / "parts", *options)
    assert [step for step, _ in history(tmp_path / "parts")] == [2, 4]
    monkeypatch.setattr(Candidate, "train", train)
    select(stage2, tmp_path / "parts", *options)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")


def test_offloading_changes_nothing(stage2, tmp_path, monkeypatch):
    options = ["--method", "ga_s2", "--top-k", "1", "--rounds", "2", "--window", "0", *STEPS]
    select(stage2, tmp_path / "whole", *options)
    build = JointTraining.build
    monkeypatch.setattr(
        JointTraining, "build", lambda self, *args: (build(self, *args), setattr(self, "resident", False))
    )
    monkeypatch.setattr(candidate_training, "TEACHER_CACHE_BYTES", 1)
    select(stage2, tmp_path / "parked", *options)
    assert history(tmp_path / "parked") == history(tmp_path / "whole")


@pytest.mark.parametrize("document_mask", ["false", "true"])
def test_cuda_graph_replay_trains_the_same_candidates(stage2, tmp_path, monkeypatch, document_mask):
    """All of them with one teacher; a stand-in replaces the graphs."""
    monkeypatch.setattr(cuda_graphs, "_record", None)
    monkeypatch.setattr(cuda_graphs, "_free_memory", None)
    use_stand_ins()
    cfg = load_config(
        stage2,
        [
            "train.max_steps=5",
            "train.micro_batch_size=1",
            "train.batch_size=1",
            "train.lr=1e-3",
            f"data.document_mask={document_mask}",
        ],
    )
    results = []
    for graphs in (True, False):
        monkeypatch.setattr(candidate_training, "use_cuda_graphs", lambda *_, graphs=graphs, **__: graphs)
        rounds = JointTraining(Bench(cfg, 2, 2), StoppingRule(), {0: [0], 2: [2]}, -1, tmp_path)
        rounds.build([0, 2], 0)
        results.append(rounds.train_round([0, 2], 0, 5, tqdm(disable=True)))
        forwards = [rounds.teacher_forward, *(candidate.forward for candidate in rounds.candidates.values())]
        assert [getattr(forward, "forward_graph", None) is not None for forward in forwards] == [graphs] * 3
    assert results[0] == results[1] and results[0][0] != results[0][2]


def test_a_non_finite_loss_of_any_micro_batch_is_an_error(stage2):
    cfg = load_config(stage2, ["train.micro_batch_size=1"])
    bench = Bench(cfg, 4, 2)
    candidate = Candidate("one", bench.student.restore_full_attention(bench.teacher, [1]), cfg, batch_plan(cfg, 1))
    scales = iter((1.0, 1.0, float("nan"), 1.0))
    candidate.forward = lambda **_: {"loss": next(scales) * candidate.hybrid.lm_head.weight.sum()}
    batch = [{"input_ids": torch.zeros(1, 32, dtype=torch.long), "teacher_hidden_states": torch.zeros(1, 32, 32)}] * 2
    for step in (1, 2):
        candidate.train(step, batch, bench.teacher.lm_head.weight)
    with pytest.raises(ValueError, match="one: its loss is not finite at step 2"):
        candidate.check_losses()


def test_halving_stops_the_worse_half_and_ranks_it_last(stage2, tmp_path):
    ranking = select(stage2, tmp_path, *STEPS, method="ga_s2", top_k=1, rounds=4, window=0, halving=True)
    assert [sorted(kl) for _, kl in history(tmp_path)][1:] == [
        ["0", "1", "2", "3"],
        *[sorted(map(str, ranking_ids(ranking)[:2]))] * 2,
    ]
    assert ranking["facts"]["stopped"] == {str(layer): 4 for layer in sorted(ranking_ids(ranking)[2:])}
    assert ranking["layers"][-1]["low"] is None and ranking["keep"] == [2]


def ranking_ids(ranking):
    return [layer["layer"] for layer in ranking["layers"]]


def test_other_candidates_are_refused(stage2, tmp_path):
    options = ["--method", "ga_s2", "--top-k", "1", "--window", "0"]
    select(stage2, tmp_path, *options, *STEPS, rounds=2)
    with pytest.raises(ValueError, match="--rounds 2"):
        select(stage2, tmp_path, *options, *STEPS, rounds=4)
    with pytest.raises(ValueError, match="train.lr"):
        select(stage2, tmp_path, *options, *STEPS, "train.lr=5e-3", rounds=2)


def test_another_optimizer_is_refused_before_a_model_is_read(stage2, tmp_path, monkeypatch):
    for where in (bench, candidate_training):
        monkeypatch.setattr(where, "StudentForCausalLM", None)
    monkeypatch.setattr(bench, "load_teacher", lambda *_: pytest.fail("read the teacher"))
    for method in ("ga_s2", "gr_s2", "avg_s2"):
        with pytest.raises(
            ValueError,
            match="^train.optimizer: adamw_8bit: candidates train jointly with adamw only; set that, or take --full_runs$",
        ):
            select(stage2, tmp_path / "out", "train.optimizer=adamw_8bit", method=method, top_k=1)
    with pytest.raises(ValueError, match="^train.optimizer: adamw_8bit"):
        compare_selectors.main(
            flags(
                cfg=stage2,
                ratio=0.25,
                methods="scan",
                output_dir=tmp_path / "out",
                overrides="train.optimizer=adamw_8bit",
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_history_of_an_older_version_is_refused(stage2, tmp_path):
    options = ["--method", "ga_s2", "--top-k", "1", "--window", "0", "--rounds", "2", *STEPS]
    select(stage2, tmp_path, *options)
    file = tmp_path / "side_by_side" / "rounds.json"
    known = json.loads(file.read_text())
    del known["over"]
    file.write_text(json.dumps(known))
    with pytest.raises(
        ValueError,
        match=f"^--output_dir: {file} is of an older version, without over; remove that folder or name",
    ):
        select(stage2, tmp_path, *options)
    assert json.loads(file.read_text()) == known


def test_a_failed_start_does_not_claim_the_folder(stage2, tmp_path):
    options = ["--method", "ga_s2", "--top-k", "1", "--window", "0", "--rounds", "2", *STEPS]
    with pytest.raises(ValueError, match="its loss is not finite at step .*; try a lower train.lr"):
        select(stage2, tmp_path, *options, "train.lr=1e30", "train.lr_attn=1e30")
    assert select(stage2, tmp_path, *options)["keep"] == [2]


def test_stopping_rules():
    a, b, c = {0: 3.0, 1: 2.0, 2: 1.0}, {0: 2.0, 1: 3.0, 2: 1.0}, {0: 3.1, 1: 1.0, 2: 2.0}
    assert rank_correlation(a, a) == 1 and rank_correlation(a, b) == 0.5
    rounds = {
        name: {layer: [score, score + 0.2] for layer, score in scores.items()}
        for name, scores in {"a": a, "b": b, "c": c}.items()
    }
    tied = {0: [3.0, 1.9], 1: [2.0, 2.95], 2: [1.0, 1.0]}  # 0 or 1, as the sequence has it
    a, b, c = rounds.values()

    def settled(rounds, top_k, window, correlation):
        return StoppingRule(window=window, correlation=correlation, top_k=top_k).has_converged(rounds)

    assert settled([c, a, a], 1, 2, 0.9) and not settled([a], 1, 2, 0.0) and not settled([a, a], 1, 0, 0.0)
    assert settled([a, b], 2, 2, 0.4) and not settled([a, b], 2, 2, 0.6) and not settled([a, b], 1, 2, 0.0)
    assert settled([a, tied], 1, 2, 0.4) and settled([b, tied], 1, 2, 0.4) and not settled([c, tied], 2, 2, -1.0)
    # Layers that stopped keep their places after the rest: two that swap at the top of four have a
    # Spearman correlation of 0.8, not -1.
    four = {layer: [float(-layer)] for layer in range(4)}
    halved = [four, four, {0: [0.0], 1: [0.5]}]
    assert order_after([{k: v[0] for k, v in scores.items()} for scores in halved]) == {
        1: 0,
        0: -1,
        2: -2,
        3: -3,
    }
    assert settled(halved, 2, 2, 0.8) and not settled(halved, 2, 2, 0.9) and not settled(halved, 1, 2, 0.0)
    eight = {layer: float(layer) for layer in range(8)}
    halving = StoppingRule(halving=True, top_k=2)
    assert halving.survivors(eight, 1) == halving.survivors(eight, 3) == list(range(8))
    assert halving.survivors(eight, 2) == [4, 5, 6, 7]
    assert halving.survivors({layer: float(layer) for layer in range(4, 8)}, 4) == [5, 6, 7]
    assert StoppingRule(top_k=2).survivors(eight, 2) == list(range(8))


def test_selection_cost(stage2, tmp_path, capsys, monkeypatch):
    """All rounds cost what full runs do, less the repeated work of the teacher; half of the rounds
    cost half of that."""
    options = flags(cfg=stage2, ratio=0.25, seeds=2, rounds=4, sequences=1, correlation=-1, output_dir=tmp_path)
    selection_cost.main([*options, "--window", "0", *STEPS])
    whole = json.loads((tmp_path / "cost.json").read_text())
    assert [len(row["full"]) for row in whole] == [1, 1] and all(row["same"] and row["steps"] == 8 for row in whole)
    assert all(26 / 32 < row["flops"] < 1.1 and row["full_seconds"] > 0 for row in whole)
    assert capsys.readouterr().out.endswith((tmp_path / "cost.md").read_text())
    for seed in range(2):
        shutil.rmtree(tmp_path / f"seed_{seed}" / "side_by_side")
    monkeypatch.setattr(StoppingRule, "has_converged", lambda self, rounds: len(rounds) == 2)
    selection_cost.main([*options, *STEPS])
    for row, before in zip(json.loads((tmp_path / "cost.json").read_text()), whole):
        assert (
            row["steps"] == 4
            and row["flops"] == pytest.approx(before["flops"] / 2)
            and row["full_seconds"] == before["full_seconds"]
        )

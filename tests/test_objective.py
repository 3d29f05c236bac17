"""What a selection minimises: which tokens count, and their mean KL against the naive one."""

import json
import random
from pathlib import Path

from runtime.config import load_config
from runtime.data import load_tokenizer, split_batch
from runtime.run_folder import EXPORT

import pytest
import torch
import torch.nn.functional as F
from test_select_layers import flags, select

from convert import load_teacher
from layer_selection import bench as bench_module
from layer_selection import objective, stage2_runs
from layer_selection.bench import Bench
from layer_selection.objective import needs_far_context, recall_rows, take_rows
from layer_selection.options import OBJECTIVES, RecallOptions
from layer_selection.stage2_runs import HELDOUT_KL
from recall_tasks import associative_recall

RECALL = RecallOptions(num_pairs=2, num_words=8)


def naive_kls(teacher, model, batch):
    """KL(teacher || model) of each position, [B, T] in float64, from whole logits; each document is
    read alone."""
    rows = []
    for i, row in enumerate(batch["input_ids"]):
        lengths = [len(row)]
        if "document_ids" in batch:
            lengths = batch["document_ids"][i].unique_consecutive(return_counts=True)[1].tolist()
        for text in row.split(lengths):
            with torch.no_grad():
                theirs, ours = (
                    m(text[None], use_cache=False).logits.double().log_softmax(-1) for m in (teacher, model)
                )
            rows.append((theirs.exp() * (theirs - ours)).sum(-1)[0])
    return torch.cat(rows).view(batch["input_ids"].shape)


def whole(batches):
    """The batches as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def counted(batch):
    """Positions that are followed by a token of their document."""
    documents = batch["document_ids"]
    return F.pad(documents[:, 1:] == documents[:, :-1], (0, 1))


def test_far_context_is_found_against_a_loop_over_positions(teacher_dir, monkeypatch):
    """Every position with exactly the context that its piece leaves it."""
    monkeypatch.setattr(objective, "FAR_MARGIN", 0.2)
    teacher = load_teacher(teacher_dir).eval()
    torch.manual_seed(0)
    length = 37
    window = length // objective.SHORT_CONTEXT
    ids = torch.randint(0, 90, (2, length))
    expected = torch.zeros(2, length, dtype=torch.bool)
    with torch.no_grad():
        logits = teacher(input_ids=ids, use_cache=False).logits
        for position in range(window, length - 1):
            start = position // window * window - window
            if start + 2 * window > length - 1:
                continue  # a piece whose labels are not all known
            piece = teacher(input_ids=ids[:, start : position + 1], use_cache=False).logits[:, -1]
            label = ids[:, position + 1]
            losses = [F.cross_entropy(x, label, reduction="none") for x in (piece, logits[:, position])]
            expected[:, position] = losses[0] - losses[1] >= 0.2
    far = needs_far_context(teacher, ids)
    assert torch.equal(far, expected) and 0 < far.float().mean() < 1
    assert not needs_far_context(teacher, ids[:, :2]).any()


def test_rows_of_recall_predict_the_answers_alone(teacher_dir):
    tokenizer = load_tokenizer(teacher_dir)
    ids, predicts = take_rows(recall_rows(tokenizer, RECALL, 96, "0"), 3, torch.device("cpu"))
    again, _ = take_rows(recall_rows(tokenizer, RECALL, 96, "0"), 3, torch.device("cpu"))
    other, _ = take_rows(recall_rows(tokenizer, RECALL, 96, "1"), 3, torch.device("cpu"))
    assert torch.equal(ids, again) and not torch.equal(ids, other) and not predicts[:, -1].any()
    document = associative_recall(random.Random("0"), 2, 2, 8)
    answers = [document.text[slice(*span)] for span in document.answers]
    marked = [i + 1 for i in predicts[0].nonzero().flatten().tolist() if i + 1 < len(document.text)]
    assert tokenizer.decode(ids[0, marked]) == "".join(answers)
    with pytest.raises(ValueError, match="--num_pairs: 20 pairs take .* train.train_seq_len is 96; lower it"):
        next(recall_rows(tokenizer, RecallOptions(20, 64), 96, "0"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_the_naive_mean_over_their_tokens(stage2, name, monkeypatch):
    monkeypatch.setattr(objective, "FAR_MARGIN", 0.1)
    recall = RecallOptions(num_pairs=1, num_words=8)
    bench = Bench(load_config(stage2), 5, 3, name, recall)
    hybrid = bench.student.restore_full_attention(bench.teacher, [2]).eval()
    measured = bench.losses(hybrid)
    assert len(measured) == 5 and bench.losses(bench.teacher) == pytest.approx([0.0] * 5, abs=1e-5)
    text = whole(bench.batches)
    rows = recall_rows(bench.tokenizer, recall, text["input_ids"].shape[1], f"held out {bench.cfg.train.seed}")
    documents, answers = take_rows(rows, 5, bench.device)
    documents = {"input_ids": documents}
    everything = counted(text)
    far = needs_far_context(bench.teacher, text)
    assert not (far & ~everything).any()

    def mean(model, batch, selected):
        return naive_kls(bench.teacher, model, batch)[selected].mean().item()

    by_chunk = [kls[chosen].mean() for kls, chosen in zip(naive_kls(bench.teacher, hybrid, text), everything)]
    expected = {"kl": torch.stack(by_chunk).mean().item(), "far_kl": mean(hybrid, text, far)}
    expected["recall"] = mean(hybrid, documents, answers)
    shares = [mean(hybrid, text, everything) / mean(bench.student, text, everything)]
    shares.append(expected["recall"] / mean(bench.student, documents, answers))
    expected["mixture"] = sum(shares) / 2
    assert sum(measured) / 5 == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_weights_make_the_same_mean(stage2, name, monkeypatch):
    monkeypatch.setattr(objective, "FAR_MARGIN", 0.1)
    bench = Bench(load_config(stage2), 4, 2, name, RecallOptions(1, 8))
    batch = whole(bench.batches)
    text = batch["input_ids"]
    ((chosen, weights),) = bench.objective.training_rows([batch], "0")
    ids = chosen["input_ids"]
    assert ids.shape == weights.shape and len(ids) == 4
    if name != "recall":
        assert chosen["document_ids"].shape == ids.shape and not weights[:2][~counted(batch)[:2]].any()
    total = sum(1 / scale for scale in bench.objective.scales)
    assert weights.sum().item() == pytest.approx(total)
    assert (torch.equal(ids, text), torch.equal(ids[:2], text[:2])) == {
        "kl": (True, True),
        "far_kl": (True, True),
        "recall": (False, False),
        "mixture": (False, True),
    }[name]


@pytest.mark.parametrize("name", ["kl", "far_kl"])
def test_tokens_of_a_step_weigh_the_same_in_all_micro_batches(stage2, name, monkeypatch):
    monkeypatch.setattr(objective, "FAR_MARGIN", 0.1)
    bench = Bench(load_config(stage2), 4, 2, name)
    torch.manual_seed(0)
    batch = whole(bench.batches)
    batch["loss_mask"] = torch.rand(batch["input_ids"].shape) < torch.tensor([[0.9], [0.5], [0.2], [0.0]])
    ((_, expected),) = bench.objective.training_rows([batch], "0")
    parts = bench.objective.training_rows(split_batch(batch, 1), "0")
    assert expected.sum().item() == pytest.approx(1) and not expected[3].any()
    assert torch.equal(torch.cat([weights for _, weights in parts]), expected)


@pytest.mark.parametrize("name", ["kl", "far_kl", "mixture"])
def test_only_learned_tokens_of_text_count(stage2, name, monkeypatch):
    monkeypatch.setattr(objective, "FAR_MARGIN", 0.1)
    bench = Bench(load_config(stage2), 4, 2, name, RecallOptions(1, 8))
    torch.manual_seed(0)
    bench.batches = [batch | {"loss_mask": torch.rand(batch["input_ids"].shape) < 0.5} for batch in bench.batches]
    text = whole(bench.batches)
    expected = counted(text) & F.pad(text["loss_mask"][:, 1:], (0, 1))
    if name == "far_kl":
        expected &= needs_far_context(bench.teacher, text)
    assert torch.equal(torch.cat(bench.objective.parts[0].weights) > 0, expected)
    ((chosen, weights),) = bench.objective.training_rows([text], "0")
    rows = 2 if name == "mixture" else 4
    assert torch.equal(weights[:rows] > 0, expected[:rows])
    if name == "mixture":
        assert set(chosen) == {"input_ids", "document_ids"}


def test_text_without_far_context_is_refused(stage2, monkeypatch):
    monkeypatch.setattr(objective, "FAR_MARGIN", 1e9)
    with pytest.raises(ValueError, match="--objective: far_kl: no held-out token needs far context"):
        Bench(load_config(stage2), 4, 2, "far_kl").objective  # noqa: B018 (it is built when first used)


def test_scan_and_ga_s2_rank_by_the_objective(stage2, tmp_path):
    """As the bench measures it; another one does not take over what is there."""
    options = flags(objective="recall", num_pairs=1, vocab_size=8, top_k=1)
    ranking = select(stage2, tmp_path / "scan", *options, method="scan")
    bench = Bench(load_config(stage2), 6, 4, "recall", RecallOptions(1, 8))
    for layer in ranking["layers"]:
        losses = bench.losses(bench.student.restore_full_attention(bench.teacher, [layer["layer"]]).eval())
        assert layer["importance"] == pytest.approx(-sum(losses) / len(losses), rel=1e-4)
    assert ranking["unit"] == "-recall"
    assert select(stage2, tmp_path / "ga", *options, method="ga_s2")["facts"]["tokens"] == 4 * 2 * 2 * 32
    with pytest.raises(ValueError, match="--objective: .* was measured by recall, not kl; set that"):
        select(stage2, tmp_path / "ga", method="ga_s2", top_k=1)
    with pytest.raises(ValueError, match="ga/side_by_side was measured with num_pairs 1, not 2; name another"):
        select(stage2, tmp_path / "ga", *options, method="ga_s2", num_pairs=2)
    file = tmp_path / "ga" / "side_by_side" / "rounds.json"
    known = json.loads(file.read_text())
    del known["num_words"]  # of an earlier version
    file.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="ga/side_by_side was measured with num_words unknown, not 8; name another"):
        select(stage2, tmp_path / "ga", *options, method="ga_s2")
    with pytest.raises(ValueError, match="--objective: recall is for --method gates, .*; mse has its own"):
        select(stage2, tmp_path / "mse", *options, method="mse")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pairs": 0}, "--num_pairs: 0 must be at least 1"),
        (
            {"num_pairs": 300},
            "--num_pairs: 300 pairs need as many different words, not 256; lower it, or set --vocab_size",
        ),
        ({"vocab_size": 99999}, r"--vocab_size \(of compare_selectors.py: --num_words\): 99999 must be at most 5550"),
    ],
)
def test_documents_that_cannot_be_are_refused_before_a_model_is_read(tmp_path, monkeypatch, stage2, options, message):
    monkeypatch.setattr(bench_module, "load_teacher", lambda *_: pytest.fail("read the teacher"))
    for name in ("recall", "mixture"):
        with pytest.raises(ValueError, match=f"^{message}"):
            select(stage2, tmp_path / "out", *flags(method="scan", top_k=1, objective=name, **options))
    assert not (tmp_path / "out").exists()


def test_other_objectives_do_not_need_the_documents(stage2, tmp_path):
    assert select(stage2, tmp_path, *flags(method="uniform", top_k=1, num_pairs=300))["keep"]


def test_measured_candidates_are_of_their_documents(stage2, tmp_path, monkeypatch):
    """What was measured with other documents, or with unknown ones by an earlier version, is measured
    again."""
    assert HELDOUT_KL == "heldout_kl.json"
    bench = Bench(load_config(stage2), 4, 2, "recall", RecallOptions(1, 8))
    (tmp_path / "heldout_recall.json").write_text("[9, 9, 9, 9]")
    (tmp_path / "heldout_recall_2_8.json").write_text("[9, 9, 9, 9]")
    monkeypatch.setattr(
        stage2_runs,
        "train_with_script",
        lambda cfg, *_: bench.student.save_pretrained(Path(cfg.train.output_dir) / EXPORT),
    )
    kls = stage2_runs.train_hybrid(bench, "false", [1], tmp_path)
    assert kls == pytest.approx(bench.losses(bench.student)) and 9 not in kls
    assert json.loads((tmp_path / "heldout_recall_1_8.json").read_text()) == kls
    monkeypatch.setattr(stage2_runs, "train_with_script", lambda *_: pytest.fail("trained again"))
    assert stage2_runs.train_hybrid(bench, "false", [1], tmp_path) == kls

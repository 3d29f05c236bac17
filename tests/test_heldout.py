"""Held-out figures against naive float64 logits, at lengths that no chunk size divides."""

import math
from types import SimpleNamespace

from runtime.data import open_chunks, read_batch, split_batch

import pytest
import torch
from conftest import mean_kl, random_teacher, read_alone
from transformers import AutoModelForCausalLM

import heldout
from convert import load_teacher
from distill_model import StudentForCausalLM, losses
from heldout import (
    has_linear_head,
    heldout_cross_entropy,
    heldout_figures,
    heldout_kl,
    read_chunks,
    read_logits,
    top1_agreement,
)


@pytest.fixture
def models(teacher_dir):
    """(Teacher, all-linear student, batches of 3 and 2 chunks of 23 tokens)."""
    teacher = load_teacher(teacher_dir)
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0].eval()
    ids = torch.randint(0, teacher.config.vocab_size, (5, 23))
    return teacher, student, ids.split(3)


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


def test_figures_are_those_of_naive_logits(models, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SIZE", 7)
    monkeypatch.setattr(heldout, "CHUNK_SIZE", 7)
    teacher, student, batches = models
    figures = heldout_figures(student, batches, [read_chunks(teacher, ids) for ids in batches])
    ids = torch.cat(batches)
    ours = log_probabilities(student, ids)
    theirs = log_probabilities(teacher, ids)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    cross_entropy = -ours[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean(1)
    assert figures.kl == pytest.approx(kl.tolist(), rel=1e-4)
    assert figures.cross_entropy == pytest.approx(cross_entropy.tolist(), rel=1e-5)
    assert figures.agreement == pytest.approx(agreement.tolist()) and 0 < agreement.mean() < 1
    assert figures.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert figures.mean_cross_entropy == pytest.approx(cross_entropy.mean().item(), rel=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(cross_entropy.mean()), rel=1e-5)
    assert figures.mean_agreement == pytest.approx(agreement.mean().item())


def test_a_teacher_agrees_with_itself(models):
    teacher, _, (ids, _) = models
    output = read_chunks(teacher, ids)
    assert heldout_kl(output, output).abs().max() < 1e-6
    assert top1_agreement(output, output).tolist() == [1.0] * 3
    loss = teacher(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert heldout_cross_entropy(output, ids).mean().item() == pytest.approx(loss, rel=1e-5)


def test_logits_of_all_rows_are_never_held(models, monkeypatch):
    """No tensor with as many rows as a batch and as many columns as the vocabulary."""
    monkeypatch.setattr(losses, "CHUNK_SIZE", 7)
    monkeypatch.setattr(heldout, "CHUNK_SIZE", 7)
    teacher, student, batches = models
    vocabulary = teacher.config.vocab_size
    heads = {model.lm_head.weight.data_ptr() for model in (teacher, student)}
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (vocabulary,) and out.data_ptr() not in heads:
                largest.append(out.numel() // vocabulary)
            return out

    with Largest():
        heldout_figures(student, batches, [read_chunks(teacher, ids) for ids in batches])
    assert max(largest) <= 7


def test_other_vocabularies_and_batches_are_refused(models):
    teacher, student, batches = models
    output = read_chunks(teacher, batches[0])
    other = heldout.ModelOutput(output.hidden, output.head[:-1])
    with pytest.raises(ValueError, match="vocabularies differ"):
        heldout_kl(other, output)
    with pytest.raises(ValueError, match="argument"):
        heldout_figures(student, batches, [output])


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_models_of_transformers_are_read_as_well(kind, tmp_path):
    """And one whose logits are not linear in its hidden states is refused."""
    model = random_teacher(tmp_path, kind)
    ids = torch.randint(0, 90, (2, 19))
    output = read_chunks(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(output.hidden @ output.head.T, model(ids).logits)
    assert has_linear_head(model, ids[:1])


@pytest.mark.parametrize("wrong", [lambda logits: 3 * torch.tanh(logits / 3), lambda logits: logits + torch.arange(96)])
def test_other_logits_than_linear_ones_are_held(models, monkeypatch, wrong):
    """As of heads with a bias, or models that cap their logits."""
    teacher, model, (ids, _) = models
    forward = model.forward
    model.forward = lambda *args, **options: SimpleNamespace(logits=wrong(forward(*args, **options).logits))
    assert not has_linear_head(model, ids[:1])
    monkeypatch.setattr(heldout, "CHUNK_SIZE", 7)
    output = read_logits(model, ids)
    ours = log_probabilities(model, ids)
    theirs = log_probabilities(teacher, ids)
    expected = read_chunks(teacher, ids)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    torch.testing.assert_close(heldout_kl(output, expected).double(), kl, rtol=1e-4, atol=1e-6)
    cross_entropy = -ours[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(heldout_cross_entropy(output, ids).double(), cross_entropy, rtol=1e-5, atol=1e-6)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean(1)
    assert torch.equal(top1_agreement(output, expected), agreement)
    assert output.vocab_size == expected.vocab_size == 96


def test_logits_that_are_not_finite_are_refused(models):
    _, model, (ids, _) = models
    forward = model.forward
    model.forward = lambda *args, **options: SimpleNamespace(logits=forward(*args, **options).logits * math.nan)
    with pytest.raises(ValueError, match="the logits are not finite"):
        has_linear_head(model, ids[:1])


def test_documents_are_measured_one_by_one(teacher_dir, data_dir, tmp_path):
    """Of our models, of transformers' (which read each document in a pass of its own), and where
    logits are held: against a loop over the documents. A chunk of which nothing counts is 0."""
    teacher = load_teacher(teacher_dir)
    hf_teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4", [1])[0].eval()
    chunks = open_chunks(data_dir, document_mask="auto").heldout
    batch = read_batch(chunks, range(5))
    alone = read_alone(chunks, 5, student, teacher)
    kl = [mean_kl(*predicted) for predicted, _ in alone]
    loss = [torch.nn.functional.nll_loss(ours, tokens).item() for (ours, _), tokens in alone]
    agree = [(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item() for (ours, theirs), _ in alone]
    for read in (read_chunks, read_logits):
        for model in (teacher, hf_teacher):
            output, expected = read(student, batch), read(model, batch)
            assert heldout_kl(output, expected).tolist() == pytest.approx(kl, rel=1e-3, abs=1e-6)
            assert heldout_cross_entropy(output, batch["input_ids"]).tolist() == pytest.approx(loss, rel=1e-4)
            assert top1_agreement(output, expected).tolist() == pytest.approx(agree)
    parts = split_batch(batch, 2)
    figures = heldout_figures(student, parts, [read_chunks(teacher, part) for part in parts])
    assert figures.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    batch["document_ids"][0] = torch.arange(32)
    output = read_chunks(student, batch)
    assert heldout_kl(output, read_chunks(teacher, batch))[0] == 0
    assert heldout_cross_entropy(output, batch["input_ids"])[0] == 0

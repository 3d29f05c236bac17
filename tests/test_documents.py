"""Chunks of several documents: each is read as if it stood alone, by every student, and the losses
count its own predictions only."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import runtime.data
from runtime.data import collate, split_batch

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import write_config
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from distill_model import STUDENT_ATTENTION_MAP, DistillationLoss, StudentConfig, StudentForCausalLM, cpu_ops
from distill_model.documents import PADDING, Documents, learned_tokens
from distill_model.losses import micro_batch_weights
from hf_trainer import DistillTrainer, FinetuneTrainer, FrozenTeacher, KDTrainer
from wrapper import AttentionAlignmentModel, mean_distances

# Shorter than most documents.
OPTIONS = {"swa_v1": {"window_size": 5, "sink_size": 2}, "lolcats_v1": {"window_size": 5}}
# Parts of these compute in fp32.
ROUNDING = dict.fromkeys(("mamba2_v1", "lolcats_v1", "path_v1", "path_fox_v1"), 1e-4)
LENGTH = 101
# Documents of each row: one token, odd lengths, across the kernels' chunks of 64; one that spans
# the row; many.
ROWS = ([1, 70, 2, 1, 27], [LENGTH], [3] * 20 + [41])


def document_ids(rows=ROWS):
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def split(tensor, rows=ROWS):
    """The documents [1, length, ...] of a batch [B, T, ...]."""
    return [part[None] for row, lengths in zip(tensor, rows) for part in row.split(lengths)]


def shape(**more):
    return dict(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
        qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        **more,
    )


def hybrid(name, seed=0):
    """A layer of the student and a kept one, in float64, near its initialisation: no gate is neutral,
    and no gradient 0."""
    torch.manual_seed(seed)
    options = OPTIONS.get(name, {})
    kept = [1]
    config = StudentConfig(
        **shape(num_hidden_layers=2), student_name=name, student_options=options, keep_full_attention_layers=kept
    )
    model = StudentForCausalLM(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(rows=ROWS):
    return torch.randint(0, 64, (len(rows), sum(rows[0])))


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", STUDENT_ATTENTION_MAP)
def test_packed_documents_equal_each_alone(name):
    model = hybrid(name)
    ids = random_ids()
    packed = model.model(ids, document_ids=document_ids()).last_hidden_state
    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    ours = gradients(model)
    alone = [model.model(part, use_cache=False).last_hidden_state for part in split(ids)]
    error = ROUNDING.get(name, 1e-8)
    for output, expected in zip(split(packed), alone, strict=True):
        torch.testing.assert_close(output, expected, rtol=error, atol=error)
    sum((output * w).sum() for output, w in zip(alone, split(weights))).backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=error, atol=error * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", STUDENT_ATTENTION_MAP)
def test_a_changed_document_changes_no_other(name):
    model = hybrid(name)
    ids = random_ids()
    groups = document_ids()
    other = ids.clone()
    changed = torch.zeros_like(ids, dtype=torch.bool)
    for row, document in ((0, 1), (0, 3), (2, 20)):
        changed[row] |= groups[row] == document
    other[changed] = (ids[changed] + 7) % 64
    weights = torch.randn(*ids.shape, 40).double()
    found = []
    for x in (ids, other):
        embedded = model.model.embeddings(x).detach().requires_grad_()
        output = model.model(inputs_embeds=embedded, document_ids=groups).last_hidden_state
        (output * weights).sum().backward()
        found.append((output.detach(), embedded.grad))
    (output, gradient), (other_output, other_gradient) = found
    assert torch.equal(output[~changed], other_output[~changed])
    assert torch.equal(gradient[~changed], other_gradient[~changed])
    assert (output[changed] - other_output[changed]).abs().amax(-1).min() > 1e-3


def padded_document_ids(rows=ROWS):
    """`document_ids`, with the last document of the first row as padding."""
    ids = document_ids(rows)
    ids[0, -rows[0][-1] :] = PADDING
    return ids


def test_data_and_model_mean_the_same_padding():
    """Neither imports the other's constant."""
    assert PADDING == runtime.data.PADDING


def predictions(model, ids, groups, learned=None):
    """Log-probabilities [tokens, V] at the positions that count, and the next tokens, by a loop over
    the tokens; each document is read alone. learned: [B, T], if not all next tokens are."""
    found = []
    learned = torch.ones_like(ids, dtype=torch.bool) if learned is None else learned
    for row, row_groups, row_learned in zip(ids, groups, learned):
        for document in row_groups.unique():
            text = row[row_groups == document][None]
            if document == PADDING or text.shape[1] == 1:
                continue
            logits = model(input_ids=text, use_cache=False).logits[0, :-1]
            chosen = row_learned[row_groups == document][1:]
            found.append((logits.log_softmax(-1)[chosen], text[0, 1:][chosen]))
    log_probs, targets = zip(*found)
    return torch.cat(log_probs), torch.cat(targets)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_count_each_document_alone(masked):
    """Cross-entropy, and KL with it, and their gradients: against log-probabilities of each document
    read alone. What begins a document is predicted by nobody, and padding does not count; nor do
    tokens that a loss mask leaves out."""
    model, teacher = hybrid("gdn_v7"), hybrid("gdn_v4", seed=1).eval()
    ids, groups = random_ids(), padded_document_ids()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4 if masked else None
    ours, targets = predictions(model, ids, groups, mask)
    with torch.no_grad():
        theirs, _ = predictions(teacher, ids, groups, mask)
        hidden = teacher.model(ids, document_ids=groups).last_hidden_state
    cross_entropy = -ours.gather(1, targets[:, None]).mean()
    kl = (theirs.exp() * (theirs - ours)).sum(1).mean()
    assert int(learned_tokens(mask, groups).sum()) == len(targets)
    for loss, expected in (
        (model(input_ids=ids, labels=ids, document_ids=groups, loss_mask=mask).loss, cross_entropy),
        (
            model(
                input_ids=ids,
                labels=ids,
                document_ids=groups,
                loss_mask=mask,
                teacher_hidden_states=hidden,
                teacher_head_weight=teacher.lm_head.weight,
                distillation=DistillationLoss(kl_weight=0.5, ce_weight=2.0),
            ).loss,
            0.5 * kl + 2 * cross_entropy,
        ),
    ):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        got = gradients(model)
        expected.backward(retain_graph=True)
        for key, gradient in gradients(model).items():
            torch.testing.assert_close(got[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=key)


def test_documents_of_one_token_have_no_loss():
    model = hybrid("gdn_v4")
    ids = random_ids()[:, :5]
    alone = torch.arange(5).expand_as(ids)
    options = dict(teacher_hidden_states=torch.randn(3, 5, 40).double(), teacher_head_weight=model.lm_head.weight)
    for more in ({}, options):
        loss = model(input_ids=ids, labels=ids, document_ids=alone, **more).loss
        loss.backward()
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("kind", ["mse", "l2"])
def test_stage_1_aligns_each_document_alone(kind):
    """Losses, gradients and variances of packed documents are those of the documents read alone,
    weighted by their tokens."""
    torch.manual_seed(0)
    teacher = StudentForCausalLM(StudentConfig(**shape(num_hidden_layers=2))).double()
    student, _ = StudentForCausalLM.from_teacher(teacher, "gdn_v7")
    student.double()
    model = AttentionAlignmentModel(copy.deepcopy(teacher), student, kind)
    ids, groups = random_ids(), padded_document_ids()
    packed = model(ids, groups)
    packed["loss"].backward()
    ours = gradients(model)
    loss = tokens = 0
    for row, row_groups in zip(ids, groups):
        for document in row_groups.unique():
            if document != PADDING:
                text = row[row_groups == document][None]
                loss = loss + model(text)["loss"] * text.shape[1]
                tokens += text.shape[1]
    (loss / tokens).backward()
    theirs = gradients(model)
    torch.testing.assert_close(packed["loss"].double(), (loss / tokens).double(), rtol=1e-5, atol=0)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=key)
    changed = ids.clone()
    changed[groups == PADDING] = 3
    for key, value in model(changed, groups).items():
        torch.testing.assert_close(value, packed[key], rtol=0, atol=0)


@pytest.mark.parametrize("groups", [document_ids(), padded_document_ids()], ids=["full", "padded"])
def test_mean_distances_end_at_a_document(groups):
    model = StudentForCausalLM(StudentConfig(**shape(num_hidden_layers=1))).double()
    attn = model.model.layers[0].attn
    hidden = torch.randn(3, LENGTH, 40).double()
    documents = Documents.of(groups)
    packed = mean_distances(attn, hidden, model.model.position_embeddings(hidden, documents.positions), documents)
    total = queries = 0
    for row, row_groups in zip(hidden, groups):
        for document in row_groups.unique():
            if document != PADDING:
                part = row[row_groups == document][None]
                own = part.shape[1] - part.shape[1] // 2
                total = total + own * mean_distances(attn, part, model.model.position_embeddings(part))
                queries += own
    torch.testing.assert_close(packed, total / queries)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (dict(use_cache=True), "use_cache"),
        (dict(attention_mask=torch.ones(3, LENGTH)), "attention_mask"),
        (dict(position_ids=torch.arange(LENGTH)[None]), "position_ids"),
        (dict(document_ids=document_ids()[:, 1:]), r"\(3, 100\) must be \(3, 101\)"),
    ],
)
def test_what_does_not_go_with_documents_is_refused(inputs, named):
    model = StudentForCausalLM(StudentConfig(**shape(num_hidden_layers=1)))
    with pytest.raises(ValueError, match=f"document_ids: .*{named}"):
        model(input_ids=random_ids(), **{"document_ids": document_ids()} | inputs)


def test_long_and_short_documents_are_not_padded_to_one_length():
    """The stand-ins' work grows with the tokens: 200 documents of one token beside one of 300 are
    not 200 x 300 tokens."""
    seen = []

    def padded(cu_seqlens, *tensors):
        mask, *out = unpack(cu_seqlens, *tensors)
        seen.append(mask.numel())
        return mask, *out

    lengths = torch.tensor([300] + [1] * 200)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    q, k, v = torch.randn(3, 1, 500, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        unpack = cpu_ops.unpack
        patch.setattr(cpu_ops, "unpack", padded)
        out, _ = cpu_ops.delta_rule(q, k, v, torch.randn(1, 500, 2).neg().exp().neg(), cu_seqlens=bounds)
    assert sum(seen) == 500
    torch.testing.assert_close(out[:, 300:], (k[:, 300:] * q[:, 300:]).sum(-1, keepdim=True) * v[:, 300:] * 8**-0.5)


def test_the_trainers_hand_documents_to_teacher_and_student():
    """The losses of stages 2 and 3 on a batch, as the data loader makes it, against log-probabilities
    of each document alone."""
    model, teacher = hybrid("gdn_v4").float(), hybrid("gla_v1", seed=1).float()
    frozen = FrozenTeacher(teacher, torch.device("cpu"))
    rows = [
        {"input_ids": ids.numpy(), "document_lengths": numpy.array(lengths)}
        for ids, lengths in zip(random_ids(), ([1, 70, 2, 1], *ROWS[1:]))  # the first row ends with padding
    ]
    batch = collate(rows)
    ours, targets = predictions(model, batch["input_ids"], batch["document_ids"])
    theirs, _ = predictions(teacher, batch["input_ids"], batch["document_ids"])
    stage_2 = SimpleNamespace(teacher=frozen, distillation=DistillationLoss())
    loss = KDTrainer.forward_loss(stage_2, model, batch)
    torch.testing.assert_close(loss, (theirs.exp() * (theirs - ours)).sum(1).mean(), rtol=1e-4, atol=1e-6)
    loss = FinetuneTrainer.forward_loss(None, model, batch)
    torch.testing.assert_close(loss, -ours.gather(1, targets[:, None]).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainer_class", [DistillTrainer, KDTrainer, FinetuneTrainer])
def test_micro_batches_change_neither_loss_nor_gradients(trainer_class):
    """Rows with different numbers of documents and of padded tokens, in one micro-batch and in
    three; their losses are weighted as the trainer weights them."""
    torch.manual_seed(0)
    trainer = trainer_class.__new__(trainer_class)
    trainer.distillation = DistillationLoss(ce_weight=0.3)
    model, teacher = hybrid("gdn_v4"), hybrid("gla_v1", seed=1)
    trainer.teacher = FrozenTeacher(teacher, torch.device("cpu"))
    if trainer_class is DistillTrainer:
        model = AttentionAlignmentModel(hybrid("gla_v1", seed=1), model)
    rows = ([1, 40, 2, 1], [LENGTH], [3] * 20)
    batch = collate(
        [
            {"input_ids": ids.numpy(), "document_lengths": numpy.array(lengths)}
            for ids, lengths in zip(random_ids(), rows)
        ]
    )
    found = []
    for size in (3, 1):
        trainer._layers = {True: [], False: []}
        micro_batches = split_batch(batch, size)
        weights = micro_batch_weights([trainer.counted(part) for part in micro_batches], torch.device("cpu"))
        losses = [trainer.forward_loss(model, part) * w for part, w in zip(micro_batches, weights, strict=True)]
        loss = sum(losses) / len(losses)
        loss.backward()
        figures = [loss.detach(), *gradients(model).values()]
        if trainer_class is DistillTrainer:
            total, count = trainer._layers[True]
            figures.append(total[0] / count)
        found.append(figures)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_stage_1_counts_every_token_the_same(tmp_path, teacher_dir, data_dir):
    """Losses of training and evaluation, in total and by layer, on chunks with padding of all
    lengths; in one micro-batch, in four, and on two ranks."""
    from test_train import launch, metrics

    data = tmp_path / "padded"
    shutil.copytree(data_dir, data)
    for split in ("train", "heldout"):
        dataset = Dataset.from_file(str(Path(data_dir) / f"{split}.arrow"))
        writer = ArrowWriter(features=dataset.features, path=str(data / f"{split}.arrow"))
        for i, row in enumerate(dataset):
            writer.write(row | {"document_lengths": [1 + 7 * i % 31]})
        writer.finalize()
    found = []
    for processes, size in ((1, 4), (1, 1), (2, 1)):
        folder = tmp_path / f"{processes} {size}"
        folder.mkdir()
        changes = {"micro_batch_size": size, "eval_batches": 4 // size // processes, "document_mask": True}
        file = write_config(folder, 1, teacher_dir, str(data), **changes, lr=0, lr_attn=0, final_lr=0)
        launch(file, processes=processes)
        lines = metrics(folder / "stage1")
        found.append([v for line in lines for name, v in line.items() if "loss" in name and name != "train_loss"])
    assert len(found[0]) > 20 and found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)

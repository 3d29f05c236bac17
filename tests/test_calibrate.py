"""Calibration: the closed forms against independent solutions, and a lower loss for every
student."""

import pytest
import torch
from conftest import random_teacher

from convert import load_teacher
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM
from wrapper import AttentionAlignmentModel, calibrate, mean_distances


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_teacher(folder, "llama", attention_bias=True)
    return folder


def alignment_model(folder, name):
    teacher = load_teacher(str(folder))
    torch.manual_seed(0)
    return AttentionAlignmentModel(teacher, StudentForCausalLM.from_teacher(teacher, name)[0])


def batches(model, count=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (count, 2, 33), generator=generator)
    return [{"input_ids": part} for part in ids]


def rows(tensor):
    """[B, T, features] -> [B T, features] in float64."""
    return tensor.detach().flatten(0, 1).double()


def ridge_rows(x, strength):
    """The rows whose squares add strength mean(diag X'X) |w|^2 to a least-squares problem in w."""
    scale = (strength * x.square().sum(0).mean()).sqrt()
    return scale * torch.eye(x.shape[1], dtype=torch.float64)


FUSED = ["gsa_v1", "hgrn2_v1"]


@pytest.mark.parametrize("name", [name for name in STUDENT_ATTENTION_MAP if name not in FUSED])
def test_calibration_lowers_the_loss(folder, name):
    model = alignment_model(folder, name)
    fit = batches(model, 4)
    fresh = batches(model, 5)[4]
    with torch.no_grad():
        before = model(**fresh)["loss"].item()
        calibrate(model, fit)
        after = model(**fresh)["loss"].item()
    assert after < max(0.95 * before, 1e-6)  # a window wider than the text is exact already
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", FUSED)
def test_what_cannot_be_fitted_is_refused(folder, name):
    model = alignment_model(folder, name)
    with pytest.raises(ValueError, match=f"train.calibrate_init: {name}"):
        calibrate(model, batches(model))


def test_output_projection_is_the_ridge_regression(folder):
    """Against the same problem as one stacked least squares: rows of tokens, and rows that pull
    towards the scaled start."""
    model = alignment_model(folder, "swa_v1")  # its o_proj has a bias
    wrapper = model.model.layers[1].attn
    o_proj = wrapper.student_attn.o_proj
    heads = model.config.num_attention_heads
    with torch.no_grad():
        o_proj.weight.normal_()
    start = o_proj.weight.detach().double().clone().unflatten(1, (heads, -1))
    inputs = []
    targets = []
    hooks = [
        o_proj.register_forward_pre_hook(lambda m, args: inputs.append(rows(args[0]))),
        wrapper.register_forward_hook(lambda m, args, out: targets.append(rows(out[0]))),
    ]
    for batch in batches(model):
        model(**batch)
    for hook in hooks:
        hook.remove()
    x = torch.cat(inputs)
    y = torch.cat(targets) - o_proj.bias.detach().double()
    x_by_head = x.unflatten(1, (heads, -1))
    outputs = [(x_by_head[:, h] @ start[:, h].mT).flatten() for h in range(heads)]
    scales = torch.linalg.lstsq(torch.stack(outputs, 1), y.flatten()[:, None]).solution[:, 0]
    scaled = (start * scales[:, None]).flatten(1)
    penalty = ridge_rows(x, 0.5)
    stacked = torch.cat((x, penalty))
    expected = torch.linalg.lstsq(stacked, torch.cat((y, penalty @ scaled.mT))).solution.mT
    calibrate(model, batches(model), ridge=0.5)
    torch.testing.assert_close(o_proj.weight.double(), expected, atol=1e-4, rtol=1e-4)


def test_mean_distance_against_a_loop(folder):
    model = alignment_model(folder, "gdn_v4")
    attn = model.model.layers[0].attn.teacher_attn
    hidden = torch.randn(2, 11, model.config.hidden_size)
    positions = model.model.position_embeddings(hidden)
    q, k, _ = attn.project(hidden, positions)
    group = attn.num_heads // attn.num_kv_heads
    expected = torch.zeros(attn.num_heads)
    for head in range(attn.num_heads):
        distances = []
        for row in range(2):
            for t in range(5, 11):
                keys = k[row, : t + 1, head // group]
                logits = keys @ q[row, t, head] * attn.head_dim**-0.5
                distance = t - torch.arange(t + 1)
                distances.append((logits.softmax(-1) * distance).sum())
        expected[head] = torch.stack(distances).mean()
    torch.testing.assert_close(mean_distances(attn, hidden, positions), expected)


@pytest.mark.parametrize("name", ["gdn_v4", "kda_v1"])
def test_decay_has_the_mean_distance_of_the_teacher(folder, name):
    """A head that decays by `rate` nats per token has weights exp(-rate d), whose mean distance is
    the teacher's."""
    attn = alignment_model(folder, name).model.layers[0].attn.student_attn
    distance = torch.tensor([1.0, 3.0, 10.0, 40.0])[: attn.A_log.numel()]
    attn.set_decay(torch.log1p(1 / distance))
    per_head = attn.dt_bias.view(len(distance), -1)
    rate = attn.A_log.exp()[:, None] * torch.nn.functional.softplus(per_head)
    d = torch.arange(4000)
    weights = torch.exp(-rate[:, :1].double() * d)
    mean = (weights * d).sum(1) / weights.sum(1)
    torch.testing.assert_close(mean, distance.double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(rate, rate[:, :1].expand_as(rate))


def test_a_gate_that_starts_closed_is_opened(folder):
    """Along the ridge regression of 1, against the same problem as one stacked least squares; what
    it lets through is near 1."""
    model = alignment_model(folder, "gdn_v8")
    wrapper = model.model.layers[1].attn
    attn = wrapper.student_attn
    seen = []
    hook = wrapper.register_forward_pre_hook(lambda m, args: seen.append(rows(args[0])))
    closed, *_ = attn(torch.randn(1, 5, model.config.hidden_size))
    assert closed.abs().max() == 0
    for batch in batches(model):
        model(**batch)
    hook.remove()
    calibrate(model, batches(model))
    x = torch.cat(seen)
    penalty = ridge_rows(x, 0.01)
    ones = torch.cat((torch.ones(len(x), 1), torch.zeros(len(penalty), 1))).double()
    expected = torch.linalg.lstsq(torch.cat((x, penalty)), ones).solution.mT
    weight = attn.g_proj.weight.double()
    torch.testing.assert_close(weight / 0.3, expected.expand_as(weight), atol=1e-4, rtol=1e-4)
    gate = torch.nn.functional.silu(x @ weight.mT).unflatten(1, (-1, attn.head_v_dim))
    passed = attn.o_norm.weight.double() * gate
    residual = (x @ expected.mT - 1).square().mean()
    assert (passed - 1).square().mean() < 1.5 * residual < 0.3

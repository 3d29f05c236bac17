"""The model class: initialisation from the teacher, causality, cached decoding, save and load."""

import copy
import re
from functools import partial
from pathlib import Path

import flash_stand_in
import pytest
import torch
import torch.nn.functional as F
from conftest import random_teacher
from fla.layers import Mamba2

from convert import load_teacher
from distill_model import (
    STUDENT_ATTENTION_MAP,
    DistillationLoss,
    StudentConfig,
    StudentForCausalLM,
    check_student,
    cpu_ops,
)
from distill_model.cache import HybridCache
from distill_model.student_base import expand_kv_heads

ROOT = Path(__file__).parent.parent
STUDENTS = sorted(STUDENT_ATTENTION_MAP)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return load_teacher(teacher_dir)


# Small enough to make a difference in the tests' short sequences.
OPTIONS = {
    "swa_v1": {"window_size": 8},
    "lolcats_v1": {"window_size": 8, "feature_dim": 12},
    "gsa_v1": {"num_slots": 12},
    "gla_v1": {"gate_logit_normalizer": 4},
}


def hybrid(teacher, name="gdn_v4", kept=(1,)):
    torch.manual_seed(1)
    return StudentForCausalLM.from_teacher(teacher, name, kept, OPTIONS.get(name))[0].eval()


def trained(model, scale=0.05):
    """The model a little off its start, so that no gate is exactly neutral."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 2), (4, 1), (3, 3)])
def test_expanded_kv_heads_give_the_teachers_attention(heads, kv_heads):
    """A softmax attention with one kv head per query head, built from the expanded weights, equals
    the grouped one."""
    head_dim = 8
    hidden = 20
    x = torch.randn(2, 7, 20).double()
    q, k, v = (torch.randn(n * head_dim, hidden).double() for n in (heads, kv_heads, kv_heads))

    def attend(k, v):
        parts = [(x @ w.T).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w in (q, k, v)]
        return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

    expanded = (expand_kv_heads(w, kv_heads, heads) for w in (k, v))
    torch.testing.assert_close(attend(*expanded), attend(k, v))


def check_mamba2(ours, theirs, report):
    assert report.copied == ["out_proj.weight"]
    assert report.transformed == ["in_proj.weight"]
    assert set(report.dropped) == {"q_norm.weight", "k_norm.weight", "rope"}
    _, x, b, c, _ = ours.in_proj.weight.split([64, 64, 64, 64, 4])
    for rows, name in ((x, "v_proj"), (b, "k_proj"), (c, "q_proj")):
        weight = theirs.get_parameter(f"{name}.weight")
        assert torch.equal(rows, weight if name == "q_proj" else expand_kv_heads(weight, 2, 4))


@pytest.mark.parametrize("name", STUDENTS)
def test_every_tensor_is_accounted_for(teacher, name):
    student, reports = StudentForCausalLM.from_teacher(teacher, name, [0], OPTIONS.get(name))
    assert sorted(reports) == [1, 2, 3]
    ours, theirs = student.model.layers[2].attn, teacher.model.layers[2].attn
    report = reports[2]
    assert sorted(report.copied + report.transformed + report.fresh) == sorted(n for n, _ in ours.named_parameters())
    if name == "mamba2_v1":  # q, k and v lie in one matrix
        return check_mamba2(ours, theirs, report)
    taken = {ours.SOURCES[name] for name in report.copied + report.transformed}
    rope = [name for name in report.dropped if "rope" in name]
    assert rope == {0.0: ["rope"], 0.25: ["the slow rope frequencies"], 1.0: []}[ours.rope_share]
    assert taken | set(report.dropped) - set(rope) == {n for n, _ in theirs.named_parameters()}
    assert not taken & set(report.dropped)
    for name in report.copied:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(ours.SOURCES[name]))
    for name in report.transformed:
        expected = expand_kv_heads(theirs.get_parameter(ours.SOURCES[name]), theirs.num_kv_heads, theirs.num_heads)
        assert torch.equal(ours.get_parameter(name), expected)
    for (name, a), (_, b) in zip(
        student.model.layers[0].named_parameters(), teacher.model.layers[0].named_parameters()
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", STUDENTS)
def test_biases_and_norms_are_kept_where_the_student_has_them(tmp_path, name):
    """A teacher with every bias: those that keep the teacher's attention take them all, and the
    layer uses them."""
    random_teacher(tmp_path, "qwen3", attention_bias=True)
    teacher = load_teacher(str(tmp_path))
    student, reports = StudentForCausalLM.from_teacher(teacher, name)
    extras = {n for n, _ in teacher.model.layers[0].attn.named_parameters() if "bias" in n or "norm" in n}
    biases = {extra for extra in extras if "bias" in extra}
    used = {"gdn_v7": biases, "fox_v1": extras, "swa_v1": extras, "lolcats_v1": extras}.get(name, set())
    kept = biases if name == "mamba2_v1" else used
    assert extras & set(reports[0].dropped) == extras - kept
    x = torch.randn(1, 5, 48)
    attn = student.model.layers[0].attn
    positions = student.model.position_embeddings(x)
    before = attn(x, position_embeddings=positions)[0]
    for extra in used:
        with torch.no_grad():
            attn.get_parameter(extra).add_(0.5 * torch.randn_like(attn.get_parameter(extra)))
        after = attn(x, position_embeddings=positions)[0]
        assert not torch.allclose(before, after), extra
        before = after


def test_gdn_v7_equals_its_formula(teacher):
    """Convolution, SiLU on q and k, RoPE in the fastest quarter, L2 norms, gated delta rule, gated
    norm: token by token in float64."""
    attn = trained(hybrid(teacher, "gdn_v7", [])).model.layers[0].attn.double()
    torch.nn.init.normal_(attn.dt_bias, -1.0)
    x = torch.randn(1, 13, 48, dtype=torch.float64)
    with torch.no_grad():
        heads, dim = attn.num_heads, attn.head_dim
        parts = []
        for n in "qkv":
            y = getattr(attn, f"{n}_proj")(x)[0]
            taps = getattr(attn, f"{n}_conv1d").weight[:, 0]
            padded = torch.cat((y.new_zeros(3, y.shape[1]), y))
            parts.append(sum(padded[i : i + 13] * taps[:, i] for i in range(4)).view(13, heads, dim))
        q = F.silu(parts[0])
        k = F.silu(parts[1])
        v = parts[2]
        angles = torch.arange(13.0)[:, None, None] * 10000.0 ** (-torch.arange(dim // 8) / (dim // 2))
        for y in (q, k):
            a = y[..., : dim // 8].clone()
            b = y[..., dim // 2 : dim // 2 + dim // 8].clone()
            y[..., : dim // 8] = a * angles.cos() - b * angles.sin()
            y[..., dim // 2 : dim // 2 + dim // 8] = b * angles.cos() + a * angles.sin()
            y /= (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        decay = torch.exp(-attn.A_log.exp() * F.softplus(attn.a_proj(x)[0] + attn.dt_bias))
        beta = attn.b_proj(x)[0].sigmoid()
        state = x.new_zeros(heads, dim, dim)
        rows = []
        for t in range(13):
            state = state * decay[t, :, None, None]
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * error)
            rows.append(torch.einsum("hkv,hk->hv", state, q[t]) * dim**-0.5)
        o = torch.stack(rows)
        o = o * (o.square().mean(-1, keepdim=True) + attn.o_norm.eps).rsqrt() * attn.o_norm.weight
        expected = attn.o_proj((o * attn.g_proj(x)[0].view_as(o).sigmoid()).flatten(1))
        cos, sin = teacher.model.position_embeddings(x)
        torch.testing.assert_close(attn(x, position_embeddings=(cos, sin))[0][0], expected, atol=1e-5, rtol=1e-5)


def test_factored_heads_start_as_the_repeated_ones(teacher):
    torch.manual_seed(0)
    whole, factored = (hybrid(teacher, name, []).model.layers[0].attn for name in ("gdn_v4", "gdn_v5"))
    shared = {k: v for k, v in whole.state_dict().items() if k.split(".")[0] not in ("k_proj", "v_proj")}
    factored.load_state_dict(shared, strict=False)
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(whole(x)[0], factored(x)[0])
    assert sum(p.numel() for p in factored.k_proj.parameters()) < 2 * whole.k_proj.weight.numel()


@pytest.mark.parametrize("name", ["swa_v1", "lolcats_v1"])
def test_a_window_as_long_as_the_text_is_the_teacher(teacher, name):
    student = StudentForCausalLM.from_teacher(teacher, name, student_options={"window_size": 21})[0].eval()
    ids = torch.randint(0, 96, (2, 23))
    with torch.no_grad():
        ours, theirs = student(ids).logits, teacher(ids).logits
    torch.testing.assert_close(ours[:, :21], theirs[:, :21], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[:, 22], theirs[:, 22], atol=1e-4)


def naive_window(attn, x, positions, real, window, sinks):
    """Softmax attention row by row and query by query, over a row's real tokens alone."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        tokens = real[row].nonzero().flatten()
        angles = [a.expand(len(x), -1, -1)[row : row + 1, tokens] for a in positions]
        q, k, v = attn.project(x[row : row + 1, tokens], angles)
        k, v = (y.repeat_interleave(attn.num_heads // attn.num_kv_heads, 2)[0] for y in (k, v))
        for i, token in enumerate(tokens.tolist()):
            seen = [j for j in range(i + 1) if j > i - window or j < sinks]
            weights = torch.einsum("hd,shd->hs", q[0, i], k[seen] * attn.head_dim**-0.5).softmax(-1)
            out[row, token] = attn.o_proj(torch.einsum("hs,shd->hd", weights, v[seen]).flatten())
    return out


@pytest.mark.parametrize("window, sinks", [(5, 3), (1, 1), (8, 0), (4, 40)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_with_sinks_equals_its_formula(monkeypatch, teacher, window, sinks, padded, packed):
    """Outputs and gradients; then a cache that is filled in parts of odd lengths, padding included. Without
    a kernel for packed rows, and with a stand-in of it."""
    if packed:
        flash_stand_in.use(monkeypatch)
    options = {"window_size": window, "sink_size": sinks}
    student = StudentForCausalLM.from_teacher(teacher, "swa_v1", [], options)[0]
    attn = student.model.layers[0].attn.double()
    length = 31
    real = torch.ones(3, length, dtype=torch.bool)
    if padded:
        real[0, :4] = real[1, :17] = real[2, 20:24] = False
    ids = (real.cumsum(1) - 1).clamp(min=0)
    positions = [angle.double() for angle in teacher.model.rotary_emb(torch.zeros(3, length, 1), ids)]
    mask = real.long() if padded else None
    results = []
    for naive in (False, True):
        x = torch.randn(3, length, 48, generator=torch.Generator().manual_seed(window), dtype=torch.double)
        x.requires_grad_()
        attn.zero_grad()
        if naive:
            out = naive_window(attn, x, positions, real, window, sinks)
        else:
            out = attn(x, mask, position_embeddings=positions)[0]
        (out * real[..., None]).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in attn.parameters()]
        results.append([out * real[..., None], x.grad * real[..., None], *gradients])
    torch.testing.assert_close(*results)
    cache = HybridCache(student.config)
    parts = []
    with torch.no_grad():
        for part in torch.arange(length).split([9, 1, 13, 1, 1, 6]):
            first, last = part[0], part[-1] + 1
            angles = [angle[:, first:last] for angle in positions]
            seen = None if mask is None else mask[:, :last]
            parts.append(attn(x[:, first:last], seen, cache, use_cache=True, position_embeddings=angles)[0])
    torch.testing.assert_close(torch.cat(parts, 1) * real[..., None], results[1][0])
    assert cache[0]["attn_state"][0].shape[1] <= window + sinks


def test_lolcats_equals_its_formula(teacher):
    attn = trained(hybrid(teacher, "lolcats_v1", [])).model.layers[0].attn
    x = torch.randn(2, 71, 48)
    positions = teacher.model.position_embeddings(x)
    with torch.no_grad():
        q, k, v = attn.project(x, positions)
        k, v = (y.repeat_interleave(2, 2) for y in (k, v))
        distance = torch.arange(71)[:, None] - torch.arange(71)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 16**-0.5
        near = scores.masked_fill((distance < 0) | (distance >= 8), -torch.inf)
        near = (near - near.amax(-1, keepdim=True)).exp() * attn.window_log_weight.exp()[:, None, None]
        far = torch.einsum("bthf,bshf->bhts", attn.q_map(q), attn.k_map(k)).masked_fill(distance < 8, 0)
        weights = (near + far) / (near + far).sum(-1, keepdim=True)
        expected = attn.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        torch.testing.assert_close(attn(x, position_embeddings=positions)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["path_v1", "path_fox_v1", "fox_v1"])
def test_softmax_students_start_near_the_teacher_without_positions(teacher, name):
    """With open gates and Householder matrices near the identity they equal the teacher's attention
    without RoPE (and q/k norms)."""
    attn = hybrid(teacher, name, []).model.layers[0].attn
    theirs = teacher.model.layers[0].attn
    x = torch.randn(2, 9, 48)
    q, k, v = (getattr(theirs, f"{n}_proj")(x).unflatten(-1, (-1, theirs.head_dim)) for n in "qkv")
    if name == "fox_v1":
        q = theirs.q_norm(q)
        k = theirs.k_norm(k)
    plain = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True, enable_gqa=True)
    plain = theirs.o_proj(plain.transpose(1, 2).flatten(2))
    assert (attn(x)[0] - plain).norm() < 0.15 * plain.norm()


@pytest.mark.parametrize("name", [n for n in STUDENTS if n in ("gdn_v3", "gdn_v4")])
def test_the_output_gate_starts_neutral(teacher, name):
    """With the gate's initial weights, the layer equals the same layer without a gate."""
    torch.manual_seed(0)
    attn = hybrid(teacher, name, []).model.layers[0].attn
    plain = {"gdn_v3": "gdn_v1", "gdn_v4": "gdn_v2"}[name]
    other = hybrid(teacher, plain, []).model.layers[0].attn
    other.load_state_dict(
        {k: v for k, v in attn.state_dict().items() if k not in ("g_proj.weight", "o_norm.weight")}
        | {"o_norm.weight": torch.ones_like(other.o_norm.weight)}
    )
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(attn(x)[0], other(x)[0])


@pytest.mark.parametrize("name", STUDENTS)
def test_causality(teacher, name):
    model = trained(hybrid(teacher, name))
    ids = torch.randint(0, 96, (2, 83))
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 96
    with torch.no_grad():
        a, b = model(ids).logits, model(changed).logits
    torch.testing.assert_close(a[:, :40], b[:, :40], atol=1e-5, rtol=1e-5)
    assert (a[:, 40:] - b[:, 40:]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("length", [1, 9, 70])
def test_prefill_and_decode_equal_the_full_forward(teacher, name, length):
    model = trained(hybrid(teacher, name))
    ids = torch.randint(1, 96, (3, length + 3))
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0  # left padding
    with torch.no_grad():
        out = model(ids[:, :length], attention_mask=mask[:, :length], use_cache=True)
        steps = [out.logits]
        for t in range(length, length + 3):
            out = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
        steps = torch.cat(steps, 1)
        full = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[:1, length // 2 :], use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(steps[real], full[real], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(full[0, length // 2 :], alone[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", STUDENTS)
def test_prefill_and_decode_in_bf16(teacher, name):
    model = trained(hybrid(teacher, name).bfloat16())
    ids = torch.randint(1, 96, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        past = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
        step = model(ids[:, 9:], attention_mask=mask, past_key_values=past, use_cache=True).logits[:, 0]
        full = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    assert step.dtype == torch.bfloat16
    assert (step - full).norm() < 0.1 * full.norm()


def test_losses_equal_the_naive_ones(teacher):
    model = hybrid(teacher)
    ids = torch.randint(0, 96, (2, 21))
    with torch.no_grad():
        logits, teacher_logits = model(ids).logits, teacher(ids).logits
        hidden = teacher.model(ids).last_hidden_state
    naive_ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    naive_kl = 4 * F.kl_div(
        (logits / 2).log_softmax(-1).flatten(0, 1),
        (teacher_logits / 2).softmax(-1).flatten(0, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(model(ids, labels=ids).loss, naive_ce)
    head = dict(teacher_hidden_states=hidden, teacher_head_weight=teacher.lm_head.weight)
    kl = model(ids, distillation=DistillationLoss(kl_temperature=2.0), **head).loss
    torch.testing.assert_close(kl, naive_kl, atol=1e-5, rtol=1e-4)
    weighted = DistillationLoss(kl_temperature=2.0, kl_weight=0.5, ce_weight=0.25)
    mixed = model(ids, labels=ids, distillation=weighted, **head).loss
    torch.testing.assert_close(mixed, 0.5 * naive_kl + 0.25 * naive_ce, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", STUDENTS)
def test_gradient_checkpointing_gives_the_same_gradients(teacher, name):
    model = trained(hybrid(teacher, name)).train()
    ids = torch.randint(0, 96, (2, 19))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in plain.values())
    model.set_activation_checkpointing("mlp")
    assert all(torch.equal(gradient, plain[key]) for key, gradient in gradients().items())
    model.set_activation_checkpointing(False)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("what, forward_passes", [(False, 1), ("mlp", 2), (True, 2)])
def test_gradient_checkpointing_recomputes_what_it_says(teacher, what, forward_passes):
    model = hybrid(teacher).train()
    ids = torch.randint(0, 96, (1, 8))
    calls = {"gate": 0, "attention": 0}
    for name, module in (
        ("gate", model.model.layers[1].mlp.gate_proj),
        ("attention", model.model.layers[1].attn),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    model.set_activation_checkpointing(what)
    model(ids, labels=ids).loss.backward()
    assert calls == {"gate": forward_passes, "attention": 2 if what is True else 1}
    with torch.no_grad():
        model(ids)
    assert calls["gate"] == forward_passes + 1


def test_restoring_all_layers_gives_the_teacher(teacher, monkeypatch):
    student = hybrid(teacher, kept=())
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.copy_(teacher.model.layers[0].mlp.up_proj.weight)
    restored = student.restore_full_attention(teacher, range(4)).eval()
    ids = torch.randint(0, 96, (1, 11))
    with torch.no_grad():
        assert torch.equal(restored(ids).logits, teacher(ids).logits)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", None)  # no weight is drawn only to be overwritten
    one = student.restore_full_attention(teacher, [2])
    assert one.config.keep_full_attention_layers == [2]
    assert student.config.keep_full_attention_layers == []


@pytest.mark.parametrize("name", STUDENTS)
def test_bf16_stays_within_its_error(teacher, name):
    model = hybrid(teacher, name, [])
    x = torch.randn(2, 70, 48)
    attn = model.model.layers[0].attn
    positions = model.model.position_embeddings(x)
    if attn.fits_gate:
        attn.open_gate(torch.randn(48))
    with torch.no_grad():
        exact = attn(x, position_embeddings=positions)[0]
        half = attn.to(torch.bfloat16)(x.bfloat16(), position_embeddings=[y.bfloat16() for y in positions])[0]
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltanet_does_not_call_the_chunked_kernel_in_fp32(teacher, monkeypatch, dtype):
    """FLA's kernel refuses fp32; its stand-in does not."""
    rules = []
    for name in ("chunk_delta_rule", "fused_recurrent_delta_rule"):
        monkeypatch.setattr(
            f"fla.layers.delta_net.{name}",
            lambda *x, name=name, **k: (rules.append(name), cpu_ops.delta_rule(*x, **k))[1],
        )
    hybrid(teacher, "deltanet_v1", [0, 1, 2]).to(dtype)(torch.randint(0, 96, (1, 70)))
    assert rules == ["fused_recurrent_delta_rule" if dtype == torch.float32 else "chunk_delta_rule"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STUDENTS)
def test_save_and_load_change_nothing(teacher, tmp_path, name, dtype):
    model = trained(hybrid(teacher, name).to(dtype))
    model.save_pretrained(tmp_path)
    again = StudentForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert again.lm_head.weight is again.model.embeddings.weight
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key
    assert torch.equal(model.model.rotary_emb.inv_freq, again.model.rotary_emb.inv_freq)
    assert again.config.student_options == OPTIONS.get(name, {})


ALL_OPTIONS = [(name, key) for name in STUDENTS for key in STUDENT_ATTENTION_MAP[name].options]


@pytest.mark.parametrize("name, key", ALL_OPTIONS)
def test_every_option_works(teacher, tmp_path, name, key):
    """A value other than the default, for a number the minimum or the next: it makes a difference, trains,
    decodes, and survives save and load."""
    student = STUDENT_ATTENTION_MAP[name]
    option = student.options[key]
    default = student.value_of(key, {})
    value = not default if option.kind is bool else option.minimum + (option.minimum == default)
    assert value != default
    needed = {option.needs: True} if option.needs in student.options else {}
    options = OPTIONS.get(name, {}) | needed

    def build(options):
        torch.manual_seed(1)
        return trained(StudentForCausalLM.from_teacher(teacher, name, [0, 1, 2], options)[0].eval())

    model = build(options | {key: value})
    other = build(options)
    ids = torch.randint(1, 96, (2, 70))
    with torch.no_grad():
        logits, others = model(ids).logits, other(ids).logits
        cached = model(ids[:, :9], use_cache=True)
        steps = [cached.logits]
        for t in range(9, 12):
            cached = model(ids[:, t : t + 1], past_key_values=cached.past_key_values, use_cache=True)
            steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits[:, :12], atol=2e-4, rtol=1e-3)
    if key == "chunk_size":  # it affects memory alone
        torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-4)
        assert model.model.layers[3].attn.chunk_size == value
    else:
        shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, other)]
        assert shapes[0] != shapes[1] or not torch.allclose(logits, others, atol=1e-4)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.model.layers[3].attn.parameters())
    model.save_pretrained(tmp_path)
    again = StudentForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.student_options == options | {key: value}
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("name, key", ALL_OPTIONS)
def test_every_option_is_checked(teacher, name, key):
    option = STUDENT_ATTENTION_MAP[name].options[key]
    wrong = [1, "true"] if option.kind is bool else [option.minimum - 1, option.maximum + 1, -3, True, "4", 4.5, [4]]
    for value in (*wrong, None):
        with pytest.raises(
            ValueError, match=f"student_model.options.{key}: .* must be .*; {name} takes .*{key}: "
        ) as error:
            check_student(name, {key: value}, teacher.config)
        assert "\n" not in str(error.value)
    check_student(name, {} if option.needs else {key: option.kind(option.minimum)}, teacher.config)


@pytest.mark.parametrize(
    "name, options, head_dim, message",
    [
        ("gdn_v99", {}, 16, "student_model.name: 'gdn_v99' is unknown; choose one of .*gdn_v4"),
        (
            "gdn_v4",
            {"num_slots": 3},
            16,
            "num_slots: unknown; gdn_v4 takes allow_neg_eigval: true or false$",
        ),
        (
            "gdn_v4",
            {"conv_size": 3},
            16,
            "conv_size: unknown; gdn_v4 takes",
        ),  # it has no convolution
        ("fox_v1", {"num_slots": 3}, 16, "num_slots: unknown; fox_v1 takes none"),
        (
            "gdn_v3",
            {"conv_size": 0},
            16,
            "conv_size: 0 must be an integer from 1 to 1048576; gdn_v3 takes conv_size",
        ),
        (
            "gla_v1",
            {"conv_size": 3},
            16,
            "conv_size: 3 does nothing without use_short_conv: true; set that, or leave",
        ),
        (
            "kda_v1",
            {"conv_bias": True, "use_short_conv": False},
            16,
            "conv_bias: True does nothing without use_short_conv",
        ),
        (
            "path_v1",
            {"conv_size": 2, "use_w_shortconv": False},
            16,
            "conv_size: 2 does nothing without use_w_shortconv",
        ),
        ("gsa_v1", {"num_slots": 8}, 16, "num_slots: 8 must be an integer from 9 to 1048576"),
        (
            "mamba2_v1",
            {"conv_kernel": 10**12},
            16,
            "conv_kernel: 1000000000000 must be an integer from 1 to",
        ),
        (
            "path_v1",
            {},
            96,
            "path_v1 takes heads of size 16, 32, 64, 128, the teacher's have 96; choose another student",
        ),
        ("gdn_v4", {}, 512, "gdn_v4 takes heads of size 9 to 256, the teacher's have 512"),
        ("rwkv7_v1", {}, 8, "rwkv7_v1 takes heads of size 9 to 256, the teacher's have 8"),
    ],
)
def test_bad_students_are_refused(teacher, name, options, head_dim, message):
    config = copy.deepcopy(teacher.config)
    config.head_dim = head_dim
    with pytest.raises(ValueError, match=message) as error:
        check_student(name, options, config)
    assert "\n" not in str(error.value)


def test_good_students_pass(teacher):
    check_student("gla_v1", {"conv_size": 3, "use_short_conv": True}, teacher.config)
    check_student("kda_v1", {"conv_size": 3}, teacher.config)
    check_student("swa_v1", {"window_size": 1}, StudentConfig(head_dim=512))


def test_a_student_checks_its_options_before_it_is_built(teacher):
    with pytest.raises(ValueError, match="num_slots: unknown"):
        StudentForCausalLM.from_teacher(teacher, "gdn_v4", student_options={"num_slots": 3})


def documented_options():
    """Student -> options, of the two tables of docs/students.md. That of Gated DeltaNet says which
    variants have a short convolution and its options."""
    text = (ROOT / "docs" / "students.md").read_text()
    gated_deltanet = re.search(
        r"^\| `gdn_v1` \.\.\. `gdn_v8` \|.*\| `(.*)`; where there is a short convolution, `(.*)` \|", text, re.MULTILINE
    )
    common, of_convolution = (set(cell.split()) for cell in gated_deltanet.groups())
    listed = {}
    for name, has_convolution in re.findall(r"^\| `(gdn_v\d)` \| (yes|no) \|", text, re.MULTILINE):
        listed[name] = common | of_convolution if has_convolution == "yes" else common
    rows = re.findall(r"^\| (`(?!gdn)\w+_v\d`[^|]*) \|[^|]*\| (none|`[a-z_ ]+`) \|[^|]*\|$", text, re.MULTILINE)
    for names, cell in rows:
        options = set() if cell == "none" else set(cell.strip("`").split())
        listed |= {name: options for name in re.findall(r"`(\w+)`", names)}
    return listed


def test_the_documentation_lists_every_student_and_option():
    assert documented_options() == {name: set(STUDENT_ATTENTION_MAP[name].options) for name in STUDENTS}


@pytest.mark.parametrize("hidden, heads, head_dim", [(448, 61, 64), (704, 15, 64), (5120, 64, 128)])
def test_mamba2_is_as_wide_as_the_heads(hidden, heads, head_dim):
    """448 x (3904 / 448) is less than 3904 in floating point."""
    config = StudentConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=1, head_dim=head_dim)
    with torch.device("meta"):
        assert STUDENT_ATTENTION_MAP["mamba2_v1"](config, 0).intermediate_size == heads * head_dim


@pytest.mark.parametrize("kept", [[4], [-1], [1, 1]])
def test_bad_kept_layers_are_refused(kept):
    with pytest.raises(ValueError, match="keep_full_attention_layers"):
        StudentConfig(num_hidden_layers=4, student_name="gdn_v4", keep_full_attention_layers=kept)


def test_linear_layers_need_a_student_name():
    with pytest.raises(ValueError, match="student_name"):
        StudentConfig(num_hidden_layers=4, keep_full_attention_layers=[0])


@pytest.mark.parametrize("length", [2, 67])
def test_mamba2_is_that_of_fla(length):
    """Its scan by the kernels of gated linear attention against FLA's layer in plain PyTorch, with
    all gradients."""
    torch.manual_seed(length)
    config = StudentConfig(
        hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16, num_hidden_layers=1
    )
    layer = STUDENT_ATTENTION_MAP["mamba2_v1"](config, 0)
    layer.init_fresh()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    x = torch.randn(2, length, 48)
    d_output = torch.randn(2, length, 48)

    def run(forward):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        output = forward(leaves[0])[0]
        return [output.detach(), *torch.autograd.grad(output, leaves, d_output)]

    for ours, theirs in zip(run(layer), run(partial(Mamba2.forward, layer)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

"""Decoding one token of all layers: each kernel's reference implementation against a formula in
float64 (the kernels themselves run in test_losses.py's interpreter), and whole models, modified
parts included, against their full forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_teacher
from test_model import STUDENTS, hybrid, trained
from torch import nn

from convert import load_teacher
from distill_model import (
    STUDENT_ATTENTION_MAP,
    StudentConfig,
    StudentForCausalLM,
    decode_step,
    get_student_attention_class,
)
from distill_model.cache import StaticCache
from distill_model.decode_kernels import gated_delta_token, place_token, swiglu_rows
from distill_model.decode_step import (
    GraphedDecoder,
    add_linear_,
    can_fuse_block,
    fused_parameters,
    input_projections,
    join_parameters,
    project,
)

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
GDN = [
    ("gdn_v1", 24, {"conv_size": 3, "conv_bias": True}),
    ("gdn_v2", 9, {}),
    ("gdn_v3", 33, {"allow_neg_eigval": True}),
    ("gdn_v4", 192, {}),
    ("gdn_v5", 16, {}),
    ("gdn_v6", 20, {}),
    ("gdn_v7", 20, {"conv_bias": True, "conv_size": 5}),
    ("gdn_v7", 34, {"allow_neg_eigval": True}),
    ("gdn_v8", 40, {"conv_size": 1}),
]
PLACES = [
    (6, 2, 20, True),
    (3, 3, 8, False),
    (7, 1, 80, True),
]  # heads, kv heads, their size, norms


def near(ours, theirs, limit):
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs).norm() / theirs.norm()
    assert error < limit, error


def rows(dtype, batch, *widths, device="cpu"):
    """Views of the rows of one matrix, as a fused GEMM of several projections leaves them."""
    return torch.randn(batch, sum(widths) + 3, device=device).to(dtype)[:, 3:].split(widths, -1)


def angles(dtype, batch, size, device="cpu"):
    turn = 10 * torch.rand(batch, size // 2, device=device)
    return [x.repeat(1, 2).to(dtype) for x in (turn.cos(), turn.sin())]


def rotated(x, cos, sin):
    """RoPE by multiplying complex numbers; x [heads, size], cos and sin [size]."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:]) * torch.complex(cos, sin)[:half]
    return torch.cat((z.real, z.imag), -1)


def gated_delta_naively(q, k, v, gate, a, b, attn, name, state, past, cos, sin):
    """S <- alpha S (I - beta k k^T) + beta v k^T, o = S q / sqrt(size), one head after the
    other in float64, with the options of each student name."""
    double = [x.double() for x in (q, k, v)]
    if past is not None:
        past = [torch.cat((held[..., 1:].double(), new[..., None]), -1) for held, new in zip(past, double)]
        for i, (held, convolution) in enumerate(zip(past, (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d))):
            double[i] = (held * convolution.weight.double()[:, 0]).sum(-1)
            if convolution.bias is not None:
                double[i] += convolution.bias.double()
    heads, size = state.shape[1:3]
    out = torch.empty(len(q), heads, size, dtype=torch.float64, device=q.device)
    state = state.double()
    for row in range(len(q)):
        q, k, v = (x[row].view(heads, size) for x in double)
        if name != "gdn_v6":
            q, k = q * q.sigmoid(), k * k.sigmoid()
        if name not in ("gdn_v6", "gdn_v7"):
            v = v * v.sigmoid()
        if name == "gdn_v7":
            c, s = cos[row].double(), sin[row].double()
            for channel in range(size):
                if channel % (size // 2) >= 0.25 * (size // 2):
                    c[channel], s[channel] = 1, 0
            q, k = rotated(q, c, s), rotated(k, c, s)
        for head in range(heads):
            query, key = (x[head] / (x[head] @ x[head] + 1e-6).sqrt() for x in (q, k))
            alpha = (
                -attn.A_log[head].double().exp()
                * (1 + (a[row, head].double() + attn.dt_bias[head].double()).exp()).log()
            ).exp()
            beta = b[row, head].double().sigmoid() * (2 if attn.allow_neg_eigval else 1)
            kept = torch.eye(size, device=key.device) - beta * torch.outer(key, key)
            state[row, head] = alpha * state[row, head] @ kept + beta * torch.outer(v[head], key)
            o = state[row, head] @ query / size**0.5
            if name != "gdn_v6":
                o = o / ((o * o).mean() + attn.o_norm.eps).sqrt() * attn.o_norm.weight.double()
            if gate is not None:
                g = gate[row].view(heads, size)[head].double()
                o = o * g.sigmoid() * (g if name == "gdn_v8" else 1)
            out[row, head] = o
    return out.flatten(1), state, past


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name, size, options", GDN)
def test_gated_delta_token(name, size, options, dtype, device="cpu"):
    torch.manual_seed(0)
    heads, batch = 3, 2
    config = StudentConfig(
        hidden_size=20,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=size,
        attention_bias=True,
        num_hidden_layers=1,
        keep_full_attention_layers=[],
        student_name=name,
    )
    attn = get_student_attention_class(name)(config, 0, **options).to(dtype).to(device)
    for parameter in attn.parameters():
        parameter.copy_(torch.randn_like(parameter))
    q, k, v, gate, a, b = rows(dtype, batch, *[heads * size] * 4, heads, heads, device=device)
    gate = gate if attn.use_gate else None
    state = torch.randn(batch, heads, size, size, device=device)
    past = None
    if attn.use_short_conv:
        past = tuple(torch.randn(batch, heads * size, attn.conv_size, device=device).to(dtype) for _ in range(3))
    inputs = q, k, v, gate, a, b, attn
    cos_sin = (
        angles(dtype, batch, size, device) if size % 2 == 0 else [torch.empty(batch, size, device=device).to(dtype)] * 2
    )
    expected, new_state, new_past = gated_delta_naively(*inputs, name, state, past, *cos_sin)
    out = gated_delta_token(*inputs, state, past, *cos_sin)
    assert out.dtype == dtype
    near(out, expected, LIMITS[dtype])
    near(state, new_state, 2e-5)
    for ours, theirs in zip(past or (), new_past or ()):
        assert torch.equal(ours.double(), theirs)
    in_pages(inputs, state, past, cos_sin, dtype)


def in_pages(inputs, state, past, cos_sin, dtype):
    """Another token, whose states lie in rows of larger tensors; the second sequence is a new one, on used pages."""
    device = state.device
    rows = torch.tensor([4, 1], device=device)
    has_state = torch.tensor([True, False], device=device)
    pools = []
    for x in (state, *(past or ())):
        page = torch.randn(6, 3 + x[0].numel(), device=device).to(x.dtype)
        pool = page[:, 1:-2].view(6, *x.shape[1:])
        pool[rows] = x
        pool[1], pool[1, ..., 0] = torch.nan, torch.inf  # whatever another sequence has left
        pools.append(pool)
    before = [pool.clone() for pool in pools]
    blank = [x * has_state.view(-1, *[1] * (x.ndim - 1)) for x in (state, *(past or ()))]
    past = past and tuple(blank[1:])
    expected = gated_delta_token(*inputs, blank[0], past, *cos_sin)
    out = gated_delta_token(*inputs, pools[0], past and tuple(pools[1:]), *cos_sin, (rows, has_state))
    near(out, expected.double(), LIMITS[dtype])
    for pool, old, new in zip(pools, before, blank):
        near(pool[rows], new.double(), 2e-5)
        others = [0, 2, 3, 5]
        assert torch.equal(pool[others], old[others])


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("heads, kv_heads, size, normed", PLACES)
def test_place_token(heads, kv_heads, size, normed, dtype, device="cpu"):
    torch.manual_seed(0)
    q, k, v = rows(dtype, 2, heads * size, kv_heads * size, kv_heads * size, device=device)
    cos, sin = angles(dtype, 2, size, device)
    norms = [nn.RMSNorm(size, eps=0.1).to(device, dtype) for _ in range(2)] if normed else [nn.Identity()] * 2
    buffers = torch.randn(2, 2, 9, kv_heads, size, device=device).to(dtype)
    before = buffers.clone()
    expected = []
    for x, norm in zip((q, k), norms):
        if normed:
            norm.weight.copy_(torch.randn(size))
        x = x.double().unflatten(-1, (-1, size))
        x = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double() if normed else x
        expected.append(torch.stack([rotated(*row) for row in zip(x, cos.double(), sin.double())]))
    out = place_token(q, k, v, *norms, cos, sin, *buffers, torch.tensor([5], device=device))
    assert out.dtype == dtype
    near(out, expected[0][:, None], LIMITS[dtype])
    near(buffers[0][:, 5], expected[1], LIMITS[dtype])
    assert torch.equal(buffers[1][:, 5], v.view(2, kv_heads, size))
    others = [i for i in range(9) if i != 5]
    assert torch.equal(buffers[:, :, others], before[:, :, others])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("batch, size", [(1, 7), (3, 1030)])
def test_swiglu_rows(batch, size, dtype, device="cpu"):
    gate, up = rows(dtype, batch, size, size, device=device)
    out = swiglu_rows(gate, up)
    assert out.is_contiguous()
    assert out.dtype == dtype
    near(out, F.silu(gate.double()) * up.double(), LIMITS[dtype])


# ------------------------------------------------------------------------------- fused projections
def test_joined_parameters_are_views_of_one_tensor():
    """Of any numbers of rows, with biases that some lack; again where one was moved; and not in a
    buffer that other code owns."""
    torch.manual_seed(0)
    projections = [nn.Linear(5, n, bias=bias) for n, bias in ((4, False), (1, True), (7, True))]
    for parts in ([m.weight for m in projections], [m.bias for m in projections]):
        expected = torch.cat(
            [torch.zeros(m.out_features) if p is None else p.detach().clone() for m, p in zip(projections, parts)]
        )
        whole = join_parameters(parts, [4, 1, 7])
        assert torch.equal(whole, expected)
        assert join_parameters(parts, [4, 1, 7]).data_ptr() == whole.data_ptr()
        with torch.no_grad():
            parts[1] += 1
        assert torch.equal(whole[4:5], parts[1])
        assert not torch.equal(whole, expected)
        parts[2].data = torch.full_like(parts[2], 3)
        again = join_parameters(parts, [4, 1, 7])
        assert again.data_ptr() != whole.data_ptr()
        assert torch.equal(again, torch.cat((whole[:5], parts[2])))
        assert parts[1].data_ptr() == again[4:].data_ptr()
        assert all(p.requires_grad and p.is_leaf for p in parts[1:])
        flat = torch.randn(100)
        parts[1].data = flat[10 : 10 + parts[1].numel()].view(parts[1].shape)
        assert join_parameters(parts, [4, 1, 7]) is None
        assert parts[1].data_ptr() == flat[10:].data_ptr()


def test_projections_that_cannot_be_fused_run_one_by_one():
    torch.manual_seed(0)
    x = torch.randn(2, 5)

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    def hooked(m):
        m.register_forward_hook(lambda m, _, y: y + 1)

    def overridden(m):
        m.forward = lambda x: F.linear(x, m.weight, m.bias) + 1

    projections = [nn.Linear(5, 4), nn.Linear(5, 3, bias=False)]
    with torch.no_grad():
        expected = projections[0](x), projections[1](x)
        torch.testing.assert_close(project(x, projections), expected)
        assert fused_parameters(projections) is not None
        for change in (hooked, overridden, lambda m: setattr(m, "__class__", Adapter)):
            changed = [copy.deepcopy(projections[0]), projections[1]]
            change(changed[0])
            assert fused_parameters(changed) is None
            torch.testing.assert_close(project(x, changed), (expected[0] + 1, expected[1]))
            hidden = torch.ones(2, 4)
            add_linear_(hidden, x, changed[0])
            torch.testing.assert_close(hidden, expected[0] + 2)
        assert fused_parameters([projections[0], nn.Linear(5, 3).double()]) is None
        hidden = torch.ones(2, 4)
        add_linear_(hidden, x, projections[0])
        torch.testing.assert_close(hidden, expected[0] + 1)


# ------------------------------------------------------------------------------------ whole models
STATIC = [name for name in STUDENTS if STUDENT_ATTENTION_MAP[name].supports_static_cache]
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
TEACHERS = {
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": SCALING},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for kind, options in TEACHERS.items():
        random_teacher(folder / kind, kind, **options)
    return {kind: load_teacher(str(folder / kind)) for kind in TEACHERS}


@pytest.fixture
def steps(monkeypatch):
    """The calls of `decode_token`."""
    calls = []
    decode_token = decode_step.decode_token

    def counted(*args):
        calls.append(args)
        return decode_token(*args)

    monkeypatch.setattr(decode_step, "decode_token", counted)
    return calls


def text(length=30):
    ids = torch.randint(1, 96, (3, length))
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, :7] = 0
    return ids, mask


@torch.no_grad()
def check_tokens(model, start=12, limit=5e-5):
    """Tokens one by one, a batch padded on the left, against the full forward. Returns the last
    logits."""
    torch.manual_seed(0)
    ids, mask = text()
    full = model(ids, attention_mask=mask, use_cache=False).logits
    cache = StaticCache(model.config, ids.shape[1])
    model(ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
    for at in range(start, ids.shape[1]):
        logits = model(ids[:, at, None], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        assert logits.shape == (3, 1, 96)
        error = (logits[:, 0] - full[:, at]).abs().max() / full[:, at].abs().max()
        assert error < limit, (at, error)
    return logits


@pytest.mark.parametrize("name", [*TEACHERS, *STATIC])
def test_tokens_equal_the_full_forward(teachers, steps, name):
    check_tokens(teachers[name] if name in TEACHERS else trained(hybrid(teachers["qwen3"], name)))
    assert len(steps) == 18


@pytest.mark.parametrize("name", ["gdn_v7", "gdn_v5", "mamba2_v1"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_tokens_of_a_hybrid_with_biases(teachers, steps, kind, name):
    check_tokens(trained(hybrid(teachers[kind], name)))
    assert len(steps) == 18


def test_tokens_of_another_activation(steps):
    torch.manual_seed(0)
    config = StudentConfig(
        vocab_size=96,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        hidden_act="gelu",
        initializer_range=0.2,
    )
    check_tokens(StudentForCausalLM(config).eval())
    assert len(steps) == 18


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("kind, name", [("qwen3", "gdn_v4"), ("qwen2", "gdn_v7"), ("llama", "gdn_v3")])
def test_weights_of_a_decoded_model(teachers, tmp_path, kind, name):
    """They take no more memory than before, are saved completely, stay tied, can be copied, and are
    joined again after they were moved."""
    model = trained(hybrid(teachers[kind], name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    size = sum(storages(model).values())
    logits = check_tokens(model)
    for attn in (block.attn for block in model.model.layers):
        assert len({m.weight.untyped_storage().data_ptr() for m in decode_step.input_projections(attn)}) == 1
    zeros = sum(
        len(m.weight)
        for b in model.model.layers
        for m in decode_step.input_projections(b.attn)
        if m.bias is None and b.attn.q_proj.bias is not None
    )
    assert sum(storages(model).values()) == size + 4 * zeros
    places = storages(model)
    check_tokens(model)
    assert storages(model) == places
    model.save_pretrained(tmp_path)
    again = StudentForCausalLM.from_pretrained(tmp_path).eval()
    for state in (model.state_dict(), again.state_dict(), copy.deepcopy(model).state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)
    for loaded in (model, again):
        assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == (kind == "qwen3")
    torch.testing.assert_close(check_tokens(again), logits)
    model.double().float()
    assert len(storages(model)) == len([*model.parameters()]) > len(places)
    torch.testing.assert_close(check_tokens(model), logits)
    again.model.layers[0].attn.k_proj.weight.data = torch.zeros_like(again.model.layers[0].attn.k_proj.weight)
    assert (check_tokens(again) - logits).norm() > 1e-3 * logits.norm()


def test_training_after_decoding(teachers, monkeypatch):
    """Also after decoding in inference mode; what is decoded then is the new model's, in the same
    cache too."""
    model = trained(hybrid(teachers["qwen2"], "gdn_v7"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.inference_mode():
        before = check_tokens(model)
    ids, mask = text()
    cache = StaticCache(model.config, 40)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    places = storages(model)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.model.layers[1].parameters())
    optimizer.step()
    model.eval()
    same_cache = copy.deepcopy(cache)
    step = model(ids[:, 1:2], past_key_values=cache).logits
    with torch.no_grad(), monkeypatch.context() as patch:  # the same by the modules
        patch.setattr(GraphedDecoder, "can_fuse", lambda _: False)
        by_modules = model(ids[:, 1:2], past_key_values=same_cache).logits
    torch.testing.assert_close(step, by_modules, atol=1e-4, rtol=1e-4)
    assert storages(model) == places
    assert (check_tokens(model) - before).norm() > 0.01 * before.norm()


def test_weights_in_a_flat_buffer_stay_there(teachers, steps):
    """DeepSpeed keeps the weights that it trains in such a buffer: what it writes there is used."""
    model = trained(hybrid(teachers["qwen3"], "gdn_v4"))
    parameters = [*model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data = piece.view(p.shape)
    before = check_tokens(model)
    assert {*storages(model)} == {flat.untyped_storage().data_ptr()}
    assert len(steps) == 18
    flat *= 0.9
    assert (check_tokens(model) - before).norm() > 0.01 * before.norm()


class LowRank(nn.Module):
    """An adapter (Hu et al., arXiv 2106.09685) around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2)
        self.b = nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("name", ["gdn_v5", "gdn_v7", "gla_v1"])
def test_modified_parts(teachers, steps, name):
    """Adapters, hooks, and a replaced forward; a hook's tensors are not overwritten."""
    model = trained(hybrid(teachers["qwen2"], name))
    seen = []
    layers = model.model.layers
    check_tokens(model)
    layers[0].mlp.up_proj, layers[0].mlp.down_proj = (
        LowRank(layers[0].mlp.up_proj),
        LowRank(layers[0].mlp.down_proj),
    )
    layers[1].attn.k_proj, layers[0].attn.o_proj = (
        LowRank(layers[1].attn.k_proj),
        LowRank(layers[0].attn.o_proj),
    )
    changed = check_tokens(model)
    layers[2].register_forward_hook(
        lambda *args: seen.append((args[1][0], args[1][0].clone(), args[2], args[2].clone()))
    )
    layers[3].mlp.act = nn.Tanh()
    check_tokens(model)
    layers[3].mlp.forward = lambda x: x
    assert [can_fuse_block(block) for block in layers] == [True, True, False, False]
    assert (check_tokens(model) - changed).norm() > 0.01 * changed.norm()
    assert len(steps) == 4 * 18
    assert len(seen) == 2 * 20
    assert all(torch.equal(*pair) for given, kept, out, held in seen for pair in ((given, kept), (out, held)))
    model.model.register_forward_hook(lambda *_: None)
    check_tokens(model)
    assert len(steps) == 4 * 18


class Half(nn.Module):
    """A wrapper around a part that exposes its weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) / 2

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "base" else getattr(super().__getattr__("base"), name)


@pytest.mark.parametrize(
    "name, part",
    [("gdn_v7", "q_norm"), ("gdn_v7", "o_norm"), ("gdn_v4", "o_norm"), ("gdn_v5", "k_proj")],
)
def test_wrapped_parts_of_an_attention(teachers, steps, name, part):
    """A kernel would read the weight and bypass the wrapper."""
    model = trained(hybrid(teachers["qwen3"], name))
    attn = next(
        block.attn
        for block in model.model.layers
        if hasattr(block.attn, part) and not isinstance(getattr(block.attn, part), nn.Identity)
    )
    before = check_tokens(model)
    assert input_projections(attn)
    setattr(attn, part, Half(getattr(attn, part)))
    assert not input_projections(attn)
    assert (check_tokens(model) - before).norm() > 1e-4 * before.norm()
    assert len(steps) == 2 * 18


@pytest.mark.parametrize("part", ["attn_norm", "norm"])
def test_a_wrapped_norm(teachers, steps, part):
    model = copy.deepcopy(teachers["llama"])
    before = check_tokens(model)
    owner = model.model.layers[0] if part == "attn_norm" else model.model
    setattr(owner, part, Half(getattr(owner, part)))
    assert (check_tokens(model) - before).norm() > 0.01 * before.norm()
    assert len(steps) == 2 * 18


def test_a_hook_of_the_embeddings_keeps_its_tensors(teachers):
    model = copy.deepcopy(teachers["llama"])
    seen = []
    model.model.embeddings.register_forward_hook(lambda *args: seen.append((args[2], args[2].clone())))
    check_tokens(model)
    assert len(seen) > 18
    assert all(torch.equal(*pair) for pair in seen)


def test_memory_shared_by_several_processes_is_not_moved(teachers):
    """One of them may train while another decodes."""
    model = copy.deepcopy(teachers["llama"]).share_memory()
    places = [p.data_ptr() for p in model.parameters()]
    check_tokens(model)
    assert places == [p.data_ptr() for p in model.parameters()]


def test_recorded_hidden_states_do_not_slow_what_follows(teachers, steps):
    model = trained(hybrid(teachers["qwen3"], "gdn_v4"))
    model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    check_tokens(model)
    assert len(steps) == 18
    assert all(map(can_fuse_block, model.model.layers))


def test_autocast(teachers, steps):
    """It casts at every module, so that the modules run."""
    with torch.autocast("cpu", torch.bfloat16):
        check_tokens(teachers["llama"], limit=0.1)
    assert not steps

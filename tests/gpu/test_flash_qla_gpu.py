"""On a GPU of the Hopper generation with flash-qla: the gated delta rule by FlashQLA, called as
Gated DeltaNet's layers call it, against a recurrence in float64, and layers and training steps
through it against the same through Triton's kernels."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from fla.layers import gated_deltanet

from cuda_graphs import EAGER_CALLS, GraphedForward
from distill_model import StudentConfig, StudentForCausalLM
from distill_model.student_deltanet import FlashQLAWithGates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("flash_qla") is None, reason="needs flash-qla"),
]
SIZE = 128
# [B, T, heads]: one sequence, which is split where that fills the GPU, and several.
SHAPES = [(2, 63, 12), (3, 257, 12), (1, 1537, 12), (2, 130, 16), (2, 65, 32)]


@pytest.fixture(autouse=True)
def _chosen(monkeypatch):
    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    if not FlashQLAWithGates.is_available():
        pytest.skip("needs a GPU of the Hopper generation and nvcc")


def inputs(batch, length, heads, with_state):
    """Leaves: q, k, v, the logits of gate and beta, A_log, dt_bias, and the initial state."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(batch, length, heads, SIZE).bfloat16() for _ in range(3))
    gate, beta = (torch.randn(batch, length, heads).bfloat16() for _ in range(2))
    A_log = torch.rand(heads).mul(16).log()
    dt_bias = torch.randn(heads) - 4
    state = [0.3 * torch.randn(batch, heads, SIZE, SIZE)] if with_state else []
    return [x.cuda().requires_grad_() for x in (q, k, v, gate, beta, A_log, dt_bias, *state)]


def recurrence(q, k, v, gate, beta, A_log, dt_bias, state=None, beta_scale=1.0):
    """Output [B, T, heads, 128] and final state [B, heads, V, K], a step per token."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    decay = (-A_log.exp() * F.softplus(gate + dt_bias)).exp()[..., None, None]
    beta = (beta_scale * beta.sigmoid())[..., None]
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], SIZE, SIZE)
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t]
        new = (v[:, t] - (state @ k[:, t, :, :, None])[..., 0]) * beta[:, t]
        state = state + new[..., None] * k[:, t, :, None]
        outputs.append((state @ q[:, t, :, :, None])[..., 0] * SIZE**-0.5)
    return torch.stack(outputs, 1), state


def operator(q, k, v, gate, beta, A_log, dt_bias, state=None, **options):
    """FLA's operator as Gated DeltaNet calls it."""
    return gated_deltanet.chunk_gated_delta_rule(
        q=q,
        k=k,
        v=v,
        g=gate,
        beta=beta,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=state,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        state_v_first=True,
        **options,
    )


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def run(function, leaves, output_final_state):
    """The outputs, and the gradients of all leaves for fixed random gradients of the outputs."""
    outputs = [x for x in function(*leaves) if x is not None][: 1 + output_final_state]
    torch.manual_seed(1)
    d_outputs = [torch.randn(x.shape, device="cuda", dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, d_outputs)]


def triton_results(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setenv("FLA_FLASH_QLA", "0")
        return run(*arguments)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch, length, heads", SHAPES)
def test_outputs_and_gradients(monkeypatch, batch, length, heads, with_state):
    leaves = inputs(batch, length, heads, with_state)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = run(recurrence, exact, with_state)

    def fused(*leaves):
        return operator(*leaves, output_final_state=with_state)

    assert FlashQLAWithGates().chunk_gated_delta_rule_verifier(*leaves[:5], use_gate_in_kernel=True)[0]
    ours = [relative_error(a, b) for a, b in zip(run(fused, leaves, with_state), expected, strict=True)]
    others = triton_results(monkeypatch, fused, leaves, with_state)
    theirs = [relative_error(a, b) for a, b in zip(others, expected, strict=True)]
    assert ours != theirs, "both ran the same kernels"
    assert max(ours) < 2e-2, (ours, theirs)
    for error, reference in zip(ours, theirs):
        assert error < 1.5 * reference + 1e-3, (ours, theirs)


@pytest.mark.parametrize("batch, length", [(1, 1537), (2, 257)])
def test_prefill_and_negative_eigenvalues(batch, length):
    leaves = [x.detach() for x in inputs(batch, length, 12, True)]
    expected = recurrence(*(x.double() for x in leaves), beta_scale=2.0)
    found = operator(*leaves, allow_neg_eigval=True, output_final_state=True)
    assert max(map(relative_error, found, expected)) < 1e-2


def test_what_flash_qla_does_not_support_runs_in_triton():
    q, k, v, gate, beta, A_log, dt_bias = inputs(2, 65, 2, False)
    packed = torch.tensor([0, 65], device="cuda")
    backend = FlashQLAWithGates()
    for leaves, options in (
        ((q[..., :64], k[..., :64], v[..., :64]), {}),
        ((q.float(), k.float(), v.float()), {}),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": packed}),
    ):
        assert not backend.verify("chunk_gated_delta_rule", *leaves, gate, beta, **options)[0]
    operator(q[..., :64], k[..., :64], v[..., :64], gate, beta, A_log, dt_bias)


def model_of(student):
    config = StudentConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=SIZE,
        student_name=student,
        keep_full_attention_layers=[1],
    )
    torch.manual_seed(0)
    return StudentForCausalLM._from_config(config, dtype=torch.bfloat16).cuda().train()


def loss_and_gradients(model, forward, ids):
    loss = forward(input_ids=ids, labels=ids, use_cache=False)["loss"]
    loss.backward()
    gradients = [p.grad.flatten().clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("student", ["gdn_v4", "gdn_v7"])
def test_models_agree_with_triton(monkeypatch, student):
    model = model_of(student)
    ids = torch.randint(0, 512, (2, 193), device="cuda")
    loss, gradients = loss_and_gradients(model, model, ids)
    with monkeypatch.context() as patch:
        patch.setenv("FLA_FLASH_QLA", "0")
        expected_loss, expected_gradients = loss_and_gradients(model, model, ids)
    assert not torch.equal(gradients, expected_gradients), "both ran the same kernels"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    assert relative_error(gradients, expected_gradients.double()) < 3e-2


@pytest.mark.parametrize("batch, length", [(2, 193), (1, 2048)])
def test_cuda_graphs_replay_it_to_the_bit(batch, length):
    model = model_of("gdn_v4")
    torch.manual_seed(2)
    batches = torch.randint(0, 512, (EAGER_CALLS + 3, batch, length), device="cuda")
    expected = [loss_and_gradients(model, model, ids) for ids in batches]
    graphed = GraphedForward(model)
    for ids, (loss, gradients) in zip(batches, expected):
        found = loss_and_gradients(model, graphed, ids)
        assert torch.equal(found[0], loss) and torch.equal(found[1], gradients)
    assert graphed.forward_graph is not None

"""The chunked losses against the naive ones in float64: value and every gradient; and all Triton
kernels of the project in Triton's interpreter (`python tests/test_losses.py`, a process of its
own)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from distill_model import divergences, losses
from distill_model.divergences import top_tokens
from distill_model.losses import alignment_loss, divergence, forward_kl, linear_cross_entropy, token_kl, top_token_kl

N, V, H, H_TEACHER = 37, 53, 12, 20


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def double(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def compare(loss, naive, tensors, references, scale=3.0):
    torch.testing.assert_close(loss.double(), naive, rtol=1e-5, atol=1e-6)
    (loss * scale).backward()
    (naive * scale).backward()
    for tensor, reference in zip(tensors, references):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("ignored", [0, 5, N])
def test_linear_cross_entropy(chunk_size, ignored):
    hidden, weight = leaves((N, H), (V, H))
    labels = torch.randint(0, V, (N,))
    labels[torch.randperm(N)[:ignored]] = -100
    h, w = double(hidden, weight)
    naive = F.cross_entropy(h @ w.T, labels, reduction="sum") / max(1, N - ignored)
    compare(linear_cross_entropy(hidden, weight, labels, chunk_size), naive, [hidden, weight], [h, w])


@pytest.mark.parametrize("chunk_size", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl(chunk_size, temperature):
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    h, w, th, tw = double(hidden, weight, teacher_hidden, teacher_weight)
    student, teacher = ((a @ b.T / temperature).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    naive = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    loss = forward_kl(hidden, teacher_hidden, weight, teacher_weight, temperature, chunk_size)
    compare(loss, naive, [hidden, weight], [h, w])
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None


@pytest.mark.parametrize("chunk_size", [8, 1000])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_forward_kl_over_some_rows(chunk_size, count):
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    h, w, th, tw = double(hidden, weight, teacher_hidden, teacher_weight)
    rows = torch.randperm(N)[:count]
    learned = torch.zeros(N, dtype=torch.bool)
    learned[rows] = True
    student, teacher = ((a[rows] @ b.T / 2.5).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    naive = 2.5**2 * (teacher.exp() * (teacher - student)).sum() / max(1, count)
    args = (hidden, teacher_hidden, weight, teacher_weight, 2.5, chunk_size)
    loss = divergence("forward", *args, learned=learned)
    compare(loss, naive, [hidden, weight], [h, w])


def naive_divergence(kind, student, teacher, k):
    """Of log-probabilities [N, V] in float64, by the definition."""
    q, p = student.exp(), teacher.exp()
    if kind == "reverse":
        return (q * (student - teacher)).sum(-1)
    if kind == "jsd":
        log_m = ((p + q) / 2).log()
        return ((p * (teacher - log_m)).sum(-1) + (q * (student - log_m)).sum(-1)) / 2
    ids = teacher.topk(k, -1).indices
    p_k, q_k = p.gather(-1, ids), q.gather(-1, ids)
    kl = (p_k * (p_k / q_k).log()).sum(-1)
    if k == V:
        return kl
    p_rest, q_rest = 1 - p_k.sum(-1), 1 - q_k.sum(-1)
    return kl + p_rest * (p_rest / q_rest).log()


@pytest.mark.parametrize("chunk_size", [1, 8, 37])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind, k", [("reverse", 0), ("jsd", 0), ("topk", 1), ("topk", 7), ("topk", V)])
@pytest.mark.parametrize("masked", [False, True])
def test_divergences(chunk_size, temperature, kind, k, masked):
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    h, w, th, tw = double(hidden, weight, teacher_hidden, teacher_weight)
    student, teacher = ((a @ b.T / temperature).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    learned = torch.rand(N) < 0.5 if masked else None
    naive = naive_divergence(kind, student, teacher, k)
    naive = temperature**2 * (naive[learned] if masked else naive).mean()
    args = (hidden, teacher_hidden, weight, teacher_weight, temperature, chunk_size)
    loss = divergence(kind, *args, learned=learned, top_k=k)
    compare(loss, naive, [hidden, weight], [h, w])
    assert teacher_hidden.grad is None and teacher_weight.grad is None


@pytest.mark.parametrize("kind", ["reverse", "jsd", "topk"])
def test_divergences_of_extreme_logits_are_finite(kind):
    """Probabilities that are 0 in fp32, on either side."""
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    with torch.no_grad():
        hidden.mul_(100)
    loss = divergence(kind, hidden, 100 * teacher_hidden, weight, teacher_weight, chunk_size=8, top_k=3)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_the_whole_vocabulary_as_top_tokens_is_forward_kl():
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    args = (hidden, teacher_hidden, weight, teacher_weight, 1.5)
    torch.testing.assert_close(divergence("topk", *args, top_k=V), forward_kl(*args))
    fewer = [divergence("topk", *args, top_k=k).item() for k in (1, 4, 16, 48)]
    assert fewer == sorted(fewer) and fewer[-1] <= forward_kl(*args).item()


def test_stored_top_tokens_give_the_live_loss():
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    live = divergence("topk", hidden, teacher_hidden, weight, teacher_weight, 2.0, top_k=9)
    stored = top_tokens((teacher_hidden @ teacher_weight.mT).detach(), 9, 2.0)
    torch.testing.assert_close(top_token_kl(hidden, weight, stored, 2.0, chunk_size=5), live)


def test_an_unknown_divergence_is_refused():
    args = leaves((N, H), (N, H), (V, H), (V, H))
    with pytest.raises(ValueError, match="train.kl: 'forwards' is unknown; choose forward, reverse, jsd, topk"):
        divergence("forwards", *args)


@pytest.mark.parametrize("chunk_size", [8, 1000])
def test_forward_kl_of_weighted_rows(chunk_size):
    """The sum of weight x KL, also where rows have no weight."""
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    row_weights = torch.rand(N) * (torch.arange(N) % 3 > 0)
    h, w, th, tw = double(hidden, weight, teacher_hidden, teacher_weight)
    student, teacher = ((a @ b.T / 2.5).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    naive = 2.5**2 * ((teacher.exp() * (teacher - student)).sum(-1) * row_weights.double()).sum()
    loss = forward_kl(hidden, teacher_hidden, weight, teacher_weight, 2.5, chunk_size, row_weights)
    compare(loss, naive, [hidden, weight], [h, w])


def test_gradients_accumulate_over_micro_batches():
    """Two half batches with half the weight give the gradient of the whole batch."""
    hidden, weight, teacher_hidden, teacher_weight = leaves((N - 1, H), (V, H), (N - 1, H_TEACHER), (V, H_TEACHER))
    forward_kl(hidden, teacher_hidden, weight, teacher_weight, chunk_size=7).backward()
    whole = weight.grad
    weight.grad = None
    for part in (slice(0, 18), slice(18, 36)):
        (forward_kl(hidden[part], teacher_hidden[part], weight, teacher_weight, chunk_size=7) / 2).backward()
    torch.testing.assert_close(weight.grad, whole)


def test_only_two_chunks_of_logits_are_in_memory(monkeypatch):
    """The teacher's and the student's, which its gradient overwrites."""
    held = []

    def fused_kl(logits, teacher, temperature, learned=None):
        held.extend(StorageWeakRef(x.untyped_storage()) for x in (logits, teacher))
        assert sum(not reference.expired() for reference in held) == 2
        return logits.sum(-1)

    monkeypatch.setattr(losses, "use_triton", lambda tensor: True)
    monkeypatch.setattr(losses, "_fused_kl", fused_kl)
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    forward_kl(hidden, teacher_hidden, weight, teacher_weight, chunk_size=7)
    token_kl(hidden, teacher_hidden, weight, teacher_weight, 7)
    assert len(held) == 2 * 2 * 6


def test_only_the_needed_gradients_are_computed():
    hidden, weight = leaves((N, H), (V, H))
    labels = torch.randint(0, V, (N,))
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    weight.grad = None
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).grad_fn is None


def test_bfloat16_stays_near_float64():
    hidden, weight, teacher_hidden, teacher_weight = leaves((N, H), (V, H), (N, H_TEACHER), (V, H_TEACHER))
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    h, w, th, tw = double(*low, teacher_hidden.bfloat16(), teacher_weight.bfloat16())
    loss = forward_kl(low[0], th.bfloat16(), low[1], tw.bfloat16(), chunk_size=8)
    naive = ((p := (th @ tw.T).log_softmax(-1)).exp() * (p - (h @ w.T).log_softmax(-1))).sum(-1).mean()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - naive.item()) < 0.01 * naive.item()
    loss.backward()
    naive.backward()
    for a, b in zip(low, (h, w)):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.double() - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_token_kl(chunk_size):
    """Its mean is forward_kl's; each of its tokens the naive one."""
    hidden, weights = torch.randn(2, 7, 16), torch.randn(2, 53, 16)
    theirs, ours = ((h.double() @ w.double().T).log_softmax(-1) for h, w in zip(hidden, weights))
    got = token_kl(hidden[1], hidden[0], weights[1], weights[0], chunk_size)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), (theirs.exp() * (theirs - ours)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean(), forward_kl(hidden[1], hidden[0], weights[1], weights[0]))


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="53 and 54"):
        forward_kl(torch.randn(3, 4), torch.randn(3, 4), torch.randn(53, 4), torch.randn(54, 4))
    with pytest.raises(ValueError, match="53 and 54"):
        token_kl(torch.randn(3, 4), torch.randn(3, 4), torch.randn(53, 4), torch.randn(54, 4))


def test_without_gradients_none_are_computed(monkeypatch):
    monkeypatch.setattr(losses, "accumulate", lambda *_: pytest.fail("a gradient"))
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(53, 4, requires_grad=True)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, torch.arange(5)) > 0
        assert forward_kl(hidden, hidden + 1, weight, weight) > 0


def test_alignment_loss():
    a = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    b = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    squared = (a.double() - b.double()).square()
    torch.testing.assert_close(alignment_loss(a, b).double(), squared.mean(), rtol=1e-5, atol=0)
    l2 = (squared.sum(-1).sqrt() / 4).mean()
    torch.testing.assert_close(alignment_loss(a, b, "l2").double(), l2, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="alignment_loss: 'huber'"):
        alignment_loss(a, b, "huber")


def test_triton_kernels_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_fused_kl(rows, vocabulary, temperature=1.0, spread=3.0, padding=0):
    """The kernel's KL of each row and its gradient, alone, against float64. padding: the last columns,
    where the teacher's probability is 0 and the logits of every second row are equal and low too."""
    student, teacher = spread * torch.randn(2, rows, vocabulary)
    if padding:
        teacher[:, -padding:] = -1e4
        student[::2, -padding:] = -1e4
    ours, theirs = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    loss = losses._fused_kl(student, teacher, temperature)
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.double(), ours.exp() - theirs.exp(), rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    import test_decode_step
    import test_fp8
    import test_fused_ops

    from distill_model import decode_kernels, fp8, fused_ops

    for module in (losses, fused_ops, decode_kernels, fp8):
        module.use_triton = lambda tensor: True
    check_fused_kl(3, 9001)  # blocks of the real size
    losses.BLOCK = losses.KL_BLOCK = divergences.BLOCK = fused_ops.BLOCK = 16  # 53 entries are three blocks and a part
    for vocabulary in (1, 7, 8, 16, 17, 131):
        check_fused_kl(5, vocabulary, temperature=0.7)
    check_fused_kl(1, 53, temperature=4.0, spread=60.0)
    check_fused_kl(4, 64, padding=21)
    for shape in test_fused_ops.SHAPES:
        test_fused_ops.test_swiglu(shape)
        test_fused_ops.test_mean_squared_error(shape)
    for checkpointed in (False, True):
        test_fused_ops.test_project_swiglu(checkpointed)
    for size in (7, N):
        test_linear_cross_entropy(size, 5)
        test_forward_kl(size, 2.5)
    test_forward_kl_over_some_rows(8, 20)
    for kind, k in (("reverse", 0), ("jsd", 0), ("topk", 7), ("topk", V)):
        test_divergences(8, 2.5, kind, k, masked=True)
    for kind in ("reverse", "jsd", "topk"):
        test_divergences_of_extreme_logits_are_finite(kind)
    test_fused_ops.test_rotate(1)
    test_fused_ops.test_rotate(2)
    test_fused_ops.test_scaled()
    fused_ops.PROCESSORS, fused_ops.NORM_WARPS = (
        3,
        1,
    )  # three programs, of which each has several of the 10 rows, and not equally many
    for shape in test_fused_ops.SHAPES:
        test_fused_ops.test_rms_norm(shape)
    test_fused_ops.test_rms_norm_of_the_rounded_sum()
    for length in (1, 300):
        test_fused_ops.test_decode_attention(length)
    test_fp8.test_representable_values_are_kept()
    for dtype in test_decode_step.LIMITS:
        for case in test_decode_step.GDN:
            test_decode_step.test_gated_delta_token(*case, dtype)
        for case in test_decode_step.PLACES:
            test_decode_step.test_place_token(*case, dtype)
        for case in ((1, 7), (3, 1030)):
            test_decode_step.test_swiglu_rows(*case, dtype)
    test_token_kl(None)
    test_token_kl(3)
    test_linear_cross_entropy(8, N)
    test_gradients_accumulate_over_micro_batches()
    test_only_the_needed_gradients_are_computed()

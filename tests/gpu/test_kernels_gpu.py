"""On a GPU: the project's Triton kernels in fp32 and bf16 against naive losses and operations in
float64."""

import pytest
import test_decode_step
import torch
import torch.nn.functional as F
from test_fused_ops import attend_naively
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill_model.fused_ops import decode_attention, mean_squared_error, rms_norm, rotate, swiglu
from distill_model.losses import forward_kl, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def tensors(dtype, *shapes):
    """Leaves on the GPU, whose dot products have the size of logits, and the same in float64."""
    given = [
        torch.randn(shape, device="cuda", dtype=dtype).mul_(shape[-1] ** -0.25 * 1.5).requires_grad_()
        for shape in shapes
    ]
    return given, [t.detach().double().requires_grad_() for t in given]


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def gradient_errors(given, references):
    return [relative_error(a.grad, b.grad) for a, b in zip(given, references)]


def check(loss, naive, given, references, limit):
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    (3 * naive).backward()
    errors = [relative_error(loss, naive), *gradient_errors(given, references)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("vocab", [53, 4096, 151_936])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_forward_kl(dtype, vocab, chunk_size):
    given, (h, w, th, tw) = tensors(dtype, (257, 64), (vocab, 64), (257, 96), (vocab, 96))
    student, teacher = ((a @ b.T / 1.5).log_softmax(-1) for a, b in ((h, w), (th, tw)))
    naive = 1.5**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    loss = forward_kl(given[0], given[2], given[1], given[3], 1.5, chunk_size)
    check(loss, naive, given[:2], (h, w), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("vocab", [53, 4096, 151_936])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_linear_cross_entropy(dtype, vocab, chunk_size):
    given, (h, w) = tensors(dtype, (257, 64), (vocab, 64))
    labels = torch.randint(0, vocab, (257,), device="cuda")
    labels[::5] = -100
    check(
        linear_cross_entropy(*given, labels, chunk_size),
        F.cross_entropy(h @ w.T, labels),
        given,
        (h, w),
        LIMITS[dtype],
    )


def check_step(out, expected, given, references, limit):
    weight = torch.randn(expected.shape, device="cuda", dtype=torch.float64)
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    errors = [relative_error(out, expected), *gradient_errors(given, references)]
    assert max(errors) < limit, errors


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 131, 12, 128), (3, 5, 7, 20)])
def test_element_wise_operations(dtype, shape):
    given, double = tensors(dtype, shape, shape)
    check_step(swiglu(*given), F.silu(double[0]) * double[1], given, double, LIMITS[dtype] / 2)
    given, double = tensors(dtype, shape, shape)
    loss = mean_squared_error(*given)
    expected = F.mse_loss(double[0], double[1].detach())
    check(loss, expected, given[:1], double[:1], LIMITS[dtype] / 2)
    for batch in (1, shape[0]):
        given, double = tensors(dtype, shape)
        angles = (10 * torch.rand(batch, shape[1], shape[3] // 2, device="cuda")).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected = apply_rotary_pos_emb(double[0], double[0], cos.double(), sin.double(), unsqueeze_dim=2)[0]
        check_step(rotate(given[0], cos, sin), expected, given, double, LIMITS[dtype] / 2)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1031, 1536), (2, 5, 8192), (16, 3584)])
def test_rms_norm(dtype, shape):
    given, (x, branch, weight) = tensors(dtype, shape, shape, shape[-1:])
    for total in (x, x + branch):
        expected = weight * total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if total is x:
            check_step(
                rms_norm(given[0], given[2], 1e-6),
                expected,
                given[::2],
                (x, weight),
                LIMITS[dtype] / 2,
            )
        else:
            out, kept = rms_norm(given[0], given[2], 1e-6, given[1])
            check_step(
                torch.stack((out, kept)),
                torch.stack((expected, total)),
                given,
                (x, branch, weight),
                LIMITS[dtype] / 2,
            )
        for tensor in (*given, x, branch, weight):
            tensor.grad = None


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("heads, kv_heads, size", [(12, 2, 128), (14, 2, 64), (32, 8, 80), (4, 4, 256)])
def test_decode_attention(dtype, heads, kv_heads, size):
    for batch, length in ((1, 1), (1, 20_000), (5, 777)):
        q = torch.randn(batch, 1, heads, size, device="cuda", dtype=dtype)
        k, v = torch.randn(2, batch, length + 100, kv_heads, size, device="cuda", dtype=dtype)
        first = torch.arange(batch, device="cuda") * (length // 5)
        last = torch.tensor([length - 1], device="cuda")
        out = decode_attention(q, k, v, first, last)
        expected = attend_naively(q, k, v, first, last)
        assert (out.double() - expected).norm() < LIMITS[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", LIMITS)
def test_kernels_of_a_decoded_token(dtype):
    """The cases of test_decode_step.py, and sizes of published teachers: one block of the state and
    several, with all options of a kernel."""
    options = {"conv_bias": True, "allow_neg_eigval": True}
    published = [
        (name, size, options if name in ("gdn_v3", "gdn_v7") else {})
        for name in ("gdn_v3", "gdn_v4", "gdn_v7")
        for size in (64, 80, 128, 256)
    ]
    for case in (*test_decode_step.GDN, *published):
        test_decode_step.test_gated_delta_token(*case, dtype, device="cuda")
    for case in (
        *test_decode_step.PLACES,
        (12, 2, 128, False),
        (32, 8, 128, True),
        (14, 2, 64, False),
    ):
        test_decode_step.test_place_token(*case, dtype, device="cuda")
    for case in ((1, 7), (3, 1030), (16, 8960)):
        test_decode_step.test_swiglu_rows(*case, dtype, device="cuda")

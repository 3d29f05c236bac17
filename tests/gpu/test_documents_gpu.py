"""On a GPU: packed documents through FLA's kernels and FlashAttention's for packed rows, against each
document alone: outputs and every gradient, for every student and the kept layers' attention; and a
changed document changes no other."""

import functools

import pytest
import torch
from test_students_gpu import CONFIG, DEVICE, LIMITS, build, error, one_config, positions, random

from distill_model import STUDENT_ATTENTION_MAP
from distill_model.attention import SoftmaxAttention
from distill_model.documents import Documents, run_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
__all__ = ["one_config"]  # a fixture: few configurations of each kernel are compiled
LENGTH = 131
# One token, odd lengths, across the kernels' chunks of 64; one that spans the row; many.
ROWS = ([1, 70, 2, 1, 57], [LENGTH], [3] * 40 + [11])
KEPT = "a kept layer"


def document_ids():
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    return torch.stack(rows).to(DEVICE)


def split(x):
    """The documents [1, length, ...] of x [B, T, ...]."""
    return [part[None] for row, lengths in zip(x, ROWS) for part in row.split(lengths)]


def layer_of(name, dtype):
    if name != KEPT:
        return build(name, dtype, DEVICE).train()
    torch.manual_seed(0)
    return SoftmaxAttention(CONFIG, 0).bfloat16().to(DEVICE, dtype)


def inputs_of(layer):
    """The input, and the gradient of the output, [B, T, hidden_size]."""
    torch.manual_seed(1)
    return [random(len(ROWS), LENGTH, CONFIG.hidden_size, like=layer.o_proj.weight) for _ in range(2)]


def read_packed(layer, x):
    documents = Documents.of(document_ids())
    return run_attention(layer, x, documents, position_embeddings=positions(x, documents.positions))


def read_alone(layer, x):
    outputs = []
    for part in split(x):
        angles = positions(part, torch.arange(part.shape[1])[None])
        outputs.append(run_attention(layer, part, position_embeddings=angles)[0])
    return torch.cat(outputs).view(x.shape)


def results(name, dtype, read):
    """Output and gradients."""
    layer = layer_of(name, dtype)
    x, d_output = inputs_of(layer)
    x.requires_grad_()
    output = read(layer, x)
    output.backward(d_output)
    gradients = {f"gradient of {key}": parameter.grad for key, parameter in layer.named_parameters()}
    found = {"output": output.detach(), "gradient of x": x.grad} | gradients
    return {key: tensor.float() for key, tensor in found.items()}


@functools.cache
def alone(name, dtype):
    return results(name, dtype, read_alone)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", [*STUDENT_ATTENTION_MAP, KEPT])
def test_packed_documents_equal_each_alone(name, dtype):
    """In bf16 the tolerance is measured: by the error of the documents alone."""
    exact = alone(name, torch.float32)
    floor, share = LIMITS[dtype]
    noise = {key: error(alone(name, dtype)[key], exact[key]) for key in exact}
    got = results(name, dtype, read_packed)
    errors = {key: (error(got[key], exact[key]), floor + share * noise[key]) for key in exact}
    wrong = {key: f"{value:.1e} > {limit:.1e}" for key, (value, limit) in errors.items() if not value <= limit}
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", [*STUDENT_ATTENTION_MAP, KEPT])
def test_a_changed_document_changes_no_other(name, dtype):
    """To the bit in the output; in the gradient of the input up to the order of sums."""
    layer = layer_of(name, dtype)
    x, d_output = inputs_of(layer)
    other = x.clone()
    groups = document_ids()
    changed = torch.zeros_like(groups, dtype=torch.bool)
    for row, document in ((0, 1), (0, 3), (2, 20)):
        changed[row] |= groups[row] == document
    other[changed] = x.flip(0)[changed]
    found = []
    for inputs in (x, other):
        inputs = inputs.detach().requires_grad_()
        output = read_packed(layer, inputs)
        output.backward(d_output)
        found.append((output.detach(), inputs.grad))
    (output, gradient), (other_output, other_gradient) = found
    assert torch.equal(output[~changed], other_output[~changed])
    assert not torch.equal(output[changed], other_output[changed])
    assert error(other_gradient[~changed].float(), gradient[~changed].float()) < LIMITS[dtype][0]

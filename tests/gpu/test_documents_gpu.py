"""On a GPU: packed documents through FLA's kernels and FlashAttention's for packed rows, against the
stand-ins on the CPU, which tests/test_documents.py compares with each document alone: outputs and
every gradient, for every student and the kept layers' attention; and a changed document changes no
other. All documents of all students are of one shape: each new one costs compilations.

In bf16, which training runs in: a document that leaks changes others by far more than rounding.
"""

import functools

import pytest
import test_students_gpu
import torch
from test_students_gpu import CONFIG, DEVICE, DRAWS, LIMITS, build, error, positions, random, stand_ins

from distill_model import DistillationLoss, StudentConfig, StudentForCausalLM
from distill_model.attention import SoftmaxAttention
from distill_model.documents import PADDING, Documents, run_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTH = 131
# One token, odd lengths, across the kernels' chunks of 64; one that spans the row; many.
ROWS = ([1, 70, 2, 1, 57], [LENGTH], [3] * 40 + [11])
KEPT = "a kept layer"
LAYERS = [*test_students_gpu.LAYERS, KEPT]


def document_ids(device=DEVICE):
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    return torch.stack(rows).to(device)


def layer_of(name, dtype, device, seed):
    if name != KEPT:
        return build(name, dtype, device, seed).train()
    torch.manual_seed(seed)
    return SoftmaxAttention(CONFIG, 0).bfloat16().to(device, dtype)


def inputs_of(layer, seed):
    """The input, and the gradient of the output, [B, T, hidden_size]."""
    torch.manual_seed(100 + seed)
    return [random(len(ROWS), LENGTH, CONFIG.hidden_size, like=layer.o_proj.weight) for _ in range(2)]


def read_packed(layer, x):
    documents = Documents.of(document_ids(x.device))
    return run_attention(layer, x, documents, position_embeddings=positions(x, documents.positions))


def draw(name, dtype, device, seed):
    """Output and gradients."""
    layer = layer_of(name, dtype, device, seed)
    x, d_output = inputs_of(layer, seed)
    x.requires_grad_()
    output = read_packed(layer, x)
    output.backward(d_output)
    gradients = {f"gradient of {key}": parameter.grad for key, parameter in layer.named_parameters()}
    return {"output": output.detach(), "gradient of x": x.grad} | gradients


def results(name, dtype, device):
    """Of all draws, stacked."""
    draws = [draw(name, dtype, device, seed) for seed in range(DRAWS)]
    return {key: torch.stack([found[key].float().cpu() for found in draws]) for key in draws[0]}


@functools.cache
def expected(name):
    """Results of the stand-ins in fp32, and their error in bf16."""
    with stand_ins():
        exact, rounded = (results(name, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    return exact, {key: error(rounded[key], exact[key]) for key in exact}


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_equal_the_stand_ins(name):
    exact, noise = expected(name)
    got = results(name, torch.bfloat16, DEVICE)
    assert got.keys() == exact.keys()
    floor, share = LIMITS[torch.bfloat16]
    errors = {key: (error(got[key], exact[key]), floor + share * noise[key]) for key in exact}
    wrong = {key: f"{value:.1e} > {limit:.1e}" for key, (value, limit) in errors.items() if not value <= limit}
    assert not wrong, wrong


@pytest.mark.parametrize("name", LAYERS)
def test_a_changed_document_changes_no_other(name):
    """To the bit in the output; in the gradient of the input up to the order of sums."""
    layer = layer_of(name, torch.bfloat16, DEVICE, 0)
    x, d_output = inputs_of(layer, 0)
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
    assert error(other_gradient[~changed].float(), gradient[~changed].float()) < LIMITS[torch.bfloat16][0]


@pytest.mark.parametrize("name", [*filter(test_students_gpu.takes_documents_in_graphs, test_students_gpu.LAYERS), KEPT])
def test_a_fixed_number_of_documents_changes_nothing_and_reads_nothing_on_the_host(name):
    """The output to the bit; gradients up to the order of sums. In the second call memory that is not
    written to holds NaN; in the third, for which all kernels are compiled, a host-device sync raises."""
    layer = layer_of(name, torch.bfloat16, DEVICE, 0)
    x, d_output = inputs_of(layer, 0)
    unchanged = x.clone()
    groups = document_ids()
    angles = positions(x, Documents.of(groups).positions)
    found = []
    for most in (None, 64, 64):
        layer.zero_grad()
        inputs = x.detach().requires_grad_()
        torch.use_deterministic_algorithms(len(found) == 1, warn_only=True)
        torch.cuda.set_sync_debug_mode("error" if len(found) == 2 else "default")
        try:
            output = run_attention(layer, inputs, Documents.of(groups, most), position_embeddings=angles)
            output.backward(d_output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(False)
        gradients = {key: parameter.grad.clone() for key, parameter in layer.named_parameters()}
        found.append((output.detach(), {"x": inputs.grad} | gradients))
    assert torch.equal(x, unchanged), "the backward pass overwrites the layer's input"
    (output, gradients), *static = found
    for other_output, other_gradients in static:
        assert torch.equal(output, other_output)
        for key, gradient in gradients.items():
            assert error(other_gradients[key].float(), gradient.float()) < LIMITS[torch.bfloat16][0], key


def distilled(dtype, device):
    """Stage 2's loss of a hybrid on documents with padding, and the gradient of its embeddings."""
    shape = {name: getattr(CONFIG, name) for name in ("hidden_size", "num_attention_heads", "head_dim")}
    shape |= {"num_key_value_heads": 1, "vocab_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(0)
    teacher = StudentForCausalLM(StudentConfig(**shape)).bfloat16().to(device, dtype)
    hybrid, _ = StudentForCausalLM.from_teacher(teacher, "gdn_v7", [1])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(random(*parameter.shape, like=parameter), alpha=0.125)
    hybrid.to(device)
    groups = document_ids("cpu")
    groups[0, -57:] = PADDING
    ids = torch.randint(0, 64, groups.shape).to(device)
    groups = groups.to(device)
    with torch.no_grad():
        hidden = teacher.model(ids, document_ids=groups).last_hidden_state
    loss = hybrid(
        input_ids=ids,
        document_ids=groups,
        teacher_hidden_states=hidden,
        teacher_head_weight=teacher.lm_head.weight,
        distillation=DistillationLoss(),
        use_cache=False,
    ).loss
    loss.backward()
    return loss.item(), hybrid.model.embeddings.weight.grad.float().cpu()


def test_a_hybrid_learns_from_packed_documents():
    with stand_ins():
        exact, exact_gradient = distilled(torch.float32, "cpu")
        rounded, rounded_gradient = distilled(torch.bfloat16, "cpu")
    loss, gradient = distilled(torch.bfloat16, DEVICE)
    floor, share = LIMITS[torch.bfloat16]
    assert abs(loss - exact) <= floor * abs(exact) + share * abs(rounded - exact)
    assert error(gradient, exact_gradient) <= floor + share * error(rounded_gradient, exact_gradient)

"""On a GPU: every student through FLA's Triton kernels against the same weights and inputs
through the stand-ins on the CPU, in fp32: output, every gradient, and decoding after left
padding.

The tolerance of a dtype is measured: by the error of the stand-ins in bf16, over several draws of
weights and inputs, because a gradient of two numbers (one per head) has too few to tell by itself.
"""

import contextlib
import functools
import os

import pytest
import torch
from fla.models.utils import Cache
from one_config import FP32_DOTS

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, cpu_ops, get_student_attention_class
from distill_model.attention import RotaryEmbedding
from distill_model.student_layers import reads_documents_on_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
os.environ |= FP32_DOTS  # read whenever a kernel is compiled
DEVICE = "cuda"
# One set of shapes for all: each new one costs compilations.
BATCH, PADDING, STEPS = 2, 5, 3
DRAWS = 4
CONFIG = StudentConfig(
    hidden_size=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    num_hidden_layers=1,
    attention_bias=True,
    qk_norm=True,
    student_name="gdn_v4",
)
SINKS = "swa_v1 with sinks"
LAYERS = [*STUDENT_ATTENTION_MAP, SINKS]
# Windows shorter than the text.
OPTIONS = {"swa_v1": {"window_size": 8}, SINKS: {"window_size": 8, "sink_size": 3}, "lolcats_v1": {"window_size": 8}}
# The largest error allowed: a floor, and a multiple of the stand-ins' error in bf16.
LIMITS = {torch.float32: (3e-3, 0.0), torch.bfloat16: (1e-2, 3.0)}


@contextlib.contextmanager
def stand_ins():
    bound = cpu_ops.bind_stand_ins()
    assert bound, "the stand-ins were bound before: nothing would be compared"
    try:
        yield
    finally:
        for space, key, old in bound:
            space[key] = old


def student_of(name):
    """The student that an entry of LAYERS is."""
    return name.partition(" ")[0]


def takes_documents_in_graphs(name):
    """Whether this entry of LAYERS reads nothing of documents on the host."""
    return not reads_documents_on_host(student_of(name))


def build(name, dtype, device, seed=0):
    """A layer near its initialisation, so that no gate is neutral and no gradient 0; its weights
    are exact in bf16. The seed is that of the inputs too."""
    torch.manual_seed(seed)
    layer = get_student_attention_class(student_of(name))(CONFIG, 0, **OPTIONS.get(name, {}))
    layer.init_fresh()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.bfloat16().to(device, dtype)


def random(*shape, like):
    return torch.randn(*shape).bfloat16().to(like.device, like.dtype)


def positions(x, ids):
    return RotaryEmbedding(CONFIG).to(x.device)(x, ids.to(x.device))


def train(layer, length):
    """Output and gradients of a forward and a backward pass."""
    weight = layer.o_proj.weight
    x = random(BATCH, length, CONFIG.hidden_size, like=weight).requires_grad_()
    output = layer.train()(x, position_embeddings=positions(x, torch.arange(length)[None]))[0]
    output.backward(random(*output.shape, like=weight))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "gradient of x": x.grad} | gradients


@torch.no_grad()
def decode(layer, chunks):
    """Outputs of a prompt that is read in `chunks` of these lengths, the first sequence padded on
    the left, the second inside its second chunk, and of single steps."""
    layer.eval()
    sizes = (*chunks, *[1] * STEPS)
    x = random(BATCH, sum(sizes), CONFIG.hidden_size, like=layer.o_proj.weight)
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    mask[0, :PADDING] = 0
    if len(chunks) > 1:
        mask[1, chunks[0] + 2 : chunks[0] + 2 + PADDING] = 0
    cos, sin = positions(x, (mask.cumsum(-1) - 1).clamp(min=0))
    cache = Cache()
    outputs = {}
    start = 0
    for size in sizes:
        part = slice(start, start := start + size)
        output = layer(
            x[:, part],
            attention_mask=mask[:, :start],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(cos[:, part], sin[:, part]),
        )[0]
        outputs[f"output of {part.start} to {start}"] = output[mask[:, part].bool()]
    return outputs


SCENARIOS = {
    "train on one token": functools.partial(train, length=1),
    "train": functools.partial(train, length=131),
    "decode after a short prompt": functools.partial(decode, chunks=(19,)),  # token by token
    "decode": functools.partial(decode, chunks=(131,)),  # chunk by chunk
    "decode after chunked prefill": functools.partial(decode, chunks=(131, 70, 19)),
}


def run(name, scenario, dtype, device):
    """The results of all draws, stacked."""
    draws = [SCENARIOS[scenario](build(name, dtype, device, seed)) for seed in range(DRAWS)]
    return {key: torch.stack([draw[key].float().cpu() for draw in draws]) for key in draws[0]}


@functools.cache
def expected(name, scenario):
    """Results of the stand-ins in fp32, and their error in bf16."""
    with stand_ins():
        exact, rounded = (run(name, scenario, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    return exact, {key: error(rounded[key], exact[key]) for key in exact}


def error(got, exact):
    """Relative to the norm of the tensor; absolute per element where that is 0 but for rounding
    errors of the kernels."""
    one = exact.numel() ** 0.5
    return ((got - exact).norm() / (exact.norm() if exact.norm() > 1e-3 * one else one)).item()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_equal_stand_ins(name, scenario, dtype):
    exact, noise = expected(name, scenario)
    got = run(name, scenario, dtype, DEVICE)
    assert got.keys() == exact.keys()
    floor, share = LIMITS[dtype]
    errors = {key: (error(got[key], exact[key]), floor + share * noise[key]) for key in exact}
    wrong = {key: f"{value:.1e} > {limit:.1e}" for key, (value, limit) in errors.items() if not value <= limit}
    assert not wrong, wrong

"""The CPU stand-ins against FLA's own Triton kernels, which run in Triton's interpreter: outputs,
final states and every gradient, at odd lengths, with initial states, packed sequences and grouped
heads.

The kernels run in processes of their own (`python tests/test_interpreter.py RESULTS SHARD`), with
FLA as it is; both sides draw the same inputs.
"""

import importlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

SHARDS = 2  # one per core
PACKED = (5, 64, 1, 3)  # lengths of packed sequences: a whole chunk, one token, odd ones
H = 1  # key heads
HV = 2  # value or query heads
K = 20  # channels of a key
V = 24  # channels of a value
M = 12  # slots
D = 24  # channels of a layer
PATH_K = 16  # of PaTH, whose kernel takes few sizes
ANGLES = torch.arange(140)[:, None] * 0.3 ** torch.arange(K // 2)


def normal(*shape):
    return torch.randn(*shape)


def unit(*shape):
    return F.normalize(normal(*shape), dim=-1)


def share(*shape):
    return normal(*shape).sigmoid()


def decay(*shape):
    return F.logsigmoid(normal(*shape) + 2)


# -------------------------------------------------------------------------- inputs, drawn in order
def gated_delta(channels=()):
    """g, beta and the decay's parameters are logits: the kernels compute the gates."""

    def inputs(B, T, N):
        return dict(
            q=normal(B, T, H, K),
            k=normal(B, T, H, K),
            v=normal(B, T, HV, V),
            g=normal(B, T, HV, *channels),
            beta=normal(B, T, HV),
            A_log=normal(HV),
            dt_bias=normal(HV, *channels).flatten(),
            initial_state=normal(N, HV, V, K),
        )

    return inputs


def delta(B, T, N):
    return dict(
        q=normal(B, T, HV, K),
        k=normal(B, T, HV, K),
        v=normal(B, T, HV, V),
        beta=2 * share(B, T, HV),
        initial_state=normal(N, HV, K, V),
    )


def gla(gate):
    def inputs(B, T, N):
        return dict(
            q=normal(B, T, HV, K),
            k=normal(B, T, HV, K),
            v=normal(B, T, HV, V),
            initial_state=normal(N, HV, V, K),
            **{gate: decay(B, T, HV, K)},
        )

    return inputs


def gsa(B, T, N):
    return dict(
        q=normal(B, T, HV, K),
        k=normal(B, T, HV, K),
        v=normal(B, T, HV, V),
        s=share(B, T, HV, M),
        g=decay(B, T, HV, M),
        initial_state=(normal(N, HV, K, M), normal(N, HV, M, V)),
    )


def rwkv7(chunked):
    def inputs(B, T, N):
        kk = unit(B, T, HV, K)
        a = share(B, T, HV, K)
        return dict(
            r=normal(B, T, HV, K),
            w=-0.6065 * share(B, T, HV, K),
            k=normal(B, T, HV, K),
            v=normal(B, T, HV, V),
            initial_state=normal(N, HV, K, V),
            **(dict(a=-kk, b=kk * a) if chunked else dict(kk=kk, a=a)),
        )

    return inputs


def attention(gate=False, path=False):
    """path: with PaTH's Householder vectors."""

    def inputs(B, T, N):
        k, v = (PATH_K, PATH_K) if path else (K, V)
        x = dict(q=normal(B, T, HV, k), k=normal(B, T, H, k), v=normal(B, T, H, v))
        x |= dict(w=unit(B, T, H, k), beta=2 * share(B, T, H)) if path else {}
        return x | (dict(g=decay(B, T, HV)) if gate else {})

    return inputs


def decoding(B, T, N):
    return dict(q=normal(1, N, HV, K), k=normal(1, T, H, K), v=normal(1, T, H, V), g=decay(1, T, HV))


def tokens(**more):
    """x [B, T, D] and more, each a function of (B, T, N) or a shape."""

    def inputs(B, T, N):
        return dict(x=normal(B, T, D)) | {
            key: make(B, T, N) if callable(make) else normal(*make) for key, make in more.items()
        }

    return inputs


def like_x(B, T, N):
    return normal(B, T, D)


def nothing(B, T, N):
    return None


def addcmul(B, T, N):
    return dict(
        hidden_states=normal(B, T, D),
        delta=normal(B, T, D),
        **{f"x{c}": normal(1, 1, D) for c in "rwkvag"},
    )


def k_update(B, T, N):
    return dict(k=normal(B, T, D), a=share(B, T, D), ka=normal(D))


def rotary(B, T, N):
    return dict(x=normal(B, T, HV, K))


def correction(B, T, N):
    return dict(
        o=normal(B, T, HV * K),
        r=normal(B, T, HV, K),
        k=normal(B, T, HV, K),
        r_k=normal(HV, K),
        v=normal(B, T, HV, K),
        g=normal(B, T, HV * K),
    )


# ------------------------------------------------------------------------------------------- calls
@dataclass(frozen=True)
class Case:
    """Calls of one entry point. inputs(B, T, N): its tensors, for B sequences of T tokens and N
    initial states.

    lengths: those of dense sequences, two each time. packed: whether it takes packed ones too.
    keep: what of the outputs anybody reads. positional: the entry point takes no names.
    """

    entry: str
    inputs: Callable
    options: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 131)
    packed: bool = True
    gradients: bool = True
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    keep: Callable = lambda *outputs: outputs
    positional: bool = False

    @property
    def shapes(self):
        return [*self.lengths, *([PACKED] if self.packed else [])]


IN_KERNEL = dict(
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    state_v_first=True,
    output_final_state=True,
)
STATE = dict(output_final_state=True)
V_FIRST = dict(output_final_state=True, state_v_first=True)
NORM, MODULES = "fla.modules.norm.layernorm", "fla.modules"
PATH = "fla.ops.path_attn.parallel.parallel_path_attn"
ROTARY = dict(cos=ANGLES.cos(), sin=ANGLES.sin())
CONVOLUTION = tokens(weight=(D, 4), bias=(D,), initial_state=lambda B, T, N: normal(N, D, 4), residual=like_x)
CASES = {
    "gated delta rule, chunks": Case("fla.ops.gated_delta_rule.chunk_gated_delta_rule", gated_delta(), IN_KERNEL),
    "gated delta rule, negative eigenvalues": Case(
        "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
        gated_delta(),
        IN_KERNEL | {"allow_neg_eigval": True},
        (1,),
        False,
    ),
    "gated delta rule, step by step": Case(
        "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule",
        gated_delta(),
        IN_KERNEL,
        (1, 19),
        gradients=False,
    ),
    "KDA, chunks": Case("fla.ops.kda.chunk_kda", gated_delta((K,)), IN_KERNEL),
    "KDA, step by step": Case(
        "fla.ops.kda.fused_recurrent_kda", gated_delta((K,)), IN_KERNEL, (1, 19), gradients=False
    ),
    "delta rule, chunks": Case(
        "fla.ops.delta_rule.chunk_delta_rule",
        delta,
        STATE | {"use_qk_l2norm_in_kernel": True},
        dtype=torch.float16,
        tolerance=3e-3,
    ),  # it refuses fp32, and the interpreter bf16
    "delta rule, step by step": Case(
        "fla.ops.delta_rule.fused_recurrent_delta_rule",
        delta,
        STATE | {"use_qk_l2norm_in_kernel": True},
        (1, 19),
    ),
    "GLA, chunks": Case("fla.ops.gla.chunk_gla", gla("g"), V_FIRST),
    "GLA, step by step": Case("fla.ops.gla.fused_recurrent_gla", gla("gk"), V_FIRST, (1, 19)),
    "GSA, chunks": Case("fla.ops.gsa.chunk_gsa", gsa, STATE | {"scale": 1.0}),
    "GSA, step by step": Case("fla.ops.gsa.fused_recurrent_gsa", gsa, STATE | {"scale": 1.0}, (1, 19)),
    "GSA, one step of decoding": Case(
        "fla.ops.gsa.fused_recurrent_gsa",
        gsa,
        STATE | {"scale": 1.0},
        (1,),
        packed=False,
        gradients=False,
    ),
    "RWKV-7, chunks": Case(
        "fla.ops.rwkv7.chunk_rwkv7",
        rwkv7(True),
        STATE | dict(safe_gate=True, chunk_size=64, lower_bound=-0.6065306597126334),
    ),
    "RWKV-7, step by step": Case(
        "fla.ops.rwkv7.fused_mul_recurrent_rwkv7", rwkv7(False), STATE, (1, 19), gradients=False
    ),
    "RWKV-7, token shift": Case(
        f"{MODULES}.token_shift.token_shift",
        tokens(cache=lambda B, T, N: normal(N, D)),
        {"output_cache": True},
        (1, 19),
    ),
    "RWKV-7, mixes": Case("fla.ops.rwkv7.fused_addcmul.fused_addcmul_rwkv7", addcmul, lengths=(19,), packed=False),
    "RWKV-7, keys": Case("fla.ops.rwkv7.fused_k_update.fused_k_rwkv7", k_update, packed=False),
    "RWKV-7, output": Case("fla.ops.rwkv7.gate_output_correction.gate_output_correction", correction, packed=False),
    "PaTH": Case(PATH, attention(path=True), tolerance=1e-3),  # the kernel rounds its matrices to fp16
    "PaTH, forget gate": Case(PATH, attention(gate=True, path=True), tolerance=1e-3),
    "PaTH, keys for decoding": Case(PATH, attention(path=True), {"use_cache": True}, gradients=False, tolerance=1e-3),
    "forgetting attention": Case("fla.ops.forgetting_attn.parallel.parallel_forgetting_attn", attention(gate=True)),
    "one step of forgetting attention": Case(
        "fla.ops.attn.decoding.attn_decoding_one_step",
        decoding,
        {"do_gate_scale": True},
        (),
        gradients=False,
    ),
    "short convolution": Case(
        f"{MODULES}.causal_conv1d.ops.causal_conv1d",
        CONVOLUTION,
        STATE | {"activation": "silu"},
        (1, 19),
        keep=lambda y, state: (y, state[..., 1:]),
    ),
    "short convolution of one token": Case(
        f"{MODULES}.causal_conv1d.ops.causal_conv1d",
        tokens(weight=(D, 1)),
        {"activation": "silu"},
        (19,),
    ),
    "one step of a short convolution": Case(
        f"{MODULES}.causal_conv1d.ops.causal_conv1d_update",
        tokens(cache=lambda B, T, N: normal(N, D, 4), weight=(D, 4), bias=(D,), residual=like_x),
        {"activation": "silu"},
        (1,),
        packed=False,
        gradients=False,
    ),
    "RMSNorm": Case(
        f"{NORM}.rms_norm",
        tokens(weight=(D,), bias=nothing, residual=like_x),
        {"prenorm": True},
        packed=False,
    ),
    "LayerNorm": Case(f"{NORM}.layer_norm", tokens(weight=(D,), bias=(D,)), packed=False),
    "GroupNorm": Case(f"{NORM}.group_norm", tokens(weight=(D,), bias=(D,)), {"num_groups": 3}, packed=False),
    "RMSNorm and projection": Case(
        f"{NORM}.layer_norm_linear",
        tokens(norm_weight=(D,), norm_bias=nothing, linear_weight=(7, D), linear_bias=(7,)),
        {"is_rms_norm": True},
        packed=False,
    ),
    "RMSNorm, sigmoid gate": Case(
        f"{MODULES}.norm.fused_norm_gate.rms_norm_gated",
        tokens(g=like_x, weight=(D,), bias=nothing),
        {"activation": "sigmoid"},
        packed=False,
    ),
    "RMSNorm, swish gate": Case(
        f"{MODULES}.norm.fused_norm_gate.rms_norm_gated",
        tokens(g=like_x, weight=(D,), bias=nothing),
        packed=False,
    ),
    "LayerNorm, gate": Case(
        f"{MODULES}.norm.fused_norm_gate.layer_norm_gated",
        tokens(g=like_x, weight=(D,), bias=(D,)),
        packed=False,
    ),
    "Mamba-2's norm": Case(
        f"{MODULES}.norm.layernorm_gated.rmsnorm_fn",
        tokens(weight=(D,), bias=nothing, z=like_x),
        {"group_size": D // 3, "norm_before_gate": False},
        packed=False,
    ),
    "L2 norm": Case(f"{MODULES}.norm.l2norm.l2norm", tokens(), packed=False),
    "rotary embedding": Case(f"{MODULES}.rotary.ops.rotary_embedding", rotary, ROTARY | {"seqlen_offsets": 3}),
    "rotary embedding, left padding": Case(
        f"{MODULES}.rotary.ops.rotary_embedding",
        rotary,
        ROTARY | {"seqlen_offsets": torch.tensor([0, -4])},
        packed=False,
    ),
    "swish": Case(f"{MODULES}.activations.ops.swish", tokens(), packed=False, positional=True),
    "sigmoid": Case(f"{MODULES}.activations.ops.sigmoid", tokens(), packed=False, positional=True),
    "SwiGLU": Case(f"{MODULES}.activations.ops.swiglu", tokens(y=like_x), packed=False, positional=True),
    "SwiGLU and projection": Case(
        f"{MODULES}.activations.ops.swiglu_linear",
        tokens(y=like_x, weight=(7, D), bias=(7,)),
        packed=False,
        positional=True,
    ),
}
CALLS = [(name, shape) for name, case in CASES.items() for shape in case.shapes]


def flat(values):
    """The tensors in nested tuples and lists, in order; None is left out."""
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in flat(value)]
    return [] if values is None else [values]


def call(function, name, shape):
    """Outputs and gradients of one side, as a dict by what they are."""
    case = CASES[name]
    packed = isinstance(shape, tuple)
    torch.manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    inputs = case.inputs(1, sum(shape), len(shape)) if packed else case.inputs(2, shape, 2)

    def convert(x):
        return None if x is None else x.to(case.dtype).requires_grad_(case.gradients)

    inputs = {key: tuple(map(convert, x)) if isinstance(x, tuple) else convert(x) for key, x in inputs.items()}
    options = case.options | ({"cu_seqlens": torch.tensor([0, *shape]).cumsum(0)} if packed else {})
    outputs = function(*inputs.values()) if case.positional else function(**inputs, **options)
    outputs = flat(case.keep(*outputs) if isinstance(outputs, tuple) else outputs)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if case.gradients:
        cotangents = [torch.randn(output.shape).to(output) for output in outputs]
        names = [f"gradient of {key} {i}" for key, value in inputs.items() for i, _ in enumerate(flat(value))]
        results |= dict(
            zip(
                names,
                torch.autograd.grad(outputs, flat([*inputs.values()]), cotangents),
                strict=True,
            )
        )
    return results


def resolve(entry):
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernels' side of every call: its results or its error, and its seconds."""
    folder = tmp_path_factory.mktemp("kernels")
    start = time.time()
    command = [sys.executable, __file__]
    shards = [
        subprocess.Popen([*command, folder / f"{i}.pt", str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(SHARDS)
    ]
    errors = [shard.communicate()[1] for shard in shards]
    results = {}
    for i, shard in enumerate(shards):
        assert shard.returncode == 0, errors[i][-3000:]
        results |= torch.load(folder / f"{i}.pt")
    slowest = sorted(results, key=lambda key: -results[key][1])[:10]
    print(
        f"\n{len(results)} calls in {time.time() - start:.0f} s, with {SHARDS} imports; the slowest:",
        *(f"{results[key][1]:6.1f} s  {key}" for key in slowest),
        sep="\n",
    )
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", CALLS)
def test_stand_ins_equal_the_kernels(kernels, name, shape):
    from distill_model.cpu_ops import STAND_INS

    case = CASES[name]
    module, _, function = case.entry.rpartition(".")
    stand_in = STAND_INS[module][function]
    theirs, _ = kernels[name, shape]
    assert isinstance(theirs, dict), theirs
    ours = call(resolve(stand_in) if isinstance(stand_in, str) else stand_in, name, shape)
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        b = theirs[key]
        assert a.shape == b.shape and a.dtype == b.dtype, key
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-2)).item()
        assert error <= case.tolerance, f"{key}: {error:.1e}"


def test_every_stand_in_has_a_case():
    """Those for flash-attn have no kernel of FLA: tests/test_cpu_ops.py compares them with their
    formula."""
    from distill_model.cpu_ops import STAND_INS

    entries = {f"{module}.{name}" for module, names in STAND_INS.items() for name in names}
    assert entries == {case.entry for case in CASES.values()}


if __name__ == "__main__":
    from triton_interpreter import interpret

    interpret()
    torch.set_num_threads(1)
    done = {}
    for key in CALLS[int(sys.argv[2]) :: SHARDS]:
        begin = time.time()
        try:
            result = call(resolve(CASES[key[0]].entry), *key)
        except Exception as error:  # the call's test shows it
            result = f"{type(error).__name__}: {error}"
        done[key] = result, time.time() - begin
    torch.save(done, sys.argv[1])

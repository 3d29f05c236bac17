"""Every Triton kernel of the project compiles for NVIDIA's Ampere and Hopper, within the shared
memory of the smallest of them. This needs no GPU, and the interpreter does not show it."""

import pytest
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distill_model import StudentConfig, decode_kernels, fused_ops, get_student_attention_class, losses

SHARED = 99 * 1024  # bytes per program on GPUs of compute capability 8.6 and 8.9
NUMBER = {float: "fp32", int: "i32"}
POINTER = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Compiled:
    """Replaces a kernel: a call compiles it instead of launching it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.calls = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, **constants):
        names = self.kernel.arg_names
        given = dict(zip(names, args)) | constants
        constants = {name: value for name, value in given.items() if name in constants or value is None}
        kinds = {
            name: "constexpr"
            if name in constants
            else POINTER[value.dtype]
            if isinstance(value, torch.Tensor)
            else NUMBER[type(value)]
            for name, value in given.items()
        }
        signature = {name: kinds[name] for name in names}
        source = ASTSource(
            self.kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
        )
        for capability in (80, 90):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}
            )
            assert compiled.metadata.shared <= SHARED, (
                self.kernel.__name__,
                kinds,
                compiled.metadata.shared,
            )
        self.calls += 1


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of the modules, replaced by `Compiled`."""
    kernels = []
    for module in (decode_kernels, fused_ops, losses):
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
        functions = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
        for name, kernel in functions.items():
            if not any(
                f" {name}(" in other.src for other in functions.values() if other is not kernel
            ):  # a part of another
                kernels.append(Compiled(kernel))
                monkeypatch.setattr(module, name, kernels[-1])
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_compiles(compiled, dtype):
    def random(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    fused_ops.swiglu(random(3, 70), random(3, 70)).sum().backward()
    fused_ops.mean_squared_error(random(3, 70), random(3, 70)).backward()
    for size in (70, 1536, 16384):
        for weight in (random(size), random(size).detach()):
            fused_ops.rms_norm(random(2, size), weight, 1e-6).sum().backward()
            sum(fused_ops.rms_norm(random(2, size), weight, 1e-6, random(2, size))).sum().backward()
    cos, sin = random(2, 5, 128).detach(), random(2, 5, 128).detach()
    fused_ops.rotate(random(2, 5, 3, 128), cos, sin).sum().backward()
    for heads, kv_heads, size in ((12, 2, 128), (32, 8, 64), (4, 4, 256), (3, 1, 20)):
        q = random(2, 1, heads, size).detach()
        k = random(2, 70, kv_heads, size).detach()
        fused_ops.decode_attention(q, k, k, torch.zeros(2, dtype=torch.long), torch.tensor([69]))
    hidden, weight = random(7, 16), random(53, 16)
    losses.linear_cross_entropy(hidden, weight, torch.randint(53, (7,)))
    losses.forward_kl(hidden, hidden, weight, weight)
    decode_kernels.swiglu_rows(random(2, 70).detach(), random(2, 70).detach())
    for size, norm in ((128, nn.RMSNorm(128, eps=1e-6)), (80, nn.Identity())):
        q, k = random(2, 3 * size).detach(), random(2, size).detach()
        places = torch.empty(2, 2, 5, 1, size, dtype=dtype)
        decode_kernels.place_token(q, k, k, norm, norm, k, k, *places, torch.tensor([4]))
    for name in ("gdn_v1", "gdn_v4", "gdn_v6", "gdn_v7", "gdn_v8"):
        for size in (20, 128, 256):
            config = StudentConfig(
                hidden_size=20,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=size,
                num_hidden_layers=1,
                keep_full_attention_layers=[],
                student_name=name,
            )
            options = {"conv_bias": True, "allow_neg_eigval": True} if name == "gdn_v7" else {}
            attn = get_student_attention_class(name)(config, 0, **options)
            x, few = random(2, 3 * size).detach(), random(2, 3).detach()
            past = tuple(torch.empty(3, 2, 3 * size, attn.conv_size, dtype=dtype)) if attn.use_short_conv else None
            gate = x if attn.use_gate else None
            state = torch.empty(2, 3, size, size)
            angles = random(2, 2, size).detach()
            decode_kernels.gated_delta_token(x, x, x, gate, few, few, attn.to(dtype), state, past, *angles)
    assert not [each.kernel.__name__ for each in compiled if not each.calls]

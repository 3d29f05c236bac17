"""Every Triton kernel of the project compiles for NVIDIA GPUs from Ampere on, in the shared memory that the smallest has: no GPU is needed
to see that, and the interpreter does not."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distill_model import fused_ops, losses

SHARED = 99 * 1024  # bytes that a program may have on GPUs of compute capability 8.6 and 8.9
NUMBER = {float: "fp32", int: "i32"}
POINTER = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Compiled:
    """Stands for a kernel: its calls compile it."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, **constants):
        names = self.kernel.arg_names
        given = dict(zip(names, args)) | constants
        constants = {name: value for name, value in given.items() if name in constants or value is None}
        kinds = {name: "constexpr" if name in constants else POINTER[value.dtype] if isinstance(value, torch.Tensor) else NUMBER[type(value)]
                 for name, value in given.items()}  # fmt: skip
        signature = {name: kinds[name] for name in names}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        for capability in (80, 90):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            assert compiled.metadata.shared <= SHARED, (self.kernel.__name__, kinds, compiled.metadata.shared)
        self.calls += 1


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of the modules, which compile and compute nothing."""
    kernels = []
    for module in (fused_ops, losses):
        monkeypatch.setattr(module, "fuses", lambda tensor: True)
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and kernel.__module__ == module.__name__:
                kernels.append(Compiled(kernel))
                monkeypatch.setattr(module, name, kernels[-1])
    return kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_compiles(compiled, dtype):
    def random(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    fused_ops.swiglu(random(3, 70), random(3, 70)).sum().backward()
    fused_ops.mean_squared_error(random(3, 70), random(3, 70)).backward()
    cos, sin = random(2, 5, 128).detach(), random(2, 5, 128).detach()
    fused_ops.rotate(random(2, 5, 3, 128), cos, sin).sum().backward()
    for heads, kv_heads, size in ((12, 2, 128), (32, 8, 64), (4, 4, 256), (3, 1, 20)):
        q, k = random(2, 1, heads, size).detach(), random(2, 70, kv_heads, size).detach()
        fused_ops.decode_attention(q, k, k, torch.zeros(2, dtype=torch.long), torch.tensor([69]))
    hidden, weight = random(7, 16), random(53, 16)
    losses.linear_cross_entropy(hidden, weight, torch.randint(53, (7,)))
    losses.forward_kl(hidden, hidden, weight, weight)
    assert not [each.kernel.__name__ for each in compiled if not each.calls]

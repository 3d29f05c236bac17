"""Has FLA solve the triangular system of a chunk in fp32. On a GPU it takes TF32 whatever the environment says, which
alone changes a log-probability by more than the tests of fp32 allow.

`conftest.engine` names the class below to vLLM, which therefore imports this module in each of its worker processes."""

from fla.ops.gated_delta_rule import chunk_fwd
from fla.ops.kda import chunk_intra
from triton import language

KERNELS = (chunk_fwd, chunk_intra)
for kernels in KERNELS:
    kernels.SOLVE_TRIL_DOT_PRECISION = language.constexpr("ieee")


class Fp32Solve:
    """What vLLM adds to its worker."""

    def solve_precisions(self) -> list[str]:
        """Those of this process."""
        return [kernels.SOLVE_TRIL_DOT_PRECISION.value for kernels in KERNELS]

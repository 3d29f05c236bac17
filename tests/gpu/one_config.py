"""One configuration of each Triton kernel, for tests of what kernels compute, not of their speed.

With a cold cache Triton's autotuner compiles up to two dozen of them, for half an hour over all
students.
"""

import os
from pathlib import Path

from triton.runtime.autotuner import Autotuner

# Triton's default for fp32 is TF32, in whose ten bits of mantissa the gradients of decays, sums of
# many terms that cancel, are off by percents; the kernels are what is compared, not their rounding.
# tf32x3 splits each operand in two and is nearly as exact as fp32. With "ieee", which has no tensor
# cores, one kernel compiles for minutes. bf16 is not touched.
FP32_DOTS = {"TRITON_F32_DEFAULT": "tf32x3"}


def cost(config):
    """What to compile: few stages take little shared memory; small blocks and many warps make few
    instructions a thread, which compile several times as fast."""
    blocks = [value for value in config.kwargs.values() if isinstance(value, int)]
    return config.num_stages, sum(blocks), -config.num_warps


def take_one_config():
    """Makes the autotuner take one configuration unmeasured. Returns what undoes it."""
    everything, bench = Autotuner.prune_configs, Autotuner._bench

    def cheapest(self, kwargs):
        return sorted(everything(self, kwargs), key=cost)[:1]

    def undo():
        Autotuner.prune_configs, Autotuner._bench = everything, bench

    Autotuner.prune_configs = cheapest
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    return undo


def environment_of_one_config():
    """Variables for a process that a test starts, and for those that it starts: sitecustomize.py,
    beside this file, does the same in each. For fp32, of which no configurations are shipped."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    return FP32_DOTS | {"PYTHONPATH": path}

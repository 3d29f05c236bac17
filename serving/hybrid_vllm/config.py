"""What is refused before a model is loaded, and the engine settings that its layers need."""

from __future__ import annotations

from dataclasses import replace

from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig
from distill_model.student_softmax import SlidingWindowStudent


def window_size(config: StudentConfig) -> int | None:
    """To how many tokens the student's layers attend, if they are softmax attention over a window."""
    student = STUDENT_ATTENTION_MAP.get(config.student_name)
    if student is None or student.layer is not SlidingWindowStudent:
        return None
    return student.value_of("window_size", config.student_options)


def has_states(config: StudentConfig) -> bool:
    """Whether layers of the model are linear, and not all of them softmax attention."""
    return bool(config.linear_layers) and window_size(config) is None


def student_refusals(config, devices: int) -> dict[str, bool]:
    """Why the student's layers of a model cannot be served on so many devices -> whether that applies."""
    if not config.linear_layers:
        return {}
    name = config.student_name
    student = STUDENT_ATTENTION_MAP.get(name)
    if window_size(config) is not None:
        sinks = student.value_of("sink_size", config.student_options)
        reason = f"student {name}: vLLM's layers have no sinks, such as sink_size: {sinks}; served is sink_size: 0"
        return {reason: sinks > 0}
    if student is None or not student.supports_static_cache:
        served = [key for key, value in STUDENT_ATTENTION_MAP.items() if value.supports_static_cache] + ["swa_v1"]
        return {f"student {name}: its state grows with the text; served are {', '.join(served)}": True}
    heads = config.num_attention_heads
    return {
        f"tensor_parallel_size: {devices} does not divide the {heads} heads": heads % devices > 0,
        f"tensor_parallel_size: the norm of {name} spans all heads; set it to 1": (
            devices > 1 and not student.layer.heads_are_independent
        ),
    }


def refusal(vllm_config: VllmConfig) -> str | None:
    """Why vLLM cannot serve a model with these settings; None if it can."""
    config = vllm_config.model_config.hf_config
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    state_dtype = cache.mamba_ssm_cache_dtype
    rope_type = config.rope_parameters["rope_type"]
    reasons = {
        f"RoPE of type {rope_type} depends on the length of the text": rope_type in ("dynamic", "longrope"),
        "speculative decoding needs states that can be rolled back; leave it out": (
            vllm_config.speculative_config is not None
        ),
        "pipeline_parallel_size: layers stay on one device; set it to 1": parallel.pipeline_parallel_size > 1,
        f"mamba_ssm_cache_dtype: recurrent states are float32, not {state_dtype}; leave it out": (
            state_dtype not in ("auto", "float32")
        ),
        "mamba_cache_mode: all keeps a state per block, of which the layers know one; leave it out": (
            cache.mamba_cache_mode == "all"
        ),
        "enable_lora: the layers take no adapters; merge them into the export": vllm_config.lora_config is not None,
        **student_refusals(config, parallel.tensor_parallel_size),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class HybridConfig(VerifyAndUpdateConfig):
    """vLLM calls this before it loads a model."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Raises ValueError for what is not supported. A decoding step becomes one CUDA graph; prefill runs eagerly,
        because a compiler cannot see through the kernels of linear layers."""
        if reason := refusal(vllm_config):
            raise ValueError(f"{vllm_config.model_config.model}: {reason}")
        model = vllm_config.model_config
        if not has_states(model.hf_config):  # vLLM would take the model for one with states, because of its class
            model._model_info = replace(model._model_info, is_hybrid=False)
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        if compilation.cudagraph_mode is None:
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY

"""Engines on the tiny exports that make_models.py wrote to the folder HYBRID_MODELS. HYBRID_ENGINE, JSON, has more
arguments of vllm.LLM, such as {"attention_backend": "TRITON_ATTN"} for fp32 on a GPU, where TRITON_F32_DEFAULT=ieee is
needed, too."""

import gc
import json
import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ENGINE = json.loads(os.environ.get("HYBRID_ENGINE", "{}"))


@pytest.fixture(scope="session")
def models() -> Path:
    return Path(os.environ["HYBRID_MODELS"])


@pytest.fixture(scope="session")
def reference(models):
    """A function of an export's name: its prompts, and what transformers made of them."""
    return lambda name: json.loads((models / f"{name}.json").read_text())


@contextmanager
def engine(model, **settings):
    """vLLM on a folder, in this process; with heads distributed, its workers are processes of their own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    defaults = dict(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
        worker_extension_cls="fp32_solve.Fp32Solve",
    )
    llm = LLM(str(model), **defaults | settings | ENGINE)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        # vLLM keeps one memory pool for the CUDA graphs of all engines of a process, which ends with the first one's.
        type(current_platform)._global_graph_pool = None


def decode(llm, prompts, new_tokens=40, logprobs=None):
    """The greedy continuations, in order: vLLM's outputs."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return llm.generate(prompts, sampling, use_tqdm=False)


def texts(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def counter(llm, name: str) -> int:
    """The value of one of vLLM's counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)

"""Greedy text of vLLM against that of transformers, for every kind of export."""

import json
import os
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import counter, decode, engine, texts
from hybrid_vllm.linear import LinearMetadataBuilder
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import MambaSpec

pytestmark = pytest.mark.vllm
MODELS = sorted(file.stem for file in Path(os.environ["HYBRID_MODELS"]).glob("*.json"))
ONE_OF_EACH_LAYER = (
    ["teacher_qwen2", "gdn_v4", "gdn_v7", "kda_v1", "deltanet_v1", "gla_v1", "gsa_v1"]
    + ["hgrn2_v1", "mamba2_v1", "rwkv7_v1", "swa_v1", "stage1_gdn_v7"]
)  # fmt: skip


def chosen_log_probabilities(outputs) -> list[torch.Tensor]:
    """Of each output's tokens."""
    found = []
    for output in outputs:
        tokens = output.outputs[0]
        found.append(torch.tensor([step[token].logprob for step, token in zip(tokens.logprobs, tokens.token_ids)]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers(name, models, reference):
    """Prompts of 1 to 300 tokens: in one batch whose prefill is chunked, from the prefix cache, and alone."""
    expected = reference(name)
    with engine(models / name, max_num_batched_tokens=128, enable_prefix_caching=True) as llm:
        batched = decode(llm, expected["prompts"], logprobs=1)
        assert texts(batched) == expected["texts"]
        for found, text, exact in zip(
            chosen_log_probabilities(batched), expected["texts"], expected["log_probabilities"]
        ):
            exact = torch.tensor(exact).gather(1, torch.tensor(text)[:, None])[:, 0]
            torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)
        again = decode(llm, expected["prompts"])
        assert texts(again) == expected["texts"]
        assert again[-1].num_cached_tokens >= 64
        for prompt, text in zip(expected["prompts"], expected["texts"]):
            assert texts(decode(llm, [prompt])) == [text]


@pytest.mark.parametrize("name", ONE_OF_EACH_LAYER)
def test_preempted_sequences_and_recycled_pages(name, models, reference, monkeypatch):
    """The cache holds fewer sequences than are decoded at once, so that some are preempted and all pages recycled.
    vLLM's runner zeroes pages before they are used again; here it does not, so that they hold other texts' states."""
    for runner in ("gpu_model_runner.GPUModelRunner", "cpu_model_runner.CPUModelRunner"):
        monkeypatch.setattr(f"vllm.v1.worker.{runner}._zero_block_ids", lambda *_: None)
    expected = reference(name)
    order = [2] * 8 + [0, 1]  # of 110 tokens, which soon need a second page of 128
    prompts = [expected["prompts"][i] for i in order]
    settings = dict(num_gpu_blocks_override=blocks(name), enable_prefix_caching=False, max_num_seqs=10)
    with engine(models / name, **settings) as llm:
        assert texts(decode(llm, prompts)) == [expected["texts"][i] for i in order]
        preempted = counter(llm, "vllm:num_preemptions")
        # Pages of linear layers alone do not grow, so that nobody has to give way.
        assert preempted > 0 or name.startswith("stage1")
        # A prompt of one token, whose page held the state of another text.
        alone = [0] * 8
        assert texts(decode(llm, [expected["prompts"][i] for i in alone])) == [expected["texts"][i] for i in alone]


@pytest.mark.parametrize(
    "name", ["gdn_v5", "gdn_v7", "kda_v1", "gla_v1", "mamba2_v1", "rwkv7_v1", "swa_v1", "teacher_llama"]
)
def test_heads_distributed_to_two_devices(name, models, reference):
    expected = reference(name)
    with engine(models / name, tensor_parallel_size=2, max_num_batched_tokens=128) as llm:
        assert llm.collective_rpc("solve_precisions") == [["ieee", "ieee"]] * 2
        assert texts(decode(llm, expected["prompts"])) == expected["texts"]


def blocks(name: str) -> int:
    """Of the cache, in a test of preemption."""
    return 12 if name.startswith("teacher") else 24


@pytest.mark.parametrize("name", ONE_OF_EACH_LAYER)
def test_bf16_within_its_noise(name, models, reference):
    """Log-probabilities differ from fp32's about as much as those of transformers in bf16, and the text differs only
    where two tokens are as close."""
    expected = reference(name)
    with engine(models / name, dtype="bfloat16", max_num_batched_tokens=128) as llm:
        outputs = decode(llm, expected["prompts"], logprobs=1)
    differences = []
    for found, text, expected_text, exact in zip(
        chosen_log_probabilities(outputs), texts(outputs), expected["texts"], expected["log_probabilities"]
    ):
        exact = torch.tensor(exact)
        pairs = list(zip(text, expected_text))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        differences.append(found[:same] - exact[range(same), text[:same]])
        if same < len(pairs):
            gap = exact[same, expected_text[same]] - exact[same, text[same]]
            assert gap <= 2 * expected["bf16_largest"]
    differences = torch.cat(differences)
    assert len(differences) >= 24
    assert differences.square().mean().sqrt() <= 2 * expected["bf16_rms"]


@pytest.mark.parametrize("cache_mode", ["none", "align"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 1, 0, 0], [1, 1, 7, 130], [9, 2], [1]])
def test_groups_of_layers_share_the_metadata_of_a_step(counts, cache_mode):
    """A group's metadata, made from another group's, is that which it would make itself, at the addresses that a CUDA
    graph of this group reads."""
    spec = MambaSpec(block_size=128, shapes=((1,),), dtypes=(torch.float32,))
    device = torch.device("cpu")
    config = SimpleNamespace(
        cache_config=SimpleNamespace(mamba_cache_mode=cache_mode),
        scheduler_config=SimpleNamespace(max_num_seqs=6),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
    )
    first, second, alone = (LinearMetadataBuilder(spec, [], config, device) for _ in range(3))
    counts = torch.tensor(counts, dtype=torch.int32)
    ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    read = torch.randint(0, 2, counts.shape, dtype=torch.int32) * 300 * (counts > 0)
    for builder in (first, second, alone):  # what an earlier step left
        builder.rows.fill_(77)
        builder.has_state.fill_(True)

    def batch(blocks):
        return SimpleNamespace(
            query_start_loc=ends,
            query_start_loc_cpu=ends,
            seq_lens=read + counts,
            num_reqs=len(counts),
            block_table_tensor=blocks,
        )

    blocks = [torch.randint(1, 70, (len(counts), 4), dtype=torch.int32) for _ in range(2)]
    shared = second.update_block_table(first.build(0, batch(blocks[0])), blocks[1], torch.empty(0))
    expected = alone.build(0, batch(blocks[1]))
    tokens = [int(n) for n in counts if n > 0]
    long = [n for n in tokens if n > 1]
    for metadata in (shared, expected):
        column = (read + counts - 1).clamp(min=0) // 128 if cache_mode == "align" else torch.zeros_like(counts)
        pages = blocks[1].gather(1, column.long()[:, None])[:, 0].masked_fill(counts == 0, NULL_BLOCK_ID)
        assert metadata.rows.tolist() == pages.tolist()
        assert metadata.has_state.tolist() == ((read > 0) & (counts > 0)).tolist()
        assert metadata.decodes == len(counts) - len(long) and metadata.tokens == sum(long)
        assert (None if metadata.ends is None else metadata.ends.tolist()) == ([0, *accumulate(long)] if long else None)
    assert shared.rows.data_ptr() == second.rows.data_ptr()
    assert shared.has_state.data_ptr() == second.has_state.data_ptr()


def test_config_carries_what_vllm_reads(models):
    config = json.loads((models / "gdn_v7" / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
    assert config["mamba_ssm_dtype"] == "float32"

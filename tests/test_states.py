"""What a student keeps of each sequence is declared once, and its layers keep exactly that; packed sequences with
states give what each gives alone."""

import pytest
import torch
from conftest import SHAPE

from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, StudentForCausalLM
from distill_model.cache import HybridCache, state_tensors

CONSTANT = [name for name, student in STUDENT_ATTENTION_MAP.items() if student.supports_static_cache]
OPTIONS = {
    "kda_v1": {"use_short_conv": False},
    "deltanet_v1": {"conv_size": 3},
    "gla_v1": {"use_short_conv": True, "conv_size": 3},
    "gsa_v1": {"num_slots": 12},
    "mamba2_v1": {"conv_kernel": 3},
}


def one_layer(name, options, dtype=torch.float32, **changes):
    """A random linear layer, its config and its RoPE."""
    values = {**SHAPE, "head_dim": 16, "num_hidden_layers": 1, "attention_bias": True, **changes}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = StudentConfig(**values, rope_parameters=rope, student_name=name, student_options=options)
    torch.manual_seed(0)
    model = StudentForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.model.layers[0].attn, config, model.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("name", CONSTANT)
@torch.no_grad()
def test_declared_states_are_those_that_the_layer_keeps(name, options, dtype):
    options = OPTIONS.get(name, {}) if options else {}
    attn, config, model = one_layer(name, options, dtype)
    declared = STUDENT_ATTENTION_MAP[name].states(config)
    cache = HybridCache(config)
    hidden = torch.randn(2, 6, config.hidden_size, dtype=dtype)
    angles = model.position_embeddings(hidden)
    attn(hidden, past_key_values=cache, use_cache=True, position_embeddings=angles)
    held = cache.layers[0].state

    def compare(state, expected):
        if isinstance(expected, tuple):
            assert isinstance(state, (tuple, list)) and len(state) == len(expected)
            for part in zip(state, expected):
                compare(*part)
        elif expected is None:
            assert not list(state_tensors(state))
        else:
            assert state.shape == (2, *expected.shape)
            assert state.dtype == (expected.dtype or dtype)

    for key in ("recurrent_state", "conv_state"):
        compare(held.get(key), declared[key])
    assert torch.float32 in {state.dtype for state in state_tensors(declared)}


@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("name", CONSTANT)
@torch.no_grad()
def test_packed_sequences_with_states_equal_each_alone(name, options):
    options = OPTIONS.get(name, {}) if options else {}
    attn, config, model = one_layer(name, options, torch.float64)
    rope = model.position_embeddings
    texts = [torch.randn(1, 5, config.hidden_size, dtype=torch.float64) for _ in range(4)]
    lengths = (1, 70, 3, 9)
    more = [torch.randn(1, n, config.hidden_size, dtype=torch.float64) for n in lengths]
    fresh = (False, False, True, False)
    alone, states, positions = [], [], []
    for text, extra, is_fresh in zip(texts, more, fresh):
        cache = HybridCache(config)
        past = 0
        if not is_fresh:
            past = text.shape[1]
            attn(text, past_key_values=cache, use_cache=True, position_embeddings=rope(text))
            states.append([x.clone() for x in state_tensors(cache.layers[0].state)])
        else:
            states.append(None)
        positions.append(past + torch.arange(extra.shape[1]))
        angles = rope(extra, positions[-1][None])
        out = attn(extra, past_key_values=cache, use_cache=True, position_embeddings=angles)[0]
        alone.append((out, [x.clone() for x in state_tensors(cache.layers[0].state)]))
    template = HybridCache(config)
    attn(texts[0], past_key_values=template, use_cache=True, position_embeddings=rope(texts[0]))
    blank = [torch.zeros_like(x) for x in states[0]]
    stacked = iter([torch.cat(parts) for parts in zip(*(blank if s is None else s for s in states))])
    cache = HybridCache(config)
    held = template.layers[0]
    held.state = held._map_state(lambda _: next(stacked))
    cache.layers.append(held)
    packed = torch.cat(more, 1)
    close = 5e-6 if name == "mamba2_v1" else 1e-9  # its state is fp32
    ends = torch.tensor([0, *lengths]).cumsum(0)
    angles = rope(packed, torch.cat(positions)[None])
    out = attn(packed, past_key_values=cache, use_cache=True, position_embeddings=angles, cu_seqlens=ends)[0]
    for i, (expected, expected_states) in enumerate(alone):
        torch.testing.assert_close(out[:, ends[i] : ends[i + 1]], expected, atol=close, rtol=close)
        for state, reference in zip(state_tensors(cache.layers[0].state), expected_states):
            torch.testing.assert_close(state[i : i + 1], reference, atol=close, rtol=close)


@pytest.mark.parametrize("name", [None, "gdn_v7", "gsa_v1", "mamba2_v1"])
@torch.no_grad()
def test_sequence_bytes_are_those_of_a_cache(name):
    values = {**SHAPE, "head_dim": 16, "student_name": name, "keep_full_attention_layers": [1] if name else None}
    config = StudentConfig(**values, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = StudentForCausalLM(config).to(torch.bfloat16).eval()
    cache = model(torch.randint(96, (3, 11)), use_cache=True).past_key_values
    assert cache.nbytes == 3 * HybridCache.sequence_bytes(config, 11, torch.bfloat16)

"""Generation with every student family in a hybrid: what the cache holds, and that every way of
decoding gives the same text."""

import copy
from functools import partial
from threading import Thread

from runtime.data import load_tokenizer

import pytest
import torch
from conftest import save_tokenizer
from test_model import STUDENTS, hybrid, trained
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from convert import load_teacher
from distill_model import decode_loop, modeling_distilled_student
from distill_model.cache import StaticCache, state_tensors
from distill_model.decode_step import GraphedDecoder
from distill_model.student_base import restore_rows

GROWING = {"path_v1", "path_fox_v1", "fox_v1"}  # softmax in another form
WINDOWED = {"swa_v1", "lolcats_v1"}
STATIC = ["teacher", *(name for name in STUDENTS if name not in GROWING | WINDOWED)]


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return load_teacher(teacher_dir)


@pytest.fixture(scope="module")
def models(teacher):
    """Each student, trained a little, with layer 1 kept; built once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = teacher if name == "teacher" else trained(hybrid(teacher, name))
        return made[name]

    return get


def padded(length=12, rows=3, padding=5):
    """ids and mask [rows, length], the first row padded on the left; independent of
    earlier tests."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 96, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return ids, mask


def read(model, ids, mask, *sizes):
    """Logits [B, T, vocabulary] of a text read in chunks of `sizes`, and the cache."""
    cache = None
    logits = []
    start = 0
    for size in sizes:
        out = model(
            ids[:, start : start + size],
            attention_mask=mask[:, : start + size],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        cache = out.past_key_values
        start = start + size
    assert start == ids.shape[1]
    return torch.cat(logits, 1), cache


def held(cache):
    """Bytes per layer."""
    return [sum(x.nbytes for x in state_tensors(layer.state)) for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_the_cache_holds_keys_and_values_or_a_constant_state(models, name):
    model = models(name)
    short, long = (read(model, *padded(length), length)[1] for length in (20, 90))
    for cache, length in ((short, 20), (long, 90)):
        assert [cache.get_seq_length(i) for i in range(4)] == [length] * 4
        kept = cache[1]["attn_state"]
        assert [tuple(x.shape) for x in kept] == [(3, length, 2, 16)] * 2
        assert len(kept) == 2
    a, b = held(short), held(long)
    assert long.nbytes == sum(b)
    assert a[1] * 90 == b[1] * 20
    for i in (0, 2, 3):
        assert b[i] > a[i] if name in GROWING else b[i] == a[i] > 0


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_a_text_in_chunks_equals_the_full_forward(models, name):
    """Chunks of one token, of fewer and more than FLA's 64, some of them all padding in a row."""
    ids, mask = padded(83, padding=11)
    mask[1, :79] = 0
    full = models(name)(ids, attention_mask=mask, use_cache=False).logits
    for sizes in ((4, 1, 5, 70, 3), (66, 17), (7, 76)):
        logits = read(models(name), ids, mask, *sizes)[0]
        torch.testing.assert_close(logits[mask.bool()], full[mask.bool()], atol=5e-4, rtol=1e-3)


# Rows of one batch, 0 for padding: on the right; on the left and inside; a whole chunk; a late
# start; an early end; none.
PADDED = [
    [1] * 20 + [0] * 4,
    [0] * 3 + [1] * 5 + [0] * 5 + [1] * 4 + [0] * 2 + [1] * 5,
    [1] * 10 + [0] * 9 + [1] * 5,
    [0] * 16 + [1] * 8,
    [1] * 7 + [0] * 17,
    [1] * 24,
]


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher", *STUDENTS])
def test_padding_anywhere_leaves_the_text_as_it_is(models, name):
    """At once, in training mode, in chunks with a filled cache, token by token: the same as each
    row's text alone."""
    model = models(name)
    mask = torch.tensor(PADDED)
    ids = padded(mask.shape[1], rows=len(mask))[0]
    texts = torch.cat([model(row[real][None], use_cache=False).logits[0] for row, real in zip(ids, mask.bool())])
    model.train()
    results = {"training mode": model(ids, attention_mask=mask).logits}
    model.eval()
    results["at once"] = model(ids, attention_mask=mask, use_cache=False).logits
    for sizes in ((24,), (8, 8, 8), (9, 1, 7, 7), (1,) * 24):
        results[f"chunks of {sizes}"] = read(model, ids, mask, *sizes)[0]
    for way, logits in results.items():
        difference = (logits[mask.bool()] - texts).abs().max()
        assert difference < 1e-3, f"{way}: {difference:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_refuses_padding_that_is_not_on_the_left(models, name):
    """Whether the prompt was padded on the right, or a sequence ends before others."""
    model = models(name)
    (ids, mask) = padded(12)
    right = mask.flip(1)
    for prompt, step in (
        (right, torch.ones(3, 1, dtype=torch.long)),
        (mask, torch.tensor([[1], [0], [1]])),
    ):
        cache = StaticCache(model.config, 20)
        model(ids, attention_mask=prompt, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask: a static cache takes padding on the left alone"):
            model(ids[:, :1], attention_mask=torch.cat((prompt, step), 1), past_key_values=cache)


def test_a_mask_of_another_length_is_refused(models):
    model = models("gdn_v4")
    (ids, mask) = padded(12)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for wrong in (mask, mask[:, None, None], torch.ones(3, 12)):
        with pytest.raises(ValueError, match=r"attention_mask: its shape .* must be \(3, 17\)"):
            model(ids[:, :5], attention_mask=wrong, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_chunked_prefill_gives_the_same_text(models, name, monkeypatch):
    """Greedy, sampled and beam search, beyond the teacher's 64 positions, and never more tokens
    at a time than requested."""
    model = models(name)
    (ids, mask) = padded(70, padding=23)
    generate = partial(model.generate, ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0)
    for options in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 8},
    ):
        texts = []
        lengths = []
        embed = model.model.embeddings.forward
        for extra in ({}, {"use_cache": False}, {"prefill_chunk_size": 16}):
            torch.manual_seed(3)
            texts.append(generate(**options, **extra))
        assert texts[0].shape == (3, 75)
        assert torch.equal(texts[0], texts[1])
        assert torch.equal(texts[0], texts[2])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.embeddings, "forward", lambda x: (lengths.append(x.shape[1]), embed(x))[1])
        generate(do_sample=False, prefill_chunk_size=16)
    assert lengths == [16, 16, 16, 16, 6, 1, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", STUDENTS)
def test_reordered_rows_continue_as_themselves(models, name):
    model = models(name)
    (ids, mask) = padded(23)
    order = torch.tensor([2, 0, 0])
    cache = read(model, ids[:, :22], mask[:, :22], 22)[1]
    cache.reorder_cache(order)
    step = model(ids[order][:, 22:], attention_mask=mask[order], past_key_values=cache).logits
    full = model(ids[order], attention_mask=mask[order], use_cache=False).logits[:, 22:]
    torch.testing.assert_close(step, full, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", [*STUDENTS, "teacher"])
def test_crop_removes_tokens_or_says_why_not(models, teacher, name):
    model = teacher if name == "teacher" else models(name)
    ids, mask = padded(8, padding=2)
    cache = read(model, ids, mask, 8)[1]
    for nothing in (99, 8, 0):
        cache.crop(nothing)
    if name in ("teacher", "fox_v1"):
        for tokens, length in ((7, 7), (-2, 5)):
            cache.crop(tokens)
            assert [cache.get_seq_length(i) for i in range(4)] == [length] * 4
        rest = model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids, attention_mask=mask).logits[:, 5:], atol=2e-4, rtol=1e-3)
    else:
        with pytest.raises(
            NotImplementedError,
            match=rf"{name} in layers \[0, 2, 3\] holds .* the last 2 tokens cannot be removed",
        ):
            cache.crop(-2)
        assert cache.get_seq_length() == 8
        assert cache[1]["attn_state"][0].shape[1] == 8


def test_chunked_prefill_with_a_cache_of_the_users(models):
    """The whole text again, or its new part alone, with the mask of all of it."""
    model = models("gdn_v4")
    (ids, mask) = padded(40)
    generate = partial(model.generate, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    text = generate(ids)[:, 40:]
    for size in (None, 7):
        for given in (ids, ids[:, 11:]):
            cache = read(model, ids[:, :11], mask[:, :11], 11)[1]
            assert torch.equal(
                generate(given, past_key_values=cache, prefill_chunk_size=size)[:, given.shape[1] :],
                text,
            )


def test_unsupported_caches_are_refused(models, teacher):
    model = models("gdn_v4")
    ids = torch.randint(1, 96, (1, 9))
    with pytest.raises(ValueError, match="a DynamicCache has no place for the states"):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="cache_implementation: 'quantized' has no place for the states"):
        model.generate(ids, cache_implementation="quantized", max_new_tokens=2)
    with pytest.raises(ValueError, match="both `cache_implementation`"):
        model.generate(
            ids,
            cache_implementation="static",
            past_key_values=StaticCache(model.config, 9),
            max_new_tokens=2,
        )
    with pytest.raises(ValueError, match="prefill_chunk_size: 4 needs use_cache=True"):
        model.generate(ids, prefill_chunk_size=4, use_cache=False, max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size: 0 must be at least 1"):
        model.generate(ids, prefill_chunk_size=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="output_attentions: .* leave it out"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="prefill_chunk_size: 4 cannot follow RoPE of type dynamic"),
    ):
        patch.setitem(model.config.rope_parameters, "rope_type", "dynamic")
        model.generate(ids, prefill_chunk_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_stop_strings(models, teacher_dir, options):
    """Strings of which every token is one end a text after its first token; a string that does not
    occur does not end it."""
    model = models("gdn_v4")
    tokenizer = load_tokenizer(teacher_dir)
    ids = torch.randint(1, 80, (1, 9))
    options = {
        "do_sample": False,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "tokenizer": tokenizer,
        **options,
    }
    every = [text for i in range(len(tokenizer)) if (text := tokenizer.decode([i]))]
    lengths = [model.generate(ids, stop_strings=strings, **options).shape[1] for strings in (every, ["def" * 13])]
    assert lengths == [10, 21]


# ------------------------------------------------------------------------------------ static cache
@torch.no_grad()
@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_gives_the_same_text(models, name):
    """Greedy, sampled, beam search, chunked prefill, a batch padded on the left, beyond the
    teacher's 64 positions."""
    model = models(name)
    (ids, mask) = padded(61, padding=23)
    generate = partial(
        model.generate,
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 8},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 16},
        {"do_sample": False, "eos_token_id": list(range(48))},
    ):
        out = []
        for kind in (None, "static"):
            torch.manual_seed(3)
            out.append(generate(**options, cache_implementation=kind))
        assert torch.equal(out[0].sequences, out[1].sequences)
        assert out[0].past_key_values.get_seq_length() == out[1].past_key_values.get_seq_length()


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens = []
        self.ended = 0

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended += 1


class Nines(StoppingCriteria):
    """Ends a sequence that has three tokens below 9."""

    def __call__(self, input_ids, scores, **_):
        return (input_ids[:, -9:] < 9).sum(1) >= 3


@torch.no_grad()
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("name", ["teacher", "gdn_v7"])
def test_the_asynchronous_loop_ends_where_transformers_does(models, monkeypatch, name, ahead):
    """Also with tokens launched after the last one: sequences that end one by one, one that ends at
    the greatest length, none that ends."""
    model = models(name)
    (ids, mask) = padded(21, padding=4)
    everything = {
        "attention_mask": mask,
        "pad_token_id": 0,
        "do_sample": False,
        "cache_implementation": "static",
    }
    lengths = set()
    for options in (
        {},
        {"eos_token_id": list(range(1, 60, 2))},
        {"eos_token_id": 7},
        {"stopping_criteria": [Nines()]},
    ):
        text = model.generate(ids, max_new_tokens=14, **everything, **options)[:, 21:]
        for most in sorted({1, 2, 14, text.shape[1], text.shape[1] + 1}):
            wanted = {"max_new_tokens": most, **everything, **options}
            with monkeypatch.context() as patch:
                patch.setattr(modeling_distilled_student, "can_sample", lambda *_: False)
                expected = model.generate(ids, **wanted)
            with monkeypatch.context() as patch:
                patch.setattr(decode_loop, "tokens_ahead", lambda *_: ahead)
                assert torch.equal(model.generate(ids, **wanted), expected)
            lengths.add(expected.shape[1] - 21)
    assert lengths > {1, 2, 14}
    assert len(lengths) > 3


def test_the_asynchronous_loop_does_not_look_ahead_where_that_is_visible():
    """In a cache that is used again, in a streamer, and in classes outside transformers, which may
    not tolerate a token after the last."""
    gpu = torch.device("cuda")
    theirs = (MinLengthLogitsProcessor(2, 7, device="cpu"), MaxLengthCriteria(9), EosTokenCriteria(7))
    assert decode_loop.tokens_ahead(False, None, theirs, gpu) == 1
    assert (
        decode_loop.tokens_ahead(True, None, theirs, gpu) == decode_loop.tokens_ahead(False, Heard(), theirs, gpu) == 0
    )
    for watcher in (Nines(), LogitsProcessor(), PrefixConstrainedLogitsProcessor(lambda *_: [], 1)):
        assert decode_loop.tokens_ahead(False, None, (*theirs, watcher), gpu) == (type(watcher) is LogitsProcessor)


class Half(MaxLengthCriteria):
    """Ends after half of the allowed tokens."""

    def __call__(self, input_ids, scores, **_):
        return input_ids.new_full(
            (len(input_ids),),
            input_ids.shape[1] >= 21 + (self.max_length - 21) // 2,
            dtype=torch.bool,
        )


@torch.no_grad()
@pytest.mark.parametrize("criteria, length", [([Half(31)], 26), ([MaxLengthCriteria(31), MaxLengthCriteria(25)], 25)])
def test_the_asynchronous_loop_checks_every_criterion(models, criteria, length):
    """One with a length of its own, and the shorter of two lengths."""
    model = models("teacher")
    (ids, _) = padded(21, padding=0)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "stopping_criteria": criteria,
    }
    out = model.generate(ids, cache_implementation="static", **options)
    assert out.shape[1] == length
    assert torch.equal(out, model.generate(ids, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher", "gdn_v7"])
def test_what_the_asynchronous_loop_leaves_to_transformers(models, monkeypatch, name):
    """Generation without the given cache; an adapter that prepends tokens, as PEFT's prompt tuning;
    ids on another device."""
    model = models(name)
    (ids, mask) = padded(21, padding=0)
    used = []
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    monkeypatch.setattr(
        modeling_distilled_student,
        "sample",
        lambda *args, **kwargs: used.append(1) or decode_loop.sample(*args, **kwargs),
    )
    expected = model.generate(ids, cache_implementation="static", **options)
    assert used.pop()
    assert torch.equal(
        model.generate(ids, past_key_values=StaticCache(model.config, 60), use_cache=False, **options),
        expected,
    )
    assert [decode_loop.can_sample(model, ids.to(device), model.generation_config) for device in ("cpu", "meta")] == [
        True,
        False,
    ]
    for asked in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        config = GenerationConfig(use_cache=True, **{asked: True})
        assert decode_loop.can_sample(model, ids, config)  # they are not returned without return_dict_in_generate
        config.return_dict_in_generate = True
        assert not decode_loop.can_sample(model, ids, config)
    config = GenerationConfig(use_cache=True)
    config.is_assistant = True
    assert not decode_loop.can_sample(model, ids, config)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "output_hidden_states", True)
        assert not decode_loop.can_sample(model, ids, model.generation_config)
    prepare = model.prepare_inputs_for_generation
    prompt = model.get_input_embeddings()(torch.randint(1, 96, (3, 5)))

    def with_prompt(input_ids, past_key_values=None, attention_mask=None, **kwargs):
        attention_mask = torch.cat((attention_mask.new_ones(3, 5), attention_mask), 1)
        first = past_key_values.get_seq_length() == 0
        inputs = prepare(input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs) | {
            "position_ids": None
        }
        if first:
            inputs |= {"inputs_embeds": torch.cat((prompt, model.get_input_embeddings()(inputs.pop("input_ids"))), 1)}
        return inputs

    monkeypatch.setitem(vars(model), "prepare_inputs_for_generation", with_prompt)
    tuned = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=StaticCache(model.config, 60), **options), tuned)
    assert not torch.equal(tuned, expected)
    assert not used


@torch.no_grad()
def test_what_the_asynchronous_loop_passes_on(models, monkeypatch):
    """Given positions; logits in fp32, whatever the model's dtype; and whether the cache is used
    again."""
    model = models("teacher")
    (ids, mask) = padded(21, padding=0)
    kept = []
    options = {
        "attention_mask": mask,
        "position_ids": 3 * torch.arange(21)[None],
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    dtypes = [lambda _, scores: dtypes.append(scores.dtype) or scores]
    monkeypatch.setattr(decode_loop, "tokens_ahead", lambda *args: kept.append(bool(args[0])) or 0)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(ids, past_key_values=StaticCache(model.config, 60), **options), expected)
    options |= {
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "logits_processor": dtypes[:],
    }
    copy.deepcopy(model).bfloat16().generate(ids, **options)
    assert kept == [False, True, True]
    assert dtypes[1:] == 6 * [torch.float32]


@torch.no_grad()
def test_the_asynchronous_loop_streams_and_leaves_a_usable_cache(models, monkeypatch):
    model = models("gdn_v7")
    heard = Heard()
    (ids, _) = padded(20, rows=1, padding=0)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options["eos_token_id"] = model.generate(ids, max_new_tokens=12, **options)[0, 25].item()
    whole = model.generate(ids, max_new_tokens=12, streamer=heard, cache_implementation="static", **options)
    assert heard.tokens == whole[0].tolist()
    assert heard.ended == 1
    assert 21 <= whole.shape[1] <= 26
    cache = StaticCache(model.config, 60)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=12, **options)
    assert torch.equal(first, whole)
    assert cache.get_seq_length() == whole.shape[1] - 1
    longer = torch.cat((first, ids), 1)
    options |= {
        "eos_token_id": None,
        "attention_mask": torch.ones_like(longer),
    }  # 0 may occur in the text
    again = model.generate(longer, past_key_values=cache, max_new_tokens=5, return_dict_in_generate=True, **options)
    assert torch.equal(again.sequences, model.generate(longer, max_new_tokens=5, **options))
    assert again.past_key_values is cache
    monkeypatch.setattr(modeling_distilled_student, "sample", None)  # scores are gathered by transformers
    options |= {
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    assert len(model.generate(longer, max_new_tokens=2, **options).scores) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_stays_in_place(models, name):
    """No tensor of it moves or grows from step to step; the logits are those of the full forward,
    also when several tokens come after single ones, and after rows were reordered."""
    model = models(name)
    (ids, mask) = padded(40, padding=7)
    full = model(ids, attention_mask=mask, use_cache=False).logits
    cache = StaticCache(model.config, 40)
    places = set()
    start = 0
    for size in (11, 1, 1, 1, 12, 1, 1, 1):
        new = slice(start, start := start + size)
        logits = model(ids[:, new], attention_mask=mask[:, :start], past_key_values=cache).logits
        torch.testing.assert_close(logits[mask[:, new].bool()], full[:, new][mask[:, new].bool()], atol=5e-4, rtol=1e-3)
        if size == 1 and start < 15:
            places.add(tuple(x.data_ptr() for layer in cache.layers for x in state_tensors(layer.state)))
            assert [tuple(x.shape) for x in cache[1]["attn_state"]] == [(3, 40, 2, 16)] * 2
    assert len(places) == 1
    assert cache.get_seq_length() == start == 29
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    for _ in range(2):
        logits = model(ids[order, start, None], attention_mask=mask[order, : start + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], full[order, start], atol=5e-4, rtol=1e-3)
        start += 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher", "gdn_v7"])
def test_chunked_prefill_after_decoding_with_the_same_static_cache(models, name):
    model = models(name)
    (ids, _) = padded(20, rows=1, padding=0)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    cache = StaticCache(model.config, 60)
    first = model.generate(ids, past_key_values=cache, **options)
    longer = torch.cat((first, ids), 1)
    options["attention_mask"] = torch.ones_like(longer)
    again = model.generate(longer, past_key_values=cache, prefill_chunk_size=4, **options)
    assert torch.equal(again, model.generate(longer, **options))


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "static"])
def test_hidden_states(models, teacher_dir, kind):
    """Those of Hugging Face's model, from a forward pass and from `generate`; a hybrid returns as
    many."""
    ids = torch.randint(1, 96, (2, 9))
    theirs = AutoModelForCausalLM.from_pretrained(teacher_dir)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "pad_token_id": 0,
    }
    expected = theirs(ids, output_hidden_states=True).hidden_states
    teacher = models("teacher")
    for ours in (
        teacher(ids, output_hidden_states=True).hidden_states,
        teacher.model(ids, output_hidden_states=True).hidden_states,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert teacher(ids).hidden_states is None
    expected = theirs.generate(ids, **options).hidden_states
    torch.testing.assert_close(
        teacher.generate(ids, cache_implementation=kind, **options).hidden_states,
        expected,
        atol=1e-4,
        rtol=1e-3,
    )
    hybrid = models("gdn_v4").generate(ids, cache_implementation=kind, **options).hidden_states
    assert [[x.shape for x in step] for step in hybrid] == [[x.shape for x in step] for step in expected]


def test_what_a_static_cache_refuses(models, teacher):
    ids = torch.randint(1, 96, (2, 9))
    for name in (*GROWING, *WINDOWED):
        with pytest.raises(ValueError, match=f"cache_implementation: static has no place for the state of {name}"):
            models(name).generate(ids, cache_implementation="static", max_new_tokens=2)
    model = models("gdn_v4")
    cache = StaticCache(teacher.config, 10)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 4] = 0
    model(ids, attention_mask=mask[:, :9], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: a static cache takes padding on the left alone"):
        model(ids[:, :1], attention_mask=mask[:, :10], past_key_values=cache)
    without = model(ids[:, :1], past_key_values=cache, use_cache=False).logits
    torch.testing.assert_close(without, model(ids[:, :1]).logits)
    assert cache.get_seq_length() == 9
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids: 1 sequences do not fit a static cache of 2"):
        model(ids[:1, :1], past_key_values=cache)
    for change in (
        lambda: cache.batch_select_indices(torch.tensor([1])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(ValueError, match="past_key_values: a static cache of 2 sequences cannot become one of"):
            change()
    with pytest.raises(ValueError, match="past_key_values: a static cache of 10 tokens is full"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: a static cache of 10 tokens has no place for 13"):
        model(ids[:, :3], past_key_values=cache)


@torch.no_grad()
def test_a_static_cache_of_a_layer_on_another_device(teacher):
    """Another one than the prompt's, as with device_map="auto"."""
    cache = StaticCache(teacher.config, 20)
    ids = torch.randint(1, 96, (2, 5))
    teacher(ids, past_key_values=cache)
    cache.begin_decoding(ids[:, :1], None)
    cache.layers[0].state = cache.layers[0]._map_state(lambda x: x.to("meta"))
    k = v = torch.empty(2, 1, *cache[0]["attn_state"][0].shape[2:], device="meta")
    q = torch.empty(2, 1, 4, k.shape[-1], device="meta")
    assert GraphedDecoder(teacher, cache).attend(0, q, k, v).shape == q.shape
    restore_rows(cache.layers[0], torch.tensor([True, False]), [])


@torch.no_grad()
def test_a_static_cache_of_a_teacher_crops(teacher):
    ids = torch.randint(1, 96, (2, 12))
    cache = StaticCache(teacher.config, 20)
    teacher(ids, past_key_values=cache)
    teacher(ids[:, :1], past_key_values=cache)
    cache.crop(7)
    for at in range(7, 10):
        logits = teacher(ids[:, at, None], past_key_values=cache).logits
        torch.testing.assert_close(logits, teacher(ids[:, : at + 1]).logits[:, -1:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["teacher", "fox_v1"])
def test_speculative_decoding_where_the_cache_can_be_cropped(models, teacher, name):
    """Prompt lookup proposes several tokens at a time, and crops the cache after the first rejected
    one."""
    model = teacher if name == "teacher" else models(name)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    generate = partial(model.generate, ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(), generate(prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("name", ["gdn_v4", "gdn_v3", "lolcats_v1"])
def test_streaming_with_a_chat_template(models, tmp_path, name):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %}(a: "
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "def f(x):"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    generate = partial(models(name).generate, **inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)
    thread = Thread(target=generate, kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(generate()[0, inputs["input_ids"].shape[1] :])
    assert text

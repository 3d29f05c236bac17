"""Decoding one token of each sequence with a StaticCache, in few kernels: the time per token
should be that of reading weights and states.

A layer is two RMSNorms, four GEMMs, a SwiGLU, and an attention of one kernel (Gated DeltaNet) or
three (softmax). Projections of the same input are fused into one GEMM: their weights become views
of one buffer, so that nothing is stored twice. Residuals are added by the GEMMs. Whatever was
modified (adapters, hooks, quantised projections) and other linear attentions run as their modules
do, the rest around them as here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from torch import nn

from .attention import SoftmaxAttention
from .cache import StaticCache, state_tensors
from .decode_kernels import gated_delta_token, place_token, swiglu_rows
from .fused_ops import decode_attention
from .student_base import UnquantizedLinear
from .student_deltanet import GatedDeltaNetPlainStudent, GatedDeltaNetStudent

GATED_DELTA_NETS = (GatedDeltaNetStudent, GatedDeltaNetPlainStudent)


# ------------------------------------------------------------------------------- fused projections
def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward and nothing else. transformers' own
    hooks, which record requested outputs and are never removed, do not count: a decoding step
    records nothing."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own_forward = "forward" in vars(module)
    return not own_forward and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)


def is_plain(linear: nn.Module) -> bool:
    """Whether it computes x W^T + bias from tensors of its own: not an adapter, not quantised, not
    sharded by ZeRO-3, and not on another device."""
    return (
        type(linear) in (nn.Linear, UnquantizedLinear)
        and has_no_hooks(linear)
        and linear.weight.is_contiguous()
        and linear.weight.shape == (linear.out_features, linear.in_features)
        and all(type(p) is nn.Parameter and not p.is_inference() for p in linear.parameters())
    )


def shared_storage(
    parameters: list[tuple[nn.Parameter, slice]], shape: tuple[int, ...]
) -> tuple[torch.Tensor | None, list[bool]]:
    """The tensor of `shape` of which all parameters are already the given rows, or None; and for
    each parameter whether its storage has the size and offset for that."""
    example = parameters[0][0]
    nbytes = shape[0] * example[0].nbytes
    row_size = example[0].numel()
    in_place = [
        p.untyped_storage().nbytes() == nbytes and p.storage_offset() == rows.start * row_size for p, rows in parameters
    ]
    storages = {p.untyped_storage().data_ptr() for p, _ in parameters}
    if all(in_place) and len(storages) == 1:
        return example.data.as_strided(shape, (*shape[1:], 1), 0), in_place
    return None, in_place


def join_parameters(parts: list[nn.Parameter | None], rows: list[int]) -> torch.Tensor | None:
    """One tensor [sum(rows), ...] of parameters [rows[i], ...], which become views of it; None is
    rows of zeros.

    Returns None, and changes nothing, where a parameter is a view of a buffer that other code owns, as in
    DeepSpeed's flat buffers, or is shared with other processes: they would keep writing there.
    """
    begins = [0, *accumulate(rows)]
    places = [slice(begin, end) for begin, end in zip(begins, begins[1:])]
    parameters = [(p, place) for p, place in zip(parts, places) if p is not None]
    example = parameters[0][0]
    shape = (begins[-1], *example.shape[1:])
    joined, in_place = shared_storage(parameters, shape)
    if joined is not None:
        return joined
    if any(not p.is_cuda and p.is_shared() for p, _ in parameters):
        return None
    for (p, _), was_joined in zip(parameters, in_place):
        owns_storage = p.untyped_storage().nbytes() == p.nbytes
        if not was_joined and not owns_storage:
            return None
    # Not in inference mode: an inference tensor could not be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        joined = example.data.new_zeros(shape)
        for p, at in parameters:
            joined[at] = p.data
            p.data = joined[at]
    return joined


def fused_parameters(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of several projections of one input as one GEMM, or None where they cannot be
    fused."""
    if not all(map(is_plain, linears)):
        return None
    kinds = {(p.dtype, p.device) for linear in linears for p in linear.parameters()}
    if len(kinds) > 1:
        return None
    rows = [linear.out_features for linear in linears]
    weight = join_parameters([linear.weight for linear in linears], rows)
    if weight is None:
        return None
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return weight, None
    bias = join_parameters(biases, rows)
    return None if bias is None else (weight, bias)


def project(x: torch.Tensor, linears: list[nn.Linear]) -> tuple[torch.Tensor, ...]:
    """The output of each projection for x [B, in_features]."""
    parameters = fused_parameters(linears)
    if parameters is None:
        return tuple(linear(x) for linear in linears)
    return F.linear(x, *parameters).split([linear.out_features for linear in linears], -1)


def add_linear_(hidden: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> None:
    """hidden += linear(x), in one kernel where there is no bias."""
    if not is_plain(linear):
        hidden += linear(x)
        return
    hidden.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        hidden += linear.bias


# ------------------------------------------------------------------------------------------ layers
def input_projections(attn: nn.Module) -> list[nn.Linear]:
    """The projections of an attention's input, in order: q, k, v, and of Gated DeltaNet its gate,
    if it has one, a and b. Empty for an attention that has to run as its module: of another kind,
    or with a replaced part, whose weights a kernel would misread."""
    if type(attn) is SoftmaxAttention:
        norms = (attn.q_norm, attn.k_norm)
        is_original = all(type(norm) in (nn.RMSNorm, nn.Identity) for norm in norms)
        return [attn.q_proj, attn.k_proj, attn.v_proj] if is_original else []
    if type(attn) not in GATED_DELTA_NETS or not has_original_parts(attn):
        return []
    k, v = (attn.k_proj[0], attn.v_proj[0]) if attn.factored else (attn.k_proj, attn.v_proj)
    gates = [attn.g_proj] if attn.use_gate else []
    return [attn.q_proj, k, v, *gates, attn.a_proj, attn.b_proj]


def has_original_parts(attn: GatedDeltaNetStudent) -> bool:
    """Whether its norm, convolutions and factored projections are of the classes that it was built
    with."""
    convolutions = (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d) if attn.use_short_conv else ()
    factored = (attn.k_proj, attn.v_proj) if attn.factored else ()
    return (
        type(attn.o_norm) in (RMSNorm, FusedRMSNormGated, nn.Identity)
        and all(type(convolution) is ShortConvolution for convolution in convolutions)
        and all(type(projection) is nn.Sequential for projection in factored)
    )


def can_fuse_block(block: nn.Module) -> bool:
    """Whether a block can be run part by part: none of its modules has hooks, and its MLP is the
    one that it was built with."""
    original_mlp = type(block.mlp).__module__ == type(block).__module__
    return original_mlp and all(map(has_no_hooks, block.modules()))


def add_attention(
    attn: nn.Module,
    x: torch.Tensor,
    hidden: torch.Tensor,
    cache: StaticCache,
    attend: Callable,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """hidden += attn(x), both [B, hidden_size]; cos, sin [B, head_dim]."""
    projections = input_projections(attn)
    if not projections:
        angles = cos[:, None], sin[:, None]
        options = dict(past_key_values=cache, use_cache=True, position_embeddings=angles)
        hidden += attn(x[:, None], **options, attend=attend)[0][:, 0]
        return
    q, k, v, *gates = project(x, projections)
    state = cache.layers[attn.layer_idx].state
    if type(attn) is SoftmaxAttention:
        first, last = cache.decoding.first, cache.decoding.last
        keys, values = state["attn_state"]
        q = place_token(q, k, v, attn.q_norm, attn.k_norm, cos, sin, keys, values, last)
        out = decode_attention(q, keys, values, first, last).flatten(1)
    else:
        out = decode_gated_delta(attn, (q, k, v, *gates), state, cos, sin)
    add_linear_(hidden, out, attn.o_proj)


def decode_gated_delta(
    attn: nn.Module, projected: tuple[torch.Tensor, ...], state: dict, cos, sin, pages=None
) -> torch.Tensor:
    """The output of a Gated DeltaNet for one token of each sequence, before its output projection, from what its
    `input_projections` give. state: what a cache layer holds, updated in place. cos, sin, pages: see
    `gated_delta_token`."""
    q, k, v, *gates = projected
    if attn.factored:
        k, v = attn.k_proj[1](k), attn.v_proj[1](v)
    gate, a, b = gates if attn.use_gate else (None, *gates)
    states = state["recurrent_state"], state["conv_state"]
    return gated_delta_token(q, k, v, gate, a, b, attn, *states, cos, sin, pages)


def add_mlp(mlp: nn.Module, x: torch.Tensor, hidden: torch.Tensor) -> None:
    """hidden += mlp(x), both [B, hidden_size]."""
    gate, up = project(x, [mlp.gate_proj, mlp.up_proj])
    activated = swiglu_rows(gate, up) if mlp.act is None else mlp.act(gate) * up
    add_linear_(hidden, activated, mlp.down_proj)


def join_projections(model) -> None:
    """Joins the weights of projections of the same input, as the first step would, where they are
    not joined yet."""
    before = [p.data_ptr() for p in model.parameters()]
    for block in filter(can_fuse_block, model.model.layers):
        projections = input_projections(block.attn)
        if projections:
            fused_parameters(projections)
        fused_parameters([block.mlp.gate_proj, block.mlp.up_proj])
    if model.device.type == "cuda" and before != [p.data_ptr() for p in model.parameters()]:
        # The freed blocks have the sizes of single weights: too small for what comes next.
        torch.cuda.empty_cache()


@torch.no_grad()
def decode_token(model, cache: StaticCache, attend: Callable) -> torch.Tensor:
    """The logits [B, 1, vocab_size] after the token in `cache.decoding`; the states in the cache
    are updated in place.

    attend(layer, q, k, v): the softmax attention of blocks that run as their modules.
    """
    inner = model.model
    hidden = inner.embeddings(cache.decoding.input_ids)
    angles = inner.position_embeddings(hidden, cache.decoding.position_ids)
    cos, sin = (x[:, 0] for x in angles)
    # It is updated in place, and a hook may hold the embeddings' output.
    hidden = hidden[:, 0].clone()
    options = dict(past_key_values=cache, use_cache=True, position_embeddings=angles, attend=attend)
    for block in inner.layers:
        if can_fuse_block(block):
            add_attention(block.attn, block.attn_norm(hidden), hidden, cache, attend, cos, sin)
            add_mlp(block.mlp, block.mlp_norm(hidden), hidden)
        else:  # copies in and out: hooks may hold them, and `hidden` is updated in place
            hidden = block(hidden[:, None].clone(), **options)[:, 0].clone()
    return model.lm_head(inner.norm(hidden))[:, None]


# ------------------------------------------------------------------------------------- the decoder
def is_decoding_step(past_key_values, input_ids: torch.Tensor | None) -> bool:
    """Whether a forward pass is one more token of each sequence whose prompt is in
    a StaticCache."""
    if not isinstance(past_key_values, StaticCache) or input_ids is None:
        return False
    return input_ids.shape[1] == 1 and past_key_values.get_seq_length() > 0


class GraphedDecoder:
    """Decodes token by token with a StaticCache: on a GPU as one CUDA graph per token, recorded at
    the first step, which avoids the launch overhead of single kernels.

    A step is `decode_token`, which moves the weights of fused projections to new memory. Where
    weights are quantised or on several devices, it is the model's own forward without a graph. The
    decoder itself is stateless and cheap: buffers and graph are in `cache.decoding`.
    """

    def __init__(self, model, cache: StaticCache):
        self.model = model
        self.cache = cache

    @torch.no_grad()
    def step(self, input_ids, position_ids=None, attention_mask=None) -> torch.Tensor:
        """The logits [B, 1, vocab_size] after one more token of each sequence, input_ids [B, 1].

        position_ids: [B or 1, 1], or None to count the tokens. attention_mask: as in
        `StaticCache.begin_decoding`; the first step reads all of it, later ones only the column of
        their token, if it has one. Raises ValueError for padding that is not on the left, and if
        the cache is full or of another batch size.
        """
        cache = self.cache
        if cache.decoding is None:
            cache.begin_decoding(input_ids, attention_mask)
        self.check(input_ids, attention_mask)
        buffers = cache.decoding
        buffers.input_ids.copy_(input_ids)
        counted = (buffers.last - buffers.first)[:, None]
        buffers.position_ids.copy_(counted if position_ids is None else position_ids)
        if buffers.graph is None and buffers.last.is_cuda and self.on_one_device():
            # Of the current device, which may be another one, a stream would record nothing.
            with torch.cuda.device(buffers.last.device):
                self.capture()
        if buffers.graph is None:
            self.run()
        else:
            buffers.graph.replay()
        for layer in cache.layers:
            layer._seen_tokens += 1
        return buffers.logits.clone()

    def check(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        cache = self.cache
        has_column = attention_mask is not None and attention_mask.shape[1] > cache.get_seq_length()
        if has_column and not attention_mask[:, -1].all():
            raise ValueError(cache.PADDING)
        batch_size = len(cache.decoding.input_ids)
        if len(input_ids) != batch_size:
            raise ValueError(f"input_ids: {len(input_ids)} sequences do not fit a static cache of {batch_size}")
        if cache.get_seq_length() >= cache.max_len:
            raise ValueError(f"past_key_values: a static cache of {cache.max_len} tokens is full; make a larger one")

    def run(self) -> None:
        """Computes the step of `cache.decoding` without a graph."""
        buffers = self.cache.decoding
        buffers.is_running = True
        try:
            buffers.logits = self.logits()
        finally:
            buffers.is_running = False
        buffers.last += 1

    def logits(self) -> torch.Tensor:
        if self.can_fuse():
            return decode_token(self.model, self.cache, self.attend)
        buffers = self.cache.decoding
        outputs = self.model.model(
            buffers.input_ids,
            position_ids=buffers.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            attend=self.attend,
        )
        return self.model.lm_head(outputs.last_hidden_state)

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Softmax attention of the decoded token, q [B, 1, heads, head_dim], to all earlier ones
        and itself; its k and v [B, 1, kv heads, head_dim] are written to the cache."""
        keys, values = self.cache.layers[layer_idx].state["attn_state"]
        first = self.cache.decoding.first.to(q.device)  # a model may be on several devices
        last = self.cache.decoding.last.to(q.device)
        keys.index_copy_(1, last, k)
        values.index_copy_(1, last, v)
        return decode_attention(q, keys, values, first, last)

    def on_one_device(self) -> bool:
        devices = {p.device for p in self.model.parameters()}
        return len(devices) == 1 and not getattr(self.model, "is_quantized", False)

    def can_fuse(self) -> bool:
        """Whether `decode_token` applies: it supports neither hooks around all layers
        nor autocast."""
        autocast = torch.is_autocast_enabled(self.model.device.type)
        return self.on_one_device() and has_no_hooks(self.model.model) and not autocast

    def capture(self) -> None:
        """Records `run` as a CUDA graph. It runs twice before, which compiles its kernels; the
        states that this changes are restored."""
        if self.can_fuse():
            join_projections(self.model)
        buffers = self.cache.decoding
        recurrent = [layer.state for layer in self.cache.layers if "recurrent_state" in layer.state]
        changed = [buffers.last, *state_tensors(recurrent)]
        before = [x.clone() for x in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
                for buffer, value in zip(changed, before):
                    buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        buffers.graph = graph  # not earlier: a graph whose recording failed must not be replayed

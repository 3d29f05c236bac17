"""A linear attention of the model library on vLLM's flat batch of tokens, with its states in vLLM's pages.

vLLM has read some tokens of every sequence before a step: none, or all but those of this step. A state is the whole
of what a layer knows of a sequence, so each sequence holds one page, wherever vLLM puts it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor

from distill_model import StudentConfig, get_student_attention_class
from distill_model.cache import state_tensors
from distill_model.decode_step import decode_gated_delta, fused_parameters, input_projections, project
from distill_model.student_base import State

from .config import has_states


# ------------------------------------------------------------------------------------------- batch
@dataclass
class LinearMetadata:
    """The sequences of a step: first those of one token each, then the others, packed.

    rows [N]: the page of each sequence. has_state [N]: whether it holds a state of this sequence; a page that is
    used for the first time holds another one's. decodes: how many sequences have one token. tokens: how many the
    others have; ends [N - decodes + 1]: where each of them begins and ends, None without others.
    total: how many of the N are sequences, and not rows that fill up a CUDA graph. lengths [N]: all tokens of each.
    """

    rows: torch.Tensor
    has_state: torch.Tensor
    decodes: int
    tokens: int
    ends: torch.Tensor | None
    total: int
    lengths: torch.Tensor


class LinearMetadataBuilder(AttentionMetadataBuilder[LinearMetadata]):
    """Makes the metadata of each step, for each of vLLM's groups of linear layers. What does not differ between them,
    the first one computes: on the host, from vLLM's copy there, so that it does not wait for the GPU."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1  # sequences of one token come first
    supports_update_block_table = True
    last_ends = (None, None)  # of all builders: the last batch's `LinearMetadata.ends`, as a list and on the device

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.cache_mode = vllm_config.cache_config.mamba_cache_mode
        largest = vllm_config.scheduler_config.max_num_seqs
        largest = max(largest, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        # At fixed addresses, which a CUDA graph reads.
        self.rows = torch.zeros(largest, dtype=torch.long, device=device)
        self.has_state = torch.zeros(largest, dtype=torch.bool, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LinearMetadata:
        batch = common_attn_metadata
        starts = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
        counts = [end - start for start, end in pairwise(starts)]
        # A graph of more sequences than there are has rows without tokens at its end.
        total = len(counts) - counts.count(0)
        decodes = next((i for i, count in enumerate(counts[:total]) if count > 1), total)
        rows = len(counts) if decodes == total else total
        new = 1 if decodes == total else batch.query_start_loc[: total + 1].diff()
        torch.gt(batch.seq_lens[:total], new, out=self.has_state[:total])
        if rows > total:
            self.has_state[total:rows] = False
        return LinearMetadata(
            rows=self.pages(batch.block_table_tensor, batch.seq_lens, total, rows),
            has_state=self.has_state[:rows],
            decodes=rows if decodes == total else decodes,
            tokens=starts[total] - starts[decodes],
            ends=self.ends(batch, starts[decodes : total + 1], decodes) if decodes < total else None,
            total=total,
            lengths=batch.seq_lens,
        )

    def update_block_table(
        self, metadata: LinearMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> LinearMetadata:
        """The metadata of the same step, which another group's builder made, for this group's pages. vLLM calls this
        instead of `build`. `has_state` is copied, because a graph was recorded with this builder's."""
        rows = len(metadata.rows)
        self.has_state[:rows].copy_(metadata.has_state)
        pages = self.pages(blk_table, metadata.lengths, metadata.total, rows)
        return replace(metadata, rows=pages, has_state=self.has_state[:rows])

    def pages(self, blocks: torch.Tensor, lengths: torch.Tensor, total: int, rows: int) -> torch.Tensor:
        """The page of each of the first `total` sequences, then the page that no sequence has, up to `rows`."""
        pages = mamba_get_block_table_tensor(blocks, lengths, self.kv_cache_spec, self.cache_mode)
        self.rows[:total].copy_(pages[:total, 0])
        if rows > total:
            self.rows[total:rows] = NULL_BLOCK_ID
        return self.rows[:rows]

    @classmethod
    def ends(cls, batch: CommonAttentionMetadata, places: list[int], decodes: int) -> torch.Tensor:
        """Where the sequences after the first `decodes` begin and end, from the same as a list, `places`, in which the
        decoded tokens count. One tensor for the layers of all builders: FLA copies it to the host, and keeps what it
        derives from the last few tensors that it got."""
        if cls.last_ends[0] != places:
            own = batch.query_start_loc[decodes : decodes + len(places)]
            cls.last_ends = places, own - batch.query_start_loc[decodes]
        return cls.last_ends[1]


class LinearBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "HYBRID_DISTILLATION_LINEAR"

    @staticmethod
    def get_builder_cls() -> type[LinearMetadataBuilder]:
        return LinearMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


# ------------------------------------------------------------------------------------------ states
class SequenceStates:
    """What FLA's layers take for a cache: the states of one layer before the step, and those after it."""

    def __init__(self, before: dict | None, layer_idx: int):
        self.before = before
        self.after: dict | None = None
        self.layer_idx = layer_idx

    def __len__(self) -> int:
        return 0 if self.before is None else self.layer_idx + 1

    def __getitem__(self, layer_idx: int) -> dict:
        return self.before

    def update(self, *, recurrent_state, conv_state=None, **_) -> dict:
        self.after = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        return self.after


def nested(declared, tensors: Iterator[torch.Tensor]):
    """The tensors in the nesting of a declaration."""
    if isinstance(declared, State):
        return next(tensors)
    if isinstance(declared, dict):
        return {name: nested(part, tensors) for name, part in declared.items()}
    return None if declared is None else tuple(nested(part, tensors) for part in declared)


def config_of_rank(config: StudentConfig, devices: int) -> StudentConfig:
    """The model's config with a device's share of the heads. Sizes that a layer would derive from the number of heads
    are those of the whole layer."""
    if devices == 1:
        return config
    student = get_student_attention_class(config.student_name)
    with torch.device("meta"):
        whole = student(config, 0, **config.student_options)
    derived = {
        key: getattr(whole, key) for key in student.options if key.endswith("low_rank_dim") and hasattr(whole, key)
    }
    share = copy.deepcopy(config)
    share.num_attention_heads //= devices
    share.student_options = derived | config.student_options
    return share


def layer_states(vllm_config: VllmConfig) -> tuple[dict, list[tuple[tuple[int, ...], torch.dtype]]]:
    """What a device keeps of each sequence in a linear layer: the declaration, and shape and dtype of each tensor."""
    model = vllm_config.model_config
    if not has_states(model.hf_config):  # vLLM 0.26 asks for the states of a teacher, too
        return {}, []
    config = config_of_rank(model.hf_config, vllm_config.parallel_config.tensor_parallel_size)
    declared = get_student_attention_class(config.student_name).states(config)
    return declared, [(state.shape, state.dtype or model.dtype) for state in state_tensors(declared)]


# ------------------------------------------------------------------------------------------- layer
class StudentLinear(nn.Module, MambaBase):
    """A linear attention. `inner` is the layer of the model library, with this device's share of the heads."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        self.prefix = prefix
        self.layer_idx = layer_idx
        self.declared, self.tensors = layer_states(vllm_config)
        self.devices = get_tensor_model_parallel_world_size()
        config = config_of_rank(vllm_config.model_config.hf_config, self.devices)
        inner = get_student_attention_class(config.student_name)(config, layer_idx, **config.student_options)
        self.inner = inner.to(vllm_config.model_config.dtype).eval().requires_grad_(False)
        self.inner.exempt_from_quantization()
        self.kv_cache = (torch.tensor([]),)
        self.projections = self.joined = None  # see `join_projections`
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.tensors)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.tensors)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[LinearBackend]:
        return LinearBackend

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor, name: str) -> None:
        """Copies this device's heads of a whole layer's tensor into the parameter `name` of `inner`."""
        rank = get_tensor_model_parallel_rank()
        if self.devices > 1:
            tensor = self.inner.share_of_heads(name, tensor, rank, self.devices)
        if rank > 0 and parameter is self.inner.o_proj.bias:  # the devices' outputs are added up
            tensor = torch.zeros_like(tensor)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{self.prefix}.{name}: {tuple(tensor.shape)} in the file, {tuple(parameter.shape)} here")
        parameter.data.copy_(tensor)

    def run(self, x, rope, rows, has_state, cu_seqlens=None) -> torch.Tensor:
        """The outputs of tokens x [B, T, hidden_size], or packed [1, T, hidden_size] with cu_seqlens; the states in
        the pages `rows` are replaced by those after the tokens."""
        before = []
        blank = ~has_state
        for pool in self.kv_cache:
            state = pool[rows]
            before.append(state.masked_fill_(blank.view(-1, *[1] * (state.ndim - 1)), 0))
        states = SequenceStates(nested(self.declared, iter(before)), self.layer_idx)
        options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        out = self.inner(x, past_key_values=states, use_cache=True, position_embeddings=rope, **options)[0]
        for pool, state in zip(self.kv_cache, state_tensors(states.after), strict=True):
            pool[rows] = state.to(pool.dtype)
        return out

    def join_projections(self) -> None:
        """Makes the weights of one input views of one tensor, as decoding reads them; without, the first step would.
        Found once, because looking for them takes time in each step that is not a CUDA graph."""
        self.projections = input_projections(self.inner)
        self.joined = fused_parameters(self.projections) if self.projections else None

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the projections of its input give for x [B, hidden_size]; of none, where it decodes as its module."""
        if self.projections is None:
            self.join_projections()
        if self.joined is None:
            return project(x, self.projections) if self.projections else ()
        return F.linear(x, *self.joined).split([linear.out_features for linear in self.projections], -1)

    def decode(self, x, rope, rows, has_state) -> torch.Tensor:
        """As `run`, for one token of each sequence, x [B, hidden_size]: a Gated DeltaNet is one kernel that reads and
        writes the pages, between two GEMMs."""
        projected = self.project(x)
        if not projected:
            angles = None if rope is None else tuple(y[:, None] for y in rope)
            return self.run(x[:, None], angles, rows, has_state)[:, 0]
        state = nested(self.declared, iter(self.kv_cache))
        angles = (None, None) if rope is None else rope
        out = decode_gated_delta(self.inner, projected, state, *angles, (rows, has_state))
        return self.inner.o_proj(out)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """x [tokens, hidden_size]; rope: cos and sin [tokens, head_dim], or None for a layer without."""
        metadata = get_forward_context().attn_metadata
        # Without metadata vLLM measures the memory of a step.
        out = self.rehearse(x, rope) if metadata is None else self.step(x, rope, metadata[self.prefix])
        return tensor_model_parallel_all_reduce(out) if self.devices > 1 else out

    def rehearse(self, x, rope) -> torch.Tensor:
        """The outputs of one new sequence, by the same kernels as those of prompts, which are compiled and tuned here
        and not when the first request comes."""
        before = [torch.zeros(1, *shape, dtype=dtype, device=x.device) for shape, dtype in self.tensors]
        states = SequenceStates(nested(self.declared, iter(before)), self.layer_idx)
        ends = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        angles = None if rope is None else tuple(y[None] for y in rope)
        options = dict(past_key_values=states, use_cache=True, position_embeddings=angles, cu_seqlens=ends)
        return self.inner(x[None], **options)[0][0]

    def step(self, x, rope, batch: LinearMetadata) -> torch.Tensor:
        n = batch.decodes
        if n == len(x):
            return self.decode(x, rope, batch.rows, batch.has_state)
        out = torch.zeros_like(x)
        if n:
            angles = None if rope is None else tuple(y[:n] for y in rope)
            out[:n] = self.decode(x[:n], angles, batch.rows[:n], batch.has_state[:n])
        if n < len(batch.rows):
            packed = slice(n, n + batch.tokens)
            angles = None if rope is None else tuple(y[None, packed] for y in rope)
            states = batch.rows[n:], batch.has_state[n:]
            out[packed] = self.run(x[None, packed], angles, *states, batch.ends)[0]
        return out

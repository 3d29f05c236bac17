"""A vLLM connector for serve.py: gives the prompts of its decoding measurement a cache of random values,
without reading them. vLLM takes it for a cache that another machine has filled, and computes only the last token
of the prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase

FILLED = "decode-"  # begins the names of requests whose prompts are not read


def is_filled(request) -> bool:
    return request.request_id.startswith(FILLED)


@dataclass
class NewPages(KVConnectorMetadata):
    """For each request that begins: its pages, of each group of layers."""

    requests: list[tuple[list[int], ...]] = field(default_factory=list)


class FilledCache(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's half notes the pages of requests that begin, the worker's half fills them."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.pages = kv_cache_config.num_blocks
        self.new = NewPages()
        self.caches: dict[str, torch.Tensor | list[torch.Tensor]] = {}

    # ------------------------------------------------------------------------------- scheduler
    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        """All tokens but the last, from which the first new one is computed; at once."""
        if not is_filled(request):
            return 0, False
        return request.num_tokens - num_computed_tokens - 1, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.new.requests.append(blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output) -> NewPages:
        new, self.new = self.new, NewPages()
        return new

    def request_finished(self, request, block_ids) -> tuple[bool, None]:
        return False, None

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, None]:
        return False, None

    # ---------------------------------------------------------------------------------- worker
    def register_kv_caches(self, kv_caches) -> None:
        self.caches = kv_caches

    def start_load_kv(self, forward_context, **_) -> None:
        for groups in self._get_connector_metadata().requests:
            for names, pages in zip(self.groups, groups, strict=True):
                for name in names:
                    layer = forward_context.no_compile_layers[name]
                    # vLLM 0.32 registers the states of a linear layer as bytes.
                    linear = isinstance(layer, MambaBase)
                    self.fill(name, layer.kv_cache if linear else [self.caches[name]], pages)

    def fill(self, layer: str, cache: Iterable[torch.Tensor], pages: list[int]) -> None:
        """Small random values in these pages of a layer: keys and values, or each of its states. A page may be
        several rows of a cache, where the attention kernel's blocks are smaller. Raises ValueError for a cache of
        another layout."""
        for tensor in cache:
            rows_per_page, rest = divmod(len(tensor), self.pages)
            if rest:
                raise ValueError(f"{layer}: a cache of {tuple(tensor.shape)} is not made of {self.pages} pages")
            within = torch.arange(rows_per_page, device=tensor.device)
            rows = torch.tensor(pages, device=tensor.device)[:, None] * rows_per_page + within
            shape = (rows.numel(), *tensor.shape[1:])
            tensor[rows.flatten()] = torch.randn(shape, dtype=tensor.dtype, device=tensor.device) / 16

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **_) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

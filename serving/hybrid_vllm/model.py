"""`StudentForCausalLM` in vLLM: vLLM's own layers around softmax attention, MLP, norms and head, and the model
library's linear attentions. Takes teachers, linear students and hybrids, as the exports of all stages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import maybe_prefix

from distill_model import StudentConfig
from distill_model.attention import RotaryEmbedding

from .config import window_size
from .linear import StudentLinear, layer_states

# A projection of an export -> vLLM's, of several, and its part.
FUSED = {
    "attn.q_proj": ("attn.qkv_proj", "q"),
    "attn.k_proj": ("attn.qkv_proj", "k"),
    "attn.v_proj": ("attn.qkv_proj", "v"),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}


class StudentSoftmax(nn.Module):
    """Grouped-query softmax attention with RoPE, optional biases and per-head q/k RMSNorm, over the last `window`
    tokens, the query's among them, or all."""

    def __init__(self, vllm_config: VllmConfig, window: int | None, prefix: str):
        super().__init__()
        config: StudentConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        size = self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * size,
            config.hidden_size,
            bias=config.attention_output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads  # of this device
        self.widths = [heads * size, kv_heads * size, kv_heads * size]
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.q_norm = RMSNorm(size, eps=eps)
            self.k_norm = RMSNorm(size, eps=eps)
        self.rotary_emb = get_rope(
            size, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            heads,
            size,
            size**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x)[0].split(self.widths, -1)
        if self.q_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class StudentMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: StudentConfig = vllm_config.model_config.hf_config
        options = dict(bias=config.mlp_bias, quant_config=vllm_config.quant_config)
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [wide] * 2, prefix=f"{prefix}.gate_up_proj", **options)
        self.down_proj = RowParallelLinear(wide, hidden, prefix=f"{prefix}.down_proj", **options)
        self.act = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


class StudentBlock(nn.Module):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config: StudentConfig = vllm_config.model_config.hf_config
        window = None if layer_idx in config.keep_full_attention_layers else window_size(config)
        self.is_softmax = layer_idx in config.keep_full_attention_layers or window is not None
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_softmax:
            self.attn = StudentSoftmax(vllm_config, window, f"{prefix}.attn")
        else:
            self.attn = StudentLinear(vllm_config, layer_idx, f"{prefix}.attn")
        self.mlp = StudentMLP(vllm_config, f"{prefix}.mlp")

    def forward(self, positions, branch, residual, rope) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's input is branch + residual, or branch alone where residual is None; so is its output."""
        if residual is None:
            x, residual = self.attn_norm(branch), branch
        else:
            x, residual = self.attn_norm(branch, residual)
        x = self.attn(positions, x) if self.is_softmax else self.attn(x, rope)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


class StudentModel(nn.Module):
    """Embeddings, blocks and final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: StudentConfig = vllm_config.model_config.hf_config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embeddings")
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(StudentBlock(vllm_config, i, f"{prefix}.layers.{i}") for i in layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        linear = [block.attn.inner for block in self.layers if not block.is_softmax]
        self.rotary_emb = RotaryEmbedding(config) if any(attn.rope_share for attn in linear) else None

    def forward(self, input_ids, positions, inputs_embeds=None) -> torch.Tensor:
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rope = None
        if self.rotary_emb is not None:
            rope = tuple(y[0] for y in self.rotary_emb(x, positions[None]))
        residual = None
        for block in self.layers:
            x, residual = block(positions, x, residual, rope)
        return self.norm(x, residual)[0]


class StudentForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The language model."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    states_per_layer = 0  # of the model in this process; vLLM asks the class for as many functions

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        type(self).states_per_layer = len(layer_states(vllm_config)[1])
        self.model = StudentModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embeddings(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in layer_states(vllm_config)[1])

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in layer_states(vllm_config)[1])

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        """How the prefix cache copies each state: all of it."""
        return (get_temporal_copy_spec,) * cls.states_per_layer

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the tensors of an export; returns the names of the parameters that were loaded."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            loaded.add(self.load_weight(parameters, name, tensor))
        for block in self.model.layers:
            if not block.is_softmax:
                block.attn.join_projections()
        return loaded

    def load_weight(self, parameters: dict[str, nn.Parameter], name: str, tensor: torch.Tensor) -> str:
        """Loads one tensor of an export into its parameter, or into its rows of one; returns the parameter's name."""
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            default_loader = default_weight_loader
            getattr(parameters[name], "weight_loader", default_loader)(parameters[name], tensor)
            return name
        block = self.model.layers[int(parts[2])]
        own = ".".join(parts[3:])
        if parts[3] == "attn" and not block.is_softmax:
            own = own.removeprefix("attn.")
            name = ".".join((*parts[:4], "inner", own))
            block.attn.load(parameters[name], tensor, own)
            return name
        module, _, kind = own.rpartition(".")
        module, *part = FUSED.get(module, (module,))
        name = ".".join((*parts[:3], module, kind))
        parameter = parameters[name]
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *part)
        return name

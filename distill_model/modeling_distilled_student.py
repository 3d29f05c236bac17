"""`StudentForCausalLM`: teacher, all-linear student and hybrid in one model class.

Parameter names are FLA's and the same in all three, so that weights move between them as state
dicts with equal keys. With every layer kept the model *is* the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cpu_ops import install as install_cpu_ops

# An exported checkpoint carries this file, not the package's __init__, so FLA's entry points are
# replaced here: before FLA's layers are imported, and only where there is no GPU for its kernels.
install_cpu_ops()

from fla.models.utils import Cache, FLAGenerationMixin, FLALayer

from .attention import RotaryEmbedding, SoftmaxAttention
from .cache import HybridCache, StaticCache
from .config_distilled_student import StudentConfig
from .decode_loop import can_sample, sample
from .decode_step import GraphedDecoder, is_decoding_step
from .divergences import TopTokens
from .documents import Documents, learned_tokens, run_attention
from .fused_ops import project_swiglu, rms_norm, swiglu
from .losses import DistillationLoss, forward_kl, next_token_loss
from .student_base import InitReport, copy_rows, restore_rows
from .student_layers import (
    STUDENT_ATTENTION_MAP,
    check_student,
    get_student_attention_class,
    is_student_attention,
)

__all__ = [
    "STUDENT_ATTENTION_MAP",
    "StudentBlock",
    "StudentForCausalLM",
    "StudentModel",
    "forward_kl",
    "get_student_attention_class",
]


class RMSNorm(nn.RMSNorm):
    """RMSNorm; with `branch` a fused residual add and RMSNorm: norm(x + branch) and x + branch."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None = None):
        return rms_norm(x, self.weight, self.eps, branch)


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x)), Shazeer, arXiv 2002.05202.

    checkpoint_activations: store x alone for the backward pass, which recomputes gate and up.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, wide, bias=config.mlp_bias)
        self.down_proj = nn.Linear(wide, hidden, bias=config.mlp_bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]
        self.checkpoint_activations = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Nothing in it is random.
            return checkpoint(self.project, x, use_reentrant=False, preserve_rng_state=False)
        return self.project(x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act is not None:
            return self.down_proj(self.act(gate) * up)
        if self.checkpoint_activations:
            return self.down_proj(swiglu(gate, up))
        return project_swiglu(gate, up, self.down_proj)


class LMHead(nn.Linear):
    """The output projection. With `loss`, a function of (hidden, weight), it returns that loss and
    never the logits.

    The loss is computed inside forward(), where the hooks of ZeRO-3 have gathered the weight.
    """

    def forward(self, hidden: torch.Tensor, loss: Callable | None = None) -> torch.Tensor:
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


class StudentBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x)). `attn` is softmax or linear, as the
    config says."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if layer_idx in config.keep_full_attention_layers:
            self.attn = SoftmaxAttention(config, layer_idx)
        else:
            student = get_student_attention_class(config.student_name)
            attn = student(config, layer_idx, **config.student_options)
            # FLA creates some parameters in fp32, whatever dtype the model is loaded in.
            self.attn = attn.to(torch.get_default_dtype())
            self.attn.exempt_from_quantization()
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention_output = run_attention(self.attn, self.attn_norm(hidden_states), **kwargs)
        normed, hidden_states = self.mlp_norm(hidden_states, attention_output)
        return hidden_states + self.mlp(normed)


class StudentPreTrainedModel(PreTrainedModel):
    config_class = StudentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StudentBlock"]
    _can_record_outputs = {"hidden_states": StudentBlock}
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if is_student_attention(module) and module.o_proj.weight.device.type != "meta":
            module.init_fresh()

    def set_activation_checkpointing(self, mode: bool | str) -> None:
        """What the backward pass recomputes instead of storing it: nothing (False), "mlp" (the
        activations inside the MLPs), or whole blocks (True)."""
        if mode is True:
            # Nothing in a block is random.
            self.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        else:
            self.gradient_checkpointing_disable()
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.checkpoint_activations = mode == "mlp"


def expected_mask(attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """The mask, or None where nothing is padded, which spares the linear layers their unpadding.
    Raises ValueError for another shape than `shape`."""
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask: its shape {tuple(attention_mask.shape)} must be {shape}, a column for "
            "each token in the cache and in the input"
        )
    return None if attention_mask.all() else attention_mask


def check_documents(document_ids: torch.Tensor, shape: tuple[int, int], **others) -> None:
    """Raises ValueError for document_ids of another shape than `shape`, or beside inputs of a
    forward pass that go on with a text: others, by name."""
    if document_ids.shape != shape:
        raise ValueError(f"document_ids: its shape {tuple(document_ids.shape)} must be {tuple(shape)}, of the input")
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(f"document_ids: whole documents are read, without {name}; leave one of them out")


def count_positions(attention_mask: torch.Tensor | None, past: int, q_len: int, device: torch.device) -> torch.Tensor:
    """Positions [B or 1, q_len] after `past` tokens; padding does not count."""
    if attention_mask is None:
        return torch.arange(past, past + q_len, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -q_len:]


class StudentModel(StudentPreTrainedModel):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(StudentBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def unsupported_empty_rows(self, attention_mask: torch.Tensor | None, q_len: int) -> torch.Tensor | None:
        """The sequences [B] whose q_len new tokens are all padding, or None if there are none or
        all layers support them."""
        if attention_mask is None:
            return None
        is_empty = ~attention_mask[:, -q_len:].any(1)
        students = [block.attn for block in self.layers if is_student_attention(block.attn)]
        if all(attn.supports_empty_rows for attn in students) or not is_empty.any():
            return None
        return is_empty

    def linear_states(self, cache: Cache | None) -> list[FLALayer]:
        """The cache's entries of the linear layers; none before the first token."""
        if cache is None:
            return []
        return [cache.layers[i] for i in self.config.linear_layers if i < len(cache.layers)]

    def cache_of(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache that a forward pass reads and updates; None for none. Raises ValueError for a
        cache that has no place for the states of linear layers."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache:
            return None
        if past_key_values is None:
            return HybridCache(self.config)
        if not isinstance(past_key_values, Cache):
            raise ValueError(
                f"past_key_values: a {type(past_key_values).__name__} has no place for the states of linear layers; "
                "leave it out, and pass on what the model returns"
            )
        return past_key_values

    def position_embeddings(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's (cos, sin), each [B or 1, T, head_dim], in the dtype of hidden_states [B, T,
        hidden_size].

        position_ids [B or 1, T]; None counts from 0.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        return self.rotary_emb(hidden_states, position_ids)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        attend: Callable[..., torch.Tensor] | None = None,
        document_ids: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T]; attention_mask [B, past + T], 0 for padding; attend: see
        `SoftmaxAttention.forward`; document_ids [B, T]: each document is read as if it stood alone,
        see documents.py; max_documents: see `Documents.of`. Returns last_hidden_state [B, T,
        hidden_size] after the final norm; with output_hidden_states also hidden_states, the
        embeddings and each block's output, as transformers' models do. Raises ValueError for a cache
        that has no place for the states of linear layers."""
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, q_len, _ = hidden_states.shape
        documents = None
        if document_ids is not None:
            ruled_out = dict(attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
            check_documents(document_ids, (batch_size, q_len), position_ids=position_ids, **ruled_out)
            use_cache = False
            documents = Documents.of(document_ids, max_documents)
            position_ids = documents.positions
        past_key_values = self.cache_of(past_key_values, use_cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention_mask = expected_mask(attention_mask, (batch_size, past + q_len))
        if position_ids is None:
            position_ids = count_positions(attention_mask, past, q_len, hidden_states.device)
        position_embeddings = self.position_embeddings(hidden_states, position_ids)
        empty_rows = self.unsupported_empty_rows(attention_mask, q_len)
        if empty_rows is not None:
            # Kernels differ in what they do with an empty sequence: such a row reads one token of
            # padding, and its states are restored afterwards.
            attention_mask = attention_mask.clone()
            attention_mask[empty_rows, -1] = 1
            before = [copy_rows(layer, empty_rows) for layer in self.linear_states(past_key_values)]
        for block in self.layers:
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                position_embeddings=position_embeddings,
                attend=attend,
                documents=documents,
            )
        if empty_rows is not None:
            after = self.linear_states(past_key_values)
            for layer, copies in zip_longest(after, before, fillvalue=()):
                restore_rows(layer, empty_rows, copies)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def requested_loss(
    labels: torch.Tensor | None,
    teacher_hidden_states: torch.Tensor | None,
    teacher_head_weight: torch.Tensor | None,
    distillation: DistillationLoss | None,
    loss_mask: torch.Tensor | None = None,
    teacher_tokens: TopTokens | None = None,
) -> Callable | None:
    """The loss as a function of (hidden, weight) that these inputs of a forward pass ask for, or
    None. Raises ValueError if it lacks some of its inputs."""
    if (teacher_hidden_states is None) != (teacher_head_weight is None):
        raise ValueError("teacher_hidden_states and teacher_head_weight go together")
    if loss_mask is not None and labels is not None:
        labels = labels.masked_fill(~loss_mask, -100)
    if teacher_hidden_states is not None or teacher_tokens is not None:
        distillation = distillation or DistillationLoss()
        if distillation.ce_weight and labels is None:
            raise ValueError(f"ce_weight: {distillation.ce_weight} needs labels")
        return partial(
            distillation,
            teacher_hidden=teacher_hidden_states,
            teacher_weight=teacher_head_weight,
            labels=labels,
            loss_mask=loss_mask,
            teacher_tokens=teacher_tokens,
        )
    return None if labels is None else partial(next_token_loss, labels=labels)


class StudentForCausalLM(FLAGenerationMixin, StudentPreTrainedModel):
    """The language model. See `forward` for its losses and `from_teacher` for
    its initialisation."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.model = StudentModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        """Whether transformers should refuse assisted decoding, which removes rejected tokens from
        the cache."""
        return bool(HybridCache.cannot_crop(self.config))

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, mode, batch_size, max_cache_length
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "static"):
            raise ValueError(
                f"cache_implementation: {kind!r} has no place for the states of linear layers; choose static, or leave "
                "it out"
            )
        if model_kwargs.get("past_key_values") is None:
            # transformers would build a cache of its own.
            generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            is_static = kind == "static"
            model_kwargs["past_key_values"] = (
                StaticCache(self.config, max_cache_length) if is_static else HybridCache(self.config)
            )

    def prepare_inputs_for_generation(self, input_ids, *args, tokenizer=None, assistant_tokenizer=None, **kwargs):
        """As transformers, without the tokenizers of stop strings and of an assistant, which
        transformers would pass on to `forward`."""
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def check_prefill_chunk_size(self, size: int, cache: Cache | None, inputs_embeds: torch.Tensor | None) -> None:
        """Raises ValueError if a prompt cannot be read in chunks of `size` tokens."""
        if size < 1:
            raise ValueError(f"prefill_chunk_size: {size} must be at least 1")
        if self.config.rope_depends_on_length:
            raise ValueError(
                f"prefill_chunk_size: {size} cannot follow RoPE of type dynamic, which depends on the length; leave it out"
            )
        if cache is None or inputs_embeds is not None:
            raise ValueError(f"prefill_chunk_size: {size} needs use_cache=True, and token ids; leave it out")

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """As transformers, with chunked prefill: reads a prompt in chunks of `prefill_chunk_size`
        tokens, if that is set. The last chunk is left to transformers."""
        if generation_config.output_attentions:
            raise ValueError(
                "output_attentions: neither the kernels of softmax attention nor a linear attention return weights; "
                "leave it out"
            )
        size = generation_config.prefill_chunk_size
        if size is not None:
            cache = model_kwargs.get("past_key_values")
            self.check_prefill_chunk_size(size, cache, model_kwargs.get("inputs_embeds"))
            mask = model_kwargs.get("attention_mask")
            read = cache.get_seq_length()
            has_all_ids = mask is None or input_ids.shape[1] == mask.shape[1]
            if has_all_ids:  # otherwise the ids are only those that the cache has not read
                input_ids = input_ids[:, read:]
            while input_ids.shape[1] > size:
                chunk, input_ids = input_ids[:, :size], input_ids[:, size:]
                read += size
                mask_so_far = None if mask is None else mask[:, :read]
                self.model(chunk, mask_so_far, past_key_values=cache, use_cache=True)
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """Asynchronous decoding with a static cache where `can_sample` allows it, else
        transformers' loop."""
        is_static = isinstance(model_kwargs.get("past_key_values"), StaticCache)
        if is_static and not synced_gpus and can_sample(self, input_ids, generation_config):
            loop = partial(sample, self)
        else:
            loop = partial(super()._sample, synced_gpus=synced_gpus)
        return loop(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer=streamer,
            **model_kwargs,
        )

    def get_output_embeddings(self) -> LMHead:
        return self.lm_head

    def set_output_embeddings(self, value: LMHead) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        teacher_hidden_states: torch.Tensor | None = None,
        teacher_head_weight: torch.Tensor | None = None,
        distillation: DistillationLoss | None = None,
        loss_mask: torch.Tensor | None = None,
        teacher_values: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_log_rest: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        document_ids: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] (the last `logits_to_keep` of them if that is not 0), or a loss
        without logits.

        labels [B, T] alone, aligned with input_ids, -100 ignored: the mean cross-entropy of the
        next tokens. teacher_hidden_states [B, T, teacher's hidden_size], after its final norm, with
        teacher_head_weight [vocab_size, teacher's hidden_size]: the loss `distillation`, by default
        KL(teacher || student). loss_mask [B, T] bool: the tokens that a loss is the mean over; None:
        all. teacher_values, teacher_ids [B, T, k] and teacher_log_rest [B, T]: the teacher's stored
        `TopTokens`, in place of its hidden states and head. document_ids [B, T]: each document is read
        as if it stood alone, and the losses skip the prediction of a document's first token, see
        documents.py; max_documents: see `Documents.of`. Raises ValueError if a requested loss lacks its
        inputs, and for document_ids beside a cache, a mask or position_ids.
        """
        tokens = None if teacher_values is None else TopTokens(teacher_values, teacher_ids, teacher_log_rest)
        learned = learned_tokens(loss_mask, document_ids)
        loss_function = requested_loss(
            labels, teacher_hidden_states, teacher_head_weight, distillation, learned, tokens
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_step = use_cache is not False and is_decoding_step(past_key_values, input_ids)
        if is_step and not output_hidden_states:
            logits = GraphedDecoder(self, past_key_values).step(input_ids, position_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs = self.model(
            *inputs, output_hidden_states=output_hidden_states, document_ids=document_ids, max_documents=max_documents
        )
        loss = logits = None
        if loss_function is not None:
            loss = self.lm_head(outputs.last_hidden_state, loss=loss_function)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, keep])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    @classmethod
    @torch.no_grad()
    def from_teacher(
        cls,
        teacher: StudentForCausalLM,
        student_name: str,
        keep_full_attention_layers=(),
        student_options=None,
    ) -> tuple[StudentForCausalLM, dict[int, InitReport]]:
        """A student with the teacher's weights: kept layers and everything outside attention
        copied, linear layers initialised from the attention that they replace. Returns it, in the
        teacher's dtype, with one report per linear layer.

        Raises ValueError if the student or its options do not suit the teacher: see
        `check_student`.
        """
        check_student(student_name, student_options or {}, teacher.config)
        config = copy.deepcopy(teacher.config)
        config.student_name = student_name
        config.student_options = dict(student_options or {})
        config.keep_full_attention_layers = sorted(keep_full_attention_layers)
        student = cls(config).to(teacher.dtype)
        reports = {
            i: student.model.layers[i].attn.init_from_teacher(teacher.model.layers[i].attn)
            for i in config.linear_layers
        }
        prefixes = tuple(f"model.layers.{i}.attn." for i in config.linear_layers)
        state = {k: v for k, v in teacher.state_dict().items() if not k.startswith(prefixes)}
        state |= {k: v for k, v in student.state_dict().items() if k.startswith(prefixes)}
        student.load_state_dict(state)
        return student, reports

    @torch.no_grad()
    def restore_full_attention(self, teacher: StudentForCausalLM, layers) -> StudentForCausalLM:
        """A copy of this model in which `layers` hold the teacher's softmax attention again."""
        config = copy.deepcopy(self.config)
        config.keep_full_attention_layers = sorted({*config.keep_full_attention_layers, *layers})
        with no_init_weights():  # all weights are loaded below
            hybrid = type(self)._from_config(config, dtype=self.dtype)
        hybrid.tie_weights()
        prefixes = tuple(f"model.layers.{i}.attn." for i in layers)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(prefixes)}
        state |= {k: v for k, v in teacher.state_dict().items() if k.startswith(prefixes)}
        hybrid.load_state_dict(state)
        return hybrid


StudentConfig.register_for_auto_class()
StudentForCausalLM.register_for_auto_class("AutoModelForCausalLM")

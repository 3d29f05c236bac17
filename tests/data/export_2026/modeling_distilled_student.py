"""`StudentForCausalLM`: teacher, all-linear student and hybrid in one model class.

Parameter names are FLA's and the same in all three, so that handing weights from one to the next is an operation on
dicts with equal keys. With every layer kept the model *is* the teacher.
"""

from __future__ import annotations

import copy
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

# An exported checkpoint brings this file, not the package's __init__, so the stand-ins are set up here: before FLA's
# layers are imported, and only where there is no GPU for FLA's own kernels.
install_cpu_ops()

from fla.models.utils import Cache, FLAGenerationMixin, FLALayer  # noqa: E402

from .attention import RotaryEmbedding, SoftmaxAttention  # noqa: E402
from .cache import HybridCache, StaticCache  # noqa: E402
from .config_distilled_student import StudentConfig  # noqa: E402
from .decode_loop import can_sample, sample  # noqa: E402
from .fused_ops import project_swiglu, rms_norm, swiglu  # noqa: E402
from .losses import forward_kl, linear_cross_entropy  # noqa: E402
from .student_layers import (  # noqa: E402
    STUDENT_ATTENTION_MAP,
    InitReport,
    check_student,
    copy_rows,
    get_student_attention_class,
    is_student_attention,
    restore_rows,
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
    """norm(x), and with the branch that x is the residual of, norm(x + branch) and x + branch."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None = None):
        return rms_norm(x, self.weight, self.eps, branch)


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x)), Shazeer, arXiv 2002.05202.

    checkpointed: of x and what is made of it, keep x alone for the backward pass, which computes gate and up again.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]
        self.checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.project, x, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return self.project(x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act is not None:
            return self.down_proj(self.act(gate) * up)
        return self.down_proj(swiglu(gate, up)) if self.checkpointed else project_swiglu(gate, up, self.down_proj)


class LMHead(nn.Linear):
    """The output projection. With `loss`, a function of (hidden, weight), it returns that loss and never the logits.

    The loss runs inside forward() so that the hooks of ZeRO-3, which gather the weight, see it.
    """

    def forward(self, hidden: torch.Tensor, loss=None) -> torch.Tensor:
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


class StudentBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x)). `attn` is softmax or linear, as the config says."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if layer_idx in config.keep_full_attention_layers:
            self.attn = SoftmaxAttention(config, layer_idx)
        else:
            attn = get_student_attention_class(config.student_name)(config, layer_idx, **config.student_options)
            self.attn = attn.to(torch.get_default_dtype())  # FLA makes some parameters fp32, whatever the model is loaded in
            self.attn.keep_whole()
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed, hidden_states = self.mlp_norm(hidden_states, self.attn(self.attn_norm(hidden_states), **kwargs)[0])
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

    @property
    def needs_a_token_a_row(self) -> bool:
        """Whether a linear layer does not take a row without a token of text."""
        return any(is_student_attention(block.attn) and not block.attn.TAKES_EMPTY_ROWS for block in self.layers)

    def linear_states(self, cache: Cache | None) -> list[FLALayer]:
        """What a cache holds of the linear layers; nothing before the first token."""
        return [] if cache is None else [cache.layers[i] for i in self.config.linear_layers if i < len(cache.layers)]

    def position_embeddings(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's (cos, sin), each [B or 1, T, head_dim], in the dtype of hidden_states [B, T, hidden_size].

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
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T]; attention_mask [B, past + T], 0 for padding. Returns last_hidden_state [B, T, hidden_size]
        after the final norm; with output_hidden_states also hidden_states, the embeddings and what each block made of them, as
        transformers' models do. Raises ValueError for a cache that has no place for the states of linear layers."""
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if not use_cache:
            past_key_values = None
        elif past_key_values is None:
            past_key_values = HybridCache(self.config)
        elif not isinstance(past_key_values, Cache):
            raise ValueError(f"past_key_values: a {type(past_key_values).__name__} has no place for the states of linear layers; "
                             "leave it out, and hand over what the model returns")  # fmt: skip
        q_len, past = hidden_states.shape[1], past_key_values.get_seq_length() if past_key_values is not None else 0
        shape = len(hidden_states), past + q_len
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask: its shape {tuple(attention_mask.shape)} must be {shape}, a column for "
                             "each token in the cache and in the input")  # fmt: skip
        if attention_mask is not None and attention_mask.all():
            attention_mask = None  # nothing is padded: spares the linear layers their unpadding
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -q_len:]
            else:
                position_ids = torch.arange(past, past + q_len, device=hidden_states.device)[None]
        position_embeddings = self.position_embeddings(hidden_states, position_ids)
        idle = None
        empty = None if attention_mask is None else ~attention_mask[:, -q_len:].any(1)
        if empty is not None and self.needs_a_token_a_row and empty.any():
            # Kernels differ in what they make of an empty sequence: such a row reads a token of padding and forgets it.
            idle = empty
            attention_mask = attention_mask.clone()
            attention_mask[idle, -1] = 1
            before = [copy_rows(layer, idle) for layer in self.linear_states(past_key_values)]
        for block in self.layers:
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
            )
        if idle is not None:
            for layer, copies in zip_longest(self.linear_states(past_key_values), before, fillvalue=()):
                restore_rows(layer, idle, copies)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class StudentForCausalLM(FLAGenerationMixin, StudentPreTrainedModel):
    """The language model. See `forward` for its losses and `from_teacher` for its start."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.model = StudentModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        """Whether transformers should refuse to decode with an assistant, whose guesses must be forgotten again."""
        return bool(HybridCache.cannot_crop(self.config))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "static"):
            raise ValueError(f"cache_implementation: {kind!r} has no place for the states of linear layers; choose static, or leave it out")
        if model_kwargs.get("past_key_values") is None:
            generation_config.cache_implementation = None  # transformers' own
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            cache = StaticCache(self.config, max_cache_length) if kind == "static" else HybridCache(self.config)
            model_kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(self, input_ids, *args, tokenizer=None, assistant_tokenizer=None, **kwargs):
        """As transformers does, which hands on the tokenizers of stop strings and of an assistant; `forward` has no use for them."""
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """Reads a prompt in pieces of `prefill_chunk_size` tokens, if that is set; the last piece as transformers does."""
        size, cache = generation_config.prefill_chunk_size, model_kwargs.get("past_key_values")
        if generation_config.output_attentions:
            raise ValueError("output_attentions: neither softmax attention's kernels nor a linear attention have weights to give; leave it out")
        if size is not None:
            if size < 1:
                raise ValueError(f"prefill_chunk_size: {size} must be at least 1")
            if self.config.rope_depends_on_length:
                raise ValueError(f"prefill_chunk_size: {size} cannot follow RoPE of type dynamic, which depends on the length; leave it out")
            if cache is None or model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(f"prefill_chunk_size: {size} needs use_cache=True, and token ids; leave it out")
            mask, read = model_kwargs.get("attention_mask"), cache.get_seq_length()
            if mask is None or input_ids.shape[1] == mask.shape[1]:  # else the ids are only those that the cache has not read
                input_ids = input_ids[:, read:]
            while input_ids.shape[1] > size:
                piece, input_ids, read = input_ids[:, :size], input_ids[:, size:], read + size
                self.model(piece, mask if mask is None else mask[:, :read], past_key_values=cache, use_cache=True)
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **model_kwargs):
        static = isinstance(model_kwargs.get("past_key_values"), StaticCache)
        own = static and not synced_gpus and can_sample(self, input_ids, generation_config)
        loop = partial(sample, self) if own else partial(super()._sample, synced_gpus=synced_gpus)
        return loop(input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs)

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
        kl_temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] (the last `logits_to_keep` of them if that is not 0), or a loss without logits.

        labels [B, T] alone, aligned with input_ids, -100 ignored: the mean cross-entropy of the next tokens.
        teacher_hidden_states [B, T, teacher's hidden_size], after its final norm, with teacher_head_weight
        [vocab_size, teacher's hidden_size]: kl_weight * tau^2 KL(teacher || student), the mean over all positions
        (Hinton et al., arXiv 1503.02531), plus, where ce_weight is not 0, ce_weight * cross-entropy.
        Raises ValueError if a loss that was asked for lacks its inputs.
        """
        if (teacher_hidden_states is None) != (teacher_head_weight is None):
            raise ValueError("teacher_hidden_states and teacher_head_weight go together")
        if teacher_hidden_states is not None and ce_weight and labels is None:
            raise ValueError(f"ce_weight: {ce_weight} needs labels")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if isinstance(past_key_values, StaticCache) and use_cache is not False:
            one = input_ids is not None and input_ids.shape[1] == 1 and past_key_values.get_seq_length() > 0
            if one and not output_hidden_states:
                logits = past_key_values.step(self, input_ids, position_ids, attention_mask)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
            past_key_values.stop()
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                             output_hidden_states=output_hidden_states)  # fmt: skip
        hidden_states = outputs.last_hidden_state

        def cross_entropy(hidden, weight):
            return linear_cross_entropy(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())

        def distillation(hidden, weight):
            teacher = teacher_hidden_states.flatten(0, 1), teacher_head_weight
            loss = kl_weight * forward_kl(hidden.flatten(0, 1), teacher[0], weight, teacher[1], kl_temperature)
            return loss + ce_weight * cross_entropy(hidden, weight) if ce_weight else loss

        loss = logits = None
        if teacher_hidden_states is not None:
            loss = self.lm_head(hidden_states, loss=distillation)
        elif labels is not None:
            loss = self.lm_head(hidden_states, loss=cross_entropy)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states)  # fmt: skip

    @classmethod
    @torch.no_grad()
    def from_teacher(
        cls, teacher: StudentForCausalLM, student_name: str, keep_full_attention_layers=(), student_options=None
    ) -> tuple[StudentForCausalLM, dict[int, InitReport]]:
        """A student with the teacher's weights: kept layers and all outside attention copied, linear layers initialised
        from the attention they replace. Returns it, in the teacher's dtype, with a report a linear layer.

        Raises ValueError if the student or its options do not suit the teacher: see `check_student`."""
        check_student(student_name, student_options or {}, teacher.config)
        config = copy.deepcopy(teacher.config)
        config.student_name, config.student_options = student_name, dict(student_options or {})
        config.keep_full_attention_layers = sorted(keep_full_attention_layers)
        student = cls(config).to(teacher.dtype)
        reports = {i: student.model.layers[i].attn.init_from_teacher(teacher.model.layers[i].attn)
                   for i in config.linear_layers}  # fmt: skip
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
        with no_init_weights():  # all are loaded
            hybrid = type(self)._from_config(config, dtype=self.dtype)
        hybrid.tie_weights()
        prefixes = tuple(f"model.layers.{i}.attn." for i in layers)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(prefixes)}
        state |= {k: v for k, v in teacher.state_dict().items() if k.startswith(prefixes)}
        hybrid.load_state_dict(state)
        return hybrid


StudentConfig.register_for_auto_class()
StudentForCausalLM.register_for_auto_class("AutoModelForCausalLM")

"""`StudentConfig`: one configuration for the teacher, the all-linear student and every hybrid
between them."""

from __future__ import annotations

from transformers import PreTrainedConfig

# Model types of other projects that look like ours -> why they are not supported.
FOREIGN = {
    "student": "a student of the KL-guided layer selection paper's code (arXiv 2512.20569), which "
    "orders K and V of grouped-query teachers in its own way; load it with that code, or distil its "
    "teacher again",
}


class StudentConfig(PreTrainedConfig):
    """A decoder-only transformer whose layers have either full softmax attention or a linear
    attention.

    The fields from `vocab_size` to `tie_word_embeddings` describe the teacher's architecture and
    are read from its own config, never from a table. The last three say which layers are linear,
    and of which kind:

    student_name: the linear attention, a key of `STUDENT_ATTENTION_MAP`; None for a model without
    linear layers. student_options: hyper-parameters of that attention that differ from its
    defaults. keep_full_attention_layers: 0-based indices of the layers that keep softmax attention;
    all of them = the teacher.

    The config file also carries what vLLM and transformers read of a hybrid: `layer_types`, and the dtype
    of recurrent states. Both follow from the rest and are never read back.

    Raises ValueError if a kept layer is out of range or listed twice, or if a linear layer has no
    `student_name`.
    """

    model_type = "distilled_student"
    keys_to_ignore_at_inference = ["past_key_values"]
    mamba_ssm_dtype = "float32"  # of recurrent states

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False  # of q_proj, k_proj and v_proj
    attention_output_bias: bool = False  # of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_eps: float | None = None  # None: rms_norm_eps
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    student_name: str | None = None
    student_options: dict | None = None
    keep_full_attention_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        layers = range(self.num_hidden_layers)
        if self.keep_full_attention_layers is None:
            self.keep_full_attention_layers = list(layers) if self.student_name is None else []
        self.student_options = dict(self.student_options or {})
        kept = self.keep_full_attention_layers
        if len(set(kept)) != len(kept) or not set(kept) <= set(layers):
            raise ValueError(
                f"keep_full_attention_layers: {kept} must be different layers in 0..{self.num_hidden_layers - 1}"
            )
        if self.student_name is None and len(kept) < self.num_hidden_layers:
            linear = self.num_hidden_layers - len(kept)
            raise ValueError(f"student_name: needed, for {linear} layers are linear")
        for derived in ("layer_types", "mamba_ssm_dtype"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        return super().to_dict() | {"layer_types": self.layer_types, "mamba_ssm_dtype": self.mamba_ssm_dtype}

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Raises ValueError for the config of another kind of model, which transformers would only
        warn of."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type or kind in FOREIGN:
            reason = FOREIGN.get(kind, f"not {cls.model_type}")
            raise ValueError(f"model_type: {kind!r} is {reason}")
        return super().from_dict(config_dict, **kwargs)

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether all angles change when the text exceeds the context, which invalidates cached
        keys."""
        return self.rope_parameters["rope_type"] == "dynamic"

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, by transformers' names."""
        kept = set(self.keep_full_attention_layers)
        return ["full_attention" if i in kept else "linear_attention" for i in range(self.num_hidden_layers)]

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the layers with linear attention, in order."""
        kept = set(self.keep_full_attention_layers)
        return [i for i in range(self.num_hidden_layers) if i not in kept]

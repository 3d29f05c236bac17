"""Compares a checkpoint with its conversion, one layer of each in memory at a time."""

from __future__ import annotations

import copy

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from distill_model import StudentForCausalLM
from distill_model.attention import RotaryEmbedding

from .loader import OURS, Checkpoint, source_config

TOLERANCE = 1e-3
TOKENS = 256
HEAD_ROWS = 8192  # of the vocabulary, held in fp32 at a time


class _LayerByLayer:
    """A model whose layers come into memory one after the other, in fp32.

    Hugging Face's own class where it has one for the checkpoint, else ours. round_to: a dtype that weights pass through.
    """

    def __init__(self, checkpoint: Checkpoint, theirs: bool, round_to: torch.dtype | None):
        self.checkpoint, self.theirs, self.round_to = checkpoint, theirs, round_to
        if theirs:
            config = source_config(str(checkpoint.folder))
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
            self.rotary = type(self.model.model.rotary_emb)(config)
        else:
            with torch.device("meta"):
                self.model = StudentForCausalLM(checkpoint.config).eval()
            self.rotary = RotaryEmbedding(checkpoint.config)

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if self.round_to is None else tensor.to(self.round_to)).float()

    def _loaded(self, module, prefix: str):
        state = {k: self._rounded(v) for k, v in self.checkpoint.state(prefix, self.theirs).items()}
        module.load_state_dict(state, assign=True)
        return module

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._rounded(self.checkpoint.rows("model.embeddings.weight", ids))

    def layer(self, index: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """hidden [1, T, hidden_size] through layer `index`, at positions [1, T]."""
        layer = self._loaded(copy.deepcopy(self.model.model.layers[index]), f"model.layers.{index}.")
        out = layer(hidden, position_embeddings=self.rotary(hidden, positions), **({"attention_mask": None} if self.theirs else {}))
        return out[0] if isinstance(out, tuple) else out

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._loaded(copy.deepcopy(self.model.model.norm), "model.norm.")(hidden)

    def logits(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        tied = self.checkpoint.config.tie_word_embeddings
        name = "model.embeddings.weight" if tied else "lm_head.weight"
        return hidden @ self._rounded(self.checkpoint.rows(name, rows)).mT


@torch.no_grad()
def largest_difference(source: Checkpoint, result: Checkpoint, round_to: torch.dtype | None = None) -> float:
    """The largest difference of the two in fp32, over random tokens at positions from 0 and from beyond the original
    context length: of any logit, and of any layer's output relative to its largest number.

    The source runs in Hugging Face's class, unless it is a checkpoint of FLA's or ours. round_to: the precision that
    the source was converted to.
    """
    config = source.config
    rope = config.rope_parameters or {}
    beyond = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=generator)
    models = (_LayerByLayer(source, source.family is not OURS, round_to), _LayerByLayer(result, False, None))
    differences = []
    with tqdm(total=2 * config.num_hidden_layers, desc="verifying", unit="layer") as progress:
        for first in (0, beyond):
            positions = torch.arange(first, first + TOKENS)[None]
            theirs, ours = (model.embed(ids) for model in models)
            for i in range(config.num_hidden_layers):
                theirs, ours = (m.layer(i, h, positions) for m, h in zip(models, (theirs, ours)))
                differences.append((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1))
                progress.update()
            theirs, ours = (m.norm(h) for m, h in zip(models, (theirs, ours)))
            for start in range(0, config.vocab_size, HEAD_ROWS):
                rows = slice(start, min(start + HEAD_ROWS, config.vocab_size))
                a, b = (m.logits(h, rows) for m, h in zip(models, (theirs, ours)))
                differences.append((a - b).abs().max())
    return torch.stack(differences).max().item()  # NaN where there is one

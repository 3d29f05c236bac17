"""Compares a converted model with its source as transformers itself loads it, one layer of each in
memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from logging import ERROR, NOTSET, getLogger
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from distill_model import StudentForCausalLM
from distill_model.attention import RotaryEmbedding

from .families import HUGGING_FACE_NAMES
from .loader import ModelFolder, rows_of, source_config

TOLERANCE = 1e-3
TOKENS = 256
HEAD_ROWS = 8192  # of the output head, in memory in fp32 at a time


class _LayerByLayer:
    """The converted model as we load it, in fp32, with one layer in memory at a time."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        with torch.device("meta"):
            self.model = StudentForCausalLM(folder.config).eval()
        self.rotary = RotaryEmbedding(folder.config)

    def _loaded(self, module, prefix: str):
        module.load_state_dict(self.folder.state(prefix), assign=True)
        return module

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.folder.rows("model.embeddings.weight", ids).float()

    def layer(self, index: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """hidden [1, T, hidden_size] through layer `index`, at positions [1, T]."""
        layer = self._loaded(copy.deepcopy(self.model.model.layers[index]), f"model.layers.{index}.")
        return layer(hidden, position_embeddings=self.rotary(hidden, positions))

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._loaded(copy.deepcopy(self.model.model.norm), "model.norm.")(hidden)

    def logits(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        tied = self.folder.config.tie_word_embeddings
        name = "model.embeddings.weight" if tied else "lm_head.weight"
        return hidden @ self.folder.rows(name, rows).float().mT


class _Rounded(Mapping):
    """A mapping of weights that rounds each one to a dtype when it is read."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype):
        self.weights = weights
        self.dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name].to(self.dtype).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class _AsTransformersReads:
    """A source as `AutoModelForCausalLM` loads its folder, in fp32: transformers decides on names,
    tying and which tensors to ignore.

    Weights of transformers' own classes stay on disk until they are needed. Models of FLA's class
    and ours are held in memory, because their kernels would read weights that are not there.
    round_to: a dtype that weights are rounded to first. Raises ValueError if FLA's class cannot be
    built here.
    """

    def __init__(self, source: ModelFolder, round_to: torch.dtype | None):
        self.round_to = round_to
        config = source_config(str(source.folder))
        places = None  # all in memory
        if source.family.weights is HUGGING_FACE_NAMES:
            # Tied embeddings and head must be in memory: if the file holds both, transformers
            # compares them.
            ends = "cpu" if config.tie_word_embeddings else "disk"
            places = {
                "model.embed_tokens": ends,
                "lm_head": ends,
                "model.layers": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
            }
        level = logging.get_verbosity()
        offloading = getLogger("accelerate.big_modeling")
        logging.set_verbosity_error()  # the loader has warned of all that matters
        offloading.setLevel(ERROR)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=torch.float32,
                device_map=places,
                trust_remote_code=False,
            ).eval()
        except ImportError as error:
            reason = f"--verify: {source.folder}: its class cannot be built ({error}); use --no-verify"
            raise ValueError(reason) from None
        finally:
            logging.set_verbosity(level)
            offloading.setLevel(NOTSET)
        self.layers = self.model.model.layers
        if round_to is not None:
            self._round()

    def _round(self) -> None:
        for module in self.model.model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != "meta":
                    parameter.data = parameter.data.to(self.round_to).float()
            hook = getattr(module, "_hf_hook", None)
            if getattr(hook, "weights_map", None) is not None and module is not self.model.get_input_embeddings():
                hook.weights_map = _Rounded(hook.weights_map, self.round_to)

    def _rows(self, module: torch.nn.Module, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows of a module's weight, from memory or from the file where transformers found it."""
        if module.weight.device.type != "meta":
            rows = module.weight[index]
        else:
            weights = module._hf_hook.weights_map
            place = weights.dataset.index[f"{weights.prefix}weight"]
            rows = rows_of(Path(place["safetensors_file"]), place["weight_name"], index)
        return (rows if self.round_to is None else rows.to(self.round_to)).float()

    def hidden(self, ids: torch.Tensor, **positions) -> torch.Tensor:
        """The final norm's output, [1, T, hidden_size]."""
        embeddings = self._rows(self.model.get_input_embeddings(), ids)
        return self.model.model(inputs_embeds=embeddings, use_cache=False, **positions).last_hidden_state

    def logits(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        return hidden @ self._rows(self.model.get_output_embeddings(), rows).mT


@torch.no_grad()
def largest_difference(source: ModelFolder, result: ModelFolder, round_to: torch.dtype | None = None) -> float:
    """The largest difference between the two in fp32: of any logit (absolute), and of any layer's
    output (relative to its largest absolute value).

    Both run on random tokens, at positions from 0 and from beyond the original context length;
    FLA's class takes no positions and runs from 0 alone. The source is loaded by transformers, the
    result by us. round_to: the precision that the source was converted to.
    """
    config = source.config
    rope = config.rope_parameters or {}
    beyond = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    starts = (0,) if source.model_type == "transformer" else (0, beyond)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=generator)
    theirs = _AsTransformersReads(source, round_to)
    ours = _LayerByLayer(result)
    differences = []
    run = {}  # our hidden states and positions, as far as the layers have run

    def compare(index):
        def hook(layer, args, output):
            out = output[0] if isinstance(output, tuple) else output
            run["hidden"] = ours.layer(index, run["hidden"], run["positions"])
            differences.append((out - run["hidden"]).abs().max() / out.abs().max().clamp(min=1))
            progress.update()

        return hook

    hooks = [layer.register_forward_hook(compare(i)) for i, layer in enumerate(theirs.layers)]
    with tqdm(total=len(starts) * config.num_hidden_layers, desc="verifying", unit="layer") as progress:
        for start in starts:
            run["positions"] = torch.arange(start, start + TOKENS)[None]
            run["hidden"] = ours.embed(ids)
            positions = {"position_ids": run["positions"]} if len(starts) > 1 else {}
            their_hidden = theirs.hidden(ids, **positions)
            our_hidden = ours.norm(run["hidden"])
            for first in range(0, config.vocab_size, HEAD_ROWS):
                rows = slice(first, min(first + HEAD_ROWS, config.vocab_size))
                difference = theirs.logits(their_hidden, rows) - ours.logits(our_hidden, rows)
                differences.append(difference.abs().max())
    for hook in hooks:
        hook.remove()
    return torch.stack(differences).max().item()  # NaN if any is NaN

"""The optimiser of a training stage: parameter groups, AdamW in fp32 or 8 bits, and the
learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from runtime.batch_plan import BatchPlan
from runtime.config import PARTS, Config, trained_parts

import torch
from torch import nn

from distill_model import is_student_attention
from distill_model.attention import SoftmaxAttention

# Bytes of optimiser state per parameter: an fp32 master copy, and two moments in fp32 or 8 bits.
STATE_BYTES = {"adamw": 12, "adamw_8bit": 6}
# Elements per 8-bit group: ZeRO-1 and ZeRO-2 flatten a group into one tensor, and bitsandbytes' GPU
# kernels index it with 32 bits.
GROUP_OF_8_BITS = 2**30


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    def as_torch(self) -> dict:
        """The group as torch.optim takes it."""
        return {"params": self.params, "lr": self.lr, "weight_decay": self.weight_decay}


def _vector_ids(model: nn.Module) -> set[int]:
    """The ids of the parameters that are vectors, whatever their number of dimensions."""
    vectors = set()
    for module in model.modules():
        if isinstance(module, nn.Conv1d):  # one filter per channel
            vectors.update(id(p) for p in module.parameters())
    for name, p in model.named_parameters():
        one_per_head = name.endswith(".r_k")  # RWKV-7's
        if one_per_head or p.squeeze().ndim < 2:
            vectors.add(id(p))
    return vectors


def _attention_ids(model: nn.Module, scope: str) -> set[int]:
    """The ids of the parameters of linear attentions; with scope "all", of softmax attentions
    too."""
    found = set()
    for module in model.modules():
        if is_student_attention(module) or (scope == "all" and isinstance(module, SoftmaxAttention)):
            found.update(id(p) for p in module.parameters())
    return found


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a student model by part, of `PARTS`; every one in one part."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    seen = set()

    def add(part: str, module: nn.Module) -> None:
        for p in module.parameters():
            if id(p) not in seen:
                seen.add(id(p))
                parts[part].append(p)

    for block in model.model.layers:
        add("linear_attention" if is_student_attention(block.attn) else "kept_attention", block.attn)
        add("mlp", block.mlp)
    add("norms", model.model.norm)
    for block in model.model.layers:
        add("norms", block)  # what is left of it
    add("embeddings", model)
    return parts


def freeze_parts(model: nn.Module, cfg: Config) -> dict[str, int]:
    """Freezes what train.train_only and train.freeze say; returns the number of frozen parameters by
    part. Raises ValueError if nothing is left to train."""
    trained = trained_parts(cfg.train)
    frozen = {}
    for part, params in parts_of(model).items():
        for p in params:
            p.requires_grad_(part in trained)
        if params and part not in trained:
            frozen[part] = sum(p.numel() for p in params)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"train.train_only: {trained}: the model has no such parts; train others")
    return frozen


def parameter_groups(model: nn.Module, cfg: Config) -> list[ParameterGroup]:
    """The trainable parameters in groups: linear attentions (with lr_attn_scope "all", every
    attention) train at lr_attn and the rest at lr; only matrices decay."""
    train = cfg.train
    vectors = _vector_ids(model)
    attention = _attention_ids(model, train.lr_attn_scope)
    attention_name = "attention" if train.lr_attn_scope == "all" else "linear attention"
    attention_lr = train.lr if train.lr_attn is None else train.lr_attn
    groups: dict[str, ParameterGroup] = {}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        is_attention = id(p) in attention
        is_matrix = id(p) not in vectors
        owner = attention_name if is_attention else "the rest"
        name = f"{owner}, {'matrices' if is_matrix else 'vectors'}"
        if name not in groups:
            lr = attention_lr if is_attention else train.lr
            weight_decay = train.weight_decay if is_matrix else 0.0
            groups[name] = ParameterGroup(name, [], lr, weight_decay)
        groups[name].params.append(p)
    return list(groups.values())


def split_by_size(params: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """The parameters, in order, as lists of at most `limit` elements each; a larger parameter is
    alone in its list."""
    lists: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in params:
        if lists[-1] and size + p.numel() > limit:
            lists.append([])
            size = 0
        lists[-1].append(p)
        size += p.numel()
    return lists


def get_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`.

    Its moments are in fp32, or in 8 bits with block-wise quantisation (Dettmers et al., arXiv
    2110.02861); 8-bit groups are split at GROUP_OF_8_BITS elements.
    """
    groups = [group.as_torch() for group in parameter_groups(model, cfg)]
    betas = tuple(cfg.train.betas)
    if cfg.train.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas)
    from bitsandbytes.optim import AdamW8bit

    small_groups = []
    for group in groups:
        for params in split_by_size(group["params"], GROUP_OF_8_BITS):
            small_groups.append(group | {"params": params})
    return AdamW8bit(small_groups, betas=betas)


def get_scheduler(optimizer: torch.optim.Optimizer, cfg: Config, plan: BatchPlan) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to each group's peak, then constant, or linear or cosine decay to
    train.final_lr."""
    train = cfg.train
    warmup = min(train.warmup_steps, plan.warmup_limit)

    def factor_of(peak: float) -> Callable[[int], float]:
        """step -> learning rate / peak."""
        floor = min(1.0, train.final_lr / peak) if peak else 1.0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if train.lr_scheduler_type == "constant":
                return 1.0
            progress = min(1.0, (step - warmup) / max(1, plan.steps - warmup))
            shapes = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
            return floor + (1 - floor) * shapes[train.lr_scheduler_type]

        return factor

    factors = [factor_of(group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)

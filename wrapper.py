"""Stage 1: a linear attention beside every attention of the teacher, aligned layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from distill_model import StudentForCausalLM, check_calibration
from distill_model.attention import SoftmaxAttention
from distill_model.documents import Documents, real_rows, run_attention
from distill_model.fused_ops import scaled
from distill_model.losses import alignment_loss

Batch = dict[str, torch.Tensor]  # inputs of the model: input_ids [B, T], and where it has documents document_ids


class _LossAndGradients(torch.autograd.Function):
    """loss(), with its gradients computed in the forward pass, so that its graph does not outlive
    the call; backward scales them. They are flattened into one tensor, so that scaling them is a
    single kernel launch."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        with torch.enable_grad():
            value = loss()
            gradients = torch.autograd.grad(value, parameters)
        ctx.shapes = [gradient.shape for gradient in gradients]
        ctx.save_for_backward(torch.cat([gradient.flatten() for gradient in gradients]))
        return value.detach()

    @staticmethod
    def backward(ctx, d_loss):
        (gradients,) = ctx.saved_tensors
        parts = scaled(gradients, d_loss).split([shape.numel() for shape in ctx.shapes])
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes))


class AttentionDistillationWrapper(nn.Module):
    """A teacher's attention and the student's, with the same hidden states as input.

    The loss is returned, not kept as an attribute: an attribute is lost under re-entrant activation
    checkpointing and under ZeRO. kind: see `alignment_loss`. recompute: see
    `AttentionAlignmentModel`.
    """

    def __init__(
        self,
        teacher_attn: nn.Module,
        student_attn: nn.Module,
        kind: str = "mse",
        recompute: bool = False,
    ):
        super().__init__()
        self.teacher_attn = teacher_attn.requires_grad_(False)
        self.student_attn = student_attn
        self.kind = kind
        self.recompute = recompute

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings,
        documents: Documents | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, T, hidden_size] -> (the teacher's output, of the same shape and
        detached; the loss, a scalar, of all tokens but padding)."""
        hidden_states = hidden_states.detach()
        inputs = (hidden_states, documents)
        with torch.no_grad():
            target = run_attention(self.teacher_attn, *inputs, position_embeddings=position_embeddings)

        def loss():
            output = run_attention(self.student_attn, *inputs, position_embeddings=position_embeddings)
            return _loss_of_real_tokens(output, target, documents, self.kind)

        if not torch.is_grad_enabled():
            return target, loss()
        if self.recompute:
            return target, checkpoint(loss, use_reentrant=False)
        parameters = [p for p in self.student_attn.parameters() if p.requires_grad]
        parameters.sort(key=torch.numel, reverse=True)  # small ones last: the others stay aligned in memory
        return target, _LossAndGradients.apply(loss, *parameters)


class AttentionAlignmentModel(nn.Module):
    """What stage 1 runs: the teacher's embeddings and blocks, each attention wrapped, up to the
    last attention; no final norm and no lm_head.

    Only the student attentions train, and only one layer's autograd graph exists at a time: a
    layer's gradients are computed together with its loss. With `recompute` the layer is computed
    again in the backward pass instead, as ZeRO-3 needs it, which gathers weights around forward and
    backward. Parameters are named as in `StudentForCausalLM`, with `attn.teacher_attn.` and
    `attn.student_attn.` for `attn.`.
    """

    def __init__(
        self,
        teacher: StudentForCausalLM,
        student: StudentForCausalLM,
        kind: str = "mse",
        recompute: bool = False,
    ):
        super().__init__()
        self.config = student.config
        self.kind = kind
        self.model = teacher.model.requires_grad_(False)
        del self.model.norm
        for block, student_block in zip(self.model.layers, student.model.layers, strict=True):
            student_attn = student_block.attn.requires_grad_(True)
            block.attn = AttentionDistillationWrapper(block.attn, student_attn, kind, recompute)
        last = self.model.layers[-1]
        del last.mlp, last.mlp_norm

    def forward(
        self, input_ids: torch.Tensor, document_ids: torch.Tensor | None = None, max_documents: int | None = None
    ) -> dict[str, torch.Tensor]:
        """input_ids [B, T] -> loss, the mean over the layers, and layer_losses and layer_variances,
        each [num_hidden_layers] in fp32. document_ids [B, T]: each document is read as if it stood
        alone, and padding is not counted, see distill_model/documents.py; max_documents: see
        `Documents.of`.

        A layer's variance is that of the teacher's output y [B T, hidden_size]: the mean over tokens and
        features of (y - the feature's mean over the tokens)^2. See `relative_errors`.
        """
        with torch.no_grad():
            hidden_states = self.model.embeddings(input_ids)
            documents = None if document_ids is None else Documents.of(document_ids, max_documents)
            positions = None if documents is None else documents.positions
            position_embeddings = self.model.position_embeddings(hidden_states, positions)
        losses = []
        variances = []
        for block in self.model.layers:
            with torch.no_grad():
                normed = block.attn_norm(hidden_states)
            output, loss = block.attn(normed, position_embeddings, documents=documents)
            losses.append(loss)
            # One reduction per layer here; the means over the features of all layers come below.
            variances.append(_variance_of_real_tokens(output, documents))
            if block is not self.model.layers[-1]:
                with torch.no_grad():
                    normed, hidden_states = block.mlp_norm(hidden_states, output)
                    hidden_states = hidden_states + block.mlp(normed)
        losses = torch.stack(losses)
        return {
            "loss": losses.mean(),
            "layer_losses": losses.detach(),
            "layer_variances": torch.stack(variances).float().mean(1),
        }

    def relative_errors(self, losses: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
        """layer_losses in units that can be compared between layers: 0 for the teacher's output, 1
        for its mean.

        mse: mean squared difference / variance. l2, the mean of norms: loss / standard deviation.
        """
        scale = variances if self.kind == "mse" else variances.sqrt()
        return losses / scale.clamp(min=torch.finfo(torch.float32).tiny)


def _loss_of_real_tokens(
    output: torch.Tensor, target: torch.Tensor, documents: Documents | None, kind: str
) -> torch.Tensor:
    """`alignment_loss` of output and target [B, T, hidden_size], the mean over all tokens but padding."""
    if documents is None or not documents.is_static:
        return alignment_loss(real_rows(output, documents), real_rows(target, documents), kind)
    is_real = documents.is_real.view(*output.shape[:2], 1)
    loss = alignment_loss(torch.where(is_real, output, target), target, kind)  # padding is at distance 0
    return loss * (is_real.numel() / is_real.sum())


def _variance_of_real_tokens(x: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    """The variance over the tokens of x [B, T, hidden_size] but padding, [hidden_size]."""
    if documents is None or not documents.is_static:
        return real_rows(x, documents).var(0, correction=0)
    is_real = documents.is_real[:, None]
    rows = x.flatten(0, 1).float()
    mean = torch.where(is_real, rows, 0).sum(0) / is_real.sum()
    return torch.where(is_real, rows - mean, 0).square().sum(0) / is_real.sum()


@torch.no_grad()
def mean_distances(
    attn: SoftmaxAttention, hidden_states: torch.Tensor, position_embeddings, documents: Documents | None = None
) -> torch.Tensor:
    """How many tokens back each head attends: the mean over its attention weights and the queries
    of the second half of each sequence or document; padding is left out. Returns [num_heads]."""
    batch, length, _ = hidden_states.shape
    lengths = [length] * batch
    if documents is not None:
        hidden_states = hidden_states.flatten(0, 1)[None]
        lengths = documents.lengths
    counted = [True] * len(lengths)
    if documents is not None and documents.real is not None:
        counted = torch.isin(documents.cu_seqlens[:-1], documents.real).tolist()
    q, k, _ = attn.project(hidden_states, position_embeddings)
    k = k.repeat_interleave(attn.num_heads // attn.num_kv_heads, 2)
    total = q.new_zeros(attn.num_heads, dtype=torch.float32)
    # One sequence at a time: the scores are T x T per head.
    rows = zip(counted, q.flatten(0, 1).split(lengths), k.flatten(0, 1).split(lengths))
    for is_counted, q_row, k_row in rows:
        if not is_counted:
            continue
        keys = torch.arange(len(k_row), device=q.device)
        half = len(q_row) // 2
        distance = keys[half:, None] - keys
        scores = torch.einsum("thd,shd->hts", q_row[half:], k_row).float() * attn.head_dim**-0.5
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        total += (weights * distance.clamp(min=0)).sum((-1, -2))
    return total / sum(length - length // 2 for length, is_counted in zip(lengths, counted) if is_counted)


@torch.no_grad()
def calibrate(
    model: AttentionAlignmentModel,
    batches: list[Batch],
    ridge: float = 2.0,
    show: bool = False,
) -> list[nn.Parameter]:
    """Closed-form calibration of the students before the first step, on the model's inputs
    `batches`.

    Decay, where the student has one per head: an exponential kernel whose mean distance d is that
    of the teacher's attention weights decays by log(1 + 1 / d) per token.

    Gates without a bias, where the student has one: with X [tokens, hidden_size] the layer's
    inputs, the gate opens along u = argmin |X u - 1|^2 + 0.01 mean(diag X'X) |u|^2.

    Then o_proj: with X [tokens, num_heads x head_dim] its inputs and Y the teacher's attention
    output less o_proj's bias, one scale per head by least squares, and around the scaled weight W_s
    W = argmin |X W' - Y|^2 + ridge mean(diag X'X) |W - W_s|^2. The ridge keeps W near the
    teacher's: the best fit before training is not the best start for training.

    show: a progress bar. Returns the parameters that were fitted. Raises ValueError for students
    whose o_proj is fused with their norm, whose inputs cannot be observed.
    """
    check_calibration(model.config.student_name)
    layers = [block.attn for block in model.model.layers]
    with_decay = [layer for layer in layers if layer.student_attn.fits_decay]
    with_gate = [layer for layer in layers if layer.student_attn.fits_gate]
    passes = 2 if with_decay or with_gate else 1
    total = passes * len(batches) * len(layers)
    with tqdm(total=total, desc="calibrating", unit="layer", disable=not show) as progress:
        if passes == 2:
            _fit_decay_and_gates(model, batches, with_decay, with_gate, progress)
        moments = _output_moments(model, batches, progress)
        heads = model.config.num_attention_heads
        for layer in layers:
            _fit_output_projection(layer.student_attn.o_proj, *moments[layer], heads, ridge)
    return [
        *(layer.student_attn.dt_bias for layer in with_decay),
        *(layer.student_attn.g_proj.weight for layer in with_gate),
        *(layer.student_attn.o_proj.weight for layer in layers),
    ]


def _run(model: AttentionAlignmentModel, batches: list[Batch], hooks: list, progress: tqdm) -> None:
    """Runs the model on all batches, and removes the hooks."""

    def count(layer, args, output):
        progress.update()

    for block in model.model.layers:
        hooks.append(block.attn.register_forward_hook(count))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()


def _fit_decay_and_gates(
    model: AttentionAlignmentModel,
    batches: list[Batch],
    with_decay: list[AttentionDistillationWrapper],
    with_gate: list[AttentionDistillationWrapper],
    progress: tqdm,
) -> None:
    """One pass over the batches; see `calibrate`."""
    distances = dict.fromkeys(with_decay, 0)
    moments = dict.fromkeys(with_gate, (0, 0))  # X'X and the sum of X over the tokens

    def add_distances(layer, args, kwargs):
        mean = mean_distances(layer.teacher_attn, *args, kwargs["documents"])
        distances[layer] = distances[layer] + mean / len(batches)

    def add_moments(layer, args, kwargs):
        x = real_rows(args[0], kwargs["documents"]).double()
        xx, total = moments[layer]
        xx = xx + x.mT @ x
        moments[layer] = (xx, total + x.sum(0))

    hooks = [layer.register_forward_pre_hook(add_distances, with_kwargs=True) for layer in with_decay]
    hooks += [layer.register_forward_pre_hook(add_moments, with_kwargs=True) for layer in with_gate]
    _run(model, batches, hooks, progress)
    for layer, distance in distances.items():
        layer.student_attn.set_decay(torch.log1p(1 / distance.clamp(min=0.5)))
    for layer, (xx, total) in moments.items():
        direction = torch.linalg.solve(xx + _ridge(xx, 0.01), total)
        layer.student_attn.open_gate(direction)


def _output_moments(
    model: AttentionAlignmentModel,
    batches: list[Batch],
    progress: tqdm,
) -> dict[AttentionDistillationWrapper, tuple[torch.Tensor, torch.Tensor]]:
    """One pass over the batches: X'X and X'Y of every layer's o_proj in float64, see
    `calibrate`."""
    inputs = {}
    layers = [block.attn for block in model.model.layers]
    moments = dict.fromkeys(layers, (0, 0))

    def keep_input(o_proj, args):
        inputs[o_proj] = args[0]

    def add_moments(layer, args, kwargs, output):
        documents = kwargs["documents"]
        o_proj = layer.student_attn.o_proj
        x = real_rows(inputs.pop(o_proj), documents).double()
        y = real_rows(output[0], documents).double()
        if o_proj.bias is not None:
            y = y - o_proj.bias
        xx, xy = moments[layer]
        xx = xx + x.mT @ x
        xy = xy + x.mT @ y
        moments[layer] = (xx, xy)

    hooks = [layer.register_forward_hook(add_moments, with_kwargs=True) for layer in layers]
    hooks += [layer.student_attn.o_proj.register_forward_pre_hook(keep_input) for layer in layers]
    _run(model, batches, hooks, progress)
    return moments


def _fit_output_projection(o_proj: nn.Linear, xx: torch.Tensor, xy: torch.Tensor, heads: int, ridge: float) -> None:
    """Sets o_proj's weight from X'X and X'Y, see `calibrate`."""
    by_head = o_proj.weight.double().unflatten(1, (heads, -1))
    xx_by_head = xx.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    overlap = torch.einsum("hdge,ohd,oge->hg", xx_by_head, by_head, by_head)
    target = torch.einsum("hdo,ohd->h", xy.unflatten(0, (heads, -1)), by_head)
    # The pseudo-inverse, for a head whose outputs are all zero makes `overlap` singular.
    scales = torch.linalg.pinv(overlap, hermitian=True) @ target
    scaled_weight = (by_head * scales[:, None]).flatten(1)
    penalty = _ridge(xx, ridge)
    weight = torch.linalg.solve(xx + penalty, xy + penalty @ scaled_weight.mT).mT
    o_proj.weight.copy_(weight)


def _ridge(xx: torch.Tensor, strength: float) -> torch.Tensor:
    """strength x the mean of the diagonal of X'X, on a diagonal."""
    scale = strength * xx.diagonal().mean().clamp(min=1e-12)
    return scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)


def student_attention_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student attentions of an `AttentionAlignmentModel`'s state dict, under the names of
    `StudentForCausalLM`."""
    found = {}
    for name, tensor in state.items():
        if ".attn.student_attn." in name:
            found[name.replace(".attn.student_attn.", ".attn.")] = tensor
    return found

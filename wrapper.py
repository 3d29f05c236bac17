"""Stage 1: every attention of the teacher beside its linear twin, aligned layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from distill_model import StudentForCausalLM, check_calibration
from distill_model.attention import SoftmaxAttention
from distill_model.fused_ops import scaled
from distill_model.losses import alignment_loss


class _LossAndGradients(torch.autograd.Function):
    """loss(), with its gradients computed at once, so that its graph does not outlive the call;
    backward scales them. They lie one behind the other, for a host needs as long to start the
    scaling of one as of all."""

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
    """A teacher's attention and the student's, fed the same hidden states.

    The loss is returned, not kept as an attribute: a kept one is lost under re-entrant
    checkpointing and under ZeRO. recompute: see `AttentionAlignmentModel`.
    """

    def __init__(
        self,
        teacher_attn: nn.Module,
        student_attn: nn.Module,
        kind: str = "mse",
        recompute: bool = False,
    ):
        super().__init__()
        self.teacher_attn, self.student_attn = teacher_attn.requires_grad_(False), student_attn
        self.kind, self.recompute = kind, recompute

    def forward(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, T, hidden_size] -> (the teacher's output, same shape, without graph;
        the loss)."""
        hidden_states = hidden_states.detach()
        with torch.no_grad():
            target = self.teacher_attn(hidden_states, position_embeddings=position_embeddings)[0]

        def loss():
            output = self.student_attn(hidden_states, position_embeddings=position_embeddings)[0]
            return alignment_loss(output, target, self.kind)

        if not torch.is_grad_enabled():
            return target, loss()
        if self.recompute:
            return target, checkpoint(loss, use_reentrant=False)
        parameters = [p for p in self.student_attn.parameters() if p.requires_grad]
        parameters.sort(key=torch.numel, reverse=True)  # those of a few elements last: all but them stay aligned
        return target, _LossAndGradients.apply(loss, *parameters)


class AttentionAlignmentModel(nn.Module):
    """What stage 1 runs: the teacher's embeddings and blocks, each attention wrapped, up to the
    last attention.

    No final norm, no head, nothing after the last attention. Only the student attentions train, and
    never is more than one layer's graph alive: a layer's gradients are computed with its loss, or,
    with `recompute`, the layer is computed again in backward, as ZeRO-3 needs it, which gathers
    weights around forward and backward. Parameters are named as in `StudentForCausalLM`, with
    `attn.teacher_attn.` and `attn.student_attn.` for `attn.`.
    """

    def __init__(self, teacher: StudentForCausalLM, student: StudentForCausalLM, kind="mse", recompute=False):
        super().__init__()
        self.config, self.kind = student.config, kind
        self.model = teacher.model.requires_grad_(False)
        del self.model.norm
        for block, twin in zip(self.model.layers, student.model.layers, strict=True):
            block.attn = AttentionDistillationWrapper(block.attn, twin.attn.requires_grad_(True), kind, recompute)
        last = self.model.layers[-1]
        del last.mlp, last.mlp_norm

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids [B, T] -> loss, a mean over layers, layer_losses and layer_variances
        [num_hidden_layers], in fp32.

        A layer's variance is that of its teacher's attention output y [B T, hidden_size]: the mean
        over tokens and features of (y - the feature's mean over the tokens)^2. See
        `relative_errors`.
        """
        with torch.no_grad():
            hidden_states = self.model.embeddings(input_ids)
            position_embeddings = self.model.position_embeddings(hidden_states)
        losses, variances = [], []
        for block in self.model.layers:
            with torch.no_grad():
                normed = block.attn_norm(hidden_states)
            output, loss = block.attn(normed, position_embeddings)
            losses.append(loss)
            variances.append(output.flatten(0, 1).var(0, correction=0))  # one reduction; all layers' means come below
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
        """layer_losses in units that compare between layers: 0 is the teacher's output, 1 as good
        as its mean.

        mse: mean squared difference / variance. l2, the mean of norms: loss / standard deviation.
        """
        scale = variances if self.kind == "mse" else variances.sqrt()
        return losses / scale.clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def mean_distances(attn: SoftmaxAttention, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
    """How many tokens back each head looks, the mean over its weights and the queries of the second
    half: [num_heads]."""
    q, k, _ = attn.project(hidden_states, position_embeddings)
    half, length = hidden_states.shape[1] // 2, hidden_states.shape[1]
    k = k.repeat_interleave(attn.num_heads // attn.num_kv_heads, 2)
    distance = torch.arange(half, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    total = q.new_zeros(attn.num_heads, dtype=torch.float32)
    for q_row, k_row in zip(q[:, half:], k):  # a sequence at a time: T x T scores of all heads
        scores = torch.einsum("thd,shd->hts", q_row, k_row).float() * attn.head_dim**-0.5
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        total += (weights * distance.clamp(min=0)).sum(-1).mean(-1)
    return total / len(q)


@torch.no_grad()
def calibrate(
    model: AttentionAlignmentModel,
    batches: list[torch.Tensor],
    ridge: float = 2.0,
    show: bool = False,
) -> list[nn.Parameter]:
    """Fits what of a student has a closed form, before the first step, on batches of token ids [B,
    T].

    Decay, where the student has one a head: an exponential kernel whose mean distance d is that of
    the teacher's softmax weights forgets log(1 + 1 / d) a token. A gate without a bias, where the
    student has one: X [tokens, hidden_size] being what the layer gets, it opens along u = argmin |X
    u - 1|^2 + 0.01 mean(diag X'X) |u|^2. Then o_proj, with X [tokens, heads x head_dim] what it
    gets and Y what the teacher's attention gives, less o_proj's bias: one scale a head by least
    squares, and around that W = argmin |X W' - Y|^2 + ridge mean(diag X'X) |W - W_scaled|^2. The
    ridge keeps W near the teacher's: what fits best before training is not the best to train from.

    show: a progress bar. Returns the parameters that it fitted. Raises ValueError for students
    whose o_proj is fused with their norm, so that nobody sees what it gets.
    """
    check_calibration(model.config.student_name)
    wrappers, heads = [block.attn for block in model.model.layers], model.config.num_attention_heads
    distances, inputs, moments, gates = {}, {}, {}, {}

    def look(wrapper, args):
        distances[wrapper] = distances.get(wrapper, 0) + mean_distances(wrapper.teacher_attn, *args) / len(batches)

    def keep_input(o_proj, args):
        inputs[o_proj] = args[0]

    def add_moments(wrapper, args, output):
        o_proj = wrapper.student_attn.o_proj
        x, y = (t.flatten(0, -2).double() for t in (inputs.pop(o_proj), output[0]))
        if o_proj.bias is not None:
            y = y - o_proj.bias
        xx, xy = moments.get(o_proj, (0, 0))
        moments[o_proj] = xx + x.mT @ x, xy + x.mT @ y

    def add_gate_moments(wrapper, args):
        x = args[0].flatten(0, -2).double()
        xx, total = gates.get(wrapper, (0, 0))
        gates[wrapper] = xx + x.mT @ x, total + x.sum(0)

    def penalty(xx, strength):
        return strength * xx.diagonal().mean().clamp(min=1e-12) * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)

    def count(wrapper, args, output):
        progress.update()

    def run(hooks):
        hooks += [wrapper.register_forward_hook(count) for wrapper in wrappers]
        for ids in batches:
            model(ids)
        for hook in hooks:
            hook.remove()

    passes = 2 if any(wrapper.student_attn.fits_decay or wrapper.student_attn.fits_gate for wrapper in wrappers) else 1
    progress = tqdm(
        total=passes * len(batches) * len(wrappers),
        desc="calibrating",
        unit="layer",
        disable=not show,
    )
    hooks = [wrapper.register_forward_pre_hook(look) for wrapper in wrappers if wrapper.student_attn.fits_decay]
    hooks += [
        wrapper.register_forward_pre_hook(add_gate_moments) for wrapper in wrappers if wrapper.student_attn.fits_gate
    ]
    if hooks:
        run(hooks)
    for wrapper, distance in distances.items():
        wrapper.student_attn.set_decay(torch.log1p(1 / distance.clamp(min=0.5)))
    for wrapper, (xx, total) in gates.items():
        wrapper.student_attn.open_gate(torch.linalg.solve(xx + penalty(xx, 0.01), total))
    run(
        [wrapper.register_forward_hook(add_moments) for wrapper in wrappers]
        + [wrapper.student_attn.o_proj.register_forward_pre_hook(keep_input) for wrapper in wrappers]
    )
    for o_proj, (xx, xy) in moments.items():
        by_head = o_proj.weight.double().unflatten(1, (heads, -1))
        overlap = torch.einsum(
            "hdge,ohd,oge->hg",
            xx.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)),
            by_head,
            by_head,
        )
        target = torch.einsum("hdo,ohd->h", xy.unflatten(0, (heads, -1)), by_head)
        scales = torch.linalg.pinv(overlap, hermitian=True) @ target  # a head may give nothing but zeros
        scaled = (by_head * scales[:, None]).flatten(1)
        pull = penalty(xx, ridge)
        o_proj.weight.copy_(torch.linalg.solve(xx + pull, xy + pull @ scaled.mT).mT)
    progress.close()
    return [
        *(wrapper.student_attn.dt_bias for wrapper in distances),
        *(wrapper.student_attn.g_proj.weight for wrapper in gates),
        *(o_proj.weight for o_proj in moments),
    ]


def student_attention_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student attentions of an `AttentionAlignmentModel`'s state, under the names of
    `StudentForCausalLM`."""
    return {k.replace(".attn.student_attn.", ".attn."): v for k, v in state.items() if ".attn.student_attn." in k}

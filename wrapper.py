"""Stage 1: every attention of the teacher beside its linear twin, aligned layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill_model import StudentForCausalLM
from distill_model.losses import alignment_loss


class AttentionDistillationWrapper(nn.Module):
    """A teacher's attention and the student's, fed the same hidden states.

    The loss is returned, not kept as an attribute: a kept one is lost under re-entrant checkpointing and under ZeRO.
    """

    def __init__(self, teacher_attn: nn.Module, student_attn: nn.Module, kind: str = "mse", checkpointing: bool = False):
        super().__init__()
        self.teacher_attn, self.student_attn = teacher_attn.requires_grad_(False), student_attn
        self.kind, self.checkpointing = kind, checkpointing

    def _student_loss(self, hidden_states, target, position_embeddings):
        output = self.student_attn(hidden_states, position_embeddings=position_embeddings)[0]
        return alignment_loss(output, target, self.kind)

    def forward(self, hidden_states: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, T, hidden_size] -> (the teacher's output, same shape, without graph; the loss)."""
        hidden_states = hidden_states.detach()
        with torch.no_grad():
            target = self.teacher_attn(hidden_states, position_embeddings=position_embeddings)[0]
        arguments = hidden_states, target, position_embeddings
        if self.checkpointing and torch.is_grad_enabled():
            return target, checkpoint(self._student_loss, *arguments, use_reentrant=False)
        return target, self._student_loss(*arguments)


class AttentionAlignmentModel(nn.Module):
    """What stage 1 runs: the teacher's embeddings and blocks, each attention wrapped, up to the last attention.

    No final norm, no head, nothing after the last attention. Only the student attentions train. Parameters are named
    as in `StudentForCausalLM`, with `attn.teacher_attn.` and `attn.student_attn.` for `attn.`.
    """

    def __init__(self, teacher: StudentForCausalLM, student: StudentForCausalLM, kind="mse", checkpointing=False):
        super().__init__()
        self.config = student.config
        self.model = teacher.model.requires_grad_(False)
        del self.model.norm
        for block, twin in zip(self.model.layers, student.model.layers, strict=True):
            block.attn = AttentionDistillationWrapper(block.attn, twin.attn.requires_grad_(True), kind, checkpointing)
        last = self.model.layers[-1]
        del last.mlp, last.mlp_norm

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids [B, T] -> loss, the mean over layers, and layer_losses [num_hidden_layers], in fp32."""
        with torch.no_grad():
            hidden_states = self.model.embeddings(input_ids)
            position_embeddings = self.model.position_embeddings(hidden_states)
        losses = []
        for block in self.model.layers:
            with torch.no_grad():
                normed = block.attn_norm(hidden_states)
            output, loss = block.attn(normed, position_embeddings)
            losses.append(loss)
            if block is not self.model.layers[-1]:
                with torch.no_grad():
                    hidden_states = hidden_states + output
                    hidden_states = hidden_states + block.mlp(block.mlp_norm(hidden_states))
        losses = torch.stack(losses)
        return {"loss": losses.mean(), "layer_losses": losses.detach()}


def student_attention_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student attentions of an `AttentionAlignmentModel`'s state, under the names of `StudentForCausalLM`."""
    return {k.replace(".attn.student_attn.", ".attn."): v for k, v in state.items() if ".attn.student_attn." in k}

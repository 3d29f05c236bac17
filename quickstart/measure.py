"""What the quickstart's report measures: held-out figures, recall, answers to questions, decoding
speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from distill_model import StudentForCausalLM
from heldout import ModelOutput, heldout_figures
from recall_tasks import Document, answer_accuracy

BATCH_SIZE = 8
WARM_TOKENS = 4  # decoded before the times count


@dataclass(frozen=True)
class ModelFigures:
    """A model on held-out text: loss and KL in nats per token, top-1 agreement with the teacher,
    the loss at the longer context, and associative recall (None where the teacher has not learnt
    it)."""

    name: str
    heldout_loss: float
    heldout_kl: float
    top1_agreement: float
    long_loss: float
    associative_recall: float | None = None


@dataclass(frozen=True)
class Decoding:
    """Decoding one token at a time after `context` tokens: tokens per second, and bytes of the
    cache."""

    name: str
    context: int
    tokens_per_second: float
    cache_bytes: int


@dataclass(frozen=True)
class HeldoutData:
    """chunks and long_chunks: held-out batches at both context lengths. teacher_outputs: for the
    chunks. documents: of associative recall, or none."""

    chunks: list[dict[str, torch.Tensor]]
    long_chunks: list[dict[str, torch.Tensor]]
    teacher_outputs: Sequence[ModelOutput]
    documents: list[Document]

    @property
    def ids(self) -> torch.Tensor:
        """The token ids of the chunks, [N, T]."""
        return torch.cat([batch["input_ids"] for batch in self.chunks])


def figures_of(name: str, model: StudentForCausalLM, tokenizer, data: HeldoutData) -> ModelFigures:
    figures = heldout_figures(model, data.chunks, data.teacher_outputs)
    recall = answer_accuracy(model, tokenizer, data.documents) if data.documents else None
    return ModelFigures(
        name=name,
        heldout_loss=figures.mean_cross_entropy,
        heldout_kl=figures.mean_kl,
        top1_agreement=figures.mean_agreement,
        long_loss=mean_loss(model, data.long_chunks),
        associative_recall=recall,
    )


@torch.no_grad()
def mean_loss(model: StudentForCausalLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean next-token cross-entropy over batches."""
    total = count = 0
    for batch in batches:
        rows = len(batch["input_ids"])
        total += model(**batch, labels=batch["input_ids"], use_cache=False).loss.item() * rows
        count += rows
    return total / count


@torch.no_grad()
def alignment(
    student: StudentForCausalLM,
    teacher: StudentForCausalLM,
    ids: torch.Tensor,
) -> list[float]:
    """Relative alignment error of each layer on ids [N, T]: the mean squared error of the
    student's attention output, given the teacher's hidden states, over the variance of the
    teacher's attention output (its mean squared deviation from each feature's mean over the
    tokens). 0 is perfect, 1 as good as a constant. Stage 1 logs the same as layer_error/00 ..."""
    errors = []

    def compare(index):
        def hook(module, args, kwargs, output):
            ours = student.model.layers[index].attn(*args, **kwargs)[0].flatten(0, 1)
            theirs = output[0].flatten(0, 1)
            variance = theirs.var(0, correction=0).mean()
            errors.append(((ours - theirs).square().mean() / variance).item())

        return hook

    hooks = [
        layer.attn.register_forward_hook(compare(index), with_kwargs=True)
        for index, layer in enumerate(teacher.model.layers)
    ]
    try:
        teacher.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@torch.no_grad()
def generated(model: StudentForCausalLM, tokenizer, prompt: str, new_tokens: int) -> str:
    """The greedy continuation of a text."""
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = encoded["input_ids"].to(model.device)
    pad = model.config.eos_token_id or 0
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def answer(model: StudentForCausalLM, tokenizer, document: Document) -> str:
    """What the model writes for the last answer of a document, up to the comma or line end that
    follows it."""
    length = len(tokenizer(f" {document.answer}", add_special_tokens=False)["input_ids"])
    text = generated(model, tokenizer, document.prompt, length + 4)
    return text.replace("\n", ",").partition(",")[0].strip()


class Clock(LogitsProcessor):
    """Notes the time whenever the logits of a token are there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores


@torch.no_grad()
def decoding(name: str, model: StudentForCausalLM, context: int, new_tokens: int = 32) -> Decoding:
    """Decodes greedily after `context` random tokens with a static cache, at batch size 1. The
    speed is that of the median token, which what is read or decoded does not change."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(1, model.config.vocab_size, (1, context), generator=generator)
    clock = Clock()
    output = model.generate(
        ids.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        prefill_chunk_size=4096,
        logits_processor=[clock],
        return_dict_in_generate=True,
    )
    times = clock.times[WARM_TOKENS:]
    token_seconds = statistics.median(stop - start for start, stop in zip(times, times[1:]))
    return Decoding(name, context, 1 / token_seconds, output.past_key_values.nbytes)

"""The tasks of our own: recall in synthetic documents, perplexity and KL on held-out chunks. None
needs a network."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

from runtime.data import LOSS_MASK, encode_beginnings, load_tokenizer, open_chunks_for, read_batch

import torch
from tqdm import tqdm

from recall_tasks import ASKED_TASKS, RECALL_TASKS, WORDS, Document, document_accuracies

from .options import Options, option_error, option_name, vocabulary_size
from .tasks import HELDOUT, KL, PERPLEXITY, RECALL_GENERATION, Unit

NUM_DOCUMENTS = 100  # of a recall task
MAX_HELDOUT_CHUNKS = 256
BATCH_TOKENS = 4096  # per forward pass
CHECKED_TOKENS = 64  # for `has_linear_head`, which holds their logits
METRICS = {PERPLEXITY: "perplexity", KL: "nats"}  # of the others: accuracy


def recall_options(task: str, size: int) -> tuple[dict[str, int], int]:
    """(options of the task's generator for documents of about 8 * size tokens, words that they
    need at least)."""
    num_chains = 3 * size // 8
    return {
        "associative_recall": ({"num_pairs": size}, size),
        "copying": ({"length": 2 * size}, 1),
        "multi_hop_recall": ({"num_chains": num_chains}, 9 * size // 8),
        "needle_recall": ({"num_sentences": 9 * size // 8}, 1),
    }[task]


def recall_documents(task: str, seq_len: int, num_words: int, tokenizer, count: int = NUM_DOCUMENTS) -> list[Document]:
    """`count` documents of at most seq_len tokens, and nearly as many. A tokenizer always gets the
    same ones.

    num_words: the number of words that they draw from; they draw from more if they need more.
    Raises ValueError if seq_len is too short or too long.
    """
    size = seq_len // 8  # a pair and its comma take some six tokens, and its question may repeat it
    while size >= 4:
        options, words_needed = recall_options(task, size)
        if words_needed > len(WORDS):
            need = f"need {words_needed} different words; there are {len(WORDS)}"
            raise option_error("seq_lens", f"{seq_len} tokens of {task} {need}")
        if task in RECALL_TASKS:
            options["num_words"] = max(num_words, words_needed)
        rng = random.Random(f"{task} {seq_len}")
        documents = [ASKED_TASKS[task](rng, **options) for _ in range(count)]
        encoded = encode_beginnings(tokenizer, [document.text for document in documents])
        longest = max(len(ids) for ids in encoded)
        if longest <= seq_len:
            return documents
        size = min(size - 1, size * seq_len // longest)
    raise option_error("seq_lens", f"{seq_len} tokens are too few for {task}")


def recall_generation(seq_len: int, num_words: int, tokenizer):
    """A task of lm-evaluation-harness: the model generates the last answer of documents of
    associative recall."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = recall_documents("associative_recall", seq_len, num_words, tokenizer)
    rows = [{"prompt": document.prompt, "answer": document.answer} for document in documents]
    answers = [f" {document.answer}" for document in documents]
    encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    longest = max(len(ids) for ids in encoded)

    def exact_match(row: dict, generated: list[str]) -> dict[str, float]:
        return {"exact_match": float(generated[0].strip() == row["answer"])}

    return ConfigurableTask(
        config={
            "task": RECALL_GENERATION,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            # Room for more than the answer, so that a model that does not stop is wrong.
            "generation_kwargs": {
                "until": [",", "\n"],
                "do_sample": False,
                "max_gen_toks": longest + 4,
            },
            "process_results": exact_match,
            "metric_list": [{"metric": "exact_match"}],
        }
    )


@dataclass(frozen=True)
class HeldoutChunks:
    """Chunks as a batch of tensors [N, T] by name, see `runtime.data.collate`; sliced by chunk."""

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, rows: slice) -> HeldoutChunks:
        return HeldoutChunks({name: tensor[rows] for name, tensor in self.tensors.items()})


def heldout_chunks(options: Options, lm) -> HeldoutChunks:
    """Held-out chunks of --data. Raises ValueError if there are none, or if they were
    made with another tokenizer than the checkpoint's."""
    tokenizer = load_tokenizer(lm.tokenizer.name_or_path)
    vocab_size = vocabulary_size(lm.model.config)
    key = option_name("data")
    chunks = open_chunks_for(
        tokenizer, vocab_size, options.data, key=key, model_key="CHECKPOINT", document_mask=options.document_mask
    )
    if chunks.heldout is None:
        raise ValueError(f"{key}: {options.data} has no held-out part; preprocess with --holdout")
    count = min(len(chunks.heldout), MAX_HELDOUT_CHUNKS)
    return HeldoutChunks(read_batch(chunks.heldout, range(count)))


def heldout_values(
    unit: Unit, options: Options, lm, chunks: HeldoutChunks, weights: torch.Tensor | None, teacher
) -> list[float]:
    """Of each of the chunks the mean over its positions, in nats: cross-entropy of the next token,
    or KL(teacher || model). weights: [N, T], see `position_weights`. Raises ValueError if the
    vocabularies differ."""
    from heldout import has_linear_head, heldout_cross_entropy, heldout_kl, read_chunks, read_logits

    def reader(model):
        return read_chunks if has_linear_head(model, ids[:1, :CHECKED_TOKENS]) else read_logits

    ids = chunks.tensors["input_ids"]
    if not len(ids):  # of a rank that got none
        return []
    read_model = reader(lm.model)
    read_teacher = reader(teacher) if unit.task == KL else None
    values = []
    for batch in batches(unit, lm, chunks, ids.shape[1]):
        output = read_model(lm.model, batch.tensors)
        weight = None if weights is None else weights[len(values) : len(values) + len(batch)]
        if unit.task == PERPLEXITY:
            values += heldout_cross_entropy(output, batch.tensors["input_ids"], weight).tolist()
            continue
        expected = read_teacher(teacher, batch.tensors)
        if output.vocab_size != expected.vocab_size:
            sizes = f"a vocabulary of {output.vocab_size} entries, the teacher {options.teacher} one of"
            raise ValueError(f"CHECKPOINT: it has {sizes} {expected.vocab_size}")
        values += heldout_kl(output, expected, weight).tolist()
    if not all(math.isfinite(value) for value in values):
        raise ValueError("the logits are not finite")
    return values


def batches(unit: Unit, lm, documents, length: int):
    """Slices of `documents`, of about BATCH_TOKENS tokens each; rank 0 shows a progress bar."""
    size = max(1, BATCH_TOKENS // length)
    for start in tqdm(range(0, len(documents), size), desc=unit.key, disable=bool(lm.rank)):
        yield documents[start : start + size]


def measure_own(unit: Unit, options: Options, documents, lm, teacher) -> dict | None:
    """The result of a unit: the mean, with its standard error, of a figure that a forward pass
    gives for each document.

    documents: of a recall task, or `HeldoutChunks`; they are sharded across the ranks. The figure is
    accuracy (`document_accuracies`), KL, or cross-entropy, whose mean's exp is the perplexity.
    None on ranks other than 0.
    """
    mine = slice(lm.rank, None, lm.world_size)
    if unit.task in HELDOUT:
        from heldout import position_weights

        chunks = documents[: options.limit]
        weights = position_weights(chunks.tensors)[mine] if LOSS_MASK in chunks.tensors else None
        values = heldout_values(unit, options, lm, chunks[mine], weights, teacher)
    else:
        shard = documents[: options.limit][mine]
        values = []
        for batch in batches(unit, lm, shard, unit.seq_len):
            values += document_accuracies(lm.model, lm.tokenizer, batch)
    gathered = lm.gather_object(values)
    if lm.rank:
        return None
    values = [value for part in gathered for value in part]
    mean = statistics.fmean(values)
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    result = {
        "metric": METRICS.get(unit.task, "acc"),
        "score": mean,
        "stderr": stderr,
        "higher_is_better": unit.task not in HELDOUT,
        "samples": len(values),
    }
    if unit.task == PERPLEXITY:
        perplexity = math.exp(mean)
        result["score"] = perplexity
        result["stderr"] = stderr and perplexity * stderr
        result["metrics"] = {"loss": mean, "loss_stderr": stderr}
    return result

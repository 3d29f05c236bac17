"""Checkpoints and tasks as lm-evaluation-harness expects them, and the result that it finds."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import statistics
import sys
from pathlib import Path
from unittest.mock import patch

from runtime.data import end_no_text, load_tokenizer, out_of_vocabulary
from runtime.generation import PREFILL_CHUNK, greedy

import torch

from recall_tasks import RECALL_TASKS

from .options import Options, vocabulary_size
from .own_tasks import heldout_chunks, measure_own, recall_documents, recall_generation
from .ruler import ruler_task, seed_generators
from .tasks import HELDOUT, NEEDLE, OWN, RECALL_GENERATION, RULER, Unit

PROJECT = Path(__file__).resolve().parents[1]
# The metric that stands for a task is the first of these that it has.
MAIN_METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")


# ------------------------------------------------------------------------------------- checkpoints
def load_model(checkpoint: str):
    """A checkpoint in its own dtype, on this process's device. It generates greedily, with chunked
    prefill (`prefills_in_chunks`)."""
    from transformers import AutoModelForCausalLM

    from convert import load_teacher
    from convert.loader import source_config

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    config = source_config(checkpoint)
    if config.model_type == "transformer":  # FLA's own class needs flash-attn
        model = load_teacher(checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype="auto", trust_remote_code=False)
    model.generation_config = greedy(model.generation_config)
    if prefills_in_chunks(model.config):
        model.generation_config.prefill_chunk_size = PREFILL_CHUNK
    return model.to(device).eval()


def prefills_in_chunks(config) -> bool:
    """Whether chunked prefill is known to work for the model, and is not slower than a whole
    prompt."""
    from convert.families import FAMILIES
    from distill_model import StudentConfig, get_student_attention_class

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # its frequencies depend on the length of the prompt
        return False
    student = getattr(config, "student_name", None)
    if student:
        return get_student_attention_class(student).supports_chunked_prefill
    return config.model_type in {*FAMILIES, StudentConfig.model_type}


def refuse_unknown_tokens(model, tokenizer) -> None:
    """Makes the model raise ValueError for a token without an embedding, if the tokenizer has one:
    on a GPU the lookup of such an id would abort the process. If padding, which is masked, is such
    a token, EOS replaces it."""
    vocab_size = vocabulary_size(model.config)
    if max(tokenizer.get_vocab().values()) < vocab_size:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token

    def refuse(module, args) -> None:
        largest = args[0].max().item()
        if largest >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(largest)
            where = f"CHECKPOINT: {token!r} in a text has the id"
            raise out_of_vocabulary(where, largest, vocab_size)

    model.get_input_embeddings().register_forward_pre_hook(refuse)


def harness_model(checkpoint: str, batch_size: str):
    """The checkpoint as a model of lm-evaluation-harness; under torchrun documents are sharded
    across ranks."""
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # transformers warns of texts longer than the tokenizer's model_max_length, which tasks may make.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    refuse_unknown_tokens(model, tokenizer)
    end_no_text(tokenizer)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # HFLM does this only for models that it loads, on GPUs
        lm.accelerator = Accelerator(cpu=lm.device.type == "cpu")
        lm._rank = lm.accelerator.process_index
        lm._world_size = lm.accelerator.num_processes
    return lm


# ------------------------------------------------------------------------------------------- tasks
def build(unit: Unit, options: Options, manager, lm):
    """The unit's documents if `measure_own` measures it, else its task or group of tasks of
    lm-evaluation-harness."""
    if unit.task in HELDOUT:
        return heldout_chunks(options, lm)
    if unit.task in (*RECALL_TASKS, NEEDLE):
        return recall_documents(unit.task, unit.seq_len, options.num_words, lm.tokenizer)
    if unit.task == RECALL_GENERATION:
        return recall_generation(unit.seq_len, options.num_words, lm.tokenizer)
    if unit.task in RULER:
        return ruler_task(unit, lm.tokenizer, options.limit)
    seed_generators(unit)
    import_evaluate_library()
    with contextlib.redirect_stdout(io.StringIO()):  # tasks print their progress
        loaded = manager.load([unit.task])
    groups = loaded.get("groups") or {}
    return groups.get(unit.task) or loaded["tasks"][unit.task]


def import_evaluate_library() -> None:
    """Imports the library `evaluate`, which some tasks use: they would find this project's script
    of that name, whose folder comes first on the path."""
    path = [entry for entry in sys.path if Path(entry).resolve() != PROJECT]
    with patch.object(sys, "path", path):
        importlib.import_module("evaluate")


def measure(unit: Unit, options: Options, task, lm, manager, teacher) -> dict | None:
    """The unit's result; None on ranks other than 0."""
    from lm_eval import simple_evaluate

    if unit.task in OWN:
        return measure_own(unit, options, task, lm, teacher)
    # RULER's documents fill their length to the last token; HFLM would cut them at the length that
    # the config names.
    lm._max_length = None
    if unit.seq_len:
        lm._max_length = max(lm.max_length, unit.seq_len)
    found = simple_evaluate(lm, tasks=[task], limit=options.limit, task_manager=manager, log_samples=True)
    return None if found is None else result_of(unit, found)


def result_of(unit: Unit, found: dict) -> dict:
    """A result, from what `simple_evaluate` returned."""
    metrics = {
        name: value
        for name, value in found["results"][unit.task].items()
        if isinstance(value, (int, float)) and "," in name
    }
    metric = main_metric(unit, metrics)
    stderr = metrics.get(metric.replace(",", "_stderr,", 1))
    if stderr is None:
        stderr = stderr_of_samples(found["samples"], metric, metrics[metric])
    directions = found["higher_is_better"].get(unit.task, {})
    return {
        "metric": "match" if unit.task in RULER else metric.removesuffix(",none"),
        "score": metrics[metric],
        "stderr": stderr,
        "higher_is_better": directions.get(metric.split(",", 1)[0]) is not False,
        "samples": sum(found["n-samples"][name]["effective"] for name in found["samples"]),
        "metrics": metrics,
    }


def stderr_of_samples(samples: dict[str, list[dict]], metric: str, score: float) -> float | None:
    """The standard error of a score that is the mean of its samples', as RULER's are, for which the
    harness gives none; None for other scores."""
    name, filtered = metric.split(",", 1)
    values = []
    for task in samples:
        for sample in samples[task]:
            if sample["filter"] == filtered and isinstance(sample.get(name), (int, float)):
                values.append(sample[name])
    if len(values) < 2 or not math.isclose(statistics.fmean(values), score, abs_tol=1e-9):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def main_metric(unit: Unit, metrics: dict[str, float]) -> str:
    """The name of the metric that stands for the task."""
    scores = [name for name in metrics if "_stderr," not in name]
    preferred = (f"{unit.seq_len},none",) if unit.task in RULER else MAIN_METRICS
    for name in preferred:
        if name in scores:
            return name
    return scores[0]

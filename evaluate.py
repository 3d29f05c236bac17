"""Checkpoints through lm-evaluation-harness, and through tasks of our own that need no network.

    python evaluate.py outputs/qwen2.5_1.5b_gdn_v4_hybrid_0_25_ga_s2/stage3/converted-hf       # RULER at 4096
    python evaluate.py TEACHER STUDENT --tasks local --seq_lens 512,2048 --data CHUNKS --teacher TEACHER

A checkpoint is a folder or a hub name: one of ours, or a plain Hugging Face one. --tasks takes groups (`GROUPS`), tasks of our
own (`LOCAL`) and any name that lm-evaluation-harness knows. With several GPUs there is a process on each, and the documents of a
task are dealt out to them.

Each checkpoint has OUTPUT/PATH__OF__CHECKPOINT/results.json, written anew after every task: run again, the command does what is
missing, what failed, and what was measured with other settings or by an older procedure. The tables of this call are
OUTPUT/results.md and results.json, with results.png for several checkpoints. The exit code is 1 if a task failed; the others are
done all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import io
import json
import logging
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from runtime.checkpoints import fingerprint, sha256
from runtime.command import run_main
from runtime.data import (
    check_special_tokens,
    data_fingerprint,
    encode_beginnings,
    end_no_text,
    load_tokenizer,
    open_chunks,
    open_chunks_for,
    out_of_vocabulary,
    read_metadata,
)
from runtime.files import atomic_write_text, one_line
from runtime.generation import greedy
from runtime.guard import StopSignals

from tqdm import tqdm

from eval_ruler import FETCHED, ruler_manager, ruler_task, seed_generators
from eval_tables import (
    GROUPS,
    KL,
    LOCAL,
    PERPLEXITY,
    RECALL_GENERATION,
    RULER,
    Unit,
    markdown,
    plot,
)
from recall_tasks import NUM_WORDS, RECALL_TASKS, WORDS, Document, document_accuracies

OWN = (*RECALL_TASKS, PERPLEXITY, KL)  # measured here, by forward passes over whole documents
SIZED = (*RULER, *RECALL_TASKS, RECALL_GENERATION)  # those whose documents are made at a length
SEQ_LENS = {"needle": (4096, 16384, 65536, 262144)}  # of a group, unless --seq_lens says otherwise; of the others:
SEQ_LEN = 4096
# The metric that stands for a task, the first of these that it has.
METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")
PROCEDURE = 2  # raise it when the code changes what is measured: results with another number are measured again
DOCUMENTS = 100  # of a recall task
HELDOUT_CHUNKS = 256  # at most
BATCH_TOKENS = 4096  # of our own tasks, whose logits are held at once
PREFILL = 4096  # tokens of a long prompt that are read at a time


# ------------------------------------------------------------------------------------------------ what is asked for
def task_manager(names):
    """lm-evaluation-harness's index of tasks, as far as these need it."""
    from lm_eval.tasks import TaskManager

    if set(names) <= {*RULER, *LOCAL}:
        return ruler_manager()
    print("Tasks: reading lm-evaluation-harness's index, 15 s", flush=True)
    return TaskManager()


def plan(args: argparse.Namespace, manager) -> list[Unit]:
    """The units that --tasks and --seq_lens ask for, each once. Raises ValueError for a task that
    nobody knows."""
    units: dict[Unit, None] = {}
    for asked in args.tasks:
        names = GROUPS.get(asked, (asked,))
        if asked == "local":  # as far as there is what it needs
            names = [
                name for name in names if name not in (PERPLEXITY, KL) or args.data and (name != KL or args.teacher)
            ]
        for name in names:
            if name in LOCAL:
                found = [name]
            elif name not in manager.task_index:
                known = [*GROUPS, *LOCAL, *manager.all_tasks]
                close = difflib.get_close_matches(name, known, 3)
                hint = f"did you mean {' or '.join(close)}? " if close else ""
                raise ValueError(
                    f"TASKS: {name!r} is unknown; {hint}Groups: {', '.join(GROUPS)}; of our own: {', '.join(LOCAL)}; "
                    "or any of lm-evaluation-harness (lm-eval ls tasks)"
                )
            else:
                entry = manager.task_index[name]
                found = sorted(entry.tags) if entry.kind.name == "TAG" else [name]
            for task in found:
                lengths = (args.seq_lens or SEQ_LENS.get(asked, (SEQ_LEN,))) if task in SIZED else (None,)
                units |= dict.fromkeys(Unit(task, length) for length in lengths)
    for unit in units:
        if unit.task in (PERPLEXITY, KL) and not args.data:
            raise ValueError(f"DATA: {unit.task} needs a folder of chunks with a held-out part, of preprocess_chunk.py")
        if unit.task == KL and not args.teacher:
            raise ValueError(f"TEACHER: {unit.task} needs the checkpoint that the KL is measured to")
    return list(units)


def dataset_of(task: str, manager) -> str | None:
    """What a task fetches from a network, None if nothing: a hub dataset's name or a place."""
    if task in SIZED or task in LOCAL:
        return FETCHED.get(task)
    config = manager.task_index[task].cfg or {}
    if "group" in config:
        member = config["task"][0]
        member = member if isinstance(member, str) else member.get("task", member.get("group"))
        return (
            dataset_of(member, manager) if isinstance(member, str) and member in manager.task_index else "its datasets"
        )
    if "dataset_path" not in config:  # of a tag, or of Python code
        return (
            dataset_of(sorted(manager.task_index[task].tags)[0], manager)
            if manager.task_index[task].kind.name == "TAG"
            else "its dataset"
        )
    return None if config["dataset_path"] in ("json", "csv", "parquet", "text", "") else config["dataset_path"]


def downloads(units: list[Unit], manager) -> dict[str, str]:
    """Task -> what it must fetch, as far as the Hugging Face cache does not hold it."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    found = {}
    for unit in units:
        source = dataset_of(unit.task, manager)
        if (
            source
            and not (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source.split()[0], repo_type="dataset")).is_dir()
        ):
            found[unit.task] = source
    return found


def vocabulary_size(config) -> int:
    """Of a model's config, or of its text model's where it has several."""
    return getattr(config, "vocab_size", None) or config.get_text_config().vocab_size


def check_checkpoint(key: str, name: str) -> int:
    """The size of the checkpoint's vocabulary. Raises ValueError unless `name` has a config that
    loads; `key` is the option that named it."""
    from convert.loader import KEY, source_config

    try:
        return vocabulary_size(source_config(name))
    except ValueError as error:
        raise ValueError(str(error).replace(KEY, key)) from None


# ------------------------------------------------------------------------------------------------ what is written down
def path_parts(checkpoint: str) -> list[str]:
    parts = [part for part in Path(checkpoint).parts if part not in ("/", ".", "..")]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "converted-hf" else parts


def labels(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoint -> the shortest end of its path that tells it from the others."""
    parts = [path_parts(checkpoint) for checkpoint in checkpoints]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise ValueError(f"CHECKPOINT: {checkpoints[i]} is named twice")
    for length in range(1, 1 + max(map(len, parts))):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return dict(zip(checkpoints, found))
    raise AssertionError(f"{checkpoints}: paths that differ have ends that differ")


class Record:
    """A checkpoint's results.json, and what outlives a process beside it: what runs, why it died,
    hashes of weights."""

    def __init__(self, args: argparse.Namespace, checkpoint: str):
        self.args, self.checkpoint = args, checkpoint
        self.folder = args.output / "__".join(path_parts(checkpoint))
        self.file, self.running, self.died, self.hashes = (
            self.folder / name for name in ("results.json", ".running", ".died", ".hashes.json")
        )
        try:
            self.results = json.loads(self.file.read_text())["tasks"] if self.file.is_file() else {}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"OUTPUT: {self.file} holds no results of ours; remove it, or name another folder"
            ) from None

    def fingerprint(self, checkpoint: str) -> str:
        """Of a folder: a hash of its config and weights. Of a hub name: the name."""
        return fingerprint(Path(checkpoint), self.sha256) if Path(checkpoint).is_dir() else checkpoint

    def sha256(self, file: Path) -> str:
        """Of its content, which is read again only when size or time of the file have changed: it
        may be of many gigabytes."""
        try:
            known = json.loads(self.hashes.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        stat, name = file.stat(), str(file.resolve())
        *state, digest = known.get(name) or (None,)
        if state != [stat.st_size, stat.st_mtime_ns]:
            digest = sha256(file)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(
                self.hashes,
                json.dumps(known | {name: [stat.st_size, stat.st_mtime_ns, digest]}, indent=1) + "\n",
            )
        return digest

    def settings(self, unit: Unit) -> dict:
        """What a result depends on, besides its unit."""
        settings = {"checkpoint": self.fingerprint(self.checkpoint), "limit": self.args.limit}
        if unit.task not in (PERPLEXITY, KL):  # measured on chunks, as ever
            settings["procedure"] = PROCEDURE
        if unit.task in (*RECALL_TASKS, RECALL_GENERATION):
            settings["num_words"] = self.args.num_words
        if unit.task in (PERPLEXITY, KL):
            settings["data"] = data_fingerprint(read_metadata(self.args.data))
        if unit.task == KL:
            settings["teacher"] = self.fingerprint(self.args.teacher)
        return settings

    def missing(self, units: list[Unit]) -> list[Unit]:
        """The units that have no result with these settings, or failed."""
        return [
            unit
            for unit in units
            if not (
                (result := self.results.get(unit.key))
                and "error" not in result
                and result["settings"] == self.settings(unit)
            )
        ]

    def put(self, unit: Unit, result: dict) -> None:
        self.results[unit.key] = {
            "task": unit.task,
            "seq_len": unit.seq_len,
            **result,
            "settings": self.settings(unit),
        }
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        packages = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        atomic_write_text(
            self.file,
            json.dumps(
                {"checkpoint": self.checkpoint, "versions": packages, "tasks": self.results},
                indent=1,
            )
            + "\n",
        )

    def clear(self, units: list[Unit]) -> list[Unit]:
        """Forgets the units that failed or were measured with other settings; returns those to do."""
        todo = self.missing(units)
        for unit in todo:
            self.results.pop(unit.key, None)
        self.end()
        return todo

    def begin(self, units: list[Unit]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running.write_text(json.dumps([unit.key for unit in units]))

    def end(self) -> None:
        self.running.unlink(missing_ok=True)
        self.died.unlink(missing_ok=True)

    def record_crashes(self, units: list[Unit]) -> bool:
        """Writes down as failed what processes died of; whether there was something."""
        keys = json.loads(self.running.read_text()) if self.running.is_file() else []
        why = self.died.read_text() if self.died.is_file() else "a process was killed, perhaps for memory"
        for unit in units:
            if unit.key in keys:
                self.put(unit, {"error": why})
        self.end()
        return bool(keys)


# ------------------------------------------------------------------------------------------------ tasks of our own
def recall_documents(task: str, seq_len: int, num_words: int, tokenizer, count: int = DOCUMENTS) -> list[Document]:
    """`count` documents of at most seq_len tokens, about as long as that allows; the same for a
    tokenizer every time.

    num_words: that they draw from, or as many as they need. Raises ValueError if seq_len is too
    short or too long.
    """
    size = seq_len // 8  # a pair and its comma take some six tokens, and its question may come again
    while size >= 4:
        options, words = {
            "associative_recall": ({"num_pairs": size}, size),
            "copying": ({"length": 2 * size}, 1),
            "multi_hop_recall": ({"num_chains": 3 * size // 8}, 9 * size // 8),
        }[task]
        if words > len(WORDS):
            raise ValueError(
                f"SEQ_LENS: {seq_len} tokens of {task} need {words} different words; there are {len(WORDS)}"
            )
        rng = random.Random(f"{task} {seq_len}")
        documents = [RECALL_TASKS[task](rng, num_words=max(num_words, words), **options) for _ in range(count)]
        longest = max(map(len, encode_beginnings(tokenizer, [d.text for d in documents])))
        if longest <= seq_len:
            return documents
        size = min(size - 1, size * seq_len // longest)
    raise ValueError(f"SEQ_LENS: {seq_len} tokens are too few for {task}")


def recall_generation(seq_len: int, num_words: int, tokenizer):
    """A task of lm-evaluation-harness: of documents of associative recall the last answer, which
    the model writes."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    made = recall_documents("associative_recall", seq_len, num_words, tokenizer)
    longest = max(map(len, tokenizer([f" {d.answer}" for d in made], add_special_tokens=False)["input_ids"]))
    return ConfigurableTask(
        config={
            "task": RECALL_GENERATION,
            "custom_dataset": lambda **_: {
                "test": Dataset.from_list([{"prompt": d.prompt, "answer": d.answer} for d in made])
            },
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
            "process_results": lambda doc, written: {"exact_match": float(written[0].strip() == doc["answer"])},
            "metric_list": [{"metric": "exact_match"}],
        }
    )


def heldout_rows(args: argparse.Namespace, tokenizer, vocab_size: int):
    """[N, T] held-out token ids. Raises ValueError if there are none, or of another tokenizer."""
    import torch

    chunks = open_chunks_for(tokenizer, vocab_size, args.data, key="DATA", model_key="CHECKPOINT")
    if chunks.heldout is None:
        raise ValueError(f"DATA: {args.data} has no held-out part; preprocess with --holdout")
    return torch.as_tensor(chunks.heldout[: min(len(chunks.heldout), HELDOUT_CHUNKS)]["input_ids"], dtype=torch.long)


def chunk_values(unit: Unit, args: argparse.Namespace, lm, ids, teacher) -> list[float]:
    """Of each of the chunks ids [N, T] the mean over its positions: cross-entropy of the next
    token, or KL(teacher || model)."""
    import torch

    values, size = [], max(1, BATCH_TOKENS // ids.shape[1])
    for start in tqdm(range(0, len(ids), size), desc=unit.key, disable=bool(lm.rank)):
        batch = ids[start : start + size].to(lm.device)
        with torch.no_grad():
            ours = lm.model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
            if unit.task == PERPLEXITY:
                values += (-ours[:, :-1].gather(-1, batch[:, 1:, None])[..., 0].mean(-1)).tolist()
                continue
            theirs = teacher(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"TEACHER: {args.teacher} has a vocabulary of {theirs.shape[-1]} entries, the checkpoint of {ours.shape[-1]}"
            )
        values += (theirs.exp() * (theirs - ours)).sum(-1).mean(-1).tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("the logits are not finite")
    return values


def measure_own(unit: Unit, args: argparse.Namespace, documents, lm, teacher) -> dict | None:
    """The mean over `documents` (of recall, or [N, T] chunks) of a figure that one forward pass
    gives, with its standard error: accuracy (`document_accuracies`), KL, or perplexity, which is
    exp of the mean. None on ranks other than 0."""
    mine = documents[: args.limit][lm.rank :: lm.world_size]
    if unit.task in RECALL_TASKS:
        values, size = [], max(1, BATCH_TOKENS // unit.seq_len)
        for start in tqdm(range(0, len(mine), size), desc=unit.key, disable=bool(lm.rank)):
            values += document_accuracies(lm.model, lm.tokenizer, mine[start : start + size])
    else:
        values = chunk_values(unit, args, lm, mine, teacher)
    gathered = lm.gather_object(values)
    if lm.rank:
        return None
    values = [value for part in gathered for value in part]
    mean = statistics.fmean(values)
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    metric = {PERPLEXITY: "perplexity", KL: "nats"}.get(unit.task, "acc")
    result = {
        "metric": metric,
        "score": mean,
        "stderr": stderr,
        "higher_is_better": metric == "acc",
        "samples": len(values),
    }
    if unit.task == PERPLEXITY:
        perplexity = math.exp(mean)
        result |= {
            "score": perplexity,
            "stderr": stderr and perplexity * stderr,
            "metrics": {"loss": mean, "loss_stderr": stderr},
        }
    return result


# ------------------------------------------------------------------------------------------------ running
def load_model(checkpoint: str):
    """A checkpoint in its own dtype, on this process's device. It generates greedily, with chunked
    prefill unless that is slower for its student."""
    import torch
    from transformers import AutoModelForCausalLM

    from convert import load_teacher
    from convert.families import FAMILIES
    from convert.loader import source_config
    from distill_model import StudentConfig, get_student_attention_class

    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    config = source_config(checkpoint)
    if config.model_type == "transformer":  # FLA's own class needs flash-attn
        model = load_teacher(checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype="auto", trust_remote_code=False)
    model.generation_config = greedy(model.generation_config)
    student, rope = (
        getattr(model.config, "student_name", None),
        getattr(model.config, "rope_parameters", None) or {},
    )
    reads_on = (
        get_student_attention_class(student).func.supports_chunked_prefill
        if student
        else model.config.model_type in {*FAMILIES, StudentConfig.model_type}
    )
    if reads_on and rope.get("rope_type") != "dynamic":  # which depends on the length
        model.generation_config.prefill_chunk_size = PREFILL
    return model.to(device).eval()


def refuse_unknown_tokens(model, tokenizer) -> None:
    """Makes the model raise ValueError for a token that it has no embedding of, where the tokenizer
    has one: on a GPU a lookup of such an id would end the process. Padding, which is masked,
    becomes EOS instead."""
    vocab_size = vocabulary_size(model.config)
    if max(tokenizer.get_vocab().values()) < vocab_size:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token

    def refuse(module, args) -> None:
        if (largest := args[0].max().item()) >= vocab_size:
            raise out_of_vocabulary(
                f"CHECKPOINT: {tokenizer.convert_ids_to_tokens(largest)!r} in a text has the id",
                largest,
                vocab_size,
            )

    model.get_input_embeddings().register_forward_pre_hook(refuse)


def harness_model(checkpoint: str, batch_size: str):
    """The checkpoint as lm-evaluation-harness wants it; under torchrun the documents are dealt out
    to the ranks."""
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Of texts longer than the tokenizer's model_max_length; what a task makes may be, and what a
    # model reads is cut elsewhere.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    refuse_unknown_tokens(model, tokenizer)
    end_no_text(tokenizer)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # HFLM does so itself only for models that it loads, and only on GPUs
        lm.accelerator = Accelerator(cpu=lm.device.type == "cpu")
        lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
    return lm


def build(unit: Unit, args: argparse.Namespace, manager, lm):
    """The unit's documents if `measure_own` measures it, else its task, or group of tasks, of
    lm-evaluation-harness."""
    if unit.task in (PERPLEXITY, KL):
        return heldout_rows(args, load_tokenizer(lm.tokenizer.name_or_path), vocabulary_size(lm.model.config))
    if unit.task in RECALL_TASKS:
        return recall_documents(unit.task, unit.seq_len, args.num_words, lm.tokenizer)
    if unit.task == RECALL_GENERATION:
        return recall_generation(unit.seq_len, args.num_words, lm.tokenizer)
    if unit.task in RULER:
        return ruler_task(unit, lm.tokenizer, args.limit)
    seed_generators(unit)
    with contextlib.redirect_stdout(io.StringIO()):  # tasks print what they do
        loaded = manager.load([unit.task])
    return (loaded.get("groups") or {}).get(unit.task) or loaded["tasks"][unit.task]


def measure(unit: Unit, args: argparse.Namespace, task, lm, manager, teacher) -> dict | None:
    """The unit's result; None on ranks other than 0."""
    from lm_eval import simple_evaluate

    if unit.task in OWN:
        return measure_own(unit, args, task, lm, teacher)
    # RULER's documents fill their length to the last token; HFLM would cut them at the length that
    # the config names.
    lm._max_length = None
    lm._max_length = max(lm.max_length, unit.seq_len) if unit.seq_len else None
    found = simple_evaluate(lm, tasks=[task], limit=args.limit, task_manager=manager, log_samples=True)
    if found is None:
        return None
    metrics = {
        name: value
        for name, value in found["results"][unit.task].items()
        if isinstance(value, (int, float)) and "," in name
    }
    metric, score = headline(unit, metrics)
    samples = [sample for name in found["samples"] for sample in found["samples"][name]]
    counts = [found["n-samples"][name]["effective"] for name in found["samples"]]
    stderr = metrics.get(metric.replace(",", "_stderr,", 1))
    name, filtered = metric.split(",", 1)
    values = [s[name] for s in samples if s["filter"] == filtered and isinstance(s.get(name), (int, float))]
    if stderr is None and len(values) > 1 and math.isclose(statistics.fmean(values), score, abs_tol=1e-9):  # RULER's
        stderr = statistics.stdev(values) / math.sqrt(len(values))
    higher = found["higher_is_better"].get(unit.task, {}).get(name)
    return {
        "metric": "match" if unit.task in RULER else metric.removesuffix(",none"),
        "score": score,
        "stderr": stderr,
        "higher_is_better": higher is not False,
        "samples": sum(counts),
        "metrics": metrics,
    }


def headline(unit: Unit, metrics: dict[str, float]) -> tuple[str, float]:
    """The metric that stands for the task, and its value."""
    scores = {name: value for name, value in metrics.items() if "_stderr," not in name}
    wanted = (f"{unit.seq_len},none",) if unit.task in RULER else METRICS
    name = next((name for name in wanted if name in scores), None) or next(iter(scores))
    return name, scores[name]


def reason(error: BaseException, args: argparse.Namespace) -> str:
    """An error in one line."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory; BATCH_SIZE {args.batch_size} is too much"
    text = one_line(error)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def work(args: argparse.Namespace, units: list[Unit], manager) -> None:
    """Does what has no result yet, on every rank. What fails is written down, and the next comes;
    but where other ranks would wait for the one that failed, that one ends its process, and `run`
    starts all of them again behind the task."""
    import torch

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        os.environ["TQDM_DISABLE"] = "1"
    teacher = None
    for checkpoint in args.checkpoints:
        record = Record(args, checkpoint)
        todo = [unit for unit in units if unit.key not in record.results]
        if not todo:
            continue

        def failed(error: BaseException, units: list[Unit]) -> None:
            why = reason(error, args)
            print(f"   FAILED: {why}", file=sys.stderr, flush=True)
            if ranks > 1:
                record.died.write_text(why)
                os._exit(1)
            for unit in units:
                record.put(unit, {"error": why})

        if not rank:
            record.begin(todo)
        try:
            lm = harness_model(checkpoint, args.batch_size)
            teacher = teacher or (load_model(args.teacher) if any(unit.task == KL for unit in todo) else None)
        except Exception as error:
            failed(error, todo)
            continue
        for i, unit in enumerate(todo):
            start, error = time.monotonic(), None
            if not rank:
                record.begin([unit])
                print(
                    f"== {labels(args.checkpoints)[checkpoint]}, {i + 1}/{len(todo)}: {unit.key}",
                    flush=True,
                )
            try:
                task = build(unit, args, manager, lm)
            except Exception as failure:  # whatever a task's code or a download raises
                error = failure
            if any(lm.all_gather(torch.tensor([error is not None], device=lm.device)).tolist()):
                if not rank:
                    why = reason(error, args) if error else "another process could not make its documents"
                    record.put(unit, {"error": why})
                    print(f"   FAILED: {why}", file=sys.stderr, flush=True)
                continue
            try:
                result = measure(unit, args, task, lm, manager, teacher)
            except Exception as failure:
                failed(failure, [unit])
            else:
                if not rank:
                    record.put(unit, {**result, "seconds": round(time.monotonic() - start, 1)})
            task = None
            gc.collect()  # a traceback may hold a batch on the device
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        record.end()
        lm = None


def run(args: argparse.Namespace, units: list[Unit], manager, argv: list[str]) -> None:
    """`work`, in this process or in one a GPU."""
    records = [Record(args, checkpoint) for checkpoint in args.checkpoints]
    if not sum(len(record.clear(units)) for record in records):
        print("Everything is there already.")
        return
    for record in records:
        record.write()
    if args.num_gpus == 1:
        work(args, units, manager)
        return
    while True:
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={args.num_gpus}",
                __file__,
                *argv,
            ]
        )
        try:
            code = child.wait()
        finally:
            child.terminate()
            child.wait()
        buried = [Record(args, checkpoint).record_crashes(units) for checkpoint in args.checkpoints]
        if code == 0:
            return
        if not any(buried):
            raise ValueError(
                f"NUM_GPUS: the {args.num_gpus} processes ended with exit code {code} before the first task (above)"
            )


def results_of(args: argparse.Namespace, units: list[Unit]) -> dict[str, dict[str, dict]]:
    """Label -> unit's key -> result, of these units; one that did not get its turn has none."""
    return {
        label: {unit.key: record.results[unit.key] for unit in units if unit.key in record.results}
        for checkpoint, label in labels(args.checkpoints).items()
        for record in [Record(args, checkpoint)]
    }


# ------------------------------------------------------------------------------------------------ command line
def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that eval_compare.py takes too."""
    parser.add_argument("--tasks", default="ruler", help=f"separated by commas; groups: {', '.join(GROUPS)} (ruler)")
    parser.add_argument(
        "--seq_lens",
        default="",
        help=f"lengths in tokens of tasks that have one, separated by commas ({SEQ_LEN})",
    )
    parser.add_argument("--batch_size", default="8", help="documents at a time on a device, or auto (8)")
    parser.add_argument("--num_gpus", type=int, help="processes, one a GPU (all visible GPUs; 1 on a CPU)")
    parser.add_argument(
        "--limit",
        type=int,
        help="take only so many documents of a task; such scores are for trying things out",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    parser.add_argument(
        "--data",
        help=f"chunks of preprocess_chunk.py with a held-out part, for {PERPLEXITY} and {KL}",
    )
    parser.add_argument(
        "--num_words",
        type=int,
        default=NUM_WORDS,
        help=f"different words in the recall tasks ({NUM_WORDS})",
    )


def check(args: argparse.Namespace) -> None:
    """Turns the lists into lists. Raises ValueError for what cannot be."""
    args.tasks = [name for name in re.split(r"[\s,]+", args.tasks) if name]
    try:
        args.seq_lens = [int(text) for text in re.split(r"[\s,]+", args.seq_lens) if text]
    except ValueError:
        raise ValueError(f"SEQ_LENS: {args.seq_lens!r} must be numbers of tokens, separated by commas") from None
    if not args.tasks:
        raise ValueError(f"TASKS: names no task; groups: {', '.join(GROUPS)}")
    for name, values in (
        ("SEQ_LENS", args.seq_lens),
        ("LIMIT", [args.limit]),
        ("NUM_GPUS", [args.num_gpus]),
        ("NUM_WORDS", [args.num_words]),
    ):
        if wrong := [value for value in values if value is not None and value < 1]:
            raise ValueError(f"{name}: {wrong[0]} must be at least 1")
    if args.num_words > len(WORDS):
        raise ValueError(f"NUM_WORDS: {args.num_words} must be at most {len(WORDS)}, the words that there are")
    if not re.fullmatch(r"[1-9]\d*|auto", args.batch_size):
        raise ValueError(f"BATCH_SIZE: {args.batch_size!r} must be a number, or auto")
    if args.data:
        open_chunks(args.data, key="DATA")
    labels(args.checkpoints)
    for checkpoint in args.checkpoints:
        vocab_size = check_checkpoint("CHECKPOINT", checkpoint)
        check_special_tokens(load_tokenizer(checkpoint, "CHECKPOINT"), vocab_size, "CHECKPOINT")
    if args.teacher:
        check_checkpoint("TEACHER", args.teacher)
    if args.num_gpus is None:
        import torch

        args.num_gpus = max(1, torch.cuda.device_count())


def evaluate(args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, dict]]:
    """Runs what is missing and returns label -> unit's key -> result. args: of the parser, before
    `check`; argv: what gave them."""
    check(args)
    manager = task_manager([name for asked in args.tasks for name in GROUPS.get(asked, (asked,))])
    units = plan(args, manager)
    if "RANK" in os.environ:
        work(args, units, manager)
        return {}
    if fetched := downloads(units, manager):
        print(
            "Needs a network, to fetch: " + "; ".join(f"{task} ({source})" for task, source in fetched.items()),
            flush=True,
        )
    run(args, units, manager, argv)
    return results_of(args, units)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    add_options(parser)
    parser.add_argument("--teacher", help=f"the checkpoint that {KL} is measured to")
    args = parser.parse_args(argv)
    results = evaluate(args, argv)
    if "RANK" in os.environ:
        return 0
    atomic_write_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    atomic_write_text(args.output / "results.md", text)
    if len(results) > 1 and any("score" in r for tasks in results.values() for r in tasks.values()):
        plot(results, args.output / "results.png")
    print(f"\n{text}\nWritten to {args.output}")
    return int(any("error" in r for tasks in results.values() for r in tasks.values()))


def with_stop_signals(main) -> int:
    """Runs a script's `main`; a stop signal ends it in order."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers' own, a line for every file read
    with StopSignals():
        return main()


if __name__ == "__main__":
    run_main(partial(with_stop_signals, main))

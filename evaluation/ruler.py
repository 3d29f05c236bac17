"""RULER's tasks, with documents made with the checkpoint's own tokenizer: as many as are asked
for, once per tokenizer.

lm-evaluation-harness has the generators and the scoring. Its generators open the tokenizer by its
path, which runs code that is stored there, and always make all documents; here they are given the
tokenizer and the number. The documents are kept in HF_DATASETS_CACHE/ruler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

from runtime.data import tokenizer_fingerprint
from runtime.files import sync

from .options import option_error
from .tasks import RULER, Unit

SAMPLES = 500  # documents of a task
# Below this many tokens RULER's generators do not end.
SHORTEST = {"ruler_cwe": 2048, **{name: 1024 for name in RULER if name != "ruler_cwe"}}
ESSAY_TASKS = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multiquery",
    "niah_multivalue",
)
# What a task downloads.
DOWNLOADED = {
    **dict.fromkeys(ESSAY_TASKS, "baber/paul_graham_essays and nltk's punkt_tab"),
    "ruler_qa_squad": "rajpurkar.github.io/SQuAD-explorer",
    "ruler_qa_hotpot": "namlh2004/hotpotqa",
}
# Task -> module of lm-evaluation-harness, its function for the task's dataset, and that for a
# number of documents.
GENERATORS = {
    **{name: ("niah_utils", name, "generate_samples") for name in RULER if name.startswith("niah_")},
    "ruler_vt": ("vt_utils", "get_vt_dataset", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "fwe_download", "sys_kwext"),
    "ruler_qa_squad": ("qa_utils", "get_squad", "generate_samples"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa", "generate_samples"),
}


def ruler_manager(metadata: dict | None = None):
    """The index of RULER's tasks alone, which is read quickly. metadata: settings for the tasks."""
    import lm_eval.tasks

    folder = str(Path(lm_eval.tasks.__file__).parent / "ruler")
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder, metadata=metadata)


def seed_generators(unit: Unit) -> int:
    """Seeds the process's random state, from which tasks draw their documents, so that they do not
    depend on the tasks before; returns the seed."""
    import numpy

    seed = int.from_bytes(hashlib.sha256(unit.key.encode()).digest()[:4], "big")
    random.seed(seed)
    numpy.random.seed(seed)
    return seed


def ruler_task(unit: Unit, tokenizer, limit: int | None):
    """A task of lm-evaluation-harness with the first `limit` of the unit's documents, or all.
    Raises ValueError if the length is too short."""
    shortest = SHORTEST[unit.task]
    if unit.seq_len < shortest:
        raise option_error("seq_lens", f"{unit.seq_len} is too short for {unit.task}; it needs {shortest}")
    made = documents(unit, tokenizer, min(limit or SAMPLES, SAMPLES))
    manager = ruler_manager(metadata={"max_seq_lengths": [unit.seq_len]})
    group = {
        "group": "made",
        "task": [{"task": unit.task, "custom_dataset": lambda **_: {"test": made}}],
    }
    return manager.load([group])["tasks"][unit.task]


def documents(unit: Unit, tokenizer, count: int):
    """The first `count` of the unit's SAMPLES documents, a memory-mapped dataset; they are made
    unless they are there for this tokenizer."""
    from datasets import Dataset, config

    made_by = {name: version(name) for name in ("lm_eval", "wonderwords", "nltk")}
    key = [
        tokenizer_fingerprint(tokenizer),
        unit.task,
        unit.seq_len,
        seed_generators(unit),
        count,
        made_by,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    name = f"{unit.task}_{unit.seq_len}_{count}_{digest}.arrow"
    file = Path(config.HF_DATASETS_CACHE) / "ruler" / name
    if not file.is_file():
        found = generate(unit, tokenizer, count)
        if len(found) < count:  # some did not fit and were left out
            found = generate(unit, tokenizer, SAMPLES)[:count]
        write_documents(found, file)
    return Dataset.from_file(str(file))


def write_documents(found: list[dict], file: Path) -> None:
    """Writes the documents atomically; of several processes that write the same file the last one
    wins."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".")
    os.close(descriptor)
    try:
        table = Dataset.from_list(found).data.table
        writer = ArrowWriter(path=temporary, schema=table.schema)
        writer.write_table(table)
        writer.finalize()
        sync(Path(temporary))
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def generate(unit: Unit, tokenizer, count: int) -> list[dict]:
    """The first `count` documents of the unit; a generator draws one after the other.

    Raises ValueError if the length is too short or a download fails.
    """
    seed_generators(unit)
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # it has a random state of its own
    if unit.task == "ruler_vt":
        check_tracking(tokenizer, unit.seq_len)
    name, dataset, generator = GENERATORS[unit.task]
    with contextlib.redirect_stdout(io.StringIO()):  # generators print their progress
        module = import_generators(name)
        if unit.task in ESSAY_TASKS:
            download_essays()
        inner = getattr(module, generator)

        def limited(*args, num_samples: int = SAMPLES, **kwargs):
            return inner(*args, num_samples=min(num_samples, count), **kwargs)

        replaced = {"get_tokenizer": lambda *_, **__: tokenizer, generator: limited}
        with patch.multiple(module, **replaced):
            return list(getattr(module, dataset)(max_seq_lengths=[unit.seq_len])["test"])


def import_generators(name: str):
    """A module of RULER. Those of the needles download nltk's sentence splitter when they are
    imported, though only essays need it; here they do not."""
    import nltk

    with patch.object(nltk, "download", lambda *_, **__: False):
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")


def download_essays() -> None:
    """Downloads the essays and nltk's sentence splitter, unless they are there. Raises what the hub
    raises for the former, ValueError for the latter."""
    import nltk
    from lm_eval.tasks.ruler import prepare_niah

    prepare_niah.get_haystack(type_haystack="essay")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise ValueError(
                "nltk's punkt_tab is missing and could not be downloaded; "
                "run 'python -m nltk.downloader punkt_tab' with a network"
            ) from None


def check_tracking(tokenizer, seq_len: int) -> None:
    """Raises ValueError if RULER's shortest variable tracking does not fit the 500 tokens of its
    example, or with the example does not fit seq_len: its generator would not end."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    for sentences, room in ((5, 500), (10, seq_len - 500)):
        text, answer = generate_input_output(sentences, 1, 4, is_icl=sentences == 5)
        length = len(tokenizer(f"{text} {answer}")["input_ids"])
        if length + 50 > room:  # 30 to generate, and other names may have more tokens
            room_text = f"where RULER has room for {room - 50}"
            raise ValueError(f"ruler_vt: the tokenizer makes {length} tokens {room_text}")

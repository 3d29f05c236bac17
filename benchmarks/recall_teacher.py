"""Trains a teacher that predicts text and recalls what it has read. Comparisons are measured on it.

    python benchmarks/recall_teacher.py --output_dir recall_out [--text FOLDER]         # a GPU, less than 10 minutes
    python benchmarks/recall_teacher.py --output_dir recall_out --size tiny             # a CPU, some minutes
    python benchmarks/recall_teacher.py --output_dir recall_out --size quickstart --seed 1   # made quickstart/teacher
    python benchmarks/recall_teacher.py --output_dir recall_out --size hard             # for selection_regret.py
    python benchmarks/recall_teacher.py --output_dir recall_out --size deep             # the same, recall in the middle
    python benchmarks/recall_teacher.py --output_dir large_out --grow recall_out --seed 1    # a better one

A Qwen3-type model of 40M parameters (hard and deep: 7M, quickstart: 0.7M, tiny: 0.6M) learns from the
standard library's source text, the files of --text, and the recall tasks of recall_tasks.py. Of the
tasks only the answers count at first: next to the random words around them, which cannot be predicted,
recall is learnt ten times later. `hard` has more pairs and words, fillers between pairs and questions,
and heads of 32: few layers of linear attention hold so many pairs. Its recall ends in the first layers.
`deep` differs in masks that make layers 3 and 5 learn it, each of them alone, in training
(`training_masks`). Training continues at a constant learning rate until 95 % of every task's held-out
questions are answered (or for four fifths of --max_steps), then the learning rate decays while all
words count. The exit code is 1 if held-out recall ends below 90 %.

--grow FOLDER begins with the teacher of FOLDER, of the same size, instead: each of its layers is followed
by a new one, which adds nothing at first. The twice as deep model trains further, on all words, at a
learning rate that decays after the warm-up: on FOLDER's text, which it has read several times, and on half
of the Python files of the installed PyTorch. Another --seed draws other recall documents.

OUTPUT_DIR gets tokenizer/, data/chunked_context<N> for the stages, teacher/ (a plain Hugging Face
checkpoint), teacher.json and teacher.png with the training curves. Run again, the command does
only what is missing, with the exit code of the first time. A folder belongs to one size, text, seed,
difficulty and --grow (settings.json).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.command import run_main
from runtime.corpora import Corpus
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_directory, atomic_write_text

import matplotlib
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.jobs import run_script
from quickstart.corpus import QUICKSTART_TASKS, TASK_DOCUMENTS, TEXT_FILES, TaskMix, make_corpus
from quickstart.train_teacher import heldout_loss, token_ids, unigram_entropy, untrained_teacher
from quickstart.train_tokenizer import limited, train_tokenizer
from recall_tasks import FILLERS, RECALL_TASKS, WORDS, Document, answer_accuracy, encode

ENOUGH = 0.95  # accuracy that ends training at a constant learning rate
DEMANDED = 0.90  # recall that the result must have
WARMUP_STEPS = 100
CHECK_STEPS = 200
COOLDOWN = 0.2  # share of the steps at the end, in which the learning rate decays
FLOOR = 0.05  # of the learning rate, at the last step
WEIGHT_DECAY = 0.1
GROWN_STEPS = 600  # of a grown teacher: the text once
QUESTIONS = 32  # held-out documents of each task
DIFFICULTY = {
    "num_pairs": "pairs of the hardest documents of associative recall",
    "num_chains": "chains of the hardest documents of two-hop recall",
    "num_fillers": "most words between pairs and questions",
    "num_words": "words that documents draw from",
}


@dataclass(frozen=True)
class Scale:
    """Model, data and training.

    A batch has text_rows and task_rows. text_weight: of the loss on text; the loss on answers has
    weight 1. text_files: of the standard library, all if None. far_layers, window: see `training_masks`.
    """

    shape: dict
    tasks: TaskMix
    task_documents: int
    text_files: int | None
    vocab_size: int
    context_length: int
    text_rows: int
    task_rows: int
    text_weight: float
    learning_rate: float
    max_steps: int
    far_layers: tuple[int, ...] = ()
    window: int = 0


FULL = Scale(
    shape=dict(
        hidden_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1920,
        initializer_range=0.03,
    ),
    tasks=TaskMix(
        ranges={
            "associative_recall": {"num_pairs": (4, 64), "num_queries": (16, 32)},
            "multi_hop_recall": {"num_chains": (2, 24), "num_queries": (8, 12)},
            "copying": {"length": (8, 128)},
        },
        num_words=256,
    ),
    task_documents=30_000,
    text_files=None,
    vocab_size=4096,
    context_length=512,
    text_rows=32,
    task_rows=32,
    text_weight=1.0,
    learning_rate=1e-3,
    max_steps=4000,
)
# Heads of size 16 recall 32 pairs by softmax attention; a linear attention's state of 16 x 16 per
# head cannot.
QUICKSTART = Scale(
    shape=dict(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=288,
        initializer_range=0.06,
    ),
    tasks=QUICKSTART_TASKS,
    task_documents=TASK_DOCUMENTS,
    text_files=TEXT_FILES,
    vocab_size=1024,
    context_length=256,
    text_rows=8,
    task_rows=24,
    text_weight=0.3,
    learning_rate=3e-3,
    max_steps=4000,
)
# Small enough to train all sets of kept layers; its tasks tell the sets apart.
HARD = Scale(
    shape=dict(
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        initializer_range=0.04,
    ),
    tasks=TaskMix(
        ranges={
            "associative_recall": {"num_pairs": (8, 96), "num_queries": (16, 24), "num_fillers": (0, 32)},
            "multi_hop_recall": {"num_chains": (4, 40), "num_queries": (8, 12), "num_fillers": (0, 64)},
            "copying": {"length": (8, 128)},
        },
        num_words=512,
    ),
    task_documents=30_000,
    text_files=200,
    vocab_size=2048,
    context_length=512,
    text_rows=16,
    task_rows=48,
    text_weight=0.5,
    learning_rate=2e-3,
    max_steps=4000,
)
# Recall is learnt in the middle, twice: an ablation of one layer at a time need not show where.
DEEP = dataclasses.replace(HARD, far_layers=(3, 5), window=16)
TINY = Scale(
    shape=dict(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=288,
        initializer_range=0.06,
    ),
    tasks=TaskMix(
        ranges={
            "associative_recall": {"num_pairs": (2, 8), "num_queries": (4, 8)},
            "multi_hop_recall": {"num_chains": (2, 3), "num_queries": (2, 3)},
            "copying": {"length": (4, 16)},
        },
        num_words=32,
    ),
    task_documents=10_000,
    text_files=60,
    vocab_size=1024,
    context_length=128,
    text_rows=8,
    task_rows=24,
    text_weight=0.3,
    learning_rate=3e-3,
    max_steps=2000,
)


def scale_of(size: str, hardest: dict[str, int] | None = None) -> Scale:
    """The scale of a size. hardest: option of the tasks -> its value in the hardest documents, in
    place of the size's; num_words for all documents. Raises ValueError for a value that is easier
    than the easiest, and for a number of words that the documents do not allow."""
    scale = {"full": FULL, "hard": HARD, "deep": DEEP, "quickstart": QUICKSTART, "tiny": TINY}[size]
    hardest = hardest or {}
    ranges = {}
    for task, options in scale.tasks.ranges.items():
        if task != "copying" and "num_fillers" in hardest:
            options = {"num_fillers": (0, 0), **options}
        ranges[task] = {}
        for name, (easiest, highest) in options.items():
            value = hardest.get(name, highest)
            if value < easiest:
                raise ValueError(f"--{name}: {value} must be at least {easiest}, the easiest of --size {size}")
            ranges[task][name] = (easiest, value)
    tasks = TaskMix(ranges, hardest.get("num_words", scale.tasks.num_words))
    check_words(tasks)
    return dataclasses.replace(scale, tasks=tasks)


def check_words(tasks: TaskMix) -> None:
    """Raises ValueError if documents draw from fewer words than they need, or also from the fillers."""
    pairs = tasks.ranges["associative_recall"]["num_pairs"][1]
    chains = tasks.ranges["multi_hop_recall"]["num_chains"][1]
    needed = max(pairs, 3 * chains)  # all keys, or all words of chains of two links, differ
    if tasks.num_words < needed:
        raise ValueError(
            f"--num_words: {tasks.num_words} are too few for {pairs} pairs and {chains} chains of three words, which "
            f"need {needed}; set that, or lower --num_pairs and --num_chains"
        )
    most = len(WORDS) - len(FILLERS)
    if tasks.num_words > most:
        raise ValueError(f"--num_words: {tasks.num_words} must be at most {most}, the words that are no fillers")


# ---------------------------------------------------------------------------------- data
def make_chunks(corpus: Path, tokenizer: Path, folder: Path, context_length: int) -> None:
    """Tokenizes the texts in `corpus` and writes `folder`/chunked_context<N>; a part of them is
    held out."""
    tokenized = folder / "tokenized"
    run_script(
        "preprocess_download_tokenize.py",
        dataset_name=corpus,
        tokenizer=tokenizer,
        holdout=0.02,
        output_dir=tokenized,
    )
    run_script(
        "preprocess_chunk.py", tokenized_dataset_path=tokenized, output_dir=folder, context_length=context_length
    )


def prepare(out: Path, scale: Scale, text: Path | None, seed: int) -> None:
    """Makes what is missing under `out`: corpus, tokenizer, chunks of everything (data) and of
    text alone (data/text)."""
    make_corpus(out / "corpus", scale.tasks, scale.task_documents, scale.text_files, seed, text)
    if not (out / "tokenizer").is_dir():
        tasks = "".join(document.text for document in scale.tasks.interleaved(seed + 1, 1000))
        texts = (document.text for document in Corpus(str(out / "corpus" / "text")).documents())
        learnt_from = itertools.chain([tasks], limited(texts, len(tasks)))
        tokenizer = train_tokenizer(learnt_from, scale.vocab_size)
        with atomic_directory(out / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
    make_chunks(out / "corpus", out / "tokenizer", out / "data", scale.context_length)
    text_chunks = out / "data" / "text"
    make_chunks(out / "corpus" / "text", out / "tokenizer", text_chunks, scale.context_length)


def prepare_growth(out: Path, data: Path, context_length: int) -> None:
    """Makes what is missing under `out`: chunks of new text (data), by the tokenizer of `data`."""
    corpus = out / "text.jsonl"
    if not corpus.is_file():
        lines = [
            json.dumps({"text": file.read_text(encoding="utf-8", errors="replace")}) + "\n" for file in new_files()
        ]
        atomic_write_text(corpus, "".join(lines))
    make_chunks(corpus, data / "tokenizer", out / "data", context_length)


def new_files() -> list[Path]:
    """Every second Python file of PyTorch."""
    return sorted(Path(torch.__file__).parent.rglob("*.py"))[::2]


class TaskRows(IterableDataset):
    """Endless fresh task documents packed into rows: (token ids [T], whether each belongs to an
    answer [T]).

    They are fresh because a model learns a finite set of questions by heart before it learns to
    look up. No document is cut; the rest of a row is EOS.
    """

    def __init__(self, tokenizer, scale: Scale, seed: int):
        self.tokenizer = tokenizer
        self.scale = scale
        self.seed = seed

    def documents(self) -> Iterator[Document]:
        """Without end; other ones in every worker of a DataLoader."""
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        for part in itertools.count():
            yield from self.scale.tasks.interleaved(f"{self.seed} {worker_id} {part}", 64)

    def row(self, tokens: list[int], answers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.scale.context_length
        is_answer = torch.zeros(length, dtype=torch.bool)
        is_answer[answers] = True
        padding = [self.tokenizer.eos_token_id] * (length - len(tokens))
        return torch.tensor(tokens + padding), is_answer

    def __iter__(self):
        length = self.scale.context_length
        documents = self.documents()
        tokens = []
        answers = []
        while True:
            batch = list(itertools.islice(documents, 64))
            for ids, spans in encode(batch, self.tokenizer):
                if len(ids) >= length:
                    raise ValueError(
                        f"--num_pairs, --num_chains, --num_fillers: a document takes {len(ids)} tokens, a row has {length}"
                    )
                if len(tokens) + len(ids) >= length:
                    yield self.row(tokens, answers)
                    tokens = []
                    answers = []
                answers += [len(tokens) + index for span in spans for index in span]
                tokens += [*ids, self.tokenizer.eos_token_id]


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of row numbers, without repeats within an epoch."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


# ---------------------------------------------------------------------------------- growth
def deepened(scale: Scale) -> Scale:
    """The scale of what `grow` makes of its teacher."""
    shape = scale.shape | {"num_hidden_layers": 2 * scale.shape["num_hidden_layers"]}
    return dataclasses.replace(scale, shape=shape, far_layers=tuple(2 * layer for layer in scale.far_layers))


def grow(small: Qwen3ForCausalLM, large: Qwen3ForCausalLM) -> None:
    """Gives `large`, which has twice as many layers, the function of `small`: its layers 2 i are those of
    `small`, and the outputs of the others, otherwise random, are zero."""
    weights = {}
    for name, value in small.state_dict().items():
        weights[re.sub(r"(?<=layers\.)\d+", lambda number: str(2 * int(number[0])), name)] = value
    for i, layer in enumerate(large.model.layers):
        if i % 2:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    large.load_state_dict(large.state_dict() | weights)


# ---------------------------------------------------------------------------------- training
@dataclass
class Schedule:
    """Warm-up, a constant part, and a linear decay that begins at `cool_from` and ends training at
    `cool_to`."""

    cool_from: int
    cool_to: int

    @classmethod
    def of(cls, max_steps: int) -> Schedule:
        return cls(min(round(max_steps * (1 - COOLDOWN)), max_steps - 1), max_steps)

    @classmethod
    def without_constant_part(cls, steps: int) -> Schedule:
        return cls(min(WARMUP_STEPS, steps - 1), steps)

    def factor(self, step: int) -> float:
        """Of the learning rate at `step`, counted from 1."""
        decay = FLOOR + (1 - FLOOR) * (self.cool_to - step) / (self.cool_to - self.cool_from)
        return min(1.0, step / WARMUP_STEPS, decay)

    def cool_down_after(self, step: int) -> None:
        self.cool_from = step
        self.cool_to = round(step / (1 - COOLDOWN))


def training_masks(rows: int, layers: int, length: int, far_layers: tuple[int, ...], window: int) -> torch.Tensor:
    """Whether a query of [layer, row, 1, query, key] sees the key, in training.

    The rows take turns: in one of len(far_layers) + 1, all layers see all earlier tokens; in each other one, one of
    far_layers does, and all layers else see the last `window` tokens. So recall is learnt by far_layers, by each of
    them alone, and the model works with full attention in every layer, as it is saved.
    """
    position = torch.arange(length)
    distance = position[:, None] - position
    causal = distance >= 0
    near = causal & (distance < window)
    turn = torch.arange(rows) % (len(far_layers) + 1)
    masks = []
    for layer in range(layers):
        far = turn == len(far_layers)
        if layer in far_layers:
            far |= turn == far_layers.index(layer)
        masks.append(torch.where(far[:, None, None], causal, near))
    return torch.stack(masks)[:, :, None]


def mask_training(model, masks: torch.Tensor) -> None:
    """Gives every layer of `model` its mask of `training_masks` while it trains."""

    def masked(layer, args, kwargs, mask):
        return (args, kwargs | {"attention_mask": mask}) if layer.training else None

    for layer, mask in zip(model.model.layers, masks):
        layer.register_forward_pre_hook(partial(masked, mask=mask), with_kwargs=True)


class Training:
    """Trains `model` in place on text chunks and `TaskRows`."""

    def __init__(self, model, tokenizer, text, scale: Scale, schedule: Schedule, seed: int):
        self.model = model
        self.tokenizer = tokenizer
        self.text = text
        self.scale = scale
        self.schedule = schedule
        on_gpu = model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            scale.learning_rate,
            (0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
            fused=on_gpu,
        )
        self.autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=on_gpu)
        self.questions = scale.tasks.documents(seed + 2, QUESTIONS, hardest=True)
        generator = torch.Generator().manual_seed(seed)
        self.text_batches = shuffled(len(text), scale.text_rows, generator)
        rows = TaskRows(tokenizer, scale, seed)
        self.task_batches = iter(DataLoader(rows, scale.task_rows, num_workers=8 if on_gpu else 1))
        if scale.far_layers:
            batch = scale.text_rows + scale.task_rows
            layers = len(model.model.layers)
            masks = training_masks(batch, layers, scale.context_length, scale.far_layers, scale.window)
            mask_training(model, masks.to(model.device))

    def step(self, step: int) -> torch.Tensor:
        """One optimiser step; returns the mean losses [on text, on answers]."""
        scale = self.scale
        rows, answers = next(self.task_batches)
        ids = torch.cat([token_ids(self.text, next(self.text_batches)), rows]).to(self.model.device)
        answers = answers[:, 1:].to(self.model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = scale.learning_rate * self.schedule.factor(step)
        with self.autocast():
            logits = self.model(input_ids=ids).logits[:, :-1]
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(),
                ids[:, 1:].flatten(),
                reduction="none",
            )
            losses = losses.view(len(ids), -1)
        on_text = losses[: scale.text_rows].mean()
        on_tasks = losses[scale.text_rows :]
        on_answers = on_tasks[answers].mean()
        on_all_words = on_tasks.mean() if step > self.schedule.cool_from else 0
        (scale.text_weight * on_text + on_answers + on_all_words).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([on_text.detach(), on_answers.detach()])

    def accuracies(self) -> dict[str, float]:
        """Task -> share of its held-out questions that are answered."""
        self.model.eval()
        with self.autocast():
            found = {task: answer_accuracy(self.model, self.tokenizer, asked) for task, asked in self.questions.items()}
        self.model.train()
        return found

    def run(self) -> list[dict]:
        """Step, learning rate, mean loss on text and on answers, and accuracy by task, every
        CHECK_STEPS and at the end."""
        history = []
        losses = []
        step = 0
        with tqdm(total=self.schedule.cool_to, desc="teacher", unit="step") as bar:
            while step < self.schedule.cool_to:
                step += 1
                losses.append(self.step(step))
                bar.update()
                if step % CHECK_STEPS and step != self.schedule.cool_to:
                    continue
                accuracies = self.accuracies()
                text_loss, answer_loss = torch.stack(losses).mean(0).tolist()
                losses.clear()
                lr = self.scale.learning_rate * self.schedule.factor(step)
                history.append(
                    dict(step=step, lr=lr, text_loss=text_loss, answer_loss=answer_loss, **accuracies),
                )
                shown = {task: f"{accuracy:.1%}" for task, accuracy in accuracies.items()}
                bar.set_postfix({"text": f"{text_loss:.3f}", **shown})
                if step < self.schedule.cool_from and min(accuracies.values()) >= ENOUGH:
                    self.schedule.cool_down_after(step)
                    bar.total = self.schedule.cool_to
        return history


def plot(history: list[dict], path: Path) -> None:
    """Accuracy of every task and the loss over the steps."""
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    steps = [row["step"] for row in history]
    for task in RECALL_TASKS:
        axis.plot(steps, [row[task] for row in history], label=task.replace("_", " "))
    axis.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.02))
    loss = axis.twinx()
    loss.plot(
        steps,
        [row["text_loss"] for row in history],
        color="grey",
        linestyle=":",
        label="loss on text (right)",
    )
    loss.set_ylabel("nats per token")
    handles = [*axis.get_lines(), *loss.get_lines()]
    axis.legend(handles, [line.get_label() for line in handles], loc="center right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def demand(recall: float) -> None:
    """Ends the program if a teacher's held-out recall is too low to compare students on."""
    if recall < DEMANDED:
        sys.exit(f"--max_steps: too few, held-out recall is {recall:.1%}, not {DEMANDED:.0%}")


def make_deterministic() -> None:
    """A seed gives the same teacher: some CUDA kernels sum in the order of threads otherwise, and
    cuDNN's attention has no deterministic backward."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(
        True,
    )  # a warning instead would leave flash attention's backward as it is
    torch.backends.cuda.enable_cudnn_sdp(False)


def train_teacher(out: Path, data: Path, scale: Scale, max_steps: int | None, seed: int) -> dict:
    """Trains on what `prepare` made under `data`, writes teacher/, teacher.json and teacher.png under
    `out`, and returns the content of teacher.json. If `data` is another folder, its teacher grows, also on
    what `prepare_growth` made. max_steps: None for the default."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork of the loader's workers
    make_deterministic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    chunks = str(data / "data" / "text" / f"chunked_context{scale.context_length}")
    text = open_chunks_for(tokenizer, len(tokenizer), chunks, scale.context_length)
    text_rows = text.train
    schedule = Schedule.of(max_steps or scale.max_steps)
    grows = data != out
    if grows:
        new = str(out / "data" / f"chunked_context{scale.context_length}")
        new_rows = open_chunks_for(tokenizer, len(tokenizer), new, scale.context_length).train
        text_rows = concatenate_datasets([text.train, new_rows])
        scale = deepened(scale)
        schedule = Schedule.without_constant_part(max_steps or GROWN_STEPS)
    model = untrained_teacher(tokenizer, scale.shape)
    if grows:
        grow(Qwen3ForCausalLM.from_pretrained(data / "teacher"), model)
    model.to(device)
    tokens_per_step = (scale.text_rows + scale.task_rows) * scale.context_length
    print(
        f"Teacher: {model.num_parameters() / 1e6:.1f}M parameters on {device.type}, {tokens_per_step} tokens per step"
    )
    start = time.monotonic()
    history = Training(model, tokenizer, text_rows, scale, schedule, seed).run()
    seconds = time.monotonic() - start
    heldout = token_ids(text.heldout, range(min(64, len(text.heldout))))
    last = history[-1]
    result = {
        "parameters": model.num_parameters(),
        "heldout_loss": heldout_loss(model, heldout.to(device)),
        "unigram_entropy": unigram_entropy(heldout),
        **{task: last[task] for task in RECALL_TASKS},
        "tokens": last["step"] * tokens_per_step,
        "seconds": round(seconds, 1),
        "seed": seed,
        "history": history,
    }
    plot(history, out / "teacher.png")
    with atomic_directory(out / "teacher", replace=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Last: who waits for a teacher waits for this file.
    atomic_write_text(out / "teacher.json", json.dumps(result, indent=1) + "\n")
    return result


# ---------------------------------------------------------------------------------- command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for options that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--text",
        type=Path,
        help="a folder of text files to learn beside the standard library",
    )
    parser.add_argument(
        "--size",
        choices=("full", "hard", "deep", "quickstart", "tiny"),
        default="full",
        help="model, data and questions",
    )
    parser.add_argument(
        "--tiny",
        dest="size",
        action="store_const",
        const="tiny",
        help="the same as --size tiny",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        help=f"the most steps to take; default: as the size needs, {GROWN_STEPS} with --grow",
    )
    parser.add_argument("--grow", type=Path, metavar="FOLDER", help="make the teacher of this folder deeper")
    parser.add_argument("--seed", type=int, default=0)
    for name, what in DIFFICULTY.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: of the size")
    args = parser.parse_args(argv)
    if args.text and not args.text.is_dir():
        raise ValueError(f"--text: {args.text} is no folder; give one of text files")
    scale_of(args.size, difficulty(args))
    if args.grow:
        check_growth(args)
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max_steps: {args.max_steps} must be at least 1")
    return args


def difficulty(args: argparse.Namespace) -> dict[str, int]:
    """The options of DIFFICULTY that were set."""
    values = {name: getattr(args, name) for name in DIFFICULTY}
    return {name: value for name, value in values.items() if value is not None}


def check_growth(args: argparse.Namespace) -> None:
    """Raises ValueError unless --grow has a teacher of the size and difficulty of the options."""
    if args.text:
        raise ValueError("--text: --grow has text of its own; leave one of the two out")
    if not (args.grow / "teacher.json").is_file():
        raise ValueError(f"--grow: {args.grow} has no teacher; name an output folder of recall_teacher.py")
    if args.grow.resolve() == args.output_dir.resolve():
        raise ValueError(f"--output_dir: {args.output_dir} has the teacher that grows; name another")
    found = json.loads((args.grow / "settings.json").read_text())
    if found.get("grow"):
        raise ValueError(f"--grow: the teacher of {args.grow} has grown already; name that which it grew from")
    for name in ("size", *DIFFICULTY):
        value = getattr(args, name)
        if found[name] != value:
            raise ValueError(f"--{name}: the teacher of {args.grow} has {found[name]!r}, not {value!r}; give the same")


def claim_folder(args: argparse.Namespace) -> None:
    """Binds the output folder to this size, text, seed, difficulty and --grow. Raises ValueError if it is
    bound to others."""
    settings = {
        "size": args.size,
        "text": args.text and str(args.text.resolve()),
        "seed": args.seed,
        "grow": args.grow and str(args.grow.resolve()),
        **{name: getattr(args, name) for name in DIFFICULTY},
    }
    file = args.output_dir / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text())
        if "tiny" in found:  # written before there were three sizes
            found["size"] = "tiny" if found.pop("tiny") else "full"
        for name, value in settings.items():
            if found.get(name) != value:
                begun = f"was begun with {name} {found.get(name)!r}, not {value!r}"
                raise ValueError(f"--output_dir: {args.output_dir} {begun}; name another")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    claim_folder(args)
    out = args.output_dir
    if (out / "teacher.json").is_file():
        print(f"{out}/teacher: is there already")
        demand(json.loads((out / "teacher.json").read_text())["associative_recall"])
        return
    disable_progress_bar()  # transformers' own, a line for every file written
    start = time.monotonic()
    scale = scale_of(args.size, difficulty(args))
    if args.grow:
        prepare_growth(out, args.grow, scale.context_length)
    else:
        prepare(out, scale, args.text, args.seed)
    print(f"Data ready after {time.monotonic() - start:.0f} s")
    result = train_teacher(out, args.grow or out, scale, args.max_steps, args.seed)
    accuracies = ", ".join(f"{task.replace('_', ' ')} {result[task]:.1%}" for task in RECALL_TASKS)
    text = f"held-out loss on text {result['heldout_loss']:.3f}, unigram entropy {result['unigram_entropy']:.3f}"
    speed = f"{result['tokens'] / result['seconds']:,.0f} tokens/s"
    steps = result["history"][-1]["step"]
    print(
        f"Teacher: {accuracies}; {text}; {steps} steps, {speed}; {time.monotonic() - start:.0f} s in all",
    )
    demand(result["associative_recall"])


if __name__ == "__main__":
    run_main(main)

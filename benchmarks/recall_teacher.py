"""A teacher worth distilling: it predicts text, and it recalls what it has read. Comparisons are measured on it.

    python benchmarks/recall_teacher.py --output_dir recall_out [--text FOLDER]      # a GPU, less than 10 minutes
    python benchmarks/recall_teacher.py --output_dir recall_out --tiny               # a CPU, some minutes

A Qwen3-shaped model of 40M parameters (--tiny: 0.6M) learns from the standard library's source text, the files of --text, and
the tasks of recall_tasks.py: recall of pairs, of two hops, copying. Of the tasks only answers count at first: next
to the random words around them, which nobody can tell, recall is learnt ten times later. Training goes on at a constant
learning rate until 95 % of every task's held-out questions are answered (or for four fifths of --max_steps), then cools
down with all words counting. The exit code is 1 if held-out recall ends below 90 %.

Written are tokenizer/, data/chunked_context<N> for the stages, teacher/ (a plain Hugging Face checkpoint), teacher.json and
teacher.png, the way there. Run again, it does only what is missing, with the exit code of the first time; a folder belongs to
one size, text and seed (settings.json).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.command import run_main

import matplotlib
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

matplotlib.use("Agg")
from runtime.corpora import Corpus
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_directory

from matplotlib import pyplot

import preprocess_chunk
import preprocess_download_tokenize
from quickstart.train_teacher import heldout_loss, token_ids, unigram_entropy
from quickstart.train_tokenizer import copy_stdlib, limited, train_tokenizer
from recall_tasks import RECALL_TASKS, Document, answer_accuracy, encode

ENOUGH, DEMANDED = (
    0.95,
    0.90,
)  # accuracy that ends the constant part, and that recall must have at the end
WARMUP_STEPS, CHECK_STEPS, COOLDOWN, WEIGHT_DECAY = 100, 200, 0.2, 0.1


@dataclass(frozen=True)
class Scale:
    """Model, data and training. tasks: option -> (easiest, hardest); held-out questions are the
    hardest. A batch has text_rows and task_rows; text_weight: of the loss on text, the loss on
    answers having 1."""

    shape: dict
    tasks: dict[str, dict[str, tuple[int, int]]]
    num_words: int
    task_documents: int
    text_files: int | None
    vocab_size: int
    context_length: int
    text_rows: int
    task_rows: int
    text_weight: float
    learning_rate: float
    max_steps: int


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
    tasks={
        "associative_recall": {"num_pairs": (4, 64), "num_queries": (16, 32)},
        "multi_hop_recall": {"num_chains": (2, 24), "num_queries": (8, 12)},
        "copying": {"length": (8, 128)},
    },
    num_words=256,
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
    tasks={
        "associative_recall": {"num_pairs": (2, 8), "num_queries": (4, 8)},
        "multi_hop_recall": {"num_chains": (2, 3), "num_queries": (2, 3)},
        "copying": {"length": (4, 16)},
    },
    num_words=32,
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


def task_documents(scale: Scale, seed: int | str, count: int, hardest: bool = False) -> dict[str, list[Document]]:
    """`count` documents of every task, drawn between its easiest and hardest options, or at the
    hardest."""
    rng = random.Random(seed)

    def draw(task: str) -> Document:
        options = {name: high if hardest else rng.randint(low, high) for name, (low, high) in scale.tasks[task].items()}
        return RECALL_TASKS[task](rng, num_words=scale.num_words, **options)

    return {task: [draw(task) for _ in range(count)] for task in scale.tasks}


def make_corpus(folder: Path, scale: Scale, text: Path | None, seed: int) -> None:
    """Text files and tasks.jsonl in `folder`, complete or not at all."""
    if folder.is_dir():
        return
    with atomic_directory(folder) as temporary:
        copy_stdlib(temporary / "text" / "stdlib", scale.text_files)
        if text:
            shutil.copytree(text, temporary / "text" / "given")
        by_task = task_documents(scale, seed, scale.task_documents // len(scale.tasks))
        with (temporary / "tasks.jsonl").open("w") as file:
            for row in zip(*by_task.values()):
                file.writelines(json.dumps({"text": document.text}) + "\n" for document in row)


def make_chunks(corpus: Path, tokenizer: Path, folder: Path, context_length: int) -> None:
    """`folder`/chunked_context<N> of the texts in `corpus`, a part of them held out."""
    preprocess_download_tokenize.main(
        [
            "--dataset_name",
            str(corpus),
            "--tokenizer",
            str(tokenizer),
            "--holdout",
            "0.02",
            "--output_dir",
            str(folder / "tokenized"),
        ]
    )
    preprocess_chunk.main(
        [
            "--tokenized_dataset_path",
            str(folder / "tokenized"),
            "--output_dir",
            str(folder),
            "--context_length",
            str(context_length),
        ]
    )


def prepare(out: Path, scale: Scale, text: Path | None, seed: int) -> None:
    """Under `out`, each unless it is there: corpus, tokenizer, chunks of all (data) and of text
    alone (data/text)."""
    make_corpus(out / "corpus", scale, text, seed)
    if not (out / "tokenizer").is_dir():
        tasks = "".join(d.text for row in zip(*task_documents(scale, seed + 1, 1000).values()) for d in row)
        texts = (document.text for document in Corpus(str(out / "corpus" / "text")).documents())
        with atomic_directory(out / "tokenizer") as folder:
            train_tokenizer(itertools.chain([tasks], limited(texts, len(tasks))), scale.vocab_size).save_pretrained(
                folder
            )
    make_chunks(out / "corpus", out / "tokenizer", out / "data", scale.context_length)
    make_chunks(out / "corpus" / "text", out / "tokenizer", out / "data" / "text", scale.context_length)


class TaskRows(IterableDataset):
    """Endless fresh task documents packed into rows: (token ids [T], whether each belongs to an
    answer [T]).

    A model learns a finite set of questions by heart before it learns to look up. No document is
    cut; what is left of a row is EOS.
    """

    def __init__(self, tokenizer, scale: Scale, seed: int):
        self.tokenizer, self.scale, self.seed = tokenizer, scale, seed

    def __iter__(self):
        worker, length, eos = (
            get_worker_info(),
            self.scale.context_length,
            self.tokenizer.eos_token_id,
        )
        row, marks = [], []
        for part in itertools.count():
            seed = f"{self.seed} {worker.id if worker else 0} {part}"
            by_task = task_documents(self.scale, seed, 64)
            for ids, spans in encode(
                [document for group in zip(*by_task.values()) for document in group], self.tokenizer
            ):
                assert len(ids) < length, "a document must fit into a row"
                if len(row) + len(ids) >= length:
                    is_answer = torch.zeros(length, dtype=torch.bool)
                    is_answer[marks] = True
                    yield torch.tensor(row + [eos] * (length - len(row))), is_answer
                    row, marks = [], []
                marks += [len(row) + i for span in spans for i in span]
                row += [*ids, eos]


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of row numbers for ever, without repeats within an epoch."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train(model, tokenizer, text, scale: Scale, max_steps: int, seed: int) -> list[dict]:
    """Trains in place, on text chunks and `TaskRows`.

    Returns step, learning rate, mean loss on text and on answers, and accuracy by task, every
    CHECK_STEPS and at the end.
    """
    device, text_rows = model.device, scale.text_rows
    optimizer = torch.optim.AdamW(
        model.parameters(),
        scale.learning_rate,
        (0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=device.type == "cuda",
    )
    mixed = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    questions = task_documents(scale, seed + 2, 32, hardest=True)
    generator = torch.Generator().manual_seed(seed)
    text_batches = shuffled(len(text), text_rows, generator)
    task_batches = iter(
        DataLoader(
            TaskRows(tokenizer, scale, seed),
            scale.task_rows,
            num_workers=8 if device.type == "cuda" else 1,
        )
    )
    history, losses, cool_from, cool_to, step = (
        [],
        [],
        min(round(max_steps * (1 - COOLDOWN)), max_steps - 1),
        max_steps,
        0,
    )
    with tqdm(total=max_steps, desc="teacher", unit="step") as bar:
        while step < cool_to:
            step += 1
            rows, answers = next(task_batches)
            ids = torch.cat([token_ids(text, next(text_batches)), rows]).to(device)
            answers = answers[:, 1:].to(device)
            factor = min(1.0, step / WARMUP_STEPS, 0.05 + 0.95 * (cool_to - step) / (cool_to - cool_from))
            for group in optimizer.param_groups:
                group["lr"] = scale.learning_rate * factor
            with mixed():
                logits = model(input_ids=ids).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(
                    len(ids), -1
                )
            on_text, on_tasks = loss[:text_rows].mean(), loss[text_rows:]
            on_answers = on_tasks[answers].mean()
            (scale.text_weight * on_text + on_answers + (on_tasks.mean() if step > cool_from else 0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(torch.stack([on_text.detach(), on_answers.detach()]))
            bar.update()
            if step % CHECK_STEPS == 0 or step == cool_to:
                model.eval()
                with mixed():
                    accuracy = {task: answer_accuracy(model, tokenizer, asked) for task, asked in questions.items()}
                model.train()
                text_loss, answer_loss = torch.stack(losses).mean(0).tolist()
                history.append(
                    {
                        "step": step,
                        "lr": scale.learning_rate * factor,
                        "text_loss": text_loss,
                        "answer_loss": answer_loss,
                        **accuracy,
                    }
                )
                losses.clear()
                bar.set_postfix(
                    {
                        "text": f"{text_loss:.3f}",
                        **{task: f"{a:.1%}" for task, a in accuracy.items()},
                    }
                )
                if step < cool_from and min(accuracy.values()) >= ENOUGH:
                    cool_from, cool_to = step, round(step / (1 - COOLDOWN))
                    bar.total = cool_to
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
    loss.set_ylabel("nats a token")
    handles = [*axis.get_lines(), *loss.get_lines()]
    axis.legend(handles, [line.get_label() for line in handles], loc="center right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def demand(recall: float) -> None:
    """Ends the program if a teacher's held-out recall is too low to compare students on."""
    if recall < DEMANDED:
        sys.exit(f"--max_steps: too few, held-out recall is {recall:.1%}, not {DEMANDED:.0%}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a folder of text files to learn beside the standard library")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a model of 0.6M parameters and easier questions, for a CPU",
    )
    parser.add_argument("--max_steps", type=int, help="the most steps to take; default: as the size needs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.text and not args.text.is_dir():
        raise ValueError(f"--text: {args.text} is no folder; give one of text files")
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max_steps: {args.max_steps} must be at least 1")
    out, scale = args.output_dir, TINY if args.tiny else FULL
    settings = {
        "tiny": args.tiny,
        "text": args.text and str(args.text.resolve()),
        "seed": args.seed,
    }
    kept_settings = out / "settings.json"
    if kept_settings.is_file() and (found := json.loads(kept_settings.read_text())) != settings:
        name = next(k for k in settings if settings[k] != found.get(k))
        raise ValueError(
            f"--output_dir: {out} was begun with {name} {found.get(name)!r}, not {settings[name]!r}; name another"
        )
    if (out / "teacher").is_dir():
        print(f"{out}/teacher: is there already")
        demand(json.loads((out / "teacher.json").read_text())["associative_recall"])
        return
    out.mkdir(parents=True, exist_ok=True)
    kept_settings.write_text(json.dumps(settings) + "\n")

    disable_progress_bar()  # transformers' own, a line for every file written
    begin = time.monotonic()
    prepare(out, scale, args.text, args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork of the loader's workers
    # A seed shall give the same teacher: the sums of some CUDA kernels depend on the order of
    # threads otherwise, and cuDNN's attention has no other backward.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)  # a warning instead would leave flash attention's backward as it is
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(str(out / "tokenizer"))
    folder = out / "data" / "text" / f"chunked_context{scale.context_length}"
    text = open_chunks_for(tokenizer, len(tokenizer), str(folder), scale.context_length)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **scale.shape,
    )
    model = Qwen3ForCausalLM(config).to(device)
    print(
        f"Teacher: {model.num_parameters() / 1e6:.1f}M parameters on {device.type}, {scale.text_rows + scale.task_rows} x "
        f"{scale.context_length} tokens a step; data ready after {time.monotonic() - begin:.0f} s"
    )
    start = time.monotonic()
    history = train(model, tokenizer, text.train, scale, args.max_steps or scale.max_steps, args.seed)
    seconds = time.monotonic() - start
    heldout = token_ids(text.heldout, range(min(64, len(text.heldout)))).to(device)
    last, tokens = (
        history[-1],
        history[-1]["step"] * (scale.text_rows + scale.task_rows) * scale.context_length,
    )
    result = {
        "parameters": model.num_parameters(),
        "heldout_loss": heldout_loss(model, heldout),
        "unigram_entropy": unigram_entropy(heldout.cpu()),
        **{task: last[task] for task in RECALL_TASKS},
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "seed": args.seed,
        "history": history,
    }
    plot(history, out / "teacher.png")
    (out / "teacher.json").write_text(json.dumps(result, indent=1) + "\n")
    with atomic_directory(out / "teacher") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    accuracies = ", ".join(f"{task.replace('_', ' ')} {last[task]:.1%}" for task in RECALL_TASKS)
    print(
        f"Teacher: {accuracies}; held-out loss on text {result['heldout_loss']:.3f}, unigram entropy "
        f"{result['unigram_entropy']:.3f}; {last['step']} steps, {tokens / seconds:,.0f} tokens/s; "
        f"the whole {time.monotonic() - begin:.0f} s"
    )
    demand(last["associative_recall"])


if __name__ == "__main__":
    run_main(main)

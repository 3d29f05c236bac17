"""The quickstart's corpus: source text of Python's standard library, and documents of recall tasks.

    python -m quickstart.corpus --output_dir quickstart_out/corpus

The text is always there; the documents (recall_tasks.py) ask for words that stood before, which
only a model that reads its context can answer. OUTPUT_DIR gets text/stdlib/ and tasks.jsonl, and
is written atomically.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from runtime.command import run_main
from runtime.files import atomic_directory

from recall_tasks import RECALL_TASKS, Document

# encodings/ is tables of characters: a sixth of the bytes, next to nothing to learn, and noise in
# every loss curve.
NOT_CORPUS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "encodings",
}


@dataclass(frozen=True)
class TaskMix:
    """Recall tasks of varying difficulty.

    ranges: task -> option of its generator -> (easiest, hardest). num_words: the words that
    documents draw from.
    """

    ranges: dict[str, dict[str, tuple[int, int]]]
    num_words: int

    def draw(self, rng: random.Random, task: str, hardest: bool = False) -> Document:
        """A document of `task` with options between its easiest and hardest, or at the hardest."""
        options = {}
        for name, (easiest, highest) in self.ranges[task].items():
            options[name] = highest if hardest else rng.randint(easiest, highest)
        return RECALL_TASKS[task](rng, num_words=self.num_words, **options)

    def documents(
        self,
        seed: int | str,
        count: int,
        hardest: bool = False,
    ) -> dict[str, list[Document]]:
        """`count` documents of every task."""
        rng = random.Random(seed)
        return {task: [self.draw(rng, task, hardest) for _ in range(count)] for task in self.ranges}

    def interleaved(self, seed: int | str, count: int) -> list[Document]:
        """`count` documents of every task, the tasks in turn."""
        groups = zip(*self.documents(seed, count).values())
        return [document for group in groups for document in group]


# What the quickstart's teacher has learnt, at most 256 tokens per document.
QUICKSTART_TASKS = TaskMix(
    ranges={
        "associative_recall": {"num_pairs": (2, 32), "num_queries": (4, 16)},
        "multi_hop_recall": {"num_chains": (2, 12), "num_queries": (2, 8)},
        "copying": {"length": (4, 64)},
    },
    num_words=64,
)
TEXT_FILES = 60
TASK_DOCUMENTS = 10_000


def stdlib_files() -> list[Path]:
    """The Python files of the running interpreter's standard library, sorted, without tests,
    character tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in root.rglob("*.py"):
        folders = file.relative_to(root).parts[:-1]
        if not NOT_CORPUS.intersection(folders):
            files.append(file)
    return sorted(files)


def copy_stdlib(folder: Path, max_files: int | None = None) -> int:
    """Copies the standard library's readable files to `folder`, atomically, and returns their
    number.

    A `folder` that exists is left alone. max_files: take every n-th file, so that there are about
    as many. Raises ValueError if this interpreter comes without sources.
    """
    if folder.is_dir():
        return sum(1 for _ in folder.rglob("*.py"))
    root = Path(sysconfig.get_paths()["stdlib"])
    files = stdlib_files()
    if not files:
        raise ValueError(f"{root}: holds no Python sources; pass a corpus to quickstart.sh")
    if max_files and max_files < len(files):
        step = -(-len(files) // max_files)
        files = files[::step]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copied = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few files are deliberately in other encodings
        target = partial / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        copied += 1
    partial.rename(folder)
    return copied


def make_corpus(
    folder: Path,
    tasks: TaskMix,
    task_documents: int,
    text_files: int | None,
    seed: int,
    text: Path | None = None,
) -> None:
    """Writes text/ and tasks.jsonl to `folder`, atomically; a folder that exists is left alone.

    task_documents: of all tasks together. text_files: of the standard library, all if None. text:
    a folder of text files to add.
    """
    if folder.is_dir():
        return
    with atomic_directory(folder) as temporary:
        copy_stdlib(temporary / "text" / "stdlib", text_files)
        if text:
            shutil.copytree(text, temporary / "text" / "given")
        documents = tasks.interleaved(seed, task_documents // len(tasks.ranges))
        lines = [json.dumps({"text": document.text}) + "\n" for document in documents]
        (temporary / "tasks.jsonl").write_text("".join(lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the tasks' documents (%(default)s)")
    args = parser.parse_args(argv)
    make_corpus(args.output_dir, QUICKSTART_TASKS, TASK_DOCUMENTS, TEXT_FILES, args.seed)
    files = sum(1 for _ in (args.output_dir / "text").rglob("*.py"))
    content = f"{files} files of the standard library and {TASK_DOCUMENTS:,} task documents"
    print(f"Corpus: {content} in {args.output_dir}")


if __name__ == "__main__":
    run_main(main)

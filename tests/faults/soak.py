"""Kills and resumes a tiny run at random moments and compares it with an uninterrupted one.

    python tests/faults/soak.py [--cycles 100] [--seed 0] [--ranks 1] [--stage 1]

In a cycle, the run is started and ended by SIGKILL, SIGTERM or SIGUSR1 after a random time: mostly
in training, sometimes while it starts, saves or exports. After the last cycle the run is started
once more and finishes; its metrics and weights must equal the uninterrupted run's bit for bit. A
run that finishes earlier is followed by another, until all cycles are done.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for conftest and processes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from runtime.guard import REQUEUE

from conftest import python_texts, random_teacher, save_tokenizer, write_config
from processes import Child, import_once, start
from test_faults import SETTINGS, metrics, preprocess
from tqdm import tqdm

ENDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def prepare(folder: Path, stage: int, ranks: int) -> tuple[Path, float]:
    """Makes a teacher, data and uninterrupted runs of the stages up to `stage` in `folder`.

    Returns the last one's config and duration in seconds.
    """
    (folder / "corpus").mkdir()
    for i, text in enumerate(python_texts(14, lines=3)):
        (folder / "corpus" / f"{i}.py").write_text(text)

    def teacher():
        random_teacher(folder / "teacher", "qwen3", tie_word_embeddings=True)
        save_tokenizer(folder / "teacher")

    child = Child(teacher, folder / "log.teacher", {})
    assert child.wait() == 0, child.output()
    preprocess(folder / "corpus", str(folder / "teacher"), folder)
    seconds = 0.0
    paths = (str(folder / "teacher"), str(folder / "chunked_context32"))
    settings = SETTINGS | {"max_steps": 60}
    for number in range(1, stage + 1):
        file = write_config(folder, number, *paths, **settings)
        begin = time.monotonic()
        job = start(file, log=folder / f"log.whole{number}", ranks=ranks)
        assert job.wait() == 0, job.output()
        seconds = time.monotonic() - begin
    return file, seconds


def must_equal(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole), f"{run}: other metrics than {whole}"
    for name in ("model.safetensors", "config.json"):
        ours = (run / "converted-hf" / name).read_bytes()
        theirs = (whole / "converted-hf" / name).read_bytes()
        assert ours == theirs, f"{run}: another {name}"
    left = [path.name for path in run.iterdir() if path.name[0] == "."]
    assert not left, f"{run}: leaves {left}"


def train_and_end(file: Path, run: Path, log: Path, ranks: int, chance: random.Random, seconds: float):
    """Starts the run and ends it by a random signal after a random part of `seconds`.

    Returns the signal, or None if the run had finished before.
    """
    job = start(file, f"train.output_dir={run}", log=log, ranks=ranks)
    number = chance.choice(ENDS)
    end = time.monotonic() + chance.uniform(0.2, 0.8) * seconds
    while time.monotonic() < end and job.ranks[0].poll() is None:
        time.sleep(0.01)
    victims = [chance.choice(job.ranks)] if number == signal.SIGKILL else job.ranks
    for victim in victims:
        victim.kill(number)
    code = job.wait()
    if code == 0:
        return None
    assert code in (-signal.SIGKILL, REQUEUE), f"exit code {code} after {number.name}:\n{job.output()[-3000:]}"
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    args = parser.parse_args()
    import_once()
    chance = random.Random(args.seed)
    ends = Counter()
    runs = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        file, seconds = prepare(folder, args.stage, args.ranks)
        with tqdm(total=args.cycles, desc="kill and resume", unit=" cycles") as progress:
            while progress.n < args.cycles:
                runs += 1
                run = folder / f"run{runs}"
                finished = False
                while not finished and progress.n < args.cycles:
                    log = folder / f"log{progress.n}"
                    number = train_and_end(file, run, log, args.ranks, chance, seconds)
                    finished = number is None
                    if not finished:
                        ends[number.name] += 1
                        progress.update()
                if not finished:
                    job = start(file, f"train.output_dir={run}", log=folder / "log.last", ranks=args.ranks)
                    assert job.wait() == 0, job.output()[-3000:]
                must_equal(run, folder / f"stage{args.stage}")
        counts = ", ".join(f"{count} {name}" for name, count in sorted(ends.items()))
        print(
            f"{args.cycles} cycles ({counts}) over {runs} runs of stage {args.stage} on {args.ranks} processes: "
            "metrics and weights of all equal the uninterrupted run's bit for bit"
        )


if __name__ == "__main__":
    main()

"""Kills and resumes a tiny run at random moments, again and again, and compares it with one that nobody touched.

    python tests/faults/soak.py [--cycles 100] [--seed 0] [--ranks 1] [--stage 1]

A cycle is a start that is ended by SIGKILL, SIGTERM or SIGUSR1 after a random time, most in training, some while it starts,
saves or exports. When the cycles are through, or the run is finished, it is started once more; metrics and weights must equal
the untouched run's to the bit. A run that finishes early is followed by the next, until there were enough cycles.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from runtime.guard import REQUEUE

from conftest import random_teacher, save_tokenizer, write_config
from processes import Child, import_once, start
from test_faults import SETTINGS, metrics, preprocess
from tqdm import tqdm

ENDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def prepare(folder: Path, stage: int, ranks: int) -> tuple[Path, float]:
    """Teacher, data, and the untouched run in folder/whole; returns its config and the seconds that
    it took."""
    (folder / "corpus").mkdir()
    for i in range(14):
        lines = (f"def f{(i * j * j) % 91}(x): return x + {(i * 7 + j * 13) % 101}" for j in range(3))
        (folder / "corpus" / f"{i}.py").write_text("\n".join(lines))

    def teacher():
        random_teacher(folder / "teacher", "qwen3", tie_word_embeddings=True)
        save_tokenizer(folder / "teacher")

    child = Child(teacher, folder / "log.teacher", {})
    assert child.wait() == 0, child.output()
    preprocess(folder / "corpus", str(folder / "teacher"), folder)
    seconds = 0.0
    for number in range(1, stage + 1):
        file = write_config(
            folder,
            number,
            str(folder / "teacher"),
            str(folder / "chunked_context32"),
            **SETTINGS | {"max_steps": 60},
        )
        begin = time.monotonic()
        job = start(file, log=folder / f"log.whole{number}", ranks=ranks)
        assert job.wait() == 0, job.output()
        seconds = time.monotonic() - begin
    return file, seconds


def must_equal(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole), f"{run}: other metrics than {whole}"
    for name in ("model.safetensors", "config.json"):
        assert (run / "converted-hf" / name).read_bytes() == (whole / "converted-hf" / name).read_bytes(), (
            f"{run}: another {name}"
        )
    left = [path.name for path in run.iterdir() if path.name[0] == "."]
    assert not left, f"{run}: leaves {left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    args = parser.parse_args()
    import_once()
    chance, ends, runs = random.Random(args.seed), {}, 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        file, seconds = prepare(folder, args.stage, args.ranks)
        with tqdm(total=args.cycles, desc="kill and resume", unit=" cycles") as progress:
            while progress.n < args.cycles:
                runs += 1
                run = folder / f"run{runs}"
                finished = False
                while not finished and progress.n < args.cycles:
                    job = start(
                        file,
                        f"train.output_dir={run}",
                        log=folder / f"log{progress.n}",
                        ranks=args.ranks,
                    )
                    number = chance.choice(ENDS)
                    end = time.monotonic() + chance.uniform(0.2, 0.8) * seconds
                    while time.monotonic() < end and job.ranks[0].poll() is None:
                        time.sleep(0.01)
                    victims = job.ranks if number != signal.SIGKILL else [chance.choice(job.ranks)]
                    for victim in victims:
                        victim.kill(number)
                    code = job.wait()
                    finished = code == 0
                    if not finished:
                        assert code in (-signal.SIGKILL, REQUEUE), (
                            f"exit code {code} after {number.name}:\n{job.output()[-3000:]}"
                        )
                        ends[number.name] = ends.get(number.name, 0) + 1
                        progress.update()
                if not finished:
                    job = start(file, f"train.output_dir={run}", log=folder / "log.last", ranks=args.ranks)
                    assert job.wait() == 0, job.output()[-3000:]
                must_equal(run, folder / f"stage{args.stage}")
        print(
            f"{args.cycles} cycles ({', '.join(f'{count} {name}' for name, count in sorted(ends.items()))}) over {runs} runs of "
            f"stage {args.stage} on {args.ranks} processes: metrics and weights of all equal the untouched run's to the bit"
        )


if __name__ == "__main__":
    main()

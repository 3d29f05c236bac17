"""Injects faults into real processes and files, and checks what must hold after each.

A run that was interrupted and started again must give the metrics and weights of an uninterrupted
run, bit for bit. FAULTS.md beside this file lists all faults with their tests; docs/reliability.md says which promise each checks.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from runtime.checkpoints import INDEX, checkpoints, read_index
from runtime.data import data_fingerprint, read_metadata
from runtime.guard import HUNG, REQUEUE

import pytest
from conftest import options, python_texts, write_config
from processes import PATIENCE, ROOT, Child, import_once, start

import preprocess_chunk
import preprocess_download_tokenize

pytestmark = pytest.mark.faults
STEPS = 20
SAVE = 3
LENGTH = 32
# Checkpoints are written between logged steps (every 2) and at ends of epochs (every 6).
SETTINGS = {
    "max_steps": STEPS,
    "micro_batch_size": 2,
    "save_steps": SAVE,
    "logging_steps": 2,
    "eval_steps": 7,
    "report_to": "none",
    "weight_decay": 0.1,
}
RANKS = {1: 1, 2: 2, 3: 2}  # by stage: ZeRO-1 on one process, ZeRO-2 and ZeRO-3 on two
VOLATILE = ("seconds", "runtime", "per_second", "total_flos")


# ----------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(python_texts(14, lines=3)):
        (folder / f"{i}.py").write_text(text)
    return folder


def preprocess(corpus, teacher, folder, hook=lambda: None, code=0):
    """Makes chunks in a separate process, because its threads would not survive a fork."""
    tokenized = folder / "tokenized"

    def body():
        hook()
        paths = options(dataset_name=corpus, tokenizer=teacher, output_dir=tokenized)
        preprocess_download_tokenize.main([*paths, *options(holdout=0.17)])
        preprocess_chunk.main(options(tokenized_dataset_path=tokenized, context_length=LENGTH, output_dir=folder))

    child = Child(body, folder / "log", {"TOKENIZERS_PARALLELISM": "false"})
    assert child.wait() == code, child.output()
    return child.output()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, teacher_dir, corpus):
    """24 chunks: an epoch is 6 steps."""
    import_once()
    folder = tmp_path_factory.mktemp("small")
    preprocess(corpus, teacher_dir, folder)
    metadata = read_metadata(folder / f"chunked_context{LENGTH}")
    assert metadata["num_chunks"] // 4 == 6 and metadata["heldout_chunks"] >= 2
    return str(folder / f"chunked_context{LENGTH}")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, teacher_dir, small_data):
    """A folder with uninterrupted runs of the three stages: stage1, stage2, stage3."""
    import_once()
    folder = tmp_path_factory.mktemp("whole")
    for stage, ranks in RANKS.items():
        file = write_config(folder, stage, teacher_dir, small_data, **SETTINGS)
        job = start(file, log=folder / f"log{stage}", ranks=ranks)
        assert job.wait() == 0, job.output()
    return folder


class Run:
    """A run of one stage, in its own folder, into which faults are injected.

    whole: the folder of the uninterrupted run. root: holds config and logs; folder: the run itself.
    """

    def __init__(self, stage, whole, folder, teacher, data, settings):
        self.stage = stage
        self.whole = whole / f"stage{stage}"
        self.ranks = RANKS[stage]
        self.starts = 0
        self.root = folder
        if stage > 1:
            (folder / f"stage{stage - 1}").symlink_to(whole / f"stage{stage - 1}")
        self.file = write_config(folder, stage, teacher, data, **SETTINGS | settings)
        self.folder = folder / f"stage{stage}"

    def start(self, *options, **settings):
        self.starts += 1
        settings = {"ranks": self.ranks} | settings
        self.job = start(self.file, *options, log=self.root / f"log{self.starts}", **settings)
        return self.job

    def to_the_end(self, *options, **settings):
        job = self.start(*options, **settings)
        assert job.wait() == 0, job.output()[-3000:]
        return job.output()

    def must_equal_the_whole(self):
        assert metrics(self.folder) == metrics(self.whole)
        for name in ("model.safetensors", "config.json"):
            ours = (self.folder / "converted-hf" / name).read_bytes()
            assert ours == (self.whole / "converted-hf" / name).read_bytes(), name
        left = [path.name for path in self.folder.iterdir() if path.name[0] == "."]
        assert not left and len(checkpoints(self.folder)) == len(list(self.folder.glob("checkpoint-*"))) == 2


@pytest.fixture
def make_run(whole, tmp_path, teacher_dir, small_data):
    return lambda stage=1, **settings: Run(stage, whole, tmp_path, teacher_dir, small_data, settings)


def metrics(folder):
    """Every logged line, without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = []
    for line in lines:
        if "train_runtime" not in line:
            found.append({name: value for name, value in line.items() if not name.endswith(VOLATILE)})
    return found


# ---------------------------------------------------------------------------------- fault injection
def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(module, name, act, nth=1, when=lambda *a, **k: True, after=False):
    """In this process, the nth call of module.name for which when(arguments) holds also calls
    act(), before or after the original."""
    original = getattr(module, name)
    calls = 0

    def wrapped(*arguments, **options):
        nonlocal calls
        hit = when(*arguments, **options)
        calls += hit
        if hit and calls == nth and not after:
            act()
        result = original(*arguments, **options)
        if hit and calls == nth and after:
            act()
        return result

    setattr(module, name, wrapped)


def half_written(path_part, nth, end=die):
    """torch.save writes half of the nth file whose path contains `path_part`, then calls end()."""
    import io

    import torch

    original = torch.save
    calls = 0

    def save(value, path, *arguments, **options):
        nonlocal calls
        calls += path_part in str(path)
        if path_part in str(path) and calls == nth:
            buffer = io.BytesIO()
            original(value, buffer, *arguments, **options)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            end()
        return original(value, path, *arguments, **options)

    torch.save = save


def in_forward():
    import hf_trainer

    on_call(hf_trainer.StageTrainer, "compute_loss", die, nth=2 * 7 + 1)


def in_optimiser():
    import torch

    on_call(torch.optim.AdamW, "step", die, nth=8)


def before_the_ranks_agree():
    """The other rank waits in an all-reduce that never completes."""
    import hf_trainer

    on_call(hf_trainer.Guard, "on_step_end", die, nth=8)


def while_states_are_written():
    half_written("optim_states", 2)


def while_random_state_is_written():
    half_written("rng_state", 3)


def before_the_index():
    import runtime.checkpoints as module

    on_call(module, "atomic_write_text", die, nth=2)


def before_the_rename():
    on_call(os, "replace", die, when=lambda a, b: str(b).endswith("checkpoint-6"))


def after_the_rename():
    on_call(os, "replace", die, when=lambda a, b: str(b).endswith("checkpoint-9"), after=True)


def while_pruning():
    # The first call makes room for the checkpoint.
    on_call(shutil, "rmtree", die, nth=2, when=lambda path, **k: str(path).endswith("checkpoint-6"))


def while_exporting():
    from convert import loader

    on_call(loader, "copy_sidecars", die)


def after_the_last_step():
    import convert_ckpt

    on_call(convert_ckpt, "export_checkpoint", die)


def on_rank(rank, hook):
    return lambda ours: hook() if ours == rank else None


KILLS = {
    "in a forward pass": (1, 0, in_forward),
    "in the optimiser's step": (1, 0, in_optimiser),
    "one of two ranks, in a collective": (2, 1, before_the_ranks_agree),
    "half-way through the optimiser's states": (1, 0, while_states_are_written),
    "half-way through the states, one of two ranks": (2, 1, while_states_are_written),
    "half-way through the states, ZeRO-3": (3, 0, while_states_are_written),
    "half-way through the random states": (2, 0, while_random_state_is_written),
    "with all files written, before the index": (1, 0, before_the_index),
    "before the checkpoint gets its name": (1, 0, before_the_rename),
    "after it has its name, before old ones go": (1, 0, after_the_rename),
    "while an old checkpoint is removed": (1, 0, while_pruning),
    "after the last step, before the export": (3, 0, after_the_last_step),
    "while exporting": (1, 0, while_exporting),
}


# -------------------------------------------------------------------------------------------- kills
@pytest.mark.parametrize("name", KILLS)
def test_killed(make_run, name):
    """After SIGKILL at that moment, the same command gives the metrics and weights of an
    uninterrupted run."""
    stage, rank, hook = KILLS[name]
    run = make_run(stage)
    assert run.start(hook=on_rank(rank, hook)).wait() == -signal.SIGKILL
    assert not (run.folder / "converted-hf").exists()
    output = run.to_the_end()
    assert "resuming from" in output or name in (
        "after the last step, before the export",
        "while exporting",
    )
    run.must_equal_the_whole()


def test_killed_before_the_first_checkpoint_and_while_it_starts_again(make_run):
    """Then killed while it rewrites metrics.jsonl, whose last line is incomplete."""
    run = make_run()

    def early():
        import hf_trainer

        on_call(hf_trainer.StageTrainer, "compute_loss", die, nth=5)

    assert run.start(hook=on_rank(0, early)).wait() == -signal.SIGKILL
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')

    def rewriting():
        on_call(os, "replace", die, when=lambda a, b: str(b).endswith("metrics.jsonl"))

    assert run.start(hook=on_rank(0, rewriting)).wait() == -signal.SIGKILL
    run.to_the_end()
    run.must_equal_the_whole()


def test_killed_between_the_renames_of_a_second_export(make_run):
    """The old export is renamed and the new one not yet in its place: convert_ckpt.py completes it."""
    import convert_ckpt

    run = make_run()
    run.to_the_end()
    command = ["convert_ckpt.py", "--cfg", str(run.file)]

    def export(hook=lambda: None):
        hook()
        sys.argv = command
        convert_ckpt.main()

    def between():
        on_call(os, "replace", die, when=lambda a, b: str(a).endswith(".converted-hf.new"))

    assert Child(lambda: export(between), run.root / "export1", {}).wait() == -signal.SIGKILL
    assert not (run.folder / "converted-hf").exists() and (run.folder / ".converted-hf.old").exists()
    assert Child(export, run.root / "export2", {}).wait() == 0
    run.must_equal_the_whole()


@pytest.mark.parametrize("part, folder", [("tokens", "tokenized"), ("chunks", f"chunked_context{LENGTH}")])
def test_killed_while_preprocessing(tmp_path, teacher_dir, corpus, small_data, part, folder):
    """At the end of the second split's file: no folder that looks like data is left; the same
    commands give the data of uninterrupted ones."""

    def fault():
        from runtime.mixtures import ArrowFile

        from datasets.arrow_writer import ArrowWriter

        ends = {"tokens": (ArrowFile, "close"), "chunks": (ArrowWriter, "finalize")}
        on_call(*ends[part], die, nth=2)

    preprocess(corpus, teacher_dir, tmp_path, fault, -signal.SIGKILL)
    assert not (tmp_path / folder).exists() and (tmp_path / f".{folder}.new").exists()
    preprocess(corpus, teacher_dir, tmp_path)
    made = tmp_path / f"chunked_context{LENGTH}"
    assert data_fingerprint(read_metadata(made)) == data_fingerprint(read_metadata(small_data))
    assert (made / "train.arrow").read_bytes() == (Path(small_data) / "train.arrow").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


# ------------------------------------------------------------------------------ damaged checkpoints
def truncate(checkpoint):
    path = next(checkpoint.glob("global_step*/*optim_states.pt"))
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint):
    path = next(checkpoint.glob("global_step*/*model_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_a_file(checkpoint):
    (checkpoint / "scheduler.pt").unlink()


def tear_the_index(checkpoint):
    os.truncate(checkpoint / INDEX, 200)


def remove_the_index(checkpoint):
    (checkpoint / INDEX).unlink()


DAMAGES = {
    truncate: "of .* bytes",
    flip_a_bit: "is not what was written",
    remove_a_file: "scheduler.pt is missing",
    tear_the_index: "missing or damaged",
    remove_the_index: "missing or damaged",
}


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_a_damaged_newest_checkpoint(make_run, harm):
    """It is reported and set aside; the run resumes from the one before, with the same result."""
    run = make_run()
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    before, newest = checkpoints(run.folder)
    harm(newest)
    output = run.to_the_end()
    assert (
        re.search(f"{newest.name}: damaged .*{DAMAGES[harm]}.*set aside", output)
        and f"resuming from {before}" in output
    )
    assert (run.folder / f"set-aside-{newest.name}").is_dir()
    run.must_equal_the_whole()


def test_all_checkpoints_damaged(make_run):
    """The run does not silently start from step 0."""
    run = make_run()
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    older, newest = checkpoints(run.folder)
    truncate(older)
    remove_the_index(newest)
    assert run.start().wait() == 1
    assert "all its checkpoints are damaged and set aside" in run.job.output()


# ------------------------------------------------------------------------------------------ signals
def send(number):
    return lambda: os.kill(os.getpid(), number)


def in_the_next_step():
    import hf_trainer

    on_call(hf_trainer.StageTrainer, "compute_loss", die, nth=3)


def usr1_in_a_step():
    import hf_trainer

    on_call(hf_trainer.StageTrainer, "compute_loss", send(signal.SIGUSR1), nth=8)


def term_in_a_step():
    import hf_trainer

    on_call(hf_trainer.StageTrainer, "compute_loss", send(signal.SIGTERM), nth=8)


def term_while_saving():
    import torch

    on_call(torch, "save", send(signal.SIGTERM), nth=5)


def term_before_training():
    import stages

    on_call(stages, "build_trainer", send(signal.SIGTERM))


def term_while_exporting():
    from convert import loader

    on_call(loader, "copy_sidecars", send(signal.SIGTERM))


SIGNALS = {
    "SIGUSR1 to one of two ranks": (
        2,
        1,
        usr1_in_a_step,
        "SIGUSR1: stopped at step|signal to another rank: stopped at step",
    ),
    "SIGTERM in a step": (
        1,
        0,
        term_in_a_step,
        "SIGTERM: stopped at step 4 of 20; checkpoint-4 is complete",
    ),
    "SIGTERM while saving": (1, 0, term_while_saving, "SIGTERM: stopped at step"),
    "SIGTERM to ZeRO-3": (3, 0, term_in_a_step, "SIGTERM: stopped at step"),
    "SIGTERM before the first step": (1, 0, term_before_training, "SIGTERM: stopping"),
    "SIGTERM while exporting": (1, 0, term_while_exporting, "SIGTERM: stopping"),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signalled(make_run, name):
    """It saves and exits with the code for a requeue; the same command resumes, with the same
    result."""
    stage, rank, hook, says = SIGNALS[name]
    run = make_run(stage)
    assert run.start(hook=on_rank(rank, hook)).wait() == REQUEUE, run.job.output()
    assert re.search(says, run.job.output()), run.job.output()
    assert not (run.folder / "converted-hf").exists()
    run.to_the_end()
    run.must_equal_the_whole()


def test_term_to_all_processes_of_a_run(make_run):
    """As Slurm and DeepSpeed's launcher send it: W&B's service dies of it before the run has saved,
    which must not matter."""
    import hf_trainer

    run = make_run(report_to="wandb")

    def term_all():
        import psutil

        children = psutil.Process().children(recursive=True)
        assert children
        for process in children:
            process.terminate()
        psutil.wait_procs(children, timeout=60)
        os.kill(os.getpid(), signal.SIGTERM)

    def hook():
        on_call(hf_trainer.StageTrainer, "compute_loss", term_all, nth=8)

    job = run.start(hook=on_rank(0, hook), environment={"WANDB_MODE": "offline"})
    assert job.wait() == REQUEUE, job.output()
    assert "W&B ended" in job.output() and "SIGTERM: stopped at step 4 of 20; checkpoint-4 is complete" in job.output()
    run.to_the_end(environment={"WANDB_MODE": "offline"})
    run.must_equal_the_whole()


@pytest.fixture
def launched(make_run):
    """`bash launch_stage1.sh` with two ranks, while it trains: its process, its log, its run."""
    run = make_run()
    environment = os.environ | {
        "CFG": str(run.file),
        "DEVICE": "cpu",
        "PROCESSES_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }
    path = run.root / "launch.log"
    command = ["bash", str(ROOT / "launch_stage1.sh"), "train.max_steps=2000"]
    with path.open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + PATIENCE
    while not (run.folder / "metrics.jsonl").exists():
        assert job.poll() is None and time.monotonic() < end, path.read_text()[-3000:]
        time.sleep(0.1)
    yield job, path, run
    job.kill()


def test_the_launch_script_hands_signals_on(launched):
    """Through DeepSpeed's launcher, which would lose the exit code of a SIGTERM."""
    job, log, run = launched
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE) == REQUEUE, log.read_text()[-3000:]
    (checkpoint,) = checkpoints(run.folder)[-1:]
    assert f"{checkpoint.name} is complete" in log.read_text() and "ended with exit code 75" in log.read_text()


def test_a_launcher_that_is_killed(launched):
    """DeepSpeed then exits with 0, but the job fails, and its ranks do not keep running."""
    import psutil

    job, log, run = launched
    processes = psutil.Process(job.pid).children(recursive=True)
    (launcher,) = (process for process in processes if "deepspeed.launcher.launch" in process.cmdline())
    ranks = [process for process in launcher.children() if "train.py" in process.cmdline()]
    assert len(ranks) == 2
    launcher.kill()
    assert job.wait(PATIENCE) == 1, log.read_text()[-3000:]
    assert "ended with exit code 1: the launcher of DeepSpeed was killed" in log.read_text()
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1] and not (run.folder / "converted-hf").exists()


def test_checkpoints_by_minutes(make_run):
    run = make_run(save_steps=STEPS, save_minutes=0.0)
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-6", "checkpoint-7"]
    run.to_the_end()
    run.must_equal_the_whole()


# --------------------------------------------------------------------------------- values and ranks
def break_layer(layer, gradient):
    """From the 7th micro-batch on, the layer's output, or its gradient, is infinite."""
    import hf_trainer

    def hook(module, inputs, output):
        if not gradient:
            return output * float("inf")
        output.register_hook(lambda g: g * float("inf"))

    trainers = []

    def act():
        block = trainers[0].model.model.layers[layer]
        stage_1 = trainers[0].args.world_size == RANKS[1]
        module = block.attn.student_attn.o_proj if stage_1 else block.mlp
        module.register_forward_hook(hook)

    def remember(self, *arguments, **options):
        trainers.append(self)
        return True

    on_call(hf_trainer.StageTrainer, "compute_loss", act, nth=7, when=remember)


DIVERGED = {
    "loss, stage 1": (
        1,
        0,
        2,
        False,
        r"step 4: the output of model.layers.2.attn.student_attn.o_proj is not finite on rank 0 .*in layer 2;",
    ),
    "gradient, stage 1": (
        1,
        0,
        1,
        True,
        r"step 4: the gradient of model.layers.1.attn.student_attn.o_proj.weight is not finite .*layer 1;",
    ),
    "loss, stage 2": (
        2,
        1,
        2,
        False,
        r"step 7: the output of model.layers.2.mlp is not finite on rank 1 .*in layer 2;",
    ),
    "gradient, stage 2": (
        2,
        1,
        2,
        True,
        r"step 7: the gradient of model.layers.2.mlp.down_proj.weight is not finite on rank 1 .*layer 2;",
    ),
    "gradient, ZeRO-3": (
        3,
        0,
        2,
        True,
        r"step 7: the gradient of model.layers.2.mlp.down_proj.weight is not finite on rank 0 .*layer 2;",
    ),
}


@pytest.mark.parametrize("name", DIVERGED)
def test_not_finite(make_run, name):
    """It ends with one line with step, layer and rank; the checkpoints stay usable."""
    stage, rank, layer, gradient, says = DIVERGED[name]
    run = make_run(stage)
    assert run.start(hook=on_rank(rank, lambda: break_layer(layer, gradient))).wait() == 1
    assert re.search(says, run.job.output()), run.job.output()[-2500:]
    assert "Traceback" not in run.job.output() and "Try a lower train.lr" in run.job.output()
    run.to_the_end()
    run.must_equal_the_whole()


def test_out_of_memory(make_run):
    """It ends with one line with the settings that help in this stage and are not in use yet."""
    run = make_run(2)

    def exhausted():
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has less.")

    def hook():
        import hf_trainer

        on_call(hf_trainer.KDTrainer, "forward_loss", exhausted, nth=3)

    job = run.start("train.gradient_checkpointing=true", hook=on_rank(1, hook))
    assert job.wait() == 1
    (line,) = (line for line in job.output().splitlines() if "out of GPU memory" in line)
    assert line.startswith("train.py: error: rank 1 of 2") and "(20.00 GiB more were wanted)" in line
    assert (
        "train.micro_batch_size below 2" in line
        and "train.kd_teacher_shard=always" in line
        and "gradient_checkpointing" not in line
    )
    run.to_the_end()
    run.must_equal_the_whole()


def at_step_8(act):
    """Calls act() at step 8; from there on this rank waits at most 10 s for the others. Before, it
    waits longer, because a busy machine starts slowly."""
    import hf_trainer

    trainers = []

    def hook():
        trainers[0].watchdog.seconds = 10.0
        act()

    def remember(self, *arguments, **options):
        trainers.append(self)
        return True

    on_call(hf_trainer.StageTrainer, "compute_loss", hook, nth=8, when=remember)


@pytest.mark.parametrize(
    "rank, act, says",
    [
        (1, lambda: time.sleep(600), "rank 1 of 2|waiting for rank 1"),
        (
            0,
            lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "waiting for rank 0, which does not answer",
        ),
    ],
    ids=["sleeps", "first rank is stopped"],
)
def test_a_rank_hangs(make_run, rank, act, says):
    """The timeout names the rank and where it is. The ranks report that in a store which the first
    rank holds."""
    run = make_run(2)
    job = run.start(hook=lambda ours: at_step_8(act if ours == rank else lambda: None))
    assert job.wait() == HUNG
    assert "no progress for 10 s at step 8" in job.output() and re.search(says, job.output()), job.output()
    run.to_the_end()
    run.must_equal_the_whole()


# ------------------------------------------------------------------------------------- file systems
@contextmanager
def mounted(folder, mount_options):
    command = ["mount", "-t", "tmpfs", "-o", mount_options, "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and permission to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    def act():
        with open(folder / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    return act


def full_while_saving(folder):
    half_written("optim_states", 2, end=fill(folder))


def full_while_logging(folder):
    import hf_trainer

    on_call(hf_trainer.MetricsFile, "on_log", fill(folder), nth=9)


def full_while_exporting(folder):
    import convert_ckpt

    on_call(convert_ckpt, "trained_state", fill(folder))


@pytest.mark.parametrize(
    "fault", [full_while_saving, full_while_logging, full_while_exporting], ids=lambda f: f.__name__
)
def test_full_file_system(make_run, fault):
    """It ends with one line that says so; nothing incomplete counts as complete; with space again,
    the run finishes with the same result."""
    run = make_run()
    run.folder.mkdir()
    with mounted(run.folder, "size=16m"):
        (run.folder / ".keep").touch()
        run.file.write_text(run.file.read_text().replace(f"{run.root}/stage1", f"{run.folder}/run"))
        mount = run.folder
        run.folder = mount / "run"
        assert run.start(hook=on_rank(0, lambda: fault(mount))).wait() == 1
        assert re.search("train.py: error: .*the file system is full", run.job.output()), run.job.output()
        assert "Traceback" not in run.job.output()
        assert not (run.folder / "converted-hf").exists()
        (mount / "filler").unlink()
        run.to_the_end()
        run.must_equal_the_whole()


@pytest.mark.parametrize("part, left", [("tokens", ".tokenized.new"), ("chunks", "tokenized")])
def test_full_while_preprocessing(tmp_path, teacher_dir, corpus, part, left):
    """The tokeniser leaves what it resumes from; neither leaves a folder that looks like data."""
    small = tmp_path / "small"
    small.mkdir()
    with mounted(small, "size=1m"):
        import_once()

        def fault():
            from runtime.mixtures import ArrowFile

            from datasets.arrow_writer import ArrowWriter

            writes = {"tokens": (ArrowFile, "write"), "chunks": (ArrowWriter, "write_batch")}
            on_call(*writes[part], fill(small))

        assert "No space left on device" in preprocess(corpus, teacher_dir, small, fault, 1)
        assert [path.name for path in small.iterdir() if path.name not in ("filler", "log")] == [left]
        (small / "filler").unlink()
        preprocess(corpus, teacher_dir, small)
        made = sorted(path.name for path in small.iterdir() if path.name != "log")
        assert made == [f"chunked_context{LENGTH}", "tokenized"]


def test_a_folder_that_may_not_be_written(make_run):
    run = make_run()
    run.folder.mkdir()
    with mounted(run.folder, "size=1m,ro"):
        assert run.start().wait() == 1
        assert f"{run.folder}/.lock: Read-only file system" in run.job.output() and "Traceback" not in run.job.output()


def own_data(run):
    """Makes the run use a copy of its data; returns (original, copy)."""
    data = run.root / "data"
    text = run.file.read_text()
    source = next(line.split(": ")[1] for line in text.splitlines() if "cache_dir" in line)
    shutil.copytree(source, data)
    run.file.write_text(text.replace(source, str(data)))
    return Path(source), data


def claim_another_corpus(data):
    file = data / "metadata.json"
    file.write_text(file.read_text().replace("local-", "local-0"))


DATA = {
    "train.arrow vanished": (
        lambda data: (data / "train.arrow").unlink(),
        "train.arrow: missing or damaged",
    ),
    "train.arrow cut": (
        lambda data: os.truncate(data / "train.arrow", 900),
        "train.arrow: .*damaged",
    ),
    "metadata.json torn": (
        lambda data: os.truncate(data / "metadata.json", 40),
        "holds no readable metadata.json",
    ),
    "other data": (
        claim_another_corpus,
        "has other data than .*checkpoint-6 was trained on",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_lost_between_two_starts(make_run, name):
    run = make_run()
    source, data = own_data(run)
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    harm, says = DATA[name]
    harm(data)
    assert run.start().wait() == 1
    assert re.search(says, run.job.output()) and "Traceback" not in run.job.output(), run.job.output()
    shutil.copytree(source, data, dirs_exist_ok=True)
    run.to_the_end()
    run.must_equal_the_whole()


def test_data_cut_while_it_is_read(make_run):
    """The kernel ends the process with SIGBUS: the log says where, and nothing is lost."""
    import hf_trainer

    run = make_run()
    source, data = own_data(run)

    def hook():
        on_call(hf_trainer.StageTrainer, "compute_loss", lambda: os.truncate(data / "train.arrow", 0), nth=15)

    assert run.start(hook=on_rank(0, hook)).wait() == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in run.job.output()
    shutil.copytree(source, data, dirs_exist_ok=True)
    run.to_the_end()
    run.must_equal_the_whole()


# ------------------------------------------------------------------------------ one run, one folder
def test_two_jobs_on_one_folder(make_run):
    """The second is refused and names the first, which continues."""
    import hf_trainer

    run = make_run()

    def wait():
        print("in the middle", flush=True)
        while not (run.root / "go").exists():
            time.sleep(0.05)

    first = run.start(hook=on_rank(0, lambda: on_call(hf_trainer.StageTrainer, "compute_loss", wait, nth=9)))
    first.wait_for("in the middle")
    second = run.start()
    assert second.wait() == 1
    assert f"stage1 is being written by process {first.ranks[0].pid} on" in second.output()
    (run.root / "go").touch()
    assert first.wait() == 0, first.output()
    run.must_equal_the_whole()


@pytest.mark.parametrize("alive", [False, True], ids=["dead", "alive"])
def test_a_lock_of_another_machine(make_run, alive):
    """Where locks do not work across machines: a holder without heartbeat is replaced, one with a
    heartbeat is respected."""
    run = make_run()
    run.folder.mkdir()
    lock = run.folder / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": None, "since": "2026-01-01 00:00:00"}))

    def beat():
        while True:
            lock.touch()
            time.sleep(0.3)

    def soon():
        import runtime.files

        runtime.files.WATCH = 3.0

    holder = Child(beat, run.root / "holder", {}) if alive else None
    code = run.start(hook=None if alive else on_rank(0, soon)).wait()
    if alive:
        holder.kill()
        assert code == 1 and "is being written by process 1 on elsewhere, since 2026" in run.job.output()
    else:
        assert code == 0, run.job.output()
        run.must_equal_the_whole()


def test_null_with_a_run_in_the_folder(make_run):
    run = make_run()
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    assert run.start("train.resume_from_checkpoint=null").wait() == 1
    assert (
        "set it to auto to resume from the latest checkpoint, or to one of them to resume from that, or remove the folder"
        in run.job.output()
    )
    run.to_the_end()
    run.must_equal_the_whole()
    assert "this run is finished; its result is" in run.to_the_end()


def test_resuming_from_a_named_checkpoint(make_run):
    """Later ones are set aside, so that `auto` follows this choice. The same command, as a
    scheduler repeats it after a time limit, resumes from its own newer checkpoints, even if the
    named one is gone, and finishes."""
    run = make_run()
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    named = f"train.resume_from_checkpoint={run.folder}/checkpoint-3"
    assert run.start(named, hook=on_rank(0, usr1_in_a_step)).wait() == REQUEUE
    assert "checkpoint-6 comes after checkpoint-3; set aside" in run.job.output()
    stopped = checkpoints(run.folder)[-1].name
    assert run.start(named, hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    assert f"resuming from {run.folder}/{stopped}" in run.job.output() and not (run.folder / "checkpoint-3").exists()
    run.to_the_end(named)
    run.must_equal_the_whole()
    assert "this run is finished" in run.to_the_end(named)


def test_restarting_a_finished_run_from_a_checkpoint(make_run):
    """Although the export of the last step exists, the run does not count as finished."""
    run = make_run()
    run.to_the_end()
    named = f"train.resume_from_checkpoint={checkpoints(run.folder)[0]}"
    assert run.start(named, hook=on_rank(0, in_the_next_step)).wait() == -signal.SIGKILL
    output = run.to_the_end(named)
    assert "resuming from" in output and "this run is finished" not in output
    run.must_equal_the_whole()


def test_an_export_during_a_run_does_not_end_it(make_run):
    import convert_ckpt

    def export():
        sys.argv = ["convert_ckpt.py", "--cfg", str(run.file)]
        convert_ckpt.main()

    run = make_run()
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    assert Child(export, run.root / "export", {}).wait() == 0 and (run.folder / "converted-hf").is_dir()
    run.to_the_end()
    run.must_equal_the_whole()
    assert "this run is finished" in run.to_the_end()
    seconds = [json.loads(line)["seconds"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)  # of both parts together


@pytest.mark.parametrize(
    "stage, before, after, zero",
    [
        (1, 1, 2, None),
        (1, 2, 1, None),
        (2, 2, 1, None),
        (2, 1, 2, None),
        (3, 2, 1, None),
        (3, 1, 2, None),
        (2, 1, 2, 2),
        (3, 1, 2, 3),
    ],
)
def test_another_number_of_processes(make_run, stage, before, after, zero):
    """It gives the losses of an uninterrupted run, up to the effect of another order of summation,
    so optimiser states are restored. At these learning rates the effect is 3e-6; at the other
    tests', ten times as high, Adam's first steps amplify it to percents on some processors."""
    import hf_trainer

    rates = {"lr": 2e-4, "lr_attn": 4e-4, "final_lr": 1e-4}
    if zero:
        rates["zero_stage"] = zero
    run = make_run(stage, **rates)
    uninterrupted = run.root / "uninterrupted"
    run.to_the_end(f"train.output_dir={uninterrupted}")

    def kill():
        on_call(hf_trainer.StageTrainer, "compute_loss", die, nth=2 * 7 // before + 1)

    assert run.start(hook=on_rank(0, kill), ranks=before).wait() == -signal.SIGKILL
    output = run.to_the_end(ranks=after)
    assert f"checkpoint-6 was saved by {before} processes and is resumed by {after}" in output
    assert read_index(checkpoints(run.folder)[-1])["zero_stage"] == (zero or (1 if before == 1 else stage))
    ours, theirs = metrics(run.folder), metrics(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
    assert not (run.folder / ".universal").exists()


def test_another_number_of_processes_in_stage_1_with_zero_3(make_run):
    """Stage 1 under ZeRO-3: DeepSpeed's universal checkpoint has no frozen weights. This is refused
    with a message, and the old number of processes resumes."""
    import hf_trainer

    run = make_run(zero_stage=3)

    def kill():
        on_call(hf_trainer.StageTrainer, "compute_loss", die, nth=8)

    assert run.start(hook=on_rank(0, kill), ranks=2).wait() == -signal.SIGKILL
    job = run.start(ranks=1)
    assert job.wait() == 1
    assert (
        "checkpoint-6 was saved by 2 processes and is resumed by 1: with train.zero_stage 3" in job.output()
        and "start 2 processes" in job.output()
    )
    assert "Traceback" not in job.output()
    run.to_the_end(ranks=2)


@pytest.mark.parametrize("stage", RANKS)
def test_optimiser_states_of_8_bits(make_run, stage):
    """They take a quarter of the space, train nearly as well, and resume bit for bit, but not on
    another number of processes."""
    run = make_run(stage, optimizer="adamw_8bit")
    uninterrupted = run.root / "uninterrupted"
    run.to_the_end(f"train.output_dir={uninterrupted}")
    ours, theirs = (
        [line["loss"] for line in metrics(folder) if "loss" in line] for folder in (uninterrupted, run.whole)
    )
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)

    def optimiser_bytes(folder):
        return sum(file.stat().st_size for file in checkpoints(folder)[-1].rglob("*optim_states.pt"))

    assert optimiser_bytes(uninterrupted) < 0.6 * optimiser_bytes(run.whole)
    assert run.start(hook=on_rank(0, in_forward)).wait() == -signal.SIGKILL
    job = run.start(ranks=3 - run.ranks)
    assert job.wait() == 1
    message = "with train.optimizer adamw_8bit, DeepSpeed's universal checkpoint cannot split the optimiser states"
    assert message in job.output()
    run.to_the_end()
    run.whole = uninterrupted
    run.must_equal_the_whole()


# -------------------------------------------------------------------------------------------- trust
class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_foreign_checkpoint_is_not_unpickled(make_run):
    import torch

    run = make_run()
    foreign = run.root / "foreign" / "checkpoint-3"
    shutil.copytree(checkpoints(run.whole)[0], foreign)
    for path in foreign.rglob("*.pt"):
        torch.save(Bomb(run.root / "boom"), path)
    for command in (
        lambda: run.start(f"train.resume_from_checkpoint={foreign}").wait(),
        lambda: export_foreign(run, foreign),
    ):
        assert command() == 1
        assert not (run.root / "boom").exists()
    assert "is not a complete checkpoint of" in run.job.output()


def export_foreign(run, foreign):
    command = [sys.executable, "convert_ckpt.py", *options(cfg=run.file, checkpoint=foreign)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "is not a complete checkpoint of" in done.stderr, done.stderr
    return done.returncode


def test_code_and_pickles_of_a_teacher_are_not_run(make_run, teacher_dir):
    """A teacher that brings modelling code, tokenizer code and a pickled copy of its weights."""
    import torch

    run = make_run()
    evil = run.root / "evil"
    shutil.copytree(teacher_dir, evil)
    code = f"import os\nos.mkdir({str(run.root / 'boom')!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (evil / name).write_text(code)
    for name, key, target in (
        ("config.json", "AutoModelForCausalLM", "modeling_evil.Evil"),
        ("config.json", "AutoConfig", "configuration_evil.Evil"),
        ("tokenizer_config.json", "AutoTokenizer", ["tokenization_evil.Evil", None]),
    ):
        content = json.loads((evil / name).read_text())
        content.setdefault("auto_map", {})[key] = target
        (evil / name).write_text(json.dumps(content))
    torch.save(Bomb(run.root / "boom"), evil / "pytorch_model.bin")
    run.file.write_text(run.file.read_text().replace(teacher_dir, str(evil)))
    run.start().wait()
    assert not (run.root / "boom").exists()
    for weights in evil.glob("*.safetensors"):  # then the pickled copy must not be read either
        weights.unlink()
    assert run.start(f"train.output_dir={run.root}/other").wait() == 1
    assert not (run.root / "boom").exists()


KEYS = {
    "HF_TOKEN": "hf_PLANTED0123456789abcdefghijklmnopqr",
    "WANDB_API_KEY": "PLANTED89abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDsecretaccesskey0123456789abcdefgh",
}


def test_no_key_is_written_anywhere(make_run):
    """Not into configs, checkpoints, logs or W&B's offline record, nor after a failure."""
    run = make_run(report_to="wandb")
    environment = KEYS | {"WANDB_MODE": "offline"}
    assert run.start(hook=on_rank(0, in_forward), environment=environment).wait() == -signal.SIGKILL
    assert run.start("train.lr=-1", environment=environment).wait() == 1
    run.to_the_end(environment=environment)
    searched = [path for path in run.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in searched) and any(path.suffix == ".pt" for path in searched)
    for path in searched:
        assert b"PLANTED" not in path.read_bytes(), path


def test_nothing_is_written_outside_the_run_folder(make_run):
    """Python's audit events show every file that a run opens for writing, creates, renames or
    removes."""
    run = make_run()
    log = run.root / "audit"
    (run.root / "tmp").mkdir()

    def name(path, folder=-1):
        base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        return os.path.abspath(os.path.join(base, os.fsdecode(path)))

    def audit():
        import tempfile

        tempfile.tempdir = str(run.root / "tmp")
        file = open(log, "a", buffering=1)  # noqa: SIM115 (stays open until the process ends)

        def hook(event, arguments):
            paths = []
            if event == "open" and isinstance(arguments[0], (str, bytes)):
                writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                # A path without a slash is relative to a folder's descriptor, as in rmtree.
                if writes and "/" in os.fsdecode(arguments[0]):
                    paths = [name(arguments[0])]
            elif event in ("os.remove", "os.rmdir", "os.mkdir"):
                paths = [name(arguments[0], arguments[-1])]
            elif event == "os.truncate":
                paths = [name(arguments[0])]
            elif event == "os.rename":
                paths = [name(arguments[0]), name(arguments[1])]
            else:
                return
            file.write("".join(f"{path}\n" for path in paths))

        sys.addaudithook(hook)

    run.to_the_end(
        hook=on_rank(0, audit),
        environment={"TORCHINDUCTOR_CACHE_DIR": str(run.root / "tmp" / "inductor")},
    )
    paths = {Path(line) for line in log.read_text().splitlines()}
    assert len(paths) > 20
    allowed = (run.folder, run.root / "tmp", Path("/dev"), Path("/proc"))
    outside = [path for path in paths if not any(path.is_relative_to(folder) for folder in allowed)]
    assert not outside, outside

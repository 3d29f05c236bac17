"""What docs/reliability.md promises has tests by those names; the launch scripts' parts that need
no cluster."""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from runtime import files
from runtime.files import FolderLockedError, atomic_directory, locked

import pytest
import torch
from processes import PATIENCE, free_port
from safetensors.torch import save_file

import hf_trainer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("table", ["docs/reliability.md", "tests/faults/FAULTS.md"])
def test_every_test_that_is_named_exists(table):
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / table).read_text()))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in code]


def test_every_fault_has_a_line():
    code = (ROOT / "tests" / "faults" / "test_faults.py").read_text()
    table = (ROOT / "tests" / "faults" / "FAULTS.md").read_text() + (ROOT / "docs" / "reliability.md").read_text()
    assert not [name for name in re.findall(r"^def (test_\w+)", code, re.MULTILINE) if f"`{name}`" not in table]


def shell(text, **environment):
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source launch_common.sh; {text}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "DEVICE": "cpu", **environment},
    )


def test_the_deepspeed_env_is_private_and_holds_no_secret():
    show = 'make_job_dir; plan_nodes; write_deepspeed_env; stat -c "%a %n" "$JOB_DIR" "$DS_ENV_FILE"; cat "$DS_ENV_FILE"; cat "$JOB_DIR/hostfile"'
    done = shell(
        show,
        HF_HOME="/hub",
        WANDB_PROJECT="p",
        MY_FLAG="1",
        DEEPSPEED_ENV="MY_FLAG",
        HF_TOKEN="hf_PLANTED",
        PROCESSES_PER_NODE="3",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("700 ")
    assert lines[1].startswith("600 ")
    assert lines[1].endswith("/.deepspeed_env")
    assert lines[2].startswith("TRITON_CACHE_DIR=/tmp/triton-")
    assert lines[3:] == [
        "HF_HOME=/hub",
        "WANDB_PROJECT=p",
        "MY_FLAG=1",
        "localhost slots=3",
    ]
    assert not Path(lines[0].split()[1]).exists()
    done = shell(show, DEEPSPEED_ENV="HF_TOKEN", HF_TOKEN="hf_PLANTED")
    assert done.returncode == 1
    assert "HF_TOKEN looks like a secret" in done.stderr
    assert "PLANTED" not in done.stderr


def test_what_looks_like_a_secret():
    """In upper or lower case; a setting of the tokenizers does not."""
    show = 'make_job_dir; plan_nodes; write_deepspeed_env; cat "$DS_ENV_FILE"'
    assert "TOKENIZERS_PARALLELISM=false\n" in shell(show, DEEPSPEED_ENV="TOKENIZERS_PARALLELISM").stdout
    for name in ("my_token", "HF_TOKEN_2", "Api_Key", "DB_PASSWD"):
        done = shell(show, DEEPSPEED_ENV=name, **{name: "PLANTED"})
        assert done.returncode == 1
        assert f"{name} looks like a secret" in done.stderr
        assert "PLANTED" not in done.stdout + done.stderr


def test_jobs_do_not_share_a_folder():
    """The process id of one machine may be used on another, or be the number of a Slurm job."""
    folders = [
        shell('make_job_dir; echo "$$ $JOB_DIR"', **environment).stdout.split()
        for environment in ({}, {"SLURM_JOB_ID": "17"})
    ]
    assert [Path(folder).name for _, folder in folders] == [
        f"{socket.gethostname()}-{folders[0][0]}",
        "17",
    ]


def test_a_signal_before_the_handlers_are_set(tmp_path):
    """Its launcher ignores SIGUSR1, and so does Python until a handler is set: the run learns about
    the signal then."""
    code = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "ready")!r}).touch()
while not os.path.exists({str(tmp_path / "go")!r}):
    time.sleep(0.05)
from runtime.guard import StopSignals
with StopSignals():
    print("not stopped", flush=True)
"""
    command = (
        f"set -euo pipefail; source launch_common.sh; make_job_dir; plan_nodes; supervise python -c {shlex.quote(code)}"
    )
    job = subprocess.Popen(
        ["bash", "-c", command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
    )
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    (folder,) = (ROOT / ".launch").glob(f"*-{job.pid}")
    while not (folder / "stop").exists():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    (tmp_path / "go").touch()
    output = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode == 75
    assert "SIGUSR1: stopping" in output
    assert "not stopped" not in output
    assert not folder.exists()


def test_layer_selection_waits_until_its_run_has_saved(tmp_path):
    """SIGTERM reaches both, or selection alone, which forwards it and exits with the code for a
    requeue once the run has ended."""
    run = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(1)  # as DeepSpeed's launcher
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(600)
"""
    (tmp_path / "run.py").write_text(run)
    code = "import sys; from layer_selection.stage2_runs import run_to_completion as run; print(run(sys.argv[1:]))"
    selection = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, str(tmp_path / "run.py")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "ready").exists():
        assert selection.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    selection.terminate()
    assert selection.communicate(timeout=PATIENCE)[0] == "(1, True)\n"
    assert (tmp_path / "saved").exists()


def test_headers():
    """Every script that trains requests GPUs, a requeue and a signal to its shell; preprocessing
    requests no GPU and no signal."""
    for script in ("stage1", "stage2", "stage3", "selection", "preprocess"):
        headers = re.findall(r"^#SBATCH --(.*)", (ROOT / f"launch_{script}.sh").read_text(), re.MULTILINE)
        assert "requeue" in headers
        assert "open-mode=append" in headers
        assert any("gpu" in line for line in headers) == (script != "preprocess")
        assert ("signal=B:USR1@600" in headers) == (script != "preprocess")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_python_exits_changes_nothing(name):
    code = f"""
import os, signal
from runtime.guard import StopSignals

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}):
        kill(pid, number)

late = Late()
with StopSignals():
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_signal_in_the_middle_of_a_print():
    """It ends the process with the same exit code."""
    code = """
import io, os, signal, sys
from runtime.guard import StopSignals

class Raw(io.RawIOBase):
    def writable(self):
        return True

    def write(self, content):
        os.kill(os.getpid(), signal.SIGTERM)
        return len(content)

sys.stdout = io.TextIOWrapper(io.BufferedWriter(Raw()))
with StopSignals():
    print("a line", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done
    assert done.stdout == "SIGTERM: stopping; run the same command again\n", done


def test_python_does_not_exit_while_a_thread_uses_the_store():
    """The store's C++ code would abort the process, with another exit code than the run's."""
    code = """
import sys, threading, time
import torch.distributed as dist
from runtime.guard import Watchdog

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
with Watchdog(20) as watchdog:
    store, inside = watchdog.store, threading.Event()
    class Slow:
        def set(self, *position):
            inside.set()
            begin = time.monotonic()
            while time.monotonic() < begin + 4:
                store.set(*position)
    watchdog.store = Slow()
    watchdog.beat("the end")
    inside.wait()
sys.exit(75)
"""
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(port)], cwd=ROOT) for rank in range(2)]
    assert [rank.wait(PATIENCE) for rank in ranks] == [75, 75]


def test_foreach_norms_equal_deepspeeds():
    """On two ranks, with clipping: bitwise equal weights and equal norms; an infinite gradient or
    NaN, on one rank and in one of two groups, skips the step on both. And no gradient is checked by
    itself."""
    code = """
import os, sys, torch
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2],
               "DS_ACCELERATOR": "cpu"}
import deepspeed
import deepspeed.runtime.zero.stage_1_and_2 as zero
from hf_trainer import use_foreach_grad_norm
rank, asked, ask = int(sys.argv[1]), [], zero.has_inf_or_nan
zero.has_inf_or_nan = lambda x: asked.append(x) or ask(x)

def trained(stage, bf16, at_once, bad):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 7), torch.nn.Linear(7, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1:].parameters(), "lr": 0.01}]
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}, "train_batch_size": 4, "gradient_accumulation_steps": 2,
              "gradient_clipping": 0.5, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]
    if at_once:
        use_foreach_grad_norm(engine.optimizer)
    asked.clear()
    norms = []
    for step in range(3):
        for micro in range(2):
            x = torch.randn(1, 5, generator=torch.Generator().manual_seed(10 * step + 3 * micro + rank)).to(torch.bfloat16 if bf16 else torch.float32)
            loss = engine(x).float().square().sum() * 9
            if bad and step == 1 and micro == 1 and rank == 1:
                loss = loss + model[bad].weight.float().sum() * bad * float("inf" if bad == 1 else "nan")
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return [p.detach().clone() for p in model.parameters()], norms, len(asked)

for stage in (1, 2):
    for bf16 in (False, True):
        for bad in (0, 1, 2):
            (theirs, norms, looks), (ours, our_norms, our_looks) = (trained(stage, bf16, x, bad) for x in (False, True))
            assert all(map(torch.equal, theirs, ours)) and our_norms == norms, (stage, bf16, bad, norms, our_norms)
            assert [norm < 1e9 for norm in norms] == [True, not bad, True] and norms[0] > 0.5, norms
            assert not our_looks and (looks > 0) == bf16
"""
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(port)], cwd=ROOT, stdout=subprocess.DEVNULL)
        for rank in range(2)
    ]
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0]


def test_training_uses_foreach_norms(monkeypatch):
    optimizer, given = object(), []
    monkeypatch.setattr(hf_trainer, "use_foreach_grad_norm", given.append)
    trainer = SimpleNamespace(finish_resuming=lambda: None, deepspeed=SimpleNamespace(optimizer=optimizer))
    state = SimpleNamespace(compute_steps=lambda *_: None, max_steps=1)
    hf_trainer.Guard(trainer, None, None).on_train_begin(None, state, None)
    assert given == [optimizer]


def test_an_export_that_is_stopped_between_its_renames_leaves_the_one_before(tmp_path, monkeypatch):
    """Not only after a kill: an exception there, such as that of a signal, cleans up."""
    folder, replace = tmp_path / "converted-hf", os.replace
    folder.mkdir()
    (folder / "config.json").write_text("before")

    def stopped(source, target):
        if str(target) == str(folder):
            monkeypatch.undo()
            raise SystemExit(75)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(SystemExit), atomic_directory(folder, replace=True) as new:
        (new / "config.json").write_text("after")
    assert [(path.name, (path / "config.json").read_text()) for path in tmp_path.iterdir()] == [
        ("converted-hf", "before")
    ]


def test_others_may_read_what_safetensors_keeps_to_the_owner(tmp_path):
    """safetensors makes its files readable by their owner alone, whatever the umask says; an export
    on a shared disk must be readable for those who may read its folder."""
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    (kept / "weights").touch(mode=0o600)
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with atomic_directory(tmp_path / "out", replace=True) as folder:
                save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
                (folder / "link").symlink_to(kept / "weights")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == mode
    assert stat.S_IMODE((kept / "weights").stat().st_mode) == 0o600


def test_a_lock_that_goes_while_it_is_watched(tmp_path, monkeypatch):
    """Its holder on another machine has ended: no error, and no further waiting."""
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": None, "since": "then"}))
    monkeypatch.setattr(files, "WATCH", 600.0)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: lock.unlink())
    with locked(lock, "x"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with (
            pytest.raises(FolderLockedError, match=f"x is being written by process {os.getpid()}"),
            locked(lock, "x"),
        ):
            pass
    assert not lock.exists()


def test_two_jobs_that_take_a_lock_together(tmp_path, monkeypatch):
    """On two machines that do not see each other's locks: the job that wrote last holds it."""
    lock, other = (
        tmp_path / ".lock",
        json.dumps({"host": "elsewhere", "pid": 1, "job": "18", "since": "then"}),
    )
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: lock.write_text(other))
    with (
        pytest.raises(
            FolderLockedError,
            match="x is being written by process 1 on elsewhere, Slurm job 18, since then",
        ),
        locked(lock, "x"),
    ):
        pass
    assert lock.read_text() == other
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    lock.unlink()
    with locked(lock, "x"):
        assert json.loads(lock.read_text())["job"] == "17"
    assert not lock.exists()

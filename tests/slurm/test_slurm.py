"""The launch scripts on a real Slurm of two nodes: training across them, requeues, time limits, a lost node."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import random_teacher, save_tokenizer, write_config
from processes import PATIENCE, ROOT, import_once, start

from convert import load_teacher
from distill_model import StudentForCausalLM

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
MISSING = [name for name in NEEDED if not shutil.which(name)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster in namespaces needs root"),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"not installed: {' '.join(MISSING)} (Debian: slurmctld slurmd slurm-client munge iproute2)",
    ),
]
LENGTH, SECRET = 32, "hf_PLANTED0123456789abcdefghijklmnopqr"


class Cluster:
    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munge's socket must be reachable by all

    def start(self):
        command = ["sh", "-c", 'touch "$0"; exec sleep infinity', self.folder / "ready"]
        self.process = subprocess.Popen([ROOT / "tests/slurm/cluster.sh", self.folder / "slurm", *command])
        end = time.monotonic() + PATIENCE
        while not (self.folder / "ready").exists():
            assert self.process.poll() is None and time.monotonic() < end, "the cluster did not start"
            time.sleep(0.1)
        (unshare,) = psutil.Process(self.process.pid).children()
        self.inside = unshare.children()[0].pid

    def _processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *command, environment=None, check=True):
        """The output of a command on the login node, in the project's folder."""
        command = [
            "nsenter",
            "-t",
            str(self.inside),
            "-m",
            "-u",
            "-n",
            "-p",
            "env",
            "-C",
            str(ROOT),
            *map(str, command),
        ]
        done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + (done.stderr if not check else "")

    def submit(self, script, *arguments, sbatch=(), **environment):
        environment = {
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "HF_TOKEN": SECRET,
            **environment,
        }
        output = f"--output={self.folder}/job-%j.log"
        job = self.run("sbatch", "--parsable", output, *sbatch, script, *arguments, environment=environment).strip()
        return job

    def fact(self, job, name):
        return re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", "-o", job))[1]

    def log(self, job):
        path = self.folder / f"job-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job, seconds=PATIENCE):
        """The job's last state."""
        end = time.monotonic() + seconds
        while (state := self.fact(job, "JobState")) in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "REQUEUED",
        ):
            assert time.monotonic() < end, f"{state} ({self.fact(job, 'Reason')})\n{self.log(job)[-3000:]}"
            time.sleep(0.3)
        return state

    def wait_for(self, condition, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "in vain"
            time.sleep(0.1)

    def commands(self):
        """The command lines of all processes in the cluster."""
        found = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):  # it has ended
                found.append(" ".join(process.cmdline()))
        assert any("train.py" in command for command in found) and any("srun" in command for command in found)
        return found

    def ranks(self, output_dir):
        """{rank: process} of a run whose command holds `output_dir`, on whatever node."""
        found = {}
        for process in sorted(self._processes(), key=lambda process: process.create_time()):
            try:
                command = process.cmdline()
                if any("--local_rank" in part for part in command) and any(str(output_dir) in part for part in command):
                    found.setdefault(int(process.environ()["RANK"]), process)  # the first: later ones are its helpers
            except psutil.Error:
                continue
        return found

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights in the shape of quickstart.sh's teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    random_teacher(
        folder,
        "qwen3",
        tie_word_embeddings=True,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=8,
        head_dim=32,
        initializer_range=0.05,
    )
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(cluster, teacher, tmp_path_factory):
    """Chunks, made by `sbatch launch_preprocess.sh`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    for i in range(40):
        lines = (f"def f{(i * j * j) % 91}(x): return x + {(i * 7 + j * 13) % 101}" for j in range(9))
        (folder / "corpus" / f"{i}.py").write_text("\n".join(lines))
    job = cluster.submit(
        "launch_preprocess.sh",
        DATASET=str(folder / "corpus"),
        TOKENIZER=teacher,
        DATA_DIR=str(folder / "made"),
        CONTEXT_LENGTHS=f"{LENGTH}",
        HOLDOUT="0.1",
    )
    facts = cluster.run("scontrol", "show", "job", "-o", job)
    assert "gpu" not in facts.lower()
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    return str(folder / "made" / f"chunked_context{LENGTH}")


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def one_process(file, folder, log):
    """The same run by one process, without Slurm."""
    import_once()
    job = start(file, f"train.output_dir={folder}", log=log)
    assert job.wait() == 0, job.output()
    return losses(folder)


# ------------------------------------------------------------------------------------------------ the scripts
def test_slurm_accepts_the_headers(cluster):
    """As they are, on nodes with 8 GPUs."""
    for script in ("preprocess", "stage1", "stage2", "stage3", "selection"):
        array = ["--array=0-27"] if script == "selection" else []
        output = cluster.run("sbatch", "--test-only", *array, f"launch_{script}.sh", check=False)
        assert re.search("Job .* to start at", output), output


def test_stages_on_two_nodes(cluster, teacher, data, tmp_path):
    """Stage 1, then 2 behind it, on two nodes: the losses of one process; nothing of a key in any
    log or file."""
    files = {stage: write_config(tmp_path, stage, teacher, data, max_steps=6, report_to="none") for stage in (1, 2)}
    first = cluster.submit("launch_stage1.sh", sbatch=["--nodes=2"], CFG=str(files[1]))
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"keep": [1, 5]}))
    second = cluster.submit(
        "launch_stage2.sh",
        sbatch=["--nodes=2", f"--dependency=afterok:{first}"],
        CFG=str(files[2]),
        RANKING=str(ranking),
        OVERRIDES="train.lr=1e-3 train.kd_teacher_shard=always",
    )
    assert cluster.wait(first) == "COMPLETED", cluster.log(first)
    assert cluster.wait(second) == "COMPLETED", cluster.log(second)
    assert "on 2 x 1 processes (cpu): node1 node2" in cluster.log(first)
    assert json.loads((tmp_path / "stage1" / "run.json").read_text())["world_size"] == 2
    student = StudentForCausalLM.from_pretrained(tmp_path / "stage2" / "converted-hf")
    assert student.config.keep_full_attention_layers == [1, 5]
    assert student.config.num_hidden_layers == load_teacher(teacher).config.num_hidden_layers
    alone = one_process(files[1], tmp_path / "alone1", tmp_path / "log1")
    assert losses(tmp_path / "stage1") == pytest.approx(alone, rel=1e-4)
    values = yaml.safe_load(files[2].read_text())
    values["student_model"]["keep_full_attention_layers"] = [1, 5]
    values["train"]["lr"] = 1e-3
    files[2].write_text(yaml.safe_dump(values))
    alone = one_process(files[2], tmp_path / "alone2", tmp_path / "log2")
    assert losses(tmp_path / "stage2") == pytest.approx(alone, rel=1e-4)
    for path in (*tmp_path.rglob("*"), *cluster.folder.glob("job-*.log")):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert not (ROOT / ".launch" / first).exists() and not (ROOT / ".launch" / second).exists()


def test_a_rank_that_fails(cluster, teacher, data, tmp_path):
    """It fails the job, and the log says where and how. No key is on a command line."""
    file = write_config(tmp_path, 1, teacher, data, max_steps=2000, report_to="none")
    job = cluster.submit("launch_stage1.sh", sbatch=["--nodes=2"], CFG=str(file))
    cluster.wait_for(lambda: losses(tmp_path / "stage1") if (tmp_path / "stage1" / "metrics.jsonl").exists() else False)
    assert not [command for command in cluster.commands() if SECRET in command]
    os.kill(cluster.ranks(tmp_path / "stage1")[1].pid, signal.SIGKILL)
    assert cluster.wait(job) == "FAILED"
    assert re.search("node2, ranks 1 to 1: ended with exit code", cluster.log(job)), cluster.log(job)[-3000:]
    assert "; requeued," not in cluster.log(job)


def test_requeued_limited_cancelled_and_on_a_lost_node(cluster, teacher_dir, data, tmp_path):
    """Four jobs at a time: each goes on by itself to the end of a run that nobody touched, but for
    the cancelled one."""
    # Enough for each to be found training, after the seconds that Slurm and the other jobs take.
    steps = {"requeued": 500, "limited": 3000, "cancelled": 100_000, "lost": 500}
    jobs, folders = {}, {name: tmp_path / name for name in steps}
    settings = {
        "report_to": "none",
        "save_steps": 25,
        "micro_batch_size": 4,
        "logging_steps": 5,
        "eval_steps": 10000,
    }
    config = write_config(tmp_path, 1, teacher_dir, data, **settings)

    def saved(name):
        return list(folders[name].glob("checkpoint-*/index.json"))

    # The cancelled one holds most of node1's GPUs, so that the one that gets lost starts on node2,
    # and finds room on node1 later.
    for name, gpus, sbatch in (
        ("limited", 1, ["--nodelist=node1", "--time=60", "--signal=B:USR1@120"]),
        ("cancelled", 6, ["--nodelist=node1"]),
        ("requeued", 1, ["--nodelist=node1"]),
        ("lost", 6, []),
    ):
        sbatch = [*sbatch, f"--gpus-per-node={gpus}", "--mem=8G", "--cpus-per-task=4"]
        jobs[name] = cluster.submit(
            "launch_stage1.sh",
            f"train.output_dir={folders[name]}",
            f"train.max_steps={steps[name]}",
            CFG=str(config),
            sbatch=sbatch,
        )
        if name == "limited":  # once it trains its limit is one to two minutes away: the signal comes at once
            cluster.wait_for(lambda: saved("limited"))
            hours, minutes, _ = map(int, cluster.fact(jobs[name], "RunTime").split(":"))
            cluster.run("scontrol", "update", f"jobid={jobs[name]}", f"timelimit={60 * hours + minutes + 2}")
            cluster.wait_for(lambda: int(cluster.fact(jobs["limited"], "Restarts")) >= 1)
            cluster.run("scontrol", "update", f"jobid={jobs[name]}", "timelimit=60")  # once is enough
        if name == "cancelled":
            cluster.wait_for(lambda: cluster.fact(jobs["cancelled"], "JobState") == "RUNNING")

    cluster.wait_for(lambda: saved("cancelled"))
    cluster.run("scancel", jobs["cancelled"])
    cluster.wait_for(lambda: saved("requeued"))
    cluster.run("scontrol", "requeue", jobs["requeued"])
    cluster.wait_for(lambda: saved("lost"))
    node = cluster.fact(jobs["lost"], "NodeList")
    assert node == "node2"
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        assert cluster.wait(jobs["lost"]) == "COMPLETED", cluster.log(jobs["lost"])[-3000:]
        assert cluster.fact(jobs["lost"], "NodeList") == "node1"
    finally:
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    for name in ("requeued", "limited"):
        assert cluster.wait(jobs[name]) == "COMPLETED", cluster.log(jobs[name])[-3000:]
    assert cluster.fact(jobs["cancelled"], "JobState") == "CANCELLED" and "; requeued," not in cluster.log(
        jobs["cancelled"]
    )
    for name in ("requeued", "limited", "lost"):
        assert int(cluster.fact(jobs[name], "Restarts")) >= 1
        assert re.search("resuming from .*checkpoint-", cluster.log(jobs[name]))
        assert sorted(losses(folders[name])) == [1, *range(5, steps[name] + 1, 5)]
    assert re.search("SIGUSR1: stopped at step .*; requeued, it goes on", cluster.log(jobs["limited"]), re.DOTALL)
    values = yaml.safe_load(config.read_text())
    values["train"]["max_steps"] = 500
    config.write_text(yaml.safe_dump(values))
    whole = one_process(config, tmp_path / "whole", tmp_path / "log")
    assert losses(folders["requeued"]) == whole and losses(folders["lost"]) == whole


def test_the_pipeline_is_submitted(cluster, teacher, tmp_path):
    """Each job behind the one before, the selection as an array; the ids are printed."""
    for stage in (1, 2, 3):
        write_config(tmp_path, stage, teacher, str(tmp_path / "data"))
    environment = {
        "CONFIGS": str(tmp_path),
        "SBATCH_ARGS": f"--begin=now+1hour --output={tmp_path}/%j.log",
        "SBATCH_TRAIN": "--nodes=2",
    }
    printed = dict(
        re.findall(
            r"^(\w+) +(\d+)",
            cluster.run("bash", "launch_pipeline.sh", environment=environment),
            re.MULTILINE,
        )
    )
    assert list(printed) == [
        "preprocess",
        "stage1",
        "candidates",
        "selection",
        "stage2",
        "stage3",
        "evaluation",
    ]
    before = None
    for name, job in printed.items():
        facts = cluster.run("scontrol", "show", "job", "-o", job)
        assert f"JobName={name}" in facts and (
            "Dependency=(null)" in facts if before is None else f"afterok:{before}" in facts
        ), facts
        assert ("NumNodes=2" in facts) == name.startswith("stage"), facts
        if name == "candidates":
            assert "ArrayTaskId=0-7" in facts, facts
        before = job
    cluster.run("scancel", *printed.values())


@pytest.mark.slow
def test_the_pipeline_runs(cluster, teacher_dir, tmp_path):
    """From a corpus to a hybrid whose layers an array of jobs has chosen, each job behind the one
    before."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        lines = (f"def f{(i * j * j) % 91}(x): return x + {(i * 7 + j * 13) % 101}" for j in range(9))
        (tmp_path / "corpus" / f"{i}.py").write_text("\n".join(lines))
    for stage in (1, 2, 3):
        write_config(
            tmp_path,
            stage,
            teacher_dir,
            str(tmp_path / "data" / f"chunked_context{LENGTH}"),
            report_to="none",
        )
    environment = {
        "CONFIGS": str(tmp_path),
        "DATASET": str(tmp_path / "corpus"),
        "HOLDOUT": "0.1",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "SBATCH_ARGS": f"--output={tmp_path}/%x-%j.log --mem=8G --cpus-per-task=4",
        "SBATCH_TRAIN": "--gpus-per-node=1",
        "TASKS": "heldout_perplexity",
        "DATA": str(tmp_path / "data" / f"chunked_context{LENGTH}"),
        "OUTPUT": str(tmp_path / "evaluation"),
    }
    jobs = dict(
        re.findall(
            r"^(\w+) +(\d+)",
            cluster.run("bash", "launch_pipeline.sh", environment=environment),
            re.MULTILINE,
        )
    )
    for name in ("preprocess", "stage1", "selection", "stage2", "stage3", "evaluation"):
        log = lambda name=name: "".join(path.read_text() for path in tmp_path.glob(f"{name}-*.log"))[-3000:]
        assert cluster.wait(jobs[name]) == "COMPLETED", log()
    keep = json.loads((tmp_path / "stage2_ga_s2" / "ranking.json").read_text())["keep"]
    assert len(keep) == 1
    assert {path.name for path in (tmp_path / "stage2_ga_s2").glob("layer_*")} == {
        f"layer_{layer}" for layer in range(4)
    }
    assert (
        StudentForCausalLM.from_pretrained(tmp_path / "stage3" / "converted-hf").config.keep_full_attention_layers
        == keep
    )
    assert "heldout_perplexity" in (tmp_path / "evaluation" / "results.md").read_text()
    # The same selection from one command, whose jobs train only what is missing.
    out = tmp_path / "again"
    (out / "layer_0").mkdir(parents=True)
    shutil.copy(tmp_path / "stage2_ga_s2" / "layer_0" / "heldout_kl.json", out / "layer_0")
    command = ["--cfg", tmp_path / "stage2.yaml", "--ratio", "0.25", "--output_dir", out, "--slurm"]
    shown = cluster.run("python", "layer_selection/select_layers.py", *command, environment=environment)
    jobs = dict(re.findall(r"^(\w+) +(\d+)", shown, re.MULTILINE))
    assert list(jobs) == ["candidates", "selection"]
    assert cluster.wait(jobs["selection"]) == "COMPLETED", "".join(
        path.read_text() for path in tmp_path.glob("selection-*.log")
    )[-3000:]
    assert json.loads((out / "ranking.json").read_text())["keep"] == keep
    assert {path.parent.name for path in out.glob("layer_*/run")} == {f"layer_{layer}" for layer in (1, 2, 3)}

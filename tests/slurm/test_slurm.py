"""The launch scripts on a real two-node Slurm cluster: training on both nodes, requeues, time
limits, a lost node."""

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
from conftest import options, python_texts, random_teacher, save_tokenizer, write_config
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
LENGTH = 32
SECRET = "hf_PLANTED0123456789abcdefghijklmnopqr"
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")  # states of a job that has not ended


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
        enter = ["nsenter", "-t", str(self.inside), "-m", "-u", "-n", "-p", "env", "-C", str(ROOT)]
        command = [*enter, *map(str, command)]
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
        return self.run("sbatch", "--parsable", output, *sbatch, script, *arguments, environment=environment).strip()

    def fact(self, job, name):
        return re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", "-o", job))[1]

    def log(self, job):
        path = self.folder / f"job-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job, seconds=PATIENCE):
        """The state in which the job has ended."""
        end = time.monotonic() + seconds
        while (state := self.fact(job, "JobState")) in ACTIVE:
            assert time.monotonic() < end, f"{state} ({self.fact(job, 'Reason')})\n{self.log(job)[-3000:]}"
            time.sleep(0.3)
        return state

    def wait_for(self, condition, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
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
        """{rank: process} of a run whose command contains `output_dir`, on both nodes."""
        found = {}
        for process in sorted(self._processes(), key=lambda process: process.create_time()):
            try:
                command = process.cmdline()
                if any("--local_rank" in part for part in command) and any(str(output_dir) in part for part in command):
                    found.setdefault(int(process.environ()["RANK"]), process)  # later ones are its child processes
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


def write_corpus(folder):
    folder.mkdir()
    for i, text in enumerate(python_texts(40)):
        (folder / f"{i}.py").write_text(text)


@pytest.fixture(scope="module")
def data(cluster, teacher, tmp_path_factory):
    """Chunks, made by `sbatch launch_preprocess.sh`."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus")
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


# -------------------------------------------------------------------------------------- the scripts
def test_slurm_accepts_the_headers(cluster):
    """As they are, on nodes with 8 GPUs."""
    for script in ("preprocess", "stage1", "stage2", "stage3", "selection"):
        array = ["--array=0-27"] if script == "selection" else []
        output = cluster.run("sbatch", "--test-only", *array, f"launch_{script}.sh", check=False)
        assert re.search("Job .* to start at", output), output


def test_stages_on_two_nodes(cluster, teacher, data, tmp_path):
    """Stage 1 and then stage 2 on two nodes give the losses of one process; no log or file contains
    a key."""
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
    """It fails the job, and the log says on which node and how. No command line contains a key."""
    file = write_config(tmp_path, 1, teacher, data, max_steps=2000, report_to="none")
    job = cluster.submit("launch_stage1.sh", sbatch=["--nodes=2"], CFG=str(file))
    metrics = tmp_path / "stage1" / "metrics.jsonl"
    cluster.wait_for(lambda: metrics.exists() and losses(tmp_path / "stage1"))
    assert not [command for command in cluster.commands() if SECRET in command]
    os.kill(cluster.ranks(tmp_path / "stage1")[1].pid, signal.SIGKILL)
    assert cluster.wait(job) == "FAILED"
    assert re.search("node2, ranks 1 to 1: ended with exit code", cluster.log(job)), cluster.log(job)[-3000:]
    assert "; requeued," not in cluster.log(job)


def reach_the_time_limit(cluster, job):
    """Sets a limit of one to two minutes for a job that trains, so that the signal comes at once."""
    hours, minutes, _ = map(int, cluster.fact(job, "RunTime").split(":"))
    cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={60 * hours + minutes + 2}")
    cluster.wait_for(lambda: int(cluster.fact(job, "Restarts")) >= 1)
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")  # so that it happens only once


def lose_the_node(cluster, job):
    """Takes down node2, where the job runs; the job must complete on node1."""
    assert cluster.fact(job, "NodeList") == "node2"
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)[-3000:]
        assert cluster.fact(job, "NodeList") == "node1"
    finally:
        cluster.run("scontrol", "update", "nodename=node2", "state=resume")


def test_requeued_limited_cancelled_and_on_a_lost_node(cluster, teacher_dir, data, tmp_path):
    """Four jobs at a time: all but the cancelled one resume by themselves, and give the losses of
    an uninterrupted run."""
    # Enough that each is still training when it is interrupted, however slow Slurm and the others are.
    steps = {"requeued": 500, "limited": 3000, "cancelled": 100_000, "lost": 500}
    jobs = {}
    folders = {name: tmp_path / name for name in steps}
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

    def submit(name, gpus, *sbatch):
        overrides = [f"train.output_dir={folders[name]}", f"train.max_steps={steps[name]}"]
        sbatch = [*sbatch, f"--gpus-per-node={gpus}", "--mem=8G", "--cpus-per-task=4"]
        jobs[name] = cluster.submit("launch_stage1.sh", *overrides, CFG=str(config), sbatch=sbatch)

    submit("limited", 1, "--nodelist=node1", "--time=60", "--signal=B:USR1@120")
    cluster.wait_for(lambda: saved("limited"))
    reach_the_time_limit(cluster, jobs["limited"])
    # The cancelled one holds most of node1's GPUs, so that the lost one starts on node2, and finds
    # free GPUs on node1 later.
    submit("cancelled", 6, "--nodelist=node1")
    cluster.wait_for(lambda: cluster.fact(jobs["cancelled"], "JobState") == "RUNNING")
    submit("requeued", 1, "--nodelist=node1")
    submit("lost", 6)
    cluster.wait_for(lambda: saved("cancelled"))
    cluster.run("scancel", jobs["cancelled"])
    cluster.wait_for(lambda: saved("requeued"))
    cluster.run("scontrol", "requeue", jobs["requeued"])
    cluster.wait_for(lambda: saved("lost"))
    lose_the_node(cluster, jobs["lost"])
    for name in ("requeued", "limited"):
        assert cluster.wait(jobs[name]) == "COMPLETED", cluster.log(jobs[name])[-3000:]
    assert cluster.fact(jobs["cancelled"], "JobState") == "CANCELLED"
    assert "; requeued," not in cluster.log(jobs["cancelled"])
    for name in ("requeued", "limited", "lost"):
        assert int(cluster.fact(jobs[name], "Restarts")) >= 1
        assert re.search("resuming from .*checkpoint-", cluster.log(jobs[name]))
        assert sorted(losses(folders[name])) == [1, *range(5, steps[name] + 1, 5)]
    assert re.search("SIGUSR1: stopped at step .*; requeued, it will resume", cluster.log(jobs["limited"]), re.DOTALL)
    values = yaml.safe_load(config.read_text())
    values["train"]["max_steps"] = 500
    config.write_text(yaml.safe_dump(values))
    uninterrupted = one_process(config, tmp_path / "uninterrupted", tmp_path / "log")
    assert losses(folders["requeued"]) == uninterrupted
    assert losses(folders["lost"]) == uninterrupted


def submitted(output):
    """{name: job id} that launch_pipeline.sh printed."""
    return dict(re.findall(r"^(\w+) +(\d+)", output, re.MULTILINE))


def test_the_pipeline_is_submitted(cluster, teacher, tmp_path):
    """Each job depends on the one before, the selection is an array, and the ids are printed."""
    for stage in (1, 2, 3):
        write_config(tmp_path, stage, teacher, str(tmp_path / "data"))
    environment = {
        "CONFIGS": str(tmp_path),
        "SBATCH_ARGS": f"--begin=now+1hour --output={tmp_path}/%j.log",
        "SBATCH_TRAIN": "--nodes=2",
    }
    printed = submitted(cluster.run("bash", "launch_pipeline.sh", environment=environment))
    assert " ".join(printed) == "preprocess stage1 candidates selection stage2 stage3 evaluation"
    before = None
    for name, job in printed.items():
        facts = cluster.run("scontrol", "show", "job", "-o", job)
        dependency = f"afterok:{before}" if before else "Dependency=(null)"
        assert f"JobName={name}" in facts and dependency in facts, facts
        assert ("NumNodes=2" in facts) == name.startswith("stage"), facts
        if name == "candidates":
            assert "ArrayTaskId=0-7" in facts, facts
        before = job
    cluster.run("scancel", *printed.values())


@pytest.mark.slow
def test_the_pipeline_runs(cluster, teacher_dir, tmp_path):
    """From a corpus to a hybrid whose layers were chosen by a job array; then the selection alone
    again."""
    write_corpus(tmp_path / "corpus")
    data = str(tmp_path / "data" / f"chunked_context{LENGTH}")
    for stage in (1, 2, 3):
        write_config(tmp_path, stage, teacher_dir, data, report_to="none")
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
        "DATA": data,
        "OUTPUT": str(tmp_path / "evaluation"),
    }

    def log(name):
        return "".join(path.read_text() for path in tmp_path.glob(f"{name}-*.log"))[-3000:]

    jobs = submitted(cluster.run("bash", "launch_pipeline.sh", environment=environment))
    for name in ("preprocess", "stage1", "selection", "stage2", "stage3", "evaluation"):
        assert cluster.wait(jobs[name]) == "COMPLETED", log(name)
    keep = json.loads((tmp_path / "stage2_ga_s2" / "ranking.json").read_text())["keep"]
    assert len(keep) == 1
    tried = {path.name for path in (tmp_path / "stage2_ga_s2").glob("layer_*")}
    assert tried == {"layer_0", "layer_1", "layer_2", "layer_3"}
    hybrid = StudentForCausalLM.from_pretrained(tmp_path / "stage3" / "converted-hf")
    assert hybrid.config.keep_full_attention_layers == keep
    assert "held-out perplexity" in (tmp_path / "evaluation" / "results.md").read_text()
    # The same selection from one command, whose jobs train only what is missing.
    out = tmp_path / "again"
    (out / "layer_0").mkdir(parents=True)
    shutil.copy(tmp_path / "stage2_ga_s2" / "layer_0" / "heldout_kl.json", out / "layer_0")
    command = [*options(cfg=tmp_path / "stage2.yaml", ratio=0.25, output_dir=out), "--method", "ga_s2", "--slurm"]
    shown = cluster.run("python", "layer_selection/select_layers.py", *command, environment=environment)
    jobs = submitted(shown)
    assert list(jobs) == ["candidates", "selection"]
    assert cluster.wait(jobs["selection"]) == "COMPLETED", log("selection")
    assert json.loads((out / "ranking.json").read_text())["keep"] == keep
    assert {path.parent.name for path in out.glob("layer_*/run")} == {f"layer_{layer}" for layer in (1, 2, 3)}

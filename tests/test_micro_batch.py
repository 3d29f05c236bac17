"""train.micro_batch_size auto: what is chosen, and that the run then is the one with that number.

Runs go through train.py on the CPU, with a stand-in for the GPU's memory.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from runtime.batch_plan import batch_plan
from runtime.config import ConfigError, load_config
from runtime.context import RunContext
from runtime.data import open_chunks
from runtime.guard import memory_advice
from runtime.run_folder import check_run_folder, record_run, with_micro_batch_size_of_run

import pytest
import torch
from conftest import LENGTH, write_config
from processes import import_once, start
from safetensors.torch import load_file

import micro_batch
import train
from layer_selection.candidate_training import check_joint_training
from micro_batch import Trial

ROOT = Path(__file__).parent.parent
MIB = 2**20


class StandIn:
    """A GPU of 100 MiB of which a pass takes 20 per sequence, and whose memory runs out in a pass of
    more than `most` sequences. Tokens per second double with the size."""

    room = 100 * MIB

    def __init__(self, most):
        self.most = most
        self.sizes = []

    def measure(self, run):
        run()
        return 20 * MIB * self.sizes[-1], 1 / self.sizes[-1]

    def release(self):
        print("measured", *self.sizes)

    def before_forward(self, model, args, inputs):
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def with_stand_in(*most):
    """A hook for `start`, after which rank i measures with a StandIn(most[i])."""

    def hook(rank):
        gpu = StandIn(most[rank])
        found = micro_batch._trials

        def trials(ctx, stage, *rest):
            watched = stage.model.register_forward_pre_hook(gpu.before_forward, with_kwargs=True)
            tried = found(ctx, stage, *rest)
            watched.remove()
            return tried

        micro_batch._trials = trials
        micro_batch.memory_of = lambda device: gpu

    return hook


def killed_after_the_first_checkpoint(rank):
    import hf_trainer

    hf_trainer.Guard.on_save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def never_measured(rank):
    micro_batch.memory_of = lambda device: sys.exit("measured again")


def both(*hooks):
    return lambda rank: [hook(rank) for hook in hooks]


def train_all(folder, teacher, data):
    """Trains what the tests look at, in processes forked from a fresh one."""
    import_once()
    folder = Path(folder)
    codes = {}

    def run(name, stage, *options, batch_size=8, **settings):
        place = folder / name
        place.mkdir(exist_ok=True)
        before = {2: "auto/stage1", 3: "ranks/stage2"}
        init = {"student_init_ckpt": f"{folder}/{before[stage]}/converted-hf"} if stage > 1 else {}
        steps = {"max_steps": 2, "save_steps": 1, "eval_steps": 2}
        file = write_config(place, stage, teacher, data, batch_size=batch_size, **steps, **init)
        job = start(file, *options, log=place / f"log{len(codes)}", **settings)
        codes[f"{name}{len(codes)}"] = job.wait()
        (place / f"out{len(codes)}").write_text(job.output())

    auto = "train.micro_batch_size=auto"
    run("auto", 1, auto, hook=both(with_stand_in(6), killed_after_the_first_checkpoint))
    run("auto", 1, auto, hook=never_measured)
    run("number", 1, "train.micro_batch_size=4")
    run("ranks", 2, auto, "train.kd_teacher_shard=always", ranks=2, hook=with_stand_in(99, 2))
    run("full", 1, auto, hook=with_stand_in(0))
    run("sharded", 3, auto, batch_size=2, ranks=2, hook=with_stand_in(9, 0))
    (folder / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher_dir, data_dir):
    """(the folder of `train_all`, the exit codes in its order)."""
    folder = tmp_path_factory.mktemp("runs")
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_micro_batch; test_micro_batch.train_all(*sys.argv[1:])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, str(folder), teacher_dir, data_dir]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, json.loads((folder / "codes.json").read_text())


def printed(folder):
    return "\n".join(file.read_text() for file in sorted(folder.glob("out*")))


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def resolved(folder):
    return load_config(folder / "config.yaml").train.micro_batch_size


def test_the_largest_that_fits_is_chosen_and_kept_when_the_run_is_killed_and_resumed(runs):
    """8 run out of memory."""
    folder, codes = runs
    assert codes["auto0"] == -signal.SIGKILL and codes["auto1"] == 0
    out = printed(folder / "auto")
    assert "measured 1 2 4 8\n" in out
    assert re.search(r"micro_batch_size: auto: 4 .*1: 32 tokens/s per GPU, .* 4: 512 .* GiB; 8: out of memory\)", out)
    assert "resuming from" in out and "measured again" not in out
    assert resolved(folder / "auto" / "stage1") == 4


def test_the_run_is_the_one_with_that_number(runs):
    """To the bit: measuring leaves no trace in weights, gradients or the order of the data."""
    folder, _ = runs
    auto, number = (folder / name / "stage1" for name in ("auto", "number"))
    assert len(losses(auto)) == 2
    assert losses(auto) == losses(number)
    weights = load_file(number / "converted-hf" / "model.safetensors")
    for name, tensor in load_file(auto / "converted-hf" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_ranks_agree(runs):
    """Rank 1 has memory for 2 sequences, rank 0 for all 4 of its share; ZeRO-2 and a sharded
    teacher."""
    folder, codes = runs
    assert codes["ranks3"] == 0
    out = printed(folder / "ranks")
    assert "measured 1 2 4\n" in out and "auto: 2 (" in out and "4: out of memory" in out
    assert resolved(folder / "ranks" / "stage2") == 2
    assert len(losses(folder / "ranks" / "stage2")) == 2


def test_no_size_fits(runs):
    """One line, on all ranks, and no run folder; with sharded weights it says why a number may
    work."""
    folder, codes = runs
    assert codes["full4"] == codes["sharded5"] == 1
    (line,) = (line for line in printed(folder / "full").splitlines() if "error" in line)
    assert "out of GPU memory; try train.optimizer=adamw_8bit; more GPUs" in line
    lines = [line for line in printed(folder / "sharded").splitlines() if "error" in line]
    assert len(lines) == 2
    assert all(
        re.search(r"micro_batch_size: auto is measured with the whole weights .*; set a number$", x) for x in lines
    )
    for place in (folder / "full" / "stage1", folder / "sharded" / "stage3"):
        assert not any(path.name[0] != "." for path in place.glob("*"))


# ------------------------------------------------------------------------ in this process
@pytest.mark.parametrize(
    "trials, chosen",
    [
        ([(1, 10, True, 100), (2, 20, True, 190), (4, 40, True, 240)], 4),
        ([(1, 10, True, 100), (2, 20, True, 190), (4, 40, True, 195)], 2),  # 4 is not worth its memory
        ([(1, 10, True, 100), (2, 20, True, 99), (4, 40, True, 190)], 4),  # nor does 2 hide it
        ([(1, 10, True, 100), (2, 20, False, 190)], 1),
        ([(1, 10, False, 100)], 1),  # the margin is a wish
    ],
)
def test_what_is_chosen(trials, chosen):
    trials = [Trial(*trial) for trial in trials]
    assert micro_batch._choice(trials) == chosen
    warned = "none leaves 8% of the GPU's memory free" in micro_batch._report(chosen, 40, trials)
    assert warned == all(trial.need > 40 or not trial.fits for trial in trials)


def test_a_size_must_fit_all_ranks():
    ranks = [Trial(2, 20, True, 100.0), Trial(2, 30, False, 90.0)]
    assert micro_batch._on_all_ranks(ranks) == Trial(2, 30, False, 90.0)
    assert micro_batch._on_all_ranks([*ranks, Trial(2, None, False, 0.0)]) == Trial(2, None, False, 0.0)


def context(cfg, world_size=1, chunks=None, **changes):
    return RunContext(cfg, batch_plan(cfg, world_size), chunks, 0, print, **changes)


@pytest.mark.parametrize(
    "zero_stage, world_size, options, expected",
    [
        (1, 1, ["train.cuda_graphs=false"], 12),
        (1, 1, [], 12 + 2 + 6),  # graphs
        (1, 1, ["train.optimizer=adamw_8bit", "train.cuda_graphs=false"], 6),
        (1, 4, [], 12 / 4 + 2 + 6 / 4),
        (2, 4, ["train.cuda_graphs=false"], 12 / 4 - 2 + 2 / 4),
        (3, 4, [], 12 / 4 - 2 + 2 / 4),  # ZeRO-3 has no graphs
    ],
)
def test_what_the_engine_adds(tmp_path, teacher_dir, zero_stage, world_size, options, expected):
    """Bytes per trained parameter in bf16; frozen ones add nothing."""
    cfg = load_config(write_config(tmp_path, 1, teacher_dir, "none"), options)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).bfloat16()
    model[1].requires_grad_(False)
    model.config = SimpleNamespace(rope_parameters={"rope_type": "default"})
    chunks = SimpleNamespace(has_documents=False)
    ctx = context(cfg, world_size, chunks, device="cuda", zero_stage=zero_stage)
    added = micro_batch._engine_bytes(ctx, SimpleNamespace(model=model), sharded_teacher=False)
    assert added == expected * 72


def test_sizes_leave_enough_chunks(tmp_path, teacher_dir, data_dir):
    chunks = open_chunks(data_dir, LENGTH, document_mask="auto")
    chunks = dataclasses.replace(chunks, heldout=chunks.heldout.select(range(7)))
    file = write_config(tmp_path, 1, teacher_dir, data_dir, micro_batch_size="auto", batch_size=12)
    ctx = context(load_config(file), chunks=chunks)
    assert micro_batch._sizes(ctx) == [1, 2, 3, 4, 6]
    assert micro_batch._sizes(dataclasses.replace(ctx, chunks=dataclasses.replace(chunks, heldout=None)))[-1] == 12
    assert micro_batch._sizes(context(load_config(file), 2, chunks)) == [1, 2, 3]
    few = len(chunks.train) // 2
    assert micro_batch._sizes(context(load_config(file, [f"train.calibrate_init={few}"]), chunks=chunks)) == [1, 2]


def test_a_cpu_has_micro_batches_of_one_sequence(tmp_path, teacher_dir, data_dir, capsys):
    file = write_config(tmp_path, 1, teacher_dir, data_dir, micro_batch_size="auto", eval_batches=2)
    ctx = train.prepare(train.parse_args(["--cfg", str(file)]))
    assert len(ctx.chunks.heldout) > 2  # kept until the size is known
    measured = micro_batch.with_measured_micro_batch(ctx, None)
    assert measured.cfg.train.micro_batch_size == measured.plan.micro_batch_size == 1
    assert len(measured.chunks.heldout) == 2
    assert "train.micro_batch_size: auto: 1 on a CPU" in capsys.readouterr().out


def test_a_run_keeps_its_number(tmp_path, teacher_dir, data_dir):
    """With other processes the largest number up to it that divides their share; another number
    may be set."""
    file = write_config(tmp_path, 1, teacher_dir, data_dir, batch_size=24)
    auto = load_config(file, ["train.micro_batch_size=auto"])
    assert with_micro_batch_size_of_run(auto, 1) is auto
    record_run(load_config(file, ["train.micro_batch_size=8"]), ROOT, 0)
    check_run_folder(auto)
    check_run_folder(load_config(file, ["train.micro_batch_size=2"]))
    kept = {world: with_micro_batch_size_of_run(auto, world).train.micro_batch_size for world in (1, 2, 3, 4, 5, 6, 24)}
    assert kept == {1: 8, 2: 6, 3: 8, 4: 6, 5: "auto", 6: 4, 24: 1}
    with pytest.raises(ConfigError, match=r"train.batch_size: 24 must be a multiple .*\(1 x 5 = 5\)"):
        batch_plan(with_micro_batch_size_of_run(auto, 5), 5)
    assert with_micro_batch_size_of_run(load_config(file, ["train.micro_batch_size=3"]), 1).train.micro_batch_size == 3


@pytest.mark.parametrize(
    "value, message",
    [
        ("many", r"'many' must be a number of at least 1 or one of auto$"),
        ("0", "0 must be at least 1"),
        ("1.5", "1.5 is of type float; it must be int or str"),
        ("null", "None is of type NoneType"),
    ],
)
def test_what_is_no_size(tmp_path, teacher_dir, value, message):
    with pytest.raises(ConfigError, match=f"train.micro_batch_size: {message}"):
        load_config(write_config(tmp_path, 1, teacher_dir, "none"), [f"train.micro_batch_size={value}"])


def test_a_dry_run_says_what_will_happen(tmp_path, teacher_dir, data_dir, capsys):
    file = write_config(tmp_path, 1, teacher_dir, data_dir, micro_batch_size="auto")
    train.prepare(train.parse_args(["--cfg", str(file), "--dry-run"]))
    assert "devices: 1, each 4 sequences per step, in micro-batches measured before" in capsys.readouterr().out
    record_run(load_config(file, ["train.micro_batch_size=2"]), ROOT, 0)
    train.prepare(train.parse_args(["--cfg", str(file), "--dry-run"]))
    assert "devices: 1, each 2 x 2 sequences per step" in capsys.readouterr().out


def test_candidates_that_train_jointly_need_a_number(tmp_path, teacher_dir):
    file = write_config(tmp_path, 2, teacher_dir, "none", micro_batch_size="auto")
    with pytest.raises(ConfigError, match="^train.micro_batch_size: auto: .* set a number .*--full_runs$"):
        check_joint_training(load_config(file))
    check_joint_training(load_config(file, ["train.micro_batch_size=2"]))


def test_advice_that_needs_a_new_folder_says_so(tmp_path, teacher_dir, data_dir):
    """A folder with the config of a run refuses another optimiser, even before a checkpoint."""
    file = write_config(tmp_path, 2, teacher_dir, data_dir)
    cfg = load_config(file)
    ctx = dataclasses.replace(context(cfg, 2), zero_stage=2)

    def advice():
        with pytest.raises(ConfigError) as error, memory_advice(ctx, lambda: False):
            raise torch.OutOfMemoryError
        return str(error.value)

    assert "train.optimizer=adamw_8bit;" in advice() and "train.zero_stage=3;" in advice()
    record_run(cfg, ROOT, 0)
    assert "train.optimizer=adamw_8bit with a new train.output_dir;" in advice()
    assert "train.zero_stage=3 with a new train.output_dir;" in advice()
    with pytest.raises(ConfigError, match="holds another run"):
        check_run_folder(load_config(file, ["train.optimizer=adamw_8bit"]))
    folder = tmp_path / "new"
    check_run_folder(load_config(file, ["train.optimizer=adamw_8bit", f"train.output_dir={folder}"]))


def test_a_dry_run_counts_the_gradients_of_cuda_graphs(tmp_path, teacher_dir, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    shares = {}
    whole = ["data.document_mask=false"]
    for graphs in ("true", "false"):
        train.prepare(train.parse_args(["--cfg", str(file), "--dry-run", f"train.cuda_graphs={graphs}", *whole]))
        out = capsys.readouterr().out
        shares[graphs] = re.search(r"activations \((.*)\)", out)[1]
    assert "CUDA graphs" not in shares["false"]
    *_, gradients, _, graphs = shares["true"].split(", ")
    assert graphs.removeprefix("CUDA graphs ") == gradients.removeprefix("gradients ")

"""What recipes choose: learning rates by size; in stage 2 which parts train, another teacher, which divergence, and stored
teacher outputs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from runtime.batch_plan import batch_plan
from runtime.config import PARTS, load_config
from runtime.data import collate, model_inputs, open_chunks, read_batch
from runtime.recipes import rate_text, rates_warning, size_in_name
from runtime.teacher_outputs import RowsWithOutputs, open_arrays

import pytest
import torch
from conftest import KEPT, LENGTH, SHAPE, make_chunks, python_texts, random_teacher, save_tokenizer, write_config
from torch.nn.functional import log_softmax

import optim
import preflight
import store_teacher
import train
from convert import load_teacher
from distill_model import StudentForCausalLM, is_student_attention
from layer_selection.bench import Bench
from layer_selection.candidate_training import Candidate, JointTraining, MasterAdamW
from layer_selection.gates import GateTraining
from layer_selection.stopping_rule import StoppingRule
from stages import distillation_loss, load_kd_teacher

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def start_dir(tmp_path_factory, teacher_dir):
    """An all-linear student, as stage 1 exports it."""
    folder = tmp_path_factory.mktemp("stage1") / "converted-hf"
    torch.manual_seed(1)
    StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0].save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """A wider and shallower teacher of another family, with the same tokenizer and more padding in
    its vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": SHAPE["vocab_size"] + 16}
    random_teacher(folder, "llama", **shape)
    save_tokenizer(folder)
    return str(folder)


def prepare(file, *options):
    return train.prepare(train.parse_args(["--cfg", str(file), *options]))


def config(tmp_path, teacher_dir, data_dir, start_dir, stage=2, **changes):
    """Chunks are read whole, if not told otherwise."""
    changes = {"document_mask": False, "student_init_ckpt": start_dir} | changes
    return write_config(tmp_path, stage, teacher_dir, data_dir, **changes)


def metrics(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def heldout_rows(data_dir, count):
    chunks = open_chunks(data_dir, LENGTH).heldout.with_format("numpy")
    return collate([chunks[i] for i in range(count)])["input_ids"]


# ------------------------------------------------------------------------ learning rates
PUBLISHED = {"linear attention": 1e-4, "the rest": 1e-5}
OF_135M = {"linear attention": 5e-4, "the rest": 5e-5}


@pytest.mark.parametrize(
    "stage, parameters, rates, far",
    [
        (2, 1_543_714_304, PUBLISHED, []),
        (2, 596_049_920, PUBLISHED, []),  # nearer to 1.5B than to 135M
        (2, 8_000_000_000, OF_135M, ["linear attention 5e-4 instead of 1e-4", "the rest 5e-5 instead of 1e-5"]),
        (2, 134_515_008, OF_135M, []),
        (2, 134_515_008, {"attention": 1.5e-3, "the rest": 1.7e-5}, []),  # within three times
        (2, 134_515_008, PUBLISHED, ["linear attention 1e-4 instead of 5e-4", "the rest 1e-5 instead of 5e-5"]),
        (2, 134_515_008, PUBLISHED | {"linear attention": 5e-4}, ["the rest 1e-5 instead of 5e-5"]),
        (1, 134_515_008, {"linear attention": 1e-3}, []),
        (1, 134_515_008, {"linear attention": 2.5e-4}, ["linear attention 2.5e-4 instead of 1e-3"]),
        (3, 7e9, {"linear attention": 1e-5, "the rest": 1e-5}, []),
        (3, 7e9, {"linear attention": 1e-4, "the rest": 1e-5}, ["linear attention 1e-4 instead of 1e-5"]),
    ],
)
def test_learning_rates_far_from_those_of_the_size_are_named(stage, parameters, rates, far):
    warning = rates_warning(stage, parameters, rates)
    if far:
        assert warning.startswith("warning: train.lr: for ") and f": {', '.join(far)}; see docs" in warning
    else:
        assert warning is None


def test_rates_and_sizes_in_words():
    assert [rate_text(rate) for rate in (1e-5, 5e-4, 2.5e-4, 1e-3, 0.3)] == ["1e-5", "5e-4", "2.5e-4", "1e-3", "3e-1"]
    assert [size_in_name(name) for name in ("qwen2.5_1.5b", "smollm2_135m")] == [1.5e9, 135e6]


def test_a_dry_run_warns_of_learning_rates(tmp_path, teacher_dir, data_dir, start_dir, capsys, monkeypatch):
    """One line, of what trains; none where the rates are those of the size."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = config(tmp_path, teacher_dir, data_dir, start_dir, lr=1e-4, lr_attn=1e-3)
    warnings = []
    for options in ([], ["train.lr=1e-5"], ["train.lr=1e-5", "train.train_only=[linear_attention]"]):
        prepare(file, "--dry-run", *options)
        warnings.append([line for line in capsys.readouterr().out.splitlines() if "warning: train.lr" in line])
    assert [len(lines) for lines in warnings] == [0, 1, 0]
    assert "the rest 1e-5 instead of 1e-4" in warnings[1][0]


# ------------------------------------------------------------------------ parts
def part_of(model, name):
    if ".attn." in name:
        return (
            "linear_attention"
            if is_student_attention(model.model.layers[int(name.split(".")[2])].attn)
            else "kept_attention"
        )
    return next(part for part, word in (("norms", "norm"), ("mlp", "mlp"), ("embeddings", "")) if word in name)


@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False)])
def test_every_parameter_is_in_one_part(tmp_path, kind, tied):
    random_teacher(tmp_path, kind, tie_word_embeddings=tied)
    model = StudentForCausalLM.from_teacher(load_teacher(tmp_path), "gdn_v7", KEPT)[0]
    names = {id(p): name for name, p in model.named_parameters()}
    parts = optim.parts_of(model)
    assert list(parts) == list(PARTS)
    found = {names[id(p)]: part for part, params in parts.items() for p in params}
    assert found == {name: part_of(model, name) for name in names.values()}
    assert sum(map(len, parts.values())) == len(names)


@pytest.mark.parametrize(
    "option, value, trained",
    [
        ("train_only", ["linear_attention"], {"linear_attention"}),
        ("freeze", ["mlp", "embeddings"], {"linear_attention", "kept_attention", "norms"}),
        ("train_only", [], set(PARTS)),
    ],
)
def test_what_is_frozen_has_no_gradient_or_optimiser_state(
    tmp_path, teacher_dir, data_dir, start_dir, option, value, trained
):
    cfg = load_config(config(tmp_path, teacher_dir, data_dir, start_dir, **{option: value}))
    model = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", KEPT)[0]
    frozen = optim.freeze_parts(model, cfg)
    assert set(frozen) == set(PARTS) - trained
    assert sum(frozen.values()) == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    optimizer = optim.get_optimizer(model, cfg)
    model(torch.randint(90, (2, 16)), labels=torch.randint(90, (2, 16)), use_cache=False)["loss"].backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    with_state = {id(p) for p in optimizer.state}
    for name, p in model.named_parameters():
        trains = part_of(model, name) in trained
        assert (p.grad is not None) == (id(p) in with_state) == trains, name
        assert torch.equal(p, before[name]) != trains, name


def test_frozen_parts_are_shown_and_cost_no_memory(tmp_path, teacher_dir, data_dir, start_dir, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = config(tmp_path, teacher_dir, data_dir, start_dir)
    prepare(file, "--dry-run")
    whole = capsys.readouterr().out
    prepare(file, "--dry-run", "train.freeze=[mlp, embeddings]")
    part = capsys.readouterr().out
    for name in ("mlp", "embeddings"):
        assert f"{name}: frozen" in part and f"{name}: frozen" not in whole
    shares = [
        re.search(r"weights (\S+), .*gradients (\S+), optimiser (\S+?)[,)]", out).groups() for out in (whole, part)
    ]
    assert shares[0][0] == shares[1][0] and all(float(a) >= float(b) for a, b in zip(*shares))
    model = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", KEPT)[0]
    cfg = load_config(file, ["train.freeze=[mlp, embeddings]"])
    frozen = sum(optim.freeze_parts(model, cfg).values())
    ctx = SimpleNamespace(cfg=cfg, world_size=1, log=print, chunks=SimpleNamespace(has_documents=False))
    memory = preflight._memory_per_gpu(ctx, model, 0, 1, "cpu")
    assert memory["weights"] == 4 * model.num_parameters()
    assert memory["gradients"] == 4 * (model.num_parameters() - frozen) == memory["optimiser"] / 3


def test_parts_that_the_model_lacks_are_refused(tmp_path, teacher_dir, data_dir, start_dir, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = config(tmp_path, teacher_dir, data_dir, start_dir, train_only=["kept_attention"])
    with pytest.raises(
        ValueError, match="train.train_only: kept_attention: 0 of 4 layers keep full attention, so this"
    ):
        prepare(file, "student_model.keep_full_attention_layers=[]")
    assert not (tmp_path / "stage2").exists()


# ------------------------------------------------------------------------ another teacher
def test_a_larger_teacher_gives_its_distribution_over_the_students_vocabulary(
    tmp_path, teacher_dir, data_dir, start_dir, other_teacher
):
    from transformers import AutoModelForCausalLM

    size = SHAPE["vocab_size"]
    file = config(tmp_path, teacher_dir, data_dir, start_dir)
    cfg = load_config(file, [f"teacher_model.distill_from={other_teacher}"])
    teacher = load_kd_teacher(cfg, torch.float32, size).eval()
    ids = torch.randint(90, (2, 16))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(other_teacher)(ids).logits
        found = teacher(ids, use_cache=False).logits
    assert isinstance(teacher.lm_head.weight, torch.nn.Parameter) and len(teacher.lm_head.weight) == size
    torch.testing.assert_close(found, logits[..., :size], rtol=1e-4, atol=1e-4)


def test_teachers_that_do_not_fit_are_refused_before_anything_runs(
    tmp_path, teacher_dir, data_dir, start_dir, monkeypatch
):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = config(tmp_path, teacher_dir, data_dir, start_dir)
    for name, extra, size in (("tokens", "zzz", 96), ("small", None, 91), ("none", None, 96)):
        random_teacher(tmp_path / name, "llama", vocab_size=size)
        if name != "none":
            save_tokenizer(tmp_path / name, extra=extra)
    cases = {
        "tokens": r"distill_from: '.*tokens' has another tokenizer than '.*' \(they differ at 'zzz'\); name a teacher",
        "small": "distill_from: '.*small' has a vocabulary of 91, fewer than the student's 96; name a teacher",
        "none": "teacher_model.distill_from: '.*none' has no tokenizer that loads",
        "missing": "'.*missing' is neither a folder",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            prepare(file, f"teacher_model.distill_from={tmp_path / name}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "stage2").exists()


def test_another_teacher_has_no_effect_in_other_stages(tmp_path, teacher_dir, data_dir, other_teacher):
    cfg = load_config(write_config(tmp_path, 1, teacher_dir, data_dir), [f"teacher_model.distill_from={other_teacher}"])
    assert preflight.options_without_effect(cfg) == ["teacher_model.distill_from: has no effect in stage 1"]


@pytest.mark.slow
@pytest.mark.parametrize("zero, ranks", [(2, 2), (3, 2), (1, 1)])
def test_a_run_that_trains_parts_on_another_teacher(
    tmp_path, teacher_dir, data_dir, start_dir, other_teacher, zero, ranks
):
    """The held-out loss before the first step is the KL to the other teacher; frozen weights are
    exported unchanged; on one process the passes are replayed as graphs; it resumes."""
    from test_cuda_graphs import run
    from test_train import launch

    changes = {"freeze": ["mlp", "embeddings"], "zero_stage": zero, "eval_batches": 2}
    file = config(tmp_path, teacher_dir, data_dir, start_dir, **changes)
    options = [f"teacher_model.distill_from={other_teacher}"]
    out = run(file, *options, "train.cuda_graphs=true") if ranks == 1 else launch(file, *options, processes=ranks)
    assert "frozen: " in out and "of mlp" in out
    folder = tmp_path / "stage2"
    student = (
        StudentForCausalLM.from_pretrained(start_dir).restore_full_attention(load_teacher(teacher_dir), KEPT).eval()
    )
    teacher = load_kd_teacher(load_config(file, options), torch.float32, SHAPE["vocab_size"]).eval()
    ids = heldout_rows(data_dir, 2 * ranks)
    with torch.no_grad():
        ours, theirs = (log_softmax(m(ids, use_cache=False).logits.double(), -1) for m in (student, teacher))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert metrics(folder, "eval_loss")[0] == pytest.approx(expected, rel=1e-4)
    assert metrics(folder, "eval_loss")[-1] < expected
    trained = StudentForCausalLM.from_pretrained(folder / "converted-hf").state_dict()
    for name, before in student.state_dict().items():
        frozen = part_of(student, name) in ("mlp", "embeddings")
        assert torch.equal(trained[name], before) == frozen, name


# ------------------------------------------------------------------------ stored teacher outputs
TOP = 12


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teacher_dir, data_dir, start_dir):
    """Folder of the stored outputs of the teacher, and the config they were made with."""
    folder = tmp_path_factory.mktemp("stored")
    file = config(folder, teacher_dir, data_dir, start_dir, kl="topk", kl_top_k=TOP, kl_temperature=1.5)
    store_teacher.main(["--cfg", str(file), "--output_dir", str(folder / "outputs"), "--batch_size", "3"])
    return folder / "outputs", file


def test_stored_outputs_are_those_of_the_teacher(stored, teacher_dir, data_dir):
    """Against transformers' logits in float64: masses to fp16, in every split."""
    from transformers import AutoModelForCausalLM

    folder, _ = stored
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    chunks = open_chunks(data_dir, LENGTH)
    for split, rows in (("train", chunks.train), ("heldout", chunks.heldout)):
        arrays = open_arrays(folder, split)
        assert arrays["teacher_ids"].shape == (len(rows), LENGTH, TOP) and arrays["teacher_ids"].dtype == "uint16"
        ids = torch.as_tensor(rows[:]["input_ids"])
        with torch.no_grad():
            exact = (teacher(ids).logits.double() / 1.5).log_softmax(-1)
        found = torch.as_tensor(arrays["teacher_ids"].astype("int64"))
        values = torch.as_tensor(arrays["teacher_values"].astype("float64"))
        torch.testing.assert_close(values, exact.topk(TOP, -1).values, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values, exact.gather(-1, found), rtol=1e-3, atol=1e-3)
        rest = 1 - exact.topk(TOP, -1).values.exp().sum(-1)
        torch.testing.assert_close(
            torch.as_tensor(arrays["teacher_log_rest"].astype("float64")).exp(), rest, rtol=1e-2, atol=1e-4
        )


def test_stored_outputs_give_the_loss_of_the_live_teacher(stored, teacher_dir, data_dir, start_dir):
    """Value to 1e-3 and gradients to 1 % of their norm, the error of fp16."""
    folder, file = stored
    cfg = load_config(file)
    rows = RowsWithOutputs(open_chunks(data_dir, LENGTH).train.with_format("numpy"), folder, "train")
    batch = collate([rows[i] for i in range(4)])
    teacher = load_teacher(teacher_dir).eval()
    student = StudentForCausalLM.from_pretrained(start_dir)
    loss = distillation_loss(cfg)
    gradients = []
    losses = []
    for live in (True, False):
        student.zero_grad()
        inputs = batch
        if live:
            with torch.no_grad():
                hidden = teacher.model(batch["input_ids"], use_cache=False).last_hidden_state
            inputs = {"input_ids": batch["input_ids"], "teacher_hidden_states": hidden}
            inputs["teacher_head_weight"] = teacher.lm_head.weight
        value = student(**inputs, distillation=loss, use_cache=False)["loss"]
        value.backward()
        losses.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


def test_outputs_are_stored_of_documents_read_alone(tmp_path, teacher_dir, data_dir, start_dir, monkeypatch):
    """Stored and live teacher give the same loss of tokens that are learned, and a run that reads
    chunks whole refuses them."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    values = {"kl": "topk", "kl_top_k": TOP, "document_mask": True}
    file = config(tmp_path, teacher_dir, data_dir, start_dir, **values)
    folder = tmp_path / "outputs"
    store_teacher.main(["--cfg", str(file), "--output_dir", str(folder)])
    chunks = open_chunks(data_dir, LENGTH, document_mask=True)
    stored = read_batch(RowsWithOutputs(chunks.train.with_format("numpy"), folder, "train"), range(4))
    torch.manual_seed(0)
    batch = model_inputs(stored)
    mask = torch.rand(batch["input_ids"].shape) < 0.3
    teacher = load_teacher(teacher_dir).eval()
    student = StudentForCausalLM.from_pretrained(start_dir)
    with torch.no_grad():
        hidden = teacher.model(**batch, use_cache=False).last_hidden_state
        live = batch | {"teacher_hidden_states": hidden, "teacher_head_weight": teacher.lm_head.weight}
        losses = [
            student(**inputs, loss_mask=mask, distillation=distillation_loss(load_config(file)), use_cache=False).loss
            for inputs in (stored, live)
        ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    with pytest.raises(
        ValueError, match="with document_mask True, this run has False; set data.document_mask to true, or"
    ):
        prepare(file, f"teacher_model.outputs={folder}", "data.document_mask=false")


def test_storing_resumes_and_does_nothing_again(stored, tmp_path, monkeypatch, capsys):
    folder, file = stored
    before = (folder / "train.values.npy").stat().st_mtime_ns
    store_teacher.main(["--cfg", str(file), "--output_dir", str(folder)])
    assert "already exists" in capsys.readouterr().out
    assert (folder / "train.values.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="outputs: was made with top_k 12, not 8"):
        store_teacher.main(["--cfg", str(file), "--output_dir", str(folder), "train.kl_top_k=8"])
    monkeypatch.setattr(store_teacher, "SAVE_SECONDS", 0.0)
    outputs = store_teacher.outputs
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return outputs(*args)

    monkeypatch.setattr(store_teacher, "outputs", killed)
    again = ["--cfg", str(file), "--output_dir", str(tmp_path / "again"), "--batch_size", "5"]
    with pytest.raises(KeyboardInterrupt):
        store_teacher.main(again)
    assert not (tmp_path / "again").exists()
    store_teacher.main(again)
    rows = sum(json.loads((folder / "metadata.json").read_text())["rows"].values())
    assert len(calls) <= rows // 5 + 3
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    for array in folder.glob("*.npy"):
        assert (tmp_path / "again" / array.name).stat().st_size == array.stat().st_size
    for split in ("train", "heldout"):
        ours, theirs = open_arrays(tmp_path / "again", split), open_arrays(folder, split)
        assert (ours["teacher_ids"] == theirs["teacher_ids"]).mean() > 0.999


def test_stored_outputs_of_something_else_are_refused(
    stored, tmp_path, teacher_dir, data_dir, start_dir, other_teacher, monkeypatch
):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder, _ = stored
    values = {"kl": "topk", "kl_top_k": TOP, "kl_temperature": 1.5}
    file = config(tmp_path, teacher_dir, data_dir, start_dir, **values)
    fits = f"teacher_model.outputs={folder}"
    assert prepare(file, fits) is not None
    chunks = make_chunks(tmp_path, teacher_dir, python_texts(40))
    copied = tmp_path / "trained"
    shutil.copytree(teacher_dir, copied)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    cases = [
        (
            [fits, "train.kl=forward"],
            "train.kl: forward needs all logits, of which teacher_model.outputs holds the top",
        ),
        ([fits, "train.kl_top_k=8"], "holds outputs with top_k 12, this run has 8; they are of"),
        ([fits, "train.kl_temperature=1"], "holds outputs with temperature 1.5, this run has 1"),
        ([fits, f"data.cache_dir={chunks}"], "holds outputs of another data set than data.cache_dir"),
        ([fits, f"teacher_model.distill_from={other_teacher}"], "holds outputs of another teacher; they are of"),
        ([fits, f"teacher_model.distill_from={copied}"], "holds outputs of another teacher; they are of"),
        ([f"teacher_model.outputs={data_dir}"], "was not written by store_teacher.py"),
        (["teacher_model.outputs=nowhere"], "teacher_model.outputs: nowhere was not written by store_teacher.py"),
    ]
    for overrides, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            prepare(file, *overrides)
        assert "\n" not in str(error.value)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "train.ids.npy").unlink()
    with pytest.raises(ValueError, match="train.ids.npy: missing or damaged; remove .*broken and run store_teacher"):
        prepare(file, f"teacher_model.outputs={broken}")
    with pytest.raises(ValueError, match="is of stage 1; name a stage-2 file"):
        store_teacher.main(["--cfg", str(write_config(tmp_path, 1, teacher_dir, data_dir)), "--output_dir", "x"])
    assert not (tmp_path / "stage2").exists()


def test_a_selection_trains_candidates_on_stored_outputs(stored, start_dir):
    folder, file = stored
    cfg = load_config(file, [f"teacher_model.outputs={folder}"])
    bench = Bench(cfg, 2, 2)
    rounds = JointTraining(bench, StoppingRule(rounds=1), {0: [0]}, -1, folder.parent / "selection")
    ((_, parts),) = rounds.batches(0, 1)
    assert set(parts[0]) == {"input_ids", "teacher_values", "teacher_ids", "teacher_log_rest"}
    candidate = Candidate("one", bench.student.restore_full_attention(bench.teacher, [0]), cfg, batch_plan(cfg, 1))
    candidate.train(1, parts, bench.teacher.lm_head.weight)
    candidate.check_losses()
    with pytest.raises(ValueError, match="teacher_model.outputs: gates train on the teacher's whole distributions"):
        GateTraining(bench, 1, None, folder.parent / "gates")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_stored_outputs(stored, tmp_path, teacher_dir, data_dir, start_dir, ranks):
    """It has the losses of the live teacher and no teacher; on one process as graphs."""
    from test_cuda_graphs import run
    from test_train import launch

    folder, _ = stored
    values = {"kl": "topk", "kl_top_k": TOP, "kl_temperature": 1.5, "eval_batches": 2}
    found = []
    for name, options in (("live", []), ("stored", [f"teacher_model.outputs={folder}"])):
        (tmp_path / name).mkdir()
        file = config(tmp_path / name, teacher_dir, data_dir, start_dir, **values)
        graphs = [*options, "train.cuda_graphs=true"]
        out = run(file, *graphs) if ranks == 1 else launch(file, *options, processes=ranks)
        assert ("teacher: replicated" in out) == (name == "live")
        found.append(metrics(tmp_path / name / "stage2", "loss") + metrics(tmp_path / name / "stage2", "eval_loss"))
    assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], rel=5e-3)


# ------------------------------------------------------------------------ small updates
SMALL, STEPS = 1e-6, 1000


def test_the_master_weights_of_candidates_keep_small_updates():
    """An update of 1e-6 relative is lost in bf16, whose numbers near 1 are 0.4 % apart."""
    lost = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    kept = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([lost], lr=SMALL, weight_decay=0.0)
    groups = [{"params": [kept], "lr": SMALL, "weight_decay": 0.0}]
    master = MasterAdamW(
        groups, (0.9, 0.95), 0.0, lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    )
    for _ in range(STEPS):
        lost.grad, kept.grad = torch.ones_like(lost), torch.ones_like(kept)
        plain.step()
        master.step()
    assert torch.equal(lost, torch.ones_like(lost))
    torch.testing.assert_close(master.masters[0], torch.full((8,), 1 - SMALL * STEPS), rtol=0, atol=5e-5)


ENGINE = """
import sys
import deepspeed, torch
from stages import deepspeed_config
from deepspeed.utils import safe_get_full_fp32_param

zero, small, steps = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
config = deepspeed_config(f"stage_{zero}")
config |= {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
config |= {"train_batch_size": 1, "gradient_clipping": 0.0}
config["zero_optimization"].pop("leaf_module", None)
model = torch.nn.Linear(4, 4, bias=False)
torch.nn.init.ones_(model.weight)
model = model.bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=small, weight_decay=0.0)
engine = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
x = torch.ones(1, 4, dtype=torch.bfloat16)
for _ in range(steps):
    engine.backward(engine(x).sum())
    engine.step()
found = safe_get_full_fp32_param(engine.module.weight)
print("master", found.dtype, *sorted({f"{value:.7f}" for value in found.flatten().tolist()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_master_weights_of_training_keep_small_updates(zero):
    from processes import free_port

    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", ENGINE, str(zero), str(SMALL), str(STEPS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    kind, *values = done.stdout.split("master ")[1].split()
    assert kind == "torch.float32"
    assert [float(value) for value in values] == pytest.approx([1 - SMALL * STEPS] * len(values), abs=5e-5)

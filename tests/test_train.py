"""The three stages through the real launcher and DeepSpeed on two CPU processes, from each stage's
export to the next."""

import copy
import dataclasses
import gc
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from runtime.batch_plan import batch_plan
from runtime.checkpoints import checkpoints, fingerprint
from runtime.config import load_config
from runtime.data import open_chunks, read_batch
from runtime.environment import mark_done, set_up_process, wandb_wanted
from runtime.model_card import stage_record, write_card, write_native_card
from runtime.run_folder import check_run_folder, record_run, recorded_config

import pytest
import torch
import yaml
from conftest import KEPT, LENGTH, SHAPE, mean_kl, random_teacher, read_alone, save_tokenizer, write_config
from httpx import HTTPError
from huggingface_hub import ModelCard
from processes import free_port
from transformers import AutoModelForCausalLM

import convert_ckpt
import optim
import preflight
import stages as stage_builders
import train
from convert import load_teacher, load_teacher_config
from convert_ckpt import export_checkpoint
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM, is_student_attention
from distill_model.losses import alignment_loss
from distill_model.modeling_distilled_student import StudentBlock
from wrapper import AttentionAlignmentModel, student_attention_state

ROOT = Path(__file__).parent.parent


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RANK", None)
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def launch(file, *options, processes=2):
    launcher = Path(sys.executable).with_name("deepspeed")
    return run(
        launcher,
        "--num_gpus",
        processes,
        "--master_port",
        free_port(),
        "train.py",
        "--cfg",
        file,
        *options,
    )


def prepare(file, *options):
    return train.prepare(train.parse_args(["--cfg", str(file), *options]))


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def logged(folder, name):
    return [line[name] for line in metrics(folder) if name in line]


@pytest.fixture(scope="session")
def stages(tmp_path_factory, teacher_dir, data_dir):
    """A folder with stage1 (ZeRO-1), stage2 (ZeRO-2, the teacher sharded with ZeRO-3) and stage3
    (ZeRO-3), of two processes, with activation checkpointing in stages 2 and 3."""
    folder = tmp_path_factory.mktemp("stages")
    for stage, changes in (
        (1, {}),
        (2, {"kd_teacher_shard": "always", "gradient_checkpointing": "mlp"}),
        (3, {"gradient_checkpointing": True}),
    ):
        output = launch(write_config(folder, stage, teacher_dir, data_dir, **changes))
        (folder / f"stage{stage}.out").write_text(output)
    return folder


def heldout(data_dir, rows=2):
    return read_batch(open_chunks(data_dir, LENGTH, document_mask="auto").heldout, range(rows))


# ------------------------------------------------------------------------ the runs
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_runs_and_explains_itself(stages, stage):
    folder = stages / f"stage{stage}"
    assert len(logged(folder, "loss")) == 4
    assert len(logged(folder, "eval_loss")) == 2
    assert logged(folder, "eval_loss")[1] < logged(folder, "eval_loss")[0]
    rates = logged(folder, "tokens_per_second")
    assert len(rates) == 4
    assert min(rates) > 0
    assert not logged(folder, "mfu")  # a CPU's peak is not known
    assert load_config(folder / "config.yaml").stage == stage
    facts = json.loads((folder / "run.json").read_text())
    assert facts["world_size"] == 2
    assert facts["versions"]["torch"]
    assert facts["device"] == "cpu"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "modeling_distilled_student.py",
    ):
        assert (folder / "converted-hf" / name).is_file(), name


def test_weights_and_biases_offline(stages):
    """conftest.py sets WANDB_MODE; the run is named after its folder."""
    (record,) = (stages / "stage1" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert str(stages / "stage1").encode() in content
    assert b"train/layer_loss/00" in content


def test_the_schedule_is_ours(stages):
    """Cosine from the peak to the floor, not transformers' default."""
    rates = logged(stages / "stage1", "learning_rate")
    expected = [1e-3 + 3e-3 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) / 2 for step in range(4)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_stage_1_logs_every_layer_and_the_export_has_that_loss(stages, teacher_dir, data_dir):
    folder = stages / "stage1"
    last = [line for line in metrics(folder) if "eval_loss" in line][-1]
    layers = [last[f"eval_layer_loss/{i:02}"] for i in range(SHAPE["num_hidden_layers"])]
    assert sum(layers) / len(layers) == pytest.approx(last["eval_loss"], rel=1e-5)
    student = StudentForCausalLM.from_pretrained(folder / "converted-hf")
    assert student.config.keep_full_attention_layers == []
    model = AttentionAlignmentModel(load_teacher(teacher_dir), student)
    with torch.no_grad():
        assert model(**heldout(data_dir))["layer_losses"].tolist() == pytest.approx(layers, rel=1e-4)


def test_stage_1_logs_and_names_relative_errors(stages, teacher_dir, data_dir):
    """Each layer's loss over the variance of Hugging Face's attention output; the worst layers are
    logged at the end."""
    outputs = []
    theirs = AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    for layer in theirs.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    with torch.no_grad():
        batch = heldout(data_dir)
        assert not batch["document_ids"].any()  # one document each: transformers' model need not be told of others
        theirs(batch["input_ids"])
    variances = [((y - y.mean(1, keepdim=True)) ** 2).mean().item() for y in outputs]  # about each sequence's own means
    for prefix in ("", "eval_"):
        line = [line for line in metrics(stages / "stage1") if f"{prefix}layer_loss/00" in line][-1]
        errors = [line[f"{prefix}layer_error/{i:02}"] for i in range(len(variances))]
        if prefix:
            expected = [line[f"eval_layer_loss/{i:02}"] / variance for i, variance in enumerate(variances)]
            assert errors == pytest.approx(expected, rel=1e-4)
        assert all(0 < error < 10 for error in errors)
    (said,) = [line for line in (stages / "stage1.out").read_text().splitlines() if "worst aligned layers" in line]
    worst = sorted(range(len(errors)), key=errors.__getitem__)[::-1][:3]
    assert said.startswith("worst aligned layers on held-out text")
    assert ", ".join(f"{i} ({errors[i]:.3g})" for i in worst) in said
    assert f"median {statistics.median(errors):.3g}" in said


@pytest.mark.parametrize("kind", ["mse", "l2"])
def test_relative_errors_of_a_student_that_gives_the_mean_are_1(teacher_dir, kind):
    """For outputs whose distance from the mean is the same for all tokens, at any scale."""
    teacher = load_teacher(teacher_dir)
    model = AttentionAlignmentModel(teacher, StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0], kind)
    y = torch.randn(2, 8, 48).sign() * torch.tensor([1e-3, 1e3])[:, None, None]
    for output in y:
        output -= output.mean(0)
        output /= output.norm(dim=-1, keepdim=True) / output.norm(dim=-1).mean()
        mean = output.mean(0, keepdim=True).expand_as(output)
        error = model.relative_errors(alignment_loss(mean, output, kind), output.var(0, correction=0).mean())
        assert error.item() == pytest.approx(1, rel=0.05)


def test_stage_1_trains_attention_alone(stages, teacher_dir):
    student = StudentForCausalLM.from_pretrained(stages / "stage1" / "converted-hf").state_dict()
    for name, tensor in load_teacher(teacher_dir).state_dict().items():
        if ".attn." not in name:
            assert torch.equal(student[name], tensor), name


def test_stage_2_starts_from_stage_1_with_the_teachers_layers(stages, teacher_dir, data_dir):
    teacher = load_teacher(teacher_dir)
    linear = StudentForCausalLM.from_pretrained(stages / "stage1" / "converted-hf")
    hybrid = linear.restore_full_attention(teacher, KEPT)
    kls = [
        mean_kl(*predicted)
        for predicted, _ in read_alone(open_chunks(data_dir, document_mask="auto").heldout, 2, hybrid, teacher)
    ]
    assert logged(stages / "stage2", "eval_loss")[0] == pytest.approx(sum(kls) / 2, rel=1e-4)


def test_stage_3_changes_nothing_at_load(stages, teacher_dir, data_dir):
    export = StudentForCausalLM.from_pretrained(stages / "stage2" / "converted-hf")
    assert export.config.keep_full_attention_layers == KEPT
    cfg = load_config(stages / "stage3.yaml")
    built = stage_builders.build_student_for_stage2_and_3(cfg, torch.float32)
    for (name, a), (_, b) in zip(export.state_dict().items(), built.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    attention = export.model.layers[KEPT[0]].attn.q_proj.weight
    assert not torch.equal(attention, load_teacher(teacher_dir).model.layers[KEPT[0]].attn.q_proj.weight)
    alone = read_alone(open_chunks(data_dir, document_mask="auto").heldout, 2, export.eval())
    losses = [torch.nn.functional.nll_loss(predicted, tokens).item() for (predicted,), tokens in alone]
    assert logged(stages / "stage3", "eval_loss")[0] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_one_process_gives_the_losses_of_two_and_resumes_to_the_bit(stages, teacher_dir, data_dir, tmp_path):
    shutil.copytree(stages / "stage1", tmp_path / "stage1")
    file = write_config(tmp_path, 2, teacher_dir, data_dir)
    run(sys.executable, "train.py", "--cfg", file)
    folder = tmp_path / "stage2"
    whole = logged(folder, "loss")
    assert whole == pytest.approx(logged(stages / "stage2", "loss"), rel=1e-4)
    weights = StudentForCausalLM.from_pretrained(folder / "converted-hf").state_dict()
    shutil.rmtree(folder / "converted-hf")
    shutil.rmtree(folder / "checkpoint-4")
    run(sys.executable, "train.py", "--cfg", file)
    assert logged(folder, "loss") == whole
    for name, tensor in StudentForCausalLM.from_pretrained(folder / "converted-hf").state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert "is finished" in run(sys.executable, "train.py", "--cfg", file)


def as_older_version_wrote(file, has_key):
    """The run's config.yaml as a version wrote it whose data.document_mask was false unless set, or
    that did not have the key."""
    recorded = yaml.safe_load(file.read_text())
    assert recorded["data"].pop("document_mask") is False
    if has_key:
        recorded["data"]["document_mask"] = False
    file.write_text(yaml.safe_dump(recorded))


@pytest.mark.parametrize("has_key", [True, False])
def test_a_run_that_read_chunks_whole_keeps_that(tmp_path, monkeypatch, teacher_dir, data_dir, capsys, has_key):
    """A run of an earlier version, whose default was false, with the same YAML."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    new = prepare(file)
    assert new.chunks.has_documents and new.cfg.data.document_mask == "auto"
    assert "data: documents are read one by one" in capsys.readouterr().out
    record_run(load_config(file, ["data.document_mask=false"]), ROOT, 0)
    recorded = tmp_path / "stage1" / "config.yaml"
    as_older_version_wrote(recorded, has_key)
    resumed = prepare(file)
    assert not resumed.chunks.has_documents and resumed.cfg.data.document_mask is False
    out = capsys.readouterr().out
    assert f"data.document_mask: false, as recorded in {recorded}" in out
    assert "data: chunks are read whole, across their documents: data.document_mask is false" in out
    assert recorded_config(recorded).data.document_mask is False
    with pytest.raises(ValueError, match="another run .data.document_mask is False there, True here"):
        prepare(file, "data.document_mask=true")
    record_run(load_config(file), ROOT, 0)  # one that began with the default of today
    assert prepare(file).chunks.has_documents
    with pytest.raises(ValueError, match="another run .data.document_mask is 'auto' there, False here"):
        prepare(file, "data.document_mask=false")


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes_to_the_bit(teacher_dir, data_dir, tmp_path):
    """Its chunks record documents, and it read them whole: so do its last steps, with the same YAML."""
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    folder = tmp_path / "stage1"
    run(sys.executable, "train.py", "--cfg", file, "data.document_mask=true")
    documents = logged(folder, "loss")
    shutil.rmtree(folder)
    run(sys.executable, "train.py", "--cfg", file, "data.document_mask=false")
    whole = logged(folder, "loss")
    assert whole[2:] != documents[2:]
    as_older_version_wrote(folder / "config.yaml", has_key=False)
    shutil.rmtree(folder / "converted-hf")
    shutil.rmtree(folder / "checkpoint-4")
    run(sys.executable, "train.py", "--cfg", file)
    assert logged(folder, "loss") == whole
    assert load_config(folder / "config.yaml").data.document_mask is False
    shutil.rmtree(folder / "converted-hf")
    assert "converted-hf" in run(sys.executable, "convert_ckpt.py", "--cfg", file)


def test_stage_3_says_that_documents_are_shorter_than_its_context(tmp_path, monkeypatch, teacher_dir, data_dir):
    file = write_config(tmp_path, 3, teacher_dir, data_dir, student_init_ckpt="none")
    chunks = open_chunks(data_dir, LENGTH, document_mask="auto")
    count = 4 * chunks.metadata["num_chunks"]
    short = chunks.metadata | {"documents_in_chunks": {"train": count}}
    chunks = dataclasses.replace(chunks, metadata=short)
    _, warning = preflight.notes_on_documents(load_config(file), chunks)
    assert warning.startswith(f"warning: documents have {LENGTH // 4} of a chunk's {LENGTH} tokens on average")
    assert len(preflight.notes_on_documents(load_config(write_config(tmp_path, 1, teacher_dir, data_dir)), chunks)) == 1


def test_stage_2_says_that_windows_hold_all_of_its_text(tmp_path, teacher_dir, data_dir):
    """A window of LENGTH tokens reaches all of a chunk; one of half as many does not, but all of its
    documents if these are short."""
    whole = open_chunks(data_dir, LENGTH, document_mask=False)
    chunks = open_chunks(data_dir, LENGTH, document_mask="auto")
    short = {"documents_in_chunks": {"train": 4 * chunks.metadata["num_chunks"]}}
    chunks = dataclasses.replace(chunks, metadata=chunks.metadata | short)

    def notes(window: int, of) -> list[str]:
        student = ["student_model.name=swa_v1", f"student_model.options={{window_size: {window - 4}, sink_size: 4}}"]
        file = write_config(tmp_path, 2, teacher_dir, data_dir)
        return preflight.notes_on_windows(load_config(file, student), of)

    assert not notes(LENGTH // 2, whole)
    (note,) = notes(LENGTH, whole)
    assert f"window and sinks reach {LENGTH} tokens, and chunks have {LENGTH} on average" in note
    (note,) = notes(LENGTH // 2, chunks)
    assert f"documents have {LENGTH // 4} on average" in note


def test_the_export_script_refuses_another_runs_checkpoint(stages, tmp_path):
    """The exported frozen weights would be those of another teacher of the same shape."""
    folder, teacher = tmp_path / "run", tmp_path / "another"
    shutil.copytree(stages / "stage1", folder)
    with pytest.raises(
        ValueError,
        match=f"is not of the run in {folder} .*teacher_model.name is .* there, '{teacher}' here.*; name {folder}/config.yaml",
    ):
        convert_ckpt.main(
            [
                "--cfg",
                str(stages / "stage1.yaml"),
                f"train.output_dir={folder}",
                f"teacher_model.name={teacher}",
            ]
        )


def test_a_copied_runs_config_does_not_export_into_the_original(stages, tmp_path):
    """Its config names the folder that it was copied from, whose export would be replaced."""
    folder, original = tmp_path / "copy", stages / "stage1"
    shutil.copytree(original, folder)
    before = (original / "converted-hf").stat().st_ino
    with pytest.raises(
        ValueError,
        match=f"train.output_dir: {original} is not where {folder}/config.yaml lies; add train.output_dir={folder}",
    ):
        convert_ckpt.main(["--cfg", str(folder / "config.yaml")])
    assert (original / "converted-hf").stat().st_ino == before
    convert_ckpt.main(["--cfg", str(folder / "config.yaml"), f"train.output_dir={folder}"])


def test_a_run_folder_as_initial_student_is_refused_and_its_export_named(tmp_path, teacher_dir):
    (tmp_path / "stage1" / "converted-hf").mkdir(parents=True)
    cfg = load_config(
        write_config(tmp_path, 2, teacher_dir, "no data"),
        [f"train.student_init_ckpt={tmp_path}/stage1"],
    )
    with pytest.raises(
        ValueError,
        match=f"student_init_ckpt: {tmp_path}/stage1 holds no checkpoint; name {tmp_path}/stage1/converted-hf$",
    ):
        preflight.check_models(cfg)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_export_script_gives_what_training_exported(stages, tmp_path, monkeypatch, stage):
    """From ZeRO-1, 2 and 3; a named earlier checkpoint gives another model; large models are
    written in shards."""
    folder = tmp_path / "run"
    options = ["--cfg", str(stages / f"stage{stage}.yaml"), f"train.output_dir={folder}"]
    shutil.copytree(stages / f"stage{stage}", folder)
    shutil.rmtree(folder / "converted-hf")
    monkeypatch.setattr(convert_ckpt, "SHARD_SIZE", "50KB")
    convert_ckpt.main(options)
    assert len(list((folder / "converted-hf").glob("model-*.safetensors"))) > 1
    trained = StudentForCausalLM.from_pretrained(stages / f"stage{stage}" / "converted-hf")
    ours = StudentForCausalLM.from_pretrained(folder / "converted-hf")
    for (name, a), (_, b) in zip(ours.state_dict().items(), trained.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert (folder / "converted-hf" / "README.md").read_text() == (
        stages / f"stage{stage}/converted-hf/README.md"
    ).read_text()
    convert_ckpt.main([*options, "--checkpoint", str(folder / "checkpoint-2")])
    half = StudentForCausalLM.from_pretrained(folder / "converted-hf")
    moved = [not torch.equal(a, b) for a, b in zip(half.state_dict().values(), trained.state_dict().values())]
    assert any(moved)
    assert json.loads((folder / "converted-hf/training.json").read_text())["stages"][-1]["steps"] == 2


def test_the_card_describes_all_stages(stages, teacher_dir, tmp_path):
    folder = stages / "stage3" / "converted-hf"
    history = json.loads((folder / "training.json").read_text())
    assert [stage["stage"] for stage in history["stages"]] == [1, 2, 3]
    assert history["student"] == {
        "name": "gdn_v4",
        "options": {},
        "layers": 4,
        "keep_full_attention_layers": KEPT,
    }
    card, body = ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()
    assert card.data.license == "cc-by-4.0"
    assert "gdn_v4" in card.data.tags
    # Of windows as of linear attention.
    assert "| learning rate of the student layers | of the rest |" in body
    assert "its licence (cc-by-4.0) holds" in body
    assert card.data.base_model is None
    assert Path(teacher_dir).name in body
    assert str(stages) not in body + json.dumps(history)
    for number, record in enumerate(history["stages"], 1):
        losses, heldout = (logged(stages / f"stage{number}", name) for name in ("loss", "eval_loss"))
        assert record["loss"] == [losses[0], losses[-1]]
        assert record["heldout_loss"] == [
            heldout[0],
            heldout[-1],
        ]
        assert record["tokens"] == 4 * 4 * LENGTH
        assert record["versions"]["torch"]
        assert record["world_size"] == 2
        assert (
            f"| {record['objective']} | {losses[0]:.4g} → {losses[-1]:.4g} | {heldout[0]:.4g} → {heldout[-1]:.4g} |"
            in body
        )
        assert (
            f"| {4 * 4 * LENGTH} | {LENGTH} | 4 | 0.004 → 0.001 | {'frozen' if number == 1 else '0.002 → 0.001'} | cosine |"
            in body
        )
    assert "## Evaluation" not in body
    snippet = (
        re.search("```python\n(.*?)```", body, re.DOTALL)[1]
        .replace("folder = ...", f"folder = {str(folder)!r}")
        .replace("50)", "2)")
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main("), done.stderr
    assert "[y/N]" not in done.stdout + done.stderr, done.stderr
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "modeling_distilled_student.py",
    ):
        assert (folder / name).is_file(), name


def test_the_record_of_a_checkpoint_before_the_first_evaluation(stages):
    """Its only held-out loss is the one before training."""
    record = stage_record(load_config(stages / "stage2.yaml"), stages / "stage2" / "checkpoint-2")
    before = logged(stages / "stage2", "eval_loss")[0]
    assert record["steps"] == 2
    assert record["heldout_loss"] == [before, None]
    assert all(record["loss"])


def test_the_card_of_a_hub_model_with_results(tmp_path, teacher_dir, data_dir):
    """The teacher's licence and name, what is not recorded, and results of lm-evaluation-harness
    beside the export."""
    cfg = load_config(write_config(tmp_path, 2, "owner/teacher", data_dir, kl_weight=0.5, ce_weight=0.25))
    folder, config = tmp_path / "stage2" / "converted-hf", load_teacher_config(teacher_dir)
    config.student_name, config.keep_full_attention_layers = "gdn_v4", [1]
    load_teacher(teacher_dir).save_pretrained(folder)
    measured = {"checkpoint": fingerprint(folder), "limit": None}
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\n---\n# T\n")
    arc = {"task": "arc_easy", "seq_len": None, "metric": "acc", "score": 0.5, "stderr": 0.01}
    records = {
        "eval/hybrid": {
            "checkpoint": str(folder),
            "tasks": {
                "a": arc | {"settings": measured},
                "b": {"task": "mmlu", "seq_len": None, "error": "x"},
                "c": arc | {"task": "boolq", "settings": measured | {"limit": 5}},
                "d": arc
                | {
                    "task": "winogrande",
                    "settings": measured | {"checkpoint": "of weights that were there before"},
                },
                "e": arc | {"task": "openbookqa"},
            },
        },
        "eval/teacher": {
            "checkpoint": "owner/teacher",
            "tasks": {"a": arc | {"task": "piqa", "settings": measured}},
        },
        "harness": {
            "model_name": str(folder),
            "results": {
                "ruler_vt": {
                    "alias": "x",
                    "4096,none": 0.25,
                    "8192,none": -1,
                    "4096_stderr,none": "N/A",
                }
            },
        },
    }
    for name, record in records.items():
        (folder.parent / name).mkdir(parents=True)
        (folder.parent / name / "results.json").write_text(json.dumps(record))
    compared = {"student": arc | {"settings": measured}, "teacher": arc | {"score": 0.625}, "share": 0.8}
    boolq = {**compared, "student": compared["student"] | {"task": "boolq"}}
    of_others = compared["student"] | {"settings": {"checkpoint": "other weights"}}
    for name, teacher, tasks in (
        ("1", "teacher", [compared, {**compared, "student": of_others, "share": 0.1}]),
        ("2", "another", [boolq]),
    ):
        (folder.parent / name).mkdir()
        comparison = {"teacher": teacher, "students": {"hybrid": {"tasks": tasks}}}
        (folder.parent / name / "compare.json").write_text(json.dumps(comparison))
    write_card(cfg, folder.parent / "checkpoint-8", folder, config)
    body, data = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data
    assert data.base_model == "owner/teacher"
    assert (data.license, data.license_name) == (
        "other",
        "llama3.2",
    )
    for line in (
        "[owner/teacher](https://huggingface.co/owner/teacher)",
        "its licence (llama3.2) holds",
        "| arc_easy |  | acc | 0.5000 ± 0.0100 | 0.6250 ± 0.0100 | 80.0% |",
        "| boolq |  | acc | 0.5000 ± 0.0100, with a limit of 5 documents |  |  |",  # beside another teacher
        "| ruler_vt | 4096 | match | 0.2500 |  |  |",
        "Of stage 1 there is no record",
        "not recorded",
        "0.5 x KL to the teacher (temperature 1) + 0.25 x cross-entropy",
    ):
        assert line in body, line
    assert not any(word in body for word in ("8192", "mmlu", "piqa", "winogrande", "openbookqa"))
    assert "trust_remote_code=True" in body
    (tmp_path / "native").mkdir()
    write_native_card(folder, tmp_path / "native", "Qwen3_5ForCausalLM")
    native = (tmp_path / "native" / "README.md").read_text()
    assert "trust_remote_code" not in native
    assert "`Qwen3_5ForCausalLM`" in native
    assert "| arc_easy |  | acc |" in native


@pytest.mark.parametrize("theirs", ["# no metadata", "---\n: [\n---\n", None])
def test_a_teacher_without_a_licence(tmp_path, teacher_dir, data_dir, theirs):
    """A licence is never invented, and its absence does not fail an export."""
    cfg = load_config(write_config(tmp_path, 1, teacher_dir, data_dir))
    config = load_teacher_config(teacher_dir)
    config.student_name, config.keep_full_attention_layers = "gdn_v4", []
    if theirs is not None:
        (tmp_path / "README.md").write_text(theirs)
    write_card(cfg, tmp_path / "checkpoint-8", tmp_path, config)
    assert ModelCard.load(tmp_path / "README.md").data.license is None
    assert "whose card names no licence here" in (tmp_path / "README.md").read_text()


@pytest.fixture
def hub(monkeypatch):
    """The calls that would have gone to the hub."""
    calls = []
    monkeypatch.setattr(convert_ckpt.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(convert_ckpt, "get_token", lambda: "token")
    monkeypatch.setattr(
        convert_ckpt.HfApi,
        "create_repo",
        lambda self, name, **options: calls.append((name, options)),
    )
    monkeypatch.setattr(
        convert_ckpt.HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path, **_: calls.append(
            (repo_id, sorted(path.name for path in folder_path.iterdir()))
        ),
    )
    return calls


def test_push_to_hub(stages, tmp_path, hub, monkeypatch):
    shutil.copytree(stages / "stage2", tmp_path / "run")
    options = [
        "--cfg",
        str(stages / "stage2.yaml"),
        f"train.output_dir={tmp_path / 'run'}",
        "--push-to-hub",
    ]
    convert_ckpt.main([*options, "me/hybrid"])
    assert hub[0] == ("me/hybrid", {"exist_ok": True})
    assert hub[1][0] == "me/hybrid"
    assert len(hub) == 2
    assert {
        "README.md",
        "training.json",
        "config.json",
        "model.safetensors",
        "modeling_distilled_student.py",
    } <= set(hub[1][1])

    def refused(*_, **__):
        raise HTTPError("403 Forbidden\nand a page more")

    for change, name, message in (
        (
            (convert_ckpt.HfApi, "create_repo", refused),
            "me/hybrid",
            r"the hub failed \(403 Forbidden\)",
        ),
        (
            (convert_ckpt, "get_token", lambda: None),
            "me/hybrid",
            "--push-to-hub: me/hybrid: not logged in; run `hf auth login`",
        ),
        ((convert_ckpt.constants, "HF_HUB_OFFLINE", True), "me/hybrid", "HF_HUB_OFFLINE is set"),
        ((convert_ckpt, "get_token", lambda: None), "a/b/c", "a/b/c"),
    ):
        monkeypatch.setattr(*change)
        monkeypatch.setattr(
            convert_ckpt,
            "export_checkpoint",
            lambda *_: pytest.fail("exported before the hub was asked"),
        )
        with pytest.raises(ValueError, match=message):
            convert_ckpt.main([*options, name])
    assert len(hub) == 2


def test_an_optimiser_that_is_not_installed(tmp_path, teacher_dir, data_dir, monkeypatch):
    file = write_config(tmp_path, 1, teacher_dir, data_dir, optimizer="adamw_8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.optimizer: adamw_8bit needs bitsandbytes"):
        prepare(file)


def test_one_process_needs_no_port():
    """DeepSpeed's launcher gives every run the same port, and a free one may be taken before it is
    used."""
    code = """
from runtime.environment import init_distributed, set_up_device, set_up_process
set_up_process()
device = set_up_device()
init_distributed(device, 5)
import deepspeed, torch
ones = torch.ones(1, device=device)
deepspeed.comm.all_reduce(ones)
assert deepspeed.comm.get_world_size() == ones.item() == 1
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in ({}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment | port,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr


def test_the_process_environment(tmp_path, monkeypatch):
    """Every rank has a Triton cache of its own; W&B is used when it is set up or asked for."""
    for launched, expected in (
        ({}, (0, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ):
        monkeypatch.setattr(os, "environ", {"TRITON_CACHE_DIR": str(tmp_path)} | launched)
        assert set_up_process() == expected
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / f"rank{expected[0]}")
    assert not wandb_wanted("auto")
    assert wandb_wanted("wandb")
    os.environ["WANDB_MODE"] = "offline"
    assert wandb_wanted("auto")
    assert not wandb_wanted("none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not wandb_wanted("auto")
    with pytest.raises(ValueError, match="train.report_to: wandb is not installed"):
        wandb_wanted("wandb")


def test_the_mark_of_a_rank_that_has_finished(tmp_path, monkeypatch):
    """The launch scripts wait for it; without them there is none."""
    monkeypatch.setenv("JOB_DIR", str(tmp_path))
    mark_done(3)
    assert [path.name for path in tmp_path.iterdir()] == ["done_3"]
    monkeypatch.delenv("JOB_DIR")
    monkeypatch.chdir(tmp_path)
    mark_done(4)
    assert not (tmp_path / "done_4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STUDENT_ATTENTION_MAP))
def test_every_student_goes_through_both_stages(tmp_path, teacher_dir, data_dir, name):
    """Stage 1, export, stage 2, generate."""
    options = {"window_size": 8} if name in ("swa_v1", "lolcats_v1") else {}  # the default is longer than the text
    for stage in (1, 2):
        run(
            sys.executable,
            "train.py",
            "--cfg",
            write_config(tmp_path, stage, teacher_dir, data_dir),
            f"student_model.name={name}",
            f"student_model.options={options}",
            "train.max_steps=8",
            "train.lr=3e-4",
            "train.lr_attn=2e-3",
            "train.micro_batch_size=4",
        )
        losses = logged(tmp_path / f"stage{stage}", "eval_loss")
        assert losses[-1] < losses[0]
    report = json.loads((tmp_path / "stage1" / "init_report.json").read_text())
    assert list(report) == [str(i) for i in range(SHAPE["num_hidden_layers"])]
    assert report["0"]["copied"]
    model = StudentForCausalLM.from_pretrained(tmp_path / "stage2" / "converted-hf")
    ids = heldout(data_dir)["input_ids"][:, :9]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        tokens,
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False),
    )


@pytest.mark.parametrize("name", ["gdn_v4", "gdn_v8", "kda_v1", "mamba2_v1", "swa_v1"])
def test_the_report_has_what_calibration_changed(tmp_path, teacher_dir, data_dir, name):
    file = write_config(tmp_path, 1, teacher_dir, data_dir, calibrate_init=2, micro_batch_size=2)
    cfg = load_config(file, [f"student_model.name={name}", "student_model.options={}"])
    model, init_report = stage_builders.build_student_for_stage1(cfg, torch.float32)
    students = [block.attn.student_attn for block in model.model.layers]
    before = [{n: p.detach().clone() for n, p in student.named_parameters()} for student in students]
    fitted = stage_builders.calibrate_students(model, open_chunks(data_dir, LENGTH, document_mask="auto"), 2, 2)
    init_report = stage_builders.with_calibrated(init_report, fitted)
    for layer, student in enumerate(students):
        report = init_report[layer]
        parameters = student.named_parameters()
        changed = {name for name, p in parameters if not torch.equal(p, before[layer][name])}
        assert changed
        assert set(report["calibrated"]) == changed
        tensors = [n for kind in ("copied", "transformed", "fresh", "calibrated") for n in report[kind]]
        assert sorted(tensors) == sorted(before[layer])


def test_a_calibrated_start_is_better(tmp_path, teacher_dir, data_dir, capfd):
    cfg = load_config(write_config(tmp_path, 1, teacher_dir, data_dir, calibrate_init=4, micro_batch_size=2))
    said = []
    model, _ = stage_builders.build_student_for_stage1(cfg, torch.float32, said.append)
    chunks = open_chunks(data_dir, LENGTH, document_mask="auto")
    test = read_batch(chunks.heldout, range(8))
    losses = [model(**test)["loss"].item()]
    stage_builders.calibrate_students(model, chunks, cfg.train.calibrate_init, cfg.train.micro_batch_size, said.append)
    losses.append(model(**test)["loss"].item())
    pattern = r"calibrated on 256 tokens: alignment loss (\S+) -> (\S+) on ([\d,]+) held-out tokens"
    *reported, tokens = re.fullmatch(pattern, said[-1]).groups()
    assert [float(x) for x in reported] == pytest.approx(losses, rel=1e-3)
    assert losses[1] < 0.9 * losses[0]
    assert int(tokens.replace(",", "")) == test["input_ids"].numel()
    assert "calibrating: 100%" in capfd.readouterr().err


def test_calibration_without_held_out_chunks_is_logged_as_such(tmp_path, teacher_dir, data_dir):
    cfg = load_config(write_config(tmp_path, 1, teacher_dir, data_dir, calibrate_init=2))
    said, chunks = [], dataclasses.replace(open_chunks(data_dir, LENGTH, document_mask="auto"), heldout=None)
    model, _ = stage_builders.build_student_for_stage1(cfg, torch.float32, said.append)
    stage_builders.calibrate_students(model, chunks, 2, 1, said.append)
    assert said[-1].endswith("on the same tokens, because there are no held-out chunks")


def test_calibration_on_fewer_tokens_than_inputs_is_warned_of(tmp_path, teacher_dir, data_dir, capsys):
    """The teacher's 4 heads of 16 are wider than its hidden_size; a batch has 32 tokens."""
    for batches, warned in ((1, True), (2, False)):
        prepare(write_config(tmp_path, 1, teacher_dir, data_dir, calibrate_init=batches), "--dry-run")
        out = capsys.readouterr().out
        said = "warning: train.calibrate_init: 1 is 32 tokens, fewer than the 64 inputs to fit"
        assert (said in out and "set it to 2 or more\n" in out) == warned
        assert ("warning" in out) == warned


def test_a_failed_export_leaves_the_old_one(stages, tmp_path):
    shutil.copytree(stages / "stage2", tmp_path / "stage2")
    cfg = load_config(stages / "stage2.yaml", ["student_model.keep_full_attention_layers=[0]"])  # not what was trained
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key|size mismatch"):
        export_checkpoint(cfg, tmp_path / "stage2" / "checkpoint-4", tmp_path / "stage2" / "converted-hf")
    names = {path.name for path in (tmp_path / "stage2").iterdir()}
    assert "converted-hf" in names
    assert not any(name.startswith(".") for name in names)
    assert StudentForCausalLM.from_pretrained(tmp_path / "stage2" / "converted-hf")


# ------------------------------------------------------------------------ the environment
def test_kernel_configs_are_used_where_there_are_some(tmp_path, monkeypatch):
    """By the GPU's compute capability; the user's own variables take precedence."""
    from runtime import autotuning

    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$GPU"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    for gpu in ("1.0", ""):
        monkeypatch.setenv("GPU", gpu)
        autotuning.use_kernel_configs()
        assert "FLA_CONFIG_DIR" not in os.environ
    with monkeypatch.context() as patch:  # GPUs that differ, with configurations for either
        for name in ("sm_80", "sm_90"):
            (tmp_path / name).mkdir()
        patch.setattr(autotuning, "KERNEL_CONFIGS", tmp_path)
        patch.setenv("GPU", "9.0\n8.0")
        autotuning.use_kernel_configs()
        assert "FLA_CONFIG_DIR" not in os.environ
    monkeypatch.setenv("GPU", "9.0")
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    autotuning.use_kernel_configs()
    assert "FLA_CONFIG_DIR" not in os.environ
    monkeypatch.delenv("FLA_CACHE_MODE")
    autotuning.use_kernel_configs()
    folder = Path(os.environ.pop("FLA_CONFIG_DIR"))
    assert os.environ.pop("FLA_CACHE_MODE") == "fuzzy"
    assert folder == ROOT / "runtime" / "autotuning" / "kernel_configs" / "sm_90"
    for file in folder.iterdir():
        for entry in json.loads(file.read_text())["autotune_entries"].values():
            assert {"kwargs", "num_warps", "num_stages", "num_ctas"} <= entry["config"].keys()


def test_kernel_configs_are_not_given_to_others_of_their_name(monkeypatch):
    """FLA looks up a kernel by its name and by the number of its tensors and sizes. DeltaNet's
    kernels have the names of Gated DeltaNet's, and one of them is miscompiled for Hopper with the 4
    warps that suit the other."""
    from runtime.autotuning import KERNEL_CONFIGS

    from fla.ops.delta_rule import wy_fast as delta
    from fla.ops.gated_delta_rule import wy_fast as gated_delta
    from fla.ops.utils import cache

    def key_of(kernel, dtype):
        while not hasattr(kernel, "keys"):
            kernel = kernel.fn
        tensors = [
            name
            for name in kernel.arg_names[: kernel.arg_names.index("T")]
            if name not in ("cu_seqlens", "chunk_indices")
        ]
        return [False if name.startswith("IS_") else 64 for name in kernel.keys] + [dtype] * len(tensors)

    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.FUZZY)
    monkeypatch.setenv("FLA_CONFIG_DIR", str(KERNEL_CONFIGS / "sm_90"))
    for name in ("prepare_wy_repr_bwd_kernel", "recompute_w_u_fwd_kernel"):
        (entry,) = json.loads((KERNEL_CONFIGS / "sm_90" / f"{name}.json").read_text())["autotune_entries"].values()
        ours, theirs = (key_of(getattr(module, name), "torch.bfloat16") for module in (gated_delta, delta))
        assert len(ours) == len(entry["autotune_key"])
        assert cache.load_cached_config(name, cache.AutotuneKey(tuple(entry["autotune_key"])))
        assert len(theirs) != len(ours)
        assert cache.load_cached_config(name, cache.AutotuneKey(tuple(theirs))) is None


def test_every_kernel_of_fla_uses_its_config(tmp_path, monkeypatch):
    """Those too that FLA decorates with Triton's autotuner, by their module and name. What was
    saved is read again."""
    from runtime.autotuning import _cache_every_kernel_of_fla, save_kernel_configs

    from fla.ops.utils import cache
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    class Kernel:
        def __init__(self, module):
            self.fn = lambda x, N, cu_seqlens, IS_VARLEN: None
            self.fn.__module__, self.fn.__name__ = module, "kernel"
            self.launched = []

        def run(self, *args, **options):
            self.launched.append(options["num_warps"])

    def tuner(module, do_bench, kind=Autotuner):
        configs = [Config({}, num_warps=warps) for warps in (1, 2, 4)]
        names = ["x", "N", "cu_seqlens", "IS_VARLEN"]
        return kind(Kernel(module), names, configs, ["N", "IS_VARLEN"], None, None, do_bench=do_bench)

    def measure(call, quantiles):
        call()
        return [float(measured.fn.launched[-1] != 2)] * 3  # 2 warps are the fastest

    def refuse(call, quantiles):
        raise AssertionError("measured again")

    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # restored after the test
    _cache_every_kernel_of_fla()
    folder = tmp_path / "kernel_configs"
    monkeypatch.setenv("FLA_CONFIG_DIR", str(folder))
    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.FUZZY)
    measured = tuner("fla.ops.one", measure)
    measured.run(torch.ones(1), 64, None, IS_VARLEN=False)
    save_kernel_configs(folder)
    assert [file.name for file in folder.iterdir()] == ["fla.ops.one.kernel.json"]
    shutil.copy(folder / "fla.ops.one.kernel.json", folder / "kernel.json")  # as FLA's own autotuner names it
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    for kind in (Autotuner, cache.CachedAutotuner):
        read = tuner("fla.ops.one", refuse, kind)
        read.run(torch.ones(1), 32, None, IS_VARLEN=False)  # of another size
        read.run(torch.ones(1), 32, bounds, IS_VARLEN=True)  # after a call without documents, and first
        first = tuner("fla.ops.one", refuse, kind)
        first.run(torch.ones(1), 32, cu_seqlens=bounds, IS_VARLEN=True)
        assert read.fn.launched == [2, 2] and first.fn.launched == [2]
        for x in (torch.ones(1).half(), torch.ones(1).double()):
            with pytest.raises(AssertionError, match="measured again"):
                first.run(x, 32, bounds, IS_VARLEN=True)
    for other in (tuner("fla.ops.two", refuse), tuner("ours", refuse)):
        with pytest.raises(AssertionError, match="measured again"):
            other.run(torch.ones(1), 64, None, IS_VARLEN=False)
    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.STRICT)
    with pytest.raises(AssertionError, match="measured again"):
        tuner("fla.ops.one", refuse).run(torch.ones(1), 64, bounds, IS_VARLEN=True)


def test_every_config_is_found_for_a_call_with_documents(monkeypatch):
    """Of each kernel that takes documents' bounds, under the key that FLA makes of such a call, without states
    and with. The chunks listed for a call have one length, which a configuration must not set."""
    from runtime.autotuning import KERNEL_CONFIGS, STATES, _autotuner_for_documents, kernel_name

    from fla.ops.utils import cache
    from triton.runtime.autotuner import Autotuner

    def lookup(tuner, file, call):
        """The configuration that a call by these arguments finds in `file`, or None."""
        tuner = copy.copy(tuner)
        tuner.__class__, tuner.kernel_name, tuner.cache = _autotuner_for_documents(), file.stem, {}
        tuner.early_config_prune = None  # it depends on this machine's GPU, not on documents
        key = cache.AutotuneKey.build(tuner.arg_names, tuner.keys, (), call)
        tuner.maybe_load_cached_config(key, call, {})
        return tuner.cache.get(key.autotune_key)

    folder = KERNEL_CONFIGS / "sm_90"
    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.FUZZY)
    monkeypatch.setenv("FLA_CONFIG_DIR", str(folder))
    documents = {"cu_seqlens": torch.zeros(2, dtype=torch.int32), "chunk_indices": torch.zeros(1, 2).long()}
    found, with_states = set(), set()
    for tuner in [x for x in gc.get_objects() if issubclass(type(x), Autotuner)]:
        names, file = tuner.arg_names, folder / f"{kernel_name(tuner)}.json"
        if not file.is_file() or not documents.keys() & set(names) or not tuner.base_fn.__module__.startswith("fla."):
            continue
        others = [name for name in names if name not in (*tuner.keys, *documents, *STATES)]
        for entry in json.loads(file.read_text())["autotune_entries"].values():
            values = [value for value in entry["autotune_key"] if not isinstance(value, str)]
            dtypes = [getattr(torch, x.removeprefix("torch.")) for x in entry["autotune_key"] if isinstance(x, str)]
            if len(values) != len(tuner.keys):  # another kernel of this name
                continue
            kwargs, warps = entry["config"]["kwargs"], entry["config"]["num_warps"]
            assert "chunk_indices" not in names or "BT" not in kwargs, file.name
            call = dict(zip(tuner.keys, values)) | documents | {"IS_VARLEN": True}
            tensors = {name: torch.zeros(1, dtype=dtype) for name, dtype in zip(others, dtypes)}
            for states in ({}, {name: torch.zeros(1) for name in STATES}):
                given = call | tensors | states
                given = {name: given[name] for name in names if name in given}
                config = lookup(tuner, file, given)
                assert config is not None and (config.kwargs, config.num_warps) == (kwargs, warps), file.name
            if given.keys() & states.keys():
                with_states.add(file.name)
            halves = {name: tensor.half() for name, tensor in tensors.items()}
            assert lookup(tuner, file, given | halves) is None, file.name
            found.add(file.name)
    assert len(found) > 30, found
    assert {"causal_conv1d_fwd_kernel.json", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64.json"} <= with_states


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "chat",
        "evaluation.commands",
        "train",
        "quickstart.report",
        "layer_selection.scan_layers",
        "benchmarks.decode",
        "benchmarks.compare_students",
    ],
)
def test_every_script_that_runs_kernels_uses_their_configs(module, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLA_")} | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    }
    code = f"import {module}; from runtime.autotuning import use_kernel_configs; use_kernel_configs(); from fla.ops.utils import cache; print(cache.FLA_CACHE_MODE.value, cache.get_fla_config_dir().name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["fuzzy", "sm_90"], done.stderr


# ------------------------------------------------------------------------ parts of a stage
def graph(node):
    """The names of the operations that a backward pass would go through."""
    return {node.name().rpartition("::")[2]}.union(
        *(graph(below) for below, _ in node.next_functions if below is not None)
    )


@pytest.mark.parametrize("kind", ["mse", "l2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_alignment_gradients_equal_direct_ones(teacher_dir, kind, recompute):
    teacher, ids = load_teacher(teacher_dir), torch.randint(0, 80, (2, 19))
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0]
    expected, hidden = {}, teacher.model.embeddings(ids).detach()
    positions = teacher.model.position_embeddings(hidden)
    for i, block in enumerate(teacher.model.layers):
        normed = block.attn_norm(hidden).detach()
        target = block.attn(normed, position_embeddings=positions)[0].detach()
        linear = student.model.layers[i].attn
        loss = alignment_loss(linear(normed)[0], target, kind) / len(teacher.model.layers)
        gradients = torch.autograd.grad(loss, list(linear.parameters()))
        for (name, _), gradient in zip(linear.named_parameters(), gradients):
            expected[f"model.layers.{i}.attn.{name}"] = gradient
        hidden = block(hidden, position_embeddings=positions).detach()
    model = AttentionAlignmentModel(teacher, student, kind, recompute).train()
    loss = model(ids)["loss"]
    if not recompute:  # no layer's autograd graph is left, only its gradients
        assert graph(loss.grad_fn) == {
            "MeanBackward0",
            "StackBackward0",
            "_LossAndGradientsBackward",
            "AccumulateGrad",
        }
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert student_attention_state(trainable).keys() == expected.keys()
    for name, p in student_attention_state(trainable).items():
        torch.testing.assert_close(p.grad, expected[name])
    if not recompute:  # the gradients of a layer are one tensor, and scaled in one operation
        assert len({p.grad.untyped_storage().data_ptr() for p in trainable.values()}) == len(teacher.model.layers)


def test_a_sharded_teacher_is_gathered_by_blocks(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 2, teacher_dir, data_dir, student_init_ckpt="none", kd_teacher_shard="always")
    code = f"""
from runtime.environment import init_distributed, set_up_device, set_up_process
set_up_process(), init_distributed(set_up_device(), 5)
import torch
from deepspeed.utils import z3_leaf_module
import hf_trainer, stages
from convert import load_teacher
from runtime.config import load_config
cfg, plain, sharded = load_config({str(file)!r}), *(load_teacher({teacher_dir!r}) for _ in range(2))
sharded = hf_trainer.FrozenTeacher(sharded, "cpu", stages.teacher_engine_config(cfg, sharded, "cpu", 1, print))
assert sharded.model.model.layers[0].mlp.up_proj.weight.numel() == 0  # sharded
assert all(map(z3_leaf_module, sharded.model.model.layers)) and not z3_leaf_module(sharded.model.lm_head)
ids = torch.randint(0, 80, (2, 19))
assert torch.equal(*(each.hidden_states(ids) for each in (sharded, hf_trainer.FrozenTeacher(plain, "cpu"))))
"""
    run(sys.executable, "-c", code)


def test_keys_of_another_stage_are_reported_to_have_no_effect(tmp_path, teacher_dir, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    config = write_config(tmp_path, 1, teacher_dir, data_dir)
    prepare(
        config,
        "--dry-run",
        "train.kd_teacher_offload=cpu",
        "train.kl_weight=0.5",
        "train.alignment_loss=l2",
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert lines == [f"train.{name}: has no effect in stage 1" for name in ("kl_weight", "kd_teacher_offload")]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("norm", [0.25, 0.0])
def test_max_grad_norm_is_what_deepspeed_clips_at(tmp_path, stage, norm):
    """0 means no clipping to DeepSpeed."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(stage_builders.deepspeed_config(f"stage_{stage}"))
    config.trainer_config_process(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=norm))
    assert config.config["gradient_clipping"] == norm


@pytest.mark.parametrize(
    "shard, offload, expected",
    [
        ("auto", "none", None),
        ("never", "none", None),
        ("always", "none", "none"),
        ("auto", "cpu", "cpu"),
        ("always", "cpu", "cpu"),
    ],
)
def test_where_a_teachers_weights_are(tmp_path, teacher_dir, data_dir, shard, offload, expected):
    """In DeepSpeed's config, for one process; None: a replica on each device."""
    cfg = load_config(
        write_config(tmp_path, 2, teacher_dir, data_dir, kd_teacher_shard=shard, kd_teacher_offload=offload)
    )
    engine = stage_builders.teacher_engine_config(cfg, load_teacher(teacher_dir), "cpu", 1, print)
    assert (engine and engine["zero_optimization"].get("offload_param", {"device": "none"})["device"]) == expected


def test_the_leaf_module_of_zero_3_is_our_block():
    """DeepSpeed only warns about a class that does not exist, and then gathers module by module."""
    for name in ("stage_3", "stage_2_teacher"):
        assert stage_builders.deepspeed_config(name)["zero_optimization"]["leaf_module"] == {
            "classes": [StudentBlock.__name__]
        }


@pytest.mark.parametrize("scope", ["linear", "all"])
def test_parameter_groups(teacher_dir, tmp_path, data_dir, scope):
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, data_dir, weight_decay=0.1, lr_attn_scope=scope))
    model = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", KEPT)[0]
    optimizer = optim.get_optimizer(model, cfg)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(settings) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, module in model.named_modules():
        for parameter_name, p in module.named_parameters(recurse=False):
            linear = any(is_student_attention(model.get_submodule(name.rsplit(".", k)[0])) for k in range(3))
            attention = ".attn" in name and "attn_norm" not in name
            fast = linear or scope == "all" and attention
            assert settings[id(p)] == (4e-3 if fast else 2e-3, 0.1 if p.ndim > 1 else 0.0), f"{name}.{parameter_name}"


@pytest.mark.parametrize(
    "name, vectors",
    [
        (
            "gdn_v7",
            {
                "A_log",
                "dt_bias",
                "q_conv1d.weight",
                "k_conv1d.weight",
                "v_conv1d.weight",
                "o_norm.weight",
            },
        ),
        ("rwkv7_v1", {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k"}),
    ],
)
def test_only_matrices_decay(teacher_dir, tmp_path, data_dir, name, vectors):
    """Not depthwise filters, nor vectors with dimensions of size 1."""
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, data_dir, weight_decay=0.1))
    model = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), name)[0]
    decay = {id(p): group.weight_decay for group in optim.parameter_groups(model, cfg) for p in group.params}
    found = dict(model.model.layers[0].attn.named_parameters())
    assert vectors <= found.keys()
    assert all(decay[id(found[parameter])] == 0 for parameter in vectors)
    assert all(
        decay[id(parameter)] == 0.1 for parameter in found.values() if sum(size > 8 for size in parameter.shape) > 1
    )


def test_8_bit_groups_are_split(teacher_dir, tmp_path, data_dir, monkeypatch):
    """ZeRO makes one tensor of a group, and kernels with 32-bit indices would fail on a larger one
    or skip its end."""
    model, limit = load_teacher(teacher_dir), 5000
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, data_dir, weight_decay=0.1, optimizer="adamw_8bit"))
    whole = optim.get_optimizer(model, cfg).param_groups
    monkeypatch.setattr(optim, "GROUP_OF_8_BITS", limit)
    cut = optim.get_optimizer(model, cfg).param_groups
    assert max(sum(p.numel() for p in group["params"]) for group in whole) > 2 * limit
    assert all(len(group["params"]) == 1 or sum(p.numel() for p in group["params"]) <= limit for group in cut)
    settings = [
        [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
        for groups in (whole, cut)
    ]
    assert settings[0] == settings[1]


def test_the_schedule_reaches_its_floor(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 1, teacher_dir, data_dir, max_steps=100, warmup_steps=5)
    for kind, middle, end in (
        ("constant", 4e-3, 4e-3),
        ("linear", 2.5e-3, 1e-3),
        ("cosine", 2.5e-3, 1e-3),
    ):
        cfg = load_config(file, [f"train.lr_scheduler_type={kind}"])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-3)
        scheduler = optim.get_scheduler(optimizer, cfg, batch_plan(cfg, 1))
        rates = []
        for _ in range(101):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert 0 < rates[0] < rates[4] < rates[5] == 4e-3
        assert rates[100] == pytest.approx(end)
        assert sum(rates[52:54]) / 2 == pytest.approx(middle, rel=1e-2)


def test_dry_run_writes_nothing(tmp_path, teacher_dir, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    prepare(write_config(tmp_path, 1, teacher_dir, data_dir), "--dry-run", "train.max_steps=9")
    out = capsys.readouterr().out
    student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0]
    trained = sum(p.numel() for n, p in student.named_parameters() if ".attn." in n)
    total = sum(p.numel() for p in student.parameters())
    assert f"9 steps x 4 sequences x {LENGTH} = {9 * 4 * LENGTH:,} tokens" in out
    assert f"{total:,} in the student, {trained:,} trained" in out
    assert not (tmp_path / "stage1").exists()


def test_a_dry_run_warns_about_data_and_options(tmp_path, teacher_dir, data_dir, capsys, monkeypatch):
    """Too many epochs, an EOS that the config does not want, and options that the stage ignores; no
    warning otherwise."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    chunks = len(open_chunks(data_dir, LENGTH, document_mask="auto").train)
    chunks -= chunks % 4  # whole batches
    config = write_config(tmp_path, 1, teacher_dir, data_dir)
    few, many = chunks, chunks + 1  # steps of 4 sequences
    prepare(config, "--dry-run", f"train.max_steps={few}", "train.add_eos_token=true")
    out = capsys.readouterr().out
    assert f"data: {chunks} chunks for {4 * few:,} sequences: 4.0 epochs" in out
    assert "warning" not in out
    assert "has no effect" not in out
    prepare(
        config,
        "--dry-run",
        f"train.max_steps={many}",
        "train.add_eos_token=false",
        "train.gradient_checkpointing=true",
    )
    out = capsys.readouterr().out
    assert (
        f"warning: data: {chunks} chunks for {4 * many:,} sequences: 4.0 epochs; repeated more than 4 times, text adds little; preprocess"
        in out
    )
    assert f"warning: train.add_eos_token: false has no effect; documents end with EOS in {data_dir}" in out
    assert "train.gradient_checkpointing: has no effect in stage 1" in out
    cfg = load_config(str(config), ["train.add_eos_token=false"])
    chunks = open_chunks(data_dir, LENGTH, document_mask=False)
    adopted = dataclasses.replace(chunks, metadata=chunks.metadata | {"eos_tokens": 0})
    (note,) = preflight.notes_on_data(cfg, batch_plan(cfg, 1), adopted)  # there is no EOS in them
    assert note.startswith("data: chunks are read whole, across their documents: they do not record")


@pytest.mark.parametrize("event", ["setup", "on_train_begin", "on_log", "on_save", "on_train_end"])
def test_wandb_does_not_end_a_run(monkeypatch, capsys, event):
    """Whichever callback fails, none is called after it."""
    from transformers.integrations import WandbCallback

    from hf_trainer import Wandb

    def broken(self, *args, **options):
        called.append(event)
        raise ConnectionResetError("the service is gone")

    called, events = [], ("on_train_begin", "on_log", "on_save", "on_train_end")
    for other in set(events) - {"on_train_begin"} if event == "setup" else events:
        monkeypatch.setattr(WandbCallback, other, lambda *args, other=other, **options: called.append(other))
    monkeypatch.setattr(WandbCallback, event, broken)
    callback, state = Wandb(), SimpleNamespace(is_hyper_param_search=False)
    capsys.readouterr()  # transformers' own
    for each in events:
        getattr(callback, each)(None, state, None, model=None, logs={"loss": 1.0})
    assert called == [*events[: events.index(event) if event in events else 0], event]
    assert capsys.readouterr().out == "W&B ended (the service is gone); metrics.jsonl continues without it\n"


# ------------------------------------------------------------------------ bad input
BAD = {
    "stage=4": "stage: 4 must be one of",
    "train.lr_atn=1": "did you mean train.lr_attn",
    "data.cache_dir=nowhere": "data.cache_dir: nowhere: no such folder",
    "train.train_seq_len=64": f"holds chunks of {LENGTH} tokens, but train.train_seq_len is 64",
    "train.batch_size=3 train.micro_batch_size=2": "train.batch_size: 3 must be a multiple",
    "train.batch_size=4096": "fewer than train.batch_size",
    "student_model.keep_full_attention_layers=[9]": r"\[9\] out of range; the teacher's layers are 0..3",
    "train.calibrate_init=8": "train.calibrate_init: 8 is for stage 1, whose students start from the teacher; remove it",
    "stage=1 train.student_init_ckpt=null student_model.keep_full_attention_layers=[] train.calibrate_init=999": "batches of 1 are more than the",
    "student_model.name=gdn_v99": "student_model.name: 'gdn_v99' is unknown",
    "student_model.options={num_slots: 4}": "student_model.options.num_slots",
    "student_model.options={allow_neg_eigval: true}": "student_options {}, this run {'allow_neg_eigval': True}",
    "student_model.name=gdn_v3": "has student_name 'gdn_v4', this run 'gdn_v3'",
    "train.student_init_ckpt=null": "train.student_init_ckpt: missing; gdn_v4 has weights that the teacher lacks: run stage 1 first",
    "train.student_init_ckpt=nowhere": "train.student_init_ckpt: nowhere holds no checkpoint; run stage 1 first",
    "teacher_model.name=no/such/folder": "teacher_model.name: 'no/such/folder' is neither a folder",
    "train.resume_from_checkpoint=nowhere": "train.resume_from_checkpoint: nowhere is not a complete checkpoint",
    "stage=3": r"keep_full_attention_layers: \[1\] must be those of .*stage1/converted-hf, \[\]",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_ends_in_one_line(stages, tmp_path, monkeypatch, teacher_dir, data_dir, overrides):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "stage1").symlink_to(stages / "stage1")
    file = write_config(tmp_path, 2, teacher_dir, data_dir)
    overrides = [overrides] if "{" in overrides else overrides.split()
    with pytest.raises(ValueError, match=BAD[" ".join(overrides)]) as error:
        prepare(file, *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "stage2").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        (
            {"student_name": "gdn_v3"},
            "has student_name 'gdn_v3', this run 'gdn_v4'; use one that matches",
        ),
        (
            {"student_name": None, "keep_full_attention_layers": [0, 1, 2, 3]},
            "has student_name None, this run 'gdn_v4'",
        ),
        ({"student_options": {"allow_neg_eigval": False}}, None),
        ({"student_options": {"unheard": 1}}, "has student_options {'unheard': 1}, this run {}"),
        (
            {"student_options": {"allow_neg_eigval": True}},
            "has student_options {'allow_neg_eigval': True}, this run {}",
        ),
        ({"num_hidden_layers": 3}, "has num_hidden_layers 3, this run 4"),
        ({"num_key_value_heads": 4}, "has num_key_value_heads 4, this run 2"),
        ({"head_dim": 12}, "has head_dim 12, this run 16"),
        ({"keep_full_attention_layers": [7]}, r"cannot be read: keep_full_attention_layers: \[7\]"),
        (
            {"keep_full_attention_layers": [0, 1]},
            r"keeps full attention in \[0, 1\], of which this run drops \[0\]",
        ),
        (
            {"model_type": "student"},
            "cannot be read: model_type: 'student' is a student of the KL-guided layer selection",
        ),
        ({"model_type": "qwen3"}, "cannot be read: model_type: 'qwen3' is not distilled_student"),
        ("{", "has a config.json that cannot be read"),
        (None, "holds no checkpoint; run stage 1 first, or name its converted-hf"),
    ],
)
def test_another_kind_of_checkpoint_is_refused(tmp_path, teacher_dir, change, message):
    """By its config, before a weight is read."""
    folder = tmp_path / "stage1" / "converted-hf"
    folder.mkdir(parents=True)
    config = load_teacher_config(teacher_dir)
    config.student_name, config.keep_full_attention_layers = "gdn_v4", []
    if change is not None:
        text = change if isinstance(change, str) else json.dumps(config.to_dict() | change)
        (folder / "config.json").write_text(text)
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, "no data"))
    if message is None:
        return preflight.check_models(cfg)
    with pytest.raises(ValueError, match=message) as error:
        preflight.check_models(cfg)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"train.student_init_ckpt: {folder}")


def test_the_script_exits_non_zero_with_one_line(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    done = subprocess.run(
        [sys.executable, "train.py", "--cfg", file, "stage=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: error:")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["gsa_v1", "hgrn2_v1"])
def test_a_student_that_cannot_be_calibrated_is_refused_before_training(tmp_path, teacher_dir, name):
    """By its name alone: there are no data and no weights."""
    file = write_config(tmp_path, 1, teacher_dir, "no data", calibrate_init=2)
    with pytest.raises(ValueError, match=f"^train.calibrate_init: {name} fuses o_proj with its norm; set it to 0$"):
        preflight.check_models(load_config(file, [f"student_model.name={name}"]))
    preflight.check_models(load_config(file, [f"student_model.name={name}", "train.calibrate_init=0"]))


def test_another_tokenizer_and_an_unsupported_teacher(tmp_path, monkeypatch, teacher_dir, data_dir):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    random_teacher(tmp_path / "teacher", "qwen3")
    save_tokenizer(tmp_path / "teacher", extra="zzz")
    file = write_config(tmp_path, 1, str(tmp_path / "teacher"), data_dir)
    with pytest.raises(ValueError, match="which is not the teacher's"):
        prepare(file)
    (tmp_path / "teacher" / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError,
        match="^teacher_model.name: '.*teacher' has no tokenizer that loads .*; name a folder or",
    ) as error:
        prepare(file)
    assert "\n" not in str(error.value)
    save_tokenizer(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="cannot be read exactly: hidden_act 'gelu'"):
        prepare(file)


def test_a_folder_belongs_to_one_run(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    cfg = load_config(file)
    check_run_folder(cfg)
    record_run(cfg, ROOT, 0)
    for same in (
        "train.save_steps=1",
        "train.logging_steps=7",
        "train.eval_steps=3",
        "train.report_to=none",
        "train.save_minutes=1",
    ):
        check_run_folder(load_config(file, [same]))
    for other in (
        "train.lr=1e-5",
        "train.seed=1",
        "student_model.name=gdn_v2",
        "train.batch_size=8",
    ):
        with pytest.raises(ValueError, match=f"stage1 holds another run .{other.split('=')[0]} is"):
            check_run_folder(load_config(file, [other]))
    with pytest.raises(ValueError, match="resume_from_checkpoint: None, but .* holds this run with 0 checkpoints"):
        check_run_folder(load_config(file, ["train.resume_from_checkpoint=null"]))
    found = tmp_path / "stage1" / "checkpoint-2"
    found.mkdir()
    assert checkpoints(found.parent) == []  # not complete
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint of"):
        check_run_folder(load_config(file, [f"train.resume_from_checkpoint={found}"]))
    (found / "index.json").write_text("{}")
    assert checkpoints(found.parent) == [found]
    check_run_folder(load_config(file, [f"train.resume_from_checkpoint={found}"]))
    (tmp_path / "link").symlink_to(tmp_path)
    for spelling in (
        f"train.output_dir={tmp_path}/stage1/",
        f"train.output_dir={tmp_path}/link/stage1",
        f"data.cache_dir={data_dir}/",
        f"teacher_model.name={teacher_dir}/.",
    ):
        check_run_folder(load_config(file, [spelling]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other is not empty and holds no run"):
        check_run_folder(load_config(file, [f"train.output_dir={tmp_path / 'other'}"]))

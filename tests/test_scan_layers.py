"""The quick scan without a stage-2 config: it measures as --method scan does, and on held-out
chunks only."""

import json
import shutil

from runtime.config import load_config

import pytest
import torch
from test_select_layers import select

from convert import load_teacher
from distill_model import StudentForCausalLM
from layer_selection import baselines, scan_layers


def test_scan_restores_one_layer_and_leaves_the_student_as_it_was(teacher_dir):
    teacher = load_teacher(teacher_dir)
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0].eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    ids = torch.randint(0, teacher.config.vocab_size, (4, 24))
    all_linear, kls = scan_layers.scan(student, teacher, [ids[:2], ids[2:]], [None, None])
    after = student.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    def naive(model):
        with torch.no_grad():
            ours, theirs = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, teacher))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean(1).tolist()

    assert all_linear == pytest.approx(naive(student), rel=1e-4)
    assert list(kls) == [0, 1, 2, 3]
    assert baselines.rank_scan({0: [0.3, 0.3], 1: [0.1, 0.1], 2: [0.4, 0.4], 3: [0.2, 0.2]}).keep(2) == [1, 3]
    for layer, values in kls.items():
        hybrid = student.restore_full_attention(teacher, [layer]).eval()
        assert values == pytest.approx(naive(hybrid), rel=1e-4)


def scan(stage2, out, *options, **changes):
    cfg = load_config(stage2)
    arguments = {
        "--student": cfg.train.student_init_ckpt,
        "--teacher": cfg.teacher_model.name,
        "--data": cfg.data.cache_dir,
        "--output_dir": str(out),
    } | {f"--{name}": str(value) for name, value in changes.items()}
    scan_layers.main([word for pair in arguments.items() for word in pair] + list(options))
    return json.loads((out / "layer_scan.json").read_text())


@pytest.mark.parametrize("mask", ["auto", "false"])
def test_the_script_measures_what_the_method_measures(stage2, tmp_path, capsys, mask):
    """Documents one by one, or chunks whole."""
    found = scan(stage2, tmp_path, "--keep", "2", "--chunks", "6", "--batch_size", "4", document_mask=mask)
    shown = capsys.readouterr().out
    other = scan(stage2, tmp_path / "other", "--chunks", "6", document_mask={"auto": "false", "false": "true"}[mask])
    assert other["all_linear_kl"] != pytest.approx(found["all_linear_kl"], rel=1e-3)
    ranking = select(stage2, tmp_path / "select", "--method", "scan", "--top-k", "2", f"data.document_mask={mask}")
    assert found["keep"] == ranking["keep"] and 2 in found["keep"]
    importance = {layer["layer"]: -layer["importance"] for layer in ranking["layers"]}
    kls = {entry["layer"]: entry["kl"] for entry in found["layers"]}
    assert kls == pytest.approx(importance, rel=1e-6) and list(kls) == [0, 1, 2, 3]
    assert found["all_linear_kl"] > min(kls.values())
    assert f"Kept: {found['keep']}; {6 * 32} held-out tokens per layer" in shown


def test_a_quarter_is_kept_unless_told_otherwise(stage2, tmp_path):
    assert scan(stage2, tmp_path, "--chunks", "2")["keep"] == [2]


def test_what_cannot_be_scanned_is_refused(stage2, tmp_path):
    cfg = load_config(stage2)
    data = tmp_path / "chunked_context32"
    shutil.copytree(cfg.data.cache_dir, data)
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps(metadata | {"heldout_chunks": 0}))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"^--data: {data} has no held-out split; preprocess with --holdout$"):
        scan(stage2, out, data=data)
    with pytest.raises(ValueError, match="--keep: 5 must be between 1 and the student's 4 layers"):
        scan(stage2, out, keep=5)
    hybrid = StudentForCausalLM.from_teacher(load_teacher(cfg.teacher_model.name), "gdn_v4", [0])[0]
    hybrid.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match="--student: .*hybrid keeps layers already; pass stage 1's all-linear"):
        scan(stage2, out, student=tmp_path / "hybrid")
    assert not out.exists()

"""Stage 2 without a stage 1, from the teacher: which students can, where their weights come from, and
what is refused. A whole run of one is in test_whole_path.py."""

from runtime.config import load_config

import pytest
import torch
from conftest import KEPT, random_teacher, save_tokenizer, write_config
from transformers import AutoModelForCausalLM

import convert_ckpt
import preflight
import stages
from convert import load_teacher
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM
from layer_selection.bench import Bench
from layer_selection.stage2_runs import check_start

WINDOW, SINKS = 5, 2
MISSING = "train.student_init_ckpt: missing; {} has weights that the teacher lacks: run stage 1 first and name its "


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def teacher(request, tmp_path_factory):
    """A folder with a tiny random teacher: with biases, with q/k norms, with neither."""
    folder = tmp_path_factory.mktemp(request.param)
    random_teacher(folder, request.param, hidden_size=64)  # heads of 16, which all students take
    save_tokenizer(folder)
    return str(folder)


def config(folder, teacher, data="no data", kept=KEPT, name="swa_v1", **train):
    """A stage 2 without train.student_init_ckpt."""
    options = f"{{window_size: {WINDOW}, sink_size: {SINKS}}}" if name == "swa_v1" else "{}"
    file = write_config(folder, 2, teacher, data, student_init_ckpt=None, **train)
    student = [f"student_model.name={name}", f"student_model.options={options}"]
    return load_config(file, [*student, f"student_model.keep_full_attention_layers={kept}"])


def with_windows(model, kept):
    """transformers' teacher, whose layers outside `kept` see the last WINDOW tokens and the first SINKS."""

    def narrow(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        query, key = torch.arange(length)[:, None], torch.arange(length)
        seen = (key <= query) & ((query - key < WINDOW) | (key < SINKS))
        mask = torch.where(seen, 0.0, float("-inf"))[None, None]
        return args, {**kwargs, "attention_mask": mask}

    for index, layer in enumerate(model.model.layers):
        if index not in kept:
            layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
    return model


def test_students_that_start_from_a_teacher_are_those_without_weights_of_their_own(teacher):
    """A copy of each of the teacher's tensors and nothing else, for every kind of teacher."""
    source = load_teacher(teacher)
    for name, student in STUDENT_ATTENTION_MAP.items():
        model, reports = StudentForCausalLM.from_teacher(source, name)
        is_copy = all(not (r.fresh or r.transformed or r.dropped) for r in reports.values())
        assert is_copy == student.layer.has_only_teachers_weights, name
        if student.layer.has_only_teachers_weights:
            fresh = StudentForCausalLM(model.config)
            fresh.load_state_dict(source.state_dict())  # strict: nothing is missing
            for key, tensor in fresh.state_dict().items():
                assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("kept", [[1], [0, 2, 3], [0, 1, 2, 3]])
def test_the_start_is_the_teacher_with_windows(teacher, tmp_path, kept):
    """Logits against transformers' own teacher with a mask in the layers that are not kept."""
    cfg = config(tmp_path, teacher, kept=kept)
    preflight.check_models(cfg)
    lines = []
    student = stages.build_student_for_stage2_and_3(cfg, torch.float32, lines.append, load_teacher(teacher)).eval()
    assert lines == [f"students: {4 - len(kept)} x swa_v1; full: {kept}; all weights are the teacher's"]
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(90, (2, 23))
    with torch.no_grad():
        found, whole = student(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits
        expected = with_windows(theirs, kept)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    changed = (expected - whole).abs().amax((0, 2)) > 1e-3
    assert changed.any() == (len(kept) < 4) and not changed[: WINDOW + 1].any()


@pytest.mark.parametrize("name", sorted(set(STUDENT_ATTENTION_MAP) - {"swa_v1"}))
def test_other_students_need_stage_1(teacher_dir, tmp_path, name):
    """One line, before a weight is read; but a hybrid that keeps all layers has no weights of its own.
    Layer selection needs the student in every layer, whatever the config keeps."""
    with pytest.raises(ValueError) as error:
        preflight.check_models(config(tmp_path, teacher_dir, name=name))
    assert str(error.value) == MISSING.format(name) + "converted-hf"
    every = config(tmp_path, teacher_dir, name=name, kept=[0, 1, 2, 3])
    preflight.check_models(every)
    with pytest.raises(RuntimeError, match="Missing key"):  # no weight is left as it happens to be
        stages.load_initial_student(every, torch.float32, load_teacher(teacher_dir))
    with pytest.raises(ValueError, match=MISSING.format(name)):
        check_start(every)


def test_a_hybrid_that_keeps_all_layers_starts_as_the_teacher(teacher_dir, tmp_path):
    cfg = config(tmp_path, teacher_dir, name="gdn_v7", kept=[0, 1, 2, 3])
    source = load_teacher(teacher_dir)
    model = stages.build_student_for_stage2_and_3(cfg, torch.float32, print, source)
    assert model.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_layers_are_selected_from_the_same_start(teacher_dir, data_dir, tmp_path):
    """The all-linear student of a selection holds the teacher's weights, whatever the config keeps."""
    bench = Bench(config(tmp_path, teacher_dir, data_dir), 2, 2)
    assert bench.student.config.linear_layers == [0, 1, 2, 3]
    source = load_teacher(teacher_dir).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in bench.student.state_dict().items())


def test_frozen_weights_are_exported_as_the_teachers(teacher_dir, tmp_path):
    cfg = config(tmp_path, teacher_dir, freeze=["linear_attention", "mlp"])
    frozen = convert_ckpt.frozen_state(cfg)
    source = load_teacher(teacher_dir).state_dict()
    assert {name.split(".")[3] for name in frozen} == {"attn", "mlp"}
    assert not any(name.startswith("model.layers.1.attn") for name in frozen)
    assert all(torch.equal(tensor, source[name]) for name, tensor in frozen.items())

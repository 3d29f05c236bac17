"""The code around CUDA graphs, with a stand-in for the graphs on the CPU: a replay runs what was
recorded again, and overwrites the first results. The graphs themselves:
tests/gpu/test_cuda_graphs_gpu.py."""

import json
import os
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import ConfigError, dump_config, load_config
from runtime.context import RunContext
from runtime.guard import memory_advice
from runtime.run_folder import check_run_folder, zero_stage_of_run

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file

import cuda_graphs
import stages
import train
from convert import load_teacher
from cuda_graphs import EAGER_CALLS, GraphedForward, graphs_in_use, switch_off_all
from distill_model import DistillationLoss, StudentConfig, StudentForCausalLM
from preflight import open_data

ROOT = Path(__file__).parents[1]


class Recomputed:
    """A graph's stand-in."""

    count = 0

    def __init__(self, run):
        self.run = run
        self.result = run()
        self.with_gradients = torch.is_grad_enabled()

    def replay(self):
        Recomputed.count += 1
        with torch.set_grad_enabled(self.with_gradients):
            values = self.run()
        pairs = zip(self.result.values(), values.values()) if isinstance(values, dict) else zip(self.result, values)
        for old, new in pairs:
            if old is not None:
                old.copy_(new)

    def pool(self):
        return None


def use_stand_ins() -> None:
    def record(run, pool):
        graph = Recomputed(run)
        return graph, graph.result

    cuda_graphs._record = record
    cuda_graphs._free_memory = lambda: None


def train_with_stand_ins(arguments: list[str]) -> None:
    """Runs train.py with stand-ins for all graphs; prints how often one was replayed."""
    use_stand_ins()
    stages.supports_varlen = lambda *_: True
    wanted = stages.use_cuda_graphs
    stages.use_cuda_graphs = lambda cfg, device, *rest, **more: wanted(cfg, "cuda", *rest, **more)
    train.main(arguments)
    print(f"replayed {Recomputed.count} times")


def run(file, *overrides) -> str:
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_cuda_graphs; test_cuda_graphs.train_with_stand_ins(sys.argv[1:])"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment.pop("RANK", None)
    command = [sys.executable, "-c", code, "--cfg", str(file), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("document_mask", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_training_through_deepspeed_is_the_same_with_and_without(tmp_path, teacher_dir, data_dir, document_mask):
    """All three stages, with accumulated gradients, clipping and evaluations in between; to the bit but
    in stage 1 with documents, which takes its mean over tokens differently."""
    for stage in (1, 2, 3):
        results = []
        for graphs in ("true", "false"):
            changes = {
                "max_steps": 6,
                "eval_steps": 2,
                "save_steps": 6,
                "gradient_checkpointing": {1: False, 2: "mlp", 3: True}[stage],
            }
            folder = tmp_path / f"graphs_{graphs}"
            folder.mkdir(exist_ok=True)
            file = write_config(folder, stage, teacher_dir, data_dir, **changes)
            overrides = [f"train.cuda_graphs={graphs}", f"data.document_mask={document_mask}"]
            if stage > 1:
                before = tmp_path / "graphs_true" / f"stage{stage - 1}" / "converted-hf"
                overrides.append(f"train.student_init_ckpt={before}")
            out = run(file, *overrides)
            assert ("replayed 0 times" in out) == (graphs == "false")
            lines = map(json.loads, (folder / f"stage{stage}" / "metrics.jsonl").read_text().splitlines())
            losses = []
            for line in lines:
                names = [name for name in line if "loss" in name or name == "grad_norm"]
                losses += [(line["step"], name, line[name]) for name in names]
            results.append((losses, load_file(folder / f"stage{stage}" / "converted-hf" / "model.safetensors")))
        (losses, weights), (expected, expected_weights) = results
        assert len(losses) > 8
        if stage == 1 and document_mask == "true":
            assert losses == [(step, name, pytest.approx(value, rel=1e-4)) for step, name, value in expected]
            continue
        assert losses == expected
        assert all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items())


def test_a_sharded_teacher_trains_without(tmp_path, teacher_dir, data_dir):
    """Its head is gathered into new memory for each pass, which a graph would not read."""
    StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0].save_pretrained(tmp_path / "student")
    file = write_config(tmp_path, 2, teacher_dir, data_dir, max_steps=5, student_init_ckpt=str(tmp_path / "student"))
    out = run(file, "train.cuda_graphs=true", "train.kd_teacher_shard=always", "data.document_mask=false")
    assert "train.cuda_graphs: not used, for the head of a sharded teacher" in out
    assert "replayed 0 times" in out


@pytest.mark.parametrize(
    "changes, sharded_teacher, used",
    [
        ({"cuda_graphs": True}, False, True),
        ({"cuda_graphs": True}, True, False),
        ({"cuda_graphs": False}, False, False),
        ({"cuda_graphs": True, "zero_stage": 3}, False, False),
        ({}, False, True),
        ({}, True, False),
        ({"zero_stage": 3}, False, False),
    ],
)
def test_where_graphs_are_used(tmp_path, teacher_dir, data_dir, changes, sharded_teacher, used):
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, data_dir, **changes))
    model = load_teacher(teacher_dir)
    lines = []
    for device, expected in (("cuda", used), ("cpu", False)):
        zero_stage = cfg.train.zero_stage or 2
        found = stages.use_cuda_graphs(cfg, device, zero_stage, model, lines.append, sharded_teacher)
        assert found == expected
    assert len(lines) == (cfg.train.cuda_graphs is True and not used)


def test_large_models_have_graphs_in_stage_1_or_on_request(tmp_path, teacher_dir, data_dir, monkeypatch):
    first = load_config(write_config(tmp_path, 1, teacher_dir, data_dir))
    file = write_config(tmp_path, 2, teacher_dir, data_dir)
    auto = load_config(file)
    asked = load_config(file, ["train.cuda_graphs=true"])
    model = load_teacher(teacher_dir)
    assert stages.use_cuda_graphs(auto, "cuda", 2, model)
    monkeypatch.setattr(stages, "LARGE_MODEL", model.num_parameters())
    assert not stages.use_cuda_graphs(auto, "cuda", 2, model)
    assert stages.use_cuda_graphs(asked, "cuda", 2, model)
    assert stages.use_cuda_graphs(first, "cuda", 2, model)


def test_documents_one_by_one_rule_graphs_out_for_some_students(tmp_path, teacher_dir, data_dir, monkeypatch):
    """auto takes them for the others and says why not for these; asked for, they are refused before a
    model is read."""
    monkeypatch.setattr(stages, "supports_varlen", lambda device, dtype, head_dim: dtype == torch.bfloat16)
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    auto, asked = load_config(file), load_config(file, ["train.cuda_graphs=true"])
    teacher = load_teacher(teacher_dir)
    lines = []

    def used(student, cfg=asked, **more):
        model, _ = StudentForCausalLM.from_teacher(teacher, student, **more)
        return stages.use_cuda_graphs(cfg, "cuda", 1, model, lines.append, has_documents=True)

    assert used("gdn_v4") and used("gdn_v4", auto)
    assert used("gla_v1", keep_full_attention_layers=range(teacher.config.num_hidden_layers))
    assert not lines
    for mode in ("auto", "true"):
        in_fp32 = load_config(file, [f"train.cuda_graphs={mode}", "train.dtype=fp32"])
        assert not used("gla_v1", load_config(file, [f"train.cuda_graphs={mode}"])) and not used("gdn_v4", in_fp32)
        of_student, of_dtype = lines
        assert "gla_v1 reads documents on the host" in of_student
        assert "in this dtype" in of_dtype
        lines.clear()
    assert open_data(asked, batch_plan(asked, 1)).has_documents
    of_gla = ["train.cuda_graphs=true", "student_model.name=gla_v1"]
    asked = load_config(file, of_gla)
    with pytest.raises(ValueError, match="train.cuda_graphs: true .* gla_v1 reads documents .*document_mask to false"):
        open_data(asked, batch_plan(asked, 1))
    without = load_config(file, [*of_gla, "data.document_mask=false"])
    assert not open_data(without, batch_plan(without, 1)).has_documents


def context(cfg) -> RunContext:
    """Of one process."""
    return RunContext(cfg, batch_plan(cfg, 1), None, 0, print, zero_stage=zero_stage_of_run(cfg, 1))


def test_a_run_that_was_out_of_memory_resumes_without_graphs_as_advised(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    cfg = load_config(file)

    def advice():
        with pytest.raises(ConfigError, match="out of GPU memory") as error, memory_advice(context(cfg), graphs_in_use):
            raise torch.OutOfMemoryError
        return str(error.value)

    assert "cuda_graphs" not in advice()
    graphed = GraphedForward(load_teacher(teacher_dir))
    assert "train.cuda_graphs=false" in advice()
    graphed.switch_off()
    assert "cuda_graphs" not in advice()
    Path(cfg.train.output_dir).mkdir()
    (Path(cfg.train.output_dir) / "config.yaml").write_text(dump_config(cfg))
    check_run_folder(load_config(file, ["train.cuda_graphs=false"]))


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_record", None)
    monkeypatch.setattr(cuda_graphs, "_free_memory", None)
    use_stand_ins()


@pytest.fixture
def model(stand_ins):
    config = StudentConfig(
        hidden_size=32,
        intermediate_size=48,
        vocab_size=50,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_hidden_layers=2,
        keep_full_attention_layers=[0, 1],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return StudentForCausalLM(config).train()


def inputs(rows=2):
    ids = torch.randint(50, (rows, 9), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def replayed(model) -> GraphedForward:
    forward = GraphedForward(model)
    for _ in range(EAGER_CALLS + 1):
        forward(**inputs())["loss"].backward()
    return forward


def test_gradients_add_up_over_calls(model):
    """A replay overwrites the graph's own gradients, which must not be those that the parameters
    hold."""
    batches = [inputs() | {"labels": inputs()["labels"].roll(i, 1)} for i in range(3)]
    forward = replayed(model)
    gradients = []
    for call in (forward, model):
        model.zero_grad()
        losses = [call(**batch)["loss"] for batch in batches[:1]]
        losses[0].backward()
        for batch in batches[1:]:
            losses.append(call(**batch)["loss"])
            losses[-1].backward()
        gradients.append(([loss.item() for loss in losses], [p.grad for p in model.parameters()]))
    (losses, replays), (expected, launches) = gradients
    assert losses == expected
    assert len(set(losses)) == 3
    assert all(map(torch.equal, replays, launches))


@pytest.mark.parametrize("between", ["the same model", "a frozen model", "the backward pass"])
def test_activations_that_are_overwritten_are_not_used(model, between):
    forward = replayed(model)
    other = GraphedForward(StudentForCausalLM(model.config).requires_grad_(False))
    for _ in range(EAGER_CALLS + 1):
        other(**inputs())
    loss = forward(**inputs())["loss"]
    if between == "the same model":
        forward(**inputs())
    elif between == "a frozen model":
        other(**inputs())
    else:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="may have overwritten its activations"):
        loss.backward()


def test_parameters_are_the_models_own_again(model):
    before = list(model.parameters())
    replayed(model)
    assert all(a is b for a, b in zip(before, model.parameters()))
    assert model.lm_head.weight is model.model.embeddings.weight


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_cache": True}, "recorded with use_cache False, and is called with use_cache True"),
        ({"distillation": DistillationLoss(ce_weight=0.5)}, "ce_weight"),
        (inputs(1), r"recorded with input_ids \(2, 9\)"),
    ],
)
def test_another_call_than_the_recorded_one_is_refused(model, changes, message):
    forward = replayed(model)
    with pytest.raises(RuntimeError, match=message):
        forward(**inputs() | changes)


def test_documents_differ_from_call_to_call(model):
    """In number and length; the recorded pass reads those of each call."""
    forward = GraphedForward(model, max_documents=7)
    generator = torch.Generator().manual_seed(0)
    for call in range(EAGER_CALLS + 4):
        documents = (torch.rand(2, 9, generator=generator) < 0.3).int().cumsum(1).clamp(max=2)
        batch = inputs() | {"document_ids": documents}
        losses, gradients = [], []
        for run in (forward, model):
            model.zero_grad()
            losses.append(run(**batch)["loss"])
            losses[-1].backward()
            gradients.append([p.grad for p in model.parameters()])
        assert (forward.forward_graph is not None) == (call >= EAGER_CALLS)
        assert torch.equal(*losses) and all(map(torch.equal, *gradients))


def moved(tensor) -> None:
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.rotary_emb.inv_freq"])
@pytest.mark.parametrize("frozen", [False, True])
def test_moved_weights_and_buffers_are_refused(model, name, frozen):
    if frozen:
        forward = GraphedForward(model.requires_grad_(False))
        for _ in range(EAGER_CALLS + 1):
            forward(**inputs())
    else:
        forward = replayed(model)
    moved(attrgetter(name)(model))
    with pytest.raises(RuntimeError, match="moved in memory"):
        forward(**inputs())


def test_a_moved_parameter_that_is_an_input_is_refused(model):
    """As the head of a teacher is."""
    head = torch.nn.Parameter(torch.randn(50, 32), requires_grad=False)
    forward = GraphedForward(model)
    batch = inputs() | {
        "labels": None,
        "teacher_hidden_states": torch.randn(2, 9, 32),
        "teacher_head_weight": head,
    }
    for _ in range(EAGER_CALLS + 2):
        forward(**batch)
    moved(head)
    with pytest.raises(RuntimeError, match="moved in memory"):
        forward(**batch)


def test_a_pass_that_cannot_be_recorded_names_the_cure(model, monkeypatch):
    def record(error):
        def fail(run, pool):
            raise error

        monkeypatch.setattr(cuda_graphs, "_record", fail)

    record(RuntimeError("operation not permitted when stream is capturing"))
    with pytest.raises(
        RuntimeError,
        match=r"StudentForCausalLM .*; set train.cuda_graphs=false \(operation not permitted",
    ):
        replayed(model)
    record(torch.OutOfMemoryError("20 GiB"))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(model)


def test_switched_off_every_call_is_eager_and_no_memory_is_held(model):
    forward = replayed(model)
    again = GraphedForward(model)  # not recorded yet
    expected = model(**inputs(1))["loss"]
    switch_off_all()
    for graphed in (forward, again):
        assert all(torch.equal(graphed(**inputs(1))["loss"], expected) for _ in range(EAGER_CALLS + 1))
        assert graphed.forward_graph is graphed.backward_graph is graphed.outputs is graphed.gradients is None


def test_a_frozen_model_is_replayed_without_gradients(model):
    forward = GraphedForward(model.model.requires_grad_(False))
    ids = inputs()["input_ids"]
    calls = [forward(input_ids=ids.roll(i, 1), use_cache=False)["last_hidden_state"] for i in range(EAGER_CALLS + 3)]
    expected = [
        model.model(input_ids=ids.roll(i, 1), use_cache=False)["last_hidden_state"] for i in range(EAGER_CALLS + 3)
    ]
    assert forward.forward_graph is not None
    assert all(map(torch.equal, calls, expected))

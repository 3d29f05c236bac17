"""FP8: its quantisation and MLPs against float64, what of a teacher it changes, and what is
refused. The Triton kernels run in test_losses.py's interpreter, `torch._scaled_mm` on the CPU."""

import copy
import json
import math

from runtime.config import ConfigError, load_config

import pytest
import torch
import torch.nn.functional as F
from conftest import KEPT, LENGTH, write_config

import preflight
import stages
import train
from convert import load_teacher
from distill_model import StudentForCausalLM
from distill_model.fp8 import Fp8Linear, Fp8SwiGLU, kl_of, quantize_mlps, quantize_rows, quantize_swiglu
from mfu import training_flops_per_token

FP8 = "teacher_model.precision=fp8"


def rows_of_all_sizes(count, size):
    """Random rows, of which one is 0 and the others differ in size by orders of magnitude."""
    torch.manual_seed(0)
    x = torch.randn(count, size) * torch.logspace(-4, 4, count)[:, None]
    x[1] = 0
    return x


def check_quantized(quantized, scales, exact):
    """Whether quantized * scales is exact [N, D] to the spacing of e4m3 (3 bits of mantissa; below
    2^-6 of a fixed step of 2^-9), with 448 for each row's largest value."""
    assert quantized.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert scales.shape == (len(exact), 1)
    values = exact / scales.double()
    error = (quantized.double() - values).abs()
    assert (error <= (values.abs() / 16).clamp(min=2**-10) * (1 + 1e-5)).all()
    largest = quantized.double().abs().amax(1)
    assert (largest[exact.abs().amax(1) > 0] == 448).all()
    assert (quantized.double()[(exact == 0).all(1)] == 0).all()


@pytest.mark.parametrize("shape", [(5, 16), (3, 53)])
def test_quantize_rows(shape):
    x = rows_of_all_sizes(*shape)
    check_quantized(*quantize_rows(x), x.double())


def test_quantize_swiglu():
    x = rows_of_all_sizes(5, 2 * 37).clamp(-30, 30)
    gate, up = x.double().chunk(2, 1)
    check_quantized(*quantize_swiglu(x), F.silu(gate) * up)


def test_representable_values_are_kept():
    """Values that need no rounding, which the interpreter gets wrong where it carries."""
    torch.manual_seed(0)
    values = torch.randint(0, 256, (4, 53), dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values.where(values.float().isfinite(), torch.zeros(()).to(values.dtype)).float()
    values[:, 0] = 448
    powers = torch.tensor([[1.0], [2.0**-20], [2.0**20], [0.5]])
    swiglu = torch.cat((torch.full_like(values, 64), values * powers), 1)  # silu(64) is 64 in fp32
    for quantize, x, factor in ((quantize_rows, values * powers, 1), (quantize_swiglu, swiglu, 64)):
        quantized, scales = quantize(x)
        assert torch.equal(scales, factor * powers)
        assert torch.equal(quantized.float(), values)


@pytest.mark.parametrize("bias", [False, True])
def test_mlp(teacher_dir, bias):
    """Against the same MLP in float64, of weights and activations rounded by PyTorch's casts."""
    mlp = load_teacher(teacher_dir, torch.bfloat16).model.layers[0].mlp
    if bias:
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features).bfloat16())

    def rounded(x):
        scale = (x.abs().amax(-1, keepdim=True) / 448).float().double()
        return (x / scale).float().to(torch.float8_e4m3fn).double() * scale

    def project(linear, x):
        y = rounded(x) @ rounded(linear.weight.double()).T
        return y if linear.bias is None else y + linear.bias.double()

    x = torch.randn(2, 7, 48).bfloat16()
    found = Fp8SwiGLU(mlp)(x)
    gate, up = (project(linear, x.double()).bfloat16().double() for linear in (mlp.gate_proj, mlp.up_proj))
    expected = project(mlp.down_proj, F.silu(gate) * up)
    assert found.shape == x.shape and found.dtype == x.dtype
    # A product of gate and up may be rounded to another value of e4m3 in fp32 than in float64.
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-2
    exact = copy.deepcopy(mlp).double()(x.double())
    assert ((found.double() - exact).norm() / exact.norm()).item() < 0.1


def test_mlp_keeps_its_dtypes_and_is_not_saved(teacher_dir):
    model = load_teacher(teacher_dir, torch.bfloat16)
    flops = training_flops_per_token(model, LENGTH, model)
    quantize_mlps(model)
    assert training_flops_per_token(model, LENGTH, model) == flops
    assert not [name for name in model.state_dict() if "mlp." in name]
    before = [buffer.clone() for buffer in model.model.layers[0].mlp.buffers()]
    model.float().bfloat16()  # as DeepSpeed's engine casts a model
    after = list(model.model.layers[0].mlp.buffers())
    assert [x.dtype for x in after] == [x.dtype for x in before]
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(after, before))


def test_kl_of(teacher_dir):
    model = load_teacher(teacher_dir, torch.bfloat16)
    torch.manual_seed(0)
    batches = [torch.randint(0, 96, (rows, 11)) for rows in (2, 1)]

    def log_probabilities():
        hidden = torch.cat([model.model(ids).last_hidden_state.flatten(0, 1) for ids in batches])
        return (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)

    with torch.no_grad():
        exact = log_probabilities()
        found = kl_of(quantize_mlps, model, [{"input_ids": ids} for ids in batches])
        changed = log_probabilities()
    naive = (exact.exp() * (exact - changed)).sum(-1).mean().item()
    assert naive > 1e-4  # it changes something
    assert math.isclose(found, naive, rel_tol=0.05)  # the logits are rounded to bf16


# ------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "stage, overrides, words",
    [
        (2, ["teacher_model.precision=fp16"], "precision: 'fp16' must be one of exact, fp8"),
        (3, [FP8], "stage 3 has no teacher; remove it"),
        (1, [FP8, "train.dtype=fp32"], "needs train.dtype bf16"),
        (2, [FP8, "train.kd_teacher_shard=always"], "set train.kd_teacher_shard=never"),
        (2, [FP8, "train.kd_teacher_offload=cpu"], "set train.kd_teacher_shard=never"),
    ],
)
def test_config_refusals(tmp_path, stage, overrides, words):
    file = write_config(tmp_path, stage, "teacher", "data")
    with pytest.raises(ConfigError, match=words):
        load_config(file, overrides)


def test_refused_without_a_gpu(tmp_path, teacher_dir, data_dir):
    file = write_config(tmp_path, 1, teacher_dir, data_dir)
    ctx = train.prepare(train.parse_args(["--cfg", str(file), FP8]))
    with pytest.raises(ValueError, match="fp8 needs a GPU of the Ada.* here is no GPU; set exact"):
        stages.build_stage(ctx)


def test_a_dry_run_knows_fp8(tmp_path, teacher_dir, data_dir, capsys, monkeypatch):
    """A GPU without it is refused; without a GPU the dry run says what the run needs."""
    arguments = train.parse_args(["--cfg", str(write_config(tmp_path, 1, teacher_dir, data_dir)), "--dry-run", FP8])
    needed = "fp8: the run needs a GPU of the Ada, Hopper or a later generation\n"
    train.prepare(arguments)
    assert needed in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ValueError, match="fp8 needs a GPU of the Ada.*, here is NVIDIA A100; set exact"):
        train.prepare(arguments)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    train.prepare(arguments)
    out = capsys.readouterr().out
    assert "memory per GPU" in out and needed not in out


@pytest.mark.parametrize("precision", ["exact", "fp8"])
def test_a_dry_run_counts_the_bytes_of_the_teacher(tmp_path, teacher_dir, precision):
    cfg = load_config(
        write_config(tmp_path, 2, teacher_dir, "data"), [f"teacher_model.precision={precision}", "train.dtype=bf16"]
    )
    estimated = preflight._teacher_bytes(cfg, load_teacher(teacher_dir), "cuda")
    teacher = load_teacher(teacher_dir, torch.bfloat16)
    if precision == "fp8":
        quantize_mlps(teacher)
    tensors = list(teacher.parameters())
    tensors += [layer.weight for layer in teacher.modules() if isinstance(layer, Fp8Linear)]
    assert estimated == sum(tensor.nbytes for tensor in tensors)


def test_unsupported_mlps_are_refused(teacher_dir):
    model = load_teacher(teacher_dir)
    model.model.layers[1].mlp.act = torch.nn.GELU()
    with pytest.raises(ValueError, match="needs MLPs with hidden_act silu; set exact"):
        quantize_mlps(model)
    assert not any(isinstance(block.mlp, Fp8SwiGLU) for block in model.model.layers)
    model = load_teacher(teacher_dir)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(80, 40)
    with pytest.raises(ValueError, match="hidden_size 40 and intermediate_size 80 must be multiples of 16; set exact"):
        quantize_mlps(model)


def test_a_teacher_that_would_be_sharded_is_refused(tmp_path, teacher_dir, monkeypatch):
    cfg = load_config(write_config(tmp_path, 2, teacher_dir, "data"), [FP8])
    monkeypatch.setattr(stages, "shard_teacher", lambda *_: (True, "it does not fit"))
    with pytest.raises(ValueError, match="needs a replica of the teacher on every GPU"):
        stages.teacher_engine_config(cfg, load_teacher(teacher_dir), "cuda", 2, print)


@pytest.fixture
def context(tmp_path, teacher_dir, data_dir, monkeypatch):
    """The context of a stage on the CPU, which is taken for an FP8 device: `torch._scaled_mm` runs
    there too."""
    monkeypatch.setattr(stages, "check_fp8_device", lambda device: None)

    def make(stage):
        if stage == 2:
            student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", [])[0]
            student.save_pretrained(tmp_path / "stage1" / "converted-hf")
        file = write_config(tmp_path, stage, teacher_dir, data_dir, dtype="bf16")
        return train.prepare(train.parse_args(["--cfg", str(file), FP8]))

    return make


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_is_built_with_an_fp8_teacher(context, stage, monkeypatch):
    monkeypatch.setattr(stages, "FP8_MAX_KL", 0.2)  # of random weights, which are rounded worse than trained ones
    built = stages.build_stage(context(stage))
    teacher = built.teacher if stage == 2 else built.model
    blocks = teacher.model.layers
    assert all(isinstance(block.mlp, Fp8SwiGLU) for block in (blocks if stage == 2 else blocks[:-1]))
    found = built.teacher_precision
    assert 0 < found["kl"] <= 0.2 and found["split"] == "held-out" and found["tokens"] % LENGTH == 0
    if stage == 2:
        assert not any(isinstance(module, Fp8SwiGLU) for module in built.model.modules())
        assert built.model.config.keep_full_attention_layers == KEPT
    json.dumps(found)


def test_a_teacher_that_fp8_changes_is_refused(context, monkeypatch):
    """A weight that meets zeros only changes no exact output, but is all that its row's scale
    leaves in FP8."""

    def with_outliers(name, dtype):
        teacher = load_teacher(name, dtype)
        with torch.no_grad():
            for block in teacher.model.layers:
                block.mlp_norm.weight[0] = 0
                block.mlp.gate_proj.weight[:, 0] = 1e6
        return teacher

    monkeypatch.setattr(stages, "load_teacher", with_outliers)
    monkeypatch.setattr(stages, "FP8_MAX_KL", 0.2)
    with pytest.raises(ValueError, match=r"precision: fp8: KL\(exact \|\| fp8\) is .* more than 0.2; set exact"):
        stages.build_stage(context(1))

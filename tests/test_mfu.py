"""FLOPs of a training step against PyTorch's own count of the operations that run, and the
throughput in the logs."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hf_trainer
from distill_model import StudentConfig, StudentForCausalLM
from hf_trainer import ProgressBar, Throughput
from mfu import alignment_flops_per_token, device_peak_flops, peak_flops, training_flops_per_token
from wrapper import AttentionAlignmentModel

ROWS, LENGTH = 2, 24
CONFIG = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROPE = 2 * 8 / ROWS  # the angles of 8 frequencies, a GEMM for PyTorch, which all sequences share; not counted by mfu.py
GEMMS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def model_of(**changes) -> StudentForCausalLM:
    layers = list(range(CONFIG["num_hidden_layers"]))
    return StudentForCausalLM(StudentConfig(**CONFIG | {"keep_full_attention_layers": layers} | changes)).train()


def count(step, only=None) -> float:
    """FLOPs per token of the operations that step() runs; only: of these alone."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if only is None or operation in only) / (ROWS * LENGTH)


@pytest.mark.parametrize("tied", [True, False])
def test_finetuning_takes_what_runs(tied):
    """Of a softmax model, whose every operation PyTorch counts. Logits are made whole here: the
    fused head computes some of them again, which is no FLOP of the model."""
    model = model_of(tie_word_embeddings=tied)
    ids = torch.randint(0, 100, (ROWS, LENGTH))

    def step():
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()

    assert count(step) == training_flops_per_token(model, LENGTH) + ROPE


def test_the_teachers_forward_pass_counts_in_stage_2():
    teacher, student = model_of().requires_grad_(False), model_of()
    ids = torch.randint(0, 100, (ROWS, LENGTH))

    def step():
        logits = teacher(input_ids=ids, use_cache=False).logits
        (student(input_ids=ids, use_cache=False).logits * logits).mean().backward()

    assert count(step) == training_flops_per_token(student, LENGTH, teacher) + 2 * ROPE


@pytest.mark.parametrize("name", ["gdn_v4", "gla_v1"])
def test_gemms_of_a_hybrid(name):
    """Of linear attention the projections are counted, and not the recurrence."""
    teacher = model_of()
    hybrid = StudentForCausalLM.from_teacher(teacher, name, [1])[0].train()
    ids = torch.randint(0, 100, (ROWS, LENGTH))

    def step():
        hybrid(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()

    softmax_attention = 3 * 4 * LENGTH * 4 * 16  # one layer of 4 heads, forward and twice backward
    assert count(step, GEMMS) == training_flops_per_token(hybrid, LENGTH) - softmax_attention


def test_alignment_takes_what_runs():
    """The teacher's blocks without lm_head and the last MLP; students forward and backward. The
    gates that read what o_proj reads are projections of the input, whose gradient nobody needs."""
    teacher = model_of()
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0]
    model = AttentionAlignmentModel(teacher, student).train()
    ids = torch.randint(0, 100, (ROWS, LENGTH))

    def step():
        model(ids)["loss"].backward()

    softmax_attention = 3 * 4 * LENGTH * 4 * 16  # three layers of 4 heads, forward
    assert count(step, GEMMS) == alignment_flops_per_token(model, LENGTH) - softmax_attention


def test_flops_by_hand():
    small = CONFIG | {"num_hidden_layers": 2, "num_attention_heads": 2, "keep_full_attention_layers": [0, 1]}
    teacher = StudentForCausalLM(StudentConfig(**small))
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v2")[0]  # q, k, v, o of 32 x 32, two of 32 x 2
    attention, mlp, head = 4 * 32 * 32, 3 * 32 * 48, 32 * 100
    linear = attention + 2 * 32 * 2
    scores = 4 * LENGTH * 32  # of one softmax attention
    forward = 2 * (2 * (attention + mlp) + head) + 2 * scores
    trained = 6 * (2 * (linear + mlp) + head)
    assert training_flops_per_token(student, LENGTH) == trained
    assert training_flops_per_token(student, LENGTH, teacher) == trained + forward
    aligned = AttentionAlignmentModel(teacher, student)
    frozen = 2 * (2 * attention + mlp) + 2 * scores  # the last block has no MLP
    assert alignment_flops_per_token(aligned, LENGTH) == frozen + 2 * (4 * linear + 2 * 32 * 32)


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


def test_there_is_no_peak_without_a_gpu_or_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device_peak_flops("cuda", torch.bfloat16) == 989e12
    assert device_peak_flops("cuda", torch.float32) is None
    assert device_peak_flops("cpu", torch.bfloat16) is None


# ------------------------------------------------------------------------ in the logs
@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(hf_trainer, "time", SimpleNamespace(perf_counter=lambda: now.value))
    return now


@pytest.mark.parametrize("peak", [None, 8e6])
def test_throughput_of_known_times(clock, peak):
    """Steps of 2 and 3 s; an evaluation and a checkpoint of 10 s each take no part."""
    throughput = Throughput(tokens_per_step=1000, flops_per_token=5e3, peak_flops=peak)
    throughput.on_train_begin(None, None, None)
    for end in (2.0, 5.0):
        clock.value = end
        throughput.on_step_end(None, None, None)
    expected = {"tokens_per_second": 400.0}
    assert throughput.figures() == expected | ({"mfu": 0.25} if peak else {})
    clock.value = 15.0
    throughput.on_evaluate(None, None, None)
    clock.value = 25.0
    throughput.on_save(None, None, None)
    clock.value = 29.0
    throughput.on_step_end(None, None, None)
    assert throughput.figures()["tokens_per_second"] == 250.0


def test_time_left_after_a_resume(monkeypatch):
    """Step 91 to 100 of 100, a second each: the 90 steps of the process before are no part of the
    rate."""
    import tqdm.std

    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(tqdm.std, "time", lambda: now.value)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=100, global_step=90)
    bar = ProgressBar()
    bar.on_train_begin(None, state, None)
    for step in range(91, 96):
        now.value += 1.0
        state.global_step = step
        bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.23456, "tokens_per_second": 83246.1, "mfu": 0.4312, "other": 1})
    shown = str(bar.training_bar)
    bar.on_train_end(None, state, None)
    assert "95/100" in shown, shown
    assert "00:05<00:05" in shown, shown
    assert "1.00it/s" in shown, shown
    assert "loss=1.23, tokens_per_second=83,246, mfu=43.1%" in shown

"""Documents whose number is fixed, as a CUDA graph needs it: no shape depends on them, the host
reads nothing of them, and results are those of documents as many as there are.

FLA's own kernels run in Triton's interpreter, in a process per student: see triton_interpreter.py.
This file is that process's script too, so it must not import FLA at its top.
"""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from runtime.data import DOCUMENT_LENGTHS, collate, most_documents

import numpy
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
HIDDEN, HEADS, HEAD_DIM, LENGTH = 24, 2, 16, 75
# One token, odd lengths, across chunks of 64; several.
ROWS = ([1, 70, 2, 1, 1], [3, 30, 42])
MOST = 11  # documents, of 8 that there are
HOST_READERS = ("gla_v1", "gsa_v1", "hgrn2_v1", "mamba2_v1", "path_v1", "path_fox_v1", "lolcats_v1")
STATIC = ("gdn_v7", "kda_v1", "deltanet_v1", "rwkv7_v1", "fox_v1")


def document_ids():
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS])


class HostRead(Exception):
    pass


class NoHostReads(TorchDispatchMode):
    """Raises HostRead where a GPU would make the host wait for a value."""

    OPS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.repeat_interleave.Tensor,
        torch.ops.aten.unique_consecutive.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.OPS:
            raise HostRead(str(func))
        return func(*args, **kwargs or {})

    def __enter__(self):
        def tolist(tensor):
            raise HostRead("tolist")

        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)


def kernel_results(name: str) -> str:
    """What became of a student's layer with FLA's kernels: "equal", or what went wrong. Memory that
    is not written to holds NaN."""
    from triton_interpreter import interpret

    interpret()
    import fla.layers
    import fla.models
    import fla.utils

    fla.utils.device_platform = "cuda"  # no stand-ins
    from distill_model import STUDENT_ATTENTION_MAP, StudentConfig
    from distill_model.documents import Documents, run_attention

    torch.compiler.set_stance("force_eager")  # the compiler refuses what a dispatch mode observes
    torch.use_deterministic_algorithms(True)
    sizes = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=1, head_dim=HEAD_DIM)
    config = StudentConfig(**sizes, num_hidden_layers=1, vocab_size=8, intermediate_size=8, student_name=name)
    torch.manual_seed(0)
    layer = STUDENT_ATTENTION_MAP[name](config, 0).train()
    layer.init_fresh()
    dtype = torch.float16 if name == "deltanet_v1" else torch.float32  # its chunked kernel takes no fp32
    layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = document_ids()
    inputs = torch.randn(len(ROWS), LENGTH, HIDDEN, dtype=dtype)
    unchanged = inputs.clone()
    d_output = torch.randn_like(inputs)
    cos, sin = (torch.randn(1, ids.numel(), HEAD_DIM, dtype=dtype) for _ in range(2))
    found = []
    for most, guard in ((None, nullcontext()), (MOST, NoHostReads())):
        layer.zero_grad()
        x = inputs.detach().requires_grad_()
        try:
            with guard:
                documents = Documents.of(ids, most)
                output = run_attention(layer, x, documents, position_embeddings=(cos, sin))
                output.backward(d_output)
        except HostRead as read:
            return f"read on the host: {read}"
        if not torch.equal(inputs, unchanged):
            return "overwrites its input"
        found.append([output.detach(), x.grad] + [parameter.grad for parameter in layer.parameters()])
    dynamic, static = found
    if not all(x is None or x.isfinite().all() for x in dynamic):
        return "not finite"
    pairs = [(a, b) for a, b in zip(dynamic, static, strict=True) if a is not None]
    different = [place for place, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    return f"different: {different}" if different else "equal"


def in_own_process(name: str) -> str:
    """`kernel_results(name)`, of a process of its own."""
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_kernels_of_fla_give_the_same_without_host_reads():
    assert in_own_process("gdn_v4") == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", STATIC)
def test_kernels_of_other_students_give_the_same_without_host_reads(name):
    assert in_own_process(name) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", HOST_READERS)
def test_students_that_rule_graphs_out_do_read_on_the_host(name):
    """Where a version of FLA does not, the student can have graphs."""
    assert in_own_process(name).startswith("read on the host")


def test_which_students_read_documents_on_the_host():
    from distill_model import STUDENT_ATTENTION_MAP
    from distill_model.student_layers import reads_documents_on_host

    found = [name for name in STUDENT_ATTENTION_MAP if reads_documents_on_host(name)]
    assert sorted(found) == sorted(HOST_READERS)


@pytest.mark.parametrize("most", [8, MOST, 1000])
def test_static_documents_are_the_same_documents(most):
    from distill_model.documents import PADDING, Documents, tokens_of

    ids = document_ids()
    ids[1, -42:] = PADDING
    dynamic = Documents.of(ids)
    with NoHostReads():
        static = Documents.of(ids, most)
    count = len(dynamic.cu_seqlens)
    assert len(static.cu_seqlens) == min(most, ids.numel()) + 2
    assert torch.equal(static.cu_seqlens[:count], dynamic.cu_seqlens)
    assert (static.cu_seqlens[count:] == ids.numel()).all()
    assert static.cu_seqlens.dtype == torch.int32
    assert torch.equal(static.positions, dynamic.positions)
    assert torch.equal(static.real, dynamic.real) and len(static.real) == ids.numel() - 42
    assert [length for length in static.lengths if length] == dynamic.lengths == ROWS[0] + ROWS[1]
    assert static.longest == LENGTH and dynamic.longest == 70
    # As FLA's autograd functions and activation checkpointing hand it on.
    assert tokens_of(static.cu_seqlens.detach().contiguous()) == ids.numel()
    assert tokens_of(dynamic.cu_seqlens) is None


def test_more_documents_than_said_are_an_error():
    from distill_model.documents import Documents

    with pytest.raises(RuntimeError):
        Documents.of(document_ids(), 7)
    every_token = torch.arange(12)[None]
    assert Documents.of(every_token, 12).lengths == [1] * 12 + [0]


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_static_chunk_indices_are_flas_and_then_the_empty_document(chunk_size):
    from fla.ops.utils.index import prepare_chunk_indices

    from distill_model.documents import Documents

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        share = torch.rand((), generator=generator)
        ids = (torch.rand(3, 67, generator=generator) < share).cumsum(1)
        expected = prepare_chunk_indices(Documents.of(ids).cu_seqlens, chunk_size)
        most = len(Documents.of(ids).lengths) + 2
        found = prepare_chunk_indices(Documents.of(ids, most).cu_seqlens, chunk_size)
        assert found.dtype == expected.dtype == torch.int32
        assert len(found) == -(-ids.numel() // chunk_size) + most
        assert torch.equal(found[: len(expected)], expected)
        assert (found[len(expected) :] == torch.tensor([most, 0])).all()


def test_stand_ins_give_the_same_to_the_bit():
    """And the kept layers. The other students: tests/test_documents.py."""
    from test_documents import document_ids, gradients, hybrid, random_ids

    from distill_model import STUDENT_ATTENTION_MAP

    ids, groups = random_ids(), document_ids()
    weights = torch.randn(*ids.shape, 40).double()
    for name in STUDENT_ATTENTION_MAP:
        model = hybrid(name)
        found = []
        for most in (None, 40):
            output = model.model(ids, document_ids=groups, max_documents=most).last_hidden_state
            (output * weights).sum().backward()
            found.append({"output": output.detach()} | gradients(model))
        dynamic, static = found
        assert dynamic.keys() == static.keys()
        assert [key for key in dynamic if not torch.equal(dynamic[key], static[key])] == [], name


@pytest.mark.parametrize("kind", ["mse", "l2"])
def test_stage_1_counts_real_tokens_alone(kind):
    from test_documents import gradients, padded_document_ids, random_ids, shape

    from distill_model import StudentConfig, StudentForCausalLM
    from wrapper import AttentionAlignmentModel

    torch.manual_seed(0)
    teacher = StudentForCausalLM(StudentConfig(**shape(num_hidden_layers=2))).double()
    student, _ = StudentForCausalLM.from_teacher(teacher, "gdn_v4")
    model = AttentionAlignmentModel(teacher, student.double(), kind)
    ids, groups = random_ids(), padded_document_ids()
    found = []
    for most in (None, 40):
        outputs = model(ids, groups, max_documents=most)
        outputs["loss"].backward()
        found.append(({name: value.detach() for name, value in outputs.items()}, gradients(model)))
    (dynamic, expected), (static, got) = found
    for name, value in dynamic.items():
        torch.testing.assert_close(static[name], value, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item(), msg=name)
    changed = ids.clone()
    changed[groups == -1] = 3
    for name, value in model(changed, groups, max_documents=40).items():
        assert torch.equal(value, static[name])


def test_a_number_of_documents_that_no_micro_batch_exceeds():
    """Any rows, one perhaps twice, with padding."""
    generator = numpy.random.default_rng(0)
    rows = []
    for _ in range(9):
        lengths = generator.multinomial(20, [1 / 6] * 6)
        lengths = lengths[: generator.integers(1, 7)]
        rows.append(
            {
                "input_ids": numpy.zeros(20, "int32"),
                DOCUMENT_LENGTHS: lengths[lengths > 0] if lengths.any() else lengths + 1,
            }
        )
    dataset = Dataset.from_list(rows)
    largest = 0
    for first in range(9):
        for second in range(9):
            ids = collate([rows[first], rows[second]])["document_ids"]
            largest = max(largest, sum(len(row.unique()) for row in ids))
    most = max(len(row[DOCUMENT_LENGTHS]) for row in rows)
    assert largest <= most_documents(dataset, 2) == 2 * (most + 1)
    assert most_documents(dataset, 1) == most + 1
    assert most_documents(dataset, 18) == 2 * sum(len(row[DOCUMENT_LENGTHS]) + 1 for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(kernel_results(sys.argv[1]))

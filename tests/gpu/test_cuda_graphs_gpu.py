"""On a GPU: training passes replayed as CUDA graphs against the same passes launched kernel by
kernel."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_students_gpu import LAYERS, OPTIONS, student_of, takes_documents_in_graphs

from cuda_graphs import EAGER_CALLS, GraphedForward, switch_off_all
from distill_model import DistillationLoss, StudentConfig, StudentForCausalLM
from distill_model.documents import PADDING
from layer_selection.gates import GatedModel
from wrapper import AttentionAlignmentModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CALLS, ACCUMULATED, BATCH, LENGTH, MOST = EAGER_CALLS + 5, 2, 2, 131, 40
CONFIG = StudentConfig(
    hidden_size=128,
    intermediate_size=192,
    vocab_size=509,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    num_hidden_layers=3,
    keep_full_attention_layers=[0, 1, 2],
    tie_word_embeddings=True,
)


def models(name, stage):
    """(the model that trains, its teacher). target: of stage 1."""
    torch.manual_seed(0)
    teacher = StudentForCausalLM(CONFIG).to("cuda", torch.bfloat16).eval()
    student = StudentForCausalLM.from_teacher(teacher, student_of(name), [1] if stage > 1 else [], OPTIONS.get(name))[
        0
    ].to("cuda", torch.bfloat16)
    if stage == 1:
        return AttentionAlignmentModel(copy.deepcopy(teacher), student).train(), teacher
    return student.train(), teacher


def train(
    name,
    stage,
    graphed,
    checkpointing=False,
    documents=False,
    max_documents=None,
):
    """Losses and weights of CALLS micro-batches, with an optimiser step after every ACCUMULATED
    ones. documents: the tokens are of documents, at most MOST in a micro-batch, and padding."""
    model, teacher = models(name, stage)
    teacher.model.requires_grad_(False)
    if stage > 1:
        model.set_activation_checkpointing(checkpointing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"max_documents": max_documents} if documents else {}
    wrap = GraphedForward if graphed else partial
    forward, read = wrap(model, **options), wrap(teacher.model, **options)
    sgd = torch.optim.SGD(parameters, 0.05)
    generator, losses = torch.Generator().manual_seed(1), []
    for call in range(CALLS):
        ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=generator).cuda()
        inputs = {"input_ids": ids}
        if documents:
            begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.2 * torch.rand((), generator=generator)
            groups = begins.cumsum(1).clamp(max=MOST // BATCH - 2).int()
            groups[:, -5:] = PADDING
            inputs["document_ids"] = groups.cuda()
        batch = dict(inputs)
        if stage > 1:
            inputs |= {"use_cache": False, "labels": ids}
        if stage == 2:
            with torch.no_grad():
                hidden = read(**batch, use_cache=False)["last_hidden_state"]
            inputs |= {
                "teacher_hidden_states": hidden,
                "teacher_head_weight": teacher.lm_head.weight,
                "distillation": DistillationLoss(ce_weight=0.5),
            }
        loss = forward(**inputs)["loss"]
        (loss / 3).backward()  # not a power of two, so that the last bit shows where the scale enters
        losses.append(loss.detach())
        if graphed and stage == 2:
            assert (read.forward_graph is not None) == (call >= EAGER_CALLS)
        if call % ACCUMULATED:
            sgd.step()
            sgd.zero_grad()
    return torch.stack(losses), parameters


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_graphs_equal_launches_to_the_bit(name, stage):
    losses, weights = train(name, stage, graphed=False)
    graphed_losses, graphed_weights = train(name, stage, graphed=True)
    assert losses.isfinite().all()
    assert losses.unique().numel() > CALLS // 2
    assert torch.equal(losses, graphed_losses), losses - graphed_losses
    assert all(map(torch.equal, weights, graphed_weights))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in LAYERS if takes_documents_in_graphs(name)])
def test_graphs_of_documents_equal_launches_to_the_bit(name, stage):
    """With as many documents at most; and nearly launches for as many as there are."""
    launched, weights = train(name, stage, graphed=False, max_documents=MOST, documents=True)
    graphed, graphed_weights = train(name, stage, graphed=True, max_documents=MOST, documents=True)
    dynamic, _ = train(name, stage, graphed=False, documents=True)
    assert launched.isfinite().all()
    assert launched.unique().numel() > CALLS // 2
    assert torch.equal(launched, graphed), launched - graphed
    assert all(map(torch.equal, weights, graphed_weights))
    torch.testing.assert_close(launched, dynamic, rtol=2e-2, atol=0)


def test_graphs_of_documents_with_activation_checkpointing():
    options = dict(checkpointing=True, max_documents=MOST, documents=True)
    losses, weights = train("gdn_v7", 2, False, **options)
    graphed_losses, graphed_weights = train("gdn_v7", 2, True, **options)
    assert torch.equal(losses, graphed_losses)
    assert all(map(torch.equal, weights, graphed_weights))


def test_a_student_that_reads_documents_on_the_host_names_the_cure():
    with pytest.raises(RuntimeError, match="set train.cuda_graphs=false"):
        train("gla_v1", 3, True, max_documents=MOST, documents=True)


@pytest.mark.parametrize("checkpointing", ["mlp", True])
def test_graphs_equal_launches_with_activation_checkpointing(checkpointing):
    losses, weights = train("gdn_v4", 3, False, checkpointing)
    graphed_losses, graphed_weights = train("gdn_v4", 3, True, checkpointing)
    assert torch.equal(losses, graphed_losses)
    assert all(map(torch.equal, weights, graphed_weights))


def gate_logits(graphed):
    """The logits of gates over both attentions of every layer, after some steps."""
    torch.manual_seed(0)
    teacher = StudentForCausalLM(CONFIG).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    student = StudentForCausalLM.from_teacher(teacher, "gdn_v4")[0].to("cuda", torch.bfloat16)
    cfg = SimpleNamespace(train=SimpleNamespace(gradient_checkpointing=False))
    model = GatedModel(SimpleNamespace(cfg=cfg, teacher=teacher, student=student, device=student.device), 1).train()
    forward, read = (GraphedForward(model), GraphedForward(teacher.model)) if graphed else (model, teacher.model)
    adam = torch.optim.Adam([model.logits], 0.1)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for call in range(CALLS):
        ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=generator).cuda()
        weights = torch.rand(BATCH, LENGTH, generator=generator).cuda() / ids.numel()
        model.temperature.fill_(0.8**call)
        with torch.no_grad():
            hidden = read(input_ids=ids, use_cache=False)["last_hidden_state"]
        forward(input_ids=ids, token_weights=weights, teacher_hidden_states=hidden)["loss"].backward()
        adam.step()
        adam.zero_grad()
        seen.append(model.logits.detach().clone())
    assert not graphed or forward.forward_graph is not None
    return torch.stack(seen)


def test_gates_learn_the_same_with_graphs():
    launched = gate_logits(graphed=False)
    assert launched.isfinite().all() and launched.unique(dim=0).shape[0] == CALLS
    assert torch.equal(launched, gate_logits(graphed=True))


def graph_of_stage_3():
    model, _ = models("gdn_v4", 3)
    forward, ids = GraphedForward(model), torch.ones(BATCH, LENGTH, dtype=torch.long, device="cuda")
    for _ in range(EAGER_CALLS + 1):
        forward(input_ids=ids, labels=ids, use_cache=False)["loss"].backward()
    return model, forward, ids


def test_another_call_than_the_recorded_one_is_refused():
    model, forward, ids = graph_of_stage_3()
    with pytest.raises(RuntimeError, match="recorded with input_ids"):
        forward(input_ids=ids[:1], labels=ids[:1], use_cache=False)  # would be broadcast
    with pytest.raises(RuntimeError, match="use_cache"):
        forward(input_ids=ids, labels=ids, use_cache=True)
    model.to("cpu").to("cuda")
    with pytest.raises(RuntimeError, match="moved in memory"):
        forward(input_ids=ids, labels=ids, use_cache=False)


def test_without_gradients_and_when_switched_off_hooks_see_every_call():
    model, forward, ids = graph_of_stage_3()
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    forward(input_ids=ids, labels=ids, use_cache=False)
    assert not seen
    with torch.no_grad():
        forward(input_ids=ids[:1], labels=ids[:1], use_cache=False)
    forward.switch_off()
    forward(input_ids=ids[:1], labels=ids[:1], use_cache=False)
    assert len(seen) == 2


def test_graphs_that_are_switched_off_give_their_memory_back():
    """To eager calls; it is free only after the last graph of the shared pool is dropped."""
    torch.cuda.empty_cache()
    model, forward, ids = graph_of_stage_3()
    reader = GraphedForward(models("gdn_v4", 3)[1].model.requires_grad_(False))
    for _ in range(EAGER_CALLS + 1):
        reader(input_ids=ids, use_cache=False)
    model.zero_grad()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    switch_off_all()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held

"""Conversations: the chat template's text, what of it is learned, and that training and evaluation
take their means over that alone."""

import json
import math

from runtime.config import load_config
from runtime.conversations import Conversations
from runtime.data import LOSS_MASK, DataError, collate, load_tokenizer, open_chunks, open_split

import pytest
import torch
from conftest import KEPT, options, save_tokenizer, write_config
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoTokenizer

import preprocess_chunk
import preprocess_download_tokenize as tokenize_script
from convert import load_teacher
from distill_model import StudentForCausalLM
from distill_model.documents import predicting_learned
from distill_model.losses import DistillationLoss, forward_kl, micro_batch_weights
from heldout import ModelOutput, heldout_cross_entropy, heldout_kl, position_weights
from layer_selection.bench import Bench
from layer_selection.gates import GateTraining

CHATML = (
    "{% for m in messages %}{{ '[start]' + m.role + '\n' }}"
    "{{ m.content + '[end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[start]assistant\n' }}{% endif %}"
)
# Shows the thinking of the last message only, as Qwen3's template does.
THINKING = (
    "{% for m in messages %}{{ '[start]' + m.role + '\n' }}"
    "{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ text + '[end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[start]assistant\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRICT = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + (
    "{{ m.role + m.content }}{% endfor %}"
)
TURNS = [("system", "be brief"), ("user", "2+2"), ("assistant", "4"), ("user", "3+3"), ("assistant", "six (6)")]


def messages(turns=TURNS, **of_last):
    found = [{"role": role, "content": content} for role, content in turns]
    found[-1] |= of_last
    return found


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A tokenizer with control tokens as ChatML has them, and a
    chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[start]", "[end]"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(tmp_path, chat_dir, rows, *more, name="chats", **values):
    """The tokenised folder of these rows."""
    file = tmp_path / f"{name}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    values = {"loss_on": "assistant", "holdout": 0} | values
    paths = options(dataset_name=file, tokenizer=chat_dir, output_dir=tmp_path / f"{name}-tokens")
    tokenize_script.main([*paths, *options(**values), *more])
    return tmp_path / f"{name}-tokens"


def learned_texts(folder, tokenizer, split="train"):
    """Of each row the whole text and the runs of it that are learned."""
    found = []
    for row in open_split(folder, split):
        runs, last = [], None
        mask = row.get(LOSS_MASK) or [True] * len(row["input_ids"])
        for i, (token, learned) in enumerate(zip(row["input_ids"], mask, strict=True)):
            if learned:
                if last != i - 1:
                    runs.append([])
                runs[-1].append(token)
                last = i
        found.append((tokenizer.decode(row["input_ids"]), [tokenizer.decode(run) for run in runs]))
    return found


@pytest.mark.parametrize(
    "loss_on, expected",
    [("assistant", ["4[end]", "six (6)[end]"]), ("completion", ["six (6)[end]"]), ("all", None)],
)
def test_what_is_learned_of_a_conversation(tmp_path, chat_dir, loss_on, expected):
    tokenizer = load_tokenizer(chat_dir)
    folder = make(tmp_path, chat_dir, [{"messages": messages()}] * 2, loss_on=loss_on)
    text = tokenizer.apply_chat_template(messages(), tokenize=False) + tokenizer.eos_token
    for row in open_split(folder, "train"):
        assert row["input_ids"] == tokenizer(text)["input_ids"]
    for whole, runs in learned_texts(folder, tokenizer):
        assert whole == text
        assert runs == (expected or [text])
    assert (LOSS_MASK in open_split(folder, "train").column_names) == (loss_on != "all")


def test_prompts_with_completions_and_texts_beside_them(tmp_path, chat_dir):
    """A plain text among conversations is learned as a whole."""
    tokenizer = load_tokenizer(chat_dir)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": messages(TURNS[:2]), "completion": messages(TURNS[2:3])}]
    found = learned_texts(make(tmp_path, chat_dir, rows, loss_on="completion"), tokenizer)
    assert [runs for _, runs in found] == [["b[end]"], ["4[end]"]]
    found = learned_texts(make(tmp_path, chat_dir, [{"text": "plain"}], name="texts"), tokenizer)
    assert found == [("plain<eos>", ["plain<eos>"])]


def test_turns_keep_their_thinking(tmp_path, chat_dir):
    """Where the template drops the thinking of earlier turns, each turn is a document as it is
    generated, in one split; the last message after it is left out."""
    tokenizer = load_tokenizer(chat_dir)
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    turns = messages()
    turns[2]["reasoning_content"] = "two and two"
    turns[4]["reasoning_content"] = "three twice"
    rows = [{"messages": turns + [{"role": "user", "content": "thanks"}]}] * 4
    folder = make(tmp_path, chat_dir, rows, chat_template=template, holdout=0.5)
    for split in ("train", "heldout"):
        texts = learned_texts(folder, tokenizer, split)
        answers = ["<think>two and two</think>4[end]", "<think>three twice</think>six (6)[end]"]
        assert [runs for _, runs in texts] == [[answers[0]], [answers[1]]] * 2
        assert texts[0][0].endswith(answers[0] + "\n<eos>") and "thanks" not in texts[1][0]
    folder = make(tmp_path, chat_dir, rows, chat_template=template, name="all", loss_on="all")
    whole = [text for text, _ in learned_texts(folder, tokenizer)]
    assert len(whole) == 12 and all(sum(t in text for text in whole) == 4 for t in ("two and two", "three twice"))


def test_the_end_is_learned_where_the_template_does_not_end_a_turn(tmp_path, chat_dir):
    template = tmp_path / "bare.jinja"
    template.write_text(NO_END)
    folder = make(tmp_path, chat_dir, [{"messages": messages()}], chat_template=template)
    assert learned_texts(folder, load_tokenizer(chat_dir))[0][1] == ["4", "six (6)", "<eos>"]


def test_control_tokens_in_messages_are_text(tmp_path, chat_dir):
    tokenizer = load_tokenizer(chat_dir)
    attack = messages([("user", "say [end] now"), ("assistant", "[start]")])
    (row,) = open_split(make(tmp_path, chat_dir, [{"messages": attack}]), "train")
    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("[end]")) == 2
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(attack, tokenize=False) + "<eos>"
    learned = [token for token, learned in zip(row["input_ids"], row[LOSS_MASK]) if learned]
    assert tokenizer.decode(learned) == "[start][end]" and len(learned) == 8


BAD = {
    "no assistant": ([{"messages": messages(TURNS[:2])}], "row 1: has no assistant turn to learn; remove"),
    "empty": ([{"messages": []}], "row 1: is no list of messages; each is an object with role and content"),
    "no role": ([{"messages": [{"from": "human", "value": "a"}]}], "row 1: message 1 has no role"),
    "parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
        "row 1: message 1 has content of type list, not text; join",
    ),
    "lost thinking": (
        [{"messages": messages(reasoning_content="hm, six")}],
        "row 1: the chat template drops the thinking of message 5; write it to the content between <think> and",
    ),
    "no columns": ([{"chat": "x"}], "has no column 'messages' or 'prompt' and 'completion' or 'text', only chat"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations_are_one_line_and_may_be_skipped(tmp_path, chat_dir, kind, capsys):
    rows, message = BAD[kind]
    with pytest.raises(DataError) as error:
        make(tmp_path, chat_dir, rows)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "chats.jsonl" in str(error.value)
    assert not (tmp_path / "chats-tokens").exists()
    make(
        tmp_path,
        chat_dir,
        [*([{"messages": messages()}] * (kind != "no columns")), {"text": "x"}, *rows],
        "--skip_bad_files",
    )
    assert kind == "no columns" or "left out 1 conversations" in capsys.readouterr().out


def test_bad_templates_are_one_line_before_anything_is_read(tmp_path, chat_dir):
    rows = [{"messages": messages()}]
    plain = tmp_path / "plain"
    save_tokenizer(plain)
    broken, empty, strict = (tmp_path / f"{name}.jinja" for name in ("broken", "empty", "strict"))
    broken.write_text("{% for m in %}")
    empty.write_text(" \n")
    strict.write_text(STRICT)
    cases = [
        (str(plain), {}, "--tokenizer: .*plain' has no chat template; take the instruct model's tokenizer, or name"),
        (chat_dir, {"chat_template": "tool_use"}, "--chat_template: 'tool_use' is neither a file nor a template"),
        (chat_dir, {"chat_template": empty}, "empty.jinja: its chat template is empty"),
        (chat_dir, {"chat_template": broken}, "--chat_template: a question and its answer: the chat template refuses"),
    ]
    for tokenizer, values, message in cases:
        with pytest.raises(DataError, match=message):
            make(tmp_path, tokenizer, rows, **values)
    tool = [{"messages": messages([("user", "a"), ("tool", "b"), ("assistant", "c")])}]
    with pytest.raises(DataError, match=r"row 1: the chat template refuses it \(no tools here\); correct"):
        make(tmp_path, chat_dir, tool, chat_template=strict)
    with pytest.raises(DataError, match="--chat_template: is for conversations"):
        tokenize_script.parse_args([*options(dataset_name="a", tokenizer="b", output_dir="c", chat_template="d")])


def test_another_template_or_loss_makes_other_data(tmp_path, chat_dir):
    rows = [{"messages": messages()}]
    make(tmp_path, chat_dir, rows)
    with pytest.raises(DataError, match="was made with loss_on 'assistant', not 'completion'"):
        make(tmp_path, chat_dir, rows, loss_on="completion")
    template = tmp_path / "bare.jinja"
    template.write_text(NO_END)
    with pytest.raises(DataError, match="was made with chat_template"):
        make(tmp_path, chat_dir, rows, chat_template=template)
    text = [word for word in options(dataset_name=tmp_path / "chats.jsonl", tokenizer=chat_dir, text_field="messages")]
    with pytest.raises(DataError, match="was made with"):
        tokenize_script.main([*text, *options(output_dir=tmp_path / "chats-tokens", holdout=0)])


def test_the_mask_travels_in_the_chunks(tmp_path, chat_dir):
    """Chunks of which nothing is learned are left out."""
    rows = [{"messages": messages([("user", "long " * 20), ("assistant", f"answer {i}")])} for i in range(9)]
    tokens = make(tmp_path, chat_dir, rows)
    preprocess_chunk.main(options(tokenized_dataset_path=tokens, context_length=16, output_dir=tmp_path))
    ids = [token for row in open_split(tokens, "train") for token in row["input_ids"]]
    mask = [learned for row in open_split(tokens, "train") for learned in row[LOSS_MASK]]
    starts = [i for i in range(0, len(ids) - 15, 16) if any(mask[i + 1 : i + 16])]
    chunks = open_chunks(str(tmp_path / "chunked_context16"), 16)
    assert chunks.train["input_ids"][:] == [ids[i : i + 16] for i in starts]
    assert chunks.train[LOSS_MASK][:] == [mask[i : i + 16] for i in starts]
    assert len(starts) < len(ids) // 16 and chunks.metadata["loss_on"] == "assistant"
    batch = collate([chunks.train.with_format("numpy")[i] for i in (0, 1)])
    assert batch[LOSS_MASK].dtype == torch.bool and batch[LOSS_MASK].tolist() == [mask[i : i + 16] for i in starts[:2]]


# ------------------------------------------------------------------------ losses
def tensors(learned=0.4):
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    return hidden, weight, torch.randn(3, 7, 6), torch.randn(11, 6), torch.rand(3, 7) < learned


def naive(hidden, weight, teacher_hidden, teacher_weight, ids, mask, tau, ce_weight):
    """The loss from all logits, over the tokens that are learned, in float64."""
    student = hidden.double() @ weight.double().mT
    teacher = teacher_hidden.double() @ teacher_weight.double().mT
    terms = []
    for row in range(len(ids)):
        for place in range(1, ids.shape[1]):
            if mask[row, place]:
                s = log_softmax(student[row, place - 1] / tau, -1)
                t = log_softmax(teacher[row, place - 1] / tau, -1)
                ce = cross_entropy(student[row, place - 1], ids[row, place])
                terms.append(tau**2 * (t.exp() * (t - s)).sum() + ce_weight * ce)
    return torch.stack(terms).mean()


def test_the_masked_loss_is_the_mean_over_learned_tokens():
    hidden, weight, teacher_hidden, teacher_weight, mask = tensors()
    ids = torch.randint(11, (3, 7))
    expected = naive(hidden, weight, teacher_hidden, teacher_weight, ids, mask, 1.5, 0.3)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = DistillationLoss(1.5, 1.0, 0.3)
    labels = ids.masked_fill(~mask, -100)
    value = loss(hidden, weight, teacher_hidden, teacher_weight, labels, mask)
    torch.testing.assert_close(value.double(), expected)
    for found, other in zip(torch.autograd.grad(value, (hidden, weight)), wanted):
        torch.testing.assert_close(found, other)
    nothing = loss(hidden, weight, teacher_hidden, teacher_weight, labels * 0 - 100, mask & False)
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, (hidden, weight)))


def test_without_a_mask_the_loss_is_the_same_to_the_bit():
    hidden, weight, teacher_hidden, teacher_weight, _ = tensors()
    args = (hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), weight, teacher_weight)
    loss = DistillationLoss()(hidden, weight, teacher_hidden, teacher_weight)
    assert torch.equal(loss, forward_kl(*args))
    assert micro_batch_weights([None, None], torch.device("cpu")) == [1.0, 1.0]


def test_every_learned_token_of_a_step_weighs_the_same():
    """Micro-batches with different numbers of them, one with none, sum to the loss of the whole."""
    hidden, weight, teacher_hidden, teacher_weight, mask = tensors()
    mask[1] = False
    loss = DistillationLoss()
    whole = loss(hidden, weight, teacher_hidden, teacher_weight, loss_mask=mask)
    weights = micro_batch_weights(list(predicting_learned(mask).split(1)), torch.device("cpu"))
    parts = [
        loss(hidden[i : i + 1], weight, teacher_hidden[i : i + 1], teacher_weight, loss_mask=mask[i : i + 1])
        * weights[i]
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts) / 3, whole)
    assert predicting_learned(mask).sum() == mask[:, 1:].sum() and weights[1] == 0


def test_heldout_figures_are_means_over_learned_tokens():
    hidden, weight, teacher_hidden, teacher_weight, mask = tensors()
    ids = torch.randint(11, (3, 7))
    mask[2] = False
    student = ModelOutput(hidden, weight)
    teacher = ModelOutput(teacher_hidden, teacher_weight)
    weights = position_weights({"input_ids": ids, "loss_mask": mask})
    kl = heldout_kl(student, teacher, weights).mean()
    both = naive(hidden, weight, teacher_hidden, teacher_weight, ids, mask, 1.0, 1.0)
    only_kl = naive(hidden, weight, teacher_hidden, teacher_weight, ids, mask, 1.0, 0.0)
    torch.testing.assert_close(kl.double(), only_kl)
    ce = heldout_cross_entropy(student, ids, weights)
    torch.testing.assert_close(ce.mean().double(), both - only_kl)
    assert ce[2] == 0 and math.isfinite(ce.sum())


def test_a_template_that_begins_a_turn_otherwise_is_refused(chat_dir):
    tokenizer = load_tokenizer(chat_dir)
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant: ' }}{% endif")
    with pytest.raises(DataError, match="shows message 2 otherwise than its generation prompt begins it"):
        Conversations(tokenizer, "assistant")


# ------------------------------------------------------------------------ a run
@pytest.fixture(scope="module")
def chats(tmp_path_factory, teacher_dir):
    """Chunks of 32 tokens, 8 to train on, of conversations with answers of very different lengths."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "bare.jinja").write_text(NO_END)
    rows = [
        {"messages": messages([("user", f"question {i}"), ("assistant", "ab" * (1 + 9 * (i % 3)))])} for i in range(12)
    ]
    values = {"chat_template": folder / "bare.jinja", "holdout": 0.2}
    tokens = make(folder, teacher_dir, rows, **values)
    preprocess_chunk.main(options(tokenized_dataset_path=tokens, context_length=32, output_dir=folder))
    return str(folder / "chunked_context32")


def mean_over_learned(student, teacher, rows):
    """KL(teacher || student), a mean over the learned tokens of all rows; documents that the rows
    record are read alone."""
    kls = []
    for row in rows:
        ids, mask = (torch.as_tensor(row[name]) for name in ("input_ids", LOSS_MASK))
        lengths = [int(n) for n in row.get("document_lengths", (len(ids),))]
        for text, learned in zip(ids.long().split(lengths), mask.split(lengths)):
            with torch.no_grad():
                ours, theirs = (log_softmax(m(text[None]).logits[0].double(), -1)[:-1] for m in (student, teacher))
            kls.append((theirs.exp() * (theirs - ours)).sum(-1)[learned[1:]])
    return torch.cat(kls).mean()


@pytest.mark.slow
@pytest.mark.parametrize("ranks, graphs, documents", [(2, False, True), (1, True, False), (1, True, True)])
def test_a_run_takes_its_loss_over_learned_tokens(tmp_path, teacher_dir, student_dir, chats, ranks, graphs, documents):
    """Over all micro-batches and ranks, in training and evaluation, also where passes are replayed."""
    from test_cuda_graphs import run
    from test_train import launch

    chunks = open_chunks(chats, 32, document_mask=documents)
    size = len(chunks.train) - len(chunks.train) % 2
    held = min(len(chunks.heldout) // ranks, 16) * ranks
    changes = {"batch_size": size, "eval_batches": held // ranks, "document_mask": documents}
    file = write_config(tmp_path, 2, teacher_dir, chats, student_init_ckpt=student_dir, **changes)
    if graphs:
        # The first steps run eagerly, so the loss of a later one shows what is replayed.
        run(file, "train.lr=0", "train.lr_attn=0", "train.final_lr=0", "train.cuda_graphs=true")
    else:
        launch(file, "train.lr=0", "train.lr_attn=0", "train.final_lr=0", processes=ranks)
    student = StudentForCausalLM.from_pretrained(student_dir)
    student = student.restore_full_attention(load_teacher(teacher_dir), KEPT).eval()
    teacher = load_teacher(teacher_dir).eval()
    train = chunks.train.with_format("numpy").select(range(size))
    heldout = chunks.heldout.with_format("numpy").select(range(held))
    lines = [json.loads(line) for line in (tmp_path / "stage2" / "metrics.jsonl").read_text().splitlines()]
    expected = mean_over_learned(student, teacher, train).item()
    found = [line["loss"] for line in lines if "loss" in line]
    assert found == pytest.approx([expected] * 4, rel=1e-4)
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert found == pytest.approx([mean_over_learned(student, teacher, heldout).item()] * len(found), rel=1e-4)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_selection_measures_learned_tokens(tmp_path, teacher_dir, chats, document_mask):
    """On the held-out sequences by the mean over all of their learned tokens; gates train too."""
    torch.manual_seed(1)
    student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0].eval()
    student.save_pretrained(tmp_path / "student")
    changes = {"student_init_ckpt": str(tmp_path / "student"), "document_mask": document_mask}
    bench = Bench(load_config(write_config(tmp_path, 2, teacher_dir, chats, **changes)), 8, 2)
    rows = open_chunks(chats, 32, document_mask=document_mask).heldout.with_format("numpy")
    expected = mean_over_learned(student, bench.teacher, rows.select(range(bench.num_sequences))).item()
    found = bench.losses(bench.student)
    assert sum(found) / len(found) == pytest.approx(expected, rel=1e-4)
    training = GateTraining(bench, 1, 256, tmp_path / "gates")
    training.train_step(1)
    assert training.model.logits.isfinite().all() and training.model.logits.any()

"""chat.py with pipes and in a terminal, and what it refuses."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

from runtime.data import load_tokenizer

import pytest
import torch
from conftest import begin_with_bos, random_teacher, save_tokenizer
from transformers import GenerationConfig

import chat
import chat_session
from convert import load_teacher
from distill_model import StudentConfig, StudentForCausalLM

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hybrid as it is exported, without a chat template."""
    teacher, student = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("student")
    random_teacher(teacher, "qwen3", vocab_size=92, initializer_range=0.05)
    StudentForCausalLM.from_teacher(load_teacher(teacher), "gdn_v4", [1])[0].save_pretrained(student)
    save_tokenizer(student)
    return student


@pytest.fixture
def chatty(folder, tmp_path):
    """The same with a chat template."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def greedy(folder, prompt, tokens):
    """What the model says next, by a full forward pass per token."""
    model, tokenizer = StudentForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def talk(monkeypatch, capsys, folder, *said, options=()):
    """The answers to what is said, from a pipe."""
    remaining = iter(said)

    def read(prompt):
        assert prompt == ""
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat_session, "PREFILL_CHUNK", 5)  # as if the prompts were long
    chat.main(["--model", str(folder), "--temperature", "0", "--max_new_tokens", "7", "--device", "cpu", *options])
    return capsys.readouterr().out


def test_without_a_template_it_continues_the_text(monkeypatch, capsys, folder):
    first = greedy(folder, "def f(x):", 7)
    second = greedy(folder, f"def f(x):{first}\n    return", 7)
    out = talk(
        monkeypatch, capsys, folder, "def f(x):", "", "    return", " /reset", "def f(x):", "/exit ", "never read"
    )
    assert out == f"{first}\n{second}\n{first}\n" and first.strip()


def test_temperature_0_is_greedy_decoding(monkeypatch, capsys, folder, tmp_path):
    """Of the generation config, only the EOS tokens apply."""
    shutil.copytree(folder, tmp_path / "penalties")
    expected = greedy(folder, "def f(x):", 7)
    tokens = load_tokenizer(folder)(expected)["input_ids"]
    settings = {
        "do_sample": True,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": tokens[:1],
        "top_k": 3,
    }
    (tmp_path / "penalties" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0], **settings}))
    assert talk(monkeypatch, capsys, tmp_path / "penalties", "def f(x):") == f"{expected}\n"
    ends = {"eos_token_id": [0, tokens[2]], **settings}
    (tmp_path / "penalties" / "generation_config.json").write_text(json.dumps(ends))
    shorter = talk(monkeypatch, capsys, tmp_path / "penalties", "def f(x):").rstrip("\n")
    assert expected.startswith(shorter) and len(shorter) < len(expected)


def test_text_begins_with_the_tokenizers_bos(tmp_path):
    """Once, and without the EOS that would end the text."""
    save_tokenizer(tmp_path)
    bos = begin_with_bos(tmp_path, ends=True)
    tokenizer = load_tokenizer(str(tmp_path))
    conversation = chat_session.Conversation(tokenizer, 96, None)
    encoded = conversation.add_user("def f(x):")
    assert encoded["input_ids"].tolist() == [[bos, *tokenizer("def f(x):", add_special_tokens=False)["input_ids"]]]
    assert encoded["attention_mask"].tolist() == [[1] * 10]


def test_with_a_template_it_reads_the_history(monkeypatch, capsys, chatty):
    first = greedy(chatty, "<system>Be brief.<user>Hello<a>", 7)
    second = greedy(chatty, f"<system>Be brief.<user>Hello<assistant>{first}<user>More<a>", 7)
    said = ("Hello", "More", "/reset", "Hello")
    out = talk(monkeypatch, capsys, chatty, *said, options=("--system", "Be brief."))
    assert out == f"{first}\n{second}\n{first}\n"


def own_terminal():
    """Gives the process a controlling terminal, whose Ctrl-C it receives; processes that a shell starts
    in the background ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "template, options, message",
    [
        (
            "{{ raise_exception('no system role') }}",
            ["--system", "be kind"],
            r"\(no system role\); leave --system out, or fix",
        ),
        ("{% if %}", [], r"\(Expected an expression.*\); fix chat_template"),
        ("{{ messages[0].a.b }}", [], r"has no attribute 'a'\); fix chat_template"),
    ],
)
def test_errors_of_a_template_are_one_line(monkeypatch, chatty, template, options, message):
    settings = json.loads((chatty / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (chatty / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    with pytest.raises(ValueError, match=f"^--model: its chat template refuses the conversation .*{message}") as error:
        chat.main(["--model", str(chatty), *options])
    assert "\n" not in str(error.value)


def test_in_a_terminal_the_answer_streams(folder, tmp_path):
    """A prompt, an answer that is streamed, Ctrl-C, which stops only the answer, and Ctrl-D."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    endless = GenerationConfig(suppress_tokens=[load_tokenizer(folder).eos_token_id])
    endless.save_pretrained(tmp_path)
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "chat.py",
            "--model",
            tmp_path,
            "--max_new_tokens",
            "100000",
            "--temperature",
            "1",
            "--device",
            "cpu",
        ],
        cwd=ROOT,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=own_terminal,
    )
    os.close(end)
    seen, limit = "", time.monotonic() + 300
    prompt = r"[\r\n](\x1b\[\?2004h)?> $"  # at the start of a line, where an answer seldom has "> "

    def wait_for(pattern):
        nonlocal seen
        while not re.search(pattern, seen, re.DOTALL):
            assert select.select([terminal], [], [], max(0, limit - time.monotonic()))[0], seen
            seen += os.read(terminal, 1000).decode(errors="replace")
        seen = seen[re.search(pattern, seen, re.DOTALL).end() :]

    try:
        wait_for(r"full attention in \[1\]; no chat template.*" + prompt)
        os.write(terminal, b"def f(x):\n")
        for _ in range(3):
            wait_for(r"\S{3,}.*\S{3,}")  # it is far from 100000 tokens
        os.write(terminal, b"\x03")
        wait_for(prompt)
        os.write(terminal, b"/reset\n")
        wait_for(prompt)
        os.write(terminal, b"\x04")
        assert process.wait(300) == 0
    finally:
        process.kill()
        os.close(terminal)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_model_that_diverged(monkeypatch, capsys, folder, tmp_path, temperature):
    shutil.copytree(folder, tmp_path / "nan")
    model = StudentForCausalLM.from_pretrained(tmp_path / "nan")
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="--model: its logits are not finite"):
        talk(monkeypatch, capsys, tmp_path / "nan", "def f(x):", options=("--temperature", temperature))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "no/such/folder"], "--model: 'no/such/folder' is neither a folder"),
        (["--system", "Be brief."], "--system: the model has no chat template; leave it out"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--temperature", "-1"], "--temperature a number of at least 0"),
        (["--temperature", "nan"], "--temperature a number of at least 0"),
        (["--temperature", "inf"], "--temperature a number of at least 0"),
    ],
)
def test_bad_input_ends_in_one_line(folder, options, message):
    with pytest.raises(ValueError) as error:
        chat.main(["--model", str(folder), *options])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_input_that_is_not_utf8_is_accepted(folder):
    done = subprocess.run(
        [sys.executable, "chat.py", "--model", folder, "--max_new_tokens", "2"],
        cwd=ROOT,
        input=b"def \xff\xfe\n",
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_run_folder_is_not_taken_for_its_export(tmp_path):
    (tmp_path / "converted-hf").mkdir()
    (tmp_path / "converted-hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}' is a run folder; name {tmp_path}/converted-hf$"):
        chat.main(["--model", str(tmp_path)])


def test_the_script_exits_non_zero_with_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "student"}')
    save_tokenizer(tmp_path)
    done = subprocess.run([sys.executable, "chat.py", "--model", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"chat.py: error: --model: '{tmp_path}' is a student of")


@pytest.mark.parametrize(
    "name, device, kind", [("gdn_v4", "cuda", "static"), ("gdn_v4", "cpu", None), ("swa_v1", "cuda", None)]
)
def test_a_gpu_decodes_with_a_static_cache(tmp_path, name, device, kind):
    """If the student supports it."""
    config = StudentConfig(num_hidden_layers=2, keep_full_attention_layers=[1], student_name=name)
    model = SimpleNamespace(device=torch.device(device), config=config, generation_config=GenerationConfig())
    args = SimpleNamespace(model=str(tmp_path), max_new_tokens=4, temperature=None)
    made = chat_session.generation_config(args, model, 5)
    assert (made.cache_implementation, made.eos_token_id) == (kind, 5)  # the tokenizer's, where the model names none
    assert made.prefill_chunk_size == chat_session.PREFILL_CHUNK
    config.rope_parameters["rope_type"] = "dynamic"
    assert chat_session.generation_config(args, model, 5).prefill_chunk_size is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert chat_session.generation_config(args, model, 5).eos_token_id == 7
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation_config.json"):
        chat_session.generation_config(args, model, 5)

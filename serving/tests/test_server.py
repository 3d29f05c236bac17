"""A chat over HTTP, with the OpenAI client; and what is refused at start."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import hybrid_vllm
import pytest
from conftest import ENGINE, engine

pytestmark = pytest.mark.vllm
START_SECONDS = 900  # on a busy machine


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def reasons(log: Path) -> str:
    """What a log says of the engine's failure, of which the server's trace at its end says nothing; else its end."""
    lines = log.read_text().splitlines()
    errors = [line for line in lines if "ERROR" in line and not line.startswith("(APIServer")]
    return "\n".join((errors or lines)[-60:])


def wait_until_healthy(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(START_SECONDS):
        assert process.poll() is None, reasons(log)
        try:
            urlopen(f"{address}/health", timeout=5)
            return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(reasons(log))


def command_line(settings: dict) -> list[str]:
    """Arguments of vllm.LLM as those of the server."""
    options = []
    for key, value in settings.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(option if value else option.replace("--", "--no-", 1))
        else:
            options += [option, value if isinstance(value, str) else json.dumps(value)]
    return options


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    """A client of the OpenAI-compatible server in a process of its own. `vllm serve` starts the same; it needs the
    metadata of a distribution called vllm, which the build for the CPU is not."""
    import openai

    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "chat" / "model")]
    options = ["--dtype", "float32", "--port", str(port), "--served-model-name", "hybrid", "--max-model-len", "512"]
    options += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20)]
    options += command_line(ENGINE)
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        process = subprocess.Popen([*serve, *options], stdout=output, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, log)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def chat(models):
    return json.loads((models / "chat" / "chat.json").read_text())


def ask(client, chat, **options):
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    return client.chat.completions.create(
        model="hybrid", messages=chat["messages"], temperature=0, max_tokens=40, extra_body=extra, **options
    )


def test_answer_of_a_chat_is_that_of_transformers(client, chat):
    reply = ask(client, chat)
    assert reply.choices[0].message.content == chat["answer"]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == chat["prompt_tokens"] and reply.usage.completion_tokens == 40


def test_answer_is_streamed(client, chat):
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, chat, stream=True)]
    assert len([part for part in parts if part]) > 10
    assert "".join(parts) == chat["answer"]


def test_answer_ends_at_a_stop_string(client, chat):
    stop = chat["answer"][15:18]
    reply = ask(client, chat, stop=[stop])
    assert reply.choices[0].message.content == chat["answer"].partition(stop)[0]
    assert reply.choices[0].finish_reason == "stop"


# --------------------------------------------------------------------------------------- refusals
def changed(models, tmp_path, **changes) -> Path:
    """An export with another config."""
    folder = tmp_path / "changed"
    shutil.copytree(models / "gdn_v7", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 10000.0, **FACTORS}


@pytest.mark.parametrize(
    "changes, settings, reason",
    [
        ({"student_name": "path_v1"}, {}, "student path_v1: its state grows with the text; served are gdn_v1, "),
        (
            {"student_name": "swa_v1", "student_options": {"sink_size": 4}},
            {},
            "student swa_v1: vLLM's layers have no sinks, such as sink_size: 4; served is sink_size: 0",
        ),
        ({"rope_parameters": DYNAMIC}, {}, "RoPE of type dynamic depends on the length"),
        ({"rope_parameters": LONG}, {}, "RoPE of type longrope depends on the length"),
        ({}, {"mamba_ssm_cache_dtype": "float16"}, "mamba_ssm_cache_dtype: recurrent states are float32, not float16"),
        ({}, {"mamba_cache_mode": "all"}, "mamba_cache_mode"),
        ({}, {"enable_lora": True}, "enable_lora: the layers take no adapters"),
        ({"student_name": "gsa_v1"}, {"tensor_parallel_size": 2}, "tensor_parallel_size: the norm of gsa_v1 spans"),
        ({}, {"tensor_parallel_size": 3}, "tensor_parallel_size: 3 does not divide the 4 heads"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding needs states that can be rolled back",
        ),
    ],
)
def test_refused_before_a_model_is_loaded(models, tmp_path, changes, settings, reason):
    with pytest.raises(ValueError) as error, engine(changed(models, tmp_path, **changes), **settings):
        pass
    assert reason in str(error.value)


@pytest.mark.parametrize("found, supported", [("0.25.1", False), ("0.26.0", True), ("0.32.1", True), ("0.33.0", False)])
def test_untested_version_of_vllm_is_refused(monkeypatch, found, supported):
    monkeypatch.setattr(hybrid_vllm, "vllm_version", lambda: found)
    if supported:
        hybrid_vllm.check_version()
        return
    with pytest.raises(RuntimeError, match=f"supports vLLM 0.26 to 0.32, not {found}"):
        hybrid_vllm.check_version()

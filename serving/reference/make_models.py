"""Writes tiny random exports of every kind, and the greedy text that transformers decodes from each, for the tests in
vLLM's environment. Runs in the project's environment:

    PYTHONPATH=.:tests python serving/reference/make_models.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import random_teacher, save_tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import load_teacher
from distill_model import STUDENT_ATTENTION_MAP, StudentForCausalLM

SIZES = dict(hidden_size=96, num_hidden_layers=3, head_dim=32, max_position_embeddings=1024, initializer_range=0.15)
PROMPT_LENGTHS = (1, 20, 110, 300)
NEW_TOKENS = 40
MESSAGES = [{"role": "user", "content": "Hello, who are you?"}]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# The students' exports take these in turn.
TEACHERS = {
    "qwen2": dict(kind="qwen2", hidden_size=128),
    "qwen3": dict(kind="qwen3", tie_word_embeddings=True),
    "llama": dict(kind="llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE),
}
OPTIONS = {
    "kda_v1": {"use_short_conv": False},
    "gla_v1": {"use_short_conv": True, "conv_size": 3},
    "gsa_v1": {"num_slots": 12},
    "mamba2_v1": {"conv_kernel": 3},
}


def cases() -> dict[str, tuple]:
    """The name of each export -> its teacher, student, kept layers and options."""
    found = {f"teacher_{name}": (teacher, None, None, {}) for name, teacher in TEACHERS.items()}
    for name, rope in (("yarn", YARN_ROPE), ("linear", LINEAR_ROPE)):
        teacher = dict(kind="llama", tie_word_embeddings=True, rope_parameters=rope)
        found[f"rope_{name}"] = (teacher, "gdn_v7", [1], {})
    students = [name for name, student in STUDENT_ATTENTION_MAP.items() if student.supports_static_cache]
    for i, name in enumerate(students):
        teacher = list(TEACHERS.values())[i % len(TEACHERS)]
        found[name] = (teacher, name, [1], {})
        if name in OPTIONS:
            found[f"{name}_options"] = (teacher, name, [1], OPTIONS[name])
    found["swa_v1"] = (TEACHERS["qwen3"], "swa_v1", [1], {"window_size": 48})
    # As stage 1 exports it: no full attention at all.
    found["stage1_gdn_v7"] = (TEACHERS["qwen2"], "gdn_v7", [], {})
    found["stage1_rwkv7_v1"] = (TEACHERS["qwen3"], "rwkv7_v1", [], {})
    return found


@torch.no_grad()
def export(folder: Path, teacher: dict, student: str | None, kept, options: dict) -> None:
    """Saves a random model whose greedy text does not hang on small differences."""
    teacher_folder = folder.with_name(f"{folder.name}-source")
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or teacher["kind"] != "qwen2"}
    random_teacher(teacher_folder, **sizes | teacher)
    model = load_teacher(str(teacher_folder))
    torch.manual_seed(1)
    if student is not None:
        model = StudentForCausalLM.from_teacher(model, student, kept, options)[0]
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    model.model.norm.weight.mul_(4)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@torch.no_grad()
def reference(folder: Path, prompts: list[list[int]]) -> dict:
    """The greedy continuation of each prompt in fp32; the log-probabilities of all tokens there [NEW_TOKENS, vocab];
    how much bf16 changes them: the largest difference, and the root mean square of the texts' tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, log_probabilities, differences, largest = [], [], [], 0.0
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts.append(text[0, len(prompt) :].tolist())
        log_probabilities.append(model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    model = model.to(torch.bfloat16)
    for prompt, text, exact in zip(prompts, texts, log_probabilities):
        ids = torch.tensor([prompt + text])
        rounded = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        largest = max(largest, (rounded - exact).abs().max().item())
        chosen = torch.tensor(text)[:, None]
        differences.append((rounded - exact).gather(1, chosen))
    difference = torch.cat(differences)
    return {
        "prompts": prompts,
        "texts": texts,
        "log_probabilities": [x.tolist() for x in log_probabilities],
        "bf16_largest": largest,
        "bf16_rms": difference.square().mean().sqrt().item(),
    }


@torch.no_grad()
def chat(folder: Path) -> dict:
    """Exports a model whose tokens are exactly those of its tokenizer; returns a chat, and its greedy answer."""
    save_tokenizer(folder.with_name("tokenizer"))
    size = len(AutoTokenizer.from_pretrained(folder.with_name("tokenizer")))
    export(folder, TEACHERS["qwen2"] | dict(vocab_size=size), "gdn_v7", [1], {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    return {"messages": MESSAGES, "prompt_tokens": ids.shape[1], "answer": tokenizer.decode(text)}


def main(output: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 90, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    for name, case in tqdm(cases().items(), desc="reference texts", unit="model"):
        folder = output / name
        export(folder, *case)
        (output / f"{name}.json").write_text(json.dumps(reference(folder, prompts)))
    (output / "chat").mkdir()
    (output / "chat" / "chat.json").write_text(json.dumps(chat(output / "chat" / "model")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

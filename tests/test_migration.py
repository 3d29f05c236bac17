"""What docs/migration.md tells users of hybrid-distillation (arXiv 2512.20569) is true of the scripts."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from runtime.batch_plan import batch_plan
from runtime.config import TrainConfig, load_config
from runtime.data import open_chunks
from runtime.old_flags import REPLACEMENTS

import pytest
import torch
import transformers
import yaml
from conftest import options, save_tokenizer, write_config
from tokenizers import Tokenizer

import convert.command
import convert_ckpt
import optim
import preprocess_chunk
import preprocess_download_tokenize
import train
from distill_model import StudentForCausalLM
from distill_model.losses import alignment_loss
from evaluation.options import add_options
from layer_selection import evaluate_layer_importance, generate_layer_configs_ga_s2
from layer_selection.ablation_questions import TASKS, draw_questions, question_options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text()
MAINS = {
    "preprocess_download_tokenize.py": preprocess_download_tokenize.main,
    "preprocess_chunk.py": preprocess_chunk.main,
    "evaluate_layer_importance.py": evaluate_layer_importance.main,
    "generate_layer_configs_ga_s2.py": generate_layer_configs_ga_s2.main,
    "convert_from_*.py": lambda argv: convert.command.main("", "qwen2", argv=argv),
    "train.py": train.parse_args,
    "convert_ckpt.py": convert_ckpt.main,
}
# All flags of hybrid-distillation's scripts.
FLAGS = {
    "preprocess_download_tokenize.py": """
        --dataset_name --dataset_config --split --text_field --tokenizer --output_dir --max_length --num_proc
        --batch_size --remove_columns""",
    "preprocess_chunk.py": "--tokenized_dataset_path --context_length --output_dir --dtype --npy_cache_path",
    "evaluate_layer_importance.py": """
        --task --model_name --output_dir --batch_size --num_samples --num_pairs --num_chains --num_hops --noise_ratio
        --freq_cw --freq_ucw --num_cw --num_ucw --zeta_alpha --vocab_size --num_words --K --pb_min_len --pb_max_len
        --pb_few_shots --ar_max_hops""",
    "generate_layer_configs_ga_s2.py": """
        --num-layers --config-root --teacher --student --cache-stage1 --cache-stage2 --outputs-prefix""",
    "convert_from_*.py": "--model --config --output --precision",
    "train.py": "--cfg --local_rank",
    "convert_ckpt.py": "--cfg",
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


class Seen(Exception):
    """Carries the parser that a script has built."""


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    def stop(parser, *args, **options):
        raise Seen(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
        with pytest.raises(Seen) as seen:
            MAINS[script]([])
    return seen.value.args[0]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without backticks."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


DEFAULTS = rows("Defaults that differ")


def old_lines(script: str) -> list[str]:
    return [line for where, *_, line in DEFAULTS if where == script]


@pytest.mark.parametrize("script", FLAGS)
def test_every_old_flag_is_accepted_or_has_a_replacement(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    ours = {flag for action in parser._actions for flag in action.option_strings}
    replaced = REPLACEMENTS.get(script, {})
    assert set(FLAGS[script].split()) <= ours | set(replaced)
    assert not set(replaced) & ours and set(replaced) <= set(FLAGS[script].split())
    # An abbreviated old flag must not be accepted as another flag.
    assert not parser.allow_abbrev


def test_the_page_lists_the_replaced_flags():
    """In the words of the messages; VALUE stands for the flag's value."""
    replaced = []
    for script, flags in REPLACEMENTS.items():
        for flag, message in flags.items():
            replaced.append([script, flag, message.removeprefix("use ").format("VALUE")])
    assert rows("Flags that are replaced") == replaced


COMMANDS = {
    "generate_layer_configs_ga_s2.py": (
        "--num-layers 28 --config-root config/qwen --teacher fla-hub/Qwen2.5-7B-Instruct --student=gdn_v4 "
        "--cache-stage2 data_cache/chunked_context4096 --outputs-prefix checkpoints/qwen_{index}",
        "--num-layers: leave it out: the teacher's config says how many layers there are; --config-root: use "
        "--output_dir config/qwen; --teacher: use teacher_model.name=fla-hub/Qwen2.5-7B-Instruct; --student: use "
        "student_model.name=gdn_v4; --cache-stage2: use data.cache_dir=data_cache/chunked_context4096; "
        "--outputs-prefix: leave it out: the runs write to <output_dir>/layer_<N>/run; besides: --cfg, a YAML of stage 2 "
        "with all else, and student_init_ckpt where the student needs one (docs/migration.md)",
    ),
    "preprocess_chunk.py": (
        "--tokenized_dataset_path data_cache/tokenized --output_dir data_cache --npy_cache_path data_cache/all.npy",
        "--npy_cache_path: leave it out: tokens are read from --tokenized_dataset_path as they are needed "
        "(docs/migration.md)",
    ),
    "evaluate_layer_importance.py": (
        "--task phone_book --model_name x --output_dir y --pb_few_shots 5",
        "--pb_few_shots: 5 must be 3: phone_book shows two answered questions before the one that counts; leave it out",
    ),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_refused_command_says_what_to_type_instead(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    command, message = COMMANDS[script]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MAINS[script](shlex.split(command))
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_the_message_is_one_line(tmp_path):
    command, message = COMMANDS["preprocess_chunk.py"]
    words = [sys.executable, str(ROOT / "preprocess_chunk.py"), *shlex.split(command)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (
        1,
        f"preprocess_chunk.py: error: {message}\n",
        "",
    )


@pytest.mark.parametrize("row", [row for row in DEFAULTS if row[1].startswith("--")], ids=" ".join)
def test_defaults_of_flags(row, monkeypatch):
    where, setting, there, here, line = row
    parser = parser_of(where, monkeypatch)
    action = next(action for action in parser._actions if setting in action.option_strings)
    switch = {"on": True, "off": False}
    shown = {
        None: ("by vocabulary", "that of every tensor"),
        os.cpu_count(): ("the machine's cores",),
    }
    if here == "required":
        assert action.default is None and action.dest in ("output_dir", "context_length")
    elif here in sum(shown.values(), ()):
        assert here in shown[action.default]
    elif action.const is True:
        assert action.default is switch[here]
    else:
        assert action.default == type(action.default)(here)
    for other in parser._actions:
        other.required = False
    parser._mutually_exclusive_groups.clear()
    values = vars(parser.parse_args(shlex.split(line)))
    expected = switch[there] if action.const is True else (action.type or str)(there)
    assert values[action.dest] == expected != action.default


@pytest.mark.parametrize("row", [row for row in DEFAULTS if row[0] == "train.py"], ids=" ".join)
def test_defaults_of_keys(tmp_path, row):
    _, setting, there, here, line = row
    default = next(spec.default for spec in fields(TrainConfig) if spec.name == setting)
    file = write_config(tmp_path, 2, "teacher", "data")
    values = yaml.safe_load(file.read_text())
    values["train"].pop(setting, None)
    file.write_text(yaml.safe_dump(values))
    assert getattr(load_config(file).train, setting) == default == load_value(here)
    file.write_text(yaml.safe_dump(values | {"train": values["train"] | yaml.safe_load(line)}))
    assert getattr(load_config(file).train, setting) == load_value(there) != default


def load_value(text: str):
    """A value as YAML 1.2 reads it, where 1e-05 is a number."""
    return float(text) if re.fullmatch(r"[\d.]+e-\d+", text) else yaml.safe_load(text)


def test_the_default_of_the_evaluation():
    parser = argparse.ArgumentParser()
    add_options(parser)
    ((_, setting, there, here, line),) = [row for row in DEFAULTS if row[0] == "eval.sh"]
    assert parser.get_default("batch_size") == here and line == f"{setting}={there}"
    names = re.search(r"^for name in (.*); do$", (ROOT / "eval.sh").read_text(), re.MULTILINE)  # handed on as options
    assert setting in names[1].split()


def test_the_table_has_every_default_that_differs(monkeypatch):
    """Of the flags that both have, by hybrid-distillation's own defaults."""
    there = {
        "preprocess_download_tokenize.py": "--split train --text_field text --num_proc 8 --batch_size 1024",
        "preprocess_chunk.py": "--context_length 16384 --output_dir data_cache --dtype uint32",
        "evaluate_layer_importance.py": """
            --output_dir experiment_results --batch_size 8 --num_samples 500 --num_pairs 50 --num_chains 2 --num_hops 2
            --noise_ratio 1.0 --freq_cw 2 --freq_ucw 1 --num_cw 10 --num_ucw 100 --zeta_alpha 2.0 --vocab_size 200
            --num_words 400 --K 3 --pb_min_len 8 --pb_max_len 30 --pb_few_shots 3 --ar_max_hops 2""",
    }
    for script, flags in there.items():
        parser = parser_of(script, monkeypatch)
        listed = {setting for where, setting, *_ in DEFAULTS if where == script}
        for flag, value in zip(flags.split()[::2], flags.split()[1::2]):
            action = next(action for action in parser._actions if flag in action.option_strings)
            same = action.default is not None and action.default == (action.type or str)(value)
            machine = flag == "--num_proc"  # on a machine of 8 cores they are the same
            assert machine or same == (flag not in listed), flag


def test_every_task_can_be_drawn_at_the_old_defaults(monkeypatch):
    """The command in hybrid-distillation's README is accepted, too."""
    parser = parser_of("evaluate_layer_importance.py", monkeypatch)
    words = shlex.split(" ".join(old_lines("evaluate_layer_importance.py")))
    for task in TASKS:
        args = parser.parse_args(["--task", task, "--model_name", "x", *words])
        args.num_samples = 5
        assert len(draw_questions(task, question_options(args), args.seed)) == 5
    shown = """--task variable_tracking --model_name fla-hub/Qwen2.5-3B-Instruct --output_dir layer_selection_baselines
        --num_samples 500 --batch_size 8 --num_chains 2 --num_hops 2 --noise_ratio 1.0"""
    args = parser.parse_args(shlex.split(shown))
    assert len(draw_questions("variable_tracking", question_options(args), args.seed)) == 500


def test_the_old_lines_train_as_there(tmp_path, teacher_dir, data_dir):
    """As transformers' schedule, PyTorch's AdamW and the formula of the loss do, which are used
    there."""
    file = write_config(tmp_path, 2, teacher_dir, data_dir, max_steps=20, lr_scheduler_type="cosine")
    values = yaml.safe_load(file.read_text())
    for line in old_lines("train.py"):
        values["train"] |= yaml.safe_load(line)
    file.write_text(yaml.safe_dump(values))
    cfg = load_config(file)
    weight = torch.nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.AdamW([weight], lr=cfg.train.lr) for _ in range(2))
    schedule = optim.get_scheduler(ours, cfg, batch_plan(cfg, 1))
    expected = transformers.get_scheduler("cosine", theirs, num_warmup_steps=0, num_training_steps=20)
    for _ in range(21):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        for step in (ours, theirs, schedule, expected):
            step.step()
    model = StudentForCausalLM.from_teacher(convert.load_teacher(teacher_dir), "gdn_v4", [1])[0]
    rates = {id(p): group.lr for group in optim.parameter_groups(model, cfg) for p in group.params}
    decays = {id(p): group.weight_decay for group in optim.parameter_groups(model, cfg) for p in group.params}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (cfg.train.lr_attn if ".attn." in name else cfg.train.lr)
        if name.endswith("_proj.weight"):
            assert decays[id(parameter)] == torch.optim.AdamW([parameter]).defaults["weight_decay"]
    teacher, student = torch.randn(2, 3, 5, 48).unbind()
    loss = torch.linalg.vector_norm(teacher - student, dim=-1).mean() / 48**0.5
    torch.testing.assert_close(alignment_loss(student, teacher, cfg.train.alignment_loss), loss)


def test_the_old_lines_preprocess_as_there(tmp_path, tokenizer_dir):
    """Except for EOS after each document: the tokens of all documents, joined end to end."""
    texts = [f"def f{i}(x):\n    return {i} * x\n" * (i % 4 + 1) for i in range(30)]
    lines = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    tokenized = tmp_path / "tokenized"
    words = shlex.split(" ".join(old_lines("preprocess_download_tokenize.py")))
    paths = options(dataset_name=tmp_path / "corpus.jsonl", output_dir=tokenized, tokenizer=tokenizer_dir)
    preprocess_download_tokenize.main([*paths, *words, "--remove_columns"])
    words = shlex.split(" ".join(old_lines("preprocess_chunk.py")))
    paths = options(tokenized_dataset_path=tokenized, output_dir=tmp_path / "data")
    preprocess_chunk.main([*words, *paths, *options(context_length=16)])  # the last value of an option counts
    chunks = open_chunks(str(tmp_path / "data" / "chunked_context16"), 16)
    raw = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    joined = []
    for text in texts:
        joined += [*raw.encode(text).ids, raw.token_to_id("<eos>")]
    assert chunks.heldout is None and chunks.train.features["input_ids"].feature.dtype == "uint32"
    assert sum(chunks.train["input_ids"][:], []) == joined[: len(joined) // 16 * 16]


def test_the_adopt_command_on_the_page_is_accepted():
    (command,) = re.findall(r"^python preprocess_chunk.py (.* --adopt .*|--adopt .*)$", PAGE, re.MULTILINE)
    args = preprocess_chunk.parse_args(shlex.split(command))
    assert args.adopt == Path("data_cache/chunked_context512") and args.tokenizer and args.output_dir == Path("data")

"""Fixtures and helpers of all tests: tiny random teachers, students, data and configs. Nothing
needs a network."""

import json
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from runtime.autotuning import use_kernel_configs

import pytest
import torch
import yaml

use_kernel_configs()  # as the scripts do; only on a GPU

# By CPU time, the longest first. run_tests.sh distributes whole files, and one of these must not start last.
LONGEST_FILES = (
    "test_train.py",
    "test_quickstart.py",
    "test_evaluate.py",
    "test_cuda_graphs.py",
    "test_reliability.py",
    "test_convert.py",
)

SHAPE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
LENGTH = 32  # tokens per chunk
KEPT = [1]  # full-attention layers of a hybrid


def options(**values) -> list[str]:
    """The command-line options --name value of these keywords."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def random_teacher(folder, kind="qwen3", **overrides):
    """Saves a tiny random Hugging Face teacher to `folder` and returns it; its biases and norms are
    not 0 and 1."""
    import transformers

    model_class = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[kind]
    head_dim = {} if kind == "qwen2" else {"head_dim": 16}
    config = getattr(transformers, f"{model_class}Config")(**{**SHAPE, **head_dim, **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, f"{model_class}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder, extra=None):
    """Saves a tiny BPE tokenizer of 96 entries (and `extra`, if given) with an EOS token to
    `folder`."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;()[]{}+-*/=_<>'#\n\t"
    symbols = [ByteLevelBPETokenizer().pre_tokenizer.pre_tokenize_str(c)[0][0] for c in text]
    vocabulary = ["<eos>", *dict.fromkeys(symbols), *([extra] if extra else [])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def begin_with_bos(folder, ends=False):
    """Makes the tokenizer in `folder` put a BOS before every text, as Llama 3's does, and if `ends`
    an EOS after it; returns the BOS' id."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file = Path(folder) / "tokenizer.json"
    settings = Path(folder) / "tokenizer_config.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<bos>"])
    template = "<bos> $A <eos>" if ends else "<bos> $A"
    special_tokens = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special_tokens)
    tokenizer.save(str(file))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<bos>"}))
    return tokenizer.token_to_id("<bos>")


def pytest_collection_modifyitems(items):
    """Moves the longest files to the front, and keeps the order of tests within a file."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def signals():
    """Restores signal handlers: a script that ran in this process leaves signals ignored, which
    processes of later tests would inherit."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def one_config():
    """On a GPU this process compiles one configuration of each autotuned kernel."""
    if not torch.cuda.is_available():
        yield
        return
    from gpu.one_config import take_one_config

    undo = take_one_config()
    yield
    undo()


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """A tiny random Qwen3 model: grouped-query attention, head_dim other than hidden / heads, tied
    head."""
    folder = tmp_path_factory.mktemp("teacher")
    random_teacher(folder, "qwen3", tie_word_embeddings=True)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A random teacher\n")
    (folder / "LICENSE").write_text("of a random teacher\n")
    return str(folder)


def make_chunks(folder, teacher_dir, texts, holdout=0.1, more=()):
    """`folder`/chunked_context32 of these texts, a fraction of them held out. more: options of
    preprocess_download_tokenize.py."""
    import preprocess_chunk
    import preprocess_download_tokenize

    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i}.txt").write_text(text)
    tokenized = folder / "tokenized"
    corpus = options(dataset_name=folder / "texts", tokenizer=teacher_dir, holdout=holdout)
    preprocess_download_tokenize.main([*corpus, *options(output_dir=tokenized), *more])
    preprocess_chunk.main(options(tokenized_dataset_path=tokenized, context_length=LENGTH, output_dir=folder))
    return str(folder / f"chunked_context{LENGTH}")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, teacher_dir):
    """Chunks of 32 tokens of made-up Python."""
    return make_chunks(tmp_path_factory.mktemp("data"), teacher_dir, python_texts(60))


def python_texts(count, lines=9):
    """Documents of made-up Python."""
    texts = []
    for i in range(count):
        functions = [f"def f{(i * j * j) % 91}(x): return x + {(i * 7 + j * 13) % 101}" for j in range(lines)]
        texts.append("\n".join(functions))
    return texts


def write_config(folder, stage, teacher_dir, data_dir, **changes):
    """A stage's YAML in `folder`; `changes` are keys of its train section, and document_mask."""
    values = {
        "stage": stage,
        "data": {"cache_dir": data_dir},
        "teacher_model": {"name": teacher_dir},
        "student_model": {
            "name": "gdn_v4",
            "keep_full_attention_layers": KEPT if stage > 1 else [],
        },
        "train": {
            "output_dir": str(folder / f"stage{stage}"),
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 1,
            "train_seq_len": LENGTH,
            "lr": 2e-3,
            "lr_attn": 4e-3,
            "final_lr": 1e-3,
            "warmup_steps": 0,
            "save_steps": 2,
            "eval_steps": 4,
            "eval_batches": 1,
            "logging_steps": 1,
        },
    }
    if "document_mask" in changes:
        values["data"]["document_mask"] = changes.pop("document_mask")
    if stage > 1:
        values["train"]["student_init_ckpt"] = str(folder / f"stage{stage - 1}" / "converted-hf")
    values["train"] |= changes
    file = folder / f"stage{stage}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def student_dir(teacher_dir, tmp_path_factory):
    """A random hybrid of the teacher, with a tokenizer, as training exports it."""
    from convert import load_teacher
    from distill_model import StudentForCausalLM

    folder = tmp_path_factory.mktemp("run") / "converted-hf"
    torch.manual_seed(1)
    StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4", [1])[0].save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stage2(tmp_path_factory, teacher_dir):
    """A stage-2 YAML with its data and an all-linear student of four layers, whose layer 2 has a
    far too large output."""
    from convert import load_teacher
    from distill_model import StudentForCausalLM

    folder = tmp_path_factory.mktemp("selection")
    texts = []
    for i in range(20):
        texts.append("".join(f"def f{(i * j) % 97}(x): return {j * 13 % 101}\n" for j in range(20)))
    chunks = make_chunks(folder, teacher_dir, texts, holdout=0.2)
    torch.manual_seed(0)
    student = StudentForCausalLM.from_teacher(load_teacher(teacher_dir), "gdn_v4")[0]
    with torch.no_grad():
        student.model.layers[2].attn.o_proj.weight.mul_(20)
    student.save_pretrained(folder / "student")
    values = {
        "stage": 2,
        "data": {"cache_dir": chunks},
        "teacher_model": {"name": teacher_dir},
        "student_model": {"name": "gdn_v4", "keep_full_attention_layers": [0]},
        "train": {
            "output_dir": str(folder / "runs"),
            "student_init_ckpt": str(folder / "student"),
            "max_steps": 2,
            "batch_size": 2,
            "micro_batch_size": 2,
            "train_seq_len": LENGTH,
            "lr": 1e-4,
            "eval_batches": 1,
        },
    }
    file = folder / "stage2.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def read_alone(chunks, count, *models):
    """The first `count` chunks, their documents one by one: for each chunk what the models predict, a
    list of log-probabilities [positions, V], and the tokens that follow in the same document."""
    found = []
    for row in chunks.select(range(count)):
        texts = torch.tensor(row["input_ids"]).split(row["document_lengths"])
        with torch.no_grad():
            predicted = [
                torch.cat([model(text[None]).logits[0, :-1].log_softmax(-1) for text in texts]) for model in models
            ]
        found.append((predicted, torch.cat([text[1:] for text in texts])))
    return found


def mean_kl(ours, theirs):
    """KL(theirs || ours) of log-probabilities [positions, V], the mean over the positions."""
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()

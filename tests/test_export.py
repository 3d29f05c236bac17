"""An exported folder in an environment without this project: four packages and their
requirements, any directory."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_teacher, save_tokenizer
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_model import STUDENTS, hybrid, trained
from torch import nn

from convert import load_teacher
from distill_model import StudentConfig, StudentForCausalLM

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "data" / "export_2026"  # an export of an earlier version, with its code
IDS = torch.arange(1, 82)[None]


def closure(*names):
    """The installed packages of these names and all of their requirements."""
    found = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.setdefault(package.metadata["Name"].lower(), package) is package:
            requirements = map(Requirement, package.requires or ())
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder from which only torch, transformers, flash-linear-attention, triton and their
    requirements can be imported."""
    folder = tmp_path_factory.mktemp("bare")
    for package in closure("torch", "transformers", "flash-linear-attention", "triton"):
        for top in {Path(file).parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
    return folder


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return load_teacher(teacher_dir)


def save(model, folder):
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def python(script, *options, cwd, **environment):
    environment = {
        "HF_HOME": str(cwd / "hf"),
        "PATH": os.defpath,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    } | environment
    done = subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name, dtype", [("gdn_v4", torch.float32), ("path_fox_v1", torch.bfloat16)])
def test_it_loads_in_a_bare_environment(teacher, bare, tmp_path, name, dtype):
    """Logits, text, dtype and tied weights equal the model's; saving it again keeps them, and the
    code."""
    model = trained(hybrid(teacher, name)).to(dtype)
    script = f"""
import importlib.util, torch
for missing in ("deepspeed", "wandb", "datasets", "lm_eval", "accelerate", "distill_model", "runtime", "convert", "pytest"):
    assert importlib.util.find_spec(missing) is None, missing
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "given")!r})
for folder in ({str(tmp_path / "given")!r}, "again"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.lm_head.weight is model.model.embeddings.weight and not model.training
    ids = torch.arange(1, 82)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, folder.split("/")[-1] + ".pt")
    model.save_pretrained("again")
text = model.generate(**tokenizer("def f(x):", return_tensors="pt"), max_new_tokens=6, do_sample=False, pad_token_id=0)
torch.save(text, "text.pt")
"""
    folder = save(model, tmp_path / "given")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python(script, "-S", cwd=elsewhere, PYTHONPATH=str(bare))
    with torch.no_grad():
        logits = model(IDS).logits
    for result in ("given", "again"):
        assert torch.equal(torch.load(elsewhere / f"{result}.pt"), logits)
    text = torch.load(elsewhere / "text.pt")
    assert torch.equal(model.generate(text[:, :-6], max_new_tokens=6, do_sample=False, pad_token_id=0), text)
    code = {file.name for file in Path(folder).glob("*.py")}
    assert code == {file.name for file in (elsewhere / "again").glob("*.py")}
    assert "cache.py" in code


def test_a_stored_export_loads_with_its_own_code(bare, tmp_path):
    """Its expected logits are those of the version that wrote it."""
    script = f"""
import importlib.util, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("distill_model") is None
model = AutoModelForCausalLM.from_pretrained({str(STORED)!r}, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
expected = load_file({str(STORED / "expected.safetensors")!r})
with torch.no_grad():
    torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"])
model.generate(expected["input_ids"], max_new_tokens=3, do_sample=False, cache_implementation="static", pad_token_id=0)
"""
    python(script, "-S", cwd=tmp_path, PYTHONPATH=str(bare))


def test_a_stored_export_loads_into_todays_classes():
    expected = load_file(STORED / "expected.safetensors")
    model = StudentForCausalLM(StudentConfig.from_pretrained(STORED)).eval()
    state = load_file(STORED / "model.safetensors")
    state["lm_head.weight"] = state["model.embeddings.weight"]  # tied, and saved once
    model.load_state_dict(state, strict=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"])


def test_it_loads_without_the_flag_once_our_package_is_imported(teacher, tmp_path):
    folder = save(hybrid(teacher), tmp_path / "given")
    script = f"""
import sys, distill_model, torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model) is distill_model.StudentForCausalLM
assert type(AutoConfig.from_pretrained({folder!r})) is distill_model.StudentConfig
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
"""
    python(script, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_device_maps(teacher, tmp_path):
    """Without a GPU "auto" is the CPU; layers that are offloaded to disk are loaded when
    they run."""
    model = trained(hybrid(teacher))
    folder = save(model, tmp_path / "given")
    with torch.no_grad():
        logits = model(IDS).logits
    places = {
        "model.embeddings": "cpu",
        "lm_head": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        **{f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)},
    }
    for device_map in ("auto", places):
        mapped = StudentForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
        assert mapped.lm_head.weight is mapped.model.embeddings.weight
        with torch.no_grad():
            torch.testing.assert_close(mapped(IDS).logits, logits)
        kwargs = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(mapped.generate(IDS, **kwargs), model.generate(IDS, **kwargs))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher that is large enough for quantisation in blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    random_teacher(
        folder,
        "qwen3",
        tie_word_embeddings=True,
        hidden_size=128,
        intermediate_size=256,
        head_dim=32,
    )
    return load_teacher(folder)


@pytest.mark.parametrize("name", STUDENTS)
def test_what_bitsandbytes_would_replace(wide, name):
    """Exactly nn.Linear: not the projections to one number per head, nor a weight that a kernel
    reads, nor the output projection."""
    model = hybrid(wide, name)
    replaced = {key for key, module in model.named_modules() if type(module) is nn.Linear}
    assert {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.attn.o_proj",
    } < replaced
    assert "lm_head" not in replaced
    assert all(
        min(model.get_submodule(key).weight.shape) >= 128 for key in replaced if key.startswith("model.layers.0")
    )
    first = {"mamba2_v1": "in_proj", "rwkv7_v1": "r_proj"}.get(name, "q_proj")
    last = {"mamba2_v1": "out_proj", "gsa_v1": None, "hgrn2_v1": None}.get(name, "o_proj")
    assert {f"model.layers.0.attn.{key}" for key in (first, last) if key} < replaced
    assert last or "model.layers.0.attn.o_proj" not in replaced


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8"])
@pytest.mark.parametrize("name", STUDENTS)
def test_four_and_eight_bits(wide, tmp_path, name, kind):
    pytest.importorskip(kind.split()[0])
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "bitsandbytes int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        if name == "mamba2_v1" and not torch.cuda.is_available():
            pytest.skip("its in_proj has a number of rows that bitsandbytes does not pack on a CPU")
    model = trained(hybrid(wide, name), 0.002)
    ids = torch.randint(1, 96, (2, 70))
    model.save_pretrained(tmp_path)
    small = StudentForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    with torch.no_grad():
        exact, logits = model(ids).logits, small(ids).logits
    assert 0 < (logits - exact).norm() < (0.8 if "nf4" in kind else 0.15) * exact.norm()
    kwargs = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert small.generate(ids[:, :9], **kwargs).shape == (2, 14)
    assert small.lm_head.weight is small.model.embeddings.weight

"""Native exports give our logits, decoding and text in transformers, without our package and
without FLA."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import options, random_teacher, save_tokenizer, write_config
from safetensors.torch import load_file
from test_train import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import copy_sidecars, export_native, load_teacher
from convert.export_native import native_config, native_export_refusal
from distill_model import STUDENT_ATTENTION_MAP, StudentConfig, StudentForCausalLM

NEW_TOKENS = 12
PROMPT = "def f(x): return 12"
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# The teacher's config, the full-attention layers, the student's options.
HYBRIDS = {
    "tied": ({"tie_word_embeddings": True}, [1], {}),
    "two kept": ({}, [0, 3], {}),
    "wide convolution": ({}, [3], {"conv_size": 7}),
    "all kept": ({}, [0, 1, 2, 3], {}),
    "bf16": ({}, [2], {}),
    **{rope: ({"rope_parameters": {"rope_theta": 1000.0} | values}, [1, 2], {}) for rope, values in ROPE.items()},
}
# Runs where only transformers is installed, without this project and FLA.
ELSEWHERE = """
import json, sys
for name in ("distill_model", "convert", "fla", "triton", "deepspeed"):
    sys.modules[name] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

root, cases, new_tokens, prompt = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
results = {}
for case in cases:
    folder = f"{root}/{case}/native"
    stored = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = torch.load(f"{root}/{case}/input.pt").values()
    with torch.no_grad():
        padded = model(ids[:, :20], attention_mask=mask).logits
        full, past, steps = model(ids).logits, None, []
        for start, stop in ((0, 70), *((t, t + 1) for t in range(70, ids.shape[1]))):
            out = model(ids[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    results[case] = {
        "full": full, "rounded": stored(ids).logits, "padded": padded, "steps": torch.cat(steps, 1),
        "dtypes": {p.dtype for p in stored.parameters()},
        "class": type(model).__name__, "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "prompt": AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"],
        "text": model.generate(ids[:, :20], attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0),
    }
torch.save(results, f"{root}/results.pt")
"""


def trained(model, scale=0.05):
    """The model with small random changes: as initialised, the gate would be closed."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def hybrid(folder, case):
    """Saves a hybrid to `folder`, with a tokenizer; returns it."""
    config, kept, options = HYBRIDS[case]
    random_teacher(folder / "teacher", "qwen3", **config)
    save_tokenizer(folder / "teacher")
    torch.manual_seed(1)
    model = StudentForCausalLM.from_teacher(load_teacher(str(folder / "teacher")), "gdn_v8", kept, options)[0]
    model = trained(model)
    if case == "bf16":
        with torch.no_grad():  # norms far below 1, with some spread, and projections that compensate for it
            for name, weight in model.named_parameters():
                if name.endswith(("attn_norm.weight", "mlp_norm.weight")):
                    weight.mul_(torch.empty_like(weight).uniform_(0.03, 0.06))
                elif name.endswith("_proj.weight") and not name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(20)
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "ours")
    copy_sidecars(str(folder / "teacher"), folder / "ours")
    return model


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """(folder, {case: hybrid}, {case: outputs of its export in transformers alone})."""
    root = tmp_path_factory.mktemp("native")
    models = {}
    for case in HYBRIDS:
        models[case] = hybrid(root / case, case)
        export_native.export_native(str(root / case / "ours"), root / case / "native")
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :6] = 0
        torch.save({"ids": torch.randint(1, 96, (2, 75)), "mask": mask}, root / case / "input.pt")
    arguments = [str(root), json.dumps(list(HYBRIDS)), str(NEW_TOKENS), PROMPT]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, cwd=root)
    return root, models, torch.load(root / "results.pt", weights_only=False)


@pytest.mark.parametrize("case", HYBRIDS)
@torch.no_grad()
def test_transformers_alone_gives_the_same_outputs(everywhere, case):
    root, models, results = everywhere
    model = copy.deepcopy(models[case]).float()
    result = results[case]
    ids, mask = torch.load(root / case / "input.pt").values()
    close = dict(atol=1e-4, rtol=1e-4)
    full = model(ids).logits
    torch.testing.assert_close(result["full"], full, **close)
    torch.testing.assert_close(result["steps"], full, **close)
    padded = model(ids[:, :20], attention_mask=mask).logits
    torch.testing.assert_close(result["padded"][mask.bool()], padded[mask.bool()], **close)
    text = model.generate(ids[:, :20], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    assert torch.equal(result["text"], text)


@torch.no_grad()
def test_it_also_runs_on_a_cpu_where_our_package_is_imported(everywhere):
    """transformers calls FLA if it is importable; our package has replaced its functions by plain
    PyTorch."""
    root, _, results = everywhere
    model = AutoModelForCausalLM.from_pretrained(root / "tied" / "native").eval()
    ids, mask = torch.load(root / "tied" / "input.pt").values()
    torch.testing.assert_close(model(ids).logits, results["tied"]["full"], atol=1e-4, rtol=1e-4)
    text = model.generate(ids[:, :20], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    assert torch.equal(text, results["tied"]["text"])


@torch.no_grad()
def test_bf16_is_about_as_accurate_as_in_our_format(everywhere):
    """Qwen3.5's norms multiply by 1 + weight, which bf16 resolves to 1/256 of 1 and not of the
    weight."""
    root, _, results = everywhere
    result = results["bf16"]
    ids = torch.load(root / "bf16" / "input.pt")["ids"]
    ours = StudentForCausalLM.from_pretrained(root / "bf16" / "ours").eval()(ids).logits
    assert (result["rounded"] - result["full"]).norm() < 1.3 * (ours - result["full"]).norm()
    held = load_file(root / "bf16" / "native" / "model.safetensors")
    wide = {name.split(".")[-2] for name, tensor in held.items() if tensor.dtype != torch.bfloat16}
    assert wide <= {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}


@pytest.mark.parametrize("case", HYBRIDS)
def test_the_folder_has_all_that_belongs_to_the_model(everywhere, case):
    """Class, tying, dtype, tokenizer and generation config are as in the source."""
    root, models, results = everywhere
    ours = root / case / "ours"
    native = root / case / "native"
    result = results[case]
    architecture = json.loads((native / "config.json").read_text())["architectures"][0]
    assert result["class"] == architecture == "Qwen3_5ForCausalLM"
    assert result["tied"] == (case == "tied")
    assert result["dtypes"] == {torch.bfloat16 if case == "bf16" else torch.float32}
    assert result["prompt"] == AutoTokenizer.from_pretrained(ours)(PROMPT)["input_ids"]
    assert (native / "generation_config.json").read_text() == (ours / "generation_config.json").read_text()
    assert json.loads((native / "config.json").read_text())["mamba_ssm_dtype"] == "float32"
    assert {file.suffix for file in native.iterdir()} == {".json", ".safetensors"}
    assert {file.name for file in (root / case).iterdir()} == {"input.pt", "native", "ours", "teacher"}


def config_of(name="gdn_v8", student_options=None, **values):
    base = dict(num_hidden_layers=4, qk_norm=True, keep_full_attention_layers=[1])
    return StudentConfig(student_name=name, student_options=student_options, **{**base, **values})


@pytest.mark.parametrize("name", sorted(STUDENT_ATTENTION_MAP))
def test_students_that_differ_from_qwen3_5s_layer_are_refused(name):
    reason = native_export_refusal(config_of(name))
    if name == "gdn_v8":
        assert reason is None
    else:
        assert f"{name} has " in reason and "train gdn_v8" in reason and "\n" not in reason


@pytest.mark.parametrize(
    "config, reason",
    [
        (config_of("gdn_v3"), "gdn_v3 has a sigmoid in its gate; train"),
        (
            config_of("gdn_v5"),
            "gdn_v5 has no short convolution, a sigmoid in its gate, factored K and V; train",
        ),
        (
            config_of(student_options={"conv_bias": True}),
            "gdn_v8 has conv_bias; train gdn_v8 with none of that",
        ),
        (config_of(student_options={"allow_neg_eigval": True}), "gdn_v8 has allow_neg_eigval; train"),
        (
            config_of(qk_norm=False),
            "no q/k norms, and no norm does nothing; distil a Qwen3 teacher",
        ),
        (
            config_of(qk_norm_eps=1e-5, rms_norm_eps=1e-6),
            "the q/k norms have eps 1e-05, the others 1e-06",
        ),
        (config_of(attention_bias=True), "the attention has biases, which vLLM's class has no place for; distil"),
        (config_of(attention_output_bias=True), "the attention has biases"),
        (config_of(mlp_bias=True), "the MLP has biases"),
        (config_of(hidden_act="gelu"), "activation is gelu"),
        (config_of(keep_full_attention_layers=[]), "no layer is full"),
    ],
)
def test_unsupported_features_are_refused(config, reason):
    assert reason in native_export_refusal(config)


def test_all_reasons_are_given_at_once_with_the_teachers_first():
    """In one line, so that nobody retrains for the student's reason only to meet the teacher's."""
    config = config_of("gdn_v5", qk_norm=False, mlp_bias=True, hidden_act="gelu", keep_full_attention_layers=[])
    refusal = native_export_refusal(config)
    parts = [
        "(1) the full attention has no q/k norms",
        "(2) the MLP has biases",
        "(3) the MLP's activation is gelu",
        "(4) gdn_v5 has no short convolution, a sigmoid in its gate, factored K and V; train gdn_v8",
        "(5) no layer is full",
    ]
    places = [refusal.index(part) for part in parts]
    assert places == sorted(places) and "\n" not in refusal and "(6)" not in refusal
    assert "(1)" not in native_export_refusal(config_of("gdn_v3"))  # one reason needs no number


def test_options_at_their_default_values_are_accepted():
    assert native_export_refusal(config_of(student_options={"conv_bias": False, "conv_size": 3})) is None
    assert native_config(config_of(student_options={"conv_size": 3})).linear_conv_kernel_dim == 3


def test_refused_before_anything_is_written(everywhere, tmp_path):
    """With one line, and without a folder."""
    root = everywhere[0]
    with_files = tmp_path / "full"
    with_files.mkdir()
    (with_files / "mine").touch()
    model = StudentForCausalLM.from_teacher(load_teacher(str(root / "tied" / "teacher")), "gdn_v4", [0])[0]
    model.save_pretrained(tmp_path / "gdn_v4")
    (tmp_path / "predecessor").mkdir()
    (tmp_path / "predecessor" / "config.json").write_text('{"model_type": "student"}')
    absent = tmp_path / "absent"
    predecessor = tmp_path / "predecessor"
    for source, output, message in (
        (root / "tied" / "teacher", tmp_path / "a", "is of type qwen3, no hybrid of ours"),
        (tmp_path / "gdn_v4", tmp_path / "b", "gdn_v4 has no short convolution"),
        (absent, tmp_path / "c", f"--model: '{absent}' is neither a folder"),
        (predecessor, tmp_path / "d", f"--model: '{predecessor}' is a student of the KL-guided"),
        (root / "tied" / "ours", with_files, "already exists"),
    ):
        with pytest.raises(ValueError) as error:
            export_native.main(options(model=source, output=output))
        assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "gdn_v4", "predecessor"]


@pytest.mark.parametrize(
    "name", ["linear_attn.in_proj_qkv.weight", "self_attn.q_proj.weight", "input_layernorm.weight"]
)
def test_an_export_that_differs_is_not_written(everywhere, tmp_path, monkeypatch, name):
    """The comparison during the export finds a mistake in any kind of layer."""
    right = export_native.native_block

    def wrong(block, *args):
        theirs = right(block, *args)
        return theirs | ({name: theirs[name].flip(0)} if name in theirs else {})

    monkeypatch.setattr(export_native, "native_block", wrong)
    with pytest.raises(ValueError, match="differ by .*; nothing was written"):
        export_native.export_native(str(everywhere[0] / "tied" / "ours"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_from_the_command_line(everywhere, tmp_path):
    """Started from another folder, it writes the same weights as a call in this process."""
    root = everywhere[0]
    command = [sys.executable, export_native.__file__, *options(model=root / "tied" / "ours", output="out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "as Qwen3_5ForCausalLM" in done.stdout
    first = load_file(root / "tied" / "native" / "model.safetensors")
    second = load_file(tmp_path / "out" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_distilled_exported_and_loaded_elsewhere(teacher_dir, data_dir, tmp_path):
    """A gdn_v8 with calibrated initialisation, trained in stages 1 and 2: transformers alone gives
    the same text."""
    overrides = {
        1: ["student_model.name=gdn_v8", "train.calibrate_init=2"],
        2: ["student_model.name=gdn_v8"],
    }
    for stage in (1, 2):
        launch(write_config(tmp_path, stage, teacher_dir, data_dir), *overrides[stage], processes=1)
    ours = tmp_path / "stage2" / "converted-hf"
    export_native.main(options(model=ours, output=tmp_path / "case" / "native"))
    ids = torch.randint(1, 96, (2, 75))
    torch.save({"ids": ids, "mask": torch.ones(2, 20, dtype=torch.long)}, tmp_path / "case" / "input.pt")
    arguments = [str(tmp_path), '["case"]', str(NEW_TOKENS), PROMPT]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, cwd=tmp_path)
    result = torch.load(tmp_path / "results.pt", weights_only=False)["case"]
    model = StudentForCausalLM.from_pretrained(ours).eval()
    assert model.config.student_name == "gdn_v8" and model.config.keep_full_attention_layers == [1]
    with torch.no_grad():
        torch.testing.assert_close(result["full"], model(ids).logits, atol=1e-4, rtol=1e-4)
    text = model.generate(ids[:, :20], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    assert torch.equal(result["text"], text)
    card = (tmp_path / "case" / "native" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "| 1, attention output alignment |" in card and "| 2, logit distillation |" in card

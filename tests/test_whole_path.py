"""From a teacher of SmolLM2's shape to an evaluated hybrid with its report, by the commands and the
configs that users have: on random weights of few layers, and on real ones where there are some."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.config import load_config
from runtime.data import open_chunks, read_batch

import pytest
import torch
from conftest import LENGTH, make_chunks, python_texts, random_teacher, save_tokenizer
from huggingface_hub import ModelCard
from processes import Child, import_once
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_ckpt
import report
import train
from convert import load_teacher
from distill_model import StudentForCausalLM, is_student_attention
from evaluation.commands import compare_with_teacher, evaluate_checkpoints
from evaluation.options import path_parts
from layer_selection import select_layers

ROOT = Path(__file__).parents[1]
STAGE1 = ROOT / "configs" / "smollm2_135m_gdn_v7" / "stage1.yaml"
STAGE2 = ROOT / "configs" / "smollm2_135m_gdn_v7_hybrid_0_25_uniform" / "stage2.yaml"
WINDOWS = ROOT / "configs" / "smollm2_135m_swa_v1_hybrid_0_25_gates" / "stage2.yaml"
LAYERS = 3
# SmolLM2-135M's config, but for the number of layers and the vocabulary.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
STEPS = 6
EVALUATED = 4  # held-out chunks


def overrides(teacher, data, output, **train):
    """What a trial changes in a config: places, size of batch and run, and what it reports."""
    train |= {"max_steps": STEPS, "target_tokens": "null", "batch_size": 4, "micro_batch_size": 4}
    train |= {"train_seq_len": LENGTH, "output_dir": output, "eval_batches": EVALUATED // 4}
    train = {"save_steps": STEPS, "eval_steps": STEPS, "report_to": "none"} | train
    words = [f"train.{name}={value}" for name, value in train.items()]
    return [f"teacher_model.name={teacher}", f"data.cache_dir={data}", *words]


def in_a_process(log, function, *arguments):
    """Runs function(*arguments) in a forked process, as the command that it is, and asserts that it
    ends well."""
    child = Child(lambda: sys.exit(function(*arguments) or 0), log, ENVIRONMENT)
    assert child.wait() == 0, child.output()[-3000:]


def make_teacher(folder):
    random_teacher(folder, "llama", **SMOLLM2).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")


def prepare(folder, teacher, texts):
    """Both commands that make chunks."""
    make_chunks(folder, teacher, texts)


def losses(folder, name="eval_loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def from_a_fresh_process(function, folder):
    """Runs a function of this module, which forks the commands' processes, in a process that has no
    threads yet: tests before this one may have tokenised."""
    command = [sys.executable, __file__, function.__name__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def make_path(folder):
    """Teacher, data, layer selection, both stages' runs with their reports, and the results of
    teacher and hybrid."""
    log = folder / "log"
    teacher = folder / "SmolLM2-135M-Instruct"
    in_a_process(log, make_teacher, teacher)
    in_a_process(log, prepare, folder, str(teacher), python_texts(40))
    data = folder / f"chunked_context{LENGTH}"
    words = overrides(teacher, data, folder / "stage1", calibrate_init=5)
    in_a_process(log, train.main, ["--cfg", str(STAGE1), *words])
    rates = {"lr": 1e-5, "lr_attn": 1e-4}  # random weights bear no more
    begin = folder / "stage1" / "converted-hf"
    words = overrides(teacher, data, folder / "stage2", student_init_ckpt=begin, **rates)
    words += ["--method", "scan", "--top-k", "1", "--sequences", "4", "student_model.keep_full_attention_layers=[0]"]
    in_a_process(log, select_layers.main, ["--cfg", str(STAGE2), *words])
    (chosen,) = (folder / "stage2_scan").glob("*/stage2.yaml")
    in_a_process(log, train.main, ["--cfg", str(chosen)])
    run = chosen.with_name("stage2")
    words = ["--tasks", "local", "--seq_lens", "96", "--limit", str(EVALUATED), "--num_gpus", "1"]
    words += ["--data", str(data), "--document_mask", "true", "--teacher", str(teacher)]
    words += [str(teacher), str(run / "converted-hf"), "--output", str(run / "evaluation")]
    in_a_process(log, evaluate_checkpoints, words)
    files = [run / "evaluation" / "__".join(path_parts(str(of))) for of in (teacher, run / "converted-hf")]
    words = [*(str(file / "results.json") for file in files), "--output", str(run / "evaluation")]
    in_a_process(log, compare_with_teacher, words)
    in_a_process(log, convert_ckpt.main, ["--cfg", str(run / "config.yaml")])
    in_a_process(log, report.main, [str(folder / "stage1"), str(run), "--samples", "1"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The folder of make_path."""
    return from_a_fresh_process(make_path, tmp_path_factory.mktemp("path"))


@pytest.fixture(scope="module")
def hybrid(path):
    """The run folder of stage 2."""
    (chosen,) = (path / "stage2_scan").glob("*/stage2.yaml")
    return chosen.with_name("stage2")


@pytest.fixture(scope="module")
def results(hybrid):
    """(of the teacher, of the hybrid): key of a task -> result."""
    return tuple(json.loads((hybrid / "evaluation" / "results.json").read_text()).values())


def test_both_stages_learn_and_the_scan_chooses(path, hybrid):
    for folder in (path / "stage1", hybrid):
        before, after = losses(folder)
        assert after < before
    ranking = json.loads((path / "stage2_scan" / "ranking.json").read_text())
    assert ranking["keep"] == [ranking["layers"][0]["layer"]]
    cfg = load_config(hybrid / "config.yaml")
    assert cfg.student_model.keep_full_attention_layers == ranking["keep"]


def test_the_export_has_the_teachers_shape(path, hybrid):
    """One matrix for embeddings and head; the kept layer has 9 heads that share 3 of keys and
    values; dtype and RoPE are the teacher's."""
    with safe_open(hybrid / "converted-hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    model = StudentForCausalLM.from_pretrained(hybrid / "converted-hf", dtype="auto")
    assert model.lm_head.weight is model.model.embeddings.weight
    assert model.config.rope_parameters == SMOLLM2["rope_parameters"]
    kept = [not is_student_attention(block.attn) for block in model.model.layers]
    assert [i for i, keeps in enumerate(kept) if keeps] == model.config.keep_full_attention_layers
    attention = model.model.layers[kept.index(True)].attn
    assert attention.q_proj.weight.shape == (576, 576) and attention.k_proj.weight.shape == (192, 576)


def test_the_hybrid_generates_as_it_reads(path, hybrid):
    """Greedy text with a cache, by the class and the code that the export brings, is that of whole
    passes without one."""
    folder = hybrid / "converted-hf"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("def f7(x): return", return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


def test_the_evaluation_has_the_kl_of_training(hybrid, results):
    """The KL on the same chunks, up to the rounding of the export's weights."""
    teacher, student = results
    assert teacher["heldout_kl"]["score"] == pytest.approx(0, abs=1e-5)
    assert student["heldout_kl"]["score"] == pytest.approx(losses(hybrid)[-1], rel=0.1)
    assert teacher.keys() == student.keys() and not any("error" in result for result in student.values())


def test_card_and_report_have_origins_and_results(path, hybrid, results):
    body = (hybrid / "converted-hf" / "README.md").read_text()
    assert ModelCard.load(hybrid / "converted-hf" / "README.md").data.license == "apache-2.0"
    assert (
        f"A student of `SmolLM2-135M-Instruct`, a local checkpoint: {LAYERS - 1} of its {LAYERS} layers hold `gdn_v7`"
        in body
    )
    assert re.search(
        rf"\| 1, attention output alignment \| {STEPS * 4 * LENGTH} \| {LENGTH} \|.* texts \(local files\) \|", body
    )
    assert re.search(
        rf"\| 2, logit distillation \| {STEPS * 4 * LENGTH} \| {LENGTH} \|.* texts \(local files\) \|", body
    )
    pages = [(path / "stage1" / "report.html").read_text(), (hybrid / "report.html").read_text()]
    for result in results[1].values():
        score = f"{result['score']:.4f}"
        assert f"| {result['task']} | {result['seq_len'] or ''} | {result['metric']} | {score}" in body
    perplexity = [result["heldout_perplexity"] for result in results]
    scores = [f"{result['score']:.4f} ± {result['stderr']:.4f}" for result in perplexity]
    share = f"{perplexity[0]['score'] / perplexity[1]['score']:.1%}"
    of_student = f"| {scores[1]}, with a limit of {EVALUATED} documents | {scores[0]} | {share} |"
    assert f"| heldout_perplexity |  | perplexity {of_student}" in body
    assert "Samples" in pages[1] and str(path / "SmolLM2-135M-Instruct") in pages[0]


# ------------------------------------------------------------------------ without stage 1
WINDOW, SINKS = 6, 2
KEPT = [1]


def window_overrides(folder, path, **train):
    """Of the config WINDOWS: with the teacher and the chunks of `path`, and windows that are shorter than these."""
    train |= {"lr": 1e-5, "lr_attn": 1e-4}
    words = overrides(path / "SmolLM2-135M-Instruct", path / f"chunked_context{LENGTH}", folder / "stage2", **train)
    words += [f"student_model.keep_full_attention_layers={KEPT}", "data.document_mask=false"]
    return [*words, f"student_model.options={{window_size: {WINDOW}, sink_size: {SINKS}}}"]


def make_windows(folder):
    """Stage 2 with windows, from the teacher of the folder that `folder`/path names: planned, trained with the MLPs frozen
    and the teacher sharded, resumed from its first checkpoint, and exported by the script; and a choice of layers."""
    path = Path((folder / "path").read_text())
    words = window_overrides(folder, path, freeze="[mlp]", kd_teacher_shard="always", save_steps=STEPS // 2)
    in_a_process(folder / "plan", train.main, ["--cfg", str(WINDOWS), "--dry-run", *words])
    in_a_process(folder / "log", train.main, ["--cfg", str(WINDOWS), *words])
    run = folder / "stage2"
    (run / "converted-hf").rename(run / "unbroken")
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    in_a_process(folder / "again", train.main, ["--cfg", str(WINDOWS), *words])
    in_a_process(folder / "export", convert_ckpt.main, ["--cfg", str(run / "config.yaml")])
    words += ["--method", "scan", "--top-k", "1", "--sequences", "4", "--output_dir", str(folder / "scan")]
    in_a_process(folder / "scan.log", select_layers.main, ["--cfg", str(WINDOWS), *words])


@pytest.fixture(scope="module")
def windows(path, tmp_path_factory):
    """The folder of make_windows."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "path").write_text(str(path))
    return from_a_fresh_process(make_windows, folder)


def narrowed(model):
    """transformers' model, whose layers outside KEPT see the last WINDOW tokens and the first SINKS."""

    def narrow(module, args, kwargs):
        query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        seen = (key <= query) & ((query - key < WINDOW) | (key < SINKS))
        return args, {**kwargs, "attention_mask": torch.where(seen, 0.0, float("-inf"))[None, None]}

    for index, layer in enumerate(model.model.layers):
        if index not in KEPT:
            layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
    return model


def test_windows_begin_as_the_teacher_with_a_mask(path, windows):
    """The first held-out KL of the log is that of transformers' own model with windows, and it falls."""
    teacher = path / "SmolLM2-135M-Instruct"
    models = [
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager") for _ in "ab"
    ]
    rows = open_chunks(str(path / f"chunked_context{LENGTH}"), LENGTH, document_mask=False).heldout
    ids = read_batch(rows, range(EVALUATED))["input_ids"]
    with torch.no_grad():
        whole, start = (model(ids).logits.double().log_softmax(-1) for model in (models[0], narrowed(models[1])))
    first, *_, last = losses(windows / "stage2")
    assert first == pytest.approx((whole.exp() * (whole - start)).sum(-1).mean().item(), rel=1e-3) and first > last
    assert "students: 2 x swa_v1; full: [1]; all weights are the teacher's" in (windows / "log").read_text()
    assert "teacher: sharded" in (windows / "log").read_text()
    assert "mlp: frozen" in (windows / "plan").read_text()


def test_windows_resume_and_export(path, windows):
    """The resumed run ends with the weights of the unbroken one, the MLPs with the teacher's; the export loads with
    the code that it brings, and its card says where it started."""
    run = windows / "stage2"
    assert f"resuming from {run}/checkpoint-{STEPS // 2}" in (windows / "again").read_text()
    unbroken, again = (
        AutoModelForCausalLM.from_pretrained(run / name, trust_remote_code=True, dtype=torch.float32).state_dict()
        for name in ("unbroken", "converted-hf")
    )
    source = load_teacher(str(path / "SmolLM2-135M-Instruct")).state_dict()
    assert unbroken.keys() == again.keys() == source.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, unbroken[name]), name
        if ".mlp." in name or "_proj" in name:
            assert torch.equal(tensor, source[name]) == (".mlp." in name), name
    card = (run / "converted-hf" / "README.md").read_text()
    assert "2 of its 3 layers hold `swa_v1` with window_size = 6, sink_size = 2" in card
    assert "Stage 2 started from the teacher's own weights, without a stage 1." in card and "no record" not in card


def test_layers_of_windows_can_be_selected(windows):
    (chosen,) = (windows / "scan").glob("*/stage2.yaml")
    assert load_config(chosen).train.student_init_ckpt is None
    assert load_config(chosen).student_model.options == {"window_size": WINDOW, "sink_size": SINKS}


# ------------------------------------------------------------------------ real weights
REAL = os.environ.get("SMOLLM2")  # a folder with SmolLM2-135M-Instruct
with_real_weights = pytest.mark.skipif(
    not REAL, reason="SMOLLM2 names no folder with the weights of SmolLM2-135M-Instruct"
)
KEPT_BY_RECALL = [0, 1, 8, 16, 17, 18, 19, 20]  # those of configs/smollm2_135m_gdn_v7_hybrid_0_25_ar
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. The capital of Germany is"


@pytest.fixture(scope="module")
def real():
    """(the weights in transformers' class, in ours, tokenizer), in fp32."""
    theirs = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    return theirs, load_teacher(REAL, torch.float32).eval(), AutoTokenizer.from_pretrained(REAL)


def make_real_stage1(folder):
    """Six steps of stage 1 on the pages of this project."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    in_a_process(folder / "log", prepare, folder, REAL, pages)
    words = overrides(REAL, folder / f"chunked_context{LENGTH}", folder / "stage1", calibrate_init=8)
    in_a_process(folder / "log", train.main, ["--cfg", str(STAGE1), *words])


@pytest.fixture(scope="module")
def real_stage1(tmp_path_factory):
    """The run folder of make_real_stage1."""
    return from_a_fresh_process(make_real_stage1, tmp_path_factory.mktemp("real")) / "stage1"


@pytest.mark.slow
@with_real_weights
def test_real_weights_learn_in_stage_1(real_stage1):
    before, after = losses(real_stage1)
    assert after < before


@pytest.mark.slow
@with_real_weights
def test_a_real_hybrid_that_keeps_all_layers_is_the_teacher(real, real_stage1):
    """Logits of stage 1's export with all attentions restored, against transformers' own."""
    theirs, teacher, tokenizer = real
    student = StudentForCausalLM.from_pretrained(real_stage1 / "converted-hf", dtype=torch.float32)
    hybrid = student.restore_full_attention(teacher, range(30)).eval()
    ids = tokenizer((ROOT / "README.md").read_text(), return_tensors="pt")["input_ids"][:, :301]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (hybrid(ids, use_cache=False).logits - expected).abs().max() < 1e-3 * expected.abs().max()
        fewer = student.restore_full_attention(teacher, KEPT_BY_RECALL).eval()
        loss = [torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]) for model in (theirs, fewer)]
    assert 0.1 < loss[0] < loss[1] < 7  # of text, and not of noise


@pytest.mark.slow
@with_real_weights
def test_real_greedy_text_is_sane(real):
    """With a cache, by our class: transformers' text, and the right answer."""
    theirs, teacher, tokenizer = real
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    texts = []
    for model in (theirs, teacher):
        found = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :]))
    assert texts[0] == texts[1] and texts[1].startswith(" Berlin")


if __name__ == "__main__":
    import_once()
    {function.__name__: function for function in (make_path, make_windows, make_real_stage1)}[sys.argv[1]](
        Path(sys.argv[2])
    )

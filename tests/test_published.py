"""The published rows: checked-in configs equal what the generator writes; names, counts, ranges,
folders; and reproduce.sh."""

import json
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

from runtime.config import load_config

import pytest
import yaml

from distill_model import get_student_attention_class
from evaluation.options import path_parts
from layer_selection.ranking import RATIOS, budget
from layer_selection.select_layers import layers_to_keep, make_parser
from layer_selection.write_configs import PUBLISHED, main, rows

ROOT = Path(__file__).parent.parent
SETS = yaml.safe_load(PUBLISHED.read_text())
ROWS = list(rows(SETS))
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "quickstart")


def test_checked_in_files_are_what_the_generator_writes(tmp_path):
    main(["--output_dir", str(tmp_path)])
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    checked_in = [*FILES, ROOT / "configs" / "README.md"]
    assert written == {path.relative_to(ROOT / "configs"): path.read_text() for path in checked_in}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.folder)
def test_a_folder_name_matches_its_config(row):
    """The folder's name says what the file holds."""
    cfg = load_config(ROOT / "configs" / row.folder / "stage2.yaml")
    teacher, size, kind, version, ratio, selector = re.fullmatch(
        r"([a-z0-9.]+)_([0-9.]+[mb])_([a-z]+)_(v\d)_hybrid_(\d_\d+)_(\w+)", row.folder
    ).groups()
    facts, kept = (
        SETS["teachers"][f"{teacher}_{size}"],
        cfg.student_model.keep_full_attention_layers,
    )
    name = cfg.teacher_model.name.partition("/")[2].lower().removesuffix("-instruct")
    assert name.replace("-", "") == f"{teacher}{size}" and cfg.teacher_model.name == facts["name"]
    assert cfg.student_model.name == f"{kind}_{version}" and selector in SETS["sources"]
    assert len(kept) == budget(float(ratio.replace("_", ".")), facts["layers"])
    assert kept == sorted(set(kept)) and set(kept) <= set(range(facts["layers"]))
    pair = ROOT / "configs" / f"{teacher}_{size}_{kind}_{version}"
    if row.from_teacher:
        assert cfg.train.student_init_ckpt is None and not pair.exists()
        assert get_student_attention_class(row.student).layer.has_only_teachers_weights
        return
    start = load_config(pair / "stage1.yaml")
    assert cfg.train.student_init_ckpt == f"{start.train.output_dir}/converted-hf"
    assert (start.teacher_model, start.student_model.name) == (
        cfg.teacher_model,
        cfg.student_model.name,
    )


def test_the_documentation_says_what_a_ratio_keeps():
    page = (ROOT / "docs" / "layer_selection.md").read_text()
    ratios = [float(ratio) for ratio in re.search(r"\| teacher \| layers \| (.*) \|", page)[1].split(" | ")]
    lines = re.findall(r"^\| [^|]*(?:Qwen|Llama|SmolLM)[^|]* \| (\d+) \| ([\d |]+) \|$", page, re.MULTILINE)
    assert tuple(ratios) == RATIOS and {int(layers) for layers, _ in lines} == {
        f["layers"] for f in SETS["teachers"].values()
    }
    for layers, kept in lines:
        assert [int(count) for count in kept.split(" | ")] == [budget(ratio, int(layers)) for ratio in ratios]


def test_every_published_set_has_its_rows():
    found = {(row.teacher, row.student, row.selector, tuple(row.layers)) for row in ROWS}
    for teacher, facts in SETS["teachers"].items():
        for student in facts["students"]:
            for selector, ranked in facts.get("ranked", {}).items():
                for count in (budget(ratio, facts["layers"]) for ratio in facts.get("ratios", RATIOS)):
                    assert count > len(ranked) or (teacher, student, selector, tuple(sorted(ranked[:count]))) in found
            for selector, sets in facts.get("set", {}).items():
                assert all((teacher, student, selector, tuple(layers)) in found for layers in sets)
    assert Counter(row.start for row in ROWS) == {
        "qwen2.5_1.5b_gdn_v4": 9,
        "qwen2.5_1.5b_gla_v1": 9,
        "qwen2.5_3b_gdn_v4": 21,
        "qwen2.5_3b_gla_v1": 21,
        "qwen2.5_7b_gdn_v4": 10,
        "qwen2.5_7b_gla_v1": 10,
        "llama3.2_3b_gdn_v4": 22,
        "llama3.2_3b_gla_v1": 22,
        "qwen3_0.6b_gdn_v4": 1,
        "qwen3_1.7b_gdn_v4": 1,
        "qwen3_8b_gdn_v4": 1,
        "smollm2_135m_gdn_v7": 8,
        "smollm2_135m_swa_v1": 3,
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_learning_rates_are_those_of_the_teachers_size(file):
    """Against the size in the teacher's own name."""
    cfg = load_config(file)
    size = re.search(r"-([0-9.]+[MB])(-|$)", cfg.teacher_model.name)[1]
    of_135m = size == "135M"
    rates = {1: (1e-3, None), 2: (1.5e-4, 1.5e-3) if of_135m else (1e-5, 1e-4), 3: (5e-5 if of_135m else 1e-5, None)}
    assert (cfg.train.lr, cfg.train.lr_attn) == rates[cfg.stage]


def test_a_teacher_may_have_its_own_settings():
    """SmolLM2's positions and size; what it does not name is published."""
    stages = [load_config(ROOT / "configs" / "smollm2_135m_gdn_v7" / "stage1.yaml").train]
    folder = ROOT / "configs" / "smollm2_135m_gdn_v7_hybrid_0_25_uniform"
    stages += [load_config(folder / f"stage{stage}.yaml").train for stage in (2, 3)]
    assert [train.micro_batch_size for train in stages] == ["auto"] * 3
    assert [train.train_seq_len for train in stages] == [512, 2048, 8192]
    assert [train.batch_size for train in stages] == [96, 32, 96]
    assert [train.calibrate_init for train in stages] == [8, 0, 0]


@pytest.mark.parametrize("ratio, kept", [("0_125", 4), ("0_25", 8), ("0_5", 15)])
def test_windows_are_as_the_benchmark_trained_them(ratio, kept):
    """Layers, options, rates and length of the row of docs/results.md; and which student chose the
    layers."""
    file = ROOT / "configs" / f"smollm2_135m_swa_v1_hybrid_{ratio}_gates" / "stage2.yaml"
    cfg = load_config(file)
    results = json.loads((ROOT / "docs" / "results.json").read_text())["rows"]
    row = next(row for row in results if row["name"] == f"{kept} kept by gates, swa_v1, window 512")
    settings = row["settings"]
    student = cfg.student_model
    assert (student.name, student.options) == (settings["student"], settings["options"])
    assert student.keep_full_attention_layers == row["layers"] and settings["stage1"] is None
    planned = yaml.safe_load((ROOT / "benchmarks" / "real_model.yaml").read_text())["rows"]
    (chooser,) = (other["kept"]["same_as"] for other in planned if other["name"] == row["name"])
    chosen_on = next(other for other in results if other["name"] == chooser)
    assert chosen_on["layers"] == row["layers"] and chosen_on["settings"]["stage1"]
    comment = file.read_text().partition("\n")[0]
    assert f"chosen on {chosen_on['settings']['student']} after its stage 1" in comment
    same = ("lr", "lr_attn", "final_lr", "train_seq_len")
    assert all(getattr(cfg.train, key) == settings["stage2"][key] for key in same)


def test_no_two_share_an_output_folder():
    folders = Counter(load_config(path).train.output_dir for path in FILES)
    assert len(folders) == len(FILES) and all(re.search(r"/stage[123]$", folder) for folder in folders)


def test_stage_3_starts_from_the_stage_2_in_its_folder():
    files = [path for path in FILES if path.name == "stage3.yaml"]
    assert {"qwen3_0.6b_gdn_v4_hybrid_0_25_uniform", "qwen3_8b_gdn_v4_hybrid_0_25_uniform"} <= {
        path.parent.name for path in files
    }
    for path in files:
        cfg, before = load_config(path), load_config(path.with_name("stage2.yaml"))
        assert cfg.train.student_init_ckpt == f"{before.train.output_dir}/converted-hf"
        assert cfg.student_model == before.student_model


def test_published_rankings_name_each_layer_once():
    for facts in SETS["teachers"].values():
        for ranked in facts.get("ranked", {}).values():
            assert len(set(ranked)) == len(ranked) and set(ranked) <= set(range(facts["layers"]))


def reproduce(row, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "reproduce.sh"), row],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("row", ["llama3.2_3b_gla_v1_hybrid_0_25_smart", "smollm2_135m_gdn_v7_hybrid_0_25_ar"])
@pytest.mark.parametrize("teacher", [None, "/weights/of/teacher"])
def test_a_row_is_reproduced_from_preprocessing_to_the_reports(row, teacher):
    weights = {"TEACHER": teacher} if teacher else {}
    done = reproduce(row, DRY_RUN="1", MAX_TOKENS="1000", **weights)
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [command[:2] for command in commands] == [
        ["python", "preprocess_download_tokenize.py"],
        ["python", "preprocess_chunk.py"],
        ["deepspeed", "train.py"],
        ["python", "preprocess_chunk.py"],
        ["deepspeed", "train.py"],
        *[["env", "TASKS=ruler"], ["env", "TASKS=local,needle_recall"]] * 2,
        ["python", "eval_compare.py"],
        ["python", "convert_ckpt.py"],
        ["python", "report.py"],
    ]
    tokenize, short, stage1, long, stage2 = (dict(zip(command, command[1:])) for command in commands[:5])
    first, second = load_config(ROOT / stage1["--cfg"]), load_config(ROOT / stage2["--cfg"])
    name = teacher or second.teacher_model.name
    assert tokenize["--tokenizer"] == name and tokenize["--max_tokens"] == "1000"
    for chunks, cfg in ((short, first), (long, second)):
        assert chunks["--tokenized_dataset_path"] == tokenize["--output_dir"]
        assert cfg.data.cache_dir == f"{chunks['--output_dir']}/chunked_context{chunks['--context_length']}"
    assert second.train.student_init_ckpt == f"{first.train.output_dir}/converted-hf"
    for command in (commands[2], commands[4], commands[10]):
        assert (f"teacher_model.name={teacher}" in command) == bool(teacher)
    check_evaluation(commands[5:], name, second)
    assert commands[-1][2:] == [first.train.output_dir, second.train.output_dir, "--samples", "3"]


def test_a_row_that_starts_from_the_teacher_is_reproduced_without_stage_1():
    done = reproduce("smollm2_135m_swa_v1_hybrid_0_25_gates", DRY_RUN="1")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [command[:2] for command in commands[:3]] == [
        ["python", "preprocess_download_tokenize.py"],
        ["python", "preprocess_chunk.py"],
        ["deepspeed", "train.py"],
    ]
    tokenize, chunk, stage2 = (dict(zip(command, command[1:])) for command in commands[:3])
    cfg = load_config(ROOT / stage2["--cfg"])
    assert cfg.data.cache_dir == f"{chunk['--output_dir']}/chunked_context{chunk['--context_length']}"
    assert tokenize["--output_dir"] == chunk["--tokenized_dataset_path"]
    check_evaluation(commands[3:], cfg.teacher_model.name, cfg)
    assert commands[-1][2:] == [cfg.train.output_dir, "--samples", "3"]


def check_evaluation(commands, teacher, cfg):
    """Teacher and hybrid have the same tasks; the comparison reads where evaluate.py writes, and the
    hybrid's results lie where the model card looks for them."""
    *evaluations, compare, export, _ = commands
    run = cfg.train.output_dir
    for (ruler, local), checkpoint in ((evaluations[:2], teacher), (evaluations[2:], f"{run}/converted-hf")):
        assert ruler[-1] == local[-1] == checkpoint
        assert ruler[1:3] == ["TASKS=ruler", "SEQ_LENS=4096"]
        assert local[1:3] == ["TASKS=local,needle_recall", "SEQ_LENS=512,2048"]
        assert {f"DATA={cfg.data.cache_dir}", f"TEACHER={teacher}"} <= set(local)
    outputs = [dict(word.split("=") for word in line if "=" in word)["OUTPUT"] for line in evaluations]
    assert outputs[0] == outputs[1] and outputs[2:] == [f"{run}/evaluation"] * 2
    names = ["__".join(path_parts(checkpoint)) for checkpoint in (teacher, f"{run}/converted-hf")]
    assert compare[2:4] == [f"{folder}/{name}/results.json" for folder, name in zip(outputs[1:3], names)]
    assert "--cfg" in export and export[export.index("--cfg") + 1].endswith("stage2.yaml")


def test_a_corpus_of_one_and_a_half_times_stage_2_is_the_default():
    for row, tokens in (("qwen3_8b_gdn_v4_hybrid_0_25_uniform", 900), ("smollm2_135m_gdn_v7_hybrid_0_25_ar", 180)):
        assert f"--max_tokens {tokens}000000 " in reproduce(row, DRY_RUN="1").stdout


@pytest.mark.parametrize(
    "row",
    ["qwen2.5_1.5b_gdn_v4", "quickstart", "../configs/quickstart", "nowhere_hybrid_0_25_uniform"],
)
def test_unpublished_rows_are_refused(row):
    done = reproduce(row)
    assert (
        done.returncode == 1 and done.stdout == "" and done.stderr.startswith(f"ROW: {row} is not a folder of configs/")
    )


def pipeline(tmp_path, row, **environment):
    """launch_pipeline.sh with a row, and an sbatch that notes what it is handed in `tmp_path`: CFG in
    configs, the settings of preprocessing in data, RATIO of layer selection in ratio."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\necho "${{CFG:-none}}" >>{tmp_path}/configs\n'
        f'echo "${{TOKENIZER:-}} ${{DATA_DIR:-}} ${{CONTEXT_LENGTHS:-}}" >>{tmp_path}/data\n'
        f"[[ $* != *launch_selection.sh ]] || echo ${{RATIO:-unset}} >>{tmp_path}/ratio\necho 7\n"
    )
    sbatch.chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/tmp", "CONFIGS": str(row)}
    return subprocess.run(["bash", str(ROOT / "launch_pipeline.sh")], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("method, stage_2_jobs", [("ga_s2", 3), ("gates", 2), ("mse", 2)])
def test_the_pipeline_takes_stage_1_from_the_folder_of_the_pair(tmp_path, method, stage_2_jobs):
    """What it would hand to Slurm. Preprocessing takes tokenizer, folder and lengths from the configs;
    only a method that trains every layer has an array of candidates."""
    row = ROOT / "configs" / "qwen3_8b_gdn_v4_hybrid_0_25_uniform"
    done = pipeline(tmp_path, row, LAYERS="36", METHOD=method)
    assert done.returncode == 0, done.stderr
    stage1 = ROOT / "configs" / "qwen3_8b_gdn_v4" / "stage1.yaml"
    assert (tmp_path / "configs").read_text().split() == [
        "none",
        str(stage1),
        *[f"{row}/stage2.yaml"] * stage_2_jobs,
        f"{row}/stage3.yaml",
        "none",
    ]
    stages = [load_config(file) for file in (stage1, row / "stage2.yaml", row / "stage3.yaml")]
    teacher, folder = stages[0].teacher_model.name, Path(stages[0].data.cache_dir).parent
    lengths = [str(stage.train.train_seq_len) for stage in stages]
    assert (tmp_path / "data").read_text().splitlines()[0].split() == [
        teacher,
        str(folder),
        *lengths,
    ]


@pytest.mark.parametrize("folder, kept", [("0_125", 4), ("0_25", 8), ("0_5", 15)])
def test_as_many_layers_are_selected_as_the_folder_keeps(tmp_path, folder, kept):
    """By the command of launch_selection.sh, not a quarter in all folders; RATIO asks for another
    number. Stages 2 and 3 of the pipeline take them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("python() { echo python $*; }\nexport -f python\n")
    stage2 = str(ROOT / "configs" / f"smollm2_135m_swa_v1_hybrid_{folder}_gates" / "stage2.yaml")
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "DEVICE": "cpu", "MASTER_PORT": "1", "CFG": stage2}
    for settings, expected in (({}, kept), ({"RATIO": "0.33"}, 10)):
        launch = ["bash", str(ROOT / "launch_selection.sh")]
        done = subprocess.run(launch, capture_output=True, text=True, env=environment | settings)
        assert done.returncode == 0, done.stderr
        command = done.stdout.splitlines()[-1].split()
        assert command[:2] == ["python", "layer_selection/select_layers.py"]
        args = make_parser().parse_intermixed_args(command[2:])
        assert args.cfg == stage2 and layers_to_keep(args, load_config(args.cfg), 30) == expected
    done = subprocess.run(
        launch, capture_output=True, text=True, env=environment | {"OVERRIDES": "train.seed=1 train.lr=2"}
    )
    assert done.stdout.split()[-2:] == ["train.seed=1", "train.lr=2"]


@pytest.mark.slow
def test_the_pipeline_of_a_student_that_starts_from_the_teacher(tmp_path):
    """No stage 1 and no chunks of its length; another student without a start is refused before a job
    is submitted."""
    row = ROOT / "configs" / "smollm2_135m_swa_v1_hybrid_0_5_gates"
    done = pipeline(tmp_path, row, LAYERS="30", METHOD="gates")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("preprocess", "selection", "stage2", "stage3", "evaluation")
    ]
    configs = ["none", *[f"{row}/stage2.yaml"] * 2, f"{row}/stage3.yaml", "none"]
    assert (tmp_path / "configs").read_text().split() == configs
    settings = (tmp_path / "data").read_text().splitlines()[0]
    assert settings == "HuggingFaceTB/SmolLM2-135M-Instruct data/smollm2_135m 2048 8192"
    assert (tmp_path / "ratio").read_text() == "unset\n"  # so that as many layers are kept as in the row
    other = tmp_path / "other_hybrid_0_25_gates"
    other.mkdir()
    for file in row.iterdir():
        text = file.read_text().replace("swa_v1", "gdn_v7").replace("  options: {window_size: 508, sink_size: 4}\n", "")
        (other / file.name).write_text(text)
    (tmp_path / "configs").unlink()
    done = pipeline(tmp_path, other, LAYERS="30", METHOD="gates")
    assert done.returncode == 1 and "gdn_v7 has weights that the teacher lacks: run stage 1 first" in done.stderr
    assert not (tmp_path / "configs").exists()


@pytest.mark.parametrize("file", ["train.py", *(path.name for path in ROOT.glob("launch_*.sh"))])
def test_configs_that_are_named_exist(file):
    assert not [
        name
        for name in re.findall(r"configs/[\w.]+/\w+\.yaml", (ROOT / file).read_text())
        if not (ROOT / name).is_file()
    ]

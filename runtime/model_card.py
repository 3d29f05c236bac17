"""What an exported model documents about itself: `training.json`, a record of its stages, and
`README.md`, its model card.

A stage's record is made from its run folder; those of earlier stages are copied from the model it
was initialised from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from .checkpoints import fingerprint, step_of
from .config import PARTS, Config, TrainConfig, trained_parts
from .run_folder import EXPORT, HISTORY, RUN, metrics_until, read_json

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")
STAGES = {1: "attention output alignment", 2: "logit distillation", 3: "long-context finetuning"}
MADE_WITH = ("torch", "transformers", "flash-linear-attention", "triton")


def public_name(name: str) -> str:
    """A hub name unchanged; of a local path only the last part, since the rest is private."""
    return Path(name).resolve().name if Path(name).exists() else name


DIVERGENCES = {
    "forward": "KL to",
    "reverse": "reverse KL to",
    "jsd": "Jensen-Shannon divergence from",
    "topk": "KL on the most likely tokens to",
}


def objective(cfg: Config) -> str:
    """A stage's loss in words, with its weights and unit."""
    train = cfg.train
    if cfg.stage == 1:
        return f"distance to the teacher's attention outputs ({train.alignment_loss})"
    if cfg.stage == 3:
        return "cross-entropy, nats per token" + _trained(train)
    terms = []
    other = cfg.teacher_model.distill_from
    teacher = f"{public_name(other)}, with the teacher's tokenizer" if other else "the teacher"
    for weight, name in (
        (train.kl_weight, f"{DIVERGENCES[train.kl]} {teacher} (temperature {train.kl_temperature:g})"),
        (train.ce_weight, "cross-entropy"),
    ):
        if weight:
            terms.append(name if weight == 1 else f"{weight:g} x {name}")
    return " + ".join(terms) + ", nats per token" + _trained(train)


def _trained(train: TrainConfig) -> str:
    """The parts that were trained, if not all were."""
    parts = trained_parts(train)
    return "" if len(parts) == len(PARTS) else f"; trained: {', '.join(parts)}"


def stage_record(cfg: Config, checkpoint: Path) -> dict:
    """The settings, data, losses and versions that led to `checkpoint`; what the run folder does
    not record is None."""
    train = cfg.train
    step = step_of(checkpoint)
    folder = Path(train.output_dir)
    run = read_json(folder / RUN)
    data = read_json(Path(cfg.data.cache_dir) / "metadata.json")
    lines = [json.loads(line) for line in metrics_until(folder, step)]

    def first_and_last(name: str) -> list[float | None] | None:
        """None for the last if there is only that of step 0, before training."""
        logged = [line for line in lines if name in line]
        if not logged:
            return None
        trained = any(line["step"] for line in logged)
        return [logged[0][name], logged[-1][name] if trained else None]

    local = str(data.get("corpus", "")).startswith("local-")
    return {
        "stage": cfg.stage,
        "from_teacher": not train.student_init_ckpt,
        "steps": step,
        "tokens": step * train.batch_size * train.train_seq_len,
        "sequence_length": train.train_seq_len,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "lr_attn": train.lr if train.lr_attn is None else train.lr_attn,
        "lr_scheduler_type": train.lr_scheduler_type,
        "final_lr": train.lr if train.lr_scheduler_type == "constant" else train.final_lr,
        "objective": objective(cfg),
        "loss": first_and_last("loss"),
        "heldout_loss": first_and_last("eval_loss"),
        "keep_full_attention_layers": sorted(cfg.student_model.keep_full_attention_layers),
        "dataset": Path(data["dataset_name"]).name if local else data.get("dataset_name"),
        "dataset_on_hub": bool(data) and not local,
        "seed": train.seed,
        "seconds": lines[-1].get("seconds") if lines else None,
        **{name: run.get(name) for name in ("started", "device", "world_size", "git", "python", "versions")},
    }


def teacher_record(cfg: Config, folder: Path) -> dict:
    """The teacher's name and licence; the latter from a copy of the teacher's card in `folder`, if
    any."""
    name = cfg.teacher_model.name
    card = folder / CARD
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        metadata = {}  # not in the hub's format
    licence = {key: metadata.get(key) for key in LICENCE}
    return {"name": public_name(name), "on_hub": not Path(name).exists()} | licence


def _own_results(record: dict, export_fingerprint: Callable[[], str]) -> list[dict]:
    """The rows of a results file of evaluate.py that were measured on the weights of the export."""
    rows = []
    for result in record.get("tasks", {}).values():
        settings = result.get("settings", {})
        if "score" in result and settings.get("checkpoint") == export_fingerprint():
            rows.append(result | {"limit": settings.get("limit")})
    return rows


def _harness_results(record: dict) -> list[dict]:
    """The rows of a results file of lm-evaluation-harness, whose scores have keys `metric,filter`."""
    rows = []
    limit = record.get("config", {}).get("limit")
    for task, values in record.get("results", {}).items():
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        scores = {key: value for key, value in numbers.items() if "," in key}
        for key, score in scores.items():
            metric, filter_name = key.split(",", 1)
            # RULER's metrics are sequence lengths; a score of -1 marks one that was not run.
            length = int(metric) if metric.isdigit() else None
            if metric.endswith("_stderr") or (length and score == -1):
                continue
            row = {
                "task": task,
                "seq_len": length,
                "metric": "match" if length else metric,
                "score": score,
                "stderr": scores.get(f"{metric}_stderr,{filter_name}"),
                "limit": limit,
            }
            rows.append(row)
    return rows


def _teachers_results(folder: Path, export_fingerprint: Callable[[], str]) -> dict[tuple, dict]:
    """(task, seq_len, metric, score) of the export -> what eval_compare.py found of its teacher, in
    files compare.json of `folder`: name, score, stderr, and share, the export's part of that
    score."""
    entries = []
    for file in sorted(folder.glob("**/compare.json"), key=lambda path: path.stat().st_mtime):
        try:
            record = read_json(file)
        except ValueError:
            continue  # being written
        for student in record.get("students", {}).values():
            entries += [entry | {"name": record["teacher"]} for entry in student["tasks"]]
    found = {}
    for entry in entries:
        ours = entry["student"] or {}
        theirs = entry["teacher"] or {}
        measured_on = ours.get("settings", {}).get("checkpoint")
        if "score" not in theirs or measured_on is None or measured_on != export_fingerprint():
            continue
        key = tuple(ours.get(name) for name in ("task", "seq_len", "metric", "score"))
        found[key] = {
            "name": entry["name"],
            "score": theirs["score"],
            "stderr": theirs.get("stderr"),
            "share": entry["share"],
        }
    return found


def evaluation(folder: Path, export: Path) -> list[dict]:
    """The evaluation results in the run folder `folder`, sorted by task, seq_len and metric.

    Each has task, seq_len, metric, score, stderr and limit (the number of documents; None: all), and
    teacher, see `_teachers_results`, or None where nothing was compared.
    Files of evaluate.py and lm-evaluation-harness are read; of several results for the same, the
    latest counts. Those of evaluate.py name the weights that they are of; other weights than
    `export` has are left out, since the run may have been resumed in between.
    """
    found = {}
    export_fingerprint = cache(lambda: fingerprint(export))
    for file in sorted(folder.glob("**/results*.json"), key=lambda path: path.stat().st_mtime):
        try:
            record = read_json(file)
        except ValueError:
            continue  # being written
        checkpoint = record.get("checkpoint", record.get("model_name"))
        if checkpoint is not None and Path(checkpoint).resolve() != (folder / EXPORT).resolve():
            continue  # of another model, such as the teacher
        for result in _own_results(record, export_fingerprint) + _harness_results(record):
            row = {key: result.get(key) for key in ("task", "seq_len", "metric", "score", "stderr", "limit")}
            found[row["task"], row["seq_len"] or 0, row["metric"]] = row
    teachers = _teachers_results(folder, export_fingerprint) if found else {}
    for row in found.values():
        key = (row["task"], row["seq_len"], row["metric"], row["score"])
        row["teacher"] = teachers.get(key)
    return [found[key] for key in sorted(found)]


def write_card(cfg: Config, checkpoint: Path, folder: Path, config) -> None:
    """Writes training.json and README.md of the export `folder`, over a copy of the teacher's card.

    config: the export's StudentConfig.
    """
    start = cfg.train.student_init_ckpt
    before = read_json(Path(start) / HISTORY) if start else {}
    history = {
        "teacher": teacher_record(cfg, folder),
        "student": {
            "name": config.student_name,
            "options": config.student_options,
            "layers": config.num_hidden_layers,
            "keep_full_attention_layers": config.keep_full_attention_layers,
        },
        "stages": [*before.get("stages", []), stage_record(cfg, checkpoint)],
        "evaluation": evaluation(Path(cfg.train.output_dir), folder),
    }
    (folder / HISTORY).write_text(json.dumps(history, indent=1))
    (folder / CARD).write_text(card(history))


def write_native_card(source: Path, folder: Path, architecture: str) -> None:
    """The same for the export `folder` of `source` in an `architecture` of transformers.

    If `source` has no record, only its copied card is removed, which describes how to load
    `source`.
    """
    (folder / CARD).unlink(missing_ok=True)
    if history := read_json(source / HISTORY):
        (folder / HISTORY).write_text(json.dumps(history, indent=1))
        (folder / CARD).write_text(card(history, architecture))


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _change(values: list[float | None] | None) -> str:
    if values is None:
        return "not recorded"
    return " → ".join("not measured" if value is None else f"{value:.4g}" for value in values)


def _learning_rate(peak: float, stage: dict) -> str:
    if stage["lr_scheduler_type"] == "constant":
        return f"{peak:g}"
    return f"{peak:g} → {min(peak, stage['final_lr']):g}"


def _metadata(history: dict, architecture: str | None) -> ModelCardData:
    teacher = history["teacher"]
    datasets = {stage["dataset"] for stage in history["stages"] if stage["dataset_on_hub"]}
    tags = ["linear-attention", "hybrid", "distillation", history["student"]["name"]]
    if architecture is None:
        tags.append("custom_code")
    return ModelCardData(
        **{key: teacher[key] for key in LICENCE if teacher[key]},
        base_model=teacher["name"] if teacher["on_hub"] else None,
        datasets=sorted(filter(None, datasets)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )


def _link(teacher: dict) -> str:
    name = teacher["name"]
    return f"[{name}](https://huggingface.co/{name})" if teacher["on_hub"] else f"`{name}`"


def _description(teacher: dict, student: dict) -> list[str]:
    """The card's title, and which layers hold what."""
    kept = student["keep_full_attention_layers"]
    layers = student["layers"]
    name = student["name"]
    options = ", ".join(f"{key} = {value}" for key, value in student["options"].items())
    linear = f"`{name}` with {options}" if options else f"`{name}`"
    kind = "hybrid" if kept else "all-linear"
    full = f"layers {kept} keep it" if kept else "none keeps it"
    origin = "" if teacher["on_hub"] else ", a local checkpoint"
    return [
        f"# {teacher['name'].rpartition('/')[2]}, {kind} with {name}",
        f"A student of {_link(teacher)}{origin}: {layers - len(kept)} of its {layers} layers hold {linear} "
        f"in place of softmax attention; {full}.",
    ]


def _usage(architecture: str | None, versions: dict) -> list[str]:
    """How to load the model, and what that needs."""
    flag = "" if architecture else ", trust_remote_code=True"  # for the tokenizer too, which reads the config
    named = [f"{name} {versions[name]}" for name in MADE_WITH if versions.get(name)]
    made_with = ", ".join(named) or "unknown versions"
    if architecture:
        needs = f"Its architecture is transformers' own `{architecture}` (made with {made_with})."
    else:
        needs = (
            "The folder brings its code, which needs torch, transformers, flash-linear-attention and triton "
            f"(made with {made_with}), on a GPU or a CPU. `generate(..., prefill_chunk_size=4096)` bounds the "
            "memory of a long prompt."
        )
    return [
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "folder = ...  # this one, or its name on the hub\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{flag})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{flag})\n"
        'inputs = tokenizer("def main(", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```",
        needs,
    ]


def _training(stages: list[dict]) -> list[str]:
    """The stages' settings and losses, and which stages are not recorded."""
    settings = []
    losses = []
    for stage in stages:
        number = stage["stage"]
        data = stage["dataset"] or "not recorded"
        if stage["dataset"] and not stage["dataset_on_hub"]:
            data += " (local files)"
        row = (
            f"{number}, {STAGES[number]}",
            f"{stage['tokens']:,}",
            stage["sequence_length"],
            stage["batch_size"],
            _learning_rate(stage["lr_attn"], stage),
            "frozen" if number == 1 else _learning_rate(stage["lr"], stage),
            stage["lr_scheduler_type"],
            data,
        )
        settings.append(row)
        losses.append((number, stage["objective"], _change(stage["loss"]), _change(stage["heldout_loss"])))
    before = ""
    recorded = {stage["stage"] for stage in stages}
    missing = [str(number) for number in range(1, stages[-1]["stage"]) if number not in recorded]
    if stages[0]["stage"] == 2 and stages[0].get("from_teacher"):
        before = "Stage 2 started from the teacher's own weights, without a stage 1. "
    elif missing:
        before = f"Of stage {' and '.join(missing)} there is no record. "
    columns = ("learning rate of the student layers", "of the rest", "schedule", "data")
    return [
        "## Training",
        _table(("stage", "tokens", "sequence", "batch", *columns), settings),
        _table(("stage", "loss", "in training: first → last", "held out: before → after"), losses),
        f"{before}`{HISTORY}` holds these figures, and more.",
    ]


def _score(result: dict) -> str:
    score = f"{result['score']:.4f}"
    return f"{score} ± {result['stderr']:.4f}" if result["stderr"] else score


def _evaluation(results: list[dict], teacher: dict) -> list[str]:
    """The scores, beside those of the card's teacher where the two were compared."""
    if not results:
        return []
    name = teacher["name"].rpartition("/")[2]
    rows = []
    for result in results:
        score = _score(result)
        if result.get("limit"):
            score += f", with a limit of {result['limit']:g} documents"
        compared = result.get("teacher") or {}
        cells = ("", "")
        if compared.get("name", "").rpartition("/")[2] == name:
            share = compared["share"]
            cells = (_score(compared), "" if share is None else f"{share:.1%}")
        rows.append((result["task"], result["seq_len"] or "", result["metric"], score, *cells))
    header = ("task", "length", "metric", "score ± standard error", "teacher", "share of its score")
    if not any(row[4] for row in rows):
        header = header[:4]
        rows = [row[:4] for row in rows]
    return ["## Evaluation", _table(header, rows)]


def _licence(teacher: dict) -> list[str]:
    licence = teacher["license_name"] or teacher["license"]
    if licence:
        terms = f"The weights derive from {_link(teacher)}: its licence ({licence}) holds for them."
    else:
        terms = f"The weights derive from {_link(teacher)}, whose card names no licence here: see there what holds for them."
    return ["## Licence", terms]


def card(history: dict, architecture: str | None = None) -> str:
    """The model card of `training.json`'s content `history`: the hub's metadata, how to load the
    model, how it was trained, and its evaluation.

    architecture: the class of transformers that loads the model; None for our own, whose code is in
    the folder.
    """
    teacher = history["teacher"]
    stages = history["stages"]
    parts = [
        f"---\n{_metadata(history, architecture).to_yaml()}\n---",
        *_description(teacher, history["student"]),
        *_usage(architecture, stages[-1]["versions"] or {}),
        *_training(stages),
        *_evaluation(history["evaluation"], teacher),
        *_licence(teacher),
    ]
    return "\n\n".join(parts) + "\n"

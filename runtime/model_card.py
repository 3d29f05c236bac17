"""What an exported folder says of itself: `training.json`, the stages it went through as data, and `README.md`, its card.

The record of a stage is made from its run folder; those of the stages before come from the folder it started from.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from .checkpoints import fingerprint, step_of
from .config import Config
from .run_folder import EXPORT, HISTORY, RUN, metrics_until, read_json

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")
STAGES = {1: "attention output alignment", 2: "logit distillation", 3: "long-context finetuning"}
MADE_WITH = ("torch", "transformers", "flash-linear-attention", "triton")


def public_name(name: str) -> str:
    """A hub name as it is, a local folder without the folders above it, which are nobody else's
    business."""
    return Path(name).resolve().name if Path(name).exists() else name


def objective(cfg: Config) -> str:
    """What the losses of a stage are."""
    train = cfg.train
    if cfg.stage == 1:
        return f"distance to the teacher's attention outputs ({train.alignment_loss})"
    parts = [
        (train.kl_weight, f"KL to the teacher (temperature {train.kl_temperature:g})"),
        (train.ce_weight, "cross-entropy"),
    ]
    if cfg.stage == 3:
        parts = [(1, "cross-entropy")]
    return (
        " + ".join(f"{'' if weight == 1 else f'{weight:g} x '}{name}" for weight, name in parts if weight)
        + ", nats a token"
    )


def stage_record(cfg: Config, checkpoint: Path) -> dict:
    """What led to `checkpoint`: settings, data, losses, versions; the parts that its run folder
    does not hold are None."""
    train, step, folder = cfg.train, step_of(checkpoint), Path(cfg.train.output_dir)
    run, data = read_json(folder / RUN), read_json(Path(cfg.data.cache_dir) / "metadata.json")
    lines = [json.loads(line) for line in metrics_until(folder, step)]

    def first_and_last(name: str) -> list[float | None] | None:
        steps = [line["step"] for line in lines if name in line]
        values = [line[name] for line in lines if name in line]
        return [values[0], values[-1] if any(steps) else None] if values else None  # step 0 is before training

    local = str(data.get("corpus", "")).startswith("local-")
    return {
        "stage": cfg.stage,
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
    """The teacher's name and licence, the latter from its card, of which `folder` holds a copy if
    there is one."""
    name, card = cfg.teacher_model.name, folder / CARD
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        metadata = {}  # not the hub's format
    return {"name": public_name(name), "on_hub": not Path(name).exists()} | {key: metadata.get(key) for key in LICENCE}


def evaluation(folder: Path, export: Path) -> list[dict]:
    """Results of a run's export that lie in its `folder`: task, seq_len, metric, score, stderr and
    limit (to so many documents; None: all), in the order of their names. evaluate.py's and
    lm-evaluation-harness' own files are read; of two results for the same, the newer one is taken.
    evaluate.py's say of which weights they are, and those of others than `export` has are left out:
    the run may have gone on since."""
    found, ours = {}, cache(lambda: fingerprint(export))
    for file in sorted(folder.glob("**/results*.json"), key=lambda path: path.stat().st_mtime):
        try:
            record = read_json(file)
        except ValueError:
            continue  # half-written
        checkpoint = record.get("checkpoint", record.get("model_name"))
        if checkpoint is not None and Path(checkpoint).resolve() != (folder / EXPORT).resolve():
            continue  # the teacher's, for comparison
        results = [
            result | {"limit": result["settings"].get("limit")}
            for result in record.get("tasks", {}).values()
            if "score" in result and result.get("settings", {}).get("checkpoint") == ours()
        ]
        for task, values in record.get("results", {}).items():
            scores = {key: value for key, value in values.items() if isinstance(value, (int, float)) and "," in key}
            for key, score in scores.items():
                metric, filtered = key.split(",", 1)
                length = (
                    int(metric) if metric.isdigit() else None
                )  # RULER's metrics are lengths, and -1 is one that was not run
                if not (metric.endswith("_stderr") or length and score == -1):
                    results.append(
                        {
                            "task": task,
                            "seq_len": length,
                            "metric": "match" if length else metric,
                            "score": score,
                            "stderr": scores.get(f"{metric}_stderr,{filtered}"),
                            "limit": record.get("config", {}).get("limit"),
                        }
                    )
        for result in results:
            row = {key: result.get(key) for key in ("task", "seq_len", "metric", "score", "stderr", "limit")}
            found[row["task"], row["seq_len"] or 0, row["metric"]] = row
    return [found[key] for key in sorted(found)]


def write_card(cfg: Config, checkpoint: Path, folder: Path, config) -> None:
    """Writes training.json and README.md of the export `folder`, in which a copy of the teacher's
    card may lie.

    config: the StudentConfig of the export.
    """
    before = read_json(Path(cfg.train.student_init_ckpt) / HISTORY) if cfg.train.student_init_ckpt else {}
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
    """The same for the export `folder` of `source` in an architecture that transformers knows;
    without a record only the card of `source`, which tells how to load that, is taken away."""
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


def _rate(peak: float, stage: dict) -> str:
    return f"{peak:g}" if stage["lr_scheduler_type"] == "constant" else f"{peak:g} → {min(peak, stage['final_lr']):g}"


def card(history: dict, architecture: str | None = None) -> str:
    """The model card of `training.json`: the hub's metadata, how to load the model, how it was
    made, and how good it is.

    architecture: the one of transformers that holds the model; None for our own, whose code lies
    beside the weights.
    """
    teacher, student, stages, results = (history[key] for key in ("teacher", "student", "stages", "evaluation"))
    kept, layers = student["keep_full_attention_layers"], student["layers"]
    datasets = sorted({stage["dataset"] for stage in stages if stage["dataset_on_hub"] and stage["dataset"]})
    metadata = ModelCardData(
        **{key: teacher[key] for key in LICENCE if teacher[key]},
        base_model=teacher["name"] if teacher["on_hub"] else None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "linear-attention",
            "hybrid",
            "distillation",
            student["name"],
            *([] if architecture else ["custom_code"]),
        ],
    )
    source = (
        f"[{teacher['name']}](https://huggingface.co/{teacher['name']})"
        if teacher["on_hub"]
        else f"`{teacher['name']}`"
    )
    linear = layers - len(kept)
    options = f" with {', '.join(f'{k} = {v}' for k, v in student['options'].items())}" if student["options"] else ""
    kind = f"{linear} of its {layers} layers hold `{student['name']}`{options} in place of softmax attention"
    versions = stages[-1]["versions"] or {}
    made_with = ", ".join(f"{name} {versions[name]}" for name in MADE_WITH if versions.get(name)) or "unknown versions"
    missing = [
        str(number) for number in range(1, stages[-1]["stage"]) if number not in [stage["stage"] for stage in stages]
    ]
    rows = [
        (
            f"{stage['stage']}, {STAGES[stage['stage']]}",
            f"{stage['tokens']:,}",
            stage["sequence_length"],
            stage["batch_size"],
            _rate(stage["lr_attn"], stage),
            "frozen" if stage["stage"] == 1 else _rate(stage["lr"], stage),
            stage["lr_scheduler_type"],
            stage["dataset"] or "not recorded",
        )
        for stage in stages
    ]
    losses = [
        (stage["stage"], stage["objective"], _change(stage["loss"]), _change(stage["heldout_loss"])) for stage in stages
    ]
    flag = "" if architecture else ", trust_remote_code=True"  # the tokenizer too: it reads the config
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {teacher['name'].rpartition('/')[2]}, {'hybrid' if kept else 'all-linear'} with {student['name']}",
        f"A student of {source}: {kind}; {f'layers {kept} keep it' if kept else 'none keeps it'}.",
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "folder = ...  # this one, or its name on the hub\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{flag})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{flag})\n"
        'inputs = tokenizer("def main(", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```",
        f"Its architecture is transformers' own `{architecture}` (made with {made_with})."
        if architecture
        else f"The folder brings its code, which needs torch, transformers, flash-linear-attention and triton (made with {made_with}), "
        "on a GPU or a CPU. `generate(..., prefill_chunk_size=4096)` bounds the memory of a long prompt.",
        "## Training",
        _table(
            (
                "stage",
                "tokens",
                "sequence",
                "batch",
                "learning rate of the linear attention",
                "of the rest",
                "schedule",
                "data",
            ),
            rows,
        ),
        _table(("stage", "loss", "in training: first → last", "held out: before → after"), losses),
    ]
    unknown = f"Of stage {' and '.join(missing)} there is no record. " if missing else ""
    parts.append(f"{unknown}`{HISTORY}` holds these figures, and more.")
    if results:
        scores = [
            (
                row["task"],
                row["seq_len"] or "",
                row["metric"],
                f"{row['score']:.4f}"
                + (f" ± {row['stderr']:.4f}" if row["stderr"] else "")
                + (f", with a limit of {row['limit']:g} documents" if row.get("limit") else ""),
            )
            for row in results
        ]
        parts += [
            "## Evaluation",
            _table(("task", "length", "metric", "score ± standard error"), scores),
        ]
    licence = teacher["license_name"] or teacher["license"]
    parts += [
        "## Licence",
        f"The weights derive from {source}: its licence ({licence}) holds for them."
        if licence
        else f"The weights derive from {source}, whose card names no licence here: see there what holds for them.",
    ]
    return "\n\n".join(parts) + "\n"

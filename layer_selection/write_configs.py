"""Writes configs/ from published.yaml: the stages of every teacher with every student, at every
published budget and selector.

    python layer_selection/write_configs.py [--output_dir configs]

Each pair of teacher and student has one stage 1, {teacher}_{student}/stage1.yaml, which every stage
2 of that pair starts from: {teacher}_{student}_hybrid_{ratio}_{selector}/stage2.yaml, each with a
run folder of its own. stage3.yaml is next to the stage 2 with a quarter of the layers, chosen by
GA-S2 where that is published, else evenly. A student that starts from the teacher has no stage 1,
and always a stage 3. Other folders are not changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime.command import run_main
from runtime.recipes import rate_text, recipe_for, size_in_name, size_text

import yaml

from layer_selection.ranking import RATIOS, budget, evenly_spaced, hybrid_folder, ratio_of

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(__file__).with_name("published.yaml")
STAGE_3_RATIO = 0.25

HEAD = """\
# {comment}
stage: {stage}
data:
  cache_dir: data/{teacher}/chunked_context{length}
teacher_model:
  name: {name}
student_model:
  name: {student}
{options}  keep_full_attention_layers: {layers}
train:
  output_dir: outputs/{folder}/stage{stage}
"""
COMMENTS = {
    1: "Stage 1: {tokens} tokens at context {length}, after RADLADS.",
    2: "Stage 2: {tokens} tokens at context {length}; {count} of {total} layers kept, {source}.",
    3: "Stage 3: {tokens} tokens at context {length}, cross-entropy, no teacher.",
}
# The published settings of the section `train`, in this order; a teacher's `stages` replace some.
# Learning rates (None) are those of `runtime.recipes`.
TRAIN = {
    1: {
        "target_tokens": 100_000_000,
        "batch_size": 96,
        "micro_batch_size": 12,
        "train_seq_len": 512,
        "lr": None,
        "lr_scheduler_type": "cosine",
        "final_lr": 1e-5,
        "max_grad_norm": 1.0,
    },
    2: {
        "student_init_ckpt": "outputs/{start}/stage1/converted-hf",
        "target_tokens": 600_000_000,
        "batch_size": 32,
        "micro_batch_size": 1,
        "train_seq_len": 4096,
        "lr": None,
        "lr_attn": None,
        "lr_scheduler_type": "cosine",
        "final_lr": 1e-5,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": "mlp",
    },
    3: {
        "student_init_ckpt": "outputs/{folder}/stage2/converted-hf",
        "target_tokens": 100_000_000,
        "batch_size": 96,
        "micro_batch_size": 1,
        "train_seq_len": 16384,
        "lr": None,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
    },
}


@dataclass(frozen=True)
class Row:
    """A published hybrid: which layers of which teacher stay full.

    options: of the student. from_teacher: whether stage 2 starts from the teacher, without stage 1.
    """

    teacher: str
    student: str
    ratio: float
    selector: str
    layers: list[int]
    options: dict = field(default_factory=dict)
    from_teacher: bool = False

    @property
    def start(self) -> str:
        """The folder of the stage 1 that it starts from."""
        return f"{self.teacher}_{self.student}"

    @property
    def folder(self) -> str:
        return hybrid_folder(self.teacher, self.student, self.ratio, self.selector)


def rows(published: dict) -> Iterator[Row]:
    """Every published hybrid, and the evenly spaced ones of the same budgets."""
    for teacher, facts in published["teachers"].items():
        chosen = chosen_layers(facts)
        for student in facts["students"]:
            for (ratio, selector), layers in sorted(chosen.items()):
                yield Row(teacher, student, ratio, selector, layers)
        for student, given in facts.get("from_teacher", {}).items():
            for ratio, selector in given["choices"]:
                layers = chosen[ratio, selector]
                yield Row(teacher, student, ratio, selector, layers, given["options"], from_teacher=True)


def chosen_layers(facts: dict) -> dict[tuple[float, str], list[int]]:
    """(ratio, selector) -> the layers that a teacher's hybrid keeps. facts: of the teacher."""
    count = facts["layers"]
    ratios = facts.get("ratios", RATIOS)
    chosen = {}
    for selector, ranked in facts.get("ranked", {}).items():
        for ratio in ratios:
            keep = budget(ratio, count)
            if keep <= len(ranked):
                chosen[ratio, selector] = sorted(ranked[:keep])
    for selector, sets in facts.get("set", {}).items():
        for layers in sets:
            chosen[ratio_of(len(layers), count, ratios), selector] = layers
    published_ratios = {ratio for ratio, _ in chosen}
    for ratio in ratios:
        if ratio in published_ratios or "ratios" in facts:
            chosen[ratio, "uniform"] = evenly_spaced(budget(ratio, count), count)
    return chosen


def train_settings(facts: dict, stage: int, teacher: str) -> dict:
    """The section `train` of a teacher's stage, without output_dir. facts: of the teacher, whose name
    in `configs/` ends in its size."""
    settings = TRAIN[stage] | facts.get("stages", {}).get(stage, {})
    student_layers, rest = recipe_for(size_in_name(teacher)).rates(stage)
    settings["lr"] = rest
    if "lr_attn" in settings:
        settings["lr_attn"] = student_layers
    return settings


def yaml_text(value) -> str:
    """A value as these files spell it: 1e-5, 600_000_000, {window_size: 508}."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {yaml_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value < 1:
        return rate_text(value)
    return f"{value:_}" if isinstance(value, int) and value >= 1_000_000 else str(value)


def stage_file(published: dict, stage: int, folder: str, row: Row, layers: list[int]) -> str:
    """The content of a stage's YAML in `folder`."""
    facts = published["teachers"][row.teacher]
    train = train_settings(facts, stage, row.teacher)
    if stage == 2 and row.from_teacher:
        del train["student_init_ckpt"]
    values = {
        "stage": stage,
        "teacher": row.teacher,
        "name": facts["name"],
        "student": row.student,
        "options": f"  options: {yaml_text(row.options)}\n" if row.options else "",
        "layers": layers,
        "folder": folder,
        "start": row.start,
        "length": train["train_seq_len"],
        "tokens": size_text(train["target_tokens"]),
        "count": len(layers),
        "total": facts["layers"],
        "source": sources_of(published, row)[row.selector],
    }
    lines = [f"  {key}: {yaml_text(value)}\n" for key, value in train.items()]
    comment = COMMENTS[stage].format(**values)
    return (HEAD + "".join(lines)).format(comment=comment, **values)


def sources_of(published: dict, row: Row) -> dict[str, str]:
    """Selector -> where the layers of the row's teacher and student come from."""
    facts = published["teachers"][row.teacher]
    of_student = facts["from_teacher"][row.student]["sources"] if row.from_teacher else {}
    return published["sources"] | facts.get("sources", {}) | of_student


def has_stage_3(published: dict, row: Row, hybrids: list[Row]) -> bool:
    """Whether stage 3 trains a hybrid: one that starts from the teacher, or the one of its teacher's
    first student at STAGE_3_RATIO, chosen by GA-S2 where that is published, else evenly spaced."""
    if row.from_teacher:
        return True
    if row.ratio != STAGE_3_RATIO or row.student != published["teachers"][row.teacher]["students"][0]:
        return False
    selectors = set()
    for other in hybrids:
        if other.start == row.start and other.ratio == STAGE_3_RATIO:
            selectors.add(other.selector)
    return row.selector == ("ga_s2" if "ga_s2" in selectors else "uniform")


def files(published: dict) -> dict[str, str]:
    """Path under configs/ -> content."""
    made = {}
    hybrids = list(rows(published))
    for row in hybrids:
        if not row.from_teacher:
            made[f"{row.start}/stage1.yaml"] = stage_file(published, 1, row.start, row, [])
        stages = (2, 3) if has_stage_3(published, row, hybrids) else (2,)
        for stage in stages:
            made[f"{row.folder}/stage{stage}.yaml"] = stage_file(published, stage, row.folder, row, row.layers)
    made["README.md"] = readme(published, hybrids, made)
    return made


README = """\
# Configurations

This page lists what is in each folder: teacher, student layer, ratio, selector and kept layers.
[docs/layer_selection.md](../docs/layer_selection.md) explains the selectors,
[docs/config.md](../docs/config.md) the keys, [docs/training.md](../docs/training.md#learning-rates) the
learning rates. No folder has been trained with the weights of its teacher's hub name here.
[docs/results.md](../docs/results.md) has what hybrids of SmolLM2 keep, with most of these layers, these
learning rates, fewer tokens, text read across documents, and weights dequantised from Q4_1.

- `{teacher}_{student}/stage1.yaml`: the stage 1 that all hybrids of that pair start from.
- `{teacher}_{student}_hybrid_{ratio}_{selector}/stage2.yaml`: a hybrid. Where the table has a *,
  `stage3.yaml` is next to it; for the other folders, name the kept layers, the start and the run
  folder of stage 3 [yourself](../docs/layer_selection.md).

The student layers are `gdn_v4` and `gla_v1` because these files reproduce published layer choices;
[docs/students.md](../docs/students.md#which-one) says how to train the recommended one with them.
SmolLM2 has the recommended one, `gdn_v7`, calibrated, and `swa_v1`, a sliding window with sinks, which
[starts from the teacher](../docs/training.md#without-stage-1) and has no stage 1.

`python layer_selection/write_configs.py` writes this page and the folders from
`layer_selection/published.yaml`; do not edit them by hand. `quickstart/` belongs to `quickstart.sh`.

| selector | source |
|---|---|
"""


def readme(published: dict, hybrids: list[Row], made: dict[str, str]) -> str:
    """The content of README.md, a table per teacher. `made`: the other files, by path."""
    parts = [README]
    parts += [f"| `{name}` | {source} |\n" for name, source in published["sources"].items()]
    for teacher, facts in published["teachers"].items():
        stage1 = [f"[{student}]({teacher}_{student}/stage1.yaml)" for student in facts["students"]]
        parts.append(f"\n## {teacher}\n\n`{facts['name']}`, {facts['layers']} layers. ")
        parts.append(f"Stage 1: {', '.join(stage1)}.\n\n")
        parts += [f"Here `{name}` is: {source}.\n\n" for name, source in facts.get("sources", {}).items()]
        for student, given in facts.get("from_teacher", {}).items():
            sources = given["sources"].items()
            parts += [f"With `{student}`, `{name}` is: {source}.\n\n" for name, source in sources]
        parts.append("| ratio | selector | kept layers | stage 2 |\n|--:|---|---|---|\n")
        by_choice: dict[tuple, list[Row]] = {}
        for row in (row for row in hybrids if row.teacher == teacher):
            by_choice.setdefault((row.ratio, row.selector), []).append(row)
        for (ratio, selector), same in by_choice.items():  # all students keep the same layers
            layers = same[0].layers
            kept = " ".join(map(str, layers))
            links = ", ".join(_link(row, made) for row in same)
            parts.append(f"| {ratio:g} | `{selector}` | {len(layers)}: {kept} | {links} |\n")
    return "".join(parts)


def _link(row: Row, made: dict[str, str]) -> str:
    mark = " *" if f"{row.folder}/stage3.yaml" in made else ""
    return f"[{row.student}]({row.folder}/stage2.yaml){mark}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "configs")
    args = parser.parse_args(argv)
    made = files(yaml.safe_load(PUBLISHED.read_text()))
    for name, text in made.items():
        path = args.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{args.output_dir}: {len(made)} files")


if __name__ == "__main__":
    run_main(main)

"""Flags of hybrid-distillation (the code of arXiv 2512.20569) that scripts of the same names here
do not have.

docs/migration.md lists all its scripts, and the defaults that differ.
"""

from __future__ import annotations

# Script -> flag -> its replacement; {} stands for the flag's value.
REPLACEMENTS = {
    "preprocess_chunk.py": {
        "--npy_cache_path": "leave it out: tokens are read from --tokenized_dataset_path as they are needed",
    },
    "generate_layer_configs_ga_s2.py": {
        "--num-layers": "leave it out: the teacher's config says how many layers there are",
        "--config-root": "use --output_dir {}",
        "--teacher": "use teacher_model.name={}",
        "--student": "use student_model.name={}",
        "--cache-stage1": "leave it out: stage 1 is no part of the selection",
        "--cache-stage2": "use data.cache_dir={}",
        "--outputs-prefix": "leave it out: the runs write to <output_dir>/layer_<N>/run",
    },
}


def refuse_old_flags(script: str, argv: list[str], needed: str = "") -> None:
    """Raises ValueError if `argv` has old flags of the script; its one line says what to type
    instead.

    needed: what else such a command lacks.
    """
    replaced = []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in REPLACEMENTS[script]:
            continue
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            value = "VALUE" if following.startswith("--") else following
        replaced.append(f"{flag}: {REPLACEMENTS[script][flag].format(value)}")
    if replaced and needed:
        replaced.append(needed)
    if replaced:
        raise ValueError("; ".join(replaced) + " (docs/migration.md)")

"""Flags of hybrid-distillation (the code of arXiv 2512.20569) that our scripts of the same names do not have.

All its scripts, and the defaults that differ, are in docs/migration.md.
"""

from __future__ import annotations

# Script -> flag -> what replaces it; {} is the flag's value.
REPLACEMENTS = {
    "preprocess_chunk.py": {
        "--npy_cache_path": "leave it out: tokens are read from --tokenized_dataset_path as they are needed",
    },
    "generate_layer_configs_ga_s2.py": {
        "--num-layers": "leave it out: the teacher's config says how many layers there are",
        "--config-root": "say --output_dir {}",
        "--teacher": "say teacher_model.name={}",
        "--student": "say student_model.name={}",
        "--cache-stage1": "leave it out: stage 1 is no part of the selection",
        "--cache-stage2": "say data.cache_dir={}",
        "--outputs-prefix": "leave it out: the runs write to <output_dir>/layer_<N>/run",
    },
}


def refuse_old_flags(script: str, argv: list[str], needed: str = "") -> None:
    """Raises ValueError, of one line that says what to type instead, if `argv` holds one of the
    script's old flags.

    needed: what such a command lacks besides.
    """
    replaced = []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in REPLACEMENTS[script]:
            continue
        if not equals:
            value = next(
                (following for following in argv[i + 1 : i + 2] if not following.startswith("--")),
                "VALUE",
            )
        replaced.append(f"{flag}: {REPLACEMENTS[script][flag].format(value)}")
    if replaced:
        raise ValueError("; ".join([*replaced, *([needed] if needed else [])]) + " (docs/migration.md)")

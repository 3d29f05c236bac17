"""Stores a teacher's most likely tokens at every position of a data set, so that any number of
stage-2 runs need no teacher.

    python store_teacher.py --cfg configs/X/stage2.yaml --output_dir data/X/teacher train.kl_top_k=64
    deepspeed train.py --cfg configs/X/stage2.yaml train.kl=topk teacher_model.outputs=data/X/teacher

The config's teacher (teacher_model.distill_from, or else name), data, train.kl_top_k and
train.kl_temperature decide what is stored: the log-probabilities of the k tokens in fp16, their
ids, and the mass of all others. An interrupted run is resumed by the same command.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.batch_plan import batch_plan
from runtime.command import run_main
from runtime.config import Config, ConfigError, load_config
from runtime.data import (
    INPUT_IDS,
    METADATA,
    Chunks,
    is_done,
    load_tokenizer,
    open_chunks_for,
    read_batch,
    read_metadata,
)
from runtime.files import atomic_directory, atomic_write_text
from runtime.mixtures import SAVE_SECONDS, STATE, resumable_state
from runtime.teacher_outputs import IDS, KIND, LOG_REST, VALUES, open_arrays

from tqdm import tqdm

if TYPE_CHECKING:
    from distill_model import StudentForCausalLM

# Modules that import torch are imported in functions, after the arguments are checked.
ROWS = 1024  # of logits in memory at a time


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", required=True, help="YAML of stage 2")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write, for teacher_model.outputs")
    parser.add_argument("--batch_size", type=int, default=8, help="chunks per forward pass (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="applied after the file")
    args = parser.parse_intermixed_args(argv)
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size: {args.batch_size} must be at least 1")
    return args


def open_data(cfg: Config) -> Chunks:
    """The chunks, checked against the teachers. Raises ValueError."""
    read_metadata(cfg.data.cache_dir, "data.cache_dir")
    from convert import load_teacher_config
    from preflight import check_models, check_other_teacher

    check_models(cfg)
    batch_plan(cfg, 1)
    tokenizer = load_tokenizer(cfg.teacher_model.name, "teacher_model.name")
    vocab_size = load_teacher_config(cfg.teacher_model.name).vocab_size
    if cfg.teacher_model.distill_from:
        check_other_teacher(cfg, tokenizer, vocab_size)
    if cfg.train.kl_top_k > vocab_size:
        raise ConfigError(f"train.kl_top_k: {cfg.train.kl_top_k} is more than the vocabulary of {vocab_size}; lower it")
    length = cfg.train.train_seq_len
    return open_chunks_for(tokenizer, vocab_size, cfg.data.cache_dir, length, document_mask=cfg.data.document_mask)


def outputs(teacher: StudentForCausalLM, batch: dict, k: int, temperature: float) -> dict:
    """Column -> array of what is stored of a batch of chunks, see `collate`."""
    import torch

    from distill_model.divergences import top_tokens
    from heldout import read_chunks

    ids = batch[INPUT_IDS]
    parts = []
    with torch.no_grad():
        for rows in read_chunks(teacher, batch).hidden.flatten(0, 1).split(ROWS):
            parts.append(top_tokens(rows @ teacher.lm_head.weight.mT, k, temperature))
    values, tokens, log_rest = (torch.cat(part) for part in zip(*parts))
    return {
        VALUES: values.half().unflatten(0, ids.shape).cpu().numpy(),
        IDS: tokens.int().unflatten(0, ids.shape).cpu().numpy(),
        LOG_REST: log_rest.half().unflatten(0, ids.shape).cpu().numpy(),
    }


def store(args: argparse.Namespace, cfg: Config, chunks: Chunks, metadata: dict, folder: Path) -> None:
    """Writes the arrays to `folder`, from where an interrupted run of the same metadata stopped."""
    import torch

    from stages import compute_dtype, load_kd_teacher

    state = resumable_state(folder, metadata)
    done = state["done"] if state else dict.fromkeys(metadata["rows"], 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_kd_teacher(cfg, compute_dtype(cfg, device.type), metadata["vocab_size"]).to(device).eval()
    saved = time.monotonic()
    for split, rows in (("train", chunks.train), ("heldout", chunks.heldout)):
        if rows is None:
            continue
        arrays = open_arrays(folder, split, create=metadata)
        bar = tqdm(total=len(rows), initial=done[split], desc=f"teacher on {split}", unit=" chunks")
        while done[split] < len(rows):
            stop = min(done[split] + args.batch_size, len(rows))
            batch = read_batch(rows, range(done[split], stop))
            for column, found in outputs(teacher, batch, cfg.train.kl_top_k, cfg.train.kl_temperature).items():
                arrays[column][done[split] : stop] = found
            bar.update(stop - done[split])
            done[split] = stop
            if time.monotonic() - saved > SAVE_SECONDS or stop == len(rows):
                for array in arrays.values():
                    array.flush()
                atomic_write_text(folder / STATE, json.dumps({"key": metadata, "done": done}))
                saved = time.monotonic()
        bar.close()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.cfg, args.overrides)
    if cfg.stage != 2:
        raise ConfigError(f"--cfg: {args.cfg} is of stage {cfg.stage}; name a stage-2 file")
    chunks = open_data(cfg)
    from convert import load_teacher_config
    from preflight import notes_on_documents, outputs_key

    rows = {"train": len(chunks.train), "heldout": len(chunks.heldout or ())}
    metadata = {
        "kind": KIND,
        **outputs_key(cfg, chunks),
        "rows": rows,
        "vocab_size": load_teacher_config(cfg.teacher_model.name).vocab_size,
        "teacher": cfg.teacher_model.distill_from or cfg.teacher_model.name,
        "dataset": chunks.metadata["dataset_name"],
    }
    for note in notes_on_documents(cfg, chunks):
        print(note)
    if is_done(args.output_dir, metadata):
        print(f"{args.output_dir}: already exists, of the same teacher, data and options")
        return
    start = time.perf_counter()
    with atomic_directory(args.output_dir, resumable=True) as folder:
        store(args, cfg, chunks, metadata, folder)
        (folder / METADATA).write_text(json.dumps(metadata, indent=2))
        (folder / STATE).unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    tokens = sum(rows.values()) * cfg.train.train_seq_len
    size = sum(file.stat().st_size for file in args.output_dir.glob("*.npy"))
    print(
        f"{args.output_dir}: the top {cfg.train.kl_top_k} of {tokens:,} tokens, {size / 2**30:.2f} GiB, "
        f"{size / tokens:.0f} bytes per token, in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    run_main(main)

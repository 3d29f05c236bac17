"""Measures the peak memory of a conversion against the largest shard of its source.

    python benchmarks/convert_memory.py [--gigabytes 4]

Writes a synthetic Qwen2.5 checkpoint in bf16, in four shards, to a temporary folder, converts it in
separate processes, and prints the largest resident memory of each, mapped file pages included. The
last column is the peak minus the largest shard; without verification, the goal is at most 1.5 GB.
Converting to fp32 needs more by the size of the largest tensor, which is held in both dtypes. So
does verification, for which transformers maps all shards of the source; the system can reclaim
those pages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.command import run_main

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 4


def synthetic_checkpoint(folder: Path, size: float) -> None:
    """Writes about `size` bytes of random weights."""
    hidden = 2048
    intermediate = 11008
    vocab = 151936
    layer_bytes = 2 * (2 * hidden * hidden + 2 * hidden * 256 + 3 * hidden * intermediate)
    vocabulary_bytes = 2 * 2 * vocab * hidden  # embeddings and head
    layers = max(1, round((size - vocabulary_bytes) / layer_bytes))
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(s.numel() for s in shards[-1].values()) >= total / SHARDS:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for i, shard in enumerate(tqdm(shards, desc="synthetic checkpoint", unit="shard"), 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shard.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_memory(*command: str) -> int:
    """The largest resident memory, in bytes, of a command that must succeed."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        # In a separate process: a child's peak memory includes what its parent holds when it is forked.
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=synthetic_checkpoint, args=(source, args.gigabytes * 1e9))
        writer.start()
        writer.join()
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        rows = [("imports alone", peak_memory("-c", "import convert.command"))]
        for options in (
            [],
            ["--no-verify"],
            ["--precision", "float32", "--no-verify"],
            ["--format", "student"],
        ):
            output = Path(folder) / f"out{len(rows)}"
            paths = ["--model", str(source), "--output", str(output)]
            peak = peak_memory("convert/convert_from_qwen2.5.py", *paths, *options)
            rows.append((" ".join(options) or "defaults", peak))
        print(f"\nlargest shard: {largest / 1e9:.2f} GB\n")
        print("| conversion | peak memory, GB | above the largest shard, GB |\n|:--|--:|--:|")
        for name, peak in rows:
            above = "" if name == "imports alone" else f"{(peak - largest) / 1e9:.2f}"
            print(f"| {name} | {peak / 1e9:.2f} | {above} |")


if __name__ == "__main__":
    run_main(main)

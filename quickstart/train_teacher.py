"""A small Qwen3 teacher, trained from scratch with Hugging Face's own Qwen3ForCausalLM in a plain
loop.

    python -m quickstart.train_teacher --data quickstart_out/data/chunked_context256 \
        --tokenizer quickstart_out/tokenizer --output_dir quickstart_out/teacher

It trains on the chunks that the distillation trains on, and is judged on the part held out from
both. The result is a plain Hugging Face checkpoint with its tokenizer; <output_dir>.json says what
it reached. Unless --tiny it must predict: the held-out loss at least half a nat under the unigram
entropy, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from runtime.command import run_main
from runtime.data import load_tokenizer, open_chunks_for
from runtime.files import atomic_directory

import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

# Four query heads share two key/value heads, and head_dim is not hidden_size / heads: what real
# teachers do. With transformers' initializer_range of 0.02 a model this narrow spends half the run
# on token frequencies.
SHAPE = dict(
    hidden_size=192,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=576,
    initializer_range=0.06,
)
TINY_SHAPE = SHAPE | dict(hidden_size=48, num_hidden_layers=4, head_dim=16, intermediate_size=96)
BATCH_SIZE = 4
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
EVAL_CHUNKS = 64


def token_ids(chunks, rows) -> torch.Tensor:
    """The chunks of these row numbers, [len(rows), T]."""
    return torch.as_tensor(chunks[list(rows)]["input_ids"], dtype=torch.long)


def unigram_entropy(ids: torch.Tensor) -> float:
    """Entropy in nats of the tokens' own frequencies: no model that ignores the context has a lower
    loss on them."""
    counts = ids.flatten().bincount().double()
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log()).sum().item()


@torch.no_grad()
def heldout_loss(model, ids: torch.Tensor) -> float:
    """Mean next-token cross-entropy over ids [N, T]."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in ids.split(8)]
    model.train()
    return sum(losses) / len(ids)


def train(model, chunks, steps: int, device: torch.device, seed: int) -> list[float]:
    """Trains in place on random chunks, without repeats within an epoch; returns the loss of every
    step."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    warmup = min(WARMUP_STEPS, steps // 5)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        warmup,
        steps,
        min_lr_rate=0.1,
    )
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH_SIZE / len(chunks))
    order = torch.cat(
        [torch.randperm(len(chunks), generator=generator) for _ in range(epochs)],
    ).tolist()
    losses = []
    with tqdm(range(steps), desc="teacher", unit="step") as bar:
        for step in bar:
            batch = token_ids(chunks, order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]).to(device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    return losses


def untrained_teacher(tokenizer, shape: dict) -> Qwen3ForCausalLM:
    """A Qwen3 with the tokenizer's vocabulary and random weights. shape: the sizes of its
    config."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    return Qwen3ForCausalLM(config)


def save(model, tokenizer, result: dict, folder: Path) -> None:
    """Writes `folder` and `folder`.json, atomically."""
    with atomic_directory(folder, replace=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        folder.with_name(folder.name + ".json").write_text(json.dumps(result) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="a folder written by preprocess_chunk.py")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a smaller model, and no demand on its loss",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()  # transformers' own, a line for every file written
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    chunks = open_chunks_for(
        tokenizer,
        len(tokenizer),
        args.data,
        key="--data",
        model_key="--tokenizer",
    )
    context = chunks.metadata["context_length"]
    model = untrained_teacher(tokenizer, TINY_SHAPE if args.tiny else SHAPE).to(device)
    size = f"{model.num_parameters() / 1e6:.1f}M parameters"
    print(f"Teacher: {size}, {args.steps} steps of {BATCH_SIZE} x {context} tokens")

    start = time.monotonic()
    losses = train(model, chunks.train, args.steps, device, args.seed)
    seconds = time.monotonic() - start
    heldout = token_ids(chunks.heldout, range(min(EVAL_CHUNKS, len(chunks.heldout))))
    loss = heldout_loss(model, heldout.to(device))
    entropy = unigram_entropy(heldout)
    result = {
        "heldout_loss": loss,
        "unigram_entropy": entropy,
        "steps": args.steps,
        "tokens": args.steps * BATCH_SIZE * context,
        "seconds": round(seconds, 1),
        "losses": [round(x, 4) for x in losses],
    }
    save(model, tokenizer, result, args.output_dir)
    verdict = f"held-out loss {loss:.3f}, unigram entropy {entropy:.3f}"
    speed = f"{result['tokens'] / seconds:.0f} tokens/s"
    print(f"Teacher: {verdict}; {speed}; saved in {args.output_dir}")
    if not args.tiny and loss > entropy - 0.5:
        steps = f"--steps {args.steps}"
        sys.exit(f"{steps}: too few for the teacher to predict ({verdict}); give it more")


if __name__ == "__main__":
    run_main(main)

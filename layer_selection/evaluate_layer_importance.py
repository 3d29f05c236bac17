"""Which layers a task needs: each layer's attention output is zeroed in turn, and the drop of accuracy is its importance.

    python layer_selection/evaluate_layer_importance.py --task associative_recall --model_name Qwen/Qwen2.5-1.5B-Instruct \
        --output_dir importance/qwen2.5_1.5b

For softmax teachers and for our checkpoints (converted-hf). Answers are greedy, as long as the right one, and scored exactly. A
layer's ablation shares all before that layer with the untouched model: prompts are read once, each layer adding one stream.

Written to --output_dir: results/baseline_<task>.json, results/ablation_<task>.csv, plots/ablation_<task>.png. What is there already
is not done again; the results of other settings are not overwritten.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from pathlib import Path

from runtime.command import run_main
from runtime.data import check_special_tokens, encode_beginnings, load_tokenizer
from runtime.files import atomic_write_text

import torch
from fla.models.utils import Cache
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from convert import load_teacher, load_teacher_config
from distill_model import StudentForCausalLM
from layer_selection.questions import (
    FIXED,
    NOISY,
    SPELLINGS,
    TASKS,
    Question,
    add_options,
    draw_questions,
)
from layer_selection.ranking import Ranking, rank_samples

SLACK = 2  # tokens beyond the right answer's: what ends it, and a split of its words that is not the tokenizer's own


def read_prompts(model: StudentForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Reads prompts once for the untouched model and for every layer's ablation.

    ids, mask [B, T], padded on the left. Returns the logits of the next token [(1 + L) B,
    vocab_size], L the layers, and the cache of as many rows: first the untouched model's, then
    those without layer 0, 1 ... Before layer l the ablations of l and later ones are the untouched
    model, so that l runs on (1 + l) B rows.
    """
    decoder, batch, cache, whole = model.model, len(ids), Cache(), bool(mask.all())
    hidden = decoder.embeddings(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cos, sin = decoder.position_embeddings(hidden, positions)
    for block in decoder.layers:
        streams = len(hidden) // batch
        output = block.attn(
            block.attn_norm(hidden),
            attention_mask=None if whole else mask.repeat(streams, 1),
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(cos.repeat(streams, 1, 1), sin.repeat(streams, 1, 1)),
        )[0]
        hidden = torch.cat([hidden + output, hidden[:batch]])
        hidden = torch.cat([part + block.mlp(block.mlp_norm(part)) for part in hidden.split(batch)])
    rows = torch.arange(len(hidden), device=ids.device)
    for i, layer in enumerate(cache.layers):
        layer.reorder_cache(torch.where(rows < (1 + i) * batch, rows, rows % batch))
    return model.lm_head(decoder.norm(hidden[:, -1])), cache


@torch.no_grad()
def continuations(model: StudentForCausalLM, tokenizer, questions: list[Question]) -> list[list[str]]:
    """Greedy continuations of the questions, read as one batch: by the untouched model, then
    without each layer's attention."""
    device, layers, batch = model.device, model.model.layers, len(questions)
    encoded = encode_beginnings(tokenizer, [question.prompt for question in questions])
    longest = max(map(len, encoded))
    ids, mask = torch.zeros(2, batch, longest, dtype=torch.long, device=device)
    for i, tokens in enumerate(encoded):
        ids[i, longest - len(tokens) :] = torch.tensor(tokens)
        mask[i, longest - len(tokens) :] = 1
    budget = SLACK + max(
        map(
            len,
            tokenizer([question.gold for question in questions], add_special_tokens=False)["input_ids"],
        )
    )
    if longest + budget > model.config.max_position_embeddings:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model reads {model.config.max_position_embeddings}; make the "
            "task smaller (--num_pairs, --num_chains, --num_ucw, --num_words, --pb_max_len)"
        )
    logits, cache = read_prompts(model, ids, mask)
    mask = mask.repeat(1 + len(layers), 1)
    ablated = torch.arange(-1, len(layers), device=device).repeat_interleave(batch)  # of each row; -1: none

    def zero(layer: int):
        return lambda module, args, output: (
            output[0].masked_fill((ablated == layer)[:, None, None], 0),
            *output[1:],
        )

    hooks = [block.attn.register_forward_hook(zero(i)) for i, block in enumerate(layers)]
    written, special = [[] for _ in mask], set(tokenizer.all_special_ids)
    try:
        for _ in range(budget):
            following = logits.argmax(-1)
            for row, token in zip(written, following.tolist()):
                row.append(token)
            # A special token ends an answer as a line's end does.
            whole = [next((i for i, token in enumerate(row) if token in special), None) for row in written]
            texts = [tokenizer.decode(row[:end]) + ("" if end is None else "\n") for row, end in zip(written, whole)]
            if all(any(end in text for end in questions[i % batch].ends) for i, text in enumerate(texts)):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = model(
                input_ids=following[:, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return [texts[start : start + batch] for start in range(0, len(texts), batch)]


def ablate(
    model: StudentForCausalLM, tokenizer, questions: list[Question], batch_size: int
) -> tuple[list[float], dict, list[str]]:
    """(Score of every question, layer -> scores without its attention, what the untouched model
    answers)."""
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))  # little padding
    answers = [[""] * len(questions) for _ in range(1 + model.config.num_hidden_layers)]
    with tqdm(total=len(questions), desc="ablations", unit="question") as bar:
        for start in range(0, len(questions), batch_size):
            batch = by_length[start : start + batch_size]
            for answer, texts in zip(answers, continuations(model, tokenizer, [questions[i] for i in batch])):
                for i, text in zip(batch, texts):
                    answer[i] = text
            bar.update(len(batch))
    baseline, *without = [[q.score(text) for q, text in zip(questions, texts)] for texts in answers]
    return baseline, dict(enumerate(without)), answers[0]


def drops(method: str, baseline: list[float], without: dict[int, list[float]], **facts) -> Ranking:
    """Layers by the drop of accuracy without their attention, with intervals over questions."""
    samples = {layer: [b - s for b, s in zip(baseline, scores)] for layer, scores in without.items()}
    return rank_samples(method, "drop of accuracy", samples, baseline=sum(baseline) / len(baseline), **facts)


def plot(ranking: Ranking, path: Path) -> None:
    """Accuracy without each layer's attention against the untouched model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline, layers = (
        ranking.facts["baseline"],
        sorted(ranking.layers, key=lambda layer: layer.layer),
    )
    figure, axis = pyplot.subplots(figsize=(max(5, 0.3 * len(layers)), 3.2), layout="constrained")
    heights = [baseline - layer.importance for layer in layers]
    errors = [
        [layer.high - layer.importance for layer in layers],
        [layer.importance - layer.low for layer in layers],
    ]
    axis.bar(
        [layer.layer for layer in layers],
        heights,
        yerr=errors,
        capsize=3,
        color="tab:blue",
        ecolor="grey",
    )
    axis.axhline(baseline, color="black", linestyle="--")
    axis.set(
        xlabel="layer without attention",
        ylabel=f"accuracy (dashed: all layers, {baseline:.1%})",
        ylim=(0, 1.05),
        title=ranking.method.replace("_", " "),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", required=True, choices=[*TASKS, *SPELLINGS])
    parser.add_argument(
        "--model_name",
        required=True,
        help="hub name or folder of a teacher, or one of our checkpoints",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=4,
        help="questions read at a time, each with a row a layer",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    add_options(parser)
    for name, (value, why) in FIXED.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"always {value}: {why}")
    args = parser.parse_args(argv)
    for name, (value, why) in FIXED.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name}: {getattr(args, name)} must be {value}: {why}; leave it out")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size: {args.batch_size} must be at least 1")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir: {args.output_dir} is a file; name a folder")
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "batch_size", *FIXED)}
    if args.task in NOISY:  # earlier results count --noise_ratio as a share of all sentences
        settings["noise_ratio_of"] = "the other sentences"
    results, plots = args.output_dir / "results", args.output_dir / "plots"
    baseline_file, table, picture = (
        results / f"baseline_{args.task}.json",
        results / f"ablation_{args.task}.csv",
        plots / f"ablation_{args.task}.png",
    )
    if baseline_file.is_file():
        theirs = json.loads(baseline_file.read_text())["settings"]
        if other := [name for name in settings if settings[name] != theirs.get(name)]:
            raise ValueError(
                f"--output_dir: {args.output_dir} has this task with {other[0]} {theirs.get(other[0])!r}, not "
                f"{settings[other[0]]!r}; name another folder"
            )
        print(f"{baseline_file}: is there already, made with the same settings")
        return
    questions = draw_questions(args.task, args)

    disable_progress_bar()  # transformers' own, a line for every file read
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model_name, "--model_name")
    check_special_tokens(tokenizer, load_teacher_config(args.model_name).vocab_size, "--model_name")
    model = load_teacher(args.model_name, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    start = time.monotonic()
    baseline, without, answers = ablate(model, tokenizer, questions, args.batch_size)
    ranking = drops(args.task, baseline, without)
    accuracy, seconds = ranking.facts["baseline"], time.monotonic() - start

    results.mkdir(parents=True, exist_ok=True)
    plots.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "accuracy", "drop", "drop_low", "drop_high"])
    for layer in sorted(ranking.layers, key=lambda layer: layer.layer):
        figures = accuracy - layer.importance, layer.importance, layer.low, layer.high
        writer.writerow([layer.layer, *(f"{figure:.6f}" for figure in figures)])
    atomic_write_text(table, text.getvalue())
    plot(ranking, picture)
    shown = [
        {
            "prompt": question.prompt,
            "answers": question.answers,
            "continuation": text,
            "score": score,
        }
        for question, text, score in zip(questions, answers, baseline)
    ]
    content = {
        "settings": settings,
        "accuracy": accuracy,
        "scores": baseline,
        "seconds": round(seconds, 1),
        "questions": shown[:3],
    }
    atomic_write_text(baseline_file, json.dumps(content, indent=1) + "\n")  # last: with it, all is there
    print(f"{args.task}: {accuracy:.1%} with all layers, {len(questions)} questions, {seconds:.0f} s")
    if not accuracy:
        print("The model answers none of them: the figures say nothing about its layers; make the task easier.")
    print("| without | accuracy | drop |\n|--:|--:|--:|")
    for layer in ranking.layers:
        print(
            f"| {layer.layer} | {accuracy - layer.importance:.1%} | {layer.importance:.1%} [{layer.low:.1%}, {layer.high:.1%}] |"
        )


if __name__ == "__main__":
    run_main(main)

"""Which layers keep full attention: one command from stage 1's student to a ready stage-2 config.

    python layer_selection/select_layers.py --cfg configs/quickstart/stage2.yaml --method ga_s2 --ratio 0.25
    python layer_selection/select_layers.py --cfg STAGE2.yaml --method ga_s2 --top-k 7 --candidate 3   # one array task of many

STAGE2.yaml names teacher, data, the all-linear student (train.student_init_ckpt) and what a training run is; the layers that it
keeps do not matter here. Methods, importance being what a layer is ranked by:

    ga_s2    -KL(teacher || student) on held-out text after stage 2 with only this layer restored (arXiv 2512.20569)
    scan     the same without training
    ppl      loss of the teacher with only this layer linear (high: it cannot be replaced)
    mse      alignment error of stage 1's layer, mean squared; GA-S1 ranks the same way, for it restores one layer at a time
    uniform  evenly spaced, one in the middle of each of K equal parts
    random   by --seed

Written to --output_dir: ranking.json, ranking.png, and stage2.yaml with the K best. ga_s2 trains in <output_dir>/layer_<N>/ with
train.py; run again it does only what is missing, and a finished layer is never trained twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert import load_teacher  # noqa: E402
from distill_model import StudentForCausalLM  # noqa: E402
from layer_selection.ranking import Ranking, budget, evenly_spaced, rank_samples, rank_scores, table, write  # noqa: E402
from pipeline.config import Config, ConfigError, dump_config, load_config  # noqa: E402
from pipeline.data import load_tokenizer, open_chunks, tokenizer_fingerprint  # noqa: E402
from pipeline.guard import REQUEUE  # noqa: E402
from pipeline.run_folder import EXPORT  # noqa: E402
from wrapper import AttentionAlignmentModel  # noqa: E402

HELDOUT_KL = "heldout_kl.json"


def with_layers(cfg: Config, kept: list[int], output_dir: Path) -> Config:
    """The stage-2 config that keeps `kept` and writes to output_dir."""
    return dataclasses.replace(
        cfg,
        student_model=dataclasses.replace(cfg.student_model, keep_full_attention_layers=kept),
        train=dataclasses.replace(cfg.train, output_dir=str(output_dir)),
    )


class Bench:
    """Teacher, all-linear student and the fixed held-out sequences that all layers are measured on."""

    def __init__(self, cfg: Config, sequences: int, batch_size: int):
        self.cfg, self.batch_size = cfg, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        fingerprint = tokenizer_fingerprint(load_tokenizer(cfg.teacher_model.name))
        chunks = open_chunks(cfg.data.cache_dir, cfg.train.train_seq_len, fingerprint)
        if chunks.heldout is None:
            raise ConfigError(f"data.cache_dir: {cfg.data.cache_dir} has no held-out part; preprocess with --holdout")
        rows = range(min(sequences, len(chunks.heldout)))
        self.batches = torch.as_tensor(chunks.heldout[rows]["input_ids"], dtype=torch.long).split(batch_size)

    @cached_property
    def teacher(self) -> StudentForCausalLM:
        return load_teacher(self.cfg.teacher_model.name, self.dtype).to(self.device).eval()

    @cached_property
    def student(self) -> StudentForCausalLM:
        student = StudentForCausalLM.from_pretrained(self.cfg.train.student_init_ckpt, dtype=self.dtype)
        if student.config.keep_full_attention_layers:
            raise ConfigError(f"train.student_init_ckpt: {self.cfg.train.student_init_ckpt} keeps layers "
                              f"{student.config.keep_full_attention_layers}; name stage 1's all-linear converted-hf")  # fmt: skip
        return student.to(self.device).eval()

    @torch.no_grad()
    def losses(self, model: StudentForCausalLM) -> list[float]:
        """Mean next-token cross-entropy of each sequence."""
        losses = []
        for ids in self.batches:
            ids = ids.to(self.device)
            log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            losses += (-log_probs.gather(-1, ids[:, 1:, None])[..., 0].mean(-1)).tolist()
        return losses

    @torch.no_grad()
    def kls(self, model: StudentForCausalLM) -> list[float]:
        """KL(teacher || model) of each sequence, the mean over its tokens."""
        kls = []
        for ids in self.batches:
            ours, theirs = (m(input_ids=ids.to(self.device), use_cache=False).logits.float().log_softmax(-1)
                            for m in (model, self.teacher))  # fmt: skip
            kls += (theirs.exp() * (theirs - ours)).sum(-1).mean(-1).tolist()
        return kls

    def swapped(self, measure, into: StudentForCausalLM, source: StudentForCausalLM) -> dict[int, list[float]]:
        """`measure` of `into` with the attention of one layer taken from `source`, for every layer."""
        figures = {}
        for i, (mine, other) in enumerate(zip(tqdm(into.model.layers, desc="layers", unit="layer"), source.model.layers)):
            own, mine.attn = mine.attn, other.attn
            try:
                figures[i] = measure(into)
            finally:
                mine.attn = own
        return figures


# ------------------------------------------------------------------------------------------------ methods
def scan(bench: Bench, args) -> Ranking:
    kls = bench.swapped(bench.kls, bench.student, bench.teacher)
    return rank_samples("scan", "-KL", {layer: [-kl for kl in values] for layer, values in kls.items()})


def ppl(bench: Bench, args) -> Ranking:
    return rank_samples("ppl", "loss", bench.swapped(bench.losses, bench.teacher, bench.student))


def mse(bench: Bench, args) -> Ranking:
    layers, model = bench.teacher.config.num_hidden_layers, AttentionAlignmentModel(bench.teacher, bench.student)
    with torch.no_grad():
        errors = [model(row.to(bench.device)[None])["layer_losses"].tolist() for batch in bench.batches for row in batch]
    return rank_samples("mse", "alignment error", {i: [row[i] for row in errors] for i in range(layers)})


def uniform(bench: Bench, args) -> Ranking:
    layers = bench.teacher.config.num_hidden_layers
    kept = evenly_spaced(args.top_k, layers)
    return rank_scores("uniform", "kept", {layer: float(layer in kept) for layer in range(layers)})


def randomly(bench: Bench, args) -> Ranking:
    scores, generator = {}, random.Random(args.seed)
    for layer in range(bench.teacher.config.num_hidden_layers):
        scores[layer] = generator.random()
    return rank_scores("random", "random number", scores, seed=args.seed)


def train_candidate(bench: Bench, args, layer: int) -> None:
    """Stage 2 with only `layer` restored, and its held-out KL, in <output_dir>/layer_<N>; does what is missing."""
    folder = args.output_dir / f"layer_{layer}"
    if (folder / HELDOUT_KL).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage2.yaml").write_text(dump_config(with_layers(bench.cfg, [layer], folder / "run")))
    done = subprocess.run([*args.launcher.split(), str(ROOT / "train.py"), "--cfg", str(folder / "stage2.yaml")])
    if done.returncode == REQUEUE:  # a signal, which reached the run itself: it has saved
        sys.exit(REQUEUE)
    if done.returncode:
        raise ConfigError(f"layer {layer}: its run in {folder / 'run'} ended with exit code {done.returncode}; see above, "
                          "and run again")  # fmt: skip
    model = StudentForCausalLM.from_pretrained(folder / "run" / EXPORT, dtype=bench.dtype).to(bench.device).eval()
    partial = folder / f".{HELDOUT_KL}"
    partial.write_text(json.dumps(bench.kls(model)) + "\n")
    partial.replace(folder / HELDOUT_KL)


def ga_s2(bench: Bench, args) -> Ranking | None:
    layers = range(bench.teacher.config.num_hidden_layers)
    mine = layers if args.candidate is None else [args.candidate]
    for layer in tqdm(mine, desc="candidates", unit="layer"):
        train_candidate(bench, args, layer)
    if args.candidate is not None:
        return None
    kls = {layer: json.loads((args.output_dir / f"layer_{layer}" / HELDOUT_KL).read_text()) for layer in layers}
    return rank_samples("ga_s2", "-KL", {layer: [-kl for kl in values] for layer, values in kls.items()})


METHODS = {"ga_s2": ga_s2, "scan": scan, "ppl": ppl, "mse": mse, "uniform": uniform, "random": randomly}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="YAML of stage 2")
    parser.add_argument("--method", choices=METHODS, default="ga_s2")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--top-k", type=int, help="how many layers to keep")
    size.add_argument("--ratio", type=float, help="share of the layers to keep: floor(ratio x layers + 0.5)")
    parser.add_argument("--output_dir", type=Path, help="default: <train.output_dir>_<method>")
    parser.add_argument("--candidate", type=int, help="ga_s2: train this layer alone, and do not rank")
    parser.add_argument("--launcher", default=str(Path(sys.executable).with_name("deepspeed")), help="what starts train.py")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences to measure on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of random")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="come after the file")
    args = parser.parse_intermixed_args(argv)

    disable_progress_bar()  # transformers' own, a line for every file read
    cfg = load_config(args.cfg, args.overrides)
    if cfg.stage != 2:
        raise ConfigError(f"--cfg: {args.cfg} is of stage {cfg.stage}; name a stage-2 file")
    args.output_dir = args.output_dir or Path(f"{cfg.train.output_dir}_{args.method}")
    bench = Bench(cfg, args.sequences, args.batch_size)
    layers = bench.teacher.config.num_hidden_layers
    args.top_k = budget(args.ratio, layers) if args.ratio is not None else args.top_k
    if not 1 <= args.top_k <= layers:
        raise ConfigError(f"--top-k: {args.top_k} must be between 1 and the teacher's {layers} layers")
    if args.candidate is not None and (args.method != "ga_s2" or not 0 <= args.candidate < layers):
        raise ConfigError(f"--candidate: {args.candidate} needs --method ga_s2 and a layer in 0..{layers - 1}")
    ranking = METHODS[args.method](bench, args)
    if ranking is None:
        return
    write(ranking, args.top_k, args.output_dir)
    chosen = with_layers(cfg, ranking.keep(args.top_k), Path(cfg.train.output_dir))
    (args.output_dir / "stage2.yaml").write_text(dump_config(chosen))
    print(table(ranking, args.top_k))
    undecided = f"; not told apart at the cut: {ranking.undecided(args.top_k)}" if ranking.undecided(args.top_k) else ""
    print(f"Kept: {ranking.keep(args.top_k)}{undecided}; next: deepspeed train.py --cfg {args.output_dir}/stage2.yaml")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"select_layers.py: error: {error}")

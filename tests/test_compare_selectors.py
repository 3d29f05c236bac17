"""The comparison of selectors: figures of the hybrids they chose, once per set; finished work is
not repeated."""

import json
import threading
import time
from contextlib import nullcontext

from runtime import files
from runtime.config import load_config

import pytest
from test_select_layers import flags

from layer_selection import compare_selectors, selection
from layer_selection.candidate_training import Candidate


def compare(stage2, out, *options):
    compare_selectors.main(
        [
            *flags(
                cfg=stage2,
                ratio=0.25,
                output_dir=out,
                sequences=6,
                rounds=2,
                seeds=2,
                questions=4,
                num_pairs=2,
                num_words=16,
                overrides="train.max_steps=4",
            ),
            *options,
        ]
    )
    return json.loads((out / "selectors.json").read_text())


def test_selectors_are_compared(stage2, tmp_path, monkeypatch, capsys):
    results = compare(stage2, tmp_path, "--methods", "mse", "scan", "uniform")
    assert results["mse"]["keep"] == results["scan"]["keep"] == [2] and results["uniform"]["keep"] == [2]
    results = compare(stage2, tmp_path, "--methods", "scan", "random")
    assert (
        results["random"]["keep"] != [2]
        and len(results["scan"]["kl"]) == 2
        and results["scan"]["kl"][0] != results["scan"]["kl"][1]
    )
    assert all(kl > best for kl, best in zip(results["random"]["kl"], results["scan"]["kl"])), (
        "layer 2 is the one with a large error"
    )
    shown = capsys.readouterr().out
    assert "| `scan` * | 2 | " in shown and (tmp_path / "selectors.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "seed_0.json").read_text())
    assert set(figures) == {"[2]", str(results["random"]["keep"])} and figures["[2]"]["perplexity"] > 1
    monkeypatch.setattr(Candidate, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(compare_selectors, "select", lambda *_: pytest.fail("ranked again"))
    assert compare(stage2, tmp_path, "--methods", "scan", "random") == results


def test_seeds_can_train_in_processes_of_their_own(stage2, tmp_path, monkeypatch):
    options = ["--methods", "uniform", "--sequences", "2"]
    with pytest.raises(FileNotFoundError):  # it writes no table
        compare(stage2, tmp_path, *options, "--only_seed", "1")
    assert sorted(file.name for file in tmp_path.glob("seed_*.json")) == ["seed_1.json"]
    assert len(compare(stage2, tmp_path, *options)["uniform"]["kl"]) == 2
    with pytest.raises(ValueError, match="--only_seed: 2 must be one of 0 to 1"):
        compare(stage2, tmp_path, *options, "--only_seed", "2")
    with pytest.raises(ValueError, match="--seeds: 0 must be at least 1"):
        compare(stage2, tmp_path, *options, "--seeds", "0", "--only_seed", "0")


def test_processes_that_start_together_select_once(stage2, tmp_path, monkeypatch, capsys):
    """The second one waits for the ranking of the first, and only then trains."""
    selecting, done = threading.Event(), threading.Event()
    selected, trained = [], []
    select = compare_selectors.select

    def slow(cfg, options):
        selected.append(options.method)
        selecting.set()
        assert done.wait(60)
        return select(cfg, options)

    monkeypatch.setattr(files, "TURN", 0.01)
    monkeypatch.setattr(compare_selectors, "select", slow)
    monkeypatch.setattr(selection, "StopSignals", lambda **_: nullcontext())  # threads handle no signals
    monkeypatch.setattr(compare_selectors, "train_sets", lambda cfg, sets, seed, args: trained.append((seed, sets)))
    words = flags(cfg=stage2, ratio=0.25, output_dir=tmp_path / "out", methods="scan", seeds=2, sequences=2)
    processes = []
    for seed in "01":
        process = threading.Thread(target=compare_selectors.main, args=([*words, "--only_seed", seed],))
        process.start()
        processes.append(process)
        assert selecting.wait(60)
    time.sleep(0.1)
    assert not trained
    done.set()
    for process in processes:
        process.join(60)
    assert selected == ["scan"] and sorted(trained) == [(0, [[2]]), (1, [[2]])]
    assert capsys.readouterr().out.count("Waiting: --output_dir: ") == 1


def test_objectives_and_sets_of_ones_own(stage2, tmp_path):
    results = compare(
        stage2, tmp_path, *flags(num_pairs=1, num_words=8), "--methods", "scan:recall", "--sets", "mine=0,3"
    )
    assert results["mine"]["keep"] == [0, 3] and len(results["mine"]["kl"]) == 2
    ranking = json.loads((tmp_path / "scan-recall" / "ranking.json").read_text())
    assert ranking["unit"] == "-recall" and ranking["keep"] == results["scan:recall"]["keep"]
    for options, message in (
        (["--methods", "mse:recall"], "--methods: mse:recall: mse has no 'recall'"),
        (["--methods", "scan:remove"], "--methods: scan:remove: scan has no 'remove'"),
        (["--methods", "best"], "--methods: best is unknown; choose of"),
        (["--methods", "scan", "--sets", "mine=0,4"], "--sets: mine=0,4 must have .* layers in 0..3"),
        (["--methods", "scan", "--sets", "=0,1"], "--sets: =0,1 must have a name of its own"),
        (["--methods", "scan:kl", "--sets", "scan:kl=1"], "--sets: scan:kl=1 must have a name of its own"),
        (["--methods", "scan", "--sets", "a=1", "a=2"], "--sets: a=2 must have a name of its own"),
        (["--methods", "scan", "--num_pairs", "17"], "--num_pairs: 17 pairs need as many different words, not 16"),
        (["--methods", "scan", "--sets", "0,1"], "--sets: 0,1 must look like middle=3,4"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(stage2, tmp_path / "other", *options)
    assert compare_selectors.split_method("rounds:mixture:remove") == ("rounds", "mixture", "remove")


def test_a_failed_start_does_not_claim_the_folder(stage2, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(stage2.read_text().replace("cache_dir: ", "cache_dir: /nowhere"))
    with pytest.raises(ValueError, match="data.cache_dir: /nowhere"):
        compare(wrong, tmp_path / "out", "--methods", "mse")
    assert compare(stage2, tmp_path / "out", "--methods", "mse")["mse"]["keep"] == [2]


def test_figures_of_another_comparison_are_refused(stage2, tmp_path):
    """Whichever methods: what is there was ranked or trained with other settings."""
    compare(stage2, tmp_path, "--methods", "mse")
    written = (tmp_path / "selectors.json").read_text()
    for options, other in (
        (["--ratio", "0.5"], "--ratio is 0.25 there, 0.5 here"),
        (["--questions", "5"], "--questions is 4 there, 5 here"),
    ):
        with pytest.raises(
            ValueError,
            match=f"--output_dir: .* compares selectors with other settings \\({other}\\); name another folder",
        ):
            compare(stage2, tmp_path, "--methods", "mse", *options)
    changed = tmp_path / "changed.yaml"
    changed.write_text(stage2.read_text().replace("lr: 0.0001", "lr: 0.5"))
    with pytest.raises(ValueError, match=r"train.lr is 0.0001 there, 0.5 here"):
        compare(changed, tmp_path, "--methods", "mse")
    assert (tmp_path / "selectors.json").read_text() == written
    recorded = tmp_path / "stage2.yaml"  # of a version that read chunks whole unless told otherwise
    recorded.write_text(recorded.read_text().replace("document_mask: auto", "document_mask: false"))
    compare(stage2, tmp_path, "--methods", "mse")
    assert load_config(recorded).data.document_mask is False

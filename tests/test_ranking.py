"""Rankings: budgets, intervals, ties and their files."""

import json

import numpy
import pytest
from matplotlib import axes

from layer_selection.ranking import budget, plot, rank_samples, rank_scores, ratio_of, table, write


@pytest.mark.parametrize(
    "ratio, layers, keep",
    [(0.25, 28, 7), (0.125, 36, 5), (0.125, 28, 4), (0.33, 28, 9), (0.5, 3, 2), (1.0, 4, 4)],
)
def test_budget(ratio, layers, keep):
    assert budget(ratio, layers) == keep


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.2, -1.0, float("nan"), float("inf")])
def test_a_budget_of_no_or_too_many_layers_is_refused(ratio):
    with pytest.raises(ValueError, match="--ratio"):
        budget(ratio, 8)


def test_a_count_has_the_ratio_that_keeps_it():
    assert [
        ratio_of(4, 28),
        ratio_of(5, 36),
        ratio_of(9, 28),
        ratio_of(10, 36),
        ratio_of(1, 4),
        ratio_of(2, 3),
    ] == [0.125, 0.125, 0.33, 0.28, 0.25, 0.5]
    assert all(
        budget(ratio_of(count, layers), layers) == count for layers in range(1, 81) for count in range(1, layers + 1)
    )


def test_equal_scores_stay_in_order_of_their_layers():
    ranking = rank_scores("random", "score", {3: 1.0, 0: 1.0, 2: 5.0, 1: 0.5})
    assert [layer.layer for layer in ranking.layers] == [2, 0, 3, 1]
    assert ranking.keep(2) == [0, 2] and ranking.undecided(2) == []
    with pytest.raises(ValueError, match="--top-k: 5 must be between 1 and 4"):
        ranking.keep(5)


def test_intervals_and_ties_follow_the_spread():
    """Layers 0 and 1 differ by less than their paired noise, 2 is clearly worse although single
    sequences vary more than that."""
    rng = numpy.random.default_rng(0)
    common = rng.normal(0, 1, 200)  # sequences are hard or easy for all layers alike
    samples = {
        0: common + rng.normal(0, 0.05, 200),
        1: common + rng.normal(0, 0.05, 200),
        2: common - 0.1,
    }
    ranking = rank_samples("ga_s2", "-KL", {layer: values.tolist() for layer, values in samples.items()})
    by_layer = {layer.layer: layer for layer in ranking.layers}
    assert [layer.layer for layer in ranking.layers][2] == 2
    assert by_layer[0].ties == (1,) and by_layer[1].ties == (0,) and by_layer[2].ties == ()
    for layer, values in samples.items():
        error = values.std() / 200**0.5
        assert by_layer[layer].low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
        assert by_layer[layer].high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert ranking.undecided(1) == [0, 1] and ranking.undecided(2) == []


def test_samples_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="different numbers of sequences"):
        rank_samples("ga_s2", "-KL", {0: [1.0, 2.0], 1: [1.0]})


def test_files(tmp_path, monkeypatch):
    ranking = rank_samples("ga_s2", "-KL", {0: [1.0, 2.0, 1.5], 1: [3.0, 4.0, 3.5]}, tokens=7)
    write(ranking, 1, tmp_path)
    content = json.loads((tmp_path / "ranking.json").read_text())
    assert content["keep"] == [1] and content["facts"] == {"tokens": 7} and content["method"] == "ga_s2"
    assert [layer["layer"] for layer in content["layers"]] == [1, 0]
    assert (tmp_path / "ranking.png").stat().st_size > 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ranking.json",
        "ranking.md",
        "ranking.png",
    ]
    assert (tmp_path / "ranking.md").read_text() == table(ranking, 1) + "\n"
    faces = []
    monkeypatch.setattr(
        axes.Axes,
        "errorbar",
        lambda self, x, *_, color, markerfacecolor, **__: faces.append((x, color, markerfacecolor)),
    )
    tied = rank_samples("ga_s2", "-KL", {0: [1.0, 2.0, 1.5], 1: [1.1, 1.9, 1.6], 2: [0.0, 0.1, 0.2]})
    assert tied.undecided(1) == [0, 1]
    plot(tied, 1, tmp_path / "tied.png")
    assert [face == "white" for _, _, face in faces] == [True, True, False] and [
        x for x, color, _ in faces if color == "tab:blue"
    ] == tied.keep(1)
    assert table(ranking, 1).splitlines()[2].startswith("| 1 | 1 | 3.5 [3")

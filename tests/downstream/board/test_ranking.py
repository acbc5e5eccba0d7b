"""Ranks and tests of a board against naive loops, other libraries and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from results_drawn import drawn_scores, result
from sklearn.metrics import roc_auc_score

from downstream.board.ranking import drawn_weights, holm, significant, standings, weighted_aurocs


def test_weighted_aurocs_are_those_of_the_repeated_photographs() -> None:
    """scikit-learn, with each photograph repeated as often as it was drawn; scores have many ties."""
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    weights = drawn_weights(labels, seed=3, replicates=20)
    assert (weights[:, labels].sum(1) == labels.sum()).all()
    assert (weights[:, ~labels].sum(1) == (~labels).sum()).all()
    found = weighted_aurocs(scores, labels, weights)
    for row, value in zip(weights, found, strict=True):
        assert value == pytest.approx(roc_auc_score(np.repeat(labels, row), np.repeat(scores, row)), abs=1e-12)
    once = np.ones((1, 40), dtype=int)
    assert weighted_aurocs(scores, labels, once)[0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_the_bootstrap_spreads_as_aurocs_of_new_photographs_do() -> None:
    """Its standard deviation against that of the AUROC over freshly drawn sets of photographs, to a fifth."""
    scores, labels = drawn_scores(1.0, seed=5, count=200)
    marks = np.array(labels, dtype=bool)
    ours = weighted_aurocs(scores, marks, drawn_weights(marks, 1)).std()
    fresh = [roc_auc_score(labels, drawn_scores(1.0, seed, 200)[0]) for seed in range(400)]
    assert ours == pytest.approx(np.std(fresh), rel=0.2)


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.001, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]  # .03 > .05 / 2 ends it
    assert holm([0.01, 0.02, 0.03], 0.05) == [True, True, True]  # .01 <= .05 / 3, .02 <= .05 / 2, .03 <= .05
    assert holm([], 0.05) == []


def test_equal_contestants_are_seldom_told_apart() -> None:
    """Four contestants whose scores are noise around the same truth: in at most ALPHA of tables (plus three standard
    errors of the simulation) a pair is told apart."""
    wrong, tables, count = 0, 200, 80
    labels = np.arange(count) % 2 == 1
    for number in range(tables):
        rng = np.random.default_rng(number)
        truth = rng.normal(size=count) + labels
        scores = [truth + rng.normal(0, 0.7, count) for _ in range(4)]
        weights = drawn_weights(labels, number, replicates=300)
        values = np.array([roc_auc_score(labels, own) for own in scores])
        wrong += bool(significant(values, np.array([weighted_aurocs(own, labels, weights) for own in scores])).any())
    assert wrong / tables <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tables)


def test_pairing_tells_apart_what_spreads_together() -> None:
    """Two contestants that agree but for a small, steady loss are told apart although each spreads by more than their
    difference; the same two on different photographs are not."""
    rng, labels = np.random.default_rng(0), np.arange(200) % 2 == 1
    good = rng.normal(size=200) + 1.2 * labels
    worse = good - 0.35 * labels + rng.normal(0, 0.05, 200)
    values = np.array([roc_auc_score(labels, good), roc_auc_score(labels, worse)])
    weights = [drawn_weights(labels, seed) for seed in (1, 2)]
    paired = np.array([weighted_aurocs(good, labels, weights[0]), weighted_aurocs(worse, labels, weights[0])])
    apart = np.array([weighted_aurocs(good, labels, weights[0]), weighted_aurocs(worse, labels, weights[1])])
    assert significant(values, paired)[0, 1]
    assert not significant(values, apart).any()


def test_places_are_ranges_of_what_cannot_be_told_apart() -> None:
    """One clearly best, two equal in the middle (the same scores), one clearly worst, on two data sets."""
    quality = {"best": 4.0, "one": 1.5, "other": 1.5, "worst": 0.0}
    contestants = {
        name: {(data,): result(name, data=data, quality=value, seed=7) for data in ("tiles", "caps")}
        for name, value in quality.items()
    }
    found = standings(contestants)
    assert {name: one.place for name, one in found.items()} == {"best": "1", "one": "2–3", "other": "2–3", "worst": "4"}
    assert [found[name].mean_rank for name in quality] == [1.0, 2.5, 2.5, 4.0]


def test_all_draws_count() -> None:
    """With draws of references, a contestant's value is the mean of all; identical results share a place."""
    contestants = {name: {("tiles",): result(name, quality=1, draws=3, products=("a", "b"))} for name in ("one", "two")}
    assert {one.place for one in standings(contestants).values()} == {"1–2"}
    assert standings({}) == {}

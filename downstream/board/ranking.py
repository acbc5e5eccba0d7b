"""Who is better, and is it sure? Mean ranks, and a paired bootstrap over photographs, corrected for many comparisons.

Photographs are drawn with replacement, the normal and the defective ones of a product apart, so that both keep their
number. All contestants are measured on the same drawn photographs, so that what is hard for all of them cancels. A
difference is judged by its size over the standard deviation of its bootstrap replicates (a normal approximation), and
all pairs of a table together by Holm's method (1979): with probability 1 - ALPHA, no pair is told apart that is equal.
What another draw of references, or another product, would change is not in it: that is the spread between draws.

Shapes: B replicates, N photographs, M contestants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from downstream.board.result import Measured, Result

REPLICATES = 1000
ALPHA = 0.05
EQUAL = 1e-9  # image AUROCs that differ by less are equal

Unit = tuple[str, ...]  # what contestants are ranked on: a data set, perhaps with a detector
Contestants = Mapping[Any, Mapping[Unit, Result]]


@dataclass(frozen=True)
class Standing:
    """A contestant's place. ``mean_rank`` is over units (1 = best; equal image AUROCs share their rank); ``best`` and
    ``worst`` place are those that the test cannot tell it from."""

    mean_rank: float
    best: int
    worst: int

    @property
    def place(self) -> str:
        return f"{self.best}" if self.best == self.worst else f"{self.best}–{self.worst}"


def standings(contestants: Contestants) -> dict[Any, Standing]:
    """Rank contestants by image AUROC. Each must have a result, with a defined AUROC, for the same units."""
    names = list(contestants)
    units = list(next(iter(contestants.values()), {}))
    values_MU = np.array([[_auroc_of(contestants[name][unit]) for unit in units] for name in names])
    if not names or not units:
        return {}
    ranks_MU = np.array([rankdata(-np.round(column / EQUAL) * EQUAL) for column in values_MU.T]).T
    replicates_MB = np.array([_replicates(contestants[name], units) for name in names])
    better = significant(values_MU.mean(1), replicates_MB)
    return {
        name: Standing(float(ranks_MU[i].mean()), 1 + int(better[:, i].sum()), len(names) - int(better[i].sum()))
        for i, name in enumerate(names)
    }


def significant(values_M: NDArray[Any], replicates_MB: NDArray[Any], alpha: float = ALPHA) -> NDArray[np.bool_]:
    """Say for every pair (row, column) whether the first is better by the test: bool [M, M]."""
    pairs = list(combinations(range(len(values_M)), 2))
    p_values = [_p_value(values_M[a] - values_M[b], replicates_MB[a] - replicates_MB[b]) for a, b in pairs]
    better = np.zeros((len(values_M), len(values_M)), dtype=bool)
    for (a, b), told_apart in zip(pairs, holm(p_values, alpha), strict=True):
        if told_apart:
            better[(a, b) if values_M[a] > values_M[b] else (b, a)] = True
    return better


def _p_value(difference: float, replicates_B: NDArray[Any]) -> float:
    if abs(difference) < EQUAL:
        return 1.0
    spread = float(replicates_B.std(ddof=1))
    return 0.0 if spread < EQUAL else float(2 * norm.sf(abs(difference) / spread))


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Say which hypotheses Holm's method rejects: the smallest p-value against alpha / n, the next against
    alpha / (n - 1), and so on until the first that is larger."""
    rejected = [False] * len(p_values)
    for done, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - done):
            break
        rejected[index] = True
    return rejected


def _auroc_of(result: Result) -> float:
    mean = result.metrics["image_auroc"].mean
    assert mean is not None, "results without an image AUROC are not ranked"
    return mean


def _replicates(own: Mapping[Unit, Result], units: Sequence[Unit]) -> NDArray[Any]:
    """A contestant's mean over units in every replicate: [B]."""
    return np.mean(
        [np.mean([_of_one(one, own[unit].data.digest) for one in _defined(own[unit])], 0) for unit in units], 0
    )


def _defined(result: Result) -> list[Measured]:
    return [one for one in result.measured if 0 < sum(one.labels) < len(one.labels)]


def _of_one(one: Measured, data: str) -> NDArray[Any]:
    """The image AUROC of one product and draw in every replicate. The drawn photographs depend on the data set, the
    product and the labels only, so that all contestants, and all draws of references, get the same."""
    text = f"{data} {one.product} {one.labels}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    labels = np.array(one.labels, dtype=bool)
    return weighted_aurocs(one.scores, labels, drawn_weights(labels, seed))


def drawn_weights(labels_N: NDArray[np.bool_], seed: int, replicates: int = REPLICATES) -> NDArray[np.int64]:
    """How often each photograph is drawn in each replicate: [B, N]."""
    rng, weights = np.random.default_rng(seed), np.zeros((replicates, len(labels_N)), dtype=np.int64)
    for kind in (labels_N, ~labels_N):
        count = int(kind.sum())
        weights[:, kind] = rng.multinomial(count, np.full(count, 1 / count), size=replicates)
    return weights


def weighted_aurocs(scores_N: ArrayLike, labels_N: NDArray[np.bool_], weights_BN: NDArray[Any]) -> NDArray[Any]:
    """The image AUROC of every replicate, in which photograph n counts weights[b, n] times: [B].

    It is the share of pairs of a defective and a normal photograph in which the defective one has the larger score;
    equal scores count half.
    """
    _, group_N = np.unique(np.asarray(scores_N), return_inverse=True)
    order = np.argsort(group_N, kind="stable")
    starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))
    sums = [np.add.reduceat(weights_BN[:, order] * kind[order], starts, axis=1) for kind in (labels_N, ~labels_N)]
    defective_BG, normal_BG = sums
    below_BG = np.cumsum(normal_BG, axis=1) - normal_BG / 2
    return (defective_BG * below_BG).sum(1) / (defective_BG.sum(1) * normal_BG.sum(1))

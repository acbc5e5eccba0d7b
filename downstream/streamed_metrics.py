"""Metrics of a set that does not fit in memory, computed batch by batch, with bounds of the error.

Image scores and the scores of the few anomalous pixels are kept. Normal pixels are counted in bins, each with its
lowest and highest score. If an anomalous score is outside the range of a bin, or equal to all scores in it, the bin's
pixels are counted exactly; if it is inside, anything from none to all of them may be above. Counting all and then none
gives two tables of counts and, because every metric falls with every false positive, a lower and an upper bound of each
metric. They assume nothing about the scores, and are computed for this set.

A bin holds the float32 numbers that agree in their first ``bits`` bits: 26 bits (sign, exponent and 17 of 23 bits of
the fraction) separate scores that differ by 1 part in 131,072, whatever their unit. Memory: 20 bytes per occupied bin
(2.6 MB for every factor of two between the lowest and the highest score), 12 bytes per anomalous pixel, and `PENDING`.

Shapes: N images, H x W pixels, A anomalous and G normal pixels, K occupied bins, T distinct anomalous scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from downstream.metric_counts import Thresholds, anomalous_table, count, region_shares, unmarked
from downstream.metrics import Metrics, checked, from_counts

BITS = 26
PENDING = 1 << 22  # normal pixels collected before they are sorted into bins


@dataclass(frozen=True)
class Bounds:
    """The true metrics lie between ``lower`` and ``upper``; image metrics are exact."""

    lower: Metrics
    upper: Metrics

    @property
    def middle(self) -> Metrics:
        """The mean of both bounds, which is at most `error` from the true metrics."""
        low, high = asdict(self.lower), asdict(self.upper)
        notes = low.pop("notes")
        return Metrics(**{name: (value + high[name]) / 2 for name, value in low.items()}, notes=notes)

    @property
    def error(self) -> float:
        """The largest possible error of any metric of `middle`; 0 if no metric is defined."""
        pairs = [(asdict(self.lower)[name], asdict(self.upper)[name]) for name in ("pixel_auroc", "pixel_ap")]
        pairs += [(self.lower.pixel_f1, self.upper.pixel_f1), (self.lower.aupro, self.upper.aupro)]
        widths = [(high - low) / 2 for low, high in pairs]
        return max((width for width in widths if width == width), default=0.0)


@dataclass(frozen=True)
class _Bins:
    """K bins in ascending order: keys, numbers of pixels, and the lowest and highest score in each."""

    key_K: NDArray[np.uint32]
    count_K: NDArray[np.int64]
    low_K: NDArray[np.float32]
    high_K: NDArray[np.float32]


class StreamingMetrics:
    """`evaluate_maps` for batches: call ``add`` for each, then ``result``.

    Normal pixels wider than float32 are rounded to it. Rounding may make scores equal but never swaps them, and equal
    scores are in the same bin, so that the bounds hold for the maps as given.

    Args:
        bits: leading bits of a float32 that define a bin, 10 to 32; fewer need less memory and give wider bounds.
    """

    def __init__(self, bits: int = BITS) -> None:
        if not 10 <= bits <= 32:
            raise ValueError(f"bits {bits}; choose 10 (sign, exponent and one more) to 32 (a bin for every float32)")
        self.bits = bits
        self._scores: list[NDArray[Any]] = []
        self._labels: list[NDArray[np.bool_]] = []
        self._anomalous: list[NDArray[Any]] = []
        self._shares: list[NDArray[np.float64]] = []
        self._regions = self._bare = 0
        self._float32 = True  # whether nothing was rounded
        self._pending: list[NDArray[np.float32]] = []
        none = np.empty(0, np.float32)
        self._bins = _Bins(np.empty(0, np.uint32), np.empty(0, np.int64), none, none)

    def add(
        self,
        maps_NHW: ArrayLike,
        masks_NHW: ArrayLike,
        scores: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> None:
        """Add a batch; arguments and errors are those of `evaluate_maps`. Scores of all batches must have one unit."""
        maps, masks, image_scores, anomalous = checked(maps_NHW, masks_NHW, scores, labels)
        self._float32 &= maps.dtype.itemsize <= 4
        shares, regions = region_shares(masks)
        self._scores.append(image_scores)
        self._labels.append(anomalous)
        self._anomalous.append(maps[masks])
        self._shares.append(shares)
        self._regions += regions
        self._bare += unmarked(masks, anomalous)
        self._pending.append(_single(maps[~masks]))
        if sum(map(len, self._pending)) >= PENDING:
            self._bins = self._sorted_in()

    def result(self) -> Bounds:
        """Return bounds of the metrics of all batches so far. Raises ValueError before the first."""
        if not self._scores:
            raise ValueError("no batch was added: there is nothing to measure")
        self._bins = self._sorted_in()
        images = count(np.concatenate(self._scores), np.concatenate(self._labels))
        weights_A = np.concatenate(self._shares) / max(self._regions, 1)
        threshold_T, hits_T, overlap_T = anomalous_table(np.concatenate(self._anomalous), weights_A)
        found = []
        for pessimistic in (True, False):
            above_T, not_below_T = self._false(threshold_T, pessimistic)
            normal, anomalous = int(self._bins.count_K.sum()), int(hits_T[-1]) if len(hits_T) else 0
            pixels = Thresholds(hits_T, overlap_T, above_T, not_below_T, normal, anomalous)
            found.append(from_counts(images, pixels, self._bare))
        return Bounds(*found)

    def _sorted_in(self) -> _Bins:
        """Return the bins with all pending pixels added."""
        if not self._pending:
            return self._bins
        normal_G = np.sort(np.concatenate(self._pending))
        self._pending = []
        key_G = self._keys(normal_G)
        first = np.flatnonzero(np.append(True, key_G[1:] != key_G[:-1])[: len(key_G)])
        last = np.append(first[1:], len(key_G)) - 1
        old = self._bins
        key = np.concatenate([old.key_K, key_G[first]])
        order = np.argsort(key, kind="stable")
        start = np.flatnonzero(np.append(True, np.diff(key[order]) != 0)[: len(key)])
        if not len(start):
            return old
        joined = [
            operation.reduceat(np.concatenate([before, new])[order], start)
            for operation, before, new in (
                (np.add, old.count_K, last - first + 1),
                (np.minimum, old.low_K, normal_G[first]),
                (np.maximum, old.high_K, normal_G[last]),
            )
        ]
        return _Bins(key[order][start], *joined)

    def _keys(self, scores: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return the key of each score's bin; keys have the same order as scores."""
        pattern = (scores + np.float32(0)).view(np.uint32)  # adding 0 turns minus zero into zero
        # Positive floats have the order of their bits; negative ones the reverse order, and are below.
        ordered = np.where(pattern >> 31, ~pattern, pattern | np.uint32(1 << 31))
        return ordered >> np.uint32(32 - self.bits)

    def _false(self, threshold_T: NDArray[Any], pessimistic: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Count normal pixels above, and not below, each threshold: the largest or smallest possible numbers."""
        bins, threshold_T = self._bins, _single(threshold_T)
        beyond_K = np.append(np.cumsum(bins.count_K[::-1])[::-1], 0)  # pixels in this bin and all higher ones
        at_T = np.searchsorted(bins.key_K, self._keys(threshold_T))
        higher_T = np.searchsorted(bins.key_K, self._keys(threshold_T), side="right")
        above_T, not_below_T = beyond_K[higher_T].astype(np.float64), beyond_K[higher_T].astype(np.float64)
        own_T = np.flatnonzero(higher_T > at_T)  # thresholds that share their bin with normal pixels
        index, threshold = at_T[own_T], threshold_T[own_T]
        low, high, held = bins.low_K[index], bins.high_K[index], bins.count_K[index]
        if self._float32:
            above_T[own_T] += held * np.where(pessimistic, threshold < high, threshold < low)
            not_below_T[own_T] += held * np.where(pessimistic, threshold <= high, threshold <= low)
        else:  # scores that are equal in float32 may have been different before
            undecided = threshold <= high if pessimistic else threshold < low
            above_T[own_T] += held * undecided
            not_below_T[own_T] += held * undecided
        return above_T, not_below_T


def _single(scores: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # values beyond the range of float32 become infinite and share a bin
        return scores.astype(np.float32, copy=False)

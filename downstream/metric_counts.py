"""Input checks, counts at all relevant thresholds, and metrics computed from these counts, for use by `metrics`.

The thresholds are the distinct scores of the *anomalous* items, in descending order: between two of them recall and
PRO cannot change, and only false positives accumulate. So the normal scores are sorted once (plain values, no index),
the few anomalous ones once with their weights, and a binary search gives the false positives at each threshold.
Nothing is quantised, and there is no loop over thresholds: O(n log n) for n pixels, one copy of the scores in memory.

Shapes: A anomalous and G normal items, T distinct anomalous scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage


@dataclass(frozen=True)
class Thresholds:
    """Counts at the T distinct anomalous scores, descending; `above` means score > t, the others >= t."""

    hits_T: NDArray[np.float64]  # anomalous items with score >= t
    overlap_T: NDArray[np.float64]  # their summed weights
    false_above_T: NDArray[np.float64]
    false_T: NDArray[np.float64]
    n_normal: int
    n_anomalous: int


def sorted_normals(scores: NDArray[Any], labels: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the scores of the normal items [G], ascending. This sort is most of the time that a metric takes."""
    normal_G = scores[~labels]  # boolean indexing copies: the sort may be in place
    normal_G.sort()
    return normal_G


def count(
    scores: NDArray[Any],
    labels: NDArray[np.bool_],
    weights_A: NDArray[np.float64] | None = None,
    normal_G: NDArray[Any] | None = None,
) -> Thresholds:
    """Count scores against labels of the same shape; ``weights_A`` weights the anomalous items, in C order.
    ``normal_G``: their `sorted_normals`, if there are some already."""
    normal_G = sorted_normals(scores, labels) if normal_G is None else normal_G
    threshold_T, hits_T, overlap_T = anomalous_table(scores[labels], weights_A)
    # Searching in ascending order keeps the binary searches in cache (several times faster on large sets).
    ascending_T, n_normal = threshold_T[::-1], len(normal_G)
    return Thresholds(
        hits_T=hits_T,
        overlap_T=overlap_T,
        false_above_T=(n_normal - np.searchsorted(normal_G, ascending_T, side="right"))[::-1].astype(float),
        false_T=(n_normal - np.searchsorted(normal_G, ascending_T, side="left"))[::-1].astype(float),
        n_normal=n_normal,
        n_anomalous=int(hits_T[-1]) if len(hits_T) else 0,
    )


def anomalous_table(
    anomalous_A: NDArray[Any], weights_A: NDArray[np.float64] | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """Return the T distinct scores, descending, and for each the number and summed weight of the items not below it."""
    order_A = np.argsort(anomalous_A, kind="stable")[::-1]
    anomalous_A = anomalous_A[order_A]
    last_of_tie = np.flatnonzero(np.append(anomalous_A[1:] != anomalous_A[:-1], True)[: len(anomalous_A)])
    overlap_A = np.zeros(len(order_A)) if weights_A is None else np.cumsum(weights_A[order_A])
    return anomalous_A[last_of_tie], (last_of_tie + 1).astype(np.float64), overlap_A[last_of_tie]


def missing(counts: Thresholds, item: str) -> str | None:
    """Say why the metrics of images or pixels (``item``) are undefined, or None if they are defined."""
    if counts.n_anomalous and counts.n_normal:
        return None
    absent = "anomalous" if counts.n_normal else "normal"
    affected = f"{item} metrics" if item == "image" else "pixel metrics and aupro"
    return f"no {absent} {item}s: {affected} are undefined (nan)"


def auroc(counts: Thresholds) -> float:
    """Return the area under the ROC curve; like the metrics below, it is nan unless both classes are present."""
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    new_hits_T = np.diff(counts.hits_T, prepend=0.0)
    normal_below_T = counts.n_normal - (counts.false_T + counts.false_above_T) / 2  # ties count one half
    return float(new_hits_T @ normal_below_T) / counts.n_anomalous / counts.n_normal


def average_precision(counts: Thresholds) -> float:
    """Return the average precision, the step sum of (R_t - R_{t-1}) * P_t."""
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    precision_T = counts.hits_T / (counts.hits_T + counts.false_T)
    return float(np.diff(counts.hits_T, prepend=0.0) @ precision_T) / counts.n_anomalous


def max_f1(counts: Thresholds) -> float:
    """Return the best F1 over all thresholds."""
    # A threshold between two anomalous scores only adds false positives, so the maximum is at one of the T.
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    return float((2 * counts.hits_T / (counts.hits_T + counts.false_T + counts.n_anomalous)).max())


def errors_at_best_f1(counts: Thresholds) -> tuple[int, int] | None:
    """Return false positives and false negatives at the threshold with the best F1 (of ties, that with the fewest
    errors); None unless both classes are present."""
    if not (counts.n_anomalous and counts.n_normal):
        return None
    missed_T = counts.n_anomalous - counts.hits_T
    f1_T = 2 * counts.hits_T / (counts.hits_T + counts.false_T + counts.n_anomalous)
    best = np.lexsort((counts.false_T + missed_T, -f1_T))[0]
    return int(counts.false_T[best]), int(missed_T[best])


def accuracy_at_best_f1(counts: Thresholds) -> float:
    """Return the share of items on the right side of the threshold of `errors_at_best_f1`, which is chosen on their
    labels; nan unless both classes are present."""
    errors = errors_at_best_f1(counts)
    return math.nan if errors is None else 1 - sum(errors) / (counts.n_normal + counts.n_anomalous)


def roc_curve(counts: Thresholds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of the ROC curve, from (0, 0) to (1, 1): false and true positive rates, ascending."""
    return _corners(counts, counts.hits_T / counts.n_anomalous)


def pro_curve(counts: Thresholds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of the per-region-overlap curve: pixel false positive rates and PRO, ascending, to FPR 1."""
    return _corners(counts, counts.overlap_T)


def _corners(counts: Thresholds, share_T: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Each threshold is reached horizontally at the old share (normals strictly above t), then a step to the new share
    # that is diagonal when normals tie with t. After the last threshold the curve is flat at 1 up to FPR 1.
    fpr = np.stack([counts.false_above_T, counts.false_T], axis=1).ravel() / counts.n_normal
    share = np.stack([np.append(0.0, share_T[:-1]), share_T], axis=1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], share, [1.0]])


def area_under_pro(counts: Thresholds, limit: float) -> float:
    """Return the area under the PRO curve up to the false positive rate ``limit``, divided by ``limit``."""
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    fpr, pro = pro_curve(counts)
    inside = int(np.searchsorted(fpr, limit, side="right"))  # corners with FPR <= limit; the first is at 0
    if inside < len(fpr):
        share = (limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        pro_at_limit = pro[inside - 1] + share * (pro[inside] - pro[inside - 1])
        fpr, pro = np.append(fpr[:inside], limit), np.append(pro[:inside], pro_at_limit)
    area = float(np.diff(fpr) @ (pro[1:] + pro[:-1])) / 2
    return min(area / limit, 1.0)  # rounding of the summed weights may exceed 1 by a few ulp


def official_area_under_pro(
    maps: NDArray[Any],
    masks: NDArray[np.bool_],
    weights_A: NDArray[np.float64],
    normal_G: NDArray[Any],
    limit: float,
    steps: int,
) -> float:
    """Return AUPRO as computed by ADPretrain's released code, but from sorted scores (``normal_G``: `sorted_normals`)
    instead of a loop over images.

    Thresholds are ``steps`` even steps from the lowest to the highest value of all maps; a score is a hit if it is
    greater than the threshold; only thresholds with FPR < limit count. Unlike the exact area, it has few points if maps
    have a long tail, starts at the smallest FPR found instead of 0, and is divided by the largest FPR found instead of
    the limit, so that it depends on the highest single pixel of the set. It is nan unless both classes are present, for
    constant maps, and if fewer than two thresholds are below the limit.
    """
    low, high = maps.min(), maps.max()
    if masks.all() or not masks.any() or low == high:
        return math.nan
    threshold_S = np.arange(low, high, (high - low) / maps.dtype.type(steps))  # in the maps' own precision
    anomalous_A = maps[masks]
    order_A = np.argsort(anomalous_A, kind="stable")
    covered_A = np.append(0.0, np.cumsum(weights_A[order_A]))
    pro_S = covered_A[-1] - covered_A[np.searchsorted(anomalous_A[order_A], threshold_S, side="right")]
    fpr_S = (len(normal_G) - np.searchsorted(normal_G, threshold_S, side="right")) / len(normal_G)
    fpr_S, pro_S = fpr_S[fpr_S < limit], pro_S[fpr_S < limit]
    if len(fpr_S) < 2 or fpr_S[0] == 0:
        return math.nan
    return float(-np.diff(fpr_S) @ (pro_S[1:] + pro_S[:-1])) / 2 / float(fpr_S[0])


_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def region_weights(masks_NHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return weights [A] of the anomalous pixels in C order: 1 / (pixels in the region x number of regions).

    The summed weight of the hits at a threshold is its PRO. Regions are 8-connected and never cross images.
    """
    shares, regions = region_shares(masks_NHW)
    return shares / max(regions, 1)


def region_shares(masks_NHW: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """Return 1 / (pixels in the region) for every anomalous pixel, [A] in C order, and the number of regions."""
    shares, regions = [np.empty(0)], 0
    for mask in masks_NHW:
        if not mask.any():
            continue
        region, found = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        region_of_pixel = region[mask]
        shares.append(1.0 / np.bincount(region_of_pixel)[region_of_pixel])
        regions += found
    return np.concatenate(shares), regions


def image_labels(masks_NHW: NDArray[np.bool_], labels: ArrayLike | None) -> NDArray[np.bool_]:
    """Return which images are anomalous, [N]. Raises ValueError if a mask contradicts a label or the shape is wrong."""
    marked = np.asarray(masks_NHW.reshape(len(masks_NHW), -1).any(axis=1))
    if labels is None:
        return marked
    given = binary_masks(labels)
    if given.shape != marked.shape:
        raise ValueError(f"labels have shape {given.shape}; expected [{len(marked)}], one per map")
    if (marked & ~given).any():
        raise ValueError(f"image {int(np.argmax(marked & ~given))} is labelled normal but its mask is not empty")
    return given


def unmarked(masks_NHW: NDArray[np.bool_], labels_N: NDArray[np.bool_]) -> int:
    """Count the anomalous images without a marked pixel, whose masks are empty or lost the defect in resizing."""
    return int((labels_N & ~masks_NHW.any(axis=(1, 2))).sum())


def paired(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return scores and labels as arrays. Raises ValueError unless they have the same shape and are not empty."""
    values, truth = real_numbers(scores, "scores"), binary_masks(labels)
    if values.shape != truth.shape or values.size == 0:
        raise ValueError(f"scores have shape {values.shape}, labels {truth.shape}; expected equal, not empty")
    return values, truth


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, wherever it lives; numpy has no bfloat16
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)


def real_numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Convert to a float array. Raises ValueError for NaN, infinite values, and anything that is not a real number."""
    array = _array(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} have dtype {array.dtype}; expected real numbers")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype(np.float64 if array.dtype.kind in "iu" else np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} contain {bad} NaN or infinite values of {array.size}; all of them must be finite")
    return array


def binary_masks(values: ArrayLike) -> NDArray[np.bool_]:
    """Convert bool, integers (> 0 is a defect) or floats of only 0 and 1 to bool; ValueError for anything else."""
    array = _array(values)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind == "f" and not ((array == 0) | (array == 1)).all():
        raise ValueError("masks hold values other than 0 and 1; threshold them first, e.g. masks > 0.5")
    if array.dtype.kind not in "fiu" or (array.size and array.min() < 0):
        raise ValueError(
            f"masks have dtype {array.dtype} or negative values; expected bool or integers (> 0 is defect)"
        )
    return array > 0

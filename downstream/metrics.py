"""How well anomaly maps and scores separate defects from good product: AUROC, AP, max-F1 and AUPRO, all
exact.

Every number here follows from one small table. Let the distinct scores of the *anomalous* items, in
descending order, be the thresholds: between two of them recall and PRO cannot change, only false positives
accumulate. So the normal scores are sorted once (plain values, no index), the few anomalous ones once with
their weights, and the false positives at each threshold come from a binary search. Nothing is quantised and
no loop runs over thresholds: O(n log n) for n pixels, one copy of the scores in memory.

Shape legend: N images, H x W pixels, A anomalous and G normal items, T distinct anomalous scores.

Conventions
- a score is higher for a more anomalous item; an item is called anomalous at threshold t when score >= t;
- tied scores are taken together (AUROC counts a tie as one half, the mid-rank rule);
- AP is the step sum of (R_t - R_{t-1}) * P_t, as in scikit-learn, with no interpolation;
- AUPRO (Bergmann et al. 2020): a threshold's PRO is the mean, over all 8-connected defect regions of all
  images, of the covered share of the region; its area over pixel FPR is a trapezoid from FPR 0 to the limit,
  interpolated at the limit, divided by the limit, so that it lies in [0, 1];
- an image is anomalous when its label says so, or else when its mask has a positive pixel;
- a metric that the data does not define is nan and `Metrics.notes` says why (AUROC, AP, F1 and AUPRO all need
  both classes); input that cannot be right (NaN, shapes that disagree, fractional masks) raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Metrics:
    """All in [0, 1], higher is better; nan where undefined, with the reason in `notes`."""

    image_auroc: float
    image_ap: float
    image_f1: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1: float
    aupro: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Thresholds:
    """Counts at the T distinct anomalous scores, descending; `above` means score > t, the others >= t."""

    hits_T: NDArray[np.float64]  # anomalous items with score >= t
    overlap_T: NDArray[np.float64]  # their summed weights
    false_above_T: NDArray[np.float64]
    false_T: NDArray[np.float64]
    n_normal: int
    n_anomalous: int


def evaluate_maps(
    maps_NHW: ArrayLike, masks_NHW: ArrayLike, scores: ArrayLike | None = None, labels: ArrayLike | None = None
) -> Metrics:
    """Score maps against ground truth.

    maps_NHW: [N, H, W], any real unit. masks_NHW: [N, H, W], bool, integer (> 0 is defect) or float holding
    only 0 and 1. scores: [N] image scores, by default each map's maximum. labels: [N] which images are
    anomalous, by default those whose mask has a positive pixel; a defect too small to survive the resizing of
    its mask needs them. Arrays or tensors. Raises ValueError for shapes that disagree, no images, NaN or
    infinite values, fractional or negative masks, and a normal image whose mask is not empty.
    """
    maps = _real(maps_NHW, "maps")
    masks = _binary(masks_NHW)
    if maps.ndim != 3 or maps.size == 0:
        raise ValueError(f"maps have shape {maps.shape}; expected [N, H, W] with at least one image and pixel")
    if masks.shape != maps.shape:
        raise ValueError(f"masks have shape {masks.shape}, maps {maps.shape}; resize the masks (nearest) to the maps")
    image_scores = maps.reshape(len(maps), -1).max(axis=1) if scores is None else _real(scores, "scores")
    if image_scores.shape != (len(maps),):
        raise ValueError(f"scores have shape {image_scores.shape}; expected [{len(maps)}], one per map")

    anomalous = np.asarray(masks.reshape(len(masks), -1).any(axis=1))
    if labels is not None:
        given = _binary(labels)
        if given.shape != anomalous.shape:
            raise ValueError(f"labels have shape {given.shape}; expected [{len(maps)}], one per map")
        if (anomalous & ~given).any():
            raise ValueError(f"image {int(np.argmax(anomalous & ~given))} is labelled normal but its mask is not empty")
        anomalous = given
    images = _count(image_scores, anomalous)
    pixels = _count(maps, masks, region_weights(masks))
    notes = tuple(note for note in (_missing(images, "image"), _missing(pixels, "pixel")) if note)
    return Metrics(
        image_auroc=_auroc(images),
        image_ap=_average_precision(images),
        image_f1=_max_f1(images),
        pixel_auroc=_auroc(pixels),
        pixel_ap=_average_precision(pixels),
        pixel_f1=_max_f1(pixels),
        aupro=_area_under_pro(pixels, limit=0.3),
        notes=notes,
    )


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve of scores against labels (equal shapes; labels as masks); nan without both
    classes.
    """
    return _auroc(_count(*_pair(scores, labels)))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision of scores against labels (equal shapes); nan without both classes."""
    return _average_precision(_count(*_pair(scores, labels)))


def max_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """The best F1 over all thresholds (an oracle threshold); nan without both classes."""
    return _max_f1(_count(*_pair(scores, labels)))


def aupro(maps_NHW: ArrayLike, masks_NHW: ArrayLike, limit: float = 0.3) -> float:
    """Exact area under the per-region-overlap curve up to the pixel false-positive rate `limit`, divided by
    it.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit}; expected a false-positive rate in (0, 1], usually 0.3")
    maps, masks = _pair(maps_NHW, masks_NHW)
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {maps.shape}; expected [N, H, W]")
    return _area_under_pro(_count(maps, masks, region_weights(masks)), limit)


def d_prime(scores: ArrayLike, labels: ArrayLike) -> float:
    """How many standard deviations apart: |mu_a - mu_n| / sqrt((var_a + var_n) / 2), ReConPatch Eq. 12.

    scores, labels: equal shapes, labels as masks. Variances divide by the count. Unlike AUROC it keeps growing when the
    classes are already apart, and it changes under a non-linear change of the unit. nan without both classes; inf, or
    nan for equal means, if neither class varies.
    """
    values, truth = _pair(scores, labels)
    if truth.all() or not truth.any():
        return math.nan
    anomalous, normal = values[truth].astype(np.float64), values[~truth].astype(np.float64)
    distance = abs(float(anomalous.mean()) - float(normal.mean()))
    spread = math.sqrt((float(anomalous.var()) + float(normal.var())) / 2)
    if spread == 0:
        return math.inf if distance else math.nan
    return distance / spread


def region_weights(masks_NHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[A] weights of the anomalous pixels in C order: 1 / (pixels in its region x number of regions).

    The covered weight at a threshold is then that threshold's PRO. Regions are 8-connected and never cross
    images.
    """
    weights, n_regions = [np.empty(0)], 0
    for mask in masks_NHW:
        if not mask.any():
            continue
        region, found = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        region_of_pixel = region[mask]
        weights.append(1.0 / np.bincount(region_of_pixel)[region_of_pixel])
        n_regions += found
    return np.concatenate(weights) / max(n_regions, 1)


def _count(
    scores: NDArray[Any], labels: NDArray[np.bool_], weights_A: NDArray[np.float64] | None = None
) -> _Thresholds:
    anomalous_A, normal_G = (
        scores[labels],
        scores[~labels],
    )  # boolean indexing copies: the sort may be in place
    normal_G.sort()
    order_A = np.argsort(anomalous_A, kind="stable")[::-1]
    anomalous_A = anomalous_A[order_A]
    last_of_tie = np.flatnonzero(np.append(anomalous_A[1:] != anomalous_A[:-1], True)[: len(anomalous_A)])
    threshold_T = anomalous_A[last_of_tie]
    overlap_A = np.zeros(len(order_A)) if weights_A is None else np.cumsum(weights_A[order_A])
    n_normal = len(normal_G)
    # Searching in ascending order keeps the binary searches in cache (several times faster on large sets).
    ascending_T = threshold_T[::-1]
    return _Thresholds(
        hits_T=(last_of_tie + 1).astype(np.float64),
        overlap_T=overlap_A[last_of_tie],
        false_above_T=(n_normal - np.searchsorted(normal_G, ascending_T, side="right"))[::-1].astype(float),
        false_T=(n_normal - np.searchsorted(normal_G, ascending_T, side="left"))[::-1].astype(float),
        n_normal=n_normal,
        n_anomalous=len(anomalous_A),
    )


def _missing(counts: _Thresholds, item: str) -> str | None:
    """Why this item's metrics are undefined, or None."""
    if counts.n_anomalous and counts.n_normal:
        return None
    absent = "anomalous" if counts.n_normal else "normal"
    affected = f"{item} metrics" if item == "image" else "pixel metrics and aupro"
    return f"no {absent} {item}s: {affected} are undefined (nan)"


def _auroc(counts: _Thresholds) -> float:
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    new_hits_T = np.diff(counts.hits_T, prepend=0.0)
    normal_below_T = counts.n_normal - (counts.false_T + counts.false_above_T) / 2  # ties count one half
    return float(new_hits_T @ normal_below_T) / counts.n_anomalous / counts.n_normal


def _average_precision(counts: _Thresholds) -> float:
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    precision_T = counts.hits_T / (counts.hits_T + counts.false_T)
    return float(np.diff(counts.hits_T, prepend=0.0) @ precision_T) / counts.n_anomalous


def _max_f1(counts: _Thresholds) -> float:
    # A threshold between two anomalous scores only adds false positives, so the maximum is at one of the T.
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    return float((2 * counts.hits_T / (counts.hits_T + counts.false_T + counts.n_anomalous)).max())


def _area_under_pro(counts: _Thresholds, limit: float) -> float:
    if not (counts.n_anomalous and counts.n_normal):
        return math.nan
    # The curve's corners: reached horizontally at the old PRO (normals strictly above t), then a step to the
    # new PRO that is diagonal when normals tie with t. After the last threshold it is flat at 1 up to FPR 1.
    fpr = np.stack([counts.false_above_T, counts.false_T], axis=1).ravel() / counts.n_normal
    pro = np.stack([np.append(0.0, counts.overlap_T[:-1]), counts.overlap_T], axis=1).ravel()
    fpr, pro = np.append(fpr, 1.0), np.append(pro, 1.0)
    inside = int(np.searchsorted(fpr, limit, side="right"))  # corners with FPR <= limit
    if inside == 0:  # the curve starts at (0, 0) and its first corner lies beyond the limit
        return 0.0
    if inside < len(fpr):
        share = (limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        pro_at_limit = pro[inside - 1] + share * (pro[inside] - pro[inside - 1])
        fpr, pro = np.append(fpr[:inside], limit), np.append(pro[:inside], pro_at_limit)
    area = float(np.diff(fpr) @ (pro[1:] + pro[:-1])) / 2
    return min(area / limit, 1.0)  # rounding of the summed weights may exceed 1 by a few ulp


def _pair(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values, truth = _real(scores, "scores"), _binary(labels)
    if values.shape != truth.shape or values.size == 0:
        raise ValueError(f"scores have shape {values.shape}, labels {truth.shape}; expected equal, not empty")
    return values, truth


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, wherever it lives; numpy has no bfloat16
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)


def _real(values: ArrayLike, name: str) -> NDArray[Any]:
    array = _array(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} have dtype {array.dtype}; expected real numbers")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype(np.float64 if array.dtype.kind in "iu" else np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} contain {bad} NaN or infinite values of {array.size}; metrics need finite ones")
    return array


def _binary(values: ArrayLike) -> NDArray[np.bool_]:
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

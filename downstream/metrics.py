"""Metrics of how well anomaly maps and scores separate defects from good product: exact AUROC, AP, max-F1 and AUPRO.

They are computed from counts at every distinct score (`thresholds`), without quantisation. Sets whose maps do not fit
in memory are measured batch by batch, with bounds of the error, by `streamed_metrics.StreamingMetrics`.

Shape legend: N images, H x W pixels, A anomalous items.

Conventions
- a higher score means more anomalous; an item is called anomalous at threshold t when score >= t;
- tied scores are treated together (AUROC counts a tie as one half, the mid-rank rule);
- AP is the step sum of (R_t - R_{t-1}) * P_t, as in scikit-learn, with no interpolation;
- AUPRO (Bergmann et al. 2020): the PRO at a threshold is the mean, over all 8-connected defect regions of all
  images, of the covered share of the region; AUPRO is the area under PRO over the pixel FPR, by the trapezoidal
  rule from FPR 0 to the limit (interpolated there), divided by the limit, so that it lies in [0, 1];
- max-F1, and the accuracy of images, are those at the threshold with the best F1 on the labels of the scored items
  themselves, as papers report them; they say nothing of a threshold that is chosen before (`calibration`);
- an image is anomalous if its label says so or, without labels, if its mask has a positive pixel;
- a defective image whose mask is empty counts in image metrics; its pixels count as normal, and a note says so;
- a metric that the data does not define is nan and `Metrics.notes` says why (AUROC, AP, F1 and AUPRO all need
  both classes); input that cannot be right (NaN, shapes that disagree, fractional masks) raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from downstream import metric_counts as thresholds
from downstream.metric_counts import binary_masks, count, image_labels, paired, real_numbers, region_weights, unmarked

FORMS = ("exact", "official")
LIMIT = 0.3  # AUPRO integrates up to this false positive rate
STEPS = 200  # number of thresholds in the released code


@dataclass(frozen=True)
class Metrics:
    """Metrics in [0, 1], where higher is better; an undefined one is nan, with the reason in `notes`."""

    image_auroc: float
    image_ap: float
    image_f1: float
    image_accuracy_at_best_f1: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1: float
    aupro: float
    notes: tuple[str, ...] = ()


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
    maps, masks, image_scores, anomalous = checked(maps_NHW, masks_NHW, scores, labels)
    images = count(image_scores, anomalous)
    pixels = count(maps, masks, region_weights(masks))
    return from_counts(images, pixels, unmarked(masks, anomalous))


def checked(
    maps_NHW: ArrayLike, masks_NHW: ArrayLike, scores: ArrayLike | None, labels: ArrayLike | None
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[Any], NDArray[np.bool_]]:
    """Check the arguments of `evaluate_maps` and return them as arrays: [N, H, W], [N, H, W], [N], [N]."""
    maps, masks = real_numbers(maps_NHW, "maps"), binary_masks(masks_NHW)
    if maps.ndim != 3 or maps.size == 0:
        raise ValueError(f"maps have shape {maps.shape}; expected [N, H, W] with at least one image and pixel")
    if masks.shape != maps.shape:
        raise ValueError(f"masks have shape {masks.shape}, maps {maps.shape}; resize the masks (nearest) to the maps")
    image_scores = maps.reshape(len(maps), -1).max(axis=1) if scores is None else real_numbers(scores, "scores")
    if image_scores.shape != (len(maps),):
        raise ValueError(f"scores have shape {image_scores.shape}; expected [{len(maps)}], one per map")
    return maps, masks, image_scores, image_labels(masks, labels)


def from_counts(images: thresholds.Thresholds, pixels: thresholds.Thresholds, bare: int = 0) -> Metrics:
    """Compute all metrics from counts of images and pixels; ``bare`` is the number of defective images without mask."""
    found = [thresholds.missing(images, "image"), thresholds.missing(pixels, "pixel")]
    if bare:
        found.append(f"{bare} defective image(s) with an empty mask: their pixels count as normal")
    notes = tuple(note for note in found if note)
    return Metrics(
        image_auroc=thresholds.auroc(images),
        image_ap=thresholds.average_precision(images),
        image_f1=thresholds.max_f1(images),
        image_accuracy_at_best_f1=thresholds.accuracy_at_best_f1(images),
        pixel_auroc=thresholds.auroc(pixels),
        pixel_ap=thresholds.average_precision(pixels),
        pixel_f1=thresholds.max_f1(pixels),
        aupro=thresholds.area_under_pro(pixels, LIMIT),
        notes=notes,
    )


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve of scores and labels (equal shapes; labels like masks); nan unless both
    classes are present.
    """
    return thresholds.auroc(count(*paired(scores, labels)))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the average precision of scores and labels (equal shapes); nan unless both classes are present."""
    return thresholds.average_precision(count(*paired(scores, labels)))


def max_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the best F1 over all thresholds (an oracle threshold); nan unless both classes are present."""
    return thresholds.max_f1(count(*paired(scores, labels)))


def errors_at_best_f1(scores: ArrayLike, labels: ArrayLike) -> tuple[int, int] | None:
    """Return false positives and false negatives at the threshold with the best F1 on these same scores, as PatchCore
    counts misclassified images (Tab. 1, suppl. C.4).

    The threshold is chosen on labelled test data, so use the numbers only to compare with the paper; a threshold from
    normal images (`calibration`) gives others. Shapes must be equal; None unless both classes are present.
    """
    return thresholds.errors_at_best_f1(count(*paired(scores, labels)))


def aupro(maps_NHW: ArrayLike, masks_NHW: ArrayLike, limit: float = LIMIT, form: str = "exact") -> float:
    """Return the area under the per-region-overlap curve up to the pixel false-positive rate ``limit``, divided by it.

    ``form``: "exact", or "official", the sweep of the released code (`thresholds.official_area_under_pro`) for
    comparison with published numbers. nan unless both classes are present, and if the sweep has no curve below limit.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit}; expected a false-positive rate in (0, 1], usually 0.3")
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {FORMS}")
    maps, masks = paired(maps_NHW, masks_NHW)
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {maps.shape}; expected [N, H, W]")
    if form == "official":
        normals = thresholds.sorted_normals(maps, masks)
        return thresholds.official_area_under_pro(maps, masks, region_weights(masks), normals, limit, STEPS)
    return thresholds.area_under_pro(count(maps, masks, region_weights(masks)), limit)


def d_prime(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return d' = |mu_a - mu_n| / sqrt((var_a + var_n) / 2) of anomalous and normal scores, ReConPatch Eq. 12.

    scores, labels: equal shapes, labels like masks. Variances divide by the count. Unlike AUROC, d' keeps growing when
    the classes are already separate, and it changes under a non-linear transformation of the scores. nan unless both
    classes are present; if neither class varies, inf, or nan for equal means.
    """
    values, truth = paired(scores, labels)
    if truth.all() or not truth.any():
        return math.nan
    anomalous, normal = values[truth].astype(np.float64), values[~truth].astype(np.float64)
    distance = abs(float(anomalous.mean()) - float(normal.mean()))
    spread = math.sqrt((float(anomalous.var()) + float(normal.var())) / 2)
    if spread == 0:
        return math.inf if distance else math.nan
    return distance / spread

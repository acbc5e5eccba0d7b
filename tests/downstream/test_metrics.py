"""evaluate_maps against the golden file, naive loops over every threshold, scikit-learn, and bad input."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from downstream.metrics import (
    aupro,
    auroc,
    average_precision,
    d_prime,
    errors_at_best_f1,
    evaluate_maps,
    max_f1,
    region_weights,
)
from downstream.streamed_metrics import StreamingMetrics

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"


def random_case(seed: int, levels: int | None = None, size: int = 12) -> tuple[NDArray, NDArray]:
    """Blobby masks (several regions, diagonal contacts) and noisy maps; `levels` quantises them to force
    ties.
    """
    rng = np.random.default_rng(seed)
    masks = ndimage.uniform_filter(rng.random((5, size, size)), (0, 2, 2)) > 0.62
    masks[0] = False
    maps = rng.normal(size=masks.shape) + 1.2 * masks
    return (maps if levels is None else np.round(maps * levels) / levels), masks


def naive_aupro(maps: NDArray, masks: NDArray, limit: float) -> float:
    """Every distinct value is a threshold; every region's overlap is measured on its own."""
    regions = []
    for index, mask in enumerate(masks):
        labelled, found = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labelled == region) for region in range(1, found + 1)]
    fprs, pros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        fprs.append(float(hit[~masks].mean()))
        pros.append(float(np.mean([hit[index][region].mean() for index, region in regions])))
    inside = [i for i, fpr in enumerate(fprs) if fpr <= limit]
    xs, ys = [fprs[i] for i in inside], [pros[i] for i in inside]
    if xs[-1] < limit:
        after = len(inside)
        slope = (pros[after] - ys[-1]) / (fprs[after] - xs[-1])
        ys.append(ys[-1] + slope * (limit - xs[-1]))
        xs.append(limit)
    return float(trapezoid(ys, xs)) / limit


def test_golden_values_to_1e_9() -> None:
    golden = np.load(GOLDEN)
    measured = evaluate_maps(golden["maps"], golden["masks"])
    for field in ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1"):
        assert getattr(measured, field) == pytest.approx(float(golden[field]), abs=1e-9), field
    assert measured.aupro == pytest.approx(float(golden["aupro_exact"]), abs=1e-9)
    assert measured.notes == ()
    swept = aupro(golden["maps"], golden["masks"], form="official")
    assert swept == pytest.approx(float(golden["aupro_official_200_steps"]), abs=1e-9)


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_scikit_learn_also_with_ties(seed: int, levels: int | None) -> None:
    maps, masks = random_case(seed, levels)
    flat, truth = maps.ravel(), masks.ravel()
    assert auroc(flat, truth) == pytest.approx(roc_auc_score(truth, flat), abs=1e-12)
    assert average_precision(flat, truth) == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    precision, recall, _ = precision_recall_curve(truth, flat)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert max_f1(flat, truth) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(4))
def test_aupro_agrees_with_the_loop_over_all_thresholds(seed: int, levels: int | None, limit: float) -> None:
    maps, masks = random_case(seed, levels)
    assert aupro(maps, masks, limit) == pytest.approx(naive_aupro(maps, masks, limit), abs=1e-12)


def naive_sweep(maps: NDArray, masks: NDArray, limit: float) -> float:
    """200 even thresholds, every image and region measured anew at each, as the released code goes about it."""
    fprs, pros = [], []
    for threshold in np.arange(maps.min(), maps.max(), (maps.max() - maps.min()) / 200):
        hit = maps > threshold
        overlaps = []
        for image, mask in zip(hit, masks, strict=True):
            labelled, found = ndimage.label(mask, structure=np.ones((3, 3)))
            overlaps += [image[labelled == region].mean() for region in range(1, found + 1)]
        fprs.append(float(hit[~masks].mean()))
        pros.append(float(np.mean(overlaps)))
    xs = [fpr for fpr in fprs if fpr < limit]
    return float(-trapezoid([pro for fpr, pro in zip(fprs, pros, strict=True) if fpr < limit], xs)) / max(xs)


@pytest.mark.parametrize("limit", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_official_form_is_the_sweep_over_200_thresholds(seed: int, limit: float) -> None:
    maps, masks = random_case(seed, size=32)
    assert aupro(maps, masks, limit, "official") == pytest.approx(naive_sweep(maps, masks, limit), abs=1e-9)


def test_the_official_form_without_a_curve_is_nan() -> None:
    maps, masks = random_case(0)
    assert math.isnan(aupro(np.ones(maps.shape), masks, form="official"))
    assert math.isnan(aupro(maps, np.zeros(masks.shape), form="official"))
    assert math.isnan(aupro(masks * 1.0, masks, form="official"))  # a perfect map has no false positive to divide by
    with pytest.raises(ValueError, match="form 'sweep' is unknown"):
        aupro(maps, masks, form="sweep")


def test_regions_touching_at_a_corner_are_one_and_never_cross_images() -> None:
    masks = np.zeros((2, 3, 3), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 2, 2] = True  # one region by 8-connectivity
    masks[1, 0, 0] = True  # under the first image's pixel, yet its own region
    np.testing.assert_allclose(region_weights(masks), [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=1e-15)


def test_a_perfect_map_scores_one_and_an_inverted_map_zero() -> None:
    _, masks = random_case(0)
    perfect, worst = evaluate_maps(masks * 1.0, masks), evaluate_maps(-1.0 * masks, masks)
    assert (perfect.pixel_auroc, perfect.pixel_ap, perfect.pixel_f1) == (1.0, 1.0, 1.0)
    assert perfect.aupro == pytest.approx(1.0, abs=1e-12)
    assert worst.pixel_auroc == 0.0
    assert worst.aupro == 0.0


def test_constant_scores_are_chance() -> None:
    _, masks = random_case(1)
    measured = evaluate_maps(np.zeros(masks.shape), masks)
    share = masks.mean()
    assert measured.pixel_auroc == pytest.approx(0.5, abs=1e-12)
    assert measured.pixel_ap == pytest.approx(share, abs=1e-12)
    assert measured.pixel_f1 == pytest.approx(2 * share / (1 + share), abs=1e-12)
    assert measured.aupro == pytest.approx(0.15, abs=1e-12)  # the diagonal's area up to 0.3, over 0.3


def test_given_image_scores_replace_the_map_maximum() -> None:
    maps, masks = random_case(2)
    labels = masks.any(axis=(1, 2)).astype(float)
    assert evaluate_maps(maps, masks, scores=labels).image_auroc == 1.0
    assert evaluate_maps(maps, masks, scores=-labels).image_auroc == 0.0


def test_tensors_and_half_precision_and_0_255_masks_give_the_same_numbers() -> None:
    maps, masks = random_case(3, levels=4)  # multiples of 1/4 are exact in half precision
    expected = evaluate_maps(maps, masks)
    tensor = torch.from_numpy(maps)
    assert evaluate_maps(tensor.bfloat16(), torch.from_numpy(masks)) == expected
    assert evaluate_maps(maps.astype(np.float16), masks.astype(np.uint8) * 255) == expected


def test_without_anomalies_everything_is_nan_with_a_reason() -> None:
    measured = evaluate_maps(np.random.default_rng(0).random((3, 4, 4)), np.zeros((3, 4, 4)))
    values = [value for name, value in vars(measured).items() if name != "notes"]
    assert all(math.isnan(value) for value in values)
    assert "no anomalous images" in measured.notes[0]
    assert "no anomalous pixels" in measured.notes[1]


def test_a_defect_with_an_empty_mask_is_told_of_and_counts_in_image_metrics_only() -> None:
    maps, masks = random_case(5)
    labels = masks.any(axis=(1, 2))
    masks[np.flatnonzero(labels)[:2]] = False
    measured, streamed = evaluate_maps(maps, masks, labels=labels), StreamingMetrics()
    for one in range(len(maps)):
        streamed.add(maps[one : one + 1], masks[one : one + 1], labels=labels[one : one + 1])
    note = "2 defective image(s) with an empty mask: their pixels count as normal"
    assert measured.notes == streamed.result().middle.notes == (note,)
    assert measured.image_auroc == pytest.approx(roc_auc_score(labels, maps.max(axis=(1, 2))), abs=1e-12)
    assert measured.pixel_auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert evaluate_maps(maps, masks).notes == ()  # nobody said that these are defective


def test_with_only_anomalous_images_the_pixel_metrics_remain() -> None:
    maps, masks = random_case(4)
    measured = evaluate_maps(maps[1:], masks[1:])
    assert math.isnan(measured.image_auroc)
    assert math.isnan(measured.image_ap)
    assert measured.pixel_auroc == pytest.approx(roc_auc_score(masks[1:].ravel(), maps[1:].ravel()), abs=1e-12)
    assert measured.notes == ("no normal images: image metrics are undefined (nan)",)


def test_with_only_anomalous_pixels_nothing_is_defined() -> None:
    measured = evaluate_maps(np.random.default_rng(0).random((2, 3, 3)), np.ones((2, 3, 3)))
    assert math.isnan(measured.pixel_ap)
    assert math.isnan(measured.aupro)


@pytest.mark.parametrize(
    ("maps", "masks", "scores", "message"),
    [
        (np.zeros((2, 3, 3)), np.zeros((2, 3, 4)), None, r"masks have shape \(2, 3, 4\)"),
        (np.zeros((3, 3)), np.zeros((3, 3)), None, r"expected \[N, H, W\]"),
        (np.zeros((0, 3, 3)), np.zeros((0, 3, 3)), None, "at least one image"),
        (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)), None, "4 NaN or infinite values of 4"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), 0.5), None, "threshold them first"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), np.nan), None, "other than 0 and 1"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), -1), None, "negative"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros(3), r"expected \[2\]"),
        (np.zeros((1, 2, 2), complex), np.zeros((1, 2, 2)), None, "real numbers"),
    ],
)
def test_bad_input_is_refused(maps: NDArray, masks: NDArray, scores: NDArray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_maps(maps, masks, scores)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.5])
def test_a_limit_outside_0_1_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit="):
        aupro(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), limit)


def test_two_million_pixels_take_seconds_not_minutes() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 224, 224), dtype=bool)
    masks[:20, 50:80, 60:90] = True
    maps = rng.random(masks.shape, dtype=np.float32) + masks
    start = time.process_time()  # others may keep the cores busy
    evaluate_maps(maps, masks)
    assert time.process_time() - start < 5.0  # about 0.3 s on one core; a loop over thresholds takes hours


def test_d_prime_equals_eq_12_and_tells_normal_distributions_apart() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=40), rng.random(40) < 0.4
    a, n = scores[labels].tolist(), scores[~labels].tolist()
    mean_a, mean_n = sum(a) / len(a), sum(n) / len(n)
    var_a = sum((x - mean_a) ** 2 for x in a) / len(a)
    var_n = sum((x - mean_n) ** 2 for x in n) / len(n)
    expected = abs(mean_a - mean_n) / math.sqrt((var_a + var_n) / 2)
    assert d_prime(scores, labels) == pytest.approx(expected, rel=1e-12)
    # Two normal distributions of standard deviation 2 whose means are 3 apart.
    many = np.concatenate([rng.normal(5, 2, 200_000), rng.normal(8, 2, 200_000)])
    assert d_prime(many, np.repeat([0, 1], 200_000)) == pytest.approx(1.5, abs=0.02)
    assert d_prime(7 - 3 * scores, labels) == pytest.approx(expected, rel=1e-12)


def test_d_prime_without_variation_or_a_class() -> None:
    assert d_prime([1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1]) == math.inf
    assert math.isnan(d_prime([1.0, 1.0, 1.0], [0, 0, 1]))
    assert math.isnan(d_prime([1.0, 2.0], [1, 1]))
    with pytest.raises(ValueError, match="shape"):
        d_prime([1.0, 2.0], [1])


def test_labels_keep_a_defect_whose_mask_vanished_in_resizing() -> None:
    maps, masks = np.zeros((4, 8, 8)), np.zeros((4, 8, 8), dtype=bool)
    maps[:, 0, 0] = [1.0, 2.0, 3.0, 4.0]
    masks[2, 0, 0] = True  # image 3 is a defect too, without a pixel left
    assert evaluate_maps(maps, masks).image_auroc == pytest.approx(2 / 3)
    assert evaluate_maps(maps, masks, labels=[False, False, True, True]).image_auroc == 1.0
    with pytest.raises(ValueError, match="image 2 is labelled normal but its mask is not empty"):
        evaluate_maps(maps, masks, labels=[False, False, False, True])
    with pytest.raises(ValueError, match=r"labels have shape \(2,\); expected \[4\]"):
        evaluate_maps(maps, masks, labels=[True, False])


@pytest.mark.parametrize("seed", range(6))
def test_errors_at_the_best_f1_equal_every_threshold_tried(seed: int) -> None:
    """Scores with ties; of thresholds with the same F1 the one with the fewest errors."""
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 12, 40), rng.random(40) < 0.4
    tried = []
    for threshold in np.unique(scores):
        called = scores >= threshold
        wrong, missed = int((called & ~labels).sum()), int((~called & labels).sum())
        hits = int((called & labels).sum())
        tried.append((-2 * hits / (2 * hits + wrong + missed), wrong + missed, wrong, missed))
    assert errors_at_best_f1(scores, labels) == min(tried)[2:]
    measured = evaluate_maps(scores[:, None, None], labels[:, None, None])
    assert measured.image_accuracy_at_best_f1 == pytest.approx(1 - sum(min(tried)[2:]) / 40, abs=1e-12)
    assert errors_at_best_f1(scores, np.zeros(40, dtype=bool)) is None

"""Batch-wise metrics against the exact ones: the bounds hold, and are as narrow as they claim."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from downstream import streamed_metrics as streaming
from downstream.metrics import Metrics, evaluate_maps
from downstream.streamed_metrics import Bounds, StreamingMetrics

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"
NAMES = [field.name for field in fields(Metrics) if field.name != "notes"]


def case(seed: int, levels: int | None = None, kind: type = np.float32) -> tuple[NDArray, NDArray]:
    """Blobby masks and noisy maps; ``levels`` quantises them to force ties."""
    rng = np.random.default_rng(seed)
    masks = ndimage.uniform_filter(rng.random((9, 24, 24)), (0, 2, 2)) > 0.66
    masks[::3] = False
    maps = rng.normal(size=masks.shape) + 1.0 * masks
    return (maps if levels is None else np.round(maps * levels) / levels).astype(kind), masks


def streamed(maps: NDArray, masks: NDArray, bits: int, batch: int = 2) -> Bounds:
    metrics = StreamingMetrics(bits)
    for start in range(0, len(maps), batch):
        metrics.add(maps[start : start + batch], masks[start : start + batch])
    return metrics.result()


def assert_between(bounds: Bounds, exact: Metrics, rounding: float = 1e-12) -> None:
    for name in NAMES:
        low, value, high = (getattr(part, name) for part in (bounds.lower, exact, bounds.upper))
        assert low - rounding <= value <= high + rounding, name
        assert abs(getattr(bounds.middle, name) - value) <= bounds.error + rounding, name


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_truth_lies_between_the_bounds(seed: int, levels: int | None, kind: type) -> None:
    maps, masks = case(seed, levels, kind)
    exact = evaluate_maps(maps, masks)
    for bits in (10, 12, 18, 26):
        assert_between(streamed(maps, masks, bits), exact)


def test_few_bits_leave_a_real_gap_and_more_bits_close_it() -> None:
    maps, masks = case(0)
    errors = [streamed(maps, masks, bits).error for bits in (11, 15, 20, 32)]
    assert errors[0] > 1e-3  # else the bounds above would be tested on nothing
    assert errors == sorted(errors, reverse=True)
    assert errors[3] == 0.0


def test_float64_scores_that_float32_cannot_tell_apart_stay_undecided() -> None:
    masks = np.array([[[True, False, False, True]], [[False] * 4]])
    maps = np.array([[[1 + 1e-12, 1.0, 0.0, 1 - 1e-12]], [[0.5] * 4]])
    bounds = streamed(maps, masks, 32)
    assert bounds.error > 0
    assert_between(bounds, evaluate_maps(maps, masks))


def test_golden_values_within_1e_6_at_the_default_bits() -> None:
    golden = np.load(GOLDEN)
    bounds = streamed(golden["maps"], golden["masks"], streaming.BITS, batch=5)
    assert bounds.error < 1e-6
    assert bounds.middle.aupro == pytest.approx(float(golden["aupro_exact"]), abs=1e-6)
    assert bounds.middle.pixel_auroc == pytest.approx(float(golden["pixel_auroc"]), abs=1e-6)
    assert bounds.middle.image_auroc == pytest.approx(float(golden["image_auroc"]), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.0, 3.7, -1e30])
def test_constant_maps_are_exact(value: float) -> None:
    _, masks = case(1)
    maps = np.full(masks.shape, value, np.float32)
    bounds = streamed(maps, masks, 10)
    assert bounds.error == 0.0
    assert bounds.middle == evaluate_maps(maps, masks)


@pytest.mark.parametrize("pending", [1, 1000])
def test_bins_sorted_in_again_and_again_are_the_same(pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = case(2)
    once = streamed(maps, masks, 14)
    monkeypatch.setattr(streaming, "PENDING", pending)
    assert streamed(maps, masks, 14, batch=1) == once


def test_memory_grows_with_the_bins_and_the_anomalous_pixels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PENDING", 10_000)
    metrics, rng = StreamingMetrics(18), np.random.default_rng(0)
    for _ in range(100):
        metrics.add(rng.uniform(1, 4, (1, 100, 100)).astype(np.float32), np.zeros((1, 100, 100)))
    # 18 bits leave 9 of the fraction: 512 bins for every factor of two, and 1 <= score < 4.
    assert len(metrics._bins.key_K) == 1024
    assert metrics._bins.count_K.sum() == 1_000_000
    assert not metrics._pending


def test_labels_scores_and_nan_are_treated_as_by_evaluate_maps() -> None:
    maps, masks = case(3)
    scores = np.random.default_rng(0).random(len(maps))
    labels = masks.any((1, 2)) | (np.arange(len(maps)) == 0)
    metrics = StreamingMetrics()
    metrics.add(maps[:4], masks[:4], scores[:4], labels[:4])
    metrics.add(maps[4:], masks[4:], scores[4:], labels[4:])
    assert_between(metrics.result(), evaluate_maps(maps, masks, scores, labels))
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.add(np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)))


@pytest.mark.parametrize("mask", [0, 1])
def test_a_missing_class_is_nan_with_a_note(mask: int) -> None:
    maps = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    bounds = streamed(maps, np.full((2, 4, 4), mask), 12)
    assert math.isnan(bounds.middle.aupro)
    assert bounds.error == 0.0
    assert bounds.middle.notes == evaluate_maps(maps, np.full((2, 4, 4), mask)).notes


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="bits 9"):
        StreamingMetrics(9)
    with pytest.raises(ValueError, match="no batch"):
        StreamingMetrics().result()

"""Measure all maps of one product at once, or finish measuring them in a stream; also by kind of defect, as sPRO is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adpretrain.data import Sample
from adpretrain.data.layouts.saturation import saturated_shares, saturation_file
from adpretrain.photographs import read_mask
from adpretrain.preprocess import Preprocess
from downstream.evaluation.few_shot import PIXEL_METRICS
from downstream.evaluation.means import SPRO
from downstream.metric_counts import (
    count,
    official_area_under_pro,
    pro_curve,
    region_weights,
    sorted_normals,
    unmarked,
)
from downstream.metrics import LIMIT, STEPS, checked, evaluate_maps, from_counts
from downstream.saturated_overlap import Region, area_under_spro
from downstream.streamed_metrics import StreamingMetrics

ByKind = dict[str, dict[str, float | None]]
CURVE = np.linspace(0, 0.3, 61)  # false positive rates at which the PRO curve is kept
STREAMED = "sPRO is not measured in a stream: it needs all maps at once"


@dataclass(frozen=True)
class Measured:
    """``values`` of metrics by name, nan if undefined; notes about them; PRO at the rates of `CURVE`, or None; and the
    metrics of every kind of defect, if they were asked for."""

    values: dict[str, Any]
    notes: list[str]
    curve: list[float] | None = None
    defects: ByKind = field(default_factory=dict)


def measured_in_stream(streaming: StreamingMetrics, samples: Sequence[Sample]) -> Measured:
    """Return the middle of the bounds that were found in a stream."""
    bounds = streaming.result()
    values = asdict(bounds.middle) | {"aupro_official": None} | dict.fromkeys(SPRO)
    notes = [f"measured in a stream: pixel metrics are off by at most {bounds.error:.1e}"]
    notes += [STREAMED] if has_saturation(samples) else []
    return Measured(values, notes + list(values.pop("notes")))


def measured_at_once(
    samples: Sequence[Sample],
    maps: NDArray[np.float32],
    masks: NDArray[np.bool_],
    scores: NDArray[np.float32],
    preprocess: Preprocess,
    per_defect: bool = False,
    unchanged: bool = True,
) -> Measured:
    """Measure the maps of all samples; ``unchanged``: the masks of ``samples`` are in the places of the images."""
    labels = np.array([sample.anomalous for sample in samples])
    maps, masks, scores, labels = checked(maps, masks, scores, labels)
    weights, normals = region_weights(masks), sorted_normals(maps, masks)
    pixels = count(maps, masks, weights, normals)
    values = asdict(from_counts(count(scores, labels), pixels, unmarked(masks, labels))) | dict.fromkeys(SPRO)
    values["aupro_official"] = official_area_under_pro(maps, masks, weights, normals, LIMIT, STEPS)
    notes, curve = list(values.pop("notes")), None
    if masks.any() and not masks.all():
        fpr, pro = pro_curve(pixels)
        curve = [round(float(value), 5) for value in np.interp(CURVE, fpr, pro)]
    defects = metrics_by_defect(samples, maps, masks, scores) if per_defect else {}
    if has_saturation(samples) and unchanged:
        by_kind, lost = spro_by_defect(samples, maps, preprocess)
        values |= mean_over_kinds(by_kind)
        defects = {kind: {**own, **by_kind[kind]} for kind, own in defects.items()}
        notes += lost
    return Measured(values, notes, curve, defects)


def metrics_by_defect(
    samples: Sequence[Sample], maps: NDArray[np.float32], masks: NDArray[np.bool_], scores: NDArray[np.float32]
) -> ByKind:
    """Return for each kind of defect the metrics of its images and all normal ones, without pixel metrics if any defect
    has no mask."""
    kinds = np.array([sample.defect if sample.anomalous else "" for sample in samples])
    found, bare = {}, any(sample.anomalous and not sample.mask_files for sample in samples)
    for kind in sorted({*kinds.tolist()} - {""}):
        rows = (kinds == kind) | (kinds == "")
        values = asdict(evaluate_maps(maps[rows], masks[rows], scores[rows], kinds[rows] != ""))
        values |= dict.fromkeys(PIXEL_METRICS) if bare else {}
        found[kind] = {name: finite(value) for name, value in values.items() if name != "notes"}
    return found


def has_saturation(samples: Sequence[Sample]) -> bool:
    """Whether the set says of all defects how much of them has to be found, and there are defects."""
    defects = [sample for sample in samples if sample.anomalous]
    return bool(defects) and all(saturation_file(sample) for sample in defects)


def spro_by_defect(
    samples: Sequence[Sample], maps: NDArray[np.float32], preprocess: Preprocess
) -> tuple[ByKind, list[str]]:
    """Return for each kind of defect the areas under sPRO (`SPRO`) of its images and all normal ones, and notes. The
    benchmark reports their mean over kinds.

    Regions are resized like photographs. A region saturates at the share of its pixels at which it does in its file,
    because saturation areas are in pixels of the files. One that vanishes in resizing is left out, and a note says so.
    """
    found, kept, total = {}, 0, 0
    for kind in sorted({sample.defect for sample in samples if sample.anomalous}):
        rows = [index for index, sample in enumerate(samples) if not sample.anomalous or sample.defect == kind]
        regions = []
        for number, sample in enumerate(samples[index] for index in rows):
            shares = saturated_shares(sample) if sample.anomalous else []
            for file, share in zip(sample.mask_files, shares, strict=True):
                mask = preprocess.mask(read_mask(file)).numpy()
                regions += [Region(number, mask, share)] if mask.any() else []
            total += len(shares)
        kept += len(regions)
        areas = area_under_spro(maps[rows], regions, tuple(SPRO.values()))
        found[kind] = {name: finite(area) for name, area in zip(SPRO, areas, strict=True)}
    if kept == total:
        return found, []
    return found, [f"{total - kept} of {total} marked regions vanish in resizing: sPRO is without them"]


def mean_over_kinds(found: ByKind) -> dict[str, float | None]:
    """Return the mean of each metric over kinds of defects; None if a kind does not define it."""
    values = {name: [kind[name] for kind in found.values()] for name in SPRO}
    return {name: None if None in own else float(np.mean(np.array(own, float))) for name, own in values.items()}


def finite(value: float | None) -> float | None:
    """Return a number, or None instead of nan and infinity, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None

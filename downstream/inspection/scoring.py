"""Score photographs against a `Basis`, a batch at a time.

Every image is read, scored and drawn in one pass. Only two batches of images and one of maps are in memory,
however many images there are, because the basis fixes the colour scale before the first image is scored; that
also makes the heatmaps of different runs with the same references comparable.

Shape legend: B images of a batch, S = the network's input side.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from downstream.appearance import Unlike
from downstream.calibration import Calibration
from downstream.inspection.basis import Basis
from downstream.inspection.finding import printable
from downstream.inspection.normals import SCALE_SAMPLE, Progress, predict_photos, silent
from downstream.inspection.photos import Photo, Unreadable, picture_names, read_batches, relative_name, without_blank
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result
from downstream.inspection.resume import Batch, Record, Stamp, stamp
from downstream.visualise import ColourScale, panel, save_png

SHAPE_TOLERANCE = 0.05  # relative difference of width:height that is worth a warning


def score_images(
    basis: Basis,
    root: Path,
    paths: Sequence[Path],
    record: Record,
    batch_size: int = 16,
    progress: Progress = silent,
) -> tuple[list[Result], list[str]]:
    """Score `paths`, save a panel for each; the results in the order of `paths`, and warnings.

    Panels go below the record's folder. Batches that the record holds are taken from it, the others are added to it. A
    photograph that is blank or has no finite score counts as unreadable.
    """
    names, images = picture_names(root, paths), [stamp(root, path) for path in paths]
    scale = basis.scale or _scale_of_sample(basis, paths, images, record, batch_size)
    spans = [slice(start, start + batch_size) for start in range(0, len(paths), batch_size)]
    earlier = [record.scored(images[span], [names[path] for path in paths[span]]) for span in spans]
    if record.has_batches and not any(earlier):
        warnings.warn(
            f"what the unfinished run in {printable(record.folder)} has scored is none of these {len(paths)} images as "
            "they are now: all are scored",
            stacklevel=2,
        )
    to_read = [path for span, batch in zip(spans, earlier, strict=True) if batch is None for path in paths[span]]
    read = read_batches(to_read, basis.preprocess, batch_size, basis.full_scale)
    results, odd_shapes, saturated = list[Result](), 0, 0
    progress("scoring", 0, len(paths))
    for span, batch in zip(spans, earlier, strict=True):
        if batch is None:
            batch = _score_batch(basis, root, next(read), names, record.folder, scale)
            record.add(images[span], batch)
        results += batch.results
        odd_shapes += batch.odd_shapes
        saturated += batch.saturated
        progress("scoring", len(results), len(paths))
    return results, [*shape_warning(odd_shapes, len(paths)), *_saturation(saturated, len(paths), basis.full_scale)]


def _score_batch(
    basis: Basis,
    root: Path,
    read: Sequence[Photo | Unreadable],
    names: Mapping[Path, str],
    out: Path,
    scale: ColourScale,
) -> Batch:
    """Score and draw a batch; `names`: of the heatmaps, relative to `out`."""
    read = without_blank(read, basis.contrast)
    photos = [item for item in read if isinstance(item, Photo)]
    predicted = iter(zip(*predict_photos(basis.detector, photos, basis.device), strict=True))
    results, panels, odd_shapes, saturated = list[Result](), list[tuple[Photo, NDArray[np.float64], Result]](), 0, 0
    for item in read:
        name, heatmap = relative_name(root, item.path), names[item.path]
        score, map_SS = next(predicted) if isinstance(item, Photo) else (math.nan, np.empty((0, 0)))
        if isinstance(item, Unreadable) or not math.isfinite(score):
            reason = item.reason if isinstance(item, Unreadable) else f"the extractor gave the score {score}"
            results.append(Result(name, None, None, UNREADABLE, reason=reason))
            (out / heatmap).unlink(missing_ok=True)  # of what lay there before an interruption
            continue
        unlike = basis.appearance.unlike(item.appearance)
        result = judge(name, float(score), unlike, basis.calibration, basis.threshold, heatmap)
        if (original := basis.known.get(item.digest)) is not None:
            reason = f"it is a copy of a normal photograph ({original}), so that it is compared with itself"
            result = dataclasses.replace(result, verdict=UNDECIDED, reason=reason)
        panels.append((item, map_SS, result))
        odd_shapes += is_odd(item.aspect, basis.aspects)
        saturated += item.saturated
        results.append(result)

    def draw(made: tuple[Photo, NDArray[np.float64], Result]) -> None:
        item, map_SS, result = made
        save_png(panel(item.shown, map_SS, scale, title=_title(result)), out / names[item.path])

    with ThreadPoolExecutor() as pool:  # packing pixels takes longer than scoring them, and needs no lock of Python's
        list(pool.map(draw, panels))
    return Batch(tuple(results), odd_shapes, saturated)


def _scale_of_sample(
    basis: Basis, paths: Sequence[Path], images: Sequence[Stamp], record: Record, batch_size: int
) -> ColourScale:
    """One reference has no normal map: let the typical (median) image of an evenly spaced sample set the
    limit.
    """
    step = max(1, len(paths) // SCALE_SAMPLE)
    sample, images = paths[::step][:SCALE_SAMPLE], images[::step][:SCALE_SAMPLE]
    if (earlier := record.scale(images)) is not None:
        return earlier
    maps = [np.zeros((0, 1, 1))]
    for batch in read_batches(sample, basis.preprocess, batch_size, basis.full_scale):
        photos = [item for item in batch if isinstance(item, Photo)]
        maps.append(predict_photos(basis.detector, photos, basis.device)[1])
    scale = typical_scale([map_SS for batch in maps for map_SS in batch], basis.threshold)
    record.set_scale(images, scale)
    return scale


def typical_scale(maps: Sequence[NDArray[np.floating]], threshold: float | None = None) -> ColourScale:
    """The scale of the maps [S, S] with the median peak; those that are not finite are left out."""
    finite = sorted((map_SS for map_SS in maps if np.isfinite(map_SS).all()), key=lambda map_SS: float(map_SS.max()))
    if not finite:
        return ColourScale(0.0, 1.0, 2.0)  # nothing could be read, so nothing will be drawn
    return ColourScale.from_normal_maps(finite[len(finite) // 2][None], threshold)


def judge(
    name: str,
    score: float,
    unlike: Unlike,
    calibration: Calibration | None,
    threshold: float | None,
    heatmap: str | None = None,
) -> Result:
    """The result of one image with a finite score; ``unlike`` is of this image alone."""
    value, measure = float(unlike.values[0]), unlike.measures[0]
    p_value = unlike_p_value = None
    if calibration is not None:
        p_value = float(calibration.p_values([score])[0])
        unlike_p_value = float(calibration.unlike_p_values([value])[0]) if calibration.unlike else None
    verdict, reasons = UNDECIDED, list[str]()
    if threshold is not None:
        reasons += ["score"] if score > threshold else []
        beyond = calibration is not None and value > calibration.unlike_threshold
        reasons += [f"unlike the normals: {measure}"] if beyond else []
        verdict = ANOMALOUS if reasons else NORMAL
    return Result(name, score, p_value, verdict, heatmap, ", ".join(reasons), value, unlike_p_value, measure)


def _title(result: Result) -> str:
    p_value = "" if result.p_value is None else f", p {result.p_value:.3g}"
    return f"{printable(result.path)}: {result.judgement}, score {result.score:.4g}{p_value}"


def is_odd(aspect: float, aspects: Sequence[float]) -> bool:
    """Whether no reference has nearly this width:height."""
    return all(abs(math.log(aspect / other)) > SHAPE_TOLERANCE for other in aspects)


def shape_warning(odd: int, total: int) -> list[str]:
    """What to say when `odd` of `total` images have a shape unlike the normal photographs'."""
    if not odd:
        return []
    return [
        f"{odd} of {total} images have a shape (width:height) unlike the normal photographs'. They are "
        "prepared like those, so what lies elsewhere in them looks like an anomaly: crop them alike."
    ]


def _saturation(saturated: int, total: int, full_scale: float | None) -> list[str]:
    if not saturated:
        return []
    limit = "the full scale of their type" if full_scale is None else f"{full_scale:g}, the full scale of the normals"
    return [f"{saturated} of {total} images hold values above {limit}: what is brighter all looks white."]

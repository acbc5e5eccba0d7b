"""Score photographs against a `Basis`, a batch at a time.

Every image is read, scored and drawn in one pass. Only two batches of images and one of maps are in memory,
however many images there are, because the basis fixes the colour scale before the first image is scored; that
also makes the heatmaps of different runs with the same references comparable.

Shape legend: B images of a batch, S = the network's input side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from downstream.calibration import Calibration
from downstream.inspection.basis import SCALE_SAMPLE, Basis, Progress, predict_photos, silent
from downstream.inspection.photos import Photo, Unreadable, picture_names, printable, read_batches, relative_name
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result
from downstream.visualise import ColourScale, overlay, panel, save_png

SHAPE_TOLERANCE = 0.05  # relative difference of width:height that is worth a warning


def score_images(
    basis: Basis,
    root: Path,
    paths: Sequence[Path],
    out: Path,
    batch_size: int = 16,
    progress: Progress = silent,
    on_result: Callable[[Result, Image.Image | None, Image.Image | None], None] = lambda *_: None,
) -> tuple[list[Result], list[str]]:
    """Score `paths`, save a panel for each below out/heatmaps; the results in the order of `paths`, and
    warnings.

    `on_result(result, photograph, heatmap)` sees every picture once, before it is dropped from memory; both
    are None for an unreadable file. A photograph without a finite score counts as unreadable.
    """
    scale = basis.scale or _scale_of_sample(basis, paths, batch_size)
    names, results, odd_shapes = picture_names(root, paths), list[Result](), 0
    progress("scoring", 0, len(paths))
    for batch in read_batches(paths, basis.preprocess, batch_size):
        photos = [item for item in batch if isinstance(item, Photo)]
        scores_B, maps_BSS = predict_photos(basis.detector, photos, basis.device)
        of_photo = {photo.path: index for index, photo in enumerate(photos)}
        for item in batch:
            name = relative_name(root, item.path)
            if isinstance(item, Unreadable):
                result, shown, heat = Result(name, None, None, UNREADABLE, reason=item.reason), None, None
            elif not math.isfinite(score := float(scores_B[of_photo[item.path]])):
                reason = f"the extractor gave the score {score}"
                result, shown, heat = Result(name, None, None, UNREADABLE, reason=reason), None, None
            else:
                map_SS, shown = maps_BSS[of_photo[item.path]], item.shown
                heatmap = f"heatmaps/{names[item.path]}"
                result = judge(name, score, basis.calibration, basis.threshold, heatmap)
                heat = overlay(shown, map_SS, scale)
                save_png(panel(shown, map_SS, scale, title=_title(result)), out / str(result.heatmap))
                odd_shapes += is_odd(item.aspect, basis.aspects)
            results.append(result)
            on_result(result, shown, heat)
        progress("scoring", len(results), len(paths))
    return results, shape_warning(odd_shapes, len(paths))


def _scale_of_sample(basis: Basis, paths: Sequence[Path], batch_size: int) -> ColourScale:
    """One reference has no normal map: let the typical (median) image of an evenly spaced sample set the
    limit.
    """
    step = max(1, len(paths) // SCALE_SAMPLE)
    maps = [np.zeros((0, 1, 1))]
    for batch in read_batches(paths[::step][:SCALE_SAMPLE], basis.preprocess, batch_size):
        photos = [item for item in batch if isinstance(item, Photo)]
        maps.append(predict_photos(basis.detector, photos, basis.device)[1])
    return typical_scale([map_SS for batch in maps for map_SS in batch], basis.threshold)


def typical_scale(maps: Sequence[NDArray[np.floating]], threshold: float | None = None) -> ColourScale:
    """The scale of the maps [S, S] with the median peak; those that are not finite are left out."""
    finite = sorted((map_SS for map_SS in maps if np.isfinite(map_SS).all()), key=lambda map_SS: float(map_SS.max()))
    if not finite:
        return ColourScale(0.0, 1.0, 2.0)  # nothing could be read, so nothing will be drawn
    return ColourScale.from_normal_maps(finite[len(finite) // 2][None], threshold)


def judge(
    name: str, score: float, calibration: Calibration | None, threshold: float | None, heatmap: str | None = None
) -> Result:
    """The result of one image with a finite score."""
    p_value = float(calibration.p_values([score])[0]) if calibration else None
    verdict = UNDECIDED
    if threshold is not None:
        verdict = ANOMALOUS if score > threshold else NORMAL
    return Result(name, score, p_value, verdict, heatmap)


def _title(result: Result) -> str:
    p_value = "" if result.p_value is None else f", p {result.p_value:.3g}"
    return f"{printable(result.path)}: {result.verdict}, score {result.score:.4g}{p_value}"


def is_odd(aspect: float, aspects: Sequence[float]) -> bool:
    """Whether no reference has nearly this width:height."""
    return all(abs(math.log(aspect / other)) > SHAPE_TOLERANCE for other in aspects)


def shape_warning(odd: int, total: int) -> list[str]:
    """What to say when `odd` of `total` images have a shape that no reference has."""
    if not odd:
        return []
    return [
        f"{odd} of {total} images have a shape (width:height) that no reference has. Every photograph is "
        "squeezed to the same square, so a difference in shape looks like an anomaly: crop them alike."
    ]

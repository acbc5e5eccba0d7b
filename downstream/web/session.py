"""The uploads and scores of one visitor, and the verdicts computed from them for any false-alarm rate.

Scoring is slow and done once. Everything that depends on the rate (threshold, verdicts, colours, warnings) is computed
anew from the scores and maps kept here; reference photographs and their features are not kept.

Shape legend: S = the network's input side.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from adpretrain.extractor import ADExtractor
from adpretrain.progress import Progress
from downstream.appearance import Unlike
from downstream.calibration import Calibration, calibrate
from downstream.inspection import Options
from downstream.inspection.facts import regions_note
from downstream.inspection.inspector import Inspector, judge, shape_note
from downstream.inspection.photos import Photo, PhotoReader, Unreadable
from downstream.inspection.results import UNREADABLE, Result
from downstream.inspection.set_up import inspector_from_photos
from downstream.regions import Box, Region, find_regions
from downstream.roi import RoiFiles
from downstream.terminal import no_progress
from downstream.tiles import Tiling
from downstream.visualise import ColourScale, numbered, overlay
from downstream.web.uploads import LIMITS, MEGA, Limits, Upload, check_counts, read_upload, refusal

BATCH = 8
RATE = 0.05  # false-alarm rate when the page opens
SINGLE = (
    "One good photograph cannot be compared with another one: there is no threshold, no p-value and no verdict, "
    "only a ranking. Give at least 2."
)


@dataclass(frozen=True)
class Setup:
    """How photographs are compared: cut into tiles of ``tile`` pixels (0 = whole); what is inspected, the white of
    ``mask`` without ``border`` pixels along the edges."""

    tile: int = 0
    border: int = 0
    mask: Upload | None = None


PLAIN = Setup()


@dataclass(frozen=True)
class Shot:
    """One photograph to inspect. ``score``, ``map_SS`` and ``photo`` (a JPEG) are None if it cannot be read."""

    name: str
    score: float | None = None
    map_SS: NDArray[np.float32] | None = None
    photo: bytes | None = None
    reason: str = ""
    unlike: Unlike | None = None
    size: tuple[int, int] = (0, 0)  # width and height of the photograph in pixels
    seen: Box | None = None  # the part of it that the network sees, and ``photo`` shows


@dataclass(frozen=True)
class Scored:
    """Everything from which verdicts are computed, for any false-alarm rate."""

    shots: tuple[Shot, ...]
    normal_scores: tuple[float, ...]  # leave-one-out scores; empty if there is only one good photograph
    normal_peaks: tuple[float, ...]  # the highest values of their maps
    normal_unlike: tuple[float, ...]  # how far these photographs are from each other, see downstream.appearance
    references: int
    scale: ColourScale
    notes: tuple[str, ...]  # warnings that do not depend on the rate


@dataclass(frozen=True)
class Verdicts:
    """The verdicts at one false-alarm rate; results are in the order of the shots."""

    results: tuple[Result, ...]
    calibration: Calibration | None
    scale: ColourScale
    warnings: tuple[str, ...]
    pixel_limit: float | None  # map values above it make regions; None if there is only one good photograph
    regions: tuple[list[Region], ...]  # of each result, the highest peak first

    @property
    def threshold(self) -> float | None:
        """The calibrated threshold; None if there is only one good photograph."""
        return self.calibration.threshold if self.calibration else None

    def ranked(self) -> list[int]:
        """Indices of the results, the highest score first and unreadable ones last."""
        scores = [-math.inf if result.score is None else result.score for result in self.results]
        return sorted(range(len(scores)), key=lambda place: -scores[place])


def score_uploads(
    model: ADExtractor | Inspector,
    device: torch.device,
    good: Sequence[Upload],
    new: Sequence[Upload],
    limits: Limits = LIMITS,
    progress: Progress = no_progress,
    setup: Setup = PLAIN,
) -> Scored:
    """Score new photographs against the good ones, with an extractor, or with a saved inspector, which has its own good
    photographs and ``setup``. Raises ValueError, with a message for the page, for bad input."""
    if isinstance(model, Inspector):
        check_counts(good or ["its own"], new, limits)
        inspector = model
    else:
        check_counts(good, new, limits)
        inspector = _inspector(model, device, good, limits, progress, setup)
    shots, odd, size = list[Shot](), 0, min(BATCH, inspector.reader.batch_size)
    kept = 0  # pixels of maps
    for start in range(0, len(new), size):
        progress("scoring", start, len(new))
        read = [read_upload(upload, inspector.reader, limits) for upload in new[start : start + size]]
        for one in inspector.score(read):
            if isinstance(one, Unreadable):
                shots.append(Shot(str(one.path), reason=one.reason))
                continue
            photo, map_SS = jpeg(one.photo.shown), one.map_HW.astype(np.float32)
            kept += map_SS.size
            if kept > limits.map_pixels:
                raise ValueError(
                    f"The maps of these photographs have more than {limits.map_pixels / MEGA:.0f} megapixels, all that "
                    f"this page keeps: give at most {len(shots)} at a time, or use adpretrain score."
                )
            where = one.photo.size, one.photo.seen
            shots.append(Shot(str(one.photo.path), one.score, map_SS, photo, "", one.unlike, *where))
            odd += inspector.has_odd_shape(one.photo)
    progress("scoring", len(new), len(new))
    maps = [shot.map_SS for shot in shots if shot.map_SS is not None]
    return Scored(
        shots=tuple(shots),
        normal_scores=inspector.calibration.scores if inspector.calibration else (),
        normal_unlike=inspector.calibration.unlike if inspector.calibration else (),
        normal_peaks=tuple(normal.peak for normal in inspector.normals if normal.peak is not None),
        references=inspector.references,
        scale=inspector.scale or ColourScale.from_typical_map(maps),
        notes=(*inspector.notes, *shape_note(odd, len(new))),
    )


def _inspector(
    extractor: ADExtractor,
    device: torch.device,
    good: Sequence[Upload],
    limits: Limits,
    progress: Progress,
    setup: Setup,
) -> Inspector:
    """Set up from the good photographs."""
    # The copy shares the weights but has its own references, so that visitors never share them.
    own, mask = copy.copy(extractor), None
    if setup.mask is not None:
        if (reason := refusal(setup.mask.path, limits)) is not None:
            raise ValueError(f"The mask {setup.mask.name} cannot be used: {reason}.")
        mask = setup.mask.path
    tiling = Tiling(setup.tile)
    options = Options(
        shots=limits.good,
        batch_size=BATCH,
        tiling=tiling,
        roi=None if mask is None else str(mask),
        ignore_border=setup.border,
    )
    reader = PhotoReader.of_camera((), own.preprocess, BATCH, bool(tiling.tile), RoiFiles(mask, setup.border))
    references = list[Photo]()
    for upload in good:
        item = read_upload(upload, reader, limits)
        if isinstance(item, Unreadable):
            raise ValueError(f"Every score depends on the good photographs, but {upload.name} is bad: {item.reason}.")
        references.append(item)
    return inspector_from_photos(own, device, references, options, progress=progress, reader=reader)


def verdicts(scored: Scored, rate: float) -> Verdicts:
    """Compute threshold and verdicts for a false-alarm rate in (0, 1). Raises ValueError for other rates."""
    unlike = scored.normal_unlike, ()
    calibration = calibrate(scored.normal_scores, rate, unlike=unlike) if scored.normal_scores else None
    threshold = calibration.threshold if calibration else None
    limit = calibrate(scored.normal_peaks, rate).threshold if scored.normal_peaks else None
    regions = tuple(_regions(shot, limit) for shot in scored.shots)
    results = [
        Result(shot.name, None, None, UNREADABLE, reason=shot.reason)
        if shot.score is None or shot.unlike is None
        else dataclasses.replace(judge(shot.name, shot.score, shot.unlike, calibration, threshold), regions=len(found))
        for shot, found in zip(scored.shots, regions, strict=True)
    ]
    return Verdicts(
        results=tuple(results),
        calibration=calibration,
        scale=scored.scale.with_limit(limit),
        warnings=(
            *(calibration.warnings if calibration else (SINGLE,)),
            *scored.notes,
            *regions_note(results, sum(result.is_quiet for result in results), True),
        ),
        pixel_limit=limit,
        regions=regions,
    )


def _regions(shot: Shot, limit: float | None) -> list[Region]:
    if shot.map_SS is None or limit is None:
        return []
    return find_regions(shot.map_SS, limit, shot.size, shot.seen)


def heatmap(scored: Scored, place: int, found: Verdicts) -> bytes | None:
    """Draw the heatmap, with the numbered regions, over photograph number ``place``, as a JPEG of its size; None if it
    could not be read."""
    shot = scored.shots[place]
    if shot.photo is None or shot.map_SS is None:
        return None
    drawn = overlay(Image.open(io.BytesIO(shot.photo)), shot.map_SS, found.scale)
    return jpeg(numbered(drawn, found.regions[place], shot.seen))


def jpeg(picture: Image.Image, longest: int | None = None) -> bytes:
    """Encode a picture for the page, shrunk to at most ``longest`` pixels on each side."""
    if longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return buffer.getvalue()

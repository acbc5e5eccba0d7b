"""An `Inspector` scores and judges photographs of a product. `set_up` makes one from normal photographs.

The threshold and the colour scale of the heatmaps are computed from the scores of the normal photographs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name

import torch

from adpretrain.extractor import ADExtractor
from downstream.appearance import Normals, Unlike
from downstream.calibration import Calibration, calibrate
from downstream.detector import Detector
from downstream.detectors.tiled import Tiled
from downstream.extracts import device_of, fixed_picture
from downstream.inspection import Options
from downstream.inspection.camera import Drawn, Picture, Verdict, take
from downstream.inspection.normals import (
    Map,
    Normal,
    outlier_note,
    predict_photos,
)
from downstream.inspection.photos import (
    Photo,
    PhotoReader,
    Unreadable,
    without_blank,
)
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, Result
from downstream.regions import Region, find_regions
from downstream.visualise import ColourScale

ALONE = (
    "One normal photograph cannot be compared with another one: there is no threshold, no p-value and no verdict, only "
    "a ranking. Give at least 2, or further ones with --calibration."
)
FITTED = "one that the detector was fitted on"
PRODUCT = "downstream.inspection.product"  # imported when it is used, as it imports this module
COARSE = 48  # pixels in a cell; above, a warning says what is not seen
SHAPE_TOLERANCE = 0.05  # a relative difference of width:height above this gives a warning


@dataclass(frozen=True)
class Scored:
    """A photograph with its score and map; ``unlike`` has one row, that of this photograph."""

    photo: Photo
    score: float
    map_HW: Map
    unlike: Unlike


@dataclass(frozen=True)
class Inspector:
    """A detector and the normal photographs of a product: scores photographs (`score`) and then judges them (`judge`).

    ``fitted_on``: digests of the photographs that the detector was fitted on before; None if its references are among
    ``normals``.
    """

    detector: Detector
    reader: PhotoReader
    device: torch.device
    options: Options
    normals: tuple[Normal, ...]
    description: str  # describes the extractor or detector in the report
    score_is: str  # says in the report how a score is computed from a heatmap
    notes: tuple[str, ...]  # warnings about the normal photographs
    fitted_on: frozenset[str] | None = None

    @property
    def references(self) -> int:
        """Number of references; 0 for a detector that was fitted before."""
        return sum(normal.reference for normal in self.normals)

    @cached_property
    def contrast(self) -> float:
        """Median contrast of the references, or of a fitted detector's normal photographs."""
        return statistics.median(normal.contrast for normal in self._compared)

    @cached_property
    def known(self) -> dict[str, str]:
        """Digest of a photograph that takes part in the comparison -> its name."""
        fitted = dict.fromkeys(self.fitted_on or (), FITTED)
        return fitted | {normal.digest: normal.name for normal in self.normals}

    @property
    def _compared(self) -> list[Normal]:
        """The normal photographs that new ones are compared with as a whole."""
        return [normal for normal in self.normals if normal.reference or self.fitted_on is not None]

    @cached_property
    def appearance(self) -> Normals:
        """Appearance of the normal photographs, with which that of new ones is compared."""
        return Normals([normal.appearance for normal in self._compared])

    @cached_property
    def calibration(self) -> Calibration | None:
        """Threshold and promise; None if there is a single normal photograph."""
        alone, further = self._scores(lambda normal: normal.score)
        own = self.appearance.leave_one_out()
        if self.fitted_on is not None:
            return calibrate((), self.options.false_alarm_rate, further, ((), own) if len(own) else None)
        if not alone and not further:
            return None
        others = [normal.appearance for normal in self.normals if not normal.reference]
        return calibrate(alone, self.options.false_alarm_rate, further, (own, self.appearance.unlike(others).values))

    def _scores(self, number: Callable[[Normal], float | None]) -> tuple[list[float], list[float]]:
        """A number of the references, each against the others, and that of the further normal photographs."""
        found = [(normal.reference, number(normal)) for normal in self.normals]
        alone, further = (
            [value for reference, value in found if reference is kind and value is not None] for kind in (True, False)
        )
        return alone, further

    @cached_property
    def scale(self) -> ColourScale | None:
        """Colour scale of the heatmaps; None if there is a single normal photograph, as a sample of the images must
        then fix it."""
        lows = [normal.low for normal in self.normals if normal.low is not None]
        peaks = [normal.peak for normal in self.normals if normal.peak is not None]
        return ColourScale.of(statistics.median(lows), max(peaks), self.pixel_limit) if lows else None

    @cached_property
    def pixel_limit(self) -> float | None:
        """The map value above which a normal photograph shows a region of at least ``options.least_area`` with a
        probability of at most the promised rate; None if there is a single normal photograph."""
        alone, further = self._scores(lambda normal: normal.peak)
        return calibrate(alone, self.options.false_alarm_rate, further).threshold if alone or further else None

    def regions(self, scored: Scored) -> list[Region]:
        """The regions of a photograph above the `pixel_limit`, the highest peak first."""
        if self.pixel_limit is None:
            return []
        options, photo = self.options, scored.photo
        return find_regions(
            scored.map_HW, self.pixel_limit, photo.size, photo.seen, options.least_area, options.mm_per_pixel
        )

    @cached_property
    def cell(self) -> tuple[float, float]:
        """Width and height, in pixels of a normal photograph, of one cell of the finest features."""
        across, down = finest_grid(self.detector)
        if isinstance(self.detector, Tiled):
            return self.detector.tiling.tile / across, self.detector.tiling.tile / down
        left, top, right, bottom = self.reader.preprocess.seen(self.normals[0].size)
        return (right - left) / across, (bottom - top) / down

    @property
    def threshold(self) -> float | None:
        """The threshold that was given, else the calibrated one; None if there is neither."""
        if self.options.threshold is None and self.calibration is not None:
            return self.calibration.threshold
        return self.options.threshold

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings for the user: about the threshold, then about the photographs."""
        calibration, given = self.calibration, self.options.threshold
        if given is not None:
            text = "The threshold was given, not calibrated: no false-alarm rate is promised."
            if calibration is not None:
                exceeding = sum(score > given for score in calibration.scores)
                text += f" {exceeding} of {len(calibration.scores)} normal photographs exceed it."
            return (text, *self.notes)
        told = (*outlier_note(self.normals, calibration), *calibration.warnings) if calibration else (ALONE,)
        return (*told, *self.notes, *self._coarse_note())

    def _coarse_note(self) -> list[str]:
        across, down = self.cell
        if max(across, down) <= COARSE:
            return []
        return [
            f"One cell of the finest features covers {across:.0f} x {down:.0f} px of a photograph: far smaller "
            "defects are not seen. For small defects on large photographs give --tile, such as --tile 256."
        ]

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu", weights: Path | None = None
    ) -> Inspector:
        """Load a saved inspector, or that of a product folder (`downstream.inspection.product`), which raises the
        errors."""
        inspector: Inspector = resolve_name(f"{PRODUCT}:load_inspector")(Path(folder), device, weights)
        return inspector

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save the inspector, which HOLDS FEATURES OF THE PRODUCT; see `downstream.inspection.product`."""
        saved: Path = resolve_name(f"{PRODUCT}:save_inspector")(self, Path(folder))
        return saved

    def score(self, read: Sequence[Photo | Unreadable]) -> list[Scored | Unreadable]:
        """Score the photographs of one batch, in order; one that is blank or has no finite score becomes unreadable."""
        read = without_blank(read, self.contrast)
        photos = [item for item in read if isinstance(item, Photo)]
        predicted = iter(predict_photos(self.detector, photos, self.device))
        scored = list[Scored | Unreadable]()
        for item in read:
            if isinstance(item, Unreadable):
                scored.append(item)
                continue
            found = next(predicted)
            if isinstance(found, str):
                scored.append(Unreadable(item.path, found))
            elif math.isfinite(found[0]):
                scored.append(Scored(item, *found, self.appearance.unlike(item.appearance)))
            else:
                scored.append(Unreadable(item.path, f"the extractor gave the score {found[0]}"))
        return scored

    def __call__(self, image: Picture, name: str = "") -> Verdict:
        """Judge one photograph and write nothing; threads may call it at the same time.

        image: a path, a PIL image, a numpy array [H, W] or [H, W, 3 or 4] or a torch tensor [H, W] or [3 or 4, H, W],
        in the order red, green, blue (OpenCV's frames: ``frame[..., ::-1]``), of uint8, uint16 or floats in 0..1 or
        0..255; any size. Gray values of more than 8 bits have the full scale of the normal photographs. name: a name
        for the reasons; by default that of the file. A photograph that is blank, cannot be read or compared has the
        verdict "unreadable", with the reason. Raises ValueError for another type, shape or kind of number.
        """
        read = take(image, self.reader, name)
        return self.verdict(read, name or (read.path.name if isinstance(image, str | os.PathLike) else ""))

    def verdict(self, read: Photo | Unreadable, name: str) -> Verdict:
        """Judge one photograph of `camera.take`; its heatmap is drawn later, if it is asked for."""
        (scored,) = self.score([read])
        if isinstance(scored, Unreadable):
            return Verdict.unreadable(name, scored.reason)
        photo, regions = scored.photo, self.regions(scored)
        scale = self.scale or ColourScale.from_typical_map([scored.map_HW], self.threshold)
        drawn = Drawn(photo.shown, self.reader, scored.map_HW, scale)
        result = dataclasses.replace(self.judge(name, scored), regions=len(regions))
        return Verdict(result, tuple(regions), drawn)

    def judge(self, name: str, scored: Scored, heatmap: str | None = None) -> Result:
        """Judge one image; a copy of a normal photograph is undecided, because it is compared with itself."""
        result = judge(name, scored.score, scored.unlike, self.calibration, self.threshold, heatmap)
        if (original := self.known.get(scored.photo.digest)) is not None:
            reason = f"it is a copy of a normal photograph ({original}), so that it is compared with itself"
            result = dataclasses.replace(result, verdict=UNDECIDED, reason=reason)
        return result

    def has_odd_shape(self, photo: Photo) -> bool:
        """Say whether the width:height of ``photo`` is far from that of every normal photograph."""
        aspects = {normal.size[0] / normal.size[1] for normal in self._compared}
        return all(abs(math.log(photo.aspect / other)) > SHAPE_TOLERANCE for other in aspects)


def judge(
    name: str,
    score: float,
    unlike: Unlike,
    calibration: Calibration | None,
    threshold: float | None,
    heatmap: str | None = None,
) -> Result:
    """Judge one image by its finite score and by ``unlike``, whose only row is that of this image."""
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


def shape_note(odd: int, total: int) -> list[str]:
    """Return a warning if `odd` > 0 of `total` images have another shape than the normal photographs."""
    if not odd:
        return []
    return [
        f"{odd} of {total} images have a shape (width:height) unlike the normal photographs'. They are resized like "
        "those, so that parts that end up elsewhere look like anomalies: crop all photographs alike."
    ]


def finest_grid(detector: Detector) -> tuple[int, int]:
    """Number of columns and rows of the finest features of a detector's input."""
    while detector.members:
        detector = detector.members[0]
    extract = detector.extract
    encode = extract.encode if isinstance(extract, ADExtractor) else extract
    with torch.no_grad():
        levels = encode(fixed_picture(detector.side, device_of(extract)))
    return max((level.shape[3], level.shape[2]) for level in levels)

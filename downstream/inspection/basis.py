"""What the normal photographs fix before the first image is scored: detector, threshold and colour scale.

Read the references, fit FeatureNorm on them, score each reference against the others (leave-one-out) and any
further normal photographs against all of them: the threshold and the heatmaps' colour scale follow.

Shape legend: K references, B images of a batch, S = the network's input side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from downstream.aligned import AlignedFeatureNorm
from downstream.calibration import Calibration, calibrate, percent
from downstream.detector import Detector
from downstream.featurenorm import FeatureNorm
from downstream.inspection.choosing import ALIGNED, EVEN, METHODS, choose_references, read_all, readable
from downstream.inspection.photos import (
    Photo,
    Unreadable,
    find_images,
    printable,
    read_batches,
    without_blank,
)
from downstream.visualise import ColourScale

SCALE_SAMPLE = 64  # maps, at most, that fix the colour scale besides the references' own
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


def silent(what: str, done: int, total: int) -> None:
    """No progress display."""


@dataclass(frozen=True)
class Options:
    """How to score: at most ``shots`` references, chosen by a method of `downstream.inspection.choosing`.

    ``threshold`` replaces the calibrated one and with it the promise.
    """

    false_alarm_rate: float = 0.05
    threshold: float | None = None
    references: str = EVEN
    shots: int = 16
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"false-alarm rate {self.false_alarm_rate}; expected a share between 0 and 1, e.g. 0.05")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold {self.threshold}; expected a finite number")
        if self.references not in METHODS:
            raise ValueError(f"references {self.references!r}; choose one of {', '.join(METHODS)}")
        if self.shots < 1 or self.batch_size < 1:
            raise ValueError(f"shots {self.shots} and batch_size {self.batch_size}: expected at least 1")


DEFAULTS = Options()


D = TypeVar("D", bound=Detector, covariant=True)


@dataclass(frozen=True)
class Basis(Generic[D]):
    """What the normal photographs fix before the first image is scored."""

    detector: D
    preprocess: Preprocess
    device: torch.device
    calibration: Calibration | None
    threshold: float | None
    scale: ColourScale | None  # None with one reference only: a sample of the images must fix it
    references: int
    aspects: tuple[float, ...]  # width / height of the references, or of a fitted detector's normal photographs
    contrast: float  # of the same photographs, the median
    description: str  # of the extractor or detector, for people
    score: str  # how a score comes from a heatmap, for people
    promise: tuple[str, ...]  # what there is to say about the threshold
    notes: tuple[str, ...]  # and about the photographs

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that people should know."""
        return (*self.promise, *self.notes)


def prepare(
    extractor: ADExtractor,
    device: torch.device,
    normal: Path,
    extra: Path | None = None,
    options: Options = DEFAULTS,
    exclude: Path | None = None,
    progress: Progress = silent,
) -> Basis[FeatureNorm]:
    """Fit the references in `normal`; calibrate on them and on the normal photographs in `extra`.

    Photographs that are not chosen as references calibrate. An unreadable reference is a ValueError (every score
    depends on it); an unreadable calibration photograph is left out with a warning. Nothing below `exclude` (the
    output folder) is read.
    """
    normals = find_images(normal, exclude)
    chosen = choose_references(
        options.references,
        normals,
        options.shots,
        options.seed,
        extractor,
        options.batch_size,
        lambda done: progress("choosing references", done, len(normals)),
    )
    references = read_all(chosen, extractor, options.batch_size)
    further, overlap = _further_normals(normals, chosen, find_images(extra, exclude) if extra else [])
    return prepare_photos(extractor, device, references, options, further, overlap, progress)


def prepare_photos(
    extractor: ADExtractor,
    device: torch.device,
    references: Sequence[Photo],
    options: Options = DEFAULTS,
    further: Sequence[Path] = (),
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> Basis[FeatureNorm]:
    """`prepare` with references that are read already; the normal photographs in the files `further` calibrate too."""
    # A blank reference would match whatever is calm, and calibrate with a score beyond all others.
    references = readable(without_blank(references, max(photo.contrast for photo in references)))
    preprocess, pool = extractor.preprocess, len(references)
    images_K = torch.stack([photo.pixels for photo in references]).to(device)
    progress("fitting the references", 0, pool)
    detector = _detector(extractor, options, pool).fit(images_K.split(options.batch_size))
    scores_K, maps_KSS = np.empty(0), []
    if pool >= 2:
        prediction = detector.leave_one_out(images_K)
        scores_K, maps_KSS = _numpy(prediction.scores), [_numpy(prediction.maps)]
    progress("fitting the references", pool, pool)

    warnings = [*_twins(references), *notes]
    contrast = statistics.median(photo.contrast for photo in references)
    extra_scores, extra_maps, lost = score_normals(detector, further, preprocess, device, contrast, options, progress)
    if lost:
        warnings.append(f"{len(lost)} calibration photograph(s) left out as unreadable, the first: {lost[0].reason}")

    calibration = None
    if len(scores_K) or len(extra_scores):
        calibration = calibrate(scores_K, options.false_alarm_rate, extra_scores)
    threshold = options.threshold
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    normal_maps = [*maps_KSS, *extra_maps]
    return Basis(
        detector=detector,
        preprocess=preprocess,
        device=device,
        calibration=calibration,
        threshold=threshold,
        scale=ColourScale.from_normal_maps(np.concatenate(normal_maps), threshold) if normal_maps else None,
        references=pool,
        aspects=tuple(photo.aspect for photo in references),
        contrast=contrast,
        description=_describe(extractor, detector, options),
        score=f"the mean of the heatmap's highest {percent(detector.top)}",
        promise=promise(calibration, options),
        notes=(*warnings, *unseen(preprocess)),
    )


def unseen(preprocess: Preprocess) -> list[str]:
    """What to say where the network sees the centre of a photograph only."""
    if preprocess.crop_from is None:
        return []
    return [f"Every photograph is {preprocess.in_words}: what lies outside of them is not inspected."]


def _detector(extractor: ADExtractor, options: Options, pool: int) -> FeatureNorm:
    """Leave-one-out must meet as many references as a new image does, or one fewer where there are no more."""
    size = extractor.preprocess.image_size
    if options.references != ALIGNED or pool <= options.shots:
        return FeatureNorm(extractor, image_size=size)
    return AlignedFeatureNorm(extractor, options.shots, image_size=size)


def _further_normals(
    normals: Sequence[Path], chosen: Sequence[Path], extra: Sequence[Path]
) -> tuple[list[Path], list[str]]:
    """Every normal photograph that is not a reference, once, and a warning if `extra` holds references."""
    references = {path.resolve() for path in chosen}
    further = {path.resolve(): path for path in (*normals, *extra) if path.resolve() not in references}
    overlap = sum(path.resolve() in references for path in extra)
    if not overlap:
        return sorted(further.values()), []
    return sorted(further.values()), [
        f"{overlap} calibration photograph(s) are references too and were left out: they would score too low."
    ]


def score_normals(
    detector: Detector,
    paths: Sequence[Path],
    preprocess: Preprocess,
    device: torch.device,
    contrast: float,
    options: Options,
    progress: Progress,
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], list[Unreadable]]:
    """Scores of normal photographs that are not references, their first maps, and the unreadable files."""
    scores, maps, lost = [np.empty(0)], list[NDArray[np.float64]](), list[Unreadable]()
    for number, read in enumerate(read_batches(paths, preprocess, options.batch_size)):
        batch = without_blank(read, contrast)
        lost += [item for item in batch if isinstance(item, Unreadable)]
        scores_B, maps_BSS = predict_photos(detector, [item for item in batch if isinstance(item, Photo)], device)
        scores.append(scores_B)
        if len(maps_BSS) and number * options.batch_size < SCALE_SAMPLE:
            maps.append(maps_BSS)
        progress("calibrating", min((number + 1) * options.batch_size, len(paths)), len(paths))
    return np.concatenate(scores), maps, lost


def predict_photos(
    detector: Detector, photos: Sequence[Photo], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores [B] and maps [B, S, S], both empty for an empty batch."""
    if not photos:
        return np.empty(0), np.empty((0, 0, 0))
    prediction = detector.predict(torch.stack([photo.pixels for photo in photos]).to(device))
    return _numpy(prediction.scores), _numpy(prediction.maps)


def _numpy(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()


def promise(calibration: Calibration | None, options: Options) -> tuple[str, ...]:
    """What there is to say about the threshold."""
    if options.threshold is not None:
        text = "The threshold was given, not calibrated: no false-alarm rate is promised."
        if calibration is not None:
            exceeding = sum(score > options.threshold for score in calibration.scores)
            text += f" {exceeding} of {len(calibration.scores)} normal photographs exceed it."
        return (text,)
    if calibration is None:
        return (
            "One normal photograph cannot be compared with another one: there is no threshold, no p-value "
            "and no verdict, only a ranking. Give at least 2, or further ones with --calibration.",
        )
    return calibration.warnings


def _twins(references: Sequence[Photo]) -> list[str]:
    """Two copies of one photograph score each other near zero, which makes the threshold too low."""
    twins = [
        (printable(first.path.name), printable(second.path.name))
        for index, first in enumerate(references)
        for second in references[index + 1 :]
        if torch.equal(first.pixels, second.pixels)
    ]
    return [
        f"Copies of one photograph among the references ({a} = {b}): more false alarms than promised."
        for a, b in twins[:1]
    ]


def _describe(extractor: ADExtractor, detector: FeatureNorm, options: Options) -> str:
    features = "projected residuals" if extractor.projector is not None else "raw residuals, no projector"
    if isinstance(detector, AlignedFeatureNorm):
        return f"{extractor.backbone.name}, {features}, the {detector.shots} best aligned references for every image"
    return f"{extractor.backbone.name}, {features}, references chosen: {options.references}"

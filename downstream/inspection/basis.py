"""What the normal photographs fix before the first image is scored: detector, threshold and colour scale.

Read the references, fit FeatureNorm on them, score each reference against the others (leave-one-out) and any
further normal photographs against all of them: the threshold and the heatmaps' colour scale follow.

Shape legend: K references, B images of a batch, S = the network's input side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from downstream.appearance import Normals
from downstream.calibration import Calibration, calibrate, percent
from downstream.detector import Detector
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.featurenorm import FeatureNorm
from downstream.inspection.choosing import ALIGNED, EVEN, METHODS, choose_references, read_all, readable
from downstream.inspection.finding import find_images
from downstream.inspection.normals import (
    Progress,
    as_numpy,
    copied,
    score_normals,
    silent,
)
from downstream.inspection.photos import Photo, dark, full_scale, without_blank, without_copies
from downstream.visualise import ColourScale


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
    appearance: Normals  # what photographs are compared with as a whole
    full_scale: float | None  # of gray photographs with more than 8 bits
    known: Mapping[str, str]  # digests of the normal photographs, and their names
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
    more = find_images(extra, exclude) if extra else []
    scale = full_scale([*normals, *more])
    chosen = choose_references(
        options.references,
        normals,
        options.shots,
        options.seed,
        extractor,
        options.batch_size,
        lambda done: progress("choosing references", done, len(normals)),
        scale,
    )
    further, overlap = _further_normals(normals, chosen, more)
    references = read_all(chosen, extractor, options.batch_size, scale)
    return prepare_photos(extractor, device, references, options, further, overlap, progress, scale)


def prepare_photos(
    extractor: ADExtractor,
    device: torch.device,
    references: Sequence[Photo],
    options: Options = DEFAULTS,
    further: Sequence[Path] = (),
    notes: Sequence[str] = (),
    progress: Progress = silent,
    scale: float | None = None,
) -> Basis[FeatureNorm]:
    """`prepare` with references that are read already; the normal photographs in the files `further` calibrate too.

    ``scale``: the full scale of gray photographs with more than 8 bits. Copies of a photograph are left out.
    """
    # A blank reference would match whatever is calm, and calibrate with a score beyond all others.
    references = readable(without_blank(references, max(photo.contrast for photo in references)))
    known: dict[str, str] = {}
    references, copies = without_copies(references, known)
    preprocess, pool = extractor.preprocess, len(references)
    images_K = torch.stack([photo.pixels for photo in references]).to(device)
    progress("fitting the references", 0, pool)
    detector = _detector(extractor, options, pool).fit(images_K.split(options.batch_size))
    scores_K, maps_KSS = np.empty(0), []
    if pool >= 2:
        prediction = detector.leave_one_out(images_K)
        scores_K, maps_KSS = as_numpy(prediction.scores), [as_numpy(prediction.maps)]
    progress("fitting the references", pool, pool)

    contrast = statistics.median(photo.contrast for photo in references)
    found = score_normals(detector, further, preprocess, device, contrast, options.batch_size, progress, known, scale)
    brightest = [photo.brightest for photo in references] + found.brightest
    warnings = [*copied(copies, "references"), *notes, *found.notes("calibration"), *dark(brightest)]
    appearance = Normals([photo.appearance for photo in references])

    calibration = None
    if len(scores_K) or len(found.scores):
        unlike = appearance.leave_one_out(), appearance.unlike(found.appearance).values
        calibration = calibrate(scores_K, options.false_alarm_rate, found.scores, unlike)
    threshold = options.threshold
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    normal_maps = [*maps_KSS, *found.maps]
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
        appearance=appearance,
        full_scale=scale,
        known=known,
        description=_describe(extractor, detector, options),
        score=f"the mean of the heatmap's highest {percent(detector.config.top)}",
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
    if options.references != ALIGNED or pool <= options.shots:
        return FeatureNorm(extractor)
    return AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(shots=options.shots))


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


def _describe(extractor: ADExtractor, detector: FeatureNorm, options: Options) -> str:
    features = "projected residuals" if extractor.projector is not None else "raw residuals, no projector"
    if isinstance(detector, AlignedFeatureNorm):
        shots = detector.config.shots
        return f"{extractor.backbone.name}, {features}, the {shots} best aligned references for every image"
    return f"{extractor.backbone.name}, {features}, references chosen: {options.references}"

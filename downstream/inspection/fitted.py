"""The `Basis` of a detector that is fitted already: normal photographs that it has not seen calibrate it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from adpretrain.preprocess import Preprocess
from downstream.appearance import Normals
from downstream.calibration import calibrate
from downstream.detector import Detector
from downstream.detectors import detector_from_pretrained
from downstream.inspection.basis import DEFAULTS, Basis, Options, promise, unseen
from downstream.inspection.finding import find_images, printable
from downstream.inspection.normals import SCALE_SAMPLE, Progress, score_normals, silent
from downstream.inspection.photos import Photo, Unreadable, dark, full_scale, read_batches
from downstream.saved import member, part, read_detector_config
from downstream.visualise import ColourScale

SEEN = (
    "The promise holds only if the detector was not fitted on these normal photographs: those it knows score lower. "
    "(It was saved by a version that did not remember its photographs.)"
)


def prepare_fitted(
    folder: Path,
    device: torch.device,
    normal: Path,
    extra: Path | None = None,
    options: Options = DEFAULTS,
    exclude: Path | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Basis[Detector]:
    """Load the detector in ``folder``; all photographs in ``normal`` and ``extra`` calibrate (split conformal), but for
    those that it was fitted on.

    Raises ValueError if the folder holds no detector, or one whose photographs' preparation is unknown, or none of the
    normal photographs can be read, or it was fitted on all of them. Nothing below ``exclude`` is read.
    """
    paths = _distinct([*find_images(normal, exclude), *(find_images(extra, exclude) if extra else [])])
    preprocess = preprocess_of(folder)
    detector = detector_from_pretrained(folder, device=device, weights=weights)
    fitted = read_detector_config(folder)
    known = dict.fromkeys(fitted.photographs, "one that the detector was fitted on")
    scale = fitted.full_scale if known else full_scale(paths)
    sample = _sample(paths, preprocess, options.batch_size, scale)
    contrast = statistics.median(photo.contrast for photo in sample)
    found = score_normals(detector, paths, preprocess, device, contrast, options.batch_size, progress, known, scale)
    if not len(found.scores) and found.copies:
        raise ValueError(
            f"the detector was fitted on all {len(found.copies)} normal photographs, which can say nothing about new "
            "ones: give photographs as --normal that it was not fitted on"
        )
    appearance = Normals(found.appearance)
    unlike = appearance.leave_one_out()  # empty if there is one normal photograph only
    calibration = calibrate((), options.false_alarm_rate, found.scores, ((), unlike) if len(unlike) else None)
    threshold = calibration.threshold if options.threshold is None else options.threshold
    remembers = options.threshold is not None or bool(fitted.photographs)
    return Basis(
        detector=detector,
        preprocess=preprocess,
        device=device,
        calibration=calibration,
        threshold=threshold,
        # Not the threshold: image scores need not be in the maps' unit.
        scale=ColourScale.from_normal_maps(np.concatenate(found.maps)),
        references=0,
        aspects=tuple(photo.aspect for photo in sample),
        contrast=contrast,
        appearance=appearance,
        full_scale=scale,
        known=known,
        description=_describe(folder),
        score="the detector's, in its own unit",
        promise=(*promise(calibration, options), *([] if remembers else [SEEN])),
        notes=(*found.notes("normal"), *dark(found.brightest), *unseen(preprocess)),
    )


def preprocess_of(folder: Path) -> Preprocess:
    """How photographs become the images of a saved detector. Raises ValueError if its folder does not say."""
    config = read_detector_config(folder)
    if config.extract == "members":
        return preprocess_of(part(folder, member(0)))
    found = config.images or config.preprocess
    if found is None:
        raise ValueError(
            f"{printable(folder)} was fitted on features that a program made: how photographs are prepared for them is "
            "not known; use it in Python (downstream.detectors.detector_from_pretrained)"
        )
    return found


def _distinct(paths: Sequence[Path]) -> list[Path]:
    return sorted({path.resolve(): path for path in paths}.values())


def _sample(paths: Sequence[Path], preprocess: Preprocess, batch_size: int, scale: float | None) -> list[Photo]:
    """Evenly spaced ones of the photographs that can be read."""
    some = paths[:: -(-len(paths) // SCALE_SAMPLE)]
    read = [item for batch in read_batches(some, preprocess, batch_size, scale) for item in batch]
    photos = [item for item in read if isinstance(item, Photo)]
    if not any(photo.contrast for photo in photos):
        reasons = [item.reason for item in read if isinstance(item, Unreadable)]
        raise ValueError(f"no normal photograph can be used: {reasons[0] if reasons else 'all of them are blank'}")
    return photos


def _describe(folder: Path) -> str:
    config = read_detector_config(folder)
    network = f" on {config.backbone.name}" if config.backbone else ""
    return f"{config.detector}{network}, fitted before"

"""How an `Inspector` is set up: from a folder of normal photographs, from photographs that were read, or from a
detector that was fitted before.

FeatureNorm is fitted on the references, and each of them is scored against the others (leave-one-out). Further normal
photographs are scored in the same way as new ones.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.progress import Progress
from downstream.calibration import percent
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.tiled import Tiled, TiledConfig
from downstream.inspection import DEFAULTS, Options
from downstream.inspection.inspector import FITTED, Inspector
from downstream.inspection.normals import (
    choose_references,
    copies_note,
    dark_note,
    fit_references,
    read_all,
    readable,
    score_normals,
)
from downstream.inspection.photos import (
    Photo,
    PhotoReader,
    Unreadable,
    find_images,
    printable,
    without_blank,
    without_copies,
)
from downstream.roi import RoiFiles
from downstream.terminal import no_progress

WHERE = {"local": "the same place", "global": "all places"}
DEFAULT_TOP = FeatureNormConfig().top
SAMPLE = 64  # photographs whose contrast is looked at before others are scored
PERHAPS_FITTED = (
    "The false-alarm rate holds only if the detector was not fitted on these normal photographs, which would score "
    "lower. (It was saved by a version that did not remember its photographs.)"
)


def inspector_from_folder(
    extractor: ADExtractor,
    device: torch.device,
    normal: Path,
    extra: Path | None = None,
    options: Options = DEFAULTS,
    exclude: Path | None = None,
    progress: Progress = no_progress,
) -> Inspector:
    """Fit on the references chosen in `normal`; calibrate on all photographs in `normal` and `extra`.

    An unreadable reference raises ValueError, because every score depends on it; an unreadable photograph that only
    calibrates is left out with a warning. Nothing below `exclude` (the output folder) is read.
    """
    normals = find_images(normal, exclude)
    more = find_images(extra, exclude) if extra else []
    tiled = bool(options.tiling.tile)
    roi = RoiFiles(Path(options.roi) if options.roi else None, options.ignore_border)
    reader = PhotoReader.of_camera([*normals, *more], extractor.preprocess, options.batch_size, tiled, roi)
    chosen = choose_references(normals, extractor, options, reader, progress)
    used = {path.resolve() for path in chosen}
    further = {path.resolve(): path for path in (*normals, *more) if path.resolve() not in used}
    notes = []
    if overlap := sum(path.resolve() in used for path in more):
        notes = [f"{overlap} calibration photograph(s) are references too and were left out: they would score too low."]
    references = read_all(chosen, reader)
    return inspector_from_photos(
        extractor, device, references, options, sorted(further.values()), notes, progress, reader
    )


def inspector_from_photos(
    extractor: ADExtractor,
    device: torch.device,
    references: Sequence[Photo],
    options: Options = DEFAULTS,
    further: Sequence[Path] = (),
    notes: Sequence[str] = (),
    progress: Progress = no_progress,
    reader: PhotoReader | None = None,
) -> Inspector:
    """Like `inspector_from_folder`, with references already read; the photographs in the files `further` calibrate too.

    ``reader`` reads those and new photographs; by default all have 8 bits. Copies of a photograph are left out.
    """
    reader = reader or PhotoReader(extractor.preprocess, options.batch_size)
    # A blank reference would match anything uniform, and its own score, above all others, would calibrate.
    references = readable(without_blank(references, max(photo.contrast for photo in references)))
    known: dict[str, str] = {}
    references, copies = without_copies(references, known)
    pool = len(references)
    progress("fitting the references", 0, pool)
    detector = _detector(extractor, options, pool)
    normals = fit_references(detector, references, device, options)
    progress("fitting the references", pool, pool)
    contrast = statistics.median(photo.contrast for photo in references)
    found = score_normals(detector, further, reader, device, contrast, progress, known, options.least_area)
    normals += found.normals
    notes = [*copies_note(copies, "references"), *notes, *found.notes("calibration"), *dark_note(normals)]
    return Inspector(
        detector=detector,
        reader=reader,
        device=device,
        options=options,
        normals=tuple(normals),
        description=_describe(extractor, detector, options),
        score_is=_score_is(detector),
        notes=(*notes, *_crop_note(reader.preprocess)),
    )


def inspector_from_detector(
    folder: Path,
    device: torch.device,
    normal: Path,
    extra: Path | None = None,
    options: Options = DEFAULTS,
    exclude: Path | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Inspector:
    """Load the fitted detector in ``folder`` and calibrate it on the photographs in ``normal`` and ``extra`` that
    it was not fitted on (split conformal).

    Raises ValueError if the folder holds no detector or does not say how photographs are prepared for it, if no
    normal photograph can be read, or if it was fitted on all of them. Nothing below ``exclude`` is read.
    """
    from downstream.detectors import detector_from_pretrained
    from downstream.saved import read_detector_config

    every = [*find_images(normal, exclude), *(find_images(extra, exclude) if extra else [])]
    paths = sorted({path.resolve(): path for path in every}.values())
    preprocess = preprocess_of(folder)
    detector = detector_from_pretrained(folder, device=device, weights=weights)
    fitted = read_detector_config(folder)
    roi = RoiFiles(Path(options.roi) if options.roi else None, options.ignore_border)
    reader = PhotoReader.of_camera(paths, preprocess, options.batch_size, isinstance(detector, Tiled), roi)
    if fitted.photographs:
        reader = dataclasses.replace(reader, full_scale=fitted.full_scale)
    known = dict.fromkeys(fitted.photographs, FITTED)
    contrast = statistics.median(photo.contrast for photo in _sample(paths, reader))
    found = score_normals(detector, paths, reader, device, contrast, progress, known, options.least_area)
    if not found.normals and found.copies:
        raise ValueError(
            f"the detector was fitted on all {len(found.copies)} normal photographs, so that they cannot calibrate "
            "it: give photographs as --normal that it was not fitted on"
        )
    if not found.normals:
        raise ValueError(f"no normal photograph can be used: {found.unreadable[0].reason}")
    doubt = [PERHAPS_FITTED] if options.threshold is None and not fitted.photographs else []
    network = f" on {fitted.backbone.name}" if fitted.backbone else ""
    return Inspector(
        detector=detector,
        reader=reader,
        device=device,
        options=options,
        normals=tuple(found.normals),
        description=f"{fitted.detector}{network}, fitted before",
        score_is="the score of the detector, in its own unit",
        notes=(*doubt, *found.notes("normal"), *dark_note(found.normals), *_crop_note(reader.preprocess)),
        fitted_on=frozenset(fitted.photographs),
    )


def preprocess_of(folder: Path) -> Preprocess:
    """Return the preprocessing of a saved detector. Raises ValueError if its folder does not say."""
    from downstream.saved import member, part, read_detector_config

    config = read_detector_config(folder)
    if config.extract == "members":
        return preprocess_of(part(folder, member(0)))
    found = config.images or config.preprocess
    if found is None:
        raise ValueError(
            f"{printable(folder)} was fitted on features of another program, so that it is not known how to prepare "
            "photographs for it; use it in Python (downstream.detectors.detector_from_pretrained)"
        )
    return found


def _sample(paths: Sequence[Path], reader: PhotoReader) -> list[Photo]:
    """Read an evenly spaced sample of the photographs; those that cannot be read are left out."""
    some = paths[:: -(-len(paths) // SAMPLE)]
    read = [item for batch in reader.batches(some) for item in batch]
    photos = [item for item in read if isinstance(item, Photo)]
    if not any(photo.contrast for photo in photos):
        reasons = [item.reason for item in read if isinstance(item, Unreadable)]
        raise ValueError(f"no normal photograph can be used: {reasons[0] if reasons else 'all of them are blank'}")
    return photos


def _crop_note(preprocess: Preprocess) -> list[str]:
    if preprocess.crop_from is None:
        return []
    return [f"Every photograph is {preprocess.in_words}: what lies outside the crop is not inspected."]


def _detector(extractor: ADExtractor, options: Options, pool: int) -> FeatureNorm | Tiled:
    """The detector to fit on ``pool`` references."""
    if options.tiling.tile:
        return Tiled(extractor, TiledConfig(options.tiling))
    if options.references != "aligned" or pool <= options.shots:
        return FeatureNorm(extractor)
    from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig

    # Leave-one-out must use as many references as a new image has, or one fewer if there are not enough.
    return AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(shots=options.shots))


def _score_is(detector: FeatureNorm | Tiled) -> str:
    if isinstance(detector, Tiled):
        return f"the highest of its tiles', which is the mean of a tile's highest {percent(DEFAULT_TOP)} of map values"
    return f"the mean of the heatmap's highest {percent(detector.config.top)}"


def _describe(extractor: ADExtractor, detector: FeatureNorm | Tiled, options: Options) -> str:
    features = "projected residuals" if extractor.projector is not None else "raw residuals, no projector"
    chosen = f"references chosen: {options.references}"
    if detector.references_are == "chosen":
        chosen = f"the {options.shots} best aligned references for every image"
    if isinstance(detector, Tiled):
        tiling = detector.tiling
        chosen += f", tiles of {tiling.tile} px compared with {WHERE[tiling.positions]}"
    return f"{extractor.backbone.name}, {features}, {chosen}"

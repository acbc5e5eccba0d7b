"""`fit_folder` fits a detector, given by its name and options, on a folder of normal photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.extractor import ADExtractor
from adpretrain.files import check_writable
from adpretrain.photographs import picture_size
from adpretrain.progress import Progress
from adpretrain.saved import refuse_others
from downstream.detector import Detector
from downstream.detectors import build_detector, find_detector
from downstream.detectors.tiled import Tiled
from downstream.inspection import WHOLE, Options
from downstream.inspection.normals import NormalBatches, choose_references, set_references
from downstream.inspection.photos import PhotoReader, file_and_page, find_images
from downstream.learning import HERE, Workplace
from downstream.roi import EVERYWHERE, RoiFiles
from downstream.saved import EXTRACTOR, member, remember_photographs
from downstream.terminal import no_progress
from downstream.tiles import Tiling


@dataclass(frozen=True)
class Fitted:
    """The folder of a saved detector, and how many images and references it was fitted with."""

    folder: Path
    images: int
    references: int


def fit_folder(
    name: str,
    model: Backbone | ADExtractor,
    normal: Path,
    out: Path,
    settings: Mapping[str, Any],
    shots: int = 8,
    batch_size: int = 16,
    device: torch.device | None = None,
    progress: Progress = no_progress,
    tiling: Tiling = WHOLE,
    roi: RoiFiles = EVERYWHERE,
    workplace: Workplace = HERE,
) -> Fitted:
    """Fit on the photographs in ``normal`` and save to ``out``, which then HOLDS FEATURES OF THE PRODUCT.

    An extractor takes ``shots`` of the photographs, evenly spaced by name, as its references; the detector is fitted
    on the others, because the residuals of a reference to itself are zero (FeatureNorm is fitted on references alone).

    ``tiling``: the detector is fitted on tiles of the photographs. ``roi``: what is inspected, one mask for all.
    ``workplace``: where a detector that trains a network does so; its checkpoint is deleted when the detector is saved.
    Of several processes, all fit and the first saves.

    The digests of the photographs and their full scale are saved with the detector.

    Raises ValueError if a photograph is unreadable, if there are too few, or for wrong settings.
    """
    device = device or torch.device("cpu")
    detector = _detector(name, model, settings, tiling)
    detector.workplace = workplace
    own = [EXTRACTOR] if isinstance(model, ADExtractor) else []
    refuse_others(out, "detector", [member(number) for number in range(len(detector.members))] or own)
    check_writable(out)  # checked before the fitting, which may take hours
    paths = find_images(normal, exclude=out)
    reader = PhotoReader.of_camera(paths, model.preprocess, batch_size, bool(tiling.tile))
    inside = _inside(paths[0], reader, roi)
    takes, chosen = _references(name, model, paths, shots, reader)
    rest = [path for path in paths if path not in chosen] if takes != "fitted" else []
    if takes == "none" and detector.fitted:  # a raw backbone's FeatureNorm needs no photographs
        rest = []
    normals = NormalBatches(rest, reader, device, progress, "normal photographs")
    references = NormalBatches(chosen, reader, device, progress, "references")
    if takes == "fitted":
        detector.fit(references, roi=inside)
    elif isinstance(detector, Tiled):
        detector.fit(normals, progress, inside, references if chosen else None)
    elif rest:
        if isinstance(model, ADExtractor) and chosen:
            set_references(model, references)
        detector.fit(normals, progress, roi=inside)
    if workplace.rank == 0:
        remember_photographs(detector.save_pretrained(out), normals.digests | references.digests, reader.full_scale)
        if workplace.checkpoint is not None:
            workplace.checkpoint.unlink(missing_ok=True)
    return Fitted(out, len(rest), len(chosen))


def _references(
    name: str, model: Backbone | ADExtractor, paths: Sequence[Path], shots: int, reader: PhotoReader
) -> tuple[str, list[Path]]:
    """What a detector takes references for (`Detector.references_are`), and the photographs that become them."""
    if not isinstance(model, ADExtractor):
        return "none", []
    takes = find_detector(name).load().references_are
    if takes == "given" and len(paths) <= shots:
        raise ValueError(
            f"{len(paths)} normal photographs, up to {shots} of which become references: none is left to fit "
            f"{name} on; give more, or lower --shots"
        )
    chosen = choose_references(paths, model, Options(shots=shots), reader) if takes in ("given", "fitted") else []
    return takes, list(chosen)


def _detector(name: str, model: Backbone | ADExtractor, settings: Mapping[str, Any], tiling: Tiling) -> Detector:
    """The unfitted detector, on the tiles of photographs if they are cut into some."""
    detector = build_detector(name, model, settings)  # finds wrong settings
    if not tiling.tile:
        return detector
    tiled = {"tiling": dataclasses.asdict(tiling), "detector": name, "options": dict(settings)}
    return build_detector("tiled", model, tiled)


def _inside(path: Path, reader: PhotoReader, roi: RoiFiles) -> Tensor | None:
    """The region of interest of all photographs: bool [S, S], or [H, W] of the whole photograph for tiles."""
    if roi == EVERYWHERE:
        return None
    if roi.mask is not None and roi.mask.is_dir():
        raise ValueError(f"{roi.mask} is a folder: a detector is fitted with one mask for all photographs")
    mask = roi.of(path, picture_size(file_and_page(path)[0]))
    assert mask is not None
    return torch.from_numpy(np.asarray(mask) > 0) if reader.tiled else reader.preprocess.mask(mask)

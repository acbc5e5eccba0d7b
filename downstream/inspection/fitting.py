"""`fit_folder` fits a detector, given by its name and options, on a folder of normal photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adpretrain.backbones import Backbone
from adpretrain.extractor import ADExtractor
from adpretrain.files import check_writable
from adpretrain.progress import Progress
from adpretrain.saved import refuse_others
from downstream.detectors import build_detector
from downstream.inspection.normals import NormalBatches, set_references
from downstream.inspection.photos import Photo, PhotoReader, find_images
from downstream.saved import EXTRACTOR, member, remember_photographs
from downstream.terminal import no_progress


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
) -> Fitted:
    """Fit on the photographs in ``normal`` and save to ``out``, which then HOLDS FEATURES OF THE PRODUCT.

    An extractor takes ``shots`` of the photographs, evenly spaced by name, as its references; the detector is fitted
    on the others, because the residuals of a reference to itself are zero (FeatureNorm is fitted on references alone).

    The digests of the photographs and their full scale are saved with the detector.

    Raises ValueError if a photograph is unreadable, if there are too few, or for wrong settings.
    """
    device = device or torch.device("cpu")
    detector = build_detector(name, model, settings)
    own = [EXTRACTOR] if isinstance(model, ADExtractor) else []
    refuse_others(out, "detector", [member(number) for number in range(len(detector.members))] or own)
    check_writable(out)  # checked before the fitting, which may take hours
    paths = find_images(normal, exclude=out)
    references: list[Photo] = []
    reader = PhotoReader.of_camera(paths, model.preprocess, batch_size)
    if isinstance(model, ADExtractor) and detector.references_are != "chosen":
        if detector.references_are == "given" and len(paths) <= shots:
            raise ValueError(
                f"{len(paths)} normal photographs, up to {shots} of which become references: none is left to fit "
                f"{name} on; give more, or lower --shots"
            )
        references = set_references(model, paths, shots, reader)
    taken = {photo.path for photo in references}
    rest = [path for path in paths if path not in taken and detector.references_are != "fitted"]
    normals = NormalBatches(rest, reader, device, progress, "normal photographs")
    if rest:
        detector.fit(normals)
    folder = detector.save_pretrained(out)
    remember_photographs(folder, normals.digests.union(photo.digest for photo in references), reader.full_scale)
    return Fitted(folder, len(rest), len(references))

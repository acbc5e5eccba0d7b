"""`fit_folder`: a detector fitted on a folder of normal photographs, from its name and options in text.

Shapes: b images of a batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.extractor import ADExtractor
from adpretrain.files import check_writable
from adpretrain.preprocess import Preprocess
from adpretrain.saved import refuse_others
from downstream.detectors import build_detector
from downstream.inspection.extraction import set_references
from downstream.inspection.finding import find_images
from downstream.inspection.normals import Progress, silent
from downstream.inspection.photos import Photo, Unreadable, full_scale, read_batches
from downstream.saved import EXTRACTOR, member, remember_photographs


@dataclass(frozen=True)
class Fitted:
    """Where a fitted detector was saved, on how many images it was fitted, with how many references."""

    folder: Path
    images: int
    references: int


class NormalBatches:
    """The photographs of ``paths`` as batches [b, 3, S, S], read anew at every iteration, one batch ahead.

    Raises ValueError for an unreadable photograph: every score would depend on it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocess: Preprocess,
        batch_size: int,
        device: torch.device,
        progress: Progress = silent,
        scale: float | None = None,
    ) -> None:
        self.paths, self.preprocess, self.batch_size = paths, preprocess, batch_size
        self.device, self.progress, self.scale = device, progress, scale
        self.digests = set[str]()  # of the photographs that were read

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for batch in read_batches(self.paths, self.preprocess, self.batch_size, self.scale):
            pixels = []
            for photo in batch:
                if isinstance(photo, Unreadable):
                    raise ValueError(f"every score depends on the normal photographs, and one is bad: {photo.reason}")
                pixels.append(photo.pixels)
                self.digests.add(photo.digest)
            yield torch.stack(pixels).to(self.device)
            done += len(batch)
            self.progress("normal photographs", done, len(self.paths))


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """["embedding.patch=1", "amount=0.01"] -> nested keys and values, read as YAML. ValueError for another form."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"setting {pair!r} must be key=value, such as embedding.target_dim=100")
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"setting {pair!r}: {parent} already has a value")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"setting {pair!r}: {error}") from error
    return settings


def fit_folder(
    name: str,
    model: Backbone | ADExtractor,
    normal: Path,
    out: Path,
    settings: Mapping[str, Any],
    shots: int = 8,
    batch_size: int = 16,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Fit on the photographs in ``normal`` and save to ``out``, which then HOLDS FEATURES OF THE PRODUCT.

    An extractor takes ``shots`` of the photographs, evenly spaced by name, as its references; the detector is fitted
    on the others, as the residuals of a reference to itself are zero (FeatureNorm has nothing else to fit).

    The folder also remembers the digests of the photographs and their full scale.

    Raises ValueError for unreadable photographs, too few of them, or wrong settings.
    """
    device = device or torch.device("cpu")
    detector = build_detector(name, model, settings)
    own = [EXTRACTOR] if isinstance(model, ADExtractor) else []
    refuse_others(out, "detector", [member(number) for number in range(len(detector.members))] or own)
    check_writable(out)  # before the fitting, which may take hours
    paths = find_images(normal, exclude=out)
    references: list[Photo] = []
    scale = full_scale(paths)
    if isinstance(model, ADExtractor) and detector.references_are != "chosen":
        if detector.references_are == "given" and len(paths) <= shots:
            raise ValueError(
                f"{len(paths)} normal photographs, of which {shots} are references: none is left to fit {name} on; "
                "give more, or lower --shots"
            )
        references = set_references(model, normal, shots, batch_size, out, scale)
    taken = {photo.path for photo in references}
    rest = [path for path in paths if path not in taken and detector.references_are != "fitted"]
    normals = NormalBatches(rest, model.preprocess, batch_size, device, progress, scale)
    if rest:
        detector.fit(normals)
    folder = detector.save_pretrained(out)
    remember_photographs(folder, normals.digests.union(photo.digest for photo in references), scale)
    return Fitted(folder, len(rest), len(references))

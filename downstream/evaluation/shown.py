"""Which scored images are shown, and their maps: chosen before anything is scored, the same for every detector.

Shapes: b images of a batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adpretrain.data import Sample
from adpretrain.data.samples import load_mask
from adpretrain.photographs import read_image
from adpretrain.preprocess import Preprocess
from downstream.visualise import ColourScale, marked, overlay, save_png, shown_region

STEP, NORMALS = 4, 64  # normal maps the colour scale comes from: every 4th pixel of at most so many
WIDTH = 256  # longest side of a picture


def choose_shown(samples: Sequence[Sample], number: int) -> list[int]:
    """Positions of the images to show: of each of the first ``number`` kinds of defect the middle one by file name."""
    kinds = sorted({sample.defect for sample in samples if sample.anomalous})[:number]
    chosen = []
    for kind in kinds:
        of_kind = sorted(
            (position for position, sample in enumerate(samples) if sample.defect == kind),
            key=lambda position: str(samples[position].image),
        )
        chosen.append(of_kind[len(of_kind) // 2])
    return chosen


class Shown:
    """Collects the maps of the chosen images, and the normal images' values for the colour scale."""

    def __init__(self, chosen: Sequence[int]) -> None:
        self.maps: dict[int, NDArray[np.float32]] = {}
        self._chosen = set(chosen)
        self._normal: list[NDArray[np.float32]] = []

    def add(self, start: int, maps: NDArray[np.float32], labels: NDArray[np.bool_]) -> None:
        """A batch of maps [b, S, S] whose first image has number ``start``; labels [b]."""
        for row, (found, anomalous) in enumerate(zip(maps, labels, strict=True)):
            if start + row in self._chosen:
                self.maps[start + row] = found
            if not anomalous and len(self._normal) < NORMALS:
                self._normal.append(found[::STEP, ::STEP])

    def save(self, folder: Path, name: str, samples: Sequence[Sample], preprocess: Preprocess) -> list[dict[str, str]]:
        """Write <number>-photograph.png, <number>-truth.png and <number>-<name>.png; returns what they show.

        The colours' middle is the highest value in any normal image that was scored: for looking only.
        """
        if not self.maps or not self._normal:
            return []
        scale = ColourScale.from_normal_maps(np.stack(self._normal))
        out = []
        for position, found in sorted(self.maps.items()):
            sample = samples[position]
            photo = read_image(sample.image)
            picture = shown_region(photo, preprocess, WIDTH)
            save_png(picture, folder / f"{position}-photograph.png")
            mask = load_mask(sample, photo.size, preprocess).numpy()
            save_png(marked(picture, mask), folder / f"{position}-truth.png")
            save_png(overlay(picture, found, scale), folder / f"{position}-{name}.png")
            out.append({"defect": sample.defect, "image": sample.image.name, "number": str(position), "map": name})
        return out

"""Pictures of what an extractor sees: a typical image of every kind of defect, never the best one.

The colour scale is that of `adpretrain score`: its middle is the references' highest leave-one-out value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch

from adpretrain.data import Sample
from adpretrain.extractor import ADExtractor
from adpretrain.photographs import read_image
from downstream.detector import Prediction
from downstream.detectors.featurenorm import FeatureNorm
from downstream.evaluation.few_shot import FeatureSet
from downstream.visualise import ColourScale, panel, save_png, shown_region


def file_name(*parts: str | None) -> str:
    """A name for a file or folder that no other parts have: %XX for what is no letter or digit, joined by "@", parts
    that are missing left out."""
    name = "@".join(quote(part, safe="") for part in parts if part)
    return name.replace(".", "%2E") if name in (".", "..") else name


def product_folder(sample: Sample) -> str:
    """The name of the folder of the product that a sample shows: its category and, if it has several, its view."""
    return file_name(sample.category, sample.view)


def save_panels(
    folder: Path,
    extractor: ADExtractor,
    images: FeatureSet,
    references: Sequence[int],
    queries: Sequence[int],
    prediction: Prediction,
    kinds: int | None = None,
) -> None:
    """Photograph, heatmap and ground truth of the median-scored image of every kind of defect, or of the first
    ``kinds``: ``folder``/{defect}.png.
    """
    photos = [read_image(images.samples[index].image) for index in references]
    normal = FeatureNorm(extractor).leave_one_out(
        torch.stack([extractor.preprocess(photo) for photo in photos]).to(prediction.maps.device)
    )
    scale = ColourScale.from_normal_maps(normal.maps.cpu().numpy())
    for kind in sorted({images.samples[query].defect for query in queries} - {"good"})[:kinds]:
        positions = [p for p, query in enumerate(queries) if images.samples[query].defect == kind]
        positions.sort(key=lambda position: float(prediction.scores[position]))
        median = positions[len(positions) // 2]
        sample = images.samples[queries[median]]
        photo = shown_region(read_image(sample.image), extractor.preprocess)
        mask = images.masks[queries[median]].cpu().numpy()
        title = f"{kind}: {sample.image.name}, score {float(prediction.scores[median]):.2f}"
        save_png(
            panel(photo, prediction.maps[median].cpu().numpy(), scale, mask, title), folder / f"{file_name(kind)}.png"
        )

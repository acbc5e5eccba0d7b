"""Pictures of an evaluation: maps of photographs chosen before anything is scored, the median-scored image of every
kind of defect, and patch features in two dimensions. No metric depends on them.

Shapes: b images of a batch, S side in pixels, C channels, H x W tokens, n sampled patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.backbones import Extract
from adpretrain.data import Sample
from adpretrain.data.samples import load_mask
from adpretrain.preprocess import Preprocess
from downstream.visualise import ColourScale, marked, overlay, panel, save_png, shown_region

STEP, NORMALS = 4, 64  # the colour scale is fixed by every 4th pixel, in both directions, of up to 64 normal maps
WIDTH = 256  # longest side of a picture
MARKED = 0.25  # a patch is defective if at least this share of its pixels is marked
PERPLEXITY = 30.0

Scored = tuple[Sample, float, NDArray[np.float32], NDArray[np.bool_]]  # an image, its score, map and mask [S, S]


def choose_shown(samples: Sequence[Sample], number: int) -> list[int]:
    """Return positions of the images to show: the middle one, by file name, of the first ``number`` kinds of defect."""
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
    """Collects the maps of the chosen images, which are the same for every detector, and values of normal images for
    the colour scale. ``typical`` holds the median-scored image of every kind of defect, if these are to be drawn."""

    def __init__(self, chosen: Sequence[int]) -> None:
        self.maps: dict[int, NDArray[np.float32]] = {}
        self.typical: Sequence[Scored] = ()
        self._chosen = set(chosen)
        self._normal: list[NDArray[np.float32]] = []

    def add(self, start: int, maps: NDArray[np.float32], labels: NDArray[np.bool_]) -> None:
        """Add a batch of maps [b, S, S] with labels [b]; the first image has position ``start``."""
        for row, (found, anomalous) in enumerate(zip(maps, labels, strict=True)):
            if start + row in self._chosen:
                self.maps[start + row] = found
            if not anomalous and len(self._normal) < NORMALS:
                self._normal.append(found[::STEP, ::STEP])

    def save(self, folder: Path, name: str, samples: Sequence[Sample], preprocess: Preprocess) -> list[dict[str, str]]:
        """Write <number>-photograph.png, <number>-truth.png and <number>-<name>.png, and return what they show; write
        panels of the typical images to the subfolder ``name``.

        The middle of the colour scale is the highest value in any normal image that was scored; no metric uses it.
        """
        if not self._normal:
            return []
        scale = ColourScale.from_normal_maps(np.stack(self._normal))
        save_panels(folder / name, self.typical, scale, preprocess)
        out = []
        for position, found in sorted(self.maps.items()):
            sample = samples[position]
            photo = sample.read()
            picture = shown_region(photo, preprocess, WIDTH)
            save_png(picture, folder / f"{position}-photograph.png")
            mask = load_mask(sample, photo.size, preprocess).numpy()
            save_png(marked(picture, mask), folder / f"{position}-truth.png")
            save_png(overlay(picture, found, scale), folder / f"{position}-{name}.png")
            out.append({"defect": sample.defect, "image": sample.image.name, "number": str(position), "map": name})
        return out


def median_images(
    samples: Sequence[Sample], scores: NDArray[Any], maps: NDArray[np.float32], masks: NDArray[np.bool_]
) -> list[Scored]:
    """Return the median-scored image of every kind of defect; scores [n], maps and masks [n, S, S] of n samples."""
    out = []
    for kind in sorted({sample.defect for sample in samples if sample.anomalous}):
        positions = [position for position, sample in enumerate(samples) if sample.defect == kind]
        positions.sort(key=lambda position: float(scores[position]))
        place = positions[len(positions) // 2]
        out.append((samples[place], float(scores[place]), maps[place], masks[place]))
    return out


def save_panels(folder: Path, found: Sequence[Scored], scale: ColourScale, preprocess: Preprocess) -> None:
    """Save a panel of photograph, heatmap and ground truth for each image, as ``folder``/{defect}.png."""
    for sample, score, map_SS, mask_SS in found:
        photo = shown_region(sample.read(), preprocess)
        title = f"{sample.defect}: {sample.image.name}, score {score:.2f}"
        save_png(panel(photo, map_SS, scale, mask_SS, title), folder / f"{file_name(sample.defect)}.png")


def file_name(*parts: str | None) -> str:
    """Join parts to a unique name of a file or folder: special characters become %XX, parts are joined by "@", and
    empty ones are left out."""
    name = "@".join(quote(part, safe="") for part in parts if part)
    return name.replace(".", "%2E") if name in (".", "..") else name


def sampled_patches(
    extract: Extract, batches: Iterable[tuple[Tensor, NDArray[np.bool_]]], number: int = 400, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Sample up to ``number`` normal and ``number`` defective patches of the last level: features [n, C], defective
    [n]. ``batches`` yields images [b, 3, S, S] with masks [b, S, S].

    The same seed and images give the same patches, whatever the features, so that pictures can be compared.
    """
    features, marks = [], []
    for images, masks in batches:
        with torch.no_grad():
            level = extract(images)[-1].float().cpu()
        grid = (int(level.shape[2]), int(level.shape[3]))
        share = F.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], grid)[:, 0]
        features.append(level.permute(0, 2, 3, 1).flatten(0, 2).numpy())
        marks.append(share.flatten().numpy())
    feature_NC, share_N = np.concatenate(features), np.concatenate(marks)
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(share_N == 0), np.flatnonzero(share_N >= MARKED)]
    chosen = [rng.permutation(group)[:number] for group in groups]
    rows = np.concatenate(chosen)
    return feature_NC[rows], np.repeat([False, True], [len(group) for group in chosen])


def in_two_dimensions(feature_NC: NDArray[np.float32], seed: int = 0) -> tuple[NDArray[np.float32], str]:
    """Reduce [n, C], n >= 5, to [n, 2] by UMAP if umap-learn is installed, else by t-SNE; also return the name."""
    if len(feature_NC) < 5:
        raise ValueError(f"{len(feature_NC)} patches are too few for a picture; at least 5 are needed")
    try:
        import umap
    except ImportError:
        from sklearn.manifold import TSNE

        perplexity = min(PERPLEXITY, (len(feature_NC) - 1) / 4)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(feature_NC), "t-SNE"
    return np.asarray(umap.UMAP(random_state=seed).fit_transform(feature_NC)), "UMAP"

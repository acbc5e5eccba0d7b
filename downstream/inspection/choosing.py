"""Which of the normal photographs become references, and which are left to calibrate the threshold.

Shapes: P photographs, K references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adpretrain.extractor import ADExtractor
from adpretrain.references import kmeans_references, random_references
from downstream.inspection.photos import Photo, Unreadable, read_batches

EVEN, RANDOM, KMEANS, ALIGNED = "even", "random", "kmeans", "aligned"
METHODS = (EVEN, RANDOM, KMEANS, ALIGNED)


def choose_references(
    method: str,
    paths: Sequence[Path],
    shots: int,
    seed: int,
    extractor: ADExtractor,
    batch_size: int,
    progress: Callable[[int], None],
    scale: float | None = None,
) -> list[Path]:
    """The references among the P normal photographs, in the order of ``paths``.

    "even": K evenly spaced in sorted order; "random": K drawn with ``seed``; "kmeans": K spread over the clusters of
    the last level's features; "aligned": all of them, because each image chooses its own K later. Fewer than K
    photographs are all used. ``scale``: as in `read_batches`. Raises ValueError for an unreadable photograph where it
    must be read to choose.
    """
    if method == ALIGNED or len(paths) <= shots:
        return list(paths)
    if method == EVEN:
        chosen = [index * len(paths) // shots for index in range(shots)]
    elif method == RANDOM:
        chosen = random_references(len(paths), shots, seed)
    else:
        chosen = kmeans_references(_last_level(paths, extractor, batch_size, progress, scale), shots, seed=seed)
    return [paths[index] for index in chosen]


def read_all(paths: Sequence[Path], extractor: ADExtractor, batch_size: int, scale: float | None = None) -> list[Photo]:
    """Every photograph. Raises ValueError for an unreadable one: every score would depend on it."""
    photos: list[Photo] = []
    for batch in read_batches(paths, extractor.preprocess, batch_size, scale):
        photos += readable(batch)
    return photos


def readable(batch: Sequence[Photo | Unreadable]) -> list[Photo]:
    """Normal photographs. Raises ValueError if one is unreadable."""
    for item in batch:
        if isinstance(item, Unreadable):
            raise ValueError(f"every score depends on the normal photographs, and one is bad: {item.reason}")
    return [item for item in batch if isinstance(item, Photo)]


def _last_level(
    paths: Sequence[Path],
    extractor: ADExtractor,
    batch_size: int,
    progress: Callable[[int], None],
    scale: float | None,
) -> Tensor:
    device = next(extractor.buffers()).device
    features: list[Tensor] = []
    for batch in read_batches(paths, extractor.preprocess, batch_size, scale):
        images = torch.stack([photo.pixels for photo in readable(batch)])
        with torch.no_grad():
            features += extractor.encode(images.to(device))[-1]
        progress(len(features))
    return torch.stack(features)

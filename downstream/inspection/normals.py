"""The normal photographs of a product: which become references, and the scores of the others, which calibrate.

Shapes: P photographs, K references, N normal photographs that are no references, B images of a batch, S = the network's
input side, F numbers of an appearance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.references import kmeans_references, random_references
from downstream.detector import Detector
from downstream.inspection import Options
from downstream.inspection.photos import Photo, Unreadable, find_images, read_batches, without_blank, without_copies
from downstream.terminal import Progress, no_progress

SCALE_SAMPLE = 64  # maps, at most, that fix the colour scale besides the references' own
DARK = 256 / 8  # of 256 values


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
        progress: Progress = no_progress,
        scale: float | None = None,
        purpose: str = "choosing references",
    ) -> None:
        self.paths, self.preprocess, self.batch_size, self.device = paths, preprocess, batch_size, device
        self.progress, self.scale, self.purpose = progress, scale, purpose
        self.digests = set[str]()  # of the photographs that were read

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for batch in read_batches(self.paths, self.preprocess, self.batch_size, self.scale):
            photos = readable(batch)
            self.digests.update(photo.digest for photo in photos)
            yield torch.stack([photo.pixels for photo in photos]).to(self.device)
            done += len(photos)
            self.progress(self.purpose, done, len(self.paths))


def readable(batch: Sequence[Photo | Unreadable]) -> list[Photo]:
    """Normal photographs. Raises ValueError if one is unreadable."""
    for item in batch:
        if isinstance(item, Unreadable):
            raise ValueError(f"every score depends on the normal photographs, and one is bad: {item.reason}")
    return [item for item in batch if isinstance(item, Photo)]


def read_all(paths: Sequence[Path], preprocess: Preprocess, batch_size: int, scale: float | None) -> list[Photo]:
    """Every photograph. Raises ValueError for an unreadable one: every score would depend on it."""
    return [photo for batch in read_batches(paths, preprocess, batch_size, scale) for photo in readable(batch)]


def choose_references(
    paths: Sequence[Path],
    extractor: ADExtractor,
    options: Options,
    scale: float | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """The references among the P normal photographs, in the order of ``paths``.

    ``options.references``: "even" = K evenly spaced in sorted order; "random" = K drawn with ``options.seed``; "kmeans"
    = K spread over the clusters of the last level's features; "aligned" = all of them, because each image chooses its
    own K later. Fewer than K photographs are all used. ``scale``: as in `read_batches`. Raises ValueError for an
    unreadable photograph where it must be read to choose.
    """
    count, shots = len(paths), options.shots
    if options.references == "aligned" or count <= shots:
        return list(paths)
    if options.references == "even":
        chosen = [index * count // shots for index in range(shots)]
    elif options.references == "random":
        chosen = random_references(count, shots, options.seed)
    else:
        device, features = next(extractor.buffers()).device, list[Tensor]()
        with torch.no_grad():
            for images in NormalBatches(paths, extractor.preprocess, options.batch_size, device, progress, scale):
                features += extractor.encode(images)[-1]
        chosen = kmeans_references(torch.stack(features), shots, seed=options.seed)
    return [paths[index] for index in chosen]


def set_references(
    extractor: ADExtractor, normal: Path, shots: int, batch_size: int, out: Path, scale: float | None
) -> list[Photo]:
    """Give an extractor the photographs in ``normal``, at most ``shots``, evenly spaced by name; returns them.

    They are encoded a batch at a time. ``scale``: as in `read_batches`. Raises ValueError for an unreadable one.
    """
    options = Options(shots=shots, batch_size=batch_size)
    chosen = choose_references(find_images(normal, exclude=out), extractor, options)
    photos = read_all(chosen, extractor.preprocess, batch_size, scale)
    pixels = torch.stack([photo.pixels for photo in photos])
    device = next(extractor.buffers()).device
    parts = [extractor.encode(part.to(device)) for part in pixels.split(batch_size)]
    extractor.set_references(extractor.bank_of([torch.cat(level) for level in zip(*parts, strict=True)]))
    return photos


@dataclass
class Calibrating:
    """Normal photographs that are not references, scored: N that can be used, and those left out."""

    scores: NDArray[np.float64]  # [N]
    appearance: list[NDArray[np.float64]] = field(default_factory=list)  # N of [F]
    brightest: list[int] = field(default_factory=list)
    maps: list[NDArray[np.float64]] = field(default_factory=list)  # of the first ones
    unreadable: list[Unreadable] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def notes(self, kind: str) -> list[str]:
        """What to say about those left out; ``kind`` is what they are called."""
        unread = f"{len(self.unreadable)} {kind} photograph(s) left out as unreadable, the first: "
        notes = [unread + item.reason for item in self.unreadable[:1]]
        return [*copies_note(self.copies, f"{kind} photographs"), *notes]


def score_normals(
    detector: Detector,
    paths: Sequence[Path],
    preprocess: Preprocess,
    device: torch.device,
    contrast: float,
    batch_size: int,
    progress: Progress,
    known: dict[str, str],
    scale: float | None,
) -> Calibrating:
    """Score normal photographs that are not references. Copies of one another, and of those whose digests are
    ``known``, are left out; the others join them there."""
    found, scores = Calibrating(np.empty(0)), [np.empty(0)]
    for number, read in enumerate(read_batches(paths, preprocess, batch_size, scale)):
        batch = without_blank(read, contrast)
        found.unreadable += [item for item in batch if isinstance(item, Unreadable)]
        photos, copies = without_copies([item for item in batch if isinstance(item, Photo)], known)
        found.copies += copies
        scores_B, maps_BSS = predict_photos(detector, photos, device)
        scores.append(scores_B)
        found.appearance += [photo.appearance for photo in photos]
        found.brightest += [photo.brightest for photo in photos]
        if len(maps_BSS) and number * batch_size < SCALE_SAMPLE:
            found.maps.append(maps_BSS)
        progress("calibrating", min((number + 1) * batch_size, len(paths)), len(paths))
    found.scores = np.concatenate(scores)
    return found


def predict_photos(
    detector: Detector, photos: Sequence[Photo], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores [B] and maps [B, S, S], both empty for an empty batch."""
    if not photos:
        return np.empty(0), np.empty((0, 0, 0))
    prediction = detector.predict(torch.stack([photo.pixels for photo in photos]).to(device))
    return as_numpy(prediction.scores), as_numpy(prediction.maps)


def as_numpy(values: Tensor) -> NDArray[np.float64]:
    """Float64 on the CPU."""
    return values.detach().double().cpu().numpy()


def copies_note(copies: Sequence[tuple[str, str]], among: str) -> list[str]:
    """Copies score each other near zero, which would make the threshold too low."""
    if not copies:
        return []
    copy, original = copies[0]
    return [
        f"{len(copies)} of the {among} are copies of other normal photographs, such as {copy} of {original}, and were "
        "left out: compared with themselves they would make the threshold too low."
    ]


def dark_note(brightest: Sequence[int]) -> list[str]:
    """What to say if all of the normals, whose highest values are given, use a small part of the range."""
    if not brightest or max(brightest) >= DARK:
        return []
    return [
        f"All normal photographs use less than an eighth of the range (the highest value is {max(brightest)} of 255): "
        "little can be seen in them. If they are 16-bit colour files of a camera with 10 or 12 bits, convert them to 8 "
        "bits per channel; if they are dark, lengthen the exposure."
    ]

"""Normal photographs that are not references, scored: they calibrate.

Shape legend: N normal photographs, B images of a batch, S = the network's input side, F numbers of an appearance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adpretrain.preprocess import Preprocess
from downstream.detector import Detector
from downstream.inspection.photos import Photo, Unreadable, read_batches, without_blank, without_copies

SCALE_SAMPLE = 64  # maps, at most, that fix the colour scale besides the references' own
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


def silent(what: str, done: int, total: int) -> None:
    """No progress display."""


@dataclass
class Scored:
    """Normal photographs that are not references, scored: N that can be used, and those left out."""

    scores: NDArray[np.float64]  # [N]
    appearance: list[NDArray[np.float64]]  # N of [F]
    brightest: list[int] = field(default_factory=list)
    maps: list[NDArray[np.float64]] = field(default_factory=list)  # of the first ones
    lost: list[Unreadable] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def notes(self, kind: str) -> list[str]:
        """What to say about those left out; ``kind`` is what they are called."""
        unread = f"{len(self.lost)} {kind} photograph(s) left out as unreadable, the first: "
        return [*copied(self.copies, f"{kind} photographs"), *(unread + lost.reason for lost in self.lost[:1])]


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
) -> Scored:
    """Score normal photographs that are not references. Copies of one another, and of those whose digests are
    ``known``, are left out; the others join them there."""
    found, scores = Scored(np.empty(0), []), [np.empty(0)]
    for number, read in enumerate(read_batches(paths, preprocess, batch_size, scale)):
        batch = without_blank(read, contrast)
        found.lost += [item for item in batch if isinstance(item, Unreadable)]
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


def copied(copies: Sequence[tuple[str, str]], among: str) -> list[str]:
    """Copies score each other near zero, which would make the threshold too low."""
    if not copies:
        return []
    copy, original = copies[0]
    return [
        f"{len(copies)} of the {among} are copies of other normal photographs, such as {copy} of {original}, and were "
        "left out: compared with themselves they would make the threshold too low."
    ]


def predict_photos(
    detector: Detector, photos: Sequence[Photo], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores [B] and maps [B, S, S], both empty for an empty batch."""
    if not photos:
        return np.empty(0), np.empty((0, 0, 0))
    prediction = detector.predict(torch.stack([photo.pixels for photo in photos]).to(device))
    return as_numpy(prediction.scores), as_numpy(prediction.maps)


def as_numpy(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()

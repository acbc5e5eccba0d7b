"""Choose references among the normal photographs of a product; the scores of the others calibrate the threshold.

Shapes: P photographs, K references, N normal photographs that are not references, B images of a batch, S = the
network's input side, F numbers of an appearance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.extractor import ADExtractor
from adpretrain.progress import Progress
from adpretrain.references import kmeans_references, random_references
from downstream.calibration import Calibration, photographs_needed
from downstream.detector import Detector, Prediction
from downstream.detectors.featurenorm import FeatureNorm
from downstream.detectors.tiled import Tiled
from downstream.inspection import Options
from downstream.inspection.photos import Photo, PhotoReader, Unreadable, printable, without_blank, without_copies
from downstream.regions import Box, least_cells, peak_of
from downstream.terminal import no_progress

Map = NDArray[np.floating]
DARK = 256 / 8  # photographs are dark if their brightest value is below this
FEW = 10  # see outlier_note


class NormalBatches:
    """Batches [b, 3, S, S] of the photographs in ``paths``, read anew in every iteration, one batch ahead; for tiles,
    whole photographs, uint8 [1, 3, H, W].

    Raises ValueError for an unreadable photograph, because every score would depend on it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        reader: PhotoReader,
        device: torch.device,
        progress: Progress = no_progress,
        purpose: str = "choosing references",
    ) -> None:
        self.paths, self.reader, self.device, self.progress, self.purpose = paths, reader, device, progress, purpose
        self.digests = set[str]()  # digests of the photographs read so far

    def __len__(self) -> int:
        return -(-len(self.paths) // self.reader.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for batch in self.reader.batches(self.paths):
            photos = readable(batch)
            self.digests.update(photo.digest for photo in photos)
            if self.reader.tiled:
                yield from (photo.whole[None] for photo in photos)
            else:
                yield torch.stack([photo.pixels for photo in photos]).to(self.device)
            done += len(photos)
            self.progress(self.purpose, done, len(self.paths))


def readable(batch: Sequence[Photo | Unreadable]) -> list[Photo]:
    """Return the batch as normal photographs. Raises ValueError if one is unreadable."""
    for item in batch:
        if isinstance(item, Unreadable):
            raise ValueError(f"every score depends on the normal photographs, and one is unreadable: {item.reason}")
    return [item for item in batch if isinstance(item, Photo)]


def read_all(paths: Sequence[Path], reader: PhotoReader) -> list[Photo]:
    """Read all photographs. Raises ValueError for an unreadable one, because every score would depend on it."""
    return [photo for batch in reader.batches(paths) for photo in readable(batch)]


def choose_references(
    paths: Sequence[Path],
    extractor: ADExtractor,
    options: Options,
    reader: PhotoReader,
    progress: Progress = no_progress,
) -> list[Path]:
    """Choose K references among the P normal photographs and return them in the order of ``paths``.

    ``options.references``: "even" = K evenly spaced in sorted order; "random" = K drawn with ``options.seed``; "kmeans"
    = K spread over the clusters of the last level's features; "aligned" = all P, because K of them are chosen for each
    image later. If P <= K, all are used. Raises ValueError for an unreadable photograph, which only "kmeans" reads.
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
            for images in NormalBatches(paths, reader, device, progress):
                features += extractor.encode(images)[-1]
        chosen = kmeans_references(torch.stack(features), shots, seed=options.seed)
    return [paths[index] for index in chosen]


def set_references(extractor: ADExtractor, references: NormalBatches) -> None:
    """Make these photographs the references. They are encoded in batches."""
    parts = [extractor.encode(images) for images in references]
    extractor.set_references(extractor.bank_of([torch.cat(level) for level in zip(*parts, strict=True)]))


@dataclass(frozen=True)
class Normal:
    """What an inspector keeps of a normal photograph.

    Its ``score``, and the median (``low``) and the `peak_of` its map, are those that a new photograph would have:
    against the other references if it is one. None if there is no other reference.
    """

    name: str
    digest: str
    appearance: tuple[float, ...]
    size: tuple[int, int]  # width, height
    contrast: float
    brightest: int
    reference: bool
    score: float | None = None
    low: float | None = None
    peak: float | None = None

    @classmethod
    def of(cls, photo: Photo, reference: bool) -> Normal:
        """Describe a photograph that has not been scored."""
        name, numbers = printable(photo.path.name), tuple(photo.appearance.tolist())
        return cls(name, photo.digest, numbers, photo.size, photo.contrast, photo.brightest, reference)

    def scored(self, score: float, map_HW: Map, seen: Box, least_area: float) -> Normal:
        """The same photograph with its score and map, which covers the part ``seen``; see `least_cells`."""
        peak = peak_of(map_HW, least_cells(least_area, map_HW.shape, self.size, seen))
        return replace(self, score=float(score), low=float(np.nanmedian(map_HW)), peak=peak)


def fit_references(
    detector: FeatureNorm | Tiled, photos: Sequence[Photo], device: torch.device, options: Options
) -> list[Normal]:
    """Fit a detector on references, and score each of them against the others."""
    roi = _shared([photo.roi for photo in photos])
    if isinstance(detector, Tiled):
        detector.fit([photo.whole[None] for photo in photos], roi=roi)
    else:
        images_K = torch.stack([photo.pixels for photo in photos]).to(device)
        detector.fit(images_K.split(options.batch_size), roi=roi)
    normals = [Normal.of(photo, True) for photo in photos]
    if len(photos) < 2:
        return normals
    found = detector.leave_one_out() if isinstance(detector, Tiled) else detector.leave_one_out(roi=roi)
    return left_out(normals, found, [photo.seen for photo in photos], options.least_area)


def left_out(normals: Sequence[Normal], found: Prediction, seen: Sequence[Box], least_area: float) -> list[Normal]:
    """The references with the scores and maps that each has against the others."""
    rows = zip(normals, as_numpy(found.scores), found.maps.cpu().numpy(), seen, strict=True)
    return [normal.scored(score, map_HW, box, least_area) for normal, score, map_HW, box in rows]


def _shared(rois: Sequence[Tensor | None]) -> Tensor | None:
    """One region of interest if all photographs have the same one, else one for each, stacked."""
    found = [roi for roi in rois if roi is not None]
    if not found or all(torch.equal(roi, found[0]) for roi in found):
        return found[0] if found else None
    if len({roi.shape for roi in found}) > 1:
        raise ValueError("with tiles and a region of interest, all photographs must have the same size")
    return torch.stack(found)


@dataclass
class Calibrating:
    """The normal photographs that are not references, and those that were left out."""

    normals: list[Normal] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def notes(self, kind: str) -> list[str]:
        """Return warnings about photographs that were left out; ``kind`` names them, as "calibration"."""
        unread = f"{len(self.unreadable)} {kind} photograph(s) left out as unreadable, the first: "
        notes = [unread + item.reason for item in self.unreadable[:1]]
        return [*copies_note(self.copies, f"{kind} photographs"), *notes]


def score_normals(
    detector: Detector,
    paths: Sequence[Path],
    reader: PhotoReader,
    device: torch.device,
    contrast: float,
    progress: Progress,
    known: dict[str, str],
    least_area: float,
) -> Calibrating:
    """Score normal photographs that are not references. Copies of one another, and of photographs whose digests are
    in ``known``, are left out; the digests of the others are added to ``known``."""
    found, done = Calibrating(), 0
    for read in reader.batches(paths):
        batch = without_blank(read, contrast)
        photos, copies = without_copies([item for item in batch if isinstance(item, Photo)], known)
        found.copies += copies
        found.unreadable += [item for item in batch if isinstance(item, Unreadable)]
        for photo, predicted in zip(photos, predict_photos(detector, photos, device), strict=True):
            if isinstance(predicted, str):
                found.unreadable.append(Unreadable(photo.path, predicted))
            else:
                found.normals.append(Normal.of(photo, False).scored(*predicted, photo.seen, least_area))
        done += len(read)
        progress("calibrating", done, len(paths))
    return found


def predict_photos(detector: Detector, photos: Sequence[Photo], device: torch.device) -> list[tuple[float, Map] | str]:
    """Return score and map [H', W'] of every photograph, or the reason why it cannot be compared with the normals."""
    if not photos:
        return []
    if isinstance(detector, Tiled):
        return [_predict_tiles(detector, photo) for photo in photos]
    images_B, rois = torch.stack([photo.pixels for photo in photos]).to(device), [photo.roi for photo in photos]
    prediction = detector.predict(images_B, _shared(rois))
    return list(zip(as_numpy(prediction.scores).tolist(), as_numpy(prediction.maps), strict=True))


def _predict_tiles(detector: Tiled, photo: Photo) -> tuple[float, Map] | str:
    try:
        prediction = detector.predict(photo.whole[None], photo.roi)
    except ValueError as error:  # of another size
        return f"{printable(photo.path)}: {error}"
    return float(prediction.scores), prediction.maps[0].numpy()


def as_numpy(values: Tensor) -> NDArray[np.float64]:
    """Convert a tensor to a float64 array on the CPU."""
    return values.detach().double().cpu().numpy()


def copies_note(copies: Sequence[tuple[str, str]], among: str) -> list[str]:
    """Return a warning about ``copies`` (copy, original), which would score near zero and lower the threshold."""
    if not copies:
        return []
    copy, original = copies[0]
    return [
        f"{len(copies)} of the {among} are copies of other normal photographs, such as {copy} of {original}, and were "
        "left out: compared with themselves they would make the threshold too low."
    ]


def outlier_note(normals: Sequence[Normal], calibration: Calibration) -> list[str]:
    """Return a warning if a single normal photograph sets the threshold, far above the others: often a bad part.

    Far is farther than the others lie from each other, that is, Dixon's ratio r10 is above 1/2: so it is in 1.4 % of
    tens of normally distributed scores, but in 27 % of fours, so that fewer than `FEW` tell nothing.
    """
    scores = calibration.scores
    if len(scores) < FEW or calibration.threshold < scores[0] or scores[0] - scores[1] <= scores[1] - scores[-1]:
        return []
    name = next(normal.name for normal in normals if normal.score == scores[0])
    enough = photographs_needed(calibration.asked_rate / 2)  # with so many, the second highest sets the threshold
    return [
        f"{name} alone sets the threshold: its score is {scores[0]:.4g}, that of the next normal photograph "
        f"{scores[1]:.4g}. Look at it: if it shows a defect, take it out, because all that scores lower is called "
        f"normal; if it is good, {enough} normal photographs in all make the threshold depend less on it."
    ]


def dark_note(normals: Sequence[Normal]) -> list[str]:
    """Return a warning if all normal photographs are dark."""
    brightest = [normal.brightest for normal in normals]
    if not brightest or max(brightest) >= DARK:
        return []
    return [
        f"All normal photographs use less than an eighth of the range (the highest value is {max(brightest)} of 255): "
        "little can be seen in them. If they are 16-bit colour files from a camera with 10 or 12 bits, convert them to "
        "8 bits per channel; if they are underexposed, lengthen the exposure."
    ]

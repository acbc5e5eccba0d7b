"""The uploads and scores of one visitor, and the verdicts computed from them for any false-alarm rate.

Scoring is slow and done once. Everything that depends on the rate (threshold, verdicts, colours, warnings) is computed
anew from the scores and maps kept here; reference photographs and their features are not kept.

Shape legend: S = the network's input side.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from adpretrain.extractor import ADExtractor
from adpretrain.photographs import as_rgb, page_count
from adpretrain.preprocess import Preprocess
from adpretrain.progress import Progress
from downstream.appearance import Unlike
from downstream.calibration import Calibration, calibrate
from downstream.inspection import Options
from downstream.inspection.facts import regions_note
from downstream.inspection.inspector import Inspector, judge, shape_note
from downstream.inspection.photos import Photo, Unreadable, prepare_photo
from downstream.inspection.results import UNREADABLE, Result
from downstream.regions import Box, Region, find_regions
from downstream.terminal import no_progress
from downstream.visualise import ColourScale, numbered, overlay

MEGA = 10**6
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = "BMP, JPEG, PNG, TIFF or WebP"
NAME_LENGTH = 80


@dataclass(frozen=True)
class Limits:
    """Limits for one click on Score: numbers of photographs, bytes of a file, pixels of a photograph."""

    good: int = 8
    new: int = 64
    file_bytes: int = 20 * MEGA
    pixels: int = 50 * MEGA

    @property
    def upload_bytes(self) -> int:
        """The largest upload request, in bytes: all new photographs at once, and the overhead."""
        return min(self.new * self.file_bytes, 500 * MEGA) + MEGA


LIMITS = Limits()


@dataclass(frozen=True)
class Upload:
    """A file written by the server; ``name`` is the cleaned name that the user gave, which is never opened."""

    path: Path
    name: str


def uploads(paths: Sequence[str | Path]) -> list[Upload]:
    """Give files of the upload folder clean, distinct names."""
    found: list[Upload] = []
    taken: set[str] = set()
    for path in map(Path, paths):
        name, copies = clean_name(path.name), 1
        while name.casefold() in taken:
            copies += 1
            stem, dot, suffix = clean_name(path.name).rpartition(".")
            name = f"{stem}-{copies}.{suffix}" if dot and stem else f"{suffix}-{copies}"
        taken.add(name.casefold())
        found.append(Upload(path, name))
    return found


def clean_name(name: str) -> str:
    """Return the last part of a file name without invisible characters or any that act as path, markup or formula.

    ``../../<x>.png`` -> ``x-.png``, ``=1+1.png`` -> ``1+1.png``. Never empty, at most NAME_LENGTH characters.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    # Cc and Cf are control characters, some of which reverse the direction of text; Cs are bytes that are not UTF-8.
    visible = "".join(character for character in last if not unicodedata.category(character).startswith("C"))
    plain = re.sub(r"[<>&\"'`:|?*]+", "-", visible)
    plain = re.sub(r"\s+", " ", plain).lstrip("=+-@. \t").rstrip()
    return plain[-NAME_LENGTH:].lstrip("=+-@. ") or "photograph"


def check_counts(good: Sequence[object], new: Sequence[object], limits: Limits = LIMITS) -> None:
    """Raise ValueError, with a message for the page, if there are too few or too many photographs."""
    if not good:
        raise ValueError(f"First drop 1 to {limits.good} photographs of good products into the left field.")
    if not new:
        raise ValueError(f"Drop the photographs to inspect into the right field, at most {limits.new} at a time.")
    if len(good) > limits.good:
        raise ValueError(f"{len(good)} good photographs are too many for this page: at most {limits.good}.")
    if len(new) > limits.new:
        raise ValueError(f"{len(new)} new photographs are too many for this page: at most {limits.new} at a time.")


def read_upload(upload: Upload, preprocess: Preprocess, limits: Limits = LIMITS) -> Photo | Unreadable:
    """Read one photograph. Its format is detected from the content, and its size is checked before decoding."""
    name = Path(upload.name)
    try:
        reason = _refusal(upload.path, limits)
        if reason is None:
            with Image.open(upload.path, formats=FORMATS) as image:
                image.load()
                return prepare_photo(name, as_rgb(ImageOps.exif_transpose(image)), preprocess)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ..., with paths in their messages
        reason = "the file is damaged or cut off"
    return Unreadable(name, reason)


def _refusal(path: Path, limits: Limits) -> str | None:
    size = path.stat().st_size
    if size > limits.file_bytes:
        return f"the file has {size / MEGA:.0f} MB; at most {limits.file_bytes / MEGA:.0f} MB"
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
        pages = page_count(path)
    except Image.DecompressionBombError:
        return f"the picture is far too large; at most {limits.pixels / MEGA:.0f} megapixels"
    except Exception:
        return f"the content is not a photograph ({KINDS}), whatever the file name says"
    if width * height > limits.pixels:
        found = f"{width * height / MEGA:.0f} megapixels"
        return f"the picture has {found} ({width} x {height}); at most {limits.pixels / MEGA:.0f}"
    if pages > 1:
        return f"the file holds {pages} pages or frames: save each as a separate file"
    return None


BATCH = 8
RATE = 0.05  # false-alarm rate when the page opens
SINGLE = (
    "One good photograph cannot be compared with another one: there is no threshold, no p-value and no verdict, "
    "only a ranking. Give at least 2."
)


@dataclass(frozen=True)
class Shot:
    """One photograph to inspect. ``score``, ``map_SS`` and ``photo`` (a JPEG) are None if it cannot be read."""

    name: str
    score: float | None = None
    map_SS: NDArray[np.float32] | None = None
    photo: bytes | None = None
    reason: str = ""
    unlike: Unlike | None = None
    size: tuple[int, int] = (0, 0)  # width and height of the photograph in pixels
    seen: Box | None = None  # the part of it that the network sees, and ``photo`` shows


@dataclass(frozen=True)
class Scored:
    """Everything from which verdicts are computed, for any false-alarm rate."""

    shots: tuple[Shot, ...]
    normal_scores: tuple[float, ...]  # leave-one-out scores; empty if there is only one good photograph
    normal_peaks: tuple[float, ...]  # the highest values of their maps
    normal_unlike: tuple[float, ...]  # how far these photographs are from each other, see downstream.appearance
    references: int
    scale: ColourScale
    notes: tuple[str, ...]  # warnings that do not depend on the rate


@dataclass(frozen=True)
class Verdicts:
    """The verdicts at one false-alarm rate; results are in the order of the shots."""

    results: tuple[Result, ...]
    calibration: Calibration | None
    scale: ColourScale
    warnings: tuple[str, ...]
    pixel_limit: float | None  # map values above it make regions; None if there is only one good photograph
    regions: tuple[list[Region], ...]  # of each result, the highest peak first

    @property
    def threshold(self) -> float | None:
        """The calibrated threshold; None if there is only one good photograph."""
        return self.calibration.threshold if self.calibration else None

    def ranked(self) -> list[int]:
        """Indices of the results, the highest score first and unreadable ones last."""
        scores = [-math.inf if result.score is None else result.score for result in self.results]
        return sorted(range(len(scores)), key=lambda place: -scores[place])


def score_uploads(
    extractor: ADExtractor,
    device: torch.device,
    good: Sequence[Upload],
    new: Sequence[Upload],
    limits: Limits = LIMITS,
    progress: Progress = no_progress,
) -> Scored:
    """Score new photographs against the good ones. Raises ValueError, with a message for the page, for bad input."""
    check_counts(good, new, limits)
    # The copy shares the weights but has its own references, so that visitors never share them.
    own = copy.copy(extractor)
    references = list[Photo]()
    for upload in good:
        item = read_upload(upload, own.preprocess, limits)
        if isinstance(item, Unreadable):
            raise ValueError(f"Every score depends on the good photographs, but {upload.name} is bad: {item.reason}.")
        references.append(item)
    options = Options(shots=limits.good, batch_size=BATCH)
    inspector = Inspector.from_photos(own, device, references, options, progress=progress)
    shots, odd = list[Shot](), 0
    for start in range(0, len(new), BATCH):
        progress("scoring", start, len(new))
        read = [read_upload(upload, own.preprocess, limits) for upload in new[start : start + BATCH]]
        for one in inspector.score(read):
            if isinstance(one, Unreadable):
                shots.append(Shot(str(one.path), reason=one.reason))
                continue
            photo, map_SS = jpeg(one.photo.shown), one.map_HW.astype(np.float32)
            where = one.photo.size, one.photo.seen
            shots.append(Shot(str(one.photo.path), one.score, map_SS, photo, "", one.unlike, *where))
            odd += inspector.has_odd_shape(one.photo)
    progress("scoring", len(new), len(new))
    maps = [shot.map_SS for shot in shots if shot.map_SS is not None]
    return Scored(
        shots=tuple(shots),
        normal_scores=inspector.calibration.scores if inspector.calibration else (),
        normal_unlike=inspector.calibration.unlike if inspector.calibration else (),
        normal_peaks=tuple(normal.peak for normal in inspector.normals if normal.peak is not None),
        references=inspector.references,
        scale=inspector.scale or ColourScale.from_typical_map(maps),
        notes=(*inspector.notes, *shape_note(odd, len(new))),
    )


def verdicts(scored: Scored, rate: float) -> Verdicts:
    """Compute threshold and verdicts for a false-alarm rate in (0, 1). Raises ValueError for other rates."""
    unlike = scored.normal_unlike, ()
    calibration = calibrate(scored.normal_scores, rate, unlike=unlike) if scored.normal_scores else None
    threshold = calibration.threshold if calibration else None
    limit = calibrate(scored.normal_peaks, rate).threshold if scored.normal_peaks else None
    regions = tuple(_regions(shot, limit) for shot in scored.shots)
    results = [
        Result(shot.name, None, None, UNREADABLE, reason=shot.reason)
        if shot.score is None or shot.unlike is None
        else dataclasses.replace(judge(shot.name, shot.score, shot.unlike, calibration, threshold), regions=len(found))
        for shot, found in zip(scored.shots, regions, strict=True)
    ]
    return Verdicts(
        results=tuple(results),
        calibration=calibration,
        scale=scored.scale.with_limit(limit),
        warnings=(
            *(calibration.warnings if calibration else (SINGLE,)),
            *scored.notes,
            *regions_note(sum(result.is_quiet for result in results), True),
        ),
        pixel_limit=limit,
        regions=regions,
    )


def _regions(shot: Shot, limit: float | None) -> list[Region]:
    if shot.map_SS is None or limit is None:
        return []
    return find_regions(shot.map_SS, limit, shot.size, shot.seen)


def heatmap(scored: Scored, place: int, found: Verdicts) -> bytes | None:
    """Draw the heatmap, with the numbered regions, over photograph number ``place``, as a JPEG of its size; None if it
    could not be read."""
    shot = scored.shots[place]
    if shot.photo is None or shot.map_SS is None:
        return None
    drawn = overlay(Image.open(io.BytesIO(shot.photo)), shot.map_SS, found.scale)
    return jpeg(numbered(drawn, found.regions[place], shot.seen))


def jpeg(picture: Image.Image, longest: int | None = None) -> bytes:
    """Encode a picture for the page, shrunk to at most ``longest`` pixels on each side."""
    if longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return buffer.getvalue()

"""Reading photographs, a batch at a time; files that cannot be read are reported, not
raised.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adpretrain.photographs import depth, full_scale_of, read_image
from adpretrain.preprocess import Preprocess
from downstream.appearance import appearance
from downstream.inspection.finding import file_and_page, printable
from downstream.visualise import shown_region

HEATMAPS = "heatmaps"  # below the output folder
DIGEST = 32  # hexadecimal digits
LITTLE = 1 / 8  # of the range
BLANK = 0.1  # of the references' contrast; of the 1344 Magnetic Tile photographs none is below .3 of their median


@dataclass(frozen=True)
class Photo:
    """One photograph, read: the network's input [3, S, S] and the undistorted picture to show."""

    path: Path
    pixels: Tensor
    shown: Image.Image
    aspect: float  # width / height of the file
    digest: str  # of the pixels that the network sees: equal for copies, under any name and in any lossless format
    appearance: NDArray[np.float64]  # [F], see downstream.appearance
    brightest: int  # value of any pixel, 0 to 255
    saturated: bool  # whether values lay above the full scale

    @property
    def contrast(self) -> float:
        """Standard deviation of the network's input, mean of its channels."""
        return float(self.pixels.std(dim=(1, 2)).mean())


@dataclass(frozen=True)
class Unreadable:
    path: Path
    reason: str


def full_scale(paths: Sequence[Path]) -> float | None:
    """The value that becomes 255 in the photographs of one camera; see `adpretrain.photographs.full_scale_of`.

    Those that cannot be read are told when they are used. Raises ValueError as there.
    """

    def deep(path: Path) -> tuple[float, bool] | None:
        try:
            return depth(*file_and_page(path))
        except (ValueError, OSError):
            return None

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return full_scale_of(pool.map(deep, paths))


def read_batches(
    paths: Sequence[Path], preprocess: Preprocess, batch_size: int, scale: float | None = None
) -> Iterator[list[Photo | Unreadable]]:
    """Read in threads, one batch ahead of the consumer, in order; at most two batches are in memory.

    ``scale``: the `full_scale` of gray photographs with more than 8 bits.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; expected at least 1")
    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        ahead = [pool.submit(_read, path, preprocess, scale) for path in paths[:batch_size]]
        for start in starts:
            current = ahead
            following = paths[start + batch_size : start + 2 * batch_size]
            ahead = [pool.submit(_read, path, preprocess, scale) for path in following]
            yield [future.result() for future in current]


def _read(path: Path, preprocess: Preprocess, scale: float | None) -> Photo | Unreadable:
    file, page = file_and_page(path)
    try:
        return seen(path, read_image(file, page=page, full_scale=scale), preprocess)
    except (ValueError, OSError) as error:
        return Unreadable(path, printable(error))


def without_blank(read: Sequence[Photo | Unreadable], usual: float) -> list[Photo | Unreadable]:
    """Photographs with hardly any of the ``usual`` contrast become unreadable.

    A covered lens and a failed exposure are as calm as the calm parts of a product, which is normal to the features.
    """
    reason = "{} is blank (its contrast is {:.1%} of the references'): a covered lens or a failed exposure?"
    return [
        Unreadable(item.path, reason.format(printable(item.path), item.contrast / usual))
        if isinstance(item, Photo) and item.contrast < BLANK * usual
        else item
        for item in read
    ]


def seen(path: Path, photo: Image.Image, preprocess: Preprocess) -> Photo:
    """An RGB photograph as the network and people see it."""
    pixels = preprocess.pixels(photo)
    return Photo(
        path,
        preprocess.normalise(pixels),
        shown_region(photo, preprocess),
        photo.width / photo.height,
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:DIGEST],
        appearance(pixels),
        int(pixels.max()),
        photo.info.get("saturated") is True,
    )


def dark(brightest: Sequence[int]) -> list[str]:
    """What to say if all of the normals, whose highest values are given, use a small part of the range."""
    if not brightest or max(brightest) >= 256 * LITTLE:
        return []
    return [
        f"All normal photographs use less than an eighth of the range (the highest value is {max(brightest)} of 255): "
        "little can be seen in them. If they are 16-bit colour files of a camera with 10 or 12 bits, convert them to 8 "
        "bits per channel; if they are dark, lengthen the exposure."
    ]


def without_copies(photos: Sequence[Photo], known: dict[str, str]) -> tuple[list[Photo], list[tuple[str, str]]]:
    """The photographs whose digests are not ``known`` (digest -> name) yet, and those left out, with what they copy.

    ``known`` is filled with the photographs that stay.
    """
    kept, copies = list[Photo](), list[tuple[str, str]]()
    for photo in photos:
        name = printable(photo.path.name)
        if photo.digest in known:
            copies.append((name, known[photo.digest]))
        else:
            known[photo.digest] = name
            kept.append(photo)
    return kept, copies


def relative_name(root: Path, path: Path) -> str:
    """The path below the folder that was asked for, with forward slashes on every system."""
    return path.name if root.is_file() else path.relative_to(root).as_posix()


def picture_names(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Where each image's heatmap goes below the output folder: readable, safe in a URL, distinct on case-blind disks.

    ``a/b c.jpg`` -> ``heatmaps/a_b-c.png``; a second image that would get the same name, ``heatmaps/a_b-c-2.png``.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        stem = relative_name(root, path).removesuffix(path.suffix).replace("/", "_")
        # File systems allow 255 bytes; a temporary name beside the final one needs some of them.
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".")[-120:] or "image"
        name, copies = f"{stem}.png", 1
        while name.casefold() in taken:
            copies += 1
            name = f"{stem}-{copies}.png"
        taken.add(name.casefold())
        names[path] = f"{HEATMAPS}/{name}"
    return names

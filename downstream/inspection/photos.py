"""Finding and reading a folder's photographs, a batch at a time; files that cannot be read are reported, not
raised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from adpretrain.data.samples import IMAGE_SUFFIXES, is_image
from adpretrain.preprocess import Preprocess, read_image
from downstream.visualise import shown_region

HEATMAPS = "heatmaps"  # below the output folder
BLANK = 0.1  # of the references' contrast; of the 1344 Magnetic Tile photographs none is below .3 of their median


@dataclass(frozen=True)
class Photo:
    """One photograph, read: the network's input [3, S, S] and the undistorted picture to show."""

    path: Path
    pixels: Tensor
    shown: Image.Image
    aspect: float  # width / height of the file

    @property
    def contrast(self) -> float:
        """Standard deviation of the network's input, mean of its channels."""
        return float(self.pixels.std(dim=(1, 2)).mean())


@dataclass(frozen=True)
class Unreadable:
    path: Path
    reason: str


def find_images(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Every image file below `folder`, sorted; hidden ones and everything below `exclude` are left out.

    A single file is accepted as a folder of one. ValueError if there is no such folder or no image in it.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"no such folder: {printable(folder)}")
    barred = exclude.resolve() if exclude else None
    found = sorted(
        path
        for path in folder.rglob("*")
        if is_image(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (barred and path.resolve().is_relative_to(barred))
    )
    if not found:
        if barred and folder.resolve().is_relative_to(barred):
            raise ValueError(f"{printable(folder)} lies in the output folder {printable(exclude)}: give another --out")
        raise ValueError(f"no images in {printable(folder)}; known kinds are {', '.join(IMAGE_SUFFIXES)}")
    return found


def read_batches(paths: Sequence[Path], preprocess: Preprocess, batch_size: int) -> Iterator[list[Photo | Unreadable]]:
    """Read in threads, one batch ahead of the consumer, in order; at most two batches are in memory."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; expected at least 1")
    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        ahead = [pool.submit(_read, path, preprocess) for path in paths[:batch_size]]
        for start in starts:
            current = ahead
            following = paths[start + batch_size : start + 2 * batch_size]
            ahead = [pool.submit(_read, path, preprocess) for path in following]
            yield [future.result() for future in current]


def _read(path: Path, preprocess: Preprocess) -> Photo | Unreadable:
    try:
        return seen(path, read_image(path), preprocess)
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
    return Photo(path, preprocess(photo), shown_region(photo, preprocess), photo.width / photo.height)


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


def printable(text: object) -> str:
    """Text that any UTF-8 stream takes: file names on Linux are bytes and need not be valid UTF-8."""
    return os.fsencode(str(text)).decode("utf-8", errors="replace")

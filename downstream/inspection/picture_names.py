"""The pictures of a run below its output folder: heatmaps/*.png, masks/*.png and maps/*.tif of the same names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

Heatmaps = Literal["all", "anomalous", "none"]
HEATMAPS, MASKS, MAPS = "heatmaps", "masks", "maps"
LISTING = "heatmaps.jsonl"  # which heatmap is of which photograph, if summary.json does not list all photographs
_LISTED = re.compile(rf'"heatmap": "({HEATMAPS}/[A-Za-z0-9._-]+\.png)"')


def picture_name(name: str, taken: set[str]) -> str:
    """Name the heatmap of an image: readable, safe in a URL, and, even without case, none of those in ``taken``, to
    which it is added.

    ``a/b c.jpg`` -> ``heatmaps/a_b-c.png``; a second image with the same name gets ``heatmaps/a_b-c-2.png``.
    """
    stem, copies = _stem(name), 1
    picture = f"{HEATMAPS}/{stem}.png"
    while picture.casefold() in taken:
        copies += 1
        picture = f"{HEATMAPS}/{stem}-{copies}.png"
    taken.add(picture.casefold())
    return picture


def _stem(name: str) -> str:
    stem = name.removesuffix(PurePosixPath(name).suffix).replace("/", "_")
    # File systems allow 255 bytes, and the temporary file's name is longer than the final one.
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".")[-120:] or "image"


class PictureNames:
    """The heatmap's name of every photograph of a run; only those that are not named like their photograph are held."""

    def __init__(self, names: Iterable[str]) -> None:
        taken, self._others = set[str](), dict[str, str]()
        for name in names:
            if (picture := picture_name(name, taken)) != f"{HEATMAPS}/{_stem(name)}.png":
                self._others[name] = picture

    def of(self, name: str) -> str:
        """The path of the heatmap below the output folder."""
        return self._others.get(name) or f"{HEATMAPS}/{_stem(name)}.png"


def mask_and_map(out: Path, heatmap: str) -> tuple[Path, Path]:
    """The other files of the photograph whose heatmap has this name below the output folder."""
    return out / heatmap.replace(HEATMAPS, MASKS, 1), (out / heatmap.replace(HEATMAPS, MAPS, 1)).with_suffix(".tif")


def remove(out: Path, heatmap: str) -> None:
    """Delete the pictures of one photograph, if there are any."""
    for file in (out / heatmap, *mask_and_map(out, heatmap)):
        file.unlink(missing_ok=True)


def remove_listed(out: Path, files: Iterable[Path]) -> None:
    """Delete the pictures that ``files`` of an earlier run list, so that none remains whose photograph is gone.

    Only pictures that this toolkit wrote are deleted; a list that cannot be read is ignored.
    """
    for path in files:
        with contextlib.suppress(OSError), path.open(encoding="latin-1") as listing:
            for line in listing:
                for heatmap in _LISTED.findall(line):
                    remove(out, heatmap)

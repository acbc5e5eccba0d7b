"""Which files below a folder are photographs to use, a data set's masks told apart, and which files are passed over.

A photograph is named by a path: of a file with several pages or frames, every page has its own, ``name.tif#2``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from adpretrain.data.layouts.detect import PATTERNS, layout_of
from adpretrain.data.samples import IMAGE_SUFFIXES, is_image
from adpretrain.photographs import FORMATS, page_count

HOLD_PAGES = (".gif", ".png", ".tif", ".tiff", ".webp")
GOOD_FOLDERS = [pattern for layout in ("mvtec_3d", "btad", "mvtec", "mtd", "realiad") for pattern in PATTERNS[layout]]
MASK_FOLDERS = ("ground_truth", "gt", "mask", "masks")
MASK_NAME = re.compile(r"(.+)_(?:mask|gt|label|seg)", re.IGNORECASE)


def printable(text: object) -> str:
    """Text that any UTF-8 stream takes: file names on Linux are bytes and need not be valid UTF-8."""
    return os.fsencode(str(text)).decode("utf-8", errors="replace")


def find_images(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Every photograph below `folder`, sorted, links to folders followed; hidden ones and everything below `exclude`
    are left out.

    A single file is accepted as a folder of one. Raises ValueError, with the folder to use instead, for a data set of a
    known layout and for masks beside the photographs; and if there is no such folder or no image in it.
    """
    if folder.is_file():
        return _each_page(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {printable(folder)}")
    files = sorted(path for path in _files(folder, exclude) if is_image(path))
    if not files:
        barred = exclude.resolve() if exclude else None
        if barred and folder.resolve().is_relative_to(barred):
            raise ValueError(f"{printable(folder)} lies in the output folder {printable(exclude)}: give another --out")
        raise ValueError(f"no images in {printable(folder)}; known kinds are {', '.join(IMAGE_SUFFIXES)}")
    _refuse_data_set(folder)
    _refuse_masks(folder, files)
    return [page for file in files for page in _each_page(file)]


def passed_over(folder: Path, exclude: Path | None = None) -> list[str]:
    """What to say of the files below a folder that `find_images` does not take for photographs, hidden ones aside."""
    if not folder.is_dir():
        return []
    kinds = Counter(path.suffix.lower() or "without suffix" for path in _files(folder, exclude) if not is_image(path))
    if not kinds:
        return []
    listing = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [f"Files in {printable(folder)} that are no photographs by their names were passed over: {listing}."]


def file_and_page(path: Path) -> tuple[Path, int | None]:
    """The file of a photograph, and which page of it if `find_images` found several."""
    name, mark, page = path.name.rpartition("#")
    if mark and page.isdecimal() and Path(name).suffix.lower() in HOLD_PAGES:  # "a#1.png" ends in a suffix
        return path.with_name(name), int(page)
    return path, None


def _files(folder: Path, exclude: Path | None) -> Iterator[Path]:
    """The files below a folder. A folder that several links lead to, or that holds itself, is entered once."""
    barred, entered = exclude.resolve() if exclude else None, set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in entered or (barred and real.is_relative_to(barred)):
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.is_file() and not (barred and path.is_symlink() and path.resolve().is_relative_to(barred)):
                yield path


def _each_page(file: Path) -> list[Path]:
    if file.suffix.lower() not in HOLD_PAGES:
        return [file]
    try:
        count = page_count(file)
    except ValueError:  # is told with its reason when it is read
        count = 1
    return [file] if count == 1 else [file.with_name(f"{file.name}#{page}") for page in range(1, count + 1)]


def _refuse_data_set(folder: Path) -> None:
    layout = layout_of(folder)
    if layout is None or layout == "hf":  # photographs may have a metadata.csv
        return
    good = next((found for pattern in GOOD_FOLDERS for found in sorted(folder.glob(pattern))), None)
    use = f"use {printable(good)} as --normal" if good else "use its folder of good photographs as --normal"
    test = next((path for part in (good.parents if good else ()) if (path := part / "test").is_dir()), None)
    raise ValueError(
        f"{printable(folder)} is a data set in the {layout} layout, not a folder of photographs alone: {use}"
        + (f", {printable(test)} as --images" if test else "")
    )


def _refuse_masks(folder: Path, files: Sequence[Path]) -> None:
    for file in files:
        parents = file.relative_to(folder).parts[:-1]
        if any(part.lower() in MASK_FOLDERS for part in parents):
            _refuse(folder, file, "it lies in a folder of masks")
    stems = {file.stem for file in files}
    for file in files:
        if (named := MASK_NAME.fullmatch(file.stem)) and named[1] in stems:
            _refuse(folder, file, f"it is named after {named[1]}")
    kinds = {(file.parent, file.stem): file for file in files if file.suffix.lower() in (".jpg", ".jpeg")}
    for file in files:
        photo = kinds.get((file.parent, file.stem))
        if photo is not None and file.suffix.lower() in (".png", ".bmp") and _is_two_coloured(file):
            _refuse(folder, file, f"it has two colours and the name of {photo.name}")


def _refuse(folder: Path, mask: Path, why: str) -> None:
    raise ValueError(
        f"{printable(folder)} holds masks beside the photographs, such as {printable(mask)} ({printable(why)}): "
        "give a folder with photographs alone"
    )


def _is_two_coloured(file: Path) -> bool:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.getcolors(2) is not None
    except Exception:  # Pillow's plugins raise many kinds; told with its reason when it is read
        return False

"""Find the photographs in a folder and read them in batches.

A photograph is named by a path; each page or frame of a file that has several is one photograph, ``name.tif#2``.
Folders that hold the masks of a data set are refused. A file that cannot be read becomes an `Unreadable`, not an error.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adpretrain.data.layouts.detect import PATTERNS, layout_of
from adpretrain.data.samples import IMAGE_SUFFIXES, how_to_make_photographs, is_image
from adpretrain.photographs import FORMATS, find_full_scale, page_count, read_image
from adpretrain.preprocess import Preprocess
from downstream.appearance import appearance
from downstream.regions import Box
from downstream.roi import EVERYWHERE, RoiFiles
from downstream.visualise import shown_region

PAGED_SUFFIXES = (".gif", ".png", ".tif", ".tiff", ".webp")
GOOD_FOLDERS = [pattern for layout in ("mvtec_3d", "btad", "mvtec", "mtd", "realiad") for pattern in PATTERNS[layout]]
MASK_FOLDERS = ("ground_truth", "gt", "mask", "masks")
MASK_NAME = re.compile(r"(.+)_(?:mask|gt|label|seg)", re.IGNORECASE)
SHOWN, SHOWN_TILED = 384, 1024  # pixels of the longest side of a photograph in reports
LENS = "a covered lens or a failed exposure?"
BLANK = 0.1  # share of the references' contrast; no Magnetic Tile photograph (of 1344) is below .3 of their median


def printable(text: object) -> str:
    """Make text valid UTF-8: file names on Linux are bytes and need not be."""
    return os.fsencode(str(text)).decode("utf-8", errors="replace")


def find_images(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Find every photograph below `folder`, sorted; links to folders are followed, and hidden files and everything
    below `exclude` are left out.

    A single file counts as a folder with one photograph. Raises ValueError for a data set of a known layout (and names
    the folder to use instead), for masks among the photographs, and if there is no such folder or no image in it.
    """
    if folder.is_file():
        if how := how_to_make_photographs([folder.suffix.lower()]):
            raise ValueError(f"{printable(folder)} is not a photograph. {how}")
        return each_page(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {printable(folder)}")
    files = sorted(path for path in files_below(folder, exclude) if is_image(path))
    if not files:
        barred = exclude.resolve() if exclude else None
        if barred and folder.resolve().is_relative_to(barred):
            raise ValueError(f"{printable(folder)} lies in the output folder {printable(exclude)}: give another --out")
        how = how_to_make_photographs({path.suffix.lower() for path in files_below(folder, exclude)})
        known = f"known kinds are {', '.join(IMAGE_SUFFIXES)}"
        raise ValueError(f"no images in {printable(folder)}; {known}" + (f". {how}" if how else ""))
    _refuse_data_set(folder)
    _refuse_masks(folder, files)
    return [page for file in files for page in each_page(file)]


def passed_over(folder: Path, exclude: Path | None = None) -> list[str]:
    """Return a warning if files below a folder are not photographs; hidden files do not count."""
    if not folder.is_dir():
        return []
    kinds = Counter(
        path.suffix.lower() or "without suffix" for path in files_below(folder, exclude) if not is_image(path)
    )
    if not kinds:
        return []
    listing = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    how = how_to_make_photographs(kinds)
    said = f"Files in {printable(folder)} without the suffix of a photograph were passed over: {listing}."
    return [f"{said} {how}" if how else said]


def file_and_page(path: Path) -> tuple[Path, int | None]:
    """Split the path of a photograph into its file and its page; None if the file has only one."""
    name, mark, page = path.name.rpartition("#")
    if mark and page.isdecimal() and Path(name).suffix.lower() in PAGED_SUFFIXES:  # "a#1.png" ends in a suffix
        return path.with_name(name), int(page)
    return path, None


def files_below(folder: Path, exclude: Path | None) -> Iterator[Path]:
    """Yield the files below a folder. A folder reached by several links, or that contains itself, is entered once."""
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


def each_page(file: Path) -> list[Path]:
    """The photographs in a file: itself, or its pages."""
    if file.suffix.lower() not in PAGED_SUFFIXES:
        return [file]
    try:
        count = page_count(file)
    except ValueError:  # the error is reported when the file is read
        count = 1
    return [file] if count == 1 else [file.with_name(f"{file.name}#{page}") for page in range(1, count + 1)]


def _refuse_data_set(folder: Path) -> None:
    layout = layout_of(folder)
    if layout is None or layout == "hf":  # a folder of photographs may also hold a metadata.csv, and so look like "hf"
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
        "give a folder of photographs alone"
    )


def _is_two_coloured(file: Path) -> bool:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.getcolors(2) is not None
    except Exception:  # Pillow's plugins raise many kinds of errors, which are reported when the file is read
        return False


@dataclass(frozen=True)
class Photo:
    """A photograph that was read: the network's input [3, S, S] and the undistorted picture to show."""

    path: Path
    pixels: Tensor
    shown: Image.Image
    digest: str  # hash of the pixels that the network sees: equal for copies with other names or lossless formats
    appearance: NDArray[np.float64]  # [F], see downstream.appearance
    brightest: int  # highest pixel value, 0 to 255
    saturated: bool  # whether the file has values above the full scale
    size: tuple[int, int]  # width and height of the file in pixels
    seen: Box  # the part of the file that the network sees: left, top, right, bottom
    image: Image.Image | None = None  # the whole RGB photograph, kept if it will be cut into tiles
    # The region of interest, bool [S, S] of the network's input, for tiles [H, W] of the photograph; None = all of it.
    roi: Tensor | None = None

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.size[0] / self.size[1]

    @property
    def whole(self) -> Tensor:
        """The whole photograph, uint8 [3, H, W]."""
        assert self.image is not None
        return torch.from_numpy(np.array(self.image)).permute(2, 0, 1)

    @property
    def contrast(self) -> float:
        """Standard deviation of the network's input, in the region of interest, averaged over its channels."""
        if self.roi is None or self.image is not None:
            return float(self.pixels.std(dim=(1, 2)).mean())
        return float(self.pixels[:, self.roi].std(dim=1).mean())


@dataclass(frozen=True)
class Unreadable:
    """A photograph that cannot be used, with the reason."""

    path: Path
    reason: str


class Stored(io.BytesIO):
    """The file of a photograph in memory, as a shard holds it; messages call it by its name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.path = Path(name)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class PhotoReader:
    """Reads the photographs of one camera. ``full_scale`` is the value that becomes 255 in gray photographs with more
    than 8 bits; see `adpretrain.photographs`. ``tiled``: they will be cut into tiles. ``roi``: what is inspected."""

    preprocess: Preprocess
    batch_size: int
    full_scale: float | None = None
    tiled: bool = False
    roi: RoiFiles = EVERYWHERE

    @classmethod
    def of_camera(
        cls,
        paths: Sequence[Path],
        preprocess: Preprocess,
        batch_size: int,
        tiled: bool = False,
        roi: RoiFiles = EVERYWHERE,
    ) -> PhotoReader:
        """Make a reader with the full scale of the photographs in ``paths``."""
        if tiled:  # the appearance is that of the whole photograph; two large photographs are in memory
            preprocess, batch_size = replace(preprocess, crop_from=None), 1
        return cls(preprocess, batch_size, find_full_scale(map(file_and_page, paths)), tiled, roi)

    def batches(self, paths: Sequence[Path]) -> Iterator[list[Photo | Unreadable]]:
        """Read photographs in order, in batches of `batch_size`, as `read` does."""
        if (size := self.batch_size) < 1:
            raise ValueError(f"batch size {size}; expected at least 1")
        return self.read(paths[start : start + size] for start in range(0, len(paths), size))

    def read(self, batches: Iterable[Sequence[Path | Stored]]) -> Iterator[list[Photo | Unreadable]]:
        """Read batches in threads, in order, one ahead of the consumer; at most two are in memory."""
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            ahead: list[Future[Photo | Unreadable]] = []
            for batch in batches:
                current, ahead = ahead, [pool.submit(self._read, one) for one in batch]
                if current:
                    yield [future.result() for future in current]
            if ahead:
                yield [future.result() for future in ahead]

    def open(self, photograph: Path | Stored) -> Image.Image:
        """Read one photograph, a file or a page of one, as 8-bit RGB. Raises ValueError if that is impossible."""
        if isinstance(photograph, Stored):
            return read_image(photograph, full_scale=self.full_scale)
        file, page = file_and_page(photograph)
        return read_image(file, page=page, full_scale=self.full_scale)

    def to_show(self, photo: Image.Image) -> Image.Image:
        """The region of an RGB photograph that the network sees, undistorted, in the size for people."""
        return shown_region(photo, self.preprocess, SHOWN_TILED if self.tiled else SHOWN)

    def _read(self, photograph: Path | Stored) -> Photo | Unreadable:
        path = photograph.path if isinstance(photograph, Stored) else photograph
        try:
            photo = self.open(photograph)
            return prepare_photo(path, photo, self.preprocess, self.tiled, self.roi.of(path, photo.size))
        except (ValueError, OSError) as error:
            return Unreadable(path, printable(error))


def without_blank(read: Sequence[Photo | Unreadable], usual: float) -> list[Photo | Unreadable]:
    """Mark photographs as unreadable if their contrast is below `BLANK` times the ``usual`` contrast.

    A covered lens or a failed exposure looks as uniform as the uniform parts of a product, which are normal.
    """

    def blank(photo: Photo) -> Unreadable:
        share = f"{printable(photo.path)} is blank (its contrast is {photo.contrast / usual:.1%} of the references')"
        above = "its values lie above the full scale of the normal photographs; were those saved with fewer bits?"
        return Unreadable(photo.path, f"{share}: {above if photo.saturated else LENS}")

    return [blank(item) if isinstance(item, Photo) and item.contrast < BLANK * usual else item for item in read]


def prepare_photo(
    path: Path,
    photo: Image.Image,
    preprocess: Preprocess,
    tiled: bool = False,
    roi: Image.Image | None = None,
    shown: Image.Image | None = None,
) -> Photo:
    """Prepare an RGB photograph for the network and for display; ``tiled``: it will be cut into tiles. ``roi``: a mask
    of its size, white where it is inspected. ``shown``: by default a small picture of the region that the network sees,
    whose drawing takes a third as long as scoring."""
    pixels, inside = preprocess.pixels(photo), None if roi is None else preprocess.mask(roi)
    if inside is not None and not bool(inside.any()):
        raise ValueError(f"the region of interest of {printable(path)} lies outside of what the network sees")
    return Photo(
        path,
        preprocess.normalise(pixels),
        shown or shown_region(photo, preprocess, SHOWN_TILED if tiled else SHOWN),
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:32],
        appearance(pixels, inside),
        int(pixels.max()),
        photo.info.get("saturated") is True,
        photo.size,
        preprocess.seen(photo.size),
        photo if tiled else None,
        inside if roi is None or not tiled else torch.from_numpy(np.asarray(roi) > 0),
    )


def without_copies(photos: Sequence[Photo], known: dict[str, str]) -> tuple[list[Photo], list[tuple[str, str]]]:
    """Leave out photographs whose digests are in ``known`` (digest -> name); return the others, and pairs of the names
    of a copy and its original. The photographs that are kept are added to ``known``.
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
    """Return ``path`` relative to ``root``, with forward slashes on every system."""
    return path.name if root.is_file() else path.relative_to(root).as_posix()

"""The photographs that visitors upload: their names, their limits, and how they are read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from adpretrain.photographs import as_rgb, page_count
from downstream.inspection.photos import Photo, PhotoReader, Unreadable, prepare_photo

MEGA = 10**6
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = "BMP, JPEG, PNG, TIFF or WebP"
NAME_LENGTH = 80


@dataclass(frozen=True)
class Limits:
    """Limits for one click on Score: numbers of photographs, bytes of a file, pixels of a photograph, and of all maps,
    which have as many as their photograph if it is cut into tiles."""

    good: int = 8
    new: int = 64
    file_bytes: int = 20 * MEGA
    pixels: int = 50 * MEGA
    map_pixels: int = 200 * MEGA

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


def read_upload(upload: Upload, reader: PhotoReader, limits: Limits = LIMITS) -> Photo | Unreadable:
    """Read one photograph. Its format is detected from the content, and its size is checked before decoding."""
    name = Path(upload.name)
    try:
        reason = refusal(upload.path, limits)
        if reason is None:
            with Image.open(upload.path, formats=FORMATS) as image:
                image.load()
                photo = as_rgb(ImageOps.exif_transpose(image), reader.full_scale)
            return _prepared(name, photo, reader)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ..., with paths in their messages
        reason = "the file is damaged or cut off"
    return Unreadable(name, reason)


def _prepared(name: Path, photo: Image.Image, reader: PhotoReader) -> Photo | Unreadable:
    """The photograph, or why the mask or the tiles do not fit it."""
    try:
        return prepare_photo(name, photo, reader.preprocess, reader.tiled, reader.roi.of(name, photo.size))
    except ValueError as error:
        return Unreadable(name, str(error).replace(str(reader.roi.mask), "the mask"))


def refusal(path: Path, limits: Limits) -> str | None:
    """Why a file is not read, or None if nothing speaks against it."""
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

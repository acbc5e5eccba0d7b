"""Photographs from strangers: limits, a check of the content, and names that are safe to show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from adpretrain.photographs import as_rgb, page_count
from adpretrain.preprocess import Preprocess
from downstream.inspection.photos import Photo, Unreadable, prepare_photo

MEGA = 10**6
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = "BMP, JPEG, PNG, TIFF or WebP"
NAME_LENGTH = 80


@dataclass(frozen=True)
class Limits:
    """What one press of the button may cost."""

    good: int = 8
    new: int = 64
    file_bytes: int = 20 * MEGA
    pixels: int = 50 * MEGA

    @property
    def upload_bytes(self) -> int:
        """The largest request that carries files: all the new photographs at once, and the wrapping."""
        return min(self.new * self.file_bytes, 500 * MEGA) + MEGA


LIMITS = Limits()


@dataclass(frozen=True)
class Upload:
    """A file that the server itself wrote; ``name`` is the user's, cleaned, and never opened."""

    path: Path
    name: str


def uploads(paths: Sequence[str | Path]) -> list[Upload]:
    """Files of the upload folder with clean, distinct names."""
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
    """The last part of a file's name, without what could be a path, markup, a formula or invisible.

    ``../../<x>.png`` -> ``x-.png``, ``=1+1.png`` -> ``1+1.png``; never empty, at most NAME_LENGTH characters.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    # Cc, Cf: control characters and those that reverse the direction of the text; Cs: bytes that are not UTF-8.
    visible = "".join(character for character in last if not unicodedata.category(character).startswith("C"))
    plain = re.sub(r"[<>&\"'`:|?*]+", "-", visible)
    plain = re.sub(r"\s+", " ", plain).lstrip("=+-@. \t").rstrip()
    return plain[-NAME_LENGTH:].lstrip("=+-@. ") or "photograph"


def check_counts(good: Sequence[object], new: Sequence[object], limits: Limits = LIMITS) -> None:
    """Raise ValueError, in words for the page, if there are too few or too many photographs."""
    if not good:
        raise ValueError(f"First drop 1 to {limits.good} photographs of good products into the left field.")
    if not new:
        raise ValueError(f"Drop the photographs to inspect into the right field, at most {limits.new} at a time.")
    if len(good) > limits.good:
        raise ValueError(f"{len(good)} good photographs are too many for this page: at most {limits.good}.")
    if len(new) > limits.new:
        raise ValueError(f"{len(new)} new photographs are too many for this page: at most {limits.new} at a time.")


def read_upload(upload: Upload, preprocess: Preprocess, limits: Limits = LIMITS) -> Photo | Unreadable:
    """One photograph, or why it cannot be used. The kind is decided by the content, the size before decoding."""
    name = Path(upload.name)
    try:
        reason = _refusal(upload.path, limits)
        if reason is None:
            with Image.open(upload.path, formats=FORMATS) as image:
                image.load()
                return prepare_photo(name, as_rgb(ImageOps.exif_transpose(image)), preprocess)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...; their texts hold paths
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
        return f"the content is not a photograph ({KINDS}), whatever the file's name"
    if width * height > limits.pixels:
        found = f"{width * height / MEGA:.0f} megapixels"
        return f"the picture has {found} ({width} x {height}); at most {limits.pixels / MEGA:.0f}"
    if pages > 1:
        return f"the file holds {pages} pages or frames: save each as a file of its own"
    return None

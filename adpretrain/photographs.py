"""Read photographs and masks from files (their pages, size and depth) as 8-bit pictures.

A file of more than 8 bits does not say how many of them the camera used: 10 and 12 bits come in 16-bit files. The full
scale is the value that becomes 255.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

TIFF_KIND = 254  # tag NewSubfileType; its lowest bit marks a smaller copy of another page
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # none runs another program, as EPS does
LOSSY = ("JPEG", "JPEG2000", "WEBP")
MOST_PIXELS = 178_956_970  # of one picture: Pillow's own limit against decompression bombs
INTEGER_SCALES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of 8, 10, 12, 14 and 16 bits
FLOAT_SCALES = (1.0, *INTEGER_SCALES)
OVERSHOOT = 1.25  # times a float picture's full scale is allowed: filters and interpolation exceed it at edges


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | IO[bytes]) -> Iterator[Image.Image]:
    try:
        with contextlib.ExitStack() as stack:
            file = path
            if isinstance(path, str | os.PathLike):
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise ValueError("it is not a file")  # a pipe would wait for ever, a device would never end
                # An open file is never mapped: Pillow mixes up the rows of a mapped gray TIFF that lies on its side.
                file = stack.enter_context(open(path, "rb"))
            yield stack.enter_context(Image.open(file, formats=FORMATS))
    except FileNotFoundError:
        raise ValueError(f"image not found: {path}") from None
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"cannot read image {path}: its content is not a picture of a known kind ({kinds})") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, bomb errors ...
        raise ValueError(f"cannot read image {path}: {error or type(error).__name__}") from error


@contextlib.contextmanager
def pixels_allowed(most: int) -> Iterator[None]:
    """A context in which all threads may read pictures of up to ``most`` pixels (elsewhere, `MOST_PIXELS`).

    Raises ValueError for a limit below `MOST_PIXELS`, because our own pictures may need that many.
    """
    if most < MOST_PIXELS:
        raise ValueError(f"max_pixels {most}; expected at least {MOST_PIXELS}, which is always allowed")
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = (most + 1) // 2  # Pillow warns above this and refuses above twice as much
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def _pages(image: Image.Image) -> list[int]:
    """The frames, from 0, of an open picture that are separate pictures: not a TIFF's smaller copies, nor the previews
    that a camera puts behind a JPEG."""
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO" or frames == 1:
        return [0]
    found = []
    for frame in range(frames):
        image.seek(frame)
        if not (isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TIFF_KIND, 0) & 1):
            found.append(frame)
    image.seek(0)
    return found or [0]


def page_count(path: str | os.PathLike[str] | IO[bytes]) -> int:
    """How many pictures a file holds: pages of a TIFF, frames of a GIF, PNG or WebP. Errors as in `read_image`."""
    with _opened(path) as image:
        return len(_pages(image))


def _open(path: str | os.PathLike[str] | IO[bytes], side: int | None = None, page: int | None = None) -> Image.Image:
    with _opened(path) as image:
        pages = _pages(image)
        if page is None and len(pages) > 1:
            raise ValueError(f"it holds {len(pages)} pages or frames: save each as a file of its own")
        if page is not None and not 1 <= page <= len(pages):
            raise ValueError(f"there is no page {page}; it holds {len(pages)}")
        if (frame := pages[(page or 1) - 1]) != 0:
            image.seek(frame)
        if side is not None:
            image.draft(None, (side, side))  # has an effect on JPEG only
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # copies do not have it
        return upright


def picture_size(path: str | os.PathLike[str] | IO[bytes]) -> tuple[int, int]:
    """(width, height) of a photograph, upright, from its header alone. Errors as in `read_image`."""
    with _opened(path) as image:
        # Pillow already gives a TIFF's size upright.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
        return image.size[::-1] if turned else image.size


def depth(path: str | os.PathLike[str] | IO[bytes], page: int | None = None) -> tuple[float, bool] | None:
    """The highest value of a gray picture with more than 8 bits, and whether it holds floats; None for 8 bits (then
    only the header is read). Errors as in `read_image`."""
    with _opened(path) as image:
        if not is_deep(image):
            return None
    image = _open(path, page=page)
    try:
        return float(values_of(image).max(initial=0.0)), image.mode == "F"
    except ValueError as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


def read_image(
    path: str | os.PathLike[str] | IO[bytes],
    side: int | None = None,
    page: int | None = None,
    full_scale: float | None = None,
) -> Image.Image:
    """Read a photograph (a path or an open file) as 8-bit RGB, upright (EXIF). Transparency is composited on white.

    ``side``: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides stay at least that long, which is faster
    and changes the pixels a little. ``page``: which page or frame, from 1. ``full_scale``: the value that becomes 255
    in gray pictures of more than 8 bits (`full_scale_of`); by default 65535 for integers, and 1 or 255 for floats.

    Raises ValueError that names the file if it is missing, truncated, not an image, absurdly large (`pixels_allowed`),
    or holds several pages and ``page`` names none of them.
    """
    image = _open(path, side, page)
    try:
        return as_rgb(image, full_scale)
    except ValueError as error:  # of a colour space that Pillow cannot convert
        raise ValueError(f"cannot read image {path}: {error}") from error


def as_rgb(image: Image.Image, full_scale: float | None = None) -> Image.Image:
    """A picture of any mode as 8-bit RGB. Transparency is composited on white. ``full_scale``: as in `read_image`."""
    image = to_8_bit(image, full_scale)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def read_mask(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read a defect mask as 8-bit gray, 255 where a defect is marked. Rules and errors as in `examine_mask`."""
    return examine_mask(path)[0]


def examine_mask(path: str | os.PathLike[str] | IO[bytes]) -> tuple[Image.Image, str]:
    """A defect mask as 8-bit gray, 255 where a defect is marked, and a remark if the file is unusual, else "".

    Every colour but black marks a defect, as some sets store the number of its kind. Lossy formats add a nearly black
    fringe, so there only pixels brighter than half of white count. If the colours mark everything or nothing, the mask
    was painted on a transparent layer: then all pixels that are not fully transparent count. Errors as in `read_image`.
    """
    image = _open(path)
    lossy = image.format in LOSSY
    try:
        layered = "A" in image.getbands() or ("transparency" in image.info and image.mode in ("P", "L", "RGB"))
        opaque = np.asarray(image.convert("RGBA"))[..., 3] > 0 if layered else np.ones(image.size[::-1], bool)
        if image.mode in ("P", "PA", "LA", "CMYK"):  # the colour counts, not the palette's index
            image = image.convert("RGB")
        values = np.asarray(to_8_bit(image) if lossy else image)
    except ValueError as error:  # of a colour space that Pillow cannot convert
        raise ValueError(f"cannot read image {path}: {error}") from error
    if values.ndim == 3:  # a pixel is marked if any colour channel is
        values = values[..., :3].max(axis=2)
    marked = values > (127 if lossy else 0)
    remark = f"mask {path} is in a lossy format: pixels brighter than half of white count as marked" if lossy else ""
    if marked.all() == marked.any() and opaque.all() != opaque.any():
        marked, remark = opaque, f"mask {path} is of one colour: pixels that are not transparent count as marked"
    return Image.fromarray((marked * 255).astype(np.uint8)), remark


def mask_values(path: str | os.PathLike[str] | IO[bytes]) -> NDArray[np.int64]:
    """The values of a gray mask's pixels [H, W] as they are in the file, where they stand for kinds of defects.

    Raises ValueError that names the file if it is not a gray picture, and as `read_image` does.
    """
    image = _open(path)
    if len(image.getbands()) > 1 or image.mode in ("P", "F"):
        raise ValueError(f"mask {path} has the mode {image.mode}; expected gray values that stand for kinds of defects")
    return np.asarray(image, dtype=np.int64)


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits, which Pillow supports for gray pictures only."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def values_of(image: Image.Image) -> NDArray[np.float32]:
    """The unscaled values of a picture. Raises ValueError for NaN."""
    values = np.asarray(image, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError("it holds NaN")
    return values


def to_8_bit(image: Image.Image, full_scale: float | None = None) -> Image.Image:
    """Map 16-bit, 32-bit and float gray images to 8 bit; ``full_scale`` becomes 255.

    By default it is 65535 for integers, and 1 or 255 for floats. The range is fixed, never the image's own minimum and
    maximum: stretching each photograph by itself would hide brightness differences between a part and its references.
    ``info["saturated"]`` of the result says whether values exceeded the full scale.
    """
    if not is_deep(image):
        return image
    values = values_of(image)
    top = float(values.max(initial=0.0))
    if full_scale is None:
        full_scale = 65535.0 if image.mode != "F" else 1.0 if top <= OVERSHOOT else 255.0
    mapped = Image.fromarray(np.clip(np.rint(values * (255.0 / full_scale)), 0, 255).astype(np.uint8))
    mapped.info["saturated"] = top > full_scale * (OVERSHOOT if image.mode == "F" else 1.0)
    return mapped


def full_scale_of(depths: Iterable[tuple[float, bool] | None]) -> float | None:
    """The full scale of one camera's photographs, from their `depth`; None if all have 8 bits.

    Cameras write 10 or 12 bits into 16-bit files, so this is the smallest of `INTEGER_SCALES` (or `FLOAT_SCALES`) that
    holds the highest value. Raises ValueError for values above all scales, and for floats beside integers.
    """
    deep = [found for found in depths if found is not None]
    if not deep:
        return None
    if len({is_float for _, is_float in deep}) > 1:
        raise ValueError("some photographs hold floats and others integers of more than 8 bits: save all alike")
    top, is_float = max(deep)
    for scale in FLOAT_SCALES if is_float else INTEGER_SCALES:
        if top <= scale * (OVERSHOOT if is_float else 1.0):
            return scale
    raise ValueError(f"values up to {top:.6g} exceed 16 bits (65535), the highest full scale: rescale the photographs")


def find_full_scale(photographs: Iterable[tuple[str | os.PathLike[str], int | None]]) -> float | None:
    """The `full_scale_of` photographs in files, each with the number of its page or None.

    Only the header of an 8-bit file is read. Photographs that cannot be read are ignored here and reported when they
    are used. Raises ValueError as `full_scale_of` does.
    """

    def found(photograph: tuple[str | os.PathLike[str], int | None]) -> tuple[float, bool] | None:
        try:
            return depth(*photograph)
        except (ValueError, OSError):
            return None

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return full_scale_of(pool.map(found, photographs))

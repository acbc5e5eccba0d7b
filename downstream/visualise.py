"""Heatmaps over photographs, all on one colour scale, so that pictures can be compared by eye.

Shape legend: N maps, S x S map pixels (the region that the network sees); photographs are PIL RGB, any size.

The scale is fixed by normal photographs. Its low end is their median map value; its middle is the limit, which is the
calibrated threshold if scores and maps have the same unit, as with FeatureNorm, and else their highest map value.
Colours beyond the middle therefore mean "beyond normal" in every run with the same references and threshold. The
contour follows the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from adpretrain.files import atomic_path
from adpretrain.preprocess import Preprocess
from downstream.regions import Box, Region

COLORMAP = "inferno"
_INK, _PAPER, _MUTED = (28, 30, 34), (255, 255, 255), (110, 115, 125)
_CONTOUR, _TRUTH = (64, 224, 255), (80, 255, 120)
_BOX = (255, 255, 255)
_GAP, _HEADER, _FOOTER = 8, 22, 40
MOST_BOXES = 20  # more would hide the product


@dataclass(frozen=True)
class ColourScale:
    """Maps values in [low, high] to colours; `limit`, in the middle, is the level of the contour."""

    low: float
    limit: float
    high: float

    @classmethod
    def from_normal_maps(cls, maps_NSS: ArrayLike, limit: float | None = None) -> ColourScale:
        """Fix the scale by maps [N, S, S] of normal photographs; `limit` defaults to their maximum.

        The maximum is also used if the limit is not above the median, because it could not be the middle of the scale.
        Raises ValueError if the maps are empty or not finite.
        """
        maps = np.asarray(maps_NSS, dtype=np.float64)
        if maps.size == 0 or not np.isfinite(maps).all():
            raise ValueError(f"maps of shape {maps.shape} are empty or not finite: they give no colour scale")
        return cls.of(float(np.median(maps)), float(maps.max()), limit)

    @classmethod
    def of(cls, low: float, peak: float, limit: float | None = None) -> ColourScale:
        """Fix the scale by the median and the highest value of normal maps; `limit` as in `from_normal_maps`."""
        return cls._around(low, peak if limit is None or limit <= low else limit)

    @classmethod
    def from_typical_map(cls, maps: Sequence[NDArray[np.floating]], limit: float | None = None) -> ColourScale:
        """Fix the scale by the map [S, S] with the median peak among ``maps``; maps that are not finite are ignored."""
        finite = [map_SS for map_SS in maps if np.isfinite(map_SS).all()]
        if not finite:
            return cls(0.0, 1.0, 2.0)  # any scale will do, because nothing could be read and nothing will be drawn
        return cls.from_normal_maps(
            sorted(finite, key=lambda map_SS: float(map_SS.max()))[len(finite) // 2][None], limit
        )

    @classmethod
    def _around(cls, low: float, middle: float) -> ColourScale:
        # Constant maps (as of a blank photograph against itself) have no range; with any positive one they are dark.
        room = max(middle - low, 1e-6 * max(abs(middle), 1e-6))
        return cls(low=low, limit=low + room, high=low + 2 * room)

    def with_limit(self, limit: float | None) -> ColourScale:
        """Return the scale for another limit; it is unchanged if that is None or not above `low`."""
        return self if limit is None or limit <= self.low else self._around(self.low, limit)

    def shares(self, map_SS: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the position of map values on the scale, clipped to [0, 1]."""
        return np.clip((map_SS - self.low) / (self.high - self.low), 0.0, 1.0)


def shown_region(photo: Image.Image, preprocess: Preprocess, longest: int = 384) -> Image.Image:
    """Return the region that the network sees, undistorted and with its longest side `longest` pixels.

    The network's input may be squeezed to a square; pictures for people keep the shape of the photograph.
    """
    left, top, right, bottom = preprocess.seen(photo.size)
    zoom = longest / max(right - left, bottom - top)
    # The short side of an extremely thin photograph must keep at least a few pixels.
    size = (max(16, round((right - left) * zoom)), max(16, round((bottom - top) * zoom)))
    return photo.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def overlay(photo: Image.Image, map_SS: NDArray[np.floating], scale: ColourScale, contour: bool = True) -> Image.Image:
    """Draw the heatmap over the photograph, in its size, with a contour around values above `scale.limit`.

    Normal areas are nearly transparent, so that the product remains visible. The map is drawn over all of ``photo``, so
    pass `shown_region` of a photograph if the network sees only a crop. NaN marks what is not inspected, which is
    darkened. Raises ValueError if the map is not [S, S] or holds infinite values.
    """
    values = np.asarray(map_SS, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"the map has shape {values.shape}; expected [S, S]")
    if np.isinf(values).any():
        raise ValueError("the map holds infinite values, for which there is no colour")
    unseen = np.isnan(values)
    outside = np.asarray(Image.fromarray(unseen).resize(photo.size, Image.Resampling.NEAREST))
    values = np.where(unseen, np.float32(scale.low), values)
    values = np.asarray(Image.fromarray(values).resize(photo.size, Image.Resampling.BILINEAR))
    share_HW = scale.shares(values)
    # The photograph is turned gray, so that the colour of a red product is not mistaken for heat.
    base = np.asarray(photo.convert("L").convert("RGB"), dtype=np.float64)
    heat = colormaps[COLORMAP](share_HW)[..., :3] * 255
    opacity = (0.10 + 0.65 * np.sqrt(share_HW))[..., None]
    mixed = base * (1 - opacity) + heat * opacity
    if contour:
        mixed[outline(values > scale.limit)] = _CONTOUR
    if outside.any():
        mixed[outside] *= 0.4  # what is not inspected is dark, with an edge around the region of interest
        mixed[outline(~outside, 1)] = _MUTED
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def outline(region_HW: NDArray[np.bool_], thickness: int = 2) -> NDArray[np.bool_]:
    """Return the inner border of a region, `thickness` pixels wide; the edge of the image is not a border."""
    return region_HW & ~ndimage.binary_erosion(region_HW, iterations=thickness, border_value=1)


def panel(
    photo: Image.Image,
    map_SS: NDArray[np.floating],
    scale: ColourScale,
    mask: NDArray[np.bool_] | None = None,
    title: str = "",
    regions: Sequence[Region] = (),
    seen: Box | None = None,
) -> Image.Image:
    """Draw photograph, heatmap and, if a mask is given ([S, S] or photograph-sized bool), the marked defect side by
    side, with a title above and the colour bar below. The heatmap shows the regions with their numbers; ``seen`` is as
    in `numbered`.
    """
    pictures = [("photograph", photo), ("heatmap", numbered(overlay(photo, map_SS, scale), regions, seen))]
    if mask is not None:
        pictures.append(("ground truth", marked(photo, mask)))
    width, height = photo.size
    titled = _HEADER if title else 0
    canvas = Image.new(
        "RGB",
        (len(pictures) * (width + _GAP) + _GAP, titled + _HEADER + height + _FOOTER + _GAP),
        _PAPER,
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    if title:
        draw.text((_GAP, 5), _fit(draw, title, font, canvas.width - 2 * _GAP), fill=_INK, font=font)
    for index, (name, picture) in enumerate(pictures):
        left = _GAP + index * (width + _GAP)
        draw.text((left, titled + 4), _fit(draw, name, font, width), fill=_MUTED, font=font)
        canvas.paste(picture, (left, titled + _HEADER))
    bar = colour_bar(scale, canvas.width - 2 * _GAP, _FOOTER)
    canvas.paste(bar, (_GAP, titled + _HEADER + height + _GAP))
    return canvas


def numbered(picture: Image.Image, regions: Sequence[Region], seen: Box | None = None) -> Image.Image:
    """Draw thin boxes with the numbers 1, 2, ... around the first `MOST_BOXES` regions.

    seen: (left, top, right, bottom), the part of the photograph, in its pixels, that ``picture`` shows, whatever its
    size; by default the picture is the photograph itself.
    """
    left, top, right, bottom = (0.0, 0.0, *picture.size) if seen is None else seen
    across, down = picture.width / (right - left), picture.height / (bottom - top)
    picture = picture.copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    # The first is drawn last, so that no other box lies over it.
    for number, region in reversed(list(enumerate(regions[:MOST_BOXES], start=1))):
        x0, y0, x1, y1 = region.box
        box = [round((x0 - left) * across), round((y0 - top) * down)]
        box += [max(box[0], round((x1 - left) * across) - 1), max(box[1], round((y1 - top) * down) - 1)]
        draw.rectangle(box, outline=_BOX)
        text, high = str(number), 12
        wide = round(draw.textlength(text, font=font)) + 3
        # The number stands on the box, or inside it at the top of the picture.
        x, y = min(box[0], picture.width - wide), box[1] - high if box[1] >= high else box[1]
        draw.rectangle((x, y, x + wide, y + high), fill=_INK)
        draw.text((x + 2, y), text, fill=_BOX, font=font)
    return picture


def photo_and_heatmap(saved: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Cut photograph and heatmap out of a `panel` that has a title and no mask."""
    top, width, below = 2 * _HEADER, (saved.width - 3 * _GAP) // 2, saved.height - _FOOTER - _GAP
    lefts = (_GAP, 2 * _GAP + width)
    first, second = (saved.crop((left, top, left + width, below)) for left in lefts)
    return first, second


def colour_bar(scale: ColourScale, width: int, height: int = _FOOTER) -> Image.Image:
    """Draw the legend: colours from the low end over the limit to the high end of the scale, with their map values
    below.
    """
    bar = Image.new("RGB", (width, height), _PAPER)
    strip = colormaps[COLORMAP](np.linspace(0, 1, width))[None, :, :3].repeat(10, axis=0) * 255
    bar.paste(Image.fromarray(np.rint(strip).astype(np.uint8)), (0, 2))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(size=12)
    middle = width // 2
    draw.rectangle((middle - 1, 0, middle + 1, 13), fill=_CONTOUR)
    # Narrow panels have no room for words between the numbers.
    words = ("normal ", "limit ", "") if width >= 360 else ("", "", "")
    for at, anchor, word, value in zip(
        (0, middle, width - 1), ("la", "ma", "ra"), words, (scale.low, scale.limit, scale.high), strict=True
    ):
        draw.text((at, 17), f"{word}{value:.3g}", fill=_MUTED, font=font, anchor=anchor)
    return bar


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whose file appears only when it is complete."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=2)  # five times faster than 6, and a sixth larger


def marked(photo: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """Draw the border of a defect's mask, [S, S] or of the photograph's size, on the photograph."""
    region = Image.fromarray(np.asarray(mask, dtype=np.uint8)).resize(photo.size, Image.Resampling.NEAREST)
    pixels = np.array(photo.convert("RGB"))
    pixels[outline(np.asarray(region) > 0)] = _TRUTH
    return Image.fromarray(pixels)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut off the beginning of a text that is too long, because the end of a path says more than its start."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text

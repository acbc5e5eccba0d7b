"""Connected regions of a score map above a limit, and the statistic of normal maps that calibrates the limit.

A region is a set of map cells with values above the limit that touch at sides or corners (8 neighbours). A map may be
coarser than the photograph, squeezed, and cover only a part of it; cells are placed in the photograph by the edges of
their columns and rows. NaN in a map marks cells outside the region of interest, which belong to no region.

The limit follows from normal maps as the threshold of a score does (`downstream.calibration`): a map shows a region of
at least A cells above a limit exactly if its `peak_of` for A exceeds that limit. So with the limit
``calibrate(rate=rate, extra=[peak_of(map_HW, A) for map_HW in maps]).threshold``, a normal photograph shows any region
of at least A cells with a probability of at most the promised rate.

Shapes: H x W map cells; h x w those in the box of a region. Places are pixels from the photograph's left and top edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

_TOUCHING = np.ones((3, 3), dtype=bool)
_DIGITS = 6  # decimal places of a pixel: an edge that rounding moved to 300.0000000001 must not reach into pixel 300
_TILE = 256  # cells a side: maps are searched by tiles first, see `peak_of`
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Region:
    """A connected region of a map, in the pixels of the photograph."""

    mask: NDArray[np.bool_]  # [h, w], the cells of the region
    columns: NDArray[np.float64]  # [w + 1], ascending: the edges of the mask's columns in the photograph
    rows: NDArray[np.float64]  # [h + 1], likewise
    area: float  # square pixels: the number of cells times the size of one
    area_mm2: float | None  # square millimetres to six digits; None if the size of a pixel was not given
    peak: float  # highest map value
    mean: float  # mean map value
    peak_at: tuple[int, int]  # x, y of the pixel in which the centre of the highest cell lies

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box of whole pixels around all cells: left, top, right, bottom, half-open."""
        (left, right), (top, bottom) = self.columns[[0, -1]].tolist(), self.rows[[0, -1]].tolist()
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def painted(self) -> NDArray[np.bool_]:
        """Return the region at the photograph's resolution: bool [bottom - top, right - left] of its `box`.

        A pixel is inside if its centre lies in a cell of the region. If that holds for none, because the cells are
        smaller than pixels, the pixel of the peak is.
        """
        left, top, right, bottom = self.box
        column_of = np.searchsorted(self.columns, np.arange(left, right) + 0.5, side="right")
        row_of = np.searchsorted(self.rows, np.arange(top, bottom) + 0.5, side="right")
        # Places 0 and w + 1 are before the first and behind the last edge.
        painted = np.pad(self.mask, 1)[np.ix_(row_of, column_of)]
        if not painted.any():
            painted[self.peak_at[1] - top, self.peak_at[0] - left] = True
        return painted


def find_regions(
    map_HW: ArrayLike,
    limit: float,
    photo_size: tuple[int, int],
    seen: Box | None = None,
    least_area: float = 0.0,
    mm_per_pixel: float | None = None,
) -> list[Region]:
    """Return the regions of a map [H, W] with values strictly above ``limit``, the highest peak first.

    photo_size: (width, height) of the photograph in pixels. seen: (left, top, right, bottom) of the part that the map
    covers, as `Preprocess.seen` gives it; by default all. least_area: square pixels; smaller regions are left out.
    mm_per_pixel: the side of a pixel on the product.

    Raises ValueError for a map that is not [H, W] or holds infinite values, a limit of NaN, a covered part outside the
    photograph, a negative area, and a pixel without size.
    """
    values, seen = _checked_map(map_HW), _checked_part(seen, photo_size)
    if math.isnan(limit):
        raise ValueError("the limit of the regions is NaN; expected a map value, such as a calibrated threshold")
    if mm_per_pixel is not None and not 0 < mm_per_pixel < math.inf:
        raise ValueError(f"a pixel of {mm_per_pixel} mm; expected its side on the product in millimetres, such as 0.05")
    columns = _edges(seen[0], seen[2], values.shape[1], photo_size[0])
    rows = _edges(seen[1], seen[3], values.shape[0], photo_size[1])
    cells, cell_area = least_cells(least_area, values.shape, photo_size, seen), _cell_area(values.shape, seen)
    labels, boxes = _components(values > float(limit), cells)
    regions = list[Region]()
    for number, (down, across) in enumerate(boxes, start=1):
        mask = labels[down, across] == number
        inside = values[down, across][mask]
        y, x = np.argwhere(mask)[int(inside.argmax())] + (down.start, across.start)
        area = len(inside) * cell_area
        regions.append(
            Region(
                mask=mask,
                columns=columns[across.start : across.stop + 1],
                rows=rows[down.start : down.stop + 1],
                area=area,
                area_mm2=None if mm_per_pixel is None else float(f"{area * mm_per_pixel**2:.6g}"),
                peak=float(inside.max()),
                mean=float(inside.mean(dtype=np.float64)),
                peak_at=(_middle(columns, x, photo_size[0]), _middle(rows, y, photo_size[1])),
            )
        )
    return sorted(regions, key=lambda region: -region.peak)  # stable: equal peaks keep the order of the map's rows


def paint(regions: Iterable[Region], photo_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return all regions of a photograph of ``photo_size`` (width, height) as one mask, bool [height, width]."""
    mask = np.zeros(photo_size[::-1], dtype=bool)
    for region in regions:
        left, top, right, bottom = region.box
        mask[top:bottom, left:right] |= region.painted()
    return mask


def least_cells(least_area: float, shape: tuple[int, ...], photo_size: tuple[int, int], seen: Box | None = None) -> int:
    """Return how many cells a region needs to have at least ``least_area`` square pixels (at least 1), for a map of
    ``shape`` [H, W]; ``photo_size`` and ``seen`` are those of `find_regions`. `peak_of` takes it, so that the limit is
    calibrated for the very regions that `find_regions` returns. Raises ValueError for a negative area.
    """
    if not 0 <= least_area < math.inf:
        raise ValueError(f"a least area of {least_area} pixels; expected 0 (every region counts) or more")
    return max(1, math.ceil(least_area / _cell_area(shape, _checked_part(seen, photo_size)) - 1e-9))


def peak_of(map_HW: ArrayLike, least_area_cells: int = 1) -> float:
    """Return the highest t for which {map >= t} has a connected region of at least ``least_area_cells`` cells; for one
    cell, that is the maximum.

    The result is exact. A region within a tile of the map is one of the map, so the tiles, those with the highest
    values first, give a lower bound that is nearly always tight. What is left to search in the whole map are the few
    regions above it. Raises ValueError for a map that is not [H, W], that holds infinite values, or in which no region
    can be so large.
    """
    values = _checked_map(map_HW)
    values = np.where(np.isnan(values), -np.inf, values)
    if least_area_cells <= 1:
        best = float(values.max())
    else:
        side = max(_TILE, 4 * math.isqrt(least_area_cells))
        starts = [(y, x) for y in range(0, values.shape[0], side) for x in range(0, values.shape[1], side)]
        tiles = sorted((values[y : y + side, x : x + side] for y, x in starts), key=lambda tile: -float(tile.max()))
        best = -math.inf
        for part in (*tiles, values):
            best = _higher(part, least_area_cells, best)
    if best == -math.inf:
        raise ValueError(
            f"a least area of {least_area_cells} cells, but no connected part of this map of {values.shape[0]} x "
            f"{values.shape[1]} cells is so large; choose a smaller least area or a larger region of interest"
        )
    return best


def _higher(values_HW: NDArray[np.floating], cells: int, best: float) -> float:
    """Return the highest t > ``best`` for which {values >= t} has a region of ``cells`` cells; ``best`` if none."""
    labels, boxes = _components(values_HW > best, cells)
    for number, box in enumerate(boxes, start=1):
        region = np.where(labels[box] == number, values_HW[box], -np.inf)
        steps = np.unique(region[region > best])
        low, high = 0, len(steps)  # regions at steps[:low] are large enough, those at steps[high:] are not
        while low < high:
            middle = (low + high) // 2
            above = region >= steps[middle]
            if np.count_nonzero(above) >= cells and _components(above, cells)[1]:
                low = middle + 1
            else:
                high = middle
        best = float(steps[low - 1]) if low else best
    return best


def _components(mask_HW: NDArray[np.bool_], cells: int) -> tuple[NDArray[np.int32], list[tuple[slice, slice]]]:
    """Label the connected components of at least ``cells`` cells 1, 2, ... [H, W], and return the box of each."""
    labels, _ = ndimage.label(mask_HW, structure=_TOUCHING)
    large = np.bincount(labels.ravel()) >= cells
    large[0] = False
    if not large.any():
        return labels, []
    # Noise has a million components, of which few are large; the boxes of all would take seconds.
    numbers = np.where(large, np.cumsum(large), 0).astype(np.int32)
    labels = numbers[labels]
    return labels, ndimage.find_objects(labels)


def _checked_map(map_HW: ArrayLike) -> NDArray[Any]:
    values = np.asarray(map_HW)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise ValueError(f"the map has shape {values.shape} and dtype {values.dtype}; expected real numbers [H, W]")
    if np.isinf(values).any():
        raise ValueError("the map holds infinite values; expected finite ones, or NaN outside the region of interest")
    return values if values.dtype.kind == "f" and values.dtype.itemsize >= 4 else values.astype(np.float64)


def _checked_part(seen: Box | None, photo_size: tuple[int, int]) -> Box:
    width, height = photo_size
    left, top, right, bottom = (0.0, 0.0, float(width), float(height)) if seen is None else seen
    room = 1e-3  # of a pixel, for rounding
    if not (-room <= left < right <= width + room and -room <= top < bottom <= height + room):
        raise ValueError(
            f"the map covers {seen} of a photograph of {width} x {height} pixels; expected left, top, right and bottom "
            "within the photograph, such as Preprocess.seen gives"
        )
    return left, top, right, bottom


def _cell_area(shape: tuple[int, ...], seen: Box) -> float:
    return (seen[2] - seen[0]) / shape[1] * ((seen[3] - seen[1]) / shape[0])


def _edges(start: float, stop: float, cells: int, size: int) -> NDArray[np.float64]:
    return np.clip(np.round(np.linspace(start, stop, cells + 1), _DIGITS), 0, size)


def _middle(edges: NDArray[np.float64], index: int, size: int) -> int:
    return min(int((edges[index] + edges[index + 1]) / 2), size - 1)

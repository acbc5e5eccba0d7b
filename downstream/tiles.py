"""Tiles of a photograph that has more pixels than a network takes: their size, and where they lie.

All tiles are squares of one size on a grid that covers the photograph exactly; neighbours overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the photograph; right and bottom are outside
Positions = Literal["local", "global"]
LEAST_TILE = 16  # pixels
OVERLAP = 0.125


@dataclass(frozen=True)
class Tiling:
    """How photographs are cut into tiles. Raises ValueError for values out of range.

    Args:
        tile: cut photographs into square tiles of this side in pixels, each of which becomes one input of the network;
            0 = the whole photograph is one input, so that marks of a few pixels on a large photograph are lost
        overlap: share of a tile's side that neighbouring tiles have in common, at least
        positions: compare a tile with the normal tiles of the same place (local: the photographs must show the product
            in the same place, to within half of the overlap), or of everywhere (global)
    """

    tile: int = 0
    overlap: float = OVERLAP
    positions: Positions = "local"

    def __post_init__(self) -> None:
        if self.tile and self.tile < LEAST_TILE:
            raise ValueError(f"tile {self.tile}: expected at least {LEAST_TILE} pixels, or 0 for no tiles")
        if not 0 <= self.overlap <= 0.5:
            raise ValueError(f"overlap {self.overlap}: expected a share of the tile's side between 0 and 0.5")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions {self.positions!r}; choose one of {', '.join(get_args(Positions))}")

    def starts(self, length: int) -> list[int]:
        """The first pixel of every tile along a side of ``length`` pixels, evenly spaced from one end to the other."""
        room = length - self.tile
        steps = math.ceil(room / max(1.0, self.tile * (1 - self.overlap)))
        return [round(step * room / steps) for step in range(steps + 1)] if steps else [0]

    def rows(self, width: int, height: int) -> list[list[Box]]:
        """The tiles of a photograph, row by row. Raises ValueError if a side is shorter than a tile."""
        if min(width, height) < self.tile:
            raise ValueError(
                f"a photograph of {width}x{height} pixels is smaller than a tile of {self.tile}: lower --tile to at "
                f"most {min(width, height)}"
            )
        side = self.tile
        return [[(left, top, left + side, top + side) for left in self.starts(width)] for top in self.starts(height)]

"""Tiles of a photograph that has more pixels than a network takes: where they lie, and how their maps become one.

All tiles are squares of one size and lie on a grid that covers the photograph exactly; neighbours overlap. Near its
border a tile counts little, as the network sees only one side there, and its neighbour counts more: the stitched map
has no seams.

Shapes: W x H the photograph, S x S the map of a tile, W' x H' the stitched map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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
        return [
            [(left, top, left + side, top + side) for left in self.starts(width)] for top in self.starts(height)
        ]


class Stitched:
    """The map of a photograph of ``width`` x ``height`` pixels, made of the maps [S, S] of its tiles.

    It has S cells for the side of a tile: [H', W'] with H' = height S / tile. Where tiles overlap it is their average,
    weighted by the distance from the border of each.
    """

    def __init__(self, tiling: Tiling, width: int, height: int, side: int) -> None:
        self.zoom = side / tiling.tile  # map cells for a pixel of the photograph
        shape = max(side, round(height * self.zoom)), max(side, round(width * self.zoom))
        self.total, self.weight = torch.zeros(shape), torch.zeros(shape)
        ramp = ((torch.arange(side) + 0.5) / max(1.0, tiling.overlap * side)).clamp_max(1.0)
        ramp = torch.minimum(ramp, ramp.flip(0))
        self.ramp_SS = ramp[:, None] * ramp

    def add(self, box: Box, map_SS: Tensor) -> None:
        """Add the map of the tile at ``box``; cells that are NaN do not count."""
        side, (height, width) = len(self.ramp_SS), self.total.shape
        top, left = min(round(box[1] * self.zoom), height - side), min(round(box[0] * self.zoom), width - side)
        at = slice(top, top + side), slice(left, left + side)
        map_SS = map_SS.float().cpu()
        weight_SS = self.ramp_SS * ~map_SS.isnan()
        self.total[at] += map_SS.nan_to_num(0.0) * weight_SS
        self.weight[at] += weight_SS

    def map(self) -> Tensor:
        """The map [H', W']; NaN where no tile was added."""
        return self.total / self.weight

"""The region of interest: the pixels of a photograph that are inspected. Outside it nothing is scored or matched.

A *token* (a cell of a grid of features) is inside if at least half of its cell is. Its feature still sees what lies
around it, as far as the receptive field of the network and the neighbourhood of an embedding reach.

A map is smoothed after its outside tokens took the value of the nearest inside one. So no value from outside leaks into
the region by upsampling or by the Gaussian, and the border of the region is treated as that of the photograph is, where
values are repeated too. Dividing a blurred map by the blurred region would do the same, but it divides by nearly
nothing where the region is thin, and levels of different grids would reach to different pixels.

Shapes: B images, S side of the images in pixels, H x W tokens of a level, K photographs of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from adpretrain.data.samples import is_image
from adpretrain.photographs import read_mask
from adpretrain.references import ReferenceBank


@final
class RegionOfInterest:
    """The inspected pixels of images, ``roi``: bool [S, S] (one region for every image, ``shared``) or [B, S, S].

    Raises ValueError unless ``roi`` is a bool tensor [S, S] or [B, S, S].
    """

    def __init__(self, roi: Tensor) -> None:
        if not isinstance(roi, Tensor) or roi.dtype != torch.bool or roi.ndim not in (2, 3):
            found = f"{tuple(roi.shape)} of {roi.dtype}" if isinstance(roi, Tensor) else f"a {type(roi).__name__}"
            raise ValueError(
                f"roi must be a bool tensor [S, S], or [B, S, S] with one region for each image, got {found}: prepare "
                "a mask as the photographs are, with preprocess.mask"
            )
        self.shared = roi.ndim == 2
        self.roi, self.pixels = roi, roi[None] if self.shared else roi
        self._cells: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}  # size of a grid -> `_cells_of`
        self._pixels: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # size of maps -> `_at`

    def of(self, images: Tensor, first: int = 0) -> RegionOfInterest:
        """The region of the images [B, 3, S, S] that follow the ``first`` ones. Raises ValueError if S differs or if
        there are fewer regions."""
        if self.pixels.shape[1:] != images.shape[2:]:
            raise ValueError(
                f"roi has {tuple(self.pixels.shape[1:])} pixels but the images {tuple(images.shape[2:])}: prepare both "
                "alike"
            )
        return self.pick(range(first, first + len(images)))

    def exactly(self, images: Tensor) -> RegionOfInterest:
        """The region of all these images. Raises ValueError if S or their number differs."""
        self.check_count(len(images))
        return self.of(images)

    def check_count(self, images: int) -> None:
        """Raise ValueError unless there is one region for all images, or one for each."""
        if not self.shared and len(self.pixels) != images:
            raise ValueError(f"{len(self.pixels)} regions of interest for {images} images: give each image one")

    def pick(self, numbers: Sequence[int]) -> RegionOfInterest:
        """The region of the images of these numbers. Raises ValueError if there are fewer regions."""
        if self.shared:
            return self
        if (images := max(numbers) + 1) > len(self.pixels):
            raise ValueError(
                f"{len(self.pixels)} regions of interest for at least {images} images: give each image one"
            )
        return RegionOfInterest(self.pixels[list(numbers)])

    def inside(self, grid_BHW: Tensor) -> Tensor:
        """Which tokens of a grid are inside, bool [B, H, W] on its device. Raises ValueError if an image has none."""
        return self._cells_of(grid_BHW)[0].expand(grid_BHW.shape)

    def tokens(self, grid_BHW: Tensor) -> list[Tensor]:
        """The values [., n] of the inside tokens: of all images together if the region is shared, else of each."""
        inside, _, places = self._cells_of(grid_BHW)
        if self.shared:
            return [grid_BHW.flatten(1)[:, places]]
        return [one[cells][None] for one, cells in zip(grid_BHW, inside.expand(grid_BHW.shape), strict=True)]

    def _cells_of(self, grid_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens of a grid are inside, the number of the nearest inside token of each, and the numbers of the
        inside tokens of the first image: [., H, W], [., H * W], [n].

        They are computed once for every size, so that in an exported graph they are constants.
        """
        size = (int(grid_BHW.shape[1]), int(grid_BHW.shape[2]))
        if size not in self._cells:
            inside = cells_inside(self.pixels, size)
            if not bool(inside.flatten(1).any(1).all()):
                fewest = int(self.pixels.flatten(1).sum(1).min())
                raise ValueError(
                    f"a region of interest of {fewest} pixels covers half of no cell of a {size[0]} x {size[1]} grid "
                    "of features: enlarge it, choose finer levels or a larger image_size, or leave the image out"
                )
            nearest = np.stack([_nearest(one) for one in inside.cpu().numpy()])
            places = inside[0].flatten().nonzero()[:, 0]
            self._cells[size] = inside, torch.from_numpy(nearest).to(inside.device), places
        inside, nearest_BT, places = self._cells[size]
        return inside.to(grid_BHW.device), nearest_BT.to(grid_BHW.device), places.to(grid_BHW.device)

    def filled(self, grid_BHW: Tensor) -> Tensor:
        """The grid with the value of the nearest inside token at every token outside."""
        _, nearest_BT, _ = self._cells_of(grid_BHW)
        values_BT = grid_BHW.flatten(1)
        filled = values_BT[:, nearest_BT[0]] if self.shared else values_BT.gather(1, nearest_BT)
        return filled.view_as(grid_BHW)

    def only(self, maps_BSS: Tensor, outside: float = torch.nan) -> Tensor:
        """The maps with ``outside`` instead of the values of pixels that are not inspected."""
        return maps_BSS.masked_fill(~self._at(maps_BSS)[0], outside)

    def values(self, maps_BSS: Tensor) -> list[Tensor]:
        """The values [., n] of the inspected pixels: of all maps together if the region is shared, else of each."""
        inside, places = self._at(maps_BSS)
        if self.shared:
            return [maps_BSS.flatten(1)[:, places]]
        return [one[pixels][None] for one, pixels in zip(maps_BSS, inside.expand(maps_BSS.shape), strict=True)]

    def _at(self, maps_BSS: Tensor) -> tuple[Tensor, Tensor]:
        """Which pixels of maps are inspected, [., S, S], and the numbers [n] of those of the first map."""
        size = (int(maps_BSS.shape[1]), int(maps_BSS.shape[2]))  # maps of FeatureNorm have a side of their own
        if size not in self._pixels:
            shown = F.interpolate(self.pixels[:, None].float(), size, mode="nearest-exact")[:, 0] > 0
            shown = self.pixels if size == self.pixels.shape[1:] else shown
            self._pixels[size] = shown, shown[0].flatten().nonzero()[:, 0]
        inside, places = self._pixels[size]
        return inside.to(maps_BSS.device), places.to(maps_BSS.device)


def cells_inside(pixels_BSS: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a grid of ``size`` have at least half of their pixels inside: bool [B, H, W]."""
    return F.adaptive_avg_pool2d(pixels_BSS.float()[:, None], size)[:, 0] >= 0.5


def _nearest(inside_HW: np.ndarray) -> np.ndarray:
    rows, columns = distance_transform_edt(~inside_HW, return_distances=False, return_indices=True)
    return np.asarray(rows, np.int64).ravel() * inside_HW.shape[1] + columns.ravel()


def bank_within(bank: ReferenceBank, region: RegionOfInterest | None) -> ReferenceBank:
    """The bank without the tokens outside the region, which is one for its K photographs or one for each."""
    if region is None:
        return bank
    masks = []
    for level_1NC, (height, width) in zip(bank.levels, bank.grids, strict=True):
        grid_KHW = level_1NC[0, :, 0].view(bank.shots, height, width)
        masks.append(region.inside(grid_KHW).flatten())
    return bank.within(masks)


@dataclass(frozen=True)
class RoiFiles:
    """The region of interest of photographs: ``mask``, a picture for all or a folder with one for each by its name
    (its file name without suffix; black is not inspected), and ``border``, pixels along the edges that are left out."""

    mask: Path | None = None
    border: int = 0

    def files(self) -> list[Path]:
        """The files of masks, sorted. Raises ValueError if there are none."""
        if self.mask is None:
            return []
        if self.mask.is_file():
            return [self.mask]
        found = sorted(path for path in self.mask.glob("*") if is_image(path)) if self.mask.is_dir() else []
        if not found:
            raise ValueError(f"no mask at {self.mask}: --roi takes a picture, or a folder with one for each photograph")
        return found

    def of(self, photograph: Path, size: tuple[int, int]) -> Image.Image | None:
        """The mask of a photograph of ``size`` (width, height), white where it is inspected; None = all of it.

        Raises ValueError if there is no mask of its name, or if nothing is left.
        """
        if self.mask is None and not self.border:
            return None
        mask = ignore_border(size, self.border)
        if self.mask is not None:
            file = self._file(photograph.stem)
            mask = ImageChops.darker(mask, read_mask(file).resize(size, Image.Resampling.NEAREST))
            if mask.getextrema()[1] == 0:
                raise ValueError(
                    f"the region of interest {file} is empty: paint what is inspected white, all else black"
                )
        return mask

    def _file(self, stem: str) -> Path:
        assert self.mask is not None
        if not self.mask.is_dir():
            return self.mask
        found = [path for path in sorted(self.mask.glob("*")) if is_image(path) and path.stem == stem]
        if not found:
            raise ValueError(f"no mask named {stem} in {self.mask}: with a folder of masks every photograph needs one")
        return found[0]


EVERYWHERE = RoiFiles()


def ignore_border(size: tuple[int, int], px: int) -> Image.Image:
    """A mask, for ``preprocess.mask``, of photographs of ``size`` (width, height), black ``px`` pixels along its edges.

    Raises ValueError if nothing would be left.
    """
    width, height = size
    if not 0 <= 2 * px < min(size):
        raise ValueError(
            f"a border of {px} pixels leaves nothing of a photograph of {width}x{height}: choose 0 to "
            f"{(min(size) - 1) // 2}"
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, (px, px, width - px, height - px))
    return mask

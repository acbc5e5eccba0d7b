"""Features of the normal images that a detector is fitted on, batch by batch, and the checks of images.

Shapes: b images of a batch, N images in all, S side of the network's input in pixels, H x W tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized

import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.memory import GrowingBank, hold, memory_limit
from downstream.roi import RegionOfInterest, cells_inside
from downstream.rotations import turned

BRIGHTEST = 16.0  # limit for images without negative values; normalised as usual, no value reaches 5


class NormalFeatures:
    """Features of batches of normal images [b, 3, S, S], computed anew in every iteration, one batch in memory.

    ``extract`` gives the features of images; ``side`` is S, known once a batch was read; ``batches`` is their number if
    they have a length, else None; ``region`` is the region of interest of all images, or None. Raises ValueError if
    there are no images, if they are malformed or differ in size, or if the region does not fit them.
    """

    def __init__(
        self,
        extract: Callable[[Tensor], FeatureMaps],
        batches: Iterable[Tensor],
        region: RegionOfInterest | None = None,
    ) -> None:
        self.extract, self._images, self.region = extract, batches, region
        self.batches = len(batches) if isinstance(batches, Sized) else None
        self.side = 0

    @property
    def repeatable(self) -> bool:
        """Whether the batches can be iterated again."""
        return iter(self._images) is not self._images

    def __iter__(self) -> Iterator[FeatureMaps]:
        return (self.extract(images) for images, _ in self._read())

    def rows(self, embed: Callable[[FeatureMaps], Tensor], rotations: int = 1) -> Iterator[Tensor]:
        """The tokens in the region, embedded [b, H, W, D] -> rows [n, D]: those of every batch, then of the batch
        turned by 1 / ``rotations`` of a full turn, and so on."""
        for images, region in self._read():
            for number in range(rotations):
                rows_BHWD = embed(self.extract(turned(images, number / rotations)))
                yield (
                    rows_BHWD.flatten(0, 2)
                    if region is None
                    else rows_BHWD[_inside(region, rows_BHWD, number / rotations)]
                )

    def together(self, what: str, advice: str, max_bytes: int | None = None) -> FeatureMaps:
        """All levels of all N images, [N, C_l, H_l, W_l] each; ``what`` they are, for messages. Raises ValueError with
        the ``advice`` before they exceed ``max_bytes``; None = half of the memory."""
        banks: list[GrowingBank] = []
        count = 0
        for features in self:
            images = len(features[0])
            if not banks:
                expected = self.most_images(images)
                limit = memory_limit(features[0].device, max_bytes)
                banks = [GrowingBank(expected, limit) for _ in features]
                shapes = [level.shape[1:] for level in features]
            count += images
            most = max(count, expected or 0)
            needed = most * sum(level[0].nbytes for level in features)
            hold(f"{what} of {most} images", needed, limit, advice, say=count == images)
            for bank, level in zip(banks, features, strict=True):
                bank.add(level.flatten(1))
        return [bank.take().unflatten(1, shape) for bank, shape in zip(banks, shapes, strict=True)]

    def images(self) -> Tensor:
        """All N images as one tensor [N, 3, S, S]. Raises ValueError before half of the memory is exceeded."""
        kept: list[Tensor] = []
        count = 0
        for images, _ in self._read():
            count += len(images)
            needed = max(count, self.most_images(len(images)) or 0) * images[0].nbytes
            limit = memory_limit(images.device) // 2  # they are joined, which takes as much again
            hold("training on the normal images", needed, limit, "give fewer images", say=not kept)
            kept.append(images.detach())
        return torch.cat(kept)

    def _read(self) -> Iterator[tuple[Tensor, RegionOfInterest | None]]:
        """The batches, checked, each with its region."""
        side = count = 0
        for images in self._images:
            check_images(images)
            if side not in (0, images.shape[2]):
                raise ValueError(f"normal images of {side} and of {images.shape[2]} pixels: prepare all alike")
            self.side = side = int(images.shape[2])
            region = self.region and self.region.of(images, count)
            count += len(images)
            yield images, region
        if not side:
            raise ValueError("no normal images to fit on: normal_batches is empty (an iterator can be read only once)")
        if self.region is not None:
            self.region.check_count(count)

    def most_images(self, first: int) -> int | None:
        """Upper bound of the number of images, if batches have at most ``first``; None if their number is unknown."""
        return None if self.batches is None else self.batches * first


def _inside(region: RegionOfInterest, rows_BHWD: Tensor, turn: float) -> Tensor:
    """Which tokens of turned images are in the region, bool [B, H, W]; none may be, as corners are turned out."""
    if not turn:
        return region.inside(rows_BHWD[..., 0])
    pixels = turned(region.pixels[:, None].to(rows_BHWD.dtype), turn)[:, 0] >= 0.5
    cells = cells_inside(pixels, (int(rows_BHWD.shape[1]), int(rows_BHWD.shape[2])))
    return cells.to(rows_BHWD.device).expand(rows_BHWD.shape[:3])


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` are a tensor [B, 3, S, S], B > 0, floating-point, finite and normalised."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a tensor [B, 3, S, S], got a {type(images).__name__}: stack photographs that went through "
            "preprocess, and take only the images out of a data loader's pairs or dictionaries"
        )
    if images.ndim == 3:
        raise ValueError(
            f"images must be [B, 3, S, S], got {tuple(images.shape)}: predict takes image[None], and fit a list of "
            "batches, such as [images]"
        )
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [B, 3, S, S] with B > 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point and normalised, got {images.dtype}: prepare them first")
    low, high = torch.stack(images.detach().aminmax()).tolist()  # NaN propagates; one synchronisation with the device
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("images hold NaN or infinite values: were they divided by a zero deviation?")
    if low >= 0 and high > BRIGHTEST:
        raise ValueError(
            f"images hold values from {low:g} to {high:g}, like pixels that are not normalised: give "
            "preprocess(photograph), or divide by 255, subtract the mean and divide by the standard deviation"
        )

"""What one pretraining image needs: its views, its mask, and K normal references of its category and camera view.

Everything random derives from (seed, epoch, index), so any step of a run can be repeated alone.

Shapes: V views (2, or 1 without augmentation), K references, S side in pixels, G = H * W tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from adpretrain.data.samples import Sample, load_mask
from adpretrain.preprocess import Preprocess, TwoViews, read_image

AUGMENTATIONS = ("epoch", "once", "none")
_SHUFFLE, _REFERENCES, _VIEWS = range(3)  # streams of random numbers


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))


def draw_views(image: Image, two_views: TwoViews, augment: str, seed: int, epoch: int, index: int) -> Tensor:
    """A photograph's views, drawn for (seed, epoch, index): [V, 3, S, S]."""
    if augment == "none":
        return two_views.preprocess(image)[None]
    moment = epoch if augment == "epoch" else 0
    return two_views(image, int(_rng(seed, moment, index, _VIEWS).integers(2**62)))


class PretrainingSet(Dataset[dict[str, Any]]):
    """Pretraining samples with their references; indexed by (epoch, index).

    An item is a dict: ``views`` float [V, 3, S, S], ``references`` float [K, 3, S, S], ``mask`` bool [S, S], ``epoch``
    and ``index``. K is drawn per image from ``shots`` (ADPretrain Tab. 13: Rand(1, 4, 8)); the references are distinct
    normal images of the same category and view, never the image itself.

    Raises ValueError if a category's view has too few normal images for the largest K, or a defect has no mask.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        shots: Sequence[int],
        seed: int,
        augment: str = "epoch",
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment {augment!r} is unknown; choose one of {AUGMENTATIONS}")
        self.samples, self.preprocess, self.shots = list(samples), preprocess, list(shots)
        self.seed, self.augment = seed, augment
        self.two_views = TwoViews(preprocess)
        self.pools: dict[tuple[str, str | None], list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            if not sample.anomalous:
                self.pools[sample.category, sample.view].append(index)
            elif sample.mask is None:
                raise ValueError(f"{sample.image} is a defect without a mask: its defect would be learnt as normal")
        self._check_pools()

    def _check_pools(self) -> None:
        needed = max(self.shots) + 1  # the image itself is never its own reference
        groups = {(sample.category, sample.view) for sample in self.samples}
        short = sorted(f"{c} {v or ''}".strip() for c, v in groups if len(self.pools.get((c, v), ())) < needed)
        if short:
            raise ValueError(
                f"K = {max(self.shots)} references need {needed} normal images in every category and view; too few in "
                f"{', '.join(short[:5])}{' ...' if len(short) > 5 else ''}: lower shots {self.shots} or add images"
            )

    def draw_references(self, index: int, epoch: int) -> list[int]:
        """Indices of the K references of one image in one epoch."""
        rng = _rng(self.seed, epoch, index, _REFERENCES)
        sample = self.samples[index]
        pool = [other for other in self.pools[sample.category, sample.view] if other != index]
        return [pool[i] for i in rng.choice(len(pool), size=int(rng.choice(self.shots)), replace=False)]

    def plain(self, index: int) -> Tensor:
        """The image without augmentation: [3, S, S]."""
        return self.preprocess(read_image(self.samples[index].image))

    def views(self, index: int, epoch: int) -> Tensor:
        """The image's views: [V, 3, S, S]."""
        image = read_image(self.samples[index].image)
        return draw_views(image, self.two_views, self.augment, self.seed, epoch, index)

    def mask(self, index: int) -> Tensor:
        """bool [S, S]."""
        sample = self.samples[index]
        size = read_image(sample.image).size if sample.mask is not None else (0, 0)
        return load_mask(sample, size, self.preprocess)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return {
            "views": self.views(index, epoch),
            "references": torch.stack([self.plain(other) for other in self.draw_references(index, epoch)]),
            "mask": self.mask(index),
            "epoch": epoch,
            "index": index,
        }


class StepBatches:
    """The batches of one process from ``start`` to ``stop`` (steps of the whole run), as lists of (epoch, index).

    Every epoch is one seeded permutation of all images, cut into global batches (the incomplete last one is
    dropped) that are dealt to the processes. A resumed run starts at any step without replaying the others.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.images, self.global_batch, self.seed = images, batch_size * processes, seed
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes
        if images < self.global_batch:
            raise ValueError(
                f"a batch of {self.global_batch} images over all processes exceeds the {images} of the set"
            )

    @property
    def per_epoch(self) -> int:
        """Steps per epoch."""
        return self.images // self.global_batch

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            order = _rng(self.seed, epoch, _SHUFFLE).permutation(self.images)
            batch = order[position * self.global_batch : (position + 1) * self.global_batch]
            yield [(epoch, int(index)) for index in batch[self.rank :: self.processes]]


def token_labels(masks_BSS: Tensor, grid: tuple[int, int], rule: str = "nearest", pixels: int = 32) -> Tensor:
    """Pixel masks -> bool token labels [B, H, W].

    ``rule="nearest"``: the nearest-downsampled mask (the released norm loss). ``rule="pixels"``: more than ``pixels``
    anomalous pixels in the token's patch, counted as at 224 px (the released angle loss).
    """
    masks = masks_BSS[:, None].float()
    if rule == "nearest":
        return F.interpolate(masks, size=grid, mode="nearest-exact")[:, 0] > 0
    if rule == "pixels":
        share = F.adaptive_avg_pool2d(masks, grid)[:, 0]
        # The margin is for rounding: exactly ``pixels`` of a 14 x 14 patch come out a little above in float32.
        return share * (224 * 224 / (grid[0] * grid[1])) > pixels + 1e-3
    raise ValueError(f"token label rule {rule!r} is unknown; choose 'nearest' or 'pixels'")

"""The normal images that a detector's network learns from, step by step.

Shapes: N normal images, b images of a step in this process, S side of the network's input in pixels, L levels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from downstream.normal_features import NormalFeatures
from downstream.roi import RegionOfInterest


@dataclass(frozen=True)
class LearningConfig:
    """How long and on how many images at a time a network is trained.

    Args:
        steps: number of optimiser steps.
        batch_size: images per step, of all processes together; fewer if there are fewer normal images.
        clip: largest norm of the gradient of a step; 0 = not limited.
        reset_every: steps after which the optimiser forgets its running means; 0 = never.
        seed: random seed of the initial weights, the order of the images and all draws of the steps.
    """

    steps: int
    batch_size: int = 16
    clip: float = 0.0
    reset_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("clip", "reset_every", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")


@dataclass
class Lesson:
    """The images of one step.

    ``images`` [b, 3, S, S] and their ``numbers`` among the normal images; ``region`` of interest, if there is one;
    ``step``, from 0, and ``done``, the share of all steps before it, in 0..1; ``generator`` for everything random of
    the step that is drawn on the CPU. ``features`` are those of the images, from the detector's extract.
    """

    normals: Normals
    images: Tensor
    numbers: Sequence[int]
    region: RegionOfInterest | None
    step: int
    done: float
    generator: torch.Generator

    @cached_property
    def features(self) -> FeatureMaps:
        return self.normals.features(self.numbers)


@dataclass
class Normals:
    """The N normal images [N, 3, S, S], kept in memory, and their features, kept if they fit in ``cache_bytes``."""

    source: NormalFeatures
    cache_bytes: int = 2 << 30
    images: Tensor = field(init=False)
    _kept: list[FeatureMaps | None] = field(init=False)
    _bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.images = self.source.images()
        self._kept = [None] * len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def region(self) -> RegionOfInterest | None:
        return self.source.region

    def features(self, numbers: Sequence[int]) -> FeatureMaps:
        """The features of the images of these numbers, L levels [b, C_l, H_l, W_l]."""
        new = [number for number in dict.fromkeys(numbers) if self._kept[number] is None]
        made: dict[int, FeatureMaps] = {}
        if new:
            levels = self.source.extract(self.images[new])
            made = {number: [level[place] for level in levels] for place, number in enumerate(new)}
            size = sum(level[0].nbytes for level in levels)
            for number, one in made.items():
                if self._bytes + size <= self.cache_bytes:
                    self._kept[number] = [level.clone() for level in one]
                    self._bytes += size
        each = [made[number] if number in made else self._kept[number] or [] for number in numbers]
        return [torch.stack(level) for level in zip(*each, strict=True)]

    def lesson(self, config: LearningConfig, step: int, rank: int = 0, processes: int = 1) -> Lesson:
        """The lesson of a step. Images come in a new order in every pass over them, without a break between passes."""
        size = min(config.batch_size, len(self))
        if size % processes:
            raise ValueError(f"batch_size {size} images cannot be shared equally by {processes} processes")
        drawn = [self._number(config.seed, place) for place in range(step * size, (step + 1) * size)]
        numbers = drawn[rank::processes]
        generator = torch.Generator().manual_seed(mixed(config.seed, step, rank))
        region = self.region and self.region.pick(numbers)
        return Lesson(self, self.images[numbers], numbers, region, step, step / config.steps, generator)

    def _number(self, seed: int, place: int) -> int:
        """The image at a place of the endless sequence of passes over all images."""
        epoch, inside = divmod(place, len(self))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
        return int(self._order[inside])

    def digest(self) -> str:
        """The SHA-256 of the images."""
        found = hashlib.sha256()
        for image in self.images:
            found.update(image.detach().cpu().contiguous().view(torch.uint8).numpy())
        return found.hexdigest()


def mixed(*numbers: int) -> int:
    """A seed made of several numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> 1)

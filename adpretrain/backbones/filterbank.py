"""`filterbank`: a weight-free backbone of multi-scale oriented features, for use without any download.

Classical early vision, in four octaves: divisive normalisation, Gabor quadrature energy (contrast at 8
orientations), colour-opponent energy, and the pooled bright and dark details of luminance and colour. Every
level lies on one grid of S/8 x S/8 tokens. Colour is seen one octave coarser than luminance, as the eye and JPEG do.

Shapes: B images, S side (a multiple of 16), G = S/8 grid side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones.base import Backbone, FeatureMaps, check_levels
from adpretrain.backbones.weights import Weights
from adpretrain.preprocess import Preprocess

ORIENTATIONS = 8
OCTAVES = 4
POOL = 8  # pixels per token side at the finest octave


def gabor_pairs() -> Tensor:
    """[2 * ORIENTATIONS, 1, 7, 7] even (first half) and odd Gabor filters, wavelength 4.6 px, sigma 1.9, aspect .7.

    Each has unit L1 norm; the even ones have zero mean, so flat regions give no response.
    """
    ys, xs = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    even, odd = [], []
    for index in range(ORIENTATIONS):
        theta = math.pi * index / ORIENTATIONS
        along = xs * math.cos(theta) + ys * math.sin(theta)
        across = -xs * math.sin(theta) + ys * math.cos(theta)
        envelope = torch.exp(-(along**2 + (0.7 * across) ** 2) / (2 * 1.9**2))
        phase = 2 * math.pi * along / 4.6
        cosine = envelope * phase.cos()
        cosine = cosine - envelope * (cosine.sum() / envelope.sum())
        sine = envelope * phase.sin()
        even.append(cosine / cosine.abs().sum())
        odd.append(sine / sine.abs().sum())
    return torch.stack(even + odd)[:, None]


def local_mean(image: Tensor) -> Tensor:
    """A smooth local average over about 24 px: pool 8, two 3x3 means, bilinear up. Shape is kept."""
    low = F.avg_pool2d(image, POOL)
    for _ in range(2):
        low = F.avg_pool2d(F.pad(low, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return F.interpolate(low, size=image.shape[-2:], mode="bilinear", align_corners=False)


def normalised_channels(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 3, S, S] in 0..1 -> luminance [B, 1, S, S], two chroma channels, local mean luminance [B, 1, S, S].

    Divisive normalisation: luminance is centred on its local mean and divided by a mix of its local and its
    whole-image deviation, so that gain and slow shading vanish but a lone strong mark in a calm image stays strong.
    """
    red, green, blue = images.unbind(1)
    luminance = images.mean(1, keepdim=True)
    mean = local_mean(luminance)
    centred = luminance - mean
    energy = centred.square()
    local = local_mean(energy).clamp_min(0).sqrt()
    whole = energy.mean((2, 3), keepdim=True).sqrt()
    light = centred / (0.5 * local + 0.5 * whole + 0.01)
    chroma = torch.stack([red - green, blue - (red + green) / 2], 1) / (mean + 0.1)
    chroma = chroma - chroma.mean((2, 3), keepdim=True)
    chroma = chroma / (0.5 * chroma.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.03)
    return 0.5 * light, 0.5 * chroma, mean


def build(name: str, weights: Weights, image_size: int, levels: Sequence[int]) -> FilterBank:
    """The filterbank; ``weights`` are refused before this, as it has none."""
    return FilterBank(image_size, levels)


def binomial_blur() -> Tensor:
    """[1, 1, 5, 5] smoothing filter 1 4 6 4 1 in both directions."""
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return torch.outer(binomial, binomial)[None, None]


class FilterBank(Backbone):
    """Up to four levels of [B, 29 (30 at the last), S/8, S/8] features; images are plain RGB in 0..1.

    It computes in float32, in half precision and under autocast too, or in float64 after ``double()``; the features
    have the dtype it was moved to.
    """

    def __init__(self, image_size: int = 224, levels: Sequence[int] = (1, 2, 3, 4)) -> None:
        if image_size % (2 * POOL) or image_size < 64:
            raise ValueError(
                f"filterbank needs an image_size of at least 64, a multiple of {2 * POOL}; got {image_size}"
            )
        chosen = check_levels("filterbank", levels, OCTAVES, "levels")
        per_level = ORIENTATIONS * 2 + ORIENTATIONS // 2 + 9
        super().__init__(
            name="filterbank",
            channels=[per_level + (level == OCTAVES) for level in chosen],
            preprocess=Preprocess(image_size, interpolation="bilinear"),
            levels=chosen,
        )
        self.grid = image_size // POOL
        self._dtype = torch.float32
        self.gabor: Tensor
        self.blur: Tensor
        self.register_buffer("gabor", gabor_pairs(), persistent=False)
        self.register_buffer("blur", binomial_blur(), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.gabor.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> FilterBank:
        # The filters stay exact: rounded to half precision they would answer to flat regions.
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self._dtype, device=self.gabor.device))
        self._dtype = moved.dtype
        wide = torch.float64 if moved.dtype == torch.float64 else torch.float32
        self.gabor, self.blur = gabor_pairs().to(moved.device, wide), binomial_blur().to(moved.device, wide)
        return self

    def _smooth(self, image: Tensor, stride: int = 1) -> Tensor:
        channels = image.shape[1]
        padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
        return F.conv2d(padded, self.blur.expand(channels, 1, 5, 5), stride=stride, groups=channels)

    def _pool(self, image: Tensor) -> Tensor:
        """Averages on the token grid: [B, C, h, w] -> [B, C, G, G]; the coarsest chroma, half of it, is upsampled."""
        if image.shape[-1] < self.grid:
            return F.interpolate(image, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return F.avg_pool2d(image, image.shape[-1] // self.grid)

    def _modulus(self, image: Tensor) -> Tensor:
        """[B, C, h, w] -> Gabor energy [B, C, ORIENTATIONS, h, w]."""
        batch, channels, height, width = image.shape
        padded = F.pad(image, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
        even, odd = F.conv2d(padded, self.gabor).chunk(2, dim=1)
        energy = even.square().addcmul_(odd, odd).sqrt_()
        return energy.view(batch, channels, ORIENTATIONS, height, width)

    def _details(self, image: Tensor) -> Tensor:
        """Pooled bright and dark details, and the pooled image: [B, C, h, w] -> [B, 3 C, G, G]."""
        detail = image - self._smooth(self._smooth(image))
        return torch.cat(
            [self._pool(detail.clamp_min(0)), self._pool((-detail).clamp_min(0)), 0.5 * self._pool(image)], 1
        )

    def _level(self, light: Tensor, chroma: Tensor) -> Tensor:
        """Luminance [B, 1, h, w] and chroma [B, 2, h/2, w/2] of one octave -> [B, 29, G, G]."""
        energy = self._modulus(light)[:, 0]
        colour = self._modulus(chroma).square().sum(1).sqrt()
        colour = (colour[:, 0::2] + colour[:, 1::2]) / 2
        return torch.cat(
            [
                (self._pool(energy) + 1e-4).sqrt(),
                0.7 * (F.max_pool2d(energy, energy.shape[-1] // self.grid) + 1e-4).sqrt(),
                (self._pool(colour) + 1e-4).sqrt(),
                self._details(light),
                self._details(chroma),
            ],
            1,
        )

    def maps(self, images: Tensor) -> FeatureMaps:
        with torch.autocast(images.device.type, enabled=False):
            if images.device.type != "cpu" or torch.compiler.is_compiling():  # a graph takes any number of images
                return self._forward(images)
            # One image at a time on a CPU: the maps of one image stay in its cache.
            return [torch.cat(level) for level in zip(*map(self._forward, images.split(1)), strict=True)]

    def _forward(self, images: Tensor) -> FeatureMaps:
        light, chroma, mean = normalised_channels(images)
        chroma = self._smooth(chroma, stride=2)
        levels = []
        for octave in range(1, self.levels[-1] + 1):
            if octave in self.levels:
                levels.append(self._level(light, chroma))
            light, chroma = self._smooth(light, stride=2), self._smooth(chroma, stride=2)
        if octave < OCTAVES:
            return levels
        overall = mean.mean((2, 3), keepdim=True)
        levels[-1] = torch.cat([levels[-1], self._pool((mean - overall) / (overall + 0.05))], 1)
        return levels

"""Perturbed images look as if another camera, light or file had made them: the kinds of change, how much of each, and
how an image and its mask are changed.

The amounts of light, rotation, shift and blur are those of ReConPatch (Tab. 4, suppl. C.1), which applies all four at
once. Noise and JPEG are ours: `NOISE` is the noise at white of a sensor whose pixels hold 10,000 electrons, without
gain and with 24 dB of it (1 / sqrt(10,000) and 1 / sqrt(10,000 / 16)); `QUALITY` goes from Pillow's default down to one
at which the blocks of 8 x 8 pixels are plain to see. The paper leaves open, and we chose: every image gets every change
that is asked for, drawn uniformly; they are applied to the network's input, in the order of a camera (place, light,
lens, sensor, file); the border is filled with the mirrored image, because black corners would be defects themselves;
and only the images to score are changed, so that the detector was not fitted on such changes.

Shapes: S side in pixels, C channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adpretrain.preprocess import Preprocess
from downstream.maps import gaussian_blur

LIGHT, ANGLE, SHIFT, BLUR = 0.3, 5.0, 0.01, (0.1, 1.0)  # shares, degrees, share of the side, sigma in pixels
NOISE = (0.01, 0.04)  # standard deviation, of values in 0..1
QUALITY = (25, 75)  # of Pillow's JPEG

WORDS = {
    "light": f"changed in brightness and contrast by up to {LIGHT:.0%}",
    "rotation": f"turned by up to {ANGLE:g} degrees",
    "shift": f"shifted by up to {SHIFT:.0%} of the side",
    "blur": f"blurred with sigma {BLUR[0]:g} to {BLUR[1]:g} pixels",
    "noise": f"made noisy with a standard deviation of {NOISE[0]:.0%} to {NOISE[1]:.0%} of white",
    "jpeg": f"compressed as JPEG of quality {QUALITY[0]} to {QUALITY[1]}",
}
KINDS = tuple(WORDS)
PAPER = ("light", "rotation", "shift", "blur")
SETTINGS = {**{kind: (kind,) for kind in KINDS}, " + ".join(PAPER): PAPER}  # one row of the tables each


@dataclass(frozen=True)
class Change:
    """What is done to the images of a part: each is changed in all ``kinds``, by amounts drawn from (seed, index,
    kind), so that an image is turned alike with and without the other changes."""

    seed: int
    kinds: tuple[str, ...]

    @property
    def said(self) -> str:
        """A note for the reader of the tables."""
        *most, last = (WORDS[kind] for kind in self.kinds)
        return f"the scored images were {', '.join(most)}{' and ' if most else ''}{last}"

    def of(self, index: int) -> Perturbation:
        """Return the change of image ``index``."""
        return Perturbation.draw(self.seed, index, self.kinds)


@dataclass(frozen=True)
class Perturbation:
    """The change of one image; by default none.

    ``angle`` in degrees, counter-clockwise; ``shift`` to the right and down, as shares of the side; ``brightness`` and
    ``contrast`` as factors; ``sigma`` of the blur in pixels; ``noise`` as a standard deviation, for values in 0..1, and
    the seed of its ``grain``; ``quality`` of the JPEG file, 0 = none.
    """

    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    sigma: float = 0.0
    noise: float = 0.0
    grain: int = 0
    quality: int = 0

    @classmethod
    def draw(cls, seed: int, index: int, kinds: Sequence[str] = PAPER) -> Perturbation:
        """Draw the change of image ``index``. Each kind has its own random numbers, from its name."""
        amounts: dict[str, Any] = {}
        for kind in kinds:
            amounts |= _DRAWS[kind](np.random.default_rng([seed, index, *kind.encode()]))
        return cls(**amounts)

    def picture(self, pixels_3SS: Tensor) -> Tensor:
        """Change an image, RGB in 0..1."""
        lit = (self._moved(pixels_3SS, "bilinear") * self.brightness).clamp(0, 1)
        gray = (lit * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).mean()
        seen = gaussian_blur((gray + self.contrast * (lit - gray)).clamp(0, 1), self.sigma)
        if self.noise:
            grain = np.random.default_rng(self.grain).standard_normal(tuple(seen.shape), np.float32)
            seen = (seen + self.noise * torch.from_numpy(grain)).clamp(0, 1)
        return _compressed(seen, self.quality) if self.quality else seen

    def mask(self, mask_SS: Tensor) -> Tensor:
        """Move a mask as the image is moved: bool [S, S]."""
        return self._moved(mask_SS[None].float(), "nearest")[0] > 0.5

    def network_input(self, image_3SS: Tensor, preprocess: Preprocess) -> Tensor:
        """Change an image that ``preprocess`` has normalised, and normalise it again."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
        return (self.picture(image_3SS * std + mean) - mean) / std

    def _moved(self, values_CSS: Tensor, mode: str) -> Tensor:
        if not self.angle and not any(self.shift):
            return values_CSS
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        turn = torch.tensor([[cosine, -sine], [sine, cosine]])  # from output to input coordinates
        back = -2 * turn @ torch.tensor(self.shift)  # the image is 2 wide in these coordinates
        grid = F.affine_grid(torch.cat([turn, back[:, None]], 1)[None], [1, *values_CSS.shape], align_corners=False)
        return F.grid_sample(values_CSS[None], grid, mode, padding_mode="reflection", align_corners=False)[0]


def _compressed(pixels_3SS: Tensor, quality: int) -> Tensor:
    """Write an image as a JPEG file and read it: what Pillow does for a picture of 8 bits."""
    file = io.BytesIO()
    eight_bits = (255 * pixels_3SS).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(eight_bits.numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _light(rng: np.random.Generator) -> dict[str, Any]:
    brightness, contrast = rng.uniform(1 - LIGHT, 1 + LIGHT, 2).tolist()
    return {"brightness": brightness, "contrast": contrast}


_DRAWS: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "light": _light,
    "rotation": lambda rng: {"angle": rng.uniform(-ANGLE, ANGLE)},
    "shift": lambda rng: {"shift": tuple(rng.uniform(-SHIFT, SHIFT, 2).tolist())},
    "blur": lambda rng: {"sigma": rng.uniform(*BLUR)},
    "noise": lambda rng: {"noise": rng.uniform(*NOISE), "grain": int(rng.integers(2**32))},
    "jpeg": lambda rng: {"quality": int(rng.integers(QUALITY[0], QUALITY[1], endpoint=True))},
}

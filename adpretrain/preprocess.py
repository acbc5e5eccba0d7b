"""The only image-transform code: reading, resizing, cropping, normalising and the two-view augmentation.

Shapes: S = the network's input side in pixels.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INTERPOLATIONS = ("bilinear", "bicubic")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"image not found: {path}") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, bomb errors ...
        raise ValueError(f"cannot read image {path}: {error or type(error).__name__}") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Map 16-bit, 32-bit and float gray images to 8 bit by their type's full range.

    The range is fixed, never the image's own minimum and maximum: stretching each photograph by itself would
    hide brightness differences between a part and its references.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    full = 65535.0 if image.mode != "F" else 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    scale = 255.0 / full
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a photograph as 8-bit RGB, upright (EXIF). Transparency is composited on white.

    Raises ValueError that names the file if it is missing, truncated, not an image or absurdly large.
    """
    return as_rgb(_open(path))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB. Transparency is composited on white."""
    image = _to_8_bit(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Read a defect mask as 8-bit gray: any value above zero is a defect. Errors as in `read_image`."""
    mask = _open(path)
    if mask.mode in ("P", "PA", "LA"):  # the colour counts, not the palette's index, and never the opacity
        mask = mask.convert("RGB")
    values = np.asarray(mask)
    if values.ndim == 3:  # RGB or RGBA masks: a pixel is marked if any colour channel is
        values = values[..., :3].max(axis=2)
    return Image.fromarray(((values > 0) * 255).astype(np.uint8))


@dataclass(frozen=True)
class Preprocess:
    """Photograph -> network input: resize both sides to ``resize``, centre crop to ``image_size`` pixels, normalise.

    With ``resize == image_size`` (the default) the whole picture is squeezed to a square, so that no part of a
    product is cropped away, as the released test code does for every benchmark but MVTec (256 -> 224 crop).
    """

    image_size: int = 224
    resize: int = 224
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; choose one of {INTERPOLATIONS}")
        if not 0 < self.image_size <= self.resize:
            raise ValueError(f"image_size {self.image_size} must be in 1..resize ({self.resize})")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std {self.std} must be positive")
        # JSON and YAML give lists; a frozen config should compare equal however it was made.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def _place(self, image: Image.Image, mode: InterpolationMode) -> Image.Image:
        side = [self.resize, self.resize]
        return F.center_crop(F.resize(image, side, interpolation=mode), [self.image_size, self.image_size])

    def view_of(self, image: Image.Image) -> Image.Image:
        """The [S, S] pixels that the network sees, for overlays."""
        return self._place(image, InterpolationMode(self.interpolation))

    def normalise(self, image: Image.Image | Tensor) -> Tensor:
        """[S, S] picture -> float tensor [3, S, S], (value - mean) / std with value in 0..1."""
        return F.normalize(F.to_dtype(F.to_image(image), torch.float32, scale=True), list(self.mean), list(self.std))

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB photograph of any size -> float tensor [3, S, S]."""
        return self.normalise(self.view_of(image))

    def mask(self, mask: Image.Image) -> Tensor:
        """Mask of any size -> bool tensor [S, S] by nearest neighbour (a mask has no in-between values)."""
        return F.to_image(self._place(mask, InterpolationMode.NEAREST))[0] > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TwoViews:
    """Two independent photometric views of one picture (ADPretrain Sec. 3.2, parameters of the released code).

    Colour jitter (.4, .4, .4, .1) with p = .8, gray scale with p = .2, Gaussian blur (sigma .1 to 2) with
    p = .5. The geometry is the same in both views, so that token i of one view is token i of the other.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.augment = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply(
                    [v2.GaussianBlur(kernel_size=_odd(preprocess.image_size // 10), sigma=(0.1, 2.0))], p=0.5
                ),
            ]
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Photograph -> float tensor [2, 3, S, S]; the same seed gives the same views."""
        placed = F.to_image(self.preprocess.view_of(image))
        # torchvision draws from torch's global generator: fork it, so that nobody else's numbers change
        # (torch.manual_seed would reseed the GPUs too, which are not forked).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            views = [self.augment(placed) for _ in range(2)]
        return torch.stack([self.preprocess.normalise(view) for view in views])


def _odd(size: int) -> int:
    return max(3, size + 1 - size % 2)

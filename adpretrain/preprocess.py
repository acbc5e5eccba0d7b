"""The only image-transform code: resizing, cropping, normalising and the two-view augmentation.

Shapes: S = the network's input side in pixels.
"""

from __future__ import annotations

import math
import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from adpretrain.photographs import as_rgb

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGEST_SIDE = 4096  # pixels of a network's input: a config that asks for more would take all memory
INTERPOLATIONS = ("bilinear", "bicubic")
RESIZES = ("squeeze", "crop")
RELEASED_CROPS = {224: 256, 320: 366, 480: 512}  # image_size -> crop_from, in the authors' released code
THINNEST = 20  # largest ratio of sides of a picture to crop: resizing a thinner one would take all memory


def crop_side(image_size: int, resize: str = "squeeze", crop_from: int | None = None) -> int | None:
    """The ``crop_from`` of `Preprocess` for a configuration's ``resize`` and ``crop_from``.

    Raises ValueError if ``resize`` is neither "squeeze" nor "crop", if a crop's ``crop_from`` is neither given nor
    known from the authors' released code, or if a squeeze has one.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r} is unknown; choose one of {RESIZES}")
    if resize == "squeeze":
        if crop_from is not None:
            raise ValueError(f"crop_from {crop_from} goes with resize 'crop'; 'squeeze' crops nothing")
        return None
    if crop_from is None and image_size not in RELEASED_CROPS:
        known = ", ".join(f"{size} from {side}" for size, side in RELEASED_CROPS.items())
        raise ValueError(
            f"resize 'crop' to {image_size} pixels needs crop_from, the shorter side before the crop; only the sizes "
            f"of the authors' code have a default ({known})"
        )
    return RELEASED_CROPS[image_size] if crop_from is None else crop_from


@dataclass(frozen=True)
class Preprocess:
    """Photograph -> network input: resize to ``image_size`` x ``image_size`` pixels, normalise.

    Without ``crop_from`` the whole photograph is squeezed to a square, so that no defect at its edge is lost. With it,
    the shorter side is resized to ``crop_from`` pixels, the longer one in proportion, and the centre is cropped: the
    authors' released code does so for every set (256 -> 224; torchvision's Resize(256) and CenterCrop(224)).
    """

    image_size: int = 224
    crop_from: int | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; choose one of {INTERPOLATIONS}")
        if not 0 < self.image_size <= self.shorter_side <= LARGEST_SIDE:
            limit = LARGEST_SIDE if self.crop_from is None else f"crop_from ({self.crop_from})"
            raise ValueError(f"image_size {self.image_size} must be in 1..{limit}, and no side above {LARGEST_SIDE}")
        if not all(math.isfinite(value) for value in self.mean) or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"mean {self.mean} must be finite, std {self.std} must be positive")
        # JSON and YAML give lists; a frozen config should compare equal however it was made.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @property
    def shorter_side(self) -> int:
        """The shorter side in pixels after resizing, before any crop: a JPEG decoded smaller would lose detail."""
        return self.image_size if self.crop_from is None else self.crop_from

    @property
    def in_words(self) -> str:
        """A phrase that says how a photograph is resized and cropped."""
        square = f"{self.image_size} x {self.image_size} pixels"
        if self.crop_from is None:
            return f"squeezed to {square}"
        return f"resized to a shorter side of {self.crop_from} pixels and cropped to the central {square}"

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a photograph of ``size`` after torchvision's Resize(crop_from), before the crop."""
        width, height = size
        if self.crop_from is None:
            return self.image_size, self.image_size
        if max(size) > THINNEST * min(size):
            raise ValueError(
                f"a photograph of {width}x{height} pixels is too thin to be resized and cropped (its longer side may "
                f"be {THINNEST} times the shorter): cut it into pieces, or squeeze it (resize 'squeeze')"
            )
        return self.crop_from * width // min(size), self.crop_from * height // min(size)

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a photograph of ``size`` (width, height) that the network sees: left, top, right and bottom, in
        the photograph's pixels. Errors as in `pixels`."""
        width, height = self._resized(size)
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        right, bottom = left + self.image_size, top + self.image_size
        across, down = size[0] / width, size[1] / height  # photograph pixels per resized pixel
        return left * across, top * down, right * across, bottom * down

    def _place(self, image: Image.Image, mode: InterpolationMode) -> Image.Image:
        width, height = self._resized(image.size)
        return F.center_crop(F.resize(image, [height, width], interpolation=mode), [self.image_size, self.image_size])

    def view_of(self, image: Image.Image) -> Image.Image:
        """The [S, S] pixels that the network sees, for overlays."""
        return self._place(image, InterpolationMode(self.interpolation))

    def pixels(self, image: Image.Image) -> Tensor:
        """Photograph of any size and mode -> uint8 tensor [3, S, S], a quarter of the bytes of the float input.

        Raises ValueError for anything but a PIL image (`read_image` reads a file, Image.fromarray takes an array), and
        for a picture to be cropped whose longer side is more than `THINNEST` times the shorter.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"a photograph must be a PIL image, got {type(image).__name__}: read a file with "
                "adpretrain.photographs.read_image, turn an array [H, W, 3] of uint8 into one with PIL.Image.fromarray"
            )
        image = image if image.mode == "RGB" else as_rgb(image)
        return F.to_image(self.view_of(image)).as_subclass(Tensor)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [.., 3, S, S] -> float, (value - mean) / std with value in 0..1.

        Mean and std stay Python numbers: F.normalize would copy them to the device, waiting for its queued work.
        """
        channels = F.to_dtype(pixels, torch.float32, scale=True).unbind(-3)
        return torch.stack([(c - mean) / std for c, mean, std in zip(channels, self.mean, self.std, strict=True)], -3)

    def __call__(self, image: Image.Image) -> Tensor:
        """Photograph of any size and mode, read with `read_image` -> float tensor [3, S, S]. Errors as in `pixels`."""
        return self.normalise(self.pixels(image))

    def mask(self, mask: Image.Image) -> Tensor:
        """Mask of any size -> bool tensor [S, S] by nearest neighbour (a mask has no in-between values)."""
        return F.to_image(self._place(mask, InterpolationMode.NEAREST))[0] > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_GENERATOR_LOCK = threading.Lock()


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
                v2.RandomApply([v2.Lambda(self._blur)], p=0.5),
            ]
        )

    def _blur(self, pixels: Tensor) -> Tensor:
        return gaussian_blur(pixels, _odd(self.preprocess.image_size // 10), float(torch.empty(1).uniform_(0.1, 2.0)))

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Photograph -> uint8 tensor [2, 3, S, S]; the same seed gives the same views."""
        placed = self.preprocess.pixels(image)
        # torchvision draws from torch's global generator: fork it, so that other numbers do not change
        # (torch.manual_seed would reseed the GPUs too, which are not forked). All threads share it.
        with _GENERATOR_LOCK, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.stack([self.augment(placed) for _ in range(2)])


def _odd(size: int) -> int:
    return max(3, size + 1 - size % 2)


def gaussian_blur(pixels_3SS: Tensor, size: int, sigma: float) -> Tensor:
    """A square uint8 picture blurred with a Gaussian of ``size`` x ``size`` pixels, mirrored at its border.

    One matrix blurs both axes, 25 times as fast as torchvision's two-dimensional convolution at 224 px: a loader
    process spends most of its time on blur and jitter. The results are equal up to rounding (one level of 255).
    """
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0)
    identity_SS = torch.eye(pixels_3SS.shape[-1], dtype=torch.float32)
    mirrored = torch.nn.functional.pad(identity_SS[None], (size // 2, size // 2), mode="reflect")[0]
    blur_SS = mirrored.unfold(1, size, 1) @ kernel  # column i: the weights of pixel i
    return (blur_SS.T @ pixels_3SS.float() @ blur_SS).round_().clamp_(0, 255).to(torch.uint8)

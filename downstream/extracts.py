"""The extract of a detector: checks of its features, its device, and whether it is the one the detector was fitted on.

Shapes: B images, S side of the images as given, S' side that the backbone takes, L levels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Backbone, Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import LARGEST_SIDE, Preprocess

PARTS, TOLERANCE = 8, 0.05  # numbers per level of the probe, and their tolerated difference between devices


@torch.no_grad()
def checked_features(extract: Callable[[Tensor], FeatureMaps], images: Tensor) -> FeatureMaps:
    """Extract L levels [B, C_l, H_l, W_l] and check them. Raises ValueError if they are malformed or not finite, and
    for a module in training mode."""
    if isinstance(extract, nn.Module) and any(module.training for module in extract.modules()):
        raise ValueError(
            f"the {type(extract).__name__} is in training mode: features would depend on the rest of the batch and "
            "change from call to call; call its .eval() first"
        )
    features = extract(images)
    _check_features(features, len(images))
    for number, level in enumerate(features):
        if not bool(level.isfinite().all()):
            raise ValueError(
                f"level {number} of the features holds NaN or infinite values: try float32 for the network"
            )
    return features


def _check_features(features: Any, batch: int) -> None:
    """Raise ValueError unless features are levels [B, C, H, W] of floats, as a user's function may return others."""
    if not isinstance(features, list | tuple) or not features:
        raise ValueError(
            f"the extract must give a list of at least one level [B, C, H, W], got {type(features).__name__}: put a "
            "single map in a list, and the values of a dictionary too"
        )
    for number, level in enumerate(features):
        if not isinstance(level, Tensor):
            raise ValueError(f"level {number} of the features must be a tensor, got {type(level).__name__}")
        if level.ndim != 4 or len(level) != batch or not level.is_floating_point():
            raise ValueError(
                f"level {number} of the features of {batch} images must be floats [{batch}, C, H, W], got "
                f"{tuple(level.shape)} of {level.dtype}"
            )
        # Images and maps are square, so two equal sizes before a different one must be height and width.
        if level.shape[1] == level.shape[2] != level.shape[3]:
            raise ValueError(
                f"level {number} of the features is {tuple(level.shape)}, channels last: give [B, C, H, W], such as "
                "level.permute(0, 3, 1, 2)"
            )


def keeping_references(extract: Extract) -> Extract:
    """Copy an `ADExtractor`, without its weights, so that two detectors on one extractor do not change each other's
    references; any other extract is returned as it is."""
    return copy.copy(extract) if isinstance(extract, ADExtractor) else extract


def device_of(
    extract: Extract | None, fitted: Mapping[str, Tensor] = {}, otherwise: str | torch.device = "cpu"
) -> torch.device:
    """Return the device of an extract's tensors or, for a plain function, of the tensors fitted on its features."""
    own = (*extract.parameters(), *extract.buffers()) if isinstance(extract, nn.Module) else ()
    for tensor in (*own, *fitted.values()):
        return tensor.device
    return torch.device(otherwise)


def fixed_picture(side: int, device: torch.device) -> Tensor:
    """Draw a fixed picture [1, 3, S, S] with values in 0..1. Raises ValueError for a side outside 1..LARGEST_SIDE."""
    if not 0 < side <= LARGEST_SIDE:
        raise ValueError(f"image_size {side}; expected 1 to {LARGEST_SIDE}")
    ramp = torch.linspace(0, 6, side)
    wave = torch.stack([(k * ramp[:, None]).sin() + ((4 - k) * ramp[None]).cos() for k in (1, 2, 3)])
    return (0.5 + wave / 4)[None].to(device)


@torch.no_grad()
def probe(extract: Extract, image_size: int, device: torch.device) -> list[list[float]]:
    """Average the features of the fixed picture over positions and groups of channels: up to `PARTS` per level."""
    picture = fixed_picture(image_size, device)
    encode = extract.encode if isinstance(extract, ADExtractor) and extract.references is None else extract
    features = encode(picture)
    means = [level[0].cpu().double().mean((1, 2))[None] for level in features]  # MPS has no float64
    return [F.adaptive_avg_pool1d(mean, min(PARTS, mean.shape[1]))[0].tolist() for mean in means]


def refuse_other_features(found: list[list[float]], saved: list[list[float]], folder: object) -> None:
    """Raise ValueError if the probe ``found`` differs from that saved in ``folder``."""
    if [len(level) for level in found] != [len(level) for level in saved]:
        raise ValueError(f"{folder} was fitted on features of {len(saved)} levels, not on these of {len(found)} levels")
    for number, pair in enumerate(zip(found, saved, strict=True)):
        ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in pair)
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-9))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{folder} was fitted on other features: level {number} of a fixed picture differs by "
                f"{difference:.0%}. Were other weights loaded, or other references set?"
            )


class Adapted(nn.Module):
    """A backbone as an `Extract` of images that were prepared by the preprocessing ``images`` instead of its own, so
    that all members of an ensemble get the same images (PatchCore Tab. 4).

    [B, 3, S, S] -> normalisation undone, resized to S' (bilinear, antialiased), normalised for ``backbone`` -> its
    levels. The backbone sees the part of a photograph that ``images`` crops. Enlarging adds no detail, so prepare the
    images for the largest network of an ensemble.
    """

    def __init__(self, backbone: Backbone, images: Preprocess) -> None:
        super().__init__()
        self.backbone, self.preprocess = backbone, images
        self.eval()

    @property
    def channels(self) -> list[int]:
        """C_l, the channels of each level."""
        return self.backbone.channels

    @torch.no_grad()
    def forward(self, images: Tensor) -> FeatureMaps:
        """Extract levels. Raises ValueError for images of another size than that of ``images``."""
        given, wanted = self.preprocess, self.backbone.preprocess
        if images.shape[-1] != given.image_size:
            raise ValueError(f"expected images of {given.image_size} pixels, got {tuple(images.shape)}")
        plain = images.float() * _column(given.std, images) + _column(given.mean, images)
        if wanted.image_size != given.image_size:
            size = (wanted.image_size, wanted.image_size)
            plain = F.interpolate(plain, size, mode="bilinear", align_corners=False, antialias=True)
        return self.backbone((plain - _column(wanted.mean, images)) / _column(wanted.std, images))


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None, None]

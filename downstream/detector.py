"""What every detector gives: a score per image and a map per image; and what all of them check.

Shapes: B images, S side of the network's input in pixels.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.hub import Published

BRIGHTEST = 16.0  # of normalised images without negative values; with usual means and deviations none reaches 5


@dataclass(frozen=True)
class Prediction:
    """``scores`` [B] and ``maps`` [B, S, S]; higher is more anomalous, in the detector's own unit.

    S is the side of the images, but for FeatureNorm's maps, which have its ``image_size``.
    """

    scores: Tensor
    maps: Tensor


class Detector(Protocol):
    """Fits on normal images only, then scores and localises; with any `Extract`, a raw backbone or an `ADExtractor`.

    ``fit`` reads its batches [b, 3, S, S] once, one at a time; they are tensors, not a data loader's pairs or
    dictionaries. A fitted detector keeps the references that an `ADExtractor` had then: a later `set_references`, or
    another detector's fit, does not reach it. A module must be in evaluation mode.

    A saved detector needs no training data to be loaded and gives the same bits; see `downstream.saved` for what its
    folder holds.
    """

    def fit(self, normal_batches: Iterable[Tensor]) -> Self: ...

    def predict(self, images: Tensor) -> Prediction: ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path: ...

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> Published: ...

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], extract: Extract | None = None) -> Self: ...


def check_images(images: Tensor) -> None:
    """Raises ValueError unless ``images`` are a tensor [B, 3, S, S], B > 0, floating-point, finite and normalised."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be a tensor [B, 3, S, S], got a {type(images).__name__}: stack photographs that went through "
            "preprocess, and of a data loader's pairs or dictionaries give the images alone"
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
    low, high = torch.stack(images.detach().aminmax()).tolist()  # NaN wins, and a device is waited for once
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("images hold NaN or infinite values: were they divided by a zero deviation?")
    if low >= 0 and high > BRIGHTEST:
        raise ValueError(
            f"images hold values from {low:g} to {high:g}, as of pixels that are not normalised: give "
            "preprocess(photograph), or divide by 255, subtract the mean and divide by the standard deviation"
        )


@torch.no_grad()
def extracted(extract: Extract, images: Tensor) -> FeatureMaps:
    """Checked images -> L levels [B, C_l, H_l, W_l], finite. Raises ValueError for bad images or features, and for a
    module in training mode."""
    check_images(images)
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
    """Raises ValueError unless these are levels [B, C, H, W] of floats, which a function of the user's may not give."""
    if not isinstance(features, list | tuple) or not features:
        raise ValueError(
            f"the extract must give a list of at least one level [B, C, H, W], got {type(features).__name__}: put a "
            "single map in a list, and of a dictionary list the values"
        )
    for number, level in enumerate(features):
        if not isinstance(level, Tensor):
            raise ValueError(f"level {number} of the features must be a tensor, got {type(level).__name__}")
        if level.ndim != 4 or len(level) != batch or not level.is_floating_point():
            raise ValueError(
                f"level {number} of the features of {batch} images must be floats [{batch}, C, H, W], got "
                f"{tuple(level.shape)} of {level.dtype}"
            )
        # Images are square, and so are their maps: two equal sides before an unequal one are height and width.
        if level.shape[1] == level.shape[2] != level.shape[3]:
            raise ValueError(
                f"level {number} of the features is {tuple(level.shape)}, channels last: give [B, C, H, W], such as "
                "level.permute(0, 3, 1, 2)"
            )


def keeping_references(extract: Extract) -> Extract:
    """An `ADExtractor` with the same parts whose references stay when the given one gets others; any other extract as
    it is. Otherwise two detectors of one extractor would change each other's scores."""
    return copy.copy(extract) if isinstance(extract, ADExtractor) else extract


def normal_features(extract: Extract, normal_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, FeatureMaps]]:
    """Batches of images [b, 3, S, S] with their features, one batch in memory; all of the first one's side.

    Raises ValueError without images, or if their sizes differ.
    """
    side = None
    for images in normal_batches:
        features = extracted(extract, images)
        if side is not None and images.shape[2] != side:
            raise ValueError(f"normal images of {side} and of {images.shape[2]} pixels: prepare all alike")
        side = images.shape[2]
        yield images, features
    if side is None:
        raise ValueError("no normal images to fit on: normal_batches is empty (an iterator can be read only once)")


def not_fitted(detector: object) -> ValueError:
    """The error of a detector that was asked too early."""
    return ValueError(
        f"this {type(detector).__name__} is not fitted: call fit(normal_batches) or from_pretrained first"
    )


def check_side(images: Tensor, side: int) -> None:
    """Raises ValueError if images are not of the size that the detector was fitted on."""
    if images.ndim == 4 and images.shape[2] != side:
        raise ValueError(f"images of {images.shape[2]} pixels, the detector was fitted on {side}: prepare them alike")

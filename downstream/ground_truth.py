"""What metrics accept: scores that are numbers, masks that are masks, and the weight of each defective pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def region_weights(masks_NHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[A] weights of the anomalous pixels in C order: 1 / (pixels in its region x number of regions).

    The covered weight at a threshold is then that threshold's PRO. Regions are 8-connected and never cross images.
    """
    shares, regions = region_shares(masks_NHW)
    return shares / max(regions, 1)


def region_shares(masks_NHW: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """[A] shares of the anomalous pixels in their regions, in C order: 1 / pixels; and the number of regions."""
    shares, regions = [np.empty(0)], 0
    for mask in masks_NHW:
        if not mask.any():
            continue
        region, found = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        region_of_pixel = region[mask]
        shares.append(1.0 / np.bincount(region_of_pixel)[region_of_pixel])
        regions += found
    return np.concatenate(shares), regions


def image_labels(masks_NHW: NDArray[np.bool_], labels: ArrayLike | None) -> NDArray[np.bool_]:
    """[N] which images are anomalous. Raises ValueError for a label that a mask contradicts, or a wrong number."""
    marked = np.asarray(masks_NHW.reshape(len(masks_NHW), -1).any(axis=1))
    if labels is None:
        return marked
    given = binary_masks(labels)
    if given.shape != marked.shape:
        raise ValueError(f"labels have shape {given.shape}; expected [{len(marked)}], one per map")
    if (marked & ~given).any():
        raise ValueError(f"image {int(np.argmax(marked & ~given))} is labelled normal but its mask is not empty")
    return given


def unmarked(masks_NHW: NDArray[np.bool_], labels_N: NDArray[np.bool_]) -> int:
    """How many anomalous images have no marked pixel: their masks are empty, or lost the defect when made smaller."""
    return int((labels_N & ~masks_NHW.any(axis=(1, 2))).sum())


def paired(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Scores and labels of one shape, not empty; ValueError otherwise."""
    values, truth = real_numbers(scores, "scores"), binary_masks(labels)
    if values.shape != truth.shape or values.size == 0:
        raise ValueError(f"scores have shape {values.shape}, labels {truth.shape}; expected equal, not empty")
    return values, truth


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, wherever it lives; numpy has no bfloat16
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)


def real_numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """A float array. Raises ValueError for NaN and infinite values, and for what is no number."""
    array = _array(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} have dtype {array.dtype}; expected real numbers")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype(np.float64 if array.dtype.kind in "iu" else np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} contain {bad} NaN or infinite values of {array.size}; all of them must be finite")
    return array


def binary_masks(values: ArrayLike) -> NDArray[np.bool_]:
    """A bool array: bool, integers (> 0 is a defect) or floats of only 0 and 1; anything else raises ValueError."""
    array = _array(values)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind == "f" and not ((array == 0) | (array == 1)).all():
        raise ValueError("masks hold values other than 0 and 1; threshold them first, e.g. masks > 0.5")
    if array.dtype.kind not in "fiu" or (array.size and array.min() < 0):
        raise ValueError(
            f"masks have dtype {array.dtype} or negative values; expected bool or integers (> 0 is defect)"
        )
    return array > 0

"""How much of each defect has to be found: ``defects_config.json`` of MVTec LOCO, beside ``ground_truth``.

It is a list of kinds of defects, each with the ``pixel_value`` that its masks have, its ``saturation_threshold``, and
whether this is a share of the defect's area (``relative_saturation``) or a number of pixels. A mask file has one value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from adpretrain.data.layouts.tree import TRUTH
from adpretrain.data.samples import Sample
from adpretrain.parsing import read_json
from adpretrain.photographs import mask_values

CONFIG = "defects_config.json"


def saturation_file(sample: Sample) -> Path | None:
    """The file that says how much of a sample's defects has to be found; None if there is none or no mask."""
    if not isinstance(sample.mask, tuple) or sample.mask[0].parents[2].name != TRUTH:
        return None
    file = sample.mask[0].parents[3] / CONFIG
    return file if file.is_file() else None


def saturated_shares(sample: Sample) -> list[float]:
    """For each mask file of a sample with a `saturation_file`, the share of its pixels, in (0, 1], that is enough:
    saturation area / area, both in pixels of the file. As in the benchmark's own evaluation, a relative area is rounded
    down, and an absolute one is at most the defect's.

    Raises ValueError that names the file if a kind is malformed, or a mask is empty or has several values or one that
    is not listed.
    """
    file = saturation_file(sample)
    assert file is not None
    kinds = _kinds(file)
    shares = []
    for mask in sample.mask_files:
        values = mask_values(mask)
        found = np.unique(values[values > 0]).tolist()
        if len(found) != 1 or found[0] not in kinds:
            listed = ", ".join(map(str, sorted(kinds))) or "none"
            raise ValueError(f"mask {mask} has the values {found}; expected one of those that {file} lists: {listed}")
        threshold, relative = kinds[found[0]]
        area = int((values > 0).sum())
        enough = int(threshold * area) if relative else min(threshold, area)
        shares.append(max(enough, 1) / area)
    return shares


def _kinds(file: Path) -> dict[int, tuple[float, bool]]:
    """Value in masks -> (threshold, whether it is relative)."""
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a list of kinds of defects")
    return dict(_kind(entry, f"entry {number} of {file}") for number, entry in enumerate(content, start=1))


def _kind(entry: Any, where: str) -> tuple[int, tuple[float, bool]]:
    try:
        value, threshold = entry["pixel_value"], entry["saturation_threshold"]
        relative = entry["relative_saturation"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a kind of defect: {type(error).__name__} {error}") from error
    number = isinstance(threshold, int | float) and threshold > 0 and (threshold <= 1 or not relative)
    if not (isinstance(value, int) and value > 0 and number and isinstance(relative, bool)):
        raise ValueError(
            f"{where} has pixel_value {value!r}, saturation_threshold {threshold!r}, relative_saturation {relative!r}; "
            "expected a positive integer, a positive number (at most 1 if it is relative), and true or false"
        )
    return value, (float(threshold), relative)

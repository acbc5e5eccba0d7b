"""Frozen feature networks by name: one table, one loader; one family per file.

Importing this module imports none of their libraries and downloads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from adpretrain.backbones.base import Backbone, Extract, FeatureMaps
from adpretrain.backbones.table import BACKBONES, BackboneEntry, BackboneInfo, find_entry, list_backbones
from adpretrain.backbones.weights import Weights
from adpretrain.preprocess import crop_side

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneEntry",
    "BackboneInfo",
    "Extract",
    "FeatureMaps",
    "list_backbones",
    "load_backbone",
]


def load_backbone(
    name: str,
    pretrained: bool = True,
    revision: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    image_size: int = 224,
    levels: Sequence[int] | None = None,
    resize: str = "squeeze",
    crop_from: int | None = None,
    finest: int = 0,
    patch: Sequence[int] = (),
) -> Backbone:
    """A frozen backbone by name (see `BACKBONES`), for square inputs of ``image_size`` pixels.

    Args:
        name: a row of `BACKBONES`, or ``timm/<model name>``.
        pretrained: False = random weights, for tests.
        revision: branch, tag or commit of the weights on the Hugging Face Hub; None = the newest. The backbone's
            ``revision`` is the commit that was loaded.
        weights: a local file (.safetensors, or .pth, .pt, .bin of plain tensors) or folder instead of the Hub's.
        image_size: S; must fit the network's patch or stride.
        levels: numbers, from 1, of blocks (vision transformers) or stages (other networks); None = the paper's.
        resize: how photographs become square: "squeeze", or "crop" the centre as the authors' released code does.
        crop_from: for "crop", the shorter side before the crop; None = the released code's (`adpretrain.preprocess`).
        finest: stride in pixels to which finer maps are averaged down, which saves time in every search for nearest
            references; 0 leaves the maps as the network gives them.
        patch: for each level, the odd side of the neighbourhood over which every token is averaged, after ``finest``;
            zeros beyond the border count, as in PatchCore, so that tokens at the border differ. () = 1 for every level.

    Raises ValueError for an unknown name, a level, size, revision or file that does not fit, or weights that are
    neither in the local cache nor can be downloaded; the message says what fits, or what to do.
    """
    if not isinstance(pretrained, bool):
        raise ValueError(f"pretrained must be True or False, got {pretrained!r}; a size is given as image_size=")
    entry = find_entry(name)
    path = os.fspath(weights) if weights is not None else None
    chosen = Weights(name, entry.source, pretrained, revision, path)
    cropped = crop_side(image_size, resize, crop_from)
    backbone = entry.build(name, chosen, image_size, list(entry.levels if levels is None else levels))
    backbone.preprocess = replace(backbone.preprocess, crop_from=cropped)
    if finest < 0 or (finest and image_size % finest):
        raise ValueError(f"finest {finest} must be a stride in pixels that divides image_size {image_size}, or 0")
    if patch and (len(patch) != len(backbone.levels) or any(side < 1 or side % 2 == 0 for side in patch)):
        raise ValueError(f"patch {list(patch)} must hold an odd number for each of the levels {backbone.levels}")
    backbone.finest, backbone.patch = finest, list(patch) or backbone.patch
    return backbone

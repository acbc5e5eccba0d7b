"""Frozen feature networks by name: one table, one loader; one family per file."""

from __future__ import annotations

from collections.abc import Callable

from adpretrain.backbones.base import Backbone, Extract, FeatureMaps, References
from adpretrain.backbones.filterbank import FilterBank

__all__ = ["BACKBONES", "Backbone", "Extract", "FeatureMaps", "References", "load_backbone"]

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "filterbank": FilterBank,
}


def load_backbone(name: str, image_size: int = 224) -> Backbone:
    """A frozen backbone by name (see `BACKBONES`), for square inputs of ``image_size`` pixels.

    Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}")
    return BACKBONES[name](image_size=image_size)

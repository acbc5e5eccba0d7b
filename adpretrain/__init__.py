"""Pretrained features for industrial anomaly detection: extractors here, detectors and metrics in `downstream`."""

import importlib
from typing import TYPE_CHECKING, Any

from adpretrain._version import __version__

if TYPE_CHECKING:
    from adpretrain.backbones import load_backbone
    from adpretrain.extractor import ADExtractor
    from adpretrain.photographs import read_image

__all__ = ["ADExtractor", "__version__", "load_backbone", "read_image"]

_PLACES = {"ADExtractor": "extractor", "load_backbone": "backbones", "read_image": "photographs"}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which the command's help and its errors need not wait for.
    if name in _PLACES:
        return getattr(importlib.import_module(f"adpretrain.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Pretrained features for industrial anomaly detection: extractors here, detectors and metrics in `downstream`."""

import importlib
from typing import TYPE_CHECKING, Any

from adpretrain._version import __version__

if TYPE_CHECKING:
    from adpretrain.backbones import load_backbone
    from adpretrain.config import LocalScaleConfig, ProjectorConfig
    from adpretrain.extractor import ADExtractor
    from adpretrain.local_scale import LocalScale
    from adpretrain.photographs import read_image
    from adpretrain.projector import FeatureProjector

_PLACES = {
    "ADExtractor": "extractor",
    "FeatureProjector": "projector",
    "LocalScale": "local_scale",
    "LocalScaleConfig": "config",
    "ProjectorConfig": "config",
    "load_backbone": "backbones",
    "read_image": "photographs",
}

__all__ = [
    "ADExtractor",
    "FeatureProjector",
    "LocalScale",
    "LocalScaleConfig",
    "ProjectorConfig",
    "__version__",
    "load_backbone",
    "read_image",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which the command's help and its errors need not wait for.
    if name in _PLACES:
        return getattr(importlib.import_module(f"adpretrain.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

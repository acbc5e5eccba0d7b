"""Pretrained features for industrial anomaly detection."""

from adpretrain._version import __version__
from adpretrain.extractor import ADExtractor

__all__ = ["ADExtractor", "__version__"]

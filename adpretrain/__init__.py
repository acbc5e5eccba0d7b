"""Pretrained features for industrial anomaly detection."""

from typing import TYPE_CHECKING, Any

from adpretrain._version import __version__

if TYPE_CHECKING:
    from adpretrain.extractor import ADExtractor

__all__ = ["ADExtractor", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which the command's help and its errors need not wait for.
    if name == "ADExtractor":
        from adpretrain.extractor import ADExtractor

        return ADExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Packages that only some uses need: they are extras of the distribution, such as `adpretrain[clip]`."""

from __future__ import annotations

import importlib


def need(extra: str, *packages: str) -> None:
    """Import ``packages`` of an extra. Raises ValueError that says how to install it if one of them is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{package} is needed for this ({error}): pip install 'adpretrain[{extra}]'") from None

"""An unfitted detector from its name and its options, as files and command lines give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adpretrain.backbones import Extract
from adpretrain.extractor import ADExtractor
from adpretrain.parsing import from_dict
from downstream.composite import Composite
from downstream.detector import Detector
from downstream.detectors import find_detector
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.detectors.featurenorm import FeatureNorm

SETTINGS = ("default", "adpretrain")


def build_detector(name: str, extract: Extract, options: Mapping[str, Any], settings: str = "default") -> Detector:
    """A detector of `downstream.detectors.DETECTORS` on ``extract``.

    ``settings``: its own "default" options, or those of ADPretrain's evaluation ("adpretrain") where it has them.
    ``options`` replace single ones of these, at any depth. The FeatureNorms get the map size and the norm of the
    extractor unless the options name others. Raises ValueError for an unknown name, setting or option.
    """
    entry = find_detector(name)
    kind, chosen = entry.load(), chosen_options(name, extract, options, settings)
    if kind is AlignedFeatureNorm:
        extract = getattr(extract, "extractor", extract)
    if issubclass(kind, FeatureNorm):
        detector: Detector = kind(extract, **dataclasses.asdict(chosen))
    elif issubclass(kind, Composite):
        detector = kind.of(extract, chosen)
    else:
        detector = kind(extract, chosen)
    return detector


def chosen_options(name: str, extract: Extract, options: Mapping[str, Any], settings: str = "default") -> Any:
    """The dataclass of all options of the detector that `build_detector` makes. Errors as there."""
    if settings not in SETTINGS:
        raise ValueError(f"settings {settings!r} are unknown; choose one of {', '.join(SETTINGS)}")
    entry = find_detector(name)
    module = entry.place()
    base = dataclasses.asdict(getattr(module, "ADPRETRAIN" if settings == "adpretrain" else "DEFAULT", module.DEFAULT))
    network = getattr(extract, "extractor", extract)  # an extractor below `evaluation.withheld.Withheld`
    if issubclass(entry.load(), FeatureNorm):
        preprocess = getattr(extract, "preprocess", None)
        base["image_size"] = preprocess.image_size if preprocess is not None else base["image_size"]
        base["norm"] = network.config.norm if isinstance(network, ADExtractor) else None
    return from_dict(entry.options(), merged(base, options), f"options of {name}")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``base`` with the values of ``changes`` in place of its own; a mapping replaces key by key."""
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return out

"""Every detector by name: what it is, where it is from, and the class, imported only when asked for.

`build_detector` makes an unfitted one from its name and options, as files and command lines give them;
`detector_from_pretrained` loads a fitted one of any kind.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Unpack

from adpretrain.backbones import Extract
from adpretrain.parsing import from_dict
from downstream.detector import Detector
from downstream.saved import HubOptions, locate_model, read_detector_config

SETTINGS = ("default", "adpretrain")


@dataclass(frozen=True)
class DetectorEntry:
    """``module`` and ``name`` of the class."""

    module: str
    name: str
    summary: str
    paper: str

    def place(self) -> Any:
        """The module, which has the default options as DEFAULT."""
        return importlib.import_module(self.module)

    def load(self) -> Any:
        """The class."""
        return getattr(self.place(), self.name)

    def options(self) -> Any:
        """The dataclass of its options by name."""
        return type(self.place().DEFAULT)


DETECTORS: dict[str, DetectorEntry] = {
    "featurenorm": DetectorEntry(
        "downstream.detectors.featurenorm",
        "FeatureNorm",
        "norm of the pretrained features; nothing to fit but references",
        "ADPretrain, Yao et al. 2025",
    ),
    "aligned-featurenorm": DetectorEntry(
        "downstream.detectors.aligned",
        "AlignedFeatureNorm",
        "the same, with the best aligned references for every image",
        "ADPretrain, Yao et al. 2025, App. C",
    ),
    "patchcore": DetectorEntry(
        "downstream.detectors.patchcore",
        "PatchCore",
        "distance of every patch to a coreset of normal patches",
        "Towards Total Recall, Roth et al. 2022",
    ),
    "reconpatch": DetectorEntry(
        "downstream.detectors.reconpatch",
        "ReConPatch",
        "PatchCore on a representation trained on the product's patches",
        "ReConPatch, Hyun et al. 2024",
    ),
    "padim": DetectorEntry(
        "downstream.detectors.padim",
        "PaDiM",
        "a Gaussian at every position; for products that lie in one place",
        "PaDiM, Defard et al. 2021",
    ),
    "spade": DetectorEntry(
        "downstream.detectors.spade",
        "SPADE",
        "nearest normal images, then their nearest patches; a baseline",
        "Sub-Image Anomaly Detection, Cohen & Hoshen 2020",
    ),
    "ensemble": DetectorEntry(
        "downstream.detectors.ensemble",
        "Ensemble",
        "the mean of several detectors' standardised scores",
        "ReConPatch, Hyun et al. 2024, Sec. 3.3",
    ),
    "refined": DetectorEntry(
        "downstream.detectors.refined",
        "Refined",
        "a detector and a network that sharpens its maps",
        "ReConPatch, Hyun et al. 2024, suppl. D",
    ),
}


def find_detector(name: str) -> DetectorEntry:
    """The entry of a name. Raises ValueError that lists the names."""
    if name not in DETECTORS:
        raise ValueError(f"detector {name!r} is unknown; choose one of {', '.join(DETECTORS)}")
    return DETECTORS[name]


def build_detector(name: str, extract: Extract, options: Mapping[str, Any], settings: str = "default") -> Detector:
    """An unfitted detector of the table on ``extract``.

    ``settings``: its own "default" options, or those of ADPretrain's evaluation ("adpretrain") where it has them.
    ``options`` replace single ones of these, at any depth. Raises ValueError for an unknown name, setting or option.
    """
    detector: Detector = find_detector(name).load().of(extract, chosen_options(name, options, settings))
    return detector


def chosen_options(name: str, options: Mapping[str, Any], settings: str = "default") -> Any:
    """The dataclass of all options of the detector that `build_detector` makes. Errors as there."""
    if settings not in SETTINGS:
        raise ValueError(f"settings {settings!r} are unknown; choose one of {', '.join(SETTINGS)}")
    entry = find_detector(name)
    module = entry.place()
    base = dataclasses.asdict(getattr(module, "ADPRETRAIN" if settings == "adpretrain" else "DEFAULT", module.DEFAULT))
    return from_dict(entry.options(), merged(base, options), f"options of {name}")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``base`` with the values of ``changes`` in place of its own; a mapping replaces key by key."""
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return out


def detector_from_pretrained(
    folder: str | os.PathLike[str],
    extract: Extract | Sequence[Extract] | None = None,
    device: str | torch.device | None = None,
    weights: str | os.PathLike[str] | None = None,
    **hub: Unpack[HubOptions],
) -> Detector:
    """A fitted detector of any kind, made of others or not. Arguments and errors as in
    `downstream.saved.load_detector`.
    """
    folder = locate_model(folder, **hub).folder
    return find_detector(read_detector_config(folder).detector).load().from_pretrained(folder, extract, device, weights)

"""Every detector by name: what it is, where it is from, and the class, imported only when asked for."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Unpack

from adpretrain.backbones import Extract
from downstream.detector import Detector
from downstream.saving import HubOptions, locate_model, read_detector_config


@dataclass(frozen=True)
class DetectorEntry:
    """``module`` and ``name`` of the class; ``config``: the dataclass of its options, "" if it takes arguments."""

    module: str
    name: str
    config: str
    summary: str
    paper: str

    def load(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(self.module), self.name)

    def options(self) -> Any:
        """The dataclass of its options."""
        return getattr(importlib.import_module(self.module), self.config)


DETECTORS: dict[str, DetectorEntry] = {
    "featurenorm": DetectorEntry(
        "downstream.featurenorm",
        "FeatureNorm",
        "FeatureNormOptions",
        "norm of the pretrained features; nothing to fit but references",
        "ADPretrain, Yao et al. 2025",
    ),
    "aligned-featurenorm": DetectorEntry(
        "downstream.aligned",
        "AlignedFeatureNorm",
        "AlignedOptions",
        "the same, with the best aligned references for every image",
        "ADPretrain, Yao et al. 2025, App. C",
    ),
    "patchcore": DetectorEntry(
        "downstream.patchcore",
        "PatchCore",
        "PatchCoreConfig",
        "distance of every patch to a coreset of normal patches",
        "Towards Total Recall, Roth et al. 2022",
    ),
    "reconpatch": DetectorEntry(
        "downstream.reconpatch",
        "ReConPatch",
        "ReConPatchConfig",
        "PatchCore on a representation trained on the product's patches",
        "ReConPatch, Hyun et al. 2024",
    ),
    "padim": DetectorEntry(
        "downstream.padim",
        "PaDiM",
        "PaDiMConfig",
        "a Gaussian at every position; for products that lie in one place",
        "PaDiM, Defard et al. 2021",
    ),
    "spade": DetectorEntry(
        "downstream.spade",
        "SPADE",
        "SPADEConfig",
        "nearest normal images, then their nearest patches; a baseline",
        "Sub-Image Anomaly Detection, Cohen & Hoshen 2020",
    ),
}

# Made of other detectors: no options of their own, so they are loaded by name but not fitted by it.
COMPOSITES = {"ensemble": ("downstream.ensemble", "Ensemble"), "refined": ("downstream.refined", "Refined")}


def find_detector(name: str) -> DetectorEntry:
    """The entry of a name. Raises ValueError that lists the names."""
    if name not in DETECTORS:
        raise ValueError(f"detector {name!r} is unknown; choose one of {', '.join(DETECTORS)}")
    return DETECTORS[name]


def detector_from_pretrained(
    folder: str | os.PathLike[str],
    extract: Extract | None = None,
    device: str | torch.device | None = None,
    weights: str | os.PathLike[str] | None = None,
    **hub: Unpack[HubOptions],
) -> Detector:
    """A fitted detector of any kind, made of others or not. Arguments and errors as in
    `downstream.saving.load_detector`.
    """
    folder = locate_model(folder, **hub).folder
    name = read_detector_config(folder).detector
    if name in COMPOSITES:
        module, cls = COMPOSITES[name]
        return getattr(importlib.import_module(module), cls).from_pretrained(folder, extract, device, weights)
    return find_detector(name).load().from_pretrained(folder, extract, device, weights)

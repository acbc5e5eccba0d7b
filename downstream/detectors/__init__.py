"""The table of detectors: summary, paper, and the class, which is imported only when needed.

`build_detector` makes an unfitted detector from its name and options, as files and command lines give them;
`detector_from_pretrained` loads any fitted detector.
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
    """A row of the table; ``module`` and ``name`` are those of the class.

    ``learns``: what fitting learns and a saved detector holds; ``photographs``: from how many normal ones on it is
    worth trying, None = as its members; ``features``: what it takes ("any": an extractor or a raw backbone); ``cost``:
    CPU time and peak memory of fitting 150 photographs of 224 pixels on ResNet-18 with one thread
    (`tests/benchmarks/detector_costs.py`; for networks that learn, some steps of 16 photographs, multiplied to the
    default number of steps), "" = not measured.
    """

    module: str
    name: str
    summary: str
    paper: str
    learns: str
    photographs: int | None
    features: str
    cost: str

    def in_words(self) -> str:
        """What a reader should know besides the summary, in one line."""
        some = "photograph" if self.photographs == 1 else "photographs"
        number = "" if self.photographs is None else f"from {self.photographs} {some} on"
        takes = f"takes {self.features}{' features' if self.features == 'any' else ''}"
        cost = self.cost and f"fitting: {self.cost}"
        return "; ".join(filter(None, [f"learns {self.learns}", number, takes, cost, self.paper]))

    def place(self) -> Any:
        """Import the module, whose DEFAULT holds the default options."""
        return importlib.import_module(self.module)

    def load(self) -> Any:
        """Import the class."""
        return getattr(self.place(), self.name)

    def options(self) -> Any:
        """Return the dataclass of the options that `build_detector` takes."""
        return type(self.place().DEFAULT)


DETECTORS: dict[str, DetectorEntry] = {
    "featurenorm": DetectorEntry(
        "downstream.detectors.featurenorm",
        "FeatureNorm",
        "norm of the pretrained features; only references are fitted",
        "ADPretrain, Yao et al. 2025",
        learns="nothing but references",
        photographs=1,
        features="any",
        cost="nothing to fit, 1.1 GiB",
    ),
    "aligned-featurenorm": DetectorEntry(
        "downstream.detectors.aligned",
        "AlignedFeatureNorm",
        "FeatureNorm with the best aligned references for every image",
        "ADPretrain, Yao et al. 2025, App. C",
        learns="nothing but references",
        photographs=1,
        features="an extractor's residuals",
        cost="",
    ),
    "patchcore": DetectorEntry(
        "downstream.detectors.patchcore",
        "PatchCore",
        "distance of every patch to a coreset of normal patches",
        "Towards Total Recall, Roth et al. 2022",
        learns="a memory bank",
        photographs=2,
        features="any",
        cost="9 s, 1.3 GiB",
    ),
    "reconpatch": DetectorEntry(
        "downstream.detectors.reconpatch",
        "ReConPatch",
        "PatchCore on a representation trained on the product's patches",
        "ReConPatch, Hyun et al. 2024",
        learns="a linear map, a memory bank",
        photographs=10,
        features="any",
        cost="",
    ),
    "padim": DetectorEntry(
        "downstream.detectors.padim",
        "PaDiM",
        "a Gaussian at every position; for products always in the same place",
        "PaDiM, Defard et al. 2021",
        learns="means and covariances",
        photographs=10,
        features="any",
        cost="10 s, 1.5 GiB",
    ),
    "spade": DetectorEntry(
        "downstream.detectors.spade",
        "SPADE",
        "nearest normal images, then their nearest patches; a baseline",
        "Sub-Image Anomaly Detection, Cohen & Hoshen 2020",
        learns="a memory bank",
        photographs=1,
        features="any",
        cost="11 s, 1.9 GiB",
    ),
    "subspacead": DetectorEntry(
        "downstream.detectors.subspacead",
        "SubspaceAD",
        "distance of every patch to the principal subspace of a few normal photographs",
        "SubspaceAD, Lendering et al. 2026",
        learns="a mean, some directions",
        photographs=1,
        features="any",
        cost="19 s, 1.4 GiB",
    ),
    "anomalydino": DetectorEntry(
        "downstream.detectors.anomalydino",
        "AnomalyDINO",
        "cosine distance to the nearest patch of a few normal photographs and their rotations",
        "AnomalyDINO, Damm et al. 2025",
        learns="a memory bank",
        photographs=1,
        features="any",
        cost="64 s, 1.6 GiB",
    ),
    "musc": DetectorEntry(
        "downstream.detectors.musc",
        "MuSc",
        "unlabelled photographs score each other; those it is fitted on need not be normal",
        "MuSc, Li et al. 2024",
        learns="features of all photographs",
        photographs=10,
        features="any",
        cost="more than 5 min",
    ),
    "winclip": DetectorEntry(
        "downstream.detectors.winclip",
        "WinCLIP",
        "windows against sentences about damage, with or without normal photographs; CLIP, in Python only",
        "WinCLIP, Jeong et al. 2023",
        learns="nothing, or a memory bank",
        photographs=0,
        features="an open_clip model",
        cost="",
    ),
    "rd4ad": DetectorEntry(
        "downstream.detectors.rd4ad",
        "RD4AD",
        "a decoder learns to reconstruct the features of normal images, from a bottleneck",
        "RD4AD, Deng & Li 2022; loss of Guo et al. 2023, Eq. 3",
        learns="a bottleneck and a decoder",
        photographs=50,
        features="levels each half as large as the one before",
        cost="2 h, 2.1 GiB",
    ),
    "recontrast": DetectorEntry(
        "downstream.detectors.recontrast",
        "ReContrast",
        "a copy of the encoder learns the product together with the decoder that reconstructs it",
        "ReContrast, Guo et al. 2023",
        learns="a bottleneck, a decoder and a copy of the encoder",
        photographs=50,
        features="a raw backbone of such levels",
        cost="6 h, 3.1 GiB",
    ),
    "dinomaly": DetectorEntry(
        "downstream.detectors.dinomaly",
        "Dinomaly",
        "blocks of linear attention learn to reconstruct a vision transformer's features",
        "Dinomaly, Guo et al. 2025",
        learns="a bottleneck and a decoder",
        photographs=50,
        features="levels of one size",
        cost="9 h, 2.2 GiB",
    ),
    "cflow": DetectorEntry(
        "downstream.detectors.cflow",
        "CFLOW",
        "likelihood of every feature vector at its position, by normalising flows",
        "CFLOW-AD, Gudovskiy et al. 2022",
        learns="a flow for each level",
        photographs=20,
        features="any",
        cost="3 h, 1.5 GiB",
    ),
    "uniad": DetectorEntry(
        "downstream.detectors.uniad",
        "UniAD",
        "difference of features and what a transformer reconstructs from the rest of the image",
        "UniAD, You et al. 2022",
        learns="a transformer",
        photographs=50,
        features="any",
        cost="8 h, 3.4 GiB",
    ),
    "glass": DetectorEntry(
        "downstream.detectors.glass",
        "GLASS",
        "a discriminator of normal features and of anomalies made from them",
        "GLASS, Chen et al. 2024",
        learns="an adaptor and a discriminator",
        photographs=20,
        features="any",
        cost="10 h, 2.5 GiB",
    ),
    "ensemble": DetectorEntry(
        "downstream.detectors.ensemble",
        "Ensemble",
        "the mean of several detectors' standardised scores",
        "ReConPatch, Hyun et al. 2024, Sec. 3.3",
        learns="what its members learn",
        photographs=None,
        features="what they take",
        cost="",
    ),
    "tiled": DetectorEntry(
        "downstream.detectors.tiled",
        "Tiled",
        "a detector on the tiles of photographs larger than its input",
        "",
        learns="what the detector learns",
        photographs=None,
        features="what it takes",
        cost="",
    ),
    "refined": DetectorEntry(
        "downstream.detectors.refined",
        "Refined",
        "a detector and a network that sharpens its maps",
        "ReConPatch, Hyun et al. 2024, suppl. D",
        learns="a small network on drawn defects",
        photographs=10,
        features="what its detector takes",
        cost="",
    ),
}


def find_detector(name: str) -> DetectorEntry:
    """Return the entry of a detector. Raises ValueError that lists the names if there is none."""
    if name not in DETECTORS:
        raise ValueError(f"detector {name!r} is unknown; choose one of {', '.join(DETECTORS)}")
    return DETECTORS[name]


def build_detector(name: str, extract: Extract, options: Mapping[str, Any], settings: str = "default") -> Detector:
    """Make an unfitted detector of the table on ``extract``.

    ``settings``: "default" takes the detector's default options, "adpretrain" those of ADPretrain's evaluation if there
    are any. ``options`` override single ones, at any depth. Raises ValueError for an unknown name, setting or option.
    """
    detector: Detector = find_detector(name).load().of(extract, chosen_options(name, options, settings))
    return detector


def chosen_options(name: str, options: Mapping[str, Any], settings: str = "default") -> Any:
    """Return all options of the detector that `build_detector` would make; raises the same errors."""
    if settings not in SETTINGS:
        raise ValueError(f"settings {settings!r} are unknown; choose one of {', '.join(SETTINGS)}")
    entry = find_detector(name)
    module = entry.place()
    base = dataclasses.asdict(getattr(module, "ADPRETRAIN" if settings == "adpretrain" else "DEFAULT", module.DEFAULT))
    return from_dict(entry.options(), merged(base, options), f"options of {name}")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested ``base`` with the values of ``changes``; mappings are merged key by key."""
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
    """Load any fitted detector, also one that is made of others. Arguments and errors are those of
    `downstream.saved.load_detector`.
    """
    folder = locate_model(folder, **hub).folder
    return find_detector(read_detector_config(folder).detector).load().from_pretrained(folder, extract, device, weights)

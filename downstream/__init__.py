"""Anomaly detectors on any extractor or raw backbone, metrics and thresholds: what most programs need of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from downstream.aligned import AlignedFeatureNorm
    from downstream.calibration import calibrate
    from downstream.detector import Detector, Prediction
    from downstream.embedding import EmbeddingConfig
    from downstream.ensemble import Ensemble
    from downstream.featurenorm import FeatureNorm
    from downstream.metrics import evaluate_maps
    from downstream.padim import PaDiM, PaDiMConfig
    from downstream.patchcore import PatchCore, PatchCoreConfig
    from downstream.reconpatch import ReConPatch, ReConPatchConfig
    from downstream.refined import Refined
    from downstream.spade import SPADE, SPADEConfig
    from downstream.table import detector_from_pretrained

_PLACES = {
    "AlignedFeatureNorm": "aligned",
    "Detector": "detector",
    "EmbeddingConfig": "embedding",
    "Ensemble": "ensemble",
    "FeatureNorm": "featurenorm",
    "PaDiM": "padim",
    "PaDiMConfig": "padim",
    "PatchCore": "patchcore",
    "PatchCoreConfig": "patchcore",
    "Prediction": "detector",
    "ReConPatch": "reconpatch",
    "ReConPatchConfig": "reconpatch",
    "Refined": "refined",
    "SPADE": "spade",
    "SPADEConfig": "spade",
    "calibrate": "calibration",
    "detector_from_pretrained": "table",
    "evaluate_maps": "metrics",
}

__all__ = [
    "SPADE",
    "AlignedFeatureNorm",
    "Detector",
    "EmbeddingConfig",
    "Ensemble",
    "FeatureNorm",
    "PaDiM",
    "PaDiMConfig",
    "PatchCore",
    "PatchCoreConfig",
    "Prediction",
    "ReConPatch",
    "ReConPatchConfig",
    "Refined",
    "SPADEConfig",
    "calibrate",
    "detector_from_pretrained",
    "evaluate_maps",
]


def __getattr__(name: str) -> Any:
    # As in `adpretrain`: a command's help need not wait for torch.
    if name in _PLACES:
        return getattr(importlib.import_module(f"downstream.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

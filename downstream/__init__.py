"""Anomaly detectors on any extractor or raw backbone, metrics and thresholds: the names that most programs need."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from downstream.calibration import calibrate
    from downstream.detector import Detector, Prediction
    from downstream.detectors import detector_from_pretrained
    from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
    from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig
    from downstream.detectors.cflow import CFLOW, CFLOWConfig
    from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
    from downstream.detectors.ensemble import Ensemble
    from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
    from downstream.detectors.glass import GLASS, GLASSConfig
    from downstream.detectors.musc import MuSc, MuScConfig
    from downstream.detectors.padim import PaDiM, PaDiMConfig
    from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
    from downstream.detectors.rd4ad import RD4AD
    from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
    from downstream.detectors.recontrast import ReContrast, ReContrastConfig
    from downstream.detectors.refined import Refined
    from downstream.detectors.spade import SPADE, SPADEConfig
    from downstream.detectors.subspacead import SubspaceAD, SubspaceADConfig
    from downstream.detectors.uniad import UniAD, UniADConfig
    from downstream.detectors.winclip import WinCLIP, WinCLIPConfig
    from downstream.embedding import EmbeddingConfig
    from downstream.lessons import LearningConfig
    from downstream.metrics import evaluate_maps

_PLACES = {
    "AlignedFeatureNorm": "detectors.aligned",
    "AlignedFeatureNormConfig": "detectors.aligned",
    "AnomalyDINO": "detectors.anomalydino",
    "AnomalyDINOConfig": "detectors.anomalydino",
    "CFLOW": "detectors.cflow",
    "CFLOWConfig": "detectors.cflow",
    "Detector": "detector",
    "Dinomaly": "detectors.dinomaly",
    "DinomalyConfig": "detectors.dinomaly",
    "EmbeddingConfig": "embedding",
    "Ensemble": "detectors.ensemble",
    "FeatureNorm": "detectors.featurenorm",
    "FeatureNormConfig": "detectors.featurenorm",
    "LearningConfig": "lessons",
    "GLASS": "detectors.glass",
    "GLASSConfig": "detectors.glass",
    "MuSc": "detectors.musc",
    "MuScConfig": "detectors.musc",
    "PaDiM": "detectors.padim",
    "PaDiMConfig": "detectors.padim",
    "PatchCore": "detectors.patchcore",
    "PatchCoreConfig": "detectors.patchcore",
    "Prediction": "detector",
    "RD4AD": "detectors.rd4ad",
    "ReConPatch": "detectors.reconpatch",
    "ReConPatchConfig": "detectors.reconpatch",
    "ReContrast": "detectors.recontrast",
    "ReContrastConfig": "detectors.recontrast",
    "Refined": "detectors.refined",
    "SPADE": "detectors.spade",
    "SPADEConfig": "detectors.spade",
    "SubspaceAD": "detectors.subspacead",
    "SubspaceADConfig": "detectors.subspacead",
    "UniAD": "detectors.uniad",
    "UniADConfig": "detectors.uniad",
    "WinCLIP": "detectors.winclip",
    "WinCLIPConfig": "detectors.winclip",
    "calibrate": "calibration",
    "detector_from_pretrained": "detectors",
    "evaluate_maps": "metrics",
}

__all__ = [
    "CFLOW",
    "GLASS",
    "RD4AD",
    "SPADE",
    "AlignedFeatureNorm",
    "AlignedFeatureNormConfig",
    "AnomalyDINO",
    "AnomalyDINOConfig",
    "CFLOWConfig",
    "Detector",
    "Dinomaly",
    "DinomalyConfig",
    "EmbeddingConfig",
    "Ensemble",
    "FeatureNorm",
    "FeatureNormConfig",
    "GLASSConfig",
    "LearningConfig",
    "MuSc",
    "MuScConfig",
    "PaDiM",
    "PaDiMConfig",
    "PatchCore",
    "PatchCoreConfig",
    "Prediction",
    "ReConPatch",
    "ReConPatchConfig",
    "ReContrast",
    "ReContrastConfig",
    "Refined",
    "SPADEConfig",
    "SubspaceAD",
    "SubspaceADConfig",
    "UniAD",
    "UniADConfig",
    "WinCLIP",
    "WinCLIPConfig",
    "calibrate",
    "detector_from_pretrained",
    "evaluate_maps",
]


def __getattr__(name: str) -> Any:
    # Imported lazily, as in `adpretrain`, so that the help of a command does not wait for torch.
    if name in _PLACES:
        return getattr(importlib.import_module(f"downstream.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Nothing to work on, and numbers that cannot be: every function says so itself, before torch or numpy do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawn import SIZE, photographs

from adpretrain.backbones import Backbone
from downstream.calibration import calibrate, conformal_p_values
from downstream.detectors.anomalydino import AnomalyDINO
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.ensemble import Ensemble, training_units
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.musc import MuSc
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.reconpatch.similarity import relaxed_contrastive_loss
from downstream.detectors.refined import RefinementConfig
from downstream.detectors.refined.simulation import simulate
from downstream.detectors.spade import SPADE, SPADEConfig
from downstream.detectors.subspacead import SubspaceAD
from downstream.embedding import Embedding, pool_channels, random_reducer
from downstream.lessons import LearningConfig
from downstream.maps import gaussian_blur, upsample
from downstream.metrics import errors_at_best_f1

NOTHING: Any = None
EMPTY = torch.zeros(0, 4)
MAP = torch.zeros(1, 8, 8)

CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: calibrate(), "no calibration scores: give at least 2 reference photographs"),
    (lambda: calibrate([], extra=[]), "no calibration scores"),
    (lambda: calibrate(NOTHING), "leave-one-out scores have dtype object; expected real numbers"),
    (lambda: calibrate(0.5), r"leave-one-out scores are the single number 0\.5; expected a list"),
    (lambda: calibrate([1.0, 2.0], extra=0.5), r"extra scores are the single number 0\.5"),
    (lambda: calibrate(["high"]), "leave-one-out scores have dtype <U4; expected real numbers"),
    (lambda: calibrate([1.0, 2.0], "5 %"), "false-alarm rate '5 %'; expected a share between 0 and 1"),  # type: ignore[arg-type]
    (lambda: calibrate([1.0, 2.0], -0.05), r"false-alarm rate -0\.05"),
    (lambda: conformal_p_values([], [1.0]), "no calibration scores: a p-value needs the score"),
    (lambda: calibrate([1.0, 2.0]).p_values(NOTHING), "scores have dtype object"),
    (lambda: errors_at_best_f1([], []), "expected equal, not empty"),
    (lambda: gaussian_blur(MAP, -1.0), r"sigma -1\.0 must be a number of pixels"),
    (lambda: upsample(MAP, 0), r"a grid of \(8, 8\) patches to a map of 0 pixels"),
    (lambda: upsample(MAP[:, :0], 4), r"a grid of \(0, 8\) patches to a map of 4 pixels"),
    (lambda: PatchCoreConfig(sigma=-1.0), r"sigma -1\.0 must be a number of pixels"),
    (lambda: PaDiMConfig(sigma=float("nan")), "sigma nan must be a number of pixels"),
    (lambda: SPADEConfig(sigma=-1.0), r"sigma -1\.0 must be a number of pixels"),
    (
        lambda: FeatureNorm(lambda images: [images], FeatureNormConfig(sigma=-1.0)),
        r"sigma -1\.0 must be a number of pixels",
    ),
    (
        lambda: FeatureNorm(lambda images: [images], FeatureNormConfig(image_size=0)),
        "image_size 0, the side of the maps",
    ),
    (lambda: PatchCoreConfig(amount=-1), "amount -1; expected a share"),
    (lambda: PatchCoreConfig(amount=0.0), r"amount 0\.0; expected a share"),
    (lambda: PatchCoreConfig(projection_dim=0), "projection_dim 0 must be at least 1"),
    (lambda: PatchCoreConfig(seed=-1), "seed -1 must be at least 0"),
    (lambda: RepresentationConfig(seed=-1), "seed -1 must not be negative"),
    (lambda: RefinementConfig(seed=-1), "seed -1 must not be negative"),
    (lambda: ReConPatchConfig(cache_bytes=-1), "cache_bytes -1 must be at least 0"),
    (lambda: Embedding()([]), "there are no levels of features"),
    (lambda: Embedding()([torch.zeros(1, 3, 0, 0)]), "C, H and W at least 1"),
    (lambda: pool_channels(torch.zeros(1, 3, 2, 2), 0), "cannot pool 3 channels to 0"),
    (lambda: random_reducer(4, -1, "project"), "target_dim -1 keeps no channel; choose 1 to 4"),
    (lambda: relaxed_contrastive_loss(EMPTY, torch.zeros(0, 0)), "no patches"),
    (lambda: simulate(torch.zeros(0, 3, 8, 8), []), "no images to make defects in"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message[:30] for _, message in CALLS])
def test_it_is_our_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


FEW_STEPS = functools.partial(CFLOW, config=CFLOWConfig(training=LearningConfig(steps=2)))


@pytest.mark.parametrize(
    "kind", [PatchCore, PaDiM, SPADE, SubspaceAD, AnomalyDINO, MuSc, FEW_STEPS, FeatureNorm, Ensemble]
)
def test_an_empty_batch_is_refused_by_every_detector(backbone: Backbone, kind: Any) -> None:
    detector = kind([PaDiM(backbone)]) if kind is Ensemble else kind(backbone)
    if kind is not FeatureNorm:  # of a raw backbone it reads nothing
        for batches, message in (([], "no normal images to fit on"), ([photographs(0, 0)], "with B > 0")):
            with pytest.raises(ValueError, match=message):
                detector.fit(batches)
    detector.fit([photographs(3, 0)])
    with pytest.raises(ValueError, match=rf"images must be \[B, 3, S, S\] with B > 0, got \(0, 3, {SIZE}, {SIZE}\)"):
        detector.predict(photographs(0, 0))
    with pytest.raises(ValueError, match="no training images to take the unit of scores from"):
        training_units(detector, [])


def test_scores_may_be_tensors_with_gradients_and_a_single_new_one() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    found = calibrate(scores, rate=0.25)
    assert (found.threshold, found.scores) == (3.0, (3.0, 2.0, 1.0))
    np.testing.assert_array_equal(found.is_anomalous(3.5), True)
    assert found.p_values([]).shape == (0,)

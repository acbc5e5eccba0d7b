"""Detectors as a library: networks and batches of one's own, and one extractor for several products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import SIZE, photographs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adpretrain.backbones import Backbone, Extract, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detector import Detector
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.detectors.anomalydino import AnomalyDINO
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.musc import MuSc
from downstream.detectors.padim import PaDiM
from downstream.detectors.patchcore import PatchCore
from downstream.detectors.rd4ad import RD4AD
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.recontrast import ReContrastConfig
from downstream.detectors.spade import SPADE
from downstream.detectors.subspacead import SubspaceAD
from downstream.detectors.uniad import UniAD, UniADConfig
from downstream.lessons import LearningConfig

QUICK = ReConPatchConfig(training=RepresentationConfig(dim=8, projection_dim=8, epochs=1, patches_per_step=64))
STEPS = LearningConfig(steps=2)
SMALL_DISCRIMINATOR = GLASSConfig(hidden=16, climb_steps=1, training=LearningConfig(steps=3))
SMALL_TRANSFORMER = UniADConfig(
    grid=8, width=16, heads=2, layers=1, inner=16, dropout=0.0, training=LearningConfig(steps=3)
)
DETECTORS: dict[str, Callable[[Extract], Detector]] = {
    "featurenorm": FeatureNorm,
    "patchcore": PatchCore,
    "padim": PaDiM,
    "spade": SPADE,
    "subspacead": SubspaceAD,
    "anomalydino": AnomalyDINO,
    "musc": MuSc,
    "cflow": lambda extract: CFLOW(extract, CFLOWConfig(training=LearningConfig(steps=3))),
    "glass": lambda extract: GLASS(extract, SMALL_DISCRIMINATOR),
    "uniad": lambda extract: UniAD(extract, SMALL_TRANSFORMER),
    "reconpatch": lambda extract: ReConPatch(extract, QUICK),
    "rd4ad": lambda extract: RD4AD(extract, ReContrastConfig(form="B", training=STEPS)),
    "dinomaly": lambda extract: Dinomaly(extract, DinomalyConfig([-1], training=STEPS)),
}


class Network(nn.Module):
    """Two levels, with layers that behave otherwise in training mode, which is how a module is made."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.Conv2d(3, 64, 7, 4, 3), nn.BatchNorm2d(64), nn.Dropout(0.5))
            self.second = nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64))

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(first)]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_network_in_training_mode_is_refused(name: str) -> None:
    network = Network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"Network is in training mode: .* call its \.eval\(\) first"):
        DETECTORS[name](network).fit([photographs(4, 0)]).predict(photographs(3, 1))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    detector = DETECTORS[name](network.eval()).fit([photographs(4, 0)])
    one_by_one = torch.cat([detector.predict(image[None]).scores for image in photographs(3, 1)])
    torch.testing.assert_close(detector.predict(photographs(3, 1)).scores, one_by_one, rtol=1e-4, atol=1e-5)
    network.second.train()
    with pytest.raises(ValueError, match="in training mode"):
        detector.predict(photographs(3, 1))


WRONG: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "one map": (lambda levels: levels[0], "a list of at least one level .* got Tensor"),
    "dictionary": (lambda levels: dict(enumerate(levels)), "a list of at least one level .* got dict"),
    "nothing": (lambda levels: [], "a list of at least one level"),
    "arrays": (lambda levels: [level.numpy() for level in levels], "level 0 .* must be a tensor, got ndarray"),
    "tokens": (lambda levels: [level.flatten(2) for level in levels], r"floats \[3, C, H, W\], got \(3, 40, 64\)"),
    "first image": (lambda levels: [level[:1] for level in levels], r"floats \[3, C, H, W\], got \(1, 40, 8, 8\)"),
    "channels last": (
        lambda levels: [level.permute(0, 2, 3, 1) for level in levels],
        r"level 0 .* is \(3, 8, 8, 40\), channels last: .*permute\(0, 3, 1, 2\)",
    ),
    "integers": (lambda levels: [level.int() for level in levels], r"floats .* of torch.int32"),
}


@pytest.mark.parametrize("name", ["featurenorm", "patchcore"])
@pytest.mark.parametrize("wrong", WRONG)
def test_features_of_another_form_are_named(backbone: Backbone, name: str, wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        DETECTORS[name](lambda images: change(backbone(images))).fit([photographs(3, 0)]).predict(photographs(3, 0))


@pytest.mark.parametrize("name", DETECTORS)
def test_batches_of_another_form_are_named(backbone: Backbone, name: str) -> None:
    images, extractor = photographs(4, 0), ADExtractor(backbone).set_references(photographs(2, 1))
    with pytest.raises(ValueError, match=r"got a list: .* take only the images out of a data loader's pairs"):
        DETECTORS[name](extractor).fit(DataLoader(TensorDataset(images), batch_size=2))
    with pytest.raises(ValueError, match=r"got \(3, 64, 64\): .* fit a list of batches, such as \[images\]"):
        DETECTORS[name](extractor).fit(images)
    with pytest.raises(ValueError, match=r"hold values from .* to 25\d\.?\d*, .* not normalised: .*divide by 255"):
        DETECTORS[name](extractor).fit([images * 255])
    detector = DETECTORS[name](extractor).fit(DataLoader(images, batch_size=2))
    with pytest.raises(ValueError, match=r"must be a tensor .* got a ndarray"):
        detector.predict(images.numpy())  # type: ignore[arg-type]


# Residuals of references to themselves are zero, and images without differences cannot score each other.
@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "musc"])
def test_products_that_share_an_extractor_keep_their_references(backbone: Backbone, name: str) -> None:
    """The second product's references would change the scores of the first one's detector."""
    make, images, others = DETECTORS[name], photographs(4, 2), 1 - photographs(3, 3) / 2
    shared = ADExtractor(backbone)
    first = make(shared.set_references(photographs(3, 0))).fit([photographs(3, 4)])
    second = make(shared.set_references(others)).fit([others])

    def alone(references: Tensor, normal: Tensor) -> Tensor:
        return make(ADExtractor(backbone).set_references(references)).fit([normal]).predict(images).scores

    of_first, of_second = alone(photographs(3, 0), photographs(3, 4)), alone(others, others)
    assert not torch.equal(of_first, of_second)
    assert torch.equal(first.predict(images).scores, of_first)
    assert torch.equal(second.predict(images).scores, of_second)
    assert torch.equal(first.fit([others]).predict(images).scores, of_second)  # fitted anew, on the newer references


def test_maps_have_the_side_of_the_extract(backbone: Backbone) -> None:
    for extract in (backbone, ADExtractor(backbone)):
        assert FeatureNorm(extract).fit([photographs(2, 0)]).predict(photographs(2, 1)).maps.shape == (2, SIZE, SIZE)
    large = load_backbone("lite0", image_size=SIZE)
    assert FeatureNorm(large, FeatureNormConfig(image_size=100)).predict(photographs(2, 1)).maps.shape == (2, 100, 100)


def test_aligned_references_need_an_extractor(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="aligned-featurenorm needs an extractor, got a Stages"):
        AlignedFeatureNorm(backbone)  # type: ignore[arg-type]

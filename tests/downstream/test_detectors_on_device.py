"""Detectors and what they are made of on a device that is not the CPU: the CPU's results, fitted, saved and loaded.

Shapes: B images, S side in pixels, N rows, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import Device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adpretrain.backbones import Backbone, FeatureMaps, load_backbone
from adpretrain.backbones.weights import fingerprint
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.memory import memory_limit
from downstream.coreset import greedy_coreset, subsample
from downstream.detector import Prediction
from downstream.detectors import detector_from_pretrained
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.anomalydino import AnomalyDINO, AnomalyDINOConfig
from downstream.detectors.cflow import CFLOW, CFLOWConfig
from downstream.detectors.dinomaly import Dinomaly, DinomalyConfig
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.musc import MuSc
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.rd4ad import RD4AD
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import Representation, RepresentationConfig, training_loss
from downstream.detectors.reconpatch.similarity import relaxed_contrastive_loss, similarity
from downstream.detectors.recontrast import ReContrast, ReContrastConfig
from downstream.detectors.refined import Refined, RefinementConfig
from downstream.detectors.refined.simulation import SimulationConfig
from downstream.detectors.spade import SPADE
from downstream.detectors.subspacead import SubspaceAD, SubspaceADConfig
from downstream.detectors.uniad import UniAD, UniADConfig
from downstream.distances import squared_distances
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.lessons import LearningConfig
from downstream.maps import gaussian_blur, pixel_maps, upsample
from downstream.metrics import evaluate_maps
from downstream.neighbours import Neighbours, nearest

SIZE = 64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photographs(count: int, seed: int) -> Tensor:
    """Stripes and noise: no two patches are equal, no network sees only zeros."""
    return 0.5 + 0.1 * normal(seed, count, 3, SIZE, SIZE) + 0.2 * torch.sin(torch.arange(SIZE) / 3)


def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIZE, levels=[1, 2])


def extractor() -> ADExtractor:
    network = backbone()
    return ADExtractor(network, local_scale=LocalScale(len(network.channels)))


def copies(rows_ND: Tensor) -> Tensor:
    """Equal rows and nearly equal ones: ties to be settled."""
    return torch.cat([rows_ND, rows_ND[:20], rows_ND[:20] * (1 + 1e-6)])


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "coreset": lambda x: greedy_coreset(x, 60),
    "coreset of copies": lambda x: greedy_coreset(copies(x), 120, start=3),
    "whole coreset": lambda x: greedy_coreset(copies(x[:30]), 70),
    "coreset, projected": lambda x: subsample(x, 0.2, projection_dim=6),
    "coreset, half precision": lambda x: greedy_coreset(x.bfloat16(), 40),
    "random": lambda x: subsample(x, 0.3, "random"),
    "none": lambda x: subsample(x, 1.0, "none"),
    "neighbours": lambda x: nearest(x[:50], x[40:], 5, "torch"),
    "neighbours of copies": lambda x: nearest(copies(x)[:50], copies(x), 3, "torch", chunk_bytes=4000),
    "prepared neighbours": lambda x: Neighbours(x.double()).search(x[:9], 2),
    "distances": lambda x: squared_distances(x, x.argmax(0), x, x.argmin(0)),
    "upsampling": lambda x: upsample(x.view(4, -1, 16)[:, :16], 40),
    "blur": lambda x: gaussian_blur(x.view(4, -1, 16)[:, :16], 2.0),
    "maps": lambda x: pixel_maps(x.view(4, -1, 16)[:, :16], 40, 1.5),
    "similarity": lambda x: similarity(x[:60]),
    "contrast": lambda x: _contrast(x[:60]),
    **{
        reduction: lambda x, reduction=reduction: Embedding(EmbeddingConfig(target_dim=4, reduction=reduction))(
            [x.view(1, 8, -1, 16), x[: len(x) // 2].view(1, 8, -1, 8)]
        )
        for reduction in ("pool", "project", "choose", "orthogonal")
    },
}


def _contrast(x: Tensor) -> list[Tensor]:
    z = x.clone().requires_grad_()
    loss = relaxed_contrastive_loss(z, similarity(x))
    loss.backward()
    assert z.grad is not None
    return [loss.detach(), z.grad]


@pytest.mark.parametrize("name", PARTS)
def test_parts(device: Device, name: str) -> None:
    rows_ND = normal(0, 320, 8)
    device.equal(PARTS[name](rows_ND.to(device.place)), PARTS[name](rows_ND))


def test_metrics_take_tensors_of_any_device(device: Device) -> None:
    maps, masks = normal(0, 4, 9, 9), normal(1, 4, 9, 9) > 1.5
    scores = maps.flatten(1).amax(1)
    found = evaluate_maps(maps.to(device.place), masks.to(device.place), scores.to(device.place))
    assert found == evaluate_maps(maps, masks, scores)


def test_memory_is_the_device_s(device: Device) -> None:
    total = torch.cuda.get_device_properties(device.place).total_memory
    assert memory_limit(device.place) == total // 2


PATCHES = PatchCoreConfig(amount=0.1)
GAUSSIANS = PaDiMConfig(EmbeddingConfig(patch=1, target_dim=4, reduction="choose"))
TRAINING = RepresentationConfig(dim=16, projection_dim=16, epochs=2, patches_per_step=64, learning_rate=1e-3)
REFINING = RefinementConfig(
    width=8, rates=(1, 2), epochs=2, batch_size=4, simulation=SimulationConfig(normal_share=0.2)
)
STEPS = LearningConfig(steps=2)
SMALL_DISCRIMINATOR = GLASSConfig(hidden=16, climb_steps=1, training=LearningConfig(steps=3))
SMALL_TRANSFORMER = UniADConfig(
    grid=8, width=16, heads=2, layers=1, inner=16, dropout=0.0, training=LearningConfig(steps=3)
)
ALL_WEIGHED = PatchCoreConfig(EmbeddingConfig(target_dim=20, reduction="project"), keep=0.5, reweight_all=True)

MAKE: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "featurenorm": lambda move: FeatureNorm(move(extractor()), FeatureNormConfig(image_size=SIZE)),
    "aligned": lambda move: AlignedFeatureNorm(move(extractor()), AlignedFeatureNormConfig(image_size=SIZE, shots=2)),
    "patchcore": lambda move: PatchCore(move(backbone()), PATCHES),
    "patchcore, all weighed": lambda move: PatchCore(move(backbone()), ALL_WEIGHED),
    "padim": lambda move: PaDiM(move(backbone()), GAUSSIANS),
    "padim, low rank": lambda move: PaDiM(move(backbone()), PaDiMConfig(EmbeddingConfig(patch=1), per_level=True)),
    "spade": lambda move: SPADE(move(backbone())),
    "subspacead": lambda move: SubspaceAD(move(backbone()), SubspaceADConfig(rotations=3)),
    "anomalydino": lambda move: AnomalyDINO(move(backbone()), AnomalyDINOConfig(rotations=3, masking=0.5)),
    "musc": lambda move: MuSc(move(backbone())),
    "rd4ad": lambda move: RD4AD(move(backbone()), ReContrastConfig(form="B", training=STEPS)),
    "recontrast": lambda move: ReContrast(move(backbone()), ReContrastConfig(training=STEPS)),
    "dinomaly": lambda move: Dinomaly(move(backbone()), DinomalyConfig([-1], dropout=0.0, training=STEPS)),
    "cflow": lambda move: CFLOW(move(backbone()), CFLOWConfig(training=LearningConfig(steps=3))),
    "glass": lambda move: GLASS(move(backbone()), SMALL_DISCRIMINATOR),
    "uniad": lambda move: UniAD(move(backbone()), SMALL_TRANSFORMER),
    "reconpatch": lambda move: ReConPatch(move(backbone()), ReConPatchConfig(PATCHES, TRAINING)),
    "ensemble": lambda move: Ensemble([PatchCore(move(backbone()), PATCHES), PaDiM(move(backbone()), GAUSSIANS)]),
    "refined": lambda move: Refined(PaDiM(move(backbone()), GAUSSIANS), REFINING),
}


def both(prediction: Prediction) -> list[Tensor]:
    return [prediction.scores, prediction.maps]


@pytest.mark.parametrize("name", MAKE)
def test_detectors(device: Device, name: str, tmp_path: Path) -> None:
    normals, queries = photographs(6, 1), photographs(2, 2)
    expected = both(MAKE[name](lambda x: x).fit(normals.split(2)).predict(queries))
    move = lambda x: x.to(device.place)  # noqa: E731
    detector = MAKE[name](move).fit([move(batch) for batch in normals.split(2)])
    found = both(detector.predict(move(queries)))
    gpu = 0.05  # of the largest value: rounding may choose other rows, and training follows it
    device.equal(found, expected, 1e-5, 1e-6, gpu)
    folder = detector.save_pretrained(tmp_path / "detector")
    loaded = detector_from_pretrained(folder, device=str(device.place))
    device.equal(both(loaded.predict(move(queries))), expected, 1e-5, 1e-6, gpu)
    if device.pretended:
        on_cpu = detector_from_pretrained(folder).predict(queries)
        torch.testing.assert_close(both(on_cpu), expected, rtol=1e-5, atol=1e-6)


class Float32(TorchDispatchMode):
    """MPS has no float64: its tensors cannot be converted to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]
        assert all(leaf.device.type == "cpu" for leaf in wide), func
        return out


@pytest.mark.parametrize("name", ["featurenorm", "patchcore", "spade"])
def test_no_float64_on_the_device(device: Device, name: str, tmp_path: Path) -> None:
    move = lambda x: x.to(device.place)  # noqa: E731
    with Float32():
        detector = MAKE[name](move).fit([move(photographs(4, 1))])
        detector.predict(move(photographs(2, 2)))
        detector.save_pretrained(tmp_path / "detector")
        fingerprint(move(torch.nn.Linear(3, 3)))


def test_a_function_of_one_s_own_saves_where_it_works(device: Device, tmp_path: Path) -> None:
    network = backbone().to(device.place)

    def extract(images: Tensor) -> FeatureMaps:
        return network(images)[:1]

    detector = PatchCore(extract, PATCHES).fit([photographs(4, 1).to(device.place)])
    folder = detector.save_pretrained(tmp_path / "detector")
    loaded = PatchCore.from_pretrained(folder, extract, device.place)
    queries = photographs(2, 2).to(device.place)
    assert torch.equal(loaded.predict(queries).maps, detector.predict(queries).maps)


def test_an_approximate_search_is_refused_before_the_second_batch(device: Device) -> None:
    read = []

    def batches() -> Any:
        for seed in range(3):
            read.append(seed)
            yield photographs(2, seed).to(device.place)

    detector = PatchCore(backbone().to(device.place), PatchCoreConfig(method="none", search="ivfpq"))
    with pytest.raises(ValueError, match=r"'ivfpq' works on the CPU only.*choose search 'exact'"):
        detector.fit(batches())
    assert read == [0]


def test_the_representation_s_loss_waits_for_nothing(device: Device) -> None:
    """Forward and backward; AdamP's own decisions (timm) wait four times a step."""
    if device.syncs is None or device.uploads is None:
        pytest.skip("a GPU does not count")
    config = RepresentationConfig(dim=8, projection_dim=8)
    model, patches_ND = Representation(8, config).to(device.place), normal(0, 64, 8).to(device.place)
    before = device.syncs.total() + device.uploads.total()
    training_loss(model, patches_ND, config).backward()
    model.update_twin(config.momentum)
    assert device.syncs.total() + device.uploads.total() == before

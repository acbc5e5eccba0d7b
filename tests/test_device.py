"""The library on a device that is not the CPU: the CPU's results, and no tensor on the wrong side.

Shapes: B images, S side in pixels, N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import Device
from products import make_synthetic
from torch import Tensor, nn

from adpretrain.backbones import load_backbone
from adpretrain.backbones.dinov2 import DinoV2
from adpretrain.config import LossConfig, ProjectorConfig
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.extractor import ADExtractor
from adpretrain.leave_one_out import LeaveOneOut, leave_one_out_residuals
from adpretrain.local_scale import LocalScale
from adpretrain.losses import angle_loss, norm_loss
from adpretrain.projector import FeatureProjector
from adpretrain.references import AlignedReferences, kmeans_references
from adpretrain.residual import (
    nearest_reference,
    residual_features,
    residual_tokens,
    search_index,
)
from adpretrain.training.batches import LabelledBatch, OnlineBatches, ResidualBatch, label, thin
from adpretrain.training.cache import CachedBatches
from adpretrain.training.dataset import PretrainingSet, StepBatches
from adpretrain.training.objective import Objective, measure_centers

SIDE = 64
FUSED = 1e-5  # the CPU's attention is one fused kernel, the pretended device's is not


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photographs(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def make(architecture: str | None = "learnable_kv", scaled: bool = True) -> ADExtractor:
    """An extractor whose projector does something: its output layers do not start at zero."""
    torch.manual_seed(0)
    backbone = load_backbone("lite0", image_size=SIDE, levels=[1, 2])
    scale = LocalScale(len(backbone.channels)) if scaled else None
    if architecture is None:
        return ADExtractor(backbone, local_scale=scale)
    config = ProjectorConfig(architecture=architecture, references=16, heads=2)
    projector = FeatureProjector(backbone.channels, config)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.1)
    return ADExtractor(backbone, projector, scale)


RESIDUALS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "l2": lambda x, bank: nearest_reference(x, bank[:1]),
    "cosine": lambda x, bank: nearest_reference(x, bank[:1], "cosine"),
    "a bank for each": nearest_reference,
    "small chunks": lambda x, bank: nearest_reference(x, bank[:1], chunk_bytes=1000),
    "prepared": lambda x, bank: nearest_reference(x, bank[:1], index=search_index(bank[0])),
    "index": lambda x, bank: search_index(bank[0]),
    "residuals": lambda x, bank: residual_features([x.mT.unflatten(2, (5, 4))], [bank]),
    "scaled": lambda x, bank: residual_tokens(x, bank, scale_RN=bank[..., 0].abs() + 1),
    "leave one out": lambda x, bank: leave_one_out_residuals(bank, 3),
    "within one": lambda x, bank: leave_one_out_residuals(bank, 1),
    "in each image": lambda x, bank: LeaveOneOut.of(bank, 3).index_RKKT,
    "local scale": lambda x, bank: _local_scale(x.mT.unflatten(2, (5, 4))),
    "aligned": lambda x, bank: AlignedReferences(x.mT.unflatten(2, (4, 5)), 2, 2).distances(x.mT.unflatten(2, (4, 5))),
}


def _local_scale(feature_BCHW: Tensor) -> list[Tensor]:
    made = LocalScale(1).to(feature_BCHW.device).fit([[feature_BCHW]])
    bank = feature_BCHW.flatten(2).mT.flatten(0, 1)[None]
    return [*made.scales([bank], [(5, 4)]), *made.scales([bank[:, :20]], [(5, 4)]), made.single]


@pytest.mark.parametrize("name", RESIDUALS)
def test_matching(device: Device, name: str) -> None:
    query, bank = normal(0, 2, 20, 8), normal(1, 2, 90, 8)
    found = RESIDUALS[name](query.to(device.place), bank.to(device.place))
    device.equal(found, RESIDUALS[name](query, bank))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_prepared_search_waits_for_nothing(device: Device, metric: str) -> None:
    query, bank = normal(0, 4, 50, 8).to(device.place), normal(1, 1, 90, 8).to(device.place)
    index = search_index(bank[0], metric)
    if device.syncs is not None and device.uploads is not None:
        before = device.syncs.total() + device.uploads.total()
        residual_tokens(query, bank, metric, 10_000, index=index)
        assert device.syncs.total() + device.uploads.total() == before


def test_references_spread_by_kmeans(device: Device) -> None:
    maps = normal(0, 9, 8, 5, 5)
    assert kmeans_references(maps.to(device.place), 4) == kmeans_references(maps, 4)


@pytest.mark.parametrize("architecture", ["learnable_kv", "self_cross_attention"])
def test_extractor_and_its_projectors(device: Device, architecture: str) -> None:
    extractor, images, shots = make(architecture), photographs(2), photographs(3, 7)
    expected = extractor.set_references(shots)(images)
    cached = extractor.to(device.place)(images.to(device.place))  # moved with its references
    device.equal(cached, expected, FUSED, FUSED)
    extractor.set_references(shots.to(device.place))
    device.equal(extractor(images.to(device.place)), expected, FUSED, FUSED)
    alone = make(architecture).leave_one_out(shots)
    device.equal(extractor.leave_one_out(shots.to(device.place)), alone, FUSED, FUSED)


def test_a_prepared_extractor_hardly_waits(device: Device) -> None:
    if device.syncs is None or device.uploads is None:
        pytest.skip("a GPU does not count")
    extractor = make().to(device.place).set_references(photographs(3, 7).to(device.place))
    images = photographs(4).to(device.place)
    extractor(images)
    before = device.syncs.total() + device.uploads.total()
    extractor(images)
    assert device.syncs.total() + device.uploads.total() == before


def test_pixels_are_normalised_without_waiting(device: Device) -> None:
    """A copy from ordinary memory would: the next step's kernels could not be queued behind those of this one."""
    pixels = (255 * photographs(2)).to(torch.uint8)
    preprocess = make(None).preprocess
    expected, moved = preprocess.normalise(pixels), pixels.to(device.place)
    before = None if device.syncs is None or device.uploads is None else device.syncs.total() + device.uploads.total()
    found = preprocess.normalise(moved)
    if device.syncs is not None and device.uploads is not None:
        assert device.syncs.total() + device.uploads.total() == before
    device.equal(found, expected)


def test_saved_on_the_device_and_loaded_on_either(device: Device, tmp_path: Path) -> None:
    extractor, images, shots = make().to(device.place), photographs(2), photographs(3, 7)
    folder = extractor.save_pretrained(tmp_path / "saved")
    expected = make().set_references(shots)(images)
    loaded = ADExtractor.from_pretrained(folder, device.place).set_references(shots.to(device.place))
    device.equal(loaded(images.to(device.place)), expected, FUSED, FUSED)
    on_cpu = ADExtractor.from_pretrained(folder).set_references(shots)(images)
    torch.testing.assert_close(on_cpu, expected, rtol=0, atol=0)


def test_a_given_backbone_stays_where_it_is(device: Device, tmp_path: Path) -> None:
    """Others may be using it: the extractor is loaded to the backbone, not the backbone to the CPU."""
    extractor, images, shots = make(), photographs(2), photographs(3, 7)
    folder = extractor.save_pretrained(tmp_path / "saved")
    expected = extractor.set_references(shots)(images)
    loaded = ADExtractor.from_pretrained(folder, backbone=make().to(device.place).backbone)
    device.equal(loaded.set_references(shots.to(device.place))(images.to(device.place)), expected, FUSED, FUSED)


def test_a_small_dinov2(device: Device) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=518, patch_size=14)
    backbone = DinoV2(Dinov2Model(config), "tiny", 56, [1, 3])
    images = normal(0, 2, 3, 56, 56)
    expected = backbone(images)
    extractor = ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels)))
    residuals = extractor.set_references(images.flip(0))(images)
    extractor.to(device.place)
    device.equal(backbone(images.to(device.place)), expected, 1e-4, 1e-5)
    found = extractor(images.to(device.place))
    assert len(found) == len(residuals)
    if device.pretended:  # elsewhere rounding decides which of two references is nearest
        device.equal(found, residuals, 1e-3, 1e-3)


def random_batch(channels: list[int], place: torch.device | str = "cpu") -> LabelledBatch:
    widths = list(enumerate(channels))
    views = [[normal(10 * view + level, 2, width, 4, 4).to(place) for level, width in widths] for view in (0, 1)]
    labels = [normal(5 + level, 2, 4, 4) > 0.5 for level, _ in widths]
    return LabelledBatch(views, labels, labels, [])


LOSSES = [LossConfig(center="projected"), LossConfig(angle_form="released", norm_form="released")]


@pytest.mark.parametrize("config", LOSSES, ids=["paper", "released"])
def test_training_step(device: Device, config: LossConfig) -> None:
    """Projector, losses, gradients, Adam: three steps end with the CPU's weights and centres."""

    def trained(place: torch.device | str) -> tuple[dict[str, Tensor], Tensor]:
        extractor = make().to(place)
        assert extractor.projector is not None
        extractor.projector.train()
        batch = random_batch(extractor.channels, place)
        measure_centers(extractor, [ResidualBatch(batch.views, torch.zeros(0), [], [])])
        objective = Objective(config, extractor)
        adam = torch.optim.Adam(extractor.projector.parameters(), 1e-2)
        totals = []
        for _ in range(3):
            losses = objective([extractor.projector(view) for view in batch.views], batch)
            losses.share.backward()
            torch.nn.utils.clip_grad_norm_(extractor.projector.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            totals.append(losses.levels.sum(0))
        return dict(extractor.state_dict()), torch.stack(totals)

    expected, losses = trained("cpu")
    found, ours = trained(device.place)
    device.equal(ours, losses, 1e-4, 1e-5)
    assert losses[2, 0] < losses[0, 0]
    if device.pretended:  # Adam's first steps are as long for a rounding error's gradient as for any other
        for name, value in expected.items():
            device.equal(found[name], value, 1e-2, 1e-3)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("loss", ["angle", "norm"])
def test_the_losses_do_not_wait_for_the_device(device: Device, loss: str, form: str) -> None:
    """Forward and backward, with labels on the host."""
    if device.syncs is None:
        pytest.skip("a GPU does not count")
    first, second, center = (normal(*key).to(device.place) for key in ((0, 40, 8), (1, 40, 8), (2, 8)))
    marked = normal(3, 40) > 0.5
    first.requires_grad_()
    before = device.syncs.total()
    value = (
        angle_loss(first, second, marked, center, form=form) if loss == "angle" else norm_loss(first, marked, form=form)
    )
    value.backward()
    assert device.syncs.total() == before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PretrainingSet:
    root = make_synthetic(tmp_path_factory.mktemp("set"), 1, 3, 2, size=64, seed=1, workers=1, progress=False)
    return PretrainingSet(
        index_realiad(root), load_backbone("lite0", image_size=SIDE).preprocess, [1, 2], seed=5, augment="none"
    )


@pytest.mark.parametrize("way", ["cached", "crossed"])
def test_pretraining_batches(device: Device, data: PretrainingSet, way: str) -> None:
    def batches(place: torch.device) -> list[ResidualBatch]:
        extractor = make("cross_attention" if way == "crossed" else None).to(place)
        if way == "cached":
            made: Any = CachedBatches(extractor, data, place, draws=1, threads=2)
        else:
            made = OnlineBatches(extractor, data, 0, place)
        return list(made(StepBatches(len(data), 3, 0, 1, seed=5)))

    expected = batches(torch.device("cpu"))
    for ours, theirs in zip(batches(device.place), expected, strict=True):
        assert ours.keys == theirs.keys
        device.equal(ours.views, theirs.views, 1e-5, 1e-6)
        assert torch.equal(ours.masks, theirs.masks)  # on the host, both
        assert len(ours.contexts) == len(theirs.contexts)
        if theirs.contexts:
            device.equal([c for _, c in ours.contexts], [c for _, c in theirs.contexts], 1e-5, 1e-6)
        for rule in ("center", "nearest", "pixels"):
            before = device.syncs.total() if device.syncs is not None else 0
            thinned = thin(label(ours, rule, rule), ours.keys, 16, 3)
            assert device.syncs is None or device.syncs.total() == before
            wanted = thin(label(theirs, rule, rule), theirs.keys, 16, 3)
            device.equal(thinned.views, wanted.views, 1e-5, 1e-6)
            assert all(map(torch.equal, thinned.labels, wanted.labels))

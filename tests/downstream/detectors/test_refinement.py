"""The refinement network: its losses against loops, its shapes, and what a short training does to real maps.

Shapes: B images, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from downstream.detector import Prediction
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.detectors.refined import (
    Refined,
    RefinementConfig,
    RefinementNetwork,
    ResidualBlock,
    build_network,
    focal_loss,
    refinement_loss,
)
from downstream.detectors.refined.simulation import SimulationConfig, simulate
from downstream.metrics import average_precision

SIZE = 48
SMALL = RefinementConfig(
    width=8,
    rates=(1, 2, 4),
    epochs=40,
    batch_size=4,
    learning_rate=0.1,
    simulation=SimulationConfig("textural", smallest_area=0.03, smallest_opacity=0.8, normal_share=0.0, cells=4),
)


def logits_and_masks(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 5, generator=generator, dtype=dtype)
    return logits, torch.rand(2, 5, 5, generator=generator) < 0.3


@pytest.mark.parametrize("focusing", [0.0, 2.0, 3.5])
def test_focal_loss_equals_a_loop(focusing: float) -> None:
    logits, masks = logits_and_masks()
    total = 0.0
    for logit, mask in zip(logits.flatten().tolist(), masks.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        p = p if mask else 1 - p
        total += -((1 - p) ** focusing) * math.log(p)
    assert float(focal_loss(logits, masks, focusing)) == pytest.approx(total / logits.numel(), rel=1e-10)


def test_focal_loss_without_focusing_is_the_cross_entropy() -> None:
    logits, masks = logits_and_masks()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks.double())
    torch.testing.assert_close(focal_loss(logits, masks, 0.0), expected, rtol=1e-12, atol=0)


def test_losses_have_the_gradient_of_the_difference_quotient() -> None:
    logits, masks = logits_and_masks()
    config = replace(SMALL, focusing=1.5, l1=0.7)
    assert torch.autograd.gradcheck(lambda x: refinement_loss(x, masks, config), [logits.requires_grad_(True)])


def test_losses_are_finite_for_any_certainty() -> None:
    logits = torch.tensor([[[-200.0, 200.0, -1e4, 1e4]]], requires_grad=True)
    loss = refinement_loss(logits, torch.tensor([[[True, False, False, True]]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(logits.grad[0, 0, 0]) < 0 < float(logits.grad[0, 0, 1])  # the wrong ones are still pulled back


def test_l1_part_equals_a_loop() -> None:
    logits, masks = logits_and_masks()
    pairs = zip(logits.flatten().tolist(), masks.flatten().tolist(), strict=True)
    mean = sum(abs(1 / (1 + math.exp(-logit)) - mask) for logit, mask in pairs) / logits.numel()
    difference = refinement_loss(logits, masks, replace(SMALL, l1=1.0)) - refinement_loss(
        logits, masks, replace(SMALL, l1=0.0)
    )
    assert float(difference) == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize(("size", "stride"), [(64, 1), (64, 2), (50, 2), (33, 4)])
def test_one_logit_per_pixel_whatever_the_size(size: int, stride: int) -> None:
    network = build_network(replace(SMALL, stride=stride))
    assert network(torch.randn(2, 3, size, size), torch.randn(2, size, size)).shape == (2, size, size)


def test_a_map_does_not_depend_on_its_company() -> None:
    network = build_network(SMALL)
    images, maps = torch.randn(3, 3, 32, 32), torch.randn(3, 32, 32)
    torch.testing.assert_close(network(images, maps)[1:2], network(images[1:2], maps[1:2]), rtol=1e-4, atol=1e-5)


def test_rates_widen_the_view() -> None:
    """A pixel is seen from as far as the strides and dilations of the layers reach, and no farther."""
    seen = []
    for rates in ((1,), (1, 9)):
        network = RefinementNetwork(replace(SMALL, rates=rates, stride=1))
        maps = torch.zeros(1, 63, 63, requires_grad=True)
        # Groups are normalised over the whole image; without that the view is the convolutions' own.
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
        network(torch.randn(1, 3, 63, 63), maps)[0, 31, 31].backward()
        assert maps.grad is not None
        seen.append(int((maps.grad[0, 31] != 0).nonzero()[:, 0].amax()) - 31)
    assert seen == [4, 13]  # two blocks of two 3 x 3 convolutions, then 9 more


def test_residual_block_is_a_shortcut_plus_two_convolutions() -> None:
    block = ResidualBlock(8, 8)
    for parameter in block.second.parameters():
        torch.nn.init.zeros_(parameter)
    maps = torch.randn(1, 8, 6, 6)
    assert torch.equal(block(maps), maps.relu())


def test_the_seed_decides_and_nothing_else_is_drawn() -> None:
    state = torch.get_rng_state()
    first, second, other = (build_network(replace(SMALL, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


class Deviation(FeatureNorm):
    """A quick, plain detector: how far a pixel's colour is from its mean over the normal images, smoothed."""

    def __init__(self) -> None:
        super().__init__(lambda images: [images - self.mean], FeatureNormConfig(SIZE))
        self.mean = torch.zeros(3, SIZE, SIZE)

    def fit(self, normal_batches: Iterable[Tensor], progress: object = None, roi: Tensor | None = None) -> Deviation:
        self.mean = torch.cat(list(normal_batches)).mean(0)
        return self


def normal_images(count: int, seed: int) -> Tensor:
    """Images 0..1 of one product: bars that hardly move, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(count, 1, 1, generator=generator)
    ramp = torch.arange(float(SIZE))
    bars = 0.5 + 0.3 * ((ramp[None, :, None] + shift) / 5).sin() * ((ramp[None, None, :] + shift) / 9).cos()
    noise = 0.02 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (bars[:, None] + noise).clamp(0, 1)


@pytest.fixture(scope="module")
def refined() -> Refined:
    return Refined(Deviation(), SMALL).fit(list(normal_images(12, 0).split(5)))


def pixel_precision(prediction: Prediction, masks: Tensor) -> float:
    return average_precision(prediction.maps.numpy(), masks.numpy())


def test_a_short_training_beats_the_blurred_maps_and_any_constant(refined: Refined) -> None:
    assert len(refined.losses) == SMALL.epochs
    assert refined.losses[-1] < 0.5 * refined.losses[0]
    made = simulate(normal_images(16, 1), [(9, 0, index) for index in range(16)], SMALL.simulation)
    plain, sharp = refined.detector.predict(made.images), refined.predict(made.images)
    assert pixel_precision(sharp, made.masks) > pixel_precision(plain, made.masks) + 0.05
    constants = [refinement_loss(torch.full_like(sharp.maps, c), made.masks, SMALL).item() for c in torch.arange(-8, 3)]
    assert refinement_loss(sharp.maps, made.masks, SMALL).item() < min(constants)


def test_prediction_has_one_score_per_image_the_maximum(refined: Refined) -> None:
    prediction = refined.predict(normal_images(3, 2))
    assert prediction.maps.shape == (3, SIZE, SIZE)
    assert torch.equal(prediction.scores, prediction.maps.amax((1, 2)))


def test_training_is_reproducible(refined: Refined) -> None:
    config = replace(SMALL, epochs=2)
    torch.manual_seed(1)
    first = Refined(Deviation(), config).fit(list(normal_images(12, 0).split(5)))
    torch.manual_seed(2)
    second = Refined(Deviation(), config).fit(iter(normal_images(12, 0).split(4)))  # other batches, the same images
    assert first.losses == pytest.approx(second.losses, rel=1e-6)
    assert first.losses[0] == pytest.approx(refined.losses[0], rel=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"not fitted"):
        Refined(Deviation()).predict(normal_images(1, 0))
    with pytest.raises(ValueError, match=r"width 12 must be a positive multiple of 8"):
        RefinementConfig(width=12)
    with pytest.raises(ValueError, match=r"rates \(\) must be dilations"):
        RefinementConfig(rates=())
    with pytest.raises(ValueError, match=r"stride 0 must be at least 1"):
        RefinementConfig(stride=0)
    with pytest.raises(ValueError, match=r"l1 -1"):
        RefinementConfig(l1=-1.0)
    with pytest.raises(ValueError, match=r"momentum 1"):
        RefinementConfig(momentum=1.0)

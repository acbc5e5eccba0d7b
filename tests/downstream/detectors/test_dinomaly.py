"""Dinomaly: its attention against the quadratic sum, its groups, schedules and gradients; a defect is found."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from drawn import SIZE, photographs, tile
from torch import Tensor, nn

from adpretrain.backbones import Backbone, load_backbone
from downstream.detectors import build_detector
from downstream.detectors.dinomaly import Decoder, Dinomaly, DinomalyConfig, LinearAttention, halves
from downstream.lessons import LearningConfig
from downstream.reconstruction import cosine_distance

C, G = 12, 4
QUICK = LearningConfig(steps=3, batch_size=4)


def levels(count: int, seed: int = 0, images: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, C, G, G, generator=generator) for _ in range(count)]


def decoder(**options: Any) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(C, DinomalyConfig(**options))


@functools.cache
def transformer() -> Backbone:
    """timm's smallest vision transformer with random weights: four of its blocks, 8 x 8 tokens of 64 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = "timm/test_vit"
        return load_backbone(name, pretrained=False, image_size=2 * SIZE, levels=[2, 3, 4, 5])


@pytest.mark.parametrize(("channels", "heads"), [(C, 1), (128, 2), (384, 6), (150, 2)])
def test_linear_attention_is_the_sum_over_all_tokens(channels: int, heads: int) -> None:
    """Token by token: weights (elu(q) + 1) . (elu(k) + 1), divided by their sum, of the values of each head."""
    torch.manual_seed(0)
    attention, x = LinearAttention(channels), torch.randn(2, 7, channels)
    assert attention.heads == heads
    found = attention(x).detach().double().numpy()
    with torch.no_grad():
        qkv = (x.double() @ attention.qkv.weight.double().T + attention.qkv.bias.double()).numpy()
    width = channels // heads
    expected = np.zeros((2, 7, channels))
    elu = lambda a: np.where(a > 0, a, np.expm1(a))  # noqa: E731
    for image in range(2):
        for head in range(heads):
            places = [part * channels + head * width + np.arange(width) for part in range(3)]
            q, k, v = (qkv[image][:, place] for place in places)
            weights = (elu(q) + 1) @ (elu(k) + 1).T
            expected[image][:, head * width : (head + 1) * width] = weights / weights.sum(1, keepdims=True) @ v
    out = attention.out
    expected = expected @ out.weight.detach().double().numpy().T + out.bias.detach().double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_halves_are_reconstructed_deep_blocks_for_shallow_levels() -> None:
    model, given = decoder(depth=4).eval(), levels(5)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    (first, early), (second, late) = model.pairs(given, None)
    torch.testing.assert_close(first, (given[0] + given[1]) / 2)
    torch.testing.assert_close(second, (given[2] + given[3] + given[4]) / 3)
    as_maps = [output.transpose(1, 2).reshape(3, C, G, G) for output in outputs]
    torch.testing.assert_close(early, (as_maps[3] + as_maps[2]) / 2)
    torch.testing.assert_close(late, (as_maps[1] + as_maps[0]) / 2)
    ((only, found),) = model.pairs(given[:1], None)
    assert torch.equal(only, given[0])
    assert found.shape == only.shape
    assert [float(part) for part in halves([torch.tensor(float(n)) for n in range(8)], 2)] == [1.5, 5.5]


def test_the_noise_is_in_the_bottleneck_and_only_in_training() -> None:
    model, given = decoder(dropout=0.5), levels(2)
    drops = [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert drops == [("bottleneck.0", 0.5)]  # one module, used before, in and after the perceptron
    assert [type(layer).__name__ for layer in model.bottleneck] == [
        "Dropout",
        "Linear",
        "GELU",
        "Dropout",
        "Linear",
        "Dropout",
    ]
    one, two = (model.train().pairs(given, None)[0][1] for _ in range(2))
    assert not torch.equal(one, two)
    one, two = (model.eval().pairs(given, None)[0][1] for _ in range(2))
    assert torch.equal(one, two)


def test_gradients_of_easy_places_shrink_to_a_tenth() -> None:
    pairs = [(a, b.requires_grad_()) for a, b in zip(levels(2, 1), levels(2, 2), strict=True)]
    losses = [decoder().loss(pairs, None, done) for done in (0.0, 0.1)]  # at the beginning none is easy
    assert torch.equal(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, [found for _, found in pairs]) for loss in losses]
    for (target, found), plain, mined in zip(pairs, *gradients, strict=True):
        distance = cosine_distance(target, found)
        easy_BHW = distance < distance.flatten().sort().values[-4]  # of 48 places 4 stay: int(48 * (1 - 0.9))
        assert int(easy_BHW.sum()) == 44
        torch.testing.assert_close(mined, plain * torch.where(easy_BHW, 0.1, 1.0)[:, None], rtol=1e-5, atol=1e-9)


def test_schedules_and_defaults_are_the_authors() -> None:
    config = DinomalyConfig()
    assert (config.training.steps, config.training.clip, config.depth, config.dropout) == (10_000, 0.1, 8, 0.2)
    assert (config.easy, config.shrink, config.top, config.sigma) == (0.9, 0.1, 0.01, 4.0)
    model = decoder()
    rates = [2e-3 * model.rate(step / 10_000) for step in (0, 50, 100, 5050, 10_000)]
    assert rates == pytest.approx([0, 1e-3, 2e-3, 1.1e-3, 2e-4])
    assert 2e-3 * model.rate(0.26) == pytest.approx(2e-4 + 9e-4 * (1 + math.cos(math.pi * 0.25 / 0.99)))
    assert model.optimizer().param_groups[0]["lr"] == 2e-3
    spread = torch.cat([block.mlp[0].weight.detach().flatten() for block in model.blocks])  # type: ignore[union-attr, index]
    assert 0.009 < float(spread.std()) < 0.011


def tiles(count: int, seed: int, blob: bool = False) -> Tensor:
    preprocess = transformer().preprocess
    return torch.stack([preprocess(tile(seed + i, blob)) for i in range(count)])


def test_a_defect_scores_above_all_that_is_good() -> None:
    options = {"training": {"steps": 20, "batch_size": 4}, "depth": 4}
    backbone = transformer()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    detector: Any = build_detector("dinomaly", backbone, options).fit(tiles(6, 0).split(3))
    assert detector.workplace is None
    assert detector.losses[-1] < 0.2 * detector.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    good, bad = detector.predict(tiles(6, 50)), detector.predict(tiles(6, 50, blob=True))
    assert float(bad.scores.min()) > float(good.scores.max())


def test_mistakes_are_named() -> None:
    pyramid = load_backbone("lite0", image_size=SIZE, levels=[1, 2])
    with pytest.raises(ValueError, match=r"levels of one shape, .* got 24 x 16 x 16, 40 x 8 x 8 .*rd4ad"):
        Dinomaly(pyramid, DinomalyConfig(training=QUICK)).fit([photographs(2, 0)])
    one = Dinomaly(pyramid, DinomalyConfig(levels=[-1], training=QUICK)).fit([photographs(2, 0)])
    assert one.predict(photographs(1, 1)).maps.shape == (1, SIZE, SIZE)
    with pytest.raises(ValueError, match="depth 1 must be at least 2"):
        DinomalyConfig(depth=1)
    with pytest.raises(ValueError, match=r"dropout 1.0 must be a share, at least 0 and below 1"):
        DinomalyConfig(dropout=1.0)
    with pytest.raises(ValueError, match="shrink 2 must be a factor"):
        DinomalyConfig(shrink=2)
    with pytest.raises(ValueError, match="learning_rate 0 must be positive"):
        DinomalyConfig(learning_rate=0)

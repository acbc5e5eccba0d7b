"""UniAD: its attention against torch's, what a token can see, the noise, and maps and scores by hand.

Shapes: B images, S side in pixels, G x G grid of T tokens, C channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, wavy
from torch import Tensor, nn

from adpretrain.backbones import Backbone
from downstream.detectors.uniad import Reconstruction, UniAD, UniADConfig, jittered, window_means
from downstream.detectors.uniad.transformer import Attention, DecoderLayer, EncoderLayer, far_apart
from downstream.lessons import LearningConfig, Normals
from downstream.normal_features import NormalFeatures
from downstream.roi import RegionOfInterest

QUICK = UniADConfig(
    grid=6, neighbours=3, width=16, heads=2, layers=2, inner=16, training=LearningConfig(steps=3, batch_size=4)
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_torch(ours: Attention, theirs: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """torch's attention with our weights."""
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).detach()
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.mark.parametrize(("grid", "neighbours"), [(6, 3), (14, 7), (5, 1)])
def test_which_tokens_see_each_other_by_a_loop(grid: int, neighbours: int) -> None:
    seen = far_apart(grid, neighbours).view(grid, grid, grid, grid)
    for row, column, y, x in np.ndindex(grid, grid, grid, grid):
        near = abs(row - y) <= neighbours // 2 and abs(column - x) <= neighbours // 2
        assert bool(seen[row, column, y, x]) == (not near)


@torch.no_grad()
def test_attention_is_that_of_torch() -> None:
    ours = Attention(12, 3, 0.0)
    theirs = of_torch(ours, nn.MultiheadAttention(12, 3, batch_first=True))
    query, key, value, seen = drawn(2, 36, 12), drawn(2, 36, 12, seed=1), drawn(2, 36, 12, seed=2), far_apart(6, 3)
    expected, _ = theirs(query, key, value, attn_mask=~seen)
    torch.testing.assert_close(ours(query, key, value, seen[None]), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_encoder_layer_is_that_of_torch() -> None:
    ours, theirs = EncoderLayer(12, 3, 20, 0.0), nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True)
    of_torch(ours.attention, theirs.self_attn)
    pairs = ((ours.inner[0], theirs.linear1), (ours.inner[3], theirs.linear2))
    for mine, other in (*pairs, (ours.norms[0], theirs.norm1), (ours.norms[1], theirs.norm2)):
        for name, parameter in mine.named_parameters():
            parameter.data += 0.1 * drawn(*parameter.shape, seed=3)
            getattr(other, name).data = parameter.data.clone()
    x, seen = drawn(2, 36, 12), far_apart(6, 3)
    found = ours(x, torch.zeros(36, 12), seen[None])
    torch.testing.assert_close(found, theirs(x, src_mask=~seen), rtol=1e-4, atol=1e-5)


def test_the_decoder_sees_neither_a_token_nor_its_neighbours() -> None:
    grid, layer = 6, DecoderLayer(36, 12, 3, 20, 0.0)
    before, encoded = drawn(1, 36, 12).requires_grad_(), drawn(1, 36, 12, seed=1).requires_grad_()
    out = layer(before, encoded, drawn(36, 12, seed=2), far_apart(grid, 3)[None])
    for token in (0, 14, 35):
        for used in torch.autograd.grad(out[0, token].square().sum(), (before, encoded), retain_graph=True):
            seen = used[0].abs().sum(1) > 0
            assert seen.tolist() == far_apart(grid, 3)[token].tolist()


def test_a_token_that_sees_nothing_is_finite_and_so_are_its_gradients() -> None:
    layer, x = Attention(8, 2, 0.0), drawn(1, 4, 8).requires_grad_()
    seen = torch.tensor([[False] * 4, [True] * 4, [False, True, True, False], [False] * 4])
    out = layer(x, x, x, seen[None])
    torch.testing.assert_close(out[0, 0], layer.out.bias)
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_the_noise_has_the_stated_deviation() -> None:
    tokens = drawn(4, 25, 400) * torch.tensor([1.0, 2.0, 5.0, 10.0])[:, None, None]
    noise = jittered(tokens, 20.0, torch.Generator().manual_seed(0)) - tokens
    expected = 20 * tokens.norm(dim=2) / 400
    torch.testing.assert_close(noise.std(2), expected, rtol=0.15, atol=0)  # of 400 draws: 3.5 % is one deviation
    torch.testing.assert_close((noise.std(2) / expected).mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert torch.equal(jittered(tokens, 0.0, torch.Generator()), tokens)


def test_the_loss_is_that_of_the_tokens_in_the_region(backbone: Backbone) -> None:
    roi = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    roi[:, : SIZE // 2] = True
    config = UniADConfig(**{**vars(QUICK), "jitter": 0.0, "dropout": 0.0})
    network = Reconstruction(152, config).eval()
    images = wavy(4, 0)
    with torch.no_grad():
        lesson = Normals(NormalFeatures(backbone, [images], RegionOfInterest(roi))).lesson(config.training, 0)
        loss = network(lesson)
        resized = [F.interpolate(level, (6, 6), mode="bilinear") for level in backbone(lesson.images)]
        tokens = torch.cat(resized, 1).flatten(2).mT
        inside = torch.arange(36) % 6 < 3
        tokens[:, ~inside] = 100.0  # what is outside is never seen
        found = network.transformer(tokens, inside[None].expand(4, -1))
    expected = (found - tokens)[:, inside].square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_maps_and_scores_by_hand(backbone: Backbone) -> None:
    images = wavy(2, 1, defect=0.3)
    detector = UniAD(backbone, QUICK).fit(wavy(5, 0).split(2))
    found = detector.predict(images)
    with torch.no_grad():
        resized = [F.interpolate(level, (6, 6), mode="bilinear") for level in backbone(images)]
        tokens = torch.cat(resized, 1).flatten(2).mT
        distance = (detector.reconstruction.transformer(tokens) - tokens).square().sum(2).sqrt().view(2, 1, 6, 6)
    maps = F.interpolate(distance, (SIZE, SIZE), mode="bilinear")[:, 0]
    torch.testing.assert_close(found.maps, maps, rtol=1e-4, atol=1e-4)
    side = round(SIZE / 14)  # 16 of 224 pixels
    windows = maps.unfold(1, side, 1).unfold(2, side, 1).mean((3, 4))
    torch.testing.assert_close(found.scores, windows.amax((1, 2)), rtol=1e-4, atol=1e-4)


def test_a_window_is_around_its_pixel() -> None:
    maps = torch.zeros(1, 56, 56)
    maps[0, 30, 11] = 16.0
    means = window_means(maps)[0]
    assert means.shape == (56, 56)
    expected = torch.zeros(56, 56)
    expected[29:33, 10:14] = 1.0  # windows of 4 pixels
    assert torch.equal(means, expected)


def test_the_learning_rate_falls_once() -> None:
    rate = Reconstruction(4, QUICK).rate
    assert [rate(done) for done in (0.0, 0.79, 0.8, 1.0)] == [1.0, 1.0, 0.1, 0.1]


def test_mistakes_are_named() -> None:
    for options, message in (
        ({"neighbours": 4}, "neighbours 4 must be odd"),
        ({"grid": 7}, "neighbours 7 must be odd, such as 7, and smaller than grid 7"),
        ({"width": 250}, "width 250 must be a multiple of 2 and of heads 8"),
        ({"layers": 0}, "layers 0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout 1\.0 must be in 0\.\.1"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            UniADConfig(**options)  # type: ignore[arg-type]

"""GLASS: what its anomalies are, its loss and its maps by hand.

Shapes: B images, S side in pixels, N patches, D channels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, wavy
from PIL import Image
from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.preprocess import Preprocess
from downstream.detectors.glass import GLASS, GLASSConfig
from downstream.detectors.glass.synthesis import Textures, pasted, perlin_mask
from downstream.detectors.glass.training import Discriminator, Training, mean_embedding, projected
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.lessons import LearningConfig, Normals
from downstream.maps import pixel_maps
from downstream.normal_features import NormalFeatures
from downstream.roi import RegionOfInterest

QUICK = GLASSConfig(hidden=16, training=LearningConfig(steps=3, batch_size=4))
WIDTH = 152  # of Lite0's two levels


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def training(backbone: Backbone, config: GLASSConfig, region: RegionOfInterest | None = None) -> tuple[Training, Any]:
    torch.manual_seed(0)
    normals, embedding = Normals(NormalFeatures(backbone, [wavy(4, 0)], region)), Embedding(config.embedding)
    learner = Training(Discriminator(WIDTH, 16), embedding, config, Textures(), normals)
    return learner, normals.lesson(config.training, 0)


def test_the_projection_keeps_directions_and_distances_between_the_radii() -> None:
    features, anchors = 3 * drawn(500, 6) * drawn(500, 1, seed=2).abs(), drawn(500, 6, seed=1)
    low, high = torch.tensor(2.0), torch.tensor(5.0)
    found, away = projected(features, anchors, low, high) - anchors, features - anchors
    distance, before = found.norm(dim=1), away.norm(dim=1)
    torch.testing.assert_close(distance, before.clamp(2, 5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F.normalize(found), F.normalize(away), rtol=1e-4, atol=1e-4)
    assert bool((before < 2).any())
    assert bool((before > 5).any())


@pytest.mark.parametrize("form", ["hypersphere", "manifold"])
def test_climbed_features_lie_in_the_shell(backbone: Backbone, form: str) -> None:
    config = replace(QUICK, form=form, radii=(1.0, 1.5))  # type: ignore[arg-type]
    learner, lesson = training(backbone, config)
    rows = learner.embedding(lesson.features)
    normal = learner.network.adaptor(rows.flatten(0, 2)).detach()
    anchors, low, high = learner._shell(normal, rows, lambda x: x.flatten(0, 2))
    climbed = learner.climbed(normal, 0.1 * drawn(*normal.shape), anchors, low, high)
    distance = (climbed - anchors).norm(dim=1)
    if form == "manifold":
        expected, unit = normal, 1.0
    else:
        means = learner.embedding(backbone(wavy(4, 0))).mean(0).expand_as(rows)
        expected = learner.network.adaptor(means.flatten(0, 2)).detach()
        unit = float(np.quantile((normal - expected).norm(dim=1), 0.75, method="higher"))
    torch.testing.assert_close(anchors, expected, rtol=1e-4, atol=1e-4)
    assert float(distance.min()) >= unit * (1 - 1e-4)
    assert float(distance.max()) <= 1.5 * unit * (1 + 1e-4)
    assert not climbed.requires_grad


def test_climbing_raises_the_loss_of_the_discriminator(backbone: Backbone) -> None:
    config = replace(QUICK, form="manifold", climb_rate=0.5, climb_steps=20)
    learner, lesson = training(backbone, config)
    normal = learner.network.adaptor(learner.embedding(lesson.features).flatten(0, 2)).detach()
    noise, free = drawn(*normal.shape), (torch.tensor(0.0), torch.tensor(torch.inf))

    def loss(anomalies: Tensor) -> float:
        judged = learner.network.judge(torch.cat([normal, anomalies]))[len(normal) :]
        return float(F.binary_cross_entropy(judged.sigmoid(), torch.ones(len(normal))).detach())

    climbed = learner.climbed(normal, noise, normal, *free)
    assert loss(climbed) > 1.2 * loss(normal + noise)
    steps = (climbed - normal - noise).norm(dim=1)
    assert float(steps.max()) <= 20 * 0.5 * (1 + 1e-5)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_masks_and_pictures_agree(tmp_path: Path, backbone: Backbone) -> None:
    """Outside the mask nothing changes; inside it is a mixture with one weight, from 0.2 to 0.8, per image."""
    (tmp_path / "more").mkdir()
    Image.new("RGB", (80, 90), (250, 0, 120)).save(tmp_path / "more" / "plain.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    textures = Textures.of(str(tmp_path), backbone.preprocess)
    images, keys = wavy(8, 0), [(0, 0, number) for number in range(8)]
    made = pasted(images, keys, textures)
    texture = backbone.preprocess(Image.new("RGB", (80, 90), (250, 0, 120)))
    weights = []
    for image, changed, mask in zip(images, made.images, made.masks, strict=True):
        assert bool(mask.any())
        assert torch.equal(changed[:, ~mask], image[:, ~mask])
        ratio = ((changed - texture) / (image - texture))[:, mask]
        weights.append(float(ratio.median()))
        torch.testing.assert_close(changed[:, mask], (ratio.median() * image + (1 - ratio.median()) * texture)[:, mask])
    assert 0.2 <= min(weights) < 0.45
    assert 0.55 < max(weights) <= 0.8
    alone = pasted(images[5:6], keys[5:6], textures)
    assert torch.equal(alone.images[0], made.images[5])
    assert not torch.equal(pasted(images[:1], [(0, 1, 0)], textures).masks, made.masks[:1])


def test_masks_lie_in_the_region() -> None:
    roi = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    roi[0, :, :20] = True
    roi[1, 40:] = True
    made = pasted(wavy(2, 0), [(0, 0, 0), (0, 0, 1)], Textures(), RegionOfInterest(roi))
    assert bool(made.masks.flatten(1).any(1).all())
    assert not bool((made.masks & ~roi).any())
    nowhere = pasted(wavy(1, 0), [(0, 0, 0)], Textures(), RegionOfInterest(torch.zeros(SIZE, SIZE, dtype=torch.bool)))
    assert torch.equal(nowhere.images, wavy(1, 0))


def test_perlin_masks_are_unions_and_intersections() -> None:
    """Of half of a field with mean 0 and range -1 to 1 little is above 0.5: a tenth of the pixels, on average."""
    shares = [float(perlin_mask(SIZE, np.random.default_rng(seed)).float().mean()) for seed in range(200)]
    assert 0.03 < np.mean(shares) < 0.2
    assert max(shares) < 0.7
    assert np.mean(np.array(shares) == 0) < 0.6  # these are drawn again


def test_the_loss_by_hand(backbone: Backbone) -> None:
    """Without noise and ascent a global anomaly is its normal feature."""
    config = replace(QUICK, form="manifold", noise=0.0, climb_steps=0)
    learner, lesson = training(backbone, config)
    learner.eval()
    with torch.no_grad():
        found = float(learner(lesson))
        made = pasted(lesson.images, [(0, 0, number) for number in lesson.numbers], Textures())
        judged = [
            learner.network(learner.embedding(backbone(images)).flatten(0, 2)).sigmoid().double().numpy()
            for images in (lesson.images, made.images)
        ]
    cells = list(np.ndindex(8, 8))
    marked = np.array([mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any() for mask in made.masks for y, x in cells])
    normal, local = judged
    expected = -np.log(1 - normal).mean() - np.log(normal).mean()
    right = np.where(marked, local, 1 - local)
    hard = 1 - right >= np.quantile(1 - right, 0.5, method="higher")
    expected += (-((1 - right) ** 2) * np.log(right))[hard].mean()
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < marked.mean() < 1


def test_tokens_outside_the_region_do_not_enter_the_loss(backbone: Backbone) -> None:
    roi = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    roi[:, :32] = True
    losses = []
    for spoilt in (False, True):

        def extract(images: Tensor, spoilt: bool = spoilt) -> list[Tensor]:
            levels = [level.clone() for level in backbone(images)]
            for level in levels:
                level[..., level.shape[3] // 2 + 2 :] += 1000.0 * spoilt  # farther than a neighbourhood reaches
            return levels

        torch.manual_seed(0)
        config = replace(QUICK, embedding=EmbeddingConfig(levels=[0]))
        normals, embedding = (
            Normals(NormalFeatures(extract, [wavy(4, 0)], RegionOfInterest(roi))),
            Embedding(config.embedding),
        )
        learner = Training(Discriminator(40, 16), embedding, config, Textures(), normals)
        losses.append(float(learner(normals.lesson(config.training, 0)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_mean_embedding_is_that_of_images_in_the_region(backbone: Backbone) -> None:
    roi = torch.ones(4, SIZE, SIZE, dtype=torch.bool)
    roi[0, :, :32] = False
    embedding = Embedding(EmbeddingConfig())
    found = mean_embedding(Normals(NormalFeatures(backbone, [wavy(4, 0)], RegionOfInterest(roi))), embedding)
    every = embedding(backbone(wavy(4, 0)))
    torch.testing.assert_close(found[:, 4:], every[:, :, 4:].mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :4], every[1:, :, :4].mean(0), rtol=1e-4, atol=1e-4)


def test_maps_and_scores_by_hand(backbone: Backbone) -> None:
    images, detector = wavy(2, 1, defect=0.3), GLASS(backbone, QUICK).fit(wavy(5, 0).split(2))
    found, weights = detector.predict(images), {n: w.double() for n, w in detector.network.state_dict().items()}
    x = detector.embedding(backbone(images)).double() @ weights["adaptor.weight"].T + weights["adaptor.bias"]
    x = x @ weights["head.0.weight"].T + weights["head.0.bias"]
    deviation = (weights["head.1.running_var"] + 1e-5).sqrt()
    x = (x - weights["head.1.running_mean"]) / deviation * weights["head.1.weight"] + weights["head.1.bias"]
    logits = torch.where(x > 0, x, 0.2 * x) @ weights["head.3.weight"][0]
    grid = 1 / (1 + (-logits).exp())
    torch.testing.assert_close(found.scores.double(), grid.amax((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.maps.double(), pixel_maps(grid, SIZE), rtol=1e-4, atol=1e-5)


def test_photographs_of_textures_are_used(tmp_path: Path, backbone: Backbone) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (70, 70, 3), np.uint8)).save(tmp_path / f"{number}.png")
    with_photographs = replace(QUICK, textures=str(tmp_path))
    first, second = (GLASS(backbone, config).fit([wavy(4, 0)]) for config in (QUICK, with_photographs))
    assert first.losses[0] != second.losses[0]
    for file in tmp_path.glob("*.png"):
        file.unlink()
    loaded = GLASS.from_pretrained(second.save_pretrained(tmp_path / "saved"))  # needs no textures
    assert torch.equal(loaded.predict(wavy(2, 1)).maps, second.predict(wavy(2, 1)).maps)
    with pytest.raises(ValueError, match="no photographs of textures in"):
        GLASS(backbone, with_photographs).fit([wavy(4, 0)])


def test_mistakes_are_named(tmp_path: Path, backbone: Backbone) -> None:
    for options, message in (
        ({"form": "sphere"}, "form 'sphere' is unknown; choose one of hypersphere, manifold"),
        ({"radii": (2.0, 1.0)}, r"radii \(2\.0, 1\.0\) must be two positive distances, ascending"),
        ({"climb_rate": 0.0}, r"climb_rate 0\.0 must be positive"),
        ({"easy": 1.0}, r"easy 1\.0 must be a share"),
        ({"hidden": 0}, "hidden 0 must be at least 1"),
        ({"noise": -1.0}, r"noise -1\.0 and climb_steps 20 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            GLASSConfig(**options)  # type: ignore[arg-type]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = replace(QUICK, textures=str(tmp_path))
    with pytest.raises(ValueError, match="only a Backbone or an ADExtractor says how photographs are prepared"):
        GLASS(lambda images: backbone(images), config).fit([wavy(2, 0)])
    larger = Textures.of(str(tmp_path), Preprocess(96))
    with pytest.raises(ValueError, match=r"textures are \(3, 96, 96\) but images \(3, 64, 64\)"):
        pasted(wavy(1, 0), [(0, 0, 0)], larger)

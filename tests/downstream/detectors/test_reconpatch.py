"""ReConPatch as a detector: Eq. 9 and 10 by loops, what training does to real features, and what a folder keeps.

Shapes: B images, S side in pixels, N rows of the bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, wavy
from processes import together
from scipy import ndimage
from torch import Tensor

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detector import Detector
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ENSEMBLE_320, ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.metrics import d_prime

TRAINING = RepresentationConfig(dim=32, projection_dim=32, epochs=2, learning_rate=1e-2, patches_per_step=128)
SMALL = ReConPatchConfig(PatchCoreConfig(amount=0.2, reweight=4, reweight_all=True, projection_dim=None), TRAINING)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIZE)


@pytest.fixture(scope="module")
def detector(backbone: Backbone) -> ReConPatch:
    return ReConPatch(backbone, SMALL).fit(wavy(10, 0).split(4))


def test_scores_equal_eq_9_and_10_patch_by_patch(backbone: Backbone, detector: ReConPatch) -> None:
    assert detector.representation is not None
    images = wavy(3, 1)
    found = detector.predict(images)
    core = PatchCore(backbone, SMALL.memory)
    embeddings = core.embedding(backbone(wavy(10, 0)))
    with torch.no_grad():
        bank = core.choose(detector.representation(embeddings).split(4)).double().numpy()
        rows = detector.representation(core.embedding(backbone(images))).double().numpy()
    assert len(bank) == 128
    for index, patches in enumerate(rows):
        grid = np.empty(patches.shape[:2])
        for h, w in np.ndindex(grid.shape):
            distances = np.linalg.norm(bank - patches[h, w], axis=1)
            star = int(distances.argmin())
            around = np.argsort(np.linalg.norm(bank - bank[star], axis=1), kind="stable")[:4]
            weight = 1 - np.exp(distances[star]) / np.exp(distances[around]).sum()
            grid[h, w] = weight * distances[star]
        assert found.scores[index].item() == pytest.approx(grid.max(), rel=1e-4)
        pixels = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
        expected = ndimage.gaussian_filter(pixels[0, 0].numpy(), 4.0)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-3, atol=1e-5)


def test_untrained_and_wide_it_is_patchcore(backbone: Backbone) -> None:
    """An orthogonal f changes no distance: without an epoch the scores are those of PatchCore on the same patches."""
    memory = PatchCoreConfig(method="none", reweight_all=True)
    config = ReConPatchConfig(memory, replace(TRAINING, dim=160, epochs=0))
    normal, queries = wavy(4, 0), wavy(3, 1)
    ours = ReConPatch(backbone, config).fit(normal.split(2)).predict(queries)
    theirs = PatchCore(backbone, memory).fit(normal.split(2)).predict(queries)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.maps, theirs.maps, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_separates_faint_defects_better(backbone: Backbone) -> None:
    """On the mean of three products: here d' rises from 3.3 to 4.4."""
    labels = np.repeat([0, 1], 40)
    apart = []
    for epochs in (0, 12):
        for seed in (0, 100, 200):
            training = replace(TRAINING, dim=152, projection_dim=152, epochs=epochs, learning_rate=1e-3, seed=seed)
            config = replace(SMALL, training=replace(training, patches_per_step=256))
            detector = ReConPatch(backbone, config).fit(wavy(32, seed).split(8))
            test = wavy(40, seed + 1), wavy(40, seed + 2, defect=0.05)
            scores = torch.cat([detector.predict(images).scores for images in test])
            apart.append(d_prime(scores.numpy(), labels))
    assert np.mean(apart[3:]) > 1.15 * np.mean(apart[:3])


def test_the_map_shows_where(detector: ReConPatch) -> None:
    maps = detector.predict(wavy(2, 3, defect=0.5)).maps
    for peak in maps.flatten(1).argmax(1).tolist():
        assert 20 <= peak // SIZE < 44
        assert 20 <= peak % SIZE < 44


def test_works_on_an_extractor_and_is_a_detector(backbone: Backbone) -> None:
    extractor = ADExtractor(backbone).set_references(wavy(2, 5))
    fitted: Detector = ReConPatch(extractor, SMALL).fit([wavy(6, 0)])
    assert fitted.predict(wavy(2, 1)).maps.shape == (2, SIZE, SIZE)


def test_embeddings_that_do_not_fit_are_computed_again(backbone: Backbone) -> None:
    """The same steps when nothing is kept, if the kept images come in the same order: one group, all of its patches."""
    training = replace(TRAINING, images_per_step=6, patches_per_step=6 * 64)
    normal = wavy(6, 0)
    kept = ReConPatch(backbone, replace(SMALL, training=training)).fit([normal])
    again = ReConPatch(backbone, replace(SMALL, training=training, cache_bytes=1)).fit([normal])
    assert kept.losses == pytest.approx(again.losses, rel=1e-5)
    assert kept.representation is not None
    assert again.representation is not None
    torch.testing.assert_close(kept.representation.f.weight, again.representation.f.weight, rtol=1e-3, atol=1e-5)


def test_an_iterator_is_enough_if_its_embeddings_fit(backbone: Backbone) -> None:
    def batches() -> Iterator[Tensor]:
        yield from wavy(10, 0).split(4)

    once = ReConPatch(backbone, SMALL).fit(batches())
    twice = ReConPatch(backbone, SMALL).fit(wavy(10, 0).split(4))
    queries = wavy(2, 1)
    assert torch.equal(once.predict(queries).maps, twice.predict(queries).maps)
    with pytest.raises(ValueError, match="an iterator cannot be read again"):
        ReConPatch(backbone, replace(SMALL, cache_bytes=1)).fit(batches())


def predict(rank: int, folder: Path, images: torch.Tensor) -> list[torch.Tensor]:
    found = ReConPatch.from_pretrained(folder).predict(images)
    return [found.scores, found.maps]


def test_saved_and_loaded_in_another_process_it_gives_the_same_bits(detector: ReConPatch, tmp_path: Path) -> None:
    images = wavy(3, 1)
    folder = detector.save_pretrained(tmp_path / "detector")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    [(scores, maps)] = together(1, tmp_path, predict, folder, images)
    expected = detector.predict(images)
    assert torch.equal(scores, expected.scores)
    assert torch.equal(maps, expected.maps)
    loaded = ReConPatch.from_pretrained(folder)
    assert loaded.config == detector.config
    assert loaded.losses == detector.losses


def test_the_papers_settings() -> None:
    default = ReConPatchConfig()
    assert (default.training.dim, default.memory.amount, default.memory.embedding.patch) == (512, 0.01, 3)
    training = default.training
    assert (training.epochs, training.learning_rate, training.weight_decay) == (120, 1e-5, 1e-2)
    assert (training.neighbours, training.alpha, training.margin) == (5, 0.5, 1.0)
    ensemble = ENSEMBLE_320.training
    assert (ensemble.dim, ensemble.epochs, ensemble.learning_rate) == (384, 60, 1e-6)


def test_levels_and_random_reductions_are_kept(backbone: Backbone, tmp_path: Path) -> None:
    embedding = EmbeddingConfig(levels=[1], target_dim=20, reduction="project")
    config = replace(SMALL, memory=replace(SMALL.memory, embedding=embedding), training=replace(TRAINING, epochs=1))
    detector = ReConPatch(backbone, config).fit([wavy(4, 0)])
    loaded = ReConPatch.from_pretrained(detector.save_pretrained(tmp_path / "saved"))
    assert torch.equal(loaded.predict(wavy(2, 1)).maps, detector.predict(wavy(2, 1)).maps)
    assert Embedding(embedding)(backbone(wavy(1, 0))).shape == (1, 4, 4, 20)


def test_mistakes_are_named(backbone: Backbone, detector: ReConPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this ReConPatch is not fitted"):
        ReConPatch(backbone).predict(wavy(1, 0))
    with pytest.raises(ValueError, match="this ReConPatch is not fitted"):
        ReConPatch(backbone).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no normal images to fit on"):
        ReConPatch(backbone, SMALL).fit([])
    with pytest.raises(ValueError, match="the detector was fitted on 64"):
        detector.predict(torch.rand(1, 3, 80, 80))
    few = replace(SMALL, training=replace(TRAINING, neighbours=100, images_per_step=1))
    with pytest.raises(ValueError, match="100 neighbours among 64 patches"):
        ReConPatch(backbone, few).fit([wavy(2, 0)])

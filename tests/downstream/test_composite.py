"""Detectors made of detectors, saved: the same bits in another process, and everything that can be wrong.

Shapes: B images, S side in pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import together
from torch import Tensor

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detector import Detector
from downstream.detectors import detector_from_pretrained
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.padim import PaDiM, PaDiMConfig
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatch, ReConPatchConfig
from downstream.detectors.reconpatch.representation import RepresentationConfig
from downstream.detectors.refined import Refined, RefinementConfig
from downstream.embedding import EmbeddingConfig

SIZE = 64
MEMORY = PatchCoreConfig(amount=0.1, reweight=3, reweight_all=True)
TRAINING = RepresentationConfig(dim=16, projection_dim=16, epochs=1, patches_per_step=64)
NETWORK = RefinementConfig(width=8, rates=(1, 3), epochs=1, batch_size=4)


def photographs(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIZE)


@pytest.fixture(scope="module")
def ensemble(backbone: Backbone) -> Ensemble:
    extractor = ADExtractor(backbone).set_references(photographs(2, 9))
    padim = PaDiM(backbone, PaDiMConfig(EmbeddingConfig(patch=1, target_dim=12, reduction="choose")))
    members: list[Detector] = [
        PatchCore(extractor, MEMORY),
        padim,
        ReConPatch(backbone, ReConPatchConfig(MEMORY, TRAINING)),
    ]
    return Ensemble(members).fit(photographs(8, 0).split(3))


def predict(rank: int, folder: Path, images: Tensor) -> list[Tensor]:
    found = detector_from_pretrained(folder).predict(images)
    return [found.scores, found.maps]


def test_a_refined_ensemble_gives_the_same_bits_in_another_process(ensemble: Ensemble, tmp_path: Path) -> None:
    """Folders within folders: a network around three detectors, one of them on an extractor with references."""
    refined = Refined(ensemble, NETWORK).fit(photographs(8, 0).split(3))
    folder = refined.save_pretrained(tmp_path / "refined")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "member-0"}
    assert {path.name for path in (folder / "member-0").iterdir() if path.is_dir()} == {f"member-{i}" for i in range(3)}
    images = photographs(3, 1)
    expected = refined.predict(images)
    [(scores, maps)] = together(1, tmp_path, predict, folder, images)
    assert torch.equal(scores, expected.scores)
    assert torch.equal(maps, expected.maps)
    loaded = Refined.from_pretrained(folder)
    assert (loaded.config, loaded.losses) == (refined.config, refined.losses)


def test_members_take_extracts_of_the_loader(ensemble: Ensemble, backbone: Backbone, tmp_path: Path) -> None:
    folder = ensemble.save_pretrained(tmp_path / "ensemble")
    extractor = ADExtractor(backbone)  # without references: the saved ones are set
    loaded = Ensemble.from_pretrained(folder, [extractor, backbone, backbone])
    images = photographs(2, 1)
    assert torch.equal(loaded.predict(images).maps, ensemble.predict(images).maps)
    assert extractor.references is not None
    with pytest.raises(ValueError, match=r"2 extracts for the 3 members"):
        Ensemble.from_pretrained(folder, [extractor, backbone])


def test_saving_replaces_as_a_whole(ensemble: Ensemble, tmp_path: Path) -> None:
    folder = ensemble.save_pretrained(tmp_path / "ensemble")
    before = (folder / "config.json").read_text()
    assert ensemble.save_pretrained(folder) == folder
    assert (folder / "config.json").read_text() == before
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        ensemble.save_pretrained(folder)
    assert (folder / "mine.txt").read_text() == "keep me"


def test_mistakes_are_named(ensemble: Ensemble, tmp_path: Path) -> None:
    folder = ensemble.save_pretrained(tmp_path / "ensemble")
    with pytest.raises(ValueError, match="holds a 'ensemble' detector, not 'refined'"):
        Refined.from_pretrained(folder)
    with pytest.raises(ValueError, match="not fitted"):
        Ensemble(ensemble.members).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="not fitted"):
        Refined(ensemble).save_pretrained(tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 999}))
    with pytest.raises(ValueError, match="upgrade adpretrain"):
        Ensemble.from_pretrained(folder)
    assert not (tmp_path / "new").exists()

"""The extractor inside the package: small, complete, loaded without a network, and better than chance at once."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from products import make_synthetic
from sklearn.metrics import roc_auc_score

from adpretrain import ADExtractor
from adpretrain.card import card
from adpretrain.config import BackboneConfig, LocalScaleConfig
from adpretrain.data import ImageDataset, index_dataset
from adpretrain.hub.download import EMBEDDED_FOLDER
from downstream.detectors.featurenorm import FeatureNorm


def test_it_loads_anywhere_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert ADExtractor.from_pretrained("embedded").backbone.name == "lite0"
    assert not (tmp_path / "empty").exists()


def test_it_is_small_and_says_what_it_is() -> None:
    files = {"config.json", "model.safetensors", "README.md", "lite0.safetensors"}
    assert {path.name for path in EMBEDDED_FOLDER.iterdir()} == files
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) < 4e6
    extractor = ADExtractor.from_pretrained("embedded")
    config = extractor.config
    assert config.backbone == BackboneConfig("lite0", 224, levels=[1, 2, 3], finest=8, patch=[1, 1, 3])
    assert config.local_scale == LocalScaleConfig(share=0.35, weights=[0.5, 1.0, 2.0])
    assert config.projector is None
    assert config.provenance["projector"].startswith("none: ")
    # A photograph's nearest tokens are nearer to one another than to those of another photograph; 1 = never measured.
    assert ((extractor.local_scale.single > 1) & (extractor.local_scale.single < 3)).all()
    assert (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8") == card(config, "embedded")


def test_a_revision_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="revision='v1' is for repositories of the Hub: leave it out"):
        ADExtractor.from_pretrained("embedded", revision="v1")


@pytest.mark.slow
def test_four_photographs_of_an_unseen_product_find_its_defects(tmp_path: Path) -> None:
    """Chance is 0.5; single products vary."""
    root = make_synthetic(tmp_path / "set", 3, 12, 8, size=224, seed=77, workers=1, progress=False)
    extractor = ADExtractor.from_pretrained("embedded")
    samples = index_dataset("realiad", str(root))
    found = []
    for product in sorted({sample.category for sample in samples}):
        group = [sample for sample in samples if sample.category == product]
        good = [sample for sample in group if not sample.anomalous]
        rest = [*good[4:], *(sample for sample in group if sample.anomalous)]
        images = ImageDataset([*good[:4], *rest], extractor.preprocess)
        pixels = [images[index]["image"][None] for index in range(len(images))]
        detector = FeatureNorm(extractor).fit(pixels[:4])
        scores = [float(detector.predict(image).scores) for image in pixels[4:]]
        found.append(roc_auc_score([sample.anomalous for sample in rest], scores))
    assert np.mean(found) > 0.65

"""`adpretrain pretrain`: what it says beforehand, what it compares, and when it keeps a projector."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adpretrain.config import ProjectorConfig
from adpretrain.data import index_dataset
from adpretrain.data.products import by_product
from adpretrain.extractor import ADExtractor
from adpretrain.passport import in_a_product, passport
from adpretrain.projector import FeatureProjector
from downstream.cli import main
from downstream.commands.pretrain import held_out_of, with_evidence
from downstream.evaluation.few_shot import encode_samples, few_shot
from downstream.evaluation.gain import METRICS, Gain, Gains, compare

FAST = [
    "--image-size",
    "64",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--references",
    "8",
    "--shots",
    "2",
    "--workers",
    "0",
]


@pytest.fixture
def extractor() -> ADExtractor:
    """The embedded extractor at 64 pixels with a projector of random weights, which changes every residual."""
    plain = ADExtractor.from_pretrained("embedded", image_size=64)
    torch.manual_seed(0)
    projector = FeatureProjector(plain.backbone.channels, ProjectorConfig(references=8, heads=2, architecture="mlp"))
    for weight in projector.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return ADExtractor(plain.backbone, projector, plain.local_scale).eval()


def test_the_comparison_is_that_of_few_shot(extractor: ADExtractor, tile_products: Path) -> None:
    groups = list(by_product(index_dataset("auto", tile_products)).values())
    found = compare(extractor, groups, shots=2, draws=3)
    raw = extractor.without_projector()
    for gain, samples in zip(found.products, groups, strict=True):
        images = encode_samples(samples, extractor.backbone)
        for draw in range(3):
            expected = [few_shot(one, images, 2, draw) for one in (extractor, raw)]
            for name in METRICS:
                assert gain.with_projector[name][draw] == pytest.approx(getattr(expected[0], name), abs=1e-6)
                assert gain.without[name][draw] == pytest.approx(getattr(expected[1], name), abs=1e-6)


def gain(*changes: float, aupro: float = 0.0) -> Gain:
    before = {"image_auroc": [0.8] * len(changes), "aupro": [0.5 + aupro - aupro] * len(changes)}
    after = {"image_auroc": [0.8 + change for change in changes], "aupro": [0.5 + aupro] * len(changes)}
    return Gain("a", after, before)


def test_better_is_more_than_the_spread() -> None:
    steady, wild = gain(0.02, 0.02, 0.03, aupro=0.01), gain(0.2, -0.15, 0.02)
    assert Gains((steady,)).better
    assert not Gains((wild,)).better
    assert Gains((steady,)).gain == pytest.approx(np.mean([0.015, 0.015, 0.02]))
    assert Gains((steady,)).spread == pytest.approx(np.std([0.015, 0.015, 0.02], ddof=1))
    assert not Gains((gain(0.0, 0.0, 0.0),)).better
    bare = replace(steady, without={**steady.without, "aupro": [math.nan] * 3})
    bare = replace(bare, with_projector={**steady.with_projector, "aupro": [math.nan] * 3})
    assert Gains((bare,)).gain == pytest.approx(np.mean([0.02, 0.02, 0.03]))  # image AUROC alone
    assert with_evidence({"kept_step": 7}, Gains((bare,)))["held_out_metrics"].keys() == {
        "step", "image_auroc", "raw_image_auroc", "gain", "spread",
    }  # fmt: skip


@pytest.mark.slow
def test_the_command(tile_products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A projector that has hardly moved gains nothing, and is not saved unless it is asked for."""
    command = ["pretrain", "--data", str(tile_products), "--out", str(tmp_path / "mine"), *FAST]
    assert main(command) == 3
    said = capsys.readouterr().out
    held, trained = ("slab", "tile") if "slab: 9 normal photographs, 4 defects (disc), 4 with masks; held out" in said \
        else ("tile", "slab")  # fmt: skip
    assert f"{held}: 9 normal photographs, 4 defects (disc), 4 with masks; held out" in said
    assert f"{trained}: 9 normal photographs, 4 defects (disc), 4 with masks; training" in said
    assert f"{held}: image AUROC " in said
    assert "the projector does not help: gain +0.0 points" in said
    assert "saved without the projector, as it does not help" in said
    assert ADExtractor.from_pretrained(tmp_path / "mine").projector is None
    assert main([*command, "--keep", "always", "--data-licence", "own"]) == 3  # the finished run is not trained again
    assert "saved with the projector, which does not help: --keep always" in capsys.readouterr().out
    kept = ADExtractor.from_pretrained(tmp_path / "mine")
    assert kept.projector is not None
    assert in_a_product(passport(kept.config)) == "yes"  # the photographs are said to be one's own
    assert set(kept.config.provenance["held_out_metrics"]) >= {"image_auroc", "raw_image_auroc", "gain", "spread"}
    assert "without the projector" in (tmp_path / "mine" / "README.md").read_text()


def test_mistakes(tile_products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = index_dataset("auto", tile_products)
    with pytest.raises(ValueError, match="--held-out lid: there is no such product; there are slab, tile"):
        held_out_of(samples, ["lid"], 0)
    with pytest.raises(ValueError, match="no product with marked defects is left to train on"):
        held_out_of(samples, ["slab", "tile"], 0)
    assert held_out_of(samples, ["tile"], 0) == ["tile"]
    assert held_out_of(samples, [], 3) in (["slab"], ["tile"])
    many = [*FAST, "--shots", "10"]
    assert main(["pretrain", "--data", str(tile_products), "--out", str(tmp_path / "out"), *many]) == 2
    assert "10 references (shots) cannot be drawn from its pool of 6 normal images" in capsys.readouterr().err
    shutil.copytree(tile_products / "slab", tmp_path / "set" / "slab")
    assert main(["pretrain", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), *FAST]) == 2
    assert "1 of 1 products have defects with masks; at least 2 are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

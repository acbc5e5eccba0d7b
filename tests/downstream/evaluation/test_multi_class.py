"""One detector of several products that look nothing alike: every product is scored as well as if it were alone."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import SMALL_UNIAD
from PIL import Image
from torch import Tensor

from adpretrain.backbones import load_backbone
from adpretrain.data import index_dataset
from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.embedding import EmbeddingConfig
from downstream.evaluation.networks import Contender, Networks
from downstream.evaluation.protocols import ProtocolOptions, Trial, trials
from downstream.evaluation.trial import Images, Settings, Training, run_trial
from downstream.metrics import auroc

SIDE, GOOD, BAD = 64, 5, 5
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # a residual is a difference of features, and rounds as they do
PRODUCTS = ("felt", "grid")
QUICK = ("patchcore", "padim")
OPTIONS: dict[str, dict[str, Any]] = {
    "patchcore": {},
    "padim": {},
    "uniad": {**SMALL_UNIAD, "training": {"steps": 60, "batch_size": 8}},
    "recontrast": {"training": {"steps": 20, "batch_size": 4}},
}


def photograph(product: str, seed: int, defect: bool = False) -> Image.Image:
    """Dark noise, or bright lines at a phase of their own; a defect is a disc of fine checks that neither has."""
    rng = np.random.default_rng([PRODUCTS.index(product), seed])
    ys, xs = np.mgrid[:SIDE, :SIDE]
    values = np.full((SIDE, SIDE), 60.0)
    if product == "grid":
        values = 170 + 40 * np.sign(np.sin((xs + rng.integers(16)) * np.pi / 8))
    values += rng.normal(0, 6, values.shape)
    if defect:
        y, x = rng.integers(20, SIDE - 20, 2)
        disc = (ys - y) ** 2 + (xs - x) ** 2 < 10**2
        values[disc] = 255.0 * ((ys + xs) // 2 % 2)[disc]
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both products in MVTec's layout: 12 to fit on, and 5 good and 5 defective ones to score."""
    folder = tmp_path_factory.mktemp("products")
    for product in PRODUCTS:
        for split, kind, seeds in (("train", "good", range(12)), ("test", "good", range(50, 50 + GOOD))):
            _write(folder / product / split / kind, product, seeds)
        _write(folder / product / "test" / "disc", product, range(80, 80 + BAD), defect=True)
    return folder


def _write(folder: Path, product: str, seeds: range, defect: bool = False) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        photograph(product, seed, defect).save(folder / f"{seed:03}.png")


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(load_backbone("lite0", image_size=SIDE, levels=[1, 2, 3]))


def multi_class(root: Path) -> Trial:
    (found,) = trials(index_dataset("mvtec", root), ProtocolOptions("multi-class", references=3))
    return found


def slow(*case: str) -> Any:
    """The case, marked as slow if its detector trains a network."""
    return pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
    ("detector", "features"),
    [*(slow(name, "raw") for name in OPTIONS), *(slow(name, "residual") for name in (*QUICK, "uniad"))],
)
def test_the_protocol_finds_the_defects_of_each(detector: str, features: str, root: Path, networks: Networks) -> None:
    settings = Settings(pictures=0, options=OPTIONS)
    records = run_trial(multi_class(root), Contender(detector, features), networks, settings)
    assert [record["product"] for record in records] == list(PRODUCTS)
    for record in records:
        assert record["trained_on"] == 24
        assert record["metrics"]["image_auroc"] > 0.9, record["product"]


def test_a_photograph_stays_with_the_references_of_its_product(root: Path, networks: Networks) -> None:
    """Also after those of another product were set, as for a training loop, which reads all photographs first."""
    found, settings = multi_class(root), Settings(batch_size=5)
    extract: Any = networks.extract(Contender("uniad", "residual"))
    images = torch.cat(list(Training(found.parts, extract, extract.preprocess, settings)))
    features = extract(images)
    start = 0
    for part in found.parts:
        own, references = (
            torch.cat(list(Images(some, extract.preprocess, settings))) for some in (part.train, part.references)
        )
        alone = ADExtractor(networks.backbone).set_references(references)
        expected = alone(own)
        others = [index for index, sample in enumerate(part.train) if sample not in part.references]
        for level, wanted in zip(features, expected, strict=True):
            torch.testing.assert_close(level[start : start + len(own)][others], wanted[others], **CLOSE)
            assert float(level[start : start + len(own)].flatten(1).norm(dim=1).min()) > 0  # no reference is its own
        start += len(own)
    with pytest.raises(ValueError, match=r"makes images of its own .* leave it out of multi-class"):
        extract(images[:1] + 0.01)
    extract.set_references(references).compare_with_all()
    torch.testing.assert_close(extract(images[-12:])[0], expected[0], **CLOSE)


def test_the_other_product_in_the_bank_can_only_bring_patches_nearer(root: Path, networks: Networks) -> None:
    """With every patch kept, a map of both is nowhere above that of the product's own, and the same on its defects."""
    backbone, options = networks.backbone, PatchCoreConfig(EmbeddingConfig(levels=None), amount=1.0, sigma=0.0)
    fit, new = (
        {name: _tensors(root, backbone, name, part) for name in PRODUCTS} for part in ("train/good", "test/disc")
    )
    both = PatchCore(backbone, options).fit(list(fit.values()))
    for name in PRODUCTS:
        alone, together = PatchCore(backbone, options).fit([fit[name]]).predict(new[name]), both.predict(new[name])
        assert bool((together.maps <= alone.maps * (1 + 1e-4) + 1e-4).all())
        assert float((together.maps.amax((1, 2)) / alone.maps.amax((1, 2))).min()) > 0.8


def _tensors(root: Path, backbone: Any, product: str, part: str) -> Tensor:
    files = sorted((root / product / part).iterdir())
    return torch.stack([backbone.preprocess(Image.open(file)) for file in files])


@pytest.mark.parametrize("detector", [slow(name) for name in OPTIONS])
def test_one_fitted_detector_scores_the_folders_of_all(
    detector: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class known: a threshold for each product. Class unknown: all photographs in one folder and one threshold."""
    for name in PRODUCTS:
        for use, seeds in (("fit", range(12)), ("good", range(20, 26))):
            _write(tmp_path / use / name, name, seeds)
        _write(tmp_path / "line" / name / "good", name, range(50, 50 + GOOD))
        _write(tmp_path / "line" / name / "disc", name, range(80, 80 + BAD), defect=True)
    flags = [
        "--backbone",
        "lite0",
        "--levels",
        "[1,2,3]",
        "--image-size",
        str(SIDE),
        "--device",
        "cpu",
        "--set",
        *_flags(detector),
    ]
    assert (
        main(["fit", "--detector", detector, "--normal", str(tmp_path / "fit"), "--out", str(tmp_path / "one"), *flags])
        == 0
    )
    score = ["score", "--detector", str(tmp_path / "one"), "--normal", str(tmp_path / "good"), "--device", "cpu"]
    score += ["--images", str(tmp_path / "line"), "--heatmaps", "none"]
    assert main([*score, "--out", str(tmp_path / "known"), "--each-product"]) == 1
    for name in PRODUCTS:
        assert _separated(tmp_path / "known" / name, lambda path: True) > 0.9
    assert main([*score, "--out", str(tmp_path / "unknown")]) == 1
    for name in PRODUCTS:
        assert _separated(tmp_path / "unknown", lambda path, name=name: path.startswith(name)) > 0.9
    capsys.readouterr()


def _flags(detector: str) -> list[str]:
    options = {**OPTIONS[detector]}
    options |= {f"training.{key}": value for key, value in options.pop("training", {}).items()}
    return [f"{key}={value}" for key, value in options.items()]


def _separated(out: Path, wanted: Callable[[str], bool]) -> float:
    """The image AUROC of the rows of scores.csv that are wanted."""
    with (out / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if wanted(row["path"])]
    assert len(rows) == GOOD + BAD
    return auroc([float(row["score"]) for row in rows], ["disc" in row["path"] for row in rows])

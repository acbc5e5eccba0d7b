"""A comparison of two drawn products: its numbers against a plain loop, what is computed again, its errors."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.backbones import load_backbone
from adpretrain.data import index_dataset
from adpretrain.data.samples import ImageDataset
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.references import random_references
from downstream import FeatureNorm, PatchCore, evaluate_maps
from downstream.cli import main
from downstream.detectors import DETECTORS, build_detector
from downstream.evaluation.comparison import Comparison, detector_rows, extractor_rows, read_comparison, set_rows
from downstream.evaluation.networks import Remembered

pytestmark = pytest.mark.filterwarnings("ignore:elsewhere is left out")
METRICS = ("image_auroc", "pixel_auroc", "aupro")
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
BOARD = """
sets:
  - {{name: slabs, root: set, products: [slab]}}
  - {{name: both, root: set}}
  - {{name: elsewhere, root: absent, optional: true}}
extractors:
  pretrained: {extractor}
  raw: {{backbone: lite0, image_size: 64}}
detectors: [featurenorm, patchcore: {{amount: 0.5}}]
shots: [2]
draws: 2
seed: 3
"""


@pytest.fixture(scope="module")
def extractor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network under a local scale, at 64 pixels."""
    backbone = load_backbone("lite0", image_size=64, finest=8)
    folder = tmp_path_factory.mktemp("extractor") / "scaled"
    return ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels))).save_pretrained(folder)


@pytest.fixture
def comparison(tile_products: Path, extractor_dir: Path, tmp_path: Path) -> Path:
    """The file, beside a link to the data; slab has no masks in it."""
    shutil.copytree(tile_products, tmp_path / "set")
    for file in (tmp_path / "set").glob("*/test/disc/*.png"):  # fainter discs, which are not all found
        with Image.open(file) as disc, Image.open(file.parents[1] / "good" / "000.png") as good:
            Image.blend(good, disc, 0.03).save(file)
    shutil.rmtree(tmp_path / "set" / "slab" / "ground_truth")
    (tmp_path / "comparison.yaml").write_text(BOARD.format(extractor=extractor_dir))
    return tmp_path / "comparison.yaml"


def evaluate(comparison: Path, *flags: str) -> int:
    return main(["evaluate", str(comparison), "--out", str(comparison.parent / "out"), "--device", "cpu", *flags])


def cells(comparison: Path) -> dict[tuple[Any, ...], Path]:
    """(product, extractor, detector, images, draw) -> file."""
    files = (comparison.parent / "out" / "cells").glob("*.json")
    return {tuple(json.loads(file.read_text())["of"]): file for file in files}


def stamps(comparison: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (comparison.parent / "out" / "cells").iterdir()
    }


def without_seconds(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    for record in content["records"]:
        del record["seconds"], record["latency"]
    return content


def lines(comparison: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with (comparison.parent / "out" / "means.csv").open(newline="") as file:
        return {(row["set"], row["detector"], row["features"]): row for row in csv.DictReader(file)}


def plain_loop(root: Path, product: str, detector: str, extractor_dir: Path | None, draw: int) -> dict[str, float]:
    """A cell in the words of the public API: K = 2 of the training images, drawn with seed 3 + draw."""
    samples = [s for s in index_dataset("mvtec", root, split="") if s.category == product]
    backbone = load_backbone("lite0", image_size=64)
    data = ImageDataset(samples, backbone.preprocess)
    train = [i for i, s in enumerate(samples) if s.split == "train"]
    test = [i for i, s in enumerate(samples) if s.split == "test"]
    chosen = [train[i] for i in random_references(len(train), 2, 3 + draw)]
    normal = torch.stack([data[i]["image"] for i in chosen])
    extract: Any = ADExtractor.from_pretrained(extractor_dir) if extractor_dir else backbone
    fitted: Any
    if detector == "featurenorm":
        fitted = FeatureNorm(extract).fit([normal])
    elif extractor_dir is None:
        fitted = PatchCore(extract, PatchCore(extract).config.__class__(amount=0.5)).fit([normal])
    else:  # each of the two is compared with the other while the memory is filled, and test images with both
        pairs = [extract.encode_references(normal[[1 - row]]) for row in range(2)]
        alone = [extract(normal[row : row + 1], pairs[row]) for row in range(2)]
        held = iter(alone)
        fitted = PatchCore(lambda images: next(held), PatchCore(extract).config.__class__(amount=0.5))
        fitted.fit([normal[:1], normal[1:]])
        fitted.extract = extract.set_references(normal)
    found = fitted.predict(torch.stack([data[i]["image"] for i in test]))
    masks = np.stack([data[i]["mask"].numpy() for i in test])
    metrics = evaluate_maps(found.maps, masks, found.scores, [samples[i].anomalous for i in test])
    return {name: getattr(metrics, name) for name in METRICS}


@pytest.mark.parametrize("detector", ["featurenorm", "patchcore"])
@pytest.mark.parametrize("features", ["raw", "pretrained"])
def test_a_cell_is_a_plain_loop_over_the_public_detectors(
    comparison: Path, extractor_dir: Path, detector: str, features: str
) -> None:
    """Tile has masks and gives all three metrics; the mean of `both` over its products and draws is theirs."""
    text = comparison.read_text().replace(
        "detectors: [featurenorm, patchcore: {amount: 0.5}]", f"detectors: [{detector}]"
    )
    comparison.write_text(text.replace("[patchcore]", "[patchcore: {amount: 0.5}]"))
    assert evaluate(comparison) == 0
    folder = extractor_dir if features == "pretrained" else None
    expected = {
        (product, draw): plain_loop(comparison.parent / "set", product, detector, folder, draw)
        for product in ("slab", "tile")
        for draw in (0, 1)
    }
    for draw in (0, 1):
        record = json.loads(cells(comparison)["both/tile", features, detector, "K=2", draw].read_text())["records"][0]
        for name in METRICS:
            assert record["metrics"][name] == pytest.approx(expected["tile", draw][name], abs=1e-4), name
    assert 0 < expected["tile", 0]["pixel_auroc"] < 1
    line = lines(comparison)["both", detector, features]
    per_draw = [50 * sum(expected[product, draw]["image_auroc"] for product in ("slab", "tile")) for draw in (0, 1)]
    assert float(line["image_auroc"]) == pytest.approx(np.mean(per_draw), abs=1e-2)
    assert float(line["image_auroc_spread"]) == pytest.approx(np.std(per_draw, ddof=1), abs=1e-2)
    aupro = [100 * expected["tile", draw]["aupro"] for draw in (0, 1)]
    assert float(line["aupro"]) == pytest.approx(np.mean(aupro), abs=1e-2)


def test_a_finished_cell_is_never_computed_again(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(comparison) == 0
    first, table = stamps(comparison), (comparison.parent / "out" / "means.md").read_text()
    assert len(first) == 8 + 8  # two detectors, extractors and draws: slab is one cell in both sets
    assert capsys.readouterr().out.strip() == table.strip()
    assert evaluate(comparison) == 0
    assert stamps(comparison) == first
    gone, cut = (cells(comparison)["both/tile", "raw", name, "K=2", 0] for name in ("patchcore", "featurenorm"))
    kept = {file: without_seconds(file) for file in (gone, cut)}
    gone.unlink()
    cut.write_text(cut.read_text()[:100])
    with pytest.warns(UserWarning, match=f"{cut} is damaged .*; both/tile is computed again"):
        assert evaluate(comparison) == 0
    again = stamps(comparison)
    assert {file for file in first if again[file][0] != first[file][0]} == {gone, cut}
    assert {file: without_seconds(file) for file in kept} == kept
    assert (comparison.parent / "out" / "means.md").read_text() == table


def test_a_board_grows_by_what_is_new(comparison: Path) -> None:
    assert evaluate(comparison) == 0
    first = stamps(comparison)
    comparison.write_text(
        comparison.read_text().replace("draws: 2", "draws: 3").replace("name: slabs", "name: renamed")
    )
    assert evaluate(comparison) == 0
    again = stamps(comparison)
    assert {file: again[file] for file in first} == first
    assert len(again) == len(first) * 3 // 2
    image = next((comparison.parent / "set" / "tile" / "test" / "good").glob("*.png"))
    image.write_bytes(image.read_bytes() + b" ")  # another size: another image
    assert evaluate(comparison) == 0
    assert len(stamps(comparison)) == len(again) + 12


def test_the_table_says_what_is_missing(comparison: Path) -> None:
    assert evaluate(comparison) == 0
    text = (comparison.parent / "out" / "means.md").read_text()
    assert "- elsewhere is left out: " in text
    assert "slabs, both/slab: 4 defects have no mask, such as 000.png: no pixel metrics" in text
    found = lines(comparison)
    assert found["slabs", "patchcore", "raw"]["aupro"] == ""
    mean = found["mean over sets", "patchcore", "raw"]
    assert (mean["image_auroc_sets"], mean["aupro_sets"]) == ("2", "1")
    assert float(mean["aupro"]) == pytest.approx(float(found["both", "patchcore", "raw"]["aupro"]))
    assert "(1 of 2)" in text


def test_all_normal_images_are_one_draw(comparison: Path) -> None:
    text = comparison.read_text().replace("patchcore: {amount: 0.5}", "padim")
    comparison.write_text(text.replace("shots: [2]", "shots: [all]"))
    assert evaluate(comparison) == 0
    assert {key[3:] for key in cells(comparison)} == {("K=all", 0)}
    assert (
        json.loads(cells(comparison)["both/tile", "raw", "padim", "K=all", 0].read_text())["records"][0]["trained_on"]
        == 6
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("root: set, products: [slab]", "root: nowhere", "set slabs: folder not found: .*nowhere"),
        ("products: [slab]", "products: [slob]", r"set slabs: products \['slob'\] are not in .*found: slab, tile"),
        (
            "products: [slab]",
            "product: [slab]",
            r"comparison.yaml: sets\[0\]: unknown key product \(did you mean products",
        ),
        ("name: both", "name: slabs", "sets slabs are there twice"),
        ("draws: 2", "drawn: 2", r"comparison.yaml: unknown key drawn \(did you mean draws\?\)"),
        ("draws: 2", "draws: -1", "draws -1"),
        ("shots: [2]", "shots: [many]", "shots.*many"),
        ("shots: [2]", "shots: [7]", r"set slabs: too few normal images for K = 7 references: slab \(6\)"),
        ("shots: [2]", "shots: []", "shots must not be empty"),
        ("amount: 0.5", "amuont: 0.5", r"options of patchcore: unknown key amuont \(did you mean amount\?\)"),
        ("[featurenorm,", "[featuernorm,", "detector 'featuernorm' is unknown; choose one of featurenorm"),
        ("[featurenorm,", "[featurenorm, patchcore,", "detector patchcore is there twice"),
        ("[featurenorm,", "[3,", r"detectors\[0\] is 3; expected a detector's name"),
        (
            "image_size: 64",
            "image_size: 64, features: pretrained",
            "extractors.raw: features 'pretrained' need an extractor",
        ),
        (
            "raw: {backbone: lite0,",
            "raw: {extractor: embedded,",
            "raw: image_size cannot be given with",
        ),
        ("raw: {backbone: lite0,", "raw: {", "extractors.raw: extractor None, backbone None: name one of the two"),
        ("backbone: lite0", "backbone: lite9", "extractor raw: .*lite9"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(
    comparison: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in comparison.read_text()
    comparison.write_text(comparison.read_text().replace(old, new, 1))
    assert evaluate(comparison) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    assert re.search(message, said), said
    assert not (comparison.parent / "out" / "cells").exists()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_comparisons_of_the_project_are_read(file: Path) -> None:
    """Their folders lie where the files say, beside the project; only the solar cells may be absent."""
    comparison = read_comparison({}, file)
    sets = set_rows(comparison)
    assert {Path(row.root).resolve().parent.name for row in sets} <= {"data", "board"}
    assert {row.name for row in sets if row.optional} <= {"elpv_mono", "elpv_poly"}
    assert extractor_rows(comparison)
    assert set(detector_rows(comparison)) <= set(DETECTORS)


def test_rows_of_features_are_named_as_in_the_file() -> None:
    rows = extractor_rows(read_comparison({}, next(file for file in RECIPES if file.stem == "embedded")))
    assert [row.kind for row in rows.values()] == list(rows) == ["pretrained", "residual", "raw"]


def test_a_remembered_backbone_gives_the_same_features_and_keeps_to_its_room() -> None:
    backbone = load_backbone("lite0", image_size=64)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given = [images, images.flip(0), images[1:2]]
    expected = [backbone(some) for some in given]
    seen: list[int] = []
    backbone.network.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    remembered = Remembered(backbone, room=2 * sum(level.nbytes for level in expected[2]))
    for some, levels in zip(given, expected, strict=True):
        for level, plain in zip(backbone(some), levels, strict=True):
            torch.testing.assert_close(level, plain, rtol=1e-4, atol=5e-4)  # values of some 10
    assert seen == [1, 1, 1, 1]  # the third did not fit, and was seen twice
    remembered.forget()
    backbone(images[:2])
    assert seen == [1] * 6
    with pytest.raises(ValueError, match="takes images"):
        backbone(images[:, :, :32])


def test_protocols_that_can_be_few_shot_are_so_if_asked() -> None:
    """Without a number K they fit on all; where K images are drawn, there are 3 draws."""
    assert (Comparison().shots, Comparison().repeats) == ((4,), 3)
    for protocol in ("robustness", "contamination", "shifted-line"):
        plain, few = Comparison(protocol=protocol), Comparison(protocol=protocol, shots=(2,))  # type: ignore[arg-type]
        assert (plain.shots, plain.repeats) == ((), 1)
        assert (few.shots, few.repeats) == ((2,), 3)
    assert Comparison(protocol="full", shots=(2,)).repeats == 1


def test_a_copy_of_a_remembered_backbone_is_trained() -> None:
    """ReContrast's: with the features that the cache holds it would stay as it was, or fail in its second pass."""
    backbone = load_backbone("lite0", image_size=64, levels=[1, 2, 3])
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    Remembered(backbone)
    options = {"encoder_rate": 1e-3, "training": {"steps": 4, "batch_size": 2}}
    detector: Any = build_detector("recontrast", backbone, options).fit([images])
    for trained, frozen in zip(detector.model.encoder(images), backbone(images), strict=True):
        assert float((trained - frozen).norm()) > 0.01 * float(frozen.norm())

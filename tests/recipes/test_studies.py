"""The studies behind docs/embedded.md and docs/carry_over.md, at a small size."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import carry_over
import choose_embedded
import mutual_scoring
import numpy as np
import perturbations
import pytest
from PIL import Image
from products import make_synthetic

from adpretrain import ADExtractor, load_backbone
from adpretrain.config import LocalScaleConfig
from adpretrain.data.products import draw_shots
from adpretrain.local_scale import LocalScale
from downstream.evaluation.few_shot import encode_samples, measure, score
from downstream.evaluation.perturbations import SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(
        tmp_path_factory.mktemp("studies") / "drawn", products=3, normals=12, defects=4, views=1, size=64, workers=1
    )


def test_a_batch_holds_no_set_but_those_given_and_half_defects() -> None:
    rows = {"a": [(0, False), (1, True)], "b": [(2, False), (3, True)], "drawn": [(4, False), (5, True)]}
    variant = carry_over.Variant(steps=20, drawn=0.5)
    steps = list(carry_over.steps_of(rows, variant, seed=0))
    assert len(steps) == 20
    counts = np.bincount([index for step in steps for _, index in step], minlength=6)
    assert counts[1::2].sum() == counts[0::2].sum() == 10 * carry_over.BATCH
    assert 0.4 < counts[4:].sum() / counts.sum() < 0.6
    kept = {index for step in carry_over.steps_of({"a": rows["a"]}, variant, seed=0) for _, index in step}
    assert kept == {0, 1}


def test_every_set_is_left_out_once_and_a_finished_run_is_kept(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text("linear: {projector: {architecture: linear}, steps: 2}\n")
    arguments = ["--sets", drawn, "--variants", variants, "--seeds", "1", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["carry_over.py", *map(str, arguments)])
    carry_over.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = sorted({sample.category for sample in carry_over.index_dataset("auto", drawn)})
    assert sorted(results) == [f"linear/{name}/0" for name in names]
    assert all(list(found) == [key.split("/")[1]] for key, found in results.items())
    assert "| linear | 1 |" in capsys.readouterr().out
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(carry_over, "run_fold", lambda *_: pytest.fail("a finished run was repeated"))
    carry_over.main()
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before


def test_the_search_scores_as_the_extractor_does(drawn: Path) -> None:
    """One setting of the search, by way of the library's own extractor and FeatureNorm."""
    samples = next(iter(carry_over.products([drawn], []).values()))
    patch, share, weights, top = (1, 1, 3), 0.35, (0.5, 1.0, 2.0), 0.01
    backbone = load_backbone("lite0", levels=[1, 2, 3], finest=8, patch=patch)
    images = carry_over.coarse(encode_samples(samples, backbone))
    found = choose_embedded.scored(images, draw=0)
    place = [setting[1:] for setting in choose_embedded.SETTINGS if setting[0] == patch].index((share, weights, top))
    extractor = ADExtractor(backbone, local_scale=LocalScale(3, LocalScaleConfig(share, list(weights))))
    references, queries = draw_shots(images.samples, choose_embedded.SHOTS, seed=0)
    # The search blurs by 4 pixels of the input, which are 2 of its maps.
    prediction = score([extractor], images, references, queries, carry_over.MAP_SIDE, sigma=2.0)[0]
    metrics = measure(prediction, images, queries)
    expected = [100 * getattr(metrics, name) for name in carry_over.METRICS]
    np.testing.assert_allclose(found[place], expected, rtol=0, atol=0.05)


def test_the_recorded_search_holds_what_is_shipped() -> None:
    with (ROOT / "docs" / "embedded_search.csv").open() as file:
        rows = list(csv.DictReader(file))
    config = ADExtractor.from_pretrained("embedded").config
    shipped = (tuple(config.backbone.patch), config.local_scale.share, tuple(config.local_scale.weights))
    assert shipped in {(numbers(row["patch"]), float(row["share"]), numbers(row["weights"])) for row in rows}
    assert len(rows) == 8 * len(choose_embedded.SETTINGS)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.strip("()").split(","))


@pytest.mark.slow
def test_photographs_without_labels_score_each_other(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mutual_scoring.py", "--sets", str(drawn)])
    mutual_scoring.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    names = sorted({sample.category for sample in carry_over.index_dataset("auto", drawn)})
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    assert all(float(row.split(" | ")[3].split(" / ")[1]) > 70 for row in rows)  # pixel AUROC in %


def test_the_picture_of_changes_shows_every_setting(drawn: Path, tmp_path: Path) -> None:
    """Eight panels that differ; the first is the photograph."""
    assert list(perturbations.MOST) == ["as photographed", *SETTINGS]
    photograph = next(drawn.glob("realiad_*/*/OK/**/*.jpg"))
    perturbations.draw(photograph, tmp_path / "changes.png")
    with Image.open(tmp_path / "changes.png") as picture:
        assert picture.size == (896, 515)
    pixels = perturbations.Preprocess(64).pixels(perturbations.read_image(photograph)).float() / 255
    panels = [change.picture(pixels) for change in perturbations.MOST.values()]
    np.testing.assert_allclose(panels[0], pixels, atol=1e-6)
    assert all((panel - pixels).abs().max() > 0.02 for panel in panels[1:])

"""`adpretrain score --each-product`: each product is judged as if it were inspected alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main

SMALL = ["--image-size", "64", "--device", "cpu"]


def write(folder: Path, numbers: range, base: int, mark: int = -1) -> None:
    """Noisy gray photographs around ``base``; number ``mark`` has a white square."""
    folder.mkdir(parents=True)
    for number in numbers:
        values = np.random.default_rng([base, number]).normal(base, 8, (80, 80, 3))
        if number == mark:
            values[30:42, 30:42] = 255
        Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name, base in (("lid", 60), ("bolt", 150)):
        write(tmp_path / "fit" / name, range(3), base)
        write(tmp_path / "good" / name, range(10, 14), base)
        write(tmp_path / "line" / name, range(20, 23), base, mark=22)
    return tmp_path


def summary(out: Path) -> dict[str, Any]:
    found = json.loads((out / "summary.json").read_text())
    return {key: found[key] for key in ("threshold", "counts", "promised_false_alarm_rate", "images")}


@pytest.mark.parametrize("way", ["references", "one detector"])
def test_each_product_is_judged_as_if_alone(way: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = SMALL
    if way == "one detector":
        fit = ["--backbone", "lite0", *SMALL, "--out", str(two / "fitted")]
        assert main(["fit", "--detector", "patchcore", "--normal", str(two / "fit"), *fit]) == 0
        chosen = ["--detector", str(two / "fitted"), "--device", "cpu"]
    folders = ["--normal", str(two / "good"), "--images", str(two / "line")]
    assert main(["score", *folders, *chosen, "--out", str(two / "all"), "--each-product"]) == 1
    said = capsys.readouterr().out
    for name in ("bolt", "lid"):
        folders = ["--normal", str(two / "good" / name), "--images", str(two / "line" / name)]
        assert main(["score", *folders, *chosen, "--out", str(two / "alone" / name)]) == 1
        alone = summary(two / "alone" / name)
        assert summary(two / "all" / name) == alone
        assert alone["counts"]["anomalous"] >= 1
        assert capsys.readouterr().out.replace("alone", "all") in said
    assert said.index("\nbolt\n") < said.index("\nlid\n")


def test_json_holds_every_product(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--normal", str(two / "good"), "--images", str(two / "line"), "--out", str(two / "out")]
    assert main(["score", *folders, *SMALL, "--each-product", "--json"]) == 1
    assert sorted(json.loads(capsys.readouterr().out)) == ["bolt", "lid"]


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "line" / "nut").mkdir(), "holds the product nut, but"),
        (
            lambda at: Image.new("RGB", (80, 80)).save(at / "line" / "stray.png"),
            "stray.png lies in no product's folder",
        ),
        (lambda at: (at / "good").rename(at / "elsewhere"), "is not a folder"),
    ],
)
def test_mistakes(change: Change, message: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(two)
    folders = ["--normal", str(two / "good"), "--images", str(two / "line"), "--out", str(two / "out")]
    assert main(["score", *folders, *SMALL, "--each-product"]) == 2
    assert message in capsys.readouterr().err
    assert not (two / "out").exists()

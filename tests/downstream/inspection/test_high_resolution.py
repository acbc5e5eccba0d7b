"""Marks of a few pixels on large photographs: lost when the whole photograph is one input, found with tiles."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main


def texture(seed: int, width: int, height: int) -> np.ndarray:
    """A regular surface with fixed grain, and each photograph's own light and sensor noise."""
    draw, grain = np.random.default_rng(seed), np.random.default_rng(5)
    x, y = np.arange(width), np.arange(height)[:, None]
    waves = 130 + 25 * np.sin(x / 37) * np.cos(y / 53) + 15 * np.sin((x + y) / 211)
    fixed = np.kron(grain.normal(0, 6, (height // 8, width // 8)), np.ones((8, 8)))
    return waves * (1 + draw.normal(0, 0.01)) + fixed + draw.normal(0, 5, (height, width))


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=92)


def inspect(folder: Path, size: tuple[int, int], marks: list[tuple[int, int, int, int]], normals: int) -> dict:
    """Score photographs with one mark each (left, top, width, height), and two good ones; return summary.json."""
    for number in range(normals):
        save(texture(number, *size), folder / "good" / f"{number}.jpg")
    for number in range(2):
        save(texture(100 + number, *size), folder / "line" / f"good{number}.jpg")
    for number, (left, top, width, height) in enumerate(marks):
        pixels = texture(200 + number, *size)
        pixels[top : top + height, left : left + width] *= 0.4
        save(pixels, folder / "line" / f"mark{number}.jpg")
    command = [
        "score",
        "--normal",
        str(folder / "good"),
        "--images",
        str(folder / "line"),
        "--out",
        str(folder / "out"),
    ]
    assert main([*command, "--tile", "256"]) in (0, 1)
    summary: dict = json.loads((folder / "out" / "summary.json").read_text())
    return summary


def check(folder: Path, summary: dict, marks: list[tuple[int, int, int, int]]) -> None:
    """Every mark is the place with the highest peak of its photograph, clearly above the threshold; the good ones are
    not: each of n + 1 exchangeable photographs is the highest with a probability of 1 / (n + 1), so that a good one
    may exceed the threshold a little."""
    scores = {Path(one["path"]).stem: one["score"] / summary["threshold"] for one in summary["images"]}
    assert all(scores[f"mark{number}"] > 1.25 for number in range(len(marks))), scores
    assert all(scores[f"good{number}"] < 1.1 for number in range(2)), scores
    with (folder / "out" / "regions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number, (left, top, width, height) in enumerate(marks):
        first = next(row for row in rows if row["path"] == f"mark{number}.jpg")
        assert first["number"] == "1"
        assert left - 24 <= int(first["peak_x"]) <= left + width + 24
        assert top - 24 <= int(first["peak_y"]) <= top + height + 24


def test_marks_are_found_where_they_are(tmp_path: Path) -> None:
    marks = [(300, 100, 10, 10), (420, 250, 40, 3)]
    summary = inspect(tmp_path, (576, 448), marks, normals=4)
    check(tmp_path, summary, marks)
    assert max(summary["pixels_per_cell"]) == pytest.approx(256 / 28, abs=0.01)


def test_a_large_photograph_without_tiles_gets_a_warning(tmp_path: Path) -> None:
    for place, seed in (("good/0", 0), ("good/1", 1), ("line/0", 2)):
        save(texture(seed, 2400, 1600), tmp_path / f"{place}.jpg")
    folders = ["--normal", str(tmp_path / "good"), "--images", str(tmp_path / "line"), "--out", str(tmp_path / "out")]
    main(["score", *folders])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert any("covers 86 x 57 px" in warning and "--tile" in warning for warning in summary["warnings"])
    main(["score", *folders, "--image-size", "448"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pixels_per_cell"] == pytest.approx([2400 / 56, 1600 / 56], abs=0.01)


@pytest.mark.long
def test_twelve_megapixels(tmp_path: Path) -> None:
    marks = [(2429, 2411, 10, 10), (1144, 1528, 40, 3), (343, 1000, 10, 100), (257, 395, 200, 10)]
    check(tmp_path, inspect(tmp_path, (4000, 3000), marks, normals=8), marks)

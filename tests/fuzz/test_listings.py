"""Listings of images that somebody else wrote: what they name is inside the set, or refused in a sentence."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounded import bounded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_images import HOW, PREPROCESS, mutated
from test_models import places, replaced

from adpretrain.data import Sample
from adpretrain.data.huggingface import index_hf
from adpretrain.data.layouts.metadata import index_metadata
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.data.layouts.visa import COLUMNS, index_visa
from downstream.cli import main
from downstream.inspection.photos import PhotoReader, Unreadable
from downstream.web.uploads import Upload, read_upload

NAMES: list[Any] = ["../../../etc/passwd", "/etc/passwd", "a\0b.png", "loop/loop.png", "x" * 5000, "up/secret.png", ""]
NAMES += [".", "..", "~/x.png", "C:\\x.png", "a.png/b.png", "\udcff.png", "\u202egnp.exe", None, 5, [], {}, True]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set's folder with one picture, a link in a circle, and a link that leads out."""
    outer = tmp_path_factory.mktemp("outer")
    Image.new("RGB", (8, 8)).save(outer / "secret.png")
    folder = outer / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "up").symlink_to(outer)
    return folder


def listed(index: Callable[[], list[Sample]], root: Path) -> None:
    """Every sample's files lie inside the set; anything but a ValueError or OSError fails the test."""
    samples: list[Sample] = []
    said = ""
    try:
        samples = index()
    except (ValueError, OSError) as error:
        said = str(error)
    assert said or samples
    for sample in samples:
        assert all(isinstance(text, str) for text in (sample.defect, sample.category, sample.split))
        for file in (sample.image, *sample.mask_files):
            assert file.resolve().is_relative_to(root.resolve())


def table(rows: list[list[Any]]) -> bytes:
    """CSV of any texts, those among them that Python 3.10's own writer refuses."""
    quoted = [['"' + ("" if cell is None else str(cell)).replace('"', '""') + '"' for cell in row] for row in rows]
    return "".join(",".join(row) + "\r\n" for row in quoted).encode("utf-8", "surrogateescape")


def visa(root: Path, rows: list[list[Any]]) -> bytes:
    return table([list(COLUMNS), *rows])


@bounded(120)
@given(name=st.sampled_from(NAMES), column=st.integers(0, 4), seed=st.integers(0, 10**6), how=st.none() | HOW)
def test_visa_rows(root: Path, name: Any, column: int, seed: int, how: str | None) -> None:
    row: list[Any] = ["c", "test", "anomaly", "a.png", "a.png"]
    row[column] = name
    content = visa(root, [["c", "train", "normal", "a.png", ""], row])
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_bytes(mutated(content, seed, how) if how else content)
    listed(lambda: index_visa(root), root)


REALIAD = {
    "meta": {"normal_class": "OK", "prefix": ""},
    "train": [{"category": "c", "anomaly_class": "OK", "image_path": "a_C1_x.jpg", "mask_path": None}],
    "test": [{"category": "c", "anomaly_class": "HS", "image_path": "b_C2_x.jpg", "mask_path": "b_C2_x.png"}],
}


@bounded(120)
@given(
    at=st.integers(0, 100),
    value=st.sampled_from([*NAMES, -1, 10**30, float("nan"), [[]] * 3, {"a": {}}]),
    seed=st.integers(0, 10**6),
    how=st.none() | HOW,
)
def test_real_iad_listings(root: Path, at: int, value: Any, seed: int, how: str | None) -> None:
    (root / "realiad_256" / "c" / "OK").mkdir(parents=True, exist_ok=True)
    folder = root / "realiad_jsons" / "realiad_jsons"
    folder.mkdir(parents=True, exist_ok=True)
    spots = places(REALIAD)
    content = json.dumps(replaced(REALIAD, spots[at % len(spots)], value)).encode()
    (folder / "c.json").write_bytes(mutated(content, seed, how) if how else content)
    listed(lambda: index_realiad(root, protocol="realiad_jsons"), root)


@bounded(120)
@given(
    name=st.sampled_from(NAMES),
    column=st.sampled_from(["image", "mask", "label", "category", "split"]),
    kind=st.sampled_from(["csv", "jsonl"]),
    seed=st.integers(0, 10**6),
    how=st.none() | HOW,
)
def test_metadata_lines(root: Path, name: Any, column: str, kind: str, seed: int, how: str | None) -> None:
    good = {"image": "a.png", "mask": "a.png", "label": "bad", "category": "c", "split": "test"}
    rows = [good, {**good, column: name}]
    file = root / f"metadata.{kind}"
    if kind == "jsonl":
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        content = table([list(good), *(list(row.values()) for row in rows)])
    file.write_bytes(mutated(content, seed, how) if how else content)
    listed(lambda: index_hf(root), root)
    file.unlink()


@pytest.mark.parametrize("line", ["[" * 100_000, "[1, 2]", "[[1, 2]]", "7", '{"image": 1e999}', "1" * 5000, "null"])
def test_metadata_that_is_no_table(root: Path, line: str) -> None:
    file = root / "metadata.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match="metadata"):
        list(index_metadata(root, file, {}))
    file.unlink()


@bounded(12)
@given(seed=st.integers(0, 10**6), how=HOW)
def test_damaged_parquet(tmp_path_factory: pytest.TempPathFactory, seed: int, how: str) -> None:
    import datasets

    folder = tmp_path_factory.mktemp("parquet")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": None, "path": "/etc/passwd"}][: 1 + seed % 2]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0] * len(cells)})
    table.to_parquet(folder / "train.parquet")
    path = folder / "train.parquet"
    path.write_bytes(mutated(path.read_bytes(), seed, how))
    said = ""
    try:
        samples = index_hf(folder, cache=folder / "cache")
    except (ValueError, OSError) as error:
        said, samples = str(error), []
    assert said or samples
    assert all(sample.image.resolve().is_relative_to(folder.resolve()) for sample in samples)


def test_a_zip_bomb_is_no_photograph(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.png", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../x.png", bytes(1 << 26))
    found = read_upload(Upload(tmp_path / "bomb.png", "bomb.png"), PhotoReader(PREPROCESS, 1))
    assert isinstance(found, Unreadable)
    assert "not a photograph" in found.reason
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.png"]


def test_check_data_answers_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_bytes(visa(root, [["c", "train", "normal", "loop/x.png", ""]]))
    assert main(["check-data", "--root", str(root), "--dataset", "visa"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("adpretrain: error: path 'loop/x.png' in line 2 of 1cls.csv")
    assert said.count("\n") == 1
    for file in root.glob("metadata.*"):  # of an example that failed
        file.unlink()
    os.mkfifo(root / "metadata.csv")
    assert main(["check-data", "--root", str(root), "--dataset", "hf"]) == 2
    (root / "metadata.csv").unlink()

"""Image folders with a metadata file: every way to write one, and every way to write it wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from pictures import mask, photograph

from adpretrain.data import MissingMasks, Sample, index_dataset


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    root = tmp_path / "bolts"
    for split in ("train", "test"):
        lines = []
        for name, label in (("a.PNG", "good"), ("b.png", "scratch")):
            photograph(root / split / name)
            has = split == "test" and label != "good"
            lines.append({"file_name": name, "mask_file_name": "masks/b.png" if has else "", "label": label})
        mask(root / split / "masks/b.png")
        with (root / split / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "mask_file_name", "label"])
            writer.writeheader()
            writer.writerows(lines if split == "test" else lines[:1])
    return root


def test_an_image_folder_is_used_where_it_lies(image_folder: Path) -> None:
    samples = index_dataset("auto", image_folder)
    assert sorted(samples, key=lambda s: (s.split, s.defect)) == [
        Sample(image_folder / "test/a.PNG", None, "bolts", "good", None, "test"),
        Sample(image_folder / "test/b.png", image_folder / "test/masks/b.png", "bolts", "scratch", None, "test"),
        Sample(image_folder / "train/a.PNG", None, "bolts", "good", None, "train"),
    ]


def test_one_metadata_file_above_the_splits(image_folder: Path) -> None:
    (image_folder / "train/metadata.csv").unlink()
    (image_folder / "test/metadata.csv").unlink()
    rows = [
        {"file_name": "train/a.PNG", "mask_file_name": None, "anomaly": False, "object": "m6"},
        {"file_name": "test/a.PNG", "mask_file_name": None, "anomaly": False, "object": "m8"},
        {"file_name": "test/b.png", "mask_file_name": "test/masks/b.png", "anomaly": True, "object": "m8"},
    ]
    (image_folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert index_dataset("auto", image_folder) == [
        Sample(image_folder / "train/a.PNG", None, "m6", "good", None, "train"),
        Sample(image_folder / "test/a.PNG", None, "m8", "good", None, "test"),
        Sample(image_folder / "test/b.png", image_folder / "test/masks/b.png", "m8", "anomaly", None, "test"),
    ]


@pytest.mark.parametrize("way", ["above", "absolute", "link", "mask"])
def test_a_metadata_file_cannot_leave_the_set(image_folder: Path, tmp_path: Path, way: str) -> None:
    secret = photograph(tmp_path / "secret.png")
    (image_folder / "train/link.png").symlink_to(secret)
    name = {"above": "../../secret.png", "absolute": str(secret), "link": "link.png", "mask": "a.PNG"}[way]
    hidden = "../../secret.png" if way == "mask" else ""
    listing = image_folder / "train/metadata.csv"
    listing.write_text(f"file_name,mask_file_name,label\na.PNG,,good\n{name},{hidden},good\n")
    with pytest.raises(ValueError, match=r"path .* in line 3 of .*train/metadata\.csv leaves .*bolts"):
        index_dataset("hf", image_folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.csv",
            "file_name,kind\na.PNG,good\n",
            "metadata.csv has no label and no mask .*file_name .text., kin",
        ),
        ("metadata.csv", "file_name,label\na.PNG\n", "label '' in line 2 of .*metadata.csv is neither normal nor"),
        ("metadata.csv", "file_name,label\n,good\n", "line 2 of .*metadata.csv has no image"),
        ("metadata.jsonl", '{"file_name": "a.PNG", "label": 0}\n{', "metadata.jsonl is not a readable metadata file"),
        ("metadata.jsonl", "[1]", "metadata.jsonl is not a readable metadata file"),
        ("metadata.jsonl", '{"file_name": "a.PNG", "label": [1]}', r"label \[1\] in line 1 of .*jsonl is neither"),
    ],
)
def test_a_wrong_metadata_line_is_named(image_folder: Path, name: str, text: str, message: str) -> None:
    (image_folder / "train/metadata.csv").unlink()
    (image_folder / "train" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        index_dataset("hf", image_folder)


def test_a_defect_without_a_mask_in_a_metadata_file(image_folder: Path) -> None:
    listing = image_folder / "test/metadata.csv"
    listing.write_text(listing.read_text() + "a.PNG,,dent\n")
    with pytest.raises(MissingMasks, match=r"a\.PNG is a defect without a mask: expected one in line 4 of .*metadata"):
        index_dataset("hf", image_folder)


def test_columns_are_for_hugging_face_sets_only(image_folder: Path, btad: Path) -> None:
    with pytest.raises(ValueError, match=r"are for 'hf' data sets only; .* is read as 'btad'"):
        index_dataset("auto", btad, {"image": "shot"})

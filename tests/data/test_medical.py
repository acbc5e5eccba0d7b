"""OCT2017, APTOS 2019 and ISIC 2018 in tiny trees of their true form, split as in ReContrast (App. B)."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from pictures import photograph

from adpretrain.data import detect_layout, index_dataset
from adpretrain.data.layouts.aptos import TRAIN, index_aptos
from adpretrain.data.layouts.isic2018 import index_isic2018
from adpretrain.data.layouts.oct2017 import index_oct2017

CLASSES = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"


@pytest.fixture
def oct2017(tmp_path: Path) -> Path:
    """Two training images of every class, one test image; ``val`` as on Kaggle; an AppleDouble file."""
    for split, count in (("train", 2), ("test", 1), ("val", 1)):
        for kind in ("NORMAL", "CNV", "DME", "DRUSEN"):
            for number in range(count):
                photograph(tmp_path / split / kind / f"{kind}-10{number}-1.jpeg")
    (tmp_path / "train/NORMAL/._NORMAL-100-1.jpeg").touch()
    return tmp_path


def test_oct2017_trains_on_normal_images_only(oct2017: Path) -> None:
    samples = index_dataset("auto", oct2017)
    assert detect_layout(oct2017) == "oct2017"
    assert samples == index_dataset("oct2017", oct2017)
    assert Counter((s.category, s.split, s.defect) for s in samples) == {
        ("oct2017", "train", "good"): 2,
        ("oct2017", "test", "good"): 1,
        **{("oct2017", "test", kind): 1 for kind in ("cnv", "dme", "drusen")},
    }
    assert all(s.image.is_file() and s.mask is None for s in samples)
    assert all(s.image.parent.name == ("NORMAL" if s.defect == "good" else s.defect.upper()) for s in samples)


@pytest.mark.parametrize("lost", ["train/NORMAL", "test/DME"])
def test_an_oct2017_folder_that_is_missing_is_named(oct2017: Path, lost: str) -> None:
    for file in (oct2017 / lost).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"is not the whole OCT2017 set: there are no images in {lost}$"):
        index_oct2017(oct2017)


@pytest.fixture(scope="module")
def aptos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many normal images as are drawn and five more, and one of every other grade; the files are one."""
    root = tmp_path_factory.mktemp("aptos2019")
    first = photograph(root / "train_images/first.png")
    grades = ["0"] * (TRAIN + 5) + ["1", "2", "3", "4"]
    lines = [f"{(number * 7919) % 100_003:012x},{grade}" for number, grade in enumerate(grades)]
    for line in lines:
        os.link(first, first.with_name(f"{line.split(',')[0]}.png"))
    (root / "train.csv").write_text("\n".join(["id_code,diagnosis", *lines, ""]))
    (root / "test_images").mkdir()
    return root


def test_aptos_draws_a_thousand_normal_images(aptos: Path) -> None:
    samples = index_dataset("auto", aptos)
    assert detect_layout(aptos) == "aptos"
    assert Counter((s.split, s.defect) for s in samples) == {
        ("train", "good"): 1000,
        ("test", "good"): 5,
        **{("test", grade): 1 for grade in ("mild", "moderate", "severe", "proliferative")},
    }
    assert {(s.category, s.mask) for s in samples} == {("aptos", None)}
    listed = dict(line.split(",") for line in (aptos / "train.csv").read_text().split()[1:])
    assert all((listed[s.image.stem] == "0") == (s.defect == "good") for s in samples)
    assert index_aptos(aptos) == index_aptos(aptos)
    assert index_aptos(aptos, seed=1) != index_aptos(aptos)
    held_out = [[s.image for s in found if s.split == "test"] for found in (samples, index_aptos(aptos, seed=1))]
    assert held_out[0] != held_out[1]


def copied(listing: str, aptos: Path, tmp_path: Path) -> Path:
    (tmp_path / "train_images").symlink_to(aptos / "train_images", target_is_directory=True)
    (tmp_path / "train.csv").write_text(listing)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id_code,", "id,", "lacks the columns id_code; columns found: id, diagnosis"),
        (",4\n", ",5\n", "diagnosis '5' in line 1010 of .*train.csv is unknown; valid: 0, 1, 2, 3, 4"),
        (
            "000000000000,0",
            "absent,0",
            r"1 of 1009 images of .*train.csv are not in .*train_images, such as absent\.png",
        ),
        ("000000000000,0", "../first,0", r"names '\.\./first': expected the name of an image in"),
        (",0", ",1", "lists 0 images of diagnosis 0; 1000 are drawn to train on"),
    ],
)
def test_a_wrong_aptos_line_is_named(aptos: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (aptos / "train.csv").read_text()
    assert old in text
    with pytest.raises(ValueError, match=message):
        index_aptos(copied(text.replace(old, new), aptos, tmp_path))


def test_aptos_is_a_listing_and_images(aptos: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the APTOS set: expected train\.csv and train_images/ in it"):
        index_aptos(aptos / "train_images")


@pytest.fixture
def isic(tmp_path: Path) -> Path:
    """Three training images, two of nevi, and three validation images, one of a nevus."""
    for part, kinds in (("Training", (1, 1, 0)), ("Validation", (1, 0, 6))):
        stem, lines = f"ISIC2018_Task3_{part}", [CLASSES]
        for number, kind in enumerate(kinds):
            name = f"ISIC_00{number}{part[0]}"
            photograph(tmp_path / f"{stem}_Input" / f"{name}.jpg")
            lines.append(",".join([name, *("1.0" if column == kind else "0.0" for column in range(7))]) + "\n")
        (tmp_path / f"{stem}_Input/ATTRIBUTION.txt").touch()
        (tmp_path / f"{stem}_GroundTruth").mkdir()
        (tmp_path / f"{stem}_GroundTruth/{stem}_GroundTruth.csv").write_text("".join(lines))
    return tmp_path


def test_isic_trains_on_nevi_and_tests_on_the_validation_set(isic: Path) -> None:
    samples = index_dataset("auto", isic)
    assert detect_layout(isic) == "isic2018"
    assert [(s.image.name, s.defect, s.split) for s in samples] == [
        ("ISIC_000T.jpg", "good", "train"),
        ("ISIC_001T.jpg", "good", "train"),
        ("ISIC_000V.jpg", "good", "test"),
        ("ISIC_001V.jpg", "mel", "test"),
        ("ISIC_002V.jpg", "vasc", "test"),
    ]
    assert {(s.category, s.mask) for s in samples} == {("isic2018", None)}
    for part in ("Training", "Validation"):
        stem = f"ISIC2018_Task3_{part}_GroundTruth"
        (isic / stem / f"{stem}.csv").rename(isic / f"{stem}.csv")
    assert index_dataset("isic2018", isic) == samples


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "1.0,0.0,0.0,0.0,0.0,0.0,0.0",
            "1.0,1.0,0.0,0.0,0.0,0.0,0.0",
            "line 3 of .*has MEL '1.0', NV '1.0', .*one class",
        ),
        ("1.0,0.0,0.0,0.0,0.0,0.0,0.0", "0.5,0.0,0.0,0.0,0.0,0.0,0.0", "line 3 of .*has MEL '0.5', .*one class"),
        ("image,", "name,", "lacks the columns image; columns found: name, MEL"),
        ("ISIC_001V", "ISIC_999V", r"1 of 3 images .*are not in .*Validation_Input, such as ISIC_999V\.jpg"),
    ],
)
def test_a_wrong_isic_line_is_named(isic: Path, old: str, new: str, message: str) -> None:
    listing = isic / "ISIC2018_Task3_Validation_GroundTruth/ISIC2018_Task3_Validation_GroundTruth.csv"
    assert old in listing.read_text()
    listing.write_text(listing.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        index_isic2018(isic)


def test_what_isic_lacks_is_named(isic: Path) -> None:
    listing = isic / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
    text = listing.read_text()
    listing.write_text(CLASSES + "ISIC_002T,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n")
    with pytest.raises(ValueError, match=r"lists no image of NV: there is nothing to train on"):
        index_isic2018(isic)
    listing.write_text(text)
    (isic / "ISIC2018_Task3_Validation_Input").rename(isic / "moved")
    with pytest.raises(ValueError, match="expected the folder ISIC2018_Task3_Validation_Input in it"):
        index_isic2018(isic)
    listing.unlink()
    with pytest.raises(ValueError, match=r"expected ISIC2018_Task3_Training_GroundTruth/.*\.csv in it"):
        index_isic2018(isic)

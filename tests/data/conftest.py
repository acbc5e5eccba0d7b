"""Tiny trees in the true layouts of the public benchmarks, with what lies about in real copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import mask, photograph


@pytest.fixture
def mpdd(tmp_path: Path) -> Path:
    """MVTec's folders; capital suffixes, a checkpoint folder of a notebook, a thumbnail cache, an AppleDouble file."""
    root = tmp_path / "MPDD"
    for name in ("train/good/000.png", "train/good/001.PNG", "test/good/000.png", "test/hole/000.PNG"):
        photograph(root / "bracket_black" / name)
    mask(root / "bracket_black/ground_truth/hole/000_mask.PNG")
    photograph(root / "bracket_black/test/.ipynb_checkpoints/000.png")
    (root / "bracket_black/test/hole/Thumbs.db").touch()
    (root / "bracket_black/test/hole/._000.PNG").touch()
    (root / "__MACOSX/bracket_black/train/good").mkdir(parents=True)
    return root


@pytest.fixture
def loco(tmp_path: Path) -> Path:
    """Two logical anomalies, the first with two mask files of other values than 255."""
    root = tmp_path / "mvtec_loco"
    for name in ("train/good/000.png", "train/good/001.png", "validation/good/000.png", "test/good/000.png"):
        photograph(root / "breakfast_box" / name)
    for kind in ("logical_anomalies", "structural_anomalies"):
        photograph(root / "breakfast_box/test" / kind / "000.png")
        photograph(root / "breakfast_box/test" / kind / "001.png")
        mask(root / "breakfast_box/ground_truth" / kind / "000/000.png", (0, 0, 4, 4), value=1)
        mask(root / "breakfast_box/ground_truth" / kind / "000/001.png", (8, 4, 12, 8), value=206)
        mask(root / "breakfast_box/ground_truth" / kind / "001/000.png")
        (root / "breakfast_box/ground_truth" / kind / "000/Thumbs.db").touch()
    (root / "breakfast_box/defects_config.json").write_text("[]")
    return root


@pytest.fixture
def mvtec_3d(tmp_path: Path) -> Path:
    """Photographs in rgb, point clouds in xyz (not to be taken for images), masks in gt, also of the good."""
    root = tmp_path / "mvtec_3d"
    kinds = ("train/good", "validation/good", "test/good", "test/crack")
    for kind in kinds:
        for stem in ("000", "001"):
            photograph(root / "bagel" / kind / "rgb" / f"{stem}.png")
            (root / "bagel" / kind / "xyz").mkdir(exist_ok=True)
            (root / "bagel" / kind / "xyz" / f"{stem}.tiff").touch()
            if kind.startswith("test"):
                mask(root / "bagel" / kind / "gt" / f"{stem}.png", value=255 if "crack" in kind else 0)
    (root / "bagel/calibration").mkdir()
    return root


@pytest.fixture
def mvtec_ad_2(tmp_path: Path) -> Path:
    """Photographs in regular and other light, private test images without labels, an AppleDouble file."""
    root = tmp_path / "mvtec_ad_2"
    for name in ("train/good/000_regular.png", "train/good/001_regular.png", "validation/good/000_regular.png"):
        photograph(root / "fruit_jelly" / name)
    for name in ("good/000_regular.png", "good/000_overexposed.png", "bad/000_regular.png", "bad/000_shift_1.png"):
        photograph(root / "fruit_jelly/test_public" / name)
    for stem in ("000_regular", "000_shift_1"):
        mask(root / f"fruit_jelly/test_public/ground_truth/bad/{stem}_mask.png")
    (root / "fruit_jelly/test_public/ground_truth/bad/._000_regular_mask.png").touch()
    for name in ("test_private/000_regular.png", "test_private_mixed/000_mixed.png"):
        photograph(root / "fruit_jelly" / name)
    return root


@pytest.fixture
def btad(tmp_path: Path) -> Path:
    """01: .bmp photographs, .png masks; 02: .png; 03: .bmp photographs and masks."""
    root = tmp_path / "BTech_Dataset_transformed"
    for category, image, truth in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for name in ("train/ok/0000", "train/ok/0001", "test/ok/0000", "test/ko/0000"):
            photograph(root / category / f"{name}.{image}")
        mask(root / category / f"ground_truth/ko/0000.{truth}", value=1)
    return root


VISA_HEADER = "object,split,label,image,mask\n"
VISA_LINES = (
    "candle,train,normal,candle/Data/Images/Normal/0000.JPG,\n"
    "candle,test,normal,candle/Data/Images/Normal/0001.JPG,\n"
    "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n"
    "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,\n"
)


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    """Capital suffixes, masks with the value 1, photographs that the split file does not list."""
    root = tmp_path / "VisA"
    for category in ("candle", "pcb1"):
        for name in ("Normal/0000.JPG", "Normal/0001.JPG", "Anomaly/000.JPG", "Anomaly/thumb_000.JPG"):
            photograph(root / category / "Data/Images" / name)
        mask(root / category / "Data/Masks/Anomaly/000.png", value=1)
        (root / category / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text(VISA_HEADER + VISA_LINES)
    return root


@pytest.fixture
def rewrite_visa(visa: Path) -> Callable[[str, str], Path]:
    """Replace a piece of the split file's lines."""

    def rewrite(old: str, new: str) -> Path:
        assert old in VISA_HEADER + VISA_LINES
        (visa / "split_csv/1cls.csv").write_text((VISA_HEADER + VISA_LINES).replace(old, new), encoding="utf-8")
        return visa

    return rewrite

"""Samples as tensors: masks, missing and corrupted files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.data import ImageDataset, Sample
from adpretrain.preprocess import Preprocess

PREPROCESS = Preprocess(image_size=16)


def picture(path: Path, size: tuple[int, int] = (32, 24), value: int = 200) -> Path:
    Image.new("RGB", size, (value, 10, 10)).save(path)
    return path


def defect_mask(path: Path, size: tuple[int, int] = (32, 24)) -> Path:
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[: size[1] // 2, : size[0] // 4] = 255
    Image.fromarray(pixels).save(path)
    return path


def sample(image: Path, mask: Path | None = None, defect: str = "good", view: str | None = None) -> Sample:
    return Sample(image, mask, "tile", defect, view, "test")


@pytest.fixture
def mixed(tmp_path: Path) -> list[Sample]:
    """Good, truncated, missing, defect, defect with a missing mask, defect with a mask of another size."""
    cut = picture(tmp_path / "cut.png", (64, 64))
    cut.write_bytes(cut.read_bytes()[:60])
    return [
        sample(picture(tmp_path / "good.png")),
        sample(cut),
        sample(tmp_path / "gone.png"),
        sample(picture(tmp_path / "bad.png"), defect_mask(tmp_path / "bad_mask.png"), "scratch", "C2"),
        sample(picture(tmp_path / "bad2.png"), tmp_path / "gone_mask.png", "scratch"),
        sample(picture(tmp_path / "bad3.png"), defect_mask(tmp_path / "other.png", (24, 32)), "scratch"),
    ]


def test_items_hold_what_a_detector_needs(mixed: list[Sample]) -> None:
    data = ImageDataset([mixed[0], mixed[3]], PREPROCESS)
    good, bad = data[0], data[1]
    assert len(data) == 2
    assert torch.equal(good["image"], PREPROCESS(Image.open(mixed[0].image)))
    assert not good["mask"].any()
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:8, :4] = True
    assert torch.equal(bad["mask"], expected)
    rest = {key: bad[key] for key in ("label", "category", "defect", "view", "path", "index")}
    path = str(mixed[3].image)
    assert rest == {"label": 1, "category": "tile", "defect": "scratch", "view": "C2", "path": path, "index": 1}
    assert (good["label"], good["view"]) == (0, "")
    assert (mixed[0].anomalous, mixed[3].anomalous) == (False, True)


def test_items_collate(mixed: list[Sample]) -> None:
    loader = torch.utils.data.DataLoader(ImageDataset([mixed[0], mixed[3]], PREPROCESS), batch_size=2)
    (batch,) = loader
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["mask"].shape == (2, 16, 16)
    assert batch["label"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (1, r"cannot read image .*cut\.png"),
        (2, r"image not found: .*gone\.png"),
        (4, r"image not found: .*gone_mask\.png"),
        (5, r"mask .*other\.png is 24x32 but its image .*bad3\.png is 32x24 pixels"),
    ],
)
def test_a_bad_file_raises_when_it_is_read(mixed: list[Sample], index: int, message: str) -> None:
    data = ImageDataset(mixed, PREPROCESS)
    assert len(data) == 6
    assert data[0]["index"] == 0
    with pytest.raises(ValueError, match=message):
        data[index]

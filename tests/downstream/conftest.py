"""A small product (textured tiles), its photographs on disk, and a saved untrained extractor, made once per
session.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import SIZE, tile
from PIL import Image

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Raw features of `drawn.photographs`."""
    return load_backbone("lite0", image_size=SIZE)


@pytest.fixture(scope="session")
def extractor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lite0 without a projector, at 64 pixels: quick, and real."""
    folder = tmp_path_factory.mktemp("extractor") / "raw"
    return ADExtractor(load_backbone("lite0", image_size=64), projector=None).save_pretrained(folder)


@pytest.fixture
def write_tiles(tmp_path: Path) -> Callable[..., Path]:
    """write_tiles("shots", range(4)) -> folder of good tiles; with blob=True, of defective ones."""

    def write(folder: str, seeds: range, blob: bool = False, prefix: str = "tile") -> Path:
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            tile(seed, blob).save(target / f"{prefix}_{seed}.png")
        return target

    return write


@pytest.fixture(scope="session")
def tile_products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products of tiles in MVTec's layout: 6 good training images, 3 good and 4 with a marked disc to score."""
    root = tmp_path_factory.mktemp("mvtec")
    for number, name in enumerate(("slab", "tile")):
        for split, kind, count in (("train", "good", 6), ("test", "good", 3), ("test", "disc", 4)):
            (root / name / split / kind).mkdir(parents=True)
            for index in range(count):
                seed = 100 * number + index + (50 if split == "test" else 0)
                picture = tile(seed, blob=kind == "disc")
                picture.save(root / name / split / kind / f"{index:03}.png")
                if kind == "disc":
                    target = root / name / "ground_truth" / kind / f"{index:03}_mask.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(((np.asarray(picture)[..., 0] == 10) * 255).astype(np.uint8)).save(target)
    return root

"""SPADE equals its two stages written with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, photographs
from scipy import ndimage

from adpretrain.backbones import Backbone
from downstream.detectors.spade import SPADE, SPADEConfig
from downstream.embedding import Embedding, EmbeddingConfig


@pytest.mark.parametrize(("images", "patches"), [(3, 1), (2, 5), (50, 1)])
def test_equals_the_two_stages(backbone: Backbone, images: int, patches: int) -> None:
    """K = 50 of 7 images is all of them."""
    normal, queries = photographs(7, 0), photographs(2, 1)
    found = SPADE(backbone, SPADEConfig(images=images, patches=patches)).fit(normal.split(3)).predict(queries)
    embedding = Embedding(EmbeddingConfig(patch=1))
    gallery, rows = (embedding(backbone(x)).double().numpy() for x in (normal, queries))
    known, asked = (backbone(x)[-1].double().mean((2, 3)).numpy() for x in (normal, queries))
    for index in range(2):
        distances = np.linalg.norm(known - asked[index], axis=1)
        nearest = np.argsort(distances)[:images]
        assert float(found.scores[index]) == pytest.approx(distances[nearest].mean(), rel=1e-4)
        patches_ND = gallery[nearest].reshape(-1, gallery.shape[-1])
        grid = np.array(
            [
                [np.sort(np.linalg.norm(patches_ND - row, axis=1))[:patches].mean() for row in line]
                for line in rows[index]
            ]
        )
        pixels = F.interpolate(torch.from_numpy(grid)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
        expected = ndimage.gaussian_filter(pixels[0, 0].numpy(), 4)
        np.testing.assert_allclose(found.maps[index].numpy(), expected, rtol=1e-4)


def test_only_the_nearest_images_are_searched(backbone: Backbone) -> None:
    """Two kinds of normal images: dark ones must not explain the patches of a bright one."""
    bright, dark = photographs(4, 0) * 0.2 + 0.8, photographs(4, 1) * 0.2
    detector = SPADE(backbone, SPADEConfig(images=4)).fit([bright, dark])
    alone = SPADE(backbone, SPADEConfig(images=4)).fit([bright])
    query = photographs(1, 2) * 0.2 + 0.8
    torch.testing.assert_close(detector.predict(query).maps, alone.predict(query).maps)


def test_mistakes_are_named(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="images 0 must be at least 1"):
        SPADEConfig(images=0)
    with pytest.raises(ValueError, match="65 nearest patches cannot be found among 64"):
        SPADE(backbone, SPADEConfig(patches=65)).fit([photographs(1, 0)])
    with pytest.raises(ValueError, match=r"memory bank of 192 patches .* raise max_bank_bytes"):
        SPADE(backbone, SPADEConfig(max_bank_bytes=50_000)).fit(photographs(3, 0).split(1))

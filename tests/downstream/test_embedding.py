"""Patch embeddings equal the equations written as loops, and the released code's order of operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adpretrain.backbones import FeatureMaps, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detectors.padim import PaDiM
from downstream.detectors.patchcore import PatchCore, PatchCoreConfig
from downstream.detectors.reconpatch import ReConPatch
from downstream.detectors.spade import SPADE
from downstream.embedding import Embedding, EmbeddingConfig, pool_channels, random_reducer
from downstream.extracts import Adapted


def two_levels(seed: int = 0) -> list[Tensor]:
    """Level 0 of 12 channels on 9 x 8 tokens, level 1 of 20 channels on 5 x 4."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 12, 9, 8, generator=rng), torch.randn(2, 20, 5, 4, generator=rng)]


def bins(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Adaptive average pooling of the last axis by its definition: bin i covers floor(iL/d) .. ceil((i+1)L/d)."""
    length = values.shape[-1]
    edges = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    return np.stack([values[..., start:stop].mean(-1) for start, stop in edges], -1)


def naive_patches(
    feature_CHW: NDArray[np.float64], patch: int, stride: int, dim: int | None, form: str
) -> NDArray[np.float64]:
    """Eq. 1-3 position by position: [H', W', dim]."""
    channels, height, width = feature_CHW.shape
    reach, rows = patch // 2, []
    for h in range(0, height, stride):
        row = []
        for w in range(0, width, stride):
            values = np.zeros((channels, patch, patch))
            for a in range(-reach, reach + 1):
                for b in range(-reach, reach + 1):
                    if 0 <= h + a < height and 0 <= w + b < width:
                        values[:, a + reach, b + reach] = feature_CHW[:, h + a, w + b]
            if form == "released":
                row.append(bins(values.reshape(-1), dim or channels))
            else:
                row.append(bins(values.mean((1, 2)), dim or channels))
        rows.append(row)
    return np.array(rows)


def naive_embedding(features: list[Tensor], config: EmbeddingConfig) -> NDArray[np.float64]:
    """Neighbourhoods, bilinear to the first level's grid, pooled per level and overall: [B, H', W', D]."""
    images = []
    for image in range(len(features[0])):
        grids = []
        for level in features:
            patches = naive_patches(
                level[image].double().numpy(), config.patch, config.stride, config.level_dim, config.form
            )
            size = grids[0].shape[:2] if grids else patches.shape[:2]
            chw = torch.from_numpy(patches).permute(2, 0, 1)[None]
            resized = F.interpolate(chw, size=size, mode="bilinear", align_corners=False)
            grids.append(resized[0].permute(1, 2, 0).numpy())
        joined = np.concatenate(grids, -1)
        images.append(bins(joined, config.target_dim) if config.target_dim else joined)
    return np.stack(images)


@pytest.mark.parametrize(
    "config",
    [
        EmbeddingConfig(),
        EmbeddingConfig(patch=1),
        EmbeddingConfig(patch=5, stride=2, level_dim=7),
        EmbeddingConfig(patch=1, stride=3),
        EmbeddingConfig(level_dim=16, target_dim=24),
        EmbeddingConfig(level_dim=16, target_dim=24, form="released"),
        EmbeddingConfig(level_dim=9, stride=2, form="released"),
    ],
    ids=str,
)
def test_equals_the_loop_over_positions(config: EmbeddingConfig) -> None:
    features = two_levels()
    found = Embedding(config)(features)
    expected = naive_embedding(features, config)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 6, 12])
def test_both_forms_agree_where_whole_channels_are_pooled(dim: int) -> None:
    """If level_dim divides C_l the released code's mixed pooling is the paper's; else it is not."""
    feature = two_levels()[:1]
    paper, released = (Embedding(EmbeddingConfig(level_dim=dim, form=form)) for form in ("paper", "released"))  # type: ignore[arg-type]
    flat = F.unfold(feature[0], 3, padding=1).transpose(1, 2)  # the released code: unfold, flatten, pool
    by_hand = F.adaptive_avg_pool1d(flat, dim).unflatten(1, (9, 8))
    torch.testing.assert_close(paper(feature), by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(released(feature), by_hand, rtol=1e-5, atol=1e-6)
    mixed = [Embedding(EmbeddingConfig(level_dim=16, form=form))(feature) for form in ("paper", "released")]  # type: ignore[arg-type]
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


def test_the_common_grid_is_the_largest_wherever_it_stands() -> None:
    small_first = two_levels()[::-1]
    found = Embedding(EmbeddingConfig(patch=1))(small_first)
    assert found.shape == (2, 9, 8, 32)
    torch.testing.assert_close(found[..., 20:], small_first[1].permute(0, 2, 3, 1))


def test_levels_are_chosen_by_number() -> None:
    features = two_levels()
    last = Embedding(EmbeddingConfig(levels=[-1], patch=1))(features)
    torch.testing.assert_close(last, features[1].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"levels \[2\] do not fit features of 2 levels; choose from 0 to 1"):
        Embedding(EmbeddingConfig(levels=[2]))(features)


def test_one_image_at_a_time_equals_a_batch() -> None:
    features = load_backbone("lite0", image_size=64)(torch.rand(3, 3, 64, 64))
    embedding = Embedding(EmbeddingConfig(target_dim=50, reduction="project"))
    whole = embedding(features)
    parts = torch.cat([embedding([level[i : i + 1] for level in features]) for i in range(3)])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    features = [level.bfloat16() for level in two_levels()]
    found = Embedding()(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Embedding()([level.float() for level in features]))


def test_random_reductions() -> None:
    features = two_levels()
    full = Embedding(EmbeddingConfig(patch=1))(features)
    chosen = Embedding(EmbeddingConfig(patch=1, target_dim=10, reduction="choose", seed=3))
    found = chosen(features)
    assert chosen.reducer is not None
    torch.testing.assert_close(found, full[..., chosen.reducer])
    assert len(chosen.reducer.unique()) == 10

    orthogonal = random_reducer(32, 10, "orthogonal").double()
    torch.testing.assert_close(orthogonal.T @ orthogonal, torch.eye(10).double(), rtol=0, atol=1e-6)
    projected = Embedding(EmbeddingConfig(patch=1, target_dim=10, reduction="orthogonal"))(features)
    torch.testing.assert_close(projected.double(), full.double() @ orthogonal, rtol=1e-5, atol=1e-5)

    # Johnson-Lindenstrauss: 400 pairs in 4096 -> 1024 channels keep squared distances to within 6 / sqrt(512).
    points = torch.randn(800, 4096, generator=torch.Generator().manual_seed(1))
    moved = points @ random_reducer(4096, 1024, "project")
    ratio = (moved[::2] - moved[1::2]).square().sum(1) / (points[::2] - points[1::2]).square().sum(1)
    assert (ratio - 1).abs().max() < 6 / 512**0.5
    assert abs(float(ratio.mean()) - 1) < 0.02
    with pytest.raises(ValueError, match="target_dim 33 exceeds the 32 channels"):
        Embedding(EmbeddingConfig(target_dim=33, reduction="choose"))(features)


def test_the_same_reduction_from_the_same_seed_only() -> None:
    for reduction in ("choose", "project", "orthogonal"):
        first, again, other = (random_reducer(64, 8, reduction, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_pooling_up_repeats_channels() -> None:
    feature = torch.randn(1, 4, 2, 3)
    torch.testing.assert_close(pool_channels(feature, 8), feature.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 2}, "patch 2 must be odd"),
        ({"stride": 0}, "stride 0 must be at least 1"),
        ({"level_dim": 0}, "level_dim 0 must be at least 1"),
        ({"reduction": "pca"}, "reduction 'pca' is unknown; choose one of"),
        ({"reduction": "choose"}, "needs target_dim"),
        ({"form": "x"}, "form 'x' is unknown"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingConfig(**options)  # type: ignore[arg-type]


def test_a_reduction_drawn_for_other_features_is_refused() -> None:
    embedding = Embedding(EmbeddingConfig(target_dim=5, reduction="project"))
    embedding(two_levels())
    with pytest.raises(ValueError, match="12 channels, the projection was drawn for 32"):
        embedding(two_levels()[:1])
    with pytest.raises(ValueError, match=r"features must be \[B, C, H, W\] floats"):
        embedding([torch.zeros(1, 2, 3)])


def test_levels_of_the_papers() -> None:
    """Stages 2 and 3 of a residual network for PatchCore and ReConPatch, 1 to 3 for PaDiM and SPADE, whatever wraps it;
    elsewhere all, as they were until now."""
    whole = load_backbone("timm/resnet18", pretrained=False, image_size=64)
    late = load_backbone("timm/resnet18", pretrained=False, image_size=64, levels=[2, 4])

    def chosen(extract: object) -> list[list[int] | str | None]:
        kinds = [kind(extract).config for kind in (PatchCore, PaDiM, SPADE)]  # type: ignore[operator]
        return [config.embedding.levels for config in (*kinds, ReConPatch(extract).config.memory)]  # type: ignore[arg-type]

    for extract in (whole, ADExtractor(whole), Adapted(whole, whole.preprocess)):
        assert chosen(extract) == [[1, 2], [0, 1, 2], [0, 1, 2], [1, 2]]
    assert chosen(late) == [[0], [0], [0], [0]]
    vit = load_backbone("timm/vit_tiny_patch16_224", pretrained=False, image_size=64)

    def function(images: Tensor) -> FeatureMaps:
        return whole(images)

    assert chosen(load_backbone("lite0", image_size=64)) == [[0, 1]] * 4  # stages 2 and 3
    for extract in (vit, function):
        assert chosen(extract) == [None] * 4
    everything = PatchCore(whole, PatchCoreConfig(EmbeddingConfig(levels=None)))
    assert everything.config.embedding.levels is None

"""Batches of residuals: the cache against the step-by-step way, and the choice of tokens."""

from pathlib import Path

import pytest
import torch
from products import make_synthetic
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from adpretrain.backbones import load_backbone
from adpretrain.backbones.dinov2 import DinoV2
from adpretrain.config import ReferencesConfig
from adpretrain.data import Sample
from adpretrain.data.layouts.realiad import index_realiad
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.training.batches import OnlineBatches, ResidualBatch, encode_batch, label, thin, token_labels
from adpretrain.training.cache import CachedBatches
from adpretrain.training.dataset import PretrainingSet, Requests, StepBatches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PretrainingSet:
    root = make_synthetic(tmp_path_factory.mktemp("set"), 2, 5, 3, size=128, seed=1, workers=1, progress=False)
    return PretrainingSet(
        index_realiad(root), load_backbone("lite0", image_size=64).preprocess, [1, 3], seed=5, augment="none"
    )


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    backbone = load_backbone("lite0", image_size=64)
    return ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels)))


def by_key(batches: list[ResidualBatch]) -> dict[tuple[int, int], list[torch.Tensor]]:
    return {key: [level[row] for level in batch.views[0]] for batch in batches for row, key in enumerate(batch.keys)}


def test_cached_residuals_are_those_computed_step_by_step(data: PretrainingSet, extractor: ADExtractor) -> None:
    steps = StepBatches(len(data), 4, 0, 8, seed=5)  # epochs 0 and 1: both draws of the cache
    online = by_key(list(OnlineBatches(extractor, data, 0, CPU)(steps)))
    cached = by_key(list(CachedBatches(extractor, data, CPU, draws=2)(steps)))
    assert online.keys() == cached.keys()
    assert {epoch for epoch, _ in online} == {0, 1}
    for key, levels in online.items():
        for level, other in zip(levels, cached[key], strict=True):
            torch.testing.assert_close(other, level, rtol=2e-3, atol=2e-3)  # the cache keeps half precision


def test_online_residuals_match_one_image_with_its_own_references(data: PretrainingSet, extractor: ADExtractor) -> None:
    (batch,) = OnlineBatches(extractor, data, 0, CPU)(StepBatches(len(data), 6, 0, 1, seed=5))
    counts = [len(data.draw_references(index, epoch)) for epoch, index in batch.keys]
    assert counts == sorted(counts)
    assert set(counts) <= {1, 3}
    for row, (epoch, index) in enumerate(batch.keys):
        pictures = [data.pixels(other) for other in (index, *data.draw_references(index, epoch))]
        image, references = data.preprocess.normalise(torch.stack(pictures)).tensor_split([1])
        alone = extractor(image, extractor.encode_references(references))
        for level, expected in zip(batch.views[0], alone, strict=True):
            torch.testing.assert_close(level[row], expected[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five products of six normal photographs and two defects."""
    root = make_synthetic(tmp_path_factory.mktemp("many"), 5, 6, 2, size=64, seed=2, workers=1, progress=False)
    return index_realiad(root)


def vit(side: int) -> ADExtractor:
    """Random weights: fast, and attention spans the picture as in the real ones."""
    torch.manual_seed(0)
    geometry = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    return ADExtractor(DinoV2(Dinov2Model(geometry), "small", side, [1, 2]))


@pytest.fixture(scope="module")
def small_vit() -> ADExtractor:
    return vit(56)


def pooled(products: list[Sample], extractor: ADExtractor, augment: str = "none", **options: int) -> PretrainingSet:
    references = ReferencesConfig(**{"pool": 4, **options})
    return PretrainingSet(products, extractor.preprocess, [1, 3], 5, augment, references)


def residuals(data: PretrainingSet, extractor: ADExtractor, start: int, room: int) -> list[ResidualBatch]:
    """Steps of three images (three epochs in 39) with room for some pools of features."""
    steps = StepBatches(len(data), 3, start, 39, seed=5)
    batches, features, limit = [], {}, room * 4  # photographs
    for request in Requests(steps, data.draws, room):
        batches.append(encode_batch(extractor, data.load(request), features))
        assert len(features) <= limit
    return batches


def equal(ours: list[ResidualBatch], theirs: list[ResidualBatch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(
        a.keys == b.keys and all(map(torch.equal, sum(a.views, []), sum(b.views, [])))  # noqa: RUF017
        for a, b in pairs
    )


@pytest.mark.parametrize("refresh", [1, 2])
def test_kept_features_never_change_a_bit(products: list[Sample], small_vit: ADExtractor, refresh: int) -> None:
    """Room for all pools, for three of the five (the others go and come back), and resumed within an epoch."""
    data = pooled(products, small_vit, refresh=refresh)
    whole = residuals(data, small_vit, 0, room=5)
    scarce = residuals(data, small_vit, 0, room=3)
    assert equal(whole, scarce)
    assert equal(whole[17:], residuals(data, small_vit, 17, room=5))
    views = 3 * 39
    pools = (sum(batch.encoded for batch in batches) - views for batches in (whole, scarce))
    assert next(pools) == 5 * 4 * (3 if refresh == 1 else 2) < next(pools)  # each pool once while it serves


def test_kept_features_give_the_residuals_of_encoding_every_time(
    products: list[Sample], small_vit: ADExtractor
) -> None:
    kept, not_kept = (
        list(OnlineBatches(small_vit, data, 0, CPU)(StepBatches(len(data), 8, 0, 10, seed=5)))
        for data in (pooled(products, small_vit), pooled(products, small_vit, cache_mb=0))
    )
    assert [batch.keys for batch in kept] == [batch.keys for batch in not_kept]
    for ours, theirs in zip(kept, not_kept, strict=True):
        for level, other in zip(sum(ours.views, []), sum(theirs.views, []), strict=True):  # noqa: RUF017
            torch.testing.assert_close(level, other, rtol=1e-5, atol=1e-6)
    assert sum(batch.encoded for batch in kept) < sum(batch.encoded for batch in not_kept)


def test_features_keep_to_their_limit(products: list[Sample]) -> None:
    extractor = vit(280)  # 400 tokens of 2 x 32 channels: two pools in 1 MiB
    data = pooled(products, extractor, cache_mb=1)
    online = OnlineBatches(extractor, data, 0, CPU)
    steps = StepBatches(len(data), 2, 0, 15, seed=5)
    most, features = 0, {}
    for request in Requests(steps, data.draws, online._pools_that_fit(data.draws.config)):
        encode_batch(extractor, data.load(request), features)
        held = {level.untyped_storage().data_ptr(): level.untyped_storage() for f in features.values() for level in f}
        most = max(most, sum(storage.nbytes() for storage in held.values()))
    assert 0.5 * 2**20 < most <= 2**20
    with pytest.raises(ValueError, match=r"images of \d categories and views needs .*room for 2: raise it"):
        list(online(StepBatches(len(data), 8, 0, 1, seed=5)))


def test_workers_load_what_the_main_process_would(products: list[Sample], small_vit: ADExtractor) -> None:
    data = pooled(products, small_vit, together=2, pool=5)
    steps = StepBatches(len(data), 8, 0, 6, seed=5, blocks=data.draws.blocks)
    alone, helped = (list(OnlineBatches(small_vit, data, workers, CPU)(steps)) for workers in (0, 2))
    assert equal(alone, helped)


def test_images_that_share_references_are_matched_with_their_own(
    products: list[Sample], small_vit: ADExtractor
) -> None:
    data = pooled(products, small_vit, "epoch", together=3, pool=0)
    (batch,) = OnlineBatches(small_vit, data, 0, CPU)(StepBatches(len(data), 9, 0, 1, 5, blocks=data.draws.blocks))
    assert batch.encoded < 2 * 9 + sum(len(data.draw_references(index, epoch)) for epoch, index in batch.keys)
    for row, (epoch, index) in enumerate(batch.keys):
        pictures = torch.stack([data.pixels(other) for other in data.draw_references(index, epoch)])
        banks = small_vit.encode_references(data.preprocess.normalise(pictures))
        alone = small_vit(data.preprocess.normalise(data.views(index, epoch)), banks)
        for view in range(2):
            for level, expected in zip(batch.views[view], alone, strict=True):
                torch.testing.assert_close(level[row], expected[view], rtol=1e-4, atol=1e-5)


def test_the_cache_on_disk_is_reused_and_another_setting_makes_another(
    data: PretrainingSet, extractor: ADExtractor, tmp_path: Path
) -> None:
    first = CachedBatches(extractor, data, CPU, draws=1, folder=str(tmp_path))
    (file,) = tmp_path.iterdir()
    stored, stamp = load_file(file), file.stat().st_mtime_ns
    again = CachedBatches(extractor, data, CPU, draws=1, folder=str(tmp_path))
    assert file.stat().st_mtime_ns == stamp
    for level, (a, b) in enumerate(zip(first.levels, again.levels, strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(stored[f"level_{level}"], a)
    CachedBatches(extractor, data, CPU, draws=2, folder=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(file.read_bytes()[:1000])  # truncated: made again, not trusted
    assert torch.equal(CachedBatches(extractor, data, CPU, draws=1, folder=str(tmp_path)).levels[0], first.levels[0])


def test_thinning_keeps_anomalous_tokens_first_and_pairs_every_view(data: PretrainingSet) -> None:
    torch.manual_seed(0)
    maps = torch.arange(64.0).reshape(1, 1, 8, 8).expand(2, 3, 8, 8)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :8, :24] = True  # three anomalous tokens
    masks[1] = True
    batch = label(ResidualBatch([[maps], [maps + 100]], masks, [(0, 7), (0, 8)], []))
    assert torch.equal(batch.labels[0], token_labels(masks, (8, 8)))
    thinned = thin(batch, [(0, 7), (0, 8)], 16, seed=1)
    assert thinned.views[0][0].shape == (2, 3, 1, 16)
    assert torch.equal(thinned.views[1][0], thinned.views[0][0] + 100)
    assert set(thinned.views[0][0][0, 0, 0].tolist()) >= {0.0, 1.0, 2.0}
    assert thinned.labels[0][0].sum() == 3
    assert thinned.labels[0][1].sum() == 16  # nothing normal to fill up with
    for row in range(2):
        chosen = thinned.views[0][0][row, 0, 0].long()
        assert len(set(chosen.tolist())) == 16
        assert torch.equal(batch.labels[0][row].flatten()[chosen], thinned.labels[0][row, 0])
    again = thin(batch, [(0, 7), (0, 8)], 16, seed=1)
    assert torch.equal(again.views[0][0], thinned.views[0][0])
    assert not torch.equal(thin(batch, [(1, 7), (1, 8)], 16, seed=1).views[0][0], thinned.views[0][0])

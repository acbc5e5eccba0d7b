"""Batches of residuals: the cache against the step-by-step way, and the choice of tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adpretrain.backbones import load_backbone
from adpretrain.batches import CachedBatches, OnlineBatches, ResidualBatch, label, thin
from adpretrain.conditioning import Conditioning
from adpretrain.data import index_realiad
from adpretrain.data.pairs import PretrainingSet, StepBatches, token_labels
from adpretrain.data.synthetic import make_synthetic
from adpretrain.extractor import ADExtractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PretrainingSet:
    root = make_synthetic(tmp_path_factory.mktemp("set"), 2, 5, 3, size=128, seed=1, workers=1, progress=False)
    return PretrainingSet(
        index_realiad(root), load_backbone("filterbank", image_size=64).preprocess, [1, 3], seed=5, augment="none"
    )


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    backbone = load_backbone("filterbank", image_size=64)
    return ADExtractor(backbone, conditioning=Conditioning(backbone.channels))


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


def test_the_cache_on_disk_is_reused_and_another_setting_makes_another(
    data: PretrainingSet, extractor: ADExtractor, tmp_path: Path
) -> None:
    first = CachedBatches(extractor, data, CPU, draws=1, folder=str(tmp_path))
    (file,) = tmp_path.iterdir()
    stored, stamp = load_file(file), file.stat().st_mtime_ns
    again = CachedBatches(extractor, data, CPU, draws=1, folder=str(tmp_path))
    assert file.stat().st_mtime_ns == stamp
    for level, a, b in zip(range(4), first.levels, again.levels, strict=True):
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

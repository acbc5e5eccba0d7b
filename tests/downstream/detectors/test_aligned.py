"""References of its own for every image equal the same references set by hand, one image at a time."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from adpretrain.local_scale import LocalScale
from adpretrain.references import AlignedReferences
from downstream.detectors.aligned import AlignedFeatureNorm, AlignedFeatureNormConfig
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig

SIZE, SHOTS = 64, 2


@pytest.fixture(scope="module")
def extractor() -> ADExtractor:
    backbone = load_backbone("lite0", image_size=SIZE)
    return ADExtractor(backbone, local_scale=LocalScale(len(backbone.channels)))


def photographs(count: int, seed: int) -> Tensor:
    """Blocky random pictures, some bright on the left and some on the right, so that alignment has a choice."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    coarse[::2, :, :, :4] += 1.5
    coarse[1::2, :, :, 4:] += 1.5
    images = torch.nn.functional.interpolate(coarse / 2.5, size=SIZE, mode="bilinear")
    return (images + 0.05 * torch.rand(count, 3, SIZE, SIZE, generator=generator)).clamp(0, 1)


def by_hand(extractor: ADExtractor, pool: Tensor, image: Tensor, left_out: int | None = None) -> tuple[float, Tensor]:
    """One image against the K best aligned pool images, through `set_references`."""
    aligned = AlignedReferences(extractor.encode(pool)[0])
    order = aligned.choose(extractor.encode(image[None])[0], len(pool))[0].tolist()
    chosen = [index for index in order if index != left_out][:SHOTS]
    prediction = FeatureNorm(extractor, FeatureNormConfig(SIZE)).fit([pool[chosen]]).predict(image[None])
    return float(prediction.scores[0]), prediction.maps[0]


def test_prediction_equals_references_set_by_hand(extractor: ADExtractor) -> None:
    pool, images = photographs(6, seed=0), photographs(3, seed=1)
    found = (
        AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=SHOTS)).fit(pool.split(4)).predict(images)
    )
    for index, image in enumerate(images):
        score, map_SS = by_hand(extractor, pool, image)
        assert float(found.scores[index]) == pytest.approx(score, rel=1e-5)
        torch.testing.assert_close(found.maps[index], map_SS, rtol=1e-4, atol=1e-5)


def test_leave_one_out_never_uses_the_image_itself(extractor: ADExtractor) -> None:
    pool = photographs(5, seed=2)
    found = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=SHOTS)).fit([pool]).leave_one_out(pool)
    for index, image in enumerate(pool):
        score, _ = by_hand(extractor, pool, image, left_out=index)
        assert float(found.scores[index]) == pytest.approx(score, rel=1e-5)


def test_each_image_gets_the_references_that_look_like_it(extractor: ADExtractor) -> None:
    """Bright-left pictures must be compared with bright-left ones: lower scores than with the other kind."""
    pool, images = photographs(8, seed=3), photographs(4, seed=4)
    aligned = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=4)).fit([pool]).predict(images).scores
    right_only = FeatureNorm(extractor, FeatureNormConfig(SIZE)).fit([pool[1::2]]).predict(images).scores
    assert bool((aligned[0::2] < right_only[0::2]).all())  # images 0 and 2 are bright on the left


@pytest.mark.parametrize("known", [True, False])
def test_a_pool_that_outgrows_the_memory_is_refused_before_it_does(extractor: ADExtractor, known: bool) -> None:
    """Of a list the number of images is known at the first batch; an iterator is stopped at the batch too many."""
    pool, read = photographs(8, seed=5), []

    def batches() -> Iterator[Tensor]:
        for batch in pool.split(2):
            read.append(len(batch))
            yield batch

    one = sum(level[0].nbytes for level in extractor.encode(pool[:1]))
    enough = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=SHOTS, max_pool_bytes=8 * one))
    free = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=SHOTS)).fit([pool]).predict(pool[:2])
    torch.testing.assert_close(enough.fit(pool.split(4)).predict(pool[:2]).maps, free.maps, rtol=1e-4, atol=1e-5)
    small = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=SHOTS, max_pool_bytes=5 * one))
    with pytest.raises(ValueError, match=rf"a pool of {8 if known else 6} images needs .*raise max_pool_bytes"):
        small.fit(pool.split(2) if known else batches())
    assert known or read == [2, 2, 2]


def test_mistakes_are_named(extractor: ADExtractor) -> None:
    detector = AlignedFeatureNorm(extractor, AlignedFeatureNormConfig(SIZE, shots=5))
    with pytest.raises(ValueError, match=r"call fit\(normal_batches\) or from_pretrained first"):
        detector.predict(photographs(1, seed=0))
    with pytest.raises(ValueError, match="K = 5 aligned references cannot be chosen from a pool of 3"):
        detector.fit([photographs(3, seed=0)])
    pool = photographs(5, seed=0)
    with pytest.raises(ValueError, match="needs a pool of at least 6 images"):
        detector.fit([pool]).leave_one_out(pool)
    with pytest.raises(ValueError, match="the 5 images of the pool, got 3"):
        detector.leave_one_out(pool[:3])

"""The local scale: divisors against loops, a single reference, and that it hides nothing that is wrong everywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain import ADExtractor
from adpretrain.backbones import FeatureMaps, load_backbone
from adpretrain.config import LocalScaleConfig
from adpretrain.local_scale import LocalScale
from adpretrain.references import ReferenceBank
from adpretrain.residual import residual_features, tokens
from downstream.detectors.featurenorm import FeatureNorm

CHANNELS = [6, 9]


def product(seed: int, images: int = 3, spread: float = 1.0) -> FeatureMaps:
    """Normal images of one product: a pattern of its own plus noise of ``spread``, channels of unequal scale."""
    rng = torch.Generator().manual_seed(seed)
    maps = []
    for width in CHANNELS:
        scale = torch.logspace(-2, 1, width)[:, None, None]
        pattern = torch.randn(1, width, 5, 5, generator=rng)
        maps.append(scale * (pattern + spread * torch.randn(images, width, 5, 5, generator=rng)))
    return maps


def naive_norms(bank_NC: Tensor, images: int) -> list[float]:
    """Distance of every token to the nearest token of another image (of the same one if there is only one)."""
    each = bank_NC.shape[0] // images
    rows = bank_NC.double()
    norms = []
    for own in range(len(rows)):
        others = [r for r in range(len(rows)) if (r // each != own // each if images > 1 else r != own)]
        norms.append(min(float((rows[own] - rows[r]).norm()) for r in others))
    return norms


def naive_scales(bank_NC: Tensor, images: int, share: float = 0.35) -> Tensor:
    """``share`` of the mean norm over the token's 3 x 3 neighbourhood on its 5 x 5 map, edges repeated, and the rest
    of the mean over all."""
    norms = naive_norms(bank_NC, images)
    mean = sum(norms) / len(norms)
    scales = []
    for own in range(len(norms)):
        image, row, column = own // 25, own % 25 // 5, own % 5
        around = [
            norms[image * 25 + min(max(row + a, 0), 4) * 5 + min(max(column + b, 0), 4)]
            for a in (-1, 0, 1)
            for b in (-1, 0, 1)
        ]
        scales.append(share * sum(around) / 9 + (1 - share) * mean)
    return torch.tensor(scales)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("images", [2, 4])
def test_the_scale_of_a_token_against_loops(images: int, share: float) -> None:
    scale = LocalScale(2, LocalScaleConfig(share=share))
    calm, busy = (product(20, images, spread) for spread in (0.05, 2.0))
    banks = [torch.stack([tokens(a).flatten(0, 1), tokens(b).flatten(0, 1)]) for a, b in zip(calm, busy, strict=True)]
    for bank, found in zip(banks, scale.scales(banks, [(5, 5)] * 2), strict=True):
        assert found.shape == bank.shape[:2]
        assert found[1].mean() > 5 * found[0].mean()
        for own, value in zip(bank, found, strict=True):
            torch.testing.assert_close(value, naive_scales(own, images, share), rtol=1e-4, atol=1e-6)


def test_one_reference_is_scaled_by_the_ratio_of_the_pretraining_set() -> None:
    batches = [product(seed, spread=0.1 + 0.2 * seed) for seed in range(6)]
    scale = LocalScale(2).fit(batches)
    expected = torch.zeros(2)
    for batch in batches:
        for level in range(2):
            bank = tokens(batch[level])[1]
            between = residual_features([batch[level][:1]], [bank[None]])[0].norm(dim=1).mean()
            within = naive_norms(bank, 1)
            expected[level] += between / (sum(within) / len(within)) / len(batches)
    torch.testing.assert_close(scale.single, expected, rtol=1e-4, atol=0)
    banks = [tokens(level) for level in product(30, 1)]
    for level, found in enumerate(scale.scales(banks, [(5, 5)] * 2)):
        torch.testing.assert_close(found[0], naive_scales(banks[level][0], 1) * expected[level], rtol=1e-4, atol=1e-6)


def test_identical_references_do_not_divide_by_zero() -> None:
    banks = [tokens(level[:1]).repeat(1, 2, 1) for level in product(3)]
    assert all((found > 0).all() for found in LocalScale(2).scales(banks, [(5, 5)] * 2))


def test_the_ratio_is_saved_and_the_rest_is_configuration() -> None:
    scale = LocalScale(2, LocalScaleConfig(share=0.25)).fit([product(0), product(1)])
    loaded = LocalScale(2, scale.config)
    loaded.load_state_dict(scale.state_dict())
    banks = [tokens(level) for level in product(30, 1)]
    for a, b in zip(loaded.scales(banks, [(5, 5)] * 2), scale.scales(banks, [(5, 5)] * 2), strict=True):
        assert torch.equal(a, b)
    assert list(scale.state_dict()) == ["single"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \[1\.0, 2\.0\] must be one for each of the 3 levels"):
        LocalScale(3, LocalScaleConfig(weights=[1.0, 2.0]))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"local_scale\.share .* must be between 0 and 1"):
            LocalScaleConfig(share=share)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"local_scale\.weights .* must be positive numbers"):
            LocalScaleConfig(weights=[1.0, weight])
    with pytest.raises(ValueError, match="cannot come from 2 images"):
        LocalScale(1).scales([torch.zeros(1, 55, 4)], [(5, 5)])


# In the extractor


def photographs(count: int, seed: int) -> Tensor:
    """One product: a fixed blurred pattern and a little noise, as network input."""
    pattern = F.interpolate(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=64) - 0.5
    return pattern + 0.03 * torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def extractor(share: float = 0.5, weights: tuple[float, ...] = ()) -> ADExtractor:
    backbone = load_backbone("lite0", image_size=64)
    return ADExtractor(backbone, local_scale=LocalScale(2, LocalScaleConfig(share, list(weights))))


def test_the_residual_is_divided_by_the_scale_of_its_match_and_times_the_weight_of_its_level() -> None:
    model, images = extractor(share=1.0, weights=(0.5, 3.0)).set_references(photographs(3, 1)), photographs(2, 2)
    features = model.encode(images)
    bank = model.references
    levels = zip(model(images), features, bank.levels, bank.scales, (0.5, 3.0), strict=True)
    for found, feature, bank, scale, weight in levels:
        query, rows = tokens(feature)[1].double(), bank[0].double()
        for number, row in enumerate(query):
            match = int((rows - row).norm(dim=1).argmin())
            expected = weight * (row - rows[match]) / scale[0, match]
            torch.testing.assert_close(tokens(found)[1, number].double(), expected, rtol=1e-4, atol=1e-4)


def test_normal_photographs_of_calm_and_busy_products_have_norms_of_about_one() -> None:
    for level in range(2):
        for spread in (0.01, 1.0):
            maps = product(40, 6, spread)[level]
            bank = ReferenceBank.of([maps[:5]], local_scale=LocalScale(1))
            norms = bank.residuals([maps[5:]])[0].norm(dim=1)
            assert 0.7 < norms.mean() < 1.4


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_photograph_that_is_brighter_everywhere_is_not_hidden(share: float) -> None:
    """Removing what a whole photograph has in common would make it look normal; the scale is of the references only."""
    detector = FeatureNorm(extractor(share)).fit([photographs(4, 1)])
    normal = photographs(6, 2)
    good, brighter, much = (detector.predict(normal + light).scores for light in (0.0, 0.3, 0.6))
    assert brighter.min() > good.max()
    assert (much > brighter).all()
    model = detector.extract
    features = model.encode(normal)
    shifted = [level + 3 * level.std() for level in features]
    for far, near in zip(*(model.from_encoded(maps, model.references) for maps in (shifted, features)), strict=True):
        assert far.norm(dim=1).min() > 3 * near.norm(dim=1).max()

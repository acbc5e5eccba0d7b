"""Conditioning: unit channels, products of equal normal scale, a single reference."""

import numpy as np
import pytest
import torch
from adpretrain.conditioning import Conditioning
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from adpretrain.residual import residual_features, tokens

CHANNELS = [6, 9]


def product(seed: int, images: int = 3, spread: float = 1.0) -> FeatureMaps:
    """Normal images of one product: a pattern of its own plus noise of ``spread``, channels of unequal scale."""
    rng = torch.Generator().manual_seed(seed)
    maps = []
    for width in CHANNELS:
        scale = torch.logspace(-2, 3, width)[:, None, None]
        offset = torch.linspace(-50, 50, width)[:, None, None]
        pattern = torch.randn(1, width, 5, 5, generator=rng)
        maps.append(offset + scale * (pattern + spread * torch.randn(images, width, 5, 5, generator=rng)))
    return maps


def fitted() -> tuple[Conditioning, list[FeatureMaps]]:
    batches = [product(seed, spread=0.1 + 0.2 * seed) for seed in range(6)]
    return Conditioning(CHANNELS).fit(batches), batches


def naive_norms(bank_NC: Tensor, images: int) -> list[float]:
    """Distance of every token to the nearest token of another image (of the same one if there is only one)."""
    each = bank_NC.shape[0] // images
    rows = bank_NC.double()
    norms = []
    for own in range(len(rows)):
        others = [r for r in range(len(rows)) if (r // each != own // each if images > 1 else r != own)]
        norms.append(min(float((rows[own] - rows[r]).norm()) for r in others))
    return norms


def naive_leave_one_out(bank_NC: Tensor, images: int) -> float:
    return sum(naive_norms(bank_NC, images)) / len(bank_NC)


def naive_scales(bank_NC: Tensor, images: int) -> list[float]:
    """Half the mean norm, half the mean over the token's 3 x 3 neighbourhood on its 5 x 5 map, edges repeated."""
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
        scales.append(0.5 * mean + 0.5 * sum(around) / 9)
    return scales


def test_standardised_channels_have_median_zero_and_mean_square_one_over_c() -> None:
    conditioning, batches = fitted()
    standardised = [conditioning.standardise(batch) for batch in batches]
    for level, width in enumerate(CHANNELS):
        photographs = torch.cat([batch[level] for batch in standardised]).flatten(2).numpy()
        np.testing.assert_allclose(np.median(photographs, axis=2), 0, atol=1e-6)  # 25 tokens: the median is one of them
        rows = torch.cat([tokens(batch[level]).flatten(0, 1) for batch in standardised])
        torch.testing.assert_close(rows.square().mean(0), torch.full((width,), 1 / width), rtol=1e-4, atol=0)
        # hence a token has squared norm 1 on average, whatever the width
        assert rows.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("tokens_each", [1, 2, 24, 25])
def test_the_centre_is_torchs_median(tokens_each: int) -> None:
    maps = torch.randn(3, 6, 1, tokens_each, generator=torch.Generator().manual_seed(0))
    unscaled = Conditioning([6])
    unscaled.std_0 /= 6**0.5
    expected = maps - maps.flatten(2).median(2).values[..., None, None]
    torch.testing.assert_close(unscaled.standardise([maps])[0], expected, rtol=1e-6, atol=0)


def test_drift_of_a_whole_photograph_vanishes_and_a_defect_stays_where_it_is() -> None:
    conditioning, batches = fitted()
    batch = batches[2]
    drifted = [level + torch.randn(level.shape[:2])[..., None, None] for level in batch]
    for a, b in zip(conditioning.standardise(drifted), conditioning.standardise(batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    defective = [level.clone() for level in batch]
    for level in defective:
        level[:, :, :2, :2] += 1e6  # 4 of 25 tokens; a mean would move all others by 160,000
    for a, b in zip(conditioning.standardise(defective), conditioning.standardise(batch), strict=True):
        others = (a - b)[:, :, 2:].abs()
        assert others.max() < 2 * b.abs().max()


def test_a_channel_that_never_varies_stays_finite() -> None:
    batch = product(0)
    batch[0][:, 2] = 7.0
    out = Conditioning(CHANNELS).fit([batch, batch]).standardise(batch)
    assert all(level.isfinite().all() for level in out)
    assert out[0][:, 2].abs().max() < 1e-3


@pytest.mark.parametrize("images", [2, 4])
def test_the_scale_of_a_token_against_loops(images: int) -> None:
    conditioning, _ = fitted()
    calm, busy = (conditioning.standardise(product(20, images, spread)) for spread in (0.05, 2.0))
    banks = [torch.stack([tokens(a).flatten(0, 1), tokens(b).flatten(0, 1)]) for a, b in zip(calm, busy, strict=True)]
    scales = conditioning.scales(banks, [(5, 5)] * 2)
    for bank, scale in zip(banks, scales, strict=True):
        assert scale.shape == bank.shape[:2]
        assert scale[1].min() > 5 * scale[0].max()
        for own, value in zip(bank, scale, strict=True):
            torch.testing.assert_close(value, torch.tensor(naive_scales(own, images)), rtol=1e-4, atol=1e-6)


def test_one_reference_is_scaled_by_the_ratio_of_the_pretraining_set() -> None:
    conditioning, batches = fitted()
    expected = torch.zeros(len(CHANNELS))
    for batch in batches:
        maps = conditioning.standardise(batch)
        for level in range(len(CHANNELS)):
            first, second = tokens(maps[level])[:2]
            between = residual_features([maps[level][:1]], [second[None]])[0].norm(dim=1).mean()
            expected[level] += between / naive_leave_one_out(second, 1) / len(batches)
            assert first.shape == second.shape
    torch.testing.assert_close(conditioning.single, expected, rtol=1e-4, atol=0)
    bank = [tokens(level)[0][None] for level in conditioning.standardise(product(30, 1))]
    for level, scale in enumerate(conditioning.scales(bank, [(5, 5)] * 2)):
        within = torch.tensor(naive_scales(bank[level][0], 1))
        torch.testing.assert_close(scale[0], within * float(expected[level]), rtol=1e-4, atol=1e-6)


def test_identical_references_do_not_divide_by_zero() -> None:
    bank = [tokens(level[:1]).repeat(1, 2, 1) for level in product(3)]
    assert all((scale > 0).all() for scale in Conditioning(CHANNELS).scales(bank, [(5, 5)] * 2))


def test_the_statistics_are_saved() -> None:
    conditioning, batches = fitted()
    loaded = Conditioning(CHANNELS)
    loaded.load_state_dict(conditioning.state_dict())
    for a, b in zip(loaded.standardise(batches[0]), conditioning.standardise(batches[0]), strict=True):
        assert torch.equal(a, b)
    assert set(loaded.state_dict()) == {"single", "std_0", "std_1"}

"""Cosine losses of reconstructed features against loops in float64, with and without a region of interest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from downstream.detectors import dinomaly
from downstream.detectors.recontrast import training as recontrast
from downstream.reconstruction import cosine_distance, eased, global_loss, inside_of, regional_loss, summed_maps, within
from downstream.roi import RegionOfInterest

B, C, H, W = 3, 5, 4, 6


def drawn(seed: int, channels: int = C) -> Tensor:
    return torch.randn(B, channels, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INSIDE = torch.rand(B, H, W, generator=torch.Generator().manual_seed(9)) < 0.6
MASKS = pytest.mark.parametrize("inside", [torch.ones(B, H, W), INSIDE.float()], ids=["everywhere", "region"])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def loop(target: Tensor, found: Tensor, inside: Tensor, whole: bool) -> float:
    """Eq. 2 or 3, for one level."""
    a, b, m = (part.double().numpy() for part in (target, found, inside))
    losses = []
    for i in range(B):
        places = [(h, w) for h in range(H) for w in range(W) if m[i, h, w]]
        if whole:
            losses.append(1 - cosine(*(np.concatenate([x[i, :, h, w] for h, w in places]) for x in (a, b))))
        else:
            losses.append(np.mean([1 - cosine(a[i, :, h, w], b[i, :, h, w]) for h, w in places]))
    return float(np.mean(losses))


@MASKS
@pytest.mark.parametrize("whole", [False, True], ids=["regional", "global"])
def test_losses_are_those_of_the_equations(inside: Tensor, whole: bool) -> None:
    target, found = drawn(0), drawn(1)
    loss = (global_loss if whole else regional_loss)((target, found), inside)
    assert float(loss) == pytest.approx(loop(target, found, inside, whole), rel=1e-5)


def test_distances_of_nearly_equal_vectors_do_not_cancel() -> None:
    """1 - cosine in float32 could not tell 2e-8 from 0."""
    target, away = drawn(0).float(), drawn(1).float()
    found = target + 2e-4 * away
    a, b = target.double(), found.double()
    exact = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert float(exact.median()) < 5e-8
    torch.testing.assert_close(cosine_distance(target, found).double(), exact, rtol=1e-2, atol=1e-10)


def test_no_value_and_no_gradient_depends_on_what_is_outside() -> None:
    target, found = drawn(0), drawn(1).requires_grad_()
    other = torch.where(INSIDE[:, None], target, 7.0)
    for loss in (global_loss, regional_loss):
        one, two = loss((target, found), INSIDE.float()), loss((other, found), INSIDE.float())
        assert torch.equal(one, two)
        (gradient,) = torch.autograd.grad(one, found)
        assert bool((gradient.abs().sum(1) > 0)[INSIDE].all())
        assert not gradient.abs().sum(1)[~INSIDE].any()
    hidden = within([target, other], [INSIDE.float()] * 2)
    assert torch.equal(hidden[0], hidden[1])


def test_eased_gradients_and_the_same_bits() -> None:
    found = drawn(1).float().requires_grad_()
    easy = drawn(2, 1)[:, 0] < 0
    for factor in (0.0, 0.1):
        changed = eased(found, easy, factor)
        assert torch.equal(changed, found)
        weights = drawn(3).float()
        (gradient,) = torch.autograd.grad((changed * weights).sum(), found)
        torch.testing.assert_close(gradient, weights * torch.where(easy, factor, 1.0)[:, None], rtol=1e-6, atol=0)
        if not factor:
            assert not gradient.abs().sum(1)[easy].any()


@MASKS
def test_easy_places_of_recontrast(inside: Tensor) -> None:
    """Below the mean + alpha standard deviations of the batch (Eq. 5)."""
    pair = drawn(0), drawn(1)
    distances = cosine_distance(*pair).double().numpy()
    values = [distances[i, h, w] for i, h, w in np.ndindex(B, H, W) if inside[i, h, w]]
    for alpha in (-3.0, -0.5, 0.0, 1.0):
        limit = np.mean(values) + alpha * np.std(values, ddof=1)
        found = recontrast.easy_places(pair, inside, alpha)
        np.testing.assert_array_equal(found.numpy(), distances < limit)
    assert not recontrast.easy_places(pair, inside, -3.0).any()


@MASKS
def test_easy_places_of_dinomaly(inside: Tensor) -> None:
    """That share of the places with the smallest distances; none at the beginning."""
    pair = drawn(0), drawn(1)
    distances = cosine_distance(*pair).numpy()
    values = np.sort(distances[inside.numpy() > 0])
    for share in (0.0, 0.35, 0.9):
        easy = dinomaly.easy_places(pair, inside, share).numpy()
        hard = int(len(values) * (1 - share))
        assert (easy & (inside.numpy() > 0)).sum() == len(values) - hard
        assert (distances[easy].max(initial=0.0)) < values[len(values) - hard]


def test_maps_add_the_upsampled_distances() -> None:
    """Levels of one cell and of two: the upsampled values of both, added, and those outside continued from inside."""
    pairs = [(torch.ones(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))]
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    target = torch.stack([left, left], 1).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    found = torch.stack([left, right], 1).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    pairs.append((target, found))
    constant = 1 - 0.5**0.5
    columns = torch.tensor([0.0, 0.25, 0.75, 1.0])  # bilinear, corners not aligned
    torch.testing.assert_close(summed_maps(pairs, 4, None), (constant + columns).expand(1, 4, 4))
    roi = torch.zeros(4, 4, dtype=torch.bool)
    roi[:, :2] = True
    region = RegionOfInterest(roi)
    inner = summed_maps(pairs[1:], 4, region)
    torch.testing.assert_close(inner, torch.zeros(1, 4, 4))
    torch.testing.assert_close(inside_of([target], region)[0], torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))

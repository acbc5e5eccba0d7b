"""Residuals, losses, metrics and the coreset against dense float64 formulas and plain loops, on drawn numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from bounded import bounded
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from adpretrain.leave_one_out import leave_one_out_residuals
from adpretrain.losses import angle_loss, norm_loss
from adpretrain.residual import METRICS, nearest_reference, residual_tokens
from downstream.coreset import greedy_coreset
from downstream.metrics import aupro, auroc, average_precision

SEEDS = st.integers(0, 2**32 - 1)


def numbers(seed: int, *shape: int, ties: bool = False) -> Tensor:
    """Normal float64 numbers; with ``ties``, few small integers, so that many distances are exactly equal."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (2 * values).round().clamp(-2, 2) if ties else values


def loop_nearest(query_C: Tensor, bank_NC: Tensor, metric: str) -> int:
    """The nearest row, the first of equally near ones."""
    if metric == "l2":
        return int(torch.stack([(query_C - row).square().sum() for row in bank_NC]).argmin())
    return int(torch.stack([(query_C * row).sum() / row.norm().clamp_min(1e-12) for row in bank_NC]).argmax())


@bounded(40)
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    rows=st.integers(1, 40),
    width=st.integers(1, 17),
    metric=st.sampled_from(METRICS),
    ties=st.booleans(),
    own=st.booleans(),
    chunk=st.sampled_from([1, 200, None]),
)
def test_residuals_are_those_of_a_loop(
    seed: int, batch: int, tokens: int, rows: int, width: int, metric: str, ties: bool, own: bool, chunk: int | None
) -> None:
    query_BTC = numbers(seed, batch, tokens, width, ties=ties)
    bank_RNC = numbers(seed + 1, batch if own else 1, rows, width, ties=ties)
    residual_BTC = residual_tokens(query_BTC, bank_RNC, metric, chunk)
    index_BT = nearest_reference(query_BTC, bank_RNC, metric, chunk)
    for image in range(batch):
        bank_NC = bank_RNC[image if own else 0]
        for token in range(tokens):
            query, found = query_BTC[image, token], int(index_BT[image, token])
            expected = loop_nearest(query, bank_NC, metric)
            if metric == "l2" and not ties:
                assert found == expected
            if metric == "l2":  # equally near: which of them is a matter of rounding, how near is not
                torch.testing.assert_close((query - bank_NC[found]).norm(), (query - bank_NC[expected]).norm())
            else:
                angles = [float((query * row).sum() / row.norm().clamp_min(1e-12)) for row in bank_NC]
                assert angles[found] == pytest.approx(max(angles), abs=1e-9)
            torch.testing.assert_close(residual_BTC[image, token], query - bank_NC[found], rtol=0, atol=0)


@bounded(25)
@given(seed=SEEDS, images=st.integers(1, 4), tokens=st.integers(2, 6), width=st.integers(1, 9))
def test_leave_one_out_never_meets_its_own_image(seed: int, images: int, tokens: int, width: int) -> None:
    bank_NC = numbers(seed, images * tokens, width)
    part = tokens if images > 1 else 1
    for number, residual in enumerate(leave_one_out_residuals(bank_NC[None], images)[0]):
        others = [row for other, row in enumerate(bank_NC) if other // part != number // part]
        nearest = min(float((bank_NC[number] - row).norm()) for row in others)
        assert float(residual.norm()) == pytest.approx(nearest, rel=1e-9)


def dense_angle_loss(first: Tensor, second: Tensor, labels: Tensor, center: Tensor, tau: float, both: bool) -> Tensor:
    """ADPretrain Eq. 2 with every similarity of every pair."""
    views = [(x - center) / (x - center).norm(dim=1, keepdim=True) for x in (first, second)]
    everything, every_label = torch.cat(views), torch.cat([labels, labels])
    terms = []
    for mine, other in ((0, 1), (1, 0))[: 2 if both else 1]:
        for i in range(len(labels)):
            negatives = everything[every_label != labels[i]] @ views[mine][i] / tau
            terms.append(torch.logsumexp(negatives, 0) - views[mine][i] @ views[other][i] / tau)
    return torch.stack(terms).mean()


@bounded(40)
@given(
    seed=SEEDS,
    tokens=st.integers(2, 24),
    width=st.integers(2, 12),
    tau=st.floats(0.05, 2),
    form=st.sampled_from(["paper", "released"]),
    chunk=st.sampled_from([1, 300, 1 << 20]),
)
def test_the_angle_loss_is_the_dense_formula_in_any_order(
    seed: int, tokens: int, width: int, tau: float, form: str, chunk: int
) -> None:
    first, second = numbers(seed, tokens, width).requires_grad_(), numbers(seed + 1, tokens, width)
    labels = torch.arange(tokens) % max(2, seed % 5) == 0
    center = 0.1 * numbers(seed + 2, width)
    ours = angle_loss(first, second, labels, center, tau, form, chunk)
    theirs = dense_angle_loss(first, second, labels, center, tau, form == "released")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, first), torch.autograd.grad(theirs, first), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    again = angle_loss(first[order], second[order], labels[order], center, tau, form, chunk)
    torch.testing.assert_close(again, ours, rtol=1e-9, atol=1e-9)


def dense_norm_loss(features: Tensor, labels: Tensor, radius: float, margin: float, form: str) -> float:
    """ADPretrain Eq. 3-6 token by token, or the released code's groups."""

    def contraction(d: float) -> float:
        return math.log1p(math.exp(d)) * math.exp(d)

    rows = [[float(value) for value in row] for row in features]
    if form == "paper":
        norms = [math.sqrt(sum(v * v for v in row) + 1) - 1 for row in rows]
        gaps = [radius + margin - n if bad else n - radius for n, bad in zip(norms, labels, strict=True)]
        return sum(contraction(d) for d, bad in zip(gaps, labels, strict=True) if d >= 0 or not bad) / len(gaps)
    norms = [math.sqrt(math.sqrt(sum(v * v for v in row)) + 1) - 1 for row in rows]
    bad = [n for n, label in zip(norms, labels, strict=True) if label]
    good = [n for n, label in zip(norms, labels, strict=True) if not label]
    outer = min(0.9 * min(bad, default=math.inf), radius)
    groups = (
        [n - outer for n in good if n > outer],
        [0.99 * outer - n for n in good if n < 0.99 * outer],
        [outer + margin - n for n in bad if n < outer + margin],
    )
    return sum(sum(map(contraction, group)) / len(group) for group in groups if group)


@bounded(40)
@given(
    seed=SEEDS,
    tokens=st.integers(1, 24),
    width=st.integers(1, 12),
    scale=st.floats(0.01, 3),
    share=st.integers(0, 4),
    form=st.sampled_from(["paper", "released"]),
)
def test_the_norm_loss_is_the_formula_token_by_token_in_any_order(
    seed: int, tokens: int, width: int, scale: float, share: int, form: str
) -> None:
    features = scale * numbers(seed, tokens, width)
    labels = torch.arange(tokens) % 4 < share  # none to all of them anomalous
    ours = norm_loss(features, labels, 0.4, 0.75, form)
    assert float(ours) == pytest.approx(dense_norm_loss(features, labels, 0.4, 0.75, form), rel=1e-9, abs=1e-12)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert float(norm_loss(features[order], labels[order], 0.4, 0.75, form)) == pytest.approx(float(ours), rel=1e-9)


@bounded(60)
@given(seed=SEEDS, count=st.integers(2, 80), levels=st.sampled_from([2, 5, 1000]))
def test_metrics_are_scikit_learns_and_know_ranks_only(seed: int, count: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, levels, count) / levels, rng.integers(0, 2, count).astype(bool)
    labels[:2] = True, False
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    for transform in (np.exp, lambda s: 3 * s - 7, lambda s: s**3, np.arctan):
        assert auroc(transform(scores), labels) == pytest.approx(auroc(scores, labels), abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)


def loop_aupro(maps: NDArray[np.float64], masks: NDArray[np.bool_], limit: float) -> float:
    """Every threshold that occurs, every region of every image, the trapezium rule up to the limit."""
    curve = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found, shares = maps >= threshold, []
        for mask, hit in zip(masks, found, strict=True):
            regions, count = ndimage.label(mask, np.ones((3, 3)))
            shares += [hit[regions == number].mean() for number in range(1, count + 1)]
        curve.append((float(found[~masks].mean()), float(np.mean(shares))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= limit:
            break
        share = 1.0 if x1 <= limit else (limit - x0) / (x1 - x0)
        area += (min(x1, limit) - x0) * (y0 + y0 + share * (y1 - y0)) / 2
    return area / limit


@bounded(30)
@given(
    seed=SEEDS,
    images=st.integers(1, 3),
    side=st.integers(3, 9),
    levels=st.sampled_from([3, 10**6]),
    limit=st.floats(0.05, 1),
)
def test_aupro_is_that_of_a_loop_over_thresholds_and_regions(
    seed: int, images: int, side: int, levels: int, limit: float
) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, levels, (images, side, side)) / levels
    masks = rng.random((images, side, side)) < 0.3
    masks[0, 0, 0], masks[0, -1, -1] = True, False
    assert aupro(maps, masks, limit) == pytest.approx(loop_aupro(maps, masks, limit), abs=1e-9)
    assert aupro(np.exp(maps), masks, limit) == pytest.approx(aupro(maps, masks, limit), abs=1e-9)


@bounded(30)
@given(seed=SEEDS, rows=st.integers(1, 200), width=st.integers(1, 20), share=st.floats(0.01, 1), ties=st.booleans())
def test_the_coreset_is_that_of_the_plain_loop(seed: int, rows: int, width: int, share: float, ties: bool) -> None:
    features = numbers(seed, rows, width, ties=ties).float()
    k, start = max(1, round(share * rows)), seed % rows
    nearest, chosen = torch.full((rows,), torch.inf), [start]
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
    assert greedy_coreset(features, k, start).tolist() == chosen

"""Losses against the golden files, naive float64 loops of the paper's equations, and gradcheck."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adpretrain.losses import angle_loss, norm_loss, pseudo_huber_norm, total_loss

GOLDEN = Path(__file__).parent / "golden"
RELATIVE = 1e-5


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as content:
        return {key: torch.from_numpy(np.asarray(content[key])) for key in content}


def views(tokens: int, width: int, anomalies: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two correlated float64 views, shuffled labels with exactly ``anomalies`` set, and a centre."""
    rng = torch.Generator().manual_seed(seed)
    first = torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    second = first + 0.3 * torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    label = torch.zeros(tokens, dtype=torch.bool)
    label[torch.randperm(tokens, generator=rng)[:anomalies]] = True
    return first, second, label, 0.1 * torch.randn(width, generator=rng, dtype=torch.float64)


def naive_angle(first: Tensor, second: Tensor, label: Tensor, center: Tensor, tau: float, both: bool) -> float:
    """Eq. 2 token by token, with math.exp on Python floats."""
    shifted = (torch.cat([first, second]) - center).tolist()
    mark = label.tolist() * 2
    tokens = len(first)

    def similarity(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    total = 0.0
    anchors = range(2 * tokens if both else tokens)
    for i in anchors:
        positive = math.exp(similarity(shifted[i], shifted[(i + tokens) % (2 * tokens)]) / tau)
        negatives = math.fsum(
            math.exp(similarity(shifted[i], shifted[k]) / tau)
            for k in range(2 * tokens)
            if k != i and mark[k] != mark[i]
        )
        total += -math.log(positive / negatives)
    return total / len(anchors)


def naive_norm(features: Tensor, label: Tensor, radius: float, margin: float) -> float:
    """Eq. 3-6 token by token."""
    total = 0.0
    for vector, anomalous in zip(features.tolist(), label.tolist(), strict=True):
        norm = math.sqrt(sum(x * x for x in vector) + 1) - 1
        if anomalous and norm > radius + margin:
            continue
        excess = radius + margin - norm if anomalous else norm - radius
        total += -math.log(1 / (1 + math.exp(excess))) * math.exp(excess)
    return total / len(features)


def test_the_released_losses_reproduce() -> None:
    data = golden("official_losses.npz")
    features, augmented, label = data["features"], data["augmented"], data["anomalous"]
    nobody = torch.zeros_like(label)
    for name, value in {
        "angle": angle_loss(features, augmented, label, data["center"], form="released"),
        "norm": norm_loss(features, label, form="released"),
        "norm_augmented": norm_loss(augmented, label, form="released"),
        "norm_small": norm_loss(features * 0.05, label, form="released"),
        "norm_no_anomaly": norm_loss(features, nobody, form="released"),
    }.items():
        assert float(value) == pytest.approx(float(data[name]), rel=RELATIVE), name


def test_the_papers_losses_reproduce() -> None:
    data = golden("paper_losses.npz")
    label = data["anomalous"]
    angle = angle_loss(data["features"], data["augmented"], label, data["center"])
    norm, norm_augmented = norm_loss(data["features"], label), norm_loss(data["augmented"], label)
    assert float(angle) == pytest.approx(float(data["angle_mean_over_anchors"]), rel=RELATIVE)
    assert float(norm + norm_augmented) / 2 == pytest.approx(float(data["norm_mean"]), rel=RELATIVE)
    assert float(total_loss(angle, norm, norm_augmented)) == pytest.approx(float(data["total"]), rel=RELATIVE)


def test_lambda_weighs_half_the_angle_loss() -> None:
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)
    assert float(total_loss(one, two, three, lambda_=0.5)) == 0.25 + 3.0  # Eq. 7: the anchors are half of the 2N tokens


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("anomalies", [1, 7, 39])
def test_angle_loss_is_equation_2(form: str, anomalies: int) -> None:
    first, second, label, center = views(40, 6, anomalies)
    expected = naive_angle(first, second, label, center, 0.15, both=form == "released")
    assert float(angle_loss(first, second, label, center, form=form)) == pytest.approx(expected, rel=1e-12)
    warmer = naive_angle(first, second, label, center, 0.5, both=form == "released")
    assert float(angle_loss(first, second, label, center, 0.5, form)) == pytest.approx(warmer, rel=1e-12)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_small_chunks_change_neither_the_loss_nor_its_gradient(form: str) -> None:
    first, second, label, center = views(300, 8, 20)
    results = []
    for chunk_bytes in (1, 4096, 1 << 26):  # one row, 12 rows, all rows at a time
        a, b, c = (x.clone().requires_grad_() for x in (first, second, center))
        loss = angle_loss(a, b, label, c, form=form, chunk_bytes=chunk_bytes)
        results.append([loss.detach(), *torch.autograd.grad(loss, [a, b, c])])
    for chunked in results[:2]:
        for value, whole in zip(chunked, results[2], strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_angle_gradients_are_right(form: str) -> None:
    first, second, label, center = views(14, 5, 4)
    inputs = [x.requires_grad_() for x in (first, second, center)]
    assert torch.autograd.gradcheck(lambda a, b, c: angle_loss(a, b, label, c, form=form, chunk_bytes=200), inputs)


def test_norm_gradients_are_right_in_the_papers_form() -> None:
    features, _, label, _ = views(30, 4, 9)
    features = (features * 1.3).requires_grad_()
    norm = pseudo_huber_norm(features)[label]
    assert (norm < 1.15).any()
    assert (norm > 1.15).any()  # both branches of Eq. 5 are taken
    assert torch.autograd.gradcheck(lambda x: norm_loss(x, label), [features])


def test_released_weights_are_detached() -> None:
    """d/dx of -logsig(-d) e^d with e^d constant is sigmoid(d) e^d d'(x)."""
    x = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_loss(x, torch.zeros(1), form="released"), x)
    excess = math.sqrt(4.0) - 1 - 0.4
    expected = 1 / (1 + math.exp(-excess)) * math.exp(excess) * 0.5 / math.sqrt(4.0)
    assert float(gradient) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("radius", "margin"), [(0.4, 0.75), (1.0, 0.1)])
@pytest.mark.parametrize("scale", [0.05, 0.6, 2.0])
def test_norm_loss_is_equations_3_to_6(radius: float, margin: float, scale: float) -> None:
    features, _, label, _ = views(60, 5, 20)
    features = features * scale
    expected = naive_norm(features, label, radius, margin)
    assert float(norm_loss(features, label, radius, margin)) == pytest.approx(expected, rel=1e-12)


def test_pseudo_huber_norm_keeps_the_digits_of_small_norms() -> None:
    tiny = torch.full((1, 4), 1e-5)  # ||x||^2 / 2 to first order; sqrt(1 + 4e-10) - 1 is 0 in float32
    assert float(pseudo_huber_norm(tiny)) == pytest.approx(2e-10, rel=1e-6)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("everybody", [False, True])
def test_a_batch_of_one_label_has_no_angle_loss_and_a_finite_norm_loss(form: str, everybody: bool) -> None:
    first, second, _, center = views(20, 4, 0)
    first.requires_grad_()
    label = torch.full((20,), everybody)
    angle = angle_loss(first, second, label, center, form=form)
    norm = norm_loss(first, label, form=form)
    (angle_gradient,) = torch.autograd.grad(angle, first)
    (norm_gradient,) = torch.autograd.grad(norm, first)
    assert angle.item() == 0
    assert not angle_gradient.any()
    assert norm.isfinite()
    assert norm_gradient.isfinite().all()
    if form == "paper":
        assert norm.item() == pytest.approx(naive_norm(first.detach(), label, 0.4, 0.75), rel=1e-12)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_no_tokens_and_negative_radii_are_refused(form: str) -> None:
    nobody, label = torch.zeros(0, 8), torch.zeros(0, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"features \(0, 8\) hold no tokens"):
        norm_loss(nobody, label, form=form)
    with pytest.raises(ValueError, match=r"features \(0, 8\) hold no tokens"):
        angle_loss(nobody, nobody, label, torch.zeros(8), form=form)
    for wrong in ({"radius": -0.4}, {"margin": -0.1}, {"radius": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            norm_loss(torch.ones(2, 8), torch.tensor([False, True]), form=form, **wrong)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e15])
def test_anomalous_tokens_of_any_norm_give_finite_losses_and_gradients(form: str, scale: float) -> None:
    first, second, label, center = (x.float() if x.is_floating_point() else x for x in views(50, 8, 10))
    first = torch.where(label[:, None], first * scale, first * 0.1).requires_grad_()
    for loss in (norm_loss(first, label, form=form), angle_loss(first, second, label, center, form=form)):
        (gradient,) = torch.autograd.grad(loss, first)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_an_anomaly_outside_the_margin_is_left_alone() -> None:
    features = torch.tensor([[0.0, 0.2], [9.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_loss(features, torch.tensor([False, True])), features)
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("loss", ["angle", "norm"])
def test_bad_input_is_named(loss: str) -> None:
    first, second, label, center = views(6, 3, 2)

    def call(features: Tensor = first, marks: Tensor = label, form: str = "paper") -> Tensor:
        if loss == "norm":
            return norm_loss(features, marks, form=form)
        return angle_loss(features, second, marks, center, form=form)

    with pytest.raises(ValueError, match=r"'offical'.*'paper', 'released'"):
        call(form="offical")
    with pytest.raises(ValueError, match=r"\[N, D\].*\(6, 3\) and \(5,\)"):
        call(marks=label[:5])
    with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
        call(features=first.view(2, 3, 3))


def test_the_angle_loss_refuses_views_that_differ_and_a_temperature_of_zero() -> None:
    first, second, label, center = views(6, 3, 2)
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(5, 3\)"):
        angle_loss(first, second[:5], label, center)
    with pytest.raises(ValueError, match=r"temperature 0\.0 must be positive"):
        angle_loss(first, second, label, center, temperature=0.0)

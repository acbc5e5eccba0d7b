"""CFLOW: its flows against autograd's Jacobian and a known density, its maps by hand.

Shapes: N vectors, C channels, P channels of the position.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import SIZE, wavy
from torch import Tensor

from adpretrain.backbones import Backbone
from downstream.detectors.cflow import CFLOW, LOWEST, WARM, CFLOWConfig, Coupling, Flow, Flows, position_code
from downstream.lessons import LearningConfig, Normals
from downstream.normal_features import NormalFeatures

POSITIONS = 8
QUICK = CFLOWConfig(blocks=2, positions=POSITIONS, vectors=64, training=LearningConfig(steps=5, batch_size=4))


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with weights far from those of an untrained one, which hardly changes its input."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return module.double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 5, 6])
def test_the_determinant_is_that_of_autograd_s_jacobian(width: int) -> None:
    flow = lively(Flow(width, CFLOWConfig(blocks=3, positions=POSITIONS)))
    for x, where in zip(drawn(4, width), drawn(4, POSITIONS, seed=1), strict=True):

        def output(x_C: Tensor, where: Tensor = where) -> Tensor:
            out = x_C[None]
            for block in flow.blocks:  # type: ignore[union-attr]
                out, _ = block(out, where[None])
            return out[0]

        jacobian = torch.autograd.functional.jacobian(output, x)
        log_normal = -0.5 * float(output(x).detach().square().sum()) - 0.5 * width * math.log(2 * math.pi)
        expected = (log_normal + float(torch.linalg.slogdet(jacobian).logabsdet)) / width
        assert float(flow(x[None], where[None]).detach()) == pytest.approx(expected, rel=1e-9)


def test_a_block_can_be_undone_and_scales_by_no_more_than_the_clamp() -> None:
    block = lively(Coupling(7, POSITIONS, 1.9))
    x, where = 3 * drawn(50, 7), drawn(50, POSITIONS, seed=1)
    out, log_det = block(x, where)
    overall = 0.2 * (1 + (block.scale / 2).exp()).log()
    plain = (out[:, block.order.argsort()] - block.shift) / overall
    raw, shift = (0.1 * block.network(torch.cat([plain[:, :4], where], 1))).chunk(2, 1)
    log_scale = 1.9 * raw.tanh()
    torch.testing.assert_close(plain[:, :4], x[:, :4])
    torch.testing.assert_close((plain[:, 4:] - shift) * (-log_scale).exp(), x[:, 4:])
    assert float((log_det - overall.log().sum()).detach().abs().max()) <= 3 * 1.9


def test_an_untrained_block_only_shuffles() -> None:
    block = Coupling(6, POSITIONS, 1.9)
    torch.nn.init.zeros_(block.network[2].weight)
    torch.nn.init.zeros_(block.network[2].bias)
    x = drawn(5, 6).float()
    out, log_det = block(x, torch.zeros(5, POSITIONS))
    torch.testing.assert_close(out.sort(1).values, x.sort(1).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-5)
    assert not torch.allclose(out, x)


def test_it_learns_the_density_of_gaussians_that_depend_on_the_position() -> None:
    """The mean log-likelihood of new vectors reaches minus the entropy of the Gaussians, within 0.1 per channel."""
    torch.manual_seed(0)
    width, means = 2, torch.tensor([[3.0, -2.0], [-3.0, 2.0]])
    mixing = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    codes = position_code(1, 2, POSITIONS)[0]
    flow = Flow(width, CFLOWConfig(blocks=4, positions=POSITIONS))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)

    def vectors(count: int) -> tuple[Tensor, Tensor]:
        place = torch.randint(2, (count,))
        return means[place] + torch.randn(count, width) @ mixing.T, codes[place]

    for step in range(250):
        loss = -flow(*vectors(256)).mean()
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 250)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 0.5 * width * (1 + math.log(2 * math.pi)) + float(torch.linalg.slogdet(mixing).logabsdet)
    with torch.no_grad():
        found = float(flow(*vectors(20000)).mean())
        rows, where = vectors(1000)
        elsewhere = float(flow(rows, codes[(where == codes[0]).all(1).long()]).mean())
    assert found == pytest.approx(-entropy / width, abs=0.1)
    assert elsewhere < found - 1  # the same vectors at the other position


def test_the_position_s_code_by_a_loop() -> None:
    code = position_code(5, 3, 12)
    for row, column, number in np.ndindex(5, 3, 12):
        place, part = (column, number) if number < 6 else (row, number - 6)
        angle = place / 10000 ** (2 * (part // 2) / 6)
        expected = math.cos(angle) if part % 2 else math.sin(angle)
        assert float(code[row, column, number]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["released", "paper"])
def test_the_loss_of_all_vectors(backbone: Backbone, kind: str) -> None:
    config = CFLOWConfig(blocks=2, vectors=10**6, loss=kind, training=QUICK.training)  # type: ignore[arg-type]
    torch.manual_seed(0)
    flows = Flows([40, 112], config)
    lesson = Normals(NormalFeatures(backbone, [wavy(4, 0)])).lesson(config.training, 0)
    with torch.no_grad():
        loss, found = flows(lesson), flows.likelihoods(lesson.features)
    terms = [np.log1p(np.exp(-x.double().numpy())) if kind == "released" else -x.double().numpy() for x in found]
    assert float(loss) == pytest.approx(sum(float(term.mean()) for term in terms), rel=1e-5)


def test_maps_by_hand(backbone: Backbone) -> None:
    normal, images = wavy(5, 0), wavy(2, 1, defect=0.1)
    detector = CFLOW(backbone, QUICK).fit(normal.split(2))
    found = detector.predict(images)
    known, asked = (detector.flows.likelihoods(backbone(x)) for x in (normal, images))
    total = torch.zeros(2, SIZE, SIZE)
    for known_BHW, asked_BHW in zip(known, asked, strict=True):
        probability = (asked_BHW - known_BHW.max()).exp().clamp_max(1)
        total += F.interpolate(probability[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
    torch.testing.assert_close(found.maps, 2 - total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores, (2 - total).amax((1, 2)), rtol=1e-4, atol=1e-4)
    assert len(detector.losses) == 5


def test_the_learning_rate_rises_and_falls() -> None:
    rate = Flows([4], QUICK).rate
    assert rate(0) == pytest.approx(0.1)
    assert rate(0.5) == pytest.approx((1 + LOWEST) / 2)
    assert rate(1) == pytest.approx(LOWEST)
    assert rate(WARM - 1e-9) == pytest.approx(rate(WARM), rel=1e-6)
    assert max(rate(n / 100) for n in range(101)) == rate(WARM)


def test_mistakes_are_named(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="positions 6 must be a positive multiple of 4"):
        CFLOWConfig(positions=6)
    with pytest.raises(ValueError, match="blocks 0 must be at least 1"):
        CFLOWConfig(blocks=0)
    with pytest.raises(ValueError, match="clamp -1 must be positive"):
        CFLOWConfig(clamp=-1)
    with pytest.raises(ValueError, match="loss 'nll' is unknown; choose one of released, paper"):
        CFLOWConfig(loss="nll")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"levels \[5\] do not fit features of 2 levels"):
        CFLOW(backbone, CFLOWConfig(levels=[5])).fit([wavy(2, 0)])
    with pytest.raises(ValueError, match="halves the channels of a level, which has 1"):
        CFLOW(lambda images: [images[:, :1]], QUICK).fit([wavy(2, 0)])

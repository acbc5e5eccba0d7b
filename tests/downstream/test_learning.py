"""The shared training loop: against a loop written out, killed and resumed, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import together
from torch import Tensor, nn

from downstream.learning import HERE, Learner, Workplace, learn
from downstream.lessons import LearningConfig, Lesson, Normals
from downstream.normal_features import NormalFeatures
from downstream.roi import RegionOfInterest

WHAT = "training a line"


def pictures(count: int = 7) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def normals(images: Tensor, region: RegionOfInterest | None = None, cache_bytes: int = 1 << 20) -> Normals:
    counts.clear()

    def extract(batch: Tensor) -> list[Tensor]:
        counts.append(len(batch))
        return [batch[:, :2] * 2, batch[:, :, ::2, ::2]]

    return Normals(NormalFeatures(extract, list(images.split(3)), region), cache_bytes)


counts: list[int] = []  # images per call of the extract


class Line(Learner):
    """Predicts the last channel from the others, with dropout and noise, so that every draw matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 1, 1)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.zeros_(self.layer.bias)
        self.drop = nn.Dropout(0.3)

    def forward(self, lesson: Lesson) -> Tensor:
        noise = torch.randn(lesson.images[:, 2].shape, generator=lesson.generator)
        found = self.layer(self.drop(lesson.features[0]))[:, 0]
        return (found - lesson.images[:, 2] + 0.1 * noise).square().mean()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.layer.weight], "lr": 0.05}, {"params": [self.layer.bias], "lr": 0.01}]

    def rate(self, done: float) -> float:
        return 1 - done


class Still(Line):
    """Without anything random but the order of the images: the same in any number of processes."""

    def forward(self, lesson: Lesson) -> Tensor:
        return (self.layer(lesson.features[0])[:, 0] - lesson.images[:, 2]).square().mean()


def test_the_loop_is_the_one_written_out() -> None:
    images, config = pictures(), LearningConfig(steps=9, batch_size=4, clip=0.5, reset_every=4, seed=5)
    learner = Still()
    losses = learn(learner, normals(images), config, WHAT)

    layer = Still().layer
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 0.05}, {"params": [layer.bias], "lr": 0.01}])
    order = [int(n) for epoch in range(6) for n in np.random.default_rng([5, epoch]).permutation(7)]
    expected = []
    for step in range(9):
        batch = images[order[4 * step : 4 * step + 4]]
        if step in (4, 8):
            optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}])
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.05 * (1 - step / 9), 0.01 * (1 - step / 9)
        loss = ((layer(batch[:, :2] * 2)[:, 0] - batch[:, 2]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(learner.layer.weight, layer.weight, rtol=1e-5, atol=1e-6)
    assert not learner.training
    assert losses[-1] < losses[0]


def test_every_image_is_seen_once_in_a_pass_and_its_features_are_computed_once() -> None:
    images = pictures()
    kept, config = normals(images), LearningConfig(steps=7, batch_size=3)
    seen = []
    for step in range(7):
        lesson = kept.lesson(config, step)
        torch.testing.assert_close(lesson.features[1], images[list(lesson.numbers)][:, :, ::2, ::2])
        seen += lesson.numbers
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    assert sum(counts) == 7
    without = normals(images, cache_bytes=0)
    for step in range(7):
        assert len(without.lesson(config, step).features) == 2
    assert sum(counts) > 14  # an image that ends one pass and begins the next is computed once


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    images, config = pictures(), LearningConfig(steps=12, batch_size=3)
    whole = Line()
    losses = learn(whole, normals(images), config, WHAT)

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        assert (what, total) == (WHAT, 12)
        if done == 8:
            raise Killed

    place = Workplace(checkpoint=tmp_path / "state.pt", save_every=5)
    with pytest.raises(Killed):
        learn(Line(), normals(images), config, WHAT, place, kill)
    steps: list[int] = []
    place.resume, again = True, Line()
    before = torch.random.get_rng_state()
    resumed = learn(again, normals(images), config, WHAT, place, lambda what, done, total: steps.append(done))
    assert steps == list(range(6, 13))
    assert resumed == losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own generator is as it was
    with pytest.raises(ValueError, match=r"state\.pt was written with other photographs"):
        learn(Line(), normals(images + 1), config, WHAT, place)
    with pytest.raises(ValueError, match=r"options or processes: give those again"):
        learn(Line(), normals(images), config, WHAT, place, options="others")


def test_the_region_is_that_of_the_images() -> None:
    images = pictures()
    regions = torch.zeros(7, 8, 8, dtype=torch.bool)
    for number in range(7):
        regions[number, : number + 1] = True
    lesson = normals(images, RegionOfInterest(regions)).lesson(LearningConfig(steps=2, batch_size=4), 1)
    assert lesson.region is not None
    assert lesson.region.pixels[:, :, 0].sum(1).tolist() == [number + 1 for number in lesson.numbers]


def in_one_of_two(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    torch.set_num_threads(1)
    learner, accelerator = Still(), Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    losses = learn(learner, normals(pictures(8)), LearningConfig(steps=6, batch_size=4), WHAT, Workplace(accelerator))
    return losses, learner.state_dict()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    learner = Still()
    losses = learn(learner, normals(pictures(8)), LearningConfig(steps=6, batch_size=4), WHAT)
    for found, state in together(2, tmp_path, in_one_of_two):
        assert found == pytest.approx(losses, rel=1e-5)
        for name, value in learner.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def test_mistakes() -> None:
    class Wild(Still):
        def forward(self, lesson: Lesson) -> Tensor:
            return super().forward(lesson) * (torch.inf if lesson.step == 2 else 1)

    with pytest.raises(ValueError, match="the loss of step 3 is inf: lower the learning rate"):
        learn(Wild(), normals(pictures()), LearningConfig(steps=4, batch_size=2), WHAT)
    with pytest.raises(ValueError, match="batch_size 4 images cannot be shared equally by 3 processes"):
        normals(pictures()).lesson(LearningConfig(steps=1, batch_size=4), 0, 0, 3)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        LearningConfig(steps=0)
    with pytest.raises(ValueError, match="clip -1 must not be negative"):
        LearningConfig(steps=1, clip=-1)
    assert HERE.rank == 0
    assert HERE.processes == 1

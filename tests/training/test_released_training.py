"""The recipe's own step against ten Adam steps of the authors' loop, computed apart in float64 (tests/golden)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from torch import Tensor

from adpretrain.backbones import Backbone
from adpretrain.config import PretrainConfig, ProjectorConfig
from adpretrain.convert import projector_from_official
from adpretrain.extractor import ADExtractor
from adpretrain.parsing import from_dict, read_yaml
from adpretrain.preprocess import Preprocess
from adpretrain.projector import FeatureProjector
from adpretrain.training.batches import ResidualBatch
from adpretrain.training.objective import Objective
from adpretrain.training.run import prepare, training_step
from adpretrain.training.speed import Stopwatch, Throughput
from adpretrain.training.state import Run, learner, make_optimizer

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("official_training*.npz"))
CPU = torch.device("cpu")


class Unused(Backbone):
    """The widths of the levels; the residuals are given."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__("unused", widths, Preprocess(), list(range(1, len(widths) + 1)))


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def released_config() -> PretrainConfig:
    """The shipped one, in the precision of the golden numbers instead of bfloat16."""
    path = str(ROOT / "recipes" / "configs" / "released" / "dinov2-base.yaml")
    config = from_dict(PretrainConfig, read_yaml(path), path)
    return replace(config, optim=replace(config.optim, weights="float32", precision="no"))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_ten_steps_are_those_of_the_authors_loop(file: Path, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState, "default_device", CPU)
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()

    data = {name: torch.from_numpy(value) for name, value in np.load(file).items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}

    config = released_config()
    projector = projector_from_official(part("initial/"))
    widths = [level.references.shape[1] for level in projector.levels]
    extractor = ADExtractor(Unused(widths), projector, centers=list(data["centers"]))
    start = copy.deepcopy(projector.train().state_dict())
    model = learner(config, extractor, Console(quiet=True))
    adam, schedule = make_optimizer(config.optim, model, steps=10_000)
    accelerator = Accelerator(cpu=True)
    objective, speed = Objective(config.loss, extractor), Throughput(Stopwatch(CPU))
    run = Run(
        config, accelerator, Console(quiet=True), None, None, extractor, objective, model,
        accelerator.prepare(adam), schedule, 10_000, None, speed,
    )  # fmt: skip

    views = [[data[f"view{view}_{level}"] for level in range(len(widths))] for view in (1, 2)]
    residuals = ResidualBatch(views, data["masks"] > 0, [(0, index) for index in range(len(data["masks"]))], [])
    batch = prepare(run, residuals)
    for level in range(len(widths)):
        assert torch.equal(batch.angle_labels[level], data[f"angle_label_{level}"])
        assert torch.equal(batch.labels[level], data[f"norm_label_{level}"])
    losses = [training_step(run, batch).values()[0] for _ in data["losses"]]
    assert losses == pytest.approx(data["losses"].tolist(), rel=1e-12)

    expected = projector_from_official(part("after10/")).state_dict()
    for name, value in model.state_dict().items():
        moved = (expected[name] - start[name]).norm()
        assert moved > 0
        assert (value - expected[name]).norm() <= 1e-9 * moved, name


def test_a_fresh_projector_starts_as_the_authors_do(float64: None) -> None:
    """Against the golden start, by the moments of every kind of weight: uniform ones by their bound, normal ones by
    their deviation, and the attention without biases."""
    data = np.load(GOLDEN[0])
    theirs = projector_from_official(
        {name.removeprefix("initial/"): torch.from_numpy(data[name]) for name in data.files if "initial/" in name}
    ).state_dict()
    torch.manual_seed(0)
    ours = FeatureProjector([32] * 4, ProjectorConfig(references=48, form="released")).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for kind in {name.partition(".")[2].partition(".")[2] for name in ours}:
        found, wanted = (
            torch.cat([value.flatten() for name, value in state.items() if name.endswith(kind)])
            for state in (ours, theirs)
        )
        assert float(found.std()) == pytest.approx(float(wanted.std()), rel=0.2), kind
        assert float(found.abs().max()) == pytest.approx(float(wanted.abs().max()), rel=0.3), kind


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_no_shipped_configuration_erases_the_references(file: Path) -> None:
    """A decay of float32 weights would: its term is some 150 times the gradient of the references."""
    optim = read_yaml(str(file)).get("optim", {})
    assert optim.get("weight_decay", 0) == 0 or optim.get("weights") == "bfloat16"

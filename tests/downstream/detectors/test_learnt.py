"""What holds for every detector that trains a network: it learns, finds a defect, and goes on after it was killed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import SIZE, SMALL_UNIAD, wavy

from adpretrain.backbones import Backbone, load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detector import Detector
from downstream.detectors import DETECTORS, build_detector
from downstream.learning import Workplace

CASES: dict[str, dict[str, Any]] = {
    "cflow": {"blocks": 4, "vectors": 128, "learning_rate": 2e-3, "training": {"steps": 60}},
    "uniad": {**SMALL_UNIAD, "training": {"steps": 80}},
    "glass": {
        "hidden": 128,
        "climb_steps": 5,
        "radii": [2.0, 4.0],
        "learning_rate": 3e-3,
        "adaptor_rate": 1e-3,
        "training": {"steps": 80, "batch_size": 4},
    },
}

# An option of each that the shapes of its weights depend on.
WIDTHS = {"cflow": ("positions", 128), "uniad": ("inner", 64), "glass": ("hidden", 128)}


@functools.cache
def backbone() -> Backbone:
    return load_backbone("lite0", image_size=SIZE)


def made(name: str, extract: Any = None) -> Detector:
    return build_detector(name, extract or backbone(), CASES[name])


@functools.cache
def fitted(name: str) -> Detector:
    return made(name).fit(wavy(12, 0).split(5))


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_a_defect_stands_out(name: str) -> None:
    detector: Any = fitted(name)
    assert type(detector).learns
    assert DETECTORS[name].load() is type(detector)
    steps = CASES[name]["training"]["steps"]
    assert len(detector.losses) == steps
    assert sum(detector.losses[-5:]) < 0.8 * sum(detector.losses[:5])
    good, bad = detector.predict(wavy(8, 1)), detector.predict(wavy(8, 2, defect=0.6))
    assert float(bad.scores.min()) > float(good.scores.max())
    inside = bad.maps[:, 24:40, 24:40].mean((1, 2))
    corner = bad.maps[:, :12, :12].mean((1, 2))
    assert bool((inside > corner).all())


@pytest.mark.parametrize("name", CASES)
def test_a_score_does_not_depend_on_its_batch(name: str) -> None:
    images, detector = wavy(4, 3), fitted(name)
    together = detector.predict(images)
    for number, image in enumerate(images):
        alone = detector.predict(image[None])
        torch.testing.assert_close(alone.scores[0], together.scores[number], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.maps[0], together.maps[number], rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


def kill(what: str, done: int, total: int) -> None:
    if done == total - 1:
        raise Killed


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    checkpoint, detector = tmp_path / "state.pt", made(name)
    detector.workplace = Workplace(checkpoint=checkpoint, save_every=CASES[name]["training"]["steps"] // 2)
    with pytest.raises(Killed):
        detector.fit(wavy(12, 0).split(5), kill)
    assert not detector.fitted
    again = made(name)
    again.workplace = Workplace(checkpoint=checkpoint, resume=True)
    again.fit(wavy(12, 0).split(5))
    for part, whole in fitted(name).state()[0].items():
        assert torch.equal(again.state()[0][part], whole), part
    assert torch.equal(again.predict(wavy(2, 1)).maps, fitted(name).predict(wavy(2, 1)).maps)


@pytest.mark.parametrize("name", CASES)
def test_it_learns_from_residuals_too(name: str) -> None:
    detector = made(name, ADExtractor(backbone()).set_references(wavy(4, 5))).fit([wavy(12, 0)])
    good, bad = detector.predict(wavy(8, 1)).scores, detector.predict(wavy(8, 2, defect=0.6)).scores
    assert float(bad.min()) > float(good.mean())


@pytest.mark.parametrize("name", CASES)
def test_other_weights_than_the_options_say_are_refused(name: str, tmp_path: Path) -> None:
    folder = fitted(name).save_pretrained(tmp_path / name)
    config = folder / "config.json"
    text = config.read_text()
    key, value = WIDTHS[name]
    assert f'"{key}": {value}' in text
    config.write_text(text.replace(f'"{key}": {value}', f'"{key}": {2 * value}'))
    with pytest.raises(ValueError, match="options, tensors and features do not fit together"):
        type(fitted(name)).from_pretrained(folder)

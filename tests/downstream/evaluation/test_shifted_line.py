"""A line whose light drifts over the session: references from its first half know nothing of the second."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import tile
from PIL import Image

from adpretrain.backbones import load_backbone
from adpretrain.data import Sample, index_dataset
from downstream.evaluation.networks import Contender, Networks
from downstream.evaluation.protocol_options import ProtocolOptions
from downstream.evaluation.protocols import trials
from downstream.evaluation.trial import PhotographCache, Settings, run_trial

COUNT, DEFECTS = 24, 8
PATCHCORE = Contender("patchcore", "raw")


def photograph(seed: int, at: float, blob: bool) -> Image.Image:
    """A tile under a light that falls to a fifth from ``at`` 0 to 1; the defect is a disc 8 % darker than its tile."""
    pixels = np.asarray(tile(seed)).astype(float)
    if blob:
        ys, xs = np.mgrid[: len(pixels), : len(pixels)]
        row, column = np.random.default_rng(seed).integers(32, 64, 2)
        pixels[(ys - row) ** 2 + (xs - column) ** 2 < 49] *= 0.92
    return Image.fromarray((pixels * (1 - 0.8 * at)).astype(np.uint8))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """MVTec's layout, file names count the minutes of the session: every second good photograph is of the training
    split, so that K references of few-shot come from all of it. Defects come up all the time."""
    root = tmp_path_factory.mktemp("line")
    for minute in range(COUNT):
        folder = root / "tile" / ("test" if minute % 2 else "train") / "good"
        folder.mkdir(parents=True, exist_ok=True)
        photograph(minute, minute / COUNT, blob=False).save(folder / f"{minute}.png")
    (root / "tile" / "test" / "dent").mkdir()
    for number in range(DEFECTS):
        minute = number * COUNT // DEFECTS
        photograph(100 + number, minute / COUNT, blob=True).save(root / "tile" / "test" / "dent" / f"{minute}.png")
    return index_dataset("mvtec", root)


def test_a_detector_on_raw_features_loses_what_it_has_not_seen(session: list[Sample]) -> None:
    """The same detector with as many references, drawn from the whole session and from its first half."""
    networks, settings = (
        Networks(load_backbone("lite0", image_size=64)),
        Settings(photographs=PhotographCache(), pictures=0),
    )
    found, scores = {}, []
    for protocol in ("few-shot", "shifted-line"):
        options = ProtocolOptions(protocol, shots=(6,), draws=2)  # type: ignore[arg-type]
        records = [run_trial(trial, PATCHCORE, networks, settings)[0] for trial in trials(session, options)]
        found[protocol] = [record["metrics"]["image_auroc"] for record in records]
        scores = records[0]["scores"][: COUNT // 2]
    assert min(found["few-shot"]) > 0.9
    assert max(found["shifted-line"]) < min(found["few-shot"]) - 0.15
    assert np.corrcoef(scores, range(len(scores)))[0, 1] > 0.9  # good photographs look ever less like the references

"""A bad part among the good photographs sets the threshold alone: it is told by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.extractor import ADExtractor
from downstream.calibration import calibrate
from downstream.inspection.inspector import Inspector
from downstream.inspection.normals import Normal, outlier_note
from downstream.inspection.set_up import inspector_from_folder

Write = Callable[..., Path]
ALONE = "alone sets the threshold"


def inspector_of(folder: Path, extractor_dir: Path) -> Inspector:
    return inspector_from_folder(ADExtractor.from_pretrained(extractor_dir), torch.device("cpu"), folder)


def test_a_bad_part_among_the_good_ones_is_named(extractor_dir: Path, write_tiles: Write) -> None:
    folder = write_tiles("shots", range(12))
    assert not [text for text in inspector_of(folder, extractor_dir).warnings if ALONE in text]
    pixels = np.array(Image.open(folder / "tile_7.png"))
    pixels[20:60, 20:60] = 255
    Image.fromarray(pixels).save(folder / "tile_7.png")
    (found,) = [text for text in inspector_of(folder, extractor_dir).warnings if ALONE in text]
    assert found.startswith("tile_7.png alone sets the threshold: its score is ")
    assert "39 normal photographs in all" in found  # 5 % of 39 + 1 are two


@pytest.mark.parametrize(
    ("scores", "rate", "told"),
    [
        ([1.0] * 5 + [1.5] * 4 + [2.25], 0.05, True),
        ([1.0] * 5 + [1.5] * 4 + [2.0], 0.05, False),  # as far as the others from each other
        ([1.0] * 5 + [1.5] * 3 + [9.0], 0.05, False),  # nine tell nothing
        ([1.0] * 20 + [1.5] * 18 + [9.0], 0.05, False),  # one of 39 may exceed the threshold
        ([1.0] * 20 + [1.5] * 18 + [9.0], 0.02, True),
    ],
)
def test_it_is_far_from_the_others_and_there_are_enough(scores: list[float], rate: float, told: bool) -> None:
    blank = Normal("", "", (), (8, 8), 1.0, 255, reference=True)
    normals = [replace(blank, name=f"{number}.png", score=score) for number, score in enumerate(scores)]
    notes = outlier_note(normals, calibrate(scores, rate))
    assert len(notes) == told
    assert all(note.startswith(f"{len(scores) - 1}.png alone") for note in notes)

"""A photograph that shows nothing is never called normal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from products import make_synthetic

from adpretrain.data.layouts.realiad import index_realiad
from downstream.inspection import Options
from downstream.inspection.run import EXIT_INCOMPLETE, score_folder

NOTHING = {"black": (0, 0), "gray": (128, 0), "white": (255, 0), "sensor noise": (12, 1)}  # level, noise


@pytest.mark.slow
def test_a_covered_lens_is_not_normal_and_changes_no_other_score(tmp_path: Path) -> None:
    root = make_synthetic(tmp_path / "set", 1, 8, 2, size=128, seed=1, workers=1, progress=False)
    photos = [sample.image for sample in index_realiad(root) if not sample.anomalous]
    normal, seen, all_of_them = (tmp_path / name for name in ("normal", "seen", "all"))
    for folder, chosen in ((normal, photos[:5]), (seen, photos[5:7]), (all_of_them, photos[5:7])):
        folder.mkdir()
        for path in chosen:
            Image.open(path).save(folder / f"{path.stem}.png")
    pale = Image.open(photos[7]).convert("RGB").point(lambda level: 128 + (level - 128) // 2)
    pale.save(all_of_them / "pale.png")
    rng = np.random.default_rng(0)
    for name, (level, noise) in NOTHING.items():
        values = (level + noise * rng.standard_normal((128, 128, 3))).clip(0, 255).round().astype(np.uint8)
        Image.fromarray(values).save(all_of_them / f"{name}.png")
    options = Options(threshold=1e9)  # everything that is scored is called normal
    alone = score_folder("embedded", normal, seen, tmp_path / "out", options=options, device="cpu")
    found = score_folder("embedded", normal, all_of_them, tmp_path / "out", options=options, device="cpu")
    blank = {result.path: result.reason for result in found.results if result.verdict == "unreadable"}
    assert blank.keys() == {f"{name}.png" for name in NOTHING}
    assert all(" is blank (" in reason and "a covered lens" in reason for reason in blank.values())
    assert found.exit_code == EXIT_INCOMPLETE
    scores = {result.path: result.score for result in found.results}
    assert scores["pale.png"] is not None
    for result in alone.results:
        assert scores[result.path] == pytest.approx(result.score, rel=1e-5)  # batches of other sizes


@pytest.mark.parametrize("blank", [0, 1])
def test_a_blank_reference_is_refused_by_name(tmp_path: Path, blank: int) -> None:
    """One of two: their median would not tell which."""
    rng = np.random.default_rng(0)
    for number in range(2):
        values = rng.integers(0, 256, (64, 64, 3)) * (number != blank)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=rf"depends on the normal photographs.*/{blank}\.png is blank \(.*0\.0%"):
        score_folder("embedded", tmp_path, tmp_path, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "scores.csv").exists()

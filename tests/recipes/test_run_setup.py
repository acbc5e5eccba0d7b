"""Which samples of a benchmark a pretraining run takes."""

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from adpretrain.config import DataConfig
from adpretrain.data import index_dataset

ROOT = Path(__file__).parents[2]


def test_a_validation_split_is_neither_trained_on_nor_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from run_data import split_samples

    for category in ("box", "juice"):
        for folder in ("train/good", "validation/good", "test/good"):
            (tmp_path / category / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / category / folder / "000.png")
    training, held_out = split_samples(index_dataset("auto", tmp_path), ["juice"])
    assert [(s.category, s.split) for s in training] == [("box", "train"), ("box", "test")]
    assert [(s.category, s.split) for s in held_out] == [("juice", "train"), ("juice", "test")]


def test_columns_reach_a_hugging_face_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from checked_samples import checked_samples

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("shot,state\na.png,good\n")
    data = DataConfig("auto", str(tmp_path), {"image": "shot", "label": "state"})
    samples = checked_samples(data, tmp_path / "run", Console(quiet=True), main=True)
    assert [s.image for s in samples] == [tmp_path / "a.png"]

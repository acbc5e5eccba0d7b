"""Which samples of a benchmark a pretraining run takes."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from adpretrain.config import DataConfig
from adpretrain.data import Sample, index_dataset

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


def product(name: str, good: int, defects: int) -> list[Sample]:
    samples = [Sample(Path(f"{name}{i}.png"), None, name, "good", None, "train") for i in range(good)]
    return samples + [
        Sample(Path(f"{name}d{i}.png"), Path("m.png"), name, "dent", None, "train") for i in range(defects)
    ]


def test_held_out_products_without_metrics_are_named_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product needs both kinds of images; without any such product there is nothing to score."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from run_data import held_out_products

    console = Console(file=io.StringIO(), width=200)
    bolt, nut, disc = product("bolt", 5, 1), product("nut", 5, 0), product("disc", 4, 2)
    assert list(held_out_products([*bolt, *nut, *disc], 4, console)) == ["bolt"]
    assert "not scored for want of normal or of defective images: disc, nut" in console.file.getvalue()
    assert held_out_products([], 4, console) == {}
    with pytest.raises(ValueError, match=r"none of the held-out products can be scored \(nut\)"):
        held_out_products(nut, 4, console)
    with pytest.raises(ValueError, match=r"disc: 5 references \(shots\) cannot be drawn from its pool of 4 normal"):
        held_out_products([*bolt, *disc], 5, console)

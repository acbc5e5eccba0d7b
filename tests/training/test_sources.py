"""Which samples of a benchmark a pretraining run takes."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from adpretrain.config import DataConfig, PretrainConfig
from adpretrain.data import Sample, index_dataset
from adpretrain.data.shard_writer import write_shards
from adpretrain.data.shards import Shards
from adpretrain.preprocess import Preprocess

ROOT = Path(__file__).parents[2]


def test_a_validation_split_is_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    from adpretrain.training.sources import split_samples

    for category in ("box", "juice"):
        for folder in ("train/good", "validation/good", "test/good"):
            (tmp_path / category / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / category / folder / "000.png")
    training, held_out = split_samples(index_dataset("auto", tmp_path), ["juice"])
    assert [(s.category, s.split) for s in training] == [("box", "train"), ("box", "test")]
    assert [(s.category, s.split) for s in held_out] == [("juice", "train"), ("juice", "test")]


def test_columns_reach_a_hugging_face_set(tmp_path: Path) -> None:
    from adpretrain.training.sources import checked_samples

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("shot,state\na.png,good\n")
    data = DataConfig("auto", str(tmp_path), {"image": "shot", "label": "state"})
    samples = checked_samples(data, tmp_path / "run", Console(quiet=True), main=True)
    assert [s.image for s in samples] == [tmp_path / "a.png"]


def test_pretraining_without_a_single_defect_is_refused(tmp_path: Path) -> None:
    from adpretrain.training.sources import training_set

    for name in (
        "train/good/0.png",
        "train/good/1.png",
        "test/good/0.png",
        "test/dent/0.png",
        "ground_truth/dent/0.png",
    ):
        (tmp_path / "set/box" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "set/box" / name)
    samples = index_dataset("auto", tmp_path / "set")
    config = PretrainConfig(data=DataConfig("auto", str(tmp_path / "set")), shots=[1])
    assert len(training_set(config, None, samples, Preprocess(8))) == 4
    normal = [sample for sample in samples if not sample.anomalous]
    with pytest.raises(ValueError, match=r"the 3 training images of .*set show no defect: the losses need anomalies"):
        training_set(config, None, normal, Preprocess(8))
    shards = Shards(write_shards(normal, tmp_path / "shards", 1, references=2))
    with pytest.raises(ValueError, match=r"the 3 training images of .*set show no defect"):
        training_set(config, shards, [], Preprocess(8))


def product(name: str, good: int, defects: int) -> list[Sample]:
    samples = [Sample(Path(f"{name}{i}.png"), None, name, "good", None, "train") for i in range(good)]
    return samples + [
        Sample(Path(f"{name}d{i}.png"), Path("m.png"), name, "dent", None, "train") for i in range(defects)
    ]


def test_held_out_products_without_metrics_are_named_or_refused() -> None:
    """A product needs both kinds of images; without any such product there is nothing to score."""
    from adpretrain.training.sources import held_out_products

    console = Console(file=io.StringIO(), width=200)
    bolt, nut, disc = product("bolt", 5, 1), product("nut", 5, 0), product("disc", 4, 2)
    assert list(held_out_products([*bolt, *nut, *disc], 4, console)) == ["bolt"]
    assert "not scored because normal or defective images are missing: disc, nut" in console.file.getvalue()
    assert held_out_products([], 4, console) == {}
    with pytest.raises(ValueError, match=r"none of the held-out products can be scored \(nut\)"):
        held_out_products(nut, 4, console)
    with pytest.raises(ValueError, match=r"disc: 5 references \(shots\) cannot be drawn from its pool of 4 normal"):
        held_out_products([*bolt, *disc], 5, console)

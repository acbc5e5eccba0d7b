"""sPRO of a small set in MVTec LOCO's layout, against what its mask files say, and where it is not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn import tile
from numpy.typing import NDArray
from PIL import Image
from scipy.integrate import trapezoid

from adpretrain.data import Sample, index_dataset
from adpretrain.data.layouts.saturation import saturated_shares, saturation_file
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from downstream.evaluation import trial
from downstream.evaluation.measured import measured_at_once
from downstream.evaluation.networks import Contender, Networks
from downstream.evaluation.protocols import Part, ProtocolOptions, trials
from downstream.evaluation.trial import Settings, run_trial

SIDE = 64
CONFIG = [
    {"defect_name": "1_pin", "pixel_value": 255, "saturation_threshold": 60, "relative_saturation": False},
    {"defect_name": "dirt", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "large", "pixel_value": 7, "saturation_threshold": 100_000, "relative_saturation": False},
]
BOXES = {  # stem of a defective image -> (box, value of its mask) for every mask file
    "logical_anomalies/000": [((0, 0, 20, 11), 255), ((10, 5, 31, 16), 254)],  # they overlap
    "logical_anomalies/001": [((40, 40, 50, 50), 7)],
    "structural_anomalies/000": [((30, 2, 33, 5), 254)],
}
AREAS = {"logical_anomalies/000": [60, 115], "logical_anomalies/001": [100], "structural_anomalies/000": [4]}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Tiles of 64 pixels as a category of LOCO, with its defects_config.json."""
    root = tmp_path / "pin_box"
    for number, name in enumerate(
        ("train/good/000", "train/good/001", "train/good/002", "test/good/000", "test/good/001")
    ):
        save(tile(number), root / f"{name}.png")
    for number, (name, boxes) in enumerate(BOXES.items(), start=10):
        save(tile(number, blob=True), root / "test" / f"{name}.png")
        for index, (place, value) in enumerate(boxes):
            mask = Image.new("L", (SIDE, SIDE), 0)
            mask.paste(value, place)
            save(mask, root / "ground_truth" / name / f"{index:03}.png")
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((SIDE, SIDE)).save(path)


@pytest.fixture
def samples(box: Path) -> list[Sample]:
    return index_dataset("auto", box)


def scored(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split == "test"]


def stem(sample: Sample) -> str:
    return f"{sample.defect}/{sample.image.stem}"


def expected_area(test: list[Sample], maps: NDArray, kind: str, limit: float) -> float:
    """From the boxes and areas above, threshold by threshold, for the images of one kind and the normal ones."""
    rows = [i for i, sample in enumerate(test) if not sample.anomalous or sample.defect == kind]
    normal, regions = np.ones((len(rows), SIDE, SIDE), bool), []
    for number, row in enumerate(rows):
        boxes = BOXES.get(stem(test[row]), [])
        for ((left, top, right, bottom), _), enough in zip(boxes, AREAS.get(stem(test[row]), []), strict=True):
            normal[number, top:bottom, left:right] = False
            regions.append((number, np.s_[top:bottom, left:right], enough))
    own, fprs, spros = maps[rows], [0.0], [0.0]
    for threshold in np.unique(own)[::-1]:
        hit = own >= threshold
        fprs.append(float(hit[normal].mean()))
        spros.append(float(np.mean([min(hit[number][place].sum() / enough, 1) for number, place, enough in regions])))
        if fprs[-1] > limit:
            break
    at_limit = float(np.interp(limit, fprs[-2:], spros[-2:]))
    return float(trapezoid([*spros[:-1], at_limit], [*fprs[:-1], limit])) / limit


def random_maps(test: list[Sample]) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(len(test), SIDE, SIDE)).astype(np.float32)
    for row, sample in enumerate(test):
        for (left, top, right, bottom), _ in BOXES.get(stem(sample), []):
            maps[row, top:bottom, left:right] += 1.5
    return maps


def masks_of(test: list[Sample]) -> NDArray[np.bool_]:
    masks = np.zeros((len(test), SIDE, SIDE), bool)
    for row, sample in enumerate(test):
        for (left, top, right, bottom), _ in BOXES.get(stem(sample), []):
            masks[row, top:bottom, left:right] = True
    return masks


def test_spro_is_the_mean_of_both_kinds_measured_by_hand(samples: list[Sample]) -> None:
    test = scored(samples)
    maps, masks = random_maps(test), masks_of(test)
    found = measured_at_once(test, maps, masks, maps.max(axis=(1, 2)), Preprocess(SIDE), per_defect=True)
    for name, limit in (("spro_05", 0.05), ("spro_30", 0.3)):
        kinds = [expected_area(test, maps, kind, limit) for kind in ("logical_anomalies", "structural_anomalies")]
        assert [found.defects[kind][name] for kind in found.defects] == pytest.approx(kinds, abs=1e-12)
        assert found.values[name] == pytest.approx(np.mean(kinds), abs=1e-12)
        assert found.values[name] > 0.05
    assert found.notes == []


def test_the_share_that_is_enough_is_counted_in_pixels_of_the_file(samples: list[Sample]) -> None:
    """60 of 220 pixels, half of 231 rounded down, all of 100 where 100,000 are asked for, half of 9 rounded down."""
    shares = {stem(sample): saturated_shares(sample) for sample in samples if sample.anomalous}
    assert shares["logical_anomalies/000"] == pytest.approx([60 / 220, 115 / 231])
    assert shares["logical_anomalies/001"] == [1.0]
    assert shares["structural_anomalies/000"] == pytest.approx([4 / 9])


def test_a_region_that_vanishes_in_resizing_is_told_of(samples: list[Sample]) -> None:
    test = scored(samples)
    maps = np.random.default_rng(1).random((len(test), 8, 8), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[[sample.anomalous for sample in test], :2, :2] = True
    found = measured_at_once(test, maps, masks, maps.max(axis=(1, 2)), Preprocess(8))
    assert found.notes == ["1 of 4 marked regions vanish in resizing: sPRO is without them"]
    assert found.values["spro_05"] is None  # the only structural one is gone


def test_a_trial_has_it_where_the_set_says_how_much_is_enough(
    box: Path, samples: list[Sample], extractor_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = Networks(ADExtractor.from_pretrained(extractor_dir).backbone)
    contender, settings = Contender("featurenorm", "raw"), Settings(pictures=0, per_defect=True)

    def metrics(samples: list[Sample]) -> tuple[dict[str, float | None], dict[str, dict[str, float]], list[str]]:
        (found,) = trials(samples, ProtocolOptions())
        (record,) = run_trial(found, contender, networks, settings)
        return record["metrics"], record.get("defects", {}), record["notes"]

    values, kinds, _ = metrics(samples)
    for name in ("spro_05", "spro_30"):
        assert values[name] == pytest.approx(np.mean([kind[name] for kind in kinds.values()]), abs=1e-12)
    assert 0 < values["spro_30"] <= 1
    with monkeypatch.context() as patch:
        patch.setattr(trial, "WHOLE", 0)
        streamed, _, notes = metrics(samples)
        assert streamed["spro_05"] is None
        assert "sPRO is not measured in a stream: it needs all maps at once" in notes
    (box / "defects_config.json").unlink()
    plain, _, _ = metrics(samples)
    assert plain["spro_05"] is None
    assert {**plain, "spro_05": 0, "spro_30": 0} == {**values, "spro_05": 0, "spro_30": 0}


def test_perturbed_images_have_none(samples: list[Sample], extractor_dir: Path) -> None:
    """Their masks are moved with them; those in the files are not where they were."""
    networks = Networks(ADExtractor.from_pretrained(extractor_dir).backbone)
    first = trials(samples, ProtocolOptions("robustness"))[0]
    (record,) = run_trial(first, Contender("featurenorm", "raw"), networks, Settings(pictures=0))
    assert isinstance(first.parts[0], Part)
    assert first.parts[0].perturbed is not None
    assert record["metrics"]["spro_05"] is None
    assert record["metrics"]["aupro"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda kinds: kinds[1:],
            r"000\.png has the values \[255\]; expected one of those that .*config.json lists: 7, 254",
        ),
        (lambda kinds: [], r"lists: none"),
        (lambda kinds: {}, "holds a dict; expected a list of kinds of defects"),
        (lambda kinds: [3], "entry 1 of .*config.json is not a kind of defect: TypeError"),
        (
            lambda kinds: [{"pixel_value": 255}],
            "entry 1 of .* is not a kind of defect: KeyError 'saturation_threshold'",
        ),
        (
            lambda kinds: [{**kinds[0], "saturation_threshold": 0}],
            "saturation_threshold 0, .*expected a positive integer",
        ),
        (lambda kinds: [{**kinds[1], "saturation_threshold": 2}], r"saturation_threshold 2, .*\(at most 1 if it is"),
        (lambda kinds: [{**kinds[0], "pixel_value": "255"}], "pixel_value '255', .*expected a positive integer"),
    ],
)
def test_a_wrong_saturation_is_named(box: Path, samples: list[Sample], change: Callable, message: str) -> None:
    (box / "defects_config.json").write_text(json.dumps(change(CONFIG)))
    with pytest.raises(ValueError, match=message):
        saturated_shares(next(sample for sample in samples if sample.anomalous))


def test_a_mask_of_two_values_is_named(box: Path, samples: list[Sample]) -> None:
    first = next(sample for sample in samples if sample.anomalous)
    mask = Image.open(first.mask_files[0])
    mask.putpixel((63, 63), 7)
    mask.save(first.mask_files[0])
    with pytest.raises(ValueError, match=r"000\.png has the values \[7, 255\]; expected one"):
        saturated_shares(first)
    mask.convert("RGB").save(first.mask_files[0])
    with pytest.raises(ValueError, match=r"000\.png has the mode RGB; expected gray values"):
        saturated_shares(first)


def test_only_masks_in_locos_place_have_a_saturation_file(samples: list[Sample], tile_products: Path) -> None:
    assert {saturation_file(sample) is None for sample in samples if not sample.anomalous} == {True}
    assert not any(saturation_file(sample) for sample in index_dataset("mvtec", tile_products))

"""The procedural set: determinism, layout, exact masks, every family, views, reuse and failure."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from products import DEFECTS, PRODUCTS, make_product, make_synthetic, render, write
from products.product import MIN_AREA, MIN_CHANGE, VISIBLE, difference, kind_of
from scipy import ndimage

SMALL = {"products": 3, "normals": 2, "defects": 3, "views": 3, "size": 96, "seed": 5, "progress": False}


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("synthetic") / "set", workers=1, **SMALL)


def test_the_bytes_do_not_depend_on_the_workers(small: Path, tmp_path: Path) -> None:
    parallel = make_synthetic(tmp_path / "set", workers=2, **SMALL)
    assert contents(parallel) == contents(small)


def test_another_seed_gives_other_images_and_fewer_products_the_same(small: Path, tmp_path: Path) -> None:
    one = contents(make_synthetic(tmp_path / "one", workers=1, **{**SMALL, "products": 1}))
    other = contents(make_synthetic(tmp_path / "other", workers=1, **{**SMALL, "products": 1, "seed": 6}))
    images = {name: data for name, data in one.items() if name.endswith((".jpg", ".png"))}
    assert images.items() <= contents(small).items()
    assert not set(images.values()) & set(other.values())


def test_the_layout_is_that_of_real_iad(small: Path) -> None:
    listings = sorted((small / "realiad_jsons" / "realiad_jsons").glob("*.json"))
    assert [p.stem for p in listings] == sorted(p.name for p in (small / "realiad_256").iterdir())
    assert len(listings) == 3
    listed = set()
    for listing in listings:
        content = json.loads(listing.read_text())
        assert content["meta"] == {"normal_class": "OK", "prefix": f"{listing.stem}/"}
        assert {e["anomaly_class"] for e in content["train"]} == {"OK"}
        assert len(content["train"]) == 3
        assert len(content["test"]) == 3 + 9
        for entry in content["train"] + content["test"]:
            assert entry["category"] == listing.stem
            folder = small / "realiad_256" / listing.stem
            path = Path(entry["image_path"])
            listed.add(folder / path)
            with Image.open(folder / path) as image:
                assert (image.size, image.mode) == ((96, 96), "RGB")
            assert (entry["mask_path"] is None) == (entry["anomaly_class"] == "OK")
            if entry["mask_path"]:
                label, family, sample = path.parts[:3]
                assert (label, family) == ("NG", entry["anomaly_class"])
                assert path.name.startswith(f"{listing.stem}_{sample[1:]}_NG_{family}_C")
                assert entry["mask_path"] == path.with_suffix(".png").as_posix()
                values = np.unique(np.asarray(Image.open(folder / entry["mask_path"])))
                assert values.tolist() == [0, 255]
    assert listed == set((small / "realiad_256").rglob("*.jpg"))


def test_every_defective_sample_shows_its_defect_in_the_frontal_view(small: Path) -> None:
    frontal = list(small.glob("realiad_256/*/NG/*/*/*_C1_*.jpg"))
    assert len(frontal) == 9
    assert all(path.with_suffix(".png").is_file() for path in frontal)


@pytest.mark.parametrize("family", DEFECTS)
def test_a_family_changes_the_image_exactly_where_the_mask_says(family: str) -> None:
    shown, areas = 0, []
    for index in range(5):
        product = make_product(index, seed=3, size=128)
        normal, shot = render(product, 9, 0), render(product, 9, 0, family)
        np.testing.assert_array_equal(shot.twin, normal.image)
        if shot.mask is None:
            np.testing.assert_array_equal(shot.image, shot.twin)
            continue
        shown += 1
        change = difference(shot.image, normal.image)
        visible = change > max(VISIBLE, 0.1 * change.max())
        # Every visible change is masked, but for crumbs of under four px ...
        crumbs, _ = ndimage.label(visible & ~shot.mask, np.ones((3, 3)))
        assert np.bincount(crumbs.ravel())[1:].max(initial=0) < 4
        # ... and nothing is masked that is not in reach (closing, small holes) of a visible change.
        reach = ndimage.binary_fill_holes(ndimage.binary_dilation(visible, iterations=3))
        assert not (shot.mask & ~reach).any()
        assert change[shot.mask].mean() >= MIN_CHANGE
        assert shot.mask.sum() >= MIN_AREA * (128 / 224) ** 2
        areas.append(shot.mask.mean())
    assert shown >= 3
    assert max(areas) < 0.7


def test_sizes_reach_from_specks_to_large_and_contrasts_from_faint_to_glaring() -> None:
    areas, contrasts = [], []
    for index in range(20):
        product = make_product(index, seed=0, size=128)
        for family in list(DEFECTS)[index % 2 :: 2]:
            shot = render(product, 4, 0, family)
            if shot.mask is not None:
                areas.append(shot.mask.sum() * (224 / 128) ** 2)
                contrasts.append(difference(shot.image, shot.twin)[shot.mask].mean())
    assert min(areas) < 80
    assert max(areas) > 5000
    assert min(contrasts) < 0.06
    assert max(contrasts) > 0.3


def test_kinds_and_families_all_appear() -> None:
    kinds = [kind_of(index, seed=0) for index in range(80)]
    assert set(kinds) == set(PRODUCTS)
    assert kinds[:5] != [kind_of(index, seed=1) for index in range(5)]
    first = {make_product(index, 0, 64).families[0] for index in range(60)}
    assert len(first) >= 12
    assert len(DEFECTS) >= 12


@pytest.mark.parametrize("kind", PRODUCTS)
def test_every_kind_renders_in_every_view_and_samples_differ(kind: str) -> None:
    index = next(i for i in range(200) if kind_of(i, seed=2) == kind)
    product = make_product(index, seed=2, size=64)
    shots = [render(product, 1, view).image for view in range(5)] + [render(product, 2).image]
    for shot in shots:
        assert shot.shape in {(64, 64, 1), (64, 64, 3)}
        assert np.isfinite(shot).all()
        assert 0 <= shot.min() <= shot.max() <= 1
        assert shot.std() > 0.002
    assert all(np.abs(a - b).max() > 0.02 for a, b in pairwise(shots))


def test_a_set_with_the_same_parameters_is_reused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert make_synthetic(small, workers=2, **{**SMALL, "progress": True}) == small
    assert before == {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert "reusing" in capsys.readouterr().err


def test_another_set_or_foreign_files_are_never_overwritten(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made with.*'seed': 5.*choose another folder"):
        make_synthetic(small, workers=1, **{**SMALL, "seed": 6})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        make_synthetic(tmp_path, workers=1, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_left_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(product: object, sample: int, view: int = 0, family: str | None = None) -> write.Rendering:
        if family is not None:
            raise OSError("disk full")
        return render(product, sample, view)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "render", failing)
    with pytest.raises(OSError, match="disk full"):
        make_synthetic(tmp_path / "set", workers=1, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("views", 6), ("views", 0), ("products", 0), ("size", 97), ("size", 32), ("workers", 0)],
)
def test_a_bad_parameter_is_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_synthetic(tmp_path / "set", **{**SMALL, "workers": 1, name: value})


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"'rust'.*scratch"):
        render(make_product(0, 0, 64), 1, 0, "rust")

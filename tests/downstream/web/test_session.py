"""Verdicts for another rate, without scoring again: the same as a fresh run of `adpretrain score` at that rate."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain.extractor import ADExtractor
from downstream.inspection import Options
from downstream.inspection.facts import regions_note
from downstream.inspection.inspector import Inspector
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, write_scores
from downstream.inspection.resume import Record
from downstream.inspection.set_up import inspector_from_folder
from downstream.inspection.share import score_images
from downstream.inspection.source import InFolder
from downstream.tiles import Tiling
from downstream.web import page as showing
from downstream.web.page import EXAMPLES
from downstream.web.session import SINGLE, Scored, Setup, heatmap, score_uploads, verdicts
from downstream.web.uploads import Limits, Upload, uploads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor(extractor_dir: Path) -> ADExtractor:
    return ADExtractor.from_pretrained(extractor_dir)


def scored_of(extractor: ADExtractor, good: Path, new: Path) -> Scored:
    return score_uploads(extractor, CPU, uploads(sorted(good.iterdir())), uploads(sorted(new.iterdir())))


def test_every_rate_gives_what_a_fresh_run_gives(
    extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    good, new = write_tiles("good", range(5)), write_tiles("new", range(10, 14))
    write_tiles("new", range(20, 22), blob=True, prefix="blob")
    scored = scored_of(extractor, good, new)
    for rate in (0.05, 0.2, 0.4):
        found = verdicts(scored, rate)
        inspector = inspector_from_folder(extractor, CPU, good, options=Options(rate))
        with Record(tmp_path, {}, resume=False) as record:
            entries = list(score_images(inspector, InFolder(new, sorted(new.iterdir())), record))
        results = [entry.result for entry in entries]
        assert [result.path for result in found.results] == [result.path for result in results]
        assert [result.verdict for result in found.results] == [result.verdict for result in results]
        assert [result.p_value for result in found.results] == [result.p_value for result in results]
        assert [result.regions for result in found.results] == [result.regions for result in results]
        assert found.pixel_limit == pytest.approx(inspector.pixel_limit, rel=1e-6)
        boxes = [region.box for regions in found.regions for region in regions]
        assert boxes == [(one.left, one.top, one.right, one.bottom) for entry in entries for one in entry.findings]
        np.testing.assert_allclose([r.score for r in found.results], [r.score for r in results], rtol=1e-6)
        assert found.threshold == pytest.approx(inspector.threshold, rel=1e-6)
        assert found.scale.limit == pytest.approx(inspector.scale.limit, rel=1e-6)
        assert found.scale.high == pytest.approx(inspector.scale.high, rel=1e-6)
        assert found.warnings == (
            *inspector.warnings,
            *regions_note(results, sum(result.is_quiet for result in results), promised=True),
        )
        assert {r.verdict for r in found.results if r.path.startswith("blob")} == {ANOMALOUS}


def test_the_table_is_that_of_the_command(
    extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    scored = scored_of(extractor, write_tiles("good", range(3)), write_tiles("new", range(10, 13)))
    found = verdicts(scored, 0.25)
    write_scores(tmp_path / "ours.csv", found.results)
    rows = list(csv.DictReader((tmp_path / "ours.csv").open(encoding="utf-8")))
    assert [row["path"] for row in rows] == ["tile_10.png", "tile_11.png", "tile_12.png"]
    assert [float(row["score"]) for row in rows] == [result.score for result in found.results]


def test_regions_are_drawn_counted_and_told(extractor: ADExtractor, write_tiles: Callable[..., Path]) -> None:
    scored = scored_of(extractor, write_tiles("good", range(5)), write_tiles("new", range(20, 22), blob=True))
    found = verdicts(scored, 0.2)
    first = found.regions[0]
    assert first
    assert f'<td class="ad-regions">{len(first)}</td>' in showing.table(scored, found, 0)
    area = f"{first[0].area:.0f} px"
    assert f"above the limit {found.pixel_limit:.4g}; the highest peak is" in showing.viewer(scored, found, 0)
    assert area in showing.viewer(scored, found, 0)
    # Without its regions the picture differs, and only around the boxes (JPEG: blocks of 8 or 16 pixels).
    bare = dataclasses.replace(found, regions=([],) * len(found.regions))
    pictures = [Image.open(io.BytesIO(heatmap(scored, 0, one))) for one in (found, bare)]
    differing = np.abs(np.subtract(*(np.asarray(one, dtype=int) for one in pictures))).max(axis=2) > 24
    assert differing.any()
    zoom = pictures[0].width / scored.shots[0].size[0]
    lefts, tops, rights, bottoms = (np.multiply(sides, zoom) for sides in zip(*(one.box for one in first), strict=True))
    rows, columns = np.nonzero(differing)
    assert min(lefts) - 16 <= columns.min() <= columns.max() <= max(rights) + 16
    assert min(tops) - 32 <= rows.min() <= rows.max() <= max(bottoms) + 16


def test_a_higher_rate_never_loses_an_anomaly(extractor: ADExtractor, write_tiles: Callable[..., Path]) -> None:
    scored = scored_of(extractor, write_tiles("good", range(4)), write_tiles("new", range(10, 18)))
    counts = [sum(r.verdict == ANOMALOUS for r in verdicts(scored, rate).results) for rate in (0.2, 0.4, 0.6, 0.8)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert [round(verdicts(scored, rate).calibration.rate, 6) for rate in (0.01, 0.2, 0.4)] == [0.2, 0.2, 0.4]


def test_one_good_photograph_ranks_and_promises_nothing(
    extractor: ADExtractor, write_tiles: Callable[..., Path]
) -> None:
    new = write_tiles("new", range(10, 13))
    write_tiles("new", range(20, 21), blob=True, prefix="blob")
    scored = scored_of(extractor, write_tiles("good", range(1)), new)
    found = verdicts(scored, 0.05)
    assert found.threshold is None
    assert {(r.verdict, r.p_value) for r in found.results} == {(UNDECIDED, None)}
    assert found.results[found.ranked()[0]].path == "blob_20.png"
    assert found.warnings == (SINGLE,)
    assert (found.pixel_limit, {*map(len, found.regions)}) == (None, {0})
    assert "No threshold" in showing.summary(scored, found)
    assert heatmap(scored, 0, found) is not None


def test_visitors_share_weights_and_nothing_else(extractor_dir: Path, write_tiles: Callable[..., Path]) -> None:
    extractor = ADExtractor.from_pretrained(extractor_dir)
    good, new = write_tiles("good", range(3)), write_tiles("new", range(10, 13))
    first = scored_of(extractor, good, new)
    scored_of(extractor, write_tiles("other", range(20, 24), blob=True), new)
    again = scored_of(extractor, good, new)
    assert extractor.references is None
    assert [shot.score for shot in first.shots] == [shot.score for shot in again.shots]


def test_an_unreadable_photograph_is_listed_and_a_bad_good_one_stops(
    extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    good, new = write_tiles("good", range(3)), write_tiles("new", range(10, 12))
    (new / "note.png").write_text("not a picture")
    scored = scored_of(extractor, good, new)
    found = verdicts(scored, 0.25)
    assert [r.verdict for r in found.results if r.path == "note.png"] == [UNREADABLE]
    assert "not a photograph" in showing.table(scored, found, 0)
    assert str(tmp_path) not in showing.table(scored, found, 0)
    (good / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"good photographs, but zero\.png is bad: the content is not a photograph"):
        scored_of(extractor, good, new)


def test_other_shapes_are_noticed(extractor: ADExtractor, write_tiles: Callable[..., Path]) -> None:
    new = write_tiles("new", range(10, 12))
    Image.open(new / "tile_10.png").crop((0, 0, 96, 60)).save(new / "wide.png")
    scored = scored_of(extractor, write_tiles("good", range(3)), new)
    assert any(note.startswith("1 of 3 images have a shape") for note in scored.notes)


def test_names_are_escaped_everywhere(extractor: ADExtractor, write_tiles: Callable[..., Path]) -> None:
    evil = '<img src=x onerror="alert(1)">.png'
    paths = sorted(write_tiles("good", range(2)).iterdir())
    # Names are cleaned before; the page must not rely on it.
    scored = score_uploads(extractor, CPU, uploads(paths), [Upload(paths[0], evil), Upload(paths[1], "<b>&.png")])
    found = verdicts(scored, 0.4)
    for html in (showing.table(scored, found, 0), showing.viewer(scored, found, 0), showing.notes((evil,))):
        assert "<img src=x" not in html
        assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;.png" in html


def test_drawn_samples_are_photographs_with_and_without_defects(tmp_path: Path) -> None:
    good, new = (sorted(EXAMPLES.glob(f"{kind}_*.jpg")) for kind in ("good", "part"))
    assert (len(good), len(new)) == (8, 8)
    assert sum("good" in path.name for path in new) == 3
    sizes = {Image.open(path).size for path in (*good, *new)}
    assert sizes == {(256, 256)}
    assert len({path.read_bytes() for path in (*good, *new)}) == 16


def test_verdicts_are_words_besides_colours(extractor: ADExtractor, write_tiles: Callable[..., Path]) -> None:
    new = write_tiles("new", range(10, 12))
    write_tiles("new", range(20, 21), blob=True, prefix="blob")
    scored = scored_of(extractor, write_tiles("good", range(4)), new)
    page = showing.table(scored, verdicts(scored, 0.2), 0)
    assert f"▲ {ANOMALOUS}</span>" in page
    assert f"✓ {NORMAL}</span>" in page
    assert page.index("blob_20.png") < page.index("tile_1")  # the highest score first


@pytest.mark.parametrize("setup", ["tiles", "mask", "border"])
def test_the_setup_is_that_of_the_command(
    setup: str, extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    """Tiles, mask and border give the scores of `adpretrain score` with the same options."""
    good, new = write_tiles("good", range(4)), write_tiles("new", range(10, 12))
    write_tiles("new", range(20, 21), blob=True, prefix="blob")
    side = Image.open(next(good.iterdir())).size
    mask = Image.new("L", side, 0)
    mask.paste(255, (0, 0, side[0] // 2, side[1]))
    mask.save(tmp_path / "mask.png")
    tile = min(side) // 2
    chosen, options = {
        "tiles": (Setup(tile=tile), Options(tiling=Tiling(tile))),
        "mask": (Setup(mask=Upload(tmp_path / "mask.png", "m.png")), Options(roi=str(tmp_path / "mask.png"))),
        "border": (Setup(border=6), Options(ignore_border=6)),
    }[setup]
    files = uploads(sorted(good.iterdir())), uploads(sorted(new.iterdir()))
    scored = score_uploads(extractor, CPU, *files, setup=chosen)
    inspector = inspector_from_folder(extractor, CPU, good, options=options)
    told = [inspector(path) for path in sorted(new.iterdir())]
    np.testing.assert_allclose([shot.score for shot in scored.shots], [one.score for one in told], rtol=1e-5)
    found = verdicts(scored, options.false_alarm_rate)
    assert [[region.box for region in one] for one in found.regions] == [
        [region.box for region in one.regions] for one in told
    ]
    for place in range(len(scored.shots)):
        drawn = heatmap(scored, place, found)
        assert drawn is not None
        assert Image.open(io.BytesIO(drawn)).size == Image.open(io.BytesIO(scored.shots[place].photo or b"")).size


def test_a_saved_inspector_has_its_own_good_photographs(
    extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    good, new = write_tiles("good", range(4)), write_tiles("new", range(10, 13))
    files = uploads(sorted(good.iterdir())), uploads(sorted(new.iterdir()))
    inspector_from_folder(extractor, CPU, good).save(tmp_path / "tile")
    found = score_uploads(Inspector.load(tmp_path / "tile"), CPU, [], files[1])
    same = score_uploads(extractor, CPU, *files)
    np.testing.assert_allclose([shot.score for shot in found.shots], [shot.score for shot in same.shots], rtol=1e-5)
    assert found.references == 4


def test_mistakes_of_the_setup_are_told(
    extractor: ADExtractor, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    files = uploads(sorted(write_tiles("good", range(3)).iterdir())), uploads(sorted(write_tiles("new", [9]).iterdir()))
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    for setup, message in (
        (Setup(tile=5000), "smaller than a tile of 5000"),
        (Setup(tile=3), "expected at least 16 pixels"),
        (Setup(border=5000), "a border of 5000 pixels leaves nothing"),
        (Setup(mask=Upload(tmp_path / "black.png", "black.png")), "the region of interest the mask is empty"),
        (Setup(mask=Upload(tmp_path / "text.png", "text.png")), "The mask text.png cannot be used: the content is not"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            score_uploads(extractor, CPU, *files, setup=setup)
        assert str(tmp_path) not in str(told.value)
    with pytest.raises(ValueError, match="all that this page keeps"):
        score_uploads(extractor, CPU, *files, Limits(map_pixels=10))

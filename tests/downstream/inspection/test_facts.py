"""The sentences on top of the report, and the region of interest in a run."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import tile
from PIL import Image

from adpretrain.extractor import ADExtractor
from downstream.cli import main
from downstream.inspection import Options
from downstream.inspection.facts import in_brief, regions_note
from downstream.inspection.inspector import Inspector
from downstream.inspection.photos import Photo, prepare_photo
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result, counted
from downstream.inspection.set_up import inspector_from_folder, inspector_from_photos
from downstream.visualise import photo_and_heatmap

Write = Callable[..., Path]
FOUR = "Nothing speaks against the promise that at most 20 % of good photographs look bad"


@pytest.fixture
def inspector(extractor_dir: Path, write_tiles: Write) -> Inspector:
    extractor = ADExtractor.from_pretrained(extractor_dir)
    return inspector_from_folder(extractor, torch.device("cpu"), write_tiles("shots", range(4)), options=Options(0.2))


def good(number: int, regions: int = 0) -> list[Result]:
    return [Result(f"good_{index}.png", 1.0, 0.8, NORMAL, regions=regions) for index in range(number)]


BAD = [Result(f"bad_{index}.png", 5.0 + index, 0.2, ANOMALOUS, regions=1) for index in range(5)]
WHOLE = Result("dark.png", 1.0, 0.9, ANOMALOUS, unlike=9.0, unlike_p_value=0.1)
CUT = Result("cut.png", None, None, UNREADABLE, reason="cut off")


def brief(inspector: Inspector, results: list[Result], many: bool = False, changed: bool = False) -> str:
    return in_brief(inspector, counted(results), results, many, changed)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (good(10), f"All 10 photographs look good. {FOUR} (about 2 of 10). Nothing has to be done."),
        (good(1), f"The photograph looks good. {FOUR}. Nothing has to be done."),
        (good(2), f"Both photographs look good. {FOUR}. Nothing has to be done."),
        (good(2, regions=1), f"Both photographs look good. {FOUR}. Look at good_0.png and good_1.png all the same: a"),
        ([*good(1), CUT], f"The photograph looks good. {FOUR}. One photograph could not be read and should be taken"),
        ([*good(9), *BAD[:1]], f"1 of 10 photographs looks bad: bad_0.png. {FOUR} (about 2 of 10). Look at their"),
        ([*good(7), *BAD[:2], WHOLE], "3 of 10 photographs look bad: dark.png, bad_1.png and bad_0.png. Nothing"),
        ([*good(15), *BAD], "5 of 20 photographs look bad, and bad_4.png, bad_3.png and bad_2.png look worst."),
        ([CUT], "No photograph could be judged: the reason stands on each card."),
    ],
)
def test_the_sentences_say_what_was_found(inspector: Inspector, results: list[Result], expected: str) -> None:
    assert brief(inspector, results).startswith(expected)


def test_the_sentences_say_what_becomes_of_the_promise(inspector: Inspector, extractor_dir: Path) -> None:
    results = [*good(1), *BAD]
    assert "That is more than 20 % false alarms explain: many are defective, or the line has changed." in brief(
        inspector, results, many=True
    )
    changed = brief(inspector, results, many=True, changed=True)
    assert (
        "which is taken for time), so that the promise of at most 20 % false alarms has ended. Look at the" in changed
    )
    given = dataclasses.replace(inspector, options=Options(threshold=3.0))
    assert "chosen by hand, so that no rate of false alarms is promised" in brief(given, results)
    alone = inspector_from_photos(
        ADExtractor.from_pretrained(extractor_dir), torch.device("cpu"), [_photo(inspector, tile(1))]
    )
    ranked = [Result(f"{score}.png", score, None, UNDECIDED) for score in (1.0, 3.0)]
    assert brief(alone, ranked) == (
        "The photographs are only ranked; 3.0.png and 1.0.png look most unusual. "
        "One normal photograph promises nothing: add at least one more."
    )


def _photo(inspector: Inspector, picture: Image.Image) -> Photo:
    return prepare_photo(Path("a.png"), picture, inspector.reader.preprocess)


def test_regions_without_an_alarm_are_told() -> None:
    assert not any(result.is_quiet for result in [*good(3), *BAD])
    assert regions_note(good(3), 0, True) == []
    (note,) = regions_note([*good(2, regions=1), *BAD], 2, True)
    assert note == (
        "2 photographs, good_0.png and good_1.png, have a region above the limit for map values although their "
        "score is not above the threshold: each of the two limits keeps the promised rate by itself, "
        "both together at most twice that; look at them."
    )
    assert regions_note(good(1, regions=2), 1, False) == [
        "1 photograph, good_0.png, has a region above the limit for map values although its score is not above the "
        "threshold; look at it."
    ]
    (note,) = regions_note(good(5, regions=1), 5, True)
    assert note.startswith("5 photographs, such as good_0.png, good_1.png and good_2.png, have a region above")


def test_a_run_counts_the_regions_that_raise_no_alarm(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small spots, which leave the photograph as a whole like the others, under a threshold that nothing exceeds."""
    normal, images, out = write_tiles("shots", range(4)), write_tiles("line", range(10, 13)), tmp_path / "out"
    for name in ("tile_10.png", "tile_11.png"):
        pixels = np.array(Image.open(images / name))
        pixels[44:52, 44:52] = 40
        Image.fromarray(pixels).save(images / name)
    folders = [f"--normal={normal}", f"--images={images}", f"--out={out}", f"--extractor={extractor_dir}"]
    assert main(["score", *folders, "--device=cpu", "--false-alarm-rate=0.2", "--threshold=1e9"]) == 0
    printed = capsys.readouterr().out
    assert "note: 2 photographs, tile_10.png and tile_11.png, have a region above the limit for map" in printed
    assert f"regions: 2 regions in 2 images: {out / 'regions.csv'}\n" in printed


def test_outside_the_region_of_interest_nothing_is_found(
    write_tiles: Write, extractor_dir: Path, tmp_path: Path
) -> None:
    """Two dark squares: with a mask that leaves the right part out, only the left one is a region."""
    normal = write_tiles("shots", range(6))
    (tmp_path / "line").mkdir()
    pixels = np.array(tile(20))
    pixels[40:56, 8:24] = pixels[40:56, 76:92] = 10
    Image.fromarray(pixels).save(tmp_path / "line" / "two.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    found = {}
    for name, more in (("all", []), ("left", ["--roi", str(tmp_path / "roi.png")])):
        out = tmp_path / name
        folders = [
            f"--normal={normal}",
            f"--images={tmp_path / 'line'}",
            f"--out={out}",
            f"--extractor={extractor_dir}",
        ]
        assert main(["score", *folders, "--device=cpu", "--false-alarm-rate=0.15", "--maps", *more]) == 1
        with (out / "regions.csv").open() as file:
            boxes = [(int(row["left"]), int(row["right"])) for row in csv.DictReader(file)]
        panel = Image.open(out / "heatmaps" / "two.png")
        heat = np.asarray(photo_and_heatmap(panel)[1], dtype=float)
        summary = json.loads((out / "summary.json").read_text())
        found[name] = (
            boxes,
            heat,
            np.asarray(Image.open(out / "maps" / "two.tif")),
            summary,
            (out / "report.html").read_text(),
        )
    boxes, heat, _, summary, page = found["all"]
    assert max(right for _, right in boxes) > 80
    assert (summary["region_of_interest"], summary["inspected_share"], summary["ignored_border"]) == (None, 1.0, 0)
    assert "Region of interest" not in page
    left_boxes, left_heat, left_map, summary, page = found["left"]
    assert left_boxes
    assert min(left for left, _ in left_boxes) < 24
    assert max(right for _, right in left_boxes) <= 48
    assert np.isnan(left_map[:, left_map.shape[1] // 2 :]).all()
    assert not np.isnan(left_map[:, : left_map.shape[1] // 2]).any()
    # The panel shows what is not inspected in the dark: at .4 of the photograph, which the heat makes no darker.
    right = np.s_[:, heat.shape[1] * 5 // 8 :]
    assert left_heat[right].mean() < 0.5 * heat[right].mean()
    assert summary["region_of_interest"] == str(tmp_path / "roi.png")
    assert summary["inspected_share"] == 0.5
    assert "Region of interest</dt><dd>50 %<small>of a photograph is inspected, on average" in page
    assert json.loads((tmp_path / "left" / "summary.json").read_text())["in_brief"] in page

"""A run of very many photographs: what is counted, what is listed, what stays in memory, what is drawn."""

from __future__ import annotations

import csv
import json
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from downstream.calibration import Calibration, calibrate
from downstream.cli import main
from downstream.exchangeability import Watch
from downstream.inspection import share, tally
from downstream.inspection.entry import Entry
from downstream.inspection.findings import Finding, findings_files
from downstream.inspection.notes import change_note
from downstream.inspection.results import ANOMALOUS, COLUMNS, NORMAL, UNREADABLE, Result
from downstream.inspection.resume import Record
from downstream.inspection.source import Photographs
from downstream.inspection.spreadsheet import table_file
from downstream.inspection.tally import Tally

Write = Callable[..., Path]


def calibration() -> Calibration:
    draw = np.random.default_rng(1).normal(size=(2, 20))
    return calibrate(draw[0].tolist(), 0.05, unlike=(draw[1].tolist(), ()))


def drawn(count: int, shift_at: int | None = None) -> Iterator[Entry]:
    """Entries of drawn photographs, one in ten with a region; from ``shift_at`` on they score higher."""
    draw = np.random.default_rng(0)
    for number in range(count):
        score, unlike = (float(value) for value in draw.normal(size=2))
        score += 4.0 * (shift_at is not None and number >= shift_at)
        path, verdict = f"line/{number:07}.jpg", ANOMALOUS if score > 2 else NORMAL
        if number % 50 == 49:
            yield Entry(Result(path, None, None, UNREADABLE, reason="cut"))
            continue
        found = Finding(path, 1, 0, 0, 9, 9, 81.0, None, score, 1.0, 4, 4, tuple(range(50)))
        regions = (found,) * (number % 10 == 0)
        result = Result(path, score, 0.5, verdict, None, "", unlike, 0.5, "layout", len(regions))
        yield Entry(result, (640, 480), regions, number % 7 == 0, number % 11 == 0, 0.5)


def write_all(entries: Iterator[Entry], out: Path, most: int) -> Tally:
    found = Tally(calibration(), most)
    with table_file(out / "scores.csv", COLUMNS) as add_score, findings_files(out) as add_findings:
        for entry in entries:
            found.add(entry)
            add_score(entry.result)
            if entry.size is not None:
                add_findings(entry.result.path, entry.size, entry.findings)
    return found


def test_memory_does_not_grow_with_the_results(tmp_path: Path) -> None:
    """An `Entry` has more than 1000 bytes. What stays are 40 bytes a photograph, or 100 while the watch's newest
    numbers are in lists (up to 4096)."""
    counts, peaks, seconds = (1000, 3000), list[int](), list[float]()
    for count in counts:
        out = tmp_path / str(count)
        out.mkdir()
        with Record(out, {}, resume=False) as record:
            entries = recorded(record, count)
        began = time.process_time()
        write_all(iter(entries), out, most=100)
        seconds.append(time.process_time() - began)
        tracemalloc.start()
        found = write_all(iter(entries), out, most=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == count
        assert (out / "scores.csv").read_bytes().count(b"\n") == count + 1
    print(f"{counts} photographs: at most {peaks} bytes, {seconds} seconds")
    assert peaks[1] - peaks[0] < 250 * (counts[1] - counts[0]), peaks


def recorded(record: Record, count: int) -> share.Entries:
    """The drawn entries, as a run reads them back from its record."""
    entries, names = drawn(count), [f"{number:07}" for number in range(count)]
    for number in range(0, count, 16):
        record.add(number // 16, [(name, 1, 1) for name in names[number : number + 16]], list(islice(entries, 16)))
    places = [place for _, place in record.added()]
    photographs = SimpleNamespace(names=names, order=range(count))
    return share.Entries(record, cast(Photographs, photographs), places, 16)


def test_what_is_counted_and_listed_is_what_a_list_gives(tmp_path: Path) -> None:
    entries = list(drawn(1000))
    found, results = write_all(iter(entries), tmp_path, most=60), [entry.result for entry in entries]
    verdicts = [result.verdict for result in results]
    assert found.counts == {verdict: verdicts.count(verdict) for verdict in (*found.counts,)}
    assert found.regions == found.with_regions == sum(bool(result.regions) for result in results)
    assert found.quiet == sum(result.verdict == NORMAL and result.regions == 1 for result in results)
    read = [entry for entry in entries if entry.size is not None]
    assert (found.odd_shapes, found.saturated) == (sum(e.odd_shape for e in read), sum(e.saturated for e in read))
    assert found.inspected == pytest.approx(0.5, rel=1e-12)
    for verdict, scores in found.scores.items():
        assert list(scores) == [result.score for result in results if result.verdict == verdict]
    bad = sorted((result for result in results if result.verdict == ANOMALOUS), key=lambda result: -(result.score or 0))
    unreadable = [result for result in results if result.verdict == UNREADABLE]
    worst = [*bad, *unreadable, *sorted(results, key=lambda result: -(result.score or -9))[len(bad) :]][:60]
    assert 0 < len(bad) + len(unreadable) < 60  # some normal ones are listed too
    listed = [entry.result for entry in found.listed]
    assert listed == sorted(worst, key=lambda result: result.path)
    assert found.left_out == 940


def test_the_watch_is_that_of_all_scores_in_one_call() -> None:
    entries = list(drawn(400, shift_at=300))
    found = Tally(calibration())
    for entry in entries:
        found.add(entry)
    watched = [entry.result for entry in entries if entry.result.verdict != UNREADABLE]
    normals = list(zip(calibration().scores, calibration().unlike, strict=True))
    whole = Watch(normals, measures=("score", "unlike value"))
    change = whole.update([(result.score, result.unlike) for result in watched])
    assert change is not None
    assert found.watch is not None
    assert found.watch.warning == change
    np.testing.assert_array_equal(found.watch.log10_martingale, whole.log10_martingale)
    (note,) = change_note(found.watch, iter(entries))
    since, at = watched[change.since].path, watched[change.at].path
    assert f"Since about {since} the photographs" in note
    assert f"found at {at};" in note


@pytest.fixture
def call(write_tiles: Write, extractor_dir: Path) -> list[str]:
    normal, images = write_tiles("shots", range(4)), write_tiles("line", range(10, 16))
    write_tiles("line", range(20, 22), blob=True, prefix="disc")
    folders = [f"--normal={normal}", f"--images={images}", f"--extractor={extractor_dir}"]
    return ["score", *folders, "--device=cpu", "--false-alarm-rate=0.2", "--batch-size=3"]


def test_a_long_run_lists_the_most_unusual(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, f"--out={tmp_path / 'whole'}"]) == 1
    told = capsys.readouterr().out
    out, whole = tmp_path / "out", json.loads((tmp_path / "whole" / "summary.json").read_text())
    monkeypatch.setattr(tally.Tally.__init__, "__defaults__", (None, 5))
    assert main([*call, f"--out={out}"]) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert (len(whole["images"]), whole["images_left_out"]) == (8, 0)
    assert (len(summary["images"]), summary["images_left_out"]) == (5, 3)
    assert [image["path"] for image in summary["images"]][:2] == ["disc_20.png", "disc_21.png"]
    for name in ("scores.csv", "regions.csv", "regions.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("counts", "regions", "images_with_regions", "in_brief", "warnings"):
        assert summary[name] == whole[name]
    assert told.replace("whole", "out") == capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'Of 8 photographs the 5 most unusual are listed here; <a href="scores.csv">scores.csv</a> lists all' in page
    assert len(re.findall("<li data-name=", page)) == 5
    assert "are listed here" not in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    listing = [json.loads(line) for line in (out / summary["files"]["heatmaps_listing"]).read_text().splitlines()]
    assert {one["path"]: one["heatmap"] for one in listing} == {one["path"]: one["heatmap"] for one in whole["images"]}
    # The next run into the folder leaves no picture whose photograph is gone, listed in the summary or not.
    (tmp_path / "line" / "tile_10.png").unlink()
    assert main([*call, f"--out={out}"]) == 1
    assert len(list((out / "heatmaps").iterdir())) == 7


@pytest.mark.parametrize(("heatmaps", "pictures"), [("anomalous", 4), ("none", 0)])
def test_fewer_heatmaps_and_the_same_numbers(call: list[str], tmp_path: Path, heatmaps: str, pictures: int) -> None:
    for name, more in (("whole", []), ("out", ["--heatmaps", heatmaps])):
        assert main([*call, f"--out={tmp_path / name}", *more]) == 1
    for name in ("scores.csv", "regions.csv", "regions.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert sum(row["verdict"] == ANOMALOUS for row in rows) == 4
    for folder in ("heatmaps", "masks"):
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / folder).glob("*")}
        assert len(found) == pictures
        for picture, content in found.items():
            assert content == (tmp_path / "whole" / folder / picture).read_bytes()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="look none">') == 8 - pictures


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_batch_has_one_process(processes: int) -> None:
    numbers = range(3, 14)
    shares = [share.Share(rank, processes).of(numbers) for rank in range(processes)]
    assert [number for one in shares for number in one] == list(numbers)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

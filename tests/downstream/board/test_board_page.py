"""The tables of a board, and its page in a browser."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html import escape
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, chromium
from results_drawn import result

from downstream.board.cost_plot import Point, cost_plot, front
from downstream.board.render import as_page, as_text, tables_of, write_board
from downstream.board.result import Result
from downstream.board.tasks import Filters, tasks_of
from downstream.cli import main

EVIL = "<img src=x onerror=alert(1)>|&"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not driven")


@pytest.fixture
def results() -> list[Result]:
    """Three kinds of features, two detectors, two data sets; one pair was not measured on one set."""
    found = []
    for features, quality, licence in (
        ("best", 3.0, ("Apache-2.0", "yes")),
        ("good", 1.2, ("DINOv3 License", "with conditions")),
        (EVIL, 0.2, ("CC-BY-NC-SA-4.0", "no")),
    ):
        for detector, seconds in (("padim", 0.02), ("spade", 0.2)):
            sets = ("tiles",) if (features, detector) == (EVIL, "spade") else ("tiles", "caps")
            given: dict[str, Any] = {"quality": quality, "seed": 3, "draws": 2, "licence": licence, "latency": seconds}
            found += [result(features, detector, data, **given) for data in sets]
    return found


def test_what_lacks_a_set_is_not_ranked_but_told(results: list[Result]) -> None:
    task = tasks_of(results)[0]
    assert [(line.features, line.detector, bool(line.standing)) for line in task.pairs] == [
        ("best", "padim", True),
        ("best", "spade", True),
        ("good", "padim", True),
        ("good", "spade", True),
        (EVIL, "padim", True),
        (EVIL, "spade", False),
    ]
    assert [(line.features, line.standing.place if line.standing else None) for line in task.features] == [
        ("best", "1"),
        ("good", "2"),
        (EVIL, None),
    ]
    text = as_text([task], results, "markdown")
    told = EVIL.replace("<", "&lt;")
    assert f"- {told} with spade is not ranked: it lacks caps" in text
    assert f"- {told} is not ranked: it lacks caps with spade" in text


def test_a_line_holds_the_means(results: list[Result]) -> None:
    """Cells against plain means over the results, and the spread against that of the draws."""
    task = tasks_of(results)[0]
    _, columns, lines = tables_of(task)[1]
    cells = {column.title: column.text(lines[2]) for column in columns}
    own = [one for one in results if one.row == ("good", "padim")]
    means = [sum(values) / 2 for values in zip(*(one.metrics["image_auroc"].repeats for one in own), strict=True)]  # type: ignore[arg-type]
    spread = abs(means[0] - means[1]) / 2**0.5
    assert cells["image AUROC"] == f"{50 * sum(means):.1f} ± {100 * spread:.1f}"
    assert cells["caps"] == f"{100 * next(o.metrics['image_auroc'].mean for o in own if o.data.name == 'caps'):.1f}"  # type: ignore[operator]
    assert (cells["pixel AUROC"], cells["AUPRO"]) == ("–", "50.0 ± 0.0")
    assert (cells["ms"], cells["M parameters"]) == ("20", "0.7")
    assert cells["in a product"] == "with conditions"


def test_filters_choose_what_is_ranked(results: list[Result]) -> None:
    def features(filters: Filters) -> list[str]:
        task = tasks_of(results, filters)[0]
        return [line.features for line in task.features or task.pairs]

    assert features(Filters(commercial=True)) == ["best", "good"]
    assert features(Filters(detectors=["pad*"])) == ["best", "good", EVIL]
    fast = tasks_of(results, Filters(most_ms=50))[0]
    assert {line.detector for line in fast.pairs} == {"padim"}
    assert tasks_of(results, Filters(sets=["tiles"]))[0].sets == ("tiles",)
    with pytest.raises(ValueError, match=r"--tasks 'full' fits none of: few-shot, K=4"):
        tasks_of(results, Filters(tasks=["full"]))
    with pytest.raises(ValueError, match="none of the 11 results"):
        tasks_of(results, Filters(most_parameters=0.1))


def test_a_set_of_ones_own_takes_nobody_out_of_the_ranking(results: list[Result]) -> None:
    task = tasks_of([*results, result("best", "padim", "mine")])[0]
    assert (task.sets, task.rare) == (("caps", "tiles"), ("mine",))
    assert sum(line.standing is not None for line in task.pairs) == 5
    assert "mine is not ranked: most lines have no result for it" in as_text([task], results, "markdown")


def test_seeds_are_tasks_of_their_own_and_draws_are_told() -> None:
    protocol = {"name": "few-shot", "setting": "K=4", "seed": 7, "draws": 1}
    found = tasks_of([result(), result(protocol=protocol), result("lite1", draws=2)])
    assert [task.name for task in found] == ["few-shot, K=4", "few-shot, K=4, seed 7"]
    assert "the lines have 1 or 2 draws" in as_text(found, [result()], "markdown")


def test_tasks_are_apart_and_equal_names_are_told_apart() -> None:
    other = result("lite0")
    extractor = {**other.extractor.model_dump(mode="json"), "digest": "ab" * 32}
    found = tasks_of([result("lite0"), result("lite0", extractor=extractor), result("lite0", setting="K=1")])
    assert [task.name for task in found] == ["few-shot, K=1", "few-shot, K=4"]
    names = [line.features for line in found[1].pairs]
    assert len({*names}) == 2
    assert all(re.fullmatch(r"lite0 @[0-9a-f]{7}", name) for name in names)


def test_latex_and_markdown_say_the_same(results: list[Result]) -> None:
    tasks = tasks_of(results)
    text, latex = as_text(tasks, results, "markdown"), as_text(tasks, results, "latex")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == text.count("**few-shot") == 2
    assert EVIL.replace("|", "\\|").replace("<", "&lt;") in text
    assert "<img" not in text
    assert r"\&" in latex
    assert len(re.findall(r"^\| [\d–]", text, flags=re.M)) == 9


def test_the_front_is_what_nobody_beats_in_both() -> None:
    points = [Point(10, 80, "a", "d"), Point(20, 70, "b", "d"), Point(20, 90, "c", "d"), Point(50, 90, "e", "d")]
    assert [point.features for point in front(points)] == ["a", "c"]


def test_the_plot_has_a_point_for_each_ranked_pair(results: list[Result]) -> None:
    drawn = ET.fromstring(cost_plot(tasks_of(results)[0].pairs, alone=True))
    space = "{http://www.w3.org/2000/svg}"
    told = [point.findtext(f"{space}title") for point in drawn.iter(f"{space}circle") if len(point)]
    assert len(told) == 5
    assert any(text and text.startswith(EVIL) for text in told)
    assert cost_plot(tasks_of(results)[0].pairs[:1]) == ""


def test_files_are_written(results: list[Result], tmp_path: Path) -> None:
    paths = write_board(tmp_path / "site", tasks_of(results), results)
    assert {path.name for path in paths} == {"board.md", "board.tex", "index.html", "cost-few-shot-k-4.svg"}
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert EVIL not in page
    assert escape(EVIL) in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing from elsewhere


def rows(page: Browser, table: int = 1) -> list[list[str]]:
    script = (
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].filter(row => !row.hidden)"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return page.run(script)


@needs_chromium
def test_the_page_sorts_and_filters(results: list[Result], tmp_path: Path) -> None:
    (tmp_path / "board.html").write_text(as_page(tasks_of(results), results, "The board"), encoding="utf-8")
    with chromium(tmp_path) as page:
        page.open((tmp_path / "board.html").as_uri())
        page.until("document.querySelector('#shown')?.innerText")
        assert [row[1] for row in rows(page)] == ["best", "best", "good", "good", EVIL, EVIL]
        click = "document.querySelectorAll('table')[1].tHead.rows[0].cells[{}].querySelector('button').click()"
        page.run(click.format(4))  # image AUROC: the best first
        values = [float(row[4].split()[0]) for row in rows(page)]
        assert values == sorted(values, reverse=True)
        page.run(click.format(4))
        assert [float(row[4].split()[0]) for row in rows(page)] == sorted(values)
        page.run(click.format(3))  # mean rank: the least first, what is not ranked last
        assert rows(page)[-1][3] == "–"
        fill = "f = document.querySelector('#filters'); f.elements.{} = {}; f.dispatchEvent(new Event('input'))"
        page.run(fill.format("commercial.checked", "true"))
        assert {row[1] for row in rows(page)} == {"best", "good"}
        page.run(fill.format("ms.value", "'50'"))
        assert {row[2] for row in rows(page)} == {"padim"}
        page.run(fill.format("words.value", "'GOOD'"))
        assert [row[1:3] for row in rows(page)] == [["good", "padim"]]
        assert page.run("document.querySelector('#shown').innerText") == "2 of 9 lines"
        assert page.run("document.title") == "The board"
        assert not page.errors


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_legible_in_light_and_dark(scheme: str, results: list[Result], tmp_path: Path) -> None:
    """The contrast of its text with the ground is at least 4.5 to 1 (WCAG AA)."""
    (tmp_path / "board.html").write_text(as_page(tasks_of(results), results, "The board"), encoding="utf-8")
    with chromium(tmp_path) as page:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.open((tmp_path / "board.html").as_uri())
        page.until("document.querySelector('#shown')?.innerText")
        colours = page.run(
            "[['body', 'color', 'body'], ['td', 'color', 'section'], ['thead button', 'color', 'thead th'],"
            " ['.notes', 'color', 'body']].map(([one, name, ground]) => [getComputedStyle(document.querySelector(one))"
            "[name], getComputedStyle(document.querySelector(ground)).backgroundColor])"
        )
        dark = scheme == "dark"
        assert (luminance(colours[0][1]) < 0.1) == dark
        for ink, ground in colours:
            lighter, darker = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2)."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_an_evaluation_writes_results_that_a_board_takes(
    tile_products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From photographs to the page: scores in the results give the AUROC that the evaluation printed."""
    board = ["--at", str(tmp_path / "board")]
    flags = ["--backbone", "lite0", "--image-size", "64", "--features", "raw,scaled", "--shots", "2", "--draws", "2"]
    run = ["evaluate", "--root", str(tile_products), *flags, "--detectors", "featurenorm,padim", "--device", "cpu"]
    assert main([*run, "--pictures", "0", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    texts = [file.read_text(encoding="utf-8") for file in (tmp_path / "run" / "results").iterdir()]
    assert len(texts) == 4
    assert not any(str(folder) in text for text in texts for folder in (tmp_path, tile_products))  # paths are private
    assert main(["board", "add", str(tmp_path / "run" / "results"), *board]) == 0
    assert main(["board", "render", *board, "--out", str(tmp_path / "site")]) == 0
    shown = capsys.readouterr().out
    text = (tmp_path / "site" / "board.md").read_text(encoding="utf-8")
    for features in ("raw", "scaled"):
        mean = re.search(rf"padim \| {features} \| 2 \| ([\d.]+) ± [\d.]+ \|", printed)
        assert mean
        assert re.search(rf"lite0, {features} \| padim \| [\d.]+ \| {mean[1]} ±", text), text
    assert "few-shot, K=2: features, over detectors" in shown
    assert "none" in text  # nothing was seen in a pretraining, as there was none

"""Tables in the notation of spreadsheets, read back with the csv module and openpyxl."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from downstream.cli import main
from downstream.inspection import Tables
from downstream.inspection import spreadsheet as writing
from downstream.inspection.findings import Finding, findings_files
from downstream.inspection.results import ANOMALOUS, COLUMNS, NORMAL, UNREADABLE, Result, write_scores
from downstream.inspection.spreadsheet import write_workbook

ODD_BYTES = b"caf\xe9.png".decode("utf-8", errors="surrogateescape")
RESULTS = [
    Result("Prüfling; 1,5.png", 1234.5, 1 / 3, ANOMALOUS, reason='score, "whole"', unlike=1e-07, regions=2),
    Result("=1+1.png", 0.25, 1.0, NORMAL, unlike=-2.0, measure="layout", regions=0),
    Result(ODD_BYTES, None, None, UNREADABLE, reason="a\nb"),
]
FINDINGS = [Finding("@x.png", 1, 0, 2, 5, 6, 20.5, None, 3.25, 2.75, 4, 5, (7, 1))]
NOTATIONS = [
    (Tables(), ","),
    (Tables(decimal_comma=True), ";"),
    (Tables(csv_separator="tab", decimal_comma=True, bom=True), "\t"),
    (Tables(csv_separator="|", bom=True), "|"),
]


def read(path: Path, separator: str) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.reader(file, delimiter=separator))


@pytest.mark.parametrize(("tables", "separator"), NOTATIONS)
def test_every_notation_says_the_same(tmp_path: Path, tables: Tables, separator: str) -> None:
    write_scores(tmp_path / "scores.csv", RESULTS, tables)
    with findings_files(tmp_path, tables) as add:
        add("@x.png", (9, 9), FINDINGS)
    for name in ("scores.csv", "regions.csv"):
        assert (tmp_path / name).read_bytes().startswith("\ufeff".encode()) == tables.bom
    header, *rows = read(tmp_path / "scores.csv", separator)
    assert tuple(header) == COLUMNS
    for row, result in zip(rows, RESULTS, strict=True):
        for text, value in zip(row, (getattr(result, name) for name in COLUMNS), strict=True):
            if isinstance(value, float):
                assert ("," in text) == (tables.decimal_comma and "." in repr(value))
                assert float(text.replace(",", ".")) == value
            else:
                assert text == ("" if value is None else str(value))
    area = read(tmp_path / "regions.csv", separator)[1][6]
    assert area == ("20,5" if tables.decimal_comma else "20.5")


def test_the_defaults_are_plain_csv(tmp_path: Path) -> None:
    """Byte for byte what the csv module of Python writes."""
    naive = io.StringIO()
    writer = csv.writer(naive, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if (value := getattr(one, name)) is None else value for name in COLUMNS] for one in RESULTS])
    write_scores(tmp_path / "scores.csv", RESULTS)
    assert (tmp_path / "scores.csv").read_bytes() == naive.getvalue().encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("separator", ["", "::", '"', "\n", "5", "a", ".", "-", "§"])
def test_a_separator_that_numbers_or_quotes_contain_is_refused(separator: str) -> None:
    with pytest.raises(ValueError, match=r"expected one character such as , ; \| or the word tab"):
        Tables(csv_separator=separator)


def test_a_comma_cannot_separate_numbers_with_commas() -> None:
    with pytest.raises(ValueError, match="a comma cannot stand both between fields and in numbers"):
        Tables(csv_separator=",", decimal_comma=True)


def test_without_openpyxl_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"openpyxl is needed .* pip install 'adpretrain\[xlsx\]'"):
        Tables(xlsx=True)


def test_a_workbook_holds_numbers_and_texts_but_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "a\x07b", ODD_BYTES, "Prüfling"]
    results = [Result(name, 0.1 * place, None, NORMAL, regions=place) for place, name in enumerate(names)]
    monkeypatch.setattr(writing, "SHEET_ROWS", 4)  # a real sheet holds a million
    write_workbook(tmp_path / "a.xlsx", {"scores": (COLUMNS, results), "regions": (("path", "area_px"), [])})
    book = openpyxl.load_workbook(tmp_path / "a.xlsx")
    assert book.sheetnames == ["scores", "scores 2", "regions"]
    assert [cell.value for cell in book["regions"][1]] == ["path", "area_px"]
    rows = [row for name in ("scores", "scores 2") for row in book[name].iter_rows(min_row=2)]
    assert [cell.value for cell in book["scores 2"][1]] == list(COLUMNS)
    assert [row[0].value for row in rows] == [*names[:4], "a�b", "caf�.png", "Prüfling"]
    assert {row[0].data_type for row in rows} == {"s"}
    assert [row[0].quotePrefix for row in rows] == [True] * 4 + [False] * 3
    assert [row[1].value for row in rows] == pytest.approx([result.score for result in results], rel=1e-15)
    assert {row[1].data_type for row in rows} == {row[-1].data_type for row in rows} == {"n"}
    assert {row[2].value for row in rows} == {None}


def test_a_run_writes_them(write_tiles: Callable[..., Path], extractor_dir: Path, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    normal, images = write_tiles("shots", range(4)), write_tiles("line", range(10, 12), blob=True, prefix="ä")
    out = tmp_path / "out"
    folders = ["--normal", str(normal), "--images", str(images), "--out", str(out), "--extractor", str(extractor_dir)]
    call = ["score", *folders, "--device", "cpu", "--false-alarm-rate", "0.2"]
    assert main([*call, "--decimal-comma", "--bom", "--xlsx", "--mm-per-pixel", "0.5"]) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["files"]["workbook"] == "scores.xlsx"
    rows = read(out / "scores.csv", ";")[1:]
    regions = read(out / "regions.csv", ";")[1:]
    book = openpyxl.load_workbook(out / "scores.xlsx")
    cells = list(book["scores"].iter_rows(min_row=2, values_only=True))
    assert [row[0] for row in rows] == [row[0] for row in cells] == ["ä_10.png", "ä_11.png"]
    for row, cell, image in zip(rows, cells, summary["images"], strict=True):
        assert float(row[1].replace(",", ".")) == pytest.approx(cell[1], rel=1e-15) == image["score"]
    areas = [[float(text.replace(",", ".")) for text in row[6:8]] for row in regions]
    assert len(areas) == summary["regions"] == len(list(book["regions"].iter_rows(min_row=2)))
    assert all(math.isclose(px / 4, mm2) for px, mm2 in areas)

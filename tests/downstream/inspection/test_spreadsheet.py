"""Tables that spreadsheets read: separators, decimal commas, the mark of UTF-8, and an Excel file without formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from downstream.cli import main
from downstream.inspection import TableOptions
from downstream.inspection.spreadsheet import write_table, write_xlsx

COLUMNS, ROWS = ("path", "score", "reason"), [["=1+1.png", 1.25, 'über, "alles"'], ["b.png", None, "-x"]]


@pytest.mark.parametrize(
    ("options", "separator", "number"),
    [
        (TableOptions(), ",", "1.25"),
        (TableOptions(csv_separator=";"), ";", "1.25"),
        (TableOptions(csv_separator="tab", bom=True), "\t", "1.25"),
        (TableOptions(decimal_comma=True, bom=True), ";", "1,25"),
    ],
)
def test_a_table_reads_back(options: TableOptions, separator: str, number: str, tmp_path: Path) -> None:
    write_table(tmp_path / "scores.csv", COLUMNS, ROWS, options)
    content = (tmp_path / "scores.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf") is options.bom
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8-sig") as file:
        found = list(csv.reader(file, delimiter=separator))
    assert found == [[*COLUMNS], ["=1+1.png", number, 'über, "alles"'], ["b.png", "", "-x"]]


def test_an_excel_file_holds_texts_not_formulas(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    write_xlsx(tmp_path / "scores.xlsx", {"scores": (COLUMNS, ROWS), "regions": (("n",), [[1]])})
    book = openpyxl.load_workbook(tmp_path / "scores.xlsx")
    assert book.sheetnames == ["scores", "regions"]
    cells = [[(cell.value, cell.data_type) for cell in row] for row in book["scores"].iter_rows(min_row=2)]
    assert cells[0] == [("=1+1.png", "s"), (1.25, "n"), ('über, "alles"', "s")]
    assert cells[1] == [("b.png", "s"), (None, "n"), ("-x", "s")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"csv_separator": ",", "decimal_comma": True}, "cannot be both"),
        ({"csv_separator": "ab"}, "choose one character"),
        ({"csv_separator": "1"}, "choose one character"),
        ({"csv_separator": "."}, "choose one character"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableOptions(**options)


def test_zero_false_alarms_cannot_be_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--normal", str(tmp_path), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["score", *folders, "--false-alarm-rate", "0"]) == 2
    assert "19 promise 5 %, 99 promise 1 % and 999 promise 0.1 %" in capsys.readouterr().err

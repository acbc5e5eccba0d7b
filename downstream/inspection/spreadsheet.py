"""Tables of a run as files that a spreadsheet opens: CSV in the reader's own notation, and a workbook (XLSX)."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from adpretrain.files import atomic_path
from downstream.inspection import PLAIN, Tables
from downstream.inspection.photos import printable

Table = tuple[Sequence[str], Iterable[object]]  # the columns, and objects with an attribute for each of them
BOM = "\ufeff".encode()
SHEET_ROWS = 2**20 - 1  # that a sheet holds below its header
_NO_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # characters that a workbook cannot hold


def csv_row(values: Iterable[object], tables: Tables = PLAIN) -> bytes:
    """Return one row with its end of line; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=tables.separator, lineterminator="\n")
    writer.writerow([_field(value, tables) for value in values])
    # surrogateescape writes the original bytes of a file name that is not UTF-8, so that scripts find the file.
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _field(value: object, tables: Tables) -> object:
    if tables.decimal_comma and isinstance(value, float):
        return repr(value).replace(".", ",")
    return "" if value is None else value


@contextlib.contextmanager
def table_file(path: Path, columns: Sequence[str], tables: Tables = PLAIN) -> Iterator[Callable[[object], None]]:
    """Write a CSV file in a ``with`` statement: the names of the columns, then a row for each object that is given to
    the function that it yields. The file appears at the end."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(BOM if tables.bom else b"")
        file.write(csv_row(columns, tables))

        def add(row: object) -> None:
            file.write(csv_row((getattr(row, name) for name in columns), tables))

        yield add


def write_table(path: Path, table: Table, tables: Tables = PLAIN) -> None:
    """Write a CSV file as a whole."""
    columns, rows = table
    with table_file(path, columns, tables) as add:
        for row in rows:
            add(row)


def write_workbook(path: Path, sheets: Mapping[str, Table]) -> None:
    """Write an XLSX file with a sheet for each table. Numbers are numbers, and every other cell is text, also one that
    begins like a formula (= + - @). A table that is longer than a sheet goes on in the next one, such as "regions 2".
    """
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    for name, (columns, rows) in sheets.items():
        left, part = iter(rows), 1
        while (chunk := list(islice(left, SHEET_ROWS))) or part == 1:
            sheet = book.create_sheet(name if part == 1 else f"{name} {part}")
            sheet.freeze_panes = "A2"
            sheet.append(list(columns))
            for row in chunk:
                sheet.append([_cell(sheet, getattr(row, column)) for column in columns])
            part += 1
    with atomic_path(path) as temporary:
        book.save(temporary)


def _cell(sheet: Any, value: object) -> Any:
    if not isinstance(value, str):
        return value
    from openpyxl.cell import WriteOnlyCell

    cell = WriteOnlyCell(sheet, _NO_XML.sub("�", printable(value)))
    cell.data_type = "s"  # openpyxl takes a text that begins with = for a formula
    cell.quotePrefix = value[:1] in ("=", "+", "-", "@")  # nor does a spreadsheet when the cell is edited
    return cell

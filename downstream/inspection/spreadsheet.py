"""Tables of results as CSV files, in the form that spreadsheets of different countries read, and as an Excel file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from adpretrain.extras import need
from adpretrain.files import atomic_path
from downstream.inspection import TABLES, TableOptions

FORMULA = ("=", "+", "-", "@")  # a cell that begins so could be run as a formula
Row = Sequence[object]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Row], options: TableOptions = TABLES) -> None:
    """Write a CSV file, one line for each row; None becomes an empty field."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(b"\xef\xbb\xbf" if options.bom else b"")
        file.write(table_line(columns, options))
        file.writelines(table_line(row, options) for row in rows)


def table_line(row: Row, options: TableOptions = TABLES) -> bytes:
    """One line of a CSV file, with its end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", delimiter=options.separator)
    writer.writerow("" if value is None else _field(value, options) for value in row)
    # surrogateescape writes the original bytes of a file name that is not UTF-8, so that scripts find the file.
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _field(value: object, options: TableOptions) -> object:
    return repr(value).replace(".", ",") if options.decimal_comma and isinstance(value, float) else value


def write_xlsx(path: Path, sheets: Mapping[str, tuple[Sequence[str], Iterable[Row]]]) -> None:
    """Write an Excel file with a sheet of columns and rows for each name. Texts stay texts, never formulas.

    Raises ValueError if openpyxl, of the extra `xlsx`, is missing.
    """
    need("xlsx", "openpyxl")
    import openpyxl  # type: ignore[import-untyped]
    from openpyxl.cell import WriteOnlyCell  # type: ignore[import-untyped]

    book = openpyxl.Workbook(write_only=True)
    for name, (columns, rows) in sheets.items():
        sheet = book.create_sheet(name)
        sheet.append(list(columns))
        for row in rows:
            cells = [WriteOnlyCell(sheet, _plain(value) if isinstance(value, str) else value) for value in row]
            for cell in cells:
                if isinstance(cell.value, str) and cell.value.startswith(FORMULA):
                    cell.data_type = "s"
            sheet.append(cells)
    with atomic_path(path) as temporary:
        book.save(temporary)


def _plain(text: str) -> str:
    """A text that Excel files can hold: valid Unicode without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)

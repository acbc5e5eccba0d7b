"""The tables of a board: means over products and draws, for every set and over the sets.

A cell's values are first averaged over the products of a set, then over draws; the spread is the standard deviation
between draws (n - 1). The mean over sets is taken for each draw, so that its spread is that of whole boards. As in
`tables`, a mean that not every set defines says how many do.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adpretrain.files import atomic_path
from downstream.evaluation.tables import MAIN, TITLES, Record, Row, all_notes, markdown, summarise, summary_cell

MEAN = "mean over sets"


@dataclass(frozen=True)
class Line:
    """A row of the table: one set, or all, with one number of shots, one detector and one extractor."""

    name: str
    row: Row


def lines(records: Sequence[Record]) -> list[Line]:
    """The lines of finished cells, set after set and the mean at the end, in the order of the records.

    A record is `trial.run_trial`'s, with the set's name under "set" and the extractor's under "features".
    """
    by_set: dict[str, dict[tuple[str, str, str, int], list[Record]]] = {}
    for record in records:
        key = (record["setting"], record["detector"], record["features"], record["draw"])
        by_set.setdefault(record["set"], {}).setdefault(key, []).append(record)
    means = {name: [_over_products(name, found) for found in cells.values()] for name, cells in by_set.items()}
    out = [Line(name, row) for name, found in means.items() for row in summarise(found)]
    return out + [Line(MEAN, row) for row in summarise([record for found in means.values() for record in found])]


def _over_products(name: str, records: Sequence[Record]) -> Record:
    """One record of a set's products: metric -> mean over those that define it."""
    values = {
        metric: [r["metrics"][metric] for r in records if r["metrics"].get(metric) is not None] for metric in MAIN
    }
    metrics = {metric: sum(found) / len(found) if found else None for metric, found in values.items()}
    return {**records[0], "product": name, "metrics": metrics}


def write_board(folder: Path, records: Sequence[Record], planned: int, notes: Sequence[str]) -> str:
    """Write board.md and board.csv; returns the first one's text. ``planned``: cells of the whole board."""
    found = lines(records)
    text = _markdown(found, records, planned, notes)
    for name, content in (("board.md", text), ("board.csv", _csv(found))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return text


def _markdown(found: Sequence[Line], records: Sequence[Record], planned: int, notes: Sequence[str]) -> str:
    title = "Means in %, ± standard deviation between draws"
    if len(records) < planned:
        title += f"; {len(records)} of {planned} cells are finished, and the means are theirs"
    heading = ["set", "images", "detector", "features", "draws", *(TITLES[name] for name in MAIN)]
    rows = [
        [line.name, line.row.setting, line.row.detector, line.row.features, str(line.row.repeats)]
        + [summary_cell(line.row, name) for name in MAIN]
        for line in found
    ]
    told = [f"- {' '.join(note.split())}" for note in (*notes, *all_notes(records))]
    return "\n".join([markdown(title, heading, rows), *told]).rstrip() + "\n"


def _csv(found: Sequence[Line]) -> str:
    """Per cent, with all digits; an empty field where a metric is undefined. ``sets``: how many define it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = [f"{name}{part}" for name in MAIN for part in ("", "_spread", "_sets")]
    writer.writerow(["set", "images", "detector", "features", "draws", *columns])
    for line in found:
        cells: list[object] = []
        for name in MAIN:
            defined = line.row.defined[name]
            cells += [line.row.mean[name], line.row.spread[name], defined] if defined else ["", "", 0]
        row = line.row
        writer.writerow([line.name, row.setting, row.detector, row.features, row.repeats, *cells])
    return buffer.getvalue()

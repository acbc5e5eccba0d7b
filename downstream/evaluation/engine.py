"""Compute a comparison cell by cell. A finished cell is a file and never computed again, so a comparison can be
interrupted, and when data sets, extractors, detectors or draws are added, only new cells are computed.

In a cell, one detector on one kind of features is fitted and scored (`trial`) on one trial of a protocol (`protocols`).
The draws are the same for all extractors and detectors. Processes share only the folder: each computes the cells of its
own products, and the first process writes the tables and the report when all cells are finished.
"""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adpretrain._version import __version__
from adpretrain.data import Sample, index_with_bare
from adpretrain.data.layouts.detect import HUB
from adpretrain.progress import Progress
from downstream.evaluation.cells import Cell, cells_of, drawn, read_cell, shares, write_cell
from downstream.evaluation.comparison import Comparison, SetRow, detector_rows, extractor_rows, set_rows
from downstream.evaluation.comparison_page import draw_features, report
from downstream.evaluation.means import Record, in_order
from downstream.evaluation.networks import Features, load_features
from downstream.evaluation.pictures import file_name
from downstream.evaluation.protocols import Trial, trials
from downstream.evaluation.result_files import DataSet, write_results
from downstream.evaluation.tables import write_means, write_tables
from downstream.evaluation.trial import PhotographCache, Settings, run_trial

POLL = 0.5  # seconds between checks of the folder, while the first process waits for the others


class _Results:
    """The records of finished cells. In the first process (``main``), the table of means is rewritten after each."""

    def __init__(
        self, cells: Sequence[Cell], out: Path, notes: Sequence[str], main: bool, progress: Progress | None
    ) -> None:
        self.cells, self.out, self.notes, self.main, self.progress = cells, out, notes, main, progress
        found = {cell.digest: read_cell(self.path(cell), cell) for cell in cells}
        self.done = {digest: records for digest, records in found.items() if records is not None}
        self.text = ""
        self.tell()

    def path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.digest}.json"

    def records(self) -> list[Record]:
        return in_order([record for cell in self.cells for record in cell.described(self.done.get(cell.digest, []))])

    def add(self, cell: Cell, records: list[Record]) -> None:
        self.done[cell.digest] = records
        self.tell()

    def tell(self) -> None:
        if self.progress:
            self.progress("cells", sum(cell.digest in self.done for cell in self.cells), len(self.cells))
        if self.main:
            records = sum(len(cell.trial.parts) for cell in self.cells)
            self.text = write_means(self.out, self.records(), records, self.notes)


def run_comparison(
    comparison: Comparison,
    out: Path,
    device: str = "cpu",
    batch_size: int = 8,
    workers: int = 0,
    progress: Progress | None = None,
    process: tuple[int, int] = (0, 1),
    command: str = "",
) -> str:
    """Compute the unfinished cells; the first process writes the tables and returns the one of means as Markdown.

    ``workers`` is the number of processes that load images. ``progress`` gets (what, done, total). ``process`` is
    (rank, number of processes). ``command`` is saved with the numbers. Raises ValueError, before anything is computed,
    for a data set that is absent or has too few images, an extractor that cannot be loaded, or wrong detector options.
    """
    rank, processes = process
    sets, notes = planned(comparison)
    photographs, shown = PhotographCache(), (comparison.pictures, comparison.panels, comparison.per_defect)
    settings = Settings(
        comparison.settings, detector_rows(comparison), batch_size, workers, device, *shown, photographs
    )
    rows, backbones = load_features(extractor_rows(comparison), device)
    cells = cells_of(comparison, [(data.row, found) for data, found in sets], rows)
    results = _Results(cells, out, notes, rank == 0, progress)

    def compute(cell: Cell) -> None:
        records = computed(cell, settings, out)
        write_cell(results.path(cell), cell, records)
        results.add(cell, records)

    product = ""
    for cell in shares(cells, processes)[rank]:
        if cell.digest in results.done:
            continue
        if cell.label(cell.trial.name) != product:
            product = cell.label(cell.trial.name)
            photographs.forget()
            for backbone in backbones:
                backbone.forget()
        compute(cell)
    if rank:
        return ""
    for cell in cells:
        while cell.digest not in results.done:  # wait for another process; a barrier could time out if that one is slow
            if not results.path(cell).is_file():
                time.sleep(POLL)
            elif records := read_cell(results.path(cell), cell):
                results.add(cell, records)
            else:
                compute(cell)
    configuration = configuration_of(comparison, [data.row for data, _ in sets], rows, command)
    write_tables(out, results.records(), configuration)
    data, named = [data for data, _ in sets], extractor_rows(comparison)
    write_results(out, cells, results.done, data, comparison, named, command, device)
    scatters = draw_features(
        out, [trial for _, found in sets for trial in found], rows, settings, comparison.embeddings
    )
    report(out, results.records(), configuration, rows[0].networks.backbone.preprocess, scatters)
    return results.text


def planned(comparison: Comparison) -> tuple[list[tuple[DataSet, list[Trial]]], list[str]]:
    """Return the trials of every data set, product after product, and a note for each optional one that is absent."""
    found, notes = [], []
    for row in set_rows(comparison):
        if row.optional and not row.root.startswith(HUB) and not Path(row.root).exists():
            notes.append(f"{row.name} is left out: {row.root} does not exist")
            warnings.warn(notes[-1], stacklevel=2)
            continue
        try:
            data = DataSet(row, chosen_samples(row))
            found.append((data, trials(data.samples, comparison)))
        except ValueError as error:
            raise ValueError(f"set {row.name}: {error}") from error
    if not found:
        raise ValueError("no data set of the comparison exists: " + "; ".join(notes))
    return found, notes


def chosen_samples(row: SetRow) -> list[Sample]:
    """Return the chosen samples. Raises ValueError for products or defects that the data set does not have."""
    samples, _ = index_with_bare(row.dataset, row.root, row.columns, row.split)
    present = sorted({sample.category for sample in samples})
    if unknown := [pattern for pattern in row.products if not fnmatch.filter(present, pattern)]:
        raise ValueError(f"products {unknown} are not in {row.root}; found: {', '.join(present)}")
    kept = {name for pattern in row.products or ["*"] for name in fnmatch.filter(present, pattern)}
    kinds = sorted({sample.defect for sample in samples if sample.anomalous})
    if unknown := sorted({*row.defects} - {*kinds}):
        raise ValueError(f"defects {unknown} are unknown; this set has: {', '.join(kinds)}")
    wanted = row.defects or kinds
    return [s for s in samples if s.category in kept and (not s.anomalous or s.noise or s.defect in wanted)]


def computed(cell: Cell, settings: Settings, out: Path) -> list[Record]:
    """Compute the records of a cell, ready for JSON, and save the maps to show as pictures."""
    networks = cell.features.networks
    try:
        records = run_trial(cell.trial, cell.contender, networks, settings)
    except ValueError as error:
        name = cell.label(cell.trial.name)
        raise ValueError(f"{name}, {cell.contender.detector} on {cell.features.name}: {error}") from error
    for part, record in zip(cell.trial.parts, records, strict=True):
        shown, record["pictures"] = record.pop("shown"), []
        if drawn(cell.trial, cell.contender):
            product, setting = file_name(cell.label(part.product)), file_name(cell.trial.setting)
            folder = out / "pictures" / product / setting
            name = file_name(cell.contender.detector, cell.features.name)
            saved = shown.save(folder, name, part.test, networks.backbone.preprocess)
            record["pictures"] = [{**entry, "folder": str(folder.relative_to(out))} for entry in saved]
    return records


def configuration_of(
    comparison: Comparison, sets: Sequence[SetRow], rows: Sequence[Features], command: str
) -> dict[str, Any]:
    """Describe how the tables were made: version, comparison, data sets, backbone, extractors and command."""
    extractors = {source: digest for row in rows for source, digest in row.digests.items()}
    return {
        "library_version": __version__,
        **asdict(comparison),
        "root": ", ".join(row.root for row in sets),
        "backbone": rows[0].sees["backbone"],
        "extractors": [{"folder": name, "sha256": digest} for name, digest in extractors.items()],
        "command": command,
    }

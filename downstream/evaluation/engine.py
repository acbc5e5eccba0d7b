"""Compute a board cell by cell. A finished cell is a file and never computed again, so a board can be interrupted, and
when data sets, extractors, detectors or draws are added, only new cells are computed.

In a cell, one detector on one kind of features is fitted and scored (`trial`) on one trial of a protocol (`protocols`).
The draws are the same for all extractors and detectors. Processes share only the folder: each computes the cells of its
own products, and the first process writes the tables and the report when all cells are finished.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from adpretrain._version import __version__
from adpretrain.data import Sample, index_with_bare
from adpretrain.data.layouts.detect import HUB
from adpretrain.files import atomic_path
from adpretrain.progress import Progress
from downstream.detectors import build_detector, chosen_options
from downstream.evaluation.board import RAW, Board, SetRow, detector_rows, extractor_rows, set_rows
from downstream.evaluation.comparison_page import draw_features, report
from downstream.evaluation.means import Record, in_order
from downstream.evaluation.networks import ALIGNED, Contender, Features, load_features
from downstream.evaluation.pictures import file_name
from downstream.evaluation.protocols import Part, Trial, trials
from downstream.evaluation.tables import write_board, write_tables
from downstream.evaluation.trial import PhotographCache, Settings, run_trial

POLL = 0.5  # seconds between checks of the folder, while the first process waits for the others


@dataclass(frozen=True)
class Cell:
    """A cell of the board. ``order`` is its place in the tables; ``depends_on`` holds all that its numbers depend on,
    and its digest names the file. ``naming`` says how the tables name a product."""

    set_name: str
    naming: Literal["product", "set", "set/product"]
    trial: Trial
    features: Features
    contender: Contender
    order: tuple[int, ...]
    depends_on: dict[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.depends_on, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:32]

    def label(self, product: str) -> str:
        """The name of a product in the tables."""
        return {"product": product, "set": self.set_name}.get(self.naming, f"{self.set_name}/{product}")

    def described(self, records: Sequence[Record]) -> list[Record]:
        """Add to records the names and the order that they have in the tables."""
        own = {
            "set": self.set_name,
            "features": self.features.name,
            "kind": self.features.kind,
            "order": list(self.order),
        }
        return [{**record, **own, "product": self.label(record["product"])} for record in records]


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
            planned = sum(len(cell.trial.parts) for cell in self.cells)
            self.text = write_board(self.out, self.records(), planned, self.notes)


def run_board(
    board: Board,
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
    found, notes = indexed(set_rows(board))
    planned = [(row, planned_trials(row, samples, board)) for row, samples in found]
    photographs, shown = PhotographCache(), (board.pictures, board.panels, board.per_defect)
    settings = Settings(board.settings, detector_rows(board), batch_size, workers, device, *shown, photographs)
    rows, backbones = load_features(extractor_rows(board), device)
    cells = cells_of(board, planned, rows)
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
    configuration = configuration_of(board, [row for row, _ in found], rows, command)
    write_tables(out, results.records(), configuration)
    drawn = draw_features(out, [trial for _, found in planned for trial in found], rows, settings, board.embeddings)
    report(out, results.records(), configuration, rows[0].networks.backbone.preprocess, drawn)
    return results.text


def indexed(rows: Sequence[SetRow]) -> tuple[list[tuple[SetRow, list[Sample]]], list[str]]:
    """Return the samples of every data set, and a note for each optional one that is absent."""
    found, notes = [], []
    for row in rows:
        if row.optional and not row.root.startswith(HUB) and not Path(row.root).exists():
            notes.append(f"{row.name} is left out: {row.root} does not exist")
            warnings.warn(notes[-1], stacklevel=2)
            continue
        try:
            found.append((row, chosen_samples(row)))
        except ValueError as error:
            raise ValueError(f"set {row.name}: {error}") from error
    if not found:
        raise ValueError("no data set of the board exists: " + "; ".join(notes))
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
    return [s for s in samples if s.category in kept and (not s.anomalous or s.defect in wanted)]


def planned_trials(row: SetRow, samples: Sequence[Sample], board: Board) -> list[Trial]:
    """Return the trials of a data set, product after product."""
    try:
        return trials(samples, board)
    except ValueError as error:
        raise ValueError(f"set {row.name}: {error}") from error


def cells_of(board: Board, planned: Sequence[tuple[SetRow, Sequence[Trial]]], rows: Sequence[Features]) -> list[Cell]:
    """Return every cell, product after product, so that a product's backbone features are reused in all its cells.

    Aligned references need an extractor, so that detector has no cell for raw features. Where draws differ only in the
    references, a contender that does not use them has a single cell. Raises ValueError for wrong detector options.
    """
    pairs = list(_pairs(board, rows))
    settings = list(dict.fromkeys(trial.setting for _, found in planned for trial in found))
    cells = []
    for set_number, (row, found) in enumerate(planned):
        lone = len({part.product for trial in found for part in trial.parts}) == 1
        naming: Any = "product" if len(planned) == 1 else "set" if lone else "set/product"
        for trial in found:
            own = {
                "library_version": __version__,
                "images": _listing(trial, Path(row.root)),
                "protocol": {"setting": trial.setting, "seed": board.seed, "draw": trial.draw},
            }
            for features, contender, (detector, number), depends_on in pairs:
                undrawn = contender.features == RAW or contender.detector == ALIGNED
                if trial.only_references and trial.draw and undrawn:
                    continue
                order = (set_number, settings.index(trial.setting), detector, number, contender.extractor, trial.draw)
                kept = {"pictures": board.pictures, "panels": board.panels} if _drawn(trial, contender) else {}
                kept |= {"per_defect": True} if board.per_defect else {}
                plain = json.loads(json.dumps({**own, **depends_on, **kept}))  # equal to what is read from a file
                cells.append(Cell(row.name, naming, trial, features, contender, order, plain))
    return cells


def _pairs(
    board: Board, rows: Sequence[Features]
) -> Iterator[tuple[Features, Contender, tuple[int, int], dict[str, Any]]]:
    """Yield every detector on every row, its place, and what its numbers depend on. ValueError for wrong options."""
    for row_number, row in enumerate(rows):
        for detector_number, (detector, options) in enumerate(detector_rows(board).items()):
            if (detector, row.kind) == (ALIGNED, RAW):
                continue
            for contender, identity in row.contenders(detector):
                extract = row.networks.extract(contender)
                build_detector(detector, extract, options, board.settings)
                chosen = asdict(chosen_options(detector, options, board.settings))
                place = (detector_number, row_number)
                yield row, contender, place, {"features": identity, "detector": detector, "options": chosen}


def _drawn(trial: Trial, contender: Contender) -> bool:
    """Say whether the maps of a cell are saved as pictures: only those of the first draw and seed are."""
    return trial.draw == 0 and contender.extractor == 0


def _listing(trial: Trial, root: Path) -> str:
    """Return a digest of the images of a trial (those to fit on, to compare with and to score, in order), with their
    labels, masks and file sizes."""

    def lines(part: Part) -> Iterator[str]:
        yield json.dumps([part.product, part.perturbed])
        for use, samples in (("fit", part.train), ("compare", part.references), ("score", part.test)):
            for sample in samples:
                files = [(str(_below(file, root)), file.stat().st_size) for file in (sample.image, *sample.mask_files)]
                yield json.dumps([use, sample.defect, files])

    text = "\n".join(line for part in trial.parts for line in lines(part))
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _below(file: Path, root: Path) -> Path:
    return file.relative_to(root) if file.is_relative_to(root) else file


def shares(cells: Sequence[Cell], processes: int) -> list[list[Cell]]:
    """Share whole products (or cells, of a single product) among processes, the largest first, to the least loaded."""
    groups: dict[str, list[Cell]] = {}
    lone = len({cell.label(cell.trial.name) for cell in cells}) == 1
    for cell in cells:
        groups.setdefault(cell.digest if lone else cell.label(cell.trial.name), []).append(cell)
    out: list[list[Cell]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for group in sorted(groups.values(), key=lambda group: -sum(cell.trial.images for cell in group)):
        least = loads.index(min(loads))
        out[least] += group
        loads[least] += sum(cell.trial.images for cell in group)
    return out


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
        if _drawn(cell.trial, cell.contender):
            product, setting = file_name(cell.label(part.product)), file_name(cell.trial.setting)
            folder = out / "pictures" / product / setting
            name = file_name(cell.contender.detector, cell.features.name)
            saved = shown.save(folder, name, part.test, networks.backbone.preprocess)
            record["pictures"] = [{**entry, "folder": str(folder.relative_to(out))} for entry in saved]
    return records


def write_cell(path: Path, cell: Cell, records: Sequence[Record]) -> None:
    """Write a finished cell: a description for the reader, what it depends on, and its records."""
    of = [cell.label(cell.trial.name), cell.features.name, cell.contender.detector, cell.trial.setting, cell.trial.draw]
    with atomic_path(path) as temporary:
        content = {"of": of, "depends_on": cell.depends_on, "records": list(records)}
        temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_cell(path: Path, cell: Cell) -> list[Record] | None:
    """Read the records of a finished cell; None if there is no file and, with a warning, if the file is damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["depends_on"] != cell.depends_on:
            raise ValueError("it belongs to another cell")
        values = [value for record in content["records"] for value in record["metrics"].values()]
        if not values or not all(value is None or isinstance(value, int | float) for value in values):
            raise ValueError("its metrics are not numbers")
        return content["records"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        name = cell.label(cell.trial.name)
        warnings.warn(f"{path} is damaged ({type(error).__name__}: {error}); {name} is computed again", stacklevel=2)
        return None


def configuration_of(board: Board, sets: Sequence[SetRow], rows: Sequence[Features], command: str) -> dict[str, Any]:
    """Describe how the tables were made: version, board, data sets, backbone, extractors and command."""
    extractors = {source: digest for row in rows for source, digest in row.digests.items()}
    return {
        "library_version": __version__,
        **asdict(board),
        "root": ", ".join(row.root for row in sets),
        "backbone": rows[0].sees["backbone"],
        "extractors": [{"folder": name, "sha256": digest} for name, digest in extractors.items()],
        "command": command,
    }

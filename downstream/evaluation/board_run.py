"""A board computed cell by cell. A finished cell is a file that is never computed again, so a board can be interrupted,
and grow: more sets, extractors, detectors or draws cost what is new.

A cell is one product of a set, one extractor, one detector, one number of images and one draw of them: fitted on the
drawn images, compared with the same ones (`trial.run_trial`), scored on the product's test images. The draws are the
same for all extractors and detectors.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adpretrain._version import __version__
from adpretrain.backbones import Backbone, load_backbone
from adpretrain.backbones.weights import fingerprint
from adpretrain.data import Sample, index_with_bare
from adpretrain.data.layouts.detect import HUB
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path
from adpretrain.hub import locate
from adpretrain.saved import backbone_config, folder_digest
from downstream.detectors import build_detector, chosen_options
from downstream.evaluation.board import Board, ExtractorRow, SetRow
from downstream.evaluation.board_table import write_board
from downstream.evaluation.contenders import ALIGNED, RAW, Contender, Networks
from downstream.evaluation.few_shot import by_product
from downstream.evaluation.protocols import ProtocolOptions, Trial, trials
from downstream.evaluation.remembered import Remembered
from downstream.evaluation.tables import Record
from downstream.evaluation.trial import Settings, run_trial

Progress = Callable[[str, int, int], None]
Identity = dict[str, Any]  # all that some numbers depend on, ready for JSON


@dataclass(frozen=True)
class Features:
    """One row of the extractors, loaded."""

    name: str
    networks: Networks
    kind: str
    identity: Identity


@dataclass(frozen=True)
class Cell:
    """``place`` orders the tables; ``depends_on`` is all that its numbers follow from, and names its file."""

    set_name: str
    label: str
    trial: Trial
    features: Features
    contender: Contender
    place: tuple[int, ...]
    depends_on: Identity

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.depends_on, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:32]

    def described(self, record: Record) -> Record:
        """A record with what the tables call its cell."""
        own = {"set": self.set_name, "product": self.label, "features": self.features.name, "place": list(self.place)}
        return {**record, **own}


def run_board(
    board: Board,
    out: Path,
    device: str = "cpu",
    batch_size: int = 8,
    workers: int = 0,
    progress: Progress | None = None,
) -> str:
    """Compute the cells that are not finished, write tables after each, return the last table as Markdown.

    ``workers``: processes that read images. ``progress`` gets (what, done, total). Raises ValueError, before anything
    is computed, for a set that is absent or has too few images, an extractor that cannot be loaded, and options that a
    detector does not have.
    """
    found, notes = indexed(board)
    planned = {row.name: planned_trials(row, samples, board) for row, samples in found}
    settings = Settings(board.settings, board.detectors, batch_size, workers, device, pictures=0)
    rows, backbones = load_features(board, device)
    cells = list(cells_of(board, planned, rows, {row.name: row.root for row, _ in found}))
    folder = out / "cells"
    done = {cell.digest: record for cell in cells if (record := read_cell(folder / f"{cell.digest}.json", cell))}

    def table() -> str:
        records = [cell.described(done[cell.digest]) for cell in cells if cell.digest in done]
        return write_board(out, sorted(records, key=lambda record: record["place"]), len(cells), notes)

    text, product = table(), ""
    for number, cell in enumerate(cells):
        if cell.digest not in done:
            if cell.label != product:
                for backbone in backbones:
                    backbone.forget()
                product = cell.label
            done[cell.digest] = computed(cell, settings)
            write_cell(folder / f"{cell.digest}.json", cell, done[cell.digest])
            text = table()
        if progress:
            progress("cells", number + 1, len(cells))
    return text


def indexed(board: Board) -> tuple[list[tuple[SetRow, list[Sample]]], list[str]]:
    """The samples of every set, and a note for each optional one that is absent."""
    found, notes = [], []
    for row in board.sets:
        if row.optional and not row.root.startswith(HUB) and not Path(row.root).exists():
            notes.append(f"{row.name} is left out: {row.root} does not exist")
            warnings.warn(notes[-1], stacklevel=2)
            continue
        try:
            samples, _ = index_with_bare(row.layout, row.root, row.columns, row.split)
        except ValueError as error:
            raise ValueError(f"set {row.name}: {error}") from error
        present = sorted({sample.category for sample in samples})
        if unknown := [name for name in row.products if name not in present]:
            raise ValueError(f"set {row.name}: products {unknown} are not in {row.root}; found: {', '.join(present)}")
        found.append((row, [sample for sample in samples if not row.products or sample.category in row.products]))
    if not found:
        raise ValueError("no set of the board is there: " + "; ".join(notes))
    return found, notes


def planned_trials(row: SetRow, samples: Sequence[Sample], board: Board) -> list[Trial]:
    """The trials of a set, product after product."""
    protocol = ProtocolOptions("few-shot", shots=board.shots, draws=board.draws, seed=board.seed)
    try:
        return [trial for group in by_product(samples).values() for trial in trials(group, protocol)]
    except ValueError as error:
        raise ValueError(f"set {row.name}: {error}") from error


def load_features(board: Board, device: str) -> tuple[list[Features], list[Remembered]]:
    """Every row of the extractors, and the backbones below: one for all rows that see images alike."""
    rows: list[Features] = []
    backbones: list[tuple[Identity, Backbone]] = []
    for name, row in board.extractors.items():
        try:
            backbone, extractor, digest = _loaded(row, device)
        except ValueError as error:
            raise ValueError(f"extractor {name}: {error}") from error
        sees = {
            "backbone": asdict(backbone_config(backbone)),
            "preprocess": backbone.preprocess.to_dict(),
            "fingerprint": fingerprint(backbone.network),
        }
        shared = next((known for seen, known in backbones if seen == sees), None)
        if shared is None:
            shared = backbone
            backbones.append((sees, shared))
        if extractor is not None:
            extractor.backbone = shared
        networks = Networks(shared, () if extractor is None else (extractor,))
        if row.kind == "scaled" and (extractor is None or not extractor.local_scale):
            raise ValueError(f"extractor {name}: features 'scaled' need an extractor with a local scale")
        rows.append(Features(name, networks, row.kind, {**sees, "features": row.kind, "extractor": digest}))
    return rows, [Remembered(known) for _, known in backbones]


def _loaded(row: ExtractorRow, device: str) -> tuple[Backbone, ADExtractor | None, str | None]:
    """A backbone, and the extractor on it with its digest, if the row names one."""
    if row.extractor:
        source, _, revision = (row.extractor, "", "") if Path(row.extractor).is_dir() else row.extractor.partition("@")
        folder = locate(source, revision or None).folder
        extractor = ADExtractor.from_pretrained(folder, device, row.weights)
        return extractor.backbone, extractor, folder_digest(folder)
    assert row.backbone is not None
    backbone = load_backbone(
        row.backbone,
        weights=row.weights,
        image_size=row.image_size or 224,
        levels=row.levels,
        resize=row.resize or "squeeze",
        crop_from=row.crop_from,
        finest=row.finest or 0,
    )
    return backbone.to(device), None, None


def cells_of(
    board: Board, planned: Mapping[str, Sequence[Trial]], rows: Sequence[Features], roots: Mapping[str, str]
) -> Iterator[Cell]:
    """Every cell, product after product, so that what a backbone has seen of one serves all its cells.

    Aligned references need an extractor: that detector has no cell for raw features.
    """
    settings = [f"K={shots or 'all'}" for shots in board.shots]
    pairs = list(_pairs(board, rows))
    for set_number, (set_name, found) in enumerate(planned.items()):
        several = len({trial.name for trial in found}) > 1
        for trial in found:
            own = {
                "library_version": __version__,
                "images": _listing(trial, Path(roots[set_name])),
                "protocol": {"setting": trial.setting, "seed": board.seed, "draw": trial.draw},
            }
            for row, contender, order, depends_on in pairs:
                place = (set_number, settings.index(trial.setting), *order, trial.draw)
                label = f"{set_name}/{trial.name}" if several else set_name
                plain = json.loads(json.dumps({**own, **depends_on}))  # as it is read back from a file
                yield Cell(set_name, label, trial, row, contender, place, plain)


def _pairs(board: Board, rows: Sequence[Features]) -> Iterator[tuple[Features, Contender, tuple[int, int], Identity]]:
    """Every detector on every row, its place, and what its numbers depend on. Raises ValueError for wrong options."""
    for row_number, row in enumerate(rows):
        for detector_number, (detector, options) in enumerate(board.detectors.items()):
            if (detector, row.kind) == (ALIGNED, RAW):
                continue
            contender = Contender(detector, row.kind)
            extract = row.networks.extract(contender)
            build_detector(detector, extract, options, board.settings)
            chosen = asdict(chosen_options(detector, options, board.settings))
            yield (
                row,
                contender,
                (detector_number, row_number),
                {"features": row.identity, "detector": detector, "options": chosen},
            )


def _listing(trial: Trial, root: Path) -> str:
    """A digest of the images that a trial is fitted on and scores, in order, with their labels, masks and sizes."""
    lines = []
    for part in trial.parts:
        for use, samples in (("fit", part.train), ("score", part.test)):
            for sample in samples:
                files = [(str(_below(file, root)), file.stat().st_size) for file in (sample.image, *sample.mask_files)]
                lines.append(json.dumps([use, sample.defect, files]))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()


def _below(file: Path, root: Path) -> Path:
    return file.relative_to(root) if file.is_relative_to(root) else file


def computed(cell: Cell, settings: Settings) -> Record:
    """The record of a cell, ready for JSON."""
    try:
        (record,) = run_trial(cell.trial, cell.contender, cell.features.networks, settings)
    except ValueError as error:
        raise ValueError(f"{cell.label}, {cell.contender.detector} on {cell.features.name}: {error}") from error
    return {key: value for key, value in record.items() if key not in ("shown", "pro")}


def write_cell(path: Path, cell: Cell, record: Record) -> None:
    """One finished cell: what it is of, for people; what it depends on; its record."""
    about = {"of": [cell.label, cell.features.name, cell.contender.detector, cell.trial.setting, cell.trial.draw]}
    with atomic_path(path) as temporary:
        content = {**about, "depends_on": cell.depends_on, "record": record}
        temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_cell(path: Path, cell: Cell) -> Record | None:
    """The record of a finished cell; None, with a warning, if its file is damaged, and None if there is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["depends_on"] != cell.depends_on:
            raise ValueError("it is of another cell")
        metrics = content["record"]["metrics"]
        if not all(value is None or isinstance(value, int | float) for value in metrics.values()):
            raise ValueError("its metrics are no numbers")
        return content["record"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        told = f"{path} is damaged ({type(error).__name__}: {error}); {cell.label} is computed again"
        warnings.warn(told, stacklevel=2)
        return None

"""The cells of a comparison: which there are, what each depends on, which process computes it, and its file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adpretrain._version import __version__
from adpretrain.data import Sample
from adpretrain.data.layouts.saturation import saturation_file
from adpretrain.files import atomic_path
from downstream.detectors import build_detector, chosen_options
from downstream.evaluation.comparison import RAW, Comparison, SetRow, detector_rows
from downstream.evaluation.means import Record
from downstream.evaluation.networks import ALIGNED, Contender, Features
from downstream.evaluation.protocols import Trial

RECONTRAST = "recontrast"


@dataclass(frozen=True)
class Cell:
    """A cell of the comparison. ``order`` is its place in the tables; ``depends_on`` holds all that its numbers depend
    on, and its digest names the file. ``naming`` is how the tables name a product, such as "{set}/{product}"."""

    set_name: str
    naming: str
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
        return self.naming.format(set=self.set_name, product=product)

    def described(self, records: Sequence[Record]) -> list[Record]:
        """Add to records the names and the order that they have in the tables."""
        own = {
            "set": self.set_name,
            "features": self.features.name,
            "kind": self.features.kind,
            "order": list(self.order),
        }
        return [{**record, **own, "product": self.label(record["product"])} for record in records]


def cells_of(
    comparison: Comparison, planned: Sequence[tuple[SetRow, Sequence[Trial]]], rows: Sequence[Features]
) -> list[Cell]:
    """Return every cell, product after product, so that a product's backbone features are reused in all its cells.

    Aligned references need an extractor, so that detector has no cell for raw features; ReContrast trains a copy of a
    raw backbone, so that it has cells for raw features only, if there are any. Where draws differ only in the
    references, a contender that does not use them has a single cell. Raises ValueError for wrong detector options.
    """
    pairs = list(_pairs(comparison, rows))
    settings = list(dict.fromkeys(trial.setting for _, found in planned for trial in found))
    cells = []
    for set_number, (row, found) in enumerate(planned):
        lone = len({part.product for trial in found for part in trial.parts}) == 1
        naming = "{product}" if len(planned) == 1 else "{set}" if lone else "{set}/{product}"
        for trial in found:
            own = {
                "library_version": __version__,
                "images": listing_digest(_uses(trial), Path(row.root)),
                "protocol": {"setting": trial.setting, "seed": comparison.seed, "draw": trial.draw},
            }
            for features, contender, (detector, number), depends_on in pairs:
                undrawn = contender.features == RAW or contender.detector == ALIGNED
                if trial.only_references and trial.draw and undrawn:
                    continue
                order = (set_number, settings.index(trial.setting), detector, number, contender.extractor, trial.draw)
                kept = {"pictures": comparison.pictures, "panels": comparison.panels} if drawn(trial, contender) else {}
                kept |= {"per_defect": True} if comparison.per_defect else {}
                plain = json.loads(json.dumps({**own, **depends_on, **kept}))  # equal to what is read from a file
                cells.append(Cell(row.name, naming, trial, features, contender, order, plain))
    return cells


def _pairs(
    comparison: Comparison, rows: Sequence[Features]
) -> Iterator[tuple[Features, Contender, tuple[int, int], dict[str, Any]]]:
    """Yield every detector on every row, its place, and what its numbers depend on. ValueError for wrong options."""
    with_raw = any(row.kind == RAW for row in rows)
    for row_number, row in enumerate(rows):
        for detector_number, (detector, options) in enumerate(detector_rows(comparison).items()):
            if (detector, row.kind) == (ALIGNED, RAW) or (detector == RECONTRAST and row.kind != RAW and with_raw):
                continue
            for contender, identity in row.contenders(detector):
                extract = row.networks.extract(contender)
                build_detector(detector, extract, options, comparison.settings)
                chosen = asdict(chosen_options(detector, options, comparison.settings))
                place = (detector_number, row_number)
                yield row, contender, place, {"features": identity, "detector": detector, "options": chosen}


def drawn(trial: Trial, contender: Contender) -> bool:
    """Say whether the maps of a cell are saved as pictures: only those of the first draw and seed are."""
    return trial.draw == 0 and contender.extractor == 0


def _uses(trial: Trial) -> Iterator[tuple[str, Sequence[Sample]]]:
    """Yield what a trial does with its images, each with a heading: those to fit on, to compare with and to score."""
    for part in trial.parts:
        yield json.dumps([part.product, part.perturbed and asdict(part.perturbed)]), ()
        yield from (("fit", part.train), ("compare", part.references), ("score", part.test))


def listing_digest(uses: Iterable[tuple[str, Sequence[Sample]]], root: Path) -> str:
    """Return a digest of images in order, each with its use, label, masks, saturation files, file sizes and full scale,
    if any. A use without images is a heading. Names are those below ``root``, so that the folder's own place does not
    count."""

    def lines() -> Iterator[str]:
        for use, samples in uses:
            if not samples:
                yield use
            for sample in samples:
                used = [sample.image, *sample.mask_files, *filter(None, [saturation_file(sample)])]
                files = [(str(_below(file, root)), file.stat().st_size) for file in used]
                yield json.dumps([use, sample.defect, files, *filter(None, [sample.full_scale])])

    return hashlib.sha256("\n".join(lines()).encode("utf-8", "replace")).hexdigest()


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

"""A saved inspector, and the folder of a product: its inspectors, one version after each change.

    product/product.json            the versions in effect, the last of which is used, and a log of all changes
    product/versions/0003/          one inspector: inspector.json, detector/, roi.png
    product/versions/0003/leave-one-out.safetensors   how near the references are to each other; only of the last one

A version is written whole before product.json names it, so that a run that is killed leaves the former version or the
new one. All of it HOLDS FEATURES OF THE PRODUCT, but no photographs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from adpretrain._version import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_folder, atomic_path
from adpretrain.leave_one_out import LeaveOneOut
from adpretrain.parsing import from_dict, read_json
from adpretrain.preprocess import Preprocess
from adpretrain.references import ReferenceBank
from adpretrain.saved import save_tensors
from downstream.detectors import detector_from_pretrained
from downstream.detectors.aligned import AlignedFeatureNorm
from downstream.detectors.featurenorm import FeatureNorm
from downstream.detectors.tiled import Tiled
from downstream.inspection import Options
from downstream.inspection.inspector import Inspector
from downstream.inspection.normals import Normal, left_out, predict_photos
from downstream.inspection.photos import Photo, PhotoReader, Unreadable, printable, without_blank, without_copies
from downstream.roi import RegionOfInterest, RoiFiles, bank_within

FORMAT_VERSION = 1
INSPECTOR, DETECTOR, ROI, TABLES = "inspector.json", "detector", "roi.png", "leave-one-out.safetensors"
PRODUCT, VERSIONS, KEPT = "product.json", "versions", 10


@dataclass(frozen=True)
class SavedInspector:
    """The content of inspector.json: an `Inspector` without its detector; ``roi``: whether roi.png belongs to it."""

    options: Options
    preprocess: Preprocess
    full_scale: float | None
    normals: list[Normal]
    description: str
    score_is: str
    notes: list[str]
    fitted_on: list[str] | None = None
    roi: bool = False
    format_version: int = FORMAT_VERSION
    library_version: str = __version__


def save_inspector(inspector: Inspector, folder: Path) -> Path:
    """Save an inspector; the folder appears, or is replaced, only when complete, and HOLDS FEATURES OF THE PRODUCT.

    Raises ValueError if it has a mask for every photograph instead of one for all.
    """
    reader, options = inspector.reader, inspector.options
    mask = reader.roi.mask
    if mask is not None and mask.is_dir():
        raise ValueError(f"{printable(mask)} holds a mask for each photograph: a saved inspector takes one for all")
    fitted_on = None if inspector.fitted_on is None else sorted(inspector.fitted_on)
    saved = SavedInspector(
        dataclasses.replace(options, roi=None),
        reader.preprocess,
        reader.full_scale,
        list(inspector.normals),
        inspector.description,
        inspector.score_is,
        list(inspector.notes),
        fitted_on,
        mask is not None,
    )
    with atomic_folder(folder) as temporary:
        inspector.detector.save_pretrained(temporary / DETECTOR)
        if mask is not None:
            Image.open(mask).convert("L").save(temporary / ROI)
        if (bank := _bank(inspector)) is not None and bank.shots > 1:
            save_tensors(_tensors(bank), temporary / TABLES)
        text = json.dumps(dataclasses.asdict(saved), indent=1)
        (temporary / INSPECTOR).write_text(text + "\n", encoding="utf-8")
    return folder


def load_inspector(folder: Path, device: str | torch.device = "cpu", weights: Path | None = None) -> Inspector:
    """Load an inspector, or the version of a product folder that is in effect; it gives the same bits as the saved one.

    ``weights``: local file of the backbone's weights. Raises ValueError if the folder holds neither, if a newer library
    wrote it, or if its parts do not fit together.
    """
    if (folder / PRODUCT).is_file():
        folder = version_folder(folder, read_product(folder).current)
    if not (folder / INSPECTOR).is_file():
        raise ValueError(f"{printable(folder)} holds no inspector: {_make(folder)}")
    content = read_json(folder / INSPECTOR)
    if isinstance(content, dict) and content.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{folder / INSPECTOR} was written by a newer adpretrain: upgrade adpretrain")
    saved = from_dict(SavedInspector, content, str(folder / INSPECTOR))
    if not saved.normals:
        raise ValueError(f"{folder / INSPECTOR} lists no normal photographs")
    detector = detector_from_pretrained(folder / DETECTOR, device=device, weights=weights)
    roi = RoiFiles(folder / ROI if saved.roi else None, saved.options.ignore_border)
    tiled = isinstance(detector, Tiled)
    batch_size = 1 if tiled else saved.options.batch_size
    inspector = Inspector(
        detector=detector,
        reader=PhotoReader(saved.preprocess, batch_size, saved.full_scale, tiled, roi),
        device=torch.device(device),
        options=saved.options,
        normals=tuple(saved.normals),
        description=saved.description,
        score_is=saved.score_is,
        notes=tuple(saved.notes),
        fitted_on=None if saved.fitted_on is None else frozenset(saved.fitted_on),
    )
    if (bank := _bank(inspector)) is not None and (folder / TABLES).is_file():
        bank.tables = _tables(folder / TABLES, bank)
    return inspector


def _make(folder: Path) -> str:
    return f"make one with adpretrain inspector new --at {printable(folder)} --normal GOOD"


def _bank(inspector: Inspector) -> ReferenceBank | None:
    """The references to which others can be added; None if there are none, or others for every place or image."""
    detector = inspector.detector
    if not isinstance(detector, FeatureNorm) or isinstance(detector, AlignedFeatureNorm):
        return None
    return detector.extract.references if isinstance(detector.extract, ADExtractor) else None


def _tensors(bank: ReferenceBank) -> dict[str, torch.Tensor]:
    tables = enumerate(bank.tables)
    return {f"{name}.{level}": getattr(table, name) for level, table in tables for name in vars(table)}


def _tables(path: Path, bank: ReferenceBank) -> list[LeaveOneOut]:
    try:
        found = load_file(path, device=str(bank.levels[0].device))
        tables = [
            LeaveOneOut(found[f"similarity_RKKT.{level}"].clone(), found[f"index_RKKT.{level}"].clone())
            for level in range(len(bank.levels))
        ]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}): delete it, and it is computed anew") from error
    for table, level in zip(tables, bank.levels, strict=True):
        shape = (1, bank.shots, bank.shots, level.shape[1] // bank.shots)
        if table.similarity_RKKT.shape != shape or table.index_RKKT.shape != shape:
            raise ValueError(f"{path} is of other references: delete it, and it is computed anew")
    return tables


def with_photographs(inspector: Inspector, photos: Sequence[Photo | Unreadable]) -> tuple[Inspector, list[str]]:
    """The inspector with further normal photographs, and remarks on those that are left out: copies, unreadable ones.

    They become references, with the same bits as if they had been there from the start; in an inspector of a detector
    that was fitted before, or with photographs that only calibrate, they calibrate. Raises ValueError if none can be
    added, or if the references are chosen anew for every image or place.
    """
    read = without_blank(photos, inspector.contrast)
    readable = [item for item in read if isinstance(item, Photo)]
    remarks = [f"left out: {item.reason}" for item in read if isinstance(item, Unreadable)]
    kept, copies = without_copies(readable, dict(inspector.known))
    remarks += [f"left out: {_copied(copy, original)}" for copy, original in copies]
    if not kept:
        reasons = "; ".join(remark.removeprefix("left out: ") for remark in remarks)
        raise ValueError(f"no photograph can be added: {reasons or 'none was given'}")
    if inspector.fitted_on is not None or not all(normal.reference for normal in inspector.normals):
        predicted = zip(kept, predict_photos(inspector.detector, kept, inspector.device), strict=True)
        rows = [(photo, found) for photo, found in predicted if not isinstance(found, str)]
        least_area = inspector.options.least_area
        more = [Normal.of(photo, False).scored(*found, photo.seen, least_area) for photo, found in rows]
        return dataclasses.replace(inspector, normals=(*inspector.normals, *more)), remarks
    bank, detector = _bank(inspector), inspector.detector
    if bank is None or not isinstance(detector.extract, ADExtractor):
        raise ValueError(ANEW)
    images = torch.stack([photo.pixels for photo in kept]).to(inspector.device)
    new = detector.extract.encode_references(images)
    if detector.roi is not None:
        new = bank_within(new, RegionOfInterest(detector.roi))
    normals = [*inspector.normals, *(Normal.of(photo, True) for photo in kept)]
    return _with_bank(inspector, bank.joined(new), normals), remarks


def _copied(copy: str, original: str) -> str:
    return f"{copy} is there already" if copy == original else f"{copy} is a copy of {original}"


ANEW = (
    "the references of this inspector differ for every place or image, so that none can be added or forgotten: begin "
    "anew with adpretrain inspector new"
)


def without_photographs(inspector: Inspector, names: Sequence[str]) -> Inspector:
    """The inspector without the normal photographs of these names. Raises ValueError for a name that it does not have,
    if no photograph would be left to compare with, or if calibrating ones depend on a reference that goes."""
    known = [normal.name for normal in inspector.normals]
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"no normal photograph is named {strange[0]!r}; there are {', '.join(known[:20])}")
    gone = [number for number, name in enumerate(known) if name in names]
    kept = [normal for number, normal in enumerate(inspector.normals) if number not in gone]
    if not kept:
        raise ValueError("no normal photograph would be left")
    if not any(inspector.normals[number].reference for number in gone):
        return dataclasses.replace(inspector, normals=tuple(kept))
    bank = _bank(inspector)
    if bank is None:
        raise ValueError(ANEW)
    if not all(normal.reference for normal in kept):
        raise ValueError("the scores of photographs that calibrate depend on every reference: forget those first")
    return _with_bank(inspector, bank.without(gone), kept)


def _with_bank(inspector: Inspector, bank: ReferenceBank, normals: Sequence[Normal]) -> Inspector:
    """The inspector with other references, each scored anew against the others."""
    detector = copy.copy(inspector.detector)
    assert isinstance(detector, FeatureNorm)
    assert isinstance(detector.extract, ADExtractor)
    detector.extract = copy.copy(detector.extract).set_references(bank)
    if len(normals) > 1:
        seen = [inspector.reader.preprocess.seen(normal.size) for normal in normals]
        normals = left_out(normals, detector.leave_one_out(), seen, inspector.options.least_area)
    else:
        normals = [dataclasses.replace(normals[0], score=None, low=None, peak=None)]
    return dataclasses.replace(inspector, detector=detector, normals=tuple(normals))


@dataclass(frozen=True)
class Change:
    """A line of the log: the version that was made, or returned to."""

    version: int
    time: str
    what: str
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Product:
    """The content of product.json. ``chain``: the versions in effect, each made from the one before."""

    chain: list[int]
    log: list[Change]
    format_version: int = FORMAT_VERSION

    @property
    def current(self) -> int:
        """The version that is used."""
        return self.chain[-1]


def version_folder(folder: Path, version: int) -> Path:
    """The folder of a version of a product."""
    return folder / VERSIONS / f"{version:04}"


def read_product(folder: Path) -> Product:
    """Read product.json. Raises ValueError if there is none, or if it is wrong."""
    if not (folder / PRODUCT).is_file():
        raise ValueError(f"{printable(folder)} is no product folder: {_make(folder)}")
    content = read_json(folder / PRODUCT)
    if isinstance(content, dict) and content.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(f"{folder / PRODUCT} was written by a newer adpretrain: upgrade adpretrain")
    product = from_dict(Product, content, str(folder / PRODUCT))
    if not product.chain:
        raise ValueError(f"{folder / PRODUCT} names no version")
    return product


def new_product(folder: Path, inspector: Inspector) -> Product:
    """Make a product folder with its first version. Raises ValueError if there is one already, or other files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{printable(folder)} exists: give a new folder as --at, or add photographs to the inspector there with "
            f"adpretrain inspector add PHOTOS --at {printable(folder)}"
        )
    names = [normal.name for normal in inspector.normals]
    return _change(folder, inspector, Product([], []), "new", names)


def change_product(
    folder: Path, what: str, names: Sequence[str], change: Callable[[Inspector], Inspector], weights: Path | None = None
) -> Product:
    """Change the inspector in effect, write it as a new version, and log it; ``what`` was done to ``names``."""
    with _alone(folder):
        return _change(folder, change(load_inspector(folder, weights=weights)), read_product(folder), what, names)


def undo(folder: Path) -> Product:
    """Return to the version before the last change. Raises ValueError if there is none."""
    with _alone(folder):
        product = read_product(folder)
        if len(product.chain) < 2 or not version_folder(folder, product.chain[-2]).is_dir():
            raise ValueError(
                f"{printable(folder)} has no earlier version to return to: it is the first, or older than "
                f"the last {KEPT}, which are kept"
            )
        log = [*product.log, Change(product.chain[-2], _now(), f"undo of version {product.current}")]
        return _write(folder, Product(product.chain[:-1], log))


def _change(folder: Path, inspector: Inspector, product: Product, what: str, names: Sequence[str]) -> Product:
    version = max((change.version for change in product.log), default=0) + 1
    save_inspector(inspector, version_folder(folder, version))
    log = [*product.log, Change(version, _now(), what, list(names))]
    return _write(folder, Product([*product.chain, version], log))


def _write(folder: Path, product: Product) -> Product:
    with atomic_path(folder / PRODUCT) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(product), indent=1) + "\n", encoding="utf-8")
    for path in (folder / VERSIONS).iterdir():  # after product.json, which no longer names them
        if path.name not in {f"{version:04}" for version in product.chain[-KEPT:]}:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != f"{product.current:04}":
            (path / TABLES).unlink(missing_ok=True)
    return product


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the product; the system lets go when this process ends, however it ends."""
    read_product(folder)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            file = stack.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process changes {printable(folder)}: try again when it has ended") from None
        yield

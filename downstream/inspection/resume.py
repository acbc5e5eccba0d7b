"""The record of what an unfinished run has scored, from which `--resume` continues.

``scores.part.jsonl`` in the output folder holds a line with the settings, then a line for every batch, written once its
heatmaps are on disk; the file is removed when the run is complete. Whole batches are recorded because sums round
differently in batches of another size, and a resumed run must give the same bytes as an uninterrupted one. Only the
places of the lines are held in memory, however many photographs there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from typing_extensions import Self

from adpretrain import __version__
from adpretrain.files import sha256
from adpretrain.saved import CONFIG_NAME, WEIGHTS_NAME
from downstream.inspection import Options
from downstream.inspection.entry import Entry, entry_from
from downstream.inspection.photos import file_and_page, relative_name
from downstream.roi import RoiFiles
from downstream.visualise import ColourScale

PART = "scores.part.jsonl"
_NUMBER = re.compile(rb'\{"batch": (\d+),')
Place = tuple[Path, int]  # a file of the record, and where in it the line of a batch begins
Stamp = tuple[str, int, int]  # an image's name below its folder, size in bytes, and modification time in nanoseconds


def settings_of(
    kind: str, model: Path, device: torch.device, normal: Sequence[Path], calibration: Sequence[Path], options: Options
) -> dict[str, Any]:
    """Return everything that the scores depend on besides the images: digests of the ``model`` folder, an "extractor"
    or "detector" (``kind``), and of the photographs, the device and the options."""
    return {
        "library": f"adpretrain {__version__}, torch {torch.__version__}",
        kind: _digest(_files(model)),
        "device": str(device),
        "normal photographs": _digest(normal),
        "calibration photographs": _digest(calibration),
        "masks of the region of interest": _digest(RoiFiles(Path(options.roi)).files() if options.roi else []),
        **dataclasses.asdict(options),
    }


def _files(model: Path) -> list[Path]:
    """Find configuration and weights, also of a detector's parts; no pipes or devices, whose reading never ends."""
    names = (CONFIG_NAME, WEIGHTS_NAME, "inspector.json", "product.json", "roi.png")
    return sorted(path for path in model.rglob("*") if path.name in names and path.is_file())


def _digest(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:  # names count too, because the references are chosen by name
        found.update(os.fsencode(path.name) + b"\0")
        with contextlib.suppress(OSError):  # it is reported, with the file's name, when the file is used
            found.update(sha256(file_and_page(path)[0]).encode())
    return found.hexdigest()


def parts(out: Path) -> list[Path]:
    """The records in an output folder: one, or one for each process."""
    return sorted(path for path in out.glob("scores.part*.jsonl") if path.is_file())


def stamp(root: Path, path: Path) -> Stamp:
    """Return what tells an image from a later one of the same name; zeros if the file cannot be accessed."""
    try:
        status = file_and_page(path)[0].stat()
    except OSError:
        return relative_name(root, path), 0, 0
    return relative_name(root, path), status.st_size, status.st_mtime_ns


class Record:
    """The record of one run in ``out``, used in a ``with`` statement, which keeps the file; `finish` removes it.

    With ``resume``, the batches of a run that was interrupted there are taken over. If several processes share the run,
    each has a file of its own, by its ``rank``, and reads those of all. Raises ValueError if that run had other
    ``settings`` (the message names them), or if its record cannot be read.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool, rank: int = 0) -> None:
        self.folder, self.settings = out, dict(settings)
        self.path = out / (PART if rank == 0 else f"scores.part-{rank}.jsonl")
        self._places: dict[bytes, Place] = {}  # of the batches of the earlier run, by `_key`
        self._scale: tuple[tuple[Stamp, ...], ColourScale] | None = None
        self._known: dict[Path, int] = {}  # how much of each file has been read
        self._readers: dict[Path, BinaryIO] = {}
        for path in parts(out) if resume else ():
            for place, line in self._lines(path):
                self._take(place, line)
        self._file: BinaryIO | None = None

    def _lines(self, path: Path) -> Iterator[tuple[Place, bytes]]:
        """Read the whole lines of a file that are not yet known; the last may be torn if the run was killed."""
        with path.open("rb") as file:
            at = self._known.setdefault(path, 0)
            file.seek(at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield (path, at), line
                at += len(line)
                self._known[path] = at

    def _take(self, place: Place, text: bytes) -> None:
        path, at = place
        with _unreadable(path):
            line = json.loads(text)
            if at == 0:
                self._compare(line["settings"])
                return
            images = tuple((str(name), int(size), int(time)) for name, size, time in line["images"])
            if "scale" in line:
                self._scale = images, ColourScale(*map(float, line["scale"]))
            else:
                _entries_of(line)
                self._places[_key(images)] = place

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        differing = [key for key in {**earlier, **self.settings} if earlier.get(key) != self.settings.get(key)]
        if differing:
            listing = ", ".join(_change(key, earlier.get(key), self.settings.get(key)) for key in differing)
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings: {listing}. Give those settings "
                "again, another folder, or leave out --resume to start anew"
            )

    @property
    def has_batches(self) -> bool:
        """Whether the earlier run that is continued has scored any images."""
        return bool(self._places)

    def __enter__(self) -> Self:
        whole = self._known.get(self.path, 0)
        self._file = self.path.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write({"settings": self.settings})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "enter the record first"
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def scored(self, images: Sequence[Stamp], heatmaps: Sequence[str]) -> Place | None:
        """Find the batch of exactly these images that the earlier run has recorded; None if there is none, or one of
        its ``heatmaps`` is gone."""
        place = self._places.get(_key(images))
        if place is None:
            return None
        for entry, heatmap in zip(self.batch(place), heatmaps, strict=True):
            drawn = entry.result.heatmap
            if drawn is not None and (drawn != heatmap or not (self.folder / heatmap).is_file()):
                return None
        return place

    def add(self, number: int, images: Sequence[Stamp], entries: Sequence[Entry]) -> None:
        """Record the batch of this ``number`` in the run; its heatmaps are written."""
        self._write({"batch": number, "images": images, "entries": [dataclasses.asdict(entry) for entry in entries]})

    def added(self) -> Iterator[tuple[int, Place]]:
        """Find the batches that all processes have recorded since this one began: their numbers and places."""
        for path in parts(self.folder):
            for place, line in self._lines(path):
                if found := _NUMBER.match(line):
                    yield int(found[1]), place

    def batch(self, place: Place) -> list[Entry]:
        """Read one batch back."""
        path, at = place
        if path not in self._readers:
            self._readers[path] = path.open("rb")
        self._readers[path].seek(at)
        with _unreadable(path):
            return _entries_of(json.loads(self._readers[path].readline()))

    def scale(self, images: Sequence[Stamp]) -> ColourScale | None:
        """Return the recorded colour scale, or None; it was fixed by a sample of the images.

        Raises ValueError if ``images`` is another sample: heatmaps with two different scales cannot be compared.
        """
        if self._scale is None:
            return None
        if self._scale[0] != tuple(images):
            raise ValueError(
                f"the images that fixed the colours of the unfinished run in {self.folder} have changed: "
                "leave out --resume to start anew, or give a second normal photograph, which fixes the colours"
            )
        return self._scale[1]

    def set_scale(self, images: Sequence[Stamp], scale: ColourScale) -> None:
        """Record the colour scale and the images that fixed it."""
        self._write({"images": images, "scale": dataclasses.astuple(scale)})

    def finish(self) -> None:
        """Remove the files, because the run is complete."""
        for reader in self._readers.values():
            reader.close()
        for path in parts(self.folder):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error}): leave out --resume to start anew") from error


def _entries_of(line: Mapping[str, Any]) -> list[Entry]:
    return list(map(entry_from, line["entries"]))


def _key(images: Sequence[Stamp]) -> bytes:
    return hashlib.sha256(json.dumps(images).encode()).digest()


def _change(key: str, earlier: Any, now: Any) -> str:
    if isinstance(earlier, str) and len(earlier) == 64:  # showing a digest would not help the user
        return key
    return f"{key} ({earlier}, now {now})"

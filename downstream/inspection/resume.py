"""The record of what an unfinished run has scored, from which `--resume` continues.

``scores.part.jsonl`` in the output folder holds a line with the settings, then a line for every batch, written once its
heatmaps are on disk; the file is removed when the run is complete. Whole batches are recorded because sums round
differently in batches of another size, and a resumed run must give the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from typing_extensions import Self

from adpretrain import __version__
from adpretrain.files import sha256
from adpretrain.saved import CONFIG_NAME, WEIGHTS_NAME
from downstream.inspection import Options
from downstream.inspection.findings import Finding, finding_from
from downstream.inspection.photos import file_and_page, relative_name
from downstream.inspection.results import Result
from downstream.roi import RoiFiles
from downstream.visualise import ColourScale

PART = "scores.part.jsonl"
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """A scored batch: its results, how many images have another shape than the normal photographs, how many have values
    above the full scale, width and height of each, the regions found, and the sum of the shares that are inspected."""

    results: tuple[Result, ...]
    odd_shapes: int = 0
    saturated: int = 0
    sizes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    inspected: float = 0.0

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Join the batches of a run."""
        return cls(
            tuple(result for batch in batches for result in batch.results),
            sum(batch.odd_shapes for batch in batches),
            sum(batch.saturated for batch in batches),
            {path: size for batch in batches for path, size in batch.sizes.items()},
            tuple(finding for batch in batches for finding in batch.findings),
            sum(batch.inspected for batch in batches),
        )


class Record:
    """The record of one run in ``out``, used in a ``with`` statement, which keeps the file; `finish` removes it.

    With ``resume``, the batches of a run that was interrupted there are taken over. If several processes share the run,
    each has a file of its own, by its ``rank``, and reads those of all. Raises ValueError if that run had other
    ``settings`` (the message names them), or if its record cannot be read.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool, rank: int = 0) -> None:
        self.folder, self.settings = out, dict(settings)
        self.path = out / (PART if rank == 0 else f"scores.part-{rank}.jsonl")
        self._batches: dict[tuple[Stamp, ...], Batch] = {}
        self._scale: tuple[tuple[Stamp, ...], ColourScale] | None = None
        self._whole = 0
        if resume:
            self.read()
        self._file: BinaryIO | None = None

    def read(self) -> None:
        """Read the files of all processes; what they have recorded since the last time is then known too."""
        for path in parts(self.folder):
            whole = self._read(path)
            if path == self.path:
                self._whole = whole

    def _read(self, path: Path) -> int:
        """Read a file and return the length of its whole lines; the last may be torn if the run was killed."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[:whole].splitlines()]
            for line in lines[:1]:
                self._compare(line["settings"])
            for line in lines[1:]:
                images = tuple((str(name), int(size), int(time)) for name, size, time in line["images"])
                if "scale" in line:
                    self._scale = images, ColourScale(*map(float, line["scale"]))
                else:
                    results = tuple(map(result_from, line["results"]))
                    sizes = {str(path): (int(width), int(height)) for path, (width, height) in line["sizes"].items()}
                    findings = tuple(map(finding_from, line["findings"]))
                    numbers = int(line["odd_shapes"]), int(line["saturated"])
                    self._batches[images] = Batch(results, *numbers, sizes, findings, float(line["inspected"]))
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"cannot read {path} ({error}): leave out --resume to start anew") from error
        return whole

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        differing = [key for key in {**earlier, **self.settings} if earlier.get(key) != self.settings.get(key)]
        if differing:
            listing = ", ".join(_change(key, earlier.get(key), self.settings.get(key)) for key in differing)
            raise ValueError(
                f"{self.folder} holds an unfinished run with other settings: {listing}. Give those settings "
                "again, another folder, or leave out --resume to start anew"
            )

    @property
    def goes_on(self) -> bool:
        """Whether this run continues an earlier one."""
        return self._whole > 0 or bool(self._batches)

    @property
    def has_batches(self) -> bool:
        """Whether the earlier run that is continued has scored any images."""
        return bool(self._batches)

    def __enter__(self) -> Self:
        self._file = self.path.open("r+b" if self._whole else "wb")
        self._file.truncate(self._whole)
        self._file.seek(self._whole)
        if not self._whole:
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

    def scored(self, images: Sequence[Stamp], heatmaps: Sequence[str]) -> Batch | None:
        """Return the recorded batch of exactly these images; None if there is none or one of ``heatmaps`` is gone."""
        batch = self._batches.get(tuple(images))
        if batch is None:
            return None
        for result, heatmap in zip(batch.results, heatmaps, strict=True):
            picture = self.folder / heatmap
            if result.heatmap is not None and (result.heatmap != heatmap or not picture.is_file()):
                return None
        return batch

    def add(self, images: Sequence[Stamp], batch: Batch) -> None:
        """Record a batch whose heatmaps are written."""
        self._write({"images": images, **dataclasses.asdict(batch)})

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
        for path in parts(self.folder):
            path.unlink(missing_ok=True)


def result_from(entry: Mapping[str, Any]) -> Result:
    """Read a result back from JSON. Raises KeyError, TypeError or ValueError if it is none."""
    numbers = ("score", "p_value", "unlike", "unlike_p_value")
    score, p_value, unlike, unlike_p_value = (None if entry[key] is None else float(entry[key]) for key in numbers)
    heatmap = None if entry["heatmap"] is None else str(entry["heatmap"])
    path, verdict, reason, measure = (str(entry[key]) for key in ("path", "verdict", "reason", "measure"))
    regions = None if entry["regions"] is None else int(entry["regions"])
    return Result(path, score, p_value, verdict, heatmap, reason, unlike, unlike_p_value, measure, regions)


def _change(key: str, earlier: Any, now: Any) -> str:
    if isinstance(earlier, str) and len(earlier) == 64:  # showing a digest would not help the user
        return key
    return f"{key} ({earlier}, now {now})"

"""`adpretrain inspector` keeps an inspector of a product, to which good photographs can be added."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from downstream.commands.options import EMBEDDED, POSITIONAL, Command
from downstream.inspection import DEFAULTS, Options
from downstream.terminal import ProgressBars, number_of, plain

if TYPE_CHECKING:
    from downstream.inspection.inspector import Inspector


@dataclass(frozen=True, kw_only=True)
class InspectorCommand(Command):
    """Keep an inspector of a product in a folder, and change it: every change is a new version, which can be undone.

    actions:
      new      make the folder --at from the normal photographs in --normal
      add      add normal PHOTOS (files or folders), or the false alarms that --accept lists: the next score compares
               with them, and the threshold is computed anew, as in a new inspector of all photographs
      forget   remove normal photographs by their names
      list     show the normal photographs, the promise and the changes
      undo     return to the version before the last change
    Use it with adpretrain score --at FOLDER --images ... . The folder holds features of the product: share it only with
    people who may see the product.

    exit codes:
      0  done
      2  wrong usage or input: nothing was changed

    Args:
        action: new, add, forget, list or undo
        photos: files or folders of photographs to add, or the names of photographs to forget
        at: the folder of the product
        normal: with new, folder of normal photographs; 2 to 8 are enough, more are better
        calibration: with new, folder of further normal photographs, used only for the threshold
        extractor: with new, a folder written by save_pretrained, "org/name" on the Hugging Face Hub, or "embedded"
        detector: with new, the folder of a detector fitted by adpretrain fit instead of an extractor
        image_size: with new, side of the network's input in pixels, by default the extractor's own
        weights: local file with the backbone's weights, so that nothing is downloaded
        accept: with add, a scores.csv of adpretrain score from which the rows of real defects were deleted: the
            photographs that it still calls anomalous become normal ones
        images: with --accept, the folder that was scored
        device: with new, device used for fitting: auto, cpu, cuda, cuda:1, mps
    """

    action: Literal["new", "add", "forget", "list", "undo"] = field(metadata=POSITIONAL)
    photos: list[str] = field(default_factory=list, metadata=POSITIONAL)
    at: Path
    normal: Path | None = None
    calibration: Path | None = None
    extractor: str = EMBEDDED
    detector: str | None = None
    image_size: int | None = None
    weights: Path | None = None
    accept: Path | None = None
    images: Path | None = None
    options: Options = DEFAULTS
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.action == "new") != (self.normal is not None):
            raise ValueError(
                "--normal goes with new, and new needs it: adpretrain inspector new --at FOLDER --normal GOOD"
            )
        if (self.accept is None) != (self.images is None):
            raise ValueError("--accept and --images go together: the scores, and the folder that was scored")
        if self.accept is not None and self.action != "add":
            raise ValueError(f"--accept goes with add, not with {self.action}")
        if self.action in ("add", "forget") and not self.photos and self.accept is None:
            raise ValueError(
                f"{self.action} what? Name photographs: adpretrain inspector {self.action} PHOTOS --at FOLDER"
            )

    def run(self) -> int:
        from downstream.inspection import product

        if self.action == "new":
            product.new_product(self.at, self._new())
        elif self.action == "undo":
            product.undo(self.at)
        elif self.action == "forget":
            names = self.photos
            product.change_product(
                self.at, "forget", names, lambda old: product.without_photographs(old, names), self.weights
            )
        elif self.action == "add":
            self._add()
        print(describe(self.at, self.weights))
        return 0

    def _new(self) -> Inspector:
        from adpretrain import ADExtractor
        from downstream.inspection.run import pick_device
        from downstream.inspection.set_up import inspector_from_detector, inspector_from_folder
        from downstream.saved import locate_model

        assert self.normal is not None
        where, given = pick_device(self.device), (self.normal, self.calibration, self.options, self.at)
        with ProgressBars() as progress:
            if self.detector is not None:
                folder = locate_model(self.detector).folder
                return inspector_from_detector(folder, where, *given, weights=self.weights, progress=progress)
            model = ADExtractor.from_pretrained(self.extractor, where, self.weights, image_size=self.image_size)
            return inspector_from_folder(model, where, *given, progress=progress)

    def _add(self) -> None:
        from downstream.inspection import product
        from downstream.inspection.photos import Photo, find_images

        paths = [path for given in self.photos for path in find_images(Path(given))] + self._accepted()
        names = [path.name for path in paths]

        def added(old: Inspector) -> Inspector:
            read = [item for batch in old.reader.batches(paths) for item in batch]
            for item, scored in zip(read, old.score(read), strict=True):
                if isinstance(item, Photo):
                    _warn(old, scored)
            changed, remarks = product.with_photographs(old, read)
            for remark in remarks:
                print(f"note: {plain(remark)}")
            return changed

        product.change_product(self.at, "add", names, added, self.weights)

    def _accepted(self) -> list[Path]:
        if self.accept is None or self.images is None:
            return []
        with self.accept.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"path", "verdict"} <= rows[0].keys():
            raise ValueError(
                f"{plain(self.accept)} has no columns path and verdict: give a scores.csv of adpretrain score"
            )
        root = self.images.resolve()
        paths = [root / row["path"] for row in rows if row["verdict"] == "anomalous"]
        for path in paths:
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{plain(path)} lies outside of {plain(self.images)}")
        if not paths:
            raise ValueError(f"{plain(self.accept)} calls no photograph anomalous: there is nothing to accept")
        return paths


def _warn(inspector: Inspector, scored: object) -> None:
    """Say that a photograph to be added is anomalous so far; that is what confirmed false alarms are."""
    from downstream.inspection.inspector import Scored

    if isinstance(scored, Scored):
        result = inspector.judge(scored.photo.path.name, scored)
        if result.verdict == "anomalous":
            p_value = "" if result.p_value is None else f", p-value {result.p_value:.3g}"
            print(f"note: {plain(result.path)} was anomalous so far ({plain(result.reason)}{p_value})")


def describe(at: Path, weights: Path | None = None) -> str:
    """Describe the product's inspector and its changes in a few lines."""
    from downstream.calibration import percent
    from downstream.inspection.inspector import Inspector
    from downstream.inspection.product import read_product

    inspector, product = Inspector.load(at, weights=weights), read_product(at)
    calibration = inspector.calibration
    promise = "no threshold" if calibration is None else f"threshold {inspector.threshold:.4g}"
    if calibration is not None and inspector.options.threshold is None:
        promise += f", promised false-alarm rate {percent(calibration.rate)}"
    count = len(inspector.normals)
    lines = [f"{plain(at)}: version {product.current}, {number_of(count, 'normal photograph')}, {promise}"]
    for reference, use in ((True, "references"), (False, "only calibrate the threshold")):
        names = sorted(normal.name for normal in inspector.normals if normal.reference is reference)
        lines += [f"  {use}: {_some(names)}"] if names else []
    for change in product.log[-10:]:
        changed = f", {number_of(len(change.names), 'photograph')}" if change.names else ""
        lines.append(f"  {change.time}  version {change.version}: {change.what}{changed}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{plain(', '.join(names[:20]))}{more}"

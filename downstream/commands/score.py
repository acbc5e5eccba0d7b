"""`adpretrain score` compares photographs with a few normal ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from downstream.commands.options import EMBEDDED, Command, refuse_beside_detector
from downstream.inspection import DEFAULTS, PLAIN, Options, Tables
from downstream.terminal import ProgressBars, number_of, plain

if TYPE_CHECKING:
    from downstream.inspection.run import Inspection

TOP = 5  # at most this many anomalies are listed on stdout


@dataclass(frozen=True, kw_only=True)
class Score(Command):
    """Score photographs against a few normal ones: scores, heatmaps, a threshold, an HTML report.

    exit codes; the first of these that applies:
      1  at least one image is anomalous (even if others were unreadable): its score is too high, or the image as a
         whole (brightness, contrast, colour, sharpness, layout) is unlike the normal photographs
      3  no anomaly was found, but none can be ruled out: some images were unreadable or copies of normal photographs,
         or there is no threshold
      0  every image was read and none is anomalous
      2  wrong usage or input: nothing was scored
    Unreadable images never stop the run: scores.csv (verdict "unreadable"), summary.json and report.html list them
    with the reason, blank ones too, as from a covered lens. Copies of normal photographs have the verdict "undecided".

    Args:
        normal: folder of normal photographs; 2 to 8 are enough, more are better
        at: score with the inspector in this folder instead (made by adpretrain inspector new), which holds its normal
            photographs and options
        images: folder of photographs to score, searched with its subfolders; or of Parquet shards, which
            recipes/write_shards.py writes
        out: folder for the results, created if needed; those of an earlier run in it are replaced
        extractor: a folder written by save_pretrained, "org/name" on the Hugging Face Hub, or "embedded"
        detector: score with a detector fitted by adpretrain fit instead (a folder or org/name); --normal must then
            hold photographs that it was not fitted on, all of which calibrate the threshold
        revision: tag or commit of the extractor or detector on the Hub
        weights: local file with the backbone's weights, so that nothing is downloaded
        image_size: side of the network's input in pixels, by default the extractor's own; a larger one shows smaller
            defects and takes more time. For large photographs with tiny defects use --tile instead
        calibration: folder of further normal photographs, used only for the threshold
        max_pixels: width times height of the largest image to read; larger ones are reported as unreadable, because a
            small file may decode to an image that fills the memory
        device: auto, cpu, cuda, cuda:1, mps
        resume: continue the unfinished run in --out without scoring its finished images again
        heatmaps: write heatmaps and masks of all photographs, of those that are anomalous, or of none; a run of
            millions of photographs otherwise writes millions of pictures
        each_product: every folder directly below --normal is a product of its own, and so is that of the same name
            below --images: each has its own references, threshold and report in --out. With --detector, one detector of
            many products has a threshold for each
        json: print a JSON object (summary.json) instead of text
    """

    from_file = True
    normal: Path | None = None
    at: Path | None = None
    images: Path
    out: Path
    extractor: str = EMBEDDED
    detector: str | None = None
    revision: str | None = None
    weights: Path | None = None
    image_size: int | None = None
    calibration: Path | None = None
    options: Options = DEFAULTS
    tables: Tables = PLAIN
    max_pixels: int = 178_956_970  # copied from adpretrain.preprocess, which is slow to import
    device: str = "auto"
    resume: bool = False
    heatmaps: Literal["all", "anomalous", "none"] = "all"
    each_product: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        if self.normal is not None and self.at is not None:
            raise ValueError("--normal cannot be given with --at: the inspector holds its own normal photographs")
        if self.normal is None and self.at is None:
            raise ValueError("needed: --normal GOOD, a folder of normal photographs, or --at PRODUCT, an inspector")
        if self.each_product and self.normal is None:
            raise ValueError("--each-product needs --normal, a folder with one of normal photographs for each product")
        if self.at is not None:
            self._refuse_beside_inspector()
        if self.detector is None:
            return
        given = ["--extractor"] if self.extractor != EMBEDDED else []
        chosen = ("references", "shots", "seed", "tiling")
        given += [f"--{name}" for name in chosen if getattr(self.options, name) != getattr(DEFAULTS, name)]
        given += ["--image-size"] if self.image_size is not None else []
        refuse_beside_detector(given)

    def _refuse_beside_inspector(self) -> None:
        given = ["--extractor"] if self.extractor != EMBEDDED else []
        for name in ("detector", "revision", "image_size", "calibration"):
            given += [f"--{name.replace('_', '-')}"] if getattr(self, name) is not None else []
        for option in dataclasses.fields(Options):
            if getattr(self.options, option.name) != getattr(DEFAULTS, option.name):
                given.append(f"--{option.name.replace('_', '-')}")
        if given:
            raise ValueError(f"{' and '.join(given)} cannot be given with --at: the inspector was made with its own")

    def run(self, rank: int = 0, processes: int = 1, device: str | None = None) -> int:
        """Score the share of process ``rank`` of ``processes`` on ``device``, and, in the first, write the results."""
        found = []
        for name, one in self._products():
            found.append((name, one._inspect(rank, processes, device)))
            if rank == 0 and not self.json:
                print(*([f"\n{plain(name)}"] if name else []), describe(found[-1][1]), sep="\n")
        if rank > 0:
            return 0
        if self.json:
            summaries = {name: inspection.summary for name, inspection in found}
            print(json.dumps(summaries if self.each_product else summaries[""], allow_nan=False))
        return next((code for code in (1, 3) if any(one.exit_code == code for _, one in found)), 0)

    def _products(self) -> list[tuple[str, Score]]:
        """The products to score, each by its own command; "" is the only one without --each-product. Raises ValueError
        for photographs without normal ones of their product."""
        if not self.each_product or self.normal is None:
            return [("", self)]
        names = _folders(self.images)
        if not names:
            raise ValueError(f"{plain(self.images)} holds no folders: --each-product takes one for each product")
        if missing := [name for name in names if name not in _folders(self.normal)]:
            raise ValueError(
                f"{plain(self.images)} holds the product {plain(missing[0])}, but {plain(self.normal)} has no folder "
                f"of that name with its normal photographs; it has {', '.join(map(plain, _folders(self.normal)))}"
            )
        if loose := sorted(path.name for path in self.images.iterdir() if path.is_file() and path.name[0] != "."):
            raise ValueError(f"{plain(self.images / loose[0])} lies in no product's folder: move it into one")
        return [
            (
                name,
                dataclasses.replace(
                    self,
                    each_product=False,
                    normal=self.normal / name,
                    images=self.images / name,
                    out=self.out / name,
                    calibration=None if self.calibration is None else self.calibration / name,
                ),
            )
            for name in names
        ]

    def _inspect(self, rank: int, processes: int, device: str | None) -> Inspection:
        """Score the photographs of one product."""
        from adpretrain.photographs import pixels_allowed
        from downstream.inspection.run import score_folder
        from downstream.inspection.share import Share

        with ProgressBars() as progress, _resume_hint(self.out), pixels_allowed(self.max_pixels):
            return score_folder(
                self.extractor,
                self.normal,
                self.images,
                self.out,
                self.calibration,
                self.options,
                self.device if device is None or self.device != "auto" else device,
                progress,
                weights=self.weights,
                image_size=self.image_size,
                at=self.at,
                tables=self.tables,
                share=Share(rank, processes, _wait if processes > 1 else _go_on),
                revision=self.revision,
                resume=self.resume,
                heatmaps=self.heatmaps,
                detector=self.detector,
            )


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones. Raises ValueError if it is none."""
    if not folder.is_dir():
        raise ValueError(f"{plain(folder)} is not a folder")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _wait() -> None:
    """Wait for the other processes, which a launcher has started. Raises ValueError if one of them has ended."""
    import torch

    try:
        torch.distributed.barrier()
    except RuntimeError as error:  # as the connection to it is closed
        raise ValueError(
            f"another process of this run has ended ({str(error).splitlines()[0]}); once what it said is mended, "
            "the same command with --resume goes on"
        ) from error


def _go_on() -> None:
    """Do not wait: there is one process."""


@contextlib.contextmanager
def _resume_hint(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from downstream.inspection.resume import PART

        if (out / PART).is_file():
            print("finished images are kept: the same command with --resume goes on with the others", file=sys.stderr)
        raise


def describe(inspection: Inspection) -> str:
    """Describe the run in a few lines of plain text."""
    from downstream.calibration import percent
    from downstream.inspection.results import ANOMALOUS, UNDECIDED, UNREADABLE

    summary, results = inspection.summary, inspection.results
    counts, order = summary["counts"], sorted(results, key=lambda result: (-(result.score or 0.0), result.path))
    anomalous, undecided, unreadable = (
        [result for result in order if result.verdict == verdict] for verdict in (ANOMALOUS, UNDECIDED, UNREADABLE)
    )
    ranked, number = (anomalous, counts[ANOMALOUS]) if anomalous else (undecided, counts[UNDECIDED])
    scored = sum(counts.values()) - counts[UNREADABLE]
    others = f", {counts[UNDECIDED]} undecided" if counts[UNDECIDED] else ""
    if summary["threshold"] is None:
        lines = [f"{scored} images ranked; no threshold, so no verdicts"]
    else:
        rate = summary["promised_false_alarm_rate"]
        promise = f"promised false-alarm rate {percent(rate)}" if rate else "given, no promise"
        threshold = f"threshold {summary['threshold']:.4g}, {promise}"
        lines = [f"{counts[ANOMALOUS]} of {scored} images anomalous{others} ({threshold})"]
    if ranked:
        lines.append(f"{'score':>10}  {'p-value':>7}  image")
    for result in ranked[:TOP]:
        p_value = "" if result.p_value is None else f"{result.p_value:.3g}"
        why = f" ({plain(result.reason)})" if result.reason else ""
        lines.append(f"{result.score:>10.4g}  {p_value:>7}  {plain(result.path)}{why}")
    if number > TOP:
        lines.append(f"{'...':>10}  and {number - TOP} more")
    if regions := summary["regions"]:
        where = plain(inspection.out / "regions.csv")
        images = number_of(summary["images_with_regions"], "image")
        lines.append(f"regions: {number_of(regions, 'region')} in {images}: {where}")
    lines += [f"unreadable: {plain(result.path)} ({plain(result.reason)})" for result in unreadable[:TOP]]
    if (more := counts[UNREADABLE] - len(unreadable[:TOP])) > 0:
        lines.append(f"unreadable: and {more} more")
    lines += [f"note: {warning}" for warning in summary["warnings"]]
    lines.append(f"report: {plain(inspection.out / 'report.html')}")
    return "\n".join(lines)

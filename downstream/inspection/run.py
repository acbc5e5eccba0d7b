"""`score_folder`: inspection from folder to folder. Reads an extractor and two folders, writes everything to
a third.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adpretrain import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path, sweep
from downstream.calibration import percent
from downstream.detector import Detector
from downstream.inspection.basis import DEFAULTS, Basis, Options, prepare
from downstream.inspection.finding import find_images, passed_over, printable
from downstream.inspection.fitted import prepare_fitted
from downstream.inspection.normals import Progress, silent
from downstream.inspection.photos import HEATMAPS
from downstream.inspection.report import Fact, rate_fact, write_report
from downstream.inspection.results import (
    ANOMALOUS,
    NORMAL,
    UNDECIDED,
    UNREADABLE,
    Result,
    as_dict,
    counted,
    remove_earlier_heatmaps,
    write_scores,
    write_summary,
)
from downstream.inspection.resume import PART, Record, settings_of
from downstream.inspection.scoring import score_images
from downstream.saved import locate_model

# One meaning per code, the most urgent one that is true; --help repeats them.
EXIT_FINE, EXIT_ANOMALY, EXIT_USAGE, EXIT_INCOMPLETE = 0, 1, 2, 3
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Inspection:
    """A finished run: the results in path order, and the content of summary.json."""

    results: list[Result]
    summary: dict[str, Any]
    out: Path

    @property
    def exit_code(self) -> int:
        """1 with an anomaly; else 3 where none can be ruled out (unreadable, or no threshold); else 0."""
        verdicts = {result.verdict for result in self.results}
        if ANOMALOUS in verdicts:
            return EXIT_ANOMALY
        return EXIT_INCOMPLETE if verdicts & {UNREADABLE, UNDECIDED} else EXIT_FINE


def pick_device(name: str) -> torch.device:
    """The first accelerator (else the CPU) for "auto", or any torch device name. ValueError if it cannot be
    used.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError for CUDA in a CPU build
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"device {name!r} cannot be used here ({first_line}); try auto or cpu") from None
    return device


def score_folder(
    extractor: str | os.PathLike[str],
    normal: Path,
    images: Path,
    out: Path,
    calibration: Path | None = None,
    options: Options = DEFAULTS,
    device: str = "auto",
    progress: Progress = silent,
    weights: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    detector: str | os.PathLike[str] | None = None,
) -> Inspection:
    """Score every image below `images` against the normal photographs in `normal`.

    `extractor`, `weights`, `revision`: as in `ADExtractor.from_pretrained`. `detector`: a fitted one (a folder, or
    "org/name" on the Hub) that scores instead; the normal photographs, which it must not have seen, calibrate it.

    Writes out/scores.csv, out/heatmaps/*.png, out/report.html and out/summary.json (last: it marks a complete
    run). Until then out/scores.part.jsonl says what is scored so far; with `resume` a run that was interrupted goes on
    from there, and ends with the files of an uninterrupted one (`downstream.inspection.resume`).

    Raises ValueError for input that makes the whole run meaningless, or a run to go on with that had other settings;
    OSError if `out` cannot be written.
    """
    paths = find_images(images, exclude=out)
    _make_writable(out)
    foreign = [note for folder in (normal, calibration, images) if folder for note in passed_over(folder, exclude=out)]
    started = time.perf_counter()
    where = pick_device(device)
    kind, name = ("extractor", extractor) if detector is None else ("detector", detector)
    folder = locate_model(name, revision=revision).folder
    extra = find_images(calibration, exclude=out) if calibration else []
    normals = find_images(normal, exclude=out)
    settings = settings_of(kind, folder, where, normals, extra, options)
    record = Record(out, settings, resume)
    given = where, normal, calibration, options, out
    basis: Basis[Detector]
    if detector is None:
        basis = prepare(ADExtractor.from_pretrained(folder, where, weights), *given, progress)
    else:
        basis = prepare_fitted(folder, *given, weights, progress)
    if not record.goes_on:
        remove_earlier_heatmaps(out, (SUMMARY, PART))
    (out / SUMMARY).unlink(missing_ok=True)
    with record:
        results, more_warnings = score_images(basis, images, paths, record, options.batch_size, progress)
    warnings = [*basis.warnings, *more_warnings, *_copies(basis, results), *foreign]
    if drift := drift_warning(basis, options, results):
        warnings.insert(0, drift)
    summary: dict[str, Any] = {kind: printable(name), "normal": printable(normal), "images_folder": printable(images)}
    summary |= _summary(basis, options, results, warnings)
    summary["seconds"] = round(time.perf_counter() - started, 3)
    done = Inspection(results, summary, out)
    facts = [*_facts(basis, options, results), Fact(kind.capitalize(), printable(name), basis.description)]
    _write(done, basis, f"Inspection of {images.resolve().name}", facts, warnings)
    record.finish()
    return done


def _write(
    done: Inspection, basis: Basis[Detector], title: str, facts: Sequence[Fact], warnings: Sequence[str]
) -> None:
    """The files of a finished run, summary.json last."""
    write_scores(done.out / "scores.csv", done.results)
    made = f"Made by adpretrain {__version__} on {time.strftime('%Y-%m-%d %H:%M')}."
    write_report(
        done.out / "report.html",
        done.results,
        title=title,
        where=f"{done.summary['images_folder']} compared with {done.summary['normal']}",
        facts=facts,
        warnings=warnings,
        threshold=basis.threshold,
        normal_scores=basis.calibration.scores if basis.calibration else (),
        footer=f"{made} All numbers are in scores.csv.",
    )
    write_summary(done.out / SUMMARY, done.summary)


def _make_writable(out: Path) -> None:
    """Before any work: can files be made and renamed here? What a kill left half-written is removed."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{printable(out)} is a file: --out names a folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "scores.csv.check") as probe:
        probe.touch()
    (out / "scores.csv.check").unlink()
    sweep(out)
    sweep(out / HEATMAPS)


def _copies(basis: Basis[Detector], results: Sequence[Result]) -> list[str]:
    """A photograph that is compared with itself is normal whatever it shows."""
    undecided = [result for result in results if result.verdict == UNDECIDED and result.reason]
    if not undecided:
        return []
    return [
        f"{len(undecided)} of {len(results)} images are normal photographs too (copies, under any name): their scores "
        "say nothing, and they have no verdict."
    ]


def drift_warning(basis: Basis[Detector], options: Options, results: Sequence[Result]) -> str | None:
    """What to say if there are more alarms than the promise allows, were all photographs normal."""
    calibration = basis.calibration
    if calibration is None or options.threshold is not None:
        return None
    counts = counted(results)
    alarms, judged = counts[ANOMALOUS], counts[ANOMALOUS] + counts[NORMAL]
    if not judged or not calibration.exceeds(alarms, judged):
        return None
    return (
        f"{alarms} of {judged} images are anomalous: more than normal photographs like the given ones would give "
        f"(about {percent(calibration.rate)}; a test at the 1 % level). Either many of them have defects, or the line "
        "has changed since the normal photographs were taken. Look at the alarms; if they are good, add some of them "
        "to the normal photographs."
    )


def _summary(
    basis: Basis[Detector], options: Options, results: Sequence[Result], warnings: Sequence[str]
) -> dict[str, Any]:
    calibration = basis.calibration
    promised = calibration if options.threshold is None else None
    return {
        "references": basis.references,
        "reference_choice": options.references if basis.references else None,
        "shots": options.shots if basis.references else None,
        "threshold": basis.threshold,
        "unlike_threshold": _finite(calibration.unlike_threshold) if calibration else None,
        "threshold_from": "user" if options.threshold is not None else "calibration" if calibration else None,
        "asked_false_alarm_rate": options.false_alarm_rate,
        "promised_false_alarm_rate": promised.rate if promised else None,
        "false_alarm_rate_upper_95": promised.rate_upper if promised else None,
        "calibration_scores": list(calibration.scores) if calibration else [],
        "calibration_unlike": list(calibration.unlike) if calibration else [],
        "more_alarms_than_promised": drift_warning(basis, options, results) is not None,
        "full_scale": basis.full_scale,
        "counts": counted(results),
        "warnings": [printable(warning) for warning in warnings],
        "files": {"scores": "scores.csv", "report": "report.html", "heatmaps": HEATMAPS},
        "images": [as_dict(result) for result in results],
        "library_version": __version__,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _facts(basis: Basis[Detector], options: Options, results: Sequence[Result]) -> list[Fact]:
    calibration = basis.calibration if options.threshold is None else None
    threshold = "none" if basis.threshold is None else f"{basis.threshold:.4g}"
    origin = "given by the user" if options.threshold is not None else "from normal photographs only"
    # Why a heatmap can be outlined where the verdict is normal.
    origin += f"; a score is {basis.score}"
    beyond = basis.calibration.unlike_threshold if basis.calibration else math.inf
    limit = f"above {beyond:.3g}" if math.isfinite(beyond) else "not judged"
    calibrated = len(basis.calibration.scores) if basis.calibration else 0
    return [
        Fact(
            "Images",
            str(len(results)),
            ", ".join(f"{n} {verdict}" for verdict, n in counted(results).items() if n),
        ),
        Fact("Threshold", threshold, origin if basis.threshold is not None else "one reference cannot give one"),
        Fact("Unlike the normals", limit, "brightness, contrast, colour, sharpness, layout; in units of their spread"),
        rate_fact(
            calibration.rate if calibration else None,
            options.false_alarm_rate,
            calibration.rate_upper if calibration else None,
        ),
        Fact(
            "Normal photographs",
            str(basis.references or calibrated),
            f"as references; {calibrated} calibrate the threshold" if basis.references else "calibrate the threshold",
        ),
    ]

"""`score_folder` inspects the photographs in a folder and writes the results to another folder.

Every photograph is read, scored and drawn in one pass, and what is written about it goes to the record of the run.
Then the record is read once, in the order of the photographs' names, for the tables and the counts. Only two batches of
images and one of maps are in memory, however many images there are, because the inspector fixes the colour scale before
the first image is scored. This also makes heatmaps of different runs with the same references comparable.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from adpretrain import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path, sweep
from adpretrain.progress import Progress
from downstream.exchangeability import plot
from downstream.inspection import DEFAULTS, PLAIN, Options, Tables
from downstream.inspection.facts import facts_of, in_brief, regions_note
from downstream.inspection.findings import COLUMNS as REGION_COLUMNS
from downstream.inspection.findings import findings_files
from downstream.inspection.inspector import Inspector, shape_note
from downstream.inspection.notes import change_note, copies_note, drift_note, saturation_note
from downstream.inspection.photos import find_images, passed_over, printable
from downstream.inspection.picture_names import HEATMAPS, LISTING, MAPS, MASKS, Heatmaps, remove_listed
from downstream.inspection.report import Fact, write_report
from downstream.inspection.results import ANOMALOUS, COLUMNS, UNDECIDED, UNREADABLE, Result
from downstream.inspection.resume import Record, parts, settings_of
from downstream.inspection.set_up import inspector_from_detector, inspector_from_folder
from downstream.inspection.share import ALONE, Entries, Share, score_images
from downstream.inspection.source import InShards, photographs_of
from downstream.inspection.spreadsheet import table_file, write_workbook
from downstream.inspection.summary import summary_of
from downstream.inspection.tally import Tally
from downstream.saved import locate_model
from downstream.terminal import no_progress

# `Inspection.exit_code` chooses between them; --help explains them.
EXIT_FINE, EXIT_ANOMALY, EXIT_USAGE, EXIT_INCOMPLETE = 0, 1, 2, 3
SUMMARY, WORKBOOK = "summary.json", "scores.xlsx"  # in the output folder


@dataclass(frozen=True)
class Inspection:
    """A finished run: the results of the photographs that it lists, in path order, the content of summary.json, and the
    output folder."""

    results: list[Result]
    summary: dict[str, Any]
    out: Path

    @property
    def exit_code(self) -> int:
        """1 if an image is anomalous; else 3 if one is unreadable or undecided; else 0."""
        counts = self.summary["counts"]
        if counts[ANOMALOUS]:
            return EXIT_ANOMALY
        return EXIT_INCOMPLETE if counts[UNREADABLE] or counts[UNDECIDED] else EXIT_FINE


def pick_device(name: str) -> torch.device:
    """Return the device of a torch device name; "auto" is the first accelerator, else the CPU. Raises ValueError if it
    cannot be used.
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
    normal: Path | None,
    images: Path,
    out: Path,
    calibration: Path | None = None,
    options: Options = DEFAULTS,
    device: str = "auto",
    progress: Progress = no_progress,
    weights: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    resume: bool = False,
    detector: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    tables: Tables = PLAIN,
    at: Path | None = None,
    share: Share = ALONE,
    heatmaps: Heatmaps = "all",
) -> Inspection:
    """Score every image below `images`, or in the shards there, against the normal photographs in `normal`.

    `extractor`, `weights`, `revision` and `image_size` are those of `ADExtractor.from_pretrained`. `detector` is a
    fitted detector (a folder, or "org/name" on the Hub) to score with instead; the normal photographs, which it must
    not have seen, calibrate it. `tables` says how scores.csv and regions.csv are written.
    Writes out/scores.csv, out/regions.csv, out/heatmaps/*.png, out/report.html and, last, out/summary.json, which marks
    a complete run.
    Until then out/scores.part.jsonl records what has been scored; `resume` continues an interrupted run from there and
    writes the same files as an uninterrupted one (`downstream.inspection.resume`).

    `at` is a saved inspector (`downstream.inspection.product`) to score with instead, with its own options; `normal` is
    then None. `share` is that of this process, if several score the same folder; all but the first return an inspection
    without results. `heatmaps` says of which photographs heatmaps and masks are written.

    Raises ValueError for input that makes the whole run meaningless, or if the run to resume had other settings;
    OSError if `out` cannot be written.
    """
    photographs = photographs_of(images, exclude=out)
    if share.rank == 0:  # several at once would remove each other's probe
        _make_writable(out)
    started = time.perf_counter()
    where = pick_device(device)
    kind, name = ("extractor", extractor) if detector is None else ("detector", detector)
    kind, name = (kind, name) if at is None else ("inspector", at)
    folder = Path(name) if at is not None else locate_model(name, revision=revision).folder
    if at is not None:
        inspector = Inspector.load(at, where, None if weights is None else Path(weights))
        options = inspector.options
    extra = find_images(calibration, exclude=out) if calibration else []
    normals = find_images(normal, exclude=out) if normal else []
    settings = settings_of(kind, folder, where, normals, extra, options)
    settings |= {"image_size": image_size, "heatmaps": heatmaps}
    if share.rank == 0 and not resume:
        remove_listed(out, (out / SUMMARY, out / LISTING, *parts(out)))
        for path in parts(out):
            path.unlink(missing_ok=True)
    share.wait()  # for the removal
    record = Record(out, settings, resume, share.rank)
    if at is None:
        assert normal is not None
        given = where, normal, calibration, options, out
        if detector is None:
            model = ADExtractor.from_pretrained(folder, where, weights, image_size=image_size)
            inspector = inspector_from_folder(model, *given, progress)
        else:
            inspector = inspector_from_detector(folder, *given, weights, progress)
    (out / SUMMARY).unlink(missing_ok=True)
    with record:
        entries = score_images(inspector, photographs, record, progress, share, heatmaps)
    if share.rank > 0:
        return Inspection([], {}, out)
    folders = (normal, calibration, None if isinstance(photographs, InShards) else images)
    foreign = [note for folder in folders if folder for note in passed_over(folder, exclude=out)]
    tally = _write_tables(out, entries, inspector, tables)
    summary: dict[str, Any] = {
        kind: printable(name),
        "normal": printable(normal or name),
        "images_folder": printable(images),
    }
    summary |= _summary(inspector, tally, entries, foreign)
    summary["files"] |= {"workbook": WORKBOOK} if tables.xlsx else {}
    summary["seconds"] = round(time.perf_counter() - started, 3)
    about = Fact(kind.capitalize(), printable(name), inspector.description)
    _write_report(out, inspector, tally, summary, about, f"Inspection of {images.resolve().name}")
    with atomic_path(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    record.finish()
    return Inspection([entry.result for entry in tally.listed], summary, out)


def _summary(inspector: Inspector, tally: Tally, entries: Entries, foreign: Sequence[str]) -> dict[str, Any]:
    """What the run found, with everything that its reader should know; ``foreign`` are notes about other files."""
    results = [entry.result for entry in tally.listed]
    many, changed = drift_note(inspector, tally), change_note(tally.watch, entries)
    warnings = [
        *many,
        *changed,
        *inspector.warnings,
        *shape_note(tally.odd_shapes, len(tally)),
        *saturation_note(tally.saturated, len(tally), inspector.reader.full_scale),
        *regions_note(results, tally.quiet, inspector.options.threshold is None),
        *copies_note(tally.copies, len(tally)),
        *foreign,
    ]
    brief = in_brief(inspector, tally.counts, results, bool(many), bool(changed))
    return {
        **summary_of(inspector, tally, warnings),
        "more_alarms_than_promised": bool(many),
        "photographs_changed": bool(changed),
        "in_brief": printable(brief),
    }


def _write_tables(out: Path, entries: Entries, inspector: Inspector, tables: Tables) -> Tally:
    """Write the tables, entry by entry, and count."""
    tally = Tally(inspector.calibration)
    (out / LISTING).unlink(missing_ok=True)
    with ExitStack() as stack:
        add_score = stack.enter_context(table_file(out / "scores.csv", COLUMNS, tables))
        add_findings = stack.enter_context(findings_files(out, tables))
        listing = stack.enter_context(_listing(out)) if len(entries) > tally.most else None
        for entry in entries:
            tally.add(entry)
            add_score(entry.result)
            if entry.size is not None:
                add_findings(entry.result.path, entry.size, entry.findings)
            if listing is not None and entry.result.heatmap is not None:
                pair = {"path": printable(entry.result.path), "heatmap": entry.result.heatmap}
                listing.write(json.dumps(pair) + "\n")
    if tables.xlsx:
        results = (entry.result for entry in entries)
        findings = (finding for entry in entries for finding in entry.findings)
        write_workbook(out / WORKBOOK, {"scores": (COLUMNS, results), "regions": (REGION_COLUMNS, findings)})
    return tally


@contextmanager
def _listing(out: Path) -> Iterator[IO[str]]:
    with atomic_path(out / LISTING) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def _write_report(
    out: Path, inspector: Inspector, tally: Tally, summary: Mapping[str, Any], about: Fact, title: str
) -> None:
    write_report(
        out / "report.html",
        tally,
        title=title,
        where=f"{summary['images_folder']} compared with {summary['normal']}",
        facts=[*facts_of(inspector, summary["counts"], summary["regions"], summary["inspected_share"]), about],
        in_brief=summary["in_brief"],
        warnings=summary["warnings"],
        threshold=inspector.threshold,
        evidence=plot(tally.watch) if tally.watch is not None and len(tally.watch) else "",
        normal_scores=inspector.calibration.scores if inspector.calibration else (),
        footer=f"Made by adpretrain {__version__} on {time.strftime('%Y-%m-%d %H:%M')}. All numbers are in scores.csv.",
    )


def _make_writable(out: Path) -> None:
    """Make sure that files can be created and renamed in ``out``, and remove what a killed run left half-written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{printable(out)} is a file: --out names a folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "scores.csv.check") as probe:
        probe.touch()
    (out / "scores.csv.check").unlink()
    sweep(out)
    for folder in (HEATMAPS, MASKS, MAPS):
        sweep(out / folder)

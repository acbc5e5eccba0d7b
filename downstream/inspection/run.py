"""`score_folder` inspects a folder of images and writes the results to another folder.

Every image is read, scored and drawn in one pass. Only two batches of images and one of maps are in memory, however
many images there are, because the inspector fixes the colour scale before the first image is scored. This also makes
heatmaps of different runs with the same references comparable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from adpretrain import __version__
from adpretrain.extractor import ADExtractor
from adpretrain.files import atomic_path, sweep
from adpretrain.progress import Progress
from downstream.calibration import percent
from downstream.exchangeability import Watch, plot
from downstream.inspection import DEFAULTS, PLAIN, Options, Tables
from downstream.inspection.facts import facts_of, in_brief, regions_note
from downstream.inspection.findings import COLUMNS as REGION_COLUMNS
from downstream.inspection.findings import findings_of, write_findings, write_map, write_mask
from downstream.inspection.inspector import Inspector, Scored, shape_note
from downstream.inspection.normals import Map, predict_photos
from downstream.inspection.photos import (
    Photo,
    Unreadable,
    find_images,
    passed_over,
    printable,
    relative_name,
)
from downstream.inspection.report import Fact, write_report
from downstream.inspection.results import (
    ANOMALOUS,
    COLUMNS,
    NORMAL,
    UNDECIDED,
    UNREADABLE,
    Result,
    as_dict,
    counted,
    write_scores,
)
from downstream.inspection.resume import Batch, Record, Stamp, parts, settings_of, stamp
from downstream.inspection.spreadsheet import write_workbook
from downstream.regions import Region
from downstream.saved import locate_model
from downstream.terminal import no_progress
from downstream.visualise import ColourScale, panel, save_png

# `Inspection.exit_code` chooses between them; --help explains them.
EXIT_FINE, EXIT_ANOMALY, EXIT_USAGE, EXIT_INCOMPLETE = 0, 1, 2, 3
SCALE_SAMPLE = 64  # images that fix the colour scale if the normals cannot
# In the output folder:
SUMMARY, HEATMAPS, MASKS, MAPS, WORKBOOK = "summary.json", "heatmaps", "masks", "maps", "scores.xlsx"


@dataclass(frozen=True)
class Inspection:
    """A finished run: the results in path order, the content of summary.json, and the output folder."""

    results: list[Result]
    summary: dict[str, Any]
    out: Path

    @property
    def exit_code(self) -> int:
        """1 if an image is anomalous; else 3 if one is unreadable or undecided; else 0."""
        verdicts = {result.verdict for result in self.results}
        if ANOMALOUS in verdicts:
            return EXIT_ANOMALY
        return EXIT_INCOMPLETE if verdicts & {UNREADABLE, UNDECIDED} else EXIT_FINE


@dataclass(frozen=True)
class Share:
    """The share of one of several processes in a run: the batches whose number modulo ``processes`` is ``rank``.

    ``wait`` returns when all processes have come to it.
    """

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Share()


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
) -> Inspection:
    """Score every image below `images` against the normal photographs in `normal`.

    `extractor`, `weights`, `revision` and `image_size` are those of `ADExtractor.from_pretrained`. `detector` is a
    fitted detector (a folder, or "org/name" on the Hub) to score with instead; the normal photographs, which it must
    not have seen, calibrate it. `tables` says how scores.csv and regions.csv are written.
    Writes out/scores.csv, out/regions.csv, out/heatmaps/*.png, out/report.html and, last, out/summary.json, which marks
    a complete run.
    Until then out/scores.part.jsonl records what has been scored; `resume` continues an interrupted run from there and
    writes the same files as an uninterrupted one (`downstream.inspection.resume`).

    `at` is a saved inspector (`downstream.inspection.product`) to score with instead, with its own options; `normal` is
    then None. `share` is that of this process, if several score the same folder; all but the first return an inspection
    without results.

    Raises ValueError for input that makes the whole run meaningless, or if the run to resume had other settings;
    OSError if `out` cannot be written.
    """
    paths = find_images(images, exclude=out)
    _make_writable(out)
    foreign = [note for folder in (normal, calibration, images) if folder for note in passed_over(folder, exclude=out)]
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
    settings = settings_of(kind, folder, where, normals, extra, options) | {"image_size": image_size}
    if share.rank == 0 and not resume:
        _remove_earlier(out)
    share.wait()  # for the removal
    record = Record(out, settings, resume, share.rank)
    if at is None:
        assert normal is not None
        given = where, normal, calibration, options, out
        if detector is None:
            model = ADExtractor.from_pretrained(folder, where, weights, image_size=image_size)
            inspector = Inspector.from_folder(model, *given, progress)
        else:
            inspector = Inspector.from_detector(folder, *given, weights, progress)
    (out / SUMMARY).unlink(missing_ok=True)
    with record:
        whole, more_warnings = score_images(inspector, images, paths, record, progress, share)
    if share.rank > 0:
        return Inspection([], {}, out)
    results, counts = list(whole.results), counted(whole.results)
    quiet = regions_note(results, options.threshold is None)
    warnings = [*inspector.warnings, *more_warnings, *quiet, *_copies_note(results), *foreign]
    watch = _watch(inspector, results)
    many, changed = _drift_note(inspector, results), _change_note(watch, results)
    summary: dict[str, Any] = {
        kind: printable(name),
        "normal": printable(normal or name),
        "images_folder": printable(images),
    }
    summary |= _summary(inspector, whole, [*many, *changed, *warnings])
    summary |= {"more_alarms_than_promised": bool(many), "photographs_changed": bool(changed)}
    summary["in_brief"] = printable(in_brief(inspector, counts, results, bool(many), bool(changed)))
    summary["files"] |= {"workbook": WORKBOOK} if tables.xlsx else {}
    summary["seconds"] = round(time.perf_counter() - started, 3)
    about = Fact(kind.capitalize(), printable(name), inspector.description)
    _write(out, inspector, whole, summary, about, f"Inspection of {images.resolve().name}", watch, tables)
    record.finish()
    return Inspection(results, summary, out)


def _write(
    out: Path,
    inspector: Inspector,
    whole: Batch,
    summary: Mapping[str, Any],
    about: Fact,
    title: str,
    watch: Watch | None,
    tables: Tables,
) -> None:
    """Write scores, regions, report and, last, the summary, which marks a complete run."""
    results = whole.results
    write_scores(out / "scores.csv", results, tables)
    write_findings(out, whole.sizes, whole.findings, tables)
    if tables.xlsx:
        write_workbook(out / WORKBOOK, {"scores": (COLUMNS, results), "regions": (REGION_COLUMNS, whole.findings)})
    write_report(
        out / "report.html",
        results,
        title=title,
        where=f"{summary['images_folder']} compared with {summary['normal']}",
        facts=[*facts_of(inspector, summary["counts"], summary["regions"], summary["inspected_share"]), about],
        in_brief=summary["in_brief"],
        findings=whole.findings,
        warnings=summary["warnings"],
        threshold=inspector.threshold,
        evidence=plot(watch) if watch is not None and len(watch) else "",
        normal_scores=inspector.calibration.scores if inspector.calibration else (),
        footer=f"Made by adpretrain {__version__} on {time.strftime('%Y-%m-%d %H:%M')}. All numbers are in scores.csv.",
    )
    with atomic_path(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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


def _remove_earlier(out: Path) -> None:
    """Delete the heatmaps, masks, maps and records of an earlier run, so that none remains whose image is gone.

    Only files that this toolkit wrote are deleted; a list that cannot be read is ignored.
    """
    for path in (out / SUMMARY, *parts(out)):
        with contextlib.suppress(OSError):
            listed = re.findall(rf'"heatmap": "({HEATMAPS}/[A-Za-z0-9._-]+\.png)"', path.read_text("latin-1"))
            for heatmap in listed:
                _remove(out, heatmap)
    for path in parts(out):
        path.unlink(missing_ok=True)


def _mask_and_map(out: Path, heatmap: str) -> tuple[Path, Path]:
    """The other files of the photograph whose heatmap has this name below the output folder."""
    return out / heatmap.replace(HEATMAPS, MASKS, 1), (out / heatmap.replace(HEATMAPS, MAPS, 1)).with_suffix(".tif")


def _remove(out: Path, heatmap: str) -> None:
    for file in (out / heatmap, *_mask_and_map(out, heatmap)):
        file.unlink(missing_ok=True)


def score_images(
    inspector: Inspector,
    root: Path,
    paths: Sequence[Path],
    record: Record,
    progress: Progress = no_progress,
    share: Share = ALONE,
) -> tuple[Batch, list[str]]:
    """Score `paths` and save a panel for each; return all as one batch, in the order of `paths`, and warnings.

    Panels are written below the record's folder. Batches in the record are taken from it; the others are scored and
    added to it. A photograph that is blank or has no finite score counts as unreadable. Of several processes, each
    scores its ``share``, and only the first returns the others' too. Raises ValueError if one has ended before its
    share was done; the same run with `resume` goes on.
    """
    names, images = picture_names(root, paths), [stamp(root, path) for path in paths]
    scale = inspector.scale or _scale_of_sample(inspector, paths, images, record)
    size = inspector.reader.batch_size
    spans = [slice(start, start + size) for start in range(0, len(paths), size)]

    def recorded() -> list[Batch | None]:
        return [record.scored(images[span], [names[path] for path in paths[span]]) for span in spans]

    batches = recorded()
    if record.has_batches and not any(batches):
        warnings.warn(
            f"the unfinished run in {printable(record.folder)} has scored none of these {len(paths)} images as they "
            "are now: all are scored anew",
            stacklevel=2,
        )
    mine = [number for number, batch in enumerate(batches) if batch is None and number % share.processes == share.rank]
    read = inspector.reader.batches([path for number in mine for path in paths[spans[number]]])
    done = sum(len(paths[span]) for span, batch in zip(spans, batches, strict=True) if batch is not None)
    progress("scoring", done, len(paths))
    for number in mine:
        batch = _score_batch(inspector, root, next(read), names, record.folder, scale)
        record.add(images[spans[number]], batch)
        batches[number] = batch
        done += len(batch.results)
        progress("scoring", done, len(paths))
    share.wait()
    if share.processes > 1 and share.rank == 0:
        record.read()
        batches = recorded()
    found = [batch for batch in batches if batch is not None]
    if share.rank == 0 and len(found) < len(batches):
        missing = len(batches) - len(found)
        raise ValueError(f"{missing} batches were not scored, because a process has ended: go on with --resume")
    whole = Batch.joined(found)
    return whole, [
        *shape_note(whole.odd_shapes, len(paths)),
        *_saturation_note(whole.saturated, len(paths), inspector.reader.full_scale),
    ]


def _score_batch(
    inspector: Inspector,
    root: Path,
    read: Sequence[Photo | Unreadable],
    names: Mapping[Path, str],
    out: Path,
    scale: ColourScale,
) -> Batch:
    """Score and draw a batch; `names` holds the paths of the heatmaps, relative to `out`."""
    results, drawn = list[Result](), list[tuple[Scored, Result, list[Region]]]()
    for before, item in zip(read, inspector.score(read), strict=True):
        name, heatmap = relative_name(root, before.path), names[before.path]
        if isinstance(item, Unreadable):
            results.append(Result(name, None, None, UNREADABLE, reason=item.reason))
            _remove(out, heatmap)  # an interrupted run may have written some
        else:
            regions = inspector.regions(item)
            results.append(dataclasses.replace(inspector.judge(name, item, heatmap), regions=len(regions)))
            drawn.append((item, results[-1], regions))

    def draw(made: tuple[Scored, Result, list[Region]]) -> None:
        scored, result, regions = made
        photo, picture = scored.photo, names[scored.photo.path]
        drawing = panel(photo.shown, scored.map_HW, scale, title=result.title, regions=regions, seen=photo.seen)
        save_png(drawing, out / picture)
        mask, values = _mask_and_map(out, picture)
        mask.unlink(missing_ok=True)
        if regions:
            write_mask(mask, regions, photo.size)
        if inspector.options.maps:
            write_map(values, scored.map_HW)

    with ThreadPoolExecutor() as pool:  # compressing PNGs takes longer than scoring, and releases Python's lock
        list(pool.map(draw, drawn))
    photos = {result.path: scored.photo for scored, result, _ in drawn}
    return Batch(
        tuple(results),
        sum(map(inspector.has_odd_shape, photos.values())),
        sum(photo.saturated for photo in photos.values()),
        {path: photo.size for path, photo in photos.items()},
        tuple(
            finding
            for scored, result, regions in drawn
            for finding in findings_of(result.path, regions, scored.photo.size)
        ),
        math.fsum(1 - float(np.isnan(scored.map_HW).mean()) for scored, _, _ in drawn),
    )


def _scale_of_sample(
    inspector: Inspector, paths: Sequence[Path], images: Sequence[Stamp], record: Record
) -> ColourScale:
    """Fix the scale by the typical (median) image of an evenly spaced sample, as one reference gives no normal map."""
    step = max(1, len(paths) // SCALE_SAMPLE)
    sample, images = paths[::step][:SCALE_SAMPLE], images[::step][:SCALE_SAMPLE]
    if (earlier := record.scale(images)) is not None:
        return earlier
    maps = list[Map]()
    for batch in inspector.reader.batches(sample):
        photos = [item for item in batch if isinstance(item, Photo)]
        found = predict_photos(inspector.detector, photos, inspector.device)
        maps += [one[1] for one in found if not isinstance(one, str)]
    scale = ColourScale.from_typical_map(maps, inspector.threshold)
    record.set_scale(images, scale)
    return scale


def picture_names(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Name each image's heatmap below the output folder."""
    taken = set[str]()
    return {path: picture_name(relative_name(root, path), taken) for path in paths}


def picture_name(name: str, taken: set[str]) -> str:
    """Name the heatmap of an image: readable, safe in a URL, and, even without case, none of those in ``taken``, to
    which it is added.

    ``a/b c.jpg`` -> ``heatmaps/a_b-c.png``; a second image with the same name gets ``heatmaps/a_b-c-2.png``.
    """
    stem = name.removesuffix(PurePosixPath(name).suffix).replace("/", "_")
    # File systems allow 255 bytes, and the temporary file's name is longer than the final one.
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".")[-120:] or "image"
    picture, copies = f"{HEATMAPS}/{stem}.png", 1
    while picture.casefold() in taken:
        copies += 1
        picture = f"{HEATMAPS}/{stem}-{copies}.png"
    taken.add(picture.casefold())
    return picture


def _copies_note(results: Sequence[Result]) -> list[str]:
    """Return a warning about copies of normal photographs, which are compared with themselves."""
    copies = sum(result.verdict == UNDECIDED and bool(result.reason) for result in results)
    if not copies:
        return []
    return [
        f"{copies} of {len(results)} images are copies of normal photographs (under any name): their scores mean "
        "nothing, and they have no verdict."
    ]


def _drift_note(inspector: Inspector, results: Sequence[Result]) -> list[str]:
    """Return a warning if there are more alarms than the promised rate allows for normal photographs."""
    calibration = inspector.calibration
    if calibration is None or inspector.options.threshold is not None:
        return []
    counts = counted(results)
    alarms, judged = counts[ANOMALOUS], counts[ANOMALOUS] + counts[NORMAL]
    if not judged or not calibration.exceeds(alarms, judged):
        return []
    return [
        f"{alarms} of {judged} images are anomalous: more than normal photographs like the given ones would give "
        f"(about {percent(calibration.rate)}; a test at the 1 % level). Either many of them have defects, or the line "
        "has changed since the normal photographs were taken. Look at the alarms; if they are good, add some of them "
        "to the normal photographs."
    ]


def _watched(results: Sequence[Result]) -> list[Result]:
    """The results that count in the watch: those that are compared with the normals, in the order of their names."""
    return [result for result in results if result.verdict in (ANOMALOUS, NORMAL)]


def _watch(inspector: Inspector, results: Sequence[Result]) -> Watch | None:
    """Test whether the photographs, in the order of their names, look like the normals; None without calibration."""
    calibration = inspector.calibration
    if calibration is None:
        return None
    normals: Any = calibration.scores
    numbers: list[Any] = [result.score for result in _watched(results)]
    if calibration.unlike:
        normals = list(zip(calibration.scores, calibration.unlike, strict=True))
        numbers = [(result.score, result.unlike) for result in _watched(results)]
    watch = Watch(normals, measures=("score", "unlike value") if calibration.unlike else ("score",))
    if numbers:
        watch.update(numbers)
    return watch


def _change_note(watch: Watch | None, results: Sequence[Result]) -> list[str]:
    if watch is None or watch.warning is None:
        return []
    paths = [printable(result.path) for result in _watched(results)]
    return [watch.warning.in_words(paths[watch.warning.since], paths[watch.warning.at])]


def _saturation_note(saturated: int, total: int, full_scale: float | None) -> list[str]:
    if not saturated:
        return []
    limit = "the full scale of their type" if full_scale is None else f"{full_scale:g}, the full scale of the normals"
    return [f"{saturated} of {total} images hold values above {limit}: everything brighter looks white."]


def _summary(inspector: Inspector, whole: Batch, warnings: Sequence[str]) -> dict[str, Any]:
    calibration, options, results = inspector.calibration, inspector.options, whole.results
    promised = calibration if options.threshold is None else None
    return {
        "references": inspector.references,
        "reference_choice": options.references if inspector.references else None,
        "shots": options.shots if inspector.references else None,
        "threshold": inspector.threshold,
        "unlike_threshold": _finite(calibration.unlike_threshold) if calibration else None,
        "threshold_from": "user" if options.threshold is not None else "calibration" if calibration else None,
        "asked_false_alarm_rate": options.false_alarm_rate,
        "promised_false_alarm_rate": promised.rate if promised else None,
        "false_alarm_rate_upper_95": promised.rate_upper if promised else None,
        "calibration_scores": list(calibration.scores) if calibration else [],
        "calibration_unlike": list(calibration.unlike) if calibration else [],
        "pixel_limit": inspector.pixel_limit,
        "pixels_per_cell": [round(side, 2) for side in inspector.cell],
        "regions": sum(result.regions or 0 for result in results),
        "region_of_interest": None if options.roi is None else printable(options.roi),
        "ignored_border": options.ignore_border,
        "inspected_share": round(whole.inspected / len(whole.sizes), 4) if whole.sizes else None,
        "full_scale": inspector.reader.full_scale,
        "counts": counted(results),
        "warnings": [printable(warning) for warning in warnings],
        "files": {
            "scores": "scores.csv",
            "report": "report.html",
            "heatmaps": HEATMAPS,
            "regions": "regions.csv",
            "coco": "regions.json",
            "masks": MASKS,
        },
        "images": [as_dict(result) for result in results],
        "library_version": __version__,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

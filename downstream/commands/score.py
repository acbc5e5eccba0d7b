"""`adpretrain score`: photographs against a few normal ones."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from downstream.commands.network import EMBEDDED, EXTRACTOR_HELP
from downstream.terminal import ProgressBars, plain

if TYPE_CHECKING:
    from downstream.inspection.run import Inspection

CHOICE = {"extractor": EMBEDDED, "references": "even", "shots": 16, "seed": 0}  # what chooses references; defaults
MOST_PIXELS = 178_956_970  # as adpretrain.preprocess, which is slow to import
TOP = 5  # anomalies listed on stdout

EXIT_CODES = """exit codes, the most urgent one that is true:
  1  at least one image is anomalous (even if others were unreadable): its score is too high, or as a whole
     (brightness, contrast, colour, sharpness, layout) it is unlike the normal photographs
  3  no anomaly found, but none can be ruled out: some images were unreadable, copies of normal photographs,
     or there is no threshold
  0  every image was read and none is anomalous
  2  wrong usage or input: nothing was scored
Unreadable images never stop the run: they are listed, with the reason, in scores.csv (verdict "unreadable"),
summary.json and report.html. So are blank ones, as of a covered lens, and copies (verdict "undecided")."""


def score(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Score photographs against a few normal ones: scores, heatmaps, a threshold, an HTML report."""
    parser.epilog = EXIT_CODES
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--extractor", type=str, default=CHOICE["extractor"], help=EXTRACTOR_HELP)
    parser.add_argument(
        "--detector",
        type=str | None,
        default=None,
        help="score with a fitted detector instead (adpretrain fit; a folder or org/name): --normal are then "
        "photographs that it was not fitted on, and all of them calibrate",
    )
    parser.add_argument("--revision", type=str | None, default=None, help="tag or commit of what is on the Hub")
    parser.add_argument(
        "--weights", type=str | None, default=None, help="local file of the backbone's weights, without network"
    )
    parser.add_argument("--normal", type=str, required=True, help="folder of normal photographs, 2 to 8 or more")
    parser.add_argument("--images", type=str, required=True, help="folder of photographs to score, with subfolders")
    parser.add_argument("--out", type=str, required=True, help="folder for the results; made if needed")
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        help="share of normal images that may be called anomalous",
    )
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        help="folder of further normal photographs, for the threshold only",
    )
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="use this score instead of a calibrated threshold",
    )
    parser.add_argument(
        "--references",
        type=Literal["even", "random", "kmeans", "aligned"],
        default=CHOICE["references"],
        help="which normal photographs become references: evenly spaced by name, drawn with --seed, spread over "
        "k-means clusters, or the best aligned ones for every image (parts that do not lie in one place)",
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=CHOICE["shots"],
        help="number of references K at most; the others calibrate",
    )
    parser.add_argument("--seed", type=int, default=CHOICE["seed"], help="of --references random and kmeans")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MOST_PIXELS,
        help="width times height of the largest picture to read, to allow larger ones; others are unreadable, as a "
        "small file may claim any size and take all memory",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images in memory at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished run in --out: what it has scored is not scored again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (summary.json) instead of text")
    return _score


def _score(options: Namespace) -> int:
    from adpretrain.photographs import pixels_allowed
    from downstream.inspection.basis import Options
    from downstream.inspection.run import score_folder

    out = Path(options.out)
    if options.detector is not None:
        _refuse(options)
    with ProgressBars() as progress, _hint(out), pixels_allowed(options.max_pixels):
        inspection = score_folder(
            options.extractor,
            Path(options.normal),
            Path(options.images),
            out,
            Path(options.calibration) if options.calibration else None,
            Options(
                options.false_alarm_rate,
                options.threshold,
                options.references,
                options.shots,
                options.seed,
                options.batch_size,
            ),
            options.device,
            progress,
            weights=options.weights,
            revision=options.revision,
            resume=options.resume,
            detector=options.detector,
        )
    if options.json:
        print(json.dumps(inspection.summary, allow_nan=False))
    else:
        print(describe(inspection))
    return inspection.exit_code


def _refuse(options: Namespace) -> None:
    """ValueError for options that choose references, which a fitted detector has or does not need."""
    given = [f"--{name}" for name, default in CHOICE.items() if options[name] != default]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be given with --detector: it was fitted with its own")


@contextlib.contextmanager
def _hint(out: Path) -> Iterator[None]:
    from downstream.inspection.resume import PART

    try:
        yield
    except KeyboardInterrupt:
        if (out / PART).is_file():
            print("what is scored so far is kept: the same command with --resume goes on", file=sys.stderr)
        raise


def describe(inspection: Inspection) -> str:
    """The run in a few lines of plain text."""
    from downstream.calibration import percent
    from downstream.inspection.results import ANOMALOUS, UNDECIDED, UNREADABLE, by_score

    summary, results = inspection.summary, inspection.results
    counts = summary["counts"]
    anomalous, unreadable = by_score(results, ANOMALOUS), by_score(results, UNREADABLE)
    ranked = anomalous or by_score(results, UNDECIDED)
    scored = len(results) - len(unreadable)
    if summary["threshold"] is None:
        lines = [f"{scored} images ranked; no threshold, so no verdicts"]
    else:
        rate = summary["promised_false_alarm_rate"]
        promise = f"promised false-alarm rate {percent(rate)}" if rate else "given, no promise"
        threshold = f"threshold {summary['threshold']:.4g}, {promise}"
        lines = [f"{counts[ANOMALOUS]} of {scored} images anomalous ({threshold})"]
    if ranked:
        lines.append(f"{'score':>10}  {'p-value':>7}  image")
    for result in ranked[:TOP]:
        p_value = "" if result.p_value is None else f"{result.p_value:.3g}"
        why = f" ({plain(result.reason)})" if result.reason else ""
        lines.append(f"{result.score:>10.4g}  {p_value:>7}  {plain(result.path)}{why}")
    if len(ranked) > TOP:
        lines.append(f"{'...':>10}  and {len(ranked) - TOP} more")
    lines += [f"unreadable: {plain(result.path)} ({plain(result.reason)})" for result in unreadable[:TOP]]
    if len(unreadable) > TOP:
        lines.append(f"unreadable: and {len(unreadable) - TOP} more")
    lines += [f"note: {warning}" for warning in summary["warnings"]]
    lines.append(f"report: {plain(inspection.out / 'report.html')}")
    return "\n".join(lines)

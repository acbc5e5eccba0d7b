"""The console command `adpretrain`. Each subcommand is one function: it adds its arguments and returns what
to run.

Results go to stdout, everything else (progress, warnings, errors) to stderr. A user's mistake is one line on
stderr and exit code 2; a mistake of ours keeps its traceback and exits with 70, never with a code that means
something.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

if TYPE_CHECKING:  # torch loads only when a command runs, so that --help is quick
    from downstream.score import Inspection

Run = Callable[[Namespace], int]
EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 2, 70, 130
TOP = 5  # anomalies listed on stdout

SCORE_CODES = """exit codes, the most urgent one that is true:
  1  at least one image is anomalous (even if others were unreadable)
  3  no anomaly found, but none can be ruled out: some images were unreadable, or there is no threshold
  0  every image was read and none is anomalous
  2  wrong usage or input: nothing was scored
Unreadable images never stop the run: they are listed in scores.csv (verdict "unreadable") and, with the
reason, in summary.json and report.html."""


def score(parser: ArgumentParser) -> Run:
    """Score photographs against a few normal ones: scores, heatmaps, a threshold, an HTML report."""
    parser.epilog = SCORE_CODES
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--extractor", type=str, required=True, help="folder written by save_pretrained")
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
        "--max-references", type=int, default=16, help="use at most so many references; the others calibrate"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images in memory at once")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", action="store_true", help="print one JSON object (summary.json) instead of text")
    return _score


def _score(options: Namespace) -> int:
    from downstream.basis import Options
    from downstream.score import score_folder

    with _ProgressBars() as progress:
        inspection = score_folder(
            Path(options.extractor),
            Path(options.normal),
            Path(options.images),
            Path(options.out),
            Path(options.calibration) if options.calibration else None,
            Options(options.false_alarm_rate, options.threshold, options.max_references, options.batch_size),
            options.device,
            progress,
        )
    if options.json:
        print(json.dumps(inspection.summary, allow_nan=False))
    else:
        print(describe(inspection))
    return inspection.exit_code


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with the table of exit codes kept as it is written."""


# Later commands: one function each, named as the command.
COMMANDS: dict[str, Callable[[ArgumentParser], Run]] = {"score": score}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for a user's mistake)."""
    # Subparsers take over the formatter of their parent.
    parser = ArgumentParser(
        prog="adpretrain",
        description="Pretrained features for industrial anomaly detection.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"adpretrain {version('adpretrain')}")
    subcommands = parser.add_subcommands(metavar="command", required=True)
    runs: dict[str, Run] = {}
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip()
        subparser = ArgumentParser(description=summary)
        runs[name] = command(subparser)
        subcommands.add_subcommand(name, subparser, help=summary)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version or a usage error, already printed
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    try:
        return runs[arguments.subcommand](arguments[arguments.subcommand])
    except (ValueError, OSError) as error:
        print(f"adpretrain: error: {_printable(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("adpretrain: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        # Python would exit with 1, which here means "an anomaly was found".
        traceback.print_exc()
        return EXIT_BUG


def describe(inspection: Inspection) -> str:
    """The run in a few lines of plain text."""
    from downstream.calibration import percent
    from downstream.results import ANOMALOUS, UNDECIDED, UNREADABLE, by_score

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
        lines.append(f"{result.score:>10.4g}  {p_value:>7}  {_printable(result.path)}")
    if len(ranked) > TOP:
        lines.append(f"{'...':>10}  and {len(ranked) - TOP} more")
    lines += [f"unreadable: {_printable(result.path)} ({_printable(result.reason)})" for result in unreadable[:TOP]]
    if len(unreadable) > TOP:
        lines.append(f"unreadable: and {len(unreadable) - TOP} more")
    lines += [f"note: {warning}" for warning in summary["warnings"]]
    lines.append(f"report: {_printable(inspection.out / 'report.html')}")
    return "\n".join(lines)


def _printable(text: object) -> str:
    """Text that the terminal takes, whatever the file names and its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    readable = os.fsencode(str(text)).decode("utf-8", errors="replace")
    return readable.encode(encoding, errors="replace").decode(encoding)


class _ProgressBars:
    """Progress on stderr: a live bar on a terminal, silence in a log file."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, object] = {}
        self._bars.start()
        return self._show

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


if __name__ == "__main__":
    sys.exit(main())

"""Detectors with and without pretrained features, on labelled photographs, by one of the paper's protocols.

  accelerate launch recipes/evaluate.py --detectors patchcore,padim,featurenorm --features raw,pretrained \\
      --dataset mvtec --root data/mvtec --extractors runs/mine/extractor --protocol full --out runs/mvtec

Products are spread over the processes; a finished one is kept, and the same command goes on after a crash. The folder
gets table.json, .csv, .md and .tex, and report.html. Without --detectors, the few-shot table of FeatureNorm:

  python recipes/evaluate.py --extractors runs/demo/pretrain-seed0/extractor --root data/mtd --shots 4 8 --draws 3

A board of sets x extractors x detectors, as `adpretrain evaluate` computes it:

  python recipes/evaluate.py --board recipes/board.yaml --out runs/board
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import comparison
import few_shot
from flags import Help
from launch import complain, refuse_other_precision
from rich.console import Console

from adpretrain.data import DATASETS, Sample, index_with_bare
from adpretrain.hub import EMBEDDED
from adpretrain.preprocess import RESIZES
from downstream import cli
from downstream.detectors import DETECTORS, SETTINGS
from downstream.evaluation.contenders import FEATURES, PRETRAINED, SCALED
from downstream.evaluation.protocols import PROTOCOLS
from downstream.terminal import one_line_warnings, tell_memory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    data = parser.add_argument_group("data and networks")
    data.add_argument("--dataset", default="auto", help=f"layout: auto, {', '.join(DATASETS)}")
    data.add_argument("--board", type=Path, help="YAML file of a whole board (docs/board.md), instead of all but --out")
    data.add_argument("--root", type=Path, help="folder of the data set, or hf://org/name")
    data.add_argument("--split", default="", help="a listing of the set's own, such as realiad_jsons or VisA's 1cls")
    data.add_argument("--columns", nargs="*", default=[], help="Hugging Face columns, such as mask=segmentation")
    data.add_argument("--categories", nargs="*", default=["*"], help='categories to score, patterns such as "p00*"')
    data.add_argument("--defects", nargs="*", default=[], help="kinds of defects to score (all by default)")
    data.add_argument(
        "--extractors",
        nargs="+",
        default=[],
        help="of one kind: folders, org/name[@revision] of the Hub, or embedded (default, where one is needed)",
    )
    data.add_argument("--weights", help="a local file of the backbone's weights")
    data.add_argument("--device", help="cpu, cuda, ... (by default what accelerate finds; cpu for the few-shot table)")
    data.add_argument(
        "--shots", type=int, nargs="+", help="numbers of images K (default: 4; with --detectors 1 2 4 8 16)"
    )
    data.add_argument("--draws", type=int, help="of what is random (default: 1; 3 for reference-sensitivity)")

    table = parser.add_argument_group("with --detectors")
    table.add_argument("--detectors", type=_names, help=f"separated by commas: {', '.join(DETECTORS)}")
    table.add_argument(
        "--features", type=_names, help=f"of {', '.join(FEATURES)} (default: raw; raw,pretrained with --extractors)"
    )
    table.add_argument("--protocol", choices=PROTOCOLS, help="what is fitted on what (default: full)")
    table.add_argument("--backbone", default="lite0", help="network of raw features, without --extractors")
    table.add_argument("--image-size", type=int, default=224, help="its input in pixels, without --extractors")
    table.add_argument("--resize", choices=RESIZES, default="squeeze", help="photographs whole, or their centre")
    table.add_argument("--crop-from", type=int, help="shorter side before --resize crop, such as 256 for 224 pixels")
    table.add_argument("--levels", type=int, nargs="+", help="its blocks or stages, without --extractors")
    table.add_argument("--random-weights", type=int, metavar="SEED", help="untrained weights: a floor to compare with")
    table.add_argument("--references", type=int, default=8, help="the extractor's references, but for few-shot")
    table.add_argument("--share", type=float, default=0.1, help="sample-efficiency: share of the training images")
    table.add_argument("--noise", type=float, default=0.1, help="contamination: anomalies per normal training image")
    table.add_argument("--no-overlap", action="store_true", help="contamination: do not score what was trained on")
    table.add_argument("--settings", choices=SETTINGS, default="default", help="detectors' own, or ADPretrain's")
    table.add_argument("--options", type=Path, help="YAML file of detectors' options, a mapping under each name")
    table.add_argument("--batch-size", type=int, default=8, help="images in memory at once")
    table.add_argument("--workers", type=int, default=0, help="processes that read images, for each process")
    table.add_argument("--pictures", type=int, default=2, help="heatmaps of a product, one kind of defect each")
    table.add_argument("--embeddings", type=int, default=1, help="products whose features are drawn in two dimensions")
    table.add_argument("--out", type=Path, help="folder of the results; by default runs/, named after the settings")

    few = parser.add_argument_group("without --detectors: the few-shot table of FeatureNorm")
    few.add_argument("--per-defect", action="store_true", help="also a table for every kind of defect")
    few.add_argument("--panels", type=Path, help="folder for a picture of the median-scored image of every defect")
    few.add_argument("--json", type=Path, help="write every single result to this file")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those that do not go together end the program with a message."""
    parser = _parser()
    options = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    options.command = shlex.join(["accelerate", "launch", "recipes/evaluate.py", *given])  # kept beside its numbers
    if options.board is not None:
        fits = ("board", "out", "device", "batch_size", "workers", "command")
        values = vars(options).items()
        others = [name for name, value in values if name not in fits and value != parser.get_default(name)]
        if others:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            parser.error(f"--board names sets, extractors and detectors itself: leave {flags} out")
        return options
    if options.root is None:
        parser.error("needed: --root, the folder of a data set, or --board")
    if options.detectors is None:
        if options.protocol or options.features:
            parser.error("--protocol and --features need --detectors, such as --detectors padim,featurenorm")
    elif options.per_defect or options.panels or options.json:
        parser.error("--per-defect, --panels and --json belong to the few-shot table, without --detectors")
    if options.random_weights is not None and (options.extractors or options.weights):
        parser.error("--random-weights needs no --weights, and no --extractors: they were trained on real ones")
    needed = options.detectors is None or not {PRETRAINED, SCALED}.isdisjoint(options.features or ())
    own = options.backbone == parser.get_default("backbone") and options.random_weights is None
    if needed and own and not options.extractors:
        options.extractors = [EMBEDDED]
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen_samples(options: argparse.Namespace) -> list[Sample]:
    """The samples asked for. Raises ValueError if a pattern matches nothing."""
    columns = {role: name for role, _, name in (pair.partition("=") for pair in options.columns)}
    samples, _ = index_with_bare(options.dataset, options.root, columns, options.split)
    names = sorted({sample.category for sample in samples})
    matched = {pattern: fnmatch.filter(names, pattern) for pattern in options.categories}
    unmatched = [pattern for pattern, found in matched.items() if not found]
    if unmatched or not matched:
        raise ValueError(f"categories {unmatched} match none of: {', '.join(names)}")
    keep = {name for found in matched.values() for name in found}
    kinds = sorted({sample.defect for sample in samples if sample.anomalous})
    if unknown := set(options.defects) - set(kinds):
        raise ValueError(f"defects {sorted(unknown)} are unknown; this set has: {', '.join(kinds)}")
    return [
        sample
        for sample in samples
        if sample.category in keep and (not sample.anomalous or not options.defects or sample.defect in options.defects)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(stderr=True)
    tell_memory()
    if options.board is not None:
        flags = ["--device", options.device or "auto", "--batch-size", str(options.batch_size)]
        flags += ["--workers", str(options.workers), *(["--out", str(options.out)] if options.out else [])]
        return cli.main(["evaluate", str(options.board), *flags])
    try:
        refuse_other_precision("no", os.environ)
        with one_line_warnings():
            samples = chosen_samples(options)
        if options.detectors is None:
            few_shot.run(options, samples, console)
        else:
            comparison.run(options, samples, console)
    except (ValueError, OSError) as error:
        complain(console, "error", error)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with what is not finished" if options.detectors else "stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

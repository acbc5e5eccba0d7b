"""`adpretrain check-data` reads every image and mask of a data set, so that a broken file does not stop a long run."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downstream.commands.options import Command
from downstream.terminal import ProgressBars, number_of, plain

if TYPE_CHECKING:
    from adpretrain.data import Sample

SHOWN = 20  # at most this many warnings are printed


@dataclass(frozen=True, kw_only=True)
class CheckData(Command):
    """Read every image and mask of a data set and compare them with the labels.

    exit codes:
      0  every image and mask could be read, and the masks agree with the labels; there may be warnings
      1  problems were found; each is printed on its own line
      2  wrong usage, or the folder has no known layout: nothing was checked

    Args:
        dataset: layout of the data set; auto detects it
        root: folder of the data set, or hf://org/name
        columns: columns of a Hugging Face data set whose names cannot be guessed, such as --columns.mask segmentation
        workers: number of images read in parallel
        json: print a JSON object instead of text
    """

    dataset: str = "auto"
    root: str
    columns: dict[str, str] = field(default_factory=dict)
    workers: int = 4
    json: bool = False

    def run(self) -> int:
        from adpretrain.data import detect_layout
        from adpretrain.data.checking import check_samples

        layout = detect_layout(self.root) if self.dataset == "auto" else self.dataset
        samples, missing, left_out, junk = _index(layout, self.root, self.columns)
        with ProgressBars() as progress:
            found = check_samples(samples, self.workers, progress, missing, masks_needed=False)
        lines = [*left_out, *(problem.reason for problem in found if not problem.doubtful)]
        warned = [*junk, *(problem.reason for problem in found if problem.doubtful)]
        if self.json:
            report = {"dataset": layout, "root": self.root, "images": len(samples)}
            told = {"problems": [plain(line) for line in lines], "warnings": [plain(line) for line in warned]}
            print(json.dumps({**report, "categories": count(samples), **told}))
            return 1 if lines else 0
        print(f"{plain(self.root)}: {len(samples)} images in the {layout} layout")
        print(table(samples))
        print(number_of(len(lines), "problem") + (":" if lines else ""))
        for line in lines:
            print(f"  {plain(line)}")
        if warned:
            print(f"{number_of(len(warned), 'warning')} about files that can be used as they are:")
        for line in warned[:SHOWN]:
            print(f"  {plain(line)}")
        if len(warned) > SHOWN:
            print(f"  and {len(warned) - SHOWN} more; --json lists all")
        return 1 if lines else 0


def _index(
    layout: str, root: str, columns: dict[str, str]
) -> tuple[list[Sample], dict[Path, str], list[str], list[str]]:
    """Return the samples, a line for each missing mask, the files left out, and the junk files ignored."""
    from adpretrain.data import Junk, LeftOut, index_with_bare

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LeftOut)
        samples, missing = index_with_bare(layout, root, columns)
    left_out, junk = ([str(item.message) for item in caught if item.category is kind] for kind in (LeftOut, Junk))
    return samples, missing, left_out, junk


def count(samples: Sequence[Sample]) -> dict[str, dict[str, dict[str, int]]]:
    """Count normal and anomalous images by category and split; splits are in the order of `SPLITS`."""
    from adpretrain.data.layouts.tree import SPLITS

    found = Counter((sample.category, sample.split, sample.anomalous) for sample in samples)
    splits = [split for split in SPLITS if any(sample.split == split for sample in samples)]
    return {
        category: {
            split: {"normal": found[category, split, False], "anomalous": found[category, split, True]}
            for split in splits
        }
        for category in sorted({sample.category for sample in samples})
    }


def table(samples: Sequence[Sample]) -> str:
    """Format the counts as aligned text: a line for each category, then their sum."""
    counts = count(samples)
    splits: list[str] = list(next(iter(counts.values()), {}))
    cells = [(split, label) for split in splits for label in ("normal", "anomalous")]
    rows: list[list[Any]] = [["category", *(f"{split} {label}" for split, label in cells)]]
    rows += [[plain(category), *(counts[category][s][label] for s, label in cells)] for category in counts]
    if len(counts) > 1:
        rows.append(["all", *(sum(of[s][label] for of in counts.values()) for s, label in cells)])
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )

"""Image folders with a metadata.csv or metadata.jsonl, as the Hugging Face Hub shows them.

Read here and not by `datasets`, which refuses splits whose mask column is empty (a training split has no defects)
and overlooks a metadata file above the splits' folders.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adpretrain.data.columns import SPLIT_NAMES, choose_columns, defect_of, split_of
from adpretrain.data.layouts.tree import inside
from adpretrain.data.samples import Sample


def metadata_files(root: Path) -> list[Path]:
    """The metadata files in ``root`` and its subfolders, sorted."""
    found = (file for name in ("metadata.csv", "metadata.jsonl") for file in root.rglob(name))
    return sorted(file for file in found if file.is_file())


def index_metadata(root: Path, file: Path, columns: Mapping[str, str]) -> Iterator[tuple[Sample, str]]:
    """(sample, where it is listed) for every row of one metadata file.

    Names of images and masks are relative to the file's own folder. Without a split column, the split is that of the
    first folder below ``root`` with a split's name, else "train"; without a category column the category is
    ``root``'s name.

    Raises ValueError for a file that cannot be read, columns or labels that are not understood, a path out of
    ``root``.
    """
    chosen: dict[str, str] = {}
    for number, line in _lines(file):
        where = f"line {number} of {file}"
        chosen = chosen or choose_columns(dict.fromkeys(line, "text"), columns, str(file))
        row = {role: line.get(column) for role, column in chosen.items()}
        if not row["image"]:
            raise ValueError(f"{where} has no image")
        folder = file.parent.relative_to(root)
        image = inside(root, (folder / str(row["image"])).as_posix(), where)
        mask = inside(root, (folder / str(row["mask"])).as_posix(), where) if row.get("mask") else None
        split = split_of(str(row["split"]), where) if "split" in row else _split(image.relative_to(root))
        category = str(row.get("category") or root.resolve().name)
        yield Sample(image, mask, category, defect_of(row, mask, where), None, split), where


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            if file.suffix == ".csv":
                yield from enumerate(csv.DictReader(lines, restkey="", restval=""), start=2)
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, _object(line, number)
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable metadata file: {error}") from error


def _object(line: str, number: int) -> dict[str, Any]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"line {number} is no JSON object")
    return content


def _split(image: Path) -> str:
    names = [split for part in image.parts[:-1] for split, known in SPLIT_NAMES.items() if part.lower() in known]
    return names[0] if names else "train"

"""Read a benchmark's listing of photographs, a CSV file with a heading."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def read_listing(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV file by column; the first one after the heading is line 2.

    Raises ValueError that names the file if it is no CSV file, lacks one of ``columns``, or lists nothing.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, restval="")
            if absent := [name for name in columns if name not in (reader.fieldnames or ())]:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise ValueError(f"{file} lacks the columns {', '.join(absent)}; columns found: {found}")
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a CSV file: {error}") from error
    if not rows:
        raise ValueError(f"{file} lists no images")
    return rows


def listed_photographs(folder: Path, names: Sequence[str], suffix: str, listing: Path) -> list[Path]:
    """The file ``folder/{name}{suffix}`` of every name in a listing.

    Raises ValueError for names that are paths, and if a file is not there, which counts and names them.
    """
    if paths := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{listing} names {paths[0]!r}: expected the name of an image in {folder}, without a folder")
    present = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if lost := [name for name in names if f"{name}{suffix}" not in present]:
        raise ValueError(
            f"{len(lost)} of {len(names)} images of {listing} are not in {folder}, such as {lost[0]}{suffix}: "
            "copy the set again"
        )
    return [folder / f"{name}{suffix}" for name in names]

"""`adpretrain backbones`: which feature networks there are, under which licence, and which are already here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from adpretrain.backbones import BackboneInfo

WIDTH = 140  # of the table where stdout is no terminal
NOTE = "timm/<model name> is any other network of timm. Licences are those of the weights."


def backbones(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """List the feature networks: levels, widths, licence, and whether their weights are in the local cache."""
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    return _backbones


def _backbones(options: Namespace) -> int:
    from adpretrain.backbones import list_backbones

    rows = list_backbones()
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        _show(rows)
    return 0


def _show(rows: Sequence[BackboneInfo]) -> None:
    from rich.box import ASCII
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    table = Table("name", "levels", "widths", "licence", "in cache", box=ASCII)
    for row in rows:
        widths = f"{row.channels[0]} x {len(row.channels)}" if len({*row.channels}) == 1 else _list(row.channels)
        cached = "yes" if row.cached else "no"
        table.add_row(row.name, _list(row.levels), widths, row.licence, cached)
    console.print(table)
    console.print(NOTE)


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

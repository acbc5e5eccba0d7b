"""`adpretrain backbones`: which feature networks there are, under which licence, and which are already here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from downstream.commands.options import Command

WIDTH = 140  # of the table where stdout is no terminal


@dataclass(frozen=True)
class Backbones(Command):
    """List the feature networks: levels, widths, licence, and whether their weights are in the local cache.

    Args:
        json: print one JSON list instead of a table
    """

    json: bool = False

    def run(self) -> int:
        from rich.box import ASCII
        from rich.console import Console
        from rich.table import Table

        from adpretrain.backbones import list_backbones

        rows = list_backbones()
        if self.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows]))
            return 0
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        table = Table("name", "levels", "widths", "licence", "in cache", box=ASCII)
        for row in rows:
            same = len({*row.channels}) == 1
            widths = f"{row.channels[0]} x {len(row.channels)}" if same else _list(row.channels)
            table.add_row(row.name, _list(row.levels), widths, row.licence, "yes" if row.cached else "no")
        console.print(table)
        console.print("timm/<model name> is any other network of timm. Licences are those of the weights.")
        return 0


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

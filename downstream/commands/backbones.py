"""`adpretrain backbones` lists the feature networks, their licences, and which weights are already in the cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from downstream.commands.options import Command

WIDTH = 140  # width of the table, in characters, when stdout is not a terminal


@dataclass(frozen=True)
class Backbones(Command):
    """List the feature networks: levels, widths, licence, and whether their weights are in the local cache.

    Args:
        json: print a JSON list instead of a table
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
        console.print("Any other timm network works as timm/<model name>. The licences listed apply to the weights.")
        return 0


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

"""`adpretrain backbones` lists the feature networks, what their licences allow, and which weights are in the cache."""

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
        commercial: only those whose licence allows the weights in a product, perhaps with conditions
        json: print a JSON list instead of a table
    """

    commercial: bool = False
    json: bool = False

    def run(self) -> int:
        from rich.box import ASCII
        from rich.console import Console
        from rich.table import Table

        from adpretrain.backbones import list_backbones

        rows = [row for row in list_backbones() if not self.commercial or row.product in ("yes", "with conditions")]
        if self.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows]))
            return 0
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        table = Table("name", "levels", "widths", "licence", "in a product", "in cache", box=ASCII)
        for row in rows:
            same = len({*row.channels}) == 1
            widths = f"{row.channels[0]} x {len(row.channels)}" if same else _list(row.channels)
            cached = "yes" if row.cached else "no"
            table.add_row(row.name, _list(row.levels), widths, row.licence, row.product, cached)
        console.print(table)
        for licence, terms in {row.licence: row.terms for row in rows if row.product == "with conditions"}.items():
            console.print(f"{licence}: {terms}")
        if not self.commercial:
            console.print("Any other timm network works as timm/<model name>; see the licence on its page on the Hub.")
        console.print("The licences apply to the weights. This is no legal advice: read them before a product ships.")
        return 0


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

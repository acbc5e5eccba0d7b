"""`adpretrain detectors` lists the detectors and their papers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from downstream.commands.options import Command


@dataclass(frozen=True)
class Detectors(Command):
    """List the detectors with their papers, one per line.

    Args:
        json: print a JSON object instead of text
    """

    json: bool = False

    def run(self) -> int:
        from downstream.detectors import DETECTORS

        if self.json:
            print(json.dumps({name: dataclasses.asdict(entry) for name, entry in DETECTORS.items()}))
            return 0
        names = max(map(len, DETECTORS))
        summaries = max(len(entry.summary) for entry in DETECTORS.values())
        for name, entry in DETECTORS.items():
            print(f"{name:<{names}}  {entry.summary:<{summaries}}  {entry.paper}")
        return 0

"""`adpretrain detectors`: which detectors there are, and the papers they are from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from downstream.commands.options import Command


@dataclass(frozen=True)
class Detectors(Command):
    """List the detectors, a line each, with their papers.

    Args:
        json: print one JSON object instead of text
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

"""`adpretrain detectors` lists the detectors and their papers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from downstream.commands.options import Command


@dataclass(frozen=True)
class Detectors(Command):
    """List the detectors: what each does and learns, from how many photographs on, on which features, the CPU time and
    memory of fitting 150 photographs (one thread, ResNet-18), and its paper.

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
        for name, entry in DETECTORS.items():
            print(f"{name:<{names}}  {entry.summary}\n{'':{names}}  {entry.in_words()}")
        return 0

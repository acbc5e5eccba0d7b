"""`adpretrain detectors`: which detectors there are, and the papers they are from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from jsonargparse import ArgumentParser, Namespace


def detectors(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """List the detectors, a line each, with their papers."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return _detectors


def _detectors(options: Namespace) -> int:
    from downstream.detectors import DETECTORS

    if options.json:
        print(json.dumps({name: dataclasses.asdict(entry) for name, entry in DETECTORS.items()}))
        return 0
    names = max(map(len, DETECTORS))
    summaries = max(len(entry.summary) for entry in DETECTORS.values())
    for name, entry in DETECTORS.items():
        print(f"{name:<{names}}  {entry.summary:<{summaries}}  {entry.paper}")
    return 0

"""`adpretrain info`: what a saved model is, without loading it or its backbone."""

from __future__ import annotations

import json
from collections.abc import Callable

from jsonargparse import ArgumentParser, Namespace

from downstream.terminal import plain


def info(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Say what an extractor or fitted detector is: backbone, levels, size, training data, metrics."""
    parser.add_argument("model", type=str, help='a folder, "org/name" on the Hugging Face Hub, or embedded')
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return _info


def _info(options: Namespace) -> int:
    from downstream.described import describe_model

    facts = describe_model(options.model, options.revision)
    if options.json:
        print(json.dumps(facts))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, "", [], {}):
            if isinstance(value, dict):
                value = [f"{key} {part}" for key, part in value.items()]
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name:<{width}}  {plain(shown)}")
    return 0

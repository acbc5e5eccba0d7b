"""`adpretrain info`: what a saved model is, without loading it or its backbone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from downstream.commands.options import POSITIONAL, Command
from downstream.terminal import plain


@dataclass(frozen=True)
class Info(Command):
    """Say what an extractor or fitted detector is: backbone, levels, size, training data, metrics.

    Args:
        model: a folder, "org/name" on the Hugging Face Hub, or embedded
        revision: branch, tag or commit on the Hub
        json: print one JSON object instead of text
    """

    model: str = field(metadata=POSITIONAL)
    revision: str | None = None
    json: bool = False

    def run(self) -> int:
        from downstream.described import describe_model

        facts = describe_model(self.model, self.revision)
        if self.json:
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

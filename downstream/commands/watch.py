"""`adpretrain watch` scores the photographs that appear in a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from downstream.commands.options import Command
from downstream.terminal import plain


@dataclass(frozen=True, kw_only=True)
class WatchCommand(Command):
    """Score every photograph that appears in a folder, exactly once, until Ctrl-C; the same command goes on later.

    A file is taken when it has stopped growing and can be decoded, so that a camera may write slowly. Results are added
    to scores.csv and heatmaps/ in --out; journal.jsonl there remembers what has been scored, also if the process or the
    machine is killed. Every result is printed as a line.

    exit codes:
      0  ended by Ctrl-C
      2  wrong usage or input

    Args:
        at: the folder of the product, made by adpretrain inspector new
        folder: the folder to watch, with its subfolders
        out: folder for the results, outside of --folder
        patience: seconds after which a file that cannot be decoded is reported as unreadable
        weights: local file with the backbone's weights, so that nothing is downloaded
        device: cpu, cuda, cuda:1, mps, or auto
    """

    at: Path
    folder: Path
    out: Path
    patience: float = 30.0
    weights: Path | None = None
    device: str = "auto"

    def run(self) -> int:
        from downstream.inspection.inspector import Inspector
        from downstream.inspection.run import pick_device
        from downstream.inspection.watch import FolderWatch

        print(f"loading {plain(self.at)}", file=sys.stderr, flush=True)
        inspector = Inspector.load(self.at, pick_device(self.device), self.weights)
        with FolderWatch(inspector, self.folder, self.out, self.patience) as watch:
            print(f"watching {plain(self.folder)}; end with Ctrl-C", flush=True)
            try:
                for result in watch:
                    score = "" if result.score is None else f"  score {result.score:.4g}"
                    print(f"{result.judgement}{score}  {plain(result.path)}", flush=True)
            except KeyboardInterrupt:
                return 0
        return 0

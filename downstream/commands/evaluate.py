"""`adpretrain evaluate`: data sets x extractors x detectors, from one file to one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from downstream.commands.options import POSITIONAL, Command
from downstream.terminal import ProgressBars, plain, tell_memory


@dataclass(frozen=True)
class Evaluate(Command):
    """Compare detectors on extractors over data sets, as a YAML file says.

    The file names sets, extractors and detectors (recipes/board.yaml is one, docs/board.md explains it). Every
    finished cell is kept in OUT/cells, and the same command goes on after an interruption; OUT/board.md and
    board.csv are written after every cell.

    exit codes:
      0    all cells are finished
      2    wrong usage or input
      130  interrupted: the same command goes on

    Args:
        board: YAML file of sets, extractors and detectors
        out: folder of the results; default: runs/NAME
        device: auto, cpu, cuda, cuda:1, mps
        batch_size: images in memory at once
        workers: processes that read images
    """

    board: Path = field(metadata=POSITIONAL)
    out: Path | None = None
    device: str = "auto"
    batch_size: int = 8
    workers: int = 0

    def run(self) -> int:
        from downstream.evaluation.board import read_board
        from downstream.evaluation.board_run import run_board
        from downstream.inspection.run import pick_device

        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"--batch-size {self.batch_size} must be at least 1, and --workers {self.workers} at least 0"
            )
        board, device = read_board(self.board), str(pick_device(self.device))
        out = self.out or Path("runs") / self.board.stem
        tell_memory()
        with ProgressBars() as progress:
            text = run_board(board, out, device, self.batch_size, self.workers, progress)
        print(text)
        print(f"tables: {plain(out / 'board.md')} (.csv)", file=sys.stderr)
        return 0

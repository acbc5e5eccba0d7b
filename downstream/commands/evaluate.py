"""`adpretrain evaluate`: data sets x extractors x detectors, from one file to one table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from downstream.terminal import ProgressBars, plain, tell_memory

EPILOG = """The file names sets, extractors and detectors (recipes/board.yaml is one, docs/board.md explains it). Every
finished cell is kept in OUT/cells, and the same command goes on after an interruption; OUT/board.md and
board.csv are written after every cell.

exit codes:
  0    all cells are finished
  2    wrong usage or input
  130  interrupted: the same command goes on"""


def evaluate(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Compare detectors on extractors over data sets, as a YAML file says."""
    parser.epilog = EPILOG
    parser.add_argument("board", type=str, help="YAML file of sets, extractors and detectors")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the results; default: runs/NAME")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch-size", type=int, default=8, help="images in memory at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    return _evaluate


def _evaluate(options: Namespace) -> int:
    from downstream.evaluation.board import read_board
    from downstream.evaluation.board_run import run_board
    from downstream.inspection.run import pick_device

    if options.batch_size < 1 or options.workers < 0:
        raise ValueError(
            f"--batch-size {options.batch_size} must be at least 1, and --workers {options.workers} at least 0"
        )
    path = Path(options.board)
    board, device = read_board(path), str(pick_device(options.device))
    out = Path(options.out) if options.out else Path("runs") / path.stem
    tell_memory()
    with ProgressBars() as progress:
        text = run_board(board, out, device, options.batch_size, options.workers, progress)
    print(text)
    print(f"tables: {plain(out / 'board.md')} (.csv)", file=sys.stderr)
    return 0

"""`adpretrain evaluate`: detectors on raw and pretrained features over data sets, from flags or one file to tables."""

from __future__ import annotations

import shlex
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser, Namespace

from adpretrain.parsing import load_yaml
from downstream.evaluation.board import Board, read_board, set_rows
from downstream.terminal import ProgressBars, plain, tell_memory

EPILOG = """A file names sets, extractors and detectors (recipes/board.yaml is one, docs/board.md explains it); flags
replace its keys. One set and extractors of one kind can be given as flags alone:

  adpretrain evaluate --root data/mtd --detectors featurenorm,padim --features raw,pretrained --shots 4 8
  adpretrain evaluate recipes/board.yaml --out runs/board

Every finished cell is kept in OUT/cells, and the same command goes on after an interruption. OUT/board.md and .csv,
the means of every set, are written after every cell; OUT/table.md, .tex, .csv and .json, every product, and
OUT/report.html at the end.

exit codes:
  0    all cells are finished
  2    wrong usage or input
  130  interrupted: the same command goes on"""


def evaluate(parser: ArgumentParser) -> Callable[..., int]:
    """Compare detectors on raw and pretrained features over data sets."""
    parser.epilog = EPILOG
    parser.add_argument("board", type=str, nargs="?", default=None, help="YAML file of any of the flags' keys")
    parser.add_argument("--config", type=str, default=None, help="the same")
    told = {
        item.arg_name: item.description for kind in Board.__mro__[::-1] for item in parse(kind.__doc__ or "").params
    }
    for item in fields(Board):
        default = item.default_factory() if callable(item.default_factory) else item.default
        shown = "" if default in (None, "", [], {}) else f" (default: {_shown(default)})"
        text = " ".join((told[item.name] or "").rstrip(".").split())
        number: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        number = {"nargs": "*"} if _several(item.name) else number
        parser.add_argument(_flag(item.name), default=SUPPRESS, help=(text + shown).replace("%", "%%"), **number)
    parser.add_argument("--out", type=str, default=None, help="folder of the results; default: runs/NAME")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch-size", type=int, default=8, help="images in memory at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, for each process")
    return _evaluate


def _evaluate(
    options: Namespace,
    rank: int = 0,
    processes: int = 1,
    device: str | None = None,
    program: str = "adpretrain evaluate",
) -> int:
    """``rank`` of ``processes`` that share the work, this one on ``device``; ``program``: how it was started."""
    from downstream.evaluation.engine import run_board
    from downstream.inspection.run import pick_device

    if options.batch_size < 1 or options.workers < 0:
        raise ValueError(
            f"--batch-size {options.batch_size} must be at least 1, and --workers {options.workers} at least 0"
        )
    file = options.config or options.board
    given = {item.name: options[item.name] for item in fields(Board) if item.name in options}
    board = read_board({name: _value(name, words) for name, words in given.items()}, Path(file) if file else None)
    if device is None or options.device != "auto":
        device = str(pick_device(options.device))
    out = Path(options.out) if options.out else Path("runs") / (Path(file).stem if file else set_rows(board)[0].name)
    command = [*shlex.split(program), *([file] if file else [])]
    for name in (*given, "out", "device"):
        if (words := options[name]) is not None:
            command += [_flag(name), *([words] if isinstance(words, str) else words)]
    if processes > 1:
        print(f"process {rank + 1} of {processes} on {device}", file=sys.stderr)
    tell_memory()
    with ProgressBars() as progress:
        place, batch, readers = (rank, processes), options.batch_size, options.workers
        text = run_board(board, out, device, batch, readers, progress, place, shlex.join(command))
    if rank == 0:
        print(text)
        print(
            f"tables: {plain(out / 'board.md')} (.csv), {plain(out / 'table.md')} (.tex, .csv, .json)", file=sys.stderr
        )
        print(f"report: {plain(out / 'report.html')}", file=sys.stderr)
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _several(name: str) -> bool:
    """Whether a key holds a list or a mapping, so that its flag takes several words."""
    hint = str(typing.get_type_hints(Board)[name])
    return "list" in hint or "dict" in hint or "tuple" in hint


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default).lower()


def _value(name: str, words: Any) -> Any:
    """A flag's words as a value of the key: name=value pairs of a mapping; items of a list, also separated by commas;
    or YAML in brackets. `read_board` checks its type."""
    if isinstance(words, list):
        if len(words) == 1 and words[0][:1] in ("[", "{"):
            return load_yaml(words[0])
        if name == "columns":
            return {role: column for role, _, column in (word.partition("=") for word in words)}
        return [_scalar(name, part.strip()) for word in words for part in word.split(",") if part.strip()]
    return _scalar(name, words)


def _scalar(name: str, word: str) -> Any:
    hint = str(typing.get_type_hints(Board)[name])
    return load_yaml(word) if any(kind in hint for kind in ("int", "float", "bool")) else word

"""`adpretrain evaluate` compares extractors and detectors over data sets, set by flags or a file, in one table."""

from __future__ import annotations

import shlex
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser

from adpretrain.parsing import load_yaml
from downstream.commands.options import Command, add_options, from_options
from downstream.evaluation.comparison import Comparison, read_comparison, set_rows
from downstream.terminal import ProgressBars, plain, tell_memory


@dataclass(frozen=True)
class Evaluate(Command):
    """Compare detectors on raw and pretrained features over data sets.

    A YAML file names data sets, extractors and detectors (docs/evaluate.md explains recipes/board.yaml); flags
    override its keys. For one data set and extractors of one kind, flags alone are enough:

      adpretrain evaluate --root data/mtd --detectors featurenorm,padim --features raw,pretrained --shots 4 8
      adpretrain evaluate recipes/board.yaml --out runs/comparison

    Every finished cell is kept in OUT/cells; after an interruption the same command continues there. The means of every
    set are written after each cell, to OUT/means.md and .csv; the results of every product are written at the end, to
    OUT/table.md, .tex, .csv and .json, with OUT/report.html.

    exit codes:
      0    all cells are finished
      2    wrong usage or input
      130  interrupted: run the same command to continue

    Args:
        config: YAML file with any of the flags' keys; it can also be the first word after evaluate
        out: folder for the results; default: runs/NAME
        device: auto, cpu, cuda, cuda:1, mps
        batch_size: number of images per batch
        workers: number of processes that load images; with several evaluating processes, for each of them
    """

    config: Path | None = None
    out: Path | None = None
    device: str = "auto"
    batch_size: int = 8
    workers: int = 0
    given: dict[str, Any] = field(
        default_factory=dict, metadata={"hidden": True}
    )  # the comparison's flags, not yet parsed

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add this command's options, and a flag for each key of the comparison, which overrides the file."""
        parser.add_argument("file", type=str, nargs="?", default=None, help="YAML file, the same as --config")
        add_options(parser, cls)
        told = {
            item.arg_name: item.description
            for kind in Comparison.__mro__[::-1]
            for item in parse(kind.__doc__ or "").params
        }
        for item in fields(Comparison):
            default = item.default_factory() if callable(item.default_factory) else item.default
            shown = "" if default in (None, "", [], {}, ()) else f" (default: {_shown(default)})"
            text = " ".join((told[item.name] or "").rstrip(".").split())
            number: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
            number = {"nargs": "*"} if _several(item.name) else number
            parser.add_argument(_flag(item.name), default=SUPPRESS, help=(text + shown).replace("%", "%%"), **number)

    @classmethod
    def parsed(cls, options: Mapping[str, Any]) -> Evaluate:
        given = {item.name: options[item.name] for item in fields(Comparison) if item.name in options}
        return from_options(cls, {**options, "config": options["config"] or options["file"], "given": given})

    def run(
        self, rank: int = 0, processes: int = 1, device: str | None = None, program: str = "adpretrain evaluate"
    ) -> int:
        """Run process ``rank`` of ``processes`` on ``device``; ``program`` is the command shown in the report."""
        from downstream.evaluation.engine import run_comparison
        from downstream.inspection.run import pick_device

        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"--batch-size {self.batch_size} must be at least 1, and --workers {self.workers} at least 0"
            )
        comparison = read_comparison({name: _value(name, words) for name, words in self.given.items()}, self.config)
        if device is None or self.device != "auto":
            device = str(pick_device(self.device))
        out = self.out or Path("runs") / (self.config.stem if self.config else set_rows(comparison)[0].name)
        command = [*shlex.split(program), *([str(self.config)] if self.config else [])]
        flags = {**self.given, "out": self.out and str(self.out), "device": self.device}
        for name, words in flags.items():
            if words is not None:
                command += [_flag(name), *([words] if isinstance(words, str) else words)]
        if processes > 1:
            print(f"process {rank + 1} of {processes} on {device}", file=sys.stderr)
        tell_memory()
        with ProgressBars() as progress:
            place, batch, readers = (rank, processes), self.batch_size, self.workers
            text = run_comparison(comparison, out, device, batch, readers, progress, place, shlex.join(command))
        if rank == 0:
            print(text)
            tables = f"{plain(out / 'means.md')} (.csv), {plain(out / 'table.md')} (.tex, .csv, .json)"
            print(f"tables: {tables}\nreport: {plain(out / 'report.html')}", file=sys.stderr)
        return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _several(name: str) -> bool:
    """Say whether a key holds a list or a mapping, so that its flag takes several words."""
    hint = str(typing.get_type_hints(Comparison)[name])
    return "list" in hint or "dict" in hint or "tuple" in hint


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default).lower()


def _value(name: str, words: Any) -> Any:
    """Parse the words of a flag: name=value pairs for a mapping, items (also separated by commas) for a list, or YAML
    in brackets. `read_comparison` checks the type."""
    if isinstance(words, list):
        if len(words) == 1 and words[0][:1] in ("[", "{"):
            return load_yaml(words[0])
        if name == "columns":
            return {role: column for role, _, column in (word.partition("=") for word in words)}
        return [_scalar(name, part.strip()) for word in words for part in word.split(",") if part.strip()]
    return _scalar(name, words)


def _scalar(name: str, word: str) -> Any:
    hint = str(typing.get_type_hints(Comparison)[name])
    return load_yaml(word) if any(kind in hint for kind in ("int", "float", "bool")) else word

"""The subcommands of `adpretrain`, one file each: a function that adds its arguments and returns what to run.

torch is imported only when a command runs, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import ArgumentParser

from downstream.commands.backbones import backbones
from downstream.commands.check_data import check_data
from downstream.commands.demo import demo
from downstream.commands.detectors import detectors
from downstream.commands.evaluate import evaluate
from downstream.commands.export import export
from downstream.commands.extract import extract
from downstream.commands.fit import fit
from downstream.commands.info import info
from downstream.commands.push import push
from downstream.commands.score import score

Run = Callable[..., int]  # the parsed options -> exit code

COMMANDS: dict[str, Callable[[ArgumentParser], Run]] = {
    "score": score,
    "fit": fit,
    "evaluate": evaluate,
    "check-data": check_data,
    "export": export,
    "extract": extract,
    "backbones": backbones,
    "detectors": detectors,
    "info": info,
    "push": push,
    "demo": demo,
}

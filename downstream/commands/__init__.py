"""The subcommands of `adpretrain`, one file each."""

from __future__ import annotations

from downstream.commands.backbones import Backbones
from downstream.commands.check_data import CheckData
from downstream.commands.demo import Demo
from downstream.commands.detectors import Detectors
from downstream.commands.evaluate import Evaluate
from downstream.commands.export import Export
from downstream.commands.extract import Extract
from downstream.commands.fit import Fit
from downstream.commands.info import Info
from downstream.commands.options import Command
from downstream.commands.push import Push
from downstream.commands.score import Score

COMMANDS: dict[str, type[Command]] = {
    "score": Score,
    "fit": Fit,
    "evaluate": Evaluate,
    "check-data": CheckData,
    "export": Export,
    "extract": Extract,
    "backbones": Backbones,
    "detectors": Detectors,
    "info": Info,
    "push": Push,
    "demo": Demo,
}

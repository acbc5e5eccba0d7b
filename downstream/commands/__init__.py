"""The subcommands of `adpretrain`, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from downstream.commands.options import Command

COMMANDS = {  # name on the command line -> name of the class
    "score": "Score",
    "inspector": "InspectorCommand",
    "watch": "WatchCommand",
    "serve": "Serve",
    "identify": "Identify",
    "fit": "Fit",
    "evaluate": "Evaluate",
    "board": "BoardCommand",
    "pretrain": "Pretrain",
    "check-data": "CheckData",
    "export": "Export",
    "extract": "Extract",
    "backbones": "Backbones",
    "detectors": "Detectors",
    "info": "Info",
    "push": "Push",
    "demo": "Demo",
}


def command_class(name: str) -> type[Command]:
    """Import the module of a command and return its class."""
    command: type[Command] = getattr(import_module(f"{__name__}.{name.replace('-', '_')}"), COMMANDS[name])
    return command

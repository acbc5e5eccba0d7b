"""The subcommands of `adpretrain`, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from downstream.commands.options import Command

COMMANDS = {  # names as on the command line, and their classes
    "score": "Score",
    "fit": "Fit",
    "evaluate": "Evaluate",
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
    """The class of a command, imported only now."""
    command: type[Command] = getattr(import_module(f"{__name__}.{name.replace('-', '_')}"), COMMANDS[name])
    return command

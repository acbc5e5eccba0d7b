"""The one look of the help of recipes with argparse flags."""

from __future__ import annotations

import argparse


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show, and keeps the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is False or action.default in (None, "", [])
        return action.help if nothing else super()._get_help_string(action)

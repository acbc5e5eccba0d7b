"""The argument parser's messages in words for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from adpretrain.parsing import wrong_value

_UNKNOWN = re.compile(r"unrecognized arguments: (--\S+).*|Subcommand '\S+' does not accept option '(.+)'")


def usage_error(message: str, options: Sequence[str]) -> str:
    """One sentence of a parser's ``message``: the flag, the wrong value, what is expected; ``options``: its flags.

    A message of unknown form loses its line breaks only.
    """
    line = " ".join(message.split())
    if line.startswith('expected "subcommand"'):
        return "needed: COMMAND, such as score"
    if line.startswith("the following arguments are required: "):
        flags = map(_flag, re.findall(r"[\w-]+\.(\w+)", line))  # score.false_alarm_rate
        return f"needed: {', '.join(flag if flag in options else flag.strip('-').upper() for flag in flags)}"
    if wrong := wrong_value(line):
        key, value, expected = wrong
        kinds = (kind for kind in expected if kind != "null")  # said by leaving the flag out
        return f"{_flag(key)} {value}: expected {' or '.join(kinds)}"
    if found := _UNKNOWN.fullmatch(line):
        unknown = (found[1] or _flag(found[2])).partition("=")[0]
        close = difflib.get_close_matches(unknown, options, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown option {unknown}{guess}; known are {', '.join(options)}"
    return line


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"

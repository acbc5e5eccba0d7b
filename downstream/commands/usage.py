"""The argument parser's messages in words for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'list'>": "a list, such as [1,2]",
    "<class 'dict'>": "a mapping, such as {mask: label}",
}
_VALUE = re.compile(r'Parser key "(?P<key>\w+)": .*(?:Got|Given) value: (?P<value>.*)')
_UNKNOWN = re.compile(r"unrecognized arguments: (--\S+).*|Subcommand '\S+' does not accept option '(.+)'")


def usage_error(message: str, options: Sequence[str]) -> str:
    """One sentence of a parser's ``message``: the flag, the wrong value, what is expected; ``options``: its flags.

    A message of unknown form loses its line breaks only.
    """
    line = " ".join(message.split())
    if line.startswith("the following arguments are required: "):
        flags = map(_flag, re.findall(r"[\w-]+\.(\w+)", line))  # score.false_alarm_rate
        return f"needed: {', '.join(flag if flag in options else flag.strip('-').upper() for flag in flags)}"
    if found := _VALUE.fullmatch(line):
        return f"{_flag(found['key'])} {found['value']}: expected {_expected(line)}"
    if found := _UNKNOWN.fullmatch(line):
        unknown = (found[1] or _flag(found[2])).partition("=")[0]
        close = difflib.get_close_matches(unknown, options, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown option {unknown}{guess}; known are {', '.join(options)}"
    return line


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _expected(line: str) -> str:
    """What a value may be: "one of even, random", "a number"; a type's own name where there are no words for it."""
    words = []
    for kind in dict.fromkeys(re.findall(r"Expected an? (typing\.Literal\[.*?\]|<class '\w+'>|\S+)", line)):
        if kind.startswith("typing.Literal"):
            words.append("one of " + ", ".join(re.findall(r"'(.*?)'", kind)))
        elif kind != "<class 'NoneType'>":
            words.append(_KINDS.get(kind, kind))
    return " or ".join(words)

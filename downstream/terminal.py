"""Terminal output: progress bars on stderr, and text made safe for any terminal encoding."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adpretrain.progress import Progress

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """Make one printable line: control characters are escaped, and what the encoding lacks is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    readable = os.fsencode(str(text)).decode("utf-8", errors="replace")
    readable = _CONTROL.sub(lambda found: repr(found[0])[1:-1], readable)
    return readable.encode(encoding, errors="replace").decode(encoding)


def number_of(count: int, name: str) -> str:
    """A count with its noun, "1 region" or "2 regions"."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def lines(message: object) -> str:
    """Apply `plain` to each line of a message that has several."""
    return "\n".join(map(plain, str(message).split("\n")))


@contextlib.contextmanager
def one_line_warnings(prefix: str = "") -> Iterator[None]:
    """Print warnings without the source line that raised them."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{prefix}warning: {lines(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def tell_memory() -> None:
    """From now on, print to stderr how much memory the fitting of a detector needs."""
    logger = logging.getLogger("adpretrain.memory")
    logger.handlers = [_Shown()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Shown(logging.Handler):
    """Prints each message once, because an evaluation fits many detectors of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self._said = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if (message := plain(record.getMessage())) not in self._said:
            print(f"memory: {message}", file=sys.stderr)
            self._said.add(message)


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


class ProgressBars:
    """Shows progress on stderr: a live bar on a terminal, nothing in a log file."""

    def __enter__(self) -> Progress:
        from rich.console import Console

        from adpretrain.progress import progress_bar

        console = Console(stderr=True)
        self._bars = progress_bar(console)
        self._tasks: dict[str, object] = {}
        if not console.is_terminal:
            return no_progress
        self._bars.start()
        return self._show

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        if self._bars.live.is_started:  # stopping bars that were never started prints an empty line
            self._bars.stop()

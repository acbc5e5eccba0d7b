"""How long work is shown: the progress bar, and the callback through which the library reports progress."""

from __future__ import annotations

from collections.abc import Callable

from rich import progress as bars
from rich.console import Console

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


def progress_bar(console: Console) -> bars.Progress:
    """A bar with counts and times, on the console."""
    columns = bars.TextColumn("{task.description:<22}"), bars.BarColumn(), bars.MofNCompleteColumn()
    return bars.Progress(*columns, bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), console=console)

"""A command that runs in a process of its own: where, how, and its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from processes import output, start, wait

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/one_gpu.yaml"]


def pretrain(rank: int, argv: list[str]) -> int:
    """recipes/pretrain.py, as the target of `processes.start`."""
    from pretrain import main

    return main(argv)


def fit(rank: int, argv: list[str]) -> int:
    """recipes/fit.py, likewise."""
    from fit import main

    return main(argv)


def train(log: Path, argv: list[str], count: int = 1, expected: int = 0) -> str:
    """Pretrain in forked processes, with their output in ``log``; what the first of them said, on one line."""
    wait(start(count, log, pretrain, argv), log, expected)
    return " ".join(output(log).split())


def until(happened: Callable[[], object], alive: Callable[[], bool]) -> bool:
    """Wait for it, nearly without a pause; False if the process ended before."""
    while not happened():
        if not alive():
            return False
        time.sleep(1e-4)
    return True


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait; fail with the process's own words if it did not end as expected."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == expected, said
    return said

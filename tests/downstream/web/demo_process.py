"""`adpretrain demo` in a process of its own, as users start it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    address: str
    folder: Path  # a folder of its own for temporary files
    process: subprocess.Popen[str]
    log: Path  # what it printed

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(120)


@contextlib.contextmanager
def started(command: list[str], folder: Path, **environment: str) -> Iterator[Server]:
    """A demo that runs until the end of the block, at the address that it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    (folder / "tmp").mkdir()
    given = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), **environment}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, env=given)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"{line}\n{log.read_text()}"
        yield Server(found[0], folder / "tmp", process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "downstream.cli", "demo", "--port", "0", "--device", "cpu", *arguments]

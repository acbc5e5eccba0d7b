"""A command that runs in a process of its own: where, how, and its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/one_gpu.yaml"]


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait; fail with the process's own words if it did not end as expected."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == expected, output
    return output

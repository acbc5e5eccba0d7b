"""Loader workers obey the process that trains, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = """
import multiprocessing, os, signal, subprocess, sys
import torch
from adpretrain.training.loader import ImageBatch, Request, load_ahead

class Blank:
    draws = None
    def load(self, request):
        return ImageBatch(torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 8, 8), request.keys, [], [], [])

def train():
    batches = load_ahead(Blank().load, map(Request, [[]] * 100), 1, torch.device("cpu"))
    next(batches)
    for worker in multiprocessing.active_children():
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    print(len(list(zip(range(50), batches))), "batches after the signals")
    print("worker", worker.pid, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("this process is on fire")

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raises", "killed"])
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.long)])
def test_workers_outlive_requests_to_stop_but_not_the_process_that_trains(
    method: str, end: str, tmp_path: Path
) -> None:
    """Python 3.14 starts them from a fork server."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    command, path = [sys.executable, str(script), method, end], os.pathsep.join(sys.path)
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert "50 batches after the signals" in run.stdout
    if end == "raises":
        assert run.returncode == 1
        assert "this process is on fire" in run.stderr
    worker, deadline = int(run.stdout.split()[-1]), time.monotonic() + 120
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()

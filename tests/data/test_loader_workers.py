"""Loader workers obey the process that trains, and nobody else."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING = """
import os, subprocess
import torch
from adpretrain.data.loading import ImageBatch, Request, load_ahead

class Blank:
    draws = None
    def load(self, request):
        return ImageBatch(torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 8, 8), request.keys, [], [], [])

def train():
    batches = load_ahead(Blank(), map(Request, [[]] * 100), 1, torch.device("cpu"))
    next(batches)
    pid = os.getpid()
    for worker in open(f"/proc/{pid}/task/{pid}/children").read().split():
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", worker], check=True)
    print(len(list(zip(range(50), batches))), "batches after the signals")
    raise RuntimeError("this process is on fire")

train()
"""


@pytest.mark.slow
def test_workers_outlive_requests_to_stop_but_not_the_process_that_trains() -> None:
    run = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 1
    assert "50 batches after the signals" in run.stdout
    assert "this process is on fire" in run.stderr

"""Pretraining with references that are shared and whose features are kept: a resumed run ends with the same bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import start, wait
from running import pretrain, train, until

FLAGS = ["--augment", "epoch", "--cache.draws", "0", "--loss.lambda_", "1.0", "--local_scale", "null"]
FLAGS += ["--backbone.image_size", "64", "--eval.keep", "last", "--data.held_out", "[]", "--data.workers", "1"]
FLAGS += ["--references.together", "2", "--references.pool", "5", "--optim.steps", "16", "--checkpoint_every", "3"]


@pytest.mark.slow
def test_resumed_with_another_limit_of_kept_features(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """Killed within an epoch, when features are kept that the resumed run has to make anew."""
    log, argv = tmp_path / "log", arguments(tmp_path / "cut", *FLAGS)
    assert "images/s; time:" in train(log, arguments(tmp_path / "whole", *FLAGS))
    (process,) = start(1, log, pretrain, argv)
    assert until(lambda: list((tmp_path / "cut" / "checkpoints").glob("step_*.pt")), process.is_alive)
    process.kill()
    wait([process], log, expected=-signal.SIGKILL)
    assert not (tmp_path / "cut" / "extractor").exists()
    assert "resuming" in train(log, [*argv, "--references.cache_mb", "3"])
    weights = [(tmp_path / name / "extractor" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        shares = {key: value for key, value in line.items() if key.startswith("time_")}
        assert {"time_data", "time_backbone", "time_references", "time_matching", "time_projector"} < set(shares)
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)

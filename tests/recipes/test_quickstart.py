"""`make demo` at a small size: every step from drawing products to the table and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_demo_ends_with_a_table_and_a_report(tmp_path: Path, seeds: int) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "recipes/quickstart.py", "--out", str(out), "--products", "6", "--seeds", str(seeds)]
    command += ["--steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for features, repeats in (("raw", 1), ("residual", 1), ("scaled", 1), ("pretrained", seeds)):
        assert result.stdout.count(f"| featurenorm | {features} | {repeats} |") == 3  # K = 2, 4, 8
    summary = json.loads((out / "unseen-products" / "table.json").read_text())["summary"]
    assert {row["setting"] for row in summary} == {"K=2", "K=4", "K=8"}
    assert all(0 <= row["mean"][name] <= 100 for row in summary for name in ("image_auroc", "pixel_auroc", "aupro"))
    assert (out / "inspection" / "report" / "report.html").is_file()
    assert (out / f"pretrain-seed{seeds - 1}" / "extractor" / "model.safetensors").is_file()
    assert len(list((out / "cache").glob("*.safetensors"))) == 1  # the second seed trained on the first one's residuals

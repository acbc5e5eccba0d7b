"""Whole detectors against anomalib's classes: CPU time of fitting and scoring, and peak memory (`detector_costs`).

anomalib is no dependency: without it nothing here runs. With one in a folder of its own,
`PYTHONPATH=<folder> make bench` compares with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detector_costs import NEW, NORMAL

pytest.importorskip("anomalib")
pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # anomalib's, about its own dependencies

SCRIPT = Path(__file__).with_name("detector_costs.py")
# How many times faster we must fit. CFLOW's fit ends with a pass over the normal photographs that anomalib's has not.
LEAST = {"patchcore": 3.0, "padim": 1.0, "rd4ad": 0.8, "cflow": 0.15, "glass": 0.9}


def costs(name: str, whose: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), name, whose]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LEAST)
def test_detector(name: str) -> None:
    fast, slow = costs(name, "ours"), costs(name, "theirs")
    print(f"\n{name}, {NORMAL} normal photographs fitted, {NEW} scored, ResNet-18, one thread:")
    for who, found in (("adpretrain", fast), ("anomalib", slow)):
        print(f"  {who:10} fit {found['fit']:.1f} s, score {found['score']:.1f} s, peak {found['peak']:.0f} MiB")
    assert slow["fit"] / fast["fit"] >= LEAST[name]
    assert slow["score"] / fast["score"] >= 0.7

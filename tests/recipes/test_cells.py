"""Which trials are run for which contender."""

from __future__ import annotations

from pathlib import Path

import pytest

from adpretrain.data import Sample
from downstream.evaluation.contenders import ALIGNED, Contender
from downstream.evaluation.protocols import ProtocolOptions, trials

ROOT = Path(__file__).resolve().parents[2]


def test_what_uses_no_drawn_references_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of the references change nothing for raw features, and nothing where every image chooses its own: equal
    repeats would be shown as a spread of 0."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from cells import jobs_of

    samples = [Sample(Path(f"{i}.png"), None, "cap", "good", None, "train" if i < 9 else "test") for i in range(12)]
    rows = [Contender("padim", "raw"), Contender("padim", "pretrained"), Contender(ALIGNED, "pretrained")]
    counts = {}
    for protocol in ("reference-sensitivity", "few-shot"):
        planned = trials(samples, ProtocolOptions(protocol, shots=(4,), draws=3))
        jobs = jobs_of(planned, rows)
        counts[protocol] = [sum(job.contender == row for job in jobs) for row in rows]
    assert counts == {"reference-sensitivity": [1, 3, 1], "few-shot": [3, 3, 3]}

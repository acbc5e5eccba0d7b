"""One demo with a tiny extractor for all tests that only visit it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_process import Server, demo, started


@pytest.fixture(scope="session")
def server(extractor_dir: Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder, started(demo("--extractor", str(extractor_dir)), Path(folder)) as one:
        yield one

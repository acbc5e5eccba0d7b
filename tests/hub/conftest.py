"""Small models to publish."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import Saved, make_extractor

from adpretrain.extractor import ADExtractor


@pytest.fixture(scope="session")
def extractor() -> ADExtractor:
    return make_extractor()


@pytest.fixture(scope="session")
def other_extractor() -> ADExtractor:
    return make_extractor(1)


@pytest.fixture
def saved(extractor: ADExtractor, tmp_path: Path) -> Saved:
    folder = extractor.save_pretrained(tmp_path / "saved")
    (folder / "README.md").unlink(missing_ok=True)
    return Saved(folder)

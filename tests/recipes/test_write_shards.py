"""What `recipes/write_shards.py` refuses before it reads a single photograph."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_what_cannot_be_written_is_refused_before_any_image_is_read(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set holds an unreadable photograph, which is told only when nothing else is wrong."""
    from write_shards import main

    (photographs / "nut" / "train" / "good" / "0.png").write_bytes(b"torn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for out, shards, message in (
        ("mine", 2, "mine holds other files than shards: choose another folder"),
        ("new", 200, "200 shards for 8 images: choose a number in 1..8"),
        ("new", 0, "0 shards for 8 images"),
        ("new", 2, "1 of 8 images cannot be trained on"),
    ):
        flags = ["--data.root", str(photographs), "--data.name", "mvtec", "--shards", str(shards)]
        assert main([*flags, "--out", str(tmp_path / out)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "new").exists()

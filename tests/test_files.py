"""Atomic writing: complete or not at all."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from adpretrain.files import atomic_folder, atomic_path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fail_half_way(writer: AbstractContextManager[Path]) -> None:
    with writer as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
        raise RuntimeError


def test_a_file_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.png"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError):
        fail_half_way(atomic_path(target))
    assert target.read_text() == "one"
    assert names(target.parent) == ["a.png"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "run"
    for content in ("one", "two"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert names(target) == ["two"]
    assert names(target.parent) == ["run"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_the_earlier_folder(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("one")
    with pytest.raises(RuntimeError):
        fail_half_way(atomic_folder(target))
    assert (target / "a").read_text() == "one"
    assert names(tmp_path) == ["run"]


def test_an_impossible_parent_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x"
    for writer in (atomic_path, atomic_folder):
        with pytest.raises(NotADirectoryError, match="this is a file, but a folder is needed"), writer(target):
            pytest.fail("the body must not run")

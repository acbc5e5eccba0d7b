"""The board's page as a static Space: one commit of index.html and the Space's README, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hub_server.server import Hub
from test_publish import HUB, publish

README = HUB / "board" / "README.md"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text("<!DOCTYPE html>\n<title>Board</title>\n")
    (folder / "results.json").write_text('{"customer": "secret"}')
    return folder


def test_the_front_matter_is_that_of_a_static_space() -> None:
    match = re.match(r"---\n(.*?)\n---\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    found = yaml.safe_load(match[1])
    assert (found["sdk"], found["app_file"]) == ("static", "index.html")
    assert len(found["short_description"]) <= 60  # the Hub refuses longer ones


def test_the_page_and_its_readme_are_published_in_one_commit_and_nothing_else(
    hub: Hub, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[str | Path] = ["--board", site, "--repo-id", "ada/board"]
    assert publish(*flags, "--dry-run") == 0
    assert hub.writes == []
    assert publish(*flags) == 0
    assert f"{hub.endpoint}/spaces/ada/board" in capsys.readouterr().out
    space = hub.repositories["ada/board"]
    page, card = (site / "index.html").read_bytes(), README.read_bytes()
    assert space.contents() == {"index.html": page, "README.md": card}  # the Hub's template is gone
    assert (space.kind, space.sdk, space.private) == ("space", "static", False)
    assert space.history == [
        "commit initial commit (private)",
        "commit Publish the Space (private)",
        "made public",
    ]
    hub.requests.clear()
    assert publish(*flags) == 0
    assert hub.writes == []
    (site / "index.html").write_text("<!doctype html>\n<title>Board, later</title>\n")
    assert publish(*flags) == 0
    assert space.contents()["index.html"] == (site / "index.html").read_bytes()


def test_a_private_board_is_not_made_public_by_the_next_page(
    hub: Hub, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[str | Path] = ["--board", site, "--repo-id", "ada/board"]
    assert publish(*flags, "--private") == 0
    assert publish(*flags) == 2
    assert "ada/board is private" in capsys.readouterr().err
    assert hub.repositories["ada/board"].private


def test_a_space_that_is_something_else_is_left_alone(hub: Hub, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("ada/board", kind="space", sdk="static").write({"game.js": b"x"})
    assert publish("--board", site, "--repo-id", "ada/board") == 2
    assert "the name ada/board is taken" in capsys.readouterr().err


def test_no_links_and_no_other_pages(hub: Hub, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "index.html").rename(tmp_path / "elsewhere.html")
    assert publish("--board", site, "--repo-id", "ada/board") == 2
    assert "index.html is missing or no regular file" in capsys.readouterr().err
    (site / "index.html").symlink_to(tmp_path / "elsewhere.html")
    assert publish("--board", site, "--repo-id", "ada/board") == 2
    assert "index.html is missing or no regular file" in capsys.readouterr().err
    (site / "index.html").unlink()
    (site / "index.html").write_text("secret\n")
    assert publish("--board", site, "--repo-id", "ada/board") == 2
    assert "does not begin with <!doctype html>" in capsys.readouterr().err
    assert publish("--board", site, "--repo-id", "ada/board", "--tag", "v1") == 2
    assert "belong to an extractor" in capsys.readouterr().err
    assert hub.requests == []

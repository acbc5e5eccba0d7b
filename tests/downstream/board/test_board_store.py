"""What a board takes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from results_drawn import drawn_scores, measured, result

from downstream.board.result import Result, sealed, write_result
from downstream.board.store import add, check_files, read_board
from downstream.cli import main


def files(folder: Path, *results: Result) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [write_result(folder, one) for one in results]


def test_results_of_many_people_are_merged(tmp_path: Path) -> None:
    mine = files(tmp_path / "mine", result("lite0"), result("lite1"))
    yours = files(tmp_path / "yours", result("lite1"), result("lite2"))
    assert len(add(tmp_path / "board", mine).new) == 2
    added = add(tmp_path / "board", [tmp_path / "yours"])
    assert (len(added.new), len(added.known)) == (1, 1)
    assert {one.extractor.name for one in read_board(tmp_path / "board")} == {"lite0", "lite1", "lite2"}
    assert check_files(yours) == 2


def test_other_numbers_for_the_same_experiment_are_not_taken_silently(tmp_path: Path) -> None:
    add(tmp_path / "board", files(tmp_path / "old", result(seed=1)))
    new = files(tmp_path / "new", result(seed=2))
    with pytest.raises(ValueError, match=r"was measured before, with other numbers .* --replace takes the new ones"):
        add(tmp_path / "board", new)
    assert len(add(tmp_path / "board", new, replace=True).replaced) == 1
    assert read_board(tmp_path / "board") == [result(seed=2)]


def test_one_experiment_twice_in_one_call_is_refused(tmp_path: Path) -> None:
    (one,), (other,) = files(tmp_path / "a", result(seed=1)), files(tmp_path / "b", result(seed=2))
    with pytest.raises(ValueError, match=r"are the same experiment with other numbers: add one of the two"):
        add(tmp_path / "board", [one, other])
    assert len(add(tmp_path / "board", [one, one]).new) == 1  # the same file, named twice
    assert len(read_board(tmp_path / "board")) == 1


def test_one_set_under_two_names_is_refused(tmp_path: Path) -> None:
    content = json.loads(result("lite1").model_dump_json(exclude={"metrics", "digest", "format"}))
    content["data"]["name"] = "Fliesen"
    with pytest.raises(ValueError, match=r"calls the photographs 'Fliesen' that .* calls 'tiles'"):
        add(tmp_path / "board", files(tmp_path / "new", result(), sealed(content)))


def test_nothing_is_added_if_one_is_refused(tmp_path: Path) -> None:
    good, bad = files(tmp_path / "new", result("lite0"), result("lite1"))
    bad.write_text(bad.read_text().replace('"image_size":224', '"image_size":448'))
    with pytest.raises(ValueError, match="its digest is another"):
        add(tmp_path / "board", [good, bad])
    assert not (tmp_path / "board").exists()


def test_one_name_for_different_photographs_is_refused(tmp_path: Path) -> None:
    add(tmp_path / "board", files(tmp_path / "old", result()))
    content = json.loads(result("lite1").model_dump_json(exclude={"metrics", "digest", "format"}))
    content["data"]["digest"] = "f" * 64
    other = sealed(content)
    with pytest.raises(ValueError, match=r"call different photographs 'tiles'"):
        add(tmp_path / "board", files(tmp_path / "new", other))


def test_a_protocol_with_other_photographs_is_refused(tmp_path: Path) -> None:
    """Someone who fitted on other photographs than the protocol draws, under the same name, seed and setting."""
    add(tmp_path / "board", files(tmp_path / "old", result()))
    own = measured("tile", 0, *drawn_scores(1.0, 3), images="e" * 64)
    with pytest.raises(ValueError, match=r"claims the protocol of .*few-shot, K=4, seed 0.*other photographs of tile"):
        add(tmp_path / "board", files(tmp_path / "new", result("lite1", measured=[own])))


def test_the_command_adds_checks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in files(tmp_path / "new", result("lite0"), result("lite1"))]
    at = ["--at", str(tmp_path / "board")]
    assert main(["board", "check", *paths]) == 0
    assert "2 results are what they claim to be" in capsys.readouterr().out
    assert main(["board", "add", *paths, *at]) == 0
    assert "2 new, 0 replaced, 0 known before" in capsys.readouterr().out
    assert main(["board", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Result"
    for wrong, told in (
        (["board", "add", *at], "add needs RESULTS"),
        (["board", "render", *paths, *at], "render takes no RESULTS"),
        (["board", "check", *paths, "--sets", "a"], "filters such as --sets go with render"),
        (["board", "check", *paths, "--replace"], "--replace goes with add"),
        (["board", "render", "--at", str(tmp_path / "empty")], "holds no results: adpretrain board add"),
        (["board", "render", *at, "--detectors", "nobody"], "--detectors 'nobody' fits none of: padim"),
        (["board", "render", *at, "--most-ms", "1"], "none of the 2 results is left by the filters together"),
        (["board", "render", *at, "--out", paths[0]], "is a file: name a folder"),
        (["board", "render", "--at", paths[0]], "is a file: name the folder of a board"),
        (["board", "add", str(tmp_path), *at], "no results in"),
        (["board", "add", str(tmp_path / "empty.json"), *at], "is not a file"),
    ):
        assert main(wrong) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert told in said, said


def test_the_projects_own_board_is_what_it_claims_to_be() -> None:
    """Its results pass all checks, and their commands name no folder of the machine that measured them."""
    results = read_board(Path(__file__).parents[3] / "docs" / "own_board")
    assert len(results) == 680
    assert not [one.command for one in results if re.search(r"(^|[\s=])/", one.command)]

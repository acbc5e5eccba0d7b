"""Fitted detectors on the Hub: private unless asked, loud about what they hold, the same bits in another process."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server.fixture import settings
from hub_server.server import Hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from adpretrain.backbones import load_backbone
from adpretrain.extractor import ADExtractor
from downstream.detectors import detector_from_pretrained
from downstream.detectors.ensemble import Ensemble
from downstream.detectors.padim import PaDiM
from downstream.detectors.patchcore import PatchCore
from downstream.saved import parts_of

SIDE = 64


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def patchcore() -> PatchCore:
    return PatchCore(load_backbone("lite0", image_size=SIDE)).fit([images(3, 0)])


def test_pushed_here_loaded_with_an_empty_cache(
    hub: Hub, patchcore: PatchCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="holds features of the photographs"):
        done = patchcore.push_to_hub("factory/bottle-line3", tag="v1")
    assert hub.repositories["factory/bottle-line3"].private
    assert done.commit is not None
    for name, value in settings(hub, tmp_path / "other").items():
        monkeypatch.setattr(constants, name, value)
    found = PatchCore.from_pretrained("factory/bottle-line3", revision="v1")
    assert (tmp_path / "other" / "hub").is_dir()
    assert torch.equal(found.predict(images(2, 1)).maps, patchcore.predict(images(2, 1)).maps)


def test_detectors_within_detectors_come_whole(hub: Hub, extractor: ADExtractor) -> None:
    pretrained = copy.deepcopy(extractor).set_references(images(2, 5))
    members = [PaDiM(pretrained), PaDiM(load_backbone("lite0", image_size=SIDE))]
    ensemble = Ensemble(members).fit([images(4, 0)])
    with pytest.warns(UserWarning, match="holds features"):
        ensemble.push_to_hub("factory/both")
    found = detector_from_pretrained("factory/both")
    assert torch.equal(found.predict(images(2, 1)).scores, ensemble.predict(images(2, 1)).scores)
    files = hub.repositories["factory/both"].contents()
    assert {"config.json", "member-0/extractor/model.safetensors", "member-1/config.json", "README.md"} <= set(files)


def test_a_public_one_is_named_louder_and_its_card_says_what_it_holds(hub: Hub, patchcore: PatchCore) -> None:
    with pytest.warns(UserWarning, match="THE REPOSITORY IS PUBLIC"):
        patchcore.push_to_hub("factory/open", private=False)
    assert not hub.repositories["factory/open"].private
    text = hub.repositories["factory/open"].contents()["README.md"].decode()
    assert "# factory/open\n\n> **A fitted detector holds features of the photographs" in text
    assert 'detector_from_pretrained("factory/open")' in text


def test_an_unfitted_one_sends_nothing(hub: Hub) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="not fitted"):
            PatchCore(load_backbone("lite0", image_size=SIDE)).push_to_hub("factory/none")
    assert hub.writes == []


def test_an_absurd_number_of_members_is_refused() -> None:
    with pytest.raises(ValueError, match="a detector with 1000000000 members; expected 0 to 64"):
        parts_of({"extract": "members", "facts": {"members": 10**9}})
    assert parts_of({"extract": "extractor"}) == ["extractor"]
    assert parts_of({"backbone": {}}) == []


def run(*arguments: str) -> int:
    from downstream.cli import main

    return main(list(arguments))


def test_the_commands_push_and_info(
    hub: Hub, patchcore: PatchCore, extractor: ADExtractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patchcore.save_pretrained(tmp_path / "fitted")
    before = {path: path.read_bytes() for path in (tmp_path / "fitted").rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match="holds features"):
        assert run("push", str(tmp_path / "fitted"), "--repo-id", "factory/line", "--dry-run") == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert hub.writes == []
    with pytest.warns(UserWarning, match="holds features"):
        assert run("push", str(tmp_path / "fitted"), "--repo-id", "factory/line", "--tag", "v1") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert hub.repositories["factory/line"].private
    assert {path: path.read_bytes() for path in before} == before
    extractor.save_pretrained(tmp_path / "extractor")
    assert run("push", str(tmp_path / "extractor"), "--repo-id", "ada/features") == 0
    assert not hub.repositories["ada/features"].private
    assert b'from_pretrained("ada/features")' in hub.repositories["ada/features"].contents()["README.md"]
    capsys.readouterr()
    assert run("info", "ada/features", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["commit"] == hub.repositories["ada/features"].head().sha
    assert (facts["kind"], facts["backbone"], facts["levels"]) == ("extractor", "lite0", [2, 3])
    assert facts["parameters"] == sum(v.numel() for k, v in extractor.state_dict().items() if "backbone." not in k)
    assert run("info", "factory/line", "--revision", "v1") == 0
    out = capsys.readouterr().out
    assert "fitted patchcore (holds features of its product)" in out
    assert "lite0" in out


def test_a_warning_is_a_line_without_our_source(
    hub: Hub, patchcore: PatchCore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*warning: Any) -> None:  # as Python does it where pytest does not record
        sys.stderr.write(warnings.formatwarning(*warning[:4]))

    monkeypatch.setattr(warnings, "showwarning", shown)
    patchcore.save_pretrained(tmp_path / "fitted")
    assert run("push", str(tmp_path / "fitted"), "--repo-id", "factory/line", "--dry-run") == 0
    error = capsys.readouterr().err
    assert error.startswith("adpretrain: warning: A fitted detector holds features")
    assert error.count("\n") == 1


def test_mistakes_are_a_line(
    hub: Hub, extractor: ADExtractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (
            ["push", str(tmp_path), "--repo-id", "a/b"],
            "has no config.json: expected a folder written",
        ),
        (["info", str(tmp_path / "absent" / "deeper")], "is not a folder"),
        (["info", "nobody/nothing"], "nobody/nothing"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("adpretrain: error: ")
        assert message in error
        assert "Traceback" not in error
    extractor.save_pretrained(tmp_path / "lost")
    for name in ("model.safetensors", "README.md"):  # without a card, one is made of the configuration
        (tmp_path / "lost" / name).unlink()
        assert run("push", str(tmp_path / "lost"), "--repo-id", "a/b") == 2
        assert f"{tmp_path / 'lost'} has no model.safetensors" in capsys.readouterr().err  # not its copy's path
    (tmp_path / "config.json").write_text("[1")
    assert run("push", str(tmp_path), "--repo-id", "a/b") == 2
    assert "cannot read" in capsys.readouterr().err


def test_damaged_weights_are_found_before_any_request(
    hub: Hub, patchcore: PatchCore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = patchcore.save_pretrained(tmp_path / "fitted")
    whole = load_file(folder / "model.safetensors")
    name = next(name for name, value in whole.items() if value.is_floating_point() and value.ndim > 1)
    for damaged, words in (
        (whole[name] * torch.nan, f"{name} holds NaN or infinite values"),
        (whole[name][:-1], f"{name} is {[len(whole[name]) - 1, *whole[name].shape[1:]]}, its config says"),
    ):
        save_file({**whole, name: damaged.contiguous()}, folder / "model.safetensors")
        assert run("push", str(folder), "--repo-id", "factory/line") == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert hub.requests == []

"""Loading from a real HTTP server: one commit, every byte checked, and the cache when there is no connection."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from hub_server.fixture import environment
from huggingface_hub import constants
from small_models import Saved, make_extractor, pictures

from adpretrain.extractor import ADExtractor
from adpretrain.hub import download
from adpretrain.hub.download import locate
from adpretrain.hub.upload import publish

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "/lfs/ada/one/"  # where the large file is fetched
LOAD = """
import sys
import torch
sys.path.append("tests/hub")
from small_models import pictures
from adpretrain import ADExtractor
extractor = ADExtractor.from_pretrained("factory/tiles", revision=sys.argv[2])
torch.save([level for level in extractor.set_references(pictures(2, 1))(pictures(3, 2))], sys.argv[1])
"""


def run(code: str, *arguments: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-W", "error::UserWarning:adpretrain", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_an_empty_cache_and_another_process_get_the_same_features_to_the_last_bit(hub: Hub, tmp_path: Path) -> None:
    extractor = make_extractor(7)
    commit = extractor.push_to_hub("factory/tiles", private=True, tag="v1").commit or ""
    expected = extractor.set_references(pictures(2, 1))(pictures(3, 2))
    assert all(level.std() > 0 for level in expected)
    hub.requests.clear()
    loaded = ADExtractor.from_pretrained("factory/tiles", revision="v1")
    online = loaded.set_references(pictures(2, 1))(pictures(3, 2))
    assert any("model.safetensors" in request for request in hub.requests)
    hub.requests.clear()
    hub.stop()
    there = {**environment(hub, tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run(LOAD, str(tmp_path / "offline.pt"), commit, env=there)
    assert hub.requests == []
    for found in (online, torch.load(tmp_path / "offline.pt")):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_only_what_is_needed_is_fetched(hub: Hub, saved: Saved) -> None:
    (saved.folder / "README.md").write_text("# card\n")
    publish(saved.folder, "ada/one", private=False)
    commit = hub.repositories["ada/one"].write({"pytorch_model.bin": b"evil", "modeling.py": b"evil"})
    hub.requests.clear()
    found = locate("ada/one")
    assert (found.repo_id, found.commit, found.folder.name) == ("ada/one", commit, commit)
    assert {path.name for path in found.folder.iterdir()} == {"config.json", "model.safetensors"}
    assert not [request for request in hub.requests if any(name in request for name in (".bin", ".py", "README"))]
    assert hub.count("/revision/main") == 1  # resolved once
    assert len(hub.requests) == 5  # and HEAD and GET for each of two files


def test_all_files_are_of_one_commit_though_the_branch_moves_meanwhile(
    hub: Hub, extractor: ADExtractor, other_extractor: ADExtractor, tmp_path: Path
) -> None:
    """Between config.json and the weights another version is published."""
    first = extractor.push_to_hub("ada/one")
    theirs = Saved(other_extractor.save_pretrained(tmp_path / "theirs"))
    hub.break_next(
        "HEAD .*model.safetensors", "call", call=lambda: hub.repositories["ada/one"].write(theirs.contents())
    )
    loaded = ADExtractor.from_pretrained("ada/one")
    assert hub.repositories["ada/one"].branches["main"] != first.commit
    assert loaded.config.provenance["seed"] == 0
    expected = extractor.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_tag_stays_where_main_moves_on(hub: Hub, extractor: ADExtractor, other_extractor: ADExtractor) -> None:
    first = extractor.push_to_hub("ada/one", tag="v1")
    assert ADExtractor.from_pretrained("ada/one").config.provenance["seed"] == 0
    other_extractor.push_to_hub("ada/one", tag="v2")
    assert ADExtractor.from_pretrained("ada/one").config.provenance["seed"] == 1
    assert ADExtractor.from_pretrained("ada/one", revision="v1").config.provenance["seed"] == 0
    assert first.commit is not None
    assert locate("ada/one", first.commit[:8]).commit == first.commit


def test_a_full_commit_in_the_cache_needs_no_request(hub: Hub, extractor: ADExtractor) -> None:
    done = extractor.push_to_hub("ada/one")
    locate("ada/one", done.commit)
    hub.requests.clear()
    with hub.stopped(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ADExtractor.from_pretrained("ada/one", revision=done.commit)
    assert hub.requests == []


@pytest.mark.parametrize("why", ["stopped", "offline", "busy"])
def test_without_a_connection_the_commit_last_seen_is_used_and_named(
    hub: Hub, saved: Saved, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = publish(saved.folder, "ada/one", private=False, tag="v1")
    locate("ada/one")
    locate("ada/one", "v1")
    hub.requests.clear()
    if why == "stopped":
        hub.stop()
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if why == "busy":
        hub.break_next("revision", "status", times=2, status=503)
    for revision, name in ((None, "main"), ("v1", "v1")):
        with pytest.warns(UserWarning, match=rf"ada/one is used at commit {done.commit}, which '{name}' was"):
            assert locate("ada/one", revision).commit == done.commit
    assert hub.sleeps == []  # nobody waits for what is in the cache
    assert len(hub.requests) == (2 if why == "busy" else 0)


def test_what_is_neither_cached_nor_to_be_reached(hub: Hub, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(saved.folder, "ada/one", private=False)
    hub.stop()
    with pytest.raises(ValueError, match=r"cannot load revision 'main' of ada/one: no connection to .*Check the netw"):
        locate("ada/one")
    hub.sleeps.clear()
    with pytest.raises(ValueError, match=r"cannot load file config.json at commit a+ of ada/one: no connection"):
        locate("ada/one", "a" * 40)
    assert sum(hub.sleeps) < 40  # seconds: the client's own tries, which are not tried again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and .* does not have it. Unset"):
        locate("ada/one")


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("GET /lfs", "truncate"),
        ("GET .*config.json", "truncate"),
        ("GET /lfs", "corrupt"),
        ("GET .*config.json", "corrupt"),
        ("GET /lfs", "status"),
        ("HEAD .*config.json", "drop"),
        ("HEAD .*safetensors", "status"),
        ("revision/main", "drop"),
    ],
)
def test_a_download_that_fails_in_passing_is_repeated(hub: Hub, saved: Saved, pattern: str, kind: str) -> None:
    publish(saved.folder, "ada/one", private=False)
    fault = hub.break_next(pattern, kind)  # type: ignore[arg-type]
    assert Saved(locate("ada/one").folder).contents() == saved.contents()
    assert fault.times == 0


@pytest.mark.parametrize("kind", ["truncate", "corrupt"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_download_that_stays_damaged_is_refused_by_name(hub: Hub, saved: Saved, kind: str, name: str) -> None:
    publish(saved.folder, "ada/one", private=False)
    hub.break_next("GET .*config.json" if name == "config.json" else "GET /lfs", kind, 10**6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{name} at commit [0-9a-f]{{40}}"):
        locate("ada/one")
    cached = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.name == name or path.is_symlink()]
    assert [path.name for path in cached] == ([] if name == "config.json" else ["config.json"])
    hub.faults.clear()
    assert Saved(locate("ada/one").folder).contents() == saved.contents()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_was_damaged_in_the_cache_is_fetched_again(hub: Hub, saved: Saved, name: str) -> None:
    done = publish(saved.folder, "ada/one", private=False)
    for online in (True, False):
        blob = (locate("ada/one", done.commit).folder / name).resolve()
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if online:
            assert Saved(locate("ada/one", done.commit).folder).contents() == saved.contents()
    hub.stop()
    with pytest.raises(ValueError, match=rf"cannot load file {name} at commit {done.commit} of ada/one: no connection"):
        locate("ada/one", done.commit)


def test_a_cache_without_links_is_checked_too(hub: Hub, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where there are no blobs whose names are digests: the Hub is asked."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    publish(saved.folder, "ada/one", private=False)
    hub.break_next("GET /lfs", "corrupt")
    found = locate("ada/one").folder
    assert not (found / "model.safetensors").is_symlink()
    assert Saved(found).contents() == saved.contents()


def parts_of(config: dict[str, Any]) -> list[str]:
    return list(config.get("provenance", {}).get("parts", []))


def nested(saved: Saved, *parts: str) -> Path:
    """The saved extractor as a model of which others are parts."""
    folder = saved.folder.with_name("nested")
    for part in ("", *parts):
        shutil.copytree(saved.folder, folder / part, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "provenance": {"parts": parts}}))
    return folder


def test_the_parts_of_a_model_come_with_it(hub: Hub, saved: Saved) -> None:
    folder = nested(saved, "extractor", "member-0")
    done = publish(folder, "ada/one", private=True)
    assert set(done.files) >= {"extractor/config.json", "member-0/model.safetensors"}
    assert {path.name for path in locate("ada/one").folder.iterdir()} == {"config.json", "model.safetensors"}
    found = locate("ada/one", parts=parts_of)  # those that the first call left out are missed
    assert Saved(found.folder).contents() == Saved(folder).contents()
    hub.stop()
    assert locate("ada/one", done.commit, parts=parts_of) == found


def test_a_part_that_is_missing_or_lies_elsewhere(hub: Hub, saved: Saved, tmp_path: Path) -> None:
    publish(nested(saved, "extractor"), "ada/one", private=False)
    with pytest.raises(ValueError, match=r"ada/one has no file lost/config\.json at commit"):
        locate("ada/one", parts=lambda config: ["lost"] if parts_of(config) else [])
    for part in ("../../../../out", "..", "/tmp", "a/b", ""):
        with pytest.raises(ValueError, match=r"names the part .*, which is not a folder name"):
            locate("ada/one", parts=lambda _, part=part: [part])  # type: ignore[misc]
    for revision in ("../../../../out", "a/../b", "/tmp/x", ""):
        with pytest.raises(ValueError, match=r"revision .* is not a branch, tag or commit"):
            locate("ada/one", revision)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_something_else(hub: Hub) -> None:
    hub.add("ada/one").write({"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(ValueError, match=r"ada/one has no file model\.safetensors at commit .* not a model that adpre"):
        locate("ada/one")
    with pytest.raises(ValueError, match="ada/one has no revision 'v9'"):
        locate("ada/one", "v9")
    with pytest.raises(ValueError, match=r"ada/two: it is neither a folder here nor a repository that can be reached"):
        locate("ada/two")


def test_who_may_not_see_a_repository_learns_how(hub: Hub, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(saved.folder, "ada/hidden", private=True)
    publish(saved.folder, "ada/gated", private=False)
    hub.repositories["ada/gated"].gated = True
    for token in (False, "token-of-bob"):
        with pytest.raises(ValueError, match=r"neither a folder here nor .*if it is private, log in"):
            locate("ada/hidden", token=token)
        with pytest.raises(ValueError, match=r"it is gated. Ask for access at http.*/ada/gated"):
            locate("ada/gated", token=token)
    with pytest.raises(ValueError, match="the token is wrong or has expired"):
        locate("ada/hidden", token="hf_old")
    assert Saved(locate("ada/hidden").folder).contents() == saved.contents()


def test_folders_and_what_only_looks_like_one(
    hub: Hub, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate(saved.folder).folder == saved.folder
    with pytest.raises(ValueError, match=r"is a folder; revision='v1' is for repositories of the Hub"):
        locate(saved.folder, "v1")
    monkeypatch.chdir(tmp_path)
    for path in (Path("org/name"), "./org", "/org/name", "~/org", "runs/a/b", "org/name.safetensors", "org/", "C:\\a"):
        with pytest.raises(ValueError, match="is not a folder: expected a folder written by save_pretrained, or a Hub"):
            locate(path)
    for name in ("runs", "", "org/na me", "org/a--b", "org/.x"):
        with pytest.raises(ValueError, match="is neither a folder nor the id of a Hub repository"):
            locate(name)
    (tmp_path / "org").mkdir()
    shutil.copytree(saved.folder, tmp_path / "org" / "name")
    assert locate("org/name").folder == Path("org/name")  # a folder goes before a repository
    assert hub.requests == []


def test_the_embedded_extractor(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "EMBEDDED_FOLDER", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="this installation of adpretrain has no embedded extractor"):
        locate("embedded")
    monkeypatch.setattr(download, "EMBEDDED_FOLDER", saved.folder)
    assert locate("embedded").folder == saved.folder
    with pytest.raises(ValueError, match="leave it out"):
        locate("embedded", "v1")


def test_loading_is_strict(hub: Hub, saved: Saved) -> None:
    """Weights of other shapes, put there by somebody else, are not taken."""
    publish(saved.folder, "ada/one", private=False)
    config = json.loads((saved.folder / "config.json").read_text())
    config["projector"]["references"] = 32
    hub.repositories["ada/one"].write({"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"its config says \[32, "):
        ADExtractor.from_pretrained("ada/one")

"""Publishing to a real HTTP server: one commit or none, whatever goes wrong on the way."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_models import Saved
from torch import Tensor

from adpretrain.extractor import ADExtractor
from adpretrain.files import git_sha1, sha256
from adpretrain.hub import download
from adpretrain.hub.contents import files_of_space
from adpretrain.hub.upload import publish, publish_space
from downstream.cli import main as run

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
COMMIT = "POST /api/models/ada/one/commit/main"
CREATE, TAG, SETTINGS = "POST /api/repos/create", "POST /api/models/ada/one/tag", "PUT /api/models/ada/one/settings"


def ours(hub: Hub, name: str = "ada/one") -> list[str]:
    """The titles of the commits after the Hub's own."""
    return [event for event in hub.repositories[name].history if event.startswith("commit") and "initial" not in event]


def test_an_extractor_is_published_as_one_commit_and_public_only_then(
    hub: Hub, extractor: ADExtractor, saved: Saved
) -> None:
    done = extractor.push_to_hub("ada/one", tag="v1.0", readme="---\nlicense: mit\n---\n# Mine\n")
    repository = hub.repositories["ada/one"]
    assert repository.history == [
        "commit initial commit (private)",
        "commit Publish an extractor on lite0 (private)",
        "made public",
    ]
    found = repository.contents()
    assert found.keys() == {"config.json", "model.safetensors", "README.md"}
    assert found["model.safetensors"] == (saved.folder / "model.safetensors").read_bytes()
    assert json.loads(found["config.json"])["provenance"] == extractor.config.provenance
    assert found["README.md"].startswith(b"---\nlicense: mit")
    assert done.commit == repository.branches["main"] == repository.tags["v1.0"]
    assert repository.commits[done.commit].parent in repository.commits  # on top of what was there
    assert done.url == f"{hub.endpoint}/ada/one"
    assert done.files == {name: len(content) for name, content in found.items()}


def test_private_stays_private(hub: Hub, saved: Saved) -> None:
    publish(saved.folder, "factory/line3", private=True)
    assert hub.repositories["factory/line3"].private
    assert "made public" not in hub.repositories["factory/line3"].history


def test_an_unchanged_folder_makes_no_commit(hub: Hub, saved: Saved) -> None:
    first = publish(saved.folder, "ada/one", private=False)
    hub.requests.clear()
    second = publish(saved.folder, "ada/one", private=False)
    assert (second.commit, second.changed, second.deleted) == (first.commit, [], [])
    assert hub.writes == []
    tagged = publish(saved.folder, "ada/one", private=False, tag="v1")
    assert hub.repositories["ada/one"].tags == {"v1": first.commit}
    assert tagged.commit == first.commit
    publish(saved.folder, "ada/one", private=False, tag="v1")  # the same tag on the same commit
    assert len(ours(hub)) == 1


def test_what_the_folder_no_longer_has_goes_in_the_same_commit_and_other_files_stay(hub: Hub, saved: Saved) -> None:
    (saved.folder / "assets").mkdir()
    (saved.folder / "assets" / "curves.png").write_bytes(PNG)
    (saved.folder / "README.md").write_text("# first\n")
    publish(saved.folder, "ada/one", private=False)
    repository = hub.repositories["ada/one"]
    repository.write({"LICENSE": b"mine"})
    (saved.folder / "assets" / "curves.png").unlink()
    (saved.folder / "README.md").write_text("# second\n")
    hub.requests.clear()
    done = publish(saved.folder, "ada/one", private=False, message="Second")
    assert (done.changed, done.deleted) == (["README.md"], ["assets/curves.png"])
    assert len(ours(hub)) == 3
    assert hub.count("PUT /lfs") == 0  # the weights are there already
    assert repository.contents().keys() == {"config.json", "model.safetensors", "README.md", "LICENSE"}
    assert repository.contents()["README.md"] == b"# second\n"
    assert repository.head().title == "Second"


def test_a_tag_on_another_commit_is_refused_before_anything_is_uploaded(hub: Hub, saved: Saved) -> None:
    first = publish(saved.folder, "ada/one", private=False, tag="v1")
    (saved.folder / "README.md").write_text("# changed\n")
    hub.requests.clear()
    with pytest.raises(ValueError, match=rf"(?s)'v1' of ada/one is on commit {first.commit}.*Nothing was uploaded"):
        publish(saved.folder, "ada/one", private=False, tag="v1")
    assert hub.writes == []
    assert hub.count("preupload") == 0


def test_a_dry_run_tells_everything_and_changes_nothing(hub: Hub, saved: Saved) -> None:
    done = publish(saved.folder, "ada/one", private=False, tag="v1", dry_run=True)
    assert hub.writes == []
    assert hub.repositories == {}
    assert (done.commit, done.tag) == (None, "v1")
    sizes = {path.name: path.stat().st_size for path in saved.folder.iterdir()}
    assert done.files == sizes
    assert [step.split()[0] for step in done.steps] == ["create", "commit", "tag", "make"]
    real = publish(saved.folder, "ada/one", private=False, tag="v1")
    assert real.steps == done.steps
    hub.requests.clear()
    again = publish(saved.folder, "ada/one", private=False, tag="v1", dry_run=True)
    assert again.commit == real.commit
    assert again.steps == [f"make no commit: main holds these files already, at {real.commit}"]
    assert hub.writes == []


def test_a_dry_run_needs_no_token(
    hub: Hub,
    saved: Saved,
    extractor: ADExtractor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = publish(saved.folder, "ada/one", private=False, tag="v1")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    known = publish(saved.folder, "ada/one", private=False, tag="v1", dry_run=True)
    assert known.commit == first.commit
    assert [step.split()[:3] for step in known.steps] == [["need", "a", "token"], ["make", "no", "commit:"]]
    unknown = extractor.push_to_hub("ada/two", dry_run=True)
    assert [step.split()[0] for step in unknown.steps] == ["need", "create", "commit", "make"]
    assert run(["push", str(saved.folder), "--repo-id", "ada/two", "--dry-run"]) == 0
    assert "would need a token (none is set; a private ada/two" in capsys.readouterr().out
    assert hub.writes == []
    monkeypatch.setenv("HF_TOKEN", "hf_old")  # a wrong token is a mistake here too
    with pytest.raises(ValueError, match="the token is wrong or has expired"):
        publish(saved.folder, "ada/one", private=False, dry_run=True)


def test_another_branch_leaves_main_as_it_is(hub: Hub, saved: Saved) -> None:
    first = publish(saved.folder, "ada/one", private=False)
    (saved.folder / "README.md").write_text("# draft\n")
    done = publish(saved.folder, "ada/one", private=False, branch="draft")
    repository = hub.repositories["ada/one"]
    assert repository.branches == {"main": first.commit, "draft": done.commit}
    assert repository.contents("draft")["README.md"] == b"# draft\n"


FAULTS = [
    *[(pattern, "status", code) for pattern in (CREATE, COMMIT, TAG, SETTINGS) for code in (500, 429)],
    *[(pattern, kind, 0) for pattern in (CREATE, COMMIT, TAG, SETTINGS) for kind in ("drop", "lose")],
    ("whoami", "status", 503),
    ("GET /api/models/ada/one/refs", "drop", 0),
    ("/tree/", "status", 502),
    ("validate-yaml", "drop", 0),
    ("preupload", "lose", 0),
    ("PUT /lfs", "status", 500),
    ("PUT /lfs", "drop", 0),
    ("/verify", "lose", 0),
]


@pytest.mark.parametrize(("pattern", "kind", "status"), FAULTS)
def test_what_fails_in_passing_is_sent_again_and_nothing_twice(
    hub: Hub, saved: Saved, pattern: str, kind: str, status: int
) -> None:
    (saved.folder / "README.md").write_text("# card\n")
    fault = hub.break_next(pattern, kind, times=2, status=status)  # type: ignore[arg-type]
    done = publish(saved.folder, "ada/one", private=False, tag="v1")
    assert fault.times == (1 if (pattern, kind) == (COMMIT, "lose") else 0)  # that one is not sent again
    repository = hub.repositories["ada/one"]
    assert len(ours(hub)) == 1
    assert not repository.private
    assert repository.tags == {"v1": done.commit}
    assert done.commit == repository.branches["main"]
    assert repository.contents() == saved.contents()


def test_the_waits_grow_and_are_not_the_same_for_all(hub: Hub, saved: Saved) -> None:
    hub.break_next(COMMIT, "status", times=4, status=500)
    publish(saved.folder, "ada/one", private=False)
    bounds = list(zip(hub.sleeps, download.WAITS, strict=False))
    assert len(hub.sleeps) == 4
    assert all(wait <= slept <= 1.5 * wait for slept, wait in bounds)
    assert len({round(slept / wait, 6) for slept, wait in bounds}) == 4
    hub.sleeps.clear()
    (saved.folder / "README.md").write_text("# card\n")
    hub.break_next(COMMIT, "status", status=429, headers={"Retry-After": "30"})
    publish(saved.folder, "ada/one", private=False)
    assert hub.sleeps == [30.0]


def test_a_hub_in_trouble_leaves_nothing_half_published_and_the_next_run_goes_on(hub: Hub, saved: Saved) -> None:
    hub.break_next(COMMIT, "status", times=99, status=503)
    with pytest.raises(
        ValueError, match=r"cannot publish to ada/one: the Hub is in trouble \(status 503, tried 6 times"
    ):
        publish(saved.folder, "ada/one", private=False, tag="v1")
    repository = hub.repositories["ada/one"]
    assert (repository.private, repository.contents(), repository.tags) == (True, {}, {})
    hub.faults.clear()
    publish(saved.folder, "ada/one", private=False, tag="v1")
    assert (repository.private, repository.contents(), list(repository.tags)) == (False, saved.contents(), ["v1"])


def test_a_repository_that_stays_private_says_so(hub: Hub, saved: Saved) -> None:
    hub.break_next(SETTINGS, "drop", times=99)
    with pytest.raises(ValueError, match=r"no connection.*The files are there, at commit .*still private: make it pub"):
        publish(saved.folder, "ada/one", private=False)
    assert hub.repositories["ada/one"].private


@pytest.mark.parametrize("lost", [False, True], ids=["refused", "lost"])
def test_somebody_elses_commit_is_never_overwritten(hub: Hub, saved: Saved, lost: bool) -> None:
    publish(saved.folder, "ada/one", private=False)
    repository, theirs = hub.repositories["ada/one"], []
    (saved.folder / "README.md").write_text("# card\n")

    def slip_in() -> None:
        theirs.append(repository.write({"README.md": b"theirs"}))

    hub.break_next(COMMIT, "call", call=slip_in)
    if lost:  # our request is lost on the way and theirs comes first
        hub.faults[-1].kind = "drop"
        hub.break_next("GET /api/models/ada/one/revision/main", "call", call=slip_in)
    with pytest.raises(ValueError, match=r"changed by somebody else meanwhile: main is at .* Nothing of yours was"):
        publish(saved.folder, "ada/one", private=False)
    assert repository.branches["main"] == theirs[0]
    assert repository.contents()["README.md"] == b"theirs"


def test_a_commit_that_was_taken_late_is_found(hub: Hub, saved: Saved) -> None:
    """The answer is lost, the branch cannot be asked at first, and the second request is refused as stale."""
    publish(saved.folder, "ada/one", private=False)
    (saved.folder / "README.md").write_text("# card\n")
    repository = hub.repositories["ada/one"]
    hub.break_next(COMMIT, "call", call=lambda: repository.write({"README.md": b"# card\n"}, "the same, by a proxy"))
    done = publish(saved.folder, "ada/one", private=False)
    assert done.commit == repository.branches["main"]
    assert len(ours(hub)) == 2


def test_files_that_the_repository_ignores_are_noticed(hub: Hub, saved: Saved) -> None:
    hub.add("ada/one").write({".gitignore": b"model.safetensors\n"})
    with pytest.raises(ValueError, match=r"does not hold what was sent: a \.gitignore"):
        publish(saved.folder, "ada/one", private=False)


def no_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def token(value: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, patch: patch.setenv("HF_TOKEN", value)


def existing(files: dict[str, bytes], **options: bool) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, patch: (hub.add("ada/one", **options).write(files), None)[1]


REFUSALS = {
    "no token": (no_token, r"no token is set. Make one with write access at .*/settings/tokens, then run `hf auth log"),
    "wrong token": (token("hf_old"), r"the token is wrong or has expired.*HF_TOKEN overrides"),
    "read token": (token("read-token-of-ada"), r"the token may not do that in the namespace 'ada'.*write access"),
    "other's namespace": (token("token-of-bob"), r"the token may not do that in the namespace 'ada'"),
    "no network": (lambda hub, patch: hub.stop(), r"no connection to http://127\.0\.0\.1.*Check the network"),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), r"Unset HF_HUB_OFFLINE"),
    "no hub": (
        lambda hub, patch: hub.break_next("whoami", "corrupt", times=99),
        r"does not answer like a Hub. Check HF_ENDPOINT",
    ),
    "hidden": (lambda hub, patch: hub.break_next(CREATE, "status", status=409), r"the name ada/one is taken: choose"),
    "taken": (existing({"pytorch_model.bin": b""}), r"the name ada/one is taken: it holds.*\(pytorch_model\.bin\)"),
    "private": (existing({"README.md": b""}, private=True), r"ada/one is private: pass private=True"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_every_refusal_says_what_to_do(hub: Hub, saved: Saved, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, message = REFUSALS[refusal]
    arrange(hub, monkeypatch)
    before = {name: dict(repository.commits) for name, repository in hub.repositories.items()}
    with pytest.raises(ValueError, match=message):
        publish(saved.folder, "ada/one", private=False)
    assert {name: dict(repository.commits) for name, repository in hub.repositories.items()} == before


def test_what_is_public_is_not_taken_for_private(hub: Hub, saved: Saved) -> None:
    publish(saved.folder, "ada/one", private=False)
    with pytest.raises(ValueError, match="ada/one is public: make it private in its settings first"):
        publish(saved.folder, "ada/one", private=True)


@pytest.mark.parametrize("name", ["one", "a/b/c", "ada/-one", "ada/o ne", "ada/one--two", "ada/..", "", "ada/one.git"])
def test_invalid_names_of_repositories(hub: Hub, saved: Saved, name: str) -> None:
    with pytest.raises(ValueError, match=rf"repository id '{re.escape(name)}' is not valid: it is org/name"):
        publish(saved.folder, name, private=False)
    assert hub.requests == []


@pytest.mark.parametrize("options", [{"tag": "v 1"}, {"tag": "a" * 40}, {"branch": "../x"}, {"message": " "}])
def test_invalid_tags_branches_and_messages(hub: Hub, saved: Saved, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is not valid: use letters|message is empty"):
        publish(saved.folder, "ada/one", private=False, **options)  # type: ignore[arg-type]
    assert hub.requests == []


def with_weights(change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    """Damage to one tensor of a saved extractor."""

    def inflict(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "center_0": change(weights["center_0"]).clone()}, folder / "model.safetensors")

    return inflict


DAMAGE = {
    "pickle": (lambda f: (f / "model.bin").write_bytes(b""), r"not part of a saved model: model\.bin"),
    "code": (lambda f: (f / "modeling.py").write_text(""), r"not part of a saved model: modeling\.py"),
    "photo": (
        lambda f: (f / "shots").mkdir() or (f / "shots" / "a.png").write_bytes(PNG),
        r"saved model: shots/a\.png",
    ),
    "link": (lambda f: (f / "README.md").symlink_to("/etc/hostname"), r"README\.md is a link or not a regular file"),
    "folder link": (lambda f: (f / "assets").symlink_to("/tmp"), r"assets is a link or not a regular file"),
    "renamed pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        r"model\.safetensors is not what its name says",
    ),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
        r"model\.safetensors is not what its name says",
    ),
    "not finite": (with_weights(lambda value: value * math.nan), r"center_0 holds NaN or infinite values"),
    "other shapes": (with_weights(lambda value: value[:-1]), r"center_0 is \[\d+\], its config says \[\d+\]"),
    "not json": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not what its name says"),
    "not a picture": (lambda f: (f / "a.png").write_bytes(b"GIF"), r"a\.png is not what its name says \(not a PNG"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "half a part": (
        lambda f: (f / "extractor").mkdir() or (f / "extractor" / "config.json").write_text("{}"),
        r"extractor has no model\.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_the_files_of_a_saved_model_are_published(hub: Hub, saved: Saved, damage: str) -> None:
    inflict, message = DAMAGE[damage]
    inflict(saved.folder)
    with pytest.raises(ValueError, match=message):
        publish(saved.folder, "ada/one", private=False)
    assert hub.requests == []


def test_digests_are_those_of_git_and_sha256sum(tmp_path: Path) -> None:
    """Known values: the empty JSON object as `printf '{}' | git hash-object --stdin` and `sha256sum` give it."""
    (tmp_path / "empty.json").write_text("{}")
    assert git_sha1(tmp_path / "empty.json") == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert sha256(tmp_path / "empty.json") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_space_is_published_as_it_lies_in_the_folder(hub: Hub, tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "hub" / "space"
    done = publish_space(files_of_space(folder), "ada/demo", private=False)
    space = hub.repositories["ada/demo"]
    assert (space.kind, space.private, done.url) == ("space", False, f"{hub.endpoint}/spaces/ada/demo")
    assert space.contents() == {name: (folder / name).read_bytes() for name in done.files}
    assert {"app.py", "README.md", "requirements.txt"} <= done.files.keys()
    assert publish_space(files_of_space(folder), "ada/demo", private=False).commit == done.commit
    space.write({"secret.json": b"{}"})
    with pytest.raises(ValueError, match=r"it holds files that are not a space of adpretrain \(secret\.json\)"):
        publish_space(files_of_space(folder), "ada/demo", private=False)
    copy = tmp_path / "space"
    shutil.copytree(folder, copy)
    (copy / "weights.pth").touch()
    with pytest.raises(ValueError, match=r"holds files that no Space needs: weights\.pth"):
        publish_space(files_of_space(copy), "ada/other", private=False)

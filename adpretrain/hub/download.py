"""Find the folder of a saved model, given as a folder, "embedded", or a Hub repository to be downloaded.

All files are of one commit and match their digests. Failures that may pass are retried; others become a ValueError that
names the fix.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adpretrain.files import atomic_path, git_sha1, sha256
from adpretrain.parsing import read_json
from adpretrain.saved import CONFIG_NAME, WEIGHTS_NAME

T = TypeVar("T")
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / EMBEDDED
REPO_ID = re.compile(r"(?!.*(--|\.\.)|.*\.git$|.{97})[A-Za-z0-9][\w.-]*/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
FILE_SUFFIXES = (".safetensors", ".json", ".yaml", ".yml", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".zip", ".tar")
FILES = (CONFIG_NAME, WEIGHTS_NAME)
Parts = Callable[[dict[str, Any]], Sequence[str]]
PART = re.compile(r"[a-z0-9][a-z0-9_-]*")  # a model within a model, e.g. the extractor of a detector
GIT_SHA1, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try, plus up to half as much at random
LONGEST_WAIT = 60.0  # seconds, whatever the Hub asks for
# What the client raises if the connection or the Hub fails, whichever HTTP library its version uses; and if anything
# fails: a RuntimeError wraps a failed upload, a JSONDecodeError means that the server is no Hub.
ON_THE_WAY: tuple[type[Any], ...] = tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
TROUBLES: tuple[type[Exception], ...] = (OSError, RuntimeError, json.JSONDecodeError, *ON_THE_WAY)


@dataclass(frozen=True)
class Located:
    """Where a saved model lies. ``repo_id`` and ``commit`` (40 digits) are None if it is not from the Hub."""

    folder: Path
    repo_id: str | None = None
    commit: str | None = None


def locate(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    parts: Parts = lambda config: (),
    files: Sequence[str] = FILES,
) -> Located:
    """The folder of a saved model; one of the Hub is downloaded into the cache unless it is there.

    ``source``: a folder, "embedded" (the extractor inside this package), or the id "org/name" of a Hub repository.
    ``revision``: a branch, tag or commit of the repository, "main" by default. It is resolved to a commit once and
    every file is of that commit; a full commit (40 digits) that is in the cache needs no request. Without a
    connection the commit that a branch or tag had when last seen is used, with a warning that names it.
    ``token``: None = that of `hf auth login` or HF_TOKEN. ``parts``: names the subfolders that belong to a model, from
    its config.json; ``files``: the files to download of the model and of each part; no other file is downloaded.

    Every file is compared with the Hub's digest of it; a damaged one is downloaded once more.

    Raises ValueError if there is no such folder or repository, it lacks a file, or it cannot be reached.
    """
    name = os.fspath(source)
    is_folder = name != "" and Path(name).is_dir()
    if is_folder or name == EMBEDDED:
        if revision is not None:
            raise ValueError(f"{name} is a folder; revision={revision!r} is for repositories of the Hub: leave it out")
        folder = Path(name) if is_folder else EMBEDDED_FOLDER
        if not is_folder and not (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"this installation of adpretrain has no embedded extractor ({folder} is missing): install a "
                "released version, or give a folder or a Hub id"
            )
        return Located(folder)
    _refuse_paths(source, name)
    revision = _checked_revision(revision)
    cache = _Cache(name, token)
    commit = revision if GIT_SHA1.fullmatch(revision) else cache.resolve(revision)
    cache.fetch(commit, files, parts)
    return Located(cache.snapshot(commit), name, commit)


def _refuse_paths(source: str | os.PathLike[str], name: str) -> None:
    looks_like_path = (
        not isinstance(source, str)
        or name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith((*FILE_SUFFIXES, "/"))
    )
    if looks_like_path or Path(name).is_file():
        raise ValueError(f"{name} is not a folder: expected a folder written by save_pretrained, or a Hub id org/name")
    if not REPO_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a folder nor the id of a Hub repository, which has the form org/name of letters, "
            f'digits, "-", "_" and "."; {EMBEDDED!r} is the extractor inside this package'
        )


def _checked_revision(revision: str | None) -> str:
    revision = "main" if revision is None else revision
    if not re.fullmatch(r"[\w.+-]+(?:/[\w.+-]+)*", revision) or ".." in revision:  # it becomes a path in the cache
        raise ValueError(f"revision {revision!r} is not a branch, tag or commit: such names are like v1, main, 3f2a9c1")
    return revision


@dataclass(frozen=True)
class _Cache:
    """A Hub repository and its folder in the client's cache."""

    repo_id: str
    token: str | bool | None

    @property
    def _folder(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo_id.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self._folder / "snapshots" / commit

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag or short commit: the Hub's answer, or else the one in the cache."""
        memory = self._folder / "refs" / revision
        known = memory.read_text(encoding="utf-8").strip() if memory.is_file() else ""
        which: dict[str, Any] = {"revision": revision, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
        ask = partial(huggingface_hub.HfApi(token=self.token).model_info, self.repo_id, **which)
        try:
            commit = str((ask() if known else persistently(ask)).sha)
        except TROUBLES as error:
            if GIT_SHA1.fullmatch(known) and (may_pass(error) or isinstance(error, OfflineModeIsEnabled)):
                warnings.warn(
                    f"the Hub cannot be asked ({type(root(error)).__name__}): {self.repo_id} is used at commit "
                    f"{known}, which {revision!r} was when last seen",
                    stacklevel=4,
                )
                return known
            raise self._explained(error, f"revision {revision!r}") from error
        if not GIT_SHA1.fullmatch(commit):
            raise ValueError(f"the Hub gives {commit!r} as the commit of {revision!r} of {self.repo_id}: try again")
        if commit != known:
            with atomic_path(memory) as temporary:
                temporary.write_text(commit, encoding="utf-8")
        return commit

    def fetch(self, commit: str, files: Sequence[str], parts: Parts, prefix: str = "") -> None:
        """Make sure that the files of a model at a commit, and those of its parts, are in the cache and undamaged."""
        for name in files:
            self._fetch_file(commit, prefix + name)
        try:
            config = read_json(self.snapshot(commit) / prefix / CONFIG_NAME)
        except ValueError:
            return  # the caller that reads the config reports the error
        for part in parts(config) if isinstance(config, dict) else ():
            if not PART.fullmatch(part):
                raise ValueError(f"{self.repo_id} at {commit} names the part {part!r}, which is not a folder name")
            self.fetch(commit, files, parts, f"{prefix}{part}/")

    def _fetch_file(self, commit: str, name: str) -> None:
        path = self.snapshot(commit) / name
        if path.is_file() and _is_whole(path, _blob_name(path)):
            return
        what = f"file {name} at commit {commit}"
        which: dict[str, Any] = {"revision": commit, "token": self.token, "library_name": "adpretrain"}
        for _ in range(2):
            _discard(path)
            try:
                persistently(lambda: huggingface_hub.hf_hub_download(self.repo_id, name, **which))
                if path.is_file() and _is_whole(path, _blob_name(path) or self._digest(commit, name)):
                    return
            except TROUBLES as error:
                raise self._explained(error, what) from error
        _discard(path)
        raise ValueError(
            f"cannot load {self.repo_id}: {name} at commit {commit} arrived damaged twice (its digest is not the "
            "one the Hub gives). Try again later or over another network; if that does not help, upload it again"
        )

    def _digest(self, commit: str, name: str) -> str | None:
        """The digest that the Hub gives, for caches without blobs (on systems without links)."""
        url = huggingface_hub.hf_hub_url(self.repo_id, name, revision=commit)
        return huggingface_hub.get_hf_file_metadata(url, token=self.token).etag

    def _explained(self, error: BaseException, what: str) -> ValueError:
        if isinstance(error, RevisionNotFoundError):
            return ValueError(f"{self.repo_id} has no {what}: its branches, tags and commits are listed on its page")
        if isinstance(error, RemoteEntryNotFoundError):
            return ValueError(f"{self.repo_id} has no {what}: it is not a model that adpretrain saved")
        return explain(error, self.repo_id, f"load {what} of")


def _blob_name(path: Path) -> str | None:
    """The digest in the name of a cached file's blob, to which the file is a link."""
    return Path(os.readlink(path)).name if path.is_symlink() else None


def _is_whole(path: Path, digest: str | None) -> bool:
    """Whether a file matches its digest; True if none is known."""
    if digest is None or not (GIT_SHA1.fullmatch(digest) or SHA256.fullmatch(digest)):
        return True
    return has_digest(path, digest)


def _discard(path: Path) -> None:
    """Delete a damaged file from the cache, so that no other program finds it either."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def has_digest(path: Path, expected: str) -> bool:
    """Whether a file matches a digest: SHA-256 (64 digits, large files) or git's SHA-1 (40 digits, other files)."""
    return expected == (sha256(path) if SHA256.fullmatch(expected) else git_sha1(path))


def root(error: BaseException) -> BaseException:
    """The original error behind one that the client has wrapped."""
    while isinstance(error, (RuntimeError, ValueError, FileNotFoundError)) and error.__cause__ is not None:
        if status(error) is not None:
            break
        error = error.__cause__
    return error


def status(error: BaseException) -> int | None:
    """The HTTP status of an answer, or None if there was no answer."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub is busy or broken, or the connection was lost."""
    if isinstance(error, FileNotFoundError):
        return False  # the client has already retried this download
    error = root(error)
    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return False
    on_this_machine = isinstance(error, OSError) and error.errno is not None  # no space left, no permission, ...
    return not on_this_machine or isinstance(error, (ConnectionError, TimeoutError))


def persistently(call: Callable[[], T], landed: Callable[[], T | None] = lambda: None) -> T:
    """The result of ``call()``, retried after `WAITS` as long as its failure `may_pass`.

    ``landed`` is called after every failure. If the request took effect and only its answer was lost, it returns what
    ``call`` would have returned, else None.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except TROUBLES as error:
            if not may_pass(error):
                raise
            if wait is not None:
                time.sleep(max(wait * random.uniform(1, 1.5), min(_retry_after(error), LONGEST_WAIT)))
            if (found := landed()) is not None:
                return found
            if wait is None:
                raise
    raise AssertionError("the last try returns or raises")


def _retry_after(error: BaseException) -> float:
    headers: Any = getattr(getattr(root(error), "response", None), "headers", {})
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def explain(error: BaseException, repo_id: str, doing: str) -> ValueError:
    """An error for the user that says what failed with a repository, why, and what to do."""
    return ValueError(f"cannot {doing} {repo_id}: {_reason(root(error), repo_id)}")


def _reason(error: BaseException, repo_id: str) -> str:
    code, page, namespace = status(error), f"{constants.ENDPOINT}/{repo_id}", repo_id.partition("/")[0]
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token is set. Make one with write access at {tokens}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have it. Unset HF_HUB_OFFLINE"
    if isinstance(error, GatedRepoError):
        return f"it is gated. Ask for access at {page}, then use a token of that account (`hf auth login` or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"it is neither a folder here nor a repository that can be reached at {constants.ENDPOINT}. Check the "
            "spelling; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision. {page} lists its branches, tags and commits"
    if code == 401:
        return f"the token is wrong or has expired. Make a new one at {tokens}; HF_TOKEN overrides `hf auth login`"
    if code == 403:
        return (
            f"the token may not do that in the namespace {namespace!r}. Use your own or an organisation's where you "
            f"may write, with a token of write access ({tokens})"
        )
    if code == 429:
        return "there were too many requests. Wait some minutes and try again"
    if code is not None and code >= 500:
        return f"the Hub is in trouble (status {code}, tried {len(WAITS) + 1} times). Try again later"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if code is not None:
        return f"the Hub refuses (status {code}: {first})"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} does not answer like a Hub. Check HF_ENDPOINT and whether a proxy is in between"
    if isinstance(error, OSError) and error.errno is not None and not may_pass(error):
        return str(error)
    return f"no connection to {constants.ENDPOINT} ({first}). Check the network, HTTPS_PROXY and HF_ENDPOINT"

"""Publish a folder as one commit of a Hub repository: checked first, complete or not at all, and never twice."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError, RepositoryNotFoundError

from adpretrain.backbones.weights import some
from adpretrain.hub.claims import refuse_claims
from adpretrain.hub.contents import OURS, PAGE, files_to_publish
from adpretrain.hub.download import (
    GIT_SHA1,
    REPO_ID,
    TROUBLES,
    explain,
    has_digest,
    persistently,
    root,
    status,
)

HOUSEKEEPING = re.compile(r"\.gitattributes|\.gitignore|LICENSE(?:\.[a-z]+)?|[A-Za-z0-9_-]+\.md")
BLANK = {"model": {".gitattributes"}, "space": {".gitattributes", "README.md"}}  # a new one has these
TEMPLATE = {PAGE, "style.css"}  # and a new static Space these
STALE = (409, 412)  # the Hub's answers if the branch is no longer at the parent commit


@dataclass(frozen=True)
class Published:
    """The result of a publication or, in a dry run, what it would be.

    Args:
        url: the repository's page.
        commit: the commit that holds the files; None if a dry run would make one.
        tag: the tag on it.
        files: all files of the model, path -> size in bytes.
        changed, deleted: the paths in which the commit differs from the one before; both empty = no new commit.
        steps: descriptions, in order, of what was done or would be done.
    """

    url: str
    commit: str | None
    tag: str | None
    files: dict[str, int]
    changed: list[str]
    deleted: list[str]
    steps: list[str]


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool,
    tag: str | None = None,
    branch: str = "main",
    message: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Published:
    """Make a branch of the model repository ``repo_id`` hold the files of a saved model, in one commit.

    A repository that does not exist is created as private, and becomes public (unless ``private``) only when it is
    complete. Files of ours that ``folder`` no longer has are deleted in the same commit; an unchanged folder makes no
    commit. The commit's parent is the commit that was compared, so that no other work is overwritten. Failed requests
    are retried; before a commit is retried, the branch is checked, because the commit may be there and only its answer
    was lost. ``tag`` is put on the commit. ``token``: None = that of `hf auth login` or HF_TOKEN. ``dry_run``: check
    everything, change nothing; no token is needed.

    Raises ValueError, with the fix, if the folder is not a saved model (`files_to_publish`), its card claims more
    than the licences of what it was made of allow (`refuse_claims`), a name is not valid, the token is missing, wrong
    or lacks rights, the repository's visibility is not ``private`` or it holds something else, the tag is on another
    commit, the branch moves meanwhile, or there is no connection.
    """
    files = files_to_publish(folder)
    refuse_claims(Path(folder))
    _check_names(repo_id, branch, tag, message)
    message = message or f"Publish {Path(folder).resolve().name}"
    return _Repository(repo_id, branch, token, files, private, tag, message).publish(dry_run)


def publish_space(
    files: Mapping[str, Path],
    repo_id: str,
    sdk: Literal["gradio", "static"] = "gradio",
    *,
    private: bool,
    message: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Published:
    """Make the Space ``repo_id`` hold ``files`` (`files_of_space`, `files_of_page`), as `publish` does.

    Files that only the Space has are not deleted. Raises ValueError as `publish` does.
    """
    _check_names(repo_id, "main", None, message)
    message = message or "Publish the Space"
    return _Repository(repo_id, "main", token, dict(files), private, None, message, sdk).publish(dry_run)


def _check_names(repo_id: str, branch: str, tag: str | None, message: str | None) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(
            f"repository id {repo_id!r} is not valid: it is org/name, your user name or organisation and a name of "
            'letters, digits, "-", "_" and ".", which starts and ends with a letter or digit; '
            "96 characters at most"
        )
    for what, name in (("branch", branch), ("tag", tag)):
        if name is not None and (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or ".." in name or GIT_SHA1.fullmatch(name)
        ):
            raise ValueError(f'{what} {name!r} is not valid: use letters, digits, "-", "_" and ".", for example v1.0')
    if message is not None and not message.strip():
        raise ValueError("message is empty: say what the commit holds, or leave message out")


@dataclass(frozen=True)
class _State:
    """A repository's present state: ``files`` at the head; ``private`` and ``head`` are None if it does not exist."""

    private: bool | None = None
    head: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    is_new: bool = True  # missing, or left empty by an interrupted publication


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hub, and the files that one of its branches shall hold."""

    repo_id: str
    branch: str
    token: str | bool | None
    local: dict[str, Path]
    private: bool
    tag: str | None
    message: str
    sdk: Literal["gradio", "static"] | None = None  # of a Space; None = a model

    @property
    def kind(self) -> Literal["model", "space"]:
        return "model" if self.sdk is None else "space"

    @property
    def _api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(token=self.token, library_name="adpretrain")

    def publish(self, dry_run: bool) -> Published:
        try:
            anonymous = self._is_anonymous(dry_run)
            state = self._state()
            changed, deleted = self._differences(state.files)
            self._refuse(state, bool(changed or deleted))
            steps = self._steps(state, changed, deleted)
            if anonymous:
                steps.insert(0, f"need a token (none is set; a private {self.repo_id} cannot be seen without one)")
            commit = None if changed or deleted else state.head
            if not dry_run:
                commit = self._carry_out(state)
        except TROUBLES as error:
            raise explain(error, self.repo_id, "publish to") from error
        url = f"{self._api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo_id}"
        sizes = {name: path.stat().st_size for name, path in self.local.items()}
        return Published(url, commit, self.tag, sizes, changed, deleted, steps)

    def _is_anonymous(self, dry_run: bool) -> bool:
        """Whether no token is set, which only a dry run allows. Raises the client's error for a wrong one."""
        try:
            persistently(self._api.whoami)
        except LocalTokenNotFoundError:
            if not dry_run:
                raise
            return True
        return False

    def _info(self, revision: str | None = None) -> Any:
        return persistently(lambda: self._api.repo_info(self.repo_id, revision=revision, repo_type=self.kind))

    def _refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """The commits of the branches and of the tags by name."""
        refs = persistently(lambda: self._api.list_repo_refs(self.repo_id, repo_type=self.kind))
        branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
        return branches, tags

    def _state(self) -> _State:
        """The state at the head of the branch or, if there is no such branch, of main."""
        try:
            info = self._info()
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return _State()
        branches, tags = self._refs()
        head = branches.get(self.branch, branches.get("main", str(info.sha)))
        files = self._remote(head)
        own = files.keys() - BLANK[self.kind]
        is_new = not own or (self.sdk == "static" and own == TEMPLATE)
        return _State(bool(info.private), head, branches, tags, files, is_new)

    def _remote(self, commit: str) -> dict[str, Any]:
        """The client's `RepoFile`s of a commit by path."""
        where: dict[str, Any] = {"revision": commit, "repo_type": self.kind}
        found = persistently(lambda: list(self._api.list_repo_tree(self.repo_id, recursive=True, **where)))
        return {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}

    def _is_ours(self, name: str) -> bool:
        if self.sdk == "static" and name in TEMPLATE:
            return True
        return name in self.local if self.kind == "space" else OURS.fullmatch(name) is not None

    def _differences(self, remote: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Paths to send and paths to delete, so that the repository holds exactly the local files."""
        known = {name: file.lfs.sha256 if file.lfs is not None else file.blob_id for name, file in remote.items()}
        changed = [n for n, path in self.local.items() if n not in known or not has_digest(path, known[n])]
        return changed, sorted(name for name in remote.keys() - self.local.keys() if self._is_ours(name))

    def _refuse(self, state: _State, changes: bool) -> None:
        """Raise ValueError, before anything is sent, if the files cannot be published to this repository."""
        repo_id, tag = self.repo_id, self.tag
        if foreign := [name for name in state.files if not self._is_ours(name) and not HOUSEKEEPING.fullmatch(name)]:
            raise ValueError(
                f"the name {repo_id} is taken: it holds files that are not a {self.kind} of adpretrain "
                f"({some(foreign)}). Choose another name, or delete them there"
            )
        if state.private is False and self.private:
            raise ValueError(f"{repo_id} is public: make it private in its settings first, or choose another name")
        if state.private is True and not self.private and not state.is_new:
            raise ValueError(
                f"{repo_id} is private: pass private=True to publish to it as it is, or make it public in its settings"
            )
        if tag in state.tags and (changes or state.tags[tag] != state.head):
            raise ValueError(
                f"the tag {tag!r} of {repo_id} is on commit {state.tags[tag]}, but you publish another one: choose "
                "another tag (others rely on this one). Nothing was uploaded"
            )

    def _steps(self, state: _State, changed: list[str], deleted: list[str]) -> list[str]:
        steps, size = [], sum(self.local[name].stat().st_size for name in changed)
        if state.head is None:
            steps.append(f"create the private repository {self.repo_id}")
        elif self.branch not in state.branches:
            steps.append(f"create the branch {self.branch}")
        if changed or deleted:
            steps.append(f"commit {len(changed)} new or changed files ({size / 1e6:.2f} MB) to {self.branch}")
            steps += [f"delete {name} in the same commit" for name in deleted]
        else:
            steps.append(f"make no commit: {self.branch} holds these files already, at {state.head}")
        if self.tag is not None and self.tag not in state.tags:
            steps.append(f"tag it {self.tag}")
        if state.is_new and not self.private:
            steps.append("make the repository public")
        return steps

    def _carry_out(self, state: _State) -> str:
        """Make all changes to the repository. Returns the commit."""
        options: dict[str, Any] = {"exist_ok": True, "repo_type": self.kind}
        if state.head is None:
            new: dict[str, Any] = {"private": True, "space_sdk": self.sdk}
            try:
                persistently(lambda: self._api.create_repo(self.repo_id, repo_type=self.kind, **new))
            except TROUBLES as error:
                if status(root(error)) != 409:  # the first answer was lost, or it is somebody else's, hidden from us
                    raise
            state = self._state()
            if state.head is None:
                raise ValueError(f"the name {self.repo_id} is taken: choose another")
            if not state.is_new or state.private is not True:
                raise ValueError(f"{self.repo_id} was just created by somebody else: look at it, then publish again")
        elif self.branch not in state.branches:
            persistently(lambda: self._api.create_branch(self.repo_id, branch=self.branch, **options))
        assert state.head is not None
        commit = self._commit(state) if any(self._differences(state.files)) else state.head
        to_open = state.is_new and not self.private
        try:
            if (tag := self.tag) is not None and tag not in state.tags:
                persistently(lambda: self._api.create_tag(self.repo_id, tag=tag, revision=commit, **options))
                if (found := self._refs()[1].get(tag)) != commit:
                    raise ValueError(
                        f"the files are in {self.repo_id} at commit {commit}, but the tag {tag!r} was put on {found} "
                        "by somebody else meanwhile: publish again with another tag"
                    )
            if to_open:
                visible: dict[str, Any] = {"private": False, "repo_type": self.kind}
                persistently(lambda: self._api.update_repo_settings(self.repo_id, **visible))
        except TROUBLES as error:
            rest = "it is still private: make it public in its settings, then" if to_open else ""
            reason = explain(error, self.repo_id, "finish publishing to")
            raise ValueError(f"{reason}. The files are there, at commit {commit}; {rest} publish again") from error
        return commit

    def _commit(self, state: _State) -> str:
        """Make one commit on top of ``state`` with exactly the local files. Returns it."""
        changed, deleted = self._differences(state.files)

        def send() -> str:
            operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, self.local[name]) for name in changed]
            operations += [huggingface_hub.CommitOperationDelete(name) for name in deleted]
            where: dict[str, Any] = {"revision": self.branch, "parent_commit": state.head, "repo_type": self.kind}
            return str(self._api.create_commit(self.repo_id, operations, commit_message=self.message, **where).oid)

        def landed() -> str | None:
            head = str(self._info(self.branch).sha)
            if head == state.head:
                return None
            if not any(self._differences(self._remote(head))):
                return head
            raise ValueError(
                f"{self.repo_id} was changed by somebody else meanwhile: {self.branch} is at {head}, no longer at "
                f"{state.head}. Nothing of yours was committed; look at the new commit, then publish again"
            )

        try:
            commit = persistently(send, landed)
        except TROUBLES as error:  # the parent is stale, perhaps because the commit was made after all
            if status(root(error)) not in STALE or (found := landed()) is None:
                raise
            commit = found
        if any(self._differences(self._remote(commit))):
            raise ValueError(
                f"commit {commit} of {self.repo_id} does not hold what was sent: a .gitignore there may leave files "
                "out. Publish again"
            )
        return commit

"""A folder becomes one commit of a Hub repository: all of it or nothing, and never twice."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub

from adpretrain.hub.contents import GIT_SHA1, LocalFile, differences, files_to_publish, is_foreign, some
from adpretrain.hub.locating import REPO_ID
from adpretrain.hub.trouble import explain, persistently, root, status, troubles

T = TypeVar("T")
STALE = (409, 412)  # what the Hub answers if the branch is no longer at the parent commit


@dataclass(frozen=True)
class Published:
    """What was published or, in a dry run, would be.

    Args:
        url: the repository's page.
        commit: the commit that holds the files; None if a dry run would make one.
        tag: the tag on it.
        files: all files of the model, path -> size in bytes.
        changed, deleted: the paths in which the commit differs from the one before; both empty = no new commit.
        steps: what was done, or would be, in words and in order.
    """

    url: str
    commit: str | None
    tag: str | None
    files: dict[str, int]
    changed: list[str]
    deleted: list[str]
    steps: list[str]


@dataclass(frozen=True)
class _State:
    """A repository as it is: None for ``private`` and ``head`` if it does not exist."""

    private: bool | None = None
    head: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Whether it holds nothing yet: not there, or left empty by a publication that broke off."""
        return all(name == ".gitattributes" for name in self.files)


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

    The repository is made if there is none: private, and public (unless ``private``) only when all is there. Files
    of ours that ``folder`` no longer has are deleted in the same commit; an unchanged folder makes no commit. The
    commit has the parent that was looked at, so that nobody's work is overwritten. A request that fails is sent again
    after a while; before a commit is, the branch is asked whether the commit is there and only its answer was lost.
    ``tag`` is put on the commit. ``token``: None = that of `hf auth login` or HF_TOKEN. ``dry_run``: ask and check
    everything, change nothing.

    Raises ValueError, with the fix, if the folder is no saved model (`files_to_publish`), a name is not valid, the
    token is missing, wrong or of too few rights, the repository is not as ``private`` says or holds something else,
    the tag is on another commit, the branch moves meanwhile, or there is no connection.
    """
    files = files_to_publish(folder)
    _check_names(repo_id, branch, tag, message)
    hub = _Repository(repo_id, branch, huggingface_hub.HfApi(token=token, library_name="adpretrain"))
    try:
        persistently(hub.api.whoami)
        state = hub.state()
        changed, deleted = differences(files, state.files)
        _refuse(repo_id, state, private, tag, bool(changed or deleted))
        steps = _steps(hub, state, files, changed, deleted, private, tag)
        commit = None if changed or deleted else state.head
        if not dry_run:
            commit = _carry_out(hub, state, files, private, tag, message or f"Publish {Path(folder).resolve().name}")
    except troubles() as error:
        raise explain(error, repo_id, "publish to") from error
    url = f"{hub.api.endpoint}/{repo_id}"
    return Published(url, commit, tag, {n: f.size for n, f in files.items()}, changed, deleted, steps)


def _check_names(repo_id: str, branch: str, tag: str | None, message: str | None) -> None:
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", "-", ".")):
        raise ValueError(
            f"repository id {repo_id!r} is not valid: it is org/name, your user name or organisation and a name of "
            'letters, digits, "-", "_" and ".", which starts and ends with a letter or digit'
        )
    for what, name in (("branch", branch), ("tag", tag)):
        if name is not None and (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or ".." in name or GIT_SHA1.fullmatch(name)
        ):
            raise ValueError(f'{what} {name!r} is not valid: use letters, digits, "-", "_" and ".", for example v1.0')
    if message is not None and not message.strip():
        raise ValueError("message is empty: say what the commit holds, or leave message out")


def _refuse(repo_id: str, state: _State, private: bool, tag: str | None, changes: bool) -> None:
    """Raise ValueError, before anything is sent, if the repository does not take what is to be published."""
    if foreign := [name for name in state.files if is_foreign(name)]:
        raise ValueError(
            f"the name {repo_id} is taken: it holds files that are not a model of adpretrain ({some(foreign)}). "
            "Choose another name, or delete them there"
        )
    if state.private is False and private:
        raise ValueError(f"{repo_id} is public: make it private in its settings first, or choose another name")
    if state.private is True and not private and not state.is_new:
        raise ValueError(
            f"{repo_id} is private: pass private=True to publish to it as it is, or make it public in its settings"
        )
    if tag in state.tags and (changes or state.tags[tag] != state.head):
        raise ValueError(
            f"the tag {tag!r} of {repo_id} is on commit {state.tags[tag]}, and what you publish is another: choose "
            "another tag (others rely on this one). Nothing was uploaded"
        )


def _steps(
    hub: _Repository,
    state: _State,
    files: dict[str, LocalFile],
    changed: list[str],
    deleted: list[str],
    private: bool,
    tag: str | None,
) -> list[str]:
    steps, size = [], sum(files[name].size for name in changed)
    if state.head is None:
        steps.append(f"create the private repository {hub.repo_id}")
    elif hub.branch not in state.branches:
        steps.append(f"create the branch {hub.branch}")
    if changed or deleted:
        steps.append(f"commit {len(changed)} new or changed files ({size / 1e6:.2f} MB) to {hub.branch}")
        steps += [f"delete {name} in the same commit" for name in deleted]
    else:
        steps.append(f"make no commit: {hub.branch} holds these files already, at {state.head}")
    if tag is not None and tag not in state.tags:
        steps.append(f"tag it {tag}")
    if state.is_new and not private:
        steps.append("make the repository public")
    return steps


def _carry_out(
    hub: _Repository, state: _State, files: dict[str, LocalFile], private: bool, tag: str | None, message: str
) -> str:
    """Everything that changes the repository. Returns the commit."""
    if state.head is None:
        hub.create()
        state = hub.state()
        if not state.is_new or state.private is not True or state.head is None:
            raise ValueError(f"{hub.repo_id} was made by somebody else just now: look at it, then publish again")
    elif hub.branch not in state.branches:
        hub.create_branch()
    assert state.head is not None
    commit = hub.commit(files, state, message) if any(differences(files, state.files)) else state.head
    try:
        if tag is not None and tag not in state.tags:
            hub.tag(tag, commit)
        if state.is_new and not private:
            persistently(lambda: hub.api.update_repo_settings(hub.repo_id, private=False))
    except troubles() as error:
        rest = "it is still private: make it public in its settings, then" if state.is_new and not private else ""
        reason = explain(error, hub.repo_id, "finish publishing to")
        raise ValueError(f"{reason}. The files are there, at commit {commit}; {rest} publish again") from error
    return commit


@dataclass(frozen=True)
class _Repository:
    repo_id: str
    branch: str
    api: huggingface_hub.HfApi

    def state(self) -> _State:
        """What is there now, at the head of the branch or, if it has no such branch, of main."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            info = persistently(lambda: self.api.model_info(self.repo_id))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return _State()
        refs = persistently(lambda: self.api.list_repo_refs(self.repo_id))
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        head = branches.get(self.branch, branches.get("main", str(info.sha)))
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        return _State(bool(info.private), head, branches, tags, self.files(head))

    def files(self, commit: str) -> dict[str, Any]:
        """The client's `RepoFile`s of a commit by path."""
        found = persistently(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        return {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}

    def create(self) -> None:
        """Make the repository, private. Raises ValueError if somebody else has one of the name."""
        try:
            persistently(lambda: self.api.create_repo(self.repo_id, private=True))
        except troubles() as error:
            if status(root(error)) != 409:
                raise
            if self.state().head is None:  # there, and not for us to see; if it is, the first answer was lost
                raise ValueError(f"the name {self.repo_id} is taken: choose another") from error

    def create_branch(self) -> None:
        persistently(lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))

    def commit(self, files: dict[str, LocalFile], state: _State, message: str) -> str:
        """One commit on top of ``state``, after which the branch holds exactly ``files`` of ours. Returns it."""
        changed, deleted = differences(files, state.files)

        def send() -> str:
            operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, files[name].path) for name in changed]
            operations += [huggingface_hub.CommitOperationDelete(name) for name in deleted]
            return self.api.create_commit(
                self.repo_id, operations, commit_message=message, revision=self.branch, parent_commit=state.head
            ).oid

        def landed() -> str | None:
            head = str(persistently(lambda: self.api.model_info(self.repo_id, revision=self.branch)).sha)
            if head == state.head:
                return None
            if not any(differences(files, self.files(head))):
                return head
            raise ValueError(
                f"{self.repo_id} was changed by somebody else meanwhile: {self.branch} is at {head}, no longer at "
                f"{state.head}. Nothing of yours was committed; look at the new commit, then publish again"
            )

        commit = _unless_stale(lambda: persistently(send, landed), landed)
        if any(differences(files, self.files(commit))):
            raise ValueError(
                f"commit {commit} of {self.repo_id} does not hold what was sent: a .gitignore there may leave files "
                "out. Publish again"
            )
        return commit

    def tag(self, tag: str, commit: str) -> None:
        """Put a tag on a commit. Raises ValueError if it is on another."""
        persistently(lambda: self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True))
        found = {
            ref.name: ref.target_commit for ref in persistently(lambda: self.api.list_repo_refs(self.repo_id)).tags
        }
        if found.get(tag) != commit:
            raise ValueError(
                f"the files are in {self.repo_id} at commit {commit}, but the tag {tag!r} was put on {found.get(tag)} "
                "by somebody else meanwhile: publish again with another tag"
            )


def _unless_stale(call: Callable[[], T], landed: Callable[[], T | None]) -> T:
    """``call()``; if the Hub says that the parent is stale, the commit that is there if it is ours after all."""
    try:
        return call()
    except troubles() as error:
        if status(root(error)) not in STALE or (found := landed()) is None:
            raise
        return found

"""A Hub repository as the client shows it, and the requests that change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import huggingface_hub

from adpretrain.hub.contents import LocalFile, differences
from adpretrain.hub.trouble import persistently, root, status, troubles

T = TypeVar("T")
BLANK = {"model": (".gitattributes",), "space": (".gitattributes", "README.md")}  # what the Hub puts into a new one
STALE = (409, 412)  # what the Hub answers if the branch is no longer at the parent commit


@dataclass(frozen=True)
class State:
    """A repository as it is: None for ``private`` and ``head`` if it does not exist, ``files`` at the head."""

    private: bool | None = None
    head: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    is_new: bool = True  # not there, or left empty by a publication that broke off


@dataclass(frozen=True)
class Repository:
    """A repository and how to talk to it; ``is_ours``: which of its files are kept as the folder has them."""

    repo_id: str
    branch: str
    api: huggingface_hub.HfApi
    is_ours: Callable[[str], bool]
    kind: Literal["model", "space"] = "model"

    @property
    def page(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo_id}"

    def info(self, revision: str | None = None) -> Any:
        return persistently(lambda: self.api.repo_info(self.repo_id, revision=revision, repo_type=self.kind))

    def refs(self) -> Any:
        return persistently(lambda: self.api.list_repo_refs(self.repo_id, repo_type=self.kind))

    def differences(self, files: dict[str, LocalFile], remote: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Paths to be sent, and paths to be deleted, for ``remote`` to hold exactly ``files`` of ours."""
        changed, surplus = differences(files, remote)
        return changed, [name for name in surplus if self.is_ours(name)]

    def state(self) -> State:
        """What is there now, at the head of the branch or, if it has no such branch, of main."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            info = self.info()
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return State()
        refs = self.refs()
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        head = branches.get(self.branch, branches.get("main", str(info.sha)))
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        files = self.files(head)
        return State(bool(info.private), head, branches, tags, files, files.keys() <= set(BLANK[self.kind]))

    def files(self, commit: str) -> dict[str, Any]:
        """The client's `RepoFile`s of a commit by path."""
        where: dict[str, Any] = {"revision": commit, "repo_type": self.kind}
        found = persistently(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, **where)))
        return {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}

    def create(self) -> None:
        """Make the repository, private. Raises ValueError if somebody else has one of the name."""
        try:
            sdk: dict[str, Any] = {"space_sdk": "gradio"} if self.kind == "space" else {}
            persistently(lambda: self.api.create_repo(self.repo_id, private=True, repo_type=self.kind, **sdk))
        except troubles() as error:
            if status(root(error)) != 409:
                raise
            if self.state().head is None:  # there, and not for us to see; if it is, the first answer was lost
                raise ValueError(f"the name {self.repo_id} is taken: choose another") from error

    def create_branch(self) -> None:
        options: dict[str, Any] = {"exist_ok": True, "repo_type": self.kind}
        persistently(lambda: self.api.create_branch(self.repo_id, branch=self.branch, **options))

    def commit(self, files: dict[str, LocalFile], state: State, message: str) -> str:
        """One commit on top of ``state``, after which the branch holds exactly ``files`` of ours. Returns it."""
        changed, deleted = self.differences(files, state.files)

        def send() -> str:
            operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, files[name].path) for name in changed]
            operations += [huggingface_hub.CommitOperationDelete(name) for name in deleted]
            where: dict[str, Any] = {"revision": self.branch, "parent_commit": state.head, "repo_type": self.kind}
            return str(self.api.create_commit(self.repo_id, operations, commit_message=message, **where).oid)

        def landed() -> str | None:
            head = str(self.info(self.branch).sha)
            if head == state.head:
                return None
            if not any(self.differences(files, self.files(head))):
                return head
            raise ValueError(
                f"{self.repo_id} was changed by somebody else meanwhile: {self.branch} is at {head}, no longer at "
                f"{state.head}. Nothing of yours was committed; look at the new commit, then publish again"
            )

        commit = _unless_stale(lambda: persistently(send, landed), landed)
        if any(self.differences(files, self.files(commit))):
            raise ValueError(
                f"commit {commit} of {self.repo_id} does not hold what was sent: a .gitignore there may leave files "
                "out. Publish again"
            )
        return commit

    def tag(self, tag: str, commit: str) -> None:
        """Put a tag on a commit. Raises ValueError if it is on another."""
        options: dict[str, Any] = {"revision": commit, "exist_ok": True, "repo_type": self.kind}
        persistently(lambda: self.api.create_tag(self.repo_id, tag=tag, **options))
        found = {ref.name: ref.target_commit for ref in self.refs().tags}
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

"""A folder becomes one commit of a Hub repository: all of it or nothing, and never twice."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from adpretrain.hub.contents import (
    GIT_SHA1,
    HOUSEKEEPING,
    LocalFile,
    files_of_space,
    files_to_publish,
    is_ours,
    some,
)
from adpretrain.hub.locating import REPO_ID
from adpretrain.hub.repository import Repository, State
from adpretrain.hub.trouble import explain, persistently, troubles

LONGEST = 96  # characters of a repository's id on the Hub


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
    everything, change nothing; no token is needed.

    Raises ValueError, with the fix, if the folder is no saved model (`files_to_publish`), a name is not valid, the
    token is missing, wrong or of too few rights, the repository is not as ``private`` says or holds something else,
    the tag is on another commit, the branch moves meanwhile, or there is no connection.
    """
    files = files_to_publish(folder)
    _check_names(repo_id, branch, tag, message)
    hub = Repository(repo_id, branch, _api(token), is_ours)
    return _publish(hub, files, private, tag, message or f"Publish {Path(folder).resolve().name}", dry_run)


def publish_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool,
    message: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Published:
    """Make the Gradio Space ``repo_id`` hold the files of ``folder`` (`files_of_space`), as `publish` does.

    Files that only the Space has are not deleted. Raises ValueError as `publish` does.
    """
    files = files_of_space(folder)
    _check_names(repo_id, "main", None, message)
    hub = Repository(repo_id, "main", _api(token), files.__contains__, "space")
    return _publish(hub, files, private, None, message or "Publish the Space", dry_run)


def _api(token: str | bool | None) -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(token=token, library_name="adpretrain")


def _publish(
    hub: Repository, files: dict[str, LocalFile], private: bool, tag: str | None, message: str, dry_run: bool
) -> Published:
    try:
        anonymous = _is_anonymous(hub.api, dry_run)
        state = hub.state()
        changed, deleted = hub.differences(files, state.files)
        _refuse(hub, state, private, tag, bool(changed or deleted))
        steps = _steps(hub, state, files, changed, deleted, private, tag)
        commit = None if changed or deleted else state.head
        if anonymous:
            steps.insert(0, f"need a token (none is set; a private {hub.repo_id} cannot be seen without one)")
        if not dry_run:
            commit = _carry_out(hub, state, files, private, tag, message)
    except troubles() as error:
        raise explain(error, hub.repo_id, "publish to") from error
    sizes = {name: file.size for name, file in files.items()}
    return Published(hub.page, commit, tag, sizes, changed, deleted, steps)


def _is_anonymous(api: huggingface_hub.HfApi, dry_run: bool) -> bool:
    """Whether no token is set, which only a dry run may do without; raises what the client does for a wrong one."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        persistently(api.whoami)
    except LocalTokenNotFoundError:
        if not dry_run:
            raise
        return True
    return False


def _check_names(repo_id: str, branch: str, tag: str | None, message: str | None) -> None:
    known = REPO_ID.fullmatch(repo_id) and len(repo_id) <= LONGEST
    if not known or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", "-", ".")):
        raise ValueError(
            f"repository id {repo_id!r} is not valid: it is org/name, your user name or organisation and a name of "
            'letters, digits, "-", "_" and ".", which starts and ends with a letter or digit; '
            f"{LONGEST} characters at most"
        )
    for what, name in (("branch", branch), ("tag", tag)):
        if name is not None and (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or ".." in name or GIT_SHA1.fullmatch(name)
        ):
            raise ValueError(f'{what} {name!r} is not valid: use letters, digits, "-", "_" and ".", for example v1.0')
    if message is not None and not message.strip():
        raise ValueError("message is empty: say what the commit holds, or leave message out")


def _refuse(hub: Repository, state: State, private: bool, tag: str | None, changes: bool) -> None:
    """Raise ValueError, before anything is sent, if the repository does not take what is to be published."""
    repo_id = hub.repo_id
    if foreign := [name for name in state.files if not hub.is_ours(name) and not HOUSEKEEPING.fullmatch(name)]:
        raise ValueError(
            f"the name {repo_id} is taken: it holds files that are not a {hub.kind} of adpretrain ({some(foreign)}). "
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
    hub: Repository,
    state: State,
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
    hub: Repository, state: State, files: dict[str, LocalFile], private: bool, tag: str | None, message: str
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
    commit = hub.commit(files, state, message) if any(hub.differences(files, state.files)) else state.head
    try:
        if tag is not None and tag not in state.tags:
            hub.tag(tag, commit)
        if state.is_new and not private:
            persistently(lambda: hub.api.update_repo_settings(hub.repo_id, private=False, repo_type=hub.kind))
    except troubles() as error:
        rest = "it is still private: make it public in its settings, then" if state.is_new and not private else ""
        reason = explain(error, hub.repo_id, "finish publishing to")
        raise ValueError(f"{reason}. The files are there, at commit {commit}; {rest} publish again") from error
    return commit

"""What a Hub keeps of one repository: commits of files, branches, tags; digests as git and git-lfs compute them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LARGE = (".safetensors", ".png", ".bin", ".parquet")  # what the Hub keeps as LFS


def git_sha1(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """git's: of the content, or of the pointer that git keeps in place of a large file."""
        return git_sha1("blob", self.pointer if self.large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    files: dict[str, Blob]

    @property
    def sha(self) -> str:
        tree = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(self.files.items()))
        return git_sha1("commit", f"parent {self.parent}\n{self.title}\n{tree}".encode())


@dataclass
class Repository:
    """``owner``: who may write. ``gated``: others see it but get no files. ``lfs``: uploaded contents by SHA-256."""

    name: str
    private: bool = False
    gated: bool = False
    kind: str = "model"
    sdk: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)  # of visibility and commits, in order, for tests

    def __post_init__(self) -> None:
        files = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}
        if self.kind == "space":
            files["README.md"] = Blob(f"---\nsdk: {self.sdk or 'gradio'}\n---\n".encode(), False)
        if self.sdk == "static":  # the Hub's template
            files["index.html"] = Blob(b"<!doctype html><h1>Welcome to your static Space!</h1>", False)
            files["style.css"] = Blob(b"body {}", False)
        self.add(Commit(None, "initial commit", files), "main")

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def add(self, commit: Commit, branch: str) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        self.history.append(f"commit {commit.title} ({'private' if self.private else 'public'})")
        return commit.sha

    def resolve(self, revision: str) -> str | None:
        """A branch, tag, or commit of at least seven digits -> the commit."""
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and len(revision) >= 7:
            found = next((sha for sha in self.commits if sha.startswith(revision)), None)
        return found

    def head(self, branch: str = "main") -> Commit:
        return self.commits[self.branches[branch]]

    def apply(self, branch: str, title: str, operations: Iterable[dict[str, Any]]) -> str:
        """The operations of a commit request, on top of the branch. KeyError if a file to delete is not there."""
        parent = self.branches[branch]
        files = dict(self.commits[parent].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        return self.add(Commit(parent, title, files), branch)

    def write(self, files: dict[str, bytes], title: str = "by somebody else", branch: str = "main") -> str:
        """A commit made without a client."""
        blobs = {path: Blob(content, path.endswith(LARGE)) for path, content in files.items()}
        return self.add(Commit(self.branches[branch], title, {**self.head(branch).files, **blobs}), branch)

    def contents(self, branch: str = "main") -> dict[str, bytes]:
        """What the branch holds, without the Hub's own file."""
        return {path: blob.content for path, blob in self.head(branch).files.items() if path != ".gitattributes"}

    def info(self, sha: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in sorted(self.commits[sha].files)]
        return {
            "id": self.name,
            "modelId": self.name,
            "author": self.owner,
            "sha": sha,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, sha: str) -> list[dict[str, Any]]:
        """Every file and folder, as the recursive listing gives them."""
        entries: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, blob in sorted(self.commits[sha].files.items()):
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                folder = "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    entries.append(
                        {"type": "directory", "path": folder, "oid": git_sha1("tree", folder.encode()), "size": 0}
                    )
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
            if blob.large:
                large = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                entry["lfs"] = large
            entries.append(entry)
        return entries

    def refs(self) -> dict[str, Any]:
        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]

        return {"branches": listed(self.branches, "heads"), "converts": [], "tags": listed(self.tags, "tags")}

"""Requests to the Hub: who may do what, and the answers, as the client of the Hub expects them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from hub_server.collected import Collections
from hub_server.repository import LARGE, Repository
from hub_server.routes import ROUTES, SIGNED, WRITING, Answer

if TYPE_CHECKING:
    from hub_server.server import Fault, Hub, User


class Handler(Collections, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    def handle_request(self) -> None:
        self.body, self.silent = self.read_body(), False
        if not self.hub.running:  # a connection that was kept
            return self.hang_up()
        self.fault: Fault | None = self.hub.fault_for(f"{self.command} {unquote(self.path)}")
        kind = self.fault.kind if self.fault else None
        if kind == "drop":
            return self.hang_up()
        if self.fault and kind == "status":
            return self.answer(self.fault.status, {"error": "broken on purpose"}, self.fault.headers)
        if self.fault and kind == "call":
            self.fault.call()
        with self.hub.lock:
            self.silent = kind == "lose"
            self.route()
        return self.hang_up() if self.silent else None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """JSON or bytes; ``length``: of the body that a HEAD is about."""
        if self.silent:
            return None
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault and self.fault.kind == "corrupt" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault and self.fault.kind == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self.hang_up()
        self.wfile.write(body)
        return None

    def route(self) -> None:
        split = urlsplit(self.path)
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if method == self.command and match:
                try:
                    values = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    kind = values.pop("kind", None) or values.pop("prefix", "") or "models"
                    if "repo" in values:
                        values["repo"] = self.visible(values["repo"], name, kind)  # type: ignore[assignment]
                    return getattr(self, f"on_{name}")(**values)  # type: ignore[no-any-return]
                except Answer as refusal:
                    headers = {"X-Error-Message": str(refusal)}
                    if refusal.code:
                        headers["X-Error-Code"] = refusal.code
                    return self.answer(refusal.status, {"error": str(refusal)}, headers)
        return self.answer(404, {"error": f"no such page: {self.command} {split.path}"})

    def user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Answer(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def may_write(self, namespace: str) -> bool:
        user = self.user()
        return user is not None and user.may_write and namespace in (user.name, *user.organisations)

    def visible(self, name: str, route: str, kind: str) -> Repository:
        """The repository, if whoever asks may have it. A private one looks to others as if it were not there."""
        repository = self.hub.repositories.get(name)
        if route in SIGNED and repository is not None:
            return repository
        user = self.user()
        member = user is not None and name.partition("/")[0] in (user.name, *user.organisations)
        if repository is None or (repository.private and not member) or kind != f"{repository.kind}s":
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        if repository.gated and not member and route == "resolve":
            raise Answer(403 if user else 401, "Access to this model is restricted", "GatedRepo")
        if route in WRITING and user is None:
            raise Answer(401, "Invalid username or password.")
        if route in WRITING and not self.may_write(repository.owner):
            raise Answer(403, "You don't have the rights to write to this repository")
        return repository

    def commit_of(self, repo: Repository, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def on_whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in user.organisations]
        self.answer(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token"}})

    def on_create(self) -> None:
        asked = json.loads(self.body)
        user = self.user()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        namespace = asked.get("organization") or user.name
        name = f"{namespace}/{asked['name']}"
        if not self.may_write(namespace):
            raise Answer(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        if name in self.hub.repositories:
            raise Answer(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private", False)
        kind = asked.get("type") or "model"
        if kind == "space" and asked.get("sdk") not in ("gradio", "static"):
            raise Answer(400, "a Space needs an SDK")
        self.hub.repositories[name] = Repository(name, private, kind=kind, sdk=asked.get("sdk") or "")
        self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def on_validate(self) -> None:
        text = json.loads(self.body)["content"]
        if text.startswith("---\n") and "\n---" not in text[4:]:
            return self.answer(400, {"errors": [{"message": "the metadata block is not closed"}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def on_info(self, repo: Repository, revision: str = "main") -> None:
        self.answer(200, repo.info(self.commit_of(repo, revision)))

    def on_refs(self, repo: Repository) -> None:
        self.answer(200, repo.refs())

    def on_tree(self, repo: Repository, revision: str, folder: str) -> None:
        entries = repo.tree(self.commit_of(repo, revision))
        if folder and all(entry["path"] != folder for entry in entries if entry["type"] == "directory"):
            raise Answer(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if "recursive=true" not in urlsplit(self.path).query.lower():
            entries = [entry for entry in entries if entry["path"].rpartition("/")[0] == folder]
        self.answer(200, [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")])

    def on_preupload(self, repo: Repository, revision: str) -> None:
        now = repo.commits[self.commit_of(repo, revision)].files
        ignore = now[".gitignore"].content.decode().split() if ".gitignore" in now else []
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": file["path"] in ignore,
                "oid": now[file["path"]].etag if file["path"] in now else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def on_batch(self, repo: Repository) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs:
                href = f"{self.hub.storage}/lfs/{repo.name}/{wanted['oid']}"
                verify = f"{self.hub.endpoint}/lfs/{repo.name}/{wanted['oid']}/verify"
                found["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(found)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def on_upload(self, repo: Repository, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "the content does not have the digest")
        repo.lfs[oid] = self.body
        self.answer(200, b"", {"ETag": f'"{oid}"'})

    def on_verify(self, repo: Repository, oid: str) -> None:
        if len(repo.lfs.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Answer(404, "the object was not uploaded")
        self.answer(200, {})

    def on_commit(self, repo: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header, operations = lines[0]["value"], lines[1:]
        if revision not in repo.branches:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, repo.branches[revision]):
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile" and value["oid"] not in repo.lfs:
                raise Answer(400, f"the content of {value['path']} was not uploaded")
            if operation["key"] == "file":
                base64.b64decode(value["content"], validate=True)
        sha = repo.apply(revision, header["summary"], operations)
        url = f"{self.hub.endpoint}/{repo.name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def on_tag(self, repo: Repository, revision: str) -> None:
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Answer(409, "Tag reference exists already")
        repo.tags[name] = self.commit_of(repo, revision)
        self.answer(200, {})

    def on_branch(self, repo: Repository, revision: str) -> None:
        if revision in repo.branches:
            raise Answer(409, "Reference already exists")
        repo.branches[revision] = repo.branches["main"]
        self.answer(200, {})

    def on_settings(self, repo: Repository) -> None:
        asked = json.loads(self.body)
        repo.private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        repo.history.append("made private" if repo.private else "made public")
        self.answer(200, {})

    def on_resolve(self, repo: Repository, revision: str, path: str) -> None:
        commit = self.commit_of(repo, revision)
        blob = repo.commits[commit].files.get(path)
        headers = {"X-Repo-Commit": commit}
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, {"error": "Entry not found"}, headers)
        if blob.large:
            repo.lfs[blob.sha256] = blob.content
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
            headers["Location"] = f"{self.hub.storage}/lfs/{repo.name}/{blob.sha256}"
            return self.answer(302, b"", headers)
        return self.send_content(blob.content, {**headers, "ETag": f'"{blob.etag}"'})

    def on_large(self, repo: Repository, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Answer(400, "a token was sent to the storage")
        self.send_content(repo.lfs[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            part = content[int(wanted[1]) : int(wanted[2] or len(content)) + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
            return self.answer(206, part, headers)
        return self.answer(200, content, headers, length=len(content))

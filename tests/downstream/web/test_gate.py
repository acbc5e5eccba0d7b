"""The gate in front of a small application that answers everything: what gets through, and what does not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from downstream.web.serving import JSON_BYTES, LOCAL_NAMES, Gate


async def answers_everything(scope: Any, receive: Any, send: Any) -> None:
    """Replies with the body that it was sent."""
    body, more = b"", scope["method"] == "POST"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(
    folder: Path,
    path: str,
    body: bytes | None = None,
    host: str = "127.0.0.1:7860",
    length: int | None = None,
    hosts: tuple[str, ...] | None = LOCAL_NAMES,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body. A body makes it a POST, sent in two pieces."""
    headers = [(b"host", host.encode())]
    if body is not None:
        headers.append((b"Content-Length", str(len(body) if length is None else length).encode()))
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": headers}
    content = body or b""
    pieces = [
        {"type": "http.request", "body": content[:5], "more_body": True},
        {"type": "http.request", "body": content[5:]},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Gate(answers_everything, folder, 1000, hosts)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    path = tmp_path / "uploads" / "a1b2" / "photo.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("secret")
    (path.parent / "link.png").symlink_to(tmp_path / "secret.txt")
    return path


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/config", 200),
        ("/assets/index-1.js", 200),
        ("/gradio_api/queue/data", 200),
        ("/gradio_api/heartbeat/abc123", 200),
        ("/docs", 404),
        ("/openapi.json", 404),
        ("/gradio_api/proxy=https://example.org/x", 404),
        ("/gradio_api/dev/reload", 404),
        ("/monitoring", 404),
        ("/gradio_api/file=https://example.org/x.png", 403),
        ("/gradio_api/file=http:/127.0.0.1/x.png", 403),
        ("/gradio_api/file=/etc/passwd", 403),
        ("/gradio_api/file=%2Fetc%2Fpasswd", 403),
        ("/gradio_api/file=photo.png", 403),
        ("/gradio_api/file=/\x00", 403),
    ],
)
def test_only_the_page_s_own_routes_answer(uploaded: Path, path: str, status: int) -> None:
    assert ask(uploaded.parents[1], path)[0] == status


def test_only_uploaded_files_have_names(uploaded: Path) -> None:
    folder = uploaded.parents[1]
    for path, status in (
        (uploaded, 200),
        (folder / "a1b2" / ".." / ".." / "secret.txt", 403),
        (folder / "a1b2" / "link.png", 403),  # a link out of the folder
        (folder, 403),
        (f"{folder}-other/x.png", 403),
    ):
        assert ask(folder, f"/gradio_api/file={path}")[0] == status, path
        body = json.dumps({"data": [[{"path": str(path), "meta": {"_type": "gradio.FileData"}}]]}).encode()
        assert ask(folder, "/gradio_api/queue/join", body)[0] == status, path


@pytest.mark.parametrize("value", ["https://example.org/x.png", "HTTP://example.org", "../x", "", 7, ["a"], {"b": 1}])
def test_a_request_can_name_nothing_else(uploaded: Path, value: object) -> None:
    body = json.dumps({"data": [1, {"deep": [{"path": value}]}]}).encode()
    assert ask(uploaded.parents[1], "/gradio_api/queue/join", body)[0] == 403
    escaped = body.replace(b"http", b"\\u0068ttp").replace(b'"path"', b'"p\\u0061th"')
    assert ask(uploaded.parents[1], "/gradio_api/queue/join", escaped)[0] == 403


def test_a_good_request_passes_unchanged(uploaded: Path) -> None:
    body = json.dumps({"data": [{"path": None}, {"path": str(uploaded)}, 5]}).encode()
    assert ask(uploaded.parents[1], "/gradio_api/queue/join", body)[::2] == (200, body)
    assert ask(uploaded.parents[1], "/gradio_api/upload", b"\x00" * 1000)[::2] == (200, b"\x00" * 1000)


def test_sizes_are_limited_before_anything_is_read(uploaded: Path) -> None:
    folder = uploaded.parents[1]
    assert ask(folder, "/gradio_api/upload", b"x" * 1001)[0] == 413
    assert ask(folder, "/gradio_api/queue/join", b"{}", length=JSON_BYTES + 1)[0] == 413
    assert ask(folder, "/gradio_api/queue/join", b" " * (JSON_BYTES + 1), length=2)[0] == 413  # a false length
    assert ask(folder, "/gradio_api/upload", b"x", length=-1)[0] == 411
    assert ask(folder, "/gradio_api/queue/join", b"not json")[0] == 400
    assert ask(folder, "/gradio_api/queue/join", b"[" * 100_000)[0] == 400


def test_other_names_of_this_machine_are_not_answered(uploaded: Path) -> None:
    folder = uploaded.parents[1]
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert ask(folder, "/", host=host)[0] == 200
    status, headers, _ = ask(folder, "/", host="evil.example:7860")
    assert status == 400
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert ask(folder, "/", host="evil.example", hosts=None)[0] == 200  # a Space has a name of its own


def test_the_page_may_load_nothing_from_elsewhere(uploaded: Path) -> None:
    for path in ("/", "/docs"):
        headers = ask(uploaded.parents[1], path)[1]
        policy = dict(part.split(" ", 1) for part in headers[b"content-security-policy"].decode().split("; "))
        assert policy["default-src"] == "'self'"
        assert not any("http" in value or "*" in value for value in policy.values())
        assert headers[b"x-content-type-options"] == b"nosniff"

"""What stands between the network and Gradio: it lets through what the page needs, and nothing else.

Gradio can fetch any address for a visitor (``/file=https://...``, a file whose "path" is an address) and has many more
routes than this page uses. The gate refuses them, limits the sizes of requests, and forbids the page to load anything
from elsewhere (Content-Security-Policy), so that the demo makes and causes no request to another machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors {ancestors}"
)
API = "/gradio_api"
READABLE = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon|(assets|static|svelte|_app)/.+)?"
    rf"|{API}/(info|startup-events|app_id|queue/data|upload_progress|heartbeat/[A-Za-z0-9]+)/?"
)
WRITABLE = re.compile(rf"{API}/(queue/join|upload|reset|cancel)/?")
JSON_BYTES = 2**20
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


class Refused(Exception):
    """A request that is not answered: HTTP status and a plain reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gate:
    """ASGI middleware. ``folder``: where uploads lie, the only files that a request may name.

    ``hosts``: the Host names that are answered (a foreign page cannot rebind its name to this machine); None = any.
    """

    def __init__(
        self, app: ASGIApp, folder: Path, upload_bytes: int, hosts: tuple[str, ...] | None, ancestors: str = "'self'"
    ) -> None:
        self.app, self.folder, self.upload_bytes, self.hosts = app, folder.resolve(), upload_bytes, hosts
        self.headers = {
            "content-security-policy": POLICY.format(ancestors=ancestors),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no web sockets
            return
        try:
            receive = await self._checked(scope, receive)
        except Refused as refusal:
            response = JSONResponse({"detail": refusal.reason}, refusal.status, self.headers)
            await response(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, with_headers)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise Refused(421, f"this page is not served under the name {host!r}")
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if path.startswith(f"{API}/file="):
                self._check_file(unquote(path.removeprefix(f"{API}/file=")))
            elif not READABLE.fullmatch(path):
                raise Refused(404, "not found")
            return receive
        if method != "POST" or not WRITABLE.fullmatch(path):
            raise Refused(404, "not found")
        upload = path.rstrip("/") == f"{API}/upload"
        limit = self.upload_bytes if upload else JSON_BYTES
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "the length of the request is missing")
        if int(length) > limit:
            raise Refused(413, f"too large: at most {limit / 1e6:.0f} MB at once")
        return receive if upload else await self._checked_json(receive)

    async def _checked_json(self, receive: Receive) -> Receive:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > JSON_BYTES:
                raise Refused(413, "too large")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        for path in _paths(content):
            self._check_file(path)
        messages: Iterator[Message] = iter([{"type": "http.request", "body": body}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return replay

    def _check_file(self, path: object) -> None:
        """Only files in the upload folder have names here: no address, no other folder, no link out of it."""
        try:
            inside = isinstance(path, str) and Path(path).is_absolute() and self.folder in Path(path).resolve().parents
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise Refused(403, "only files that were uploaded here can be named")


def _paths(content: object) -> Iterator[object]:
    """Everything under a key "path", at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value

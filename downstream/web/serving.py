"""Start the demo: load the extractors, listen by default on this machine only, and serve until Ctrl-C.

Gradio can fetch any address for a visitor (``/file=https://...``, a file whose "path" is an address) and has many more
routes than this page uses. The `Gate` refuses them, limits the sizes of requests, and forbids the page to load anything
from elsewhere (Content-Security-Policy), so that the demo makes and causes no request to another machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adpretrain.extractor import ADExtractor
from adpretrain.hub.download import EMBEDDED
from downstream.inspection.inspector import Inspector
from downstream.inspection.run import pick_device
from downstream.terminal import plain
from downstream.web.uploads import LIMITS

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
STYLE = Path(__file__).with_name("style.css")
HUGGING_FACE = "'self' https://huggingface.co https://*.hf.space"


def host_of(given: str | None, environment: Mapping[str, str]) -> str:
    """Return the address to listen on: as given, else all addresses on a Hugging Face Space, else this machine only."""
    return given or (EVERYWHERE if environment.get("SPACE_ID") else LOCAL)


def names_of(extractors: Sequence[str]) -> dict[str, str]:
    """Map a name for the page to each given extractor; the page never gets a path."""
    names: dict[str, str] = {}
    for extractor in dict.fromkeys(extractors):
        name = base = Path(extractor).resolve().name if os.path.isdir(extractor) else extractor
        while name in names:
            name = f"{base} ({sum(other.startswith(base) for other in names) + 1})"
        names[name] = extractor
    return names


def serve(
    extractors: Sequence[str] = (EMBEDDED,),
    host: str | None = None,
    port: int = 7860,
    device: str = "auto",
    products: Sequence[str] = (),
) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Port 0 takes any free port; the address is printed. ``products``: folders
    of saved inspectors, offered before the extractors.

    Raises ValueError for an extractor or inspector that cannot be loaded or a device that cannot be used, and
    OSError if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="adpretrain-demo-") as folder:
        # Gradio reads these when it is imported.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        where = host_of(host, os.environ)
        with listen(where, port) as listener:
            place = pick_device(device)
            models: dict[str, ADExtractor | Inspector] = {
                f"{name}: its own good photographs": Inspector.load(given, place)
                for name, given in names_of(products).items()
            }
            models |= {name: ADExtractor.from_pretrained(given, place) for name, given in names_of(extractors).items()}
            address = f"http://{LOCAL if where == EVERYWHERE else _bracketed(where)}:{listener.getsockname()[1]}"
            if where not in (LOCAL, "localhost", "::1") and "SPACE_ID" not in os.environ:
                message = f"warning: listening on {plain(where)}: everybody who can reach this machine can use the demo"
                print(message, file=sys.stderr, flush=True)
            app = _app(models, place, Path(folder), where)
            run_until_stopped(app, listener, f"demo on {address} (Ctrl-C ends it)")
    print("demo stopped; the uploaded photographs are deleted", flush=True)


def _app(models: Mapping[str, ADExtractor | Inspector], device: object, folder: Path, where: str) -> Gate:
    import gradio as gr
    from fastapi import FastAPI

    from downstream.web.page import Desk, build_page

    # Fonts that are installed on most systems; Gradio's default theme would download one.
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(Desk(models, device, folder)),  # type: ignore[arg-type]
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=LIMITS.file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css_paths=STYLE,
    )
    local = where in (LOCAL, "localhost", "::1")
    ancestors = HUGGING_FACE if "SPACE_ID" in os.environ else "'self'"
    return Gate(app, folder, LIMITS.upload_bytes, LOCAL_NAMES if local else None, ancestors)


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises OSError that names host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from error
    return listener


def run_until_stopped(app: Any, listener: socket.socket, announcement: str) -> None:
    """Serve an ASGI app until Ctrl-C or SIGTERM; print the announcement when it is up."""
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(announcement, flush=True)

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # uvicorn re-raises a signal after its shutdown; the default action would end us before the folder is removed.
    signal.signal(signal.SIGTERM, stop)
    # Open pages hold a stream open, so we do not wait long for them.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws="none")
    with contextlib.suppress(KeyboardInterrupt):
        Announced(config).run(sockets=[listener])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


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
    """A request that is refused, with HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gate:
    """ASGI middleware that refuses requests. A request may only name files in ``folder``, which holds the uploads.

    ``hosts`` are the accepted values of the Host header, which prevents DNS rebinding by foreign pages; None = any.
    """

    def __init__(
        self, app: ASGIApp, folder: Path, upload_bytes: int, hosts: tuple[str, ...] | None, ancestors: str = "'self'"
    ) -> None:
        self.app = TrustedHostMiddleware(app, hosts, www_redirect=False)  # inside, so that its refusals have headers
        self.folder, self.upload_bytes = folder.resolve(), upload_bytes
        self.headers = {
            "content-security-policy": POLICY.format(ancestors=ancestors),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page does not use web sockets
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
        headers = Headers(raw=[(name.lower(), value) for name, value in scope["headers"]])
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
        """Refuse anything but a file in the upload folder: addresses, other folders, links that lead out of it."""
        try:
            inside = isinstance(path, str) and Path(path).is_absolute() and self.folder in Path(path).resolve().parents
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise Refused(403, "only files that were uploaded here can be named")


def _paths(content: object) -> Iterator[object]:
    """Yield every value of a key "path", at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value

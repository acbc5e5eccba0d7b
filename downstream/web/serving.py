"""Start the demo: load the extractors, bind to this machine only, answer until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from adpretrain.extractor import ADExtractor
from adpretrain.hub import EMBEDDED
from downstream.inspection.run import pick_device
from downstream.terminal import plain
from downstream.web.gate import LOCAL_NAMES, Gate
from downstream.web.uploads import LIMITS

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
STYLE = Path(__file__).with_name("style.css")
HUGGING_FACE = "'self' https://huggingface.co https://*.hf.space"


def host_of(given: str | None, environment: Mapping[str, str]) -> str:
    """Where to listen: as given, else everywhere on a Hugging Face Space, else this machine only."""
    return given or (EVERYWHERE if environment.get("SPACE_ID") else LOCAL)


def names_of(extractors: Sequence[str]) -> dict[str, str]:
    """What the page calls each extractor -> what was given. The page never learns a path."""
    names: dict[str, str] = {}
    for extractor in dict.fromkeys(extractors):
        name = base = Path(extractor).resolve().name if os.path.isdir(extractor) else extractor
        while name in names:
            name = f"{base} ({sum(other.startswith(base) for other in names) + 1})"
        names[name] = extractor
    return names


def serve(
    extractors: Sequence[str] = (EMBEDDED,), host: str | None = None, port: int = 7860, device: str = "auto"
) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Port 0 takes any free one; the address is printed.

    Raises ValueError for an extractor that cannot be loaded or a device that cannot be used, and
    OSError if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="adpretrain-demo-") as folder:
        # Gradio reads these when it is imported.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        where = host_of(host, os.environ)
        with _listen(where, port) as listener:
            place = pick_device(device)
            models = {name: ADExtractor.from_pretrained(given, place) for name, given in names_of(extractors).items()}
            address = f"http://{LOCAL if where == EVERYWHERE else _bracketed(where)}:{listener.getsockname()[1]}"
            if where not in (LOCAL, "localhost", "::1") and "SPACE_ID" not in os.environ:
                message = f"warning: listening on {plain(where)}: everybody who reaches this machine can use the demo"
                print(message, file=sys.stderr, flush=True)
            _run(_app(models, place, Path(folder), where), listener, address)
    print("demo stopped; the uploaded photographs are deleted", flush=True)


def _app(models: Mapping[str, ADExtractor], device: object, folder: Path, where: str) -> Gate:
    import gradio as gr
    from fastapi import FastAPI

    from downstream.web.page import Desk, build_page

    # Names of fonts that systems have; Gradio's own theme would fetch one.
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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from error
    return listener


def _run(app: Gate, listener: socket.socket, address: str) -> None:
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"demo on {address} (Ctrl-C ends it)", flush=True)

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # uvicorn hands a signal on when it has shut down; the default action would end us before the folder is removed.
    signal.signal(signal.SIGTERM, stop)
    # Open pages keep a stream open: do not wait long for them.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws="none")
    with contextlib.suppress(KeyboardInterrupt):
        Announced(config).run(sockets=[listener])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

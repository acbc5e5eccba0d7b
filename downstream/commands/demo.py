"""`adpretrain demo`: the inspection page in the browser."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from jsonargparse import ArgumentParser, Namespace


def demo(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Open a page on this machine: drop good photographs and new ones, see scores, verdicts and heatmaps."""
    parser.add_argument(
        "--extractor",
        action="append",
        default=None,
        help='"embedded" (default) or a folder written by save_pretrained; repeat it to offer several',
    )
    parser.add_argument("--port", type=int, default=7860, help="0 takes any free port")
    parser.add_argument(
        "--host", type=str | None, default=None, help="where to listen; default: this machine only (127.0.0.1)"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return _demo


def _demo(options: Namespace) -> int:
    if find_spec("gradio") is None:  # before torch is imported, which takes a while
        raise ValueError("the demo needs gradio: pip install 'adpretrain[demo]'")
    from downstream.web.serving import EMBEDDED, serve

    serve(options.extractor or [EMBEDDED], options.host, options.port, options.device)
    return 0

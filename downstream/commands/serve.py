"""`adpretrain serve` scores photographs that other programs send."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from downstream.commands.options import REPEATED, Command

if TYPE_CHECKING:
    from downstream.inspection.inspector import Inspector


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Score photographs that other programs send by HTTP: the body is a photograph, the answer its verdict as JSON.

    The address / says how to use it; /metrics is for Prometheus. It listens on this machine only unless --host says
    otherwise; then everybody who can reach the machine can use it.

    exit codes:
      0  ended by Ctrl-C or SIGTERM
      2  wrong usage or input

    Args:
        at: the folder of a product, made by adpretrain inspector new; may be repeated, and is served by its name
        host: address to listen on; 0.0.0.0 for all
        port: port to listen on; 0 = any free one, which is printed
        workers: number of photographs scored at a time; as many wait, and more are refused
        upload_megabytes: size of the largest photograph
        weights: local file with the backbone's weights, so that nothing is downloaded
        device: cpu, cuda, cuda:1, mps, or auto
    """

    at: list[str] = field(default_factory=list, metadata=REPEATED)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 2
    upload_megabytes: int = 50
    weights: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.at:
            raise ValueError("needed: --at PRODUCT, a folder made by adpretrain inspector new; may be repeated")
        if self.workers < 1 or self.upload_megabytes < 1:
            raise ValueError(
                f"--workers {self.workers}, --upload-megabytes {self.upload_megabytes}: expected at least 1"
            )

    def run(self) -> int:
        from adpretrain.extras import need

        need("serve", "fastapi", "uvicorn")
        from downstream.inspection.server import Limits, make_app
        from downstream.web.serving import LOCAL_NAMES, listen, run_until_stopped

        limits = Limits(upload_bytes=self.upload_megabytes * 10**6, workers=self.workers)
        inspectors = load_products(self.at, self.device, self.weights)
        local = self.host in ("127.0.0.1", "localhost", "::1")
        app = make_app(inspectors, limits, LOCAL_NAMES if local else None)
        with listen(self.host, self.port) as listener:
            address = f"http://{self.host}:{listener.getsockname()[1]}"
            run_until_stopped(app, listener, f"serving {', '.join(inspectors)} on {address} (Ctrl-C ends it)")
        return 0


def load_products(folders: Sequence[str], device: str, weights: Path | None) -> dict[str, Inspector]:
    """Load the inspectors of several products, by the names of their folders."""
    from downstream.inspection import inspector
    from downstream.inspection.run import pick_device

    found: dict[str, Inspector] = {}
    print(f"loading {', '.join(folders)}", file=sys.stderr, flush=True)
    for folder in folders:
        name = Path(folder).resolve().name
        if name in found:
            raise ValueError(f"two products are named {name}: rename the folder of one")
        found[name] = inspector.Inspector.load(folder, pick_device(device), weights)
    return found

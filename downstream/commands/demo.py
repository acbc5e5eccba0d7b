"""`adpretrain demo` opens the inspection page in the browser."""

from __future__ import annotations

from dataclasses import dataclass, field

from adpretrain.extras import need
from downstream.commands.options import EMBEDDED, REPEATED, Command


@dataclass(frozen=True)
class Demo(Command):
    """Open a web page on this machine: drop good and new photographs, see scores, verdicts and heatmaps.

    Args:
        extractor: "embedded" (default) or a folder written by save_pretrained; repeat the option to offer several
        at: folder of an inspector that adpretrain inspector has made: its good photographs, tiles and inspected region
            are used; repeat the option to offer several
        port: port to listen on; 0 takes any free port
        host: address to listen on; by default only this machine can connect (127.0.0.1)
        device: auto, cpu, cuda, cuda:1, mps
    """

    extractor: list[str] | None = field(default=None, metadata=REPEATED)
    at: list[str] | None = field(default=None, metadata=REPEATED)
    port: int = 7860
    host: str | None = None
    device: str = "auto"

    def run(self) -> int:
        need("demo", "gradio")
        from downstream.web.serving import serve

        serve(self.extractor or [EMBEDDED], self.host, self.port, self.device, self.at or ())
        return 0

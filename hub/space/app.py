"""The demo as a Hugging Face Space. The variable EXTRACTORS names the extractors to offer, separated by commas."""

from __future__ import annotations

import os

from adpretrain.hub.download import EMBEDDED
from downstream.web.serving import serve

if __name__ == "__main__":
    names = [name.strip() for name in os.environ.get("EXTRACTORS", EMBEDDED).split(",")]
    serve([name for name in names if name], port=int(os.environ.get("PORT", "7860")))

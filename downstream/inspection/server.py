"""Inspectors as a service: POST a photograph, get its verdict as JSON.

    POST /products/{name}/score    body: the bytes of a photograph -> verdict with regions
    POST /identify                 body likewise -> the product it is, or null, with the p-value of each
    GET  /products, /healthz, /metrics (Prometheus), /openapi.json, / (how to use it)

No path that a client sends is ever opened: a photograph is the body of a request. At most ``workers`` are scored at a
time and as many wait; more are refused with 503, so that a line sees at once that it is too fast.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from adpretrain import __version__
from adpretrain.photographs import FORMATS
from downstream.inspection.identify import identify
from downstream.inspection.inspector import Inspector
from downstream.inspection.results import UNREADABLE

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # upper bounds of the latency histogram
HOW = """adpretrain serve

Score a photograph:     curl --data-binary @photo.jpg http://{host}/products/{product}/score
Which product is it?    curl --data-binary @photo.jpg http://{host}/identify
Products: {products}
Also: /products, /healthz, /metrics (Prometheus), /openapi.json
"""


@dataclass(frozen=True)
class Limits:
    """Limits of a service: ``upload_bytes`` and ``pixels`` of a photograph, and ``workers`` scored at a time."""

    upload_bytes: int = 50_000_000
    pixels: int = 178_956_970
    workers: int = 2


@dataclass
class Metrics:
    """Counts of verdicts and the latency histogram of one service, as text for Prometheus."""

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    buckets: Counter[float] = field(default_factory=Counter)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, product: str, verdict: str, seconds: float) -> None:
        """Count one scored photograph."""
        with self.lock:
            self.verdicts[product, verdict] += 1
            self.seconds += seconds
            for bound in SECONDS:
                self.buckets[bound] += seconds <= bound

    def text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        with self.lock:
            count = sum(self.verdicts.values())
            lines = ["# TYPE adpretrain_verdicts_total counter"]
            for (product, verdict), number in sorted(self.verdicts.items()):
                labels = f"product={json.dumps(product)},verdict={json.dumps(verdict)}"
                lines.append(f"adpretrain_verdicts_total{{{labels}}} {number}")
            lines.append("# TYPE adpretrain_score_seconds histogram")
            lines += [f'adpretrain_score_seconds_bucket{{le="{bound}"}} {self.buckets[bound]}' for bound in SECONDS]
            lines.append(f'adpretrain_score_seconds_bucket{{le="+Inf"}} {count}')
            return "\n".join(
                [
                    *lines,
                    f"adpretrain_score_seconds_sum {self.seconds:.6f}",
                    f"adpretrain_score_seconds_count {count}",
                    "",
                ]
            )


def make_app(inspectors: Mapping[str, Inspector], limits: Limits, hosts: tuple[str, ...] | None) -> FastAPI:
    """Make the service of these inspectors. ``hosts``: accepted values of the Host header, which keeps foreign web
    pages from using it (DNS rebinding); None = any."""
    app = FastAPI(title="adpretrain", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts) if hosts else ["*"], www_redirect=False)
    metrics, busy = Metrics(), threading.BoundedSemaphore(limits.workers)
    places = threading.BoundedSemaphore(2 * limits.workers)

    async def scored(request: Request, work: Callable[[Image.Image], dict[str, Any]]) -> dict[str, Any]:
        if not places.acquire(blocking=False):
            raise HTTPException(503, "too many photographs at a time: send them more slowly", {"Retry-After": "1"})
        try:
            image = _opened(await _body(request, limits.upload_bytes), limits.pixels)

            def in_turn() -> dict[str, Any]:
                with busy:
                    return work(image)

            return await run_in_threadpool(in_turn)
        finally:
            places.release()

    @app.post("/products/{name}/score")
    async def score(name: str, request: Request) -> dict[str, Any]:
        """Score the photograph in the body."""
        if name not in inspectors:
            raise HTTPException(404, f"no product {name!r}; there are {', '.join(inspectors)}")

        def work(image: Image.Image) -> dict[str, Any]:
            began = time.perf_counter()
            verdict = inspectors[name](image)
            metrics.add(name, verdict.verdict, time.perf_counter() - began)
            return verdict.as_dict()

        found = await scored(request, work)
        if found["verdict"] == UNREADABLE and found["reason"].startswith("cannot read"):
            raise HTTPException(422, found["reason"])
        return found

    @app.post("/identify")
    async def which(request: Request) -> dict[str, Any]:
        """Find the product that the photograph in the body shows."""

        def work(image: Image.Image) -> dict[str, Any]:
            found = identify(inspectors, image)
            return {"product": found.product, "p_values": found.p_values}

        return await scored(request, work)

    @app.get("/products")
    def products() -> list[dict[str, Any]]:
        """List the products and their promises."""
        return [
            {
                "name": name,
                "normal_photographs": len(one.normals),
                "threshold": one.threshold,
                "promised_false_alarm_rate": one.calibration.rate if one.calibration else None,
            }
            for name, one in inspectors.items()
        ]

    @app.get("/healthz", response_class=PlainTextResponse)
    def healthz() -> str:
        """Say that the service is up."""
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    def numbers() -> str:
        """Return counts and latencies for Prometheus."""
        return metrics.text()

    @app.get("/", response_class=PlainTextResponse)
    def how(request: Request) -> str:
        """Say how to use the service."""
        names = list(inspectors)
        return HOW.format(host=request.url.netloc, product=names[0], products=", ".join(names))

    return app


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the photograph has more than {most / 1e6:.0f} MB")
    if not body:
        raise HTTPException(422, "the body is empty: send the bytes of a photograph, curl --data-binary @photo.jpg")
    return bytes(body)


def _opened(body: bytes, pixels: int) -> Image.Image:
    """Open a photograph, whose size is known from its header; it is decoded later."""
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except Exception as error:  # Pillow's plugins raise many kinds of errors
        raise HTTPException(422, f"the body is not a photograph of a known kind ({', '.join(FORMATS)})") from error
    if image.width * image.height > pixels:
        raise HTTPException(413, f"the photograph of {image.width} x {image.height} has more than {pixels} pixels")
    return image

"""The service: verdicts equal to the inspector's, limits, metrics, and the product that a photograph shows."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain import ADExtractor
from downstream.cli import main
from downstream.inspection import Options
from downstream.inspection.identify import identify
from downstream.inspection.inspector import Inspector
from downstream.inspection.set_up import inspector_from_folder

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from downstream.inspection.server import Limits, make_app

SIDE = 64


def photograph(seed: int, wave: float = 7.0) -> Image.Image:
    draw = np.random.default_rng(seed)
    pattern = 120 + 50 * np.sin(np.arange(90) / wave)[None, :, None]
    return Image.fromarray(np.clip(pattern + draw.normal(0, 12, (80, 90, 3)), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two products: wide and narrow stripes."""
    extractor, folders = ADExtractor.from_pretrained("embedded", image_size=SIDE), {}
    for name, wave in (("wide", 7.0), ("narrow", 1.5)):
        good = tmp_path_factory.mktemp(name)
        for number in range(6):
            photograph(number, wave).save(good / f"{number}.png")
        inspector = inspector_from_folder(extractor, torch.device("cpu"), good, options=Options(0.15))
        folders[name] = inspector.save(tmp_path_factory.mktemp("products") / name)
    return folders


@pytest.fixture(scope="module")
def inspectors(products: dict[str, Path]) -> dict[str, Inspector]:
    return {name: Inspector.load(folder) for name, folder in products.items()}


@pytest.fixture
def client(inspectors: dict[str, Inspector]) -> Iterator[TestClient]:
    limits = Limits(upload_bytes=200_000, pixels=500 * 500, workers=2)
    with TestClient(make_app(inspectors, limits, ("testserver",))) as found:
        yield found


def test_a_photograph_gets_the_inspectors_verdict(client: TestClient, inspectors: dict[str, Inspector]) -> None:
    marked = np.array(photograph(50))
    marked[30:50, 40:60] = 255
    for image in (photograph(51), Image.fromarray(marked)):
        answer = client.post("/products/wide/score", content=encoded(image))
        assert answer.status_code == 200
        assert answer.json() == json.loads(json.dumps(inspectors["wide"](image).as_dict()))
    assert answer.json()["verdict"] == "anomalous"
    left, top, right, bottom = answer.json()["regions"][0]["box"]
    assert left < 50 < right
    assert top < 40 < bottom


def test_what_is_wrong_is_refused_with_the_reason(client: TestClient) -> None:
    good = encoded(photograph(1))
    cases = [
        ("/products/none/score", good, 404, "there are wide, narrow"),
        ("/products/wide/score", b"", 422, "body is empty"),
        ("/products/wide/score", b"no photograph", 422, "not a photograph of a known kind"),
        ("/products/wide/score", good[:3000], 422, "cannot read"),
        ("/products/wide/score", os.urandom(200_001), 413, "more than 0 MB"),
        ("/products/wide/score", encoded(Image.new("L", (600, 600))), 413, "more than 250000 pixels"),
    ]
    for path, body, status, reason in cases:
        answer = client.post(path, content=body)
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/products/wide/score").status_code == 405


def test_products_metrics_and_the_page(client: TestClient, inspectors: dict[str, Inspector]) -> None:
    client.post("/products/narrow/score", content=encoded(photograph(60, 1.5)))
    listed = client.get("/products").json()
    assert [(one["name"], one["threshold"]) for one in listed] == [(n, i.threshold) for n, i in inspectors.items()]
    assert client.get("/healthz").text == "ok\n"
    lines = client.get("/metrics").text.splitlines()
    assert any(line.startswith('adpretrain_verdicts_total{product="narrow",verdict=') for line in lines)
    counts = [int(line.split()[-1]) for line in lines if "bucket" in line]
    assert counts == sorted(counts)
    assert counts[-1] == 1
    assert "curl --data-binary @photo.jpg http://testserver/products/wide/score" in client.get("/").text
    assert "/products/{name}/score" in client.get("/openapi.json").json()["paths"]


def test_too_many_at_a_time_are_refused(inspectors: dict[str, Inspector]) -> None:
    slow = Limits(workers=1)
    body = encoded(photograph(3).resize((1600, 1400)))
    with TestClient(make_app(inspectors, slow, None)) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.post("/products/wide/score", content=body).status_code, range(24)))
    assert set(answers) <= {200, 503}
    assert 200 in answers


def test_the_product_is_known(inspectors: dict[str, Inspector], client: TestClient) -> None:
    found = [identify(inspectors, photograph(70 + number, 7.0 if number % 2 else 1.5)).product for number in range(10)]
    right = ["wide" if number % 2 else "narrow" for number in range(10)]
    # Each is called unlike its own product with a probability of at most 1 / 7, and never taken for the other one.
    assert all(one in (own, None) for one, own in zip(found, right, strict=True))
    assert sum(one == own for one, own in zip(found, right, strict=True)) >= 6
    other = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8))
    assert identify(inspectors, other).product is None
    answer = client.post("/identify", content=encoded(photograph(72, 1.5))).json()
    assert answer["product"] == identify(inspectors, photograph(72, 1.5)).product
    assert answer["p_values"].keys() == inspectors.keys()
    with pytest.raises(ValueError, match="no inspector to ask"):
        identify({}, other)


def test_identify_on_the_console(products: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "line").mkdir()
    for number, wave in enumerate((7.0, 1.5)):
        photograph(0, wave).rotate(0).save(tmp_path / "line" / f"{number}.png")  # copies of good photographs
    at = [f"--at={folder}" for folder in products.values()]
    assert main(["identify", *at, "--images", str(tmp_path / "line"), "--out", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out.splitlines() == ["wide  0.png", "narrow  1.png"]
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "path,product,wide,narrow"
    assert main(["identify", at[0], "--images", str(tmp_path / "line")]) == 2


def load(products: dict[str, Path], seconds: float, clients: int) -> None:
    """A real server with several clients: no error, and memory that does not grow."""
    code = "import sys; from downstream.cli import main; sys.exit(main())"
    arguments = ["serve", "--at", str(products["wide"]), "--port", "0", "--device", "cpu", "--workers", str(clients)]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" on ")[1].split()[0]
            body, end, taken = encoded(photograph(5), "JPEG"), time.monotonic() + seconds, list[float]()

            def client(_: int) -> None:
                while time.monotonic() < end:
                    began = time.perf_counter()
                    request = urllib.request.Request(f"{address}/products/wide/score", data=body)
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        assert json.load(answer)["verdict"] in ("normal", "anomalous")
                    taken.append(time.perf_counter() - began)

            def memory() -> int:
                text = Path(f"/proc/{server.pid}/status").read_text()
                return int(text.split("VmRSS:")[1].split()[0])

            with ThreadPoolExecutor(clients) as pool:
                running = pool.map(client, range(clients))
                time.sleep(seconds / 3)
                early = memory()
                list(running)
            assert memory() < 1.15 * early + 50_000  # KiB
            taken.sort()
            p50, p99 = (taken[int(len(taken) * share)] for share in (0.5, 0.99))
            print(f"{clients} clients, {len(taken)} photographs in {seconds:.0f} s, p50 {p50:.3f} s, p99 {p99:.3f} s")
            assert taken
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0


def test_a_server_under_load(products: dict[str, Path]) -> None:
    load(products, 5, 4)


@pytest.mark.long
def test_a_server_under_load_for_two_minutes(products: dict[str, Path]) -> None:
    load(products, 120, 8)

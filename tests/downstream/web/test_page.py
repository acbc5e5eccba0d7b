"""The page in a headless Chromium: upload, score, choose, move the controls, download; nothing leaves this machine."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from browser import CHROMIUM, Browser, chromium
from demo_process import Server
from test_uploads import png_bomb

from adpretrain.extractor import ADExtractor
from downstream.web.session import Verdicts, score_uploads, verdicts
from downstream.web.uploads import uploads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the demo's page is not driven"),
]
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2<.png'
ROWS = """[...document.querySelectorAll('#ad-table tr[data-place]')].map(row =>
    [row.querySelector('.ad-name span:last-child span').innerText, row.querySelector('.ad-badge').innerText])"""


@pytest.fixture
def browser(server: Server, tmp_path: Path) -> Iterator[Browser]:
    """A visitor on the page. Afterwards: no request left this machine, and no script failed."""
    with chromium(tmp_path / "browser") as one:
        one.open(server.address)
        one.until("!!document.querySelector('#ad-score-button') && document.readyState === 'complete'")
        yield one
        elsewhere = [url for url in one.requests if urlsplit(url).scheme not in ("data", "blob", "chrome")]
        assert len(elsewhere) > 10, "the requests were not noted"
        assert [url for url in elsewhere if urlsplit(url).hostname != "127.0.0.1"] == []
        assert one.errors == []


def drop(browser: Browser, field: str, files: list[Path]) -> None:
    browser.upload(f"#{field} input[type=file]", files)
    browser.until(f"document.querySelectorAll('#{field} .file-preview tr.file').length === {len(files)}")


def shown(found: Verdicts) -> list[list[str]]:
    signs = {"anomalous": "▲", "normal": "✓", "unreadable": "✕", "undecided": "?"}
    ranked = [found.results[place] for place in found.ranked()]
    return [[result.path, f"{signs[result.verdict]} {result.verdict}"] for result in ranked]


def downloaded(browser: Browser, table: Path) -> list[dict[str, str]]:
    browser.click("#ad-csv a, #ad-csv")
    deadline = time.monotonic() + 120
    while not table.exists() and time.monotonic() < deadline:
        browser.run("1")
        time.sleep(0.1)
    return list(csv.DictReader(table.open(encoding="utf-8")))


def test_a_visitor_scores_photographs(
    browser: Browser, extractor_dir: Path, write_tiles: Callable[..., Path], tmp_path: Path
) -> None:
    good = sorted(write_tiles("good", range(5)).iterdir())
    folder = write_tiles("new", range(10, 16))
    write_tiles("new", range(20, 22), blob=True, prefix="blob")
    (folder / "tile_10.png").rename(folder / EVIL)
    (folder / "note.png").write_text("a text file under another name")
    (folder / "bomb.png").write_bytes(png_bomb(60_000, 60_000))
    new = sorted(folder.iterdir())
    drop(browser, "ad-good", good)
    drop(browser, "ad-new", new)
    browser.click("#ad-score-button")
    browser.until("document.querySelectorAll('#ad-table tr[data-place]').length === 10")

    # The page says what the functions say.
    scored = score_uploads(ADExtractor.from_pretrained(extractor_dir), torch.device("cpu"), uploads(good), uploads(new))
    names = {row[0] for row in browser.run(ROWS)}
    (evil,) = names - {upload.name for upload in uploads(new)}  # Gradio cleans names in its own way before us
    expected = [[evil if "onerror" in name else name, badge] for name, badge in shown(verdicts(scored, 0.05))]
    assert browser.run(ROWS) == expected
    assert [badge for name, badge in expected if name.startswith("blob")] == ["▲ anomalous"] * 2
    assert "the content is not a photograph" in browser.text("#ad-table")
    assert "far too large" in browser.text("#ad-table")
    assert "5 normal photographs cannot promise a false-alarm rate of 5 %" in browser.text("#ad-notes")
    assert browser.run("document.title") == "Visual inspection from a few good photographs"  # no script of a name ran
    assert browser.run("document.querySelectorAll('#ad-results script, #ad-results [onerror]').length") == 0

    # Another rate: other verdicts at once, and no photograph is scored again.
    before = browser.text("#ad-threshold")
    browser.slide("#ad-rate-slider input[type=range]", 50)
    browser.until(f"document.querySelector('#ad-threshold').innerText !== {json.dumps(before)}")
    relaxed = verdicts(scored, 0.5)
    assert browser.run(ROWS) == [[evil if "onerror" in name else name, badge] for name, badge in shown(relaxed)]
    assert relaxed.threshold < verdicts(scored, 0.05).threshold
    assert browser.text("#ad-threshold") == f"{relaxed.threshold:.4g}"
    assert browser.text("#ad-rate").split() == ["50", "%"]

    # A click chooses an image; the slider blends its heatmap in the browser itself.
    quiet = next(place for place, shot in enumerate(scored.shots) if shot.name == "tile_13.png")
    browser.click(f"#ad-table tr[data-place='{quiet}']")
    browser.until(f"document.querySelector('.ad-viewer').dataset.place === '{quiet}'")
    assert "tile_13.png" in browser.text(".ad-viewer figcaption")
    browser.until("[...document.querySelectorAll('.ad-viewer img')].every(image => image.naturalWidth > 0)")
    asked = len(browser.requests)
    for strength in (30, 0, 100):
        browser.slide("#ad-strength input[type=range]", strength)
        browser.until(f"+getComputedStyle(document.querySelector('.ad-heat')).opacity === {strength / 100}")
    assert [url for url in browser.requests[asked:] if not url.startswith("data:")] == []

    rows = downloaded(browser, tmp_path / "browser" / "scores.csv")
    assert [row["verdict"] for row in rows] == [result.verdict for result in relaxed.results]
    scores = [float(row["score"] or "nan") for row in rows]
    told = [math.nan if result.score is None else result.score for result in relaxed.results]
    assert scores == pytest.approx(told, rel=1e-4, nan_ok=True)


def test_one_click_shows_drawn_samples(browser: Browser) -> None:
    browser.click("#ad-sample-button")
    browser.until("document.querySelectorAll('#ad-table tr[data-place]').length === 8")
    assert browser.run("document.querySelectorAll('#ad-good .file-preview tr.file').length") == 8
    assert "part_4_specks.jpg" in browser.text("#ad-table")
    assert browser.run("document.querySelector('.ad-viewer img').naturalWidth") == 384
    for width in (1280, 420):
        browser.resize(width, 900)
        browser.until(f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}")


def test_mistakes_are_told_in_plain_words(browser: Browser, write_tiles: Callable[..., Path]) -> None:
    # The page draws its button before it listens to it, and a click in between is lost: click until it answers.
    browser.until("""new Promise(done => {
        document.querySelector('#ad-score-button').click();
        const told = () => document.body.innerText.includes('First drop 1 to 8 photographs of good products');
        setTimeout(() => done(told()), 2000);
    })""")
    drop(browser, "ad-good", sorted(write_tiles("good", range(9)).iterdir()))
    drop(browser, "ad-new", sorted(write_tiles("new", range(2)).iterdir()))
    browser.click("#ad-score-button")
    browser.until("document.body.innerText.includes('9 good photographs are too many for this page')")


def test_tiles_of_a_visitor(browser: Browser, write_tiles: Callable[..., Path]) -> None:
    """What is typed below the fields reaches the scoring."""
    drop(browser, "ad-good", sorted(write_tiles("good", range(3)).iterdir()))
    drop(browser, "ad-new", sorted(write_tiles("new", range(2)).iterdir()))
    browser.click("#ad-setup button")
    browser.until("!!document.querySelector('#ad-tile input')")
    browser.slide("#ad-tile input", 5000)
    browser.click("#ad-score-button")
    browser.until("document.body.innerText.includes('smaller than a tile of 5000')")


def test_a_script_of_the_page_cannot_call_home(server: Server, tmp_path: Path) -> None:
    with chromium(tmp_path / "browser") as browser:
        browser.open(server.address)
        browser.until("!!document.querySelector('#ad-score-button')")
        call = "fetch('{}').then(answer => answer.status, () => 'refused')"
        assert browser.run(call.format("/config")) == 200
        assert browser.run(call.format(f"http://localhost:{server.port}/config")) == "refused"  # another origin
        browser.until(
            "new Promise(done => { const i = new Image(); i.onload = i.onerror = () => done(1);"
            f"i.src = 'http://localhost:{server.port}/favicon.ico'; }})"
        )
        assert any("Content Security Policy" in error for error in browser.errors)

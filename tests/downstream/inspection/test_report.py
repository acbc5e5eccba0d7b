"""The report in a real browser: no name is executed, sorting and filters work, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.inspection.entry import Entry
from downstream.inspection.findings import Finding
from downstream.inspection.report import Fact, write_report
from downstream.inspection.results import ANOMALOUS, NORMAL, UNREADABLE, Result
from downstream.inspection.tally import Tally
from downstream.visualise import ColourScale, panel, save_png

EVIL = '<img src=x onerror="document.title=1">{{facts}}&amp;\'.png'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the report is not driven")

RESULTS = [
    Result("b/tile10.png", 0.5, 0.6, NORMAL, "heatmaps/b_tile10.png"),
    Result("b/tile9.png", 2.5, 0.2, ANOMALOUS, "heatmaps/b_tile9.png", regions=24),
    Result(EVIL, 1.5, 0.4, ANOMALOUS, "heatmaps/evil.png", regions=0),
    Result("a/cut.png", None, None, UNREADABLE, reason="cannot read <b>a/cut.png</b>"),
]


def make_report(folder: Path, budget: int = 2**20, most: int = 4) -> Path:
    (folder / "heatmaps").mkdir(exist_ok=True)
    for result in RESULTS:
        if result.heatmap:
            photo = Image.new("RGB", (60, 40), (90, 120, 150))
            save_png(panel(photo, np.zeros((8, 8)), ColourScale(0, 1, 2), title="t"), folder / result.heatmap)
    path = folder / "report.html"
    sizes = [(2048.4, 5.121)] + [(64.0, None)] * 23
    findings = [
        Finding("b/tile9.png", number, 0, 0, 9, 9, px, mm2, 3.25 - number / 100, 1.0, 4, 4, (0, 81))
        for number, (px, mm2) in enumerate(sizes, start=1)
    ]
    facts = [Fact("Extractor", "<script>document.title=2</script>", "a & b")]
    texts = ("T", "<u>w</u>", facts, ["few <i>photos</i>"], 1.0, [0.3, 0.7], "made by us")
    tally = Tally(most=most)
    for result in RESULTS:
        tally.add(Entry(result, (60, 40), tuple(one for one in findings if one.path == result.path)))
    write_report(path, tally, *texts, budget=budget, in_brief="2 look <b>bad</b>.")
    return path


class Elements(HTMLParser):
    """Every tag with its attributes, and the visible names in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def cards(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "li" and "data-name" in attributes]


def dump(url: str, profile: Path) -> str:
    """The page's DOM after its scripts ran."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=3000"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    page = make_report(tmp_path).read_text(encoding="utf-8")
    elements = Elements(page)
    assert elements.cards()[2]["data-name"] == EVIL  # whole, as text, placeholder included
    assert not any("onerror" in attributes for _, attributes in elements.tags)
    assert [tag for tag, _ in elements.tags].count("script") == 1
    assert not any(tag == "u" for tag, _ in elements.tags)
    assert '<p class="brief">2 look &lt;b&gt;bad&lt;/b&gt;.</p>' in page
    assert "<span>24 regions</span>" in page
    assert "<span>no region</span>" in page
    assert "few &lt;i&gt;photos&lt;/i&gt;" in page
    assert "p: share of the normal photographs, and the image itself" in page  # what the cards' p is
    assert "cannot read &lt;b&gt;a/cut.png" in page


def test_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    page = make_report(tmp_path).read_text(encoding="utf-8")
    for tag, attributes in Elements(page).tags:
        for source in (attributes.get("src"), attributes.get("href")):
            assert not source or source.startswith(("data:image/jpeg;base64,", "heatmaps/")), (tag, source)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page


def test_beyond_the_budget_pictures_are_linked(tmp_path: Path) -> None:
    page = make_report(tmp_path, budget=1).read_text(encoding="utf-8")
    sources = [attributes["src"] or "" for tag, attributes in Elements(page).tags if tag == "img"]
    assert [source.startswith("data:") for source in sources] == [False, True, True, False]  # the highest score's pair
    assert [sources[0], sources[3]] == ["heatmaps/b_tile10.png", "heatmaps/evil.png"]
    assert "The 1 highest scores have their pictures in this page, 2 others beside it" in page


@needs_chromium
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("", ["b/tile9.png", EVIL, "b/tile10.png", "a/cut.png"]),  # highest score first, numberless last
        ("#sort=score&order=asc", ["b/tile10.png", EVIL, "b/tile9.png", "a/cut.png"]),
        ("#sort=p", ["b/tile9.png", EVIL, "b/tile10.png", "a/cut.png"]),
        ("#sort=verdict&order=asc", ["b/tile10.png", "a/cut.png", "b/tile9.png", EVIL]),
        ("#sort=name&find=TILE", ["b/tile9.png", "b/tile10.png"]),  # 9 before 10
        ("#verdict=unreadable", ["a/cut.png"]),
        ("#sort=__proto__&verdict=nonsense", ["b/tile9.png", EVIL, "b/tile10.png", "a/cut.png"]),
    ],
)
def test_sorting_and_filtering_in_the_browser(tmp_path: Path, fragment: str, expected: list[str]) -> None:
    page = dump(make_report(tmp_path).as_uri() + fragment, tmp_path / "profile")
    visible = [card["data-name"] for card in Elements(page).cards() if "hidden" not in card]
    assert visible == expected
    assert f"{len(expected)} of 4 shown" in page
    assert "<title>T</title>" in page  # no script from a file name has run


@needs_chromium
def test_an_enlarged_photograph_lists_its_regions(tmp_path: Path) -> None:
    """The largest 20, as many as the picture shows; those of another photograph vanish when it is left."""
    path, listed = make_report(tmp_path), []
    script = "document.querySelector('[data-name=\"b/tile9.png\"] .look').click();"
    for steps in ("", "byId('next').click();"):
        probe = (
            "document.body.dataset.listed = [...document.querySelectorAll('#zoom-regions tr')].map(row => "
            "[...row.children].map(cell => cell.innerText).join()).join(';');"
        )
        text = path.read_text(encoding="utf-8").replace("\nrestore();\n", f"\nrestore();{script}{steps}{probe}\n")
        (tmp_path / "open.html").write_text(text, encoding="utf-8")
        page = dump((tmp_path / "open.html").as_uri(), tmp_path / "profile")
        listed.append(re.findall('data-listed="(.*?)"', page)[0].split(";"))
    assert listed[0][:3] == ["Region,Area,Peak", "1,5.12 mm²,3.24", "2,64 px,3.23"]
    assert listed[0][-2:] == ["20,64 px,3.05", "and 4 more in regions.csv"]
    assert listed[1] == [""]


@needs_chromium
def test_linked_pictures_load_from_a_folder(tmp_path: Path) -> None:
    path = make_report(tmp_path, budget=0)
    # A probe beside the page's own script reports how wide the browser found each linked picture.
    probe = (
        "<script>addEventListener('load', () => document.body.dataset.widths = "
        "[...document.querySelectorAll('#grid img')].map(image => (image.loading = 'eager', "
        "image.naturalWidth)).join())</script></body>"
    )
    text = path.read_text(encoding="utf-8").replace("</body>", probe).replace(' loading="lazy"', "")
    path.write_text(text, encoding="utf-8")
    assert 'data-widths="144,144,144"' in dump(path.as_uri(), tmp_path / "profile")

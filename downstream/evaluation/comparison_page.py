"""One self-contained HTML page about an evaluation: tables, curves, histograms and maps; no script, no network.

It looks like the report of `adpretrain score` and takes its style from there. All pictures are inlined, and everything
that comes from names or messages is escaped.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from adpretrain.files import atomic_path
from downstream.evaluation import plots
from downstream.evaluation.tables import MAIN, TITLES, all_notes, number, products_table, summarise, summary_table
from downstream.inspection.photos import printable
from downstream.inspection.report import Fact, jpeg
from downstream.visualise import COLORMAP

MOST_PRODUCTS = 40  # whose histograms and maps are shown
MOST_NOTES = 8
SCALE_NOTE = (
    "Heatmap colours: dark is a typical normal pixel, the middle of the scale (outlined) the highest value of any "
    "normal image that was scored, for each detector by itself. The photographs were chosen before anything was "
    "scored: the middle one, by file name, of a kind of defect."
)


def write_comparison(
    folder: Path,
    records: Sequence[dict[str, Any]],
    title: str,
    where: str,
    facts: Sequence[Fact],
    embeddings: Sequence[Path] = (),
    footer: str = "",
) -> Path:
    """Write report.html into an evaluation's folder; pictures are read from there. Returns its path.

    Curves, histograms and maps are those of the last setting's first draw and extractor.
    """
    last = records[-1]["setting"]
    shown = [r for r in records if r["setting"] == last and r["draw"] == 0 and r["extractor"] == 0]
    notes = all_notes(records)
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"and {len(notes) - MOST_NOTES} more notes, in table.md"]
    values = {
        "title": _text(title),
        "style": _style(),
        "where": _text(where),
        "facts": "".join(_tile(fact) for fact in facts),
        "warnings": _warnings(notes),
        "summary": _summary(records),
        "curves": _plot(plots.curves(shown), f"{last}: every curve is the mean of the products' curves."),
        "embeddings": _embeddings(embeddings),
        "tables": _product_tables(records),
        "products": _products(folder, shown),
        "footer": _text(footer),
    }
    template = resources.files("downstream").joinpath("comparison.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _text(text: object) -> str:
    return escape(printable(text), quote=True)


def _tile(fact: Fact) -> str:
    note = f"<small>{_text(fact.note)}</small>" if fact.note else ""
    return f"<div><dt>{_text(fact.name)}</dt><dd>{_text(fact.value)}{note}</dd></div>"


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""


def _style() -> str:
    page = resources.files("downstream").joinpath("report.html").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", page, flags=re.S)
    assert found is not None
    ramp = ",".join(to_hex(colormaps[COLORMAP](at)) for at in np.linspace(0, 1, 9))
    return found[1].replace("{{ramp}}", ramp)


def _summary(records: Sequence[dict[str, Any]]) -> str:
    heading, lines = summary_table(summarise(records))
    body = []
    for line in lines:
        gain = line[2] == "gain over raw"
        body.append(_line(line, 3, "gain" if gain else "", coloured=gain))
    return _table(heading, body, 3)


def _product_tables(records: Sequence[dict[str, Any]]) -> str:
    parts: list[str] = []
    for setting in dict.fromkeys(record["setting"] for record in records):
        for metric in MAIN:
            heading, lines = products_table(records, metric, setting)
            text = [[str(line[0]), *(number(value) for value in line[1:])] for line in lines]
            body = [_line(line, 1, "mean" if index == len(text) - 1 else "") for index, line in enumerate(text)]
            name = _text(f"{TITLES[metric]} in %, {setting}")
            parts.append(
                f"<details{' open' if not parts else ''}><summary>{name}</summary>"
                f'<div class="scroll">{_table(heading, body, 1)}</div></details>'
            )
    return "".join(parts)


def _table(heading: Sequence[str], body: Sequence[str], texts: int) -> str:
    cells = "".join(f"<th{_kind(index, texts)}>{_text(name)}</th>" for index, name in enumerate(heading))
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _line(cells: Sequence[str], texts: int, kind: str = "", coloured: bool = False) -> str:
    out = []
    for index, cell in enumerate(cells):
        look = _kind(index, texts)
        if coloured and index >= texts and cell[:1] in "+-" and cell.strip("+-0."):
            look = f' class="{"up" if cell[0] == "+" else "down"}"'
        out.append(f"<td{look}>{_text(cell)}</td>")
    return f'<tr class="{kind}">{"".join(out)}</tr>'


def _kind(index: int, texts: int) -> str:
    return ' class="text"' if index < texts else ""


def _products(folder: Path, shown: Sequence[dict[str, Any]]) -> str:
    products = sorted({record["product"] for record in shown})
    parts: list[str] = []
    for product in products[:MOST_PRODUCTS]:
        records = [record for record in shown if record["product"] == product]
        inner = _plot(plots.histograms(records), "Image scores, each detector in its own unit.") + _maps(
            folder, records
        )
        opened = " open" if not parts else ""
        parts.append(f"<details{opened}><summary>{_text(product)}</summary>{inner}</details>")
    if len(products) > MOST_PRODUCTS:
        parts.append(f"<p>{len(products) - MOST_PRODUCTS} more products are in the tables only.</p>")
    return "".join(parts) + f"<p><small>{_text(SCALE_NOTE)}</small></p>"


def _maps(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    """For every photograph shown: itself, the marked defect, and each contender's heatmap."""
    images: dict[str, dict[str, Any]] = {}
    for record in records:
        for entry in record["pictures"]:
            group = images.setdefault(entry["number"], {**entry, "maps": []})
            group["maps"].append((f"{record['detector']}, {record['features']}", entry["map"]))
    parts: list[str] = []
    for group in images.values():
        base = folder / group["folder"]
        pictures = [("photograph", "photograph"), ("marked defect", "truth"), *group["maps"]]
        figures = "".join(_picture(base / f"{group['number']}-{name}.png", caption) for caption, name in pictures)
        parts.append(f'<h3>{_text(group["defect"])}: {_text(group["image"])}</h3><div class="maps">{figures}</div>')
    return "".join(parts)


def _embeddings(paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    figures = "".join(_plot(path.read_bytes(), "The same patches of the last level's features.") for path in paths)
    return f'<section class="panel"><h2>Patch features in two dimensions</h2>{figures}</section>'


def _plot(content: bytes, caption: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return (
        f'<figure class="plot-image"><img src="{source}" alt="{_text(caption)}"></figure>'
        f"<figcaption>{_text(caption)}</figcaption>"
    )


def _picture(path: Path, caption: str) -> str:
    with Image.open(path) as picture:
        source = "data:image/jpeg;base64," + base64.b64encode(jpeg(picture.convert("RGB"))).decode("ascii")
    return f'<figure><img src="{source}" alt="{_text(caption)}"><figcaption>{_text(caption)}</figcaption></figure>'
